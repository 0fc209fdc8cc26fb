"""Servers of tests on loopback ports: on a thread of the tests, or as a process."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from dit_hub import DiTPipeline
from dit_hub.serving.app import create_app
from dit_hub.serving.batches import Batches
from dit_hub.serving.limits import Limits
from dit_hub.serving.models import Models
from dit_hub.serving.server import listen, make_server

from .command_line import Command

TOY = "dit-toy-shapes"
IMAGES = "/v1/images/generations"

# A name, and what loads its pipeline; None for a model of the package or a folder.
Loader = Callable[[str], Any]


def quiet_pipeline(source: str) -> DiTPipeline:
    """The pipeline of a folder or of the embedded model."""
    return DiTPipeline.from_pretrained(source)


@dataclass
class Served:
    """A server at work.

    Args:
        url: its address.
        models: those that it serves.
        app: its application.
        server: of uvicorn; `stop` begins its end.
        client: for requests to it.
    """

    url: str
    models: Models
    app: Any
    server: Any
    client: httpx2.Client

    def draw(self, **fields: Any) -> httpx2.Response:
        """POST a request for images."""
        return self.client.post(IMAGES, json=fields)

    def running(self) -> int:
        """Images that wait or have begun, of all models."""
        engines = [one.runner.engine for one in self.models.loaded().values()]
        return sum(engine.waiting + engine.running for engine in engines)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.01)


@contextmanager
def serving(
    sources: dict[str, str] | None = None,
    load: Loader = quiet_pipeline,
    limits: Limits | None = None,
    api_key: str | None = None,
    batch_folder: Path | None = None,
    memory_limit: int | None = None,
    shutdown_seconds: float = 5.0,
    ready: bool = True,
    **options: Any,
) -> Iterator[Served]:
    """A server for the block, by default of the embedded model; `ready` waits until its first model is loaded."""
    limits = limits or Limits()
    models = Models(sources or {TOY: TOY}, load, memory_limit, max_waiting=limits.waiting, **options)
    batches = None if batch_folder is None else Batches(batch_folder, models, limits)
    app = create_app(models, limits, api_key, batches)
    server = make_server(app, shutdown_seconds)
    with listen("127.0.0.1", 0) as socket:
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        try:
            models.start()
            headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
            with httpx2.Client(base_url=url, timeout=60, headers=headers) as client:
                served = Served(url, models, app, server, client)
                if ready:
                    wait_for(lambda: client.get("/ready").status_code == 200, "the model")
                yield served
        finally:
            wait_for(lambda: server.started or not thread.is_alive(), "the start")
            server.stop()
            thread.join(60)
            assert not thread.is_alive()


@contextmanager
def started(folder: Path, *arguments: object, file_limit: int | None = None) -> Iterator[tuple[Command, str]]:
    """A server's process and its address; killed at the end of the block if it still runs."""
    process = Command("serve", *arguments, "--port", 0, cwd=folder, file_limit=file_limit)
    try:
        wait_for(lambda: "curl" in process.printed() or not process.running(), "the address", 120)
        found = re.search(r"http://\S+(?=;)", process.printed())
        assert found, process.wait().stderr
        wait_for(lambda: httpx2.get(f"{found[0]}/ready").status_code == 200, "the model", 120)
        yield process, found[0]
    finally:
        if process.running():
            process.send_signal(signal.SIGKILL)
