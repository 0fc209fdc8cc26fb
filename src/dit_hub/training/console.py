"""Training at the command line: progress, the loss table, the pictures."""

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .loop import TrainingResult, steps_per_epoch, train
from .output import published_losses, save_result
from .recipe import Recipe


def train_and_save(recipe: Recipe, output_dir: str | os.PathLike, command: str, overwrite: bool = False) -> None:
    """Train with a progress bar, save the pipeline folder and print what was reached; see `save_result`."""
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, TextColumn("{task.fields[rate]}"), console=console
    ) as bar:
        task = bar.add_task("training", total=recipe.epochs * steps_per_epoch(recipe), rate="")

        def report(step: int, epoch: int, loss: float) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:.1f} steps/s" if speed else ""
            bar.update(task, completed=step, description=f"epoch {epoch}  loss {loss:.4f}", rate=rate)

        result = train(recipe, report)
    with console.status("Drawing samples…"):
        save_result(result, output_dir, command, overwrite)
    console.print(_loss_table(result))
    print(f"Trained in {result.seconds:.1f} s; the pipeline is in {output_dir}")


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
