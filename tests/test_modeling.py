"""`DiTTransformer`: the official numbers, the paper's sizes, and what it promises to trainers and exporters."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dit_hub import DiTConfig, DiTTransformer
from dit_hub.guidance import guide
from dit_hub.layers import POSITION_TABLES

from .conftest import Golden

MakeModel = Callable[..., DiTTransformer]

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")

# Against the official code in float32, whose outputs lie within +-1: some ten roundings. Guidance at 4 subtracts two
# such outputs and multiplies by 4.
FORWARD_ATOL = 2e-6
GUIDED_ATOL = 1e-5

each_conditioning = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def inputs_for(model: DiTTransformer, count: int = 2, size: tuple[int, int] | None = None) -> tuple[Any, ...]:
    """Noisy latents, timesteps and labels (None for an unconditional model), the same at every call."""
    generator = torch.Generator().manual_seed(1)
    height, width = size or model.config.sample_height_width
    latents = torch.randn(count, model.config.in_channels, height, width, generator=generator)
    timestep = torch.randint(0, 1000, (count,), generator=generator)
    classes = model.config.num_classes
    return latents, timestep, torch.randint(0, classes, (count,), generator=generator) if classes else None


@torch.no_grad()
def predict(model: DiTTransformer, *inputs: Any, **kwargs: Any) -> Tensor:
    return model(*(inputs or inputs_for(model)), **kwargs).sample


def cast(model: Any, dtype: torch.dtype) -> DiTTransformer:
    return model.to(dtype)


def parameter_count(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiTTransformer(config).parameters())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


# --- The official numbers --------------------------------------------------------------------------------------------


def test_forward_equals_the_official_code(golden: Golden) -> None:
    sample = predict(golden.model(), *golden.inputs("forward"))
    torch.testing.assert_close(sample, golden.expected["forward.out"], rtol=0, atol=FORWARD_ATOL)


@pytest.mark.parametrize("fields", [{"timestep_freq_shift": 1.0}, {"norm_eps": 1e-5}])
def test_forward_with_diffusers_numerics_is_not_the_official_code(golden: Golden, fields: dict[str, float]) -> None:
    sample = predict(golden.model(**fields), *golden.inputs("forward"))
    assert largest_difference(sample, golden.expected["forward.out"]) > 5 * FORWARD_ATOL


def test_positions_equal_the_official_table(golden: Golden) -> None:
    model, official = golden.model(), golden.weights["pos_embed"]
    torch.testing.assert_close(model.pos_embed, official, rtol=0, atol=1e-6)
    rows_and_columns_swapped = model.pos_embed.roll(model.config.hidden_size // 2, dims=2)
    assert largest_difference(rows_and_columns_swapped, official) > 0.1


def guided_halves(golden: Golden, guidance_channels: int) -> tuple[Tensor, Tensor]:
    """The guided prediction, and the prediction of both halves of the batch, whose latents the first half gives."""
    latents, timestep, labels = golden.inputs("cfg")
    half = latents[: len(latents) // 2]
    prediction = predict(golden.model(), torch.cat([half, half]), timestep, labels)
    cond, uncond = prediction.chunk(2)
    return guide(cond, uncond, golden.expected["cfg.scale"].item(), guidance_channels), prediction


def test_guidance_equals_the_official_code(golden: Golden) -> None:
    guided, prediction = guided_halves(golden, golden.model().config.guided_channels)
    conditional, unconditional = golden.expected["cfg.out"].chunk(2)
    torch.testing.assert_close(guided, conditional, rtol=0, atol=GUIDED_ATOL)
    # The official second half repeats the guided noise and keeps its own other channels.
    torch.testing.assert_close(guided[:, :3], unconditional[:, :3], rtol=0, atol=GUIDED_ATOL)
    torch.testing.assert_close(prediction[2:, 3:], unconditional[:, 3:], rtol=0, atol=FORWARD_ATOL)


def test_guiding_the_fourth_channel_is_not_the_official_code(golden_a: Golden) -> None:
    guided, _ = guided_halves(golden_a, 4)
    assert largest_difference(guided, golden_a.expected["cfg.out"][:2]) > 1000 * GUIDED_ATOL


# --- The other conditionings, which exist as a figure only -----------------------------------------------------------


def reference_forward(model: DiTTransformer, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """The prediction for 8x8 latents, written from Figure 3 of the paper."""
    config, weights = model.config, model.state_dict()
    embedded = [model.t_embedder(timestep), model.y_embedder(labels)]

    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, tokens: Tensor) -> Tensor:
        affine = (weights.get(f"{name}.weight"), weights.get(f"{name}.bias"))
        return F.layer_norm(tokens, tokens.shape[-1:], *affine, eps=config.norm_eps)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [part.unflatten(2, (config.num_attention_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(heads[0].shape[-1])
        return (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)

    def modulations(name: str, count: int) -> list[Tensor]:
        chosen = linear(f"{name}.adaLN_modulation.1", F.silu(embedded[0] + embedded[1]))
        return [part[:, None] for part in chosen.chunk(count, dim=1)]

    tokens = model.embed(latents)
    if config.conditioning == "in_context":
        tokens = torch.cat([tokens, torch.stack(embedded, dim=1)], dim=1)
    for block in (f"blocks.{index}" for index in range(config.num_hidden_layers)):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = [torch.zeros(1), torch.zeros(1), torch.ones(1)] * 2
        if config.conditioning == "adaln_zero":
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations(block, 6)
        elif config.conditioning == "adaln":
            shift, scale, mlp_shift, mlp_scale = modulations(block, 4)
        query_key_value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens) * (1 + scale) + shift)
        tokens = tokens + gate * linear(f"{block}.attn.proj", attend(*query_key_value.chunk(3, dim=2)))
        if config.conditioning == "cross_attention":
            query = linear(f"{block}.cross_attn.q", norm(f"{block}.norm_cross", tokens))
            key_value = linear(f"{block}.cross_attn.kv", torch.stack(embedded, dim=1))
            tokens = tokens + linear(f"{block}.cross_attn.proj", attend(query, *key_value.chunk(2, dim=2)))
        wide = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens) * (1 + mlp_scale) + mlp_shift)
        tokens = tokens + mlp_gate * linear(f"{block}.mlp.fc2", F.gelu(wide, approximate="tanh"))
    tokens = norm("final_layer.norm_final", tokens[:, :16])  # the patches
    if config.conditioning.startswith("adaln"):
        shift, scale = modulations("final_layer", 2)
        tokens = tokens * (1 + scale) + shift
    return model.unpatchify(linear("final_layer.linear", tokens), 8, 8)


@each_conditioning
def test_forward_equals_the_papers_figure(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning)
    with torch.no_grad():
        expected = reference_forward(model, *inputs_for(model))
    torch.testing.assert_close(predict(model), expected, rtol=0, atol=FORWARD_ATOL)
    assert largest_difference(predict(make_model(seed=1, conditioning=conditioning)), expected) > 1000 * FORWARD_ATOL


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_dtype", ["of the weights", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_two_roundings(golden: Golden, dtype: torch.dtype, input_dtype: str) -> None:
    latents, timestep, labels = golden.inputs("forward")
    latents = latents.to(dtype) if input_dtype == "of the weights" else latents
    sample = predict(cast(golden.model(), dtype), latents, timestep, labels)
    assert sample.dtype == latents.dtype
    assert relative_error(sample, golden.expected["forward.out"]) < 2 * torch.finfo(dtype).eps


@each_conditioning
def test_condition_of_half_precision_weights_is_computed_in_float32(make_model: MakeModel, conditioning: str) -> None:
    half = make_model(conditioning=conditioning).bfloat16()
    same_weights = copy.deepcopy(half).float()
    _, timestep, labels = inputs_for(half)
    condition = half.precompute(timestep, labels)
    assert condition.dtype == torch.float32
    # In bfloat16, the sinusoid alone would be off by 1e-3.
    torch.testing.assert_close(condition, same_weights.precompute(timestep, labels), rtol=0, atol=1e-6)


def test_position_table_stays_float32_when_the_weights_are_cast(make_model: MakeModel) -> None:
    model = make_model()
    table = model.pos_embed.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = cast(model, dtype)
        assert (model.dtype, model.pos_embed.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(model.pos_embed, table, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_position_table_is_right_after_loading(make_model: MakeModel, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(sample_size=(8, 12))
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert (loaded.dtype, loaded.pos_embed.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(loaded.pos_embed, model.pos_embed, rtol=0, atol=0)


@each_conditioning
def test_residual_stream_beyond_float16_stays_finite(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.fc2.bias"):
                parameter[0] = 50_000.0
            if name.endswith("adaLN_modulation.1.bias"):  # opens the gates
                parameter.fill_(1.0)
    expected = predict(model)
    largest: list[float] = []
    model.final_layer.register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].abs().max().item()))
    sample = predict(model.half())
    assert largest[0] > torch.finfo(torch.float16).max
    assert relative_error(sample, expected) < 4 * torch.finfo(torch.float16).eps


@each_conditioning
def test_autocast_gives_finite_gradients_to_every_parameter(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning).train()
    latents, timestep, labels = inputs_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        condition = model.precompute(timestep, labels)
        sample = model(latents, timestep, labels).sample
    assert condition.dtype == torch.float32
    sample.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# --- Size and initialisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("toy", 323_696), ("DiT-S/2", 32_865_056), ("DiT-XL/2", 674_834_720)])
def test_parameter_count_is_exact(name: str, count: int) -> None:
    assert parameter_count(DiTConfig.from_name(name)) == count


@pytest.mark.parametrize(
    ("size", "millions"), [("S", (33, 33, 33)), ("B", (131, 130, 130)), ("L", (459, 458, 458)), ("XL", (676, 675, 675))]
)
def test_parameter_counts_are_the_papers(size: str, millions: tuple[int, int, int]) -> None:
    counts = [parameter_count(DiTConfig.from_name(f"DiT-{size}/{patch}")) for patch in (8, 4, 2)]
    assert [round(count / 1e6) for count in counts] == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("conditioning", "millions"), [("in_context", 449), ("cross_attention", 598), ("adaln", 600), ("adaln_zero", 675)]
)
def test_parameter_counts_of_the_conditionings_are_the_papers(conditioning: str, millions: int) -> None:
    count = parameter_count(DiTConfig.from_name("DiT-XL/2", conditioning=conditioning))
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@each_conditioning
def test_fresh_model_predicts_exactly_zero(make_model: MakeModel, conditioning: str, pos_embed: str) -> None:
    random = make_model(conditioning=conditioning, pos_embed=pos_embed)
    assert predict(DiTTransformer(random.config)).count_nonzero() == 0
    assert predict(random).count_nonzero() > 0


def assert_uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Xavier: uniform within sqrt(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.97 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def assert_normal(weight: Tensor) -> None:
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.mean().item() == pytest.approx(0, abs=0.002)
    assert weight.abs().max().item() > 0.05  # a uniform distribution of this width ends at 0.035


@each_conditioning
def test_initialisation_follows_the_official_recipe(make_model: MakeModel, conditioning: str) -> None:
    width = 64
    fields: dict[str, Any] = {"hidden_size": width, "pos_embed": "learned", "sample_size": 16, "num_classes": 100}
    model = DiTTransformer(make_model(conditioning=conditioning, **fields).config)
    fans = {
        "x_embedder.proj.weight": (4 * 2 * 2, width),
        "attn.qkv.weight": (width, 3 * width),
        "attn.proj.weight": (width, width),
        "cross_attn.q.weight": (width, width),
        "cross_attn.kv.weight": (width, 2 * width),
        "mlp.fc1.weight": (width, 4 * width),
        "mlp.fc2.weight": (4 * width, width),
    }
    for name, parameter in model.named_parameters():
        if fan := next((fan for ending, fan in fans.items() if name.endswith(ending)), None):
            assert_uniform(parameter, *fan)
        elif name.endswith("bias") or "adaLN" in name or name.startswith("final_layer.linear"):
            assert parameter.count_nonzero() == 0, name
        elif "norm" in name:
            torch.testing.assert_close(parameter.data, torch.ones(width), rtol=0, atol=0)
        else:
            assert name in ("pos_embed", "y_embedder.embedding_table.weight") or name.startswith("t_embedder.mlp.")
            assert_normal(parameter)


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "rows"), [(0.1, 11), (0.0, 10)])
def test_null_row_exists_only_where_labels_are_dropped(make_model: MakeModel, probability: float, rows: int) -> None:
    model = make_model(class_dropout_prob=probability)
    assert model.state_dict()["y_embedder.embedding_table.weight"].shape == (rows, 32)


@each_conditioning
def test_training_with_dropout_1_sees_the_null_class_only(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(class_dropout_prob=1.0, conditioning=conditioning)
    latents, timestep, labels = inputs_for(model)
    null = torch.full_like(labels, model.config.null_class or 0)
    expected, with_labels = predict(model, latents, timestep, null), predict(model, latents, timestep, labels)
    torch.testing.assert_close(predict(model.train(), latents, timestep, labels), expected, rtol=0, atol=0)
    assert largest_difference(with_labels, expected) > 1e-4


def test_training_without_dropout_keeps_every_label(make_model: MakeModel) -> None:
    model = make_model(class_dropout_prob=0.0)
    expected = predict(model)
    torch.testing.assert_close(predict(model.train()), expected, rtol=0, atol=0)


@each_conditioning
def test_label_dropout_is_drawn_once_per_sample(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(class_dropout_prob=0.3, conditioning=conditioning)
    timestep, count = torch.tensor([500, 500]), 2000
    kept, dropped = model.precompute(timestep, torch.tensor([3, 10])).detach()  # each (K, D)
    drawn = model.train().precompute(timestep[:1].expand(count), torch.full((count,), 3)).detach()
    is_dropped = (drawn - dropped).flatten(1).norm(dim=1) < (drawn - kept).flatten(1).norm(dim=1)
    # Whichever it is, it is the same in every block.
    torch.testing.assert_close(drawn, torch.where(is_dropped[:, None, None], dropped, kept), rtol=0, atol=1e-6)
    assert is_dropped.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / count))


@each_conditioning
def test_unconditional_model_takes_no_labels(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(num_classes=0, conditioning=conditioning)
    latents, timestep, _ = inputs_for(model)
    assert not any("y_embedder" in name for name in model.state_dict())
    assert predict(model, latents, timestep).shape == (2, 8, 8, 8)
    with pytest.raises(ValueError, match="no class_labels"):
        model(latents, timestep, torch.tensor([0, 1]))


def test_missing_labels_are_an_error(make_model: MakeModel) -> None:
    model = make_model()
    latents, timestep, _ = inputs_for(model)
    with pytest.raises(ValueError, match="labels of 10 classes"):
        model(latents, timestep)


def test_missing_timestep_is_an_error(make_model: MakeModel) -> None:
    model = make_model()
    latents, _, labels = inputs_for(model)
    with pytest.raises(ValueError, match="timestep"):
        model(latents, None, labels)


# --- Patches, positions and timesteps --------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_are_taken_and_put_back_row_by_row(make_model: MakeModel, patch: int) -> None:
    model = make_model(patch_size=patch, sample_size=(6, 12), learn_sigma=False)
    image, _, _ = inputs_for(model)
    rows, columns = 6 // patch, 12 // patch
    patches = [
        image[:, :, patch * row : patch * (row + 1), patch * column : patch * (column + 1)]
        for row in range(rows)
        for column in range(columns)
    ]
    embedded = torch.stack([piece.flatten(1) for piece in patches], dim=1)  # channel, row, column
    weight, bias = model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias
    torch.testing.assert_close(model.x_embedder(image), F.linear(embedded, weight, bias), rtol=0, atol=1e-5)
    tokens = torch.stack([piece.permute(0, 2, 3, 1).flatten(1) for piece in patches], dim=1)  # row, column, channel
    torch.testing.assert_close(model.unpatchify(tokens, 6, 12), image, rtol=0, atol=0)
    assert predict(model).shape == image.shape


def test_positions_of_a_rectangle_encode_column_then_row(make_model: MakeModel) -> None:
    table = make_model(patch_size=2, sample_size=(4, 6)).pos_embed[0]  # 2 x 3 patches
    quarter = table.shape[1] // 4
    for token in range(6):
        row, column = divmod(token, 3)
        expected = [
            wave(position * 10000 ** (-k / quarter))
            for position in (column, row)
            for wave in (math.sin, math.cos)
            for k in range(quarter)
        ]
        torch.testing.assert_close(table[token], torch.tensor(expected), rtol=0, atol=1e-6)


class CountSines(TorchDispatchMode):
    """Counts the sines in float64, which only a position table needs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.sin.default and args[0].dtype == torch.float64
        return func(*args, **(kwargs or {}))


def sines(model: DiTTransformer, size: tuple[int, int]) -> int:
    with CountSines() as counted:
        predict(model, *inputs_for(model, size=size))
    return counted.count


def test_positions_of_another_size_are_computed_once(make_model: MakeModel) -> None:
    model = make_model(hidden_size=36, num_attention_heads=3)  # a width of its own: nothing is held yet
    assert sines(model, (8, 8)) == 0  # the trained size
    assert [sines(model, (12, 4)) for _ in range(3)] == [2, 0, 0]  # of columns and of rows
    assert [sines(model, (4, 12)) for _ in range(2)] == [2, 0]
    assert sines(copy.deepcopy(model), (12, 4)) == 0


def test_few_position_tables_are_held(make_model: MakeModel) -> None:
    model = make_model(hidden_size=44, num_attention_heads=11)
    tables = [weakref.ref(model.positions(2, width)) for width in range(5, 5 + 3 * POSITION_TABLES)]
    gc.collect()
    held = [table for table in tables if table() is not None]
    assert held == tables[-POSITION_TABLES:]


def test_positions_that_inference_asked_for_first_can_be_trained_with(make_model: MakeModel) -> None:
    model = make_model(hidden_size=52, num_attention_heads=13)
    inputs = inputs_for(model, size=(12, 12))
    with torch.inference_mode():
        expected = model(*inputs).sample
    assert not model.positions(6, 6).is_inference()
    scale = torch.ones(52, requires_grad=True)
    (model.positions(6, 6) * scale).sum().backward()  # keeps the table for the backward pass
    output = model(*inputs).sample
    output.sum().backward()
    torch.testing.assert_close(output, expected.clone(), rtol=1e-6, atol=1e-6)


def test_positions_of_a_trace_are_not_held(make_model: MakeModel) -> None:
    model = make_model(hidden_size=60, num_attention_heads=15)
    inputs = inputs_for(model, size=(12, 4))
    expected = predict(make_model(hidden_size=60, num_attention_heads=15), *inputs)

    def run(*tensors: Tensor) -> Tensor:
        return model(*tensors).sample

    make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    with FakeTensorMode() as mode:
        model.positions(6, 2)
        assert mode is not None
    torch.testing.assert_close(predict(model, *inputs), expected, rtol=0, atol=1e-6)
    program = torch.export.export(model, inputs)
    torch.testing.assert_close(program.module()(*inputs).sample, expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs).sample, expected, rtol=0, atol=1e-5)


def test_positions_follow_the_device_of_the_model(make_model: MakeModel) -> None:
    model: Any = make_model(hidden_size=68, num_attention_heads=17)
    assert model.positions(6, 2).device.type == "cpu"
    assert model.to("meta").positions(6, 2).device.type == "meta"


@pytest.mark.parametrize("size", [(16, 16), (4, 12), (12, 4)])
@each_conditioning
def test_sincos_model_takes_every_size(make_model: MakeModel, conditioning: str, size: tuple[int, int]) -> None:
    model = make_model(sample_size=8, conditioning=conditioning)
    inputs = inputs_for(model, size=size)
    configured_for_it = make_model(sample_size=size, conditioning=conditioning)
    configured_for_it.load_state_dict(model.state_dict())
    torch.testing.assert_close(predict(model, *inputs), predict(configured_for_it, *inputs), rtol=0, atol=1e-6)
    assert predict(model, *inputs).shape == (2, 8, *size)


def test_learned_positions_take_part_and_reject_other_sizes(make_model: MakeModel) -> None:
    model = make_model(pos_embed="learned", sample_size=(8, 12))
    assert model.state_dict()["pos_embed"].shape == (1, 4 * 6, 32)
    sample = predict(model)
    with torch.no_grad():
        model.pos_embed.copy_(model.pos_embed.flip(1))
    assert largest_difference(predict(model), sample) > 1e-3
    with pytest.raises(ValueError, match="cover 4x6 patches, not 6x4"):
        predict(model, *inputs_for(model, size=(12, 8)))


@pytest.mark.parametrize("size", [(7, 8), (8, 7)])
def test_sizes_that_the_patches_do_not_tile_are_errors(make_model: MakeModel, size: tuple[int, int]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not divisible by the patch size 2"):
        predict(model, *inputs_for(model, size=size))


@pytest.mark.parametrize("value", [7, 7.0, 6.5])
def test_timestep_may_be_one_number_whole_or_not(make_model: MakeModel, value: float) -> None:
    model = make_model()
    latents, _, labels = inputs_for(model)
    expected = predict(model, latents, torch.tensor([value, value], dtype=torch.float64), labels)
    torch.testing.assert_close(predict(model, latents, value, labels), expected, rtol=0, atol=0)
    assert largest_difference(expected, predict(model, latents, 6, labels)) > 1e-5


# --- Condition, attention, outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditioning", "vectors"), [("adaln_zero", 14), ("adaln", 10), ("cross_attention", 2), ("in_context", 2)]
)
def test_condition_given_equals_condition_computed(make_model: MakeModel, conditioning: str, vectors: int) -> None:
    model = make_model(conditioning=conditioning)
    latents, timestep, labels = inputs_for(model)
    condition = model.precompute(timestep, labels).detach()
    assert condition.shape == (2, vectors, 32)
    expected = predict(model, latents, timestep, labels)
    torch.testing.assert_close(predict(model, latents, precomputed=condition), expected, rtol=0, atol=0)
    other = model.precompute(timestep.flip(0), labels).detach()
    assert largest_difference(predict(model, latents, precomputed=other), expected) > 1e-4


@pytest.mark.parametrize(("conditioning", "vectors_per_branch"), [("adaln_zero", 3), ("adaln", 2)])
def test_condition_of_a_fresh_model_changes_nothing(
    make_model: MakeModel, conditioning: str, vectors_per_branch: int
) -> None:
    model = DiTTransformer(make_model(conditioning=conditioning).config)
    _, timestep, labels = inputs_for(model)
    blocks, final = model.precompute(timestep, labels).detach().split([4 * vectors_per_branch, 2], dim=1)
    neutral = torch.tensor([0.0, 1.0, 0.0])  # shift, 1 + scale, gate
    for part, expected in ((blocks, neutral[:vectors_per_branch].repeat(4)), (final, neutral[:2])):
        torch.testing.assert_close(part, expected[None, :, None].expand_as(part), rtol=0, atol=0)


@each_conditioning
def test_eager_and_sdpa_attention_agree(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning)
    samples = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        samples[implementation] = predict(model)
    torch.testing.assert_close(samples["eager"], samples["sdpa"], rtol=0, atol=1e-5)


@each_conditioning
def test_attention_weights_of_chosen_blocks(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning, num_hidden_layers=3)
    inputs = inputs_for(model)
    with torch.no_grad():
        output = model(*inputs, output_attentions=[0, 2])
        of_the_last = model(*inputs, output_attentions=[2]).attentions
    tokens = 16 + 2 * (conditioning == "in_context")
    assert [weights.shape for weights in output.attentions] == [(2, 4, tokens, tokens)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, tokens), rtol=0, atol=1e-6)
    assert len(of_the_last) == 1
    torch.testing.assert_close(output.attentions[1], of_the_last[0], rtol=0, atol=1e-6)
    assert largest_difference(output.attentions[0], output.attentions[1]) > 1e-3
    torch.testing.assert_close(output.sample, predict(model, *inputs), rtol=0, atol=1e-6)


def test_a_hook_and_true_give_the_attention_weights_of_every_block(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=3)
    inputs, seen = inputs_for(model), []
    with torch.no_grad():
        weights = model(*inputs, output_attentions=True).attentions
        block: Any = model.blocks[1]
        hook = block.attn.weights.register_forward_hook(lambda _, __, output: seen.append(output))
        model(*inputs)
        hook.remove()
        model(*inputs)
    assert len(weights) == 3
    torch.testing.assert_close(seen, [weights[1]], rtol=0, atol=1e-6)


@each_conditioning
def test_a_block_is_whole_by_itself(make_model: MakeModel, conditioning: str) -> None:
    """It computes its own modulations from the condition, and returns one tensor."""
    model = make_model(conditioning=conditioning, num_hidden_layers=3)
    latents, timestep, labels = inputs_for(model)
    with torch.no_grad():
        condition = model.condition(timestep, labels)
        tokens = model.embed(latents)
        expected = model.transform(tokens, condition)
        if conditioning == "in_context":
            tokens = torch.cat([tokens, condition], dim=1)
        for block in model.blocks:
            tokens = block(tokens, condition)
        actual = model.final_layer(tokens, condition)[:, : expected.shape[1]]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("block", [2, -3])
def test_attention_weights_of_a_block_that_is_not_there_are_an_error(make_model: MakeModel, block: int) -> None:
    model = make_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="output_attentions"):
        predict(model, *inputs_for(model), output_attentions=[block])


def test_return_dict_false_gives_a_tuple(make_model: MakeModel) -> None:
    model = make_model()
    inputs = inputs_for(model)
    expected = predict(model, *inputs)
    with torch.no_grad():
        (sample,) = model(*inputs, return_dict=False)
        with_attention, attentions = model(*inputs, output_attentions=[0], return_dict=False)
    torch.testing.assert_close(sample, expected, rtol=0, atol=0)
    torch.testing.assert_close(with_attention, expected, rtol=0, atol=1e-6)
    assert len(attentions) == 1


# --- Training and tracing --------------------------------------------------------------------------------------------


def gradients(model: DiTTransformer) -> tuple[dict[str, Tensor], int]:
    """Gradients of every parameter, and how often the blocks' MLPs ran."""
    calls: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".mlp") and name.startswith("blocks."):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model(*inputs_for(model)).sample.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, len(calls)


@each_conditioning
def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(make_model: MakeModel, conditioning: str) -> None:
    plain = make_model(conditioning=conditioning, class_dropout_prob=0.0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    (expected, calls), (actual, checkpointed_calls) = gradients(plain), gradients(checkpointed)
    assert (calls, checkpointed_calls) == (2, 4)
    assert expected.keys() == dict(plain.named_parameters()).keys()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


@each_conditioning
def test_compiles_without_graph_breaks(make_model: MakeModel, conditioning: str) -> None:
    torch.compiler.reset()
    model = make_model(conditioning=conditioning)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, *inputs_for(model)), predict(model), rtol=0, atol=1e-6)


@each_conditioning
def test_exports_with_a_dynamic_batch(make_model: MakeModel, conditioning: str) -> None:
    model = make_model(conditioning=conditioning)
    dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, inputs_for(model), dynamic_shapes=(dynamic,) * 3, strict=False)
    inputs = inputs_for(model, count=5)
    torch.testing.assert_close(program.module()(*inputs).sample, predict(model, *inputs), rtol=0, atol=1e-6)


# --- Files -----------------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    *({"conditioning": name} for name in CONDITIONINGS),
    {"pos_embed": "learned", "sample_size": (8, 12)},
    {"num_classes": 0},
    {"class_dropout_prob": 0.0, "learn_sigma": False, "patch_size": 4},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_save_and_load_give_the_same_model(make_model: MakeModel, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(predict(loaded), predict(model), rtol=0, atol=FORWARD_ATOL)
    assert not loaded.training


def elsewhere(weight: Tensor) -> Tensor:
    """A copy at 8 bytes beyond PyTorch's alignment, where the weights of a mapped file lie."""
    memory = torch.empty(weight.numel() + 2)[2:].view(weight.shape)
    assert memory.data_ptr() % 64 == 8
    return memory.copy_(weight)


@pytest.mark.parametrize("count", [1, 2])
def test_weights_may_lie_anywhere_in_memory(make_model: MakeModel, count: int) -> None:
    model = make_model()
    weights = {name: elsewhere(weight) for name, weight in model.state_dict().items()}
    moved = DiTTransformer.from_state_dict(model.config, weights)
    assert {parameter.data_ptr() % 64 for parameter in moved.parameters()} == {8}
    inputs = inputs_for(model, count)
    torch.testing.assert_close(predict(moved, *inputs), predict(model, *inputs), rtol=0, atol=FORWARD_ATOL)


def test_files_hold_the_official_names(golden_a: Golden, tmp_path: Path) -> None:
    golden_a.model().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    official = {name: weight for name, weight in golden_a.weights.items() if name != "pos_embed"}
    torch.testing.assert_close(saved, official, rtol=0, atol=0)


def test_saves_in_shards(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = DiTTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_auto_model_loads_it(make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DiTTransformer
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(predict(loaded), predict(model), rtol=0, atol=FORWARD_ATOL)


def test_loading_reports_its_keys_where_asked(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model, info = DiTTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, DiTTransformer)
    assert not info["missing_keys"]


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Path:
    """A folder with a model, to be damaged."""
    make_model().save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove weights; a double underscore in a name stands for a dot."""
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    weights.update({name.replace("__", "."): weight for name, weight in changes.items()})
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def loading_error(folder: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        DiTTransformer.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def test_missing_weights_are_an_error_that_names_them(saved: Path) -> None:
    change_weights(saved, final_layer__linear__bias=None)
    message = loading_error(saved)
    assert "missing" in message
    assert "final_layer.linear.bias" in message
    assert str(saved) in message


def test_foreign_weights_are_an_error_that_names_them(saved: Path) -> None:
    change_weights(saved, blocks__2__attn__proj__bias=torch.zeros(32))
    message = loading_error(saved)
    assert "unexpected" in message
    assert "blocks.2.attn.proj.bias" in message


def test_weights_of_another_shape_are_an_error_that_names_them(saved: Path) -> None:
    change_weights(saved, y_embedder__embedding_table__weight=torch.zeros(1001, 32))
    message = loading_error(saved)
    assert "y_embedder.embedding_table.weight" in message
    assert "1001" in message


@pytest.mark.parametrize("kept", [0.5, 0.0001, 0.0])
def test_truncated_weights_are_an_error_that_names_the_file(saved: Path, kept: float) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    assert str(saved) in loading_error(saved)


def test_absent_weights_are_an_error(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert str(saved) in loading_error(saved)


def test_absent_config_is_an_error_that_names_the_file(saved: Path) -> None:
    (saved / "config.json").unlink()  # the defaults are another model
    assert "config.json" in loading_error(saved)


def test_damaged_config_is_an_error_that_names_the_file(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    assert "config.json" in loading_error(saved)


def test_fine_tuning_on_other_classes_starts_a_new_label_table(make_model: MakeModel, saved: Path) -> None:
    loaded = DiTTransformer.from_pretrained(saved, num_classes=200, ignore_mismatched_sizes=True)
    assert loaded.config.num_classes == 200
    new_table = loaded.state_dict()["y_embedder.embedding_table.weight"]
    assert new_table.shape == (201, 32)
    assert_normal(new_table)
    original = make_model().state_dict()
    kept = {name: weight for name, weight in loaded.state_dict().items() if not name.startswith("y_embedder")}
    torch.testing.assert_close(kept, {name: original[name] for name in kept}, rtol=0, atol=0)


def test_loaded_parameters_can_be_trained(saved: Path) -> None:
    model = DiTTransformer.from_pretrained(saved)
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in model.parameters())
    assert "pos_embed" not in dict(model.named_parameters())
