"""Cached latents: whether reading them keeps up with training, and the memory of making them (`make bench`).

The loader should deliver batches at ten times the rate at which DiT-S/2 trains here, and the peak memory of
`cache_latents` should be the same for four times the data. Each run is a process of its own; loader and training take
turns. The latents are random, in a temporary folder (270 MB).
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_hub.training.data import LATENTS_FILE, Batch, CachedLatents, Key
from dit_hub.training.recipe import Recipe

CLASSES = {index: f"class {index}" for index in range(10)}
COUNTS = (2048, 8192)
SHARD_SIZE = 1024
PASSES = 2

Outcome = TypeVar("Outcome")


class Peak(NamedTuple):
    """Bytes of memory before the first image and at its peak, and of the cache on the disk."""

    start: int
    most: int
    cache: int


class RandomImages:
    """Random images, made when they are read, so that the data set itself takes no memory."""

    id2label, sample_shape, is_latent, scaling_factor = CLASSES, (3, 32, 32), False, 1.0
    shift_factor, description, license, notes = 0.0, "", "unknown", ()

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, keys: Sequence[Key]) -> Batch:
        positions = [position for position, _ in keys]
        images = [self.image(position) for position in positions]
        return Batch(torch.stack(images), torch.tensor(positions) % len(CLASSES), positions, [])

    def image(self, position: int) -> Tensor:
        return 2 * torch.rand(self.sample_shape, generator=torch.Generator().manual_seed(position)) - 1


def make_latents(folder: Path, shards: int) -> None:
    """Write random latents as `cache_latents` would."""
    from safetensors.torch import save_file

    facts: dict[str, Any] = {"id2label": CLASSES, "scaling_factor": 0.18215, "shape": [4, 32, 32], "shards": [],
                             "description": "", "license": "unknown"}  # fmt: skip
    for index in range(shards):
        file = f"shard-{index:05d}.safetensors"
        tensors = {name: torch.randn(SHARD_SIZE, 8, 32, 32).half() for name in ("upright", "mirrored")}
        save_file(tensors | {"labels": torch.randint(len(CLASSES), (SHARD_SIZE,))}, folder / file)
        facts["shards"].append({"file": file, "count": SHARD_SIZE})
    (folder / LATENTS_FILE).write_text(json.dumps(facts))


def loading(recipe: Recipe) -> float:
    """Batches per second of the loader that the training loop makes."""
    from dit_hub.training.loader import make_loader

    dataset = CachedLatents(Path(recipe.data))
    batches = PASSES * (len(dataset) // recipe.batch_size)
    loader = make_loader(dataset, recipe, micro_batches=1, own=[0], first=0, last=batches)
    start = time.perf_counter()
    for _ in loader:
        pass
    return batches / (time.perf_counter() - start)


def training(recipe: Recipe) -> float:
    """Steps per second of `dit_hub.training.loop.train`, without the first step, which warms up."""
    from dit_hub.training.loop import train

    ends: list[float] = []
    train(recipe, lambda progress: ends.append(time.perf_counter()))
    return (len(ends) - 1) / (ends[-1] - ends[0])


def caching(count: int) -> Peak:
    """Memory of `cache_latents` with a small random VAE."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from dit_hub.training.latents import cache_latents

    torch.set_num_threads(1)  # with so small a model, more threads only slow each other down
    small: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    vae = AutoencoderKL(**small).eval()
    start = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        cache_latents(RandomImages(count), vae, folder, shard_size=SHARD_SIZE)
        cache = sum(file.stat().st_size for file in Path(folder).iterdir())
    return Peak(start, peak_memory(), cache)


def peak_memory() -> int:
    """The peak memory of this process in bytes. In `resource.getrusage`, a child starts from its parent's peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def alone(run: Callable[[Any], Outcome], argument: Any) -> Outcome:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, argument).result()


def speed_table(rounds: int, steps: int, shards: int) -> Table:
    """The rates of loader and training, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        make_latents(Path(folder), shards)
        recipe = Recipe(model="DiT-S/2", data=folder, random_flip=True, steps=steps, batch_size=32,
                        num_train_timesteps=1000, mixed_precision="bf16")  # fmt: skip
        rates = [(alone(loading, recipe), alone(training, recipe)) for _ in range(rounds)]
    title = f"Latents of 4x32x32, batch {recipe.batch_size}, {rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("loader batches/s", "DiT-S/2 bf16 steps/s", "ratio"):
        table.add_column(column, justify="right")
    loader, trained, ratio = (
        statistics.median(values)
        for values in ([a for a, _ in rates], [b for _, b in rates], [a / b for a, b in rates])
    )
    table.add_row(f"{loader:.0f}", f"{trained:.3f}", f"{ratio:.0f}")
    return table


def memory_table(rounds: int) -> Table:
    """The memory of `cache_latents` with different amounts of data, in turn."""
    peaks: dict[int, list[Peak]] = {count: [] for count in COUNTS}
    for _ in range(rounds):
        for count in COUNTS:
            peaks[count].append(alone(caching, count))
    table = Table(title=f"Memory of cache_latents, shards of {SHARD_SIZE}, {rounds} rounds", title_justify="left")
    for column in ("images", "cache MB", "MB before", "peak MB", "peak, ratio"):
        table.add_column(column, justify="right")
    for count, runs in peaks.items():
        sizes = [statistics.median(values) / 1e6 for values in zip(*runs, strict=True)]
        start, most, cache = (f"{size:.0f}" for size in sizes)
        ratio = statistics.median(run.most / first.most for run, first in zip(runs, peaks[COUNTS[0]], strict=True))
        table.add_row(f"{count:,}", cache, start, most, f"{ratio:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each process (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="training steps in a turn (default 6)")
    parser.add_argument("--shards", type=int, default=8, help=f"shards of {SHARD_SIZE} latents to load (default 8)")
    arguments = parser.parse_args()
    console = Console(width=110)
    console.print(speed_table(arguments.rounds, arguments.steps, arguments.shards))
    console.print(memory_table(arguments.rounds))


if __name__ == "__main__":
    main()
