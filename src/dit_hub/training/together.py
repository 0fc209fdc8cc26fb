"""Processes that train together: the outcome of a step in all of them, and an error in one that ends all."""

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


class StepOutcome:
    """The outcome of a step in all processes; it is copied from the device while the next step runs.

    Args:
        accelerator: of the run.
        step: counted from 1.
        positions: positions in the data set of this process's samples.
        loss, norm: this process's loss and gradient norm, scalars on the device.
        unreadable: number of files that this process could not read so far.
        asked_to_stop: number of the signal that asked this process to stop, or 0.
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
        # Made on the device: a copy from the CPU would wait for everything that the device has to do.
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
        """The mean loss over all processes."""
        return float(self._columns[0].mean())

    @property
    def norm(self) -> float:
        """The norm of the gradients, which all processes share."""
        return float(self._columns[1].max())

    @property
    def unreadable(self) -> int:
        """The number of unreadable files in the process that has most."""
        return int(self._columns[2].max())

    @property
    def asked_to_stop(self) -> int:
        """The number of the signal that asked any process to stop, or 0."""
        return int(self._columns[3].max())


# Between two checks on the others; a process has three times as long to end by itself after another has failed.
_SECONDS = 1.0

# Numbers the runs of a process; all processes start the same runs in the same order.
_RUNS = itertools.count()


@contextlib.contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """End all processes within seconds of an error in one of them, wherever they wait for it.

    The process that fails writes its error to the store where the processes met, which the others check. One that then
    does not end by itself, because it waits for an exchange that will never happen, prints the error and exits with
    status 1. A launcher only ends the others once the failed process has exited, and only on its own machine.

    Raises:
        ConnectionError: an exchange failed because another process has failed.
    """
    if not dist.is_initialized() or accelerator.num_processes == 1:
        yield
        return
    store: Any = _get_default_store()
    notes = dist.PrefixStore(
        f"dit-hub/{next(_RUNS)}", store.clone()
    )  # a connection of its own, which no other call blocks
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
            with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
                notes.set(_KEY, f"Process {accelerator.process_index} has failed, and with it the run: {what}")
        raise
    finally:
        over.set()
        watcher.join()


_KEY = "failure"


def _failure(notes: Any) -> str:
    """The error that a process wrote to the store; empty where none has failed."""
    try:
        return notes.get(_KEY).decode() if notes.check([_KEY]) else ""
    except RuntimeError:  # the store is gone with the process that held it
        return ""


def _watch(notes: Any, over: threading.Event) -> None:
    """Exit this process if another fails and this one does not end by itself; returns when `over` is set."""
    while not over.wait(_SECONDS):
        failure = _failure(notes)
        if failure and not over.wait(3 * _SECONDS):
            print(f"error: {' '.join(failure.split())}", file=sys.stderr, flush=True)
            os._exit(1)
