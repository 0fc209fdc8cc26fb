"""The result of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipeline_dit import DiTPipeline
from .data import Dataset
from .recipe import Recipe


@dataclass
class TrainingResult:
    """The result of a run, or what it has reached so far.

    Args:
        pipeline: the trained model, ready to sample.
        recipe: how it was trained.
        dataset: what it was trained on.
        epoch_losses: mean training loss of each epoch.
        seconds: wall time of the steps of this process.
        finished: whether all steps are done; False after SIGTERM.
        main_process: whether this is the process that writes files.
        processes: number of processes that trained.
        skipped: number of steps that were skipped, for want of a finite loss.
        averages: weights of the moving averages after the first, by variant ("ema-9999").
        adapted: the model with adapters that are not merged, where the recipe keeps them apart.
        logs: folder with the files of trackers and `sample_every`.
    """

    pipeline: DiTPipeline
    recipe: Recipe
    dataset: Dataset
    epoch_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = True
    main_process: bool = True
    processes: int = 1
    skipped: int = 0
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    adapted: Any = None
    logs: Path | None = None
