"""The toy DiT beside a convolutional U-Net of as many parameters: same data, noise schedule, optimizer and batches.

    python examples/unet_study.py            # 25 minutes on two cores
    python examples/unet_study.py --quick    # a look at how it works

Each network is trained for equal steps on the 3,200 shapes and on ten times as many; the DiT, whose steps are shorter,
also for about the time that the U-Net took. Scored are fresh images: which class a classifier sees in samples, how
sharp these are, and the loss on images that were not trained on.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dit_hub import DiTTransformer
from dit_hub.extras import quiet_libraries
from dit_hub.objectives import noise_prediction, uniform_timesteps
from dit_hub.training.recipe import get_recipe
from dit_hub.training.shapes import ID2LABEL, shapes
from dit_hub.visualize import image_grid

OUTPUTS = Path(__file__).parent.parent / "outputs"
RECIPE = get_recipe("toy")
SAMPLES = 16  # of each class


class Run(NamedTuple):
    """A network, images of each class, and steps."""

    network: str
    per_class: int
    steps: int


RUNS = [
    *(Run("U-Net", 200, 750), Run("DiT", 200, 750), Run("DiT", 200, 4500)),  # 30 epochs, as the toy
    *(Run("U-Net", 2000, 2000), Run("DiT", 2000, 2000), Run("DiT", 2000, 12000)),
]
QUICK = [Run("U-Net", 200, 5), Run("DiT", 200, 5)]


def make_network(name: str) -> Any:
    """The toy DiT, or a U-Net of two resolutions without attention."""
    torch.manual_seed(0)
    if name == "DiT":
        return DiTTransformer(RECIPE.config)
    return UNet2DModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 38),
        layers_per_block=1,
        norm_num_groups=2,
        num_class_embeds=len(ID2LABEL),
        add_attention=False,
    )


def make_scheduler() -> DDPMScheduler:
    return DDPMScheduler(RECIPE.num_train_timesteps, RECIPE.beta_start, RECIPE.beta_end, "linear")


def losses(network: Any, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) losses of noise prediction; the draws are the generator's, so that every network sees the same."""
    noise = torch.randn(images.shape, generator=generator)
    scheduler: Any = make_scheduler()
    timesteps = uniform_timesteps(len(images), scheduler, images.device, generator)

    def denoiser(noisy: Tensor, timestep: Tensor) -> Tensor:
        return network(noisy, timestep, class_labels=labels).sample

    return noise_prediction(denoiser, scheduler, images, noise, timesteps)


def train(run: Run) -> tuple[Any, float, float]:
    """The network, its mean loss over the last 100 steps, and seconds per step."""
    network = make_network(run.network).train()
    images, labels = shapes(run.per_class, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), RECIPE.learning_rate, weight_decay=0.0, fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    generator, seen = torch.Generator().manual_seed(0), []
    start = time.perf_counter()
    for batch in track(batches(len(images), run.steps, generator), str(run), run.steps, transient=True):
        loss = losses(network, images[batch], labels[batch], generator).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), RECIPE.max_grad_norm)
        optimizer.step()
        falling.step()
        seen.append(loss.item())
    return network.eval(), sum(seen[-100:]) / len(seen[-100:]), (time.perf_counter() - start) / run.steps


def batches(count: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of each step's images: every image once in a pass."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < RECIPE.batch_size:
            order = torch.randperm(count, generator=generator)
        yield order[: RECIPE.batch_size]
        order = order[RECIPE.batch_size :]


@torch.no_grad()
def sample(network: Any, steps: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 16, 16) images, drawn by DDPM, and the classes that were asked for."""
    scheduler: Any = make_scheduler()
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(len(ID2LABEL)).repeat_interleave(SAMPLES)
    images = torch.randn(len(labels), 3, 16, 16, generator=generator)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        predicted = network(images, timestep.expand(len(labels)), class_labels=labels).sample
        images = scheduler.step(predicted, int(timestep), images, generator=generator).prev_sample
    return images.clamp(-1, 1), labels


def train_classifier() -> nn.Module:
    """A small convolutional network that knows the real shapes, a little blurred or noisy too."""
    torch.manual_seed(0)
    images, labels = shapes(200, seed=3)
    classifier = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, len(ID2LABEL))),
    )
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3)
    for batch in batches(len(images), 300, torch.Generator().manual_seed(0)):
        noisy = images[batch] + 0.1 * torch.randn_like(images[batch])
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(noisy), labels[batch]).backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def recognised(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((classifier(images).argmax(1) == labels).float().mean())


def sharpness(images: Tensor) -> float:
    """The mean size of the difference between neighbouring pixels."""
    return float((images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2)


def strip(images: Tensor) -> Image.Image:
    """One sample of each class, side by side."""
    one_each = images[::SAMPLES].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return image_grid([Image.fromarray(image) for image in one_each], len(one_each), min_side=48)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each network only")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "unet-study.png", help="the image")
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console(width=120)
    classifier, (fresh, fresh_labels) = train_classifier(), shapes(16, seed=4)
    real = sharpness(fresh)
    console.print(f"The classifier names {recognised(classifier, fresh, fresh_labels):.1%} of fresh real shapes.")
    table = Table("network", "parameters", title="Trained on shapes of 16 classes", title_justify="left")
    for column in ("images", "steps", "s/step", "s", "loss", "fresh loss", "recognised", "sharpness"):
        table.add_column(column, justify="right")
    strips = []
    for run in QUICK if arguments.quick else RUNS:
        network, loss, seconds = train(run)
        with torch.no_grad():
            fresh_loss = losses(network, fresh, fresh_labels, torch.Generator().manual_seed(2)).mean()
        images, labels = sample(network, steps=5 if arguments.quick else 50)
        table.add_row(
            run.network, f"{sum(weight.numel() for weight in network.parameters()):,}",
            f"{len(ID2LABEL) * run.per_class:,}", f"{run.steps:,}", f"{seconds:.3f}", f"{seconds * run.steps:.0f}",
            f"{loss:.4f}", f"{fresh_loss:.4f}", f"{recognised(classifier, images, labels):.0%}",
            f"{sharpness(images) / real:.2f}",
        )  # fmt: skip
        strips.append(strip(images))
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    image_grid(strips, 1).save(arguments.out)
    console.print(f"Sharpness: of real shapes 1. One sample of each class for each row: {arguments.out}")


if __name__ == "__main__":
    main()
