"""Answers to a request for images: JSON, a PNG, or a stream of events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from .drawing import Drawing, off_loop, png_bytes, png_text
from .limits import CLIENT_LEFT, ApiError

# Proxies close connections on which nothing is said for a minute.
_SILENCE_SECONDS = 15.0

# What OpenAI counts and we do not.
_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}

# Called with the number of images that were drawn.
Counter = Callable[[int], None]


class Json(JSONResponse):
    """JSON in ASCII: no text of a client's, whatever is in it, makes an answer fail."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class ClientLeftError(Exception):
    """The client has closed the connection."""


async def whole_answer(request: Request, drawing: Drawing, as_png: bool, count: Counter) -> Response:
    """All images in one answer, while the client waits for it."""
    try:
        images = await _unless_left(request, drawing.images())
    except ClientLeftError:
        return Response(status_code=CLIENT_LEFT)
    count(len(images))
    asked = drawing.job.request
    if as_png:
        png = await off_loop(partial(png_bytes, images[0]))
        return Response(png, media_type="image/png", headers={"X-Seed": str(asked.seed)})
    texts = await asyncio.gather(*(off_loop(partial(png_text, image)) for image in images))
    content = {"created": int(time.time()), "data": [{"b64_json": text} for text in texts], **_facts(images[0])}
    return await off_loop(partial(Json, content | {"seed": asked.seed}))


async def _unless_left(request: Request, wanted: Awaitable[Any]) -> Any:
    """The result, unless the client closes the connection before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientLeftError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _facts(image: np.ndarray) -> dict[str, Any]:
    height, width, _ = image.shape
    return {"size": f"{width}x{height}", "output_format": "png", "background": "opaque"}


class EventStream(StreamingResponse):
    """Server-sent events that give back what they hold, however they end; previews and images in OpenAI's shape."""

    def __init__(
        self, drawing: Drawing, partial_images: int, held: AsyncExitStack, facts: dict[str, Any], count: Counter
    ):
        super().__init__(self._events(drawing, partial_images, count), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # fmt: skip
        self._held, self._facts, self._over = held, facts, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._over:
                self._facts["status"] = CLIENT_LEFT
            await self._held.aclose()

    async def _events(self, drawing: Drawing, partial_images: int, count: Counter) -> AsyncIterator[bytes]:
        shown: dict[int, int] = {}
        try:
            while True:
                try:
                    event = await drawing.next(_SILENCE_SECONDS)
                except asyncio.TimeoutError:
                    yield b": still at work\n\n"
                    continue
                if event is None:
                    break
                assert event.image is not None
                told = {"created_at": int(time.time()), "index": event.index, **_facts(event.image), "quality": "auto"}
                number = shown.get(event.index, 0)
                if event.kind == "image":
                    count(1)
                    told |= {"usage": _USAGE, "seed": drawing.job.request.seed + event.index}
                    yield await off_loop(partial(_image_event, "completed", told, event.image))
                elif number < partial_images:
                    shown[event.index] = number + 1
                    told |= {"partial_image_index": number, "step": event.step}
                    yield await off_loop(partial(_image_event, "partial_image", told, event.image))
        except ApiError as error:
            self._facts["status"] = error.status
            yield _event("error", error.content)
        self._over = True


def _image_event(kind: str, fields: dict[str, Any], image: np.ndarray) -> bytes:
    return _event(f"image_generation.{kind}", fields | {"b64_json": png_text(image)})


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
