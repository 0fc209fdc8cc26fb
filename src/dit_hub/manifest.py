"""The list of the files that dit-hub wrote into a folder, which tells them from the files of others."""

import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

# In each folder that `files.new_folder` finished: the files it wrote there, by relative path, each with its mark.
MANIFEST_FILE = ".dit-hub.json"

# The manifest, and one that is being written, or was when a process was killed.
_MANIFESTS = re.compile(re.escape(MANIFEST_FILE) + r"(\.[a-z0-9_]{8})?")

# Of a large file this many blocks are read, evenly spread: in a gigabyte one each megabyte, so that the change of a
# single table is seen. The size alone does not tell, since further training keeps it.
_BLOCKS, _BLOCK = 1024, 4096


def write_manifest(folder: Path) -> None:
    """List all that is in a folder."""
    _write(folder, {name: _mark(folder / name) for name in files_in(folder)})


def note_written(file: Path) -> None:
    """Add a file that dit-hub wrote later to the manifest of its folder, or of the folder above."""
    for folder in (file.parent, file.parent.parent):
        if (folder / MANIFEST_FILE).is_file():
            mark, written = _mark(file), _read(folder)
            if written is not None:  # a new one would make all other files foreign
                _write(folder, {**written, file.relative_to(folder).as_posix(): mark})
            return


def written_files(folder: Path) -> dict[str, str]:
    """The files that the manifest of a folder lists, with their marks; none where it is missing or unreadable."""
    return _read(folder) or {}


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
    """Relative names of the files and links in a folder and in its folders, and of folders that cannot be listed.

    The manifest is left out, and one that a killed process was writing.
    """
    closed: list[str] = []
    for root, folders, names in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders.sort()
        for name in sorted([*names, *(each for each in folders if Path(root, each).is_symlink())]):
            relative = Path(root, name).relative_to(folder).as_posix()
            if not _MANIFESTS.fullmatch(relative):
                yield relative
    yield from (Path(name).relative_to(folder).as_posix() for name in closed)


def _mark(file: Path) -> str:
    """A string that changes with the file: its size and the SHA-256 of its bytes, or the target of a link."""
    if file.is_symlink():
        return os.readlink(file)
    size, read = file.stat().st_size, hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        if size <= _BLOCKS * _BLOCK:
            read.update(opened.readall())
            return read.hexdigest()
        for number in range(_BLOCKS):
            opened.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            read.update(opened.read(_BLOCK))
    return f"{size} {read.hexdigest()}"


def _read(folder: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads((folder / MANIFEST_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, written: dict[str, str]) -> None:
    """Replace the manifest of a folder in one step, since other processes may be reading it."""
    number, building = tempfile.mkstemp(prefix=f"{MANIFEST_FILE}.", dir=folder)
    try:
        with open(number, "w") as file:
            file.write(json.dumps({"files": written}, indent=2) + "\n")
        os.chmod(building, 0o644)
        os.replace(building, folder / MANIFEST_FILE)
    except BaseException:
        os.unlink(building)
        raise
