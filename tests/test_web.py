"""The export for browsers, in a real one."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_hub import DiTPipeline
from dit_hub.export import export_web
from dit_hub.solvers import solver_table

from .command_line import dit_hub
from .conftest import MakePipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="waits for Chromium (apt install chromium)")


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "page"
    run = dit_hub("export", "web", "dit-toy-shapes", "page", cwd=folder.parent)
    assert run.returncode == 0, run.stderr
    assert "-m http.server --directory page" in run.stdout
    return folder


@pytest.fixture(scope="module")
def page(page_folder: Path) -> Iterator[Any]:
    """The page in headless Chromium, served as the command's output says."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", page_folder]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().split("port ")[1].split()[0]
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
            page = browser.new_page()
            page.on("pageerror", lambda error: pytest.fail(str(error)))
            page.on("requestfailed", lambda request: pytest.fail(f"{request.url} was not served"))
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("document.getElementById('status').textContent === 'Ready'", timeout=60_000)
            yield page
            browser.close()
    finally:
        server.kill()
        server.wait()


def draw(page: Any, button: str, count: int) -> dict[str, np.ndarray]:
    """Click, wait, and read the pictures by caption: (16, 16, 3) bytes each."""
    page.click(f"button:text-is('{button}')")
    page.wait_for_function(f"document.getElementById('status').textContent.startsWith('{count} of {count} drawn')",
                           timeout=60_000)  # fmt: skip
    pictures = page.evaluate(
        """() => [...document.querySelectorAll("#pictures figure")].map((figure) => {
            const canvas = figure.querySelector("canvas");
            const {width, height} = canvas;
            return [figure.dataset.caption, height, width,
                    [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
        })"""
    )
    return {name: np.array(data, np.uint8).reshape(height, width, 4)[..., :3] for name, height, width, data in pictures}


def normal_numbers(seed: int) -> Iterator[float]:
    """As the page draws them: mulberry32, then Box and Muller."""
    state, mask = seed, 2**32 - 1

    def uniform() -> float:
        nonlocal state
        state = (state + 0x6D2B79F5) & mask
        mixed = (state ^ (state >> 15)) * (state | 1) & mask
        mixed ^= (mixed + ((mixed ^ (mixed >> 7)) * (mixed | 61) & mask)) & mask
        return (mixed ^ (mixed >> 14)) / 2**32

    while True:
        radius = math.sqrt(-2 * math.log(1 - uniform()))
        yield radius * math.cos(2 * math.pi * uniform())


def expected_pictures(seed: int, steps: int) -> np.ndarray:
    """(16, 16, 16, 3) bytes: what PyTorch makes of the same noise, with the solver written out."""
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    numbers = normal_numbers(seed)

    def noise() -> torch.Tensor:
        return torch.tensor([next(numbers) for _ in range(3 * 16 * 16)]).view(1, 3, 16, 16).expand(16, -1, -1, -1)

    sample = noise()
    with torch.no_grad():
        for timestep, p, q, clip, a, b, _, scale, _ in torch.from_numpy(solver_table(pipeline.scheduler, steps)):
            prediction = pipeline.transformer(sample, timestep.expand(16), torch.arange(16)).sample
            estimate = (p * sample + q * prediction).clamp(-clip, clip)
            sample = a * sample + b * estimate + scale * noise()
    return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@needs_chromium
def test_every_class_is_drawn_as_python_draws_it(page: Any) -> None:
    names = list(DiTPipeline.from_pretrained("dit-toy-shapes").id2label.values())
    pictures = draw(page, "all", 16)
    assert list(pictures) == names
    expected = expected_pictures(seed=0, steps=50)
    for picture, wanted in zip(pictures.values(), expected, strict=True):
        assert np.abs(picture.astype(int) - wanted).max() <= 2
    assert page.locator("#trajectory figure").count() == 11


@needs_chromium
def test_steps_and_seed_are_chosen_on_the_page(page: Any) -> None:
    page.select_option("#steps", "10")
    page.fill("#seed", "7")
    picture = draw(page, "blue-cross", 1)["blue-cross"]
    assert np.abs(picture.astype(int) - expected_pictures(seed=7, steps=10)[11]).max() <= 2
    page.fill("#seed", "8")
    assert np.abs(draw(page, "blue-cross", 1)["blue-cross"].astype(int) - picture).max() > 10


def test_the_folder_is_whole_and_names_no_other_host(page_folder: Path) -> None:
    texts = [(page_folder / name).read_text() for name in ("index.html", "app.js", "facts.json")]
    assert not any("http:" in text or "https:" in text for text in texts)
    assert json.loads(texts[2])["license"] == "apache-2.0"
    assert json.loads((page_folder / "ort" / "package.json").read_text())["license"] == "MIT"


def test_a_guided_latent_model_has_its_decoder_in_the_file(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    assert export_web(make_pipeline(latent=True), tmp_path / "page").relative_error < 1e-4
    facts = json.loads((tmp_path / "page" / "facts.json").read_text())
    assert (facts["null_class"], facts["latents"], facts["names"]["3"]) == (10, [4, 8, 8], "3")
    with pytest.raises(ValueError, match="draws latents and has no VAE"):
        export_web(make_pipeline(), tmp_path / "other")


def test_without_the_registry_it_is_one_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"NPM_CONFIG_REGISTRY": "http://127.0.0.1:9", "HF_ASSETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "dit_hub.cli", "export", "web", "dit-toy-shapes", "page"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "could not be fetched from npm's registry" in run.stderr
    assert not (tmp_path / "page").exists()
