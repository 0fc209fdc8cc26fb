"""A request for images at work: the engine's events on the event loop, and its images as PNG."""

import asyncio
import base64
import contextlib
import io
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from PIL import Image

from .limits import ApiError, retry_later
from .models import Loaded
from .requests import Event, ImageRequest, Job, QueueFullError

# Encoding keeps the processor from the engine; two threads are enough for what clients can take.
_ENCODERS = ThreadPoolExecutor(2, thread_name_prefix="png")

# An engine tells of a request's end within so many seconds of its deadline.
_GRACE_SECONDS = 5.0


def png_bytes(image: np.ndarray) -> bytes:
    """(height, width, 1 or 3) uint8 as a PNG, compressed quickly."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "png", compress_level=1)
    return file.getvalue()


def _png_text(image: np.ndarray) -> str:
    return base64.b64encode(png_bytes(image)).decode()


async def encoded_png(image: np.ndarray) -> bytes:
    """As `png_bytes`, off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_ENCODERS, png_bytes, image)


async def encoded_text(image: np.ndarray) -> str:
    """The PNG in base64, off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_ENCODERS, _png_text, image)


class Drawing:
    """A job and its events as they come; made by `drawing`."""

    def __init__(self, job: Job, events: "asyncio.Queue[Event]", deadline: float | None):
        self.job, self._events = job, events
        self._end = math.inf if deadline is None else time.monotonic() + deadline + _GRACE_SECONDS

    async def next(self, seconds: float = math.inf) -> Event | None:
        """The next event that is good news, None after the last one.

        Raises:
            ApiError: the job failed, or the engine does not answer.
            asyncio.TimeoutError: nothing came for so many seconds.
        """
        seconds = min(seconds, self._end - time.monotonic())
        try:
            event = await asyncio.wait_for(self._events.get(), None if math.isinf(seconds) else seconds)
        except asyncio.TimeoutError:
            if time.monotonic() < self._end:
                raise
            raise ApiError(504, "The engine did not answer in time.", code="deadline") from None
        if event.kind == "failed":
            raise failure(event.error)
        if event.kind == "cancelled":
            raise retry_later(503, "The request was cancelled; try again.", 1, "cancelled")
        return None if event.kind == "done" else event

    async def images(self) -> list[np.ndarray]:
        """All images, (height, width, 3) uint8 each."""
        found: dict[int, np.ndarray] = {}
        while (event := await self.next()) is not None:
            if event.kind == "image" and event.image is not None:
                found[event.index] = event.image
        return [found[index] for index in sorted(found)]


def failure(error: Exception | None) -> ApiError:
    """What a client hears of a failed job."""
    message = str(error) or "The image could not be drawn."
    if isinstance(error, TimeoutError):
        return ApiError(504, message, code="deadline", headers={"X-Should-Retry": "false"})
    if isinstance(error, ValueError):
        return ApiError(400, message, code="invalid_value")
    return ApiError(500, message, code="failed", headers={"X-Should-Retry": "false"})


@asynccontextmanager
async def drawing(model: Loaded, request: ImageRequest) -> AsyncIterator[Drawing]:
    """A request that the engine works on; what is left of it at the end of the block is dropped.

    Raises:
        ApiError: the engine does not take it, or does not answer.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def listen(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(events.put_nowait, event)

    submitted = _submit(model, request, listen)
    try:
        job = await asyncio.wrap_future(submitted)
    except asyncio.CancelledError:
        submitted.add_done_callback(lambda done: done.cancelled() or done.exception() or _drop(model, done.result()))
        raise
    except QueueFullError as error:
        raise retry_later(429, str(error), error.retry_after, "queue_full") from None
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    except RuntimeError as error:
        raise retry_later(503, str(error), 5, "engine_stopped") from None
    try:
        yield Drawing(job, events, request.deadline)
    finally:
        if not job.is_over:
            _SUBMITTERS.submit(_drop, model, job)


# The engine may be busy for as long as a pass takes, and a solver's table takes a moment: both off the event loop.
_SUBMITTERS = ThreadPoolExecutor(4, thread_name_prefix="submit")


def _submit(model: Loaded, request: ImageRequest, listen: Any) -> "Future[Job]":
    return _SUBMITTERS.submit(model.runner.submit, request, listen)


def _drop(model: Loaded, job: Job) -> None:
    model.runner.cancel(job)
