"""The files of a set of samples: a PNG for each image, and ADM's `.npz` of all of them."""

import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..sharing import Worker
from .provenance import FACTS_FILE
from .results import RESULTS_FILE

ARCHIVE_FILE = "samples.npz"

# The folder of the PNGs, and how many of them each folder in it holds.
_IMAGES, _PER_FOLDER = "images", 1000

# What a folder of samples may hold; hidden files are locks, and files that a killed process was writing.
_OURS = re.compile(rf"{'|'.join(map(re.escape, (FACTS_FILE, ARCHIVE_FILE, RESULTS_FILE)))}|{_IMAGES}|\..*")


class SampleFiles:
    """The files of a folder of samples.

    Args:
        folder: of the samples.
        worker: this process.
        height_width: of the images.
    """

    def __init__(self, folder: Path, worker: Worker, height_width: tuple[int, int]):
        self.folder, self.worker, self.shape = folder, worker, (*height_width, 3)

    def check_own(self) -> None:
        """Raise ValueError where the folder holds something else, or images without the facts about them."""
        names = [file.name for file in self.folder.iterdir()]
        foreign = next((name for name in names if not _OURS.fullmatch(name)), None)
        if foreign is None and FACTS_FILE not in names and _IMAGES in names:
            raise ValueError(f"{self.folder} holds images without {FACTS_FILE}, which says how they were made; choose "
                             "another folder.")  # fmt: skip
        if foreign is not None:
            raise ValueError(f"{self.folder} holds other files than samples ({foreign}); choose another folder.")

    def path(self, index: int) -> Path:
        """The PNG of an image: images/00012/012345.png."""
        return self.folder / _IMAGES / f"{index // _PER_FOLDER:05d}" / f"{index:06d}.png"

    def present(self, num: int) -> np.ndarray:
        """(num,) whether the PNG of each image is there, as the folders list them."""
        present = np.zeros(num, bool)
        for first in range(0, num, _PER_FOLDER):
            try:
                entries = os.scandir(self.path(first).parent)
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    stem = entry.name.removesuffix(".png")
                    if stem.isdecimal() and first <= int(stem) < min(first + _PER_FOLDER, num):
                        present[int(stem)] = True
        return present

    def write(self, index: int, image: np.ndarray) -> None:
        """Write the PNG of an image, (H, W, 3) uint8, whole or not at all.

        It is not waited for until it is on the disk, so that a loss of power may damage it; see `read`.
        """
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "png")
        path = self.path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.worker.write(path, lambda building: building.write_bytes(encoded.getbuffer()), durable=False)

    def read(self, index: int) -> np.ndarray | None:
        """(H, W, 3) uint8; None where the PNG is damaged, or not there."""
        try:
            with Image.open(self.path(index)) as image:
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError):  # from Pillow, for what is no PNG and for one that is torn
            return None
        return pixels if pixels.shape == self.shape and pixels.dtype == np.uint8 else None

    def write_archive(self, num: int, labels: np.ndarray | None, image: Callable[[int], np.ndarray]) -> None:
        """Write the `.npz`, one image after the other.

        As ADM's own sampler does: `arr_0` (num, H, W, 3) uint8, and `arr_1` (num,) int64 for a model with classes. The
        same images give the same bytes.

        Args:
            num: of images.
            labels: (num,) int64; None for none.
            image: gives (H, W, 3) uint8 by number.
        """

        def fill(path: Path) -> None:
            with zipfile.ZipFile(path, "w") as archive:
                _add(archive, "arr_0", (num, *self.shape), "|u1", (image(index) for index in range(num)))
                if labels is not None:
                    _add(archive, "arr_1", (num,), "<i8", [labels.astype("<i8")])

        self.worker.write(self.folder / ARCHIVE_FILE, fill)

    def remove_leftovers(self) -> None:
        """Remove what killed processes were writing."""
        for leftover in (*self.folder.glob(".*.part"), *self.folder.glob(f"{_IMAGES}/*/.*.part")):
            leftover.unlink(missing_ok=True)


def _add(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    parts: Iterator[np.ndarray] | list[np.ndarray],
) -> None:
    """Add an array of this shape, part after part, as `np.savez` would, without a date."""
    entry = zipfile.ZipInfo(f"{name}.npy")  # of 1 January 1980
    entry.create_system = 3  # whatever the system
    with archive.open(entry, "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
