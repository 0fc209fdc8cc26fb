"""Several models on one device, in bounded memory, loaded and let go by use."""

import gc
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import shown
from ..configuration_dit import nearest
from ..schedulers import default_steps, switch_scheduler
from ..sources import local_folder
from .limits import ApiError, retry_later
from .logs import log
from .requests import Pass
from .runner import FairLock, Runner

# A model that could not be loaded is tried again on a request after so many seconds.
_RETRY_SECONDS = 10.0

# Advice to clients of a model that is being loaded.
_LOADING_SECONDS = 5.0


@dataclass(eq=False)
class Loaded:
    """A model that is ready.

    Args:
        pipeline: it.
        runner: the engine of it.
        memory: bytes of its weights.
        users: requests that hold it.
        used: when it was asked for last.
    """

    pipeline: Any
    runner: Runner
    memory: int
    users: int = 0
    used: float = 0.0

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return self.pipeline.id2label

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        factor, (height, width) = self.pipeline.vae_scale_factor, self.pipeline.transformer.config.sample_height_width
        return height * factor, width * factor

    def usual_steps(self, scheduler: str | None = None) -> int:
        """Steps of an image that names none; `scheduler` is a name of `switch_scheduler`."""
        own = self.pipeline.scheduler
        return default_steps(own if scheduler is None else switch_scheduler(own, scheduler))

    def facts(self) -> dict[str, Any]:
        """What GET /v1/models says of it."""
        config, (height, width) = self.pipeline.transformer.config, self.size
        return {
            "num_classes": config.num_classes,
            "classes": {str(index): name for index, name in self.id2label.items()},
            "sizes": [f"{width}x{height}"],
            "any_size": config.pos_embed != "learned",
            "size_multiple": self.pipeline.vae_scale_factor * config.patch_size,
            "default_steps": self.usual_steps(),
            "memory_bytes": self.memory,
        }


@dataclass(eq=False)
class _Entry:
    name: str
    source: str
    state: Literal["not loaded", "loading", "loaded", "failed"] = "not loaded"
    loaded: Loaded | None = None
    leaving: bool = False
    failed_at: float = 0.0

    @property
    def may_retry(self) -> bool:
        return time.monotonic() - self.failed_at >= _RETRY_SECONDS


def named_sources(sources: Sequence[str]) -> dict[str, str]:
    """Names of models: the last part of a folder, or the id on the Hub.

    Raises:
        ValueError: there is no such model, or two have the same name.
    """
    named: dict[str, str] = {}
    for source in sources:
        folder = local_folder(source)
        name = source if folder is None else Path(os.path.realpath(folder)).name
        if name in named:
            raise ValueError(f"{named[name]} and {source} are both named {name}; rename one of the folders.")
        named[name] = source
    return named


class Models:
    """The models of a server. All methods may be called from any thread.

    Args:
        sources: folders or ids on the Hub, by name; the first one is loaded at `start`, the others at first use.
        load: makes the pipeline of a source.
        memory_limit: bytes of weights at once; the model unused longest is let go when another needs room, once no
            request is at work on it. None for no limit.
        observer: called with a model's name after each pass.
        options: of `Runner`.

    `was_ready` says whether a model was loaded since the start: one that goes to make room will come back.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Callable[[str], Any],
        memory_limit: int | None = None,
        observer: Callable[[str, Pass], None] | None = None,
        **options: Any,
    ):
        self._entries = {name: _Entry(name, source) for name, source in sources.items()}
        self._load, self._limit, self._options = load, memory_limit, options
        self.observer = observer
        self._device_lock, self._changed = FairLock(), threading.Condition()
        self._orders: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._closed = False
        self.was_ready = False
        self._loader: threading.Thread | None = None
        self._give_up: Callable[[ValueError], object] | None = None

    @property
    def names(self) -> list[str]:
        """Of all models, the first one first."""
        return list(self._entries)

    @property
    def memory(self) -> int:
        """Bytes of the weights that are loaded."""
        return sum(one.memory for one in self.loaded().values())

    @property
    def is_loading(self) -> bool:
        """Whether a model is being loaded."""
        return any(entry.state == "loading" for entry in self._entries.values())

    def start(self, give_up: Callable[[ValueError], object] | None = None) -> None:
        """Begin to load the first model; `give_up` is called where that is none, so that trying again is of no use."""
        self._give_up = give_up
        self._loader = threading.Thread(target=self._work, name="loading", daemon=True)
        self._loader.start()
        self._order(next(iter(self._entries.values())))

    def loaded(self) -> dict[str, Loaded]:
        """The models that are ready, by name."""
        with self._changed:
            return {name: entry.loaded for name, entry in self._entries.items() if entry.loaded is not None}

    def states(self) -> dict[str, str]:
        """"not loaded", "loading", "loaded" or "failed" by name."""  # fmt: skip
        return {name: entry.state for name, entry in self._entries.items()}

    def failures(self) -> dict[str, Exception]:
        """Why engines stopped, by name."""
        return {name: one.runner.error for name, one in self.loaded().items() if one.runner.error is not None}

    def acquire(self, name: str) -> Loaded:
        """A model that stays until it is released.

        Raises:
            ApiError: there is no such model (404); it is being loaded, which this call has begun, or could not be
                loaded, or its engine has stopped (503).
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                message = f"There is no model {shown(name)} here; the nearest: {nearest(name, self.names)}."
                raise ApiError(404, message, "model", "model_not_found")
            if self._closed:
                raise retry_later(503, "The server is shutting down; try again.", 1, "shutting_down")
            if entry.loaded is not None and not entry.leaving:
                if entry.loaded.runner.error is not None:
                    raise ApiError(503, f"The engine of {name} has stopped; the server must be restarted.",
                                   code="engine_stopped")  # fmt: skip
                entry.loaded.users += 1
                entry.loaded.used = time.monotonic()
                return entry.loaded
            if entry.state == "failed" and not entry.may_retry:
                message = f"The model {name} could not be loaded; the server's log says why."
                raise retry_later(503, message, _RETRY_SECONDS, "model_failed")
        self._order(entry)
        raise retry_later(503, f"The model {name} is being loaded; try again.", _LOADING_SECONDS, "model_loading")

    def retry(self, name: str) -> None:
        """Begin to load a model that could not be loaded a while ago; others stay as they are."""
        if self._entries[name].state == "failed" and self._entries[name].may_retry:
            self._order(self._entries[name])

    def release(self, loaded: Loaded) -> None:
        """Give a model back."""
        with self._changed:
            loaded.users -= 1
            self._changed.notify_all()

    @contextmanager
    def lease(self, name: str) -> Iterator[Loaded]:
        """A model for as long as the block runs; see `acquire`."""
        loaded = self.acquire(name)
        try:
            yield loaded
        finally:
            self.release(loaded)

    def close(self, finish_within: float = 0.0) -> None:
        """Take no more requests and end all engines; what is not finished within so many seconds fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._orders.put(None)
        for one in self.loaded().values():
            one.runner.close(finish_within)

    # --- Loading, on a thread of its own -----------------------------------------------------------------------------

    def _order(self, entry: _Entry) -> None:
        with self._changed:
            if entry.state in ("not loaded", "failed"):
                entry.state = "loading"
                self._orders.put(entry)

    def _work(self) -> None:
        while (entry := self._orders.get()) is not None:
            self._fill(entry)

    def _fill(self, entry: _Entry) -> None:
        """Load a model. No name of this thread's may hold it afterwards: it must be gone before the next is loaded."""
        begun = time.monotonic()
        try:
            loaded = self._open(entry)
        except Exception as error:  # whatever a damaged folder causes
            entry.failed_at = time.monotonic()
            entry.state = "failed"
            reason = " ".join(str(error).split())
            if isinstance(error, ValueError) and self._give_up is not None and not self.was_ready:
                self._give_up(error)
            else:
                log("model failed", logging.ERROR, model=entry.name, reason=f"{type(error).__name__}: {reason}")
            return
        with self._changed:
            loaded.used = time.monotonic()
            entry.loaded, entry.state, closed = loaded, "loaded", self._closed
            self.was_ready = True
        if closed:
            loaded.runner.close()
        seconds = round(time.monotonic() - begun, 1)
        log("model loaded", model=entry.name, memory_bytes=loaded.memory, seconds=seconds)

    def _open(self, entry: _Entry) -> Loaded:
        self._make_room(entry.name, _file_bytes(entry.source))
        pipeline = self._load(entry.source)
        memory = weight_bytes(pipeline) or _file_bytes(entry.source)
        self._make_room(entry.name, memory)  # for a model of the Hub, whose size was not known before
        runner = Runner(pipeline, device_lock=self._device_lock, observer=partial(self._observe, entry.name),
                        **self._options)  # fmt: skip
        return Loaded(pipeline, runner, memory)

    def _observe(self, name: str, done: Pass) -> None:
        if self.observer is not None:
            self.observer(name, done)

    def _make_room(self, name: str, needed: int) -> None:
        """Let models go until another one fits; one with work in flight gets no more, and goes when it is done."""
        if self._limit is None:
            return
        if needed > self._limit:
            raise ValueError(f"{name} takes {needed / 2**30:.3g} GiB, and --memory is {self._limit / 2**30:.3g}.")
        while self.memory + needed > self._limit:
            with self._changed:
                kept = [entry for entry in self._entries.values() if entry.loaded is not None]
                victim = min(kept, key=_unused_longest)
                victim.leaving = True
                while victim.loaded is not None and victim.loaded.users and not self._closed:
                    self._changed.wait(1.0)
                if self._closed:
                    raise RuntimeError("The server is shutting down.")
                going, victim.loaded = victim.loaded, None
                victim.state, victim.leaving = "not loaded", False
            if going is not None:
                going.runner.close()
                log("model let go", model=victim.name)
            del going
            free_memory()


def _unused_longest(entry: _Entry) -> tuple[bool, float]:
    loaded = entry.loaded
    return (False, 0.0) if loaded is None else (loaded.users > 0, loaded.used)


def free_memory() -> None:
    """Give back what models that are gone have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _file_bytes(source: str) -> int:
    """The size of a model's files; 0 for one on the Hub."""
    folder = local_folder(source)
    return 0 if folder is None else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weight_bytes(pipeline: Any) -> int:
    """The size of a pipeline's weights in PyTorch; 0 where a part of it is in another runtime."""
    parts = [part for part in (pipeline.transformer, pipeline.vae) if part is not None]
    if not all(isinstance(part, torch.nn.Module) for part in parts):
        return 0
    return sum(
        tensor.numel() * tensor.element_size() for part in parts for tensor in (*part.parameters(), *part.buffers())
    )
