"""Pipelines to and from a Hub, over HTTP, with the unmodified client.

The client reads its settings when it is imported, so each person is a process of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.export import export_onnx
from local_hub import TOKEN, LocalHub, local_hub

SAMPLE = """
import json, sys, hashlib, torch
def digest(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe([1, 2], num_inference_steps=3, generator=generator, output_type="np", **options)
    return hashlib.sha256((images.images * 255).round().astype("uint8").tobytes()).hexdigest()
def attempt(function):
    try:
        return function()
    except OSError as error:
        return "OSError: " + str(error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


def person(hub: LocalHub, home: Path, script: str, token: str | None = None, **environment: str) -> dict[str, Any]:
    """Run a script as somebody with a cache of their own; it prints a JSON object last."""
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": os.environ["PATH"],
        **environment,
    }
    if token:
        settings["HF_TOKEN"] = token
    command = [sys.executable, "-c", SAMPLE + script]
    run = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipelines of this module lie before they are pushed."""
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture
def pushed(
    hub: LocalHub,
    folder: Path,
    tmp_path: Path,
    make_model: Callable[..., DiTTransformer],
    make_vae: Callable[..., Any],
) -> dict[str, Any]:
    """A private repository of a latent pipeline with two revisions and a half-precision variant; and an ONNX one."""
    if (folder / "digests.json").exists():
        return json.loads((folder / "digests.json").read_text())
    for seed in (0, 1):
        pipeline = DiTPipeline(make_model(seed=seed, num_classes=1000), DDIMScheduler(clip_sample=False), make_vae())
        pipeline.save_pretrained(folder / str(seed))
    DiTPipeline.from_pretrained(folder / "1", dtype=torch.float16).save_pretrained(folder / "1", variant="fp16")
    export_onnx(folder / "1", folder / "onnx")
    script = f"""
from dit_hub import DiTPipeline
from huggingface_hub import HfApi
first = DiTPipeline.from_pretrained({str(folder / "0")!r})
second = DiTPipeline.from_pretrained({str(folder / "1")!r})
first.push_to_hub("me/tiny-dit", private=True)
HfApi().create_tag("me/tiny-dit", tag="v1")
HfApi().upload_folder(repo_id="me/tiny-dit", folder_path={str(folder / "1")!r})
HfApi().create_repo("me/tiny-onnx")
HfApi().upload_folder(repo_id="me/tiny-onnx", folder_path={str(folder / "onnx")!r})
onnx = DiTPipeline.from_pretrained({str(folder / "onnx")!r})
half = DiTPipeline.from_pretrained({str(folder / "1")!r}, variant="fp16")
print(json.dumps({{"first": digest(first), "second": digest(second), "onnx": digest(onnx), "half": digest(half)}}))
"""
    digests = person(hub, tmp_path, script, TOKEN)
    (folder / "digests.json").write_text(json.dumps(digests))
    return digests


def test_a_pushed_pipeline_draws_the_same_pictures_elsewhere(
    hub: LocalHub, pushed: dict[str, Any], tmp_path: Path
) -> None:
    script = f"""
import dit_hub
from dit_hub import DiTPipeline
from transformers import AutoModel
import diffusers
result = {{"newest": digest(DiTPipeline.from_pretrained("me/tiny-dit"))}}
result["tagged"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", revision="v1"))
result["half"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", variant="fp16"))
result["elsewhere"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", cache_dir={str(tmp_path / "elsewhere")!r}))
result["cached"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", local_files_only=True))
result["stock"] = type(diffusers.DiffusionPipeline.from_pretrained("me/tiny-dit").transformer).__name__
result["auto"] = type(AutoModel.from_pretrained("me/tiny-dit", subfolder="transformer")).__name__
print(json.dumps(result))
"""
    result = person(hub, tmp_path / "home", script, TOKEN)
    expected = {"newest": pushed["second"], "tagged": pushed["first"], "half": pushed["half"]}
    expected |= {"elsewhere": pushed["second"], "cached": pushed["second"]}
    assert result == {**expected, "stock": "DiTTransformer", "auto": "DiTTransformer"}
    assert pushed["first"] != pushed["second"]
    assert (tmp_path / "elsewhere").is_dir()
    offline = 'from dit_hub import DiTPipeline\nprint(json.dumps(digest(DiTPipeline.from_pretrained("me/tiny-dit"))))'
    before = len(hub.requests)
    assert person(hub, tmp_path / "home", offline, HF_HUB_OFFLINE="1") == pushed["second"]
    assert len(hub.requests) == before


def test_an_exported_pipeline_runs_from_the_hub(hub: LocalHub, pushed: dict[str, Any], tmp_path: Path) -> None:
    script = """
from dit_hub import DiTPipeline
pipe = DiTPipeline.from_pretrained("me/tiny-onnx")
print(json.dumps([type(pipe.transformer).__name__, type(pipe.vae).__name__, digest(pipe)]))
"""
    assert person(hub, tmp_path, script) == ["ORTDiTTransformer", "ORTVAEDecoder", pushed["onnx"]]


def test_what_is_not_there_or_not_allowed_is_an_error(hub: LocalHub, pushed: dict[str, Any], tmp_path: Path) -> None:
    script = f"""
from dit_hub import DiTPipeline
load = DiTPipeline.from_pretrained
result = {{"private": attempt(lambda: load("me/tiny-dit"))}}
result["unknown"] = attempt(lambda: load("me/no-such-dit", token={TOKEN!r}))
result["revision"] = attempt(lambda: load("me/tiny-dit", revision="v9", token={TOKEN!r}))
result["token"] = digest(load("me/tiny-dit", token={TOKEN!r}))
print(json.dumps(result))
"""
    result = person(hub, tmp_path, script)
    assert result["token"] == pushed["second"]
    for problem, words in {"private": "me/tiny-dit", "unknown": "me/no-such-dit", "revision": "v9"}.items():
        assert result[problem].startswith("OSError: ")
        assert words in result[problem]


def test_a_download_that_breaks_off_is_completed_by_the_next(
    hub: LocalHub, pushed: dict[str, Any], tmp_path: Path
) -> None:
    script = """
from dit_hub import DiTPipeline
print(json.dumps(digest(DiTPipeline.from_pretrained("me/tiny-dit"))))
"""
    hub.cut_download_after = 20_000
    assert person(hub, tmp_path, script, TOKEN) == pushed["second"]
    assert hub.cut_download_after is None
