"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block ends well and vanishes when it raises.

    Args:
        target: where the result goes; missing parents are made.
        overwrite: replace a folder that is there. Until the new one is complete, the old one stays.

    Raises:
        ValueError: `target` is a file, or a folder with content and `overwrite` is off.
    """
    target = Path(target)
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        building.chmod(0o755)
        yield building
        for path in building.rglob("*"):
            _sync(path)
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            target.rename(replaced / "old")
            building.rename(target)
            shutil.rmtree(replaced)
        else:
            building.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_free(target: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise ValueError where `new_folder` would, so that long work need not be done first."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"The folder {target} is not empty; choose another or pass --overwrite.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
