"""Threads around an engine: one steps, one decodes, any may submit."""

import logging
import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from .engine import Engine
from .requests import ClosedError, ImageRequest, Job, Listener

_log = logging.getLogger(__name__)


class FairLock(AbstractContextManager):
    """A lock that goes to whoever waits longest; a plain one goes back to a thread that takes it again at once."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        self._is_held = False

    def __enter__(self) -> "FairLock":
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return self
            turn = threading.Lock()
            turn.acquire()
            self._queue.append(turn)
        turn.acquire()  # released by whoever hands the lock over
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._is_held = False


class Runner:
    """An engine that runs by itself; all methods may be called from any thread.

    Args:
        pipeline, options: as for `Engine`.
        device_lock: held during a pass; runners of one device share a `FairLock`.
    """

    def __init__(self, pipeline: Any, device_lock: AbstractContextManager | None = None, **options: Any):
        self._engine = Engine(pipeline, **options)
        self._device_lock = device_lock or nullcontext()
        self._error: Exception | None = None
        self._accepts, self._ends = True, False
        self._to_step, self._to_decode = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(self._step, self._to_step), name="dit-hub-step", daemon=True),
            threading.Thread(
                target=self._work, args=(self._decode, self._to_decode), name="dit-hub-decode", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def engine(self) -> Engine:
        """The engine, to read `waiting` and `running`."""
        return self._engine

    @property
    def error(self) -> Exception | None:
        """Why the engine's threads ended, if they did; then every job fails and `submit` raises RuntimeError."""
        return self._error

    def submit(self, request: ImageRequest, listener: Listener | None = None) -> Job:
        """As `Engine.submit`; the listener is called on the runner's threads and must return at once.

        Raises:
            RuntimeError: the runner is closed, or broke.
        """
        if self._error is not None:
            raise RuntimeError(f"The engine has stopped: {self._error}")
        if not self._accepts:
            raise ClosedError
        job = self._engine.submit(request, listener)
        self._to_step.set()
        if self._ends or self._error is not None:  # meanwhile
            self._engine.fail_all(self._error or ClosedError())
        return job

    def cancel(self, job: Job) -> None:
        """As `Engine.cancel`."""
        self._engine.cancel(job)

    def close(self, finish_within: float = 0.0) -> None:
        """Take no more requests, finish those accepted within so many seconds, fail the rest and end the threads."""
        self._accepts = False
        until = time.monotonic() + finish_within
        while self._error is None and time.monotonic() < until and not self._engine.is_idle:
            time.sleep(0.01)
        self._ends = True
        self._engine.fail_all(ClosedError())
        for event in (self._to_step, self._to_decode):
            event.set()
        for thread in self._threads:
            thread.join()

    def _step(self) -> bool:
        with self._device_lock:
            went = self._engine.step()
        if went:
            self._to_decode.set()
        return went

    def _decode(self) -> bool:
        went = self._engine.decode()
        if went:
            self._to_step.set()  # what waited for memory may begin
        return went

    def _work(self, act: Any, wake: threading.Event) -> None:
        """Act until there is nothing to do, then wait; where it fails, no thread goes on."""
        try:
            while not self._ends:
                wake.clear()
                if not act():
                    wake.wait(timeout=1.0)  # deadlines of what waits pass meanwhile
        except Exception as error:
            _log.exception("The engine stopped.")
            self._error = error
            self._ends = True
            self._engine.fail_all(RuntimeError(f"The engine has stopped: {error}"))
            for event in (self._to_step, self._to_decode):
                event.set()
