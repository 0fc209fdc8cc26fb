"""Training at the command line: progress, the result's folder, the loss table."""

import os
import shutil
import sys
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from ..files import TakenError, check_free, remove_leftovers
from ..hub import push_folder
from .checkpoints import LOGS_FOLDER, checkpoints, lock_run, remove_checkpoints
from .loop import train
from .output import published_losses, save_result
from .progress import training_progress
from .recipe import Recipe
from .result import TrainingResult


def train_and_save(
    recipe: Recipe, output_dir: str | os.PathLike, command: str, overwrite: bool = False, resume: bool = True
) -> None:
    """Train with a progress bar, save the pipeline folder and print the losses; see `train` and `save_result`.

    Checkpoints lie beside the output, in `<output_dir>.run`, which no other run can use meanwhile, and are removed once
    the pipeline is saved. Ctrl-C ends with status 130.
    """
    check_free(output_dir, overwrite)
    run_folder = Path(f"{Path(output_dir)}.run")
    if run_folder.exists() and not run_folder.is_dir():
        raise ValueError(f"{run_folder} is a file; checkpoints go to a folder of that name.")
    try:
        with lock_run(run_folder):
            _train_and_save(recipe, output_dir, command, overwrite, resume, run_folder)
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"Stopped. {_resume_hint(run_folder)}")
        sys.exit(130)  # the status of Ctrl-C in shells, so that a script stops too


def _train_and_save(
    recipe: Recipe, output_dir: str | os.PathLike, command: str, overwrite: bool, resume: bool, run_folder: Path
) -> None:
    console = Console()
    with training_progress(console) as report:
        result = train(recipe, report, run_folder, resume)
    if not result.main_process:
        return
    if not result.finished:
        print(f"Stopped; the checkpoint is in {run_folder}, and the same command resumes from it.")
        return
    with console.status("Drawing samples…"):
        _save(result, output_dir, command, overwrite, run_folder)
    console.print(_loss_table(result))
    what = "pipeline is" if result.adapted is None else "adapters are"
    if result.skipped:
        print(f"{result.skipped} steps had no finite loss and were skipped.")
    together = f" by {result.processes} processes" if result.processes > 1 else ""
    print(f"Trained in {result.seconds:.1f} s{together}; the {what} in {output_dir}")
    if recipe.push_to_hub:
        try:
            print(f"Pushed: {push_folder(output_dir, recipe.push_to_hub)}")
        except (OSError, ValueError) as error:
            again = f"`dit-hub push {output_dir} {recipe.push_to_hub}` tries again."
            raise type(error)(f"{error} The whole result is in {output_dir}; {again}") from None


def _save(
    result: TrainingResult, output_dir: str | os.PathLike, command: str, overwrite: bool, run_folder: Path
) -> None:
    """Save the result, then remove the checkpoints; also where it had to take another name."""
    try:
        save_result(result, output_dir, command, overwrite, late=True)
    except TakenError:
        _remove_run(run_folder)
        raise
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{error} {_resume_hint(run_folder)}") from error
    _remove_run(run_folder)


def _resume_hint(run_folder: Path) -> str:
    """A sentence about the checkpoint of a run that was stopped, or whose result was not saved."""
    kept = checkpoints(run_folder)
    return f"The checkpoint {kept[-1]} stays, and the same command resumes from it." if kept else (
        "There is no checkpoint to resume from."
    )  # fmt: skip


def _remove_run(run_folder: Path) -> None:
    """Remove checkpoints and logs, which are in the result; the user's own files stay."""
    remove_leftovers(run_folder)
    remove_checkpoints(run_folder)
    shutil.rmtree(run_folder / LOGS_FOLDER, ignore_errors=True)


def _loss_table(result: TrainingResult) -> Table:
    published = published_losses(result)
    last = len(result.epoch_losses)
    epochs = sorted({1, 4, 8, 16, 24, 30, *range(50, last, 50), last} & set(range(1, last + 1)))
    table = Table(title="Mean loss", title_justify="left")
    for column in ("epoch", "loss", *(["published"] if published else [])):
        table.add_column(column, justify="right")
    for epoch in epochs:
        row = [str(epoch), f"{result.epoch_losses[epoch - 1]:.4f}"]
        table.add_row(*row, *([f"{published[epoch]:.4f}"] if epoch in published else []))
    return table
