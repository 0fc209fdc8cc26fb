"""The export for browsers, in a real one."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dit_hub import DiTPipeline
from dit_hub.export import export_web, verify_export
from dit_hub.solvers import solver_table
from dit_hub.solving import reference_scheduler

from .command_line import dit_hub, python
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
def messages() -> list[str]:
    """The errors and warnings that the page writes to the browser's console."""
    return []


@pytest.fixture(scope="module")
def page(page_folder: Path, messages: list[str]) -> Iterator[Any]:
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
            page = browser.new_context().new_page()
            page.on("console", lambda each: messages.append(each.text) if each.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: pytest.fail(str(error)))
            page.on("requestfailed", lambda request: pytest.fail(f"{request.url} was not served"))
            page.goto(f"http://127.0.0.1:{port}/")
            ready(page)
            yield page
            browser.close()
    finally:
        server.kill()
        server.wait()


def ready(page: Any) -> None:
    page.locator("#status", has_text="Ready").wait_for(timeout=60_000)


def drawn(page: Any, count: int) -> None:
    page.locator("#status", has_text=f"{count} of {count} drawn").wait_for(timeout=60_000)


@contextmanager
def altered(page: Any, changes: dict[str, Any]) -> Iterator[Any]:
    """The page anew, as if these facts had been exported."""

    def answer(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), **changes})

    other = page.context.new_page()
    try:
        other.route("**/facts.json", answer)
        other.goto(page.url)
        ready(other)
        yield other
    finally:
        other.close()


def draw(page: Any, button: str, count: int) -> dict[str, np.ndarray]:
    """Click, wait, and read the images by caption: (16, 16, 3) bytes each."""
    page.click(f"button:text-is('{button}')")
    drawn(page, count)
    images = page.evaluate(
        """() => [...document.querySelectorAll("#images figure")].map((figure) => {
            const canvas = figure.querySelector("canvas");
            const {width, height} = canvas;
            return [figure.dataset.caption, height, width,
                    [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
        })"""
    )
    return {name: np.array(data, np.uint8).reshape(height, width, 4)[..., :3] for name, height, width, data in images}


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


def expected_images(seed: int, table: np.ndarray) -> np.ndarray:
    """(16, 16, 16, 3) bytes: what PyTorch makes of the same noise, with the solver written out."""
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    numbers = normal_numbers(seed)

    def noise() -> torch.Tensor:
        return torch.tensor([next(numbers) for _ in range(3 * 16 * 16)]).view(1, 3, 16, 16).expand(16, -1, -1, -1)

    sample, history = noise(), []
    with torch.no_grad():
        for timestep, p, q, clip, a, b, c, scale, _, *further in torch.from_numpy(table):
            prediction = pipeline.transformer(sample, timestep.expand(16), torch.arange(16)).sample
            estimate = (p * sample + q * prediction).clamp(-clip, clip)
            sample = a * sample + b * estimate + scale * noise()
            sample = sample + sum(weight * earlier for weight, earlier in zip([c, *further], history, strict=False))
            history.insert(0, estimate)
    return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def own_table(steps: int) -> np.ndarray:
    return solver_table(DiTPipeline.from_pretrained("dit-toy-shapes").scheduler, steps)


@needs_chromium
@pytest.mark.parametrize("name", ["unipc", "dpm++ 3", "sde", "second-order"])
def test_solvers_that_remember_draw_as_in_python(page: Any, name: str) -> None:
    own = DiTPipeline.from_pretrained("dit-toy-shapes").scheduler
    dpm = diffusers.DPMSolverMultistepScheduler
    table = {
        "unipc": lambda: solver_table(diffusers.UniPCMultistepScheduler.from_config(own.config, solver_order=3), 8),
        "dpm++ 3": lambda: solver_table(dpm.from_config(own.config, solver_order=3), 8),
        "sde": lambda: solver_table(dpm.from_config(own.config, algorithm_type="sde-dpmsolver++"), 8),
        "second-order": lambda: reference_scheduler(own, 8).table,
    }[name]()
    with altered(page, {"tables": {"8": table.tolist()}, "default_steps": 8}) as other:
        image = draw(other, "blue-cross", 1)["blue-cross"]
    assert np.abs(image.astype(int) - expected_images(0, table)[11]).max() <= 2


@needs_chromium
def test_every_class_is_drawn_as_python_draws_it(page: Any) -> None:
    names = list(DiTPipeline.from_pretrained("dit-toy-shapes").id2label.values())
    images = draw(page, "all", 16)
    assert list(images) == names
    expected = expected_images(0, own_table(50))
    for image, wanted in zip(images.values(), expected, strict=True):
        assert np.abs(image.astype(int) - wanted).max() <= 2
    assert page.locator("#trajectory figure").count() == 11


@needs_chromium
def test_steps_and_seed_are_chosen_on_the_page(page: Any) -> None:
    page.select_option("#steps", "10")
    page.fill("#seed", "7")
    image = draw(page, "blue-cross", 1)["blue-cross"]
    assert np.abs(image.astype(int) - expected_images(7, own_table(10))[11]).max() <= 2
    page.fill("#seed", "8")
    assert np.abs(draw(page, "blue-cross", 1)["blue-cross"].astype(int) - image).max() > 10


@needs_chromium
def test_the_browser_has_nothing_to_complain_of(page: Any, messages: list[str]) -> None:
    draw(page, "red-circle", 1)
    assert messages == []


@needs_chromium
def test_the_keyboard_is_enough_and_keeps_its_place(page: Any) -> None:
    page.select_option("#steps", "10")
    page.focus("button:text-is('green-square')")
    for key in ("Enter", "Space"):
        page.keyboard.press(key)
        drawn(page, 1)
        assert page.evaluate("document.activeElement.textContent") == "green-square"
        page.evaluate("document.getElementById('status').textContent = ''")
    page.evaluate("[1, 2].forEach(() => document.activeElement.click())")  # the second finds it disabled
    drawn(page, 1)
    assert page.locator("#images figure").count() == 1


@needs_chromium
def test_many_classes_are_a_list_for_the_keyboard(page: Any) -> None:
    names = {index: f"class {index}" for index in range(60)}
    with altered(page, {"names": names}) as other:
        other.select_option("#steps", "10")
        other.get_by_label("Class").focus()
        other.keyboard.type("class 3")
        other.keyboard.press("Tab")
        other.keyboard.press("Enter")
        drawn(other, 1)
        assert other.locator("#images figure").get_attribute("data-caption") == "class 3"
        assert other.evaluate("document.activeElement.textContent") == "draw"


@needs_chromium
def test_a_seed_that_is_none_is_one_sentence(page: Any) -> None:
    page.select_option("#steps", "10")
    page.fill("#seed", "4294967295")
    draw(page, "red-circle", 1)
    for text in ("-1", "1.5", "99999999999", "4294967296", ""):
        page.fill("#seed", text)
        page.click("button:text-is('red-circle')")
        assert page.inner_text("#status") == "The seed must be a whole number from 0 to 4294967295."
        assert page.evaluate("document.activeElement.id") == "seed"
        assert page.locator("#images figure").count() == 1  # what was drawn stays
    page.fill("#seed", "0")
    draw(page, "red-circle", 1)


@needs_chromium
def test_a_guidance_that_is_none_is_one_sentence(page: Any) -> None:
    with altered(page, {"null_class": 15}) as other:
        for text in ("-1", "1e39", ""):
            other.fill("#guidance", text)
            other.click("button:text-is('red-circle')")
            assert other.inner_text("#status") == "Guidance must be a number from 0 to 100."


@needs_chromium
def test_without_a_server_the_page_says_so(page: Any, page_folder: Path) -> None:
    other = page.context.new_page()
    other.goto((page_folder / "index.html").as_uri())
    assert "needs a file server: run “python -m http.server” in its folder" in other.inner_text("#status")
    other.close()


@needs_chromium
def test_a_missing_file_is_one_sentence(page: Any) -> None:
    for name in ("facts.json", "model.onnx", "ort/ort.wasm.min.js"):
        other = page.context.new_page()
        other.route(f"**/{name}", lambda route: route.fulfill(status=404, body="gone"))
        other.goto(page.url)
        other.locator("#status", has_text="does not load").wait_for(timeout=60_000)
        assert name in other.inner_text("#status")
        other.close()


def test_the_folder_is_whole_and_names_no_other_host(page_folder: Path) -> None:
    texts = [(page_folder / name).read_text() for name in ("index.html", "app.js", "facts.json")]
    assert not any("http:" in text or "https:" in text for text in texts)
    assert json.loads(texts[2])["license"] == "apache-2.0"
    with pytest.raises(ValueError, match="is a page for browsers, which holds no reference"):
        verify_export(page_folder)
    assert json.loads((page_folder / "ort" / "package.json").read_text())["license"] == "MIT"


def test_a_guided_latent_model_has_its_decoder_in_the_file(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    assert export_web(make_pipeline(latent=True), tmp_path / "page").relative_error < 1e-4
    facts = json.loads((tmp_path / "page" / "facts.json").read_text())
    assert (facts["null_class"], facts["latents"], facts["names"]["3"]) == (10, [4, 8, 8], "3")
    with pytest.raises(ValueError, match="draws latents and has no VAE"):
        export_web(make_pipeline(), tmp_path / "other")


def test_without_the_registry_it_is_one_sentence(tmp_path: Path) -> None:
    script = (
        f"import huggingface_hub.constants\nhuggingface_hub.constants.HF_ASSETS_CACHE = {str(tmp_path / 'cache')!r}\n"
        "import sys\nsys.argv[1:] = ['export', 'web', 'dit-toy-shapes', 'page']\nfrom dit_hub.cli import main\nmain()\n"
    )
    nowhere = os.environ | {"NPM_CONFIG_REGISTRY": "http://127.0.0.1:9"}
    run = python("-c", script, cwd=tmp_path, environment=nowhere)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "could not be fetched from npm's registry" in run.stderr
    assert not (tmp_path / "page").exists()
