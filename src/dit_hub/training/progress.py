"""The progress of a run at the command line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from .loop import Progress as TrainingProgress
from .loop import Report

# The least width of a terminal with a bar, and the width of the shortest bar with its margins.
_WIDTH_WITH_BAR, _BAR = 72, 6

# Between two lines of a run that does not write to a terminal.
_SECONDS = 30


@contextmanager
def training_progress(console: Console) -> Iterator[Report]:
    """A function to report steps to: it redraws one line on a terminal, and prints lines now and then to a log."""
    terminal = console.is_terminal and not console.is_dumb_terminal
    numbers, with_bar = _Numbers(console if terminal else None), console.width >= _WIDTH_WITH_BAR
    columns = [TextColumn("{task.description}", table_column=Column(no_wrap=True)), numbers]
    if with_bar:
        columns.insert(1, BarColumn(None, table_column=Column(ratio=1)))
    with Progress(*columns, console=console, expand=with_bar, disable=not terminal) as bar:
        task = bar.add_task("", total=None, rates=[""], visible=False)
        said = -_SECONDS

        def report(progress: TrainingProgress) -> None:
            nonlocal said
            description = f"epoch {progress.epoch} loss {progress.loss:.4f}"
            bar.update(task, description=description, total=progress.last, completed=progress.step,
                       rates=_rates(progress), visible=True)  # fmt: skip
            if not terminal and (time.monotonic() - said >= _SECONDS or progress.step == progress.last):
                said = time.monotonic()
                console.print(f"{description} {numbers.render(bar.tasks[0])}", highlight=False, soft_wrap=True)

        yield report


class _Numbers(ProgressColumn):
    """Steps, elapsed and remaining time, and the longest form of the rate that fits the console.

    rich would cut its own columns off with an ellipsis. The forms are the task's field `rates`, the longest first.

    Args:
        console: where it must fit; None for no limit.
    """

    def __init__(self, console: Console | None):
        super().__init__(Column(no_wrap=True))
        self.console = console

    def render(self, task: Task) -> Text:
        steps = f"{int(task.completed)}/{int(task.total or 0)}"
        times = f"{_clock(task.elapsed)}<{_clock(task.time_remaining)}"
        texts = [f"{steps} {times} {rate}".rstrip() for rate in task.fields["rates"]]
        if self.console is None:
            return Text(texts[0])
        room = self.console.width - len(task.description) - (_BAR if self.console.width >= _WIDTH_WITH_BAR else 1)
        return Text(next((text for text in texts if len(text) <= room), texts[-1]))


def _rates(progress: TrainingProgress) -> list[str]:
    if not progress.images_per_second:
        return [""]
    speed = f"{progress.images_per_second:.0f}"
    return [f"{speed} images/s, {progress.mfu:.0%} of peak", f"{speed} images/s", f"{speed}/s"]


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
