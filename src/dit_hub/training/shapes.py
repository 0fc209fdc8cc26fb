"""The toy's data: 16x16 RGB images of a coloured shape on a dark ground, drawn from a seed."""

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = {"red": (230, 60, 60), "green": (60, 200, 90), "blue": (70, 110, 240), "yellow": (240, 210, 60)}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUND = (20, 20, 28)
ID2LABEL = dict(enumerate(f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES))

SIZE = 16
_SUPERSAMPLING = 4  # each pixel is the mean of 4x4 points, which smooths the edges


def _inside(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Which points (x right, y down, relative to the centre) lie inside a shape that fills a circle of `radius`."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.85 * radius
    if shape == "triangle":
        return (y <= 0.8 * radius) & (2 * x.abs() <= y + radius)
    return (torch.minimum(x.abs(), y.abs()) <= 0.33 * radius) & (torch.maximum(x.abs(), y.abs()) <= radius)


def shapes(images_per_class: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw the data set.

    Args:
        images_per_class: number of images of each of the 16 classes. Position and size vary by half a pixel.
        seed: seed of position and size.

    Returns:
        Images (16 * images_per_class, 3, 16, 16), float32 in -1..1, ordered by class, and their labels, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    points = (torch.arange(SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    background = torch.tensor(BACKGROUND, dtype=torch.float32)[:, None, None]
    images = []
    for colour in COLOURS.values():
        foreground = torch.tensor(colour, dtype=torch.float32)[:, None, None]
        for shape in SHAPES:
            jitter = torch.rand(3, images_per_class, 1, 1, generator=generator) - 0.5
            x = points[None, None, :] - SIZE / 2 - jitter[0]
            y = points[None, :, None] - SIZE / 2 - jitter[1]
            inside = _inside(shape, x, y, 5.5 + jitter[2])[:, None].float()  # (images, 1, 64, 64)
            coverage = F.avg_pool2d(inside, _SUPERSAMPLING)
            images.append(background + coverage * (foreground - background))
    labels = torch.arange(len(ID2LABEL)).repeat_interleave(images_per_class)
    return torch.cat(images) / 127.5 - 1, labels
