"""Training speed on an NVIDIA GPU against the official train step: `make bench-training-gpu`.

The targets: twice the official images per second, and 45 % of the bf16 peak, for B/2 and XL/2 on latents of 4x32x32.

- official: what train.py of facebookresearch/DiT does in a step, written here from its description: weights in fp32,
  matrix products in TF32, AdamW that is not fused, a loop over the parameters for the average, eager. Its VAE, which
  would encode each batch anew, is left out, in its favour.
- dit-hub: `dit_hub.training.loop.train` with the paper's settings, in bf16 with compiled blocks and its fused AdamW.

Both take the same random latents from memory, in equal batches; a batch that does not fit is halved for both. Each turn
is a process of its own and they take turns. A training pass counts as three forward passes, at two operations for each
multiply-accumulate; the peak is that of the best product of two 8192x8192 matrices in the same run.
"""

import argparse
import copy
import datetime
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from dit_hub import DiTTransformer
from dit_hub.flops import matmul_peak, measure
from dit_hub.objectives import noise_and_variance
from dit_hub.training.data import InMemoryImages
from dit_hub.training.recipe import Recipe

TOY: dict[str, Any] = {"sample_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Name: (model of the recipe, batch).
MODELS: dict[str, tuple[str | dict[str, Any], int]] = {
    "DiT-B/2": ("DiT-B/2", 256),
    "DiT-XL/2": ("DiT-XL/2", 64),
    "toy": (TOY, 16),
}

Outcome = TypeVar("Outcome")


class Turn(NamedTuple):
    """What is to be measured: the recipe has the warm-up's steps too."""

    recipe: Recipe
    device: str
    warm_up: int


class Speed(NamedTuple):
    """What came of it; `memory` is the peak on the GPU, in bytes."""

    images_per_second: float
    memory: int


Speeds = dict[str, list[Speed]]  # of each contender, in the order of its turns


class RandomLatents(InMemoryImages):
    """Means and deviations in memory, as read from a cache."""

    is_latent, scaling_factor = True, 0.18215

    def __init__(self, config: Any, count: int):
        channels, sides = config.in_channels, config.sample_height_width
        names = {index: f"class {index}" for index in range(config.num_classes)}
        data = torch.randn(count, 2 * channels, *sides).abs()
        super().__init__(data, torch.randint(config.num_classes, (count,)), names, "", "unknown")
        self.sample_shape = (channels, *sides)


class Stopwatch:
    """Times the steps after the warm-up. It waits for the GPU at both ends only, as waiting slows the steps down."""

    def __init__(self, turn: Turn):
        self.turn, self.done, self.start, self.speed = turn, 0, 0.0, 0.0
        self.timed = turn.recipe.steps - turn.warm_up

    def step(self) -> None:
        """To be called after each step."""
        self.done += 1
        if self.done == self.turn.warm_up:
            self.start = self.now()
        if self.done == self.turn.recipe.steps:
            self.speed = self.timed * self.turn.recipe.batch_size / (self.now() - self.start)

    def now(self) -> float:
        if self.turn.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def official(turn: Turn, dataset: RandomLatents, watch: Stopwatch) -> None:
    """The official train step."""
    from diffusers import DDPMScheduler

    torch.set_float32_matmul_precision("high")  # TF32
    recipe, device = turn.recipe, turn.device
    model: Any = DiTTransformer(recipe.config)
    model = model.to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    averaged = dict(average.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    scheduler = DDPMScheduler(1000)
    for step in range(recipe.steps):
        first = step * recipe.batch_size
        batch = dataset.read([(index % len(dataset), False) for index in range(first, first + recipe.batch_size)])
        mean, deviation = batch.data.to(device).chunk(2, dim=1)
        clean = (mean + deviation * torch.randn_like(mean)) * dataset.scaling_factor
        timestep = torch.randint(0, 1000, (len(clean),), device=device)
        losses = noise_and_variance(
            lambda *inputs, **conditions: model(*inputs, **conditions).sample,
            scheduler,
            clean,
            torch.randn_like(clean),
            timestep,
            class_labels=batch.labels.to(device),
        )
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                averaged[name].mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        loss.item()  # train.py adds it to the mean that it logs
        watch.step()


def ours(turn: Turn, dataset: RandomLatents, watch: Stopwatch) -> None:
    """`dit-hub train`."""
    from dit_hub.training.loop import train

    train(turn.recipe, lambda progress: watch.step(), dataset=dataset)


CONTENDERS = {"official": official, "dit-hub": ours}


def contend(name: str, turn: Turn) -> Speed | None:
    """The process of one contender; None where the batch does not fit."""
    torch.manual_seed(0)
    dataset, watch = RandomLatents(turn.recipe.config, 4 * turn.recipe.batch_size), Stopwatch(turn)
    try:
        CONTENDERS[name](turn, dataset, watch)
    except torch.OutOfMemoryError:
        return None
    return Speed(watch.speed, torch.cuda.max_memory_allocated() if turn.device == "cuda" else 0)


def alone(run: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def compete(turn: Turn, rounds: int) -> Speeds:
    """Each contender's speeds in turn; empty where the batch does not fit one of them."""
    speeds: Speeds = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, measured in speeds.items():
            speed = alone(contend, name, turn)
            if speed is None:
                return {}
            measured.append(speed)
    return speeds


def largest_fit(model: str | dict[str, Any], batch: int, options: argparse.Namespace) -> tuple[Recipe, Speeds]:
    """The recipe and speeds of the batch, or of the first of its halves that fits both contenders."""
    paper = Recipe(model=model, steps=options.warm_up + options.steps, learning_rate=1e-4, max_grad_norm=0,
                   lr_scheduler="constant", num_train_timesteps=1000, ema_decay=0.9999,
                   mixed_precision="bf16", compile=options.compile)  # fmt: skip
    while batch:
        recipe = replace(paper, batch_size=batch)
        if speeds := compete(Turn(recipe, options.device, options.warm_up), options.rounds):
            return recipe, speeds
        batch //= 2
    raise SystemExit("error: not even a batch of 1 fits the memory.")


def rows(name: str, options: argparse.Namespace, peak: float) -> Iterator[tuple[str, ...]]:
    """The table's rows of a model."""
    model, batch = MODELS[name]
    recipe, speeds = largest_fit(model, options.batch or batch, options)
    operations = 3 * 2e9 * measure(recipe.config).gmacs
    for contender, measured in speeds.items():
        rate = statistics.median(speed.images_per_second for speed in measured)
        pairs = zip(measured, speeds["official"], strict=True)
        times = statistics.median(speed.images_per_second / base.images_per_second for speed, base in pairs)
        memory = max(speed.memory for speed in measured)
        yield (
            name,
            contender,
            str(recipe.batch_size),
            f"{rate:.1f}",
            f"{times:.2f}",
            f"{rate * operations / 1e12:.3g}",
            f"{rate * operations / peak:.1%}",
            f"{memory / 1e9:.1f}" if memory else "—",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["DiT-B/2", "DiT-XL/2"])
    parser.add_argument("--batch", type=int, help="in place of 256 for B/2 and 64 for XL/2")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--steps", type=int, default=50, help="timed steps in a turn (default 50)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them (default 10)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu only shows that the script works"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave dit-hub's blocks eager")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.exit(2, "error: PyTorch sees no NVIDIA GPU here; --device cpu --models toy tries the script without.\n")
    if not on_gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for dit-hub's processes, which would take a GPU that is there
    side = 8192 if on_gpu else 2048
    peak = alone(matmul_peak, options.device, torch.bfloat16, side)
    title = f"Training on {torch.cuda.get_device_name() if on_gpu else 'a CPU'}, {datetime.date.today()}"
    table = Table("model", "contender", title=title, title_justify="left")
    for column in ("batch", "images/s", "times official", "TFLOP/s", "share of bf16 peak", "peak GPU memory GB"):
        table.add_column(column, justify="right")
    for name in options.models:
        for row in rows(name, options, peak):
            table.add_row(*row)
    console = Console(width=120)
    console.print(table)
    console.print(f"Best bf16 product of two {side}x{side} matrices: {peak / 1e12:.3g} TFLOP/s")


if __name__ == "__main__":
    main()
