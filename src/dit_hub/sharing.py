"""Long work that processes share: each makes its own pieces, a cut run resumes, and the last one puts them together."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from .files import LOCK_FILE, held, locked, sync

# Called with the number of pieces' items that are done, and of all.
Progress = Callable[[int, int], None]

Piece = TypeVar("Piece")

# The locks of the process that puts the pieces together, and of one that changes what all of them note in one file.
_LAST, _NOTES = f"{LOCK_FILE}-last", f"{LOCK_FILE}-notes"

# A note is written in milliseconds; after so many seconds its writer hangs.
_NOTE_SECONDS = 60.0


@dataclass(frozen=True)
class Worker:
    """One of the processes that share work in a folder, perhaps on several machines with a common disk.

    Args:
        index: its number.
        count: how many there are.
        local_index: its number on its machine, and so of its GPU.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    @classmethod
    def from_environment(cls) -> "Worker":
        """This process, as `accelerate launch` and torchrun describe it; without a launcher, the only one.

        No process group is formed: nobody waits for anybody, so nothing times out however long a share takes.

        Raises:
            ValueError: the variables are no such numbers.
        """
        told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        try:
            index, count, local = (int(text or default) for text, default in zip(told, (0, 1, 0), strict=True))
        except ValueError:
            index, count, local = 0, 0, 0
        if not 0 <= index < count:
            raise ValueError(f"RANK and WORLD_SIZE must be a process's number and how many there are, not {told[0]!r} "
                             f"and {told[1]!r}.")  # fmt: skip
        return cls(index, count, local)

    def share(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """This process's own pieces, which are every `count`-th one."""
        return pieces[self.index :: self.count]

    @contextmanager
    def at_work(self, folder: Path, refusal: str) -> Iterator[None]:
        """Keep processes of other runs out of a folder while the block runs; the folder is created if missing.

        Raises:
            ValueError: a process of this number is at work there; the message is `refusal`.
        """
        with locked(folder, refusal, f"{LOCK_FILE}-{self.index}" if self.index else LOCK_FILE):
            yield

    @contextmanager
    def as_last(self, folder: Path) -> Iterator[bool]:
        """Whether this process is to put the pieces together, for which all of them must be there.

        Each process looks when its share is done, so that the last one finds all of them. Where two are last at once,
        one of them gets False.
        """
        with held(folder / _LAST) as got:
            yield got

    @contextmanager
    def noting(self, folder: Path) -> Iterator[None]:
        """Wait until no other process changes the notes that all of them share."""
        with held(folder / _NOTES, _NOTE_SECONDS):
            yield

    def write(self, path: Path, write: Callable[[Path], Any], durable: bool = True) -> None:
        """Write a file whole or not at all, whatever ends the program meanwhile.

        Args:
            path: its name.
            write: writes to the path that it is called with, which is beside `path`.
            durable: wait until the file is on the disk, so that it is whole even after a loss of power.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        building = path.with_name(f".{path.name}.{self.index}.part")
        try:
            write(building)
            if durable:
                sync(building)
            building.replace(path)
            if durable:
                sync(path.parent)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path} could not be written ({error}). What is finished stays; with room on the disk, the "
                          "same command resumes.") from error  # fmt: skip
        finally:
            building.unlink(missing_ok=True)
