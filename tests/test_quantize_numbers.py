"""Rounding to 8 bits against torch's own, and which products are rounded."""

# Modules by name, and settings of schedulers as plain words.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.export.quantize import calibrate, quantize_dynamic, quantize_static

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

MakeModel = Callable[..., DiTTransformer]
MakePipeline = Callable[..., DiTPipeline]

ROUNDED = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


# --- Static ----------------------------------------------------------------------------------------------------------


def rounded_linear(layer: nn.Linear, input: Tensor, largest: float, precision: str) -> Tensor:
    """What a layer computes with weights rounded by output channel and inputs by one scale, by torch's functions."""
    weight = layer.weight.detach()
    scales = weight.abs().amax(1) / (127 if precision == "int8" else 448)
    if precision == "int8":
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
        input = torch.fake_quantize_per_tensor_affine(input, largest / 127, 0, -127, 127)
    else:
        weight = (weight / scales[:, None]).to(torch.float8_e4m3fn).float() * scales[:, None]
        scale = largest / 448
        input = (input / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return nn.functional.linear(input, weight, layer.bias.detach())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_static_layer_rounds_weights_by_channel_and_inputs_by_what_was_seen(
    precision: str, make_model: MakeModel
) -> None:
    model, plain = make_model(), make_model()
    with torch.no_grad():  # channels of very different size, which one scale for all would wipe out
        for one in (model, plain):
            one.blocks[1].mlp.fc1.weight.mul_(torch.logspace(-4, 0, 128)[:, None])
    largest = {name: 1.0 + 0.1 * index for index, name in enumerate(ROUNDED)}
    quantize_static(model, precision, largest)
    for name in ROUNDED:
        layer, before = model.get_submodule(name), plain.get_submodule(name)
        assert isinstance(before, nn.Linear)
        input = torch.randn(2, 7, before.in_features) * 0.8
        input[0, 0, :2] = torch.tensor([-9.0, 9.0])  # beyond what was seen
        with torch.no_grad():
            actual = layer(input)
        expected = rounded_linear(before, input, largest[name], precision)
        # Sums in another order; a rounding of the scale can turn a tie of the input the other way.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)
        assert (actual - expected).norm() < 1e-4 * expected.norm()
        assert (actual - before(input)).norm() > 1e-3 * expected.norm()
    kept = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert kept == [
        name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and name not in ROUNDED
    ]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_largest_values_are_kept_and_zeros_stay_zeros(precision: str, make_model: MakeModel) -> None:
    model = make_model()
    layer: Any = model.blocks[0].attn.proj
    with torch.no_grad():
        layer.weight[0] = 0
    largest_weight = layer.weight.abs().amax(1)
    quantize_static(model, precision, dict.fromkeys(ROUNDED, 0.0) | {"blocks.0.attn.proj": 2.0})
    rounded: Any = model.blocks[0].attn.proj
    identity = torch.eye(32) * 2.0  # the largest input there is
    with torch.no_grad():
        response = (rounded(identity) - layer.bias) / 2
    torch.testing.assert_close(response.abs().amax(0), largest_weight, rtol=1e-5, atol=1e-7)
    assert response[:, 0].eq(0).all()
    assert model.blocks[1].attn.proj.input_scale > 0
    with torch.no_grad():  # a layer whose inputs were all zero
        silent = model.blocks[1].attn.proj(torch.zeros(1, 32))
    torch.testing.assert_close(silent[0], model.blocks[1].attn.proj.bias.detach())


def test_a_static_layer_stays_in_the_dtype_of_its_model(make_model: MakeModel) -> None:
    model = make_model().to(torch.bfloat16)
    bias = model.blocks[0].mlp.fc1.bias
    quantize_static(model, "int8", dict.fromkeys(ROUNDED, 3.0))
    layer: Any = model.blocks[0].mlp.fc1
    assert layer.weight_scale.dtype == layer.input_scale.dtype == torch.bfloat16
    assert (layer.weight_q.dtype, layer.weight_zero.dtype, layer.input_zero.dtype) == (torch.int8,) * 3
    assert (layer.weight_q.shape, layer.weight_scale.shape, layer.weight_zero.shape) == ((32, 128), (128,), (128,))
    assert layer.weight_zero.eq(0).all()
    assert layer.input_zero == 0
    assert layer.bias is bias
    assert model(torch.randn(1, 4, 8, 8), 3, torch.tensor([1])).sample.isfinite().all()


def test_small_inputs_are_rounded_in_their_own_range() -> None:
    model, input = nn.Sequential(nn.Linear(6, 4)).eval(), torch.rand(3, 6) * 1e-3
    with torch.no_grad():
        model[0].bias.zero_()
        expected = model(input)
        quantize_static(model, "int8", {"0": input.max().item()})
        assert (model(input) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_static_layer_is_exported_as_it_computes(precision: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 0.1, 0.01, 10.0])[:, None])
    quantize_static(model, precision, {"0": 2.0})
    input, path = torch.randn(3, 6), tmp_path / "layer.onnx"
    torch.onnx.export(model, (input,), path, dynamo=True, opset_version=20, input_names=["x"])
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": input.numpy()})
    np.testing.assert_allclose(output, model(input).detach().numpy(), rtol=1e-5, atol=1e-5)


# --- Calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [10, 0])
def test_calibration_sees_the_largest_input_of_its_sampling_runs(
    num_classes: int, make_pipeline: MakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = make_pipeline(num_classes=num_classes)
    model: Any = pipeline.transformer
    with torch.no_grad():  # so that some inputs are small
        for parameter in model.blocks[0].attn.qkv.parameters():
            parameter.mul_(0.01)
    largest = calibrate(pipeline)
    assert capsys.readouterr().err == ""  # no bar
    assert not any(layer._forward_pre_hooks for layer in model.modules())

    seen: dict[str, list[Tensor]] = {name: [] for name in ROUNDED}
    for name, inputs_of_layer in seen.items():
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, kept=inputs_of_layer: kept.append(inputs[0]))
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 20, "output_type": "latent"}
    if num_classes:  # eight classes, evenly over all
        pipeline([0, 1, 2, 3, 5, 6, 7, 8], generator=torch.Generator().manual_seed(0), **arguments)
    else:
        pipeline(num_images_per_label=8, generator=torch.Generator().manual_seed(0), **arguments)
    assert [len(inputs) for inputs in seen["blocks.1.attn.qkv"]] == [16 if num_classes else 8] * 20
    expected = {name: max(inputs.abs().max().item() for inputs in kept) for name, kept in seen.items()}
    assert largest == pytest.approx(expected, rel=1e-6)
    assert min(largest.values()) < 0.5


def test_calibration_leaves_no_hooks_when_it_fails(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="nothing")
    with pytest.raises(ValueError, match="prediction_type"):
        calibrate(pipeline)
    assert not any(layer._forward_pre_hooks for layer in pipeline.transformer.modules())


# --- Dynamic ---------------------------------------------------------------------------------------------------------

WIDTH = 16


def weights(seed: int, *shape: int) -> np.ndarray:
    """Columns of very different size."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values * np.logspace(-3, 0, shape[-1], dtype=np.float32)


def write_graph(path: Path, external: bool = False) -> None:
    """Products that are to be rounded and such that are not, in a graph and in a branch of it."""
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    initializers = [
        tensor(weights(1, WIDTH, WIDTH), "blocks.0.attn.qkv.weight"),
        tensor(weights(2, WIDTH, WIDTH), "blocks.0.mlp.fc1.weight"),
        tensor(weights(3, WIDTH), "blocks.0.mlp.fc1.bias"),
        tensor(weights(4, WIDTH, WIDTH), "t_embedder.mlp.0.weight"),
        tensor(weights(5, WIDTH), "t_embedder.mlp.0.bias"),
        tensor(weights(6, WIDTH, WIDTH), "val_17"),  # constant folding has taken the name of the last layer's weight
        tensor(weights(7, WIDTH), "final_layer.linear.bias"),
        tensor(weights(8, WIDTH, WIDTH), "blocks.1.mlp.fc2.weight"),
    ]
    branches = [
        onnx.helper.make_graph(
            [make("MatMul", ["h4", "blocks.1.mlp.fc2.weight"], [f"{name}_out"], name=f"{name}_product")],
            name, [], [onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, None)],
        )
        for name in ("then", "else")
    ]  # fmt: skip
    nodes = [
        make("MatMul", ["x", "blocks.0.attn.qkv.weight"], ["h1"], name="product_of_block"),
        make("Gemm", ["h1", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"], ["h2"], name="gemm_of_block"),
        make("Relu", ["h2"], ["h2_positive"], name="between"),
        make("Gemm", ["h2_positive", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias"], ["h3"], name="gemm_of_time"),
        make("MatMul", ["h3", "val_17"], ["last"], name="last_product"),
        make("Add", ["last", "final_layer.linear.bias"], ["h4"], name="last_sum"),
        make("If", ["which"], ["y"], name="choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "denoiser",
        [value("x", onnx.TensorProto.FLOAT, [None, WIDTH]), value("which", onnx.TensorProto.BOOL, [])],
        [value("y", onnx.TensorProto.FLOAT, None)], initializers,
        value_info=[value("h1", onnx.TensorProto.FLOAT, [None, WIDTH])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    options: dict[str, Any] = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 0}
    onnx.save(model, path, **(options if external else {}))


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "which": np.array(True)})[0]


def all_nodes(graph: Any) -> list[Any]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for one in inner for node in all_nodes(one))]


@pytest.mark.parametrize("external", [False, True])
def test_dynamic_rounding_takes_the_products_of_blocks_alone(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "model.onnx"
    write_graph(path, external)
    assert (tmp_path / "model.onnx.data").exists() == external
    x = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
    expected = run(path, x)
    logging.disable(logging.NOTSET)
    quantize_dynamic(path)
    assert logging.root.manager.disable == logging.NOTSET
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]

    model = onnx.load(path)
    products = [node for node in all_nodes(model.graph) if node.op_type in ("MatMul", "Gemm")]
    assert [set(node.input) & {"t_embedder.mlp.0.weight", "val_17"} for node in products] == [
        {"t_embedder.mlp.0.weight"},
        {"val_17"},
    ]
    integers = [node for node in all_nodes(model.graph) if node.op_type == "MatMulInteger"]
    assert len(integers) == 4  # two of the block, and one in each branch
    # 8 bits of weights and of activations, three products deep.
    error = np.linalg.norm(run(path, x) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 5e-2


def test_a_failed_rounding_leaves_logging_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.ModelProto(), path)
    logging.disable(logging.DEBUG)
    try:
        with pytest.raises(Exception, match=r"."):
            quantize_dynamic(path)
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(logging.NOTSET)
