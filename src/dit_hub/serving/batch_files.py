"""A batch on the disk: its requests, and the images as shards that are there whole or not at all."""

import io
import json
import logging
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..files import sync
from ..sharing import Worker
from .bodies import parse_json
from .limits import ApiError, Limits
from .logs import log

# Images of a shard: few enough to hold in memory, and to draw again after the process was killed.
_SHARD_IMAGES = 64

_FACTS, _REQUESTS, _UPLOAD = "batch.json", "requests.jsonl", ".upload"

_ID = re.compile(r"batch_[0-9a-f]{32}")

_SHARD = re.compile(r"\d{6}\.tar")


class Line(NamedTuple):
    """A request of a batch: its number among those that are not blank, its shard, and its text."""

    number: int
    shard: int
    text: str


class Result(NamedTuple):
    """What became of a line: its record, and its images as PNG, none where it failed."""

    record: dict[str, Any]
    images: list[bytes]


@dataclass
class Upload:
    """The folder of a batch that is still arriving."""

    folder: Path

    @property
    def requests(self) -> Path:
        """The file to write what arrives to."""
        return self.folder / _REQUESTS

    def drop(self) -> None:
        """Remove what has arrived."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(eq=False)
class Batch:
    """A file of requests and the shards of their images, in a folder.

    Args:
        folder: whose name is the batch's id.
        created: seconds since 1970.
        shards: the number of lines of each.
        finished: the numbers of lines that succeeded and failed, of each shard that is there.
        status: of these.
        error: why it is paused.
    """

    folder: Path
    created: int
    shards: list[int]
    finished: dict[int, tuple[int, int]] = field(default_factory=dict)
    status: str = "in_progress"
    error: str | None = None
    unwritten: dict[int, dict[int, Result]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its name."""
        return self.folder.name

    @property
    def facts(self) -> dict[str, Any]:
        """What clients hear of it."""
        done = [result for results in self.unwritten.copy().values() for result in results.copy().values()]
        failed = sum(not result.images for result in done)
        written = list(self.finished.values())
        counts = {
            "total": sum(self.shards),
            "completed": sum(good for good, _ in written) + len(done) - failed,
            "failed": sum(bad for _, bad in written) + failed,
        }
        return {"id": self.id, "object": "batch", "endpoint": "/v1/images/generations", "status": self.status,
                "created_at": self.created, "request_counts": counts, "shards": len(self.shards),
                "error": self.error}  # fmt: skip

    def missing(self) -> Iterator[Line]:
        """The requests whose shards are not there."""
        ends = [sum(self.shards[: shard + 1]) for shard in range(len(self.shards))]
        shard = 0
        for number, text in enumerate(_lines(self.folder / _REQUESTS)):
            while number >= ends[shard]:
                shard += 1
            if shard not in self.finished:
                yield Line(number, shard, text)

    def add(self, line: Line, result: Result) -> None:
        """Keep what became of a line, and write its shard when that is complete.

        Raises:
            OSError: the disk is full.
        """
        results = self.unwritten.setdefault(line.shard, {})
        results[line.number] = result
        if len(results) == self.shards[line.shard]:
            name = f"{line.shard:06}.tar"
            Worker().write(self.folder / name, lambda path: path.write_bytes(_tar(results)))
            failed = sum(not result.images for result in results.values())
            self.finished[line.shard] = len(results) - failed, failed
            del self.unwritten[line.shard]

    def shard_files(self) -> dict[str, Path]:
        """The shards that are there, by name."""
        return {path.name: path for path in sorted(self.folder.iterdir()) if _SHARD.fullmatch(path.name)}

    def cancel(self) -> None:
        """Draw no more of it; its requests go, which a full disk does not prevent."""
        (self.folder / _REQUESTS).unlink(missing_ok=True)
        self.status, self.error = "cancelled", None

    def remove(self) -> None:
        """Remove all of it."""
        gone = self.folder.with_name(f".{self.id}{_UPLOAD}")
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def begin_upload(folder: Path) -> Upload:
    """A place for a batch that arrives."""
    place = folder / f".batch_{uuid.uuid4().hex}{_UPLOAD}"
    place.mkdir()
    return Upload(place)


def finish_upload(upload: Upload, limits: Limits, now: int) -> Batch:
    """The batch of requests that have arrived; on the disk when this returns.

    Args:
        upload: with all requests.
        limits: of the server.
        now: seconds since 1970.

    Raises:
        ValueError: there is no request in it.
        OSError: the disk is full.
    """
    shards = list(_shards(upload.requests, limits))
    if not shards:
        raise ValueError("The body holds no requests; it must have one JSON object on each line.")
    facts = {"created": now, "shards": shards}
    (upload.folder / _FACTS).write_text(json.dumps(facts))
    for path in (upload.requests, upload.folder / _FACTS, upload.folder):
        sync(path)
    folder = upload.folder.with_name(upload.folder.name.removeprefix(".").removesuffix(_UPLOAD))
    upload.folder.rename(folder)
    sync(folder.parent)
    return Batch(folder, now, shards)


def find_batches(folder: Path) -> list[Batch]:
    """The batches in a folder, the oldest first; what was still arriving when its server ended is removed.

    One that is damaged has failed; its shards, if there are any, can still be fetched.
    """
    found = []
    for path in folder.iterdir():
        if path.name.endswith(_UPLOAD) and _ID.fullmatch(path.name[1 : -len(_UPLOAD)]):
            shutil.rmtree(path, ignore_errors=True)
        elif _ID.fullmatch(path.name) and path.is_dir():
            found.append(_read_batch(path))
    return sorted(found, key=lambda batch: (batch.created, batch.id))


def _read_batch(folder: Path) -> Batch:
    try:
        facts = json.loads((folder / _FACTS).read_text())
        batch = Batch(folder, int(facts["created"]), [int(size) for size in facts["shards"]])
        for name, path in batch.shard_files().items():
            batch.finished[int(name[:6])] = _count(path)
    except Exception as error:  # whatever is in its files
        log("batch damaged", logging.ERROR, batch=folder.name, reason=f"{type(error).__name__}: {error}")
        said = "The batch's files are damaged; the server's log says how."
        return Batch(folder, int(folder.stat().st_mtime), [], status="failed", error=said)
    if len(batch.finished) == len(batch.shards):
        batch.status = "completed"
    elif not (folder / _REQUESTS).exists():
        batch.status = "cancelled"
    return batch


def _lines(path: Path) -> Iterator[str]:
    """The lines that are not blank; bytes that are not UTF-8 make their line fail only."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for text in file:
            if stripped := text.strip():
                yield stripped


def _shards(requests: Path, limits: Limits) -> Iterator[int]:
    """The numbers of lines that come into one shard each; only a line that has more images itself exceeds the usual."""
    lines = images = 0
    for text in _lines(requests):
        more = _images(text, limits)
        if images + more > _SHARD_IMAGES and lines:
            yield lines
            lines = images = 0
        lines, images = lines + 1, images + more
    if lines:
        yield lines


def _images(text: str, limits: Limits) -> int:
    """The number of images of a line; one that is wrong counts as one."""
    if len(text) > limits.body_bytes:
        return 1
    try:
        number = parse_json(text).get("n")
    except ApiError:
        return 1
    return number if isinstance(number, int) and 1 <= number <= limits.images_at_once else 1


def _tar(results: Mapping[int, Result]) -> bytes:
    """A shard in webdataset's naming: 000123.json, and 000123.png or, of several images, 000123.0.png, …"""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, (record, images) in sorted(results.items()):
            for index, data in enumerate(images):
                _add(archive, f"{number:06}.png" if len(images) == 1 else f"{number:06}.{index}.png", data)
            _add(archive, f"{number:06}.json", json.dumps(record).encode())
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _count(shard: Path) -> tuple[int, int]:
    """The numbers of requests in a shard that succeeded and failed."""
    with tarfile.open(shard) as archive:
        names = archive.getnames()
    drawn = {name.split(".")[0] for name in names if name.endswith(".png")}
    return len(drawn), sum(name.endswith(".json") for name in names) - len(drawn)
