"""Training speed of the toy on a CPU against a bare PyTorch loop of the same steps: `make bench`.

Each turn is a process of its own; the two take turns.
"""

import argparse
import multiprocessing
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from dit_hub.training.recipe import Recipe, get_recipe


def bare_loop(recipe: Recipe) -> float:
    """Steps per second of a loop without accelerate, data loader or progress, on the same model and data."""
    from diffusers import DDPMScheduler

    from dit_hub import DiTTransformer
    from dit_hub.training.shapes import shapes

    torch.manual_seed(recipe.seed)
    model = DiTTransformer(recipe.config).train()
    scheduler = DDPMScheduler(recipe.num_train_timesteps)
    pictures, labels = shapes(recipe.images_per_class, recipe.seed)
    steps = recipe.epochs * (len(pictures) // recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(pictures))
        for indices in order.split(recipe.batch_size):
            if len(indices) < recipe.batch_size:
                continue
            clean, noise = pictures[indices], torch.randn(len(indices), *pictures.shape[1:])
            timestep = torch.randint(0, recipe.num_train_timesteps, (len(indices),))
            noisy = scheduler.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
            loss = (model(noisy, timestep, labels[indices]).sample - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            learning_rate.step()
            loss.item()  # a loop that reports its loss waits for it
    return steps / (time.perf_counter() - start)


def dit_hub_loop(recipe: Recipe) -> float:
    """Steps per second of `dit_hub.training.loop.train`."""
    from dit_hub.training.loop import total_steps, train

    result = train(recipe)
    return total_steps(recipe, result.dataset) / result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of 25 steps in a turn (default 4)")
    arguments = parser.parse_args()
    recipe = get_recipe("toy").with_settings({"epochs": arguments.epochs})
    contenders = {"bare PyTorch loop": bare_loop, "dit-hub train": dit_hub_loop}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            with context.Pool(1) as pool:
                rates[name].append(pool.apply(run, (recipe,)))
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
