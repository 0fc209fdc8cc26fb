"""Long work behind interactive requests: batches, drawn one after the other and resumed after any end."""

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checks import shown
from ..sharing import Worker
from .batch_files import Batch, Line, Result, Upload, begin_upload, find_batches, finish_upload
from .bodies import ImageBody, parse_images, parse_json
from .drawing import failure, png_bytes
from .limits import ApiError, Limits
from .logs import log
from .models import Loaded, Models
from .requests import Event, ImageRequest, Job, QueueFullError

# Interactive requests come before all batches.
_PRIORITY = -8

# Images of batches that the engine has at a time, at most.
_IN_FLIGHT = 64

# Between two looks at what a batch waits for: a model that is loaded, room in the queue.
_SECONDS = 0.2

# Called with the name of a model, and the number of images that it has drawn.
Counter = Callable[[str, int], None]

# Errors that are not of a line, and keep a batch from going on until someone has looked.
_PAUSES = ("model_failed", "engine_stopped")


@dataclass(eq=False)
class _Work:
    """A line that the engine works on."""

    line: Line
    model: Loaded
    job: Job
    record: dict[str, Any]
    images: dict[int, bytes] = field(default_factory=dict)


class _PauseError(Exception):
    """A batch cannot go on; the text is a sentence for clients."""


class Batches:
    """The batches of a server, in a folder that no other server works in.

    Args:
        folder: created if missing. Batches that are not finished there are resumed.
        models: that draw.
        limits: of the server.

    Raises:
        ValueError: another server works there.
        OSError: the folder cannot be written to.

    `count` is called, if set, with the name of a model and a number of images that it has drawn.
    """

    def __init__(self, folder: Path, models: Models, limits: Limits):
        self._folder, self._models, self._limits = folder, models, limits
        self._in_flight = max(1, min(_IN_FLIGHT, limits.waiting // 4))  # they wait in the queue of interactive requests
        self._changed, self._stopping = threading.Condition(), False
        self._batches: dict[str, Batch] = {}
        self._current: Batch | None = None
        self.count: Counter | None = None
        begun: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(begun,), name="batches", daemon=True)
        self._thread.start()
        if (error := begun.get()) is not None:
            raise error

    def all(self) -> list[Batch]:
        """The oldest first."""
        return list(self._batches.values())

    def get(self, name: str) -> Batch:
        """The batch of an id.

        Raises:
            ApiError: there is none.
        """
        if name not in self._batches:
            raise ApiError(404, f"There is no batch {shown(name)}.", code="batch_not_found")
        return self._batches[name]

    def check_room(self) -> None:
        """Raise `ApiError` where too many batches are not finished."""
        unfinished = sum(batch.status in ("in_progress", "paused") for batch in self.all())
        if unfinished >= self._limits.batches:
            raise ApiError(429, f"{unfinished} batches are not finished, and this server takes no more than that.",
                           code="too_many_batches", headers={"Retry-After": "60"})  # fmt: skip

    def begin_upload(self) -> Upload:
        """A place for a batch that arrives."""
        return begin_upload(self._folder)

    def add(self, upload: Upload) -> Batch:
        """Accept a batch that has arrived; see `finish_upload` and `check_room`."""
        batch = finish_upload(upload, self._limits, int(time.time()))
        with self._changed:
            try:
                self.check_room()  # for others may have arrived meanwhile
            except ApiError:
                batch.remove()
                raise
            self._batches[batch.id] = batch
            self._changed.notify_all()
        return batch

    def resume(self, batch: Batch) -> None:
        """Go on with a batch that is paused."""
        with self._changed:
            if batch.status != "paused":
                raise ApiError(409, f"The batch is {batch.status}, not paused.", code="not_paused")
            batch.status, batch.error = "in_progress", None
            self._changed.notify_all()

    def cancel(self, batch: Batch) -> None:
        """End a batch; the shards that are there stay."""
        with self._changed:
            if batch.status not in ("in_progress", "paused"):
                raise ApiError(409, f"The batch is {batch.status} already.", code="over")
            batch.cancel()

    def remove(self, batch: Batch) -> None:
        """Remove a batch that is over, with its images."""
        with self._changed:
            if batch.status in ("in_progress", "paused") or batch is self._current:
                raise ApiError(409, "The batch is not over; cancel it first.", code="not_over")
            del self._batches[batch.id]
        batch.remove()

    def stop(self) -> None:
        """Stop at once; what is not in a shard is drawn again at the next start."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    # --- On a thread of its own --------------------------------------------------------------------------------------

    def _run(self, begun: "queue.SimpleQueue[Exception | None]") -> None:
        with contextlib.ExitStack() as held:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(Worker().at_work(self._folder, f"Another server works in {self._folder}."))
                self._batches = {batch.id: batch for batch in find_batches(self._folder)}
            except Exception as error:
                begun.put(error)
                return
            begun.put(None)
            while (batch := self._next()) is not None:
                self._finish(batch)

    def _next(self) -> Batch | None:
        """The oldest batch with something to do; None at the end of the server."""
        with self._changed:
            self._current = None
            while not self._stopping:
                self._current = next((one for one in self.all() if one.status == "in_progress"), None)
                if self._current is not None:
                    return self._current
                self._changed.wait()
        return None

    def _finish(self, batch: Batch) -> None:
        try:
            run = _Run(batch, self._models, self._limits, self._in_flight, lambda: self._stopping)
            run.draw(self.count)
            problem = None
        except _PauseError as error:
            problem = str(error)
        except OSError as error:
            reason = getattr(error.__cause__ or error, "strerror", None) or type(error).__name__
            problem = f"The results could not be written ({reason}); make room or put it right, and resume the batch."
        except Exception as error:
            log("batch failed", logging.ERROR, error, batch=batch.id)
            problem = "The batch has failed; the server's log says how."
        with self._changed:
            batch.unwritten.clear()
            if problem is not None and batch.status == "in_progress":
                batch.status, batch.error = "paused", problem
            elif batch.status == "in_progress" and len(batch.finished) == len(batch.shards):
                batch.status = "completed"
            elif batch.status == "in_progress" and not self._stopping:
                batch.status, batch.error = "paused", "Lines of the batch's file of requests are missing."
        if not self._stopping:
            log("batch", batch=batch.id, status=batch.status, reason=batch.error)


class _Run:
    """A batch at work, on the thread of all batches."""

    def __init__(self, batch: Batch, models: Models, limits: Limits, in_flight: int, is_stopping: Callable[[], bool]):
        self._batch, self._models, self._limits = batch, models, limits
        self._in_flight, self._is_stopping = in_flight, is_stopping
        self._working: dict[Job, _Work] = {}
        self._events: queue.SimpleQueue[tuple[Line, Event]] = queue.SimpleQueue()

    def draw(self, count: Counter | None) -> None:
        """Draw what is missing, with a bounded number of images in flight.

        Raises:
            _PauseError: a model cannot be loaded, or an engine has stopped.
            OSError: the disk is full.
        """
        lines, waiting = self._batch.missing(), None
        try:
            while not self._is_stopping() and self._batch.status == "in_progress":
                while sum(work.job.request.n for work in self._working.values()) < self._in_flight:
                    waiting = next(lines, None) if waiting is None else waiting
                    if waiting is None or not self._begin(waiting):
                        break
                    waiting = None
                if not self._working and waiting is None:
                    return
                with contextlib.suppress(queue.Empty):
                    self._hear(*self._events.get(timeout=_SECONDS), count)
        finally:
            for work in self._working.values():
                work.model.runner.cancel(work.job)
                self._models.release(work.model)

    def _begin(self, line: Line) -> bool:
        """Have the engine begin a line; False where that must wait. A line that is wrong is done with at once."""
        record: dict[str, Any] = {"line": line.number + 1}
        try:
            if len(line.text) > self._limits.body_bytes:
                raise ApiError(413, f"The line is longer than {self._limits.body_bytes} characters.")
            record["request"] = parse_json(line.text)
            body = parse_images(record["request"], self._limits)
            if body.stream or body.response_format == "png":
                raise ApiError(400, "A batch has neither stream nor response_format png.")
            self._submit(line, body, record)
        except QueueFullError:
            return False
        except (ApiError, ValueError) as error:
            problem = error if isinstance(error, ApiError) else failure(error)
            if problem.code in _PAUSES:
                raise _PauseError(problem.message) from None
            if problem.status == 503:  # loading, or shutting down
                return False
            self._batch.add(line, Result({**record, "status": problem.status, **problem.content}, []))
        except RuntimeError:  # the engine has stopped, or does with the server
            return False
        return True

    def _submit(self, line: Line, body: ImageBody, record: dict[str, Any]) -> None:
        name = self._models.names[0] if body.model is None else body.model
        model = self._models.acquire(name)
        try:
            request = self._request(line, body, model)
            job = model.runner.submit(request, lambda event: self._events.put((line, event)))
        except BaseException:
            self._models.release(model)
            raise
        record |= {"status": 200, "model": name, "label": job.request.label, "seed": request.seed}
        self._working[job] = _Work(line, model, job, record)

    def _request(self, line: Line, body: ImageBody, model: Loaded) -> ImageRequest:
        """The request of a line; its seed is the same after a restart."""
        if body.seed is None:
            digest = hashlib.sha256(f"{self._batch.id}/{line.number}".encode()).digest()
            body.seed = int.from_bytes(digest[:4], "big") // 2
        return replace(body.to_request(self._limits, model, None), priority=_PRIORITY)

    def _hear(self, line: Line, event: Event, count: Counter | None) -> None:
        """Take what the engine says of a line."""
        work = next((one for one in self._working.values() if one.line is line), None)
        if work is None:
            return
        if event.kind == "image" and event.image is not None:
            work.images[event.index] = png_bytes(event.image)
        elif event.kind == "done":
            if count is not None:
                count(work.record["model"], len(work.images))
            self._leave(work, work.record, [work.images[index] for index in sorted(work.images)])
        elif event.kind == "failed":
            if work.model.runner.error is not None:
                raise _PauseError("The engine has stopped; the server must be restarted.")
            if not self._is_stopping():  # else it is drawn again at the next start
                problem = failure(event.error)
                self._leave(work, {**work.record, "status": problem.status, **problem.content}, [])

    def _leave(self, work: _Work, record: dict[str, Any], images: list[bytes]) -> None:
        del self._working[work.job]
        self._models.release(work.model)
        self._batch.add(work.line, Result(record, images))
