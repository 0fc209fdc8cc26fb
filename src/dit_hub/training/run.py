"""A training run, step by step."""

import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from ..checks import listed
from ..modeling_dit import DiTTransformer
from ..pipeline_dit import DiTPipeline
from .checkpoints import checkpoints
from .data import Batch, Dataset, check_unreadable
from .distilling import Distillation
from .history import History
from .ladder import halvings, stage_of
from .loader import end_workers, make_loader
from .loss import TrainingLoss
from .recipe import Recipe
from .setup import describe
from .together import StepOutcome
from .weights import Weights

logger = logging.getLogger(__name__)

# A model that skips more steps in a row than this has stopped learning.
MOST_SKIPPED = 20


class TrainingError(ValueError):
    """Training cannot continue; the message says why, and names the last good checkpoint."""


class Run:
    """A training run: weights, loss, data and history.

    Args:
        recipe, dataset, accelerator: of the run.
        model: as `make_model` returns it.
        folder: where checkpoints go; None for none.
        base: the pipeline that the model was loaded from, if any.
        teacher: a model of its own, for a recipe that distills; `base` samples it.

    Attributes:
        step: optimizer steps done.
        last: optimizer steps in all.
        asked_to_stop: number of the signal that asked any process to stop, or 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: DiTTransformer,
        dataset: Dataset,
        accelerator: Accelerator,
        folder: Path | None,
        base: DiTPipeline | None,
        teacher: DiTTransformer | None = None,
    ):
        self.recipe, self.dataset, self.accelerator = recipe, dataset, accelerator
        self.folder, self.base = folder, base
        self.data = {} if folder is None else describe(dataset, accelerator.num_processes)
        steps_per_epoch = len(dataset) // recipe.batch_size
        self.history = History(steps_per_epoch)
        self.step, self.last = 0, recipe.steps or recipe.epochs * steps_per_epoch
        self.asked_to_stop, self.started = 0, time.perf_counter()
        self.pending: deque[StepOutcome] = deque()  # of steps that were started and are not settled
        each = recipe.gradient_accumulation_steps
        self.micro_batches = each * accelerator.num_processes
        self.own = range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        self.distillation: Distillation | None = None
        if base is not None and teacher is not None:
            if self.last < (stages := halvings(recipe)):
                raise ValueError(f"{self.last} steps are too few for the {stages} stages from "
                                 f"{recipe.teacher_steps} steps to {recipe.student_steps}.")  # fmt: skip
            self.distillation = Distillation(recipe, teacher, cast(Any, base).scheduler, accelerator.device)
        self.loss = TrainingLoss(recipe, dataset, model.config, accelerator, self.distillation)
        if model.config.null_class is not None:
            model.y_embedder.dropout_prob = 0.0  # `TrainingLoss` drops labels, alike in all processes
        self.weights = Weights(recipe, model, accelerator)

    def batches(self) -> Generator[list[Batch], None, None]:
        """This process's micro-batches of each step that is left; closing the generator ends the data workers."""
        pin = self.accelerator.device.type == "cuda"
        loader = make_loader(self.dataset, self.recipe, self.micro_batches, self.own, self.step, self.last, pin)
        batches, self.started = iter(loader), time.perf_counter()
        held: list[Batch] = []
        try:
            for batch in batches:
                held.append(batch)
                if len(held) == len(self.own):
                    yield held
                    held = []
        finally:
            end_workers(batches)

    def train_step(self, batches: list[Batch], asked_to_stop: int) -> None:
        """Start one optimizer step; `settled` tells its outcome.

        Args:
            batches: this process's micro-batches.
            asked_to_stop: number of the signal that asked this process to stop, or 0.
        """
        self._begin_stage()
        draws = self.loss.draw(self.step, self.micro_batches)
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in zip(self.own, batches, strict=True):
            self.history.add_unreadable(batch.unreadable)
            with self.weights.sync_gradients(index == self.own[-1]):
                loss = self.loss(self.weights.model, batch, draws[index])
                self.accelerator.backward(loss / len(batches))
            total += loss.detach() / len(batches)
        positions = [position for batch in batches for position in batch.positions]
        outcome = StepOutcome(self.accelerator, self.step + 1, positions, total, self.weights.clip(),
                              len(self.history.unreadable), asked_to_stop)  # fmt: skip
        # Only skip_nan waits for the outcome here: without it, a step that is not finite ends the run anyway.
        if not self.recipe.skip_nan or self._is_finite(outcome):
            self.weights.step(self.learning_rate(self.step))
        else:
            self.weights.skip()
        self.pending.append(outcome)
        self.step += 1

    def _begin_stage(self) -> None:
        """Make the student the teacher, where the next step begins a later stage of progressive distillation."""
        stage, _, _ = stage_of(self.recipe, self.step, self.last)
        if self.distillation is not None and stage != self.distillation.stage:
            self.distillation.begin(stage, self.weights.student())

    def settled(self) -> Iterator[tuple[int, float]]:
        """The steps whose outcome is known by now, and their losses, the mean over all processes.

        These are all but the one started last, which a GPU is still computing; before a pause or a stop, they are all.
        All processes stop after the same step.

        Raises:
            TrainingError: a loss or gradients that are not finite.
            ValueError: too many unreadable files.
        """
        while self.pending and (self.pauses or self.asked_to_stop or len(self.pending) > 1):
            outcome = self.pending.popleft()
            self.asked_to_stop = max(self.asked_to_stop, outcome.asked_to_stop)
            check_unreadable(outcome.unreadable, len(self.dataset), self.history.last_unreadable)
            finite = self._is_finite(outcome)
            self.history.add(outcome.step, outcome.loss if finite else None)
            if not finite:
                self._warn_or_raise(outcome)
            yield outcome.step, outcome.loss

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop before its last step."""
        return bool(self.asked_to_stop) and self.step < self.last

    @property
    def pauses(self) -> bool:
        """Whether training pauses after the current step, to save or to draw."""
        return self.step == self.last or self.due(self.recipe.save_every) or self.due(self.recipe.sample_every)

    def due(self, every: int) -> bool:
        """Whether it is time for what happens every so many steps, and after the last one; never where that is 0."""
        return bool(every) and (self.step % every == 0 or self.step == self.last)

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps; a closed form, so that there is no scheduler to save.

        It falls to zero in each stage of progressive distillation, so that the next teacher is a finished model.
        """
        if self.recipe.lr_scheduler == "constant":
            return self.recipe.learning_rate
        _, first, end = stage_of(self.recipe, step, self.last)
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - first) / (end - first)))

    def _is_finite(self, outcome: StepOutcome) -> bool:
        """Whether a step may be taken; in fp16 the scaler itself leaves out those whose gradients overflow."""
        return math.isfinite(outcome.loss) and (math.isfinite(outcome.norm) or self.accelerator.scaler is not None)

    def _warn_or_raise(self, outcome: StepOutcome) -> None:
        """Warn about a step that was skipped, or raise where `skip_nan` is off or too many were."""
        what = f"loss of step {outcome.step} is {outcome.loss}" if not math.isfinite(outcome.loss) else (
            f"norm of the gradients of step {outcome.step} is {outcome.norm}"
        )  # fmt: skip
        if self.recipe.skip_nan and self.history.skipped_in_a_row < MOST_SKIPPED:
            logger.warning("The %s; the step is skipped (%d so far).", what, self.history.skipped)
            return
        kept = checkpoints(self.folder) if self.folder else []
        good = f"The last good checkpoint is {kept[-1]}." if kept else "There is no checkpoint."
        hint = f"{MOST_SKIPPED} steps in a row were skipped." if self.recipe.skip_nan else (
            "skip_nan=true would skip and count such steps."
        )  # fmt: skip
        raise TrainingError(f"The {what}, on the samples {listed(outcome.positions, most=16)}. {good} {hint}")
