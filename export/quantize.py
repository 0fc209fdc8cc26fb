"""Weights of 8 bits for ONNX Runtime on processors."""

import logging
from pathlib import Path
from typing import Any

from dit_hub.extras import require

# What stays in float: the first and last layers, whose errors reach every token, and what makes the modulation.
_KEPT = ("x_embedder", "t_embedder", "y_embedder", "adaLN_modulation", "final_layer")


def quantize_int8(path: Path) -> None:
    """Quantise a denoiser's file in place: weights ahead per channel, activations while it runs.

    Args:
        path: model.onnx of `export_onnx`, whose initializers still carry the names of the weights.
    """
    onnx = require("onnx", "onnx")
    quantization: Any = require("onnxruntime.quantization", "onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]  # the shapes of float weights, which the quantiser would find to disagree
    # A product's weight may have lost its name to constant folding; the bias that is added next has kept it.
    kept_inputs = {
        name
        for node in model.graph.node
        if any(part in name for name in node.input for part in _KEPT)
        for name in node.input
    }
    kept = [
        node.name + suffix
        for node in model.graph.node
        if set(node.output) & kept_inputs or any(part in name for name in node.input for part in _KEPT)
        for suffix in ("", "_MatMul")  # what the quantiser calls a Gemm
    ]
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice to preprocess, which shape inference at export has done
    try:
        quantization.quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=kept,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"EnableSubgraph": True},
        )
    finally:
        logging.disable(level)
