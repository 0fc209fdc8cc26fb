"""Pushing checkpoints to the Hub while training continues.

`HfApi.run_as_future` is not used: the interpreter joins its thread at exit, so that a run that was stopped would wait
for its upload.
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..hub import make_repository, push_folder
from .output import write_result
from .result import TrainingResult

_SECONDS = 0.5  # between two checks whether to stop waiting

logger = logging.getLogger(__name__)


def open_publisher(repository: str, accelerator: Accelerator) -> "Publisher":
    """A publisher that pushes from the main process; an error in it is raised in all processes."""
    publisher, problem = Publisher(""), [""]
    if repository and accelerator.is_main_process:
        try:
            publisher = Publisher(repository)
        except (OSError, ValueError) as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise OSError(problem[0])
    return publisher


class Publisher:
    """Pushes pipelines and their cards in the background; a push that fails does not end the run.

    Args:
        repository: "organisation/name", which is created if it does not exist; "" pushes nothing.

    Raises:
        OSError: the Hub refuses it, or cannot be reached.
    """

    def __init__(self, repository: str):
        self.repository = make_repository(repository) if repository else ""
        self._last: Thread | None = None

    def push(self, result: TrainingResult, step: int) -> None:
        """Start a push; while the last one is still running, this one is left out."""
        if self.repository and (self._last is None or not self._last.is_alive()):
            # The process does not wait for a daemon thread at its end.
            self._last = Thread(target=self._push, args=(result, step), name="push", daemon=True)
            self._last.start()

    def _push(self, result: TrainingResult, step: int) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_result(result, Path(folder))
                push_folder(folder, self.repository, f"Step {step}")
        except Exception as error:  # whatever it is, training is worth more
            logger.warning("Step %d was not pushed to %s: %s Training continues.", step, self.repository, error)

    def wait(self, unless: Callable[[], Any]) -> None:
        """Wait for the push that is running, if any, until `unless` returns true."""
        while self._last is not None and self._last.is_alive() and not unless():
            self._last.join(_SECONDS)
