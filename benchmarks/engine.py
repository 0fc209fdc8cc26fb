"""What the serving engine itself costs, without HTTP: a step beside one of the pipeline's loop, and mixed requests.

python benchmarks/engine.py
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROUNDS, STEPS = 5, {"toy": 100, "S/2": 6}
MIXED = (10, 20, 50, 100)


def make_pipeline(model: str) -> Any:
    """The toy, or S/2 of 256x256 with random weights; with DDIM."""
    from diffusers import DDIMScheduler

    from dit_hub import DiTConfig, DiTPipeline, DiTTransformer

    pipeline: Any = DiTPipeline.from_pretrained("dit-toy-shapes")
    if model == "S/2":
        torch.manual_seed(0)
        pipeline = DiTPipeline(DiTTransformer(DiTConfig.from_name("DiT-S/2", image_size=256)).eval(), DDIMScheduler())
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seconds(act: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def steps_compared(pipeline: Any, images: int, steps: int) -> tuple[float, float]:
    """Milliseconds a step: the pipeline's own loop, and the engine's; the least of rounds that take turns."""
    from dit_hub.serving.engine import Engine
    from dit_hub.serving.requests import ImageRequest

    engine = Engine(pipeline, max_batch=64)

    def alone() -> None:
        generators = [torch.Generator().manual_seed(index) for index in range(images)]
        pipeline([0] * images, guidance_scale=1, num_inference_steps=steps, generator=generators, output_type="latent")

    def served() -> None:
        for index in range(images):
            engine.submit(
                ImageRequest(0, seed=index, num_inference_steps=steps, guidance_scale=1, output_type="latent")
            )
        engine.run()

    times = [(seconds(alone), seconds(served)) for _ in range(ROUNDS)]
    first, second = (min(column) * 1000 / steps for column in zip(*times, strict=True))
    return first, second


def share_of_full_batches(pipeline: Any, batch: int = 16, count: int = 192) -> float:
    """Images a second of mixed requests in the engine, over those of full batches of one number of steps."""
    from dit_hub.serving.engine import Engine
    from dit_hub.serving.requests import ImageRequest

    engine, chance = Engine(pipeline, max_batch=batch), random.Random(0)
    steps = [chance.choice(MIXED) for _ in range(count)]

    def served() -> None:
        for index, number in enumerate(steps):
            engine.submit(ImageRequest(index % 4, seed=index, num_inference_steps=number, guidance_scale=1))
        engine.run()

    def full() -> None:
        for number in MIXED:
            pipeline([0] * batch, guidance_scale=1, num_inference_steps=number)

    shares = []
    for _ in range(ROUNDS):
        each = seconds(full) / batch / sum(MIXED)  # of an image's step
        shares.append(each * sum(steps) / seconds(served))
    return statistics.median(shares)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    torch.set_num_threads(1)
    table = Table("model", "images", "pipeline ms", "engine ms", "ratio", title="A step")
    for model, steps in STEPS.items():
        pipeline = make_pipeline(model)
        for images in (1, 4, 16) if model == "toy" else (1, 2):
            alone, served = steps_compared(pipeline, images, steps)
            table.add_row(model, str(images), f"{alone:.3f}", f"{served:.3f}", f"{served / alone:.3f}")
    console = Console()
    console.print(table)
    share = share_of_full_batches(make_pipeline("toy"))
    console.print(f"The toy, 192 mixed requests: {share:.0%} of the throughput of full batches.")


if __name__ == "__main__":
    main()
