"""What a run has reached."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipeline_dit import DiTPipeline
from .data import Dataset
from .recipe import Recipe


@dataclass
class TrainingResult:
    """What a run leaves, or has reached so far.

    Args:
        pipeline: the trained model, ready to sample.
        recipe: how it was trained.
        dataset: what it was trained on.
        epoch_losses: mean training loss of each epoch.
        seconds: wall time of the steps of this process.
        finished: whether all steps are done; not so after SIGTERM.
        main_process: whether this is the process that writes.
        processes: how many trained.
        skipped: steps without a finite loss.
        averages: weights of the further moving averages, by variant ("ema-9999").
        adapted: the model with its adapters apart, where the recipe does not merge them.
        logs: what trackers and `sample_every` wrote, a folder.
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
