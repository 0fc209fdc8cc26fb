"""PyTorch modules to ONNX files, each checked."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.extras import require
from dit_hub.layers import for_layer, sincos_positions
from dit_hub.modeling_dit import DiTAttention, DiTTransformer

_LARGEST_PROTOBUF = 2**31 - 2**24  # 2 GiB, less room for the graph itself


def export_graph(
    module: nn.Module,
    inputs: dict[str, Tensor],
    dimensions: Mapping[str, Mapping[int, Any] | None],
    output_names: Sequence[str],
    path: Path,
    opset: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file without a trace of this machine, and check it.

    Args:
        module: what to export; it is put into evaluation mode.
        inputs: an example by name, of batch 2 or more.
        dimensions: the dynamic dimensions of each input, by axis: a name, or a `torch.export.Dim`. Those of one name
            are equal.
        output_names: in the order in which the module returns them.
        path: where to write the file.
        opset: version of the ONNX operators.
        metadata: entries for the file's own metadata.
    """
    onnx, passes = require("onnx", "onnx"), require("onnx_ir.passes.common", "onnx")
    dynamic = {name: dimensions[name] for name in inputs}
    with _quiet(), torch.no_grad(), _attention_operator() if opset >= 23 else _attention_written_out():
        program = torch.onnx.export(module.eval(), kwargs=inputs, dynamic_shapes=dynamic, input_names=list(inputs),
                                    output_names=list(output_names), opset_version=opset, dynamo=True)  # fmt: skip
    assert program is not None
    # Weights of tables that became constants may stay behind, unread; runtimes warn of them.
    passes.RemoveUnusedNodesPass()(program.model)
    _strip_metadata(program.model)
    program.model.metadata_props.update(metadata or {})
    size = sum(parameter.nbytes for parameter in module.state_dict().values())
    program.save(path, external_data=size > _LARGEST_PROTOBUF)
    onnx.checker.check_model(str(path), full_check=True)  # full: with strict shape inference


@contextlib.contextmanager
def _attention_operator() -> Iterator[None]:
    """Export attention as one operator of opset 23 that takes tokens and splits the heads itself.

    Left to the exporter, four transpositions, reshapes and a split surround it: 15 % of the toy's time.
    """

    def attend(self: DiTAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = self.config.num_attention_heads
        operator = torch.onnx.ops.attention
        output = operator(query, key, value, q_num_heads=count, kv_num_heads=count, scale=self.scaling)[0]
        return self.proj(output)

    with _replaced(DiTAttention, "attend", attend):
        yield


@contextlib.contextmanager
def _attention_written_out() -> Iterator[None]:
    """Export self-attention with one transposition of query, key and value together: 11 % of the toy sampler's time."""

    def forward(self: DiTAttention, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv(for_layer(self.qkv, hidden_states))  # (N, T, 3D)
        heads = qkv.unflatten(2, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, head size)
        weights = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) * self.scaling, dim=-1)
        return self.proj((weights @ heads[2]).transpose(1, 2).flatten(2))

    with _replaced(DiTAttention, "forward", forward):
        yield


@contextlib.contextmanager
def positions_of_any_size() -> Iterator[None]:
    """Export sin-cos positions as operators over height and width, not as the table of the trained size."""

    def positions(self: DiTTransformer, height: int, width: int) -> Tensor:
        return sincos_positions(height, width, self.config.hidden_size)

    with _replaced(DiTTransformer, "positions", positions):
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, method: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _strip_metadata(model: Any) -> None:
    """Drop the exporter's notes about its source: stack traces with local paths, three times the graph's size."""
    require("onnx_ir.passes.common", "onnx").ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for graph in model.graphs():  # the pass leaves their values
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's notes to its developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
