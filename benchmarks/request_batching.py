"""A server that batches whole requests, for `benchmarks/serving.py`: what one would write with a pipeline and FastAPI.

Requests of the same steps and guidance are drawn in one call of the pipeline, up to `max_batch` images; one that waits
is joined by all that fit. With `max_batch` 1 it draws one at a time.
"""

import asyncio
import base64
import io
import sys
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

# How long the first request of a batch waits for others, in seconds.
WINDOW = 0.005


class Asked(BaseModel):
    """The part of OpenAI's request that matters here."""

    prompt: str
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 1.0

    @property
    def key(self) -> tuple[int, float]:
        """Those of one key can share a call."""
        return self.num_inference_steps, self.guidance_scale


@dataclass(eq=False)
class Waiting:
    """A request and who waits for it."""

    asked: Asked
    answer: asyncio.Future[Any]


class RequestBatching:
    """Batches of requests, in the order in which the first of each came."""

    def __init__(self, pipeline: Any, max_batch: int):
        self.pipeline, self.max_batch = pipeline, max_batch
        self.queue: list[Waiting] = []
        self.arrived = asyncio.Event()

    async def draw(self, asked: Asked) -> str:
        """A request's image, as base64 of a PNG."""
        waiting = Waiting(asked, asyncio.get_running_loop().create_future())
        self.queue.append(waiting)
        self.arrived.set()
        return await asyncio.to_thread(encoded, await waiting.answer)

    async def work(self) -> None:
        """Draw batch after batch."""
        while True:
            await self.arrived.wait()
            if len(self.queue) < self.max_batch:
                await asyncio.sleep(WINDOW)
            key = self.queue[0].asked.key
            batch = [waiting for waiting in self.queue if waiting.asked.key == key][: self.max_batch]
            self.queue = [waiting for waiting in self.queue if waiting not in batch]
            if not self.queue:
                self.arrived.clear()
            images = await asyncio.to_thread(draw_batch, self.pipeline, [waiting.asked for waiting in batch])
            for waiting, image in zip(batch, images, strict=True):
                waiting.answer.set_result(image)


def draw_batch(pipeline: Any, batch: list[Asked]) -> list[Any]:
    """Images of requests of one key."""
    return pipeline(
        [int(asked.prompt) for asked in batch],
        guidance_scale=batch[0].guidance_scale,
        num_inference_steps=batch[0].num_inference_steps,
        generator=[torch.Generator().manual_seed(asked.seed) for asked in batch],
    ).images


def encoded(image: Any) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def load(folder: str, threads: int) -> Any:
    """A pipeline on so many threads."""
    from dit_hub import DiTPipeline

    torch.set_num_threads(threads)
    pipeline = DiTPipeline.from_pretrained(folder, num_threads=threads)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_app(pipeline: Any, max_batch: int) -> FastAPI:
    """The server."""
    app, batching = FastAPI(), RequestBatching(pipeline, max_batch)
    tasks: list[asyncio.Task] = []

    @app.post("/v1/images/generations")
    async def generate(asked: Asked) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(batching.work()))
        return {"data": [{"b64_json": await batching.draw(asked)}]}

    return app


if __name__ == "__main__":
    loaded = load(sys.argv[1], int(sys.argv[4]))
    uvicorn.run(make_app(loaded, int(sys.argv[3])), port=int(sys.argv[2]), log_level="warning")
