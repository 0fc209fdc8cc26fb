"""The list of what dit-hub wrote into a folder, by which the files of others are told apart."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

# In each folder that `files.new_folder` finished: what it wrote there, by relative path, each with its mark.
MANIFEST_FILE = ".dit-hub.json"

_SMALL = 2**20  # bytes; larger files are told apart by their size alone


def write_manifest(folder: Path) -> None:
    """List all that is in a folder."""
    _write(folder, {name: _mark(folder / name) for name in files_in(folder)})


def note_written(file: Path) -> None:
    """Take note that dit-hub wrote a file into a folder of `new_folder`, or into a folder of one, after it was made."""
    for folder in (file.parent, file.parent.parent):
        if (folder / MANIFEST_FILE).is_file():
            _write(folder, {**written_files(folder), file.relative_to(folder).as_posix(): _mark(file)})
            return


def written_files(folder: Path) -> dict[str, str | int]:
    """What the manifest of a folder says; nothing where there is none."""
    try:
        return dict(json.loads((folder / MANIFEST_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def foreign_files(folder: Path) -> Iterator[str]:
    """Names of the files that are not as `new_folder` wrote them."""
    written = written_files(folder)
    for name in files_in(folder):
        if name not in written:
            yield name
        elif _mark(folder / name) != written[name]:
            yield f"{name} (changed since)"


def listed_foreign(folder: Path, most: int = 3) -> str:
    """Some files of a folder that `new_folder` did not write, for a message; "" where there are none."""
    names = list(itertools.islice(foreign_files(folder), most + 1))
    if not names:
        return ""
    known = "" if (folder / MANIFEST_FILE).is_file() else f", or wrote before it listed them in {MANIFEST_FILE}"
    return f"{known}: {', '.join(names[:most])}{' and more' if len(names) > most else ''}"


def files_in(folder: Path) -> Iterator[str]:
    """Relative names of the files and links in a folder and in its folders, but the manifest."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *(each for each in folders if Path(root, each).is_symlink())]):
            relative = Path(root, name).relative_to(folder).as_posix()
            if relative != MANIFEST_FILE:
                yield relative


def _mark(file: Path) -> str | int:
    """What changes when a file does: the SHA-256 of a small one, the size of a large one, where a link leads."""
    if file.is_symlink():
        return os.readlink(file)
    size = file.stat().st_size
    return size if size > _SMALL else hashlib.sha256(file.read_bytes()).hexdigest()


def _write(folder: Path, written: dict[str, str | int]) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": written}, indent=2) + "\n")
