"""Options, checks and tables that several commands share."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..sharing import Worker

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists; a folder, if all in it is dit-hub's.")
]
Model = Annotated[str, typer.Argument(help="A Hub id, a folder, or dit-toy-shapes, which comes with the package.")]


def check_device(name: str) -> None:
    """Raise ValueError where PyTorch has no such device, or one that does not compute."""
    import torch

    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # a name that torch does not know; one it lacks
        raise ValueError(f"There is no device {name!r} here.") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):  # such as meta, whose tensors hold nothing
        raise ValueError(f"--device must be cpu, cuda or mps, not {name!r}.")


def find_config(model: str, image_size: int) -> Any:
    """The `DiTConfig` of a size by name at an image size, or of a model on the Hub or in a folder."""
    from ..configuration_dit import PUBLISHED_MODELS, DiTConfig

    named = model.casefold() in {name.casefold() for name in (*PUBLISHED_MODELS, "toy")}
    if named or (model.startswith("DiT-") and not Path(model).exists()):
        return DiTConfig.from_name(model, image_size=image_size)
    from ..pipeline_dit import DiTPipeline

    return DiTPipeline.from_pretrained(model).transformer.config


def own_device(name: str, worker: Worker) -> str:
    """The device of one of several processes: of a machine's GPUs, that of its number there."""
    return f"{name}:{worker.local_index}" if worker.count > 1 and name in ("cuda", "xpu") else name


def check_new_file(path: Path, overwrite: bool, kind: str) -> None:
    """Raise ValueError where a file, "an image" or of another kind, cannot be written, ahead of the work for it."""
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not {kind}.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to.")


# Between two lines about the progress of work that is not watched on a terminal.
_SECONDS = 30.0


@contextmanager
def progress_bar(action: str, worker: Worker, resumes: bool = True) -> Iterator[tuple[Any, Callable[[int, int], None]]]:
    """rich's console, and a function to report to how many images are done of how many.

    As `phase_bar`, of one phase, for work on images that the same command resumes or does not.
    """

    def stopped(done: int, total: int | None) -> str:
        reached = "" if total is None else f" after {done} of {total} images"
        return f"Stopped{reached}{'; the same command resumes' if resumes else ''}."

    with phase_bar(worker, stopped) as (console, report):
        yield console, partial(report, action)


@contextmanager
def phase_bar(worker: Worker, stopped: Callable[[int, int | None], str]) -> Iterator[tuple[Any, Callable[..., None]]]:
    """rich's console, and a function to report to the phase of the work, how much of it is done and all of it.

    Only the first process shows it: on a terminal a bar with the time left, in a log a line now and then; and a note
    behind it, if the report has a fourth argument. Ctrl-C in the block ends the program with status 130 and a sentence.

    Args:
        worker: this process.
        stopped: the sentence, from what is done and all of it, None before the first report.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # By default the speed is that of the last 30 seconds, which may be less than a batch.
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    progress = Progress(*columns, speed_estimate_period=600, disable=worker.index > 0)
    task, said = progress.add_task("", total=None, visible=False, note=""), time.monotonic()

    def report(phase: str, done: int, count: int, note: str = "") -> None:
        nonlocal said
        progress.update(task, description=phase, completed=done, total=count, visible=True, note=note)
        if not progress.console.is_terminal and not progress.disable and time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            progress.console.print(_line(progress.tasks[0]), highlight=False, soft_wrap=True)

    try:
        with progress:
            yield progress.console, report
    except KeyboardInterrupt:
        if not worker.index:
            total, done = progress.tasks[0].total, progress.tasks[0].completed
            print(stopped(int(done), None if total is None else int(total)))
        sys.exit(130)  # the status of Ctrl-C in shells, so that a script stops too


def _line(task: Any) -> str:
    left = task.time_remaining
    time_left = "" if left is None else f", {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left"
    note = f", {task.fields['note']}" if task.fields["note"] else ""
    return f"{task.description}: {task.completed} of {task.total}{time_left}{note}"


def make_table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
