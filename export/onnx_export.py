"""Export to ONNX: a pipeline folder that runs on ONNX Runtime, checked against PyTorch before it appears."""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.extras import require
from dit_hub.files import check_free, new_folder
from dit_hub.pipeline_dit import DiTPipeline

from .component import CONDITIONER_FILE, OnnxDenoiser
from .graphs import MAX_RELATIVE_ERROR, Parity, export_graph, in_float32, measure_parity
from .openvino import RUNTIME_FILE, OpenVINODiTTransformer
from .ort import ORTDiTTransformer, ORTSampler, ORTVAEDecoder
from .quantize import quantize_int8
from .sampler import export_sampler

# 23 is the first with an Attention operator, the fastest in ONNX Runtime; 20 has Gelu and runs nearly everywhere.
# torch 2.13 writes invalid files from 26 on.
DEFAULT_OPSET = 23
OPSETS = range(20, 26)

PARTS = ("denoiser", "decoder", "sampler")
DEFAULT_PARTS = ("denoiser", "decoder")

# What runs the denoiser, and its precisions there.
RUNTIMES: dict[str, type[OnnxDenoiser]] = {"onnxruntime": ORTDiTTransformer, "openvino": OpenVINODiTTransformer}
PRECISIONS = {"onnxruntime": ("fp32", "fp16", "int8"), "openvino": ("fp32", "bf16")}

_PARITY_BATCHES = (1, 2, 5)


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
        return self.transformer.condition(timestep, class_labels)


class _HoistedDenoiser(_Denoiser):
    """The model without it: the condition comes from `_Conditioner`."""

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        return self.transformer(hidden_states, condition=condition).sample


class _Decoder(nn.Module):
    """The decoding half of an `AutoencoderKL`."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def export_onnx(
    model: str | os.PathLike | DiTPipeline,
    output_dir: str | os.PathLike,
    parts: Sequence[str] = DEFAULT_PARTS,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    hoist: bool = False,
    runtime: str = "onnxruntime",
    decode: bool = False,
    max_error: float | None = None,
    overwrite: bool = False,
) -> dict[str, Parity]:
    """Export a pipeline to ONNX.

    The result is a pipeline folder again: `DiTPipeline.from_pretrained(output_dir)` runs it on ONNX Runtime. Every
    graph has passed onnx.checker, shape inference and a comparison with PyTorch, which report.json records.

    Args:
        model: a pipeline, or what `DiTPipeline.from_pretrained` takes.
        output_dir: the new folder; it appears only when all checks have passed.
        parts: of `PARTS`, or "all". "denoiser": one pass. "decoder": the VAE's, where there is one. "sampler": the
            whole loop in one file, in the folder sampler, or, without the denoiser, as the pipeline's transformer.
        precision: of the denoiser's weights and products, of `PRECISIONS`. "fp16" keeps the modulation, the gates and
            the residual sum in float32; "int8" quantises while it runs, but for the modulation, the first and the last
            layer; "bf16" leaves the file as it is and tells OpenVINO. The decoder and the sampler are float32.
        opset: version of the ONNX operators, 20 to 25; the sampler's is always 20.
        hoist: leave what depends on timestep and class alone to a file of its own, conditioner.onnx, a third of the
            weights of an adaLN model. The pipeline then computes it for all steps ahead, in float32.
        runtime: of the denoiser, "onnxruntime" or "openvino". The others run on ONNX Runtime.
        decode: put the VAE into the sampler's file, so that it draws pictures; models of pixels always do.
        max_error: bound of the relative error in place of that of `MAX_RELATIVE_ERROR`.
        overwrite: replace a folder that is there.

    Returns:
        The errors of each exported component.

    Raises:
        ValueError: an unknown part, precision or opset, a full output folder, or an error above the bound.
        ImportError: the extra "onnx" is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    if runtime not in RUNTIMES:
        raise ValueError(f"There is no runtime {runtime!r}; known: {', '.join(RUNTIMES)}.")
    if runtime == "openvino":
        require("openvino", "openvino")
    chosen = PARTS if tuple(parts) == ("all",) else tuple(parts)
    if unknown := [part for part in chosen if part not in PARTS]:
        raise ValueError(f"There is no part {unknown[0]!r}; known: {', '.join(PARTS)}, all.")
    if precision not in PRECISIONS[runtime]:
        known = ", ".join(PRECISIONS[runtime])
        raise ValueError(f"{runtime} does not run {precision!r} on a processor; it runs {known}.")
    if opset not in OPSETS:
        raise ValueError(f"opset must lie between {OPSETS[0]} and {OPSETS[-1]}, not {opset}.")
    if not {"denoiser", "sampler"} & set(chosen):
        raise ValueError("Without a denoiser or a sampler there is no pipeline; add one to the parts.")
    check_free(output_dir, overwrite)
    pipeline: DiTPipeline = model if isinstance(model, DiTPipeline) else DiTPipeline.from_pretrained(model)
    if not isinstance(pipeline.transformer, nn.Module):
        raise ValueError(f"Only a PyTorch model can be exported, not {type(pipeline.transformer).__name__}.")

    bound = MAX_RELATIVE_ERROR[precision] if max_error is None else max_error
    exact = MAX_RELATIVE_ERROR["fp32"] if max_error is None else max_error
    report: dict[str, Parity] = {}
    with new_folder(output_dir, overwrite) as folder:
        transformer = decoder = None
        if "denoiser" in chosen:
            report["transformer"] = _export_denoiser(
                pipeline, folder / "transformer", opset, precision, hoist, RUNTIMES[runtime], bound
            )
            transformer = RUNTIMES[runtime].from_pretrained(folder / "transformer")
        if "decoder" in chosen and pipeline.vae is not None:
            report["vae"] = _export_decoder(pipeline, folder / "vae", opset, exact)
            decoder = ORTVAEDecoder.from_pretrained(folder / "vae")
        if "sampler" in chosen:
            place = "transformer" if transformer is None else "sampler"
            report["sampler"] = export_sampler(pipeline, folder / place, decode, exact)
            transformer = transformer or ORTSampler.from_pretrained(folder / place)
        exported = DiTPipeline(transformer, pipeline.scheduler, decoder, pipeline.id2label)
        exported.save_pretrained(folder)
        pipeline.save_facts(folder)  # the licence goes where the weights go
        settings = {"opset": opset, "precision": precision, "hoist": hoist, "runtime": runtime}
        settings["max_relative_error"] = bound
        entries = {name: asdict(parity) for name, parity in report.items()}
        (folder / "report.json").write_text(json.dumps({**settings, "parity": entries}, indent=2) + "\n")
    return report


@torch.no_grad()
def _export_denoiser(
    pipeline: DiTPipeline,
    folder: Path,
    opset: int,
    precision: str,
    hoist: bool,
    runtime: type[OnnxDenoiser],
    bound: float,
) -> Parity:
    transformer = in_float32(pipeline.transformer)
    config = transformer.config
    folder.mkdir()
    config.save_pretrained(folder)

    def inputs(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch)
        latents = torch.randn(batch, config.in_channels, *config.sample_height_width, generator=generator)
        arguments = {"hidden_states": latents, "timestep": torch.rand(batch, generator=generator) * 999}
        if config.num_classes:
            labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
            # Also the null class, which guidance uses.
            arguments["class_labels"] = (
                labels if config.null_class is None else labels.where(labels % 2 == 0, config.null_class)
            )
        return arguments

    # The model itself keeps modulation, gates and residual sum in float32 whatever its weights are.
    exported: Any = copy.deepcopy(transformer).half() if precision == "fp16" else transformer
    if hoist:
        conditions = inputs(2)
        latents = conditions.pop("hidden_states")
        conditioner = _Conditioner(transformer)
        export_graph(conditioner, conditions, _batched(conditions), ["condition"], folder, opset, file=CONDITIONER_FILE)
        example = {"hidden_states": latents, "condition": transformer.condition(**conditions)}
        path = export_graph(_HoistedDenoiser(exported), example, _batched(example), ["sample"], folder, opset)
    else:
        path = export_graph(_Denoiser(exported), inputs(2), _batched(inputs(2)), ["sample"], folder, opset)
    if precision == "int8":
        quantize_int8(path)
    if runtime is OpenVINODiTTransformer:
        (folder / RUNTIME_FILE).write_text(json.dumps({"precision": precision}) + "\n")
    loaded = runtime.from_pretrained(folder)
    batches = [inputs(batch) for batch in _PARITY_BATCHES]
    pairs = [(transformer(**batch).sample, loaded(**batch).sample) for batch in batches]
    return measure_parity("transformer", pairs, bound)


def _batched(inputs: dict[str, Tensor]) -> dict[str, dict[int, str]]:
    """The batch is dynamic in every input."""
    return {name: {0: "batch"} for name in inputs}


@torch.no_grad()
def _export_decoder(pipeline: DiTPipeline, folder: Path, opset: int, bound: float) -> Parity:
    vae = in_float32(pipeline.vae)
    vae.save_config(folder)
    height_width = pipeline.transformer.config.sample_height_width

    def latents(batch: int) -> Tensor:
        shape = (batch, vae.config.latent_channels, *height_width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))

    # diffusers' upsampling branches at a batch of 64, so the exporter must be told to stay below.
    example = {"latents": latents(2)}
    export_graph(_Decoder(vae), example, _batched(example), ["sample"], folder, opset, max_batch=63)
    runtime = ORTVAEDecoder.from_pretrained(folder)
    batches = [latents(batch) for batch in _PARITY_BATCHES]
    pairs = [(vae.decode(batch).sample, runtime.decode(batch).sample) for batch in batches]
    return measure_parity("vae", pairs, bound)
