"""Serving on a cluster: Ray Serve's replicas hold the engine; an ingress with the HTTP interface sends them requests.

    serve run dit_hub.serving.ray_app:app model=dit-toy-shapes no_auth=true

A request whose replica is lost is drawn again by another one. Its seed was chosen before the first try, so that the
images are those that the lost replica would have drawn.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..extras import require
from .app import create_app
from .limits import Limits
from .logs import log, log_as_json
from .models import Loaded, Models, free_memory, named_sources, weight_bytes
from .requests import Event, ImageRequest, Job, Listener, QueueFullError
from .runner import FairLock, Runner

ray, serve = require("ray", "ray"), require("ray.serve", "ray")

# A request whose replicas were lost so often may itself be what ends them.
_TRIES = 4

# What the replicas accepted is finished within so many seconds when they or their models have to go.
_FINISH_SECONDS = 300.0

# How Ray tells that a replica, or what it sent, is lost.
_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)


class Settings(BaseModel):
    """Arguments of `app`.

    Args:
        model: folders or ids on the Hub, separated by commas; each replica loads the first one when it starts.
        device: of the replicas, for models in PyTorch: cpu or cuda.
        dtype: float32, bfloat16 or float16; the decoder stays in float32.
        max_batch: rows of a pass of the denoiser.
        num_gpus, num_cpus: of a replica; 0.5 GPUs put two replicas on one.
        min_replicas, max_replicas: of the engine.
        requests_per_replica: at work or waiting; where there are more, replicas are added.
        models_per_replica: in memory at once; the one unused longest goes for another.
        ingresses: processes with the HTTP interface.
        request_seconds: until a request must be answered.
        no_auth: serve without a key.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch: int = Field(32, ge=2)
    num_gpus: float = Field(0, ge=0)
    num_cpus: float = Field(1, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    requests_per_replica: float = Field(16, gt=0)
    models_per_replica: int = Field(3, ge=1)
    ingresses: int = Field(1, ge=1)
    request_seconds: float = Field(300, ge=1)
    no_auth: bool = False


class Reply(NamedTuple):
    """What a replica says of a request.

    Args:
        kind: "accepted", with the request as accepted; "event"; "refused", with a sentence; "full", with a sentence and
            seconds; "gone", with a sentence: the request must be drawn elsewhere.
        value: see there.
    """

    kind: Literal["accepted", "event", "refused", "full", "gone"]
    value: Any


# --- Replicas --------------------------------------------------------------------------------------------------------


class _Resident:
    """A model on a replica. Serve calls `__del__` when another model takes its place."""

    def __init__(self, pipeline: Any, runner: Runner):
        self.pipeline, self.runner = pipeline, runner

    def __del__(self) -> None:
        self.runner.close(_FINISH_SECONDS)


@serve.deployment
class Replica:
    """An engine for each of its models, on one device.

    Args:
        sources: folders or ids on the Hub, by name.
        settings: of the application.
    """

    async def __init__(self, sources: dict[str, str], settings: Settings):  # pyright: ignore[reportGeneralTypeIssues]
        self._sources, self._settings = sources, settings
        self._device_lock = FairLock()
        self._runners = WeakValueDictionary[str, Runner]()  # the models themselves are Serve's to hold and let go

        async def resident(name: str) -> _Resident:
            return await asyncio.to_thread(self._load, name)

        self._resident = serve.multiplexed(max_num_models_per_replica=settings.models_per_replica)(resident)
        await self._resident(next(iter(sources)))  # Serve prefers replicas that have a model, and all should share it

    def _load(self, name: str) -> _Resident:
        import torch

        from ..pipeline_dit import DiTPipeline

        free_memory()  # of the model that has just gone
        settings = self._settings
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        pipeline: Any = DiTPipeline.from_pretrained(self._sources[name], dtype=getattr(torch, settings.dtype))
        if settings.device != "cpu":
            pipeline.to(settings.device)
        self._runners[name] = runner = Runner(pipeline, self._device_lock, max_batch=settings.max_batch)
        return _Resident(pipeline, runner)

    async def describe(self) -> dict[str, Any]:
        """What an ingress must know of a model; it is loaded for that."""
        pipeline = (await self._resident(serve.get_multiplexed_model_id())).pipeline
        return {
            "config": pipeline.transformer.config,
            "scheduler": pipeline.scheduler,
            "vae_scale_factor": pipeline.vae_scale_factor,
            "id2label": pipeline.id2label,
            "memory": weight_bytes(pipeline),
        }

    async def draw(self, request: ImageRequest) -> AsyncIterator[Reply]:
        """Draw a request: it as accepted, then its events."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        runner = (await self._resident(serve.get_multiplexed_model_id())).runner
        submitting = asyncio.ensure_future(asyncio.to_thread(runner.submit, request, listen))
        try:
            job = await asyncio.shield(submitting)
        except asyncio.CancelledError:  # whoever asked has left meanwhile
            submitting.add_done_callback(lambda done: done.exception() or runner.cancel(done.result()))
            raise
        except QueueFullError as error:
            yield Reply("full", (str(error), error.retry_after))
            return
        except ValueError as error:
            yield Reply("refused", str(error))
            return
        except RuntimeError as error:  # the engine has stopped, or its model is going
            yield Reply("gone", str(error))
            return
        try:
            yield Reply("accepted", job.request)
            while True:
                event = await events.get()
                if event.kind == "failed" and runner.error is not None:
                    yield Reply("gone", str(event.error))
                    return
                yield Reply("event", event)
                if event.kind in _ENDS:
                    return
        finally:
            if not job.is_over:  # whoever asked has left
                runner.cancel(job)

    def check_health(self) -> None:
        """Raise where an engine has stopped; Serve then starts another replica in place of this one."""
        for name, runner in list(self._runners.items()):
            if runner.error is not None:
                raise RuntimeError(f"The engine of {name} has stopped: {runner.error}")


# --- The ingress -----------------------------------------------------------------------------------------------------


class RemoteRunner:
    """A `Runner` whose requests are drawn by whichever replica Serve chooses, and by another one if it is lost.

    Args:
        replicas: a handle that streams, for one model.
        loop: an event loop that runs on a thread of its own.
    """

    error = None  # replicas that fail are replaced

    def __init__(self, replicas: Any, loop: asyncio.AbstractEventLoop):
        self._replicas, self._loop = replicas, loop
        self._tasks: dict[Job, Future[None]] = {}
        self.running = self.waiting = 0  # requests on a replica, and on their way to one

    @property
    def engine(self) -> Any:
        """What has `waiting` and `running`."""
        return self

    async def submit_async(self, request: ImageRequest, listener: Listener | None = None) -> Job:
        """As `Runner.submit`, on any event loop; returns when a replica has accepted the request."""
        job, accepted = Job(request, listener), Future[ImageRequest]()
        task = asyncio.run_coroutine_threadsafe(self._draw(job, accepted), self._loop)
        self._tasks[job] = task
        task.add_done_callback(lambda _: self._tasks.pop(job, None))
        answer = asyncio.wrap_future(accepted)
        try:
            taken = await asyncio.shield(answer)
        except asyncio.CancelledError:  # whoever asked has left
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            self.cancel(job)
            raise
        job.request = replace(taken, deadline=request.deadline)
        return job

    def cancel(self, job: Job) -> None:
        """As `Runner.cancel`."""
        if (task := self._tasks.get(job)) is not None:
            task.cancel()

    def close(self, finish_within: float = 0.0) -> None:
        """As `Runner.close`; the replicas stay."""
        until = time.monotonic() + finish_within
        while self._tasks and time.monotonic() < until:
            time.sleep(0.01)
        for task in list(self._tasks.values()):
            task.cancel()

    async def _draw(self, job: Job, accepted: "Future[ImageRequest]") -> None:
        self.waiting += 1
        try:
            error = await self._try(job, accepted)
            if not accepted.done():
                accepted.set_exception(error or RuntimeError("The replica said nothing."))
            elif error is not None:
                _tell(job, Event("failed", error=error))
        except asyncio.CancelledError:
            if not accepted.done():
                accepted.set_exception(RuntimeError("The server is shutting down."))
            _tell(job, Event("cancelled"))
        except Exception as error:  # of Ray's own; the request must end all the same
            log("replica failed", logging.ERROR, error)
            failed = RuntimeError("No replica could draw the image; the server's log says why.")
            if accepted.done():
                _tell(job, Event("failed", error=failed))
            else:
                accepted.set_exception(failed)
        finally:
            if accepted.done() and accepted.exception() is None:
                self.running -= 1
            else:
                self.waiting -= 1

    async def _try(self, job: Job, accepted: "Future[ImageRequest]") -> Exception | None:
        """Draw on one replica after the other; the error that ends it, None where a replica ended it."""
        begun, drawn, reason = time.monotonic(), set[int](), ""
        limit = math.inf if job.request.deadline is None else job.request.deadline
        for attempt in range(_TRIES):
            left = limit - (time.monotonic() - begun)
            if left <= 0:
                return TimeoutError("The images were not drawn in time.")
            request = replace(job.request, deadline=None if math.isinf(left) else left)
            stream = self._replicas.draw.remote(request)
            try:
                async for kind, value in stream:
                    if kind == "refused":
                        return ValueError(value)
                    if kind == "full":
                        return QueueFullError(*value)
                    if kind == "gone":
                        reason = value
                        break
                    if kind == "accepted" and not accepted.done():
                        self.waiting, self.running = self.waiting - 1, self.running + 1
                        accepted.set_result(value)
                    if kind == "event" and (value.index not in drawn or value.kind in _ENDS):
                        drawn |= {value.index} if value.kind == "image" else set()
                        _tell(job, value)
                    if job.is_over:
                        return None
            except ray.serve.exceptions.BackPressureError:
                return QueueFullError("Too many images wait; try again.", 5.0)
            except _LOSSES as error:
                reason = str(error).splitlines()[0]
            finally:
                if not job.is_over:
                    stream.cancel()
            log("replica lost", logging.WARNING, attempt=attempt + 1, reason=reason)
            await asyncio.sleep(0.1 * 2**attempt)
        return RuntimeError(f"{_TRIES} replicas were lost while they drew this request.")


_ENDS = ("done", "failed", "cancelled")


def _tell(job: Job, event: Event) -> None:
    """Note an event in the job, and pass it on."""
    job.state = event.kind if event.kind in _ENDS else "running"
    job.error = event.error
    if job.listener is not None:
        job.listener(event)


class RemoteModels(Models):
    """The models of an ingress, which the replicas load.

    Args:
        sources: as for `Models`.
        replicas: the handle of the replicas.
        seconds: until a replica must have loaded a model.
    """

    def __init__(self, sources: dict[str, str], replicas: Any, seconds: float):
        super().__init__(sources, load=self._describe)
        self._replicas, self._seconds = replicas, seconds
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True).start()

    def _describe(self, name: str) -> Any:
        answer = self._replicas.options(multiplexed_model_id=name).describe.remote()
        return answer.result(timeout_s=self._seconds)

    def _open(self, entry: Any) -> Loaded:
        facts = self._describe(entry.name)
        pipeline = SimpleNamespace(transformer=SimpleNamespace(config=facts.pop("config")), **facts)
        replicas = self._replicas.options(multiplexed_model_id=entry.name, stream=True)
        runner: Any = RemoteRunner(replicas, self._loop)
        return Loaded(pipeline, runner, facts["memory"])


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP interface of `dit-hub serve`, in front of replicas.

    Args:
        sources: folders or ids on the Hub, by name.
        replicas: the handle of the replicas.
        settings: of the application.

    Raises:
        ValueError: this process has no key, and the settings do not say that there is none.
    """

    def __init__(self, sources: dict[str, str], replicas: Any, settings: Settings):
        log_as_json()
        self._key = _key(settings)
        self._models = RemoteModels(sources, replicas, settings.request_seconds)
        self._limits = Limits(seconds=settings.request_seconds)

    def __serve_build_asgi_app__(self) -> Any:
        self._models.start()
        return create_app(self._models, self._limits, self._key)


def _key(settings: Settings) -> str | None:
    """The key that requests must carry."""
    key = os.environ.get("DIT_HUB_API_KEY") or None
    if key is None and not settings.no_auth:
        raise ValueError("Anyone who reaches this service could use it: give it a key with DIT_HUB_API_KEY in the "
                         "environment of Ray's processes, or pass no_auth=true.")  # fmt: skip
    return key


def app(args: dict[str, Any]) -> Any:
    """The application, for `serve run` and Serve's configuration files.

    Args:
        args: fields of `Settings`; only `model` is needed. The key that requests must carry is DIT_HUB_API_KEY of the
            environment, both here and where the ingress runs.

    Raises:
        ValueError: an unknown field or a wrong value, or neither a key nor `no_auth`.
    """
    try:
        settings = Settings.model_validate(args)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        known = ", ".join(Settings.model_fields)
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}; known: {known}.") from None
    _key(settings)  # rather here than only in the log of the ingress
    sources = named_sources([each.strip() for each in settings.model.split(",") if each.strip()])
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    scaling = {
        "min_replicas": settings.min_replicas,
        "max_replicas": max(settings.min_replicas, settings.max_replicas),
        "target_ongoing_requests": settings.requests_per_replica,
    }
    replicas = Replica.options(
        ray_actor_options=resources, autoscaling_config=scaling, graceful_shutdown_timeout_s=_FINISH_SECONDS,
        max_ongoing_requests=max(8, math.ceil(4 * settings.requests_per_replica)), max_queued_requests=1024,
    ).bind(sources, settings)  # fmt: skip
    ingress = Ingress.options(num_replicas=settings.ingresses, max_ongoing_requests=2048,
                              graceful_shutdown_timeout_s=_FINISH_SECONDS)  # fmt: skip
    return ingress.bind(sources, replicas, settings)
