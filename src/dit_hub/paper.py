"""The figures that Peebles & Xie 2023 (arXiv 2212.09748) publish, read from assets/paper.json."""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

# What the paper trains each model on: 400K steps of 256 images of ImageNet (Section 4).
STEPS, BATCH_SIZE, IMAGES = 400_000, 256, 1_281_167


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper, and its figures.

    Args:
        model: name of the size, "DiT-XL/2".
        gmacs: 10^9 multiply-accumulates of a forward pass of one image, which the paper calls Gflops.
        million_parameters: rounded, as the paper prints them.
        conditioning: as in `DiTConfig`.
        image_size: side of the images in pixels.
        tokens: length of the sequence; None where the paper does not print it.
        fid: FID of 50,000 samples after 400,000 steps, without guidance; None where the paper does not print it.
    """

    model: str
    gmacs: float
    million_parameters: float
    conditioning: str = "adaln_zero"
    image_size: int = 256
    tokens: int | None = None
    fid: float | None = None

    @property
    def label(self) -> str:
        """A short name that tells the models apart: "DiT-XL/2 in_context", "DiT-XL/2 at 512"."""
        other = "" if self.conditioning == "adaln_zero" else f" {self.conditioning}"
        return self.model + other + ("" if self.image_size == 256 else f" at {self.image_size}")


@functools.cache
def paper_models() -> tuple[PaperModel, ...]:
    """All models of which the paper prints counts: the twelve sizes, the other conditionings, XL/2 at 512x512."""
    return tuple(PaperModel(**fields) for fields in _tables()["models"])


def paper_sizes() -> tuple[PaperModel, ...]:
    """The twelve models of the paper's Figure 8, with adaLN-Zero at 256x256."""
    return tuple(model for model in paper_models() if model.conditioning == "adaln_zero" and model.image_size == 256)


def paper_results() -> tuple[dict[str, Any], ...]:
    """What the paper prints of XL/2's long runs; a metric that it leaves out is missing."""
    return tuple(_tables()["results"])


def paper_correlations() -> dict[str, float]:
    """The correlations that the paper prints of its metrics with the logarithm of the multiply-accumulates."""
    return dict(_tables()["correlations"])


@functools.cache
def _tables() -> dict[str, Any]:
    return json.loads((resources.files("dit_hub") / "assets" / "paper.json").read_text(encoding="utf-8"))
