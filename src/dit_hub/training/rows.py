"""Data sets of the Hub through Hugging Face's `datasets`, downloaded first or streamed.

A stream resumes by reading past the rows it has yielded, without decoding their images, since the `state_dict` of
`datasets` loses the rows in the shuffle buffer, so that a resumed run would see others.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from .data import Batch, Key
from .images import UNREADABLE, LeftOutError, enlarged, name_of, read_image

# Number of rows that are shuffled together in a stream; a larger buffer shuffles better and starts more slowly.
SHUFFLE_BUFFER = 2048


class Rows:
    """The rows of a data set, each with an image and, unless there are no classes, a label.

    Args:
        name: name of the data set for `datasets.load_dataset`, followed by ":SPLIT" for another split than train.
        size: side to which images are scaled.

    Raises:
        ValueError: there is no such data set, or it has no image column.
        ImportError: `datasets` is missing.
    """

    is_latent, scaling_factor, shift_factor = False, 1.0, 0.0
    streaming = False

    def __init__(self, name: str, size: int):
        name, _, split = name.partition(":")
        datasets: Any = require("datasets", "train")
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(name, split=split or "train", streaming=self.streaming)
        except Exception as error:  # whatever its many readers raise
            raise ValueError(f"The data set {name} cannot be loaded: {str(error).splitlines()[0]}") from None
        features = rows.features or {}
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(images) != 1 or len(labels) > 1:
            raise ValueError(
                f"The data set {name} must have one column of images and at most one of class labels (ClassLabel); "
                f"it has {', '.join(features) or 'no columns'}."
            )
        self.image, self.label = images[0], labels[0] if labels else None
        # Decoded by `read_rows`, where a damaged image can be left out.
        self.dataset = rows.select_columns([*images, *labels]).cast_column(self.image, datasets.Image(decode=False))
        self.id2label = dict(enumerate(features[self.label].names)) if self.label else {}
        self.sample_shape, self.size = (3, size, size), size
        self.count = self._count(name, split or "train")
        self.description = f"Its data are the {self.count} images of `{name}`."
        self.license = getattr(rows.info, "license", None) or "unknown"
        self.notes = self._notes()

    def _count(self, name: str, split: str) -> int:
        return len(self.dataset)

    def _notes(self) -> list[str]:
        return enlarged(self.count, lambda position: self._content(self.dataset[position]), self.size)

    def __len__(self) -> int:
        return self.count

    def read(self, keys: Sequence[Key]) -> Batch:
        return self.read_rows([self.dataset[position] for position, _ in keys], keys)

    def read_rows(self, rows: Sequence[dict[str, Any]], keys: Sequence[Key]) -> Batch:
        """A batch of the rows at these positions."""
        images, labels, positions, unreadable = [], [], [], []
        for row, (position, flipped) in zip(rows, keys, strict=True):
            encoded, label = row[self.image] or {}, row[self.label] if self.label else 0
            try:
                if label is None or label < 0:
                    raise LeftOutError("without a class")
                image = read_image(self._content(row), self.size)
            except UNREADABLE as error:
                unreadable.append(name_of(self._name(position, encoded), error))
                continue
            images.append(image.flip(2) if flipped else image)
            labels.append(label)
            positions.append(position)
        data = torch.stack(images) if images else torch.empty(0, *self.sample_shape)
        return Batch(data, torch.tensor(labels, dtype=torch.long), positions, unreadable)

    def _content(self, row: dict[str, Any]) -> bytes:
        """The content of a row's image file, in memory or read from its path; OSError if the row has neither."""
        encoded = row[self.image] or {}
        return encoded.get("bytes") or Path(encoded.get("path") or "").read_bytes()

    def _name(self, position: int, encoded: dict[str, Any]) -> str:
        """The name of a row that is left out."""
        return f"Row {position}"


class StreamedRows(Rows):
    """The rows of a data set in the order of a stream, shuffled within a buffer; positions are places in that order."""

    streaming = True

    def _count(self, name: str, split: str) -> int:
        known = (self.dataset.info.splits or {}).get(split)
        if known is None or not known.num_examples:
            raise ValueError(f"The data set {name} does not say how many rows it has, so it cannot be streamed; "
                             "set streaming=false.")  # fmt: skip
        return known.num_examples

    def _notes(self) -> list[str]:
        return []  # nothing is read before training

    def _name(self, position: int, encoded: dict[str, Any]) -> str:
        """A name by content, since a row has another place in each pass."""
        return f"The row whose image has the SHA-1 {hashlib.sha1(encoded.get('bytes') or b'').hexdigest()}"

    def rows(self, seed: int, epoch: int, skip: int, part: int = 0, parts: int = 1) -> Iterator[dict[str, Any]]:
        """The rows of a pass, after the first `skip`; the same for the same seed and pass.

        Args:
            seed, epoch: determine the order.
            skip: number of rows to leave out at the start.
            part, parts: which of several parts to read: some of the files where their number is a multiple of `parts`,
                else one row in `parts`. Parts may differ in size, so one that ends starts over.

        Raises:
            ValueError: a part that has no rows.
        """
        distributed: Any = require("datasets.distributed", "train")
        own = distributed.split_dataset_by_node(self.dataset, part, parts) if parts > 1 else self.dataset
        shuffled = own.shuffle(seed=seed * 1_000_003 + epoch, buffer_size=SHUFFLE_BUFFER)
        return iter(shuffled.skip(skip)) if parts == 1 else islice(_over_and_over(shuffled), skip, None)


def _over_and_over(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        row = None
        for row in rows:
            yield row
        if row is None:
            raise ValueError("The data set has no rows for one of the processes; train with fewer, or streaming=false.")
