"""Fixtures shared by the tests: the official code's numbers, and small models with random weights."""

import gc
import os
import shutil

# Read when the libraries are imported. Nothing in the tests needs the Hub itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# The models are so small that more threads only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of checkpoints wait for the disk, each twice; memory does not make them wait.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dit_hub import DiTConfig, DiTTransformer
from traced import VARIABLE, trace_once

PYTORCHS_EXPORT = torch.onnx.export

GOLDEN_FOLDER = Path(__file__).parent / "golden"

# What the official code calls the fields of `DiTConfig`.
OFFICIAL_NAMES = {"input_size": "sample_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_classes": 10,
    "timestep_freq_dim": 32,
}


# Of the embedded model's data, and so small that a step takes milliseconds.
SMALL_MODEL: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 8,
    "in_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_classes": 16,
    "learn_sigma": False,
}

# The noise of the embedded model, for recipes that go on from it.
TOYS_NOISE: dict[str, Any] = {"beta_start": 5e-4, "beta_end": 0.1}
TOYS_NOISE_SETTINGS = [f"{name}={value}" for name, value in TOYS_NOISE.items()]


@dataclass(frozen=True)
class Golden:
    """A model of the official code with random weights, and what that code computed with it.

    `expected` holds inputs and outputs, named after the test they belong to: "forward.x", "ddpm.out".
    `config` holds the fields of `DiTConfig`, `weights` the official state dict.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    expected: dict[str, Tensor]

    def model(self, **overrides: Any) -> DiTTransformer:
        """Our model with the official weights; `overrides` are fields of the config."""
        model = DiTTransformer(DiTConfig(**{**self.config, **overrides})).eval()
        model.load_state_dict({name: weight for name, weight in self.weights.items() if name != "pos_embed"})
        return model

    def inputs(self, test: str) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and labels of a test."""
        return self.expected[f"{test}.x"], self.expected[f"{test}.t"], self.expected[f"{test}.y"]


def load_golden(name: str) -> Golden:
    folder = GOLDEN_FOLDER / name
    arguments = json.loads((folder / "official_args.json").read_text())
    return Golden(
        folder=folder,
        config={OFFICIAL_NAMES.get(key) or key: value for key, value in arguments.items()},
        weights=torch.load(folder / "released.pt", weights_only=True),
        expected=load_file(folder / "expected.safetensors"),
    )


def small_vae(**fields: Any) -> Any:
    """A small random VAE: 4 latent channels, 2 pixels per latent pixel; `fields` are of its config."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    small: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**{**small, **fields}).eval()


@pytest.fixture(scope="session", params=["dit_a", "dit_b"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each official model in turn: `dit_a` learns the variance of 4 channels, `dit_b` has 3 channels and none."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def golden_a() -> Golden:
    """The official model that learns its variance."""
    return load_golden("dit_a")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DiTTransformer]:
    """A function (seed, fields of the config) -> small model with random weights, in evaluation mode."""

    def make(seed: int = 0, **fields: Any) -> DiTTransformer:
        model = DiTTransformer(DiTConfig(**{**TINY, **fields})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # a fresh model predicts zero, which would hide mistakes
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def make_vae() -> Callable[..., Any]:
    """The function `small_vae`."""
    return small_vae


MakePipeline = Callable[..., Any]


@pytest.fixture(scope="session")
def make_pipeline(make_model: Callable[..., DiTTransformer], make_vae: Callable[..., Any]) -> MakePipeline:
    """A function (latent: with a VAE?, scheduler, fields of the config) -> pipeline with random weights."""
    from diffusers import DDIMScheduler

    from dit_hub import DiTPipeline

    def make(latent: bool = False, scheduler: Any = None, **fields: Any) -> DiTPipeline:
        vae = make_vae() if latent else None
        return DiTPipeline(make_model(**fields), scheduler or DDIMScheduler(clip_sample=False), vae)

    return make


def pytest_collection_finish() -> None:
    """Have the garbage collector leave the libraries alone: 10 % of the time of an export."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each graph is traced once by all workers; see traced.py."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "traced"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", trace_once(torch.onnx.export, folder))
        patch.setenv(VARIABLE, str(folder))
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from other tests."""
    monkeypatch.setattr(torch.onnx, "export", PYTORCHS_EXPORT)
    monkeypatch.delenv(VARIABLE)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
