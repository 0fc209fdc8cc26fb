"""A digest of data, cheap to compute, that tells data of the same number, shape and classes apart."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import CachedLatents, Dataset, ImageFolder, InMemoryImages
from .rows import Rows, StreamedRows

# The digest of files covers all names, the sizes of so many files, and the bytes of so many.
_SIZES, _SAMPLES = 16384, 256

# The digest of images in memory covers all labels, and so many numbers.
_NUMBERS = 2**26

_FIRST_ROWS = 8


def fingerprint(dataset: Dataset) -> str:
    """A digest of the content of data, which does not depend on where they lie or when they were copied.

    It takes seconds at most, since only a part of large data is read, evenly spread: a small change that leaves all
    names as they are may go unnoticed.
    """
    digest = hashlib.sha256()
    for part in _parts(dataset):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _parts(dataset: Dataset) -> Iterator[bytes]:
    if isinstance(dataset, InMemoryImages):
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


def _levels(images: Tensor) -> bytes:
    """Images in whole numbers, 64 to each 8-bit level, so that a processor's rounding does not show."""
    if images.dtype == torch.uint8:
        return (images.int() * 64).numpy().tobytes()
    return ((images + 1) * (127.5 * 64)).round().int().numpy().tobytes()


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
    """The size of a file in bytes; -1 if it cannot be read, and so is left out of training."""
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
    """At most `most` positions, evenly spread from the first to the last."""
    wanted = min(count, most)
    return [index * (count - 1) // max(wanted - 1, 1) for index in range(wanted)]
