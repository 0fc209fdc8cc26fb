"""The denoiser and the VAE decoder as ONNX files, each in a component's folder with its configuration and reference."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.configuration_dit import DiTConfig
from dit_hub.modeling_dit import DiTTransformer

from .component import CONDITIONER_FILE, GRID, MODEL_FILE, PAIRS, SETTINGS_FILE
from .graphs import export_graph, positions_of_any_size
from .reference import MAX_RELATIVE_ERROR, Case, write_reference

# 23 is the first with an Attention operator, the fastest in ONNX Runtime; 20 has Gelu and runs nearly everywhere.
# torch 2.13 writes invalid files from 26 on.
DEFAULT_OPSET = 23
OPSETS = range(20, 26)

PARTS = ("denoiser", "decoder", "sampler")
DEFAULT_PARTS = ("denoiser", "decoder")

# diffusers' upsampling branches at a batch of 64, so the exporter must be told to stay below.
MAX_DECODED = 63

BATCHES = (1, 2, 5)  # of the references
_DECODER_BATCHES = (1, 2)  # images of 512 pixels are 3 MB each in the reference


@dataclass(frozen=True)
class Plan:
    """What to export and how to write its ONNX files: arguments of `export_onnx`, and what targets choose."""

    parts: tuple[str, ...]
    precision: str = "fp32"  # in which the denoiser computes
    weights: str = "fp32"  # of the files; a runtime may compute in another precision than it reads
    static: bool = False
    opset: int = DEFAULT_OPSET
    # Attention as one operator (opset 23) does not build inside a loop in TensorRT, and Scan does not run in OpenVINO;
    # a Loop of opset 20 runs everywhere.
    sampler_opset: int = 20
    precompute: bool = False
    dynamic_size: bool = False
    decode: bool = False
    images: bool = True  # whether a sampler returns images where it can, beside latents
    max_error: float | None = None

    def bound(self, part: str) -> float:
        """The largest relative error of a part."""
        precision = {"denoiser": self.precision, "sampler": self.weights, "decoder": "fp32"}[part]
        return MAX_RELATIVE_ERROR[precision] if self.max_error is None else self.max_error


class _Denoiser(nn.Module):
    """The model with plain tensors in and out; `condition` comes from `_Conditioner`."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, class_labels: Any = None, condition: Any = None
    ) -> Any:
        return self.transformer(hidden_states, timestep, class_labels, precomputed=condition).sample


class _Conditioner(_Denoiser):
    """The part of the model that depends on timestep and class alone."""

    def forward(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.transformer.precompute(timestep, class_labels)


class _Decoder(nn.Module):
    """The decoding half of an `AutoencoderKL`."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


@torch.no_grad()
def write_denoiser(transformer: DiTTransformer, exported: nn.Module, folder: Path, plan: Plan) -> None:
    """Write model.onnx, and conditioner.onnx where the modulation is precomputed, in float32.

    Args:
        transformer: in float32; it computes the reference.
        exported: the same in the precision of the file.
        folder: of the component, there already.
        plan: how to write it.
    """
    config: Any = transformer.config
    height, width = config.sample_height_width
    patch = config.patch_size
    inputs = [denoiser_inputs(config, batch) for batch in BATCHES]
    if plan.dynamic_size:
        inputs.append(denoiser_inputs(config, 2, (height + patch, width + 2 * patch)))
    config.save_pretrained(folder)
    size = None if plan.dynamic_size else (height, width)
    cases = [(case, transformer(**case).sample) for case in inputs]
    write_facts(folder, cases, size, precision=plan.precision, precompute=plan.precompute)

    example = inputs[-1] if plan.dynamic_size else inputs[1]
    dimensions: dict[str, dict[int, Any]] = {name: {0: "batch"} for name in (*example, "condition")}
    if plan.dynamic_size:  # counted in patches, since no other size has a meaning
        dimensions["hidden_states"] |= {axis: patch * torch.export.Dim(name) for axis, name in enumerate(GRID, start=2)}
    with positions_of_any_size() if plan.dynamic_size else contextlib.nullcontext():
        if plan.precompute:
            latents = {"hidden_states": example.pop("hidden_states")}
            pairs = {name: {0: PAIRS} for name in example}
            path = folder / CONDITIONER_FILE
            export_graph(_Conditioner(transformer), example, pairs, ["condition"], path, plan.opset)
            example = {**latents, "condition": transformer.precompute(**example)}
        export_graph(_Denoiser(exported), example, dimensions, ["sample"], folder / MODEL_FILE, plan.opset)


@torch.no_grad()
def write_decoder(vae: Any, height_width: tuple[int, int], folder: Path, plan: Plan) -> None:
    """Write model.onnx with the decoding half of a float32 `AutoencoderKL`, for one size or every one."""
    height, width = height_width

    def latents(batch: int, larger: int = 0) -> Tensor:
        shape = (batch, vae.config.latent_channels, height + larger, width + 2 * larger)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))

    inputs = [*(latents(batch) for batch in _DECODER_BATCHES), *[latents(1, larger=1)] * plan.dynamic_size]
    vae.save_config(folder)
    cases = [({"latents": each}, vae.decode(each).sample) for each in inputs]
    write_facts(folder, cases, None if plan.dynamic_size else height_width)
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch", max=MAX_DECODED)}
    if plan.dynamic_size:
        dimensions |= dict(enumerate(GRID, start=2))
    example = {"latents": latents(2, larger=int(plan.dynamic_size))}
    export_graph(_Decoder(vae), example, {"latents": dimensions}, ["sample"], folder / MODEL_FILE, plan.opset)


def write_facts(folder: Path, cases: Sequence[Case], height_width: tuple[int, int] | None, **settings: Any) -> None:
    """Write what lies beside a part's files: its reference, and `SETTINGS_FILE` with the only size that it takes."""
    (folder / SETTINGS_FILE).write_text(json.dumps({"height_width": height_width, **settings}) + "\n")
    write_reference(folder, cases)


def denoiser_inputs(config: DiTConfig, batch: int, height_width: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Random arguments of a forward pass, the same at each call."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, config.in_channels, *(height_width or config.sample_height_width))
    inputs = {"hidden_states": torch.randn(shape, generator=generator)}
    inputs["timestep"] = torch.rand(batch, generator=generator) * 999
    if config.num_classes:
        labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
        # Also the null class, which guidance uses.
        null = config.null_class
        inputs["class_labels"] = labels if null is None else labels.where(labels % 2 == 0, null)
    return inputs
