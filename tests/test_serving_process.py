"""`dit-hub serve` as a process: what it prints, what it refuses, signals."""

import json
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import httpx2
import pytest

from .command_line import dit_hub
from .served import IMAGES, TOY, started, wait_for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_accepted_requests_finish(tmp_path: Path, number: int) -> None:
    with started(tmp_path, TOY, "--api-key", "s3cret") as (process, url):
        headers = {"Authorization": "Bearer s3cret", "X-Request-ID": "the-last-one"}
        fields = {"prompt": "red-circle", "n": 10, "num_inference_steps": 200, "seed": 1}
        answers: list[httpx2.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx2.post(url + IMAGES, json=fields, headers=headers, timeout=60))
        )
        thread.start()
        wait_for(
            lambda: re.search(r"images_running\S* [1-9]", httpx2.get(f"{url}/metrics", headers=headers).text), "work"
        )
        process.send_signal(number)
        thread.join()
        assert answers[0].status_code == 200
        result = process.wait(60)
    assert result.returncode == 0
    assert result.stdout.startswith(f"Serving {TOY} at {url}; Ctrl-C ends it. To try it:\ncurl {url}{IMAGES} ")
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    (asked,) = [line for line in lines if line.get("request_id") == "the-last-one" and line["path"] == IMAGES]
    assert (asked["status"], asked["model"], asked["images"], asked["steps"]) == (200, TOY, 10, 200)
    assert "red-circle" not in result.stderr
    assert "s3cret" not in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [[], ["--runtime", "onnxruntime"]], ids=str)
def test_the_curl_line_draws_an_image(tmp_path: Path, arguments: list[str]) -> None:
    with started(tmp_path, TOY, *arguments) as (process, _):
        line = process.printed().splitlines()[1]
        subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with started(tmp_path, TOY, "--shutdown-seconds", 600, "--max-images", 1000) as (process, url):
        fields = {"prompt": "0", "n": 1000, "num_inference_steps": 200, "stream": True}
        with httpx2.stream("POST", url + IMAGES, json=fields, timeout=60) as answer:
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx2.get(f"{url}/ready").status_code == 503, "the end to begin")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30).returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "There is no folder and no embedded model 'nowhere'"),
        ([TOY, TOY], f"are both named {TOY}"),
        ([TOY, "--runtime", "tensorrt"], "--runtime must be onnxruntime or openvino, not 'tensorrt'"),
        ([TOY, "--runtime", "openvino", "--device", "cuda"], "--runtime openvino computes on the processor"),
        ([TOY, "--host", "0.0.0.0"], "On 0.0.0.0 anyone could use this server"),
        ([TOY, "--host", "203.0.113.1", "--no-auth"], "cannot listen on 203.0.113.1 port 8000"),
        ([TOY, "--port", "70000"], "port 70000"),
        ([TOY, "--max-batch", "1"], "--max-batch must be 2 or more, not 1"),
        ([TOY, "--memory", "-1"], "--memory must be 0 or more, not -1"),
        ([TOY, "--max-steps", "0"], "--max-steps must be 1 or more, not 0"),
        ([TOY, "--request-seconds", "nan"], "--request-seconds must be a finite number, not nan"),
        ([TOY, "--device", "abacus"], "There is no device 'abacus' here"),
        ([TOY, "--dtype", "int8"], "--dtype must be"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_what_cannot_be_served_is_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = dit_hub("serve", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = dit_hub("serve", TOY, "--port", port, cwd=tmp_path)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in result.stderr


def test_a_folder_that_is_no_model_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{")
    result = dit_hub("serve", "model", "--port", 0, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "model" in result.stderr.splitlines()[-1]
