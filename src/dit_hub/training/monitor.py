"""Watching a run: its progress, and losses, rates and samples in accelerate's trackers."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from ..flops import matmul_peak, measure
from ..pipeline_dit import DiTPipeline
from ..visualize import sample_grid
from .checkpoints import LOGS_FOLDER
from .recipe import Recipe
from .run import Run

logger = logging.getLogger(__name__)

_STEPS = 10  # averaged for each entry of the log


class Progress(NamedTuple):
    """The outcome of a step; steps and epochs count from 1.

    `images_per_second` and `mfu` are means over the last ten steps, 0 before. `mfu`, the model FLOPs utilisation, is
    the share of the machine's measured peak that the model's operations take.
    """

    step: int
    last: int
    epoch: int
    loss: float
    images_per_second: float
    mfu: float


Report = Callable[[Progress], None]


def make_accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
    """The accelerator for a recipe, with its tracker if there is a folder for its files.

    Raises:
        ValueError: accelerate has no such tracker.
        ImportError: the tracker's package is missing.
    """
    tracker = None if recipe.tracker == "none" or folder is None else recipe.tracker
    if tracker and tracker not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ValueError(f"There is no tracker {tracker!r}; the known ones are none, {known}.")
    if tracker and tracker not in map(str, get_available_trackers()):
        raise ImportError(f"The tracker {tracker} needs its package: pip install {tracker}; or set tracker=none.")
    AcceleratorState._reset_state()  # without it, a process is bound to the precision of its first run
    precision = "no" if recipe.mixed_precision == "tf32" else recipe.mixed_precision
    return Accelerator(mixed_precision=precision, log_with=tracker, project_dir=folder)


class Monitor:
    """The log of a run: loss, learning rate, images per second and model FLOPs utilisation (MFU).

    Args:
        run: what to watch.
        report: called after each step, in the main process.
    """

    def __init__(self, run: Run, report: Report):
        self.run, self.report, self.accelerator = run, report, run.accelerator
        self.folder = None if run.folder is None else run.folder / LOGS_FOLDER
        self.images_per_second, self.mfu = 0.0, 0.0
        if self.accelerator.is_main_process:
            self._share_of_one = _share_of_peak(run)
        self._working = True
        if self.accelerator.log_with:
            self._open_trackers()
        self._losses: list[float] = []
        self._seconds = 0.0
        self._since = time.perf_counter()

    def _open_trackers(self) -> None:
        board = self.run.recipe.tracker == "tensorboard"
        # A killed run may have logged steps that are now taken again.
        options = {"tensorboard": {"purge_step": self.run.step + 1}} if board else {}
        project = LOGS_FOLDER if board else "dit-hub"
        self._try(lambda: self.accelerator.init_trackers(project, init_kwargs=options))
        self._try(lambda: self.accelerator.log({"recipe": str(self.run.recipe)}, step=self.run.step))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the rates."""
        yield
        self._since = time.perf_counter()

    def step(self, step: int, loss: float) -> None:
        """Log and report a step, in the main process."""
        if not self.accelerator.is_main_process:
            return
        self._losses.append(loss)
        self._seconds += time.perf_counter() - self._since
        with self.pause():
            if step % _STEPS == 0:
                self._log(step)
            run = self.run
            rates = self.images_per_second, self.mfu
            self.report(Progress(step, run.last, run.history.epoch(step), loss, *rates))

    def _log(self, step: int) -> None:
        self.images_per_second = len(self._losses) * self.run.recipe.batch_size / self._seconds
        self.mfu = self.images_per_second * self._share_of_one
        values = {
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": self.run.learning_rate(step),
            "images_per_second": self.images_per_second,
            "mfu": self.mfu,
        }
        self._try(lambda: self.accelerator.log(values, step=step))
        self._losses, self._seconds = [], 0.0

    def draw(self, pipeline: DiTPipeline, step: int) -> None:
        """Draw samples and log them, in the main process."""
        if not self.accelerator.is_main_process:
            return
        pipeline.set_progress_bar_config(disable=True)
        cast(Any, pipeline).to(self.accelerator.device)
        grid = sample_grid(pipeline)
        cast(Any, pipeline).to("cpu")  # a decoder that is kept leaves its memory to training
        self._try(lambda: self._write(grid, step))

    def _write(self, grid: Image.Image, step: int) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            grid.save(self.folder / f"samples-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            log_images = getattr(tracker, "log_images", None)
            if tracker.name == "tensorboard" and log_images is not None:
                log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            elif log_images is not None:
                log_images({"samples": [grid]}, step=step)

    def close(self) -> None:
        """Finish the log files."""
        for tracker in self.accelerator.trackers:
            self._try(tracker.finish)

    def _try(self, action: Callable[[], Any]) -> None:
        """Log, unless that failed before: a full disk or an unreachable service is no reason to stop training."""
        try:
            if self._working:
                action()
        except Exception as error:  # whatever a tracker raises
            self._working = False
            logger.error("Nothing more is logged: %s Training continues.", error)


def _share_of_peak(run: Run) -> float:
    """The share of the machine's peak that training on one image per second takes."""
    device = run.accelerator.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.recipe.mixed_precision, torch.float32)
    peak = matmul_peak(device, dtype, 8192 if device.type == "cuda" else 512) * run.accelerator.num_processes
    # Forward and backward are three passes (Kaplan et al. 2020), of two operations a multiply-accumulate.
    return 3 * 2e9 * measure(run.weights.plain.config).gmacs / peak
