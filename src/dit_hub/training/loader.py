"""Opening the data that a recipe names, and loading its batches in the order of a `ResumableSampler`."""

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
    InMemoryImages,
    Key,
    ResumableSampler,
    archive,
    digits,
)
from .recipe import Recipe
from .rows import Rows, StreamedRows
from .shapes import ID2LABEL, shapes


def open_dataset(data: str, size: int, images_per_class: int, seed: int, streaming: bool = False) -> Dataset:
    """Open the data that a recipe names.

    Args:
        data: "shapes", "digits", a folder of images or of class folders, an .npz archive (`images` uint8 (N, H, W, C)
            and, unless there are no classes, integer `labels`), a folder of `dit-hub latents`, or "hf:NAME[:SPLIT]" for
            a data set of the Hub; see `Rows`.
        size: side to which images of any size are scaled.
        images_per_class, seed: of the shapes.
        streaming: read a data set of the Hub while it downloads.

    Raises:
        ValueError: there is no such data, or it is damaged.
        ImportError: scikit-learn is missing, for the digits, or `datasets`, for data sets of the Hub.
    """
    if data == "shapes":
        description = "Its data set is drawn from a seed by `dit_hub.training.shapes`."
        return InMemoryImages(*shapes(images_per_class, seed), ID2LABEL, description, "apache-2.0")
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
        raise ValueError(
            f"{path} holds latents that are not finished; run the same dit-hub latents again, which resumes."
        )
    if data and path.is_dir():
        return ImageFolder(path, size)
    if path.is_file():
        raise ValueError(f"{path} is a file, but not an .npz archive. Put images into a folder.")
    raise ValueError(
        f"There is no data {data!r}: it is shapes, digits, a folder of images or latents, an .npz file, "
        "or hf:NAME for a data set of the Hub."
    )


def make_loader(
    dataset: Dataset, recipe: Recipe, micro_batches: int, own: Sequence[int], first: int, last: int, pin: bool = False
) -> DataLoader[Batch]:
    """A loader of a process's micro-batches of the steps `first` to `last`.

    Args:
        dataset, recipe: of the run.
        micro_batches, own, first, last: as for `ResumableSampler`.
        pin: put batches into memory from which a GPU copies while it computes.
    """
    if isinstance(dataset, StreamedRows):
        # Each process has a stream of its own, in which its batches follow each other.
        processes, process = micro_batches // len(own), own[0] // len(own)
        sampler = ResumableSampler(len(dataset) // processes, recipe.batch_size // processes, len(own),
                                   range(len(own)), recipe.random_flip, recipe.seed, first, last,
                                   shuffle=False)  # fmt: skip
        # At most one worker reads ahead, since a stream has one order.
        reader = _StreamReader(dataset, sampler, process, processes)
        return DataLoader(reader, batch_size=None, num_workers=min(recipe.num_workers, 1), pin_memory=pin,
                          worker_init_fn=_ignore_signals)  # fmt: skip
    sampler = ResumableSampler(len(dataset), recipe.batch_size, micro_batches, own, recipe.random_flip, recipe.seed,
                               first, last)  # fmt: skip
    return DataLoader(
        _Reader(dataset),
        batch_sampler=sampler,
        collate_fn=cast(Any, _as_read),
        num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0,
        pin_memory=pin,
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: the training process handles them, and needs the data of its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers(batches: Iterator[Batch]) -> None:
    """End the workers of a loader, also those that wait for a network; torch would send SIGTERM, which they ignore."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()
            worker.join()


class _Reader(torch.utils.data.Dataset):
    """A data set for torch's loader that reads a whole batch at once."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Batch:
        return self.dataset.read([key])

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.dataset.read(keys)


class _StreamReader(torch.utils.data.IterableDataset):
    """A process's part of a stream for torch's loader; the sampler's positions are places in it."""

    def __init__(self, dataset: StreamedRows, sampler: ResumableSampler, process: int, processes: int):
        self.dataset, self.sampler = dataset, sampler
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Batch]:
        epoch, place = self.sampler.first // self.sampler.steps_per_epoch - 1, self.sampler.count
        rows: Iterator[dict[str, Any]] = iter(())
        for keys in self.sampler:
            if keys[0][0] < place:  # a new pass
                epoch, place = epoch + 1, keys[0][0]
                rows = self.dataset.rows(self.sampler.seed, epoch, place, self.process, self.processes)
            batch: list[Any] = []
            for position, _ in keys:
                batch.append(next(islice(rows, position - place, None), None))
                place = position + 1
            if batch[-1] is None:
                raise ValueError(
                    f"The data set says that it has {len(self.dataset)} rows, and ends before row {place}."
                )
            yield self.dataset.read_rows(batch, keys)


def _as_read(batch: Batch) -> Batch:
    """Return the batch as it is: the loader's collate function, since batches are read whole."""
    return batch
