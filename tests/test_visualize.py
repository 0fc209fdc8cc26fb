"""Images of results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_hub.visualize import Trajectory, image_grid, loss_curve, sample_grid


def draw(pipe: Any, labels: Any, **arguments: Any) -> Trajectory:
    pipe.set_progress_bar_config(disable=True)
    trajectory = Trajectory(frames=2)
    generator = torch.Generator().manual_seed(0)
    fixed = {"num_inference_steps": 2, "output_type": "latent", "generator": generator}
    pipe(labels, callback_on_step_end=trajectory, **fixed, **arguments)
    return trajectory


def test_rows_of_a_trajectory_are_named_after_their_classes(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(in_channels=3)
    pipe.register_to_config(id2label={1: "tench, Tinca tinca", 3: "crane"})
    assert draw(pipe, ["crane", 7, 1]).names == ["crane", "7", "tench"]
    assert draw(pipe, [3, 1], num_images_per_label=2).names == ["crane", "crane", "tench", "tench"]
    unconditional = make_pipeline(in_channels=3, num_classes=0)
    assert draw(unconditional, None, num_images_per_label=2).names == ["image 1", "image 2"]


def test_names_stand_beside_the_rows_of_the_image(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(in_channels=3)
    pipe.register_to_config(id2label={1: "a name", 2: "a much longer name"})
    trajectory = draw(pipe, [1, 1, 2])
    image = trajectory.image(pipe)
    bare = image_grid(pipe.numpy_to_pil(np.zeros((6, 8, 8, 3))), 2, ["t"] * 6)
    assert image.height == bare.height
    indent = image.width - bare.width
    assert indent > 60  # room for the longest name

    def names_in(image: Image.Image, rows: int) -> list[np.ndarray]:
        return np.array_split((np.asarray(image.convert("L"))[4:, :indent] < 128), rows)

    first, second, third = names_in(image, 3)
    assert first.any()
    assert np.array_equal(first, second)
    assert third.sum() > first.sum()
    # Where not all rows are shown, those that are keep their names.
    shown = names_in(trajectory.image(pipe, max_rows=2), 2)
    assert np.array_equal(shown[0], first)
    assert np.array_equal(shown[1], third)


def test_the_samples_of_a_card_name_their_trajectory(make_pipeline: Callable[..., Any]) -> None:
    pipe, trajectory = make_pipeline(in_channels=3), Trajectory()
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(sample_grid(pipe, count=4, steps=2, callback=trajectory), Image.Image)
    assert trajectory.names == ["0", "3", "6", "9"]


def test_a_title_with_dollars_is_a_title(tmp_path: Path) -> None:
    """Which a folder's name may have, and matplotlib takes for mathematics."""
    loss_curve([1.0, 0.5], tmp_path / "loss.png", title=r"toy trained on a$\x$b")
    assert (tmp_path / "loss.png").is_file()
