"""Opening data, and batches of them in the order of a schedule."""

import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .data import (
    LATENTS_FILE,
    PLAN_FILE,
    Batch,
    CachedLatents,
    Dataset,
    ImageFolder,
    Key,
    Pictures,
    Schedule,
    archive,
    digits,
)
from .recipe import Recipe
from .rows import Rows, StreamedRows
from .shapes import ID2LABEL, shapes


def open_dataset(data: str, size: int, images_per_class: int, seed: int, streaming: bool = False) -> Dataset:
    """The data that a recipe names.

    Args:
        data: "shapes", "digits", a folder of images or of class folders, an .npz archive (`images` uint8 (N, H, W, C)
            and, unless there are no classes, whole `labels`), a folder of `dit-hub latents`, or "hf:NAME[:SPLIT]" for a
            data set of the Hub; see `Rows`.
        size: side of the pictures, for images of any size.
        images_per_class, seed: of the shapes.
        streaming: of data sets of the Hub.

    Raises:
        ValueError: there is no such data, or it is damaged.
        ImportError: the digits need scikit-learn, data sets of the Hub `datasets`.
    """
    if data == "shapes":
        return Pictures(*shapes(images_per_class, seed), ID2LABEL,
                        "Its data set is drawn from a seed by `dit_hub.training.shapes`.", "apache-2.0")  # fmt: skip
    if data == "digits":
        return digits()
    if data.startswith("hf:"):
        return (StreamedRows if streaming else Rows)(data.removeprefix("hf:"), size)
    path = Path(data)
    if path.suffix.lower() == ".npz" and path.is_file():
        return archive(path)
    if (path / LATENTS_FILE).is_file():
        return CachedLatents(path)
    if (path / PLAN_FILE).is_file():
        raise ValueError(f"{path} holds latents that are not finished; the same dit-hub latents goes on.")
    if data and path.is_dir():
        return ImageFolder(path, size)
    if path.is_file():
        raise ValueError(f"{path} is a file, and no .npz archive. Images go into a folder.")
    raise ValueError(
        f"There is no data {data!r}: it is shapes, digits, a folder of images or latents, an .npz file, "
        "or hf:NAME for a data set of the Hub."
    )


def make_loader(
    dataset: Dataset, recipe: Recipe, parts: int, mine: Sequence[int], first: int, last: int, pin: bool = False
) -> DataLoader[Batch]:
    """The batches that a process takes of the steps `first` to `last`; see `Schedule`.

    Args:
        dataset, recipe: of the run.
        parts, mine, first, last: as for `Schedule`.
        pin: put batches into memory that a GPU copies from while it computes.
    """
    if isinstance(dataset, StreamedRows):
        # Each process has a stream of its own, in which its batches follow each other.
        processes, process = parts // len(mine), mine[0] // len(mine)
        schedule = Schedule(len(dataset) // processes, recipe.batch_size // processes, len(mine), range(len(mine)),
                            recipe.mirror, recipe.seed, first, last, shuffle=False)  # fmt: skip
        # One worker at most reads ahead, since a stream has one order.
        reader = _StreamReader(dataset, schedule, process, processes)
        return DataLoader(reader, batch_size=None, num_workers=min(recipe.workers, 1), pin_memory=pin,
                          worker_init_fn=_leave_signals)  # fmt: skip
    schedule = Schedule(len(dataset), recipe.batch_size, parts, mine, recipe.mirror, recipe.seed, first, last)
    workers = recipe.workers
    return DataLoader(
        _Reader(dataset),
        batch_sampler=schedule,
        collate_fn=cast(Any, _as_read),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_leave_signals,
    )


def _leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM are for the process that trains, which still needs what is read for its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers(batches: Iterator[Batch]) -> None:
    """End the processes that read for a loader; also one that waits for a network, for which torch sends SIGTERM."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()
            worker.join()


class _Reader(torch.utils.data.Dataset):
    """A data set for torch's loader, which reads a whole batch at once."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Batch:
        return self.dataset.read([key])

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.dataset.read(keys)


class _StreamReader(torch.utils.data.IterableDataset):
    """A process's part of a stream for torch's loader; the schedule's positions are places in it."""

    def __init__(self, dataset: StreamedRows, schedule: Schedule, process: int, processes: int):
        self.dataset, self.schedule = dataset, schedule
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Batch]:
        epoch, place = self.schedule.first // self.schedule.per_pass - 1, self.schedule.count
        rows: Iterator[dict[str, Any]] = iter(())
        for keys in self.schedule:
            if keys[0][0] < place:  # a new pass
                epoch, place = epoch + 1, keys[0][0]
                rows = self.dataset.rows(self.schedule.seed, epoch, place, self.process, self.processes)
            batch: list[Any] = []
            for position, _ in keys:
                batch.append(next(islice(rows, position - place, None), None))
                place = position + 1
            if batch[-1] is None:
                raise ValueError(f"The data set ends before its row {place}, and says that it has {len(self.dataset)}.")
            yield self.dataset.read_rows(batch, keys)


def _as_read(batch: Batch) -> Batch:
    """The loader's collate function: batches are read whole."""
    return batch
