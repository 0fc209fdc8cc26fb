"""A run: what a step does, what a checkpoint holds, what is reached."""

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from ..adapters import merge_adapters
from ..checks import listed
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
from .checkpoints import Checkpoint, checkpoints, damaged, load_checkpoint, save_checkpoint
from .data import Batch, Dataset, check_unreadable
from .loader import end_workers, make_loader
from .monitor import LOGS_FOLDER
from .recipe import Recipe
from .result import TrainingResult
from .setup import check_same_recipe, describe, make_scheduler
from .together import Outcome
from .weights import Weights, average_name, merged_state

logger = logging.getLogger(__name__)

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


class Run:
    """A run: its weights, data and counters."""

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
        self.last_unreadable, self.stopping = "", 0  # the number of the signal that asked to
        self.data = {} if folder is None else describe(dataset, accelerator.num_processes)
        self.outcomes: deque[Outcome] = deque()  # of steps that were started and not looked at
        self.scheduler = make_scheduler(recipe, model.config)
        self.null_class, self.dropout = model.config.null_class, model.config.class_dropout_prob
        if self.null_class is not None:
            model.y_embedder.dropout_prob = 0.0  # drawn here instead, for all processes alike
        self.weights = Weights(recipe, model, accelerator)

    # --- A step ------------------------------------------------------------------------------------------------------

    def batches(self) -> Generator[list[Batch], None, None]:
        """The batches of each step that is left: as many as gradients are accumulated over."""
        accumulation = self.recipe.gradient_accumulation
        parts = accumulation * self.accelerator.num_processes
        mine = [self.accelerator.process_index * accumulation + index for index in range(accumulation)]
        self.parts, self.mine = parts, mine
        pin = self.accelerator.device.type == "cuda"
        loader = iter(make_loader(self.dataset, self.recipe, parts, mine, self.step, self.last, pin))
        held: list[Batch] = []
        try:
            for batch in loader:
                held.append(batch)
                if len(held) == accumulation:
                    yield held
                    held = []
        finally:
            end_workers(loader)

    def step_on(self, batches: list[Batch], asked_to_stop: int) -> None:
        """Start one optimizer step; `settled` says what it came to.

        Args:
            batches: of this process.
            asked_to_stop: the number of a signal, or 0.
        """
        rate, draws = self.learning_rate(self.step), self._draw()
        total = torch.zeros((), device=self.accelerator.device)
        for index, (part, batch) in enumerate(zip(self.mine, batches, strict=True)):
            self._note_unreadable(batch)
            with self.weights.exchange(now=index == len(batches) - 1):
                loss = self._loss(batch, *(values[part] for values in draws)) if len(batch.data) else self._nothing()
                self.accelerator.backward(loss / len(batches))
            total += loss.detach() / len(batches)
        positions = [position for batch in batches for position in batch.positions]
        outcome = Outcome(self.accelerator, self.step + 1, positions, total, self.weights.clip(),
                          len(self.unreadable), asked_to_stop)  # fmt: skip
        # Where steps may be skipped, this one's outcome is waited for; else the weights are not needed any more.
        if not self.recipe.skip_nan or self._is_finite(outcome):
            self.weights.step(rate)
        else:
            self.weights.skip()
        self.outcomes.append(outcome)
        self.step += 1

    def settled(self, everything: bool) -> Iterator[tuple[int, float]]:
        """The steps whose outcome is known by now, with their losses, the mean over all processes.

        That is all but the one that was started last, which a GPU works at; that one too where `everything` is asked
        for or the run is to stop. All processes stop alike, asked to or for what they cannot read.

        Raises:
            TrainingError: a loss or gradients that are not finite.
            ValueError: too many unreadable files.
        """
        while self.outcomes and (everything or self.stopping or len(self.outcomes) > 1):
            outcome = self.outcomes.popleft()
            self.stopping = max(self.stopping, outcome.asked_to_stop)
            check_unreadable(outcome.unreadable, len(self.dataset), self.last_unreadable)
            if self._is_finite(outcome):
                self.losses.append(outcome.loss)
                self.skipped_in_a_row = 0
            else:
                self._not_finite(outcome)
            if outcome.step % self.per_epoch == 0:
                self.epoch_losses.append(sum(self.losses) / len(self.losses) if self.losses else 0.0)
                self.losses = []
            yield outcome.step, outcome.loss

    def _is_finite(self, outcome: Outcome) -> bool:
        """Whether a step may be taken; in fp16 the scaler leaves out those whose gradients overflow."""
        return math.isfinite(outcome.loss) and (math.isfinite(outcome.norm) or self.accelerator.scaler is not None)

    def _nothing(self) -> Tensor:
        """A loss of zero, where nothing of a share can be read: the other processes wait for its gradients."""
        config, device = self.weights.plain.config, self.accelerator.device
        labels = {"class_labels": torch.zeros(1, dtype=torch.long, device=device)} if config.num_classes else {}
        noisy = torch.zeros(1, *self.dataset.sample_shape, device=device)
        return 0 * self.weights.model(noisy, torch.zeros(1, device=device), **labels).sample.sum()

    def epoch(self, step: int) -> int:
        """Of a step; both counted from 1."""
        return 1 + (step - 1) // self.per_epoch

    def learning_rate(self, steps: int) -> float:
        """After so many steps."""
        falling = self.recipe.learning_rate_schedule == "cosine"
        return self.recipe.learning_rate * (0.5 * (1 + math.cos(math.pi * steps / self.last)) if falling else 1.0)

    def _draw(self) -> list[list[Tensor]]:
        """Noise, times, label dropout and the noise of latents, of the whole step, by part.

        Drawn anew from seed and step (a CPU reads 32 bits of it): not saved, and the same for any number of processes.
        """
        device, count = self.accelerator.device, self.recipe.batch_size
        generator = torch.Generator(device).manual_seed(self.recipe.seed * 1_000_000_007 + self.step)
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
        pinned = device.type == "cuda"  # elsewhere a copy that nobody waits for may be read before it is there
        clean, labels = (values.to(device, non_blocking=pinned) for values in (batch.data, batch.labels))
        if self.dataset.is_latent:
            mean, deviation = clean.chunk(2, dim=1)
            clean = (mean + deviation * latent - self.dataset.shift_factor) * self.dataset.scaling_factor
        conditions = {}
        if self.dataset.id2label:
            conditions["class_labels"] = labels if self.null_class is None else labels.where(~dropped, self.null_class)

        def denoiser(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            output = self.weights.model(noisy, timestep, **conditions).sample
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
        return noise_and_variance if self.weights.plain.config.learn_sigma else noise_prediction

    def _not_finite(self, outcome: Outcome) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        what = f"loss of step {outcome.step} is {outcome.loss}" if not math.isfinite(outcome.loss) else (
            f"norm of the gradients of step {outcome.step} is {outcome.norm}"
        )  # fmt: skip
        if self.recipe.skip_nan and self.skipped_in_a_row < MOST_SKIPPED:
            logger.warning("The %s; it is skipped (%d so far).", what, self.skipped)
            return
        kept = checkpoints(self.folder) if self.folder else []
        good = f"The last good checkpoint is {kept[-1]}." if kept else "There is no checkpoint."
        hint = f"{MOST_SKIPPED} steps in a row were skipped." if self.recipe.skip_nan else (
            "skip_nan=true would skip and count such steps."
        )  # fmt: skip
        raise TrainingError(f"The {what}, on the samples {listed(outcome.positions, most=16)}. {good} {hint}")

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
        tensors, facts = self.weights.state()
        facts |= {
            "recipe": asdict(self.recipe),
            "data": self.data,
            "losses": self.losses,
            "epoch_losses": self.epoch_losses,
            "unreadable": sorted(self.unreadable),
            "skipped": self.skipped,
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
            model = DiTTransformer(self.weights.plain.config)
        return DiTPipeline(model, make_scheduler(self.recipe, model.config), None, self.dataset.id2label or None)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one.

        Raises:
            ValueError: it is of another recipe or of other data, or damaged, or not on every machine.
        """
        kept = checkpoints(self.folder) if self.folder else []
        if kept:
            checkpoint = load_checkpoint(kept[-1])
            check_same_recipe(kept[-1], checkpoint.facts, self.recipe, self.data)
            try:
                self.weights.restore(checkpoint.tensors, checkpoint.facts)
                self.step, self.losses = checkpoint.step, checkpoint.facts["losses"]
                self.epoch_losses, self.skipped = checkpoint.facts["epoch_losses"], checkpoint.facts["skipped"]
                self.unreadable = set(checkpoint.facts["unreadable"])
            except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise damaged(kept[-1], error) from None
        step = torch.tensor([self.step], device=self.accelerator.device)
        steps: list[int] = cast(Any, self.accelerator.gather(step)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(f"The processes find checkpoints of the steps {', '.join(map(str, steps))}: {self.folder} "
                             "must lie on a disk that all machines share.")  # fmt: skip

    # --- The end -----------------------------------------------------------------------------------------------------

    def result(self, seconds: float) -> TrainingResult:
        """What is reached; with sharded weights gathered, which every process takes part in."""
        decays, weights = self.weights.decays, self.weights
        adapted = weights.whole(weights.averaged(decays[0] if decays else None))
        others = {average_name(decay): weights.averaged(decay) for decay in decays[1:]}
        trained, kept = adapted, None
        if self.recipe.lora_rank:
            if not self.recipe.merge_adapters:
                kept = copy.deepcopy(adapted)
            merge_adapters(trained)
            others = {variant: merged_state(weights.whole(state)) for variant, state in others.items()}
        scheduler = make_scheduler(self.recipe, weights.plain.config)
        pipeline = DiTPipeline(trained, scheduler, self._decoder(), self.dataset.id2label or None)
        if self.base is not None:  # the licence stays with the weights
            pipeline.origin = self.base.origin
        losses = self.epoch_losses + ([sum(self.losses) / len(self.losses)] if self.losses else [])
        logs = None if self.folder is None else self.folder / LOGS_FOLDER
        return TrainingResult(pipeline, self.recipe, self.dataset, losses, seconds, self.step == self.last,
                              self.accelerator.is_main_process, self.accelerator.num_processes, self.skipped, others,
                              kept, logs)  # fmt: skip

    def _decoder(self) -> Any:
        """Of the pipeline; read when it is needed, so that training has its memory."""
        if self.recipe.vae and self.accelerator.is_main_process:
            return AutoencoderKL.from_pretrained(self.recipe.vae)
        return None if self.base is None else self.base.vae
