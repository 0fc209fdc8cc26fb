"""Folders that appear whole or not at all, and shards that stay in theirs."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What libraries say when the system takes no more bytes.
_FULL = (
    "No space left",
    "File too large",
    "Disk quota",
    "file write failed",  # torch
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)


@contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block ends well and vanishes when it raises.

    Args:
        target: where the result goes; missing parents are made.
        overwrite: replace a folder that is there. Until the new one is complete, the old one stays.

    Raises:
        ValueError: `target` is a file, or a folder with content and `overwrite` is off.
        OSError: the disk is full.
    """
    target = Path(target)
    check_free(target, overwrite)
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        building.chmod(0o755)
        yield building
        for path in building.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that their owner alone can read
            _sync(path)
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            target.rename(replaced / "old")
            try:
                building.rename(target)
            except OSError:
                (replaced / "old").rename(target)
                raise
            finally:
                shutil.rmtree(replaced)
        else:
            building.rename(target)
        _sync(target.parent)
    except Exception as error:  # torch and safetensors have no OSError for it
        if any(sign in str(error) for sign in _FULL):
            raise OSError(f"{target} could not be written: the disk is full or a limit is reached.") from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if not target.exists():
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()


@contextmanager
def new_file(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A path to write, which takes the name `target` when the block ends well and vanishes when it raises.

    Args:
        target: where the file goes, in a folder that is there; the path that is given has its ending.
        overwrite: replace a file that is there. Until the new one is complete, the old one stays.

    Raises:
        ValueError: there is such a file and `overwrite` is off.
        OSError: the disk is full.
    """
    target = Path(target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        building = Path(folder, target.name)
        try:
            yield building
            _sync(building)
            if overwrite:
                building.replace(target)
            else:
                _link(building, target)
        except FileExistsError:
            raise ValueError(f"{target} exists; choose another name or pass --overwrite.") from None
        except Exception as error:
            if any(sign in str(error) for sign in _FULL):
                raise OSError(f"{target} could not be written: the disk is full or a limit is reached.") from error
            raise


def _link(file: Path, name: Path) -> None:
    """Give a file a second name; unlike a rename, this fails where the name was taken meanwhile."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if name.exists():
            raise FileExistsError(name) from None
        file.replace(name)


def check_free(target: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise ValueError where `new_folder` would, so that long work need not be done first."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"The folder {target} is not empty; choose another or pass --overwrite.")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so that {target} cannot be made in it.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} cannot be written to.")


def check_shards(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names.

    Raises:
        ValueError: the index is damaged, or names a file outside its folder or one that is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of a sharded checkpoint.") from None
    for name, path in zip(names, paths, strict=True):
        if Path(name).name != name or name in ("", "..", "."):
            raise ValueError(f"{index} names {name!r}, which is not a file of its folder.")
        if not path.is_file():
            raise ValueError(f"{index} names {name}, which is not there.")
    return paths


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
