"""Threads around an engine: one steps, one decodes, any may submit."""

from typing import Any

from .requests import ImageRequest, Job, Listener


class Runner:
    """An engine that runs by itself; all methods may be called from any thread.

    Args:
        pipeline, options: as for `Engine`.
        device_lock: held during a pass and a decoding; runners of one device share it.
    """

    def __init__(self, pipeline: Any, device_lock: Any = None, **options: Any):
        raise NotImplementedError

    @property
    def engine(self) -> Any:
        """The engine, to read `waiting` and `running`."""
        raise NotImplementedError

    @property
    def error(self) -> Exception | None:
        """Why the engine's threads ended, if they did; then every job fails and `submit` raises RuntimeError."""
        raise NotImplementedError

    def submit(self, request: ImageRequest, listener: Listener | None = None) -> Job:
        """As `Engine.submit`; the listener is called on the runner's threads and must return at once."""
        raise NotImplementedError

    def cancel(self, job: Job) -> None:
        """As `Engine.cancel`."""
        raise NotImplementedError

    def close(self, finish_within: float = 0.0) -> None:
        """Take no more requests, finish those accepted within so many seconds, fail the rest and end the threads."""
        raise NotImplementedError
