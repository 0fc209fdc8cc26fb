"""Signals that ask a run to stop, after a step and with a checkpoint."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A launcher passes on Ctrl-C, which its processes get from the terminal as well: within a second, one press.
_ONE_PRESS = 1.0


class Asked:
    """The number of the signal that asked a run to stop; 0 where none did."""

    def __init__(self, says_so: bool):
        self.signal, self._interrupted = 0, math.inf
        self._process = os.getpid() if says_so else None

    def terminate(self, number: int, frame: Any) -> None:
        self.signal = number

    def interrupt(self, number: int, frame: Any) -> None:
        if time.monotonic() > self._interrupted + _ONE_PRESS:
            raise KeyboardInterrupt
        if not self.signal and os.getpid() == self._process:  # not in what it forked
            os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.\n")
        self.signal = self.signal or number
        self._interrupted = min(self._interrupted, time.monotonic())


@contextmanager
def stop_signals(saves: bool, main: bool) -> Iterator[Asked]:
    """What SIGTERM, as schedulers of clusters send it before they kill, and Ctrl-C ask of a run.

    Args:
        saves: whether the run saves checkpoints; else Ctrl-C stops it at once, as usual. Where it is ignored, as shells
            have it for what runs in the background of a script, it stays so.
        main: whether this is the main process, which says what Ctrl-C does.
    """
    asked = Asked(says_so=main)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    handlers = {signal.SIGTERM: asked.terminate}
    if saves and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        handlers[signal.SIGINT] = asked.interrupt
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
