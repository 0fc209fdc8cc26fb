"""Training data: images with or without labels, built in or from an archive or a folder, and cached latents."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Sampler

from ..checks import listed
from ..extras import require
from .images import UNREADABLE, enlarged, find_images, name_of, read_image

# The largest share of a data set that may be unreadable; above it, something is wrong with the data.
_MOST_UNREADABLE = 0.01

# A position in the data set, and whether to flip the image there.
Key = tuple[int, bool]


@dataclass
class Batch:
    """A batch of samples.

    Args:
        data: (N, C, H, W) float32 images in -1..1, or (N, 2C, H, W) means and standard deviations of latents.
        labels: (N,) int64; zeros for data without classes.
        positions: position of each sample in the data set.
        unreadable: names of the files that could not be read and are left out.
    """

    data: Tensor
    labels: Tensor
    positions: list[int]
    unreadable: list[str]

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU copies while it computes; torch's loader calls it."""
        return replace(self, data=self.data.pin_memory(), labels=self.labels.pin_memory())


def check_unreadable(unreadable: int, count: int, last: str = "") -> None:
    """Raise ValueError if more files are unreadable than can be left out; `last` names one of them."""
    if unreadable > max(1, _MOST_UNREADABLE * count):
        named = f"; the last one is {last}" if last else ""
        raise ValueError(f"{unreadable} of {count} images cannot be read, more than {_MOST_UNREADABLE:.0%}{named}.")


class Dataset(Protocol):
    """Data that the loop can train on.

    Attributes:
        id2label: names of the classes by id; empty for data without labels.
        sample_shape: (C, H, W) of the model's input.
        is_latent: whether `read` returns means and standard deviations of latents.
        scaling_factor, shift_factor: of latents; the model's input is (latents - shift_factor) * scaling_factor.
        description: a sentence for the card.
        license: the Hub's identifier of the data's licence.
        notes: sentences about files that are left out or images that are changed, for the start of a run.
    """

    id2label: dict[int, str]
    sample_shape: tuple[int, int, int]
    is_latent: bool
    scaling_factor: float
    shift_factor: float
    description: str
    license: str

    @property
    def notes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def read(self, keys: Sequence[Key]) -> Batch: ...


class InMemoryImages:
    """Images in memory: (N, C, H, W) float32 in -1..1, or uint8, and (N,) int64 labels."""

    is_latent, scaling_factor, shift_factor, notes = False, 1.0, 0.0, ()

    def __init__(self, data: Tensor, labels: Tensor, id2label: dict[int, str], description: str, license: str):
        self.data, self.labels, self.id2label = data, labels, id2label
        self.description, self.license = description, license
        self.sample_shape = (data.shape[1], data.shape[2], data.shape[3])

    def __len__(self) -> int:
        return len(self.data)

    def read(self, keys: Sequence[Key]) -> Batch:
        positions = [position for position, _ in keys]
        index = torch.tensor(positions)
        data = self.data[index]
        if any(flipped for _, flipped in keys):
            flip = torch.tensor([flipped for _, flipped in keys])
            data = torch.where(flip[:, None, None, None], data.flip(3), data)
        if data.dtype == torch.uint8:
            data = data.float() / 127.5 - 1
        return Batch(data, self.labels[index], positions, [])


class ImageFolder:
    """A folder of images, or of one folder of images per class; see `find_images` and `to_rgb`."""

    is_latent, scaling_factor, shift_factor = False, 1.0, 0.0

    def __init__(self, folder: Path, size: int):
        self.files, names, left_out = find_images(folder)
        self.id2label = dict(enumerate(names))
        self.sample_shape, self.size = (3, size, size), size
        self.description, self.license = describe_images(len(self.files), len(names)), "unknown"
        self.notes = [*left_out, *enlarged(len(self.files), lambda at: self.files[at][0], size)]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, keys: Sequence[Key]) -> Batch:
        images, labels, positions, unreadable = [], [], [], []
        for position, flipped in keys:
            path, label = self.files[position]
            try:
                image = read_image(path, self.size)
            except UNREADABLE as error:
                unreadable.append(name_of(path, error))
                continue
            images.append(image.flip(2) if flipped else image)
            labels.append(label)
            positions.append(position)
        data = torch.stack(images) if images else torch.empty(0, *self.sample_shape)
        return Batch(data, torch.tensor(labels, dtype=torch.long), positions, unreadable)


# The facts of a folder of latents: when it is finished, and from the start.
LATENTS_FILE, PLAN_FILE = "latents.json", "plan.json"


class CachedLatents:
    """The latents of `dit-hub latents`: means and standard deviations of each image and its mirror image, in shards."""

    is_latent, notes = True, ()

    def __init__(self, folder: Path):
        try:
            facts = json.loads((folder / LATENTS_FILE).read_text())
            self.id2label = {int(index): name for index, name in facts["id2label"].items()}
            self.scaling_factor, self.shards = float(facts["scaling_factor"]), list(facts["shards"])
            self.shift_factor = float(facts.get("shift_factor", 0.0))
            channels, height, width = facts["shape"]
            self.starts = np.cumsum([0, *(int(shard["count"]) for shard in self.shards)])
            self.description, self.license = facts["description"], facts["license"]
            missing = [shard["file"] for shard in self.shards if not (folder / shard["file"]).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / LATENTS_FILE} is damaged; run dit-hub latents again.") from None
        if missing:
            raise ValueError(
                f"{folder} lacks {missing[0]}; run the same dit-hub latents again, which resumes where it stopped."
            )
        for shard in self.shards:
            try:
                with safe_open(folder / shard["file"], "pt") as tensors:
                    whole = tensors.get_slice("labels").get_shape() == [shard["count"]]
            except (OSError, SafetensorError):
                whole = False
            if not whole:
                raise ValueError(f"{folder / shard['file']} is damaged; run dit-hub latents again.")
        self.folder, self.sample_shape = folder, (channels, height, width)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, keys: Sequence[Key]) -> Batch:
        data, labels = [], []
        for position, flipped in keys:
            shard = int(np.searchsorted(self.starts, position, side="right")) - 1
            if shard not in self._open:  # memory-mapped: nothing is read until it is needed
                self._open[shard] = safe_open(self.folder / self.shards[shard]["file"], "pt")
            row = position - int(self.starts[shard])
            data.append(self._open[shard].get_slice("mirrored" if flipped else "upright")[row])
            labels.append(self._open[shard].get_slice("labels")[row])
        return Batch(torch.stack(data).float(), torch.stack(labels), [position for position, _ in keys], [])


def digits() -> InMemoryImages:
    """The handwritten digits that come with scikit-learn."""
    bunch: Any = require("sklearn.datasets", "train").load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1  # 0..16 -> -1..1
    description = (
        "Its data are the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (UCI, E. Alpaydin)."
    )
    names = {index: str(index) for index in range(10)}
    return InMemoryImages(images, torch.from_numpy(bunch.target).long(), names, description, "cc-by-4.0")


def archive(path: Path) -> InMemoryImages:
    """An .npz file; see `open_dataset`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file}
            names = file.files
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        # numpy takes other files for pickled objects, and advises to load them unsafely.
        problem = "it is not what numpy.savez writes" if "pickled" in str(error) else str(error).removesuffix(".")
        raise ValueError(f"{path} is not an archive of images: {problem}.") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no images; it has {listed(names) or 'nothing'}.")
    images, labels = arrays["images"], arrays.get("labels")
    fitting = labels is None or (np.issubdtype(labels.dtype, np.integer) and labels.shape == images.shape[:1])
    if images.ndim != 4 or images.dtype != np.uint8 or not fitting or not len(images):
        has = "" if labels is None else f" and {labels.dtype} {labels.shape}"
        raise ValueError(f"{path} must hold images, uint8 (N, H, W, C), and integer labels (N,), or none for a model "
                         f"without classes; it has {images.dtype} {images.shape}{has}.")  # fmt: skip
    id2label = {} if labels is None else class_names(path, labels)
    labels = np.zeros(len(images)) if labels is None else labels
    data = torch.from_numpy(images).permute(0, 3, 1, 2)
    description = describe_images(len(images), len(id2label))
    return InMemoryImages(data, torch.from_numpy(labels.astype(np.int64)), id2label, description, "unknown")


def class_names(path: Path, labels: np.ndarray) -> dict[int, str]:
    """The names of an archive's classes, which are their numbers.

    Raises:
        ValueError: negative labels, or a class without images.
    """
    if int(labels.min()) < 0:
        raise ValueError(f"{path} has negative labels.")
    classes = np.unique(labels)
    if len(classes) != (count := int(classes[-1]) + 1):
        empty = sorted(set(range(min(count, 1000))) - set(classes.tolist()))
        raise ValueError(f"{path} has {len(classes)} classes and a label {count - 1}, and no images of the classes "
                         f"{listed(empty)}; number the classes from 0 without gaps.")  # fmt: skip
    return {index: str(index) for index in range(count)}


def describe_images(images: int, classes: int) -> str:
    """A sentence about the data, for the card."""
    return f"Its data are {images} images{f' of {classes} classes' if classes else ''}."


class ResumableSampler(Sampler[list[Key]]):
    """The samples of each step: a function of seed and step alone, so that a resumed run sees what the first one saw.

    A pass visits every sample once, in an order drawn from the seed; a last batch that is not full is left out.
    accelerate's samplers draw no flips, and resume by iterating over the batches that are done.

    Args:
        count: size of the data set.
        batch_size: samples of a step, over all processes.
        micro_batches: number of equal parts of a step's batch: processes times accumulated passes.
        own: indices of this process's micro-batches.
        random_flip: flip half of the images.
        seed: seed of order and flips.
        first, last: steps, counted from 0; `last` is not included.
        shuffle: whether to draw an order; if not, samples come in the order of the data.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        micro_batches: int,
        own: Sequence[int],
        random_flip: bool,
        seed: int,
        first: int,
        last: int,
        shuffle: bool = True,
    ):
        self.count, self.batch_size, self.micro_batches, self.own = count, batch_size, micro_batches, own
        self.random_flip, self.seed, self.first, self.last, self.shuffle = random_flip, seed, first, last, shuffle
        self.steps_per_epoch = count // batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        size = self.batch_size // self.micro_batches
        drawn, order, flipped = -1, torch.empty(0), torch.empty(0)
        for step in range(self.first, self.last):
            epoch, index = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
                flipped = torch.rand(self.count, generator=generator) < (0.5 if self.random_flip else 0.0)
                drawn = epoch
            for micro_batch in self.own:
                start = index * self.batch_size + micro_batch * size
                positions = order[start : start + size]
                yield list(zip(positions.tolist(), flipped[positions].tolist(), strict=True))

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.own)
