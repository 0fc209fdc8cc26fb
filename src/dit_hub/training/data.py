"""What is trained on: pictures with labels, from the package, an archive, folders of images or cached latents."""

import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Sampler

from ..extras import require

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")

# What PIL raises at files that are damaged in one way or another.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, EOFError, struct.error, Image.DecompressionBombError)

# More unreadable pictures than this share of the data set, and something is wrong with it.
_MOST_UNREADABLE = 0.01

# A position in the data set, and whether to mirror the picture there.
Key = tuple[int, bool]


@dataclass
class Batch:
    """Some samples.

    Args:
        data: (N, C, H, W) pictures in -1..1, or (N, 2C, H, W) means and deviations of latents.
        labels: (N,) integers.
        positions: in the data set, of each sample.
        unreadable: files that could not be read and are left out.
    """

    data: Tensor
    labels: Tensor
    positions: list[int]
    unreadable: list[str]


def check_unreadable(unreadable: int, count: int, last: str = "") -> None:
    """Raise ValueError where more of a data set cannot be read than can be left out; `last` names one of them."""
    if unreadable > max(1, _MOST_UNREADABLE * count):
        named = f"; the last one is {last}" if last else ""
        raise ValueError(f"{unreadable} of {count} pictures cannot be read, more than {_MOST_UNREADABLE:.0%}{named}.")


class Dataset(Protocol):
    """What the loop needs to know of data.

    Args:
        id2label: names of the classes by id; empty for data without labels.
        sample_shape: (C, H, W) of what the model sees.
        is_latent: whether `read` returns means and deviations of latents.
        scaling_factor: of latents.
        description: a sentence for the card.
        license: of the data, as the Hub writes it.
    """

    id2label: dict[int, str]
    sample_shape: tuple[int, int, int]
    is_latent: bool
    scaling_factor: float
    description: str
    license: str

    def __len__(self) -> int: ...

    def read(self, keys: Sequence[Key]) -> Batch: ...


class Pictures:
    """Pictures that are in memory."""

    is_latent, scaling_factor = False, 1.0

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
        if any(mirrored for _, mirrored in keys):
            flip = torch.tensor([mirrored for _, mirrored in keys])
            data = torch.where(flip[:, None, None, None], data.flip(3), data)
        return Batch(data, self.labels[index], positions, [])


class ImageFolder:
    """A folder of a folder of images for each class, in the order of their names."""

    is_latent, scaling_factor = False, 1.0

    def __init__(self, folder: Path, size: int):
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.files:
            raise ValueError(f"{folder} has no images; it takes a folder of images ({', '.join(IMAGE_SUFFIXES)}) "
                             "for each class.")  # fmt: skip
        self.id2label = dict(enumerate(names))
        self.sample_shape, self.size = (3, size, size), size
        self.description, self.license = f"Its data are {len(self.files)} images of {len(names)} classes.", "unknown"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, keys: Sequence[Key]) -> Batch:
        pictures, labels, positions, unreadable = [], [], [], []
        for position, mirrored in keys:
            path, label = self.files[position]
            try:
                picture = self.picture(path)
            except UNREADABLE:
                unreadable.append(str(path))
                continue
            pictures.append(picture.flip(2) if mirrored else picture)
            labels.append(label)
            positions.append(position)
        data = torch.stack(pictures) if pictures else torch.empty(0, *self.sample_shape)
        return Batch(data, torch.tensor(labels, dtype=torch.long), positions, unreadable)

    def picture(self, path: Path) -> Tensor:
        """(3, size, size) in -1..1."""
        with Image.open(path) as image:
            return picture_tensor(image, self.size)


def picture_tensor(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) in -1..1, from the middle square."""
    cropped = center_crop(image.convert("RGB"), size)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, scaled as ADM's evaluation data were (Dhariwal and Nichol 2021, `image_datasets.py`).

    Halved by averaging while the shorter side is at least twice `size`, then scaled with a cubic filter.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


LATENTS_FILE = "latents.json"


class CachedLatents:
    """What `dit-hub latents` wrote: means and deviations of each picture and of its mirror image, by shard."""

    is_latent = True

    def __init__(self, folder: Path):
        try:
            facts = json.loads((folder / LATENTS_FILE).read_text())
            self.id2label = {int(index): name for index, name in facts["id2label"].items()}
            self.scaling_factor, self.shards = float(facts["scaling_factor"]), list(facts["shards"])
            channels, height, width = facts["shape"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / LATENTS_FILE} is damaged; run dit-hub latents again.") from None
        if missing := [shard["file"] for shard in self.shards if not (folder / shard["file"]).is_file()]:
            raise ValueError(f"{folder} lacks {missing[0]}; dit-hub latents goes on where it stopped.")
        for shard in self.shards:
            try:
                with safe_open(folder / shard["file"], "pt") as tensors:
                    whole = tensors.get_slice("labels").get_shape() == [shard["count"]]
            except (OSError, SafetensorError):
                whole = False
            if not whole:
                raise ValueError(f"{folder / shard['file']} is damaged; run dit-hub latents again.")
        self.folder, self.sample_shape = folder, (channels, height, width)
        self.starts = np.cumsum([0, *(shard["count"] for shard in self.shards)])
        self.description, self.license = facts["description"], facts["license"]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, keys: Sequence[Key]) -> Batch:
        data, labels = [], []
        for position, mirrored in keys:
            shard = int(np.searchsorted(self.starts, position, side="right")) - 1
            if shard not in self._open:  # memory-mapped: nothing is read until it is needed
                self._open[shard] = safe_open(self.folder / self.shards[shard]["file"], "pt")
            row = position - int(self.starts[shard])
            data.append(self._open[shard].get_slice("mirrored" if mirrored else "upright")[row])
            labels.append(self._open[shard].get_slice("labels")[row])
        return Batch(torch.stack(data).float(), torch.stack(labels), [position for position, _ in keys], [])


def digits() -> Pictures:
    """The handwritten digits that come with scikit-learn."""
    bunch: Any = require("sklearn.datasets", "train").load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1  # 0..16 -> -1..1
    description = (
        "Its data are the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (UCI, E. Alpaydin)."
    )
    names = {index: str(index) for index in range(10)}
    return Pictures(images, torch.from_numpy(bunch.target).long(), names, description, "cc-by-4.0")


def archive(path: Path) -> Pictures:
    """An .npz file; see `open_dataset`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no archive of images and labels: {error}") from None
    whole = np.issubdtype(labels.dtype, np.integer)
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != (len(images),) or not whole or not len(images):
        raise ValueError(f"{path} must hold images, uint8 (N, H, W, C), and whole labels (N,); it has {images.dtype} "
                         f"{images.shape} and {labels.dtype} {labels.shape}.")  # fmt: skip
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"{path} has negative labels.")
    data = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    names = {index: str(index) for index in range(int(labels.max(initial=-1)) + 1)}
    description = f"Its data are {len(images)} images of {len(names)} classes."
    return Pictures(data, torch.from_numpy(labels.astype(np.int64)), names, description, "unknown")


class Schedule(Sampler[list[Key]]):
    """Which samples each step takes: a function of seed and step alone, so that a resumed run sees what the first saw.

    A pass visits every sample once, in an order drawn from the seed; a last batch that is not full is left out.

    Args:
        count: size of the data set.
        batch_size: samples of a step, in all processes together.
        parts: equal parts of each step's batch: processes times accumulated passes.
        mine: which parts this process takes, in turn.
        mirror: mirror half of the pictures.
        seed: of the order.
        first, last: steps, counted from 0; `last` is not included.
        shuffle: whether to draw the order; else samples come as they lie.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        parts: int,
        mine: Sequence[int],
        mirror: bool,
        seed: int,
        first: int,
        last: int,
        shuffle: bool = True,
    ):
        self.count, self.batch_size, self.parts, self.mine = count, batch_size, parts, mine
        self.mirror, self.seed, self.first, self.last, self.shuffle = mirror, seed, first, last, shuffle
        self.per_pass = count // batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size // self.parts
        shown, order, mirrored = -1, torch.empty(0), torch.empty(0)
        for step in range(self.first, self.last):
            epoch, index = divmod(step, self.per_pass)
            if epoch != shown:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
                mirrored = torch.rand(self.count, generator=generator) < (0.5 if self.mirror else 0.0)
                shown = epoch
            for part in self.mine:
                start = index * self.batch_size + part * share
                positions = order[start : start + share]
                yield list(zip(positions.tolist(), mirrored[positions].tolist(), strict=True))

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.mine)
