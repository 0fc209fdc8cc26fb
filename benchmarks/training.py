"""Training speed of the toy on a CPU against a bare PyTorch loop of the same steps: `make bench`.

Each turn is a process of its own; the three take turns. The first epoch warms up (it is when blocks are compiled) and
is not timed.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from dit_hub.training.recipe import Recipe, get_recipe


def rate(ends: list[float], epochs: int) -> float:
    """Steps per second after the first epoch, from the time at the end of each step."""
    per_epoch = len(ends) // epochs
    return (len(ends) - per_epoch) / (ends[-1] - ends[per_epoch - 1])


def bare_loop(recipe: Recipe) -> float:
    """Steps per second of a loop without accelerate, data loader or progress, on the same model and data."""
    from diffusers import DDPMScheduler

    from dit_hub import DiTTransformer
    from dit_hub.training.shapes import shapes

    torch.manual_seed(recipe.seed)
    model = DiTTransformer(recipe.config).train()
    scheduler = DDPMScheduler(recipe.num_train_timesteps)
    images, labels = shapes(recipe.images_per_class, recipe.seed)
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ends: list[float] = []
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))
        for indices in order.split(recipe.batch_size):
            if len(indices) < recipe.batch_size:
                continue
            clean, noise = images[indices], torch.randn(len(indices), *images.shape[1:])
            timestep = torch.randint(0, recipe.num_train_timesteps, (len(indices),))
            noisy = scheduler.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
            loss = (model(noisy, timestep, labels[indices]).sample - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            learning_rate.step()
            loss.item()  # a loop that reports its loss waits for it
            ends.append(time.perf_counter())
    return rate(ends, recipe.epochs)


def dit_hub_loop(recipe: Recipe) -> float:
    """Steps per second of `dit_hub.training.loop.train`."""
    from dit_hub.training.loop import train

    ends: list[float] = []
    train(recipe, lambda progress: ends.append(time.perf_counter()))
    return rate(ends, recipe.epochs)


def dit_hub_compiled(recipe: Recipe) -> float:
    """The same with compiled blocks."""
    return dit_hub_loop(replace(recipe, compile=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs of 25 steps in a turn, the first not timed (default 5)"
    )
    arguments = parser.parse_args()
    recipe = get_recipe("toy").with_settings({"epochs": arguments.epochs})
    contenders = {
        "bare PyTorch loop": bare_loop,
        "dit-hub train": dit_hub_loop,
        "dit-hub train, compiled": dit_hub_compiled,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            with ProcessPoolExecutor(1, context) as pool:
                rates[name].append(pool.submit(run, recipe).result())
    table = Table("contender", title="Training the toy, batch 128", title_justify="left")
    for column in ("median steps/s", "best steps/s", "times bare loop"):
        table.add_column(column, justify="right")
    baseline = rates["bare PyTorch loop"]
    for name, values in rates.items():
        ratio = statistics.median(ours / bare for ours, bare in zip(values, baseline, strict=True))
        table.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}", f"{ratio:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
