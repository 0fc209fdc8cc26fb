"""Sampling for evaluation: what it costs beyond the bare pipeline loop, and how soon it resumes (`make bench`).

The toy draws batches of 64 in 50 steps of DDIM. The bare loop draws the same labels from one generator and keeps the
images in memory; `sample_images` draws each from its own generator, and writes PNGs, samples.npz and its hash. Each is
a process of its own, and they take turns. The second table is the time from the call to the first batch in a folder
with 10,000 finished images.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

BATCH, STEPS, FINISHED = 64, 50, 10_000
BASELINE, OURS = "bare pipeline loop", "sample_images"


def toy() -> Any:
    from dit_hub import DiTPipeline
    from dit_hub.schedulers import switch_scheduler

    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.scheduler = switch_scheduler(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bare_loop(pipeline: Any, num: int) -> None:
    generator, images = torch.Generator().manual_seed(0), []
    for start in range(0, num, BATCH):
        labels = [index % 16 for index in range(start, start + BATCH)]
        drawn = pipeline(labels, 1.0, STEPS, generator=generator, output_type="np").images
        images.append((drawn * 255 + 0.5).astype(np.uint8))


def sampling(pipeline: Any, num: int) -> None:
    from dit_hub.evaluation import sample_images

    with tempfile.TemporaryDirectory() as folder:
        sample_images(pipeline, folder, num, batch_size=BATCH, num_inference_steps=STEPS)


CONTENDERS: dict[str, Callable[[Any, int], None]] = {BASELINE: bare_loop, OURS: sampling}


def contend(contender: str, num: int, pipe: Connection) -> None:
    """The process of one contender: it sends the seconds of each run it is asked for."""
    pipeline, draw = toy(), CONTENDERS[contender]
    draw(pipeline, BATCH)
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        draw(pipeline, num)
        pipe.send(time.perf_counter() - start)


def overhead_table(rounds: int, num: int) -> Table:
    context, pipes = multiprocessing.get_context("spawn"), {}
    for contender in CONTENDERS:
        here, there = context.Pipe()
        context.Process(target=contend, args=(contender, num, there), daemon=True).start()
        there.close()  # so that a contender that fails ends the wait for it
        here.recv()
        pipes[contender] = here
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for number in range(rounds):
        for contender, pipe in list(pipes.items())[:: 1 - 2 * (number % 2)]:  # each is first as often
            time.sleep(0.05)  # lets the threads of the previous one stop waiting for work
            pipe.send(True)
            seconds[contender].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    title = f"{num} toy images in batches of {BATCH}, {STEPS} steps of DDIM, {rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("contender", "median s", "images/s", f"time, ratio to the {BASELINE}"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for contender, times in seconds.items():
        ratio = statistics.median(own / bare for own, bare in zip(times, seconds[BASELINE], strict=True))
        median = statistics.median(times)
        table.add_row(contender, f"{median:.2f}", f"{num / median:.0f}", f"{ratio:.3f}")
    return table


class FirstBatchError(Exception):
    """Ends a run before its first batch."""


def resuming_table(rounds: int) -> Table:
    from dit_hub.evaluation import sample_images

    def stop(*_: int) -> None:
        raise FirstBatchError

    pipeline, seconds = toy(), []
    with tempfile.TemporaryDirectory() as folder:
        sample_images(pipeline, folder, FINISHED, batch_size=500, num_inference_steps=1)
        for _ in range(rounds):
            start = time.perf_counter()
            try:
                sample_images(pipeline, folder, 5 * FINISHED, batch_size=500, num_inference_steps=1, progress=stop)
            except FirstBatchError:
                seconds.append(time.perf_counter() - start)
    table = Table(title=f"To the first batch after {FINISHED:,} finished images", title_justify="left")
    for column in ("median s", "longest s"):
        table.add_column(column, justify="right")
    table.add_row(f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num", type=int, default=256, help="images in a turn (default 256)")
    arguments = parser.parse_args()
    console = Console(width=110)
    console.print(overhead_table(arguments.rounds, arguments.num))
    console.print(resuming_table(arguments.rounds))


if __name__ == "__main__":
    main()
