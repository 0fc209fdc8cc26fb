"""Processes that train together: what they tell each other of a step, and that none waits for one that has failed."""

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store


class Outcome:
    """What a step came to in all processes, on its way from the device while the next step is started.

    Args:
        accelerator: of the run.
        step: counted from 1.
        positions: of the step's samples in this process.
        loss, norm: of this process, scalars on the device; the norm is that of the gradients.
        unreadable: files that this process could not read so far.
        asked_to_stop: the number of the signal by which this process was, or 0.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        step: int,
        positions: list[int],
        loss: Tensor,
        norm: Tensor,
        unreadable: int,
        asked_to_stop: int,
    ):
        self.step, self.positions = step, positions
        # Made on the device: a copy from the processor would wait for all that the device has to do.
        rest = [torch.full((), float(value), device=loss.device) for value in (unreadable, asked_to_stop)]
        mine = torch.stack([loss.float(), norm.float(), *rest])
        everyone: Tensor = cast(Any, accelerator.gather(mine[None]))  # (processes, 4)
        self._shared = everyone.to("cpu", non_blocking=everyone.is_cuda)  # from a GPU into pinned memory
        self._copied = torch.cuda.Event() if everyone.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    @cached_property
    def _columns(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._shared.T

    @property
    def loss(self) -> float:
        """The mean over all processes."""
        return float(self._columns[0].mean())

    @property
    def norm(self) -> float:
        """Of the gradients of all processes."""
        return float(self._columns[1].max())

    @property
    def unreadable(self) -> int:
        """Of the process that could read least."""
        return int(self._columns[2].max())

    @property
    def asked_to_stop(self) -> int:
        """The number of the signal by which any process was, or 0."""
        return int(self._columns[3].max())


# Between two looks at the others, and for an end of its own where another has failed.
_SECONDS = 1.0

# Each run has a word of its own to say so; processes start the same runs in the same order.
_RUNS = itertools.count()


@contextlib.contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """An error in one process ends the others within seconds, wherever they wait for it.

    The one that fails says so in the store where the processes met. The others look there; one that does not come to an
    end of its own, since it waits for an exchange that will not be, says what happened and exits with status 1.

    Raises:
        ConnectionError: an exchange failed, since another process has.
    """
    if not dist.is_initialized() or accelerator.num_processes == 1:
        yield
        return
    store: Any = _get_default_store()
    notes = dist.PrefixStore(f"dit-hub/{next(_RUNS)}", store.clone())  # a connection of its own, never held by others
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(notes, over), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        failure = _failure(notes)
        if failure and isinstance(error, RuntimeError):
            raise ConnectionError(failure) from None
        if not failure:
            what = str(error) or type(error).__name__
            with contextlib.suppress(RuntimeError):  # the store went with the process that held it
                notes.set(_KEY, f"Process {accelerator.process_index} has failed, and with it the run: {what}")
        raise
    finally:
        over.set()
        watcher.join()


_KEY = "failure"


def _failure(notes: Any) -> str:
    """What a process said of its failure; nothing where none has failed."""
    try:
        return notes.get(_KEY).decode() if notes.check([_KEY]) else ""
    except RuntimeError:  # the store went with the process that held it
        return ""


def _watch(notes: Any, over: threading.Event) -> None:
    while not over.wait(_SECONDS):
        failure = _failure(notes)
        if failure and not over.wait(3 * _SECONDS):
            print(f"error: {' '.join(failure.split())}", file=sys.stderr, flush=True)
            os._exit(1)
