"""What caches and cheaper guidance save in time, and how far their images drift, at 10, 20, 50 and 250 steps.

    python benchmarks/cheaper.py dit-toy-shapes path/to/digits random

prints a table for each model; "random" is an S/2 of random weights, whose drift means little. A model of fewer than
250 timesteps takes all it has. Each setting lives in a
process of its own and all take turns. The time is that of the processor with one thread, so that the ratios hold on a
machine that others use as well. The noise is the same everywhere, and the drift that of the run without the setting.
"""

import argparse
import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console

STEPS = (10, 20, 50, 250)
RANDOM = "random"
FULL = "in full"
# The other way to take less time: numbers that 10, 20, 50 and 250 steps are divided by.
FEWER = {"two thirds of the steps": 1.5, "half the steps": 2}


def cached(every: int) -> Callable[[Any], dict[str, Any]]:
    def apply(pipe: Any) -> dict[str, Any]:
        from dit_hub import cache_preset

        pipe.transformer.enable_cache(cache_preset(pipe.transformer, every))
        return {}

    return apply


def first_block_cache(pipe: Any) -> dict[str, Any]:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return {}


def every_second_unguided(pipe: Any) -> dict[str, Any]:
    """No option of the pipeline: it shows what the last difference is worth."""
    turns = itertools.cycle([True, False])  # all runs have an even number of steps
    pipe._within = lambda timestep, interval: next(turns)
    return {}


# By name: what prepares a pipeline, and gives the arguments of its call.
SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys((FULL, *FEWER), lambda pipe: {}),
    **{f"`cache_preset(every={every})`": cached(every) for every in (2, 3, 4, 5)},
    "`FirstBlockCacheConfig(threshold=0.1)`": first_block_cache,
}
GUIDED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "`guidance_every=2`": lambda pipe: {"guidance_every": 2},
    "`guidance_every=4`": lambda pipe: {"guidance_every": 4},
    "every second step unguided": every_second_unguided,
    "`guidance_interval=(0.2, 0.8)`": lambda pipe: {"guidance_interval": (0.2, 0.8)},
}


def load(model: str) -> Any:
    """A pipeline that draws with DDIM, and quietly."""
    from diffusers import DDIMScheduler

    from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
    from dit_hub.extras import quiet_libraries

    quiet_libraries()
    if model != RANDOM:
        pipe = DiTPipeline.from_pretrained(model)
    else:
        torch.manual_seed(0)
        transformer = DiTTransformer(DiTConfig.from_name("DiT-S/2", sample_size=8)).eval()
        for parameter in transformer.parameters():  # a fresh model predicts zero
            torch.nn.init.normal_(parameter, std=0.02)
        pipe = DiTPipeline(transformer, DDIMScheduler(clip_sample=False))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contend(model: str, setting: str, pipe: Connection) -> None:
    """The process of one setting: for each number of steps that it is asked for, its seconds and its latents."""
    torch.set_num_threads(1)
    pipeline = load(model)
    options = {**SETTINGS, **GUIDED}[setting](pipeline)
    config: Any = pipeline.transformer.config
    images = 1 if model == RANDOM else 8
    labels = [index * config.num_classes // images for index in range(images)]

    options["generator"] = torch.Generator()

    def run(steps: int) -> torch.Tensor:
        options["num_inference_steps"] = int(min(steps, pipeline.scheduler.config.num_train_timesteps)
                                             / FEWER.get(setting, 1))  # fmt: skip
        options["generator"].manual_seed(0)
        return pipeline(labels, output_type="latent", **options).images

    run(10)
    pipe.send(config.null_class is not None)
    while steps := pipe.recv():
        start = time.process_time()
        latents = run(steps)
        pipe.send((time.process_time() - start, latents.numpy()))


def measure(model: str, rounds: int, console: Console) -> None:
    """Let all settings take turns, and print the table of a model."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}

    def start(setting: str) -> bool:
        pipes[setting], there = context.Pipe()
        context.Process(target=contend, args=(model, setting, there), daemon=True).start()
        there.close()  # so that one that fails ends the wait for it
        return pipes[setting].recv()

    is_guided = start(FULL)
    for setting in [*SETTINGS, *(GUIDED if is_guided else ())][1:]:
        start(setting)
    cells: dict[str, list[str]] = {setting: [] for setting in pipes}
    for steps in STEPS:
        seconds: dict[str, list[float]] = {setting: [] for setting in pipes}
        latents: dict[str, torch.Tensor] = {}
        for _ in range(rounds if steps < 250 else max(1, rounds // 2)):
            for setting, pipe in pipes.items():
                pipe.send(steps)
                taken, drawn = pipe.recv()
                seconds[setting].append(taken)
                latents[setting] = torch.from_numpy(drawn)
        for setting, taken in seconds.items():
            faster = statistics.median(full / own for full, own in zip(seconds[FULL], taken, strict=True))
            cells[setting].append(cell(faster, latents[setting], latents[FULL], model))
    for pipe in pipes.values():
        pipe.send(0)
    console.print(f"\n{model}\n\n| | {' | '.join(f'{steps} steps' for steps in STEPS)} |\n|---|{'---|' * len(STEPS)}")
    for setting, row in cells.items():
        console.print(f"| {setting} | {' | '.join(row)} |")


def cell(faster: float, latents: torch.Tensor, full: torch.Tensor, model: str) -> str:
    """Times as fast; relative L2 distance of the latents; for models of pixels PSNR of the images."""
    drift = ((latents - full).norm() / full.norm()).item()
    if not drift:
        return f"{faster:.2f}"
    if model == RANDOM:
        return f"{faster:.2f}, {drift:.1e}"
    error = (latents.clamp(-1, 1) - full.clamp(-1, 1)).square().mean().item() / 4  # of images in 0..1
    return f"{faster:.2f}, {drift:.1e}, {-10 * math.log10(error):.0f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", help=f"folders or names of models of pixels, or {RANDOM}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each setting (default 5; half for 250 steps)")
    arguments = parser.parse_args()
    for model in arguments.models:
        measure(model, arguments.rounds, Console(width=200, soft_wrap=True))


if __name__ == "__main__":
    main()
