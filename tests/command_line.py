"""The command line in a process of its own, forked from one that has the libraries in memory already.

Importing them takes 5 s, and there are some 200 such processes: started afresh they were half of the tests' time.
What a process does is what `python -m dit_hub.cli` does; some tests still start that.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dit_hub.cli", "dit_hub.pipeline_dit", "dit_hub.training.loop", "dit_hub.export"])


def _main(
    arguments: list[str], cwd: Path, environment: dict[str, str], output: Path, errors: Path, file_limit: int | None
) -> None:
    """Be the command line."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
    sys.argv = ["dit-hub", *arguments]
    # What it starts is started as usual, not by a server that outlives it when it is killed.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    from dit_hub.cli import main

    main()


class Command:
    """`dit-hub ARGUMENTS`, started; `file_limit` bytes is the largest file it can write, as on a full disk."""

    def __init__(self, *arguments: object, cwd: Path, file_limit: int | None = None) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("output", "errors")]
        for file in self._files:
            file.touch()
        settings = (self.arguments, cwd, dict(os.environ), *self._files, file_limit)
        self.process: ForkServerProcess = _CONTEXT.Process(target=_main, args=settings)
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its end: status (minus a signal's number), output and errors."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"{self.arguments} still runs after {timeout} s"
        output, errors = (file.read_text() for file in self._files)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, output, errors)


def dit_hub(*arguments: object, cwd: Path, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return Command(*arguments, cwd=cwd, file_limit=file_limit).wait()
