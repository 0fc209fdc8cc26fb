"""`DiTConfig`: the published models by name, and which configurations exist."""

import json
from pathlib import Path
from typing import Any

import pytest

from dit_hub import DiTConfig

# Paper, Table 1: layers, hidden size, heads.
PAPER_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PAPER_MODELS = [(f"DiT-{size}/{patch}", patch, *PAPER_SIZES[size]) for size in PAPER_SIZES for patch in (2, 4, 8)]


def error_of(**fields: Any) -> str:
    """The error of `DiTConfig` for these fields, which is one sentence on one line."""
    with pytest.raises(ValueError) as caught:
        DiTConfig(**fields)
    assert_sentence(str(caught.value))
    return str(caught.value)


def assert_sentence(message: str) -> None:
    assert message.endswith(".")
    assert "\n" not in message


def saved_and_loaded(config: DiTConfig, folder: Path) -> DiTConfig:
    config.save_pretrained(folder)
    return DiTConfig.from_pretrained(folder)


# --- Published models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "patch", "layers", "width", "heads"), PAPER_MODELS)
def test_published_models_have_the_papers_sizes(name: str, patch: int, layers: int, width: int, heads: int) -> None:
    config = DiTConfig.from_name(name)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert config.patch_size == patch
    assert (config.in_channels, config.out_channels) == (4, 8)
    assert (config.num_classes, config.null_class) == (1000, 1000)
    assert config.conditioning == "adaln_zero"


def test_defaults_are_the_published_xl_2() -> None:
    assert DiTConfig().to_dict() == DiTConfig.from_name("DiT-XL/2").to_dict()


@pytest.mark.parametrize("name", ["dit-xl/2", "DIT-XL/2", "Dit-Xl/2"])
def test_names_ignore_upper_and_lower_case(name: str) -> None:
    assert DiTConfig.from_name(name).to_dict() == DiTConfig.from_name("DiT-XL/2").to_dict()


@pytest.mark.parametrize(("image_size", "sample_size"), [(256, 32), (512, 64)])
def test_image_size_sets_the_latent_size(image_size: int, sample_size: int) -> None:
    assert DiTConfig.from_name("DiT-XL/2", image_size=image_size).sample_size == sample_size


@pytest.mark.parametrize("image_size", [0, -256, 100_000_000])
def test_an_image_size_out_of_range_is_an_error(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be above 0 and at most 524288, not {image_size}") as caught:
        DiTConfig.from_name("DiT-B/8", image_size=image_size)
    assert_sentence(str(caught.value))


@pytest.mark.parametrize("image_size", [100, 200])
def test_image_size_that_the_patches_do_not_tile_is_an_error(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size {image_size} is not divisible by 64") as caught:
        DiTConfig.from_name("DiT-B/8", image_size=image_size)
    assert_sentence(str(caught.value))


def test_from_name_takes_overrides() -> None:
    config = DiTConfig.from_name("DiT-S/4", num_classes=7, conditioning="in_context")
    assert (config.num_classes, config.conditioning, config.hidden_size) == (7, "in_context", 384)


def test_toy_is_16_pixels_of_rgb_in_16_classes_without_null_class() -> None:
    toy = DiTConfig.from_name("Toy")
    assert (toy.sample_size, toy.patch_size, toy.in_channels, toy.out_channels) == (16, 4, 3, 3)
    assert (toy.num_classes, toy.null_class, toy.pos_embed) == (16, None, "learned")


@pytest.mark.parametrize(("name", "nearest"), [("DiT-XXL/2", "DiT-XL/2"), ("dit-s2", "DiT-S/2"), ("tyo", "toy")])
def test_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="There is no DiT size named") as caught:
        DiTConfig.from_name(name)
    assert_sentence(str(caught.value))
    assert repr(name) in str(caught.value)
    assert nearest in str(caught.value)


# --- Fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("hiden_size", "hidden_size"), ("num_class", "num_classes"), ("patchsize", "patch_size"), ("eps", "norm_eps")],
)
def test_unknown_field_names_the_nearest(typo: str, nearest: str) -> None:
    message = error_of(**{typo: 1})
    assert repr(typo) in message
    assert nearest in message


def test_unknown_field_in_a_file_is_an_error(tmp_path: Path) -> None:
    DiTConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hiden_size": 1152}))
    with pytest.raises(ValueError, match="hidden_size"):
        DiTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hidden_size": 100, "num_attention_heads": 16}, "not divisible by num_attention_heads 16"),
        ({"hidden_size": 42, "num_attention_heads": 2}, "divisible by 4"),
        ({"sample_size": 0}, "sample_size must be above 0 and at most 65536, not 0"),
        ({"sample_size": 65538}, "sample_size must be above 0 and at most 65536, not 65538"),
        ({"sample_size": 31}, "sample_size 31 is not divisible by patch_size 2"),
        ({"sample_size": (32, 33)}, "is not divisible by patch_size 2"),
        ({"sample_size": 0}, "sample_size"),
        ({"sample_size": (-32, 32)}, "sample_size"),
        ({"sample_size": (8, 8, 8)}, "sample_size must be one int or"),
        ({"sample_size": ()}, "sample_size must be one int or"),
        ({"conditioning": "adaln-zero"}, "conditioning must be one of adaln_zero, adaln,"),
        ({"pos_embed": "rope"}, "pos_embed must be"),
        ({"patch_size": 0}, "patch_size must be above 0"),
        ({"in_channels": -4}, "in_channels must be above 0"),
        ({"hidden_size": -1152}, "hidden_size must be above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
        ({"num_attention_heads": -1}, "num_attention_heads must be above 0"),
        ({"mlp_ratio": -4.0}, "mlp_ratio must be above 0"),
        ({"guidance_channels": 0}, "guidance_channels must be 1 or more, not 0"),
        ({"guidance_channels": -1}, "guidance_channels must be 1 or more, not -1"),
        ({"guidance_channels": 5}, "guidance_channels must be at most 4, not 5"),
        ({"guidance_channels": 2, "in_channels": 1}, "guidance_channels must be at most 1, not 2"),
        ({"guidance_channels": True}, "guidance_channels"),
        ({"guidance_channels": 2.5}, "guidance_channels"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"class_dropout_prob": -0.1}, "class_dropout_prob must lie between 0 and 1"),
        ({"class_dropout_prob": 1.1}, "class_dropout_prob must lie between 0 and 1"),
        ({"timestep_freq_dim": 255}, "timestep_freq_dim must be an even number"),
        ({"timestep_freq_shift": 128.0}, "timestep_freq_shift"),  # the frequencies would divide by zero
        ({"norm_eps": -1e-6}, "norm_eps"),
    ],
)
def test_values_that_do_not_fit_are_errors(fields: dict[str, Any], complaint: str) -> None:
    assert complaint in error_of(**fields)


@pytest.mark.parametrize("fields", [{"hidden_size": "1152"}, {"patch_size": 2.5}, {"learn_sigma": "yes"}])
def test_values_of_a_wrong_type_are_errors(fields: dict[str, Any]) -> None:
    assert next(iter(fields)) in error_of(**fields)


@pytest.mark.parametrize(
    ("num_classes", "class_dropout_prob", "null_class"), [(10, 0.1, 10), (10, 0.0, None), (0, 0.1, None)]
)
def test_null_class_exists_where_labels_are_dropped(
    num_classes: int, class_dropout_prob: float, null_class: int | None
) -> None:
    config = DiTConfig(num_classes=num_classes, class_dropout_prob=class_dropout_prob)
    assert config.null_class == null_class


@pytest.mark.parametrize(
    ("fields", "guided"),
    [
        ({}, 3),  # the official family's latents
        ({"parameterization": "sit"}, 3),
        ({"timestep_freq_shift": 1.0}, 4),  # as diffusers computes
        ({"in_channels": 1}, 1),
        ({"in_channels": 3}, 3),
        ({"in_channels": 16}, 16),
        ({"in_channels": 16, "guidance_channels": 3}, 3),
        ({"guidance_channels": 4}, 4),
    ],
)
def test_guided_channels_follow_the_family_unless_given(fields: dict[str, Any], guided: int) -> None:
    assert DiTConfig(**fields).guided_channels == guided


@pytest.mark.parametrize(("in_channels", "guided"), [(4, 3), (3, 3), (2, 2), (1, 1)])
def test_files_of_the_old_default_of_guidance_load(in_channels: int, guided: int, tmp_path: Path) -> None:
    DiTConfig(in_channels=in_channels).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance_channels": 3}))
    assert DiTConfig.from_pretrained(tmp_path).guided_channels == guided


@pytest.mark.parametrize(("in_channels", "pixels"), [(1, True), (2, False), (3, True), (4, False), (16, False)])
def test_grey_and_rgb_are_pixels_and_other_channels_latents(in_channels: int, pixels: bool) -> None:
    assert DiTConfig(in_channels=in_channels).draws_pixels == pixels


@pytest.mark.parametrize(("learn_sigma", "out_channels"), [(True, 6), (False, 3)])
def test_learned_variance_doubles_the_output_channels(learn_sigma: bool, out_channels: int) -> None:
    assert DiTConfig(in_channels=3, learn_sigma=learn_sigma).out_channels == out_channels


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample_size", "loaded", "height_width"),
    [(32, 32, (32, 32)), ((16, 32), (16, 32), (16, 32)), ([16, 32], (16, 32), (16, 32)), ((32, 32), 32, (32, 32))],
)
def test_sample_size_survives_json(
    sample_size: Any, loaded: int | tuple[int, int], height_width: tuple[int, int], tmp_path: Path
) -> None:
    config = saved_and_loaded(DiTConfig(sample_size=sample_size), tmp_path)
    assert config.sample_size == loaded
    assert config.sample_height_width == height_width


@pytest.mark.parametrize("guidance_channels", [None, 2])
def test_guidance_channels_survive_json(guidance_channels: int | None, tmp_path: Path) -> None:
    assert saved_and_loaded(DiTConfig(guidance_channels=guidance_channels), tmp_path).guidance_channels == (
        guidance_channels
    )


def test_every_field_survives_json(tmp_path: Path) -> None:
    fields = {
        "sample_size": (8, 12),
        "patch_size": 4,
        "in_channels": 3,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "mlp_ratio": 2.5,
        "num_classes": 7,
        "class_dropout_prob": 0.25,
        "learn_sigma": False,
        "conditioning": "in_context",
        "pos_embed": "learned",
        "timestep_freq_dim": 64,
        "timestep_freq_shift": 1.0,
        "norm_eps": 1e-5,
        "guidance_channels": 2,
    }
    loaded = saved_and_loaded(DiTConfig(**fields), tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    default = DiTConfig()
    assert all(getattr(default, name) != value for name, value in fields.items())


def test_dictionary_round_trip() -> None:
    config = DiTConfig(sample_size=(8, 12), num_classes=7)
    assert DiTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_auto_config_knows_the_model_type(tmp_path: Path) -> None:
    from transformers import AutoConfig

    DiTConfig(sample_size=16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "diffusion_transformer"
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DiTConfig
    assert config.sample_size == 16
