"""`dit-hub train` and `dit-hub latents`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries, require
from ..sharing import Worker
from .common import Overwrite, check_device, make_table, own_device, progress_bar

# Below the help of `train`.
SETTINGS = "Settings are fields of the recipe: epochs=60, ema_decay=0.999, learning_rate=1e-3, seed=1, …"


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe: toy, digits, imagenet-256, …")],
    settings: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the trained pipeline; default: outputs/RECIPE.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: resume from the last checkpoint of an interrupted run; never: start over.")
    ] = "auto",
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the steps, hours and memory that this takes; write nothing.")
    ] = False,
) -> None:
    """Train a model and save it as a pipeline folder.

    The same command resumes a run that was stopped, or one that was killed, from its last checkpoint; save_every is
    the number of steps between checkpoints.
    """
    from ..files import check_free

    if resume not in ("auto", "never"):
        raise ValueError(f"--resume is auto or never, not {resume!r}.")
    out = Path("outputs", Path(recipe).stem) if out is None else out
    if not dry_run:
        check_free(out, overwrite)
    quiet_libraries()
    from ..training.recipe import get_recipe

    for module in ("accelerate", "matplotlib", "tensorboard"):  # before the work, since some are needed only at its end
        require(module, "train")

    changes = dict(_split_setting(setting) for setting in settings or [])
    chosen = get_recipe(recipe).with_settings(changes)
    if dry_run:
        _print_budget(recipe, chosen)
        return
    from ..training.console import train_and_save

    command = " ".join(["dit-hub train", recipe, *(settings or [])])
    train_and_save(chosen, out, command, overwrite, resume == "auto")


def latents(
    data: Annotated[
        str, typer.Argument(help="A folder of images, or of one folder per class, an .npz archive or hf:NAME.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the latents; an interrupted run resumes there.")],
    vae: Annotated[str, typer.Option(help="A folder or Hub id of an AutoencoderKL.")] = "stabilityai/sd-vae-ft-mse",
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Encode images and their mirror images once, to train without the VAE.

    Several processes or GPUs share the work: accelerate launch --multi_gpu -m dit_hub.cli latents …
    """
    quiet_libraries()
    require("accelerate", "train")
    from diffusers import AutoencoderKL

    from ..training.data import LATENTS_FILE, CachedLatents
    from ..training.latents import cache_latents
    from ..training.loader import open_dataset

    if size < 8 or batch_size < 1:
        raise ValueError("--size must be 8 or more and --batch-size 1 or more.")
    dataset = open_dataset(data, size, 1, 0)
    if dataset.is_latent:
        raise ValueError(f"{data} holds latents already.")
    worker = Worker.from_environment()
    device = own_device(device, worker)
    check_device(device)
    encoder: Any = AutoencoderKL.from_pretrained(vae)
    _, height, width = dataset.sample_shape
    if (height, width) != (size, size):
        print(f"The images of {data} are {height}x{width}; --size does not change that.")
    for note in dataset.notes:
        print(note)
    with progress_bar("encoding", worker) as (console, report):
        cache_latents(
            dataset,
            encoder.eval().to(device),
            out,
            batch_size,
            progress=report,
            left_out=lambda name: console.print(
                f"{name} cannot be read and is left out.", markup=False, highlight=False, soft_wrap=True
            ),
        )
    if (out / LATENTS_FILE).is_file():
        print(f"{len(CachedLatents(out))} images are encoded in {out}; train on them with data={out}")
    else:
        print(f"Process {worker.index} has encoded its share; the last one to end finishes {out}.")


def _print_budget(name: str, recipe: Any) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from ..training.budget import plan_budget

    budget = plan_budget(recipe)
    if not PartialState().is_main_process:
        return
    console = Console()
    table = make_table(f"What training {name} takes", "", "")
    for line in budget.lines():
        table.add_row(*line)
    memory = make_table("Memory of a process", "", "MB")
    for part, size in vars(budget.memory).items():
        memory.add_row(part, f"{size / 1e6:,.1f}")
    memory.add_section()
    memory.add_row("in all", f"{budget.memory.total / 1e6:,.1f}")
    memory.add_row(f"free on {budget.device}", f"{budget.room / 1e6:,.1f}")
    for shown in (table, memory):
        shown.columns[1].justify = "left" if shown is table else "right"
        console.print(shown)
    for sentence in budget.advice():
        console.print(sentence, highlight=False)


def _split_setting(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ValueError(f"{setting!r} is no setting; write key=value.")
    return key, value
