"""The model's corners: attention functions, epsilons, loading with options, resized label tables."""

# Modules by name, and settings of schedulers as plain words.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface

from dit_hub import DiTConfig, DiTTransformer

MakeModel = Callable[..., DiTTransformer]


@torch.no_grad()
def predict(model: DiTTransformer, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, model.config.in_channels, 8, 8, generator=generator)
    return model(latents, torch.tensor([700, 3]), torch.tensor([4, 9]), **options)


# --- Attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_an_attention_function_of_transformers_is_called(make_model: MakeModel, conditioning: str) -> None:
    calls: list[tuple[Any, ...]] = []

    def recorded(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        calls.append((module.is_causal, tuple(query.shape), mask, options))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    AttentionInterface.register("recorded", recorded)
    model = make_model(conditioning=conditioning)
    expected = predict(model).sample
    model.set_attn_implementation("recorded")
    torch.testing.assert_close(predict(model).sample, expected, rtol=0, atol=1e-5)
    assert len(calls) == (4 if conditioning == "cross_attention" else 2)
    for is_causal, shape, mask, options in calls:
        assert (is_causal, shape, mask) == (False, (2, 4, 16, 8), None)  # heads of 8
        assert options["is_causal"] is False
        assert options["dropout"] == 0
        assert options["scaling"] == 8**-0.5
    # Weights that are asked for come from the attention that is written out; else there are none.
    calls.clear()
    output = predict(model, output_attentions=[1])
    assert [weights.shape for weights in output.attentions] == [(2, 4, 16, 16)]
    assert len(calls) == (3 if conditioning == "cross_attention" else 1)
    model.set_attn_implementation("eager")
    output = predict(model)
    assert output.attentions is None
    torch.testing.assert_close(output.sample, expected, rtol=0, atol=1e-5)
    assert len(predict(model, return_dict=False)) == 1


# --- Epsilons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_each_norm_has_its_epsilon(make_model: MakeModel, conditioning: str) -> None:
    def epsilons(**fields: Any) -> set[tuple[str, float]]:
        model = make_model(conditioning=conditioning, **fields)
        return {(name.rpartition(".")[2], part.eps) for name, part in model.named_modules() if hasattr(part, "eps")}

    both = {("norm1", 0.5), ("norm_final", 0.5)}
    assert epsilons(norm_eps=0.5) == both | {("norm2", 0.5)}
    assert epsilons(norm_eps=0.5, mlp_norm_eps=0.25) == both | {("norm2", 0.25)}


# --- Loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "inner" / "model")
    return tmp_path / "inner" / "model"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_subfolder_and_a_config_of_ones_own_are_heeded(saved: Path, make_model: MakeModel) -> None:
    loaded = DiTTransformer.from_pretrained(saved.parent, subfolder="model")
    assert isinstance(loaded, DiTTransformer)  # and no pair
    assert torch.equal(predict(loaded).sample, predict(make_model()).sample)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"inner/model has no config\.json\."):
        DiTTransformer.from_pretrained(saved.parent, subfolder="model")
    loaded = DiTTransformer.from_pretrained(saved, config=make_model().config)
    assert torch.equal(predict(loaded).sample, predict(make_model()).sample)


def test_an_index_that_names_what_is_not_there_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../away.safetensors"}}))
    with pytest.raises(ValueError, match=r"away\.safetensors"):
        DiTTransformer.from_pretrained(saved)


def test_errors_count_and_list_ten_names(saved: Path, make_model: MakeModel) -> None:
    names = sorted(load_file(saved / "model.safetensors"))
    assert len(names) > 12

    def error(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
        whole = load_file(saved / "model.safetensors")
        rewrite(saved, change)
        with pytest.raises(ValueError, match="weight") as caught:
            DiTTransformer.from_pretrained(saved)
        save_file(whole, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="weight") as of_state_dict:
            DiTTransformer.from_state_dict(make_model().config, change(whole), name=str(saved))
        assert str(of_state_dict.value) == str(caught.value)
        return str(caught.value).removeprefix(f"{saved}: ")

    one, ten, more = names[:1], names[:10], names[:11]
    for some, words in (
        (one, f"1 weight is missing: {one[0]}."),
        (ten, f"10 weights are missing: {', '.join(ten)}."),
        (more, f"11 weights are missing: {', '.join(ten)} and 1 more."),
    ):
        assert error(lambda all, some=some: {key: value for key, value in all.items() if key not in some}) == words
    assert error(lambda all: {**all, "a": torch.ones(1)}) == "1 weight is unexpected: a."
    first, second = "blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc1.bias"
    assert error(lambda all: {**all, first: torch.ones(3)}) == (
        f"1 weight has another shape than the config says: {first} is [3] and should be [128]."
    )
    assert "2 weights have another shape" in error(lambda all: {**all, first: torch.ones(3), second: torch.ones(3)})


def test_weights_of_another_shape_are_drawn_anew_where_allowed(saved: Path) -> None:
    loaded, info = DiTTransformer.from_pretrained(
        saved, num_classes=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert loaded.y_embedder.embedding_table.weight.shape == (4, 32)
    assert info["mismatched_keys"]


def test_a_model_of_a_state_dict_holds_its_very_tensors(make_model: MakeModel) -> None:
    for pos_embed in ("sincos", "learned"):
        model = make_model(pos_embed=pos_embed)
        weights = model.state_dict()
        again = DiTTransformer.from_state_dict(model.config, weights)
        assert all(value.data_ptr() == weights[name].data_ptr() for name, value in again.state_dict().items())
        assert torch.equal(again.pos_embed, model.pos_embed)
        assert again.pos_embed.device.type == "cpu"
        assert torch.equal(predict(again).sample, predict(model).sample)
        assert not again.training


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_config_of_a_variant_names_no_dtype(make_model: MakeModel, variant: str | None, tmp_path: Path) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path, variant=variant)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text).get("dtype") == (None if variant else "bfloat16")
    assert text.endswith("}\n")
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    loaded = DiTTransformer.from_pretrained(tmp_path, variant=variant, dtype=torch.float32)
    assert predict(loaded).sample.isfinite().all()


# --- Other classes ---------------------------------------------------------------------------------------------------


def test_new_classes_start_as_those_of_a_fresh_model(make_model: MakeModel) -> None:
    model = make_model(hidden_size=64).train()
    assert model.resize_class_labels(500) is model
    table = model.y_embedder.embedding_table.weight
    assert table[10:500].std().item() == pytest.approx(0.02, rel=0.02)
    assert table.requires_grad
    assert model.y_embedder.training
    frozen = make_model().eval()
    frozen.y_embedder.embedding_table.weight.requires_grad_(False)
    frozen.to(torch.bfloat16).resize_class_labels(1)
    assert not frozen.y_embedder.embedding_table.weight.requires_grad
    assert not frozen.y_embedder.training
    assert frozen.y_embedder.embedding_table.weight.dtype == torch.bfloat16
    assert frozen.config.num_classes == 1
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"num_classes must be 1 or more, not {count}"):
            frozen.resize_class_labels(count)


def test_a_list_maps_each_new_class(make_model: MakeModel) -> None:
    model = make_model(class_dropout_prob=0.0)
    before = model.y_embedder.embedding_table.weight.detach().clone()
    model.resize_class_labels(4, mapping=[0, None, 9, 0])
    after = model.y_embedder.embedding_table.weight
    assert after.shape == (4, 32)  # no null class
    assert torch.equal(after[[0, 2, 3]], before[[0, 9, 0]])
    for mapping, words in (
        ([4], "old class 4, but those are 0 to 3"),
        ([-1], "old class -1"),
        ({-1: 0}, "new class -1"),
        ({4: 0}, "new class 4, but those are 0 to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            model.resize_class_labels(4, mapping=mapping)


def test_sit_predicts_towards_the_data_and_gives_what_points_to_the_noise(make_model: MakeModel) -> None:
    flow, sit = (make_model(parameterization=name) for name in ("flow", "sit"))
    noisy = torch.randn(2, 4, 8, 8)
    condition = flow.precompute(torch.tensor([100.0, 900.0]), torch.tensor([1, 2]))
    assert torch.equal(sit(noisy, precomputed=condition).sample, -flow(noisy, precomputed=condition).sample)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def test_what_is_asked_of_labels_and_blocks_is_said(make_model: MakeModel) -> None:
    model, unconditional = make_model(), make_model(num_classes=0)
    with pytest.raises(ValueError, match="This model takes labels of 10 classes; class_labels is None"):
        model.precompute(torch.tensor([1]))
    with pytest.raises(ValueError, match="This model takes no class_labels; class_labels is tensor"):
        unconditional.precompute(torch.tensor([1]), torch.tensor([1]))
    for block in (2, -1):
        with pytest.raises(ValueError, match=f"names block {block}, but the blocks are 0 to 1"):
            predict(model, output_attentions=[0, block])
    assert len(predict(model, output_attentions=[0, 1]).attentions) == 2


def test_positions_of_other_sizes_are_on_the_grid_asked_for(make_model: MakeModel) -> None:
    model = make_model(sample_size=(8, 12), patch_size=2)
    assert model.positions(4, 6).shape == (1, 24, 32)
    assert torch.equal(model.positions(4, 6), model.pos_embed)
    assert not torch.equal(model.positions(6, 4), model.pos_embed)
    learned = make_model(sample_size=(8, 12), pos_embed="learned")
    assert learned.pos_embed.shape == (1, 24, 32)
    with pytest.raises(ValueError, match="The learned positions cover 4x6 patches, not 6x4"):
        learned.positions(6, 4)


def test_a_fresh_model_needs_no_gradients_to_start(make_model: MakeModel) -> None:
    fresh = DiTTransformer(DiTConfig(**{**make_model().config.to_dict(), "pos_embed": "learned"}))
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in fresh.parameters())
