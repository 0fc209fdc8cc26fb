"""What tells data apart that have the same number, shape and classes: a digest that is cheap to make."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import CachedLatents, Dataset, ImageFolder, Pictures
from .rows import Rows, StreamedRows

# Of files, all names count, the sizes of so many, and the bytes of so many.
_SIZES, _SAMPLES = 16384, 256

# Of pictures in memory, all labels count, and so many numbers.
_NUMBERS = 2**26

_FIRST_ROWS = 8


def fingerprint(dataset: Dataset) -> str:
    """A digest of the content of data, the same wherever the data lie and whenever they were copied.

    Of large data only a part is read, evenly spread, so that the digest takes seconds at most: a change that leaves all
    names as they are may go unnoticed where it is small.
    """
    digest = hashlib.sha256()
    for part in _parts(dataset):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _parts(dataset: Dataset) -> Iterator[bytes]:
    if isinstance(dataset, Pictures):
        yield dataset.labels.numpy().tobytes()
        most = max(_NUMBERS // dataset.data[0].numel(), 1)
        for positions in torch.tensor(_spread(len(dataset), most)).split(64):
            yield _levels(dataset.data[positions])
    elif isinstance(dataset, ImageFolder):
        yield from _of_files(dataset)
    elif isinstance(dataset, CachedLatents):
        for shard in dataset.shards:
            yield f"{shard['sha256']} {(dataset.folder / shard['file']).stat().st_size}".encode()
    elif isinstance(dataset, StreamedRows):
        splits = dataset.dataset.info.splits or {}
        yield json.dumps({name: [split.num_examples, split.num_bytes] for name, split in splits.items()}).encode()
        for row in itertools.islice(dataset.dataset, _FIRST_ROWS):
            yield from _of_row(dataset, row)
    elif isinstance(dataset, Rows):
        for position in _spread(len(dataset), _SAMPLES):
            yield from _of_row(dataset, dataset.dataset[position])
    else:
        for position in _spread(len(dataset), _SAMPLES):
            batch = dataset.read([(position, False)])
            yield _levels(batch.data) + batch.labels.numpy().tobytes()


def _levels(pictures: Tensor) -> bytes:
    """Pictures in whole numbers, 64 to a step of 8 bits, so that the last bits of a processor's sums say nothing."""
    if pictures.dtype == torch.uint8:
        return (pictures.int() * 64).numpy().tobytes()
    return ((pictures + 1) * (127.5 * 64)).round().int().numpy().tobytes()


def _of_files(dataset: ImageFolder) -> Iterator[bytes]:
    files = [path for path, _ in dataset.files]
    yield "\0".join(f"{label}/{path.name}" for path, label in dataset.files).encode("utf-8", "surrogateescape")
    yield json.dumps([_size(files[position]) for position in _spread(len(files), _SIZES)]).encode()
    for position in _spread(len(files), _SAMPLES):
        yield _bytes(files[position])


def _of_row(dataset: Rows, row: dict[str, Any]) -> Iterator[bytes]:
    encoded = row[dataset.image] or {}
    yield encoded.get("bytes") or _bytes(Path(encoded.get("path") or ""))
    yield str(row[dataset.label] if dataset.label else 0).encode()


def _size(file: Path) -> int:
    """In bytes; -1 of a file that cannot be read, which training leaves out."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _spread(count: int, most: int) -> list[int]:
    """Positions, at most so many, from the first to the last."""
    wanted = min(count, most)
    return [index * (count - 1) // max(wanted - 1, 1) for index in range(wanted)]
