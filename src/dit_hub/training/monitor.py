"""What is seen of a run while it goes on: losses and rates in trackers, pictures."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from ..flops import matmul_peak, measure
from ..pipeline_dit import DiTPipeline
from ..visualize import sample_grid
from .recipe import Recipe

logger = logging.getLogger(__name__)

# The folder of logs beside the checkpoints, and then in the pipeline's; the Hub shows TensorBoard's from "runs".
LOGS_FOLDER = "runs"

_STEPS = 10  # of which the log shows the mean


def make_accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
    """For a recipe, with its tracker if there is a folder for its files.

    Raises:
        ValueError: accelerate knows no such tracker.
        ImportError: the tracker's package is missing.
    """
    tracker = None if recipe.tracker == "none" or folder is None else recipe.tracker
    if tracker and tracker not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"There is no tracker {tracker!r}; there are none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
    if tracker and tracker not in map(str, get_available_trackers()):
        raise ImportError(f"The tracker {tracker} needs its package: pip install {tracker}; or set tracker=none.")
    AcceleratorState._reset_state()  # or a process could not train in another precision than before
    precision = "no" if recipe.mixed_precision == "tf32" else recipe.mixed_precision
    return Accelerator(mixed_precision=precision, log_with=tracker, project_dir=folder)


class Monitor:
    """The log of a run: loss, learning rate, pictures per second and the share of the machine's peak that they take.

    Args:
        accelerator: see `make_accelerator`.
        recipe, config: of the run and of its model.
        folder: of the run's checkpoints; None for no files.
        step: steps done, by a run that goes on.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, config: Any, folder: Path | None, step: int):
        self.accelerator, self.batch_size = accelerator, recipe.batch_size
        self.folder = None if folder is None else folder / LOGS_FOLDER
        self.pictures_per_second, self.utilisation = 0.0, 0.0
        if accelerator.is_main_process:
            device = accelerator.device
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision, torch.float32)
            peak = matmul_peak(device, dtype, 8192 if device.type == "cuda" else 512) * accelerator.num_processes
            # Forward and backward are three passes (Kaplan et al. 2020), of two operations a multiply-accumulate.
            self._share_of_one = 3 * 2e9 * measure(config).gmacs / peak
        self._working = True
        if accelerator.log_with:
            board = recipe.tracker == "tensorboard"
            # A killed run wrote steps that are now taken again.
            options = {"tensorboard": {"purge_step": step + 1}} if board else {}
            self._try(lambda: accelerator.init_trackers(LOGS_FOLDER if board else "dit-hub", init_kwargs=options))
            self._try(lambda: accelerator.log({"recipe": str(recipe)}, step=step))
        self._losses: list[float] = []
        self._seconds = 0.0
        self.resume_clock()

    def resume_clock(self) -> None:
        """Count time from here: what was done since the last step was no training."""
        self._since = time.perf_counter()

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Take note of a step, in the main process."""
        self._losses.append(loss)
        self._seconds += time.perf_counter() - self._since
        if step % _STEPS:
            return
        self.pictures_per_second = len(self._losses) * self.batch_size / self._seconds
        self.utilisation = self.pictures_per_second * self._share_of_one
        values = {
            "loss": sum(self._losses) / len(self._losses),
            "learning rate": learning_rate,
            "pictures per second": self.pictures_per_second,
            "model-flops utilisation": self.utilisation,
        }
        self._try(lambda: self.accelerator.log(values, step=step))
        self._losses, self._seconds = [], 0.0

    def draw(self, pipeline: DiTPipeline, step: int) -> None:
        """Log pictures of what the model draws now, in the main process."""
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
        """Finish the files."""
        for tracker in self.accelerator.trackers:
            self._try(tracker.finish)

    def _try(self, action: Callable[[], Any]) -> None:
        """Log, unless that failed once: a full disk or a service that is away is no reason to stop training."""
        try:
            if self._working:
                action()
        except Exception as error:  # whatever a tracker raises
            self._working = False
            logger.error("Nothing more is logged: %s Training goes on.", error)
