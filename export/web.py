"""Export for browsers: a folder of static files with a page that samples, through onnxruntime-web."""

import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from huggingface_hub import cached_assets_path

from dit_hub.pipeline_dit import DiTPipeline
from dit_hub.schedulers import TableScheduler, default_steps
from dit_hub.solvers import solver_table, starts_from_unit_noise
from dit_hub.tables import COLUMNS

from .component import MODEL_FILE
from .flow import Part, Target, check_output, export, load_pytorch
from .onnx_export import require_onnx
from .parts import Plan
from .reference import Parity

# The npm package that runs the model, its hash, and the files of it that a page needs.
ORT_WEB_VERSION = "1.30.0"
_ORT_WEB_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
_ORT_WEB_FILES = (
    "dist/ort.wasm.min.js",
    "dist/ort-wasm-simd-threaded.mjs",
    "dist/ort-wasm-simd-threaded.wasm",
    "package.json",  # names its licence, MIT
)

# Beside the model: what the page must know.
FACTS_FILE = "facts.json"

# The page divides by an estimate's weight to find it: rounding errors of float32 grow by as much as a later step weighs
# the estimate more than its own step does.
_MOST_SCALED = 100
_B, _C, _EXPONENT = (COLUMNS.index(name) for name in ("b", "c", "exponent"))

# Numbers of steps to choose from, up to those of the training schedule.
_STEPS = (10, 20, 50, 100, 200)


def export_web(
    model: str | os.PathLike | DiTPipeline, output_dir: str | os.PathLike, overwrite: bool = False
) -> Parity:
    """Write a page that samples in the browser: class buttons, steps, seed, and the trajectory as it denoises.

    The folder needs no build and any file server serves it, such as `python -m http.server` or a static Space of the
    Hub. onnxruntime-web is fetched from npm's registry once and kept in the cache of huggingface_hub.

    Args:
        model: a pipeline in PyTorch, or what `DiTPipeline.from_pretrained` takes; with a VAE, this goes into the file.
        output_dir: the new folder.
        overwrite: replace a folder that is there.

    Returns:
        The error of the sampler on ONNX Runtime.

    Raises:
        ValueError: a model that cannot be exported, or that draws latents without a VAE.
        OSError: onnxruntime-web cannot be fetched.
    """
    require_onnx()
    check_output(model, output_dir, overwrite)
    pipeline = load_pytorch(model)
    if pipeline.vae is None and not pipeline.transformer.config.draws_pixels:
        raise ValueError("This model draws latents and has no VAE to make images of them.")
    target = _WebTarget(fetch_onnxruntime_web(), pipeline.origin)
    return export(pipeline, Plan(("sampler",), decode=True), target, output_dir, overwrite)["transformer"]


class _WebTarget(Target):
    """A page beside the file of a sampler, whose error ONNX Runtime measures."""

    def __init__(self, runtime: Path, origin: Any):
        self.runtime, self.origin = runtime, origin

    def build(self, part: Part, folder: Path) -> None:
        if (part.folder / f"{MODEL_FILE}.data").exists():
            raise ValueError("This model is larger than 2 GB, which no browser holds.")
        shutil.copyfile(part.folder / MODEL_FILE, folder.parent / MODEL_FILE)

    def open(self, part: Part, folder: Path) -> None:
        """None: no browser runs here."""

    def describe(self, folder: Path, pipeline: DiTPipeline, parts: dict[str, Part], report: dict[str, Any]) -> None:
        page = resources.files("dit_hub.export") / "page"
        for name in ("index.html", "app.js"):
            (folder / name).write_text((page / name).read_text(encoding="utf-8"), encoding="utf-8")
        shutil.copytree(self.runtime, folder / "ort", copy_function=shutil.copyfile)
        config, tables = pipeline.transformer.config, _tables(pipeline.scheduler)
        facts = {
            "title": self.origin.source if self.origin else "Diffusion Transformer",
            "license": self.origin.license if self.origin else None,
            "names": {index: pipeline.id2label.get(index, str(index)) for index in range(config.num_classes)},
            "null_class": config.null_class,
            "latents": [config.in_channels, *config.sample_height_width],
            "tables": {count: table.tolist() for count, table in tables.items()},
            "default_steps": min(tables, key=lambda count: abs(count - default_steps(pipeline.scheduler))),
        }
        (folder / FACTS_FILE).write_text(json.dumps(facts) + "\n")


def _step_counts(scheduler: Any) -> list[int]:
    if isinstance(scheduler, TableScheduler):
        return scheduler.steps
    trained = scheduler.config.num_train_timesteps
    return [count for count in _STEPS if count <= trained] or [trained]


def _tables(scheduler: Any) -> dict[int, np.ndarray]:
    """Tables by number of steps: those that the page can step with, and DDIM's where there are none."""
    found = {}
    for count in _step_counts(scheduler):
        with contextlib.suppress(ValueError):  # no table expresses it
            table = solver_table(scheduler, count)
            if _runs_in_browsers(table) and starts_from_unit_noise(scheduler, count):
                found[count] = table
    return found or _tables(diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False))


def _runs_in_browsers(table: np.ndarray) -> bool:
    """Whether the page can find each estimate that a step needs from the result of the step that made it."""
    weights = np.concatenate([table[:, [_C]], table[:, len(COLUMNS) :]], axis=1)  # of one step before, two, …
    for step, row in enumerate(table):
        later = [weights[step + back, back - 1] for back in range(1, weights.shape[1] + 1) if step + back < len(table)]
        if max(map(abs, later), default=0.0) > _MOST_SCALED * abs(row[_B]):
            return False
    return not (weights.any() and table[:, _EXPONENT].any())  # the sum takes the place of noise, which is unscaled


def fetch_onnxruntime_web() -> Path:
    """The folder with onnxruntime-web's files, fetched from npm's registry where they are not in the cache.

    npm's own setting of the registry holds: NPM_CONFIG_REGISTRY, or what npm says where it is installed.

    Raises:
        OSError: they cannot be fetched, or are not what was published.
    """
    folder = cached_assets_path("dit-hub", "onnxruntime-web", ORT_WEB_VERSION)
    if all((folder / Path(name).name).is_file() for name in _ORT_WEB_FILES):
        return folder
    url = f"{_npm_registry()}/onnxruntime-web/-/onnxruntime-web-{ORT_WEB_VERSION}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise OSError(
            f"onnxruntime-web {ORT_WEB_VERSION} could not be fetched from npm's registry ({error}); "
            "NPM_CONFIG_REGISTRY names another one."
        ) from error
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != _ORT_WEB_SHA512:
        raise OSError(f"What npm's registry sent is not onnxruntime-web {ORT_WEB_VERSION}: its hash differs.")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in _ORT_WEB_FILES:
            member = archive.extractfile(f"package/{name}")
            assert member is not None  # the hash says so
            building = folder / f".{Path(name).name}.{os.getpid()}"
            building.write_bytes(member.read())
            building.replace(folder / Path(name).name)
    return folder


def _npm_registry() -> str:
    registry = os.environ.get("NPM_CONFIG_REGISTRY")
    if registry is None and shutil.which("npm") is not None:
        command = ["npm", "config", "get", "registry"]
        registry = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return (registry or "https://registry.npmjs.org").rstrip("/")
