"""The command line, and other Python programs, in processes forked from one that has the libraries in memory already.

Importing them takes 5 s, and there are some 300 such processes: without forking they took more than half of the tests'
time. Nothing of dit_hub is imported ahead: a process does what `python` with the same arguments does. Some tests still
start `python` itself.
"""

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traced import install

# What commands, scripts and exports import; one that is missing here only costs time.
LIBRARIES = (
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
    "transformers.modeling_utils",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.training_utils",
    "accelerate",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "networkx",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "rich.progress",
    "typer",
)

# --- The process that forks ------------------------------------------------------------------------------------------


def _serve() -> None:
    """Fork for each socket that arrives through standard input, until that is closed."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()  # so that garbage collection in children does not copy all memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the system forgets the children
    control = socket.socket(fileno=os.dup(0))
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        client = socket.socket(fileno=descriptors[0])
        if not os.fork():
            control.close()
            with contextlib.suppress(OSError):  # the client is gone
                _watch(client)
            os._exit(0)
        client.close()


def _watch(client: socket.socket) -> None:
    """Start what the client asks for; tell it the process's id and, in the end, its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(client.makefile().readline())
    process = multiprocessing.get_context("fork").Process(target=_become, args=(client, request))
    process.start()
    client.sendall(f"{process.pid}\n".encode())
    process.join()
    client.sendall(f"{process.exitcode}\n".encode())


def _become(client: socket.socket, request: dict[str, Any]) -> None:
    """Do what `python ARGUMENTS` does."""
    client.close()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
    if limit := request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    install()
    what, *sys.argv = request["arguments"]
    sys.path[0] = request["cwd"]
    if what == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        code, sys.argv[0] = sys.argv[0], what
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv.insert(0, what)
        sys.path[0] = str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


# --- Its clients -----------------------------------------------------------------------------------------------------


class Server:
    """The process that forks; `environment` is what the libraries see while they are imported."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen([sys.executable, __file__], stdin=theirs.fileno(), env=environment)
        theirs.close()

    def connect(self) -> socket.socket:
        """A connection to a process of its own, which waits for a request."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self._control, [b"."], [theirs.fileno()])
        theirs.close()
        return ours

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@functools.cache
def default_server() -> Server:
    """The server whose libraries see the environment of the tests."""
    return Server(os.environ)


class Python:
    """`python ARGUMENTS`, started: "-m" and a module, "-c" and code, or a script, each with arguments.

    `file_limit` bytes is the size of the largest file that it can write, as on a full disk.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path,
        file_limit: int | None = None,
        environment: Mapping[str, str] | None = None,
        server: Server | None = None,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("output", "errors")]
        for file in self._outputs:
            file.touch()
        self._server = (server or default_server()).connect()
        request = {
            "arguments": self.arguments,
            "cwd": str(cwd),
            "environment": dict(os.environ if environment is None else environment),
            "outputs": [str(file) for file in self._outputs],
            "file_limit": file_limit,
        }
        self._server.sendall(json.dumps(request).encode() + b"\n")
        self.pid = int(self._answer())
        self._status: int | None = None

    def _answer(self) -> str:
        """The server's next line."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self._server.recv(1)
            assert byte, f"the server of {self.arguments} is gone"
            line += byte
        return line.decode()

    def running(self) -> bool:
        try:
            self._end(timeout=0)
        except TimeoutError:
            return True
        return False

    def _end(self, timeout: float) -> int:
        """The status once it has ended; TimeoutError if it has not in time."""
        if self._status is None:
            self._server.settimeout(timeout)
            try:
                self._status = int(self._answer())
            except BlockingIOError as error:  # from a timeout of 0
                raise TimeoutError from error
        return self._status

    def printed(self) -> str:
        """Its output until now."""
        return self._outputs[0].read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its result: status (minus a signal's number), output and errors."""
        try:
            status = self._end(timeout)
        except TimeoutError as error:
            raise AssertionError(f"{self.arguments} still runs after {timeout} s") from error
        output, errors = (file.read_text() for file in self._outputs)
        self._folder.cleanup()
        self._server.close()
        return subprocess.CompletedProcess(self.arguments, status, output, errors)


class Command(Python):
    """`dit-hub ARGUMENTS`, started."""

    def __init__(self, *arguments: object, cwd: Path, file_limit: int | None = None) -> None:
        super().__init__("-m", "dit_hub.cli", *arguments, cwd=cwd, file_limit=file_limit)


def dit_hub(*arguments: object, cwd: Path, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return Command(*arguments, cwd=cwd, file_limit=file_limit).wait()


def python(
    *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None, server: Server | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end."""
    return Python(*arguments, cwd=cwd, environment=environment, server=server).wait()


if __name__ == "__main__":
    _serve()
