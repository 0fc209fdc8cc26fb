"""Images: finding them in folders, and reading them as a viewer shows them."""

import contextlib
import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checks import listed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm",
                  ".avif", ".jp2")  # fmt: skip

# What PIL raises for damaged files.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, EOFError, struct.error,
              Image.DecompressionBombError)  # fmt: skip

# The colour behind transparent pixels, as on a page.
GROUND = (255, 255, 255, 255)

# The largest value of the modes with more than 8 bits. PIL reads some 16-bit files as 32-bit; floats go to 1.
_LARGEST = {"I": 65535, "F": 1.0}

# Folder names that mean splits rather than classes, if there are no others.
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# Number of images that are checked for their size.
_CHECKED = 100


class LeftOutError(ValueError):
    """An image that can be read but not trained on; the message is the reason."""


def read_image(file: Path | bytes, size: int) -> Tensor:
    """The middle square of an image, (3, size, size) float32 in -1..1; `file` is a path or the content.

    Raises:
        UNREADABLE: the file is damaged, or not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's warnings about damage and size do not name the file
        with _opened(file) as image:
            cropped = center_crop(to_rgb(image), size)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1


def _opened(file: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB: its first frame, turned as its EXIF says, on a white ground.

    16 bits are scaled to 8, floats from 0..1. Colour profiles are not applied.

    Raises:
        LeftOutError: integers outside 0..65535 or floats outside 0..1.
    """
    image.load()
    with contextlib.suppress(*UNREADABLE):  # EXIF that cannot be read is ignored
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits to 8 bits; PIL would cut it off at 255."""
    values, largest = np.asarray(image), _LARGEST.get(image.mode, 65535)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= largest:  # also catches NaN
        raise LeftOutError(f"its values, {low:g} to {high:g}, do not lie between 0 and {largest:g}")
    grey = np.round(values * (255.0 / largest)).astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = GROUND[0]
    return Image.fromarray(grey)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the middle square, scaled as ADM's evaluation data were (Dhariwal and Nichol 2021, `image_datasets.py`).

    Halved by averaging while the shorter side is at least twice `size`, then scaled with a cubic filter.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def name_of(what: object, error: Exception) -> str:
    """The name of an image that is left out, with the reason where it is known."""
    if isinstance(error, Image.DecompressionBombError):
        return f"{what} (it has more than {2 * cast(int, Image.MAX_IMAGE_PIXELS):,} pixels)"
    return f"{what} ({error})" if isinstance(error, LeftOutError) else str(what)


def enlarged(count: int, source: Callable[[int], Path | bytes], size: int) -> list[str]:
    """A sentence if images are smaller than `size`, in a list; empty if not. Checks some, evenly spread.

    Args:
        count: number of images.
        source: path or content of the image at a position.
        size: side to which they are scaled.
    """
    checked, small = range(0, count, -(-count // _CHECKED) or 1), 0
    for position in checked:
        with contextlib.suppress(*UNREADABLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(source(position)) as image:
                small += min(image.size) < size
    if not small:
        return []
    verb = "is" if small == 1 else "are"
    return [
        f"{small} of {len(checked)} images that were checked {verb} smaller than {size}x{size} and {verb} enlarged."
    ]


def find_images(folder: Path) -> tuple[list[tuple[Path, int]], list[str], list[str]]:
    """Find the images in a folder: in one folder per class, at any depth, or without classes.

    Names that begin with a dot are left out. Links are followed, but no folder is entered twice for a class.

    Returns:
        (file, class id) of each image; the names of the classes by id, empty if there are none (the id is then 0);
        sentences about files that are left out.

    Raises:
        ValueError: there are no images, classes without images, images outside the class folders, or splits in place of
            classes.
        OSError: a folder cannot be read.
    """
    _, entered, files = next(os.walk(folder, onerror=_raise))
    names = sorted(name for name in entered if _shown(name))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    beside = [folder / name for name in sorted(files) if _shown(name)]
    own = [file for file in beside if is_image(file)]
    if own and names:
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        raise ValueError(
            f"{folder} has images of its own ({own[0].name}{more}) and folders ({listed(names)}): with classes, each "
            f"image goes into the folder of its class; without, all go into {folder} itself."
        )
    if names and _SPLITS.issuperset(name.casefold() for name in names):
        raise ValueError(f"{folder} has splits ({listed(names)}) in place of classes; give one of them, such as "
                         f"{folder / max(names, key=lambda name: name.startswith('train'))}.")  # fmt: skip
    if nameless := [ascii(name) for name in names if any("\ud800" <= letter <= "\udfff" for letter in name)]:
        raise ValueError(f"{folder} has class folders whose names are not UTF-8: {listed(nameless)}. Rename them.")
    by_class = [sorted(_files(folder / name, without=folder)) for name in names] or [beside]
    images = [(file, label) for label, files in enumerate(by_class) for file in files if is_image(file)]
    others = Counter(file.suffix.lower() for files in by_class for file in files if not is_image(file))
    if not images:
        has = f"; its files are {_counted(others)}" if others else ""
        raise ValueError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)}){has}. Data are a folder of images, "
                         "or one folder of images per class.")  # fmt: skip
    if empty := [name for name, files in zip(names, by_class, strict=False) if not any(map(is_image, files))]:
        raise ValueError(f"{folder} has class folders without images: {listed(empty)}. Remove or fill them.")
    return images, names, _left_out(folder, others)


def is_image(file: Path) -> bool:
    """Whether a file is an image, by its suffix."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _files(folder: Path, without: Path) -> Iterator[Path]:
    """The files in a folder at any depth; each folder is entered once, and `without` never."""
    seen = {_identity(without)}
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if _identity(parent) in seen:
            folders.clear()
            continue
        seen.add(_identity(parent))
        folders[:] = sorted(filter(_shown, folders))
        yield from (Path(parent, name) for name in files if _shown(name))


def _identity(folder: str | Path) -> tuple[int, int]:
    """An identity of a folder that all links to it share."""
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino


def _raise(error: OSError) -> None:
    raise error


def _shown(name: str) -> bool:
    return not name.startswith(".")


def _counted(suffixes: Counter[str]) -> str:
    """The number of files with each suffix, the most frequent first."""
    ordered = sorted(suffixes.items(), key=lambda item: (-item[1], not item[0], item[0]))
    return listed([f"{count} {suffix or 'without a suffix'}" for suffix, count in ordered])


def _left_out(folder: Path, others: Counter[str]) -> list[str]:
    count = others.total()
    what = "1 file that is not an image and is" if count == 1 else f"{count} files that are not images and are"
    return [f"{folder} has {what} left out: {_counted(others)}."] if count else []
