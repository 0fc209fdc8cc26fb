"""The engine: requests of any steps, scales and solvers share the passes of one denoiser, and join and leave between steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from .requests import ImageRequest, Job, Listener, Observer


class Engine:
    """In-flight batching of one pipeline, driven by `step` and `decode`; of one thread alone.

    Args:
        pipeline: a `DiTPipeline` of any runtime, whose component is a denoiser and not a whole sampler.
        max_batch: rows of a pass; a guided image takes two.
        max_waiting: images that may wait; a request above that is refused with `QueueFullError`.
        batch_sizes: numbers of rows that the runtime takes, where it should see few; a pass is filled up to the next.
        observer: called after each pass.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        pipeline: Any,
        max_batch: int = 32,
        max_waiting: int = 1024,
        batch_sizes: Sequence[int] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """Images that have not begun."""
        raise NotImplementedError

    @property
    def running(self) -> int:
        """Images that have begun and are not decoded yet."""
        raise NotImplementedError

    def submit(self, request: ImageRequest, listener: Listener | None = None) -> Job:
        """Accept a request.

        Raises:
            ValueError: what the model or the solver cannot serve.
            QueueFullError: too many images wait.
        """
        raise NotImplementedError

    def cancel(self, job: Job) -> None:
        """Drop what is left of a job, at once."""
        raise NotImplementedError

    def step(self) -> bool:
        """One pass of the denoiser; False where no image waits for one."""
        raise NotImplementedError

    def decode(self) -> bool:
        """Decode the images (and previews) that are ready, a batch at a time; False where there are none."""
        raise NotImplementedError

    def run(self) -> None:
        """Step and decode until nothing is left."""
        raise NotImplementedError
