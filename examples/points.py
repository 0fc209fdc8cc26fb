"""Noise prediction and flow matching on points in the plane: `dit_hub.objectives` takes data of any shape.

    python examples/points.py

A small network learns two half moons with each objective, and diffusers' schedulers sample it. Printed are the
distances of the samples from fresh data; two fresh sets of data differ by the floor.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_timestep_embedding
from matplotlib import pyplot
from torch import Tensor, nn

from dit_hub.extras import quiet_libraries
from dit_hub.objectives import flow_matching, flow_timesteps, noise_prediction, uniform_timesteps

OUTPUTS = Path(__file__).parent.parent / "outputs"
COUNT, BATCH, WIDTH, LEARNING_RATE = 4000, 512, 128, 2e-3


class Denoiser(nn.Module):
    """Predicts noise or velocity (N, 2) from noisy points (N, 2) and timesteps (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.of_points, self.of_time = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        hidden = [layer for _ in range(3) for layer in (nn.SiLU(), nn.Linear(WIDTH, WIDTH))]
        self.layers = nn.Sequential(*hidden, nn.SiLU(), nn.Linear(WIDTH, 2))

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        time = self.of_time(get_timestep_embedding(timestep, WIDTH))  # (N,) -> (N, WIDTH)
        return self.layers(self.of_points(noisy) + time)


def moons(count: int, seed: int) -> Tensor:
    """Two half moons, (count, 2), of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    angle, noise = torch.pi * torch.rand(count, generator=generator), torch.randn(count, 2, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([x, y], dim=1) + 0.05 * noise
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def train(
    objective: Callable[..., Tensor], scheduler: Any, draw_timesteps: Callable[..., Tensor], steps: int
) -> Denoiser:
    """A network trained with an objective; draw_timesteps(count, scheduler) gives its times."""
    torch.manual_seed(0)
    denoiser, data = Denoiser(), moons(20_000, seed=0)
    optimizer = torch.optim.Adam(denoiser.parameters(), LEARNING_RATE)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean = data[torch.randint(len(data), (BATCH,))]
        losses = objective(denoiser, scheduler, clean, torch.randn_like(clean), draw_timesteps(BATCH, scheduler))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        learning_rate.step()
    return denoiser


@torch.no_grad()
def sample(denoiser: Denoiser, scheduler: Any, steps: int) -> Tensor:
    """(COUNT, 2) points made of noise."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(COUNT, 2, generator=generator)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        predicted = denoiser(points, timestep.expand(COUNT))
        points = scheduler.step(predicted, timestep, points, generator=generator).prev_sample
    return points


def distance(first: Tensor, second: Tensor, directions: int = 256) -> float:
    """Sliced Wasserstein distance: along a line, sorted points are matched with sorted points."""
    angles = torch.arange(directions) * torch.pi / directions
    lines = torch.stack([angles.cos(), angles.sin()])  # (2, directions)
    difference = (first @ lines).sort(dim=0).values - (second @ lines).sort(dim=0).values  # (N, directions)
    return float(difference.square().mean().sqrt())


def draw(sets: dict[str, Tensor], path: Path) -> None:
    """Scatter plots side by side."""
    figure, row = pyplot.subplots(1, len(sets), figsize=(4 * len(sets), 4), sharex=True, sharey=True, squeeze=False)
    for axes, (name, points) in zip(row[0], sets.items(), strict=True):
        axes.scatter(*points.T, s=2, alpha=0.4)
        axes.set(title=name, aspect="equal")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Noise prediction and flow matching on points in the plane.")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each (default 4000)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "points.png", help="the image")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)  # steps this small gain nothing from more

    ddpm, flow = DDPMScheduler(1000, clip_sample=False), FlowMatchEulerDiscreteScheduler(1000)
    of_noise = train(noise_prediction, ddpm, uniform_timesteps, arguments.steps)
    of_velocity = train(flow_matching, flow, flow_timesteps, arguments.steps)
    sets = {
        "data": moons(COUNT, seed=1),
        "noise prediction": sample(of_noise, ddpm, steps=1000),
        "flow matching": sample(of_velocity, flow, steps=100),
    }
    fresh = moons(COUNT, seed=2)
    for name, points in sets.items():
        print(f"{name if name != 'data' else 'data, the floor':<17} {distance(points, fresh):.3f}")
    draw(sets, arguments.out)
    print(f"Written: {arguments.out}")


if __name__ == "__main__":
    main()
