"""How far each choice of a protocol moves the numbers: the table of docs/evaluation.md.

    python examples/evaluation_effects.py

The embedded model's images are sampled, and measured against the shapes that it was trained on with the shapes' own
extractor, in 15 minutes. Each row changes one thing; the second changes the seed alone, which tells what chance does.
"""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dit_hub import DiTPipeline
from dit_hub.evaluation import evaluate, sample_images
from dit_hub.extras import quiet_libraries
from dit_hub.schedulers import switch_scheduler
from dit_hub.training.shapes import shapes

COUNT, STEPS = 3200, 50
METRICS = ["fid", "sfid", "is", "precision", "recall"]


def sampled(folder: Path, name: str, num: int = COUNT, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A folder of samples."""
    scheduler = settings.pop("scheduler", None)
    pipeline: Any = DiTPipeline.from_pretrained("dit-toy-shapes").to(dtype)
    if scheduler is not None:
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, scheduler)
    return sample_images(pipeline, folder / name, num, **{"num_inference_steps": STEPS, **settings})


def changed(samples: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Samples whose images are changed, as an archive."""
    path = samples.with_name(f"{samples.name}-{len(list(samples.parent.iterdir()))}.npz")
    with np.load(samples / "samples.npz") as archive:
        np.savez(path, np.stack([change(image) for image in archive["arr_0"]]), archive["arr_1"])
    return path


def as_jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    return change


def resized(there: Image.Resampling, back: Image.Resampling) -> Callable[[np.ndarray], np.ndarray]:
    """To twice the side and back, as where images are kept at another size."""

    def change(image: np.ndarray) -> np.ndarray:
        side = image.shape[0]
        return np.asarray(Image.fromarray(image).resize((2 * side, 2 * side), there).resize((side, side), back))

    return change


def unseen() -> np.ndarray:
    """As many shapes as the reference has, of another seed."""
    return ((shapes(200, 1)[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def variants(folder: Path) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Samples and options of `evaluate` by what they change."""
    base, nearest, bicubic = folder / "base", Image.Resampling.NEAREST, Image.Resampling.BICUBIC
    return {
        "as it is": lambda: (sampled(folder, "base"), {}),
        "another seed": lambda: (sampled(folder, "seed", seed=1), {}),
        "batches of 50, not 64": lambda: (sampled(folder, "batch", batch_size=50), {}),
        "bfloat16": lambda: (sampled(folder, "bf16", dtype=torch.bfloat16), {}),
        "random labels": lambda: (sampled(folder, "random", labels="random"), {}),
        "800 samples": lambda: (sampled(folder, "few", 800), {}),
        "1,600 samples": lambda: (sampled(folder, "half", 1600), {}),
        "20 steps": lambda: (sampled(folder, "steps", num_inference_steps=20), {}),
        "200 steps": lambda: (sampled(folder, "many", num_inference_steps=200), {}),
        "DPM-Solver++, 20 steps": lambda: (sampled(folder, "dpm", scheduler="dpm++", num_inference_steps=20), {}),
        "JPEG of quality 95": lambda: (changed(base, as_jpeg(95)), {}),
        "JPEG of quality 75": lambda: (changed(base, as_jpeg(75)), {}),
        "resized, bicubic": lambda: (changed(base, resized(bicubic, bicubic)), {}),
        "resized, bicubic and nearest": lambda: (changed(base, resized(bicubic, nearest)), {}),
        "against unseen images": lambda: (base, {"reference": unseen()}),
        "neighbours in float32": lambda: (base, {"half": False}),
    }


def main() -> None:
    quiet_libraries()
    table = Table("what changes", *METRICS)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in track(list(variants(Path(folder)).items()), "evaluating", console=Console(stderr=True)):
            samples, options = make()
            found = evaluate(samples, **{"reference": "shapes", "metrics": METRICS, "extractor": "shapes", **options})
            cells = [f"{found[metric].value:.3f} ± {found[metric].error or 0:.3f}" for metric in METRICS]
            table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
