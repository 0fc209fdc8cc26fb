"""Signals that ask a run to stop after its step, with a checkpoint."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A launcher forwards Ctrl-C to processes that get it from the terminal as well: within a second, it is one press.
_ONE_PRESS = 1.0


class StopRequest:
    """A request to stop a run, in `signal`: the number of the signal, or 0 where there was none.

    Args:
        announce: print what Ctrl-C does.
    """

    def __init__(self, announce: bool):
        self.signal, self._interrupted = 0, math.inf
        self._process = os.getpid() if announce else None

    def terminate(self, number: int, frame: Any) -> None:
        self.signal = number

    def interrupt(self, number: int, frame: Any) -> None:
        if time.monotonic() > self._interrupted + _ONE_PRESS:
            raise KeyboardInterrupt
        if not self.signal and os.getpid() == self._process:  # not in its forks
            os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.\n")
        self.signal = self.signal or number
        self._interrupted = min(self._interrupted, time.monotonic())


@contextmanager
def stop_signals(saves: bool, main: bool) -> Iterator[StopRequest]:
    """Take SIGTERM, which cluster schedulers send before they kill, and Ctrl-C as requests to stop.

    Args:
        saves: whether the run saves checkpoints; if not, Ctrl-C stops it at once, as usual. Where Ctrl-C is ignored, as
            in the background jobs of a script, it stays ignored.
        main: whether this is the main process, which prints what Ctrl-C does.
    """
    request = StopRequest(announce=main)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {signal.SIGTERM: request.terminate}
    if saves and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        handlers[signal.SIGINT] = request.interrupt
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
