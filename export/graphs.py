"""PyTorch modules to ONNX files, each checked, and the measure of what a runtime makes of them."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.extras import require
from dit_hub.modeling_dit import DiTAttention

from .component import MODEL_FILE

# Largest error of a precision: relative L2 distance from PyTorch in float32.
MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 5e-2}

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


def in_float32(module: Any) -> Any:
    """The module itself where it is float32, on the CPU and in evaluation mode; else a copy that is."""
    if module.dtype == torch.float32 and module.device.type == "cpu" and not module.training:
        return module
    return copy.deepcopy(module).float().cpu().eval()


def export_graph(
    module: nn.Module,
    inputs: dict[str, Tensor],
    dimensions: Mapping[str, Mapping[int, str] | None],
    output_names: Sequence[str],
    folder: Path,
    opset: int,
    max_batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
    file: str = MODEL_FILE,
) -> Path:
    """Write a file without a trace of this machine, and check it.

    Args:
        module: in evaluation mode.
        inputs: an example by name, of batch 2 or more.
        dimensions: the dynamic dimensions of each input, by axis; those of one name are equal.
        output_names: in the order of what the module returns.
        folder: made where it does not exist.
        opset: version of the ONNX operators.
        max_batch: what "batch" must not exceed, if anything.
        metadata: what the file says of itself.
        file: its name in the folder.
    """
    onnx = require("onnx", "onnx")
    folder.mkdir(exist_ok=True)
    path = folder / file

    def dimension(name: str) -> Any:
        return torch.export.Dim(name, max=max_batch) if name == "batch" and max_batch else torch.export.Dim.DYNAMIC

    dynamic = {
        name: {axis: dimension(what) for axis, what in axes.items()} if axes else None
        for name, axes in dimensions.items()
    }
    with _quiet(), torch.no_grad(), _attention_operator() if opset >= 23 else _attention_written_out():
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            dynamic_shapes=dynamic,
            input_names=list(inputs),
            output_names=list(output_names),
            opset_version=opset,
            dynamo=True,
        )
    assert program is not None
    _strip_metadata(program.model)
    program.model.metadata_props.update(metadata or {})
    size = sum(parameter.nbytes for parameter in module.state_dict().values())
    program.save(path, external_data=size > _LARGEST_PROTOBUF)
    onnx.checker.check_model(str(path), full_check=True)  # full: with strict shape inference
    return path


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


@contextlib.contextmanager
def _attention_written_out() -> Iterator[None]:
    """Export self-attention with one transposition of query, key and value together, not one of each: 11 % of the
    sampler's time for the toy."""

    def forward(self: DiTAttention, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        qkv = self.qkv(hidden_states.to(self.qkv.weight.dtype))  # (N, T, 3D)
        heads = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, head size)
        weights = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) * self.scaling, dim=-1)
        return self.proj((weights @ heads[2]).transpose(1, 2).flatten(2)), None

    original = DiTAttention.forward
    DiTAttention.forward = forward
    try:
        yield
    finally:
        DiTAttention.forward = original


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


def measure_parity(name: str, pairs: Sequence[tuple[Tensor, Tensor]], bound: float) -> Parity:
    """The distance of (expected, actual) outputs.

    Raises:
        ValueError: it is above the bound.
    """
    relative_error, max_abs_error = 0.0, 0.0
    for expected, actual in pairs:
        difference = (actual - expected).double()
        norm = expected.double().norm().item() or 1.0  # a fresh model predicts exactly zero
        error = difference.norm().item() / norm
        if not error <= bound:  # also catches NaN
            raise ValueError(
                f"The exported {name} differs from PyTorch by {error:.1e} (relative L2), more than {bound:.0e}."
            )
        relative_error = max(relative_error, error)
        max_abs_error = max(max_abs_error, difference.abs().max().item())
    return Parity(relative_error, max_abs_error, tuple(len(expected) for expected, _ in pairs))
