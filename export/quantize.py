"""Weights and activations of 8 bits: dynamic for ONNX Runtime on processors, static (Q/DQ) for the other runtimes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_hub.extras import require
from dit_hub.pipeline_dit import DiTPipeline

# Layers that stay in float: the first and the last, whose errors reach every token, and those of the modulation.
_KEPT = ("x_embedder", "t_embedder", "y_embedder", "adaLN_modulation", "final_layer")

# Largest value of a type, to which the largest seen is scaled.
_LIMITS = {"int8": 127.0, "fp8": 448.0}
_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# The sampling runs whose activations are measured: classes and steps.
_CALIBRATION_LABELS, _CALIBRATION_STEPS = 8, 20


def quantize_dynamic(path: Path) -> None:
    """Quantise a file in place: weights ahead, per channel, and activations while it runs.

    Args:
        path: model.onnx of a denoiser or sampler, whose initializers still carry the names of the weights.
    """
    onnx = require("onnx", "onnx")
    quantization: Any = require("onnxruntime.quantization", "onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]  # the shapes of float weights, which the quantiser would find to disagree
    nodes = list(_nodes(model.graph))
    # A product's weight may have lost its name to constant folding; the bias that is added next has kept it.
    kept_inputs = {
        name for node in nodes if any(part in name for name in node.input for part in _KEPT) for name in node.input
    }
    kept = [
        node.name + suffix
        for node in nodes
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
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # the float weights of a large model


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the loops in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


@torch.no_grad()
def calibrate(pipeline: DiTPipeline) -> dict[str, float]:
    """The largest absolute input of each linear layer that is quantised, over real denoising trajectories.

    Args:
        pipeline: in PyTorch. It samples eight images in 20 steps, with guidance where the model has it.
    """
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in _quantized_layers(pipeline.transformer)]
    try:
        count = pipeline.transformer.config.num_classes
        sampling = DiTPipeline(pipeline.transformer, pipeline.scheduler)
        sampling.set_progress_bar_config(disable=True)
        sampling(
            [index * count // _CALIBRATION_LABELS for index in range(_CALIBRATION_LABELS)] if count else None,
            num_images_per_label=1 if count else _CALIBRATION_LABELS,
            num_inference_steps=_CALIBRATION_STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def quantize_static(transformer: nn.Module, precision: str, largest: dict[str, float]) -> None:
    """Replace the linear layers of a model by ones that round to 8 bits, and export as Q/DQ pairs, in place.

    Args:
        transformer: with weights of any float type, in which the products are summed.
        precision: "int8" or "fp8" (e4m3).
        largest: of `calibrate`.
    """
    for name, layer in list(_quantized_layers(transformer)):
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, _QuantizedLinear(layer, precision, largest[name]))


def _quantized_layers(transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and not any(part in name for part in _KEPT):
            yield name, layer


class _QuantizedLinear(nn.Module):
    """A linear layer with a scale for each output channel of the weights and one for the input."""

    def __init__(self, layer: nn.Linear, precision: str, largest_input: float):
        super().__init__()
        self.precision, self.bias = precision, layer.bias
        limit, dtype = _LIMITS[precision], layer.weight.dtype
        weight = layer.weight.detach().float().T.contiguous()  # (in, out)
        scale = (weight.abs().amax(dim=0) / limit).clamp_min(1e-12).to(dtype)
        self.weight_q = nn.Buffer(_round(weight / scale.float(), precision))
        self.weight_scale = nn.Buffer(scale)
        self.weight_zero = nn.Buffer(torch.zeros(scale.shape).to(_TYPES[precision]))
        self.input_scale = nn.Buffer(torch.tensor(max(largest_input, 1e-12) / limit, dtype=dtype))
        self.input_zero = nn.Buffer(torch.zeros(()).to(_TYPES[precision]))

    def forward(self, input: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            operator = torch.onnx.ops.symbolic
            quantized, dtype = _TYPES[self.precision], self.weight_scale.dtype
            scaled = (input, self.input_scale, self.input_zero)
            rounded = operator("QuantizeLinear", scaled, dtype=quantized, shape=input.shape)
            scaled = (rounded, self.input_scale, self.input_zero)
            input = operator("DequantizeLinear", scaled, dtype=dtype, shape=input.shape)
            scaled = (self.weight_q, self.weight_scale, self.weight_zero)
            weight = operator("DequantizeLinear", scaled, {"axis": 1}, dtype=dtype, shape=self.weight_q.shape)
        else:
            input = _round(input / self.input_scale, self.precision).to(input.dtype) * self.input_scale
            weight = self.weight_q.to(input.dtype) * self.weight_scale
        return input @ weight + self.bias


def _round(scaled: Tensor, precision: str) -> Tensor:
    limit = _LIMITS[precision]
    scaled = scaled.clamp(-limit, limit)
    return (scaled.round() if precision == "int8" else scaled).to(_TYPES[precision])
