"""`dit-hub generate` and `dit-hub sample`."""

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries
from ..sharing import Worker
from .common import Model, Overwrite, check_device, check_new_file, own_device, progress_bar

SCHEDULERS_HELP = "ddpm, ddim, dpm++, unipc, searched, a solver's file (.json), …; default: the model's."


def generate(
    model: Model,
    labels: Annotated[
        list[str] | None, typer.Argument(help="Class names, or ids that are not names; default: all classes.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: 50, or what a student or solver was made for.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: 4 where possible, else 1.")] = None,
    cache: Annotated[
        int | None, typer.Option(help="Compute every N-th step in full and forecast the others; default: all in full.")
    ] = None,
    per_label: Annotated[int, typer.Option(help="Images of each label; of an unconditional model, in all.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise; the same seed gives the same images.")] = 0,
    scheduler: Annotated[str | None, typer.Option(help=SCHEDULERS_HELP)] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: one per core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps, for models in PyTorch.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Image to write, a grid of all samples.")] = Path("grid.png"),
    trajectory: Annotated[Path | None, typer.Option(help="Also write an image of the denoising.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Sample images of classes into one grid."""
    for path in filter(None, (out, trajectory)):
        check_image_path(path, overwrite)
    if trajectory and trajectory.resolve() == out.resolve():
        raise ValueError(f"--out and --trajectory are both {out}; give each a name of its own.")
    quiet_libraries()
    import torch

    from ..files import new_file
    from ..visualize import Trajectory, image_grid

    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to {2**63 - 1}, not {seed}.")
    pipeline = load_pipeline(model, scheduler, threads, device)
    if cache is not None:
        from ..checks import whole_number
        from ..ecosystem import cache_preset

        every = whole_number("--cache", cache, 2)
        preset = cache_preset(pipeline.transformer, every)  # refuses other runtimes
        pipeline.transformer.enable_cache(preset)
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


def sample(
    model: Model,
    num: Annotated[int, typer.Option(help="Images to draw; published figures are of 50,000.")],
    out: Annotated[Path, typer.Option(help="Folder for the images and samples.npz; the same command resumes there.")],
    labels: Annotated[
        str, typer.Option(help="balanced, random, or a file with a class name or id on each line, one for each image.")
    ] = "balanced",
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps; default: 250, or what a student or solver was made for."),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="official: the official respacing; default: the scheduler's.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help=SCHEDULERS_HELP)] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    guidance_interval: Annotated[
        tuple[float, float], typer.Option(help="Guide only between these shares of the timesteps.")
    ] = (0.0, 1.0),
    seed: Annotated[int, typer.Option(help="Seed of the noise and of random labels.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the decoder stays in float32.")] = "float32",
    vae: Annotated[str | None, typer.Option(help="Another decoder: a folder or Hub id of an AutoencoderKL.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: one per core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps, for models in PyTorch.")] = "cpu",
) -> None:
    """Draw many images for an evaluation, each by the seed and its number alone.

    Several processes or GPUs share the work: accelerate launch --multi_gpu -m dit_hub.cli sample … --device cuda
    """
    quiet_libraries()
    check_dtype(dtype)
    if timesteps not in (None, "official"):
        raise ValueError(f"--timesteps is official or left out, not {timesteps!r}.")
    from ..evaluation.provenance import read_facts
    from ..evaluation.sampling import sample_images

    worker = Worker.from_environment()
    pipeline = load_pipeline(model, scheduler, threads, own_device(device, worker), dtype, vae, revision)
    with progress_bar("drawing", worker) as (_, report):
        sample_images(pipeline, out, num, labels, seed, batch_size, steps, guidance, guidance_interval, None,
                      timesteps, report)  # fmt: skip
    if (read_facts(out) or {}).get("finished"):
        print(f"{num} {'image' if num == 1 else 'images'} in {out}, and together in {out / 'samples.npz'}")
    else:
        print(f"Process {worker.index} has drawn its share; the last one to end writes {out / 'samples.npz'}.")


_DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str) -> None:
    """Raise ValueError for a precision that models are not sampled in."""
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be {', '.join(_DTYPES)}, not {name!r}.")


def load_pipeline(
    model: str,
    scheduler: str | None,
    threads: int | None,
    device: str,
    dtype: str | None = None,
    vae: str | None = None,
    revision: str | None = None,
) -> Any:
    """A pipeline on its device; `dtype` in the precision that it says, for figures that others can reproduce."""
    import torch

    from ..pipeline_dit import DiTPipeline
    from ..schedulers import switch_scheduler
    from ..sources import local_folder

    check_device(device)
    options: dict[str, Any] = {}
    if dtype is not None:
        options["dtype"] = getattr(torch, dtype)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if revision is not None:
        if local_folder(model) is not None:
            raise ValueError(f"--revision is for models on the Hub, and {model} is none.")
        options["revision"] = revision
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # where TensorRT loads its engines
    pipeline = DiTPipeline.from_pretrained(model, num_threads=threads, **options)
    if vae is not None:
        pipeline.vae = _decoder(vae, pipeline)
    pipeline.to(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if scheduler is not None:
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, scheduler)
    return pipeline


def _decoder(name: str, pipeline: Any) -> Any:
    from diffusers import AutoencoderKL

    config = pipeline.transformer.config
    if config.draws_pixels:
        raise ValueError("--vae is for models of latents, and this one draws pixels.")
    vae: Any = AutoencoderKL.from_pretrained(name)
    if vae.config.latent_channels != config.in_channels:
        raise ValueError(f"{name} decodes latents of {vae.config.latent_channels} channels, and the model draws "
                         f"{config.in_channels}.")  # fmt: skip
    return vae.eval()


def _label_ids(pipeline: Any, labels: list[str]) -> list[int] | None:
    """The ids of names, or of numbers that are no name; all classes for no labels; None for a model without classes."""
    from ..labels import parse_labels

    num_classes, wanted = pipeline.transformer.config.num_classes, parse_labels(labels, pipeline.id2label)
    return pipeline.get_label_ids(wanted or range(num_classes)) if num_classes or wanted else None


def check_image_path(path: Path, overwrite: bool) -> None:
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
    check_new_file(path, overwrite, "an image")


def _columns(count: int) -> int:
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)
