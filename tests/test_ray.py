"""A local cluster of Ray: two replicas of the engine behind the HTTP interface, and one of them is killed."""

import asyncio
import base64
import io
import json
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dit_hub import DiTPipeline
from dit_hub.schedulers import switch_scheduler
from dit_hub.serving.requests import Event, ImageRequest, Job, QueueFullError
from dit_hub.sources import EMBEDDED_MODELS

from .together import free_port

# Read when Ray is imported. Two cores are slow to start its processes.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

TOY = "dit-toy-shapes"


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """The address of a service with two replicas and two models, and the folder of Ray's logs."""
    import ray
    from dit_hub.serving.ray_app import app
    from ray import serve

    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="ray-"))  # a short path: sockets are in it
    shutil.copytree(EMBEDDED_MODELS[TOY], folder / "other")
    port = free_port()
    try:
        ray.init(num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False,
                 _temp_dir=str(folder))  # fmt: skip
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {"model": f"{TOY},{folder / 'other'}", "min_replicas": "2", "num_cpus": "0.5", "no_auth": "true"}
        serve.run(app(settings), name="dit")
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: get(f"{url}/ready")[0] == 200)
        yield url, folder
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "It did not come to pass."
        time.sleep(0.01)


def get(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of an answer; a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def drawn(body: dict[str, Any], index: int) -> np.ndarray:
    """What the plain pipeline draws for a request."""
    pipeline: Any = DiTPipeline.from_pretrained(TOY)
    pipeline.set_progress_bar_config(disable=True)
    if body.get("scheduler"):
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, body["scheduler"])
    generator = torch.Generator().manual_seed(body["seed"] + index)
    steps = body["num_inference_steps"]
    return np.asarray(pipeline(body["prompt"], num_inference_steps=steps, generator=generator).images[0])


def assert_drawn(body: dict[str, Any], answer: str) -> None:
    for index, one in enumerate(json.loads(answer)["data"]):
        difference = decoded(one["b64_json"]).astype(int) - drawn(body, index)
        assert np.abs(difference).max() <= 1  # where rounding decides


def running(url: str) -> float:
    lines = get(f"{url}/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("dit_hub_images_running{"))


def is_replica(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] == ["ray::ServeReplica:dit:Replica"]
    except psutil.Error:  # it has ended meanwhile
        return False


def test_a_killed_replica_loses_no_accepted_request(cluster: tuple[str, Path]) -> None:
    url, folder = cluster
    bodies = [
        {"prompt": number, "seed": 100 * number, **(
            {"n": 8, "num_inference_steps": 200} if number % 2 else
            {"n": 4, "num_inference_steps": 60, "scheduler": "ddim"}
        )} for number in range(16)
    ]  # fmt: skip
    workers = [process for process in psutil.Process().children(recursive=True) if is_replica(process)]
    assert len(workers) == 2
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = [clients.submit(get, f"{url}/v1/images/generations", body) for body in bodies]
        wait_until(lambda: running(url) >= 8)
        workers[0].kill()
        found = [answer.result() for answer in answers]
    assert [status for status, _ in found] == [200] * len(bodies)
    logs = "".join(path.read_text(errors="replace") for path in folder.rglob("*Ingress*") if path.is_file())
    logs += "".join(path.read_text(errors="replace") for path in folder.rglob("worker-*.err"))
    assert "replica lost" in logs
    for number in (0, 1, 7, 14):
        assert_drawn(bodies[number], found[number][1])


def test_the_interface_is_that_of_one_machine(cluster: tuple[str, Path]) -> None:
    url, _ = cluster
    images = f"{url}/v1/images/generations"
    status, text = get(images, {"prompt": "no-circle"})
    assert (status, "no-circle" in text) == (400, True)
    status, text = get(images, {"prompt": "red-circle", "model": "absent"})
    assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")
    body = {"model": "other", "prompt": 3, "seed": 5, "num_inference_steps": 10}
    wait_until(lambda: get(images, body)[0] == 200)  # the second model is loaded when it is asked for
    assert_drawn(body, get(images, body)[1])
    status, text = get(images, body | {"stream": True, "partial_images": 2})
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    kinds = [event["type"].partition(".")[2] for event in events]
    assert (status, kinds) == (200, ["partial_image"] * 2 + ["completed"])
    assert np.abs(decoded(events[-1]["b64_json"]).astype(int) - drawn(body, 0)).max() <= 1


# --- A replica's models, without Ray's processes ---------------------------------------------------------------------


def test_a_model_that_a_replica_lets_go_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_hub.serving import ray_app

    monkeypatch.setattr(ray_app.serve, "multiplexed", lambda max_num_models_per_replica: lambda load: load)
    made: Any = ray_app.Replica.func_or_class

    async def use() -> None:
        replica = made.__new__(made)
        await replica.__init__({TOY: TOY, "other": TOY}, ray_app.Settings.model_validate({"model": TOY}))
        resident = await replica._resident(TOY)
        gone = weakref.ref(resident.pipeline.transformer)
        resident.__del__()  # as Serve does
        del resident
        other = await replica._resident("other")
        assert gone() is None
        other.runner._error = RuntimeError("CUDA error")
        with pytest.raises(RuntimeError, match="The engine of other has stopped: CUDA error"):
            replica.check_health()

    asyncio.run(use())


# --- What an ingress does with replicas' answers, without Ray's processes --------------------------------------------


class Replicas:
    """In place of Serve's handle: the replies of one replica after the other; an exception ends a replica's."""

    def __init__(self, *scripts: list[Any]):
        self.scripts, self.asked, self.draw = list(scripts), [], self

    def remote(self, request: ImageRequest) -> Any:
        self.asked.append(request)
        return Stream(self.scripts[min(len(self.asked), len(self.scripts)) - 1])


class Stream:
    def __init__(self, script: list[Any]):
        self.script, self.is_cancelled = script, False

    async def __aiter__(self) -> Any:
        for reply in self.script:
            if isinstance(reply, Exception):
                raise reply
            if reply is None:
                await asyncio.sleep(60)
            yield reply

    def cancel(self) -> None:
        self.is_cancelled = True


REQUEST = ImageRequest(label=1, n=2, seed=7, num_inference_steps=3, deadline=20.0)


def image(index: int, value: int) -> tuple[str, Event]:
    return "event", Event("image", index, image=np.full((2, 2, 3), value, np.uint8))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()


def draw(
    replicas: Replicas, loop: asyncio.AbstractEventLoop, request: ImageRequest = REQUEST
) -> tuple[Job, list[Event]]:
    """A request that is over, and its events."""
    from dit_hub.serving.ray_app import RemoteRunner

    events: list[Event] = []
    runner = RemoteRunner(replicas, loop)
    job = asyncio.run(runner.submit_async(request, events.append))
    wait_until(lambda: job.is_over, 15)
    wait_until(lambda: runner.waiting == runner.running == 0, 5)
    return job, events


def test_images_that_have_arrived_are_not_drawn_twice(loop: asyncio.AbstractEventLoop) -> None:
    from ray.exceptions import RayActorError

    accepted = ("accepted", REQUEST)
    replicas = Replicas(
        [accepted, image(0, 10), RayActorError()],
        [accepted, ("gone", "The engine has stopped.")],
        [accepted, image(0, 99), image(1, 11), ("event", Event("done"))],
    )
    job, events = draw(replicas, loop)
    assert [(event.kind, event.index) for event in events] == [("image", 0), ("image", 1), ("done", 0)]
    assert [int(event.image[0, 0, 0]) for event in events[:2] if event.image is not None] == [10, 11]
    assert job.state == "done"
    assert {request.seed for request in replicas.asked} == {7}
    deadlines = [request.deadline or 0.0 for request in replicas.asked]
    assert 20 >= deadlines[0] > deadlines[1] > deadlines[2] > 10  # what is left of it


def test_a_request_that_ends_its_replicas_fails(loop: asyncio.AbstractEventLoop) -> None:
    from ray.exceptions import RayActorError

    job, events = draw(Replicas([("accepted", REQUEST), RayActorError()]), loop)
    assert [event.kind for event in events] == ["failed"]
    assert "4 replicas were lost while they drew this request" in str(job.error)
    late = Replicas([("accepted", REQUEST), RayActorError()])
    job, _ = draw(late, loop, replace(REQUEST, deadline=0.05))
    assert (type(job.error), len(late.asked)) == (TimeoutError, 1)


def test_refusals_are_the_engines_own(loop: asyncio.AbstractEventLoop) -> None:
    from ray.serve.exceptions import BackPressureError

    with pytest.raises(ValueError, match="There is no class 99"):
        draw(Replicas([("refused", "There is no class 99.")]), loop)
    with pytest.raises(QueueFullError, match="Too many images wait") as full:
        draw(Replicas([("full", ("Too many images wait.", 3.5))]), loop)
    assert full.value.retry_after == 3.5
    with pytest.raises(QueueFullError):
        draw(Replicas([BackPressureError(1, 1)]), loop)


def test_a_cancelled_request_is_dropped_by_its_replica(loop: asyncio.AbstractEventLoop) -> None:
    from dit_hub.serving.ray_app import RemoteRunner

    streams: list[Stream] = []
    replicas = Replicas([("accepted", REQUEST), None])
    remote = replicas.remote
    replicas.remote = lambda request: streams.append(remote(request)) or streams[-1]  # pyright: ignore
    events: list[Event] = []
    runner = RemoteRunner(replicas, loop)
    job = asyncio.run(runner.submit_async(REQUEST, events.append))
    assert (runner.waiting, runner.running) == (0, 1)
    runner.cancel(job)
    wait_until(lambda: job.state == "cancelled" and streams[0].is_cancelled, 5)
    assert [event.kind for event in events] == ["cancelled"]


def test_a_model_whose_replicas_are_busy_delays_no_other(loop: asyncio.AbstractEventLoop) -> None:
    from dit_hub.serving.drawing import drawing
    from dit_hub.serving.limits import ApiError
    from dit_hub.serving.ray_app import RemoteRunner

    def model(*script: Any) -> Any:
        return SimpleNamespace(runner=RemoteRunner(Replicas(list(script)), loop))

    async def ask(model: Any, request: ImageRequest) -> list[np.ndarray]:
        async with drawing(model, request) as work:
            return await work.images()

    busy, free = model(None), model(("accepted", REQUEST), image(0, 1), image(1, 2), ("event", Event("done")))

    async def use() -> None:
        waiting = [asyncio.ensure_future(ask(busy, REQUEST)) for _ in range(20)]
        late = asyncio.ensure_future(ask(busy, replace(REQUEST, deadline=0.2)))
        images = await asyncio.wait_for(ask(free, REQUEST), 10)
        assert [int(image[0, 0, 0]) for image in images] == [1, 2]
        with pytest.raises(ApiError, match=r"The images were not ready within 0\.2 s\.") as refused:
            await late
        assert refused.value.status == 504
        wait_until(lambda: busy.runner.waiting == 20, 5)
        for one in waiting:
            one.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*waiting, return_exceptions=True)
        )

    asyncio.run(use())
    wait_until(lambda: busy.runner.waiting == 0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modle": TOY}, "model: Field required; known: model, device"),
        ({"model": TOY, "replicas": "2"}, "replicas: Extra inputs are not permitted; known: model"),
        ({"model": "absent", "no_auth": "true"}, "There is no folder and no embedded model 'absent'"),
        ({"model": TOY}, r"give it a key with DIT_HUB_API_KEY .* or pass no_auth=true\.$"),
        ({"model": TOY, "no_auth": "false"}, "give it a key with DIT_HUB_API_KEY"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_hub.serving.ray_app import app

    monkeypatch.delenv("DIT_HUB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=message):
        app(arguments)


def test_the_examples_are_of_serves_schema() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from dit_hub.serving.ray_app import Settings

    folder = Path(__file__).parents[1] / "examples" / "ray"
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    spec = service["spec"]["rayClusterConfig"]
    mounts = [
        [(one["name"], one["mountPath"]) for one in container["volumeMounts"]]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    ]
    assert mounts == [[("models", "/models")]] * 2
    for text in ((folder / "serve_config.yaml").read_text(), service["spec"]["serveConfigV2"]):
        (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
        assert application.import_path == "dit_hub.serving.ray_app:app"
        Settings.model_validate(application.args)
