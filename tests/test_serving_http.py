"""The server over real sockets: OpenAI's client, every limit, bad input, clients that leave or dawdle."""

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from dit_hub import DiTPipeline
from dit_hub.serving.limits import Limits

from .served import IMAGES, TOY, Served, quiet_pipeline, serving, wait_for

# A pipeline's PNG is rounded from the same floats, which the engine may sum in another order.
ROUNDING = 1


@pytest.fixture(scope="module")
def toy() -> DiTPipeline:
    return quiet_pipeline(TOY)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=int)


def decoded(text: str | None) -> np.ndarray:
    assert text is not None
    return pixels(base64.b64decode(text))


def drawn(pipeline: DiTPipeline, label: Any, seed: int, **options: Any) -> np.ndarray:
    """What the pipeline draws alone."""
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(label, generator=generator, **options).images[0], dtype=int)


def assert_same(image: np.ndarray, expected: np.ndarray) -> None:
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= ROUNDING


def message(answer: httpx2.Response) -> str:
    """The sentence of an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]
    return error["message"]


# --- OpenAI's client -------------------------------------------------------------------------------------------------


def client_of(served: Served, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", **options)


def test_openais_client_gets_the_pipelines_images(served: Served, toy: DiTPipeline) -> None:
    with client_of(served) as client:
        result = client.images.generate(
            model=TOY, prompt="red-circle", n=2, size="auto", extra_body={"seed": 7, "num_inference_steps": 6}
        )
    assert (result.size, result.output_format) == ("16x16", "png")
    assert result.data is not None
    assert len(result.data) == 2
    for index, image in enumerate(result.data):
        assert_same(decoded(image.b64_json), drawn(toy, "red-circle", 7 + index, num_inference_steps=6))


def test_openais_async_client(served: Served, toy: DiTPipeline) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
            asked = {"num_inference_steps": 4, "scheduler": "ddim"}
            seeds = range(3)
            return await asyncio.gather(
                *(client.images.generate(model=TOY, prompt="5", extra_body={"seed": seed, **asked}) for seed in seeds)
            )

    results = asyncio.run(ask())
    alone = quiet_pipeline(TOY)
    from dit_hub.schedulers import switch_scheduler

    alone.scheduler = switch_scheduler(alone.scheduler, "ddim")
    for seed, result in enumerate(results):
        assert_same(decoded(result.data[0].b64_json), drawn(alone, 5, seed, num_inference_steps=4))


def test_openais_client_streams_previews_and_the_image(served: Served, toy: DiTPipeline) -> None:
    with client_of(served) as client:
        stream = client.images.generate(model=TOY, prompt="blue-cross", stream=True, partial_images=3,
                                        extra_body={"seed": 1, "num_inference_steps": 8})  # fmt: skip
        events: list[Any] = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert_same(decoded(events[-1].b64_json), drawn(toy, "blue-cross", 1, num_inference_steps=8))
    assert events[-1].usage.total_tokens == 0
    assert decoded(events[0].b64_json).shape == (16, 16, 3)


def test_openais_async_client_streams(served: Served, toy: DiTPipeline) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
            stream = await client.images.generate(model=TOY, prompt="9", stream=True, partial_images=1,
                                                  extra_body={"seed": 2, "num_inference_steps": 4})  # fmt: skip
            return [event async for event in stream]

    events = asyncio.run(ask())
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert_same(decoded(events[-1].b64_json), drawn(toy, 9, 2, num_inference_steps=4))


def test_a_stream_of_two_images_names_each(served: Served) -> None:
    with served.client.stream("POST", IMAGES, json={"prompt": "1", "n": 2, "stream": True, "num_inference_steps": 2,
                                                    "seed": 4}) as answer:  # fmt: skip
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert sorted((event["index"], event["seed"]) for event in events) == [(0, 4), (1, 5)]


def test_openais_client_raises_its_own_errors(served: Served) -> None:
    with client_of(served, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="There is no class named 'red-circl'"):
            client.images.generate(model=TOY, prompt="red-circl")
        with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-image-2' here"):
            client.images.generate(model="gpt-image-2", prompt="0")


def test_openais_client_lists_the_models(served: Served) -> None:
    with client_of(served) as client:
        (model,) = client.models.list()
        one: Any = client.models.retrieve(TOY)
    assert model.id == one.id == TOY
    assert one.classes["0"] == "red-circle"
    assert (one.sizes, one.default_steps, one.num_classes) == (["16x16"], 50, 16)


def test_a_png_is_the_body(served: Served, toy: DiTPipeline) -> None:
    answer = served.draw(prompt=3, response_format="png", num_inference_steps=3, seed=9)
    assert (answer.headers["content-type"], answer.headers["x-seed"]) == ("image/png", "9")
    assert_same(pixels(answer.content), drawn(toy, 3, 9, num_inference_steps=3))


def test_a_seed_that_was_chosen_draws_the_image_again(served: Served) -> None:
    first = served.draw(prompt="2", num_inference_steps=2).json()
    again = served.draw(prompt="2", num_inference_steps=2, seed=first["seed"]).json()
    assert first["data"] == again["data"]


# --- Bad input -------------------------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "red-circl"}, "no class named 'red-circl'"),
    ({"prompt": 16}, "16"),
    ({"prompt": "9" * 150}, "out of range"),
    ({"prompt": True}, "prompt must be a class name or id"),
    ({"prompt": "x" * 201}, "at most 200 characters"),
    ({"prompt": "\ud800"}, "prompt must be"),
    ({"prompt": ["0"]}, "prompt must be a class name or id"),
    ({}, ""),
    ({"prompt": "caf\xe9"}, "no class named"),
    ({"prompt": "0", "prmpt": 1}, "There is no field 'prmpt'; the nearest: prompt"),
    ({"prompt": "0", "a\nb": 1}, "There is no field"),
    ({"prompt": "0", "n": 0}, "n must be greater than or equal to 1, not 0"),
    ({"prompt": "0", "n": 11}, "n must be at most 10"),
    ({"prompt": "0", "n": True}, "n must be a valid integer"),
    ({"prompt": "0", "n": 1.5}, "n must be a valid integer"),
    ({"prompt": "0", "n": "2"}, "n must be a valid integer"),
    ({"prompt": "0", "seed": -1}, "seed must be"),
    ({"prompt": "0", "seed": 2**63}, "seed must be"),
    ({"prompt": "0", "seed": 10**4000}, "seed must be"),
    ({"prompt": "0", "num_inference_steps": 251}, "num_inference_steps must be at most 250"),
    ({"prompt": "0", "num_inference_steps": 0}, "num_inference_steps must be"),
    ({"prompt": "0", "guidance_scale": "4"}, "guidance_scale must be a valid number"),
    ({"prompt": "0", "guidance_scale": 4}, "guidance"),  # the model has no null class
    ({"prompt": "0", "guidance_interval": [0]}, "guidance_interval must have at least 2 items, not [0]"),
    ({"prompt": "0", "guidance_interval": [1, 0]}, "guidance_interval must be two rising numbers"),
    ({"prompt": "0", "eta": 2}, "eta must be"),
    ({"prompt": "0", "priority": 9}, "priority must be"),
    ({"prompt": "0", "size": "16"}, 'size must be "WIDTHxHEIGHT" or "auto"'),
    ({"prompt": "0", "size": "17x17"}, "17"),
    ({"prompt": "0", "size": "0x0"}, "0"),
    ({"prompt": "0", "size": "32x33"}, "A side of size must be at most 32 on this server, not 33."),
    ({"prompt": "0", "size": "4096x4096"}, "at most 32"),
    ({"prompt": "0", "scheduler": "dmp++"}, "no scheduler named 'dmp++'"),
    ({"prompt": "0", "scheduler": "/etc/passwd.json"}, "no scheduler named"),
    ({"prompt": "0", "scheduler": "solver.json"}, "no scheduler named"),
    ({"prompt": "0", "response_format": "url"}, "response_format must be 'b64_json' or 'png'"),
    ({"prompt": "0", "response_format": "png", "n": 2}, "response_format png is one image, and n is 2"),
    ({"prompt": "0", "response_format": "png", "stream": True}, "not a stream"),
    ({"prompt": "0", "partial_images": 2}, "partial_images come with stream: true only"),
    ({"prompt": "0", "partial_images": 4, "stream": True}, "partial_images must be"),
    ({"prompt": "0", "style": "vivid"}, "style is for OpenAI's own models"),
    ({"prompt": "0", "quality": "hd"}, "quality must be 'auto' or 'standard'"),
    ({"prompt": "0", "background": "transparent"}, "background must be"),
    ({"prompt": "0", "output_format": "webp"}, "output_format must be 'png'"),
    ({"prompt": "0", "output_compression": 50}, "output_compression must be 100"),
]


@pytest.mark.parametrize(("fields", "sentence"), BAD_FIELDS, ids=lambda value: str(value)[:50])
def test_bad_fields_are_one_sentence(served: Served, fields: dict[str, Any], sentence: str) -> None:
    answer = served.client.post(IMAGES, content=json.dumps(fields), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert sentence in message(answer)


BAD_BODIES = {
    "nothing": b"",
    "cut off": b'{"prompt": "0"',
    "not UTF-8": b'{"prompt": "\xff"}',
    "NaN": b'{"prompt": "0", "guidance_scale": NaN}',
    "infinity": b'{"prompt": "0", "guidance_scale": -Infinity}',
    "1e999": b'{"prompt": "0", "guidance_scale": 1e999}',
    "five thousand digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "nested": b"[" * 30_000,
    "nested objects": b'{"a":' * 10_000,
    "nested field": b'{"prompt": ' + b"[" * 800 + b"]" * 800 + b"}",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies_are_one_sentence(served: Served, body: bytes) -> None:
    answer = served.client.post(IMAGES, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message(answer)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "DIT-TOY-SHAPES", "\x00", "C:\\x"])
def test_a_models_name_is_no_path(served: Served, name: str) -> None:
    answer = served.draw(model=name, prompt="0")
    assert answer.status_code == 404
    assert "There is no model" in message(answer)


def test_what_means_the_default_is_accepted(served: Served) -> None:
    usual = {"quality": "auto", "background": "opaque", "moderation": "low", "output_format": "png", "style": None,
             "n": None, "output_compression": 100, "user": "someone", "response_format": "b64_json"}  # fmt: skip
    assert served.draw(prompt="0", num_inference_steps=1, **usual).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(served: Served, kind: str) -> None:
    answer = served.client.post(IMAGES, content=b'{"prompt": "0"}', headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert "application/json" in message(answer)


def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    assert served.client.get("/v1/nothing").status_code == 404
    assert "There is nothing at '/v1/nothing'" in message(served.client.get("/v1/nothing"))
    answer = served.client.put(IMAGES, json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert message(answer)
    assert served.client.get("/v1/models/..%2f..%2fetc").status_code == 404


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_a_long_body_is_refused_as_it_arrives(served: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 100_000, chunks()):
        answer = served.client.post(IMAGES, content=content, headers=headers)
        assert answer.status_code == 413
        assert "65536 bytes" in message(answer)


def raw(served: Served, data: bytes) -> socket.socket:
    """A connection on which some bytes were sent."""
    connection = socket.create_connection(address(served), timeout=30)
    connection.sendall(data)
    return connection


def address(served: Served) -> tuple[str, int]:
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


def answer_of(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """A server that waits for a fifth of a second only."""
    limits = Limits(body_seconds=0.2, write_seconds=0.2, images=10, steps=2)
    with serving(limits=limits) as one:
        yield one


def test_a_body_that_does_not_arrive_is_408(impatient: Served) -> None:
    with raw(impatient, HEAD + b"Content-Length: 100\r\n\r\n{") as connection:
        assert answer_of(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ima", HEAD, HEAD + b"X: "])
def test_half_open_connections_are_closed(impatient: Served, sent: bytes) -> None:
    with raw(impatient, sent) as connection:
        assert answer_of(connection) == b""
    wait_for(lambda: len(impatient.server.server_state.connections) <= 1, "the connection to be forgotten")


def test_a_client_that_leaves_within_its_body_is_no_fault(impatient: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dit_hub.serving")
    raw(impatient, HEAD + b"Content-Length: 100\r\n\r\n{").close()
    wait_for(lambda: any(getattr(one, "fields", {}).get("status") == 499 for one in caplog.records), "the log")
    assert [one for one in caplog.records if one.exc_info] == []


def test_more_connections_than_there_may_be_are_503() -> None:
    with serving(limits=Limits(connections=3)) as one:
        others = [raw(one, b"") for _ in range(3)]
        wait_for(lambda: one.draw(prompt="0", num_inference_steps=1).status_code == 503, "all to be accepted")
        refused = one.draw(prompt="0")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert "Too many connections" in message(refused)
        for probe in ("/health", "/ready"):  # a supervisor would end a server that is well
            assert one.client.get(probe).status_code == 200
        for other in others:
            other.close()
        wait_for(lambda: one.draw(prompt="0", num_inference_steps=1).status_code == 200, "room")


def test_a_head_without_end_is_refused(impatient: Served) -> None:
    with raw(impatient, HEAD) as connection, contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(b"X-Header: " + b"y" * 1000 + b"\r\n")
        assert answer_of(connection).startswith(b"HTTP/1.1 400 ")
    assert impatient.client.get("/health").status_code == 200


def test_more_images_than_may_wait_are_429() -> None:
    pipeline, may_go_on = quiet_pipeline(TOY), threading.Event()
    pipeline.transformer.blocks[0].register_forward_pre_hook(lambda *_: may_go_on.wait(60) and None)
    with serving(load=lambda _: pipeline, limits=Limits(waiting=2, images=4), max_batch=2) as one:
        engine = one.models.loaded()[TOY].runner.engine
        try:
            threads = [in_background(one, prompt="0", n=2, num_inference_steps=2)]
            wait_for(lambda: (engine.running, engine.waiting) == (2, 0), "a pass")
            threads.append(in_background(one, prompt="0", n=2, num_inference_steps=2))
            wait_for(lambda: engine.waiting == 2, "a full queue")
            answer = one.draw(prompt="0")
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
            with client_of(one, max_retries=0) as client, pytest.raises(openai.RateLimitError):
                client.images.generate(prompt="0")
        finally:
            may_go_on.set()
        for thread, answers in threads:
            thread.join()
            assert answers[0].status_code == 200


def test_a_request_that_could_never_wait_is_400() -> None:
    with serving(limits=Limits(waiting=2, images=4)) as one:
        answer = one.draw(prompt="0", n=3)
        assert (answer.status_code, message(answer)) == (400, "n must be at most 2 on this server, not 3.")
        schema = one.client.get("/openapi.json").json()["paths"][IMAGES]["post"]["requestBody"]
        assert schema["content"]["application/json"]["schema"]["properties"]["n"]["anyOf"][0]["maximum"] == 2


def test_a_request_that_takes_too_long_is_504() -> None:
    with serving(limits=Limits(seconds=0.05)) as one:
        answer = one.draw(prompt="0", n=10, num_inference_steps=200)
        assert answer.status_code == 504
        assert message(answer)
        wait_for(lambda: one.running() == 0, "the rows to leave")


# --- Who may ask -----------------------------------------------------------------------------------------------------


def test_the_key_is_asked_of_all_but_probes() -> None:
    with serving(api_key="s3cret") as one:
        wrong: list[dict[str, Any]] = [{"Authorization": value} for value in ("Bearer wrong", "s3cret", b"\xff")]
        for given in ({}, *wrong):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
                answer = httpx2.get(one.url + path, headers=given)
                assert answer.status_code == 401
                assert message(answer)
            assert httpx2.get(one.url + "/health", headers=given).status_code == 200
            assert httpx2.get(one.url + "/ready", headers=given).status_code == 200
        assert one.draw(prompt="0", num_inference_steps=1).status_code == 200
        with client_of(one) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


# --- Many clients, and those that leave ------------------------------------------------------------------------------


def test_five_hundred_clients_at_once_are_answered(served: Served) -> None:
    async def ask() -> list[int]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:

            async def one(index: int) -> int:
                fields = {"prompt": str(index % 16), "num_inference_steps": 1 + index % 4, "seed": index}
                return (await client.post(IMAGES, json=fields)).status_code

            return await asyncio.gather(*(one(index) for index in range(500)))

    statuses = asyncio.run(ask())
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 250
    wait_for(lambda: served.running() == 0, "the rows to leave")


@pytest.mark.parametrize("stream", [False, True])
def test_the_rows_of_a_client_that_leaves_leave_too(served: Served, stream: bool) -> None:
    fields = {"prompt": "0", "n": 10, "num_inference_steps": 200, "stream": stream}
    body = json.dumps(fields).encode()
    connection = raw(served, HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_for(lambda: served.running() > 0, "the request to begin")
    connection.close()
    wait_for(lambda: served.running() == 0, "the rows to leave")
    text = served.client.get("/metrics").text
    wait_for(lambda: 'code="499"' in served.client.get("/metrics").text, text)


@pytest.fixture(scope="module")
def large(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that is quick to draw large images."""
    folder = tmp_path_factory.mktemp("models") / "large"
    make_pipeline(sample_size=16, patch_size=16, in_channels=3, learn_sigma=False).save_pretrained(folder)
    return {"large": str(folder)}


def cut_off(one: Served, take: Callable[[socket.socket], object]) -> int:
    """The bytes of an answer of 6 MB that a client gets which takes it in its own way until it is cut off."""
    fields = {"prompt": 0, "n": 8, "num_inference_steps": 1, "size": "512x512", "guidance_scale": 1}
    body = json.dumps(fields).encode()
    connections = one.server.server_state.connections
    before = len(connections)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address(one))
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: len(connections) > before, "the request to arrive")
        wait_for(lambda: take(connection) is not None and len(connections) == before, "the client to be cut off")
        return len(answer_of(connection))


def test_a_client_that_does_not_read_is_cut_off(large: dict[str, str]) -> None:
    with serving(large, limits=Limits(write_seconds=0.2, side=512)) as one:
        assert 0 < cut_off(one, lambda _: 0) < 8 * 512 * 512 * 3


def test_a_client_that_reads_slowly_is_cut_off(large: dict[str, str]) -> None:
    with serving(large, limits=Limits(write_seconds=10, answer_seconds=1, side=512)) as one:
        assert 0 < cut_off(one, lambda connection: connection.recv(2048)) < 8 * 512 * 512 * 3


# --- What it is watched by -------------------------------------------------------------------------------------------


def test_request_ids_go_through(served: Served) -> None:
    assert served.client.get("/health", headers={"X-Request-ID": "job-7.a_B"}).headers["x-request-id"] == "job-7.a_B"
    for bad in ("a b", "x" * 65, '"}', ""):
        given = served.client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)


def test_metrics_count(served: Served) -> None:
    def read(name: str) -> float:
        text = served.client.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = read("dit_hub_images_total"), read("dit_hub_pass_rows_count"), read('dit_hub_requests_total{code="200"}')
    assert served.draw(prompt="0", n=3, num_inference_steps=2).status_code == 200
    wait_for(lambda: read("dit_hub_images_total") == before[0] + 3, "the images to be counted")
    assert read("dit_hub_pass_rows_count") > before[1]
    assert read('dit_hub_requests_total{code="200"}') > before[2]
    assert read(f'dit_hub_request_seconds_count{{model="{TOY}",status="200"}}') >= 1
    assert read("dit_hub_models_loaded") == 1
    assert read("dit_hub_models_bytes") > 1e6
    assert read("dit_hub_queue_waiting") == read("dit_hub_images_running") == 0


def test_two_servers_of_one_process_count_apart(served: Served) -> None:
    with serving() as other:
        assert 'dit_hub_requests_total{code="404"}' not in other.client.get("/metrics").text


# --- The end ---------------------------------------------------------------------------------------------------------


def in_background(served: Served, **fields: Any) -> tuple[threading.Thread, list[httpx2.Response]]:
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(httpx2.post(served.url + IMAGES, json=fields, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: served.running() > 0, "the request to begin")
    return thread, answers


def test_accepted_requests_are_finished_and_new_ones_sent_away() -> None:
    with serving(shutdown_seconds=30) as one:
        thread, answers = in_background(one, prompt="0", n=10, num_inference_steps=100)
        one.server.stop()
        wait_for(lambda: one.app.state.service.closing, "the end to begin")
        refused = one.draw(prompt="0")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "shutting down" in message(refused)
        assert one.client.get("/ready").status_code == 503
        assert one.client.get("/health").status_code == 200
        thread.join()
        assert answers[0].status_code == 200


def test_what_is_not_finished_in_time_is_handed_back() -> None:
    with serving(shutdown_seconds=0) as one:
        thread, answers = in_background(one, prompt="0", n=10, num_inference_steps=200)
        one.server.stop()
        thread.join()
        assert answers[0].status_code == 503
        assert message(answers[0])


def test_an_end_that_fails_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("The disk is gone.")

    with serving() as one:
        monkeypatch.setattr(one.models, "close", fail)
        one.server.stop()
        wait_for(lambda: one.server.should_exit, "the end", 10)


def test_a_server_forgets_its_requests(served: Served) -> None:
    wait_for(lambda: served.running() == 0, "the rows to leave")
    assert served.app.state.service.active == 0
    assert all(one.users == 0 for one in served.models.loaded().values())
