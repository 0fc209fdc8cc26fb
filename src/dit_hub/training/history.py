"""The history of a run: its losses, and the steps and files it left out."""

import logging
from typing import Any

logger = logging.getLogger(__name__)


class History:
    """Losses by epoch, skipped steps and unreadable files; steps and epochs count from 1.

    Args:
        steps_per_epoch: optimizer steps of a pass over the data.
    """

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch
        self.losses: list[float] = []  # of the current epoch
        self.epoch_losses: list[float] = []
        self.skipped = self.skipped_in_a_row = 0
        self.unreadable: set[str] = set()
        self.last_unreadable = ""

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return 1 + (step - 1) // self.steps_per_epoch

    def add(self, step: int, loss: float | None) -> None:
        """Add a step; its loss is None where it was skipped."""
        if loss is None:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.losses.append(loss)
            self.skipped_in_a_row = 0
        if step % self.steps_per_epoch == 0:
            self.epoch_losses.append(sum(self.losses) / len(self.losses) if self.losses else 0.0)
            self.losses = []

    def add_unreadable(self, names: list[str]) -> None:
        """Warn about unreadable files, once about each."""
        for name in names:
            if name not in self.unreadable:
                self.unreadable.add(name)
                self.last_unreadable = name
                logger.warning("%s cannot be read and is left out (%d so far).", name, len(self.unreadable))

    def mean_losses(self) -> list[float]:
        """The mean loss of each epoch, the current one included."""
        return self.epoch_losses + ([sum(self.losses) / len(self.losses)] if self.losses else [])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the history, for JSON."""
        return {
            "losses": self.losses,
            "epoch_losses": self.epoch_losses,
            "unreadable": sorted(self.unreadable),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            KeyError, TypeError: it is damaged.
        """
        self.losses, self.epoch_losses = state["losses"], state["epoch_losses"]
        self.unreadable, self.skipped = set(state["unreadable"]), state["skipped"]
