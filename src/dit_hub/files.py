"""Folders that appear whole or not at all and replace nothing of the user's; locks."""

import contextlib
import errno
import hashlib
import itertools
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .manifest import MANIFEST_FILE, files_in, foreign_files, listed_foreign, write_manifest, written_files

# The lock of a folder that one process works in.
LOCK_FILE = ".lock"

# Parts of libraries' errors where the disk is full or a limit is reached.
_FULL = (
    "No space left",
    "File too large",
    "Disk quota",
    "file write failed",  # torch
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)

# Errors of a disk that lost what was written.
_LOSSES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class TakenError(ValueError):
    """The name of a result was taken while it was made; the complete result is in the folder `kept`."""

    def __init__(self, message: str, kept: Path):
        super().__init__(message)
        self.kept = kept


# --- New folders -----------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False, late: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block succeeds and is removed when it raises.

    Until then it is in a hidden folder beside the target. The next call on the same machine removes those that killed
    processes left there.

    Args:
        target: the path of the result; missing parents are created. A link stays and is followed.
        overwrite: replace an existing folder, if all files in it are as `new_folder` wrote them. The old one stays
            until the new one is complete.
        late: the long work is done already, after a `check_free`; the target is checked again only at the end, so that
            the result is kept even if the target has been filled.

    Raises:
        ValueError: see `check_free`.
        TakenError: the target was filled, or another's files were added to it, while the block ran.
        OSError: the disk is full.
    """
    if not late:
        check_free(target, overwrite)
    place = _place(target)
    made = _make_parents(place)
    remove_leftovers(place.parent)
    try:
        with workplace(place) as work:
            building = work / "new"
            building.mkdir()
            building.chmod(0o755)
            yield building
            _finish(building)
            _put(building, place, work / "old" if overwrite else None, target)
        sync(place.parent)
    except Exception as error:  # torch and safetensors raise others than OSError
        if any(sign in str(error) for sign in _FULL):
            raise OSError(f"{target} could not be written: the disk is full or a limit is reached.") from error
        raise
    finally:
        if not place.exists():
            _remove_empty(made)


@contextmanager
def new_file(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the name `target` when the block succeeds and is removed when it raises.

    Args:
        target: the path of the file, in an existing folder; the path to write to has the same suffix.
        overwrite: replace an existing file. The old one stays until the new one is complete.

    Raises:
        ValueError: the file exists and `overwrite` is off.
        OSError: the disk is full.
    """
    target = Path(target)
    remove_leftovers(target.parent)
    with workplace(target) as work:
        building = work / target.name
        try:
            yield building
            sync(building)
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
    """Give a file a second name; unlike a rename, this fails where the name has been taken meanwhile."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if name.exists():
            raise FileExistsError(name) from None
        file.replace(name)


def check_free(target: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise ValueError where `new_folder` would, to be called before long work.

    It refuses a `target` that is a file, is inside one or in a folder that cannot be written to, is or contains the
    current folder, is a mount point, or has content: any if `overwrite` is off, else what `new_folder` did not write.
    """
    place = _place(target)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{target} is a file, not a folder.")
    if os.path.ismount(place):
        raise ValueError(f"{target} is a mount point, which cannot be replaced; choose a folder in it.")
    with contextlib.suppress(FileNotFoundError):  # a current folder that is gone
        here = Path(os.path.realpath(Path.cwd()))
        if place.exists() and place in (here, *here.parents):
            what = "is" if place == here else "holds"
            raise ValueError(f"{target} {what} the current folder, which cannot be replaced; choose another folder.")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so {target} cannot be created in it.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} cannot be written to.")
    if parent == place.parent:
        remove_leftovers(parent)
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise ValueError(f"The folder {target} is not empty; choose another or pass --overwrite.")
        if foreign := listed_foreign(place):
            raise ValueError(f"{target} holds files that dit-hub did not write{foreign}; move them or choose another "
                             "folder.")  # fmt: skip


def remove_leftovers(parent: Path) -> None:
    """Remove the hidden folders that killed processes of this machine left behind.

    A folder that one of them had moved aside gets its name back.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        for work in [path for path in parent.iterdir() if re.fullmatch(r"\..+-[a-z0-9_]{8}", path.name)]:
            with contextlib.suppress(OSError):  # another user's
                if (work / _work_lock()).is_file():
                    _remove_leftover(work)
                else:
                    work.rmdir()  # empty: not locked yet, or all but removed


def remove_folder(folder: Path) -> None:
    """Remove what `new_folder` wrote; files that others added stay."""
    names, written = set(files_in(folder)), written_files(folder).keys()
    if names <= written:
        with workplace(folder) as work:  # whole or not at all
            folder.rename(work / "gone")
        return
    for name in (MANIFEST_FILE, *(names & written)):
        (folder / name).unlink(missing_ok=True)


# --- Locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, refusal: str, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold a lock of a folder; a missing folder is created, and removed again if nothing is put into it.

    The system releases the lock when the process ends, however it ends. The same thread may lock it again inside.

    Raises:
        ValueError: another process or thread holds it; the message is `refusal`.
    """
    made = _make_parents(folder)
    folder.mkdir(exist_ok=True)
    try:
        with held(folder / name) as got:
            if not got:
                raise ValueError(refusal)
            yield
    finally:
        _remove_empty([folder, *made])


@contextmanager
def held(file: Path, wait: float = 0.0) -> Iterator[bool]:
    """Try to hold a lock while the block runs; False where another has held it for `wait` seconds. See `locked`."""
    lock = _hold(file, again=True, wait=wait)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            if lock.lock_counter <= 1:
                with contextlib.suppress(OSError):  # Windows cannot remove an open file
                    file.unlink()  # before the release: later it may be another's lock
            lock.release()


# --- Details ---------------------------------------------------------------------------------------------------------


def _place(target: str | os.PathLike) -> Path:
    """The absolute path of a target, with links resolved."""
    if Path(target).parts[:1] == ("~",):
        raise ValueError(f"{target}: the shell did not expand ~; write out the path of your home folder.")
    place = Path(os.path.realpath(target))
    if place.is_symlink():
        raise ValueError(f"{target} is a link that leads in a circle.")
    return place


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside a target, locked while the block runs and removed afterwards."""
    lock = None
    while lock is None:  # again if `remove_leftovers` removed the folder before it was locked
        work = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = _hold(work / _work_lock())
        if not (work / _work_lock()).exists():
            lock = None
    try:
        yield work
    finally:
        _clear(work)
        lock.release()
        shutil.rmtree(work, ignore_errors=True)  # Windows cannot remove an open file


def _work_lock() -> str:
    """The lock's name in a hidden folder. It names the machine, since not every shared disk shares locks."""
    return f"{platform.node()}.lock"


def _remove_leftover(work: Path) -> None:
    lock = _hold(work / _work_lock())
    if lock is None or not lock.is_locked:
        return
    try:
        _clear(work)  # before the release, or a process that is creating a folder of this name could lock it
    finally:
        lock.release()


def _clear(work: Path) -> None:
    """Remove a hidden folder; a folder that was moved into it but not replaced gets its name back."""
    for old in work.glob("old/*"):
        _put_back(old, work.parent / old.name)
    shutil.rmtree(work, ignore_errors=True)


def _hold(file: Path, again: bool = False, wait: float = 0.0) -> FileLock | None:
    """The lock of a file, held where the file system has locks; None where another process or thread holds it.

    Args:
        file: created if missing.
        again: whether the thread that holds it may acquire it again.
        wait: for so many seconds.
    """
    lock = FileLock(file, timeout=wait, is_singleton=again)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


def _finish(building: Path) -> None:
    """Write the manifest of a folder and sync all of it to the disk."""
    write_manifest(building)
    for path in building.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        sync(path)
    sync(building)


def _put(building: Path, place: Path, old: Path | None, target: str | os.PathLike) -> None:
    """Give a finished folder its name in one step, or a free one beside it where the name is taken.

    Args:
        building: the folder.
        place: its name.
        old: where an existing folder is moved to; None where there must be none.
        target: the name as the user wrote it.
    """
    try:
        if old is not None and place.is_dir():
            old.mkdir()
            place.rename(old / place.name)
            if any(foreign_files(old / place.name)):  # looked at where nobody adds files any more
                raise FileExistsError(errno.EEXIST, "")
        _rename(building, place)
    except OSError as error:
        kept = _keep_beside(building, place)
        taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
        problem = "was filled meanwhile" if taken else f"cannot be replaced ({error.strerror})"
        beside = Path(target).parent / kept.name if Path(target).name == place.name else kept
        raise TakenError(f"{target} {problem}; the result is in {beside}.", kept) from None


def _put_back(old: Path, place: Path) -> None:
    """Give a folder its name back; where that is taken, a free one beside it if it holds files of others."""
    try:
        _rename(old, place)
    except OSError:
        if any(foreign_files(old)):
            _keep_beside(old, place)


def _keep_beside(folder: Path, place: Path) -> Path:
    """Move a folder to the first free name of NAME-1, NAME-2, …"""
    for number in itertools.count(1):
        beside = place.with_name(f"{place.name}-{number}")
        if os.path.lexists(beside):
            continue
        try:
            _rename(folder, beside)
            return beside
        except OSError:
            if not os.path.lexists(beside):  # not because the name has been taken meanwhile
                raise
    raise AssertionError


def _rename(folder: Path, place: Path) -> None:
    """Rename a folder to a free name, or over an empty folder, in one step; OSError where the name is taken."""
    if os.name == "nt":  # which does not rename over an empty folder
        with contextlib.suppress(OSError):
            place.rmdir()
    folder.rename(place)


def _make_parents(place: Path) -> list[Path]:
    """Create the parents of a path; returns those that were missing, the deepest first."""
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    return made


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the deepest first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Sync a file to the disk, or the entries of a folder where the system can."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only files open for writing
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # Windows opens no folders, and some network disks sync none
        if not folder or error.errno in _LOSSES:
            raise
