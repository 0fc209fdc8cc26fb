"""The layers around the blocks against their definitions."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from dit_hub import DiTConfig
from dit_hub.layers import Float32LayerNorm, Float32Linear, LabelEmbedder, TimestepEmbedder, sinusoid

from .conftest import TINY


def config(**fields: Any) -> DiTConfig:
    return DiTConfig(**{**TINY, **fields})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_layers_compute_in_float32_also_under_autocast(dtype: torch.dtype, bias: bool) -> None:
    layer = Float32Linear(8, 5, bias=bias).to(dtype)
    input = torch.randn(3, 8).to(dtype)
    expected = input.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(input)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6)
    meta = Float32Linear(8, 5, bias=bias, device="meta")  # a device that knows no autocast
    assert meta(torch.empty(3, 8, device="meta", dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_compute_in_float32(affine: bool) -> None:
    layer = Float32LayerNorm(8, eps=0.1, elementwise_affine=affine)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    input = torch.randn(3, 8).bfloat16()
    x = input.double()
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
    layer = layer.to(torch.bfloat16)
    if affine:
        expected = expected * layer.weight.double() + layer.bias.double()
    output = layer(input)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_sinusoids_are_their_equation(shift: float) -> None:
    times = torch.tensor([0.0, 1.0, 37.5, 999.0])
    for row, time in zip(sinusoid(times.to(torch.float64), 12, shift), times.tolist(), strict=True):
        frequencies = [10000 ** (-k / (6 - shift)) for k in range(6)]
        expected = [wave(time * frequency) for wave in (math.cos, math.sin) for frequency in frequencies]
        assert row.dtype == torch.float32
        assert row.tolist() == pytest.approx(expected, abs=2e-4)  # a float32 angle of 999
    assert torch.equal(sinusoid(times, 12), sinusoid(times, 12, 0.0))


def test_sit_counts_its_time_from_noise_to_data() -> None:
    plain, sit = TimestepEmbedder(config()), TimestepEmbedder(config(parameterization="sit", learn_sigma=False))
    sit.load_state_dict(plain.state_dict())
    times = torch.tensor([0, 250, 1000])
    torch.testing.assert_close(sit(times), plain(torch.tensor([1.0, 0.75, 0.0])))
    flow = TimestepEmbedder(config(parameterization="flow", learn_sigma=False))
    flow.load_state_dict(plain.state_dict())
    assert torch.equal(flow(times), plain(times))


def test_labels_are_dropped_in_training_as_often_as_said() -> None:
    embedder = LabelEmbedder(config(class_dropout_prob=0.25))
    labels = torch.full((4000,), 3)
    embedded, table = embedder(labels), embedder.embedding_table.weight
    dropped = embedded.eq(table[10]).all(1)
    assert 0.2 < dropped.float().mean() < 0.3  # seven standard deviations
    assert embedded[~dropped].eq(table[3]).all()


@pytest.mark.parametrize(("probability", "training"), [(1.0, False), (0.0, True)])
def test_labels_stay_in_evaluation_and_without_a_null_class(probability: float, training: bool) -> None:
    embedder = LabelEmbedder(config(class_dropout_prob=probability)).train(training)
    labels = torch.arange(10)
    embedded = embedder(labels)
    assert torch.equal(embedded, embedder.embedding_table.weight[:10])
    assert len(embedder.embedding_table.weight) == (11 if probability else 10)
    assert embedder.to(torch.bfloat16)(labels).dtype == torch.float32
