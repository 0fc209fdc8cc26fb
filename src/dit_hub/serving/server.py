"""A server's process: the socket, connections that hang, signals and the end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits
from .logs import log
from .middleware import Service
from .models import Models

# A client must take as much of its answer in `Limits.write_seconds`.
_TAKEN_BYTES = 2**16

# Clients and proxies keep connections for later requests; uvicorn's 5 seconds are less than most of them expect.
_IDLE_SECONDS = 75

# `Guard` refuses all but probes where more connections are open than there may be; uvicorn refuses probes too, where so
# many times as many are.
_CONNECTIONS = 2

# What is cut off at the end still gets its answer within so many seconds.
_LAST_SECONDS = 3.0


class _Protocol(H11Protocol):
    """uvicorn's connections, which end where a client sends no whole request or takes no answer.

    h11 bounds the size of a request's head, too.
    """

    def __init__(self, *args: Any, limits: Limits, service: Service, **options: Any):
        super().__init__(*args, **options)
        self._limits, self._service = limits, service
        self._head: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._service.connections += 1
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._service.connections -= 1
        self._head = _stopped(self._head)
        self._writing = _stopped(self._writing)

    def pause_writing(self) -> None:
        super().pause_writing()
        end = self.loop.time() + self._limits.answer_seconds
        self._watch_writing(self.transport.get_write_buffer_size() + _TAKEN_BYTES, end)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing = _stopped(self._writing)

    def _watch_head(self) -> None:
        """Give the next request so many seconds from its first byte, or from the opening of the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _stopped(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(self._limits.body_seconds, self.transport.abort)

    def _watch_writing(self, before: int, end: float) -> None:
        left, seconds = self.transport.get_write_buffer_size(), end - self.loop.time()
        if left > before - _TAKEN_BYTES or seconds <= 0:
            self.transport.abort()
        else:
            seconds = min(seconds, self._limits.write_seconds)
            self._writing = self.loop.call_later(seconds, self._watch_writing, left, end)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server; the first signal begins `finish`, a second one ends the process at once."""

    def __init__(self, config: uvicorn.Config, finish: Callable[[], Awaitable[None]]):
        super().__init__(config)
        self._finish, self._signalled = finish, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        own = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in own.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """Begin the end, from any thread."""
        self._signalled = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._finishing = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        try:
            await self._finish()
        except Exception as error:
            log("the end failed", logging.ERROR, error)
        finally:
            self.should_exit = True


def make_server(app: FastAPI, shutdown_seconds: float = 30.0) -> _Server:
    """A server of an application; `server.run([socket])` serves until a signal, or `server.stop()` from a thread.

    Args:
        app: made by `create_app`.
        shutdown_seconds: until accepted requests must be answered, after a signal.
    """
    models: Models = app.state.models
    service: Service = app.state.service
    limits: Limits = app.state.limits

    async def finish() -> None:
        service.closing = True
        if app.state.batches is not None:
            await asyncio.to_thread(app.state.batches.stop)
        await _until_idle(service, shutdown_seconds)
        await asyncio.to_thread(models.close)
        await _until_idle(service, _LAST_SECONDS)

    config = uvicorn.Config(
        app,
        http=partial(_Protocol, limits=limits, service=service),  # pyright: ignore[reportArgumentType]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        limit_concurrency=_CONNECTIONS * limits.connections,
        timeout_graceful_shutdown=round(_LAST_SECONDS),
        backlog=limits.connections,
    )
    return _Server(config, finish)


async def _until_idle(service: Service, seconds: float) -> None:
    end = time.monotonic() + seconds
    while service.active and time.monotonic() < end:
        await asyncio.sleep(0.05)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        ValueError: the address is none of this machine's, or in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = str(error) if number is None or isinstance(error, socket.gaierror) else os.strerror(number)
        raise ValueError(f"The server cannot listen on {host} port {port}: {reason}; choose others with --host and "
                         "--port.") from None  # fmt: skip
