"""What is read off a checkpoint's names and shapes, at the edges of what can be told, and what is refused."""

# Modules by name, and settings of schedulers as plain words.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_hub import DiTConfig, DiTTransformer
from dit_hub.conversion import config_from_official, from_diffusers, to_diffusers, to_official
from dit_hub.conversion.diffusers_layout import (
    DIFFUSERS_NUMERICS,
    config_from_diffusers,
    diffusers_config,
    is_diffusers,
    load_diffusers_folder,
)
from dit_hub.conversion.official import check_official
from dit_hub.layers import sincos_positions

MakeModel = Callable[..., DiTTransformer]


@pytest.fixture
def weights(make_model: MakeModel) -> dict[str, Tensor]:
    """Of a small model, by official names."""
    model = make_model()
    return to_official(model.state_dict(), model.config)


def read(weights: dict[str, Tensor], **overrides: Any) -> DiTConfig:
    return config_from_official(weights, 4, **overrides)


# --- The official layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "classes", "null_class"),
    [(1, 1, None), (2, 1, 1), (3, 2, 2), (999, 998, 998), (1000, 1000, None), (1001, 1000, 1000), (1002, 1001, 1001)],
)
def test_rows_of_the_label_table_are_classes_and_the_null_class(
    weights: dict[str, Tensor], rows: int, classes: int, null_class: int | None
) -> None:
    weights["y_embedder.embedding_table.weight"] = torch.zeros(rows, 32)
    config = read(weights)
    assert (config.num_classes, config.null_class) == (classes, null_class)
    assert (config.class_dropout_prob > 0) == (null_class is not None)
    # Told how many are classes, the rest follows.
    assert read(weights, num_classes=rows).null_class is None
    if rows > 1:
        assert read(weights, num_classes=rows - 1).null_class == rows - 1


def test_positions_are_the_fixed_table_up_to_their_dtype(weights: dict[str, Tensor]) -> None:
    table = weights["pos_embed"]
    for change, kind in (
        (0.0, "sincos"), (7e-7, "sincos"), (3e-6, "learned"), (0.5, "learned"), (1e3, "learned")
    ):  # fmt: skip
        changed = table.clone()
        changed[0, 3, 5] += change
        assert read({**weights, "pos_embed": changed}).pos_embed == kind, change
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert read({**weights, "pos_embed": table.to(dtype)}).pos_embed == "sincos"
        assert read({**weights, "pos_embed": (table + 0.1).to(dtype)}).pos_embed == "learned"


def test_the_input_size_is_that_of_the_square_or_as_told(weights: dict[str, Tensor]) -> None:
    assert read(weights).sample_size == 8
    weights["pos_embed"] = sincos_positions(2, 6, 32)  # 12 tokens are no square
    with pytest.raises(ValueError, match="so the input size cannot be known"):
        read(weights)
    config = read(weights, sample_size=(4, 12))
    assert (config.sample_size, config.pos_embed) == ((4, 12), "sincos")
    assert read(weights, sample_size=(12, 4)).pos_embed == "learned"
    # A square of another size than the table's has learned positions, if any.
    assert read(weights, sample_size=6).pos_embed == "learned"
    # A width that has no fixed table: sines and cosines of rows and columns take a multiple of 4.
    narrow = {**weights, "x_embedder.proj.weight": torch.zeros(6, 4, 2, 2), "pos_embed": torch.zeros(1, 16, 6)}
    assert config_from_official(narrow, 2, hidden_size=6, sample_size=8).pos_embed == "learned"


@pytest.mark.parametrize(("rows", "conditioning"), [(6, "adaln_zero"), (4, "adaln")])
def test_modulations_per_block_tell_the_conditioning(make_model: MakeModel, rows: int, conditioning: str) -> None:
    model = make_model(conditioning=conditioning)
    assert model.state_dict()["blocks.0.adaLN_modulation.1.weight"].shape == (rows * 32, 32)
    config = read(to_official(model.state_dict(), model.config))
    assert config.conditioning == conditioning


def test_shapes_tell_the_rest(make_model: MakeModel) -> None:
    fields = {"num_hidden_layers": 3, "mlp_ratio": 1.5, "in_channels": 2, "patch_size": 4, "sample_size": 12,
              "timestep_freq_dim": 20, "learn_sigma": False}  # fmt: skip
    model = make_model(**fields)
    config = read(to_official(model.state_dict(), model.config))
    assert {name: getattr(config, name) for name in fields} == fields
    assert (config.hidden_size, config.num_attention_heads) == (32, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_embedder.proj.weight": None}, r"the weight 'x_embedder\.proj\.weight' is missing\.$"),
        ({"blocks.0.mlp.fc1.weight": None}, r"the weight 'blocks\.0\.mlp\.fc1\.weight' is missing\.$"),
        ({"x_embedder.proj.weight": torch.zeros(32)}, "a weight has an unexpected shape"),
        ({"t_embedder.mlp.0.weight": torch.zeros(32)}, "a weight has an unexpected shape"),
        ({"pos_embed": torch.zeros(16, 32)}, "a weight has an unexpected shape"),
    ],
)
def test_what_is_no_dit_is_one_sentence(weights: dict[str, Tensor], change: dict[str, Any], words: str) -> None:
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"This is no DiT checkpoint: {words}"):
        read(changed)


def test_official_weights_keep_their_dtype_and_come_with_their_table(make_model: MakeModel) -> None:
    model = make_model(sample_size=(4, 8)).to(torch.bfloat16)
    weights = to_official(model.state_dict(), model.config)
    assert next(iter(weights)) == "pos_embed"
    assert weights["pos_embed"].dtype == torch.bfloat16
    assert torch.equal(weights["pos_embed"], sincos_positions(2, 4, 32).bfloat16())
    learned = make_model(pos_embed="learned")
    converted = to_official(learned.state_dict(), learned.config)
    assert converted is not learned.state_dict()
    assert torch.equal(converted["pos_embed"], learned.pos_embed)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"conditioning": "adaln"}, r"has conditioning 'adaln_zero' only, not 'adaln'"),
        ({"timestep_freq_shift": 1.0}, r"has timestep_freq_shift 0 only, not 1\.0"),
        ({"norm_eps": 1e-5}, r"has norm_eps 1e-06 only, not 1e-05"),
        ({"mlp_norm_eps": 1e-5}, r"has mlp_norm_eps None only, not 1e-05"),
    ],
)
def test_what_the_official_code_would_compute_otherwise_is_refused(fields: dict[str, Any], words: str) -> None:
    check_official(DiTConfig())
    with pytest.raises(ValueError, match=words):
        check_official(DiTConfig(**fields))


# --- diffusers' layout -----------------------------------------------------------------------------------------------

STOCK: dict[str, Any] = {"timestep_freq_dim": 256, "num_classes": 1000}

FIELDS: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "norm_type": "ada_norm_zero",
    "sample_size": 16,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 6,
    "num_attention_heads": 5,
    "attention_head_dim": 8,
    "num_layers": 7,
    "num_embeds_ada_norm": 11,
    "norm_eps": 2e-5,
}


def test_fields_of_diffusers_are_ours() -> None:
    config = config_from_diffusers(FIELDS)
    assert (config.sample_size, config.patch_size, config.in_channels, config.num_classes) == (16, 4, 3, 11)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (40, 5, 7)
    assert config.learn_sigma
    # The epsilon of a file is that of the norm before the MLP; the other one is fixed in diffusers' code.
    assert (config.norm_eps, config.mlp_norm_eps, config.timestep_freq_shift) == (1e-6, 2e-5, 1)
    assert diffusers_config(config) == {
        name: value for name, value in FIELDS.items() if name not in ("_class_name", "norm_type")
    }
    assert config_from_diffusers({**FIELDS, "_class_name": "Transformer2DModel"}).to_dict() == config.to_dict()
    assert config_from_diffusers(FIELDS, timestep_freq_shift=0.0).timestep_freq_shift == 0
    without = {name: value for name, value in FIELDS.items() if name != "norm_eps"}
    assert config_from_diffusers(without).mlp_norm_eps == DIFFUSERS_NUMERICS["mlp_norm_eps"] == 1e-5


@pytest.mark.parametrize(("out_channels", "learn_sigma"), [(3, False), (None, False), (0, False), (6, True)])
def test_twice_the_channels_are_a_learned_variance(out_channels: int | None, learn_sigma: bool) -> None:
    assert config_from_diffusers({**FIELDS, "out_channels": out_channels}).learn_sigma == learn_sigma


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "UNet2DModel"},
            "The config is of a UNet2DModel of norm_type 'ada_norm_zero', which is no DiT",
        ),
        ({"norm_type": "ada_norm_single"}, "of norm_type 'ada_norm_single', which is no DiT"),
        ({"patch_size": None}, "which is no DiT"),
        ({"num_layers": ...}, "The config of the DiTTransformer2DModel is not complete: 'num_layers'"),
        ({"num_attention_heads": None}, "The config of the DiTTransformer2DModel is not complete: unsupported operand"),
    ],
)
def test_what_is_no_dit_of_diffusers_is_one_sentence(change: dict[str, Any], words: str) -> None:
    fields = {name: value for name, value in {**FIELDS, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=words):
        config_from_diffusers(fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"conditioning": "adaln"}, "has conditioning 'adaln_zero' only, not 'adaln'"),
        ({"pos_embed": "learned"}, "has pos_embed 'sincos' only, not 'learned'"),
        ({"timestep_freq_dim": 128}, "has timestep_freq_dim 256 only, not 128"),
        ({"mlp_ratio": 2.0}, r"has mlp_ratio 4 only, not 2\.0"),
        ({"norm_eps": 1e-5}, "has norm_eps 1e-06 only, not 1e-05"),
        ({"parameterization": "flow", "learn_sigma": False}, "has parameterization 'diffusion' only, not 'flow'"),
        ({"class_dropout_prob": 0.0}, "always has a null class and a square input"),
        ({"sample_size": (16, 32)}, "always has a null class and a square input"),
        ({"timestep_freq_shift": 0.5}, r"has timestep_freq_shift 1, not 0\.5"),
        ({"timestep_freq_shift": 2.0}, r"has timestep_freq_shift 1, not 2\.0"),
    ],
)
def test_what_diffusers_would_compute_otherwise_is_refused(fields: dict[str, Any], words: str) -> None:
    for shift in (0.0, 1.0):  # both are said of a folder, the one by its patch
        assert diffusers_config(DiTConfig(timestep_freq_shift=shift))["norm_eps"] == 1e-6
    with pytest.raises(ValueError, match=words):
        diffusers_config(DiTConfig(**fields))


@pytest.mark.parametrize("blocks", [1, 2])
def test_names_and_tensors_go_there_and_back(make_model: MakeModel, blocks: int) -> None:
    model = make_model(**STOCK, num_hidden_layers=blocks)
    ours = model.state_dict()
    theirs = to_diffusers(ours, blocks)
    assert is_diffusers(theirs)
    assert not is_diffusers(ours)
    # 4 of the patches and the last layer, 6 of each block, 3 copies of embedders in each; an embedding has no bias.
    assert len(theirs) == 2 * (3 + blocks * (4 + 3 + 3)) - blocks
    query, key, value = ours[f"blocks.{blocks - 1}.attn.qkv.bias"].chunk(3)
    for name, tensor in (("to_q", query), ("to_k", key), ("to_v", value)):
        assert torch.equal(theirs[f"transformer_blocks.{blocks - 1}.attn1.{name}.bias"], tensor)
    storages = [tensor.untyped_storage().data_ptr() for name, tensor in theirs.items() if ".emb." in name]
    assert len(set(storages)) == len(storages)  # safetensors writes no tensor twice
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    back = from_diffusers({**theirs, "pos_embed.pos_embed": torch.ones(3), "other": torch.zeros(1)})
    assert torch.equal(back.pop("pos_embed"), torch.ones(3))
    assert torch.equal(back.pop("other"), torch.zeros(1))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_what_is_missing_stays_missing(make_model: MakeModel) -> None:
    model = make_model(**STOCK)
    theirs = to_diffusers(model.state_dict(), 2)
    for lost, name in (
        ("transformer_blocks.1.attn1.to_k.weight", "blocks.1.attn.qkv.weight"),
        ("transformer_blocks.0.ff.net.2.bias", "blocks.0.mlp.fc2.bias"),
        ("transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight"),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias", "t_embedder.mlp.0.bias"),
    ):
        back = from_diffusers({key: tensor for key, tensor in theirs.items() if key != lost})
        assert set(model.state_dict()) - set(back) == {name}
    assert from_diffusers({"pos_embed.proj.weight": torch.ones(1)}) == {"x_embedder.proj.weight": torch.ones(1)}
    changed = {**theirs, "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"blocks\.1\..*linear_2\.bias differs from .*blocks\.0\..*must be equal"):
        from_diffusers(changed)


# --- Folders of diffusers --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """The transformer/ folder of a diffusers pipeline, without weights."""
    config = diffusers_config(make_model(**STOCK).config)
    fields = {**config, "_class_name": "DiTTransformer2DModel", "norm_type": "ada_norm_zero"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def marked(make_model: MakeModel, mark: float) -> dict[str, Tensor]:
    """Weights in diffusers' layout that a bias tells from others."""
    weights = to_diffusers(make_model(**STOCK).state_dict(), 2)
    return {**weights, "proj_out_2.bias": torch.full_like(weights["proj_out_2.bias"], mark)}


def test_the_variant_is_taken_and_safetensors_come_first(folder: Path, make_model: MakeModel) -> None:
    def loaded(**options: Any) -> float:
        model = load_diffusers_folder(folder, **options)
        assert not model.training
        return model.final_layer.linear.bias[0].item()

    with pytest.raises(ValueError, match=r": there are no weights named diffusion_pytorch_model\.safetensors or alike"):
        loaded()
    torch.save(marked(make_model, 1.0), folder / "diffusion_pytorch_model.bin")
    assert loaded() == 1
    save_file(marked(make_model, 2.0), folder / "diffusion_pytorch_model.safetensors")
    assert loaded() == 2
    with pytest.raises(ValueError, match=r"no weights named diffusion_pytorch_model\.fp16\.safetensors"):
        loaded(variant="fp16")
    torch.save(marked(make_model, 3.0), folder / "diffusion_pytorch_model.fp16.bin")
    assert (loaded(variant="fp16"), loaded()) == (3, 2)
    for number, index in (
        (4.0, "diffusion_pytorch_model.fp16.safetensors.index.json"),
        (5.0, "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ):
        weights = marked(make_model, number)
        save_file(weights, folder / f"part-{number}.safetensors")
        (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(weights, f"part-{number}.safetensors")}))
        assert loaded(variant="fp16") == number


def test_a_table_that_older_versions_saved_is_not_asked_for(folder: Path, make_model: MakeModel) -> None:
    weights = {**marked(make_model, 0.0), "pos_embed.pos_embed": torch.zeros(1, 16, 32)}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    model = load_diffusers_folder(folder, class_dropout_prob=0.2)
    assert torch.equal(model.pos_embed, sincos_positions(4, 4, 32))
    assert model.config.class_dropout_prob == 0.2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"has no config\.json"),
        ("{", r"config\.json is damaged: it is not JSON"),
        ("[" * 100_000, r"config\.json is damaged: it is not JSON"),
        ("[1]", r"config\.json is damaged: it holds no fields"),
    ],
    ids=["absent", "torn", "deep", "list"],
)
def test_a_config_that_is_none_is_one_sentence(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        load_diffusers_folder(tmp_path)
