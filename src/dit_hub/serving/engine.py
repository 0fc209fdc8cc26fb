"""The engine: requests of any steps, scales and solvers share passes of one denoiser, from step to step."""

import bisect
import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import whole_number
from .decoding import Decoding, Problem, next_batch
from .pace import Pace
from .passes import Passes, Row, batch_sizes_of
from .plans import Plan, Planner
from .requests import Event, ImageRequest, Job, Listener, Observer, Pass, QueueFullError

# Memory of all images in flight, decoded or not. One of 256x256 takes 33 kB in the latents of Stable Diffusion.
STATE_BYTES = 512 * 2**20

# Previews that may wait for the decoder; the oldest go, since newer ones say more.
_MOST_PREVIEWS = 64

# How long a request waits for smaller ones, in multiples of the time of its own rows. In a simulation of a processor at
# 70 % load, with requests of 10 to 100 steps, 4 gives the shortest 99th percentile: 14 % below that of first come,
# first served, and a mean 26 % below.
_PATIENCE = 4.0

# After so many passes in a row in which every row fails, the runtime is taken for broken.
_MOST_FAILURES = 8

_log = logging.getLogger(__name__)


class Engine:
    """In-flight batching of one pipeline, driven by `step` and `decode`.

    Each image is a row with its own timestep, class, guidance, solver and noise, so that each equals its solo run, up
    to the rounding of another batch size. Images are served in the order in which they are due: when they came, plus a
    time in proportion to the work asked for. So small requests overtake large ones, but none that has waited for long.

    `step` is for one thread, and `decode` for the same or one other; the other methods are for any.

    Args:
        pipeline: a `DiTPipeline` of any runtime, whose component is a denoiser and not a whole sampler.
        max_batch: the most rows of a pass, of the model's own size: a guided image takes two, and one of twice the
            height and width four times as many. Passes have fewer where more would only make each image wait for the
            others.
        max_waiting: images that may wait; a request above that is refused with `QueueFullError`.
        batch_sizes: numbers of rows that the runtime should see, where it should see few; a pass is filled up to the
            next. None leaves it to the runtime.
        observer: called after each pass.
        clock: seconds, for deadlines.

    Raises:
        ValueError: a pipeline that cannot be driven step by step.
    """

    def __init__(
        self,
        pipeline: Any,
        max_batch: int = 32,
        max_waiting: int = 1024,
        batch_sizes: Sequence[int] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        transformer = pipeline.transformer
        _check_steps(pipeline)
        self.max_batch = whole_number("max_batch", max_batch, 1)
        if batch_sizes is None:
            batch_sizes = batch_sizes_of(transformer, max_batch)
        sizes = sorted(whole_number("batch_sizes", size, 1) for size in batch_sizes)
        if sizes:
            self.max_batch = min(self.max_batch, sizes[-1])
        self.max_waiting = whole_number("max_waiting", max_waiting, 1)
        self.pipeline, self._observer, self._clock = pipeline, observer, clock
        self._device = pipeline._execution_device
        for component in (transformer, pipeline.vae):
            if isinstance(component, torch.nn.Module):
                component.eval()
        self._plan = Planner(pipeline)
        self._passes = Passes(transformer, self._device, sizes)
        self._decoder = Decoding(pipeline, self._device)
        self._lock = threading.RLock()
        self._waiting: list[tuple[tuple[float, int, int], Row]] = []  # a heap
        self._running: list[Row] = []  # by their order
        self._undecoded: deque[tuple[Row, Tensor]] = deque()
        self._previews: deque[tuple[Row, tuple[int, Tensor]]] = deque(maxlen=_MOST_PREVIEWS)
        self._deadlines: list[tuple[float, int, Job]] = []  # a heap
        self._left: dict[Job, int] = {}  # images that are not decoded
        self._state_bytes = self._decoding = self._failures = 0
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """Images that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Images that have begun and are not decoded yet."""
        with self._lock:
            return len(self._running) + len(self._undecoded) + self._decoding

    @property
    def is_idle(self) -> bool:
        """Whether all requests are over."""
        return not self._left

    # --- Requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: ImageRequest, listener: Listener | None = None) -> Job:
        """Accept a request.

        Args:
            request: of images.
            listener: called with each `Event`, on the threads that call `step`, `decode` and `cancel`.

        Raises:
            ValueError: what the model or the solver cannot serve.
            QueueFullError: too many images wait.
        """
        plan = self._plan(request)
        self._check_fits(plan)
        with self._lock:
            count = plan.request.n
            if len(self._waiting) + count > self.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} images wait, and {count} more are too many; try again later.",
                    retry_after=self._seconds_of_queue(),
                )
            job = Job(plan.request, listener, images=[None] * count)
            now = self._clock()
            due = now + _PATIENCE * plan.evaluations * self._pace.seconds_per_row / 2.0**plan.request.priority
            if plan.request.deadline is not None:
                ends = now + plan.request.deadline
                due = min(due, ends)
                heapq.heappush(self._deadlines, (ends, job.number, job))
            self._left[job] = count
            for index in range(count):
                row = Row(job, index, plan, due)
                heapq.heappush(self._waiting, (row.order, row))
        return job

    def cancel(self, job: Job) -> None:
        """Drop what is left of a job, at once; nothing where it is over."""
        self._end(job, "cancelled")

    def fail_all(self, error: Exception) -> None:
        """End every job with an error, as where nobody will step any more."""
        with self._lock:
            jobs = list(self._left)
        for job in jobs:
            self._end(job, "failed", error)

    def _check_fits(self, plan: Plan) -> None:
        if plan.request.n > self.max_waiting:
            raise ValueError(f"n must be at most {self.max_waiting}, the images that may wait, not {plan.request.n}.")
        rows = plan.weight * (2 if any(plan.guided) else 1)
        if rows > self.max_batch:
            raise ValueError(f"This image takes {rows} rows of a pass, by its size and guidance, and passes have "
                             f"{self.max_batch} here; ask for a smaller one, or for guidance_scale 1.")  # fmt: skip
        if plan.state_bytes > STATE_BYTES:
            raise ValueError("This image takes more memory than the engine has, by its size and the estimates that its "
                             "solver remembers; ask for a smaller one.")  # fmt: skip

    def _seconds_of_queue(self) -> float:
        rows = [row for _, row in self._waiting]
        return max(1.0, self._pace.seconds_per_row * sum(row.plan.evaluations for row in rows))

    def _end(self, job: Job, state: Any, error: Exception | None = None) -> None:
        """Take a job out, and tell its listener."""
        with self._lock:
            if job.is_over:
                return
            job.state, job.error = state, error
            del self._left[job]
            if any(row.job is job for _, row in self._waiting):
                self._waiting = [entry for entry in self._waiting if entry[1].job is not job]
                heapq.heapify(self._waiting)
            gone = [row for row in self._running if row.job is job]
            self._running = [row for row in self._running if row.job is not job]
            gone += [row for row, _ in self._undecoded if row.job is job]
            self._undecoded = deque(entry for entry in self._undecoded if entry[0].job is not job)
            self._state_bytes -= sum(row.plan.state_bytes for row in gone)
            if len(self._deadlines) > 2 * len(self._left) + 16:  # most are of jobs that are over
                self._deadlines = [entry for entry in self._deadlines if not entry[2].is_over]
                heapq.heapify(self._deadlines)
            self._tell(job, Event(state, error=error))

    def _tell(self, job: Job, event: Event) -> None:
        if job.listener is not None:
            try:
                job.listener(event)
            except Exception:
                _log.exception("A listener failed; its request goes on.")

    # --- Passes ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One pass of the denoiser; False where no image waits for one.

        Raises:
            RuntimeError: pass after pass failed for every image.
        """
        with self._lock:
            self._expire()
            rows = self._pick()
        if not rows:
            return False
        began, cost, count = time.perf_counter(), sum(row.cost for row in rows), sum(1 + row.is_guided for row in rows)
        self._failures = 0 if self._take(rows) else self._failures + 1
        seconds = time.perf_counter() - began
        self._pace.note(cost, seconds)
        with self._lock:
            self._leave(rows)
        if self._observer is not None:
            self._observer(Pass(count, len(rows), seconds))
        if self._failures >= _MOST_FAILURES:
            raise RuntimeError(f"{self._failures} passes in a row failed; the log says how.")
        return True

    def run(self) -> None:
        """Step and decode until nothing is left."""
        while self.step() | self.decode():
            pass

    def _expire(self) -> None:
        while self._deadlines and (self._deadlines[0][2].is_over or self._deadlines[0][0] <= self._clock()):
            _, _, job = heapq.heappop(self._deadlines)
            self._end(job, "failed", TimeoutError(f"The images were not ready within {job.request.deadline:g} s."))

    def _pick(self) -> list[Row]:
        """The rows of the next pass, of one shape, the guided ones first."""
        picked: list[Row] = []
        cost, position, most = 0, 0, min(self.max_batch, max(2, self._pace.useful_rows))
        while True:
            running = self._running[position] if position < len(self._running) else None
            row = self._next_waiting(picked, running) or running
            if row is None:
                break
            position += 1
            if picked and row.plan.shape != picked[0].plan.shape:
                continue
            cost += row.cost
            if picked and cost > most:
                break
            picked.append(row)
            if cost >= most:
                break
        return sorted(picked, key=lambda row: not row.is_guided)

    def _next_waiting(self, picked: list[Row], running: Row | None) -> Row | None:
        """The first row that waits, now running, where it comes before the running one and may begin."""
        if not self._waiting:
            return None
        order, row = self._waiting[0]
        if running is not None and running.order < order:
            return None
        if picked and row.plan.shape != picked[0].plan.shape:
            return None
        if self._state_bytes + row.plan.state_bytes > STATE_BYTES:
            return None
        heapq.heappop(self._waiting)
        row.job.state = "running"
        self._state_bytes += row.plan.state_bytes
        bisect.insort(self._running, row, key=lambda row: row.order)
        return row

    def _take(self, rows: list[Row]) -> bool:
        """The next step of rows. Where that fails, of each half of them, so that only those fail that cause it.

        Returns:
            Whether a row went on, or only requests were to blame.
        """
        rows = [row for row in rows if not row.job.is_over]
        if not rows:
            return False
        problem = self._attempt(rows)
        if problem is None:
            return True
        if problem.of_memory:
            torch.cuda.empty_cache()
        if len(rows) > 1:
            if problem.of_memory:
                self.max_batch = min(self.max_batch, max(2, sum(row.cost for row in rows) // 2))
                _log.warning("%d images do not fit into a pass; from now on %d rows.", len(rows), self.max_batch)
            half = len(rows) // 2
            first = self._take(rows[:half])
            return self._take(rows[half:]) or first
        self._end(rows[0].job, "failed", RuntimeError(f"The model failed: {problem.text}"))
        return problem.of_memory or problem.of_request

    def _attempt(self, rows: list[Row]) -> Problem | None:
        try:
            self._passes(rows)
        except Exception as error:
            if len(rows) == 1:
                _log.exception("A pass failed.")
            return Problem.of(error)
        return None

    def _leave(self, rows: list[Row]) -> None:
        """Hand finished rows, and previews, to the decoder."""
        rows = [row for row in rows if not row.job.is_over]
        for row in rows:
            if row.preview is not None:
                self._previews.append((row, (row.step, row.preview)))
                row.preview = None
        finished = [row for row in rows if row.is_finished]
        if finished:
            self._running = [row for row in self._running if not row.is_finished]
            self._undecoded.extend((row, row.sample) for row in finished)

    # --- Decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self) -> bool:
        """Decode the images that are ready, a batch at a time, or else previews; False where there are neither."""
        with self._lock:
            batch = next_batch(self._undecoded)
            previews = [] if batch else next_batch(self._previews)
            self._decoding = len(batch)
        if previews:
            self._show(previews)
        try:
            self._finish(batch)
        finally:
            with self._lock:
                self._decoding = 0
                self._state_bytes -= sum(row.plan.state_bytes for row, _ in batch)
        return bool(batch or previews)

    def _finish(self, batch: list[tuple[Row, Tensor]]) -> None:
        """Decode rows. Where that fails, each half of them, so that only those fail that cause it."""
        if not batch:
            return
        problem = self._attempt_to_decode(batch)
        if problem is None:
            return
        if problem.of_memory:
            torch.cuda.empty_cache()
        if len(batch) > 1:
            self._finish(batch[: len(batch) // 2])
            self._finish(batch[len(batch) // 2 :])
        else:
            self._end(batch[0][0].job, "failed", RuntimeError(f"The decoder failed: {problem.text}"))

    def _attempt_to_decode(self, batch: list[tuple[Row, Tensor]]) -> Problem | None:
        try:
            outputs = self._decoder.outputs([row for row, _ in batch], [sample for _, sample in batch])
        except Exception as error:
            if len(batch) == 1:
                _log.exception("Decoding failed.")
            return Problem.of(error)
        for (row, _), output in zip(batch, outputs, strict=True):
            if output is None:
                text = "The image came out as numbers that are not finite; are the model's weights sound?"
                self._end(row.job, "failed", RuntimeError(text))
            else:
                self._hand_over(row, output)
        return None

    def _hand_over(self, row: Row, image: np.ndarray) -> None:
        job = row.job
        with self._lock:
            if job.is_over:
                return
            job.images[row.index] = image
            self._left[job] -= 1
            is_last = not self._left[job]
            self._tell(job, Event("image", row.index, row.step, image))
        if is_last:
            self._end(job, "done")

    def _show(self, previews: list[tuple[Row, Any]]) -> None:
        shown = [(row, state) for row, state in previews if not row.job.is_over]
        try:
            images = self._decoder.previews([row for row, _ in shown], [estimate for _, (_, estimate) in shown])
        except Exception:
            _log.exception("Previews could not be decoded.")
            return
        for (row, (step, _)), image in zip(shown, images, strict=True):
            with self._lock:
                if not row.job.is_over:
                    self._tell(row.job, Event("preview", row.index, step, image))


def _check_steps(pipeline: Any) -> None:
    """Raise ValueError for what cannot be driven step by step."""
    transformer = pipeline.transformer
    if hasattr(transformer, "sample"):
        raise ValueError("This export is a whole sampler, whose requests cannot share passes; serve one of the "
                         "denoiser, which `dit-hub export` makes by default.")  # fmt: skip
    if getattr(transformer, "_cache_config", None) is not None or getattr(transformer, "_is_cached", False):
        raise ValueError("A cache takes all rows of a pass to be at the same step, which those of several requests are "
                         "not; serve the model without it.")  # fmt: skip
    if getattr(pipeline, "_all_hooks", None):
        raise ValueError("Model offloading moves the denoiser away whenever something is decoded, which is beside its "
                         "passes here; serve the model without it.")  # fmt: skip
