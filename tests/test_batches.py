"""Batches: shards, bad lines, restarts after every kind of end, a full disk."""

import io
import json
import re
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from dit_hub.serving.batches import Batches
from dit_hub.serving.limits import ApiError, Limits

from .served import TOY, Served, quiet_pipeline, serving, started, wait_for

JSONL = {"Content-Type": "application/jsonl"}


def jsonl(requests: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def post(client: httpx2.Client, content: Any) -> dict[str, Any]:
    answer = client.post("/v1/batches", content=content, headers=JSONL)
    assert answer.status_code == 200, answer.text
    return answer.json()


def finished(client: httpx2.Client, batch: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    wait_for(lambda: client.get(f"/v1/batches/{batch['id']}").json()["status"] == status, status, 120)
    return client.get(f"/v1/batches/{batch['id']}").json()


def members(client: httpx2.Client, batch: dict[str, Any]) -> dict[str, bytes]:
    """All files of a batch's shards."""
    found: dict[str, bytes] = {}
    for shard in client.get(f"/v1/batches/{batch['id']}/results").json()["data"]:
        answer = client.get(shard["url"])
        assert (answer.headers["content-type"], len(answer.content)) == ("application/x-tar", shard["bytes"])
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def quick(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": index % 16, "seed": index, "num_inference_steps": 2, **fields} for index in range(count)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(batch_folder=tmp_path / "batches") as one:
        yield one


def test_a_batch_becomes_shards_of_the_pipelines_images(served: Served) -> None:
    batch = finished(served.client, post(served.client, jsonl(quick(150))))
    assert batch["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
    assert batch["shards"] == 3
    found = members(served.client, batch)
    assert sorted(found) == sorted(f"{index:06}.{suffix}" for index in range(150) for suffix in ("json", "png"))
    toy = quiet_pipeline(TOY)
    for index in (0, 63, 64, 149):
        expected = toy(index % 16, num_inference_steps=2, generator=torch.Generator().manual_seed(index)).images[0]
        image = Image.open(io.BytesIO(found[f"{index:06}.png"]))
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
        record = json.loads(found[f"{index:06}.json"])
        assert (record["line"], record["status"], record["seed"], record["label"]) == (
            index + 1,
            200,
            index,
            index % 16,
        )
        assert record["request"] == quick(150)[index]
    text = served.client.get("/metrics").text
    assert f'dit_hub_images_total{{model="{TOY}"}} 150.0' in text


def test_a_bad_line_fails_alone(served: Served) -> None:
    lines = [b'{"prompt": "0", "num_inference_steps": 1}', b"{", b"", b'{"prompt": "nobody"}', b'{"prompt": "\xff"}',
             b'{"prompt": "0", "model": "../x"}', b'{"prompt": "0", "stream": true}', b'{"prompt":"' + b"x" * 70_000,
             b'{"prompt": "1", "n": 3, "num_inference_steps": 1, "seed": 5}']  # fmt: skip
    batch = finished(served.client, post(served.client, b"\n".join(lines)))
    assert batch["request_counts"] == {"total": 8, "completed": 2, "failed": 6}
    found = members(served.client, batch)
    statuses = [json.loads(found[f"{index:06}.json"])["status"] for index in range(8)]
    assert statuses == [200, 400, 400, 400, 404, 400, 413, 200]
    assert "no class named 'nobody'" in json.loads(found["000002.json"])["error"]["message"]
    pngs = sorted(name for name in found if name.endswith(".png"))
    assert pngs == ["000000.png", "000007.0.png", "000007.1.png", "000007.2.png"]


def test_a_shard_has_64_images_however_n_is_spelt(served: Served) -> None:
    lines = [b'{"prompt": "0", "user": "' + b"x" * 3000 + b'", "num_inference_steps": 1, "n": 10}'] * 10
    lines += [b'{"prompt": "0", "num_inference_steps": 1, "\\u006e": 10}'] * 10
    batch = finished(served.client, post(served.client, b"\n".join(lines)))
    assert (batch["shards"], batch["request_counts"]["completed"]) == (4, 20)
    for shard in served.client.get(f"/v1/batches/{batch['id']}/results").json()["data"]:
        with tarfile.open(fileobj=io.BytesIO(served.client.get(shard["url"]).content)) as archive:
            assert sum(name.endswith(".png") for name in archive.getnames()) <= 64


def test_batches_leave_room_in_the_queue(tmp_path: Path) -> None:
    with serving(batch_folder=tmp_path, limits=Limits(waiting=8), max_batch=2) as one:
        batch = post(one.client, jsonl(quick(100, num_inference_steps=100)))
        wait_for(lambda: one.running() > 0, "the batch to begin")
        assert one.draw(prompt="0", n=4, num_inference_steps=1).status_code == 200
        assert one.running() <= 2
        one.client.post(f"/v1/batches/{batch['id']}/cancel")


def test_batches_that_arrive_at_once_are_counted(served: Served) -> None:
    batches: Batches = served.app.state.batches
    uploads = [batches.begin_upload() for _ in range(17)]
    for upload in uploads:
        upload.requests.write_bytes(jsonl(quick(100, num_inference_steps=250)))
    for upload in uploads[:16]:
        batches.add(upload)
    with pytest.raises(ApiError, match="16 batches are not finished"):
        batches.add(uploads[16])
    assert len(list(batches._folder.glob("*batch_*"))) == 16


def test_interactive_requests_come_first(served: Served) -> None:
    batch = post(served.client, jsonl(quick(2000, num_inference_steps=50)))
    wait_for(lambda: served.running() > 0, "the batch to begin")
    assert served.draw(prompt="0", num_inference_steps=5).status_code == 200
    assert served.client.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
    assert served.running() <= 64
    answer = served.client.post(f"/v1/batches/{batch['id']}/cancel")
    assert answer.json()["status"] == "cancelled"
    wait_for(lambda: served.running() == 0, "the rows to leave")


def test_openais_client_follows_a_batch(served: Served) -> None:
    first = post(served.client, jsonl(quick(3)))
    finished(served.client, first)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        batch = client.batches.retrieve(first["id"])
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 3
        assert [one.id for one in client.batches.list()] == [first["id"]]


def test_what_a_batch_refuses(served: Served) -> None:
    def status(answer: httpx2.Response) -> int:
        assert answer.json()["error"]["message"].endswith(".")
        return answer.status_code

    client = served.client
    assert status(client.post("/v1/batches", content=b"{}")) == 415
    assert status(client.post("/v1/batches", content=b" \n\n", headers=JSONL)) == 400
    assert status(client.get("/v1/batches/nothing")) == 404
    assert status(client.get("/v1/batches/..%2f..%2fx")) == 404
    batch = finished(client, post(client, jsonl(quick(1))))
    url = f"/v1/batches/{batch['id']}"
    assert status(client.get(f"{url}/results/batch.json")) == 404
    assert status(client.get(f"{url}/results/%2e%2e")) == 404
    assert status(client.post(f"{url}/resume")) == 409
    assert status(client.post(f"{url}/cancel")) == 409
    assert client.delete(url).json()["deleted"]
    assert status(client.get(url)) == 404
    assert list((served.app.state.batches._folder).glob("*batch_*")) == []


def test_limits_of_batches(tmp_path: Path) -> None:
    limits = Limits(batch_bytes=1000, batches=1)
    with serving(batch_folder=tmp_path, limits=limits) as one:
        assert one.client.post("/v1/batches", content=b"x" * 1001, headers=JSONL).status_code == 413
        assert list(tmp_path.glob("*batch_*")) == []
        first = post(one.client, jsonl(quick(10, num_inference_steps=200, n=10)))
        answer = one.client.post("/v1/batches", content=b"{}", headers=JSONL)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
        assert one.client.delete(f"/v1/batches/{first['id']}").status_code == 409


def test_without_a_folder_there_are_no_batches() -> None:
    with serving() as one:
        answer = one.client.post("/v1/batches", content=b"{}", headers=JSONL)
    assert (answer.status_code, "--batch-dir" in answer.json()["error"]["message"]) == (404, True)


def test_a_folder_is_one_servers(tmp_path: Path) -> None:
    said = f"Another server works in {re.escape(str(tmp_path))}"
    with serving(batch_folder=tmp_path), pytest.raises(ValueError, match=said), serving(batch_folder=tmp_path):
        pass


@pytest.mark.parametrize("damage", ["{", "[]", '{"created": Infinity, "shards": [1]}', "[" * 100_000], ids=len)
def test_a_damaged_batch_has_failed_and_the_others_go_on(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(batch_folder=tmp_path) as one:
        damaged, sound = (finished(one.client, post(one.client, jsonl(quick(1)))) for _ in range(2))
    (tmp_path / damaged["id"] / "batch.json").write_text(damage)
    (tmp_path / f"batch_{'0' * 32}").touch()
    with serving(batch_folder=tmp_path) as one:
        found = {each["id"]: each for each in one.client.get("/v1/batches").json()["data"]}
        assert {name: each["status"] for name, each in found.items()} == {
            damaged["id"]: "failed", sound["id"]: "completed"
        }  # fmt: skip
        assert found[damaged["id"]]["error"] == "The batch's files are damaged; the server's log says how."
        assert any(getattr(record, "fields", {}).get("batch") == damaged["id"] for record in caplog.records)
        assert len(members(one.client, damaged)) == 2
        finished(one.client, post(one.client, jsonl(quick(1))))
        assert one.client.delete(f"/v1/batches/{damaged['id']}").status_code == 200


def test_requests_that_are_missing_pause_a_batch(tmp_path: Path) -> None:
    with serving(batch_folder=tmp_path) as one:
        batch = post(one.client, jsonl(quick(200, num_inference_steps=100)))
    (tmp_path / batch["id"] / "requests.jsonl").write_bytes(jsonl(quick(3)))
    with serving(batch_folder=tmp_path) as one:
        assert "are missing" in finished(one.client, batch, "paused")["error"]


# --- Restarts --------------------------------------------------------------------------------------------------------


def test_a_killed_servers_batch_goes_on(tmp_path: Path) -> None:
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / f".batch_{'0' * 32}.upload").mkdir()
    with started(tmp_path, TOY, "--batch-dir", "batches") as (process, url), httpx2.Client(base_url=url) as client:
        batch = post(client, jsonl([{"prompt": 1, "num_inference_steps": 30} for _ in range(400)]))
        wait_for(lambda: client.get(f"/v1/batches/{batch['id']}/results").json()["data"], "a shard", 120)
        first = client.get(f"/v1/batches/{batch['id']}/results/000000.tar").content
        process.send_signal(signal.SIGKILL)
        assert process.wait(30).returncode == -signal.SIGKILL
    shards = len(list((tmp_path / "batches" / batch["id"]).glob("*.tar")))
    assert 1 <= shards < 7
    with started(tmp_path, TOY, "--batch-dir", "batches") as (_, url), httpx2.Client(base_url=url) as client:
        (found,) = client.get("/v1/batches").json()["data"]
        assert found["request_counts"]["completed"] >= 64 * shards
        batch = finished(client, batch)
        assert batch["request_counts"] == {"total": 400, "completed": 400, "failed": 0}
        assert client.get(f"/v1/batches/{batch['id']}/results/000000.tar").content == first
        assert len(members(client, batch)) == 800


def test_a_stopped_server_hands_nothing_to_the_shards(tmp_path: Path) -> None:
    with serving(batch_folder=tmp_path) as one:
        batch = post(one.client, jsonl(quick(200, num_inference_steps=100)))
        wait_for(lambda: one.running() > 0, "the batch to begin")
    with serving(batch_folder=tmp_path) as one:
        batch = finished(one.client, batch)
        assert batch["request_counts"] == {"total": 200, "completed": 200, "failed": 0}


def test_a_cancelled_batch_stays_so(tmp_path: Path) -> None:
    with serving(batch_folder=tmp_path) as one:
        batch = post(one.client, jsonl(quick(200, num_inference_steps=100)))
        one.client.post(f"/v1/batches/{batch['id']}/cancel")
    with serving(batch_folder=tmp_path) as one:
        assert one.client.get(f"/v1/batches/{batch['id']}").json()["status"] == "cancelled"
        assert one.client.delete(f"/v1/batches/{batch['id']}").status_code == 200


# --- The disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_pauses_a_batch_and_the_server_lives(tmp_path: Path) -> None:
    # A shard of 64 images of 700 bytes and their records, in blocks of 512, has 150 kB; its requests have 30.
    requests = quick(200)
    with started(tmp_path, TOY, "--batch-dir", "batches", file_limit=60_000) as (process, url):
        with httpx2.Client(base_url=url, timeout=60) as client:
            batch = finished(client, post(client, jsonl(requests)), "paused")
            assert batch["error"].startswith("The results could not be written (File too large); make room")
            assert str(tmp_path) not in batch["error"]
            assert batch["request_counts"] == {"total": 200, "completed": 0, "failed": 0}
            assert client.get("/health").status_code == 200
            assert client.post("/v1/images/generations", json={"prompt": "0"}).status_code == 200
            assert client.post(f"/v1/batches/{batch['id']}/resume").json()["status"] == "in_progress"
            finished(client, batch, "paused")
            answer = client.post("/v1/batches", content=b"x" * 100_000, headers=JSONL)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
            assert [path.suffix for path in (tmp_path / "batches" / batch["id"]).iterdir()].count(".part") == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60).returncode == 0
    with started(tmp_path, TOY, "--batch-dir", "batches") as (_, url), httpx2.Client(base_url=url) as client:
        assert finished(client, batch)["request_counts"]["completed"] == 200
