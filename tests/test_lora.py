"""Adapters as peft and diffusers have them: folders of either side, several at once, fused and taken out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.adapters import add_adapters, save_adapters

MakeModel = Callable[..., DiTTransformer]

INPUTS = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([100, 700]))


def predict(model: Any, labels: tuple[int, int] = (1, 2)) -> Tensor:
    with torch.no_grad():
        return model(*INPUTS, torch.tensor(labels)).sample


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def pipeline_of(model: DiTTransformer) -> DiTPipeline:
    return DiTPipeline(model, DDIMScheduler(), id2label={index: f"class {index}" for index in range(10)})


def write_with_peft(folder: Path, model: DiTTransformer, seed: int = 0, **settings: Any) -> Tensor:
    """A folder of adapters that peft wrote, with random weights; returns what the adapted model predicts."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["qkv", "fc1"], "init_lora_weights": False, **settings})
    adapted: Any = peft.get_peft_model(model, config)
    if config.modules_to_save:
        torch.nn.init.normal_(
            adapted.base_model.model.y_embedder.modules_to_save["default"].embedding_table.weight, std=0.05
        )
    adapted.save_pretrained(str(folder))
    return predict(adapted)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 3, "modules_to_save": ["y_embedder"]},
        {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"fc1": 32}, "rank_pattern": {"fc1": 2}},
    ],
)
def test_what_peft_wrote_loads(tmp_path: Path, make_model: MakeModel, settings: dict[str, Any]) -> None:
    expected = write_with_peft(tmp_path, make_model(), **settings)
    pipe = pipeline_of(make_model())
    plain = predict(pipe.transformer)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    close(predict(pipe.transformer), expected)
    assert (expected - plain).abs().max() > 1e-2
    pipe.unload_lora_weights()
    torch.testing.assert_close(predict(pipe.transformer), plain, rtol=0, atol=0)
    merged = pipeline_of(make_model())
    merged.load_adapters(tmp_path)
    close(predict(merged.transformer), expected)
    assert merged.transformer.state_dict().keys() == make_model().state_dict().keys()


def test_peft_opens_what_is_written_here(tmp_path: Path, make_model: MakeModel) -> None:
    model = add_adapters(make_model(), rank=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("y_embedder"):
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapters(model, 2, "someone/model", {index: f"class {index}" for index in range(10)}, tmp_path)
    opened = peft.PeftModel.from_pretrained(make_model(), str(tmp_path))
    close(predict(opened), predict(model))
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["base_model_name_or_path"], facts["modules_to_save"]) == ("someone/model", ["y_embedder"])


def test_folders_of_the_first_versions_still_load(tmp_path: Path, make_model: MakeModel) -> None:
    """Their tensors have the names that they have in a model, and the classes stand in adapter_config.json."""
    model = add_adapters(make_model(), rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapters(model, 2, "someone/model", {}, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    facts = json.loads(config.read_text()) | {"modules_to_save": None, "id2label": {str(i): f"c{i}" for i in range(10)}}
    config.write_text(json.dumps(facts))
    (tmp_path / "id2label.json").unlink()
    old = {}
    for name, tensor in load_file(weights).items():
        bare = name.removeprefix("base_model.model.")
        old[bare.replace(".weight", ".default.weight") if "lora_" in bare else bare] = tensor
    save_file(old, weights)
    pipe = pipeline_of(make_model())
    pipe.load_adapters(tmp_path)
    close(predict(pipe.transformer), predict(model))
    assert pipe.id2label[3] == "c3"


def test_several_adapters_at_once_with_weights(tmp_path: Path, make_model: MakeModel) -> None:
    for index, name in enumerate(("first", "second")):
        write_with_peft(tmp_path / name, make_model(), seed=index, lora_alpha=4)
    pipe = pipeline_of(make_model())
    plain = predict(pipe.transformer)
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    for name in ("first", "second"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["first", "second"], adapter_weights=[0.5, 0.25])
    mixed = predict(pipe.transformer)
    # The sum of both products, by hand.
    summed = make_model()
    for name, scale in (("first", 0.5), ("second", 0.25)):
        lora = load_file(tmp_path / name / "adapter_model.safetensors")
        for layer, weight in summed.state_dict().items():
            a, b = (lora.get(f"base_model.model.{layer.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
            if a is not None and b is not None:
                weight.add_(b @ a * scale)
    close(mixed, predict(summed))
    pipe.fuse_lora()
    close(predict(pipe.transformer), mixed)
    pipe.unfuse_lora()
    close(predict(pipe.transformer), mixed)
    pipe.disable_lora()
    torch.testing.assert_close(predict(pipe.transformer), plain, rtol=0, atol=1e-6)
    pipe.enable_lora()
    pipe.delete_adapters("first")
    pipe.set_adapters("second", adapter_weights=0.0)
    close(predict(pipe.transformer), plain)
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


def test_classes_come_and_go_with_the_adapters_that_bring_them(tmp_path: Path, make_model: MakeModel) -> None:
    write_with_peft(tmp_path / "style", make_model(), lora_alpha=4)
    pets = add_adapters(make_model().resize_class_labels(2), rank=2)
    save_adapters(pets, 2, "someone/model", {0: "cats", 1: "dogs"}, tmp_path / "pets")
    pipe = pipeline_of(make_model())
    plain = predict(pipe.transformer)
    for name in ("style", "pets"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        pipe.set_adapters(name)
    assert pipe.id2label == {0: "cats", 1: "dogs"}
    close(predict(pipe.transformer, (0, 1)), predict(pets, (0, 1)))
    pipe.set_adapters("style")
    assert (pipe.id2label[9], pipe.transformer.config.num_classes) == ("class 9", 10)
    pipe.set_adapters(["style", "pets"])
    assert pipe.transformer.config.num_classes == 2
    pipe.unload_lora_weights()
    assert pipe.id2label[9] == "class 9"
    torch.testing.assert_close(predict(pipe.transformer), plain, rtol=0, atol=0)


def test_what_diffusers_wrote_loads(tmp_path: Path, make_model: MakeModel) -> None:
    """`save_lora_adapter` is the door of every model of diffusers."""
    write_with_peft(tmp_path / "peft", make_model(), lora_alpha=12)
    pipe = pipeline_of(make_model())
    pipe.load_lora_weights(tmp_path / "peft", adapter_name="a")
    expected = predict(pipe.transformer)
    pipe.transformer.save_lora_adapter(str(tmp_path / "stock"), adapter_name="a")
    (file,) = (tmp_path / "stock").glob("*.safetensors")
    named = {f"transformer.{name}": tensor for name, tensor in load_file(file).items()}
    other = pipeline_of(make_model())
    # Without its metadata a file says nothing of alpha; diffusers then takes the rank for it.
    other.load_lora_weights({name: t * 3 if "lora_B" in name else t for name, t in named.items()}, adapter_name="b")
    close(predict(other.transformer), expected)


def test_fused_adapters_are_left_alone_until_they_are_taken_out(tmp_path: Path, make_model: MakeModel) -> None:
    write_with_peft(tmp_path, make_model(), lora_alpha=4)
    pipe = pipeline_of(make_model())
    plain = predict(pipe.transformer)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    pipe.fuse_lora()
    for change in (
        lambda: pipe.set_adapters("a", 0.5),
        lambda: pipe.delete_adapters("a"),
        lambda: pipe.load_lora_weights(tmp_path, adapter_name="b"),
    ):
        with pytest.raises(ValueError, match="Adapters are fused"):
            change()
    pipe.unfuse_lora()
    pipe.set_adapters("a", 0.0)
    close(predict(pipe.transformer), plain)


def test_a_file_without_weights_of_a_transformer_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    write_with_peft(tmp_path, make_model(), lora_alpha=4)
    pipe = pipeline_of(make_model())
    for given, options in (
        (tmp_path / "adapter_model.safetensors", {}),
        (tmp_path, {"weight_name": "adapter_model.safetensors"}),
    ):
        with pytest.raises(ValueError, match=r"start with \"transformer\.\""):
            pipe.load_lora_weights(given, **options)


def test_a_refused_folder_changes_nothing(tmp_path: Path, make_model: MakeModel) -> None:
    write_with_peft(tmp_path / "wide", make_model(hidden_size=64), lora_alpha=4)
    write_with_peft(tmp_path / "cut", make_model(), lora_alpha=4)
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(tmp_path / "wide", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    pipe = pipeline_of(make_model())
    plain, keys = predict(pipe.transformer), pipe.transformer.state_dict().keys()
    refused = {"wide": "are of another model than this one", "cut": "are damaged", "empty": "no adapters"}
    for name, words in refused.items():
        for door in (pipe.load_lora_weights, pipe.load_adapters):
            with pytest.raises(ValueError, match=words):
                door(tmp_path / name)
    assert pipe.transformer.state_dict().keys() == keys
    torch.testing.assert_close(predict(pipe.transformer), plain, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [["qkv", "proj", "fc1", "fc2"], ["q", "kv"]])
def test_layers_with_adapters_are_cast(tmp_path: Path, make_model: MakeModel, layers: list[str]) -> None:
    """diffusers' layerwise casting stores the layer within peft's in fewer bits."""
    conditioning = "cross_attention" if "q" in layers else "adaln_zero"
    expected = write_with_peft(tmp_path, make_model(conditioning=conditioning), lora_alpha=4, target_modules=layers)
    pipe = pipeline_of(make_model(conditioning=conditioning))
    pipe.load_lora_weights(tmp_path)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    error = (predict(pipe.transformer) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_a_denoiser_that_torch_compile_wrapped_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    expected = write_with_peft(tmp_path, make_model(), lora_alpha=4)
    pipe = pipeline_of(make_model())
    inner = pipe.transformer
    pipe.transformer = torch.compile(inner, backend="eager")
    for door in (pipe.load_lora_weights, pipe.load_adapters):
        with pytest.raises(ValueError, match=r"compile it in place: pipe\.transformer\.compile\(\)"):
            door(tmp_path)
    pipe.transformer = inner
    pipe.transformer.compile(backend="eager")
    predict(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    close(predict(pipe.transformer), expected)


def test_what_was_measured_stays_behind_once_adapters_are_fused(tmp_path: Path, make_model: MakeModel) -> None:
    write_with_peft(tmp_path / "style", make_model(), lora_alpha=4)
    pipeline_of(make_model()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "evaluation.json").write_text("{}")
    for fuse, kept in ((False, True), (True, False)):
        pipe = DiTPipeline.from_pretrained(tmp_path / "model")
        pipe.load_lora_weights(tmp_path / "style")
        if fuse:
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.save_pretrained(tmp_path / f"fused-{fuse}")
        assert (tmp_path / f"fused-{fuse}" / "evaluation.json").is_file() is kept


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_classes_change_on_an_offloaded_pipeline(tmp_path: Path, make_model: MakeModel, offload: str) -> None:
    pets = add_adapters(make_model().resize_class_labels(2), rank=2)
    save_adapters(pets, 2, "someone/model", {0: "cats", 1: "dogs"}, tmp_path / "pets")
    write_with_peft(tmp_path / "style", make_model(), lora_alpha=4)
    pipe = pipeline_of(make_model())
    for name in ("pets", "style"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters("style")
    expected = predict(pipe.transformer)
    if offload == "group":
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    for name in ("pets", "style", "pets"):
        pipe.set_adapters(name)
    table = pipe.transformer.y_embedder.embedding_table
    assert hasattr(table, "_hf_hook") or table._diffusers_hook.hooks  # still offloaded
    if offload == "sequential":
        pipe.remove_all_hooks()
    close(predict(pipe.transformer, (0, 1)), predict(pets, (0, 1)))
    pipe.set_adapters("style")
    close(predict(pipe.transformer), expected)


def test_adapters_that_are_disabled_take_their_classes_along(tmp_path: Path, make_model: MakeModel) -> None:
    pets = add_adapters(make_model().resize_class_labels(2), rank=2)
    save_adapters(pets, 2, "someone/model", {0: "cats", 1: "dogs"}, tmp_path)
    pipe = pipeline_of(make_model())
    plain = predict(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    pipe.disable_lora()
    assert pipe.id2label[9] == "class 9"
    close(predict(pipe.transformer), plain)
    pipe.enable_lora()
    assert pipe.id2label == {0: "cats", 1: "dogs"}
    close(predict(pipe.transformer, (0, 1)), predict(pets, (0, 1)))


def test_hot_swapping_takes_the_place_of_an_adapter(tmp_path: Path, make_model: MakeModel) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        expected = write_with_peft(tmp_path / name, make_model(), seed, lora_alpha=8)
    pipe = pipeline_of(make_model())
    pipe.load_lora_weights(tmp_path / "a", adapter_name="style")
    pipe.load_lora_weights(tmp_path / "b", adapter_name="style", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    close(predict(pipe.transformer), expected)  # pyright: ignore[reportPossiblyUnbound]


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_adapters_are_fused_on_an_offloaded_pipeline(tmp_path: Path, make_model: MakeModel, offload: str) -> None:
    expected = write_with_peft(tmp_path, make_model(), lora_alpha=8)
    pipe = pipeline_of(make_model())
    pipe.load_lora_weights(tmp_path)
    if offload == "group":
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    if offload == "sequential":
        pipe.remove_all_hooks()
    close(predict(pipe.transformer), expected)
