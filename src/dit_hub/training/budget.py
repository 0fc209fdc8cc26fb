"""What a recipe will take before it is run: steps, hours, memory, and where that lands beside the paper's training."""

import contextlib
import itertools
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..configuration_dit import DiTConfig
from ..flops import matmul_peak, measure
from ..paper import BATCH_SIZE, IMAGES, STEPS, paper_sizes
from .data import Dataset, InMemoryImages
from .loader import open_dataset
from .loop import train
from .memory import TrainingMemory, settings_that_fit, training_memory
from .monitor import Progress, make_accelerator
from .recipe import Recipe
from .setup import check_fit, load_start, make_model

# Steps that are taken to measure one, the first of which are not counted.
_MEASURED, _WARM_UP = 6, 2

# The share of the peak that a first guess of the time of a step takes for granted, and the seconds that measuring may
# take by that guess; beyond them a smaller model is measured.
_ASSUMED_MFU, _PATIENCE = 0.4, 30

# The smaller model's layers.
_LAYERS = 2

_PAPERS_IMAGES = STEPS * BATCH_SIZE


@dataclass(frozen=True)
class Budget:
    """What a training run takes.

    Args:
        steps, batch_size: optimizer steps, and images in each, over all processes.
        data: images in the data set; None where the data are not here.
        parameters, gmacs: of the model, as `dit_hub.flops.measure` counts them.
        step_seconds: of one step.
        how: how that was found, for people.
        memory: of one process.
        device: where training would run, such as "cuda".
        room: bytes of memory of that device; of a processor, those that are free.
        fits: settings that make it fit, with their memory; empty where it fits as it is, or nothing helps.
        starts_anew: whether the model is new; a trained one is not compared with the paper's.
    """

    steps: int
    batch_size: int
    data: int | None
    parameters: int
    gmacs: float
    step_seconds: float
    how: str
    memory: TrainingMemory
    device: str
    room: int
    fits: list[tuple[dict[str, Any], TrainingMemory]]
    starts_anew: bool = True

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def images(self) -> int:
        """Images seen in all, each as often as it is seen."""
        return self.steps * self.batch_size

    @property
    def passes(self) -> float | None:
        """Passes over the data; None where the data are not here."""
        return None if self.data is None else self.images / self.data

    @property
    def compute(self) -> float:
        """10^9 multiply-accumulates in all: three forward passes an image (paper, Figure 9)."""
        return 3 * self.gmacs * self.images

    @property
    def warning(self) -> str:
        """A sentence where training is too short for the paper's claims to show, or ""."""
        return short_training(self.steps, self.batch_size, self.data) if self.starts_anew else ""

    @property
    def landing(self) -> str:
        """Where this lands beside the paper's twelve models, in a sentence."""
        least, *others = sorted(paper_sizes(), key=lambda model: model.gmacs)
        reached = [model for model in (least, *others) if 3 * model.gmacs * _PAPERS_IMAGES <= 1.01 * self.compute]
        share = f"{self.images / _PAPERS_IMAGES:.1%} of the images that the paper's models see in {STEPS:,} steps"
        if not reached:
            part = self.compute / (3 * least.gmacs * _PAPERS_IMAGES)
            return f"{share}; {part:.2g} of the compute of its smallest, {least.model} (FID {least.fid})."
        return f"{share}; at least the compute of {reached[-1].model} there, which has an FID of {reached[-1].fid}."

    def lines(self) -> list[tuple[str, str]]:
        """What training takes, as names and values to print."""
        passes = "" if self.passes is None else f", {_plain(self.passes)} passes over {self.data:,}"
        landing = [("beside the paper", self.landing)] if self.starts_anew else []
        return [
            ("model", f"{self.parameters:,} parameters, {self.gmacs:.4g} GMACs an image"),
            ("steps", f"{self.steps:,} of {self.batch_size} images"),
            ("images seen", f"{self.images:,}{passes}"),
            ("a step", f"{self.step_seconds:.3g} s on {self.device}, {self.how}"),
            ("in all", _duration(self.step_seconds * self.steps)),
            *landing,
        ]

    def advice(self) -> list[str]:
        """Sentences about training that is too short, or takes more memory than there is."""
        sentences = [f"Warning: {self.warning}"] if self.warning else []
        if self.memory.total > self.room:
            sentences.append(
                f"This takes {self.memory.total / 1e9:.1f} GB, more than the {self.room / 1e9:.1f} GB of {self.device}."
            )
            options = [" ".join(f"{name}={str(value).lower()}" for name, value in settings.items())
                       + f" ({memory.total / 1e9:.1f} GB)" for settings, memory in self.fits]  # fmt: skip
            sentences.append(f"It fits with {', or with '.join(options)}." if options else
                             "No setting makes it fit; take a smaller model, more processes with fsdp=true, or "
                             "low-rank adapters.")  # fmt: skip
        return sentences


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:,.1f} hours" + (f", {seconds / 86400:,.1f} days" if seconds > 2 * 86400 else "")


def _plain(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def short_training(steps: int, batch_size: int, data: int | None) -> str:
    """A sentence where a run sees fewer images, and makes fewer passes over its data, than the paper's; else ""."""
    images = steps * batch_size
    passes = None if data is None else images / data
    if images >= _PAPERS_IMAGES or (passes is not None and passes >= math.floor(_PAPERS_IMAGES / IMAGES)):
        return ""
    seen = f"{steps:,} steps of {batch_size} are {images:,} images" + (f", {_plain(passes)} passes" if passes else "")
    return (f"{seen}; the paper shows its claims after {STEPS:,} steps of {BATCH_SIZE}, {_PAPERS_IMAGES:,} images in "
            f"{_PAPERS_IMAGES / IMAGES:.0f} passes. After less, models may not differ as it says.")  # fmt: skip


def plan_budget(recipe: Recipe) -> Budget:
    """Find out what training with a recipe takes. Nothing is written, and the data are not downloaded.

    A few steps are taken with the data and the model, or where that would take long, or more memory than there is,
    with fewer of its layers and a smaller batch. Where the data are not here, zeros stand in for them.

    Raises:
        ValueError: as `train` does; or the data are not here, and the recipe counts epochs rather than steps.
    """
    # What is not needed for a step, or would write; a decoder need not be here yet.
    recipe = replace(recipe, tracker="none", push_to_hub="", save_every=0, sample_every=0, vae="")
    accelerator = make_accelerator(recipe, None)
    base = load_start(recipe.init_from) if recipe.init_from else None
    config: Any = recipe.config if base is None else base.transformer.config
    dataset, here = _open(recipe, config)
    if not here:
        recipe = replace(recipe, num_workers=0)
    with torch.device("meta") if base is None else contextlib.nullcontext():
        model = make_model(recipe, dataset, base)
    processes = accelerator.num_processes
    check_fit(recipe, model, dataset, processes, base)
    memory, room = training_memory(recipe, model, processes), device_memory(accelerator.device)
    fits = settings_that_fit(recipe, model, processes, room) if memory.total > room else []
    seconds, how = _step_seconds(recipe, model.config, dataset, accelerator, memory.total <= room)
    parameters, gmacs = measure(model.config)
    steps = recipe.steps or recipe.epochs * (len(dataset) // recipe.batch_size)
    how, data = (how, len(dataset)) if here else (f"{how}, without the data", None)
    place = accelerator.device.type
    return Budget(steps, recipe.batch_size, data, parameters, gmacs, seconds, how, memory, place, room,
                  fits, base is None)  # fmt: skip


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or those that are free on a machine without one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def _open(recipe: Recipe, config: DiTConfig) -> tuple[Dataset, bool]:
    """The recipe's data, and whether they are here: else zeros of their shape, enough for a batch."""
    name = recipe.data
    if name in ("shapes", "digits") or Path(name.removeprefix("hf:") or "/").exists():
        side = config.sample_height_width[0]
        return open_dataset(name, side, recipe.images_per_class, recipe.seed, recipe.streaming), True
    if not recipe.steps:
        raise ValueError(f"The data {name!r} are not here, so that {recipe.epochs} epochs have no number of steps; set "
                         "steps, or data.")  # fmt: skip
    images = torch.zeros(recipe.batch_size, config.in_channels, *config.sample_height_width)
    names = {index: str(index) for index in range(config.num_classes)}
    return InMemoryImages(images, torch.zeros(len(images), dtype=torch.long), names, "", ""), False


def _step_seconds(
    recipe: Recipe, config: Any, dataset: Dataset, accelerator: Accelerator, fits: bool
) -> tuple[float, str]:
    """Seconds of a step, and how they were found."""
    fields = {name: getattr(config, name) for name in DiTConfig.__annotations__}
    shallow = {**fields, "num_hidden_layers": min(_LAYERS, config.num_hidden_layers)}
    gmacs, few_gmacs = measure(config).gmacs, measure(DiTConfig(**shallow)).gmacs
    images = _PATIENCE / _MEASURED * _first_guess(recipe, accelerator)  # that a step may have, of 10^9 operations each
    processes = accelerator.num_processes
    batch = max(1, min(recipe.batch_size, int(images / few_gmacs)) // processes) * processes
    choice = [fits and recipe.batch_size * gmacs <= images, batch]
    broadcast_object_list(choice)  # processes guess differently, and must measure the same
    whole, batch = choice
    if recipe.distill == "progressive":  # as many stages as a few steps have room for
        recipe = replace(recipe, teacher_steps=2 * recipe.student_steps)
    if whole:
        return _measure(replace(recipe, steps=_MEASURED), dataset), f"measured on {_MEASURED - _WARM_UP} steps"
    probe = replace(recipe, **_UNDISTILLED, model=shallow, init_from="", lora_rank=0, merge_adapters=True, freeze="",
                    batch_size=batch, gradient_accumulation_steps=1, steps=_MEASURED)  # fmt: skip
    larger = gmacs * recipe.batch_size / (few_gmacs * batch) * (1 + _extra_passes(recipe) / 3)
    seconds = _measure(probe, dataset) * larger
    return seconds, f"scaled up from {shallow['num_hidden_layers']} layers and a batch of {batch}"


# Settings of a run that has no teacher.
_UNDISTILLED: dict[str, Any] = {"distill": "", "guidance_scale": 1.0}


def _extra_passes(recipe: Recipe) -> int:
    """Forward passes of a step of distillation besides the three of forward and backward."""
    of_teacher = {"guidance": 1, "progressive": 2, "consistency": 1}.get(recipe.distill, 0)
    return of_teacher * (1 if recipe.guidance_scale == 1 else 2) + (recipe.distill == "consistency")


def _first_guess(recipe: Recipe, accelerator: Accelerator) -> float:
    """10^9 multiply-accumulates of forward passes that training makes in a second, by the peak of the machine."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision, torch.float32)
    side = 8192 if accelerator.device.type == "cuda" else 512
    peak = matmul_peak(accelerator.device, dtype, side, repeats=5) * accelerator.num_processes
    return _ASSUMED_MFU * peak / (3 * 2e9)  # three passes, of two operations a multiply-accumulate


def _measure(recipe: Recipe, dataset: Dataset) -> float:
    """The median time of the last steps of a run that leaves nothing."""
    times: list[float] = []

    def report(progress: Progress) -> None:
        times.append(time.perf_counter())

    train(recipe, report, run_folder=None, dataset=dataset)
    # Each is reported once the next is started, and the last two together.
    spans = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(spans[_WARM_UP - 1 : -1]) if times else math.nan
