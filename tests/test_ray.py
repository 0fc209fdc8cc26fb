"""A local cluster of Ray: two replicas of the engine behind the HTTP interface, and one of them is killed."""

import base64
import io
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dit_hub import DiTPipeline
from dit_hub.schedulers import switch_scheduler
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
        settings = {"model": f"{TOY},{folder / 'other'}", "min_replicas": "2", "num_cpus": "0.5"}
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


def test_a_killed_replica_loses_no_accepted_request(cluster: tuple[str, Path]) -> None:
    url, folder = cluster
    bodies = [
        {"prompt": number, "seed": 100 * number, **(
            {"n": 8, "num_inference_steps": 200} if number % 2 else
            {"n": 4, "num_inference_steps": 60, "scheduler": "ddim"}
        )} for number in range(16)
    ]  # fmt: skip
    workers = [process for process in psutil.Process().children(recursive=True)
               if process.cmdline()[:1] == ["ray::ServeReplica:dit:Replica"]]  # fmt: skip
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modle": TOY}, "model: Field required; known: model, device"),
        ({"model": TOY, "replicas": "2"}, "replicas: Extra inputs are not permitted; known: model"),
        ({"model": "absent"}, "There is no folder and no embedded model 'absent'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, str], message: str) -> None:
    from dit_hub.serving.ray_app import app

    with pytest.raises(ValueError, match=message):
        app(arguments)


def test_the_examples_are_of_serves_schema() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from dit_hub.serving.ray_app import Settings

    folder = Path(__file__).parents[1] / "examples" / "ray"
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    for text in ((folder / "serve_config.yaml").read_text(), service["spec"]["serveConfigV2"]):
        (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
        assert application.import_path == "dit_hub.serving.ray_app:app"
        Settings.model_validate(application.args)
