"""Images of results: labelled grids, denoising trajectories, loss curves."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .checks import unsound_values
from .extras import require
from .flops import measure
from .manifest import note_written
from .schedulers import default_steps

_MARGIN, _CAPTION, _PAPER, _INK = 4, 14, (255, 255, 255), (40, 40, 40)


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    min_side: int = 96,
    row_names: Sequence[str] | None = None,
) -> Image.Image:
    """A grid of images as one image.

    Args:
        images: of equal size.
        columns: images in a row.
        captions: a line of text under each image.
        min_side: small images are enlarged by a whole factor to at least this width, with sharp pixels.
        row_names: a line of text to the left of each row.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("A grid needs at least one image.")
    factor = max(1, -(-min_side // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    cell_width, cell_height = width + _MARGIN, height + _MARGIN + (_CAPTION if captions else 0)
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=11)
    indent = max((math.ceil(font.getlength(name)) + 2 * _MARGIN for name in row_names or ()), default=0)
    grid = Image.new("RGB", (indent + columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(grid)
    for row, name in enumerate(row_names or ()):
        draw.text((_MARGIN, _MARGIN + row * cell_height + height / 2), name, fill=_INK, font=font, anchor="lm")
    for index, image in enumerate(images):
        left, top = indent + _MARGIN + index % columns * cell_width, _MARGIN + index // columns * cell_height
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            centre = (left + width / 2, top + height + _CAPTION / 2)
            draw.text(centre, captions[index], fill=_INK, font=font, anchor="mm")
    return grid


def sample_grid(
    pipeline: Any, labels: Sequence[int] | None = None, count: int = 16, steps: int = 50, callback: Any = None
) -> Image.Image:
    """Samples of up to `count` classes, evenly spread over all, as a captioned grid; the same for the same weights.

    Args:
        pipeline: a `DiTPipeline`.
        labels: draw these classes instead.
        count: images; an unconditional model draws as many.
        steps: denoising steps, at most as many as the noise schedule has; a `TableScheduler` has its own.
        callback: called after each step, as `callback_on_step_end`.
    """
    num_classes = pipeline.transformer.config.num_classes
    if labels is None and num_classes:
        labels = _spread(num_classes, count)
    steps = default_steps(pipeline.scheduler, steps)
    images = pipeline(
        None if labels is None else list(labels),
        num_images_per_label=count if labels is None else 1,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=callback,
    ).images
    captions = None if labels is None else [_name(pipeline, label, 0) for label in labels]
    return image_grid(images, 4, captions)


class Trajectory:
    """Collects the latents of a denoising run: pass it to the pipeline as `callback_on_step_end`.

    Args:
        frames: how many moments to keep, evenly spread from the first step to the last.
    """

    def __init__(self, frames: int = 8):
        self.frames = frames
        self.latents: list[tuple[int, Tensor]] = []
        self.names: list[str] = []

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.names = [_name(pipeline, label, index) for index, label in enumerate(pipeline.class_labels)]
        self.latents.append((int(timestep), tensors["latents"].detach().clone()))
        return {}

    def image(self, pipeline: Any, max_rows: int = 4) -> Image.Image:
        """A grid with a row for each of up to `max_rows` samples, from noise to result.

        Rows are named after their classes, or else numbered; captions give the timesteps.
        """
        chosen = [self.latents[index] for index in _spread(len(self.latents), self.frames)]
        rows = _spread(len(chosen[0][1]), max_rows)
        columns = [pipeline.decode(latents[rows]) for _, latents in chosen]
        images = [column[row] for row in range(len(rows)) for column in columns]
        captions = [f"t = {timestep}" for timestep, _ in chosen] * len(rows)
        return image_grid(images, len(chosen), captions, row_names=[self.names[row] for row in rows])


def _name(pipeline: Any, label: int | None, index: int) -> str:
    """The caption of a sample: its class's first name or id, or else its number."""
    return f"image {index + 1}" if label is None else pipeline.id2label.get(label, str(label)).split(",")[0]


def _spread(length: int, count: int) -> list[int]:
    """Up to `count` indices below `length`, evenly spread, the first and the last among them."""
    count = min(length, count)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def loss_curve(
    epoch_losses: Sequence[float],
    path: str | os.PathLike,
    reference: dict[int, float] | None = None,
    title: str = "",
) -> None:
    """Plot the mean loss of each epoch to a file, with another run's losses by epoch as points."""
    pyplot = require("matplotlib.pyplot", "train")
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    # With dots where epochs are few, since a line through one would not be seen.
    axes.plot(range(1, len(epoch_losses) + 1), epoch_losses, "." * (len(epoch_losses) < 50) + "-", label="this run")
    if reference:
        axes.plot(list(reference), list(reference.values()), "o", label="published")
        axes.legend()
    axes.set(xlabel="epoch", ylabel="mean training loss", yscale="log")
    axes.set_title(title, parse_math=False)  # a path may have dollars
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def difference(first: Tensor, second: Tensor) -> int:
    """The largest difference of two batches of images in 0..1, in steps of 1/255."""
    return int((torch.round(first * 255) - torch.round(second * 255)).abs().max())


# The card's image is drawn while pushing if it takes no more than this many multiply-accumulates in all, which are
# seconds on a CPU, or if there is a GPU.
SAMPLES_FILE = "samples.png"
_CHEAP = 1e12
_SAMPLES, _SAMPLE_STEPS = 16, 50


def draws_quickly(pipeline: Any) -> bool:
    """Whether a pipeline can draw the image of its card, and within seconds."""
    config = pipeline.transformer.config
    passes = _SAMPLES * _SAMPLE_STEPS * (1 if config.null_class is None else 2)
    cheap = pipeline.device.type == "cuda" or measure(config).gmacs * 1e9 * passes <= _CHEAP
    return cheap and (pipeline.vae is not None or config.draws_pixels)


def draw_samples(pipeline: Any, folder: str | os.PathLike, force: bool = False) -> bool:
    """Draw the card's image into a folder unless it is there; return False if that would take long.

    Args:
        pipeline: the one to draw with.
        folder: the pipeline's.
        force: draw it however long it takes, and again if it is there.

    Raises:
        ValueError: the pipeline has no decoder for its latents, and `force` is on.
    """
    target = Path(folder, SAMPLES_FILE)
    if target.is_file() and not force:
        return True
    if not force and not draws_quickly(pipeline):
        return False
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=not force)
    with unsound_values(f"{pipeline.config.get('_name_or_path')} draws no samples"):
        sample_grid(pipeline, count=_SAMPLES, steps=_SAMPLE_STEPS).save(target)
    note_written(target)
    pipeline.set_progress_bar_config(**shown)
    return True
