"""The training loop, on accelerate."""

import contextlib
import copy
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from ..adapters import add_adapters, merge_adapters
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
from .data import Batch, Dataset
from .loader import make_loader, open_dataset
from .monitor import LOGS_FOLDER, Monitor, make_accelerator
from .publish import Publisher
from .recipe import Recipe
from .result import TrainingResult
from .setup import check_fit, check_same_recipe, load_start, make_model, make_scheduler

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Where a run stands after a step: steps and epochs counted from 1; rates over the last ten steps, 0 before.

    `utilisation` is the share of the machine's measured peak that the model's operations take.
    """

    step: int
    last: int
    epoch: int
    loss: float
    pictures_per_second: float
    utilisation: float


Report = Callable[[Progress], None]

# More unreadable files than this share of the data set, and something is wrong with it.
MOST_UNREADABLE = 0.01


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
    accelerator = make_accelerator(recipe, run_folder)
    torch.manual_seed(recipe.seed)
    base = load_start(recipe.init_from) if recipe.init_from else None
    config: Any = recipe.config if base is None else base.transformer.config
    if dataset is None:
        dataset = open_dataset(recipe.data, config.sample_height_width[0], recipe.images_per_class, recipe.seed,
                               recipe.streaming)  # fmt: skip
    model = make_model(recipe, dataset, None if base is None else base.transformer)
    check_fit(recipe, model, dataset, accelerator.num_processes, base)
    run = _Run(recipe, model, dataset, accelerator, run_folder, base)
    if resume:
        run.resume()
    main, start = accelerator.is_main_process, time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_products(recipe.mixed_precision))
        asked_to_stop = stack.enter_context(_on_sigterm())
        publisher = stack.enter_context(contextlib.closing(Publisher(recipe.push_to_hub if main else "")))
        monitor = stack.enter_context(
            contextlib.closing(Monitor(accelerator, recipe, model.config, run_folder, run.step))
        )
        for batches in run.batches():
            loss = run.step_on(batches)
            if main:
                monitor.step(run.step, loss, run.learning_rate)
                rates = monitor.pictures_per_second, monitor.utilisation
                report(Progress(run.step, run.last, run.epoch, loss, *rates))
            stopping = run.agree(asked_to_stop.is_set())
            if stopping or due(recipe.save_every, run):
                run.save()
                if recipe.push_to_hub and run.step < run.last:
                    publisher.push(run.result(time.perf_counter() - start), run.step)
            if stopping:
                break
            if due(recipe.sample_every, run):
                pipeline: Any = run.result(time.perf_counter() - start).pipeline
                if main:
                    monitor.draw(pipeline.to(accelerator.device), run.step)
            monitor.resume_clock()
        return run.result(time.perf_counter() - start)


def due(every: int, run: "_Run") -> bool:
    """Whether something that is done every so many steps is to be done now; at the last step it is."""
    return bool(every) and (run.step % every == 0 or run.step == run.last)


class _Run:
    """A run: its model, optimizer, average and counters."""

    def __init__(
        self,
        recipe: Recipe,
        model: DiTTransformer,
        dataset: Dataset,
        accelerator: Accelerator,
        folder: Path | None,
        base: DiTPipeline | None,
    ):
        self.recipe, self.dataset, self.accelerator, self.folder = recipe, dataset, accelerator, folder
        self.base = base
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
        self.averages = {decay: EMAModel(trained, decay=decay) for decay in recipe.ema_decays}
        self.trained = trained

    # --- A step ------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left: as many as gradients are accumulated over."""
        accumulation = self.recipe.gradient_accumulation
        parts = accumulation * self.accelerator.num_processes
        mine = [self.accelerator.process_index * accumulation + index for index in range(accumulation)]
        self.parts, self.mine = parts, mine
        loader = make_loader(self.dataset, self.recipe, parts, mine, self.step, self.last)
        held: list[Batch] = []
        for batch in loader:
            held.append(batch)
            if len(held) == accumulation:
                yield held
                held = []

    def step_on(self, batches: list[Batch]) -> float:
        """One optimizer step; returns the loss, the mean over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
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
            for average in self.averages.values():
                average.step(self.trained)
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

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        falling = self.recipe.learning_rate_schedule == "cosine"
        return self.recipe.learning_rate * (0.5 * (1 + math.cos(math.pi * self.step / self.last)) if falling else 1.0)

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
        # Of sharded weights the main process alone has the whole.
        optimizer, groups = flatten_optimizer(cast(Any, optimizer_state)) if optimizer_state else ({}, [])
        tensors: dict[str, dict[str, Tensor]] = {"model": cast(Any, model), "optimizer": optimizer}
        for decay in self.averages:
            tensors[average_name(decay)] = self._averaged(decay)
        scaler = self.accelerator.scaler
        facts = {
            "recipe": asdict(self.recipe),
            "groups": groups,
            "losses": self.losses,
            "epoch_losses": self.epoch_losses,
            "unreadable": sorted(self.unreadable),
            "skipped": self.skipped,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": [average.optimization_step for average in self.averages.values()],
        }
        if self.accelerator.is_main_process:
            try:
                checkpoint = Checkpoint(self.step, tensors, facts, self._empty_pipeline())
                save_checkpoint(self.folder, checkpoint, self.recipe.keep_last)
            except OSError as error:
                logger.error("No checkpoint at step %d: %s Training goes on.", self.step, error)
        self.accelerator.wait_for_everyone()

    def _empty_pipeline(self) -> DiTPipeline | None:
        """A pipeline without weights, to describe a checkpoint; none with adapters, which are not merged yet."""
        if self.recipe.lora_rank:
            return None
        with torch.device("meta"):
            model = DiTTransformer(self.plain.config)
        return DiTPipeline(model, make_scheduler(self.recipe, model.config), None, self.dataset.id2label or None)

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
        for (decay, average), steps in zip(self.averages.items(), checkpoint.facts["ema_steps"], strict=True):
            set_model_state_dict(self.plain, tensors[average_name(decay)], options=_WHOLE)
            average.shadow_params = [parameter.clone().detach() for parameter in self.trained]
            average.optimization_step = steps
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
        """What is reached; with sharded weights gathered, which every process takes part in."""
        decays = list(self.averages)
        adapted = self._whole(self._averaged(decays[0] if decays else None))
        others = {average_name(decay): self._averaged(decay) for decay in decays[1:]}
        trained, kept = adapted, None
        if self.recipe.lora_rank:
            if not self.recipe.merge_adapters:
                kept = copy.deepcopy(adapted)
            merge_adapters(trained)
            others = {variant: merged_state(self._whole(weights)) for variant, weights in others.items()}
        scheduler = make_scheduler(self.recipe, self.plain.config)
        pipeline = DiTPipeline(trained, scheduler, self._decoder(), self.dataset.id2label or None)
        if self.base is not None:  # the licence stays with the weights
            pipeline.origin = self.base.origin
        losses = self.epoch_losses + ([sum(self.losses) / len(self.losses)] if self.losses else [])
        logs = None if self.folder is None else self.folder / LOGS_FOLDER
        return TrainingResult(pipeline, self.recipe, self.dataset, losses, seconds, self.step == self.last,
                              self.accelerator.is_main_process, self.accelerator.num_processes, others, kept,
                              logs)  # fmt: skip

    def _averaged(self, decay: float | None) -> dict[str, Tensor]:
        """Weights by name, averaged with a decay or as they are, in memory of their own; with adapters apart."""
        average = None if decay is None else self.averages[decay]
        if average is not None:
            average.store(self.trained)
            average.copy_to(self.trained)
        state: dict[str, Any] = get_model_state_dict(self.plain, options=_WHOLE)
        state = {name: value.clone() for name, value in state.items()}
        if average is not None:
            average.restore(self.trained)
        return state

    def _whole(self, weights: dict[str, Tensor]) -> DiTTransformer:
        """A model with these weights; only the main process has them where they are sharded."""
        model = DiTTransformer(self.plain.config)
        if self.recipe.lora_rank:
            add_adapters(model, self.recipe.lora_rank)
        if weights:
            model.load_state_dict(weights)
        return model.eval()

    def _decoder(self) -> Any:
        """Of the pipeline; read when it is needed, so that training has its memory."""
        if self.recipe.vae:
            return AutoencoderKL.from_pretrained(self.recipe.vae)
        return None if self.base is None else self.base.vae


# Whole tensors on the processor, whatever the sharding, so that any number of processes can go on from them.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def average_name(decay: float) -> str:
    """Of the weights of a moving average: "ema-9999" for 0.9999, since diffusers takes no dots in a variant's name."""
    return "ema-" + f"{decay:.10f}".rstrip("0").partition(".")[2]


def merged_state(model: DiTTransformer) -> dict[str, Tensor]:
    """The weights of a model whose adapters are merged."""
    merge_adapters(model)
    return model.state_dict()


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextlib.contextmanager
def _products(precision: str) -> Iterator[None]:
    """How float32 is multiplied while training: in tf32 where a recipe says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
