"""The parts of a pipeline as ONNX files: the denoiser, plain or hoisted, and the VAE decoder.

Each is written into a component folder with its configuration and the reference to measure a runtime by.
"""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.configuration_dit import DiTConfig
from dit_hub.modeling_dit import DiTTransformer

from .component import CONDITIONER_FILE, GRID_DIMENSIONS, MODEL_FILE, PAIRS_DIMENSION, SETTINGS_FILE
from .graphs import export_graph, positions_of_any_size
from .reference import write_reference

# 23 is the first with an Attention operator, the fastest in ONNX Runtime; 20 has Gelu and runs nearly everywhere.
# torch 2.13 writes invalid files from 26 on.
DEFAULT_OPSET = 23
OPSETS = range(20, 26)

PARTS = ("denoiser", "decoder", "sampler")
DEFAULT_PARTS = ("denoiser", "decoder")

WEIGHT_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# diffusers' upsampling branches at a batch of 64, so the exporter must be told to stay below.
MAX_DECODED = 63

BATCHES = (1, 2, 5)  # of the references
_DECODER_BATCHES = (1, 2)  # pictures of 512 pixels are 3 MB each in the reference


class _Denoiser(nn.Module):
    """The model with plain tensors in and out."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.transformer(hidden_states, timestep, class_labels).sample


class _Conditioner(_Denoiser):
    """What the model makes of timestep and class."""

    def forward(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.transformer.precompute(timestep, class_labels)


class _HoistedDenoiser(_Denoiser):
    """The model without it: the condition comes from `_Conditioner`."""

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        return self.transformer(hidden_states, precomputed=condition).sample


class _Decoder(nn.Module):
    """The decoding half of an `AutoencoderKL`."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def in_float32(module: Any) -> Any:
    """The module itself where it is float32, on the CPU and in evaluation mode; else a copy that is."""
    if module.dtype == torch.float32 and module.device.type == "cpu" and not module.training:
        return module
    return copy.deepcopy(module).float().cpu().eval()


@torch.no_grad()
def write_denoiser(
    transformer: DiTTransformer,
    exported: nn.Module,
    folder: Path,
    opset: int,
    hoist: bool = False,
    dynamic_size: bool = False,
    precision: str = "fp32",
) -> None:
    """Write model.onnx, and conditioner.onnx with `hoist`.

    Args:
        transformer: in float32; the reference is its.
        exported: the same in the precision of the file.
        folder: of the component, there already.
        opset: version of the ONNX operators.
        hoist: leave timestep and class to the conditioner, in float32.
        dynamic_size: accept every height and width that the patches tile.
        precision: that the runtime is told, see `SETTINGS_FILE`.
    """
    config: Any = transformer.config
    config.save_pretrained(folder)
    write_settings(folder, None if dynamic_size else config.sample_height_width, precision, hoist)
    height, width = config.sample_height_width
    patch = config.patch_size
    larger = (height + patch, width + 2 * patch)
    inputs = [denoiser_inputs(config, batch) for batch in BATCHES]
    inputs += [denoiser_inputs(config, 2, larger)] * dynamic_size
    write_reference(folder, [(case, transformer(**case).sample) for case in inputs])

    example = inputs[-1] if dynamic_size else inputs[1]
    dimensions: dict[str, dict[int, Any]] = {name: {0: "batch"} for name in (*example, "condition")}
    if dynamic_size:  # counted in patches, since no other size has a meaning
        grid = {axis + 2: patch * torch.export.Dim(name) for axis, name in enumerate(GRID_DIMENSIONS)}
        dimensions["hidden_states"] |= grid
    with positions_of_any_size() if dynamic_size else contextlib.nullcontext():
        if hoist:
            hidden_states = example.pop("hidden_states")
            pairs = {name: {0: PAIRS_DIMENSION} for name in example}
            export_graph(_Conditioner(transformer), example, pairs, ["condition"], folder / CONDITIONER_FILE, opset)
            example = {"hidden_states": hidden_states, "condition": transformer.precompute(**example)}
        graph = (_HoistedDenoiser if hoist else _Denoiser)(exported)
        export_graph(graph, example, dimensions, ["sample"], folder / MODEL_FILE, opset)


@torch.no_grad()
def write_decoder(
    vae: Any, height_width: tuple[int, int], folder: Path, opset: int, dynamic_size: bool = False
) -> None:
    """Write the decoding half of a float32 `AutoencoderKL` into a component's folder, for one size or every one."""
    vae.save_config(folder)
    write_settings(folder, None if dynamic_size else height_width)
    height, width = height_width

    def latents(batch: int, larger: int = 0) -> Tensor:
        shape = (batch, vae.config.latent_channels, height + larger, width + 2 * larger)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))

    inputs = [*(latents(batch) for batch in _DECODER_BATCHES), *[latents(1, larger=1)] * dynamic_size]
    write_reference(folder, [({"latents": each}, vae.decode(each).sample) for each in inputs])
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch", max=MAX_DECODED)}
    if dynamic_size:
        dimensions |= {axis + 2: name for axis, name in enumerate(GRID_DIMENSIONS)}
    example = {"latents": latents(2, larger=int(dynamic_size))}
    export_graph(_Decoder(vae), example, {"latents": dimensions}, ["sample"], folder / MODEL_FILE, opset)


def write_settings(
    folder: Path, height_width: tuple[int, int] | None, precision: str = "fp32", hoist: bool = False
) -> None:
    """Write `SETTINGS_FILE`: the only size that the file takes, or None for every one, its precision and form."""
    settings = {"height_width": height_width, "precision": precision, "hoist": hoist}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")


def denoiser_inputs(config: DiTConfig, batch: int, height_width: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Random arguments of a forward pass, the same at each call."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, config.in_channels, *(height_width or config.sample_height_width))
    inputs = {"hidden_states": torch.randn(shape, generator=generator)}
    inputs["timestep"] = torch.rand(batch, generator=generator) * 999
    if config.num_classes:
        labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
        # Also the null class, which guidance uses.
        inputs["class_labels"] = (
            labels if config.null_class is None else labels.where(labels % 2 == 0, config.null_class)
        )
    return inputs
