"""The training loop, on accelerate."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from .checkpoints import lock_run, remove_checkpoints
from .data import Dataset
from .loader import open_dataset
from .monitor import Monitor, make_accelerator
from .publish import open_publisher
from .recipe import Recipe
from .result import TrainingResult
from .run import Run, TrainingError
from .setup import check_fit, load_start, make_model
from .signals import stop_signals
from .together import failing_together

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """What a step came to: steps and epochs counted from 1; rates over the last ten steps, 0 before.

    `utilisation` is the share of the machine's measured peak that the model's operations take.
    """

    step: int
    last: int
    epoch: int
    loss: float
    pictures_per_second: float
    utilisation: float


Report = Callable[[Progress], None]


def train(
    recipe: Recipe,
    report: Report = lambda progress: None,
    run_folder: Path | None = None,
    resume: bool = True,
    dataset: Dataset | None = None,
) -> TrainingResult:
    """Train a model.

    What a step does is a function of the recipe's seed and the step's number, so that a resumed run goes on bit for bit
    on a CPU, and two processes see what one would; of streamed data each sees a part of its own.

    Args:
        recipe: what to do.
        report: called for each step in turn, in the main process; while the next one is under way.
        run_folder: where checkpoints go; None for none.
        resume: go on from the last checkpoint of `run_folder`, if there is one.
        dataset: in place of the recipe's data.

    Raises:
        ValueError: data, model and batch that do not go together, or a run folder of another recipe or run.
        TrainingError: a loss that is not finite, or too many unreadable files.
        KeyboardInterrupt: Ctrl-C, with a `run_folder` after the step and its checkpoint; a second one stops at once.
    """
    accelerator = make_accelerator(recipe, run_folder)
    with contextlib.ExitStack() as stack:
        with failing_together(accelerator):
            stack.enter_context(lock_run(run_folder))
            run = _start(recipe, accelerator, run_folder, resume, dataset)
        main, start = accelerator.is_main_process, time.perf_counter()
        stack.enter_context(_products(recipe.mixed_precision))
        asked = stack.enter_context(stop_signals(run_folder is not None, main))
        publisher = open_publisher(recipe.push_to_hub, accelerator)
        stack.callback(publisher.wait, lambda: run.stopping or asked.signal)  # what asks to stop kills before long
        config = run.weights.plain.config
        monitor = stack.enter_context(contextlib.closing(Monitor(accelerator, recipe, config, run_folder, run.step)))
        left = stack.enter_context(contextlib.closing(run.batches()))  # ends the processes that read, however this ends
        stack.enter_context(failing_together(accelerator))  # the last, so that others hear first what happens here
        for batches in left:
            run.step_on(batches, asked.signal)
            pauses = run.step == run.last or due(recipe.save_every, run) or due(recipe.sample_every, run)
            for step, loss in run.settled(pauses):
                if main:
                    monitor.step(step, loss, run.learning_rate(step))
                    rates = monitor.pictures_per_second, monitor.utilisation
                    report(Progress(step, run.last, run.epoch(step), loss, *rates))
                monitor.resume_clock()
            cut = run.stopping and run.step < run.last
            if cut or due(recipe.save_every, run) or run.step == run.last:  # the last, whatever becomes of the result
                saved = run.save()
                if cut and run_folder is not None and not saved:
                    raise TrainingError(f"Stopped after step {run.step}, and no checkpoint of it could be written.")
                if recipe.push_to_hub and run.step < run.last and not cut:
                    publisher.push(run.result(time.perf_counter() - start), run.step)
            if cut and run.stopping == signal.SIGINT:
                raise KeyboardInterrupt(f"Stopped after step {run.step}, with a checkpoint in {run_folder}.")
            if cut:
                break
            if due(recipe.sample_every, run):
                reached = run.result(time.perf_counter() - start)
                if main:
                    monitor.draw(reached.pipeline, run.step)
            if pauses:
                monitor.resume_clock()
        return run.result(time.perf_counter() - start)


def _start(
    recipe: Recipe, accelerator: Accelerator, run_folder: Path | None, resume: bool, dataset: Dataset | None
) -> Run:
    """A run that is about to take its first step, or the next after its last checkpoint; see `train`."""
    torch.manual_seed(recipe.seed)
    base = load_start(recipe.init_from) if recipe.init_from else None
    config: Any = recipe.config if base is None else base.transformer.config
    if dataset is None:
        dataset = open_dataset(recipe.data, config.sample_height_width[0], recipe.images_per_class, recipe.seed,
                               recipe.streaming)  # fmt: skip
    model = make_model(recipe, dataset, base)
    check_fit(recipe, model, dataset, accelerator.num_processes, base)
    for note in dataset.notes if accelerator.is_main_process else ():
        logger.warning(note)
    run = Run(recipe, model, dataset, accelerator, run_folder, base)
    if resume:
        run.resume()
    elif accelerator.is_main_process:
        remove_checkpoints(run_folder)
    return run


def due(every: int, run: Run) -> bool:
    """Whether something that is done every so many steps is to be done now; at the last step it is."""
    return bool(every) and (run.step % every == 0 or run.step == run.last)


@contextlib.contextmanager
def _products(precision: str) -> Iterator[None]:
    """How float32 is multiplied while training: in tf32 where a recipe says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
