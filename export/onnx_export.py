"""Export to ONNX: a pipeline folder that runs on ONNX Runtime, checked against PyTorch before it appears."""

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.extras import require
from dit_hub.files import check_free, new_folder
from dit_hub.modeling_dit import DiTAttention
from dit_hub.pipeline_dit import DiTPipeline

from .ort import MODEL_FILE, ORTDiTTransformer, ORTVAEDecoder

# 23 is the first with an Attention operator, the fastest in ONNX Runtime; 20 has Gelu and runs nearly everywhere.
# torch 2.13 writes invalid files from 26 on.
DEFAULT_OPSET = 23
OPSETS = range(20, 26)

MAX_RELATIVE_ERROR = 1e-4
_PARITY_BATCHES = (1, 2, 5)
_LARGEST_PROTOBUF = 2**31 - 2**24  # 2 GiB, less room for the graph itself


@dataclass(frozen=True)
class Parity:
    """How far a runtime is from PyTorch on random inputs.

    Args:
        relative_error: largest L2 distance over L2 norm, of all batches tried.
        max_abs_error: largest difference of one value.
        batch_sizes: the batches tried.
    """

    relative_error: float
    max_abs_error: float
    batch_sizes: tuple[int, ...]


class _Denoiser(nn.Module):
    """The model with plain tensors in and out."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.transformer(hidden_states, timestep, class_labels).sample


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
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> dict[str, Parity]:
    """Export a pipeline to ONNX.

    The result is a pipeline folder again: `DiTPipeline.from_pretrained(output_dir)` runs it on ONNX Runtime. Every
    graph has passed onnx.checker, shape inference and a comparison with PyTorch, which report.json records.

    Args:
        model: a pipeline, or what `DiTPipeline.from_pretrained` takes.
        output_dir: the new folder; it appears only when all checks have passed.
        opset: version of the ONNX operators, 20 to 25.
        overwrite: replace a folder that is there.

    Returns:
        The errors of each exported component.

    Raises:
        ValueError: an unknown opset, a full output folder, or an error above `MAX_RELATIVE_ERROR`.
        ImportError: the extra "onnx" is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    if opset not in OPSETS:
        raise ValueError(f"opset must lie between {OPSETS[0]} and {OPSETS[-1]}, not {opset}.")
    check_free(output_dir, overwrite)
    pipeline: DiTPipeline = model if isinstance(model, DiTPipeline) else DiTPipeline.from_pretrained(model)
    if not isinstance(pipeline.transformer, nn.Module):
        raise ValueError(f"Only a PyTorch model can be exported, not {type(pipeline.transformer).__name__}.")

    with new_folder(output_dir, overwrite) as folder:
        report = {"transformer": _export_denoiser(pipeline, folder / "transformer", opset)}
        decoder = None
        if pipeline.vae is not None:
            report["vae"] = _export_decoder(pipeline, folder / "vae", opset)
            decoder = ORTVAEDecoder.from_pretrained(folder / "vae")
        exported = DiTPipeline(
            ORTDiTTransformer.from_pretrained(folder / "transformer"), pipeline.scheduler, decoder, pipeline.id2label
        )
        exported.save_pretrained(folder)
        pipeline.save_facts(folder)  # the licence goes where the weights go
        settings = {"opset": opset, "precision": "fp32", "max_relative_error": MAX_RELATIVE_ERROR}
        entries = {name: asdict(parity) for name, parity in report.items()}
        (folder / "report.json").write_text(json.dumps({**settings, "parity": entries}, indent=2) + "\n")
    return report


@torch.no_grad()
def _export_denoiser(pipeline: DiTPipeline, folder: Path, opset: int) -> Parity:
    transformer = _in_float32(pipeline.transformer)
    config = transformer.config
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

    _export_graph(_Denoiser(transformer), inputs(2), ["sample"], folder, opset, max_batch=None)
    runtime = ORTDiTTransformer.from_pretrained(folder)
    batches = [inputs(batch) for batch in _PARITY_BATCHES]
    return _compare(folder, [(transformer(**batch).sample, runtime(**batch).sample) for batch in batches])


@torch.no_grad()
def _export_decoder(pipeline: DiTPipeline, folder: Path, opset: int) -> Parity:
    vae = _in_float32(pipeline.vae)
    vae.save_config(folder)
    height_width = pipeline.transformer.config.sample_height_width

    def latents(batch: int) -> Tensor:
        shape = (batch, vae.config.latent_channels, *height_width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))

    # diffusers' upsampling branches at a batch of 64, so the exporter must be told to stay below.
    _export_graph(_Decoder(vae), {"latents": latents(2)}, ["sample"], folder, opset, max_batch=63)
    runtime = ORTVAEDecoder.from_pretrained(folder)
    batches = [latents(batch) for batch in _PARITY_BATCHES]
    return _compare(folder, [(vae.decode(batch).sample, runtime.decode(batch).sample) for batch in batches])


def _in_float32(module: Any) -> Any:
    """The module itself where it is float32, on the CPU and in evaluation mode; else a copy that is."""
    if module.dtype == torch.float32 and module.device.type == "cpu" and not module.training:
        return module
    return copy.deepcopy(module).float().cpu().eval()


def _export_graph(
    module: nn.Module,
    inputs: dict[str, Tensor],
    output_names: Sequence[str],
    folder: Path,
    opset: int,
    max_batch: int | None,
) -> None:
    """Write folder/model.onnx, with a dynamic batch and without a trace of this machine, and check it."""
    onnx = require("onnx", "onnx")
    folder.mkdir(exist_ok=True)
    batch = torch.export.Dim("batch", max=max_batch) if max_batch else torch.export.Dim.DYNAMIC
    with _quiet(), torch.no_grad(), _attention_operator() if opset >= 23 else contextlib.nullcontext():
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            dynamic_shapes={name: {0: batch} for name in inputs},
            input_names=list(inputs),
            output_names=list(output_names),
            opset_version=opset,
            dynamo=True,
        )
    assert program is not None
    _strip_metadata(program.model)
    size = sum(parameter.nbytes for parameter in module.state_dict().values())
    program.save(folder / MODEL_FILE, external_data=size > _LARGEST_PROTOBUF)
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)  # full: with strict shape inference


@contextlib.contextmanager
def _attention_operator() -> Iterator[None]:
    """Export attention as one operator of opset 23 that takes tokens and splits the heads itself.

    Left to the exporter, four transpositions, reshapes and a split surround it: 15 % of the toy's time.
    """

    def attend(
        self: DiTAttention, query: Tensor, key: Tensor, value: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, None]:
        count = self.num_heads
        operator = torch.onnx.ops.attention
        output = operator(query, key, value, q_num_heads=count, kv_num_heads=count, scale=self.scaling)[0]
        return self.proj(output), None

    original = DiTAttention.attend
    DiTAttention.attend = attend
    try:
        yield
    finally:
        DiTAttention.attend = original


def _strip_metadata(model: Any) -> None:
    """Drop what the exporter notes about its source: stack traces with local paths, three times the graph's size."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter prints for its developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _compare(folder: Path, pairs: Sequence[tuple[Tensor, Tensor]]) -> Parity:
    relative_error, max_abs_error = 0.0, 0.0
    for expected, actual in pairs:
        difference = (actual - expected).double()
        norm = expected.double().norm().item() or 1.0  # a fresh model predicts exactly zero
        error = difference.norm().item() / norm
        if not error <= MAX_RELATIVE_ERROR:  # also catches NaN
            raise ValueError(
                f"The exported {folder.name} differs from PyTorch by {error:.1e} (relative L2), "
                f"more than {MAX_RELATIVE_ERROR:.0e}."
            )
        relative_error = max(relative_error, error)
        max_abs_error = max(max_abs_error, difference.abs().max().item())
    return Parity(relative_error, max_abs_error, tuple(len(expected) for expected, _ in pairs))
