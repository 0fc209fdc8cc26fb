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
from torch.distributed.tensor import DTensor

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
    damaged,
    flatten_optimizer,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    unflatten_optimizer,
)
from .data import Batch, Dataset, check_unreadable
from .loader import make_loader, open_dataset
from .monitor import LOGS_FOLDER, Monitor, make_accelerator
from .publish import open_publisher
from .recipe import Recipe
from .result import TrainingResult
from .setup import check_fit, check_same_recipe, describe, load_start, make_model, make_scheduler

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

# More steps in a row without a finite loss, and nothing is learnt any more.
MOST_SKIPPED = 20


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
    for note in dataset.notes if accelerator.is_main_process else ():
        logger.warning(note)
    run = _Run(recipe, model, dataset, accelerator, run_folder, base)
    if resume:
        run.resume()
    elif accelerator.is_main_process:
        remove_checkpoints(run_folder)
    main, start = accelerator.is_main_process, time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_products(recipe.mixed_precision))
        asked_to_stop = stack.enter_context(_on_sigterm())
        publisher = stack.enter_context(contextlib.closing(open_publisher(recipe.push_to_hub, accelerator)))
        monitor = stack.enter_context(
            contextlib.closing(Monitor(accelerator, recipe, model.config, run_folder, run.step))
        )
        for batches in run.batches():
            loss = run.step_on(batches, asked_to_stop.is_set())
            if main:
                monitor.step(run.step, loss, run.learning_rate)
                rates = monitor.pictures_per_second, monitor.utilisation
                report(Progress(run.step, run.last, run.epoch, loss, *rates))
            if run.stopping or due(recipe.save_every, run):
                saved = run.save()
                if run.stopping and run_folder is not None and not saved:
                    raise TrainingError(f"Stopped after step {run.step}, and no checkpoint of it could be written.")
                if recipe.push_to_hub and run.step < run.last:
                    publisher.push(run.result(time.perf_counter() - start), run.step)
            if run.stopping:
                break
            if due(recipe.sample_every, run):
                reached = run.result(time.perf_counter() - start)
                if main:
                    monitor.draw(reached.pipeline, run.step)
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
        self.skipped = self.skipped_in_a_row = 0
        self.last_unreadable, self.stopping = "", False
        self.scheduler = make_scheduler(recipe, model.config)
        self.null_class, self.dropout = model.config.null_class, model.config.class_dropout_prob
        if self.null_class is not None:
            model.y_embedder.dropout_prob = 0.0  # drawn here instead, for all processes alike
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable()
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
        if accelerator.scaler is not None:  # else accelerate's wrapper does nothing, in 0.8 ms a step
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

    def step_on(self, batches: list[Batch], asked_to_stop: bool) -> float:
        """One optimizer step; returns the loss, the mean over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        draws = self._draw()
        total = torch.zeros((), device=self.accelerator.device)
        for index, (part, batch) in enumerate(zip(self.mine, batches, strict=True)):
            self._note_unreadable(batch)
            last = index == len(batches) - 1  # after which processes exchange their gradients
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.plain):
                loss = self._loss(batch, *(values[part] for values in draws)) if len(batch.data) else self._nothing()
                self.accelerator.backward(loss / len(batches))
            total += loss.detach() / len(batches)
        loss, norm = self._agree(total, self._clip(), asked_to_stop)
        # In fp16 the scaler leaves out steps whose gradients overflow.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            self.optimizer.step()
            for average in self.averages.values():
                average.step(self.trained)
            self.losses.append(loss)
            self.skipped_in_a_row = 0
        else:
            self._not_finite(loss, norm, batches)
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % self.per_epoch == 0:
            self.epoch_losses.append(sum(self.losses) / len(self.losses) if self.losses else 0.0)
            self.losses = []
        return loss

    def _clip(self) -> Tensor:
        """Clip the gradients, if the recipe says so; returns their norm before."""
        norm: Any = self.accelerator.clip_grad_norm_(self.trained, self.recipe.max_grad_norm or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self.accelerator.device)

    def _agree(self, loss: Tensor, norm: Tensor, asked_to_stop: bool) -> tuple[float, float]:
        """The mean loss and the norm, of all processes; all stop alike, asked to or for what they cannot read."""
        rest = torch.tensor([len(self.unreadable), asked_to_stop], dtype=torch.float32, device=loss.device)
        mine = torch.cat([torch.stack([loss.float(), norm.float()]), rest])
        everyone: Any = self.accelerator.gather(mine[None])  # (processes, 4)
        losses, norms, unreadable, asked = everyone.cpu().unbind(1)
        self.stopping = bool(asked.any())
        check_unreadable(int(unreadable.max()), len(self.dataset), self.last_unreadable)
        return float(losses.mean()), float(norms.max())

    def _nothing(self) -> Tensor:
        """A loss of zero, where nothing of a share can be read: the other processes wait for its gradients."""
        config, device = self.plain.config, self.accelerator.device
        labels = {"class_labels": torch.zeros(1, dtype=torch.long, device=device)} if config.num_classes else {}
        noisy = torch.zeros(1, *self.dataset.sample_shape, device=device)
        return 0 * self.model(noisy, torch.zeros(1, device=device), **labels).sample.sum()

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

    def _not_finite(self, loss: float, norm: float, batches: list[Batch]) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        what = f"loss of step {self.step + 1} is {loss}" if not math.isfinite(loss) else (
            f"norm of the gradients of step {self.step + 1} is {norm}"
        )  # fmt: skip
        if self.recipe.skip_nan and self.skipped_in_a_row < MOST_SKIPPED:
            logger.warning("The %s; it is skipped (%d so far).", what, self.skipped)
            return
        kept = checkpoints(self.folder) if self.folder else []
        good = f"The last good checkpoint is {kept[-1]}." if kept else "There is no checkpoint."
        positions = [position for batch in batches for position in batch.positions]
        hint = f"{MOST_SKIPPED} steps in a row were skipped." if self.recipe.skip_nan else (
            "skip_nan=true would skip and count such steps."
        )  # fmt: skip
        raise TrainingError(f"The {what}, on the samples {_shortened(positions)}. {good} {hint}")

    def _note_unreadable(self, batch: Batch) -> None:
        for name in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                self.last_unreadable = name
                logger.warning("%s cannot be read and is left out (%d so far).", name, len(self.unreadable))

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Write a checkpoint; False where that fails, which does not end the run."""
        if self.folder is None:
            return False
        model, optimizer_state = get_state_dict(self.plain, _bare(self.optimizer), options=_WHOLE)
        # Of sharded weights the main process alone has the whole.
        optimizer, groups = flatten_optimizer(cast(Any, optimizer_state)) if optimizer_state else ({}, [])
        tensors: dict[str, dict[str, Tensor]] = {"model": cast(Any, model), "optimizer": optimizer}
        for decay in self.averages:
            tensors[average_name(decay)] = self._averaged(decay)
        scaler = self.accelerator.scaler
        facts = {
            "recipe": asdict(self.recipe),
            "data": describe(self.dataset),
            "groups": groups,
            "losses": self.losses,
            "epoch_losses": self.epoch_losses,
            "unreadable": sorted(self.unreadable),
            "skipped": self.skipped,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": [average.optimization_step for average in self.averages.values()],
        }
        written = True
        if self.accelerator.is_main_process:
            try:
                if not all(weight.isfinite().all() for weight in tensors["model"].values()):
                    raise OSError("the weights are not finite.")
                checkpoint = Checkpoint(self.step, tensors, facts, self._empty_pipeline())
                save_checkpoint(self.folder, checkpoint, self.recipe.keep_last)
            except OSError as error:
                logger.error("No checkpoint at step %d: %s Training goes on.", self.step, error)
                written = False
        self.accelerator.wait_for_everyone()
        return written

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
            ValueError: it is of another recipe or of other data, or damaged, or not on every machine.
        """
        kept = checkpoints(self.folder) if self.folder else []
        if kept:
            checkpoint = load_checkpoint(kept[-1])
            check_same_recipe(kept[-1], checkpoint.facts, self.recipe, self.dataset)
            try:
                self._restore(checkpoint)
            except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise damaged(kept[-1], error) from None
        step = torch.tensor([self.step], device=self.accelerator.device)
        steps: list[int] = cast(Any, self.accelerator.gather(step)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(f"The processes find checkpoints of the steps {', '.join(map(str, steps))}: {self.folder} "
                             "must lie on a disk that all machines share.")  # fmt: skip

    def _restore(self, checkpoint: Checkpoint) -> None:
        state: Any = unflatten_optimizer(checkpoint.tensors["optimizer"], checkpoint.facts["groups"])
        tensors: Any = checkpoint.tensors
        if tensors["model"].keys() != self.plain.state_dict().keys():
            raise ValueError("its weights have other names")
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
                              self.accelerator.is_main_process, self.accelerator.num_processes, self.skipped, others,
                              kept, logs)  # fmt: skip

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
        if self.recipe.vae and self.accelerator.is_main_process:
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
