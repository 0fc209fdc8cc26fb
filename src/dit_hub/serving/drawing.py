"""A request for images at work: the engine's events on the event loop, and its images as PNG."""

import asyncio
import base64
import contextlib
import io
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from .limits import ApiError, retry_later
from .models import Loaded
from .requests import Event, ImageRequest, Job, Listener, QueueFullError

# Encoding keeps the processor from the engine; two threads are enough for what clients can take.
_ENCODERS = ThreadPoolExecutor(2, thread_name_prefix="png")

Made = TypeVar("Made")

# An engine tells of a request's end within so many seconds of its deadline.
_GRACE_SECONDS = 5.0


def png_bytes(image: np.ndarray) -> bytes:
    """(height, width, 1 or 3) uint8 as a PNG, compressed quickly."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "png", compress_level=1)
    return file.getvalue()


def png_text(image: np.ndarray) -> str:
    """The PNG in base64."""
    return base64.b64encode(png_bytes(image)).decode()


async def off_loop(make: Callable[[], Made]) -> Made:
    """What a function makes, on a thread beside the event loop, which large answers would hold up."""
    return await asyncio.get_running_loop().run_in_executor(_ENCODERS, make)


class Drawing:
    """A job and its events as they come; made by `drawing`."""

    def __init__(self, job: Job, events: "asyncio.Queue[Event]", deadline: float | None, begun: float):
        self.job, self._events, self._deadline = job, events, deadline
        self._end = math.inf if deadline is None else begun + deadline + _GRACE_SECONDS

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
            raise _late(self._deadline) if isinstance(event.error, TimeoutError) else failure(event.error)
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


def _late(deadline: float | None) -> ApiError:
    message = f"The images were not ready within {deadline or 0.0:g} s."
    return ApiError(504, message, code="deadline", headers={"X-Should-Retry": "false"})


def failure(error: Exception | None) -> ApiError:
    """What a client hears of a failed job."""
    message = str(error) or "The image could not be drawn."
    if isinstance(error, ValueError):
        return ApiError(400, message, code="invalid_value")
    return ApiError(500, message, code="failed", headers={"X-Should-Retry": "false"})


@asynccontextmanager
async def drawing(model: Loaded, request: ImageRequest) -> AsyncIterator[Drawing]:
    """A request that the engine works on; what is left of it at the end of the block is dropped.

    Raises:
        ApiError: the engine does not take it, or does not answer.
    """
    loop, begun = asyncio.get_running_loop(), time.monotonic()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def listen(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        job = await _submit(model, request, listen)
    except (TimeoutError, asyncio.TimeoutError):  # one and the same from Python 3.11 on
        raise _late(request.deadline) from None
    except QueueFullError as error:
        raise retry_later(429, str(error), error.retry_after, "queue_full") from None
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    except RuntimeError as error:
        raise retry_later(503, str(error), 5, "engine_stopped") from None
    try:
        yield Drawing(job, events, request.deadline, begun)
    finally:
        if not job.is_over:
            _drop(model, job)


# The engine may be busy for a moment, and a solver's table takes one: both off the event loop. What is dropped does not
# wait for what is submitted.
_SUBMITTERS = ThreadPoolExecutor(4, thread_name_prefix="submit")
_DROPPERS = ThreadPoolExecutor(1, thread_name_prefix="drop")


async def _submit(model: Loaded, request: ImageRequest, listen: Listener) -> Job:
    """The job of a request; the time until a runner takes it counts against its deadline.

    A runner that has to wait for others offers `submit_async`: one that waited in a thread would keep it from the
    requests for other models.
    """
    runner: Any = model.runner
    if hasattr(runner, "submit_async"):
        return await asyncio.wait_for(runner.submit_async(request, listen), request.deadline)
    end = math.inf if request.deadline is None else time.monotonic() + request.deadline

    def submit() -> Job:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return runner.submit(request if math.isinf(left) else replace(request, deadline=left), listen)

    submitted = _SUBMITTERS.submit(submit)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(submitted), request.deadline)
    except (asyncio.CancelledError, asyncio.TimeoutError):
        submitted.add_done_callback(lambda done: done.cancelled() or done.exception() or _drop(model, done.result()))
        raise


def _drop(model: Loaded, job: Job) -> None:
    _DROPPERS.submit(model.runner.cancel, job)
