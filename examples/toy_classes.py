"""All classes of the embedded model from seeds 0 to 9 as one image, and how far each is from real ones.

The distance is the mean square over pixels of -1 to 1, to the nearest of 400 images of the class that the model was
not trained on. Positions and sizes vary in steps, so even fresh images are not at 0.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dit_hub import DiTPipeline
from dit_hub.extras import quiet_libraries
from dit_hub.schedulers import switch_scheduler
from dit_hub.training.shapes import ID2LABEL, shapes
from dit_hub.visualize import image_grid

SEEDS = range(10)
CLEAN = 0.01  # a misplaced corner is more


def distances(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The distance to the nearest real image of the same class (P,), and the class of the nearest of all (P,)."""
    real, labels = shapes(400, seed=7)
    squares = torch.cdist(images.flatten(1), real.flatten(1)).square() / real[0].numel()  # (P, 6400)
    own = torch.where(labels == classes[:, None], squares, torch.inf)
    return own.amin(1), labels[squares.argmin(1)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("toy-classes.png"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddpm", help="ddim, dpm++, …")
    options = parser.parse_args()
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = switch_scheduler(pipeline.scheduler, options.scheduler)
    classes = torch.arange(len(ID2LABEL)).repeat_interleave(len(SEEDS))
    generators = [torch.Generator().manual_seed(seed) for _ in ID2LABEL for seed in SEEDS]
    images = pipeline(classes, num_inference_steps=options.steps, generator=generators, output_type="pt").images
    image_grid(
        pipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy()),
        columns=len(SEEDS),
        min_side=48,
        row_names=list(ID2LABEL.values()),
    ).save(options.out)
    for name, drawn, own in (("drawn", images * 2 - 1, classes), ("fresh", *shapes(len(SEEDS), seed=11))):
        away, nearest = distances(drawn, own)
        right, clean = int((nearest == own).sum()), int((away < CLEAN).sum())
        print(f"{name}: {right} of {len(own)} of their class, {clean} nearer than {CLEAN} to a real one; "
              f"mean {away.mean():.4f}, largest {away.max():.4f}")  # fmt: skip
    print(f"Written: {options.out}")


if __name__ == "__main__":
    quiet_libraries()
    main()
