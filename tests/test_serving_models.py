"""Several models in bounded memory, those that cannot be loaded, engines that stop, weights that are not sound."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_hub import DiTPipeline
from dit_hub.cli.serving import _load_exported
from dit_hub.serving.models import Models, named_sources

from .served import TOY, quiet_pipeline, serving, wait_for

MakePipeline = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three small models of pixels in folders, by name."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second", "third")):
        pipeline = make_pipeline(seed=seed, in_channels=3, learn_sigma=False)
        pipeline.save_pretrained(root / name)
    return named_sources([str(root / name) for name in ("first", "second", "third")])


def weights(source: str) -> int:
    return sum(path.stat().st_size for path in Path(source).rglob("*") if path.is_file())


def test_a_model_is_loaded_at_first_use(folders: dict[str, str]) -> None:
    with serving(folders) as one:
        assert one.client.get("/v1/models").json()["data"][1]["state"] == "not loaded"
        answer = one.draw(model="second", prompt=0, num_inference_steps=1)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_loading"
        assert int(answer.headers["retry-after"]) >= 1
        wait_for(lambda: one.draw(model="second", prompt=0, num_inference_steps=1).status_code == 200, "the second")
        assert set(one.models.loaded()) == {"first", "second"}
        states = {model["id"]: model["state"] for model in one.client.get("/v1/models").json()["data"]}
        assert states == {"first": "loaded", "second": "loaded", "third": "not loaded"}


def test_the_model_unused_longest_goes(folders: dict[str, str]) -> None:
    limit = int(weights(folders["first"]) * 2.5)
    with serving(folders, memory_limit=limit) as one:

        def use(name: str) -> None:
            wait_for(lambda: one.draw(model=name, prompt=0, num_inference_steps=1).status_code == 200, name)

        use("second")
        use("first")
        use("third")
        assert set(one.models.loaded()) == {"first", "third"}
        use("second")
        assert set(one.models.loaded()) == {"second", "third"}
        assert one.models.memory <= limit
        assert one.client.get("/ready").status_code == 200


def test_a_model_is_gone_before_the_next_is_loaded(folders: dict[str, str]) -> None:
    loaded: list[weakref.ref[Any]] = []
    kept: list[int] = []

    def load(source: str) -> DiTPipeline:
        kept.append(sum(one() is not None for one in loaded))
        pipeline = quiet_pipeline(source)
        loaded.append(weakref.ref(pipeline.transformer))
        return pipeline

    with serving(folders, load, memory_limit=int(weights(folders["first"]) * 1.5)) as one:
        assert one.draw(model="first", prompt=0, num_inference_steps=1).status_code == 200
        for name in ("second", "third", "first"):
            wait_for(lambda: one.draw(model=name, prompt=0, num_inference_steps=1).status_code == 200, name)  # noqa: B023
    assert kept == [0, 0, 0, 0]


def test_a_model_that_comes_back_is_not_exported_again(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline(in_channels=3, learn_sigma=False).save_pretrained(tmp_path / "model")
    (tmp_path / "exports").mkdir()

    def load() -> set[Path]:
        pipeline = _load_exported(str(tmp_path / "model"), "onnxruntime", tmp_path / "exports", quiet_pipeline)
        assert not isinstance(pipeline.transformer, torch.nn.Module)
        return set((tmp_path / "exports").rglob("*"))

    assert load() == load()


def test_a_model_at_work_stays_until_it_is_done(folders: dict[str, str]) -> None:
    with serving(folders, memory_limit=int(weights(folders["first"]) * 1.5)) as one:
        first = one.models.acquire("first")
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(one.draw(model="second", prompt=0, num_inference_steps=1).status_code)
        )
        thread.start()
        thread.join()
        assert statuses == [503]
        wait_for(lambda: one.draw(model="first", prompt=0).status_code == 503, "the first to be on its way out")
        assert set(one.models.loaded()) == {"first"}
        one.models.release(first)
        wait_for(lambda: set(one.models.loaded()) == {"second"}, "the second")


def test_a_model_that_does_not_fit_is_said(folders: dict[str, str]) -> None:
    with serving(folders, memory_limit=1000, ready=False) as one:
        wait_for(lambda: one.models.states()["first"] == "failed", "the failure")
        answer = one.draw(model="first", prompt=0)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")
        assert one.client.get("/ready").status_code == 503
        assert "could not be loaded" in one.client.get("/ready").json()["error"]["message"]


def test_a_model_that_could_not_be_loaded_is_tried_again(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_hub.serving.models._RETRY_SECONDS", 0.0)
    there = threading.Event()

    def load(source: str) -> DiTPipeline:
        if not there.is_set():
            raise OSError(f"The disk of {source} is gone.")
        return quiet_pipeline(source)

    with serving(folders, load, ready=False) as one:
        wait_for(lambda: one.models.states()["first"] == "failed", "the failure")
        said = one.client.get("/ready").text
        assert "disk" not in said
        assert folders["first"] not in said
        there.set()
        wait_for(lambda: one.client.get("/ready").status_code == 200, "the model")


def test_loading_is_503(folders: dict[str, str]) -> None:
    there = threading.Event()

    def load(source: str) -> DiTPipeline:
        there.wait()
        return quiet_pipeline(source)

    with serving(folders, load, ready=False) as one:
        try:
            assert one.client.get("/health").status_code == 200
            assert one.client.get("/ready").status_code == 503
            assert one.draw(prompt=0).json()["error"]["code"] == "model_loading"
        finally:
            there.set()
        wait_for(lambda: one.draw(prompt=0, num_inference_steps=1).status_code == 200, "the model")


def test_names_of_models(folders: dict[str, str], tmp_path: Path) -> None:
    assert named_sources([TOY, "facebook/DiT-XL-2-256"]) == {
        TOY: TOY,
        "facebook/DiT-XL-2-256": "facebook/DiT-XL-2-256",
    }
    (tmp_path / "first").mkdir()
    with pytest.raises(ValueError, match="are both named first; rename one"):
        named_sources([folders["first"], str(tmp_path / "first")])
    with pytest.raises(ValueError, match="There is no folder"):
        named_sources([str(tmp_path / "nothing")])


def test_two_models_draw_at_once(folders: dict[str, str]) -> None:
    with serving(folders) as one:
        wait_for(lambda: one.draw(model="second", prompt=0, num_inference_steps=1).status_code == 200, "the second")
        fields = {"prompt": 3, "num_inference_steps": 5, "seed": 1}
        answers = {name: one.draw(model=name, **fields).json()["data"] for name in ("first", "second")}
        assert answers["first"] != answers["second"]


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_sound_fail_their_class_only(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(in_channels=3, learn_sigma=False)
    with torch.no_grad():
        pipeline.transformer.get_parameter("y_embedder.embedding_table.weight")[4] = torch.nan
    pipeline.save_pretrained(tmp_path / "unsound")
    with serving({"unsound": str(tmp_path / "unsound")}) as one:
        answers: dict[int, Any] = {}

        def ask(label: int) -> None:
            answers[label] = one.draw(prompt=label, num_inference_steps=50, seed=label)

        threads = [threading.Thread(target=ask, args=(label,)) for label in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {label: answer.status_code for label, answer in answers.items()} == {
            label: 500 if label == 4 else 200 for label in range(8)
        }
        assert "not finite" in answers[4].json()["error"]["message"]
        assert answers[4].headers["x-should-retry"] == "false"
        assert one.client.get("/health").status_code == 200


def test_an_engine_that_stops_is_reported_and_nothing_hangs(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(in_channels=3, learn_sigma=False)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = quiet_pipeline(str(tmp_path / "model"))
    gone = threading.Event()

    def fail(*_: Any) -> None:
        if gone.is_set():
            raise RuntimeError("CUDA error: device-side assert triggered")

    loaded.transformer.blocks[0].register_forward_pre_hook(fail)
    with serving({"model": str(tmp_path / "model")}, lambda _: loaded) as one:
        assert one.draw(prompt=0, num_inference_steps=2).status_code == 200
        gone.set()
        for _ in range(20):
            answer = one.draw(prompt=0, num_inference_steps=2)
            assert answer.status_code in (500, 503)
            if answer.json()["error"]["code"] == "engine_stopped":
                break
        else:
            raise AssertionError("the engine did not stop")
        for path in ("/health", "/ready"):
            assert one.client.get(path).status_code == 503
            assert "stopped" in one.client.get(path).json()["error"]["message"]


def test_models_can_be_closed_while_one_is_loaded(folders: dict[str, str]) -> None:
    models = Models(folders, quiet_pipeline)
    models.start()
    models.close()
    wait_for(lambda: not models.is_loading, "the loading to end")
    assert all(one.runner.error is None for one in models.loaded().values())
