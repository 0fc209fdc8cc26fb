"""The training loop, on accelerate."""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from ..configuration_dit import DiTConfig
from ..extras import require
from ..modeling_dit import DiTTransformer
from ..objectives import (
    flow_matching,
    flow_timesteps,
    min_snr_weight,
    noise_and_variance,
    noise_prediction,
    uniform_timesteps,
    v_prediction,
)
from ..pipeline_dit import DiTPipeline
from .checkpoints import (
    Checkpoint,
    checkpoints,
    flatten_optimizer,
    load_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from .data import Batch, Dataset, Reader, Schedule, as_read, open_dataset
from .recipe import Recipe

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Where a run stands after a step: steps and epochs counted from 1."""

    step: int
    last: int
    epoch: int
    loss: float


Report = Callable[[Progress], None]

# More unreadable files than this share of the data set, and something is wrong with it.
MOST_UNREADABLE = 0.01


@dataclass
class TrainingResult:
    """What a run leaves.

    Args:
        pipeline: the trained model, ready to sample.
        recipe: how it was trained.
        dataset: what it was trained on.
        epoch_losses: mean training loss of each epoch.
        seconds: wall time of the steps of this process.
        finished: whether all steps are done; not so after SIGTERM.
        main_process: whether this is the process that writes.
    """

    pipeline: DiTPipeline
    recipe: Recipe
    dataset: Dataset
    epoch_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = True
    main_process: bool = True


class TrainingError(ValueError):
    """Training cannot go on; the message says why, and which checkpoint is the last good one."""


def steps_per_epoch(recipe: Recipe, dataset: Dataset) -> int:
    """Optimizer steps of one pass over the data; a last batch that is not full is left out."""
    return len(dataset) // recipe.batch_size


def total_steps(recipe: Recipe, dataset: Dataset) -> int:
    """All optimizer steps of a run."""
    return recipe.steps or recipe.epochs * steps_per_epoch(recipe, dataset)


def train(
    recipe: Recipe,
    report: Report = lambda progress: None,
    run_folder: Path | None = None,
    resume: bool = True,
    dataset: Dataset | None = None,
) -> TrainingResult:
    """Train a model.

    What a step does is a function of the recipe's seed and the step's number, so that a resumed run goes on bit for bit
    on a CPU, and two processes see what one would.

    Args:
        recipe: what to do.
        report: called after each step, in the main process.
        run_folder: where checkpoints go; None for none.
        resume: go on from the last checkpoint of `run_folder`, if there is one.
        dataset: in place of the recipe's data.

    Raises:
        ValueError: data, model and batch that do not go together, or a run folder of another recipe.
        TrainingError: a loss that is not finite, or too many unreadable files.
    """
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    torch.manual_seed(recipe.seed)
    base = _load_start(recipe.init_from) if recipe.init_from else None
    config: Any = recipe.config if base is None else base.transformer.config
    if dataset is None:
        dataset = open_dataset(recipe.data, config.sample_height_width[0], recipe.images_per_class, recipe.seed)
    model = make_model(recipe, dataset, None if base is None else base.transformer)
    check_fit(recipe, model, dataset, accelerator.num_processes)
    run = _Run(recipe, model, dataset, accelerator, run_folder)
    if resume:
        run.resume()
    start = time.perf_counter()
    with _on_sigterm() as asked_to_stop:
        for batches in run.batches():
            loss = run.step_on(batches)
            if accelerator.is_main_process:
                report(Progress(run.step, run.last, run.epoch, loss))
            stopping = run.agree(asked_to_stop.is_set())
            due = recipe.save_every and (run.step % recipe.save_every == 0 or run.step == run.last)
            if stopping or due:
                run.save()
            if stopping:
                break
    result = run.result(time.perf_counter() - start)
    if base is not None:  # the licence stays with the weights
        result.pipeline.origin = base.origin
        result.pipeline.register_modules(vae=base.vae)
    return result


class _Run:
    """A run: its model, optimizer, average and counters."""

    def __init__(
        self, recipe: Recipe, model: DiTTransformer, dataset: Dataset, accelerator: Accelerator, folder: Path | None
    ):
        self.recipe, self.dataset, self.accelerator, self.folder = recipe, dataset, accelerator, folder
        self.step, self.last = 0, total_steps(recipe, dataset)
        self.per_epoch = steps_per_epoch(recipe, dataset)
        self.losses: list[float] = []  # of the steps of the current epoch
        self.epoch_losses: list[float] = []
        self.unreadable: set[str] = set()
        self.skipped = 0
        self.scheduler = make_scheduler(recipe, model.config)
        self.null_class, self.dropout = model.config.null_class, model.config.class_dropout_prob
        if self.null_class is not None:
            model.y_embedder.dropout_prob = 0.0  # drawn here instead, for all processes alike
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if recipe.compile:
            for block in model.blocks:
                block.compile()
        self.plain = model.train().to(accelerator.device)
        if recipe.fsdp:
            # Attention and MLP each; what makes the modulation stays with the root, since it runs before all blocks.
            blocks: Any = model.blocks
            for block in blocks:
                fully_shard(block.attn)
                fully_shard(block.mlp)
            fully_shard(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # fused: one kernel for all weights, 0.8 ms a step on a CPU rather than 3.0
        self.optimizer = torch.optim.AdamW(
            trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=not recipe.fsdp
        )
        self.model = model if recipe.fsdp else accelerator.prepare(model)
        self.optimizer = accelerator.prepare(self.optimizer)
        self.ema = EMAModel(trained, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.trained = trained

    # --- A step ------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left: as many as gradients are accumulated over."""
        accumulation = self.recipe.gradient_accumulation
        parts = accumulation * self.accelerator.num_processes
        mine = [self.accelerator.process_index * accumulation + index for index in range(accumulation)]
        self.parts, self.mine = parts, mine
        schedule = Schedule(len(self.dataset), self.recipe.batch_size, parts, mine, self.recipe.mirror,
                            self.recipe.seed, self.step, self.last)  # fmt: skip
        workers = self.recipe.workers
        loader = DataLoader(
            Reader(self.dataset),
            batch_sampler=schedule,
            collate_fn=cast(Any, as_read),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        held: list[Batch] = []
        for batch in loader:
            held.append(batch)
            if len(held) == accumulation:
                yield held
                held = []

    def step_on(self, batches: list[Batch]) -> float:
        """One optimizer step; returns the loss, the mean over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self._learning_rate_factor()
        draws = self._draw()
        total = torch.zeros((), device=self.accelerator.device)
        for part, batch in zip(self.mine, batches, strict=True):
            self._count_unreadable(batch)
            if len(batch.data):
                loss = self._loss(batch, *(values[part] for values in draws)) / len(batches)
                self.accelerator.backward(loss)
                total += loss.detach()
        loss = float(self.accelerator.reduce(total, "mean"))  # pyright: ignore[reportArgumentType]
        if math.isfinite(loss):
            if self.recipe.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.trained, self.recipe.max_grad_norm)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.step(self.trained)
        else:
            self._not_finite(loss, batches)
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss)
        if self.step % self.per_epoch == 0:
            finite = [value for value in self.losses if math.isfinite(value)]
            self.epoch_losses.append(sum(finite) / max(1, len(finite)))
            self.losses = []
        return loss

    def agree(self, asked: bool) -> bool:
        """Whether any process was asked to stop, so that all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag)) > 0  # pyright: ignore[reportArgumentType]

    @property
    def epoch(self) -> int:
        """Of the step just done, counted from 1."""
        return 1 + (self.step - 1) // self.per_epoch

    def _learning_rate_factor(self) -> float:
        if self.recipe.learning_rate_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.step / self.last))

    def _draw(self) -> list[list[Tensor]]:
        """Noise, times, label dropout and the noise of latents, of the whole step, by part.

        Drawn anew from seed and step: nothing of it needs to be saved, and the number of processes changes nothing.
        """
        device, count = self.accelerator.device, self.recipe.batch_size
        generator = torch.Generator(device).manual_seed((self.recipe.seed << 32) + self.step)
        shape = (count, *self.dataset.sample_shape)
        noise = torch.randn(shape, generator=generator, device=device)
        if self.recipe.objective == "flow":
            times = flow_timesteps(count, self.scheduler, device, generator, self.recipe.logit_normal)
        else:
            times = uniform_timesteps(count, self.scheduler, device, generator)
        dropped = torch.rand(count, generator=generator, device=device) < self.dropout
        latent = torch.randn(shape if self.dataset.is_latent else (count, 0), generator=generator, device=device)
        return [list(values.chunk(self.parts)) for values in (noise, times, dropped, latent)]

    def _loss(self, batch: Batch, noise: Tensor, times: Tensor, dropped: Tensor, latent: Tensor) -> Tensor:
        """The mean loss of a batch. Where files could not be read it is smaller than what was drawn."""
        device, count = self.accelerator.device, len(batch.data)
        noise, times, dropped, latent = noise[:count], times[:count], dropped[:count], latent[:count]
        clean, labels = batch.data.to(device), batch.labels.to(device)
        if self.dataset.is_latent:
            mean, deviation = clean.chunk(2, dim=1)
            clean = (mean + deviation * latent) * self.dataset.scaling_factor
        conditions = {}
        if self.dataset.id2label:
            conditions["class_labels"] = labels if self.null_class is None else labels.where(~dropped, self.null_class)

        def denoiser(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            output = self.model(noisy, timestep, **conditions).sample
            # A model that was made to learn its variance has channels that the other objectives leave alone.
            return output if self.recipe.objective == "noise" else output[:, : clean.shape[1]]

        with self.accelerator.autocast():
            losses = self._objective()(denoiser, self.scheduler, clean, noise, times, **conditions)
        if self.recipe.min_snr_gamma:
            losses = losses * min_snr_weight(self.scheduler, times, self.recipe.min_snr_gamma, self.recipe.objective)
        return losses.mean()

    def _objective(self) -> Callable[..., Tensor]:
        if self.recipe.objective == "flow":
            return flow_matching
        if self.recipe.objective == "v":
            return v_prediction
        return noise_and_variance if self.plain.config.learn_sigma else noise_prediction

    def _not_finite(self, loss: float, batches: list[Batch]) -> None:
        self.skipped += 1
        if self.recipe.skip_nan:
            logger.warning("Step %d has the loss %s and is skipped.", self.step + 1, loss)
            return
        kept = checkpoints(self.folder) if self.folder else []
        good = f"The last good checkpoint is {kept[-1]}." if kept else "There is no checkpoint."
        positions = [position for batch in batches for position in batch.positions]
        raise TrainingError(
            f"The loss of step {self.step + 1} is {loss}, on the samples {_shortened(positions)}. {good} "
            "skip_nan=true would skip and count such steps."
        )

    def _count_unreadable(self, batch: Batch) -> None:
        for name in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                logger.warning("%s cannot be read and is left out (%d so far).", name, len(self.unreadable))
        if len(self.unreadable) > max(1, MOST_UNREADABLE * len(self.dataset)):
            raise TrainingError(
                f"{len(self.unreadable)} of {len(self.dataset)} files cannot be read, more than "
                f"{MOST_UNREADABLE:.0%}; the last one is {batch.unreadable[-1]}."
            )

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint. A disk that is full does not end the run."""
        if self.folder is None:
            return
        model, optimizer_state = get_state_dict(self.plain, _bare(self.optimizer), options=_WHOLE)
        optimizer, groups = flatten_optimizer(cast(Any, optimizer_state))
        tensors: dict[str, dict[str, Tensor]] = {"model": cast(Any, model), "optimizer": optimizer}
        if self.ema is not None:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
            averaged: dict[str, Any] = get_model_state_dict(self.plain, options=_WHOLE)
            tensors["ema"] = {name: value.clone() for name, value in averaged.items()}  # of memory that is restored
            self.ema.restore(self.trained)
        scaler = self.accelerator.scaler
        facts = {
            "recipe": asdict(self.recipe),
            "groups": groups,
            "losses": self.losses,
            "epoch_losses": self.epoch_losses,
            "unreadable": sorted(self.unreadable),
            "skipped": self.skipped,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": self.ema.optimization_step if self.ema is not None else 0,
        }
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(self.folder, Checkpoint(self.step, tensors, facts), self.recipe.keep_last)
            except OSError as error:
                logger.error("No checkpoint at step %d: %s Training goes on.", self.step, error)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one.

        Raises:
            ValueError: it is of another recipe, or damaged.
        """
        kept = checkpoints(self.folder) if self.folder else []
        if not kept:
            return
        checkpoint = load_checkpoint(kept[-1])
        check_same_recipe(kept[-1], checkpoint.facts.get("recipe", {}), self.recipe)
        state: Any = unflatten_optimizer(checkpoint.tensors["optimizer"], checkpoint.facts["groups"])
        tensors: Any = checkpoint.tensors
        if self.ema is not None:
            set_model_state_dict(self.plain, tensors["ema"], options=_WHOLE)
            self.ema.shadow_params = [parameter.clone().detach() for parameter in self.trained]
            self.ema.optimization_step = checkpoint.facts["ema_steps"]
        set_state_dict(
            self.plain,
            _bare(self.optimizer),
            model_state_dict=tensors["model"],
            optim_state_dict=state,
            options=_WHOLE,
        )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.facts["scaler"])
        self.step, self.losses = checkpoint.step, checkpoint.facts["losses"]
        self.epoch_losses, self.skipped = checkpoint.facts["epoch_losses"], checkpoint.facts["skipped"]
        self.unreadable = set(checkpoint.facts["unreadable"])

    # --- The end -----------------------------------------------------------------------------------------------------

    def result(self, seconds: float) -> TrainingResult:
        """The trained pipeline; with sharded weights gathered, which every process takes part in."""
        if self.ema is not None:
            self.ema.copy_to(self.trained)
        state = get_model_state_dict(self.plain, options=_WHOLE)
        trained = self.plain
        if self.recipe.fsdp:
            trained = DiTTransformer(trained.config)
            if self.accelerator.is_main_process:
                trained.load_state_dict(state)
        if self.recipe.lora_rank:
            merge_lora(trained)
        if self.null_class is not None:
            trained.y_embedder.dropout_prob = self.dropout
        names = self.dataset.id2label
        pipeline = DiTPipeline(trained.cpu().eval(), self.scheduler, id2label=names or None)
        losses = self.epoch_losses + ([sum(self.losses) / len(self.losses)] if self.losses else [])
        return TrainingResult(pipeline, self.recipe, self.dataset, losses, seconds,
                              self.step == self.last, self.accelerator.is_main_process)  # fmt: skip


# Whole tensors on the processor, whatever the sharding, so that any number of processes can go on from them.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def check_fit(recipe: Recipe, model: DiTTransformer, dataset: Dataset, processes: int) -> None:
    """Raise ValueError where data, model, batch and processes do not go together."""
    config: Any = model.config
    channels, height, width = dataset.sample_shape
    if (channels, (height, width)) != (config.in_channels, config.sample_height_width):
        wanted = "x".join(map(str, config.sample_height_width))
        raise ValueError(f"The data are {height}x{width} in {channels} channels, and the model takes {wanted} in "
                         f"{config.in_channels}.")  # fmt: skip
    if len(dataset.id2label) == 1:
        raise ValueError("The data have one class only; a conditional model needs two, an unconditional one none.")
    if len(dataset.id2label) != config.num_classes:
        raise ValueError(f"The data have {len(dataset.id2label)} classes and the model {config.num_classes}.")
    if recipe.batch_size > len(dataset):
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the data set of {len(dataset)} pictures.")
    if recipe.batch_size % (processes * recipe.gradient_accumulation):
        raise ValueError(f"batch_size {recipe.batch_size} cannot be shared equally by {processes} processes with "
                         f"gradient_accumulation {recipe.gradient_accumulation}.")  # fmt: skip


def check_same_recipe(path: Path, theirs: dict[str, Any], recipe: Recipe) -> None:
    """Raise ValueError where a checkpoint's recipe would have led elsewhere; the message says what differs."""
    ours = asdict(recipe)
    names = [name for name in ours if name not in _HARMLESS and theirs.get(name) != ours[name]]
    if names:
        differences = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours[name]!r} here" for name in names)
        raise ValueError(
            f"{path} is of another recipe: {differences}. Train to another --out, or start anew with --resume never."
        )


# Settings that change where and when work is done, not what comes of it.
_HARMLESS = ("workers", "save_every", "keep_last", "skip_nan", "fsdp", "gradient_checkpointing", "compile",
             "gradient_accumulation")  # fmt: skip


def make_scheduler(recipe: Recipe, config: Any) -> Any:
    """The noise schedule of a recipe; pictures are clipped to -1..1 while sampling, as they were trained."""
    if recipe.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(recipe.num_train_timesteps)
    learned: dict[str, Any] = {}
    if config.learn_sigma:
        learned = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
    return DDPMScheduler(
        recipe.num_train_timesteps,
        beta_start=recipe.beta_start,
        beta_end=recipe.beta_end,
        beta_schedule="linear",
        clip_sample=config.in_channels in (1, 3) and not config.learn_sigma,
        prediction_type="v_prediction" if recipe.objective == "v" else "epsilon",
        **learned,
    )


def _load_start(source: str) -> DiTPipeline:
    """A pipeline folder, a Hub id or a checkpoint file."""
    if Path(source).is_file():
        return DiTPipeline.from_single_file(source)
    return DiTPipeline.from_pretrained(source)


def make_model(recipe: Recipe, dataset: Dataset, start: DiTTransformer | None) -> DiTTransformer:
    """The model to train: a new one, or the one to start from, with a row for each class of the data."""
    classes = len(dataset.id2label)
    if start is not None:
        if classes != start.config.num_classes:
            start.resize_class_labels(classes)
        return _with_lora(start, recipe.lora_rank) if recipe.lora_rank else start
    config = recipe.config
    if isinstance(recipe.model, str) and config.num_classes != classes:  # sizes by name are ImageNet's
        config = DiTConfig(**{**config.to_dict(), "num_classes": classes})
    return DiTTransformer(config)


def _with_lora(model: DiTTransformer, rank: int) -> DiTTransformer:
    """The model with low-rank adapters to train; all else is frozen but the table of classes."""
    peft = require("peft", "train")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)")
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or name.startswith("y_embedder")
    return model


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights they adapt, and take them out."""
    layers = require("peft.tuners.tuners_utils", "train")
    for name, module in list(model.named_modules()):
        if isinstance(module, layers.BaseTunerLayer):
            adapted: Any = module
            adapted.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapted.get_base_layer())


@contextlib.contextmanager
def _on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as schedulers of clusters send it before they kill."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)


def _shortened(positions: list[int], most: int = 16) -> str:
    shown = ", ".join(map(str, positions[:most]))
    return shown + (f" and {len(positions) - most} more" if len(positions) > most else "")
