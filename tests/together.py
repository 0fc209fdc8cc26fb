"""A Python function in two processes that train together, forked from one that has the libraries in memory.

Their environment is what `accelerate launch` and `torchrun` give; `test_distributed.py` uses the launcher as well.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PROCESSES = 2

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dit_hub.training.loop"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(rank: int, processes: int, local_rank: int, local_processes: int, port: int) -> dict[str, str]:
    """What a launcher tells one of the processes; they meet at a port of this machine, and compute on the CPU."""
    place = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_processes}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return {name: str(value) for name, value in place.items()} | meeting


def _main(told: dict[str, str], errors: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Be one of the processes; what the user could fix is one sentence and exit status 2, as at the command line."""
    os.environ.update(told)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Together:
    """`function(*arguments)` in each process, started."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, processes: int = PROCESSES):
        self._folder, port = tempfile.TemporaryDirectory(), free_port()
        self.processes: list[ForkServerProcess] = []
        self._errors: list[Path] = []
        for rank in range(processes):
            told = environment(rank, processes, rank, processes, port)
            errors = Path(self._folder.name) / f"errors-{rank}"
            errors.touch()
            self._errors.append(errors)
            self.processes.append(_CONTEXT.Process(target=_main, args=(told, errors, function, arguments)))
        for process in self.processes:
            process.start()

    def wait(self, rank: int, timeout: float = 600) -> tuple[int, str]:
        """The end of a process: its status and errors."""
        process = self.processes[rank]
        process.join(timeout)
        said = self._errors[rank].read_text()
        if process.exitcode is None:
            for each in self.processes:
                each.kill()
            raise AssertionError(f"Process {rank} still runs after {timeout} s: {said}")
        return process.exitcode, said
