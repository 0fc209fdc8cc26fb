"""`dit-hub generate`."""

import io
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries
from .common import Model, Overwrite, check_device


def generate(
    model: Model,
    labels: Annotated[
        list[str] | None, typer.Argument(help="Class names, or ids that are not names; default: all classes.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: 4 where possible, else 1.")] = None,
    per_label: Annotated[int, typer.Option(help="Images of each label; of an unconditional model, in all.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise; the same seed gives the same images.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddpm, ddim, dpm++, unipc, euler, …; default: the model's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: one per core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps, for models in PyTorch.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Image to write, a grid of all samples.")] = Path("grid.png"),
    trajectory: Annotated[Path | None, typer.Option(help="Also write an image of the denoising.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Sample images of classes into one grid."""
    for path in filter(None, (out, trajectory)):
        _check_image_path(path, overwrite)
    if trajectory and trajectory.resolve() == out.resolve():
        raise ValueError(f"--out and --trajectory are both {out}; give each a name of its own.")
    quiet_libraries()
    import torch

    from ..files import new_file
    from ..visualize import Trajectory, image_grid

    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to {2**63 - 1}, not {seed}.")
    pipeline = _load(model, scheduler, threads, device)
    ids, frames = _label_ids(pipeline, labels or []), Trajectory()
    images = pipeline(
        ids,
        guidance_scale=guidance,
        num_inference_steps=steps,
        num_images_per_label=per_label,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=frames if trajectory else None,
    ).images
    captions = [pipeline.id2label.get(index, str(index)).split(",")[0] for index in ids or [] for _ in range(per_label)]
    columns = per_label if per_label > 1 else _columns(len(images))
    with new_file(out, overwrite) as path:
        image_grid(images, columns, captions or None).save(path)
    print(f"{len(images)} {'image' if len(images) == 1 else 'images'} in {out}")
    if trajectory:
        with new_file(trajectory, overwrite) as path:
            frames.image(pipeline).save(path)
        print(f"The denoising is in {trajectory}")


def _load(model: str, scheduler: str | None, threads: int | None, device: str) -> Any:
    import torch

    from ..pipeline_dit import DiTPipeline
    from ..schedulers import switch_scheduler

    check_device(device)
    pipeline = DiTPipeline.from_pretrained(model, num_threads=threads).to(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if scheduler is not None:
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, scheduler)
    return pipeline


def _label_ids(pipeline: Any, labels: list[str]) -> list[int] | None:
    """The ids of names, or of numbers that are no name; all classes for no labels; None for a model without classes."""
    num_classes = pipeline.transformer.config.num_classes
    known = {name.strip() for names in pipeline.id2label.values() for name in names.split(",")}
    wanted = [int(label) if label.isdecimal() and label not in known else label for label in labels]
    return pipeline.get_label_ids(wanted or range(num_classes)) if num_classes or wanted else None


def _check_image_path(path: Path, overwrite: bool) -> None:
    from PIL import Image

    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(f"{path} has no suffix of an image format, such as .png.")
    try:  # some formats have no writer here, or none for colours
        Image.new("RGB", (16, 16)).save(io.BytesIO(), image_format)
    except (OSError, ValueError):
        raise ValueError(
            f"{path} cannot be written: {image_format} does not take colour images; choose .png."
        ) from None
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to.")


def _columns(count: int) -> int:
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)
