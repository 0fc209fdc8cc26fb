"""The command line: each command a thin call of a public function."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .extras import quiet_libraries, require

app = typer.Typer(
    name="dit-hub",
    help="Diffusion Transformers: sample, train, convert, export and share them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
export_app = typer.Typer(help="Export a model to another runtime.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(export_app, name="export")

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists; a folder, if all in it is dit-hub's.")
]
MaxError = Annotated[float | None, typer.Option(help="Accept a larger error than the precision's bound.")]
Model = Annotated[str, typer.Argument(help="A Hub id, a folder, or dit-toy-shapes, which comes with the package.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dit-hub {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What goes before the name of a command."""


@app.command()
def generate(
    model: Model,
    labels: Annotated[
        list[str] | None, typer.Argument(help="Class names, or ids that are no name; all classes if none.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: 4 where possible, else 1.")] = None,
    per_label: Annotated[int, typer.Option(help="Pictures of each label; of an unconditional model, in all.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddpm, ddim, dpm++, unipc, euler, …; default: the model's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: one per core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps, for models in PyTorch.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Picture to write: a grid of all samples.")] = Path("grid.png"),
    trajectory: Annotated[Path | None, typer.Option(help="Also write a picture of the denoising.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Sample pictures of classes into one grid."""
    for path in filter(None, (out, trajectory)):
        _check_picture_path(path, overwrite)
    if trajectory and trajectory.resolve() == out.resolve():
        raise ValueError(f"--out and --trajectory are both {out}; give each a name of its own.")
    quiet_libraries()
    import torch

    from .files import new_file
    from .pipeline_dit import DiTPipeline
    from .schedulers import switch_scheduler
    from .visualize import Trajectory, image_grid

    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to {2**63 - 1}, not {seed}.")
    _check_device(device)
    pipeline = DiTPipeline.from_pretrained(model, num_threads=threads).to(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if scheduler is not None:
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, scheduler)
    num_classes = pipeline.transformer.config.num_classes
    known = {name.strip() for names in pipeline.id2label.values() for name in names.split(",")}
    wanted = [int(label) if label.isdecimal() and label not in known else label for label in labels or []]
    ids = pipeline.get_label_ids(wanted or range(num_classes)) if num_classes or wanted else None
    frames = Trajectory()
    images = pipeline(
        ids,
        guidance_scale=guidance,
        num_inference_steps=steps,
        num_images_per_label=per_label,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=frames if trajectory else None,
    ).images
    names = [pipeline.id2label.get(index, str(index)) for index in ids or [] for _ in range(per_label)]
    captions = [name.split(",")[0] for name in names] or None
    columns = per_label if per_label > 1 else _columns(len(images))
    with new_file(out, overwrite) as path:
        image_grid(images, columns, captions).save(path)
    print(f"{len(images)} {'picture' if len(images) == 1 else 'pictures'} in {out}")
    if trajectory:
        with new_file(trajectory, overwrite) as path:
            frames.picture(pipeline).save(path)
        print(f"The denoising in {trajectory}")


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="A size (DiT-XL/2), a Hub id, or a folder.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the picture in pixels, for sizes given by name.")] = 256,
    all_sizes: Annotated[bool, typer.Option("--all", help="All published sizes beside the paper's figures.")] = False,
) -> None:
    """Parameters and multiply-accumulates of a model, or of all published sizes."""
    if (model is None) != all_sizes:
        raise ValueError("Give a model, or --all for all published sizes.")
    quiet_libraries()
    from rich.console import Console

    from .configuration_dit import PUBLISHED_MODELS, DiTConfig
    from .flops import measure

    if all_sizes:
        _print_all_sizes(image_size)
        return
    assert model is not None
    named = model.casefold() in {name.casefold() for name in (*PUBLISHED_MODELS, "toy")}
    if named or (model.startswith("DiT-") and not Path(model).exists()):
        config = DiTConfig.from_name(model, image_size=image_size)
    else:
        from .pipeline_dit import DiTPipeline

        config = DiTPipeline.from_pretrained(model).transformer.config
    size = measure(config)
    table = _table(model, "", "")
    for name in DiTConfig.__annotations__:
        table.add_row(name, str(getattr(config, name)))
    table.add_section()
    table.add_row("parameters", f"{size.parameters:,}")
    table.add_row("multiply-accumulates", f"{size.gmacs:.4g} G for one picture")
    Console().print(table)


@app.command(
    epilog="Settings are fields of the recipe: epochs=60, ema_decay=0.999, learning_rate=1e-3, seed=1, …",
)
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe: toy, digits, imagenet-256, …")],
    settings: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the trained pipeline; default: outputs/RECIPE.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the last checkpoint of a run that was cut; never: start anew.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Train a model and save it as a pipeline folder.

    A run that was stopped goes on when the same command is given again; one that was killed, from its last checkpoint,
    of which save_every says how often there is one.
    """
    from .files import check_free

    if resume not in ("auto", "never"):
        raise ValueError(f"--resume is auto or never, not {resume!r}.")
    out = Path("outputs", Path(recipe).stem) if out is None else out
    check_free(out, overwrite)
    quiet_libraries()
    from .training.recipe import get_recipe

    for module in ("accelerate", "matplotlib", "tensorboard"):  # before the work: some are needed at its end
        require(module, "train")

    changes = dict(_split_setting(setting) for setting in settings or [])
    chosen = get_recipe(recipe).with_settings(changes)
    from .training.console import train_and_save

    command = " ".join(["dit-hub train", recipe, *(settings or [])])
    train_and_save(chosen, out, command, overwrite, resume == "auto")


@app.command()
def latents(
    data: Annotated[
        str, typer.Argument(help="A folder of images, or of one for each class, an .npz archive or hf:NAME.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the latents; one that was cut goes on.")],
    vae: Annotated[str, typer.Option(help="A folder or Hub id of an AutoencoderKL.")] = "stabilityai/sd-vae-ft-mse",
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Encode pictures and their mirror images once, to train from without the VAE."""
    quiet_libraries()
    require("accelerate", "train")
    from diffusers import AutoencoderKL
    from rich.progress import Progress

    from .training.data import CachedLatents
    from .training.latents import cache_latents
    from .training.loader import open_dataset

    if size < 8 or batch_size < 1:
        raise ValueError("--size must be 8 or more and --batch-size 1 or more.")
    dataset = open_dataset(data, size, 1, 0)
    if dataset.is_latent:
        raise ValueError(f"{data} holds latents already.")
    _check_device(device)
    encoder: Any = AutoencoderKL.from_pretrained(vae)
    _, height, width = dataset.sample_shape
    if (height, width) != (size, size):
        print(f"The pictures of {data} are {height}x{width}, whatever --size.")
    for note in dataset.notes:
        print(note)
    with Progress() as bar:
        task = bar.add_task("encoding")
        cache_latents(
            dataset,
            encoder.eval().to(device),
            out,
            batch_size,
            progress=lambda done, count: bar.update(task, completed=done, total=count),
            left_out=lambda name: bar.console.print(
                f"{name} cannot be read and is left out.", markup=False, highlight=False, soft_wrap=True
            ),
        )
    print(f"{len(CachedLatents(out))} pictures are encoded in {out}; train from them with data={out}")


@export_app.command("onnx")
def export_onnx_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it runs in the same pipeline.")],
    parts: Annotated[
        list[str] | None,
        typer.Option(help="denoiser, decoder, sampler (the whole loop in one file) or all; default: the first two."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the denoiser: fp32, fp16 or int8; with openvino fp32 or bf16.")
    ] = "fp32",
    opset: Annotated[int, typer.Option(help="Version of the ONNX operators: 23 is fastest, 20 most portable.")] = 23,
    precompute: Annotated[
        bool,
        typer.Option("--precompute/--no-precompute", help="Precompute the modulation, in a file of its own."),
    ] = False,
    runtime: Annotated[str, typer.Option(help="Of the denoiser: onnxruntime or openvino.")] = "onnxruntime",
    decode: Annotated[bool, typer.Option("--decode", help="Put the VAE into the sampler's file.")] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Accept every height and width; for sin-cos positions.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="For int8: fix the scales ahead, from sampling runs (Q/DQ).")
    ] = False,
    max_error: MaxError = None,
    overwrite: Overwrite = False,
) -> None:
    """Export to ONNX, checked against PyTorch, for ONNX Runtime or OpenVINO."""
    from .files import check_free

    check_free(out, overwrite)
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import DEFAULT_PARTS, export_onnx

    console = Console()
    with console.status("Exporting and checking…"):
        report = export_onnx(model, out, parts or DEFAULT_PARTS, precision, opset, precompute, runtime, decode,
                             dynamic_size, static, max_error, overwrite)  # fmt: skip
    _print_parity(f"ONNX {precision} against PyTorch", report)
    print(f"Exported to {out}")


@export_app.command("tensorrt")
def export_tensorrt_command(
    model: Annotated[
        str, typer.Argument(help="A Hub id, a folder, dit-toy-shapes, an export to ONNX or a .onnx file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it runs in the same pipeline.")],
    parts: Annotated[
        list[str] | None,
        typer.Option(help="denoiser, decoder, sampler (the whole loop in one engine) or all; default: the first two."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, fp8 or int8; default: fp16, or as the ONNX file.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Smallest, usual and largest batch; with guidance, twice the images.")
    ] = "1,8,64",
    size: Annotated[
        str | None, typer.Option(help="The same for height and width, in (latent) pixels; default: the training size.")
    ] = None,
    precompute: Annotated[
        bool,
        typer.Option("--precompute/--no-precompute", help="Precompute the modulation, by an engine of its own."),
    ] = True,
    runtime: Annotated[
        str, typer.Option(help="tensorrt (data-centre GPUs), rtx (builds without a GPU) or auto, what is installed.")
    ] = "auto",
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="Of a GPU to build for, such as 8.9; repeatable, for rtx; default: 8.0 up.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Keep weights in the host's memory where the GPU's is too small.")
    ] = False,
    max_error: MaxError = None,
    overwrite: Overwrite = False,
) -> None:
    """Build TensorRT engines; with tensorrt_rtx on a machine without a GPU too."""
    from .files import check_free

    check_free(out, overwrite)
    batch, sides = _numbers("--profile", profile), _numbers("--size", size) if size else None
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import DEFAULT_PARTS, export_tensorrt

    with Console().status("Exporting…") as status:
        report = export_tensorrt(
            model,
            out,
            parts or DEFAULT_PARTS,
            precision,
            batch,
            sides,
            precompute,
            runtime,
            compute_capability or (),
            weight_streaming,
            max_error,
            overwrite,
            lambda phase, done, total: status.update(f"{phase}: {done} of {total}"),
        )
    if report:
        _print_parity("Error against PyTorch", report)
        if not any(parity.measured_on.startswith("tensorrt") for parity in report.values()):
            print("The engines did not run here: `dit-hub export verify` measures them on the GPU they are for.")
    print(f"Exported to {out}")


@export_app.command("web")
def export_web_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; any file server serves it.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a page that samples in the browser."""
    from .files import check_free

    check_free(out, overwrite)
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import export_web

    with Console().status("Exporting and checking…"):
        parity = export_web(model, out, overwrite)
    _print_parity("Error against PyTorch", {"sampler": parity})
    print(f"Exported to {out}; serve it with: {Path(sys.executable).name} -m http.server --directory {out}")


@export_app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="An export.")],
    max_error: MaxError = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Of ONNX Runtime, the preferred first; repeatable; default: the CPU's.")
    ] = None,
) -> None:
    """Measure an export on this machine, against what PyTorch computed when it was made."""
    quiet_libraries()
    from dit_hub.export import verify_export

    _print_parity("Error against PyTorch", verify_export(folder, max_error, provider))


def _check_device(name: str) -> None:
    """Raise ValueError where PyTorch has no such device, or one that does not compute images."""
    import torch

    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # a name that torch does not know; one it lacks
        raise ValueError(f"There is no device {name!r} here.") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):  # such as meta, whose tensors hold nothing
        raise ValueError(f"--device must be cpu, cuda or mps, not {name!r}.")


def _numbers(option: str, text: str) -> tuple[int, int, int]:
    """Three numbers of "1,8,64"."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} takes three numbers such as 1,8,64, not {text!r}.")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _print_parity(title: str, report: Any) -> None:
    from rich.console import Console

    table = _table(title, "component", "runs on", "relative error", "bound", "largest difference")
    for name, parity in report.items():
        errors = (f"{error:.1e}" for error in (parity.relative_error, parity.bound, parity.max_abs_error))
        table.add_row(name, parity.measured_on, *errors)
    Console().print(table)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A checkpoint file, a pipeline folder (ours or diffusers'), or a Hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Layout: dit-hub, official or diffusers.")] = "dit-hub",
    weights: Annotated[
        str | None, typer.Option(help="Key of a training checkpoint: ema, model, …; default: ema where there is one.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="dit or sit; default: what the file says.")] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Attention heads; default: those of the published model of this width.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes, without the null class; default: as seen.")] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Side of the input in latent pixels; default: as seen.")
    ] = None,
    timestep_freq_shift: Annotated[
        float | None, typer.Option(help="For diffusers' layout: 0 for official weights, 1 for its own.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Decoder of latents: a folder or Hub id, or none; default: Stable Diffusion's.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, where the source does not say.")] = None,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Put the code beside the weights, for people without dit-hub.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of any origin to any layout, checked by a forward pass."""
    from .files import check_free

    check_free(out, overwrite)
    quiet_libraries()
    from rich.console import Console

    from .convert import convert as run

    console = Console()
    fields = {"num_classes": num_classes, "sample_size": sample_size}
    seen = {"weights": weights, "family": family, "num_attention_heads": num_attention_heads, **fields}
    options: dict[str, Any] = {name: value for name, value in seen.items() if value is not None}
    if vae is not None:
        options["vae"] = None if vae == "none" else vae
    with console.status("Converting and checking…"):
        result = run(source, out, to, self_contained, license, timestep_freq_shift=timestep_freq_shift,
                     overwrite=overwrite, **options)  # fmt: skip
    origin, config = result.origin, result.config
    table = _table(f"{origin.source}, {origin.layout} layout", "", "")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "patch_size", "sample_size", "in_channels",
                 "num_classes", "learn_sigma", "pos_embed", "parameterization", "timestep_freq_shift"):  # fmt: skip
        table.add_row(name, str(getattr(config, name)))
    table.add_section()
    table.add_row("weights", origin.weights or "the whole file")
    table.add_row("license", origin.license)
    for what, error in result.parity.items():
        table.add_row(what, f"{error:.1e}")
    console.print(table)
    if result.patch:
        print(
            "diffusers' class divides the timestep's frequencies by 127, these weights want 128 (12.8 % of the output "
            f"of a random model). After loading there, run:\n{result.patch}"
        )
    if origin.license == "unknown":
        print("The licence of these weights is unknown; --license names it for the card.")
    print(f"Converted to {out} ({to} layout)")


@app.command()
def card(
    folder: Annotated[str, typer.Argument(help="A pipeline folder, an export, a conversion, or dit-toy-shapes.")],
    repository: Annotated[str | None, typer.Option(help="What the card's code loads; default: the folder.")] = None,
) -> None:
    """Show the card that a push would make."""
    quiet_libraries()
    from dit_hub.model_cards import render_card

    from .sources import local_folder

    path = local_folder(folder)
    if path is None:  # what could be a Hub id
        raise ValueError(f"There is no folder {folder}.")
    print(render_card(path, repository))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder, an export or a conversion.")],
    repository: Annotated[str, typer.Argument(help="ORGANISATION/NAME on the Hub; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token of the Hub; default: HF_TOKEN, or the one you logged in with.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw the card's samples first, even where that takes long.")
    ] = False,
) -> None:
    """Push a folder with its card to the Hub."""
    quiet_libraries()
    from .hub import push_folder
    from .pipeline_dit import DiTPipeline

    if (folder / "model_index.json").is_file():
        pipeline = DiTPipeline.from_pretrained(folder)  # also a check that it loads
        if not pipeline.draw_samples(folder, force=draw):
            print("No samples.png for the card: drawing it would take long, or needs a decoder; --draw draws it.")
    url = push_folder(folder, repository, message, private, token, revision=revision)
    print(f"Pushed to {url}")


def main() -> None:
    """Run the command line. What the user can mend is one sentence and exit status 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _MEMORY_ERRORS):
            raise
        _refuse("There is not enough memory for this; draw fewer pictures at a time, or take smaller batches.")


# Of PyTorch's errors on processors, and on GPUs.
_MEMORY_ERRORS = ("can't allocate memory", "out of memory")


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _split_setting(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ValueError(f"{setting!r} is no setting; write key=value.")
    return key, value


def _check_picture_path(path: Path, overwrite: bool) -> None:
    from PIL import Image

    picture_format = Image.registered_extensions().get(path.suffix.lower())
    if picture_format not in Image.SAVE:
        raise ValueError(f"{path} has no ending of a picture, such as .png.")
    try:  # some have no writer here, or none for colours
        Image.new("RGB", (16, 16)).save(io.BytesIO(), picture_format)
    except (OSError, ValueError):
        raise ValueError(f"{path} cannot be written: {picture_format} takes no such pictures; choose .png.") from None
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to.")


def _columns(count: int) -> int:
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def _table(title: str, *columns: str):
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _print_all_sizes(image_size: int) -> None:
    from rich.console import Console

    from .configuration_dit import DiTConfig
    from .flops import PUBLISHED, PUBLISHED_CONDITIONINGS, measure

    names = [(name, name, {}, figures) for name, figures in PUBLISHED.items()]
    for conditioning, figures in PUBLISHED_CONDITIONINGS.items():
        names.append((f"DiT-XL/2 {conditioning}", "DiT-XL/2", {"conditioning": conditioning}, figures))
    columns = ("params (M)", "paper", "GMACs", "paper", "FID (paper)")
    table = _table(
        f"Published models at {image_size}x{image_size}; the paper's figures are for 256x256", "model", *columns
    )
    for label, name, fields, (millions, gmacs, fid) in names:
        if label == "DiT-XL/2 in_context":
            table.add_section()
        size = measure(DiTConfig.from_name(name, image_size=image_size, **fields))
        cells = (f"{size.parameters / 1e6:.1f}", str(millions), f"{size.gmacs:.2f}", f"{gmacs:.2f}", f"{fid:.2f}")
        table.add_row(label, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
