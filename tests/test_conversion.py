"""Reading checkpoints of every family and layout, and writing them again."""

import argparse
import copy
import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import peft
import pytest
import torch
from diffusers.pipelines import pipeline_utils
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, Trainer, TrainingArguments

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer, loading
from dit_hub.configuration_dit import PUBLISHED_MODELS
from dit_hub.conversion import config_from_official, from_diffusers, load_single_file, to_diffusers, to_official
from dit_hub.conversion.diffusers_layout import OFFICIAL_NUMERICS_PATCH, diffusers_config
from dit_hub.conversion.pipelines import convert
from dit_hub.layers import sincos_positions
from dit_hub.loading import STOCK_OPTIONS

from .conftest import Golden

MakeModel = Callable[..., DiTTransformer]

# As in test_modeling.py: some ten roundings of outputs within +-1.
FORWARD_ATOL = 2e-6


@torch.no_grad()
def predict(model: Any, config: DiTConfig, timestep: float = 321) -> Tensor:
    """What a model predicts for fixed noise."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, *config.sample_height_width, generator=generator)
    labels = torch.tensor([1, config.null_class or 0]) if config.num_classes else None
    return model(latents, torch.tensor([timestep, 17]), class_labels=labels).sample


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def official_weights(model: DiTTransformer) -> dict[str, Tensor]:
    return to_official(model.state_dict(), model.config)


def write(path: Path, content: Any) -> Path:
    """A PyTorch file, or safetensors by its suffix."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


# --- The official code's own files -----------------------------------------------------------------------------------


def test_the_released_file_loads_and_computes_the_official_numbers(golden: Golden) -> None:
    model, origin = load_single_file(
        golden.folder / "released.pt", num_attention_heads=golden.config["num_attention_heads"]
    )
    for name, value in golden.config.items():
        assert getattr(model.config, name) == value, name
    latents, timestep, labels = golden.inputs("forward")
    with torch.no_grad():
        sample = model(latents, timestep, labels).sample
    torch.testing.assert_close(sample, golden.expected["forward.out"], rtol=0, atol=FORWARD_ATOL)
    assert (origin.layout, origin.weights) == ("official", None)


def test_a_training_checkpoint_gives_its_average_or_the_weights_asked_for(golden_a: Golden) -> None:
    path = golden_a.folder / "train.pt"
    content = torch.load(path, weights_only=False)
    for weights, key in ((None, "ema"), ("ema", "ema"), ("model", "model")):
        model, origin = load_single_file(path, weights, num_attention_heads=4)
        expected = {name: tensor for name, tensor in content[key].items() if name != "pos_embed"}
        assert dict.fromkeys(expected, True) == {
            name: torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()
        }
        assert origin.weights == key
    assert not torch.equal(content["ema"]["blocks.0.attn.qkv.weight"], content["model"]["blocks.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match=r"has nothing under 'emma'; its keys are args, ema, model, opt\."):
        load_single_file(path, "emma", num_attention_heads=4)


# --- What names and shapes show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PUBLISHED_MODELS))
@pytest.mark.parametrize("image_size", [256, 512])
def test_the_config_of_every_published_model_is_read_off_its_weights(name: str, image_size: int) -> None:
    expected = DiTConfig.from_name(name, image_size=image_size)
    side = expected.sample_height_width[0] // expected.patch_size
    with torch.device("meta"):  # names and shapes without the memory
        weights = DiTTransformer(expected).state_dict()
    weights["pos_embed"] = sincos_positions(side, side, expected.hidden_size)
    assert config_from_official(weights).to_dict() == expected.to_dict()


SEEN = [
    {},
    {"learn_sigma": False, "in_channels": 3},
    {"patch_size": 4, "sample_size": 16, "mlp_ratio": 2.0},
    {"num_classes": 0},
    {"num_classes": 1000},
    {"pos_embed": "learned"},
    {"conditioning": "adaln"},
    {"conditioning": "cross_attention"},
    {"conditioning": "in_context"},
    {"num_classes": 1000, "class_dropout_prob": 0.0},
]


@pytest.mark.parametrize("fields", SEEN, ids=str)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_what_a_file_shows_is_found_and_the_rest_is_asked_for(
    fields: dict[str, Any], ending: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(**fields)
    path = write(tmp_path / f"weights{ending}", official_weights(model))
    loaded, _ = load_single_file(path, num_attention_heads=4)
    assert {name: getattr(loaded.config, name) for name in DiTConfig.__annotations__} == {
        name: getattr(model.config, name) for name in DiTConfig.__annotations__
    }
    assert_same_weights(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(predict(loaded, model.config), predict(model, model.config), rtol=0, atol=FORWARD_ATOL)
    with pytest.raises(ValueError, match=r"No published model is 32 wide.*--num-attention-heads"):
        load_single_file(path)


def test_flags_say_what_shapes_cannot(make_model: MakeModel, tmp_path: Path) -> None:
    weights = official_weights(make_model(sample_size=(4, 16)))
    path = write(tmp_path / "wide.pt", weights)
    # 16 tokens are a square of 4x4 as well, but the table is not that square's: then it counts as learned.
    assert load_single_file(path, num_attention_heads=4)[0].config.pos_embed == "learned"
    wide, _ = load_single_file(path, num_attention_heads=4, sample_size=(4, 16))
    assert (wide.config.pos_embed, wide.config.sample_size) == ("sincos", (4, 16))
    del weights["pos_embed"]
    path = write(tmp_path / "bare.pt", weights)
    with pytest.raises(ValueError, match="no pos_embed, so the input size cannot be known; give --sample-size"):
        load_single_file(path, num_attention_heads=4)
    assert load_single_file(path, num_attention_heads=4, sample_size=8)[0].config.sample_size == 8
    # Eleven rows are ten classes and the null class, unless said otherwise.
    eleven, _ = load_single_file(path, num_attention_heads=4, sample_size=8, num_classes=11)
    assert (eleven.config.num_classes, eleven.config.null_class) == (11, None)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "net."])
def test_what_wrappers_put_before_the_names_is_taken_away(prefix: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    weights = {f"{prefix}{name}": tensor for name, tensor in official_weights(model).items()}
    loaded, _ = load_single_file(write(tmp_path / "wrapped.pt", weights), num_attention_heads=4)
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_wrappers_within_the_names_are_taken_away_too(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    weights = {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): tensor
               for name, tensor in official_weights(model).items()}  # fmt: skip
    loaded, _ = load_single_file(write(tmp_path / "wrapped.pt", weights), num_attention_heads=4)
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_a_sharded_checkpoint_is_read_through_its_index(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    names = list(weights := official_weights(model))
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        write(tmp_path / file, {name: weights[name] for name in part})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    loaded, _ = load_single_file(index, num_attention_heads=4)
    assert_same_weights(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_file_stays(dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in official_weights(make_model()).items()}
    loaded, _ = load_single_file(write(tmp_path / "half.safetensors", weights), num_attention_heads=4)
    assert loaded.config.pos_embed == "sincos"
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    assert loaded.pos_embed.dtype == torch.float32


# --- SiT -------------------------------------------------------------------------------------------------------------


def sit_reference(model: DiTTransformer, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Euler from noise at t = 0 to data at t = 1 along the velocity that the bare network predicts (SiT, eq. 5)."""
    network = DiTTransformer(DiTConfig(**{**model.config.to_dict(), "parameterization": "diffusion"})).eval()
    network.load_state_dict(model.state_dict())
    latents = noise
    for step in range(steps):
        time = torch.full((len(noise),), step / steps)
        with torch.no_grad():
            velocity = network(latents, time, labels).sample[:, : noise.shape[1]]
        latents = latents + velocity / steps
    return latents


def sit_file(make_model: MakeModel, path: Path, **arguments: Any) -> Path:
    """A checkpoint as SiT's training script saves it: weights, average, optimizer and the script's arguments."""
    averaged, current = make_model(seed=3), make_model(seed=4)
    namespace = argparse.Namespace(
        **{"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", **arguments}
    )
    content = {"model": official_weights(current), "ema": official_weights(averaged), "opt": {}, "args": namespace}
    return write(path, content)


def test_sit_is_sampled_as_its_authors_do(make_model: MakeModel, tmp_path: Path) -> None:
    path = sit_file(make_model, tmp_path / "0400000.pt")
    pipe = DiTPipeline.from_single_file(path, vae=None, num_attention_heads=4)
    assert pipe.transformer.config.parameterization == "sit"
    noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    expected = sit_reference(pipe.transformer, noise, labels, steps=25)

    def error(**config: Any) -> float:
        changed = copy.deepcopy(pipe.transformer)
        for name, value in config.items():
            setattr(changed.config, name, value)
            setattr(changed.t_embedder, name, value)
        other = DiTPipeline(changed, pipe.scheduler)
        other.set_progress_bar_config(disable=True)
        arguments: dict[str, Any] = {"guidance_scale": 1.0, "latents": noise, "output_type": "latent"}
        images = other(labels, num_inference_steps=25, timesteps="official", **arguments).images
        return ((images - expected).norm() / expected.norm()).item()

    # Times such as 1 - 960/1000 come a rounding apart from 1/25.
    assert error() < 1e-5
    # Negative control: the same weights with the time and sign of diffusers' flow matching.
    assert error(parameterization="flow") > 0.1


def test_sit_is_known_by_its_arguments_its_name_or_the_flag(make_model: MakeModel, tmp_path: Path) -> None:
    bare = official_weights(make_model())
    cases = [
        (sit_file(make_model, tmp_path / "train.pt"), None, "sit"),
        (write(tmp_path / "SiT-XL-2-256x256.pt", bare), None, "sit"),
        (write(tmp_path / "my_sit.safetensors", bare), None, "sit"),
        (write(tmp_path / "visitors.pt", bare), None, "diffusion"),
        (write(tmp_path / "weights.pt", bare), "sit", "sit"),
        (write(tmp_path / "SiT-like.pt", bare), "dit", "diffusion"),
    ]
    for path, family, parameterization in cases:
        model, _ = load_single_file(path, family=family, num_attention_heads=4)
        assert model.config.parameterization == parameterization, path
    pipe = DiTPipeline.from_single_file(cases[1][0], vae=None, num_attention_heads=4)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="family must be one of dit, sit, not 'pixart'"):
        load_single_file(cases[0][0], family="pixart", num_attention_heads=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"path_type": "GVP"}, "path_type 'GVP'; only 'linear'"), ({"prediction": "score"}, "prediction 'score'")],
)
def test_a_sit_of_another_path_or_prediction_is_refused(
    arguments: dict[str, str], words: str, make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        load_single_file(sit_file(make_model, tmp_path / "train.pt", **arguments), num_attention_heads=4)


def test_heads_that_only_training_uses_are_left_out(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    weights = {**official_weights(model), "projectors.0.0.weight": torch.ones(4, 4)}
    with caplog.at_level(logging.WARNING, "dit_hub"):
        loaded, _ = load_single_file(write(tmp_path / "repa.pt", weights), num_attention_heads=4)
    assert "left out 1 weights of heads that only training uses" in caplog.text
    assert_same_weights(loaded.state_dict(), model.state_dict())


# --- diffusers' layout -----------------------------------------------------------------------------------------------

# What diffusers' class can express.
STOCK: dict[str, Any] = {"timestep_freq_dim": 256, "num_classes": 1000, "mlp_norm_eps": 1e-5}


def stock_model(model: DiTTransformer) -> Any:
    """diffusers' own model with the weights of ours."""
    stock = diffusers.DiTTransformer2DModel(**diffusers_config(model.config)).eval()
    weights = to_diffusers(model.state_dict(), model.config.num_hidden_layers)
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}
    return stock


def stock_folder(model: DiTTransformer, folder: Path, **options: Any) -> Path:
    """A pipeline folder as diffusers writes it, without a VAE."""
    stock: Any = diffusers.DiTPipeline(stock_model(model), None, diffusers.DDIMScheduler())  # pyright: ignore
    stock.save_pretrained(folder, **options)
    return folder


def as_first_class(folder: Path) -> None:
    """Rewrite the config as the older `Transformer2DModel` wrote it."""
    path = folder / "transformer" / "config.json"
    fields = json.loads(path.read_text())
    older = {"_class_name": "Transformer2DModel", "attention_bias": True, "cross_attention_dim": None,
             "num_vector_embeds": None, "use_linear_projection": False}  # fmt: skip
    path.write_text(json.dumps({**fields, **older}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": ["diffusers", "Transformer2DModel"]}))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("files", ["safetensors", "bin", "shards", "first-class"])
def test_a_diffusers_folder_loads_and_equals_stock_diffusers(
    files: str, variant: str | None, make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(**STOCK, timestep_freq_shift=1.0)
    options: dict[str, Any] = {"variant": variant, "safe_serialization": files != "bin"}
    if files == "shards":
        options["max_shard_size"] = "50KB"
    folder = stock_folder(model, tmp_path / "stock", **options)
    if files == "first-class":
        as_first_class(folder)
    assert (len(list((folder / "transformer").glob("*-of-*"))) > 1) == (files == "shards")
    with caplog.at_level(logging.WARNING, "dit_hub"):
        pipe = DiTPipeline.from_pretrained(folder, variant=variant)
    lines = [record.getMessage() for record in caplog.records if "layout" in record.getMessage()]
    assert len(lines) == 1
    assert "timestep_freq_shift=1, since as diffusers itself computes; pass 0 if" in lines[0]
    assert_same_weights(pipe.transformer.state_dict(), model.state_dict())
    expected = predict(stock_model(model), model.config)
    torch.testing.assert_close(predict(pipe.transformer, model.config), expected, rtol=0, atol=1e-5)
    other = DiTPipeline.from_pretrained(folder, variant=variant, timestep_freq_shift=0)
    difference = (predict(other.transformer, model.config) - expected).abs().max()
    assert difference > 1e-3  # the tolerance above tells the two apart
    pipe.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "model_index.json").read_text())["transformer"][0] == "dit_hub"
    again = DiTPipeline.from_pretrained(tmp_path / "ours")
    assert_same_weights(again.transformer.state_dict(), pipe.transformer.state_dict())
    torch.testing.assert_close(predict(again.transformer, model.config), expected, rtol=0, atol=1e-5)


def test_published_weights_in_diffusers_layout_get_the_official_numbers(
    golden_a: Golden, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The two published repositories, here as the client's cache holds them."""
    for repository in ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512"):
        snapshot = tmp_path / ("models--" + repository.replace("/", "--")) / "snapshots" / "0123"
        stock_folder(golden_a.model(mlp_norm_eps=1e-5), snapshot)
        with caplog.at_level(logging.WARNING, "dit_hub"):
            pipe = DiTPipeline.from_pretrained(snapshot)
        assert "timestep_freq_shift=0, since it holds official weights; pass 1" in caplog.text
        latents, timestep, labels = golden_a.inputs("forward")
        with torch.no_grad():
            sample = pipe.transformer(latents, timestep, labels).sample
        torch.testing.assert_close(sample, golden_a.expected["forward.out"], rtol=0, atol=FORWARD_ATOL)
        assert pipe.origin is not None
        assert (pipe.origin.license, pipe.origin.base_model) == ("cc-by-nc-4.0", repository)


def test_the_patch_makes_diffusers_compute_the_official_numbers(golden_a: Golden, tmp_path: Path) -> None:
    folder = stock_folder(golden_a.model(), tmp_path / "stock")
    pipe = diffusers.DiTPipeline.from_pretrained(folder, vae=None)
    latents, timestep, labels = golden_a.inputs("forward")

    def error() -> float:
        with torch.no_grad():
            sample = pipe.transformer(latents, timestep, class_labels=labels).sample
        expected = golden_a.expected["forward.out"]
        return ((sample - expected).norm() / expected.norm()).item()

    assert error() > 0.01
    exec(OFFICIAL_NUMERICS_PATCH, {"pipe": pipe})
    assert error() < 1e-5


def test_copies_of_an_embedder_that_differ_are_refused(make_model: MakeModel) -> None:
    weights = to_diffusers(make_model(**STOCK).state_dict(), 2)
    weights["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1e-7
    with pytest.raises(ValueError, match=r"transformer_blocks\.1.*differs from transformer_blocks\.0.*must be equal"):
        from_diffusers(weights)


def test_diffusers_names_without_a_folder_load_as_a_single_file(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(**STOCK)
    path = write(tmp_path / "weights.safetensors", to_diffusers(model.state_dict(), 2))
    loaded, origin = load_single_file(path, num_attention_heads=4, sample_size=8)
    assert origin.layout == "diffusers"
    assert loaded.config.timestep_freq_shift == 1
    assert_same_weights(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_classes": 0}, "null class"),
        ({"pos_embed": "learned"}, "pos_embed 'sincos' only, not 'learned'"),
        ({"conditioning": "adaln"}, "conditioning"),
        ({"parameterization": "sit"}, "parameterization"),
        ({"sample_size": (4, 8)}, "square"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(fields: dict[str, Any], words: str, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=words):
        diffusers_config(make_model(**{**STOCK, **fields}).config)


# --- Arguments of the loaders ----------------------------------------------------------------------------------------


def test_a_file_loads_in_the_dtype_that_either_name_asks_for(make_model: MakeModel, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pt", official_weights(make_model()))
    options: dict[str, Any] = {"vae": None, "num_attention_heads": 4}
    for name in ("dtype", "torch_dtype"):
        pipe = DiTPipeline.from_single_file(path, **options, **cast(Any, {name: torch.float16}))
        assert pipe.transformer.dtype == torch.float16
        with pytest.raises(ValueError, match=f"{name} must be a torch.dtype, not 'float16'"):
            DiTPipeline.from_single_file(path, **options, **cast(Any, {name: "float16"}))


@pytest.mark.parametrize(
    ("name", "near"),
    [("dtyp", "dtype"), ("num_heads", "num_attention_heads"), ("name_or_path", "norm_eps"), ("_family", "family"),
     ("attn_implementation", "attention"), ("revison", "revision")],
)  # fmt: skip
def test_a_file_is_not_opened_with_a_word_that_means_nothing(
    name: str, near: str, make_model: MakeModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "weights.pt", official_weights(make_model()))
    with pytest.raises(ValueError, match=f"from_single_file takes no {name!r}. The nearest names: .*{near}"):
        DiTPipeline.from_single_file(path, vae=None, num_attention_heads=4, **{name: cast(Any, "x")})


@pytest.mark.parametrize(
    ("name", "near"), [("foo", ""), ("dtyp", "dtype"), ("id2lable", "id2label"), ("revison", "revision")]
)
def test_a_folder_is_not_opened_with_a_word_that_means_nothing(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"from_pretrained takes no {name!r}. The nearest names: .*{near}"):
        DiTPipeline.from_pretrained("dit-toy-shapes", **{name: cast(Any, 1)})


def test_what_diffusers_and_the_pipeline_take_is_taken() -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=7)
    options = {"low_cpu_mem_usage": False, "use_safetensors": True, "trust_remote_code": False, "proxies": None}
    pipe = DiTPipeline.from_pretrained("dit-toy-shapes", scheduler=scheduler, id2label={0: "dot"}, **options)
    assert pipe.scheduler.config.num_train_timesteps == 7
    assert pipe.id2label == {0: "dot"}


def test_a_device_map_that_is_none_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"device_map must be one of balanced, cpu.*, not 'nonsense'"):
        DiTPipeline.from_pretrained("dit-toy-shapes", device_map="nonsense")
    pipe = DiTPipeline.from_pretrained("dit-toy-shapes", device_map="cpu")
    assert pipe.transformer.device.type == "cpu"


def test_every_option_of_diffusers_is_known_and_nothing_else_that_its_code_names() -> None:
    """diffusers reads its options by name, so only its code lists them."""
    stock = inspect.unwrap(diffusers.DiffusionPipeline.from_pretrained)
    taken = set(re.findall(r'\bkwargs\.pop\("(\w+)"', inspect.getsource(stock)))
    assert taken == set(STOCK_OPTIONS)
    for name in ("pipeline_class", "model_variants", "tokenizer"):
        with pytest.raises(ValueError, match=f"from_pretrained takes no {name!r}"):
            DiTPipeline.from_pretrained("dit-toy-shapes", **{name: cast(Any, 1)})


def test_a_converted_transformer_goes_to_the_device_of_the_others(
    make_pipeline: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pipeline(latent=True, timestep_freq_dim=256).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", "diffusers")
    for module in (loading, pipeline_utils):  # "cuda" where there is one
        monkeypatch.setattr(module, "SUPPORTED_DEVICE_MAP", ["balanced", "cpu", "meta"])
    pipe = DiTPipeline.from_pretrained(tmp_path / "stock", device_map="meta", dtype=torch.bfloat16)
    assert {pipe.transformer.device.type, pipe.vae.device.type} == {"meta"}
    assert pipe.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"balanced.*dit-hub convert"):
        DiTPipeline.from_pretrained(tmp_path / "stock", device_map="balanced")
    transformer = DiTPipeline.from_pretrained(tmp_path / "ours").transformer
    given = DiTPipeline.from_pretrained(tmp_path / "stock", device_map="balanced", transformer=transformer)
    assert given.transformer is transformer


# --- Names of classes ------------------------------------------------------------------------------------------------


def test_known_weights_know_imagenets_classes_by_every_synonym(make_model: MakeModel, tmp_path: Path) -> None:
    path = write(tmp_path / "DiT-XL-2-256x256.pt", official_weights(make_model(num_classes=1000)))
    pipe = DiTPipeline.from_single_file(path, vae=None, num_attention_heads=4)
    assert len(pipe.id2label) == 1000
    known = {
        "tench": 0,
        "Tinca tinca": 0,
        "great white shark": 2,
        "golden retriever": 207,
        "alp": 970,
        "toilet tissue": 999,
    }
    for name, label in known.items():
        assert pipe.get_label_ids(name) == [label]
    synonyms = [(label, name.strip().casefold()) for label, names in pipe.id2label.items() for name in names.split(",")]
    unique = {name for _, name in synonyms if sum(other == name for _, other in synonyms) == 1}
    assert len(unique) > 1800
    for label, name in synonyms:
        if name in unique:
            assert pipe.get_label_ids(name) == [label]
    ten = write(tmp_path / "SiT-XL-2-256x256.pt", official_weights(make_model()))
    assert DiTPipeline.from_single_file(ten, vae=None, num_attention_heads=4).id2label == {}
    named = DiTPipeline.from_single_file(ten, vae=None, num_attention_heads=4, id2label={3: "cat"})
    assert named.get_label_ids("cat") == [3]


def test_1000_classes_of_unknown_weights_have_no_names(make_model: MakeModel, tmp_path: Path) -> None:
    """1000 products of a shop are not ImageNet's 1000 classes: only the origin of the weights tells."""
    weights = official_weights(make_model(num_classes=1000))

    def names(path: Path) -> dict[int, str]:
        return DiTPipeline.from_single_file(path, vae=None, num_attention_heads=4).id2label

    assert names(write(tmp_path / "shop.pt", weights)) == {}
    said = {"shop": "/data/shop", "train": "/data/ImageNet/train", "ilsvrc": "/data/ilsvrc2012"}
    for name, data_path in said.items():
        arguments = argparse.Namespace(model="DiT-XL/2", data_path=data_path)
        path = write(tmp_path / f"{name}.pt", {"ema": weights, "args": arguments})
        assert bool(names(path)) == (name != "shop")
    (tmp_path / "with-card").mkdir()
    card = tmp_path / "with-card" / "README.md"
    path = write(tmp_path / "with-card" / "weights.pt", weights)
    for dataset, known in (("me/shop", False), ("imagenet-1k", True), ("ILSVRC/imagenet-1k", True)):
        card.write_text(f"---\nlicense: mit\ndatasets:\n- {dataset}\n---\n# A model\n")
        assert bool(names(path)) == known
    folder = stock_folder(make_model(**STOCK), tmp_path / "stock")
    assert DiTPipeline.from_pretrained(folder).id2label == {}
    (folder / "README.md").write_text("---\ndatasets: ILSVRC/imagenet-1k\n---\n# A model\n")
    assert DiTPipeline.from_pretrained(folder).get_label_ids("golden retriever") == [207]


def test_a_name_is_the_same_however_its_words_are_joined(make_model: MakeModel) -> None:
    names = {0: "golden retriever", 1: "red-circle", 2: "t-shirt, T-Shirt", 3: "t shirt", 4: "7", 5: "flat-coated dog"}
    pipe = DiTPipeline(make_model(), diffusers.DDIMScheduler(), id2label=names)
    same = ["golden_retriever", "golden-retriever", "Golden Retriever", " golden  retriever "]
    assert pipe.get_label_ids(same) == [0, 0, 0, 0]
    assert pipe.get_label_ids(["red circle", "RED_CIRCLE", "Flat Coated-Dog"]) == [1, 1, 5]
    assert pipe.get_label_ids(["t-shirt", "t shirt", "7"]) == [2, 3, 4]  # two classes with different spellings
    with pytest.raises(ValueError, match=r"'t_shirt' names the classes 2 \(t-shirt, T-Shirt\), 3 \(t shirt\)"):
        pipe.get_label_ids("t_shirt")
    with pytest.raises(ValueError, match=r"'red_cirle'\. The nearest names: red-circle"):
        pipe.get_label_ids("red_cirle")
    with pytest.raises(ValueError, match="no class named '-7'"):
        pipe.get_label_ids("-7")


# --- transformers' and peft's own ------------------------------------------------------------------------------------


class NoiseTrainer(Trainer):
    """transformers' Trainer, as a user of a `DiTTransformer` would set it up."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        noise = torch.randn_like(inputs["latents"])
        sample = model(inputs["latents"] + noise, inputs["timestep"], inputs["class"]).sample
        return (sample[:, :4] - noise).square().mean()


def test_what_transformers_trainer_saved_loads(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    rows = [{"latents": torch.randn(4, 8, 8), "timestep": torch.tensor(3), "class": torch.tensor(1)} for _ in range(2)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    NoiseTrainer(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    folder = tmp_path / "checkpoint-1"
    assert "use_cache" in json.loads((folder / "config.json").read_text())
    for loaded in (DiTTransformer.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert_same_weights(loaded.state_dict(), model.state_dict())
    DiTPipeline(loaded, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    assert_same_weights(DiTPipeline.from_pretrained(tmp_path / "pipeline").transformer.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="no field 'use_cach'"):
        cast(Any, DiTConfig)(use_cach=False)


@pytest.mark.parametrize("how", ["get_peft_model", "inject", "add_adapter", "no library"])
def test_a_model_that_cannot_be_saved_is_refused_before_anything_is_written(
    how: str, make_model: MakeModel, tmp_path: Path
) -> None:
    pipe: Any = DiTPipeline(make_model(), diffusers.DDIMScheduler())
    settings = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    if how == "get_peft_model":
        pipe.transformer = peft.get_peft_model(pipe.transformer, settings)
    elif how == "inject":
        peft.inject_adapter_in_model(settings, pipe.transformer)
    elif how == "add_adapter":
        pipe.transformer.add_adapter(settings)
    else:
        pipe.transformer = torch.nn.Linear(2, 2)
    words = {"get_peft_model": "merge_and_unload", "no library": "Linear, which diffusers cannot save"}.get(
        how, "fuse_lora"
    )
    for save in (lambda: pipe.save_pretrained(tmp_path / "out"), lambda: pipe.push_to_hub("me/never")):
        with pytest.raises(ValueError, match=words):
            save()
    assert list(tmp_path.iterdir()) == []
    assert pipe.config["transformer"][1] is not None  # a refused save changes nothing
    if how != "no library":  # what the error says works
        adapted: Any = pipe.transformer
        expected = predict(adapted, adapted.config)
        if how == "get_peft_model":
            pipe.transformer = adapted.merge_and_unload()
        else:
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        pipe.save_pretrained(tmp_path / "out")
        again = DiTPipeline.from_pretrained(tmp_path / "out").transformer
        torch.testing.assert_close(predict(again, again.config), expected, rtol=0, atol=FORWARD_ATOL)


# --- Other classes ---------------------------------------------------------------------------------------------------


def table_of(model: DiTTransformer) -> Tensor:
    return model.y_embedder.embedding_table.weight.detach().clone()


def test_resizing_keeps_rows_and_the_null_class(make_model: MakeModel) -> None:
    model = make_model()
    before = table_of(model)
    model.resize_class_labels(4)
    assert torch.equal(table_of(model), before[[0, 1, 2, 3, 10]])
    assert (model.config.num_classes, model.config.null_class) == (4, 4)
    model.resize_class_labels(6)
    after = table_of(model)
    assert torch.equal(after[[0, 1, 2, 3, 6]], before[[0, 1, 2, 3, 10]])
    assert 0.005 < after[4:6].std() < 0.05  # initialised again, as in a new model
    assert predict(model, model.config).isfinite().all()


def test_resizing_takes_the_rows_it_is_told(make_model: MakeModel) -> None:
    model = make_model()
    before = table_of(model)
    model.resize_class_labels(3, mapping={0: 7, 2: 7})
    after = table_of(model)
    assert torch.equal(after[[0, 2, 3]], before[[7, 7, 10]])
    assert not (after[1] == before).all(1).any()
    for mapping, words in (({3: 0}, "new class 3"), ({0: 9}, "old class 9")):
        with pytest.raises(ValueError, match=words):
            model.resize_class_labels(3, mapping=mapping)
    with pytest.raises(ValueError, match="unconditional model has no label table"):
        make_model(num_classes=0).resize_class_labels(3)
