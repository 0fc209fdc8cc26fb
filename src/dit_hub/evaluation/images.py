"""Images to evaluate: archives of ADM's format, folders of samples, training data, arrays; read a batch at a time."""

import hashlib
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..checks import shown
from ..files import file_sha256
from ..training.data import Dataset
from ..training.fingerprint import fingerprint
from ..training.loader import open_dataset
from .provenance import FACTS_FILE, read_facts
from .sample_files import ARCHIVE_FILE

# Batches of a data set that are read at a time, each by a thread.
_READERS = min(8, os.cpu_count() or 1)


class Images(Protocol):
    """A set of images of one size.

    Attributes:
        name: what they are, for results and messages.
        side: (height, width) in pixels.
        labels: (N,) classes, where they are known.
    """

    name: str
    side: tuple[int, int]
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """The images from `start` to before `stop`, as uint8 (n, H, W, 3) of at most `batch_size`."""
        ...

    def digest(self) -> str:
        """A SHA-256 that tells them apart from others: of the archive, or of what is cheap to read of a data set."""
        ...


class ArrayImages:
    """Images in memory: uint8 (N, H, W, 3)."""

    def __init__(self, array: Any, name: str = "an array"):
        _check_form(name, np.asarray(array).dtype, np.shape(array))
        self.array, self.name = np.asarray(array), name
        self.side = (self.array.shape[1], self.array.shape[2])
        self.labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.array)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, batch_size):
            yield self.array[first : min(first + batch_size, stop)]

    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.array).tobytes()).hexdigest()


class ArchiveImages:
    """`arr_0` of an .npz archive, uint8 (N, H, W, 3), as ADM's evaluator takes it; read as a stream.

    Labels are `arr_1`, where the archive has it.
    """

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        with _plain_errors(path), self._opened() as stream:
            shape, fortran, dtype = _header(stream)
        if fortran:
            raise ValueError(f"{path}: arr_0 is in Fortran's order; save it with numpy.ascontiguousarray.")
        _check_form(f"{path}: arr_0", dtype, shape)
        self.shape, self.side = shape, (shape[1], shape[2])
        self.labels = self._labels()

    def __len__(self) -> int:
        return self.shape[0]

    def _labels(self) -> np.ndarray | None:
        with _plain_errors(self.path), np.load(self.path, allow_pickle=False) as archive:
            labels = archive["arr_1"] if "arr_1" in archive.files else None
        if labels is None or labels.shape != self.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            return None
        return labels

    def _opened(self) -> Any:
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    held = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
                    raise ValueError(f"{self.path} has no images: they are called arr_0, and it holds {held}.")
                return archive.open("arr_0.npy")
        except zipfile.BadZipFile:
            raise ValueError(f"{self.path} is not an archive of numpy's, or was cut.") from None

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        size = int(np.prod(self.shape[1:]))
        with _plain_errors(self.path), self._opened() as stream:
            _header(stream)
            stream.seek(stream.tell() + start * size)
            for first in range(start, stop, batch_size):
                count = min(batch_size, stop - first)
                data = stream.read(count * size)
                if len(data) < count * size:
                    raise ValueError(f"{self.path} was cut: it ends before image {first + count}.")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])

    def digest(self) -> str:
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return file_sha256(self.path)


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """One sentence for what numpy and zipfile raise for damaged and foreign archives."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged, or not as numpy.savez writes ({error}).") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


class DatasetImages:
    """The images of training data, as they are shown to a model: cropped to its size; grey ones as three channels."""

    def __init__(self, dataset: Dataset, name: str):
        if dataset.is_latent:
            raise ValueError(f"{name} holds latents; metrics need images.")
        if dataset.sample_shape[0] not in (1, 3):
            raise ValueError(f"{name} has images of {dataset.sample_shape[0]} channels; metrics need colours or grey.")
        self.dataset, self.name = dataset, name
        self.side = (dataset.sample_shape[1], dataset.sample_shape[2])
        self.labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        starts = range(start, stop, batch_size)
        with ThreadPoolExecutor(_READERS) as pool:  # files are decoded while others are looked at
            waiting: deque[Future[np.ndarray]] = deque()
            for first in starts:
                waiting.append(pool.submit(self._read, first, min(first + batch_size, stop)))
                if len(waiting) > _READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _read(self, start: int, stop: int) -> np.ndarray:
        batch = self.dataset.read([(position, False) for position in range(start, stop)])
        if batch.unreadable:
            raise ValueError(f"{batch.unreadable[0]} cannot be read; a reference must be whole.")
        pixels = ((batch.data + 1) * 127.5).round().clamp(0, 255).byte()
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

    def digest(self) -> str:
        return fingerprint(self.dataset)


def open_samples(samples: Any) -> tuple[Images, dict[str, Any]]:
    """Generated images, and how they were made as far as their folder says.

    Args:
        samples: a folder of `dit-hub sample`, an .npz archive with `arr_0`, or an array, uint8 (N, H, W, 3).

    Raises:
        ValueError: there are no such images, the folder is not finished, or they have another form.
    """
    if isinstance(samples, np.ndarray):
        return ArrayImages(samples), {}
    path = Path(samples)
    if path.is_dir():
        return _folder_of_samples(path)
    if not path.is_file():
        raise ValueError(f"There is no folder and no file {path}.")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is no .npz archive; samples are one, or a folder of dit-hub sample.")
    return ArchiveImages(path), {}


def has_own_size(images: Any) -> bool:
    """Whether images have a size already, as archives with `arr_0` and folders of `dit-hub sample` do."""
    path = Path(images)
    return (path / FACTS_FILE).is_file() or (path.is_file() and path.suffix == ".npz" and "arr_0" in _names(path))


def finished_facts(folder: Path) -> dict[str, Any]:
    """How the samples of a folder were made; their archive, of gigabytes, is not read.

    Raises:
        ValueError: it is no folder of `dit-hub sample`, or not finished.
    """
    facts = read_facts(folder)
    if facts is None:
        raise ValueError(f"{folder} is not a folder of dit-hub sample: it has no {FACTS_FILE}. Give an .npz archive of "
                         "other samples.")  # fmt: skip
    if not facts["finished"] or not (folder / ARCHIVE_FILE).is_file():
        raise ValueError(f"{folder} is not finished: it has no {ARCHIVE_FILE} yet. The same dit-hub sample resumes.")
    return facts


def _folder_of_samples(folder: Path) -> tuple[Images, dict[str, Any]]:
    facts, images = finished_facts(folder), ArchiveImages(folder / ARCHIVE_FILE)
    if images.digest() != facts.get("sha256"):
        raise ValueError(f"{folder / ARCHIVE_FILE} is not the archive that {FACTS_FILE} describes; sample again.")
    return images, facts


def open_reference(reference: Any, side: tuple[int, int]) -> Images | None:
    """Real images to compare with; None for an archive that holds statistics alone.

    Args:
        reference: an .npz archive with `arr_0`, or data of `dit-hub train` ("shapes", "digits", a folder of images,
            "hf:NAME", …), or an array, uint8 (N, H, W, 3).
        side: (height, width) of the samples; images in folders are scaled and cropped to it as ADM's were.

    Raises:
        ValueError: there are no such images, or they have another size.
    """
    if isinstance(reference, np.ndarray):
        images: Images = ArrayImages(reference)
    else:
        path = Path(reference)
        if path.suffix.lower() == ".npz" and path.is_file() and "images" not in _names(path):
            if "arr_0" not in _names(path) and "mu" in _names(path):
                return None
            images = ArchiveImages(path)
        elif (path / FACTS_FILE).is_file():
            images = _folder_of_samples(path)[0]
        else:
            images = DatasetImages(open_dataset(str(reference), side[0], 200, 0), str(reference))
    if images.side != side:
        raise ValueError(f"The reference's images are {shown_size(images.side)}, and the samples are "
                         f"{shown_size(side)}; compare images of one size.")  # fmt: skip
    return images


def _names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        raise ValueError(f"{path} is not an archive of numpy's, or was cut.") from None


def shown_size(side: tuple[int, int] | None) -> str:
    """A size for messages: "width x height"."""
    return f"{side[1]}x{side[0]}" if side else "unknown size"


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array in a stream, which is then at its first value."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)
    except ValueError as error:
        raise ValueError(f"arr_0 is damaged: {str(error).removesuffix('.')}.") from None


def _check_form(what: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        hint = " Repeat grey images as three channels." if dtype == np.uint8 and grey else ""
        raise ValueError(f"{what} must be colour images, uint8 (N, H, W, 3), not {dtype} {shown(shape)}.{hint}")
    if shape[0] < 2 or min(shape) < 1:
        raise ValueError(f"{what} holds {shape[0]} image; metrics need two or more, with pixels.")
