"""The training loop, on accelerate."""

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from .checkpoints import lock_run, remove_checkpoints
from .data import Batch, Dataset
from .loader import open_dataset
from .monitor import Monitor, Progress, Report, make_accelerator
from .publish import Publisher, open_publisher
from .recipe import Recipe
from .result import TrainingResult
from .run import Run, TrainingError
from .saving import result_of, resume_run, save_run, stop_run
from .setup import check_fit, load_start, make_model
from .signals import StopRequest, stop_signals
from .together import failing_together

__all__ = ["Progress", "TrainingError", "train"]

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    report: Report = lambda progress: None,
    run_folder: Path | None = None,
    resume: bool = True,
    dataset: Dataset | None = None,
) -> TrainingResult:
    """Train a model.

    A step is a function of the recipe's seed and the step's number. So a resumed run ends in the same bits on a CPU,
    and two processes see the data that one would, except streamed data, of which each sees a part of its own.

    Args:
        recipe: what to do.
        report: called after each step, in the main process, while the next step is computed.
        run_folder: where checkpoints go; None for none.
        resume: continue from the last checkpoint in `run_folder`, if there is one.
        dataset: data to use in place of the recipe's.

    Raises:
        ValueError: data, model and batch do not go together, or the run folder belongs to another recipe or run.
        TrainingError: a loss that is not finite, or too many unreadable files.
        KeyboardInterrupt: Ctrl-C; with a `run_folder`, after the step and its checkpoint. A second one stops at once.
    """
    accelerator = make_accelerator(recipe, run_folder)
    with contextlib.ExitStack() as stack:
        with failing_together(accelerator):
            stack.enter_context(lock_run(run_folder))
            run = _start(recipe, accelerator, run_folder, resume, dataset)
        stack.enter_context(_matmul_precision(recipe.mixed_precision))
        request = stack.enter_context(stop_signals(run_folder is not None, accelerator.is_main_process))
        publisher = open_publisher(recipe.push_to_hub, accelerator)
        # Whoever sends a signal kills before long.
        stack.callback(publisher.wait, unless=lambda: run.asked_to_stop or request.signal)
        monitor = stack.enter_context(contextlib.closing(Monitor(run, report)))
        data = stack.enter_context(contextlib.closing(run.batches()))  # ends the data workers, however this ends
        stack.enter_context(failing_together(accelerator))  # innermost, so that the others hear of an error first
        return _loop(run, data, request, monitor, publisher)


def _loop(
    run: Run, data: Iterable[list[Batch]], request: StopRequest, monitor: Monitor, publisher: Publisher
) -> TrainingResult:
    for batches in data:
        run.train_step(batches, request.signal)
        for step, loss in run.settled():
            monitor.step(step, loss)
        if run.stopping:
            stop_run(run)
            break
        if run.pauses:
            with monitor.pause():
                _save_and_draw(run, monitor, publisher)
    return result_of(run)


def _save_and_draw(run: Run, monitor: Monitor, publisher: Publisher) -> None:
    """Save a checkpoint, push it and draw samples, each if it is due."""
    if run.due(run.recipe.save_every) or run.step == run.last:  # the last one, in case the result cannot be saved
        save_run(run)
        if run.recipe.push_to_hub and run.step < run.last:
            publisher.push(result_of(run), run.step)
    if run.due(run.recipe.sample_every):
        monitor.draw(result_of(run).pipeline, run.step)


def _start(
    recipe: Recipe, accelerator: Accelerator, run_folder: Path | None, resume: bool, dataset: Dataset | None
) -> Run:
    """A run that is ready for its first step, or for the one after its last checkpoint; see `train`."""
    torch.manual_seed(recipe.seed)
    base = load_start(recipe.init_from) if recipe.init_from else None
    config: Any = recipe.config if base is None else base.transformer.config
    if dataset is None:
        dataset = open_dataset(recipe.data, config.sample_height_width[0], recipe.images_per_class, recipe.seed,
                               recipe.streaming)  # fmt: skip
    teacher = copy.deepcopy(cast(Any, base).transformer) if recipe.distill else None
    model = make_model(recipe, dataset, base)
    check_fit(recipe, model, dataset, accelerator.num_processes, base)
    for note in dataset.notes if accelerator.is_main_process else ():
        logger.warning(note)
    run = Run(recipe, model, dataset, accelerator, run_folder, base, teacher)
    if resume:
        resume_run(run)
    elif accelerator.is_main_process:
        remove_checkpoints(run_folder)
    return run


@contextlib.contextmanager
def _matmul_precision(mixed_precision: str) -> Iterator[None]:
    """Multiply float32 matrices in tf32 while training, if the recipe says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if mixed_precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
