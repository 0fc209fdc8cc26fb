"""`dit-hub convert` and `card`, and the origin of a folder: round trips, licences, code that travels."""

import ast
import builtins
import json
import os
import re
import subprocess
import symtable
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.conversion import load_single_file, pipelines, read_origin, to_official
from dit_hub.conversion.pipelines import convert
from dit_hub.export import export_onnx
from dit_hub.model_cards import render_card

from .command_line import dit_hub, python
from .conftest import Golden

MakeModel = Callable[..., DiTTransformer]

# What every layout can express, with the numerics of official weights.
SHARED: dict[str, Any] = {"timestep_freq_dim": 256, "num_classes": 1000}

# Relative error of equal weights: their alignment in memory decides how some processors sum.
ROUNDING = 1e-6

# The same of images in [0, 1] after 20 steps with guidance.
IMAGE_ATOL = 1e-5


def official_file(model: DiTTransformer, path: Path) -> Path:
    torch.save(to_official(model.state_dict(), model.config), path)
    return path


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """A card's data and text."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def weights_of(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def fields_of(config: DiTConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DiTConfig.__annotations__}


# --- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_classes": 0}, {"pos_embed": "learned"}, {"parameterization": "sit"}, {"sample_size": (4, 16)},
     {"num_classes": 5, "class_dropout_prob": 0.0}, {"norm_eps": 1e-6, "guidance_channels": 4}],
    ids=str,
)  # fmt: skip
def test_official_to_ours_and_back_is_the_same_file(
    fields: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(**{**SHARED, **fields})
    source = official_file(model, tmp_path / "weights.pt")
    config = {name: getattr(model.config, name) for name in fields}
    convert(source, tmp_path / "ours", vae=None, num_attention_heads=4, **config)
    convert(tmp_path / "ours", tmp_path / "back", to="official")
    assert_same_weights(weights_of(tmp_path / "back" / "model.pt"), weights_of(source))
    # The folder keeps what shapes do not show, so nothing has to be given the second time.
    again = convert(tmp_path / "back" / "model.pt", tmp_path / "again", vae=None)
    assert fields_of(again.config) == fields_of(model.config)
    assert_same_weights(
        weights_of(tmp_path / "again" / "transformer" / "model.safetensors"),
        weights_of(tmp_path / "ours" / "transformer" / "model.safetensors"),
    )


def test_the_official_layout_keeps_names_and_noise_levels_in_its_facts(tmp_path: Path) -> None:
    convert("dit-toy-shapes", tmp_path / "official", to="official")
    toy, again = (
        DiTPipeline.from_pretrained("dit-toy-shapes"),
        DiTPipeline.from_single_file(tmp_path / "official" / "model.pt"),
    )
    images = []
    for pipe in (toy, again):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe("red-circle", num_inference_steps=20, generator=generator, output_type="pt").images)
    assert_same_weights(again.transformer.state_dict(), toy.transformer.state_dict())
    torch.testing.assert_close(*images, rtol=0, atol=IMAGE_ATOL)
    assert 'pipe(["red-circle", "red-square"])' in card_of(tmp_path / "official")[1]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_ours_to_diffusers_and_back_is_the_same_model(shift: float, make_model: MakeModel, tmp_path: Path) -> None:
    pipe = DiTPipeline(make_model(**SHARED, timestep_freq_shift=shift), diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "stock", to="diffusers")
    assert (report.patch is None) == (shift == 1)
    assert list(report.parity) == ["before against after, in diffusers' own class"]
    assert max(report.parity.values()) < 1e-6
    stock = diffusers.DiTPipeline.from_pretrained(tmp_path / "stock", vae=None)
    assert type(stock.transformer).__name__ == "DiTTransformer2DModel"
    convert(tmp_path / "stock", tmp_path / "back")
    file = Path("transformer", "model.safetensors")
    assert_same_weights(weights_of(tmp_path / "back" / file), weights_of(tmp_path / "ours" / file))
    before, after = (
        json.loads((tmp_path / name / "transformer" / "config.json").read_text()) for name in ("ours", "back")
    )
    # Only the epsilons differ: diffusers' class states the same in another way, or its own numerics are kept.
    assert {key for key in before if before[key] != after[key]} <= {"mlp_norm_eps"}
    _, text = card_of(tmp_path / "stock")
    assert ("12.8 %" in text) == (shift == 0)
    assert ("downscale_freq_shift = 0" in text) == (shift == 0)
    assert "from diffusers import" in text


@pytest.mark.parametrize(
    ("fields", "guided"),
    [
        ({"timestep_freq_shift": 0.0}, 3),
        ({"timestep_freq_shift": 1.0}, 4),
        ({"timestep_freq_shift": 0.0, "guidance_channels": 2}, 2),
        ({"timestep_freq_shift": 1.0, "guidance_channels": 3}, 3),
    ],
)
def test_guidance_is_the_same_after_diffusers_and_back(
    fields: dict[str, Any], guided: int, make_model: MakeModel, tmp_path: Path
) -> None:
    DiTPipeline(make_model(**SHARED, **fields), diffusers.DDIMScheduler()).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", to="diffusers")
    back = DiTPipeline.from_pretrained(tmp_path / "stock").transformer.config
    assert back.guided_channels == guided
    assert back.guidance_channels == fields.get("guidance_channels")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["dit-hub", "official", "diffusers"])
def test_half_precision_stays_as_it_is(to: str, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    model: Any = make_model(**SHARED)
    source = official_file(model.to(dtype), tmp_path / "weights.pt")
    convert(source, tmp_path / "out", to=to, vae=None, num_attention_heads=4)
    files = [*(tmp_path / "out").rglob("*.safetensors"), *(tmp_path / "out").glob("*.pt")]
    assert {tensor.dtype for file in files for tensor in weights_of(file).values()} == {dtype}


# --- What a conversion checks and reports ----------------------------------------------------------------------------


def test_the_golden_checkpoint_converts_with_its_numbers(golden_a: Golden, tmp_path: Path) -> None:
    report = convert(golden_a.folder / "train.pt", tmp_path / "out", num_attention_heads=4, vae=None)
    assert report.origin.weights == "ema"
    assert list(report.parity) == ["before against after, read back"]
    assert report.parity["before against after, read back"] < ROUNDING
    official = torch.load(golden_a.folder / "train.pt", weights_only=False)["ema"]
    written = weights_of(tmp_path / "out" / "transformer" / "model.safetensors")
    assert_same_weights(dict(sorted(written.items())), {k: w for k, w in sorted(official.items()) if k != "pos_embed"})
    assert read_origin(tmp_path / "out") == report.origin
    data, text = card_of(tmp_path / "out")
    assert f"| before against after, read back | {report.parity['before against after, read back']:.1e} |" in text
    assert "its `ema`" in text
    assert data["license"] == "unknown"
    assert str(render_card(tmp_path / "out")) == (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["official", "diffusers", "dit-hub"])
def test_a_conversion_that_changes_numbers_is_refused(
    to: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check must find a fault put into the writing of weights."""
    source = official_file(make_model(**SHARED), tmp_path / "weights.pt")
    write = pipelines._WRITERS[to]

    def faulty(pipeline: Any, folder: Path) -> None:
        with torch.no_grad():
            pipeline.transformer.blocks[1].mlp.fc1.weight[3] *= 1.01
        write(pipeline, folder)

    monkeypatch.setitem(pipelines._WRITERS, to, faulty)
    with pytest.raises(ValueError, match="The converted model differs by more than 1e-05: before against after"):
        convert(source, tmp_path / "out", to=to, num_attention_heads=4, vae=None)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_what_a_layout_cannot_express_is_refused_before_anything_is_written(
    make_model: MakeModel, tmp_path: Path
) -> None:
    DiTPipeline(make_model(conditioning="adaln"), diffusers.DDIMScheduler()).save_pretrained(tmp_path / "ours")
    export_onnx("dit-toy-shapes", tmp_path / "onnx")
    for source, to, words in (
        ("ours", "official", "conditioning 'adaln_zero' only, not 'adaln'"),
        ("ours", "diffusers", "conditioning 'adaln_zero' only"),
        ("onnx", "official", "holds a ORTDiTTransformer, which cannot be converted back"),
        ("ours", "onnx", "There is no layout 'onnx'; known: dit-hub, official, diffusers"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / source, tmp_path / "out", to=to)
    with pytest.raises(ValueError, match="self-contained"):
        convert(tmp_path / "ours", tmp_path / "out", to="diffusers", self_contained=True)
    with pytest.raises(ValueError, match="num_classes, vae: for checkpoint files only"):
        convert(tmp_path / "ours", tmp_path / "out", num_classes=3, vae=None)
    with pytest.raises(ValueError, match="timestep_freq_shift: for diffusers' layout only"):
        convert(tmp_path / "ours", tmp_path / "out", timestep_freq_shift=1)
    assert not (tmp_path / "out").exists()


# --- Licences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.safetensors"])
def test_the_licence_of_official_weights_goes_wherever_they_go(
    name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model, source = make_model(**SHARED), tmp_path / name
    write = save_file if source.suffix == ".safetensors" else torch.save
    write(to_official(model.state_dict(), model.config), source)
    convert(source, tmp_path / "ours", num_attention_heads=4, vae=None)
    convert(tmp_path / "ours", tmp_path / "stock", to="diffusers")
    convert(tmp_path / "stock", tmp_path / "official", to="official", timestep_freq_shift=0)
    export_onnx(tmp_path / "ours", tmp_path / "onnx")
    tuned = (
        DiTPipeline.from_pretrained(tmp_path / "official-again")
        if False
        else DiTPipeline.from_pretrained(tmp_path / "ours")
    )
    with torch.no_grad():
        tuned.transformer.final_layer.linear.bias += 1
    tuned.save_pretrained(tmp_path / "tuned")
    for folder in ("ours", "stock", "official", "onnx", "tuned"):
        origin = read_origin(tmp_path / folder)
        assert origin is not None
        assert origin.license == "cc-by-nc-4.0"
        card = render_card(tmp_path / folder)
        assert card.data.to_dict()["license"] == "cc-by-nc-4.0"
        assert card.data.to_dict()["base_model"].startswith("facebook/DiT-XL-2-")
        assert "CC-BY-NC-4.0" in card.text
        assert "Meta Platforms" in card.text
        assert origin.modified == (folder == "tuned")
    # The card shows measurements only of the weights that were measured.
    assert "## Checked" in str(render_card(tmp_path / "ours"))
    assert "## Checked" not in str(render_card(tmp_path / "tuned"))
    assert "They have been changed since." in str(render_card(tmp_path / "tuned"))
    with pytest.raises(ValueError, match=r"is under cc-by-nc-4\.0, which stays with its weights; it cannot become mit"):
        convert(source, tmp_path / "mine", num_attention_heads=4, vae=None, license="mit")
    assert not (tmp_path / "mine").exists()


def test_an_unknown_licence_can_be_named_once(make_model: MakeModel, tmp_path: Path) -> None:
    source = official_file(make_model(), tmp_path / "weights.pt")
    convert(source, tmp_path / "ours", num_attention_heads=4, vae=None, license="mit")
    assert card_of(tmp_path / "ours")[0]["license"] == "mit"
    with pytest.raises(ValueError, match="it cannot become apache"):
        convert(tmp_path / "ours", tmp_path / "again", license="apache-2.0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_attention_heads": 4, "license": ""}, "The licence is empty"),
        ({"num_attention_heads": 4, "license": " "}, "The licence is empty"),
        ({"num_attention_heads": 0}, "num_attention_heads must be above 0"),
    ],
)
def test_an_empty_licence_and_no_heads_are_refused(
    options: dict[str, Any], words: str, make_model: MakeModel, tmp_path: Path
) -> None:
    source = official_file(make_model(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=words):
        convert(source, tmp_path / "ours", vae=None, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


# --- Code that travels -----------------------------------------------------------------------------------------------

WITHOUT_DIT_HUB = """
import sys
sys.modules["dit_hub"] = None  # any import of it fails
import hashlib, torch
from diffusers import DiffusionPipeline
from transformers import AutoModel
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe({labels}, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
model = AutoModel.from_pretrained({folder!r}, subfolder="transformer", trust_remote_code=True)
same = all(map(torch.equal, model.state_dict().values(), pipe.transformer.state_dict().values()))
print(hashlib.sha256(images.tobytes()).hexdigest(), same, type(pipe).__module__.startswith("diffusers_modules"))
"""


@pytest.mark.parametrize("parameterization", ["diffusion", "sit"])
def test_a_self_contained_folder_draws_the_same_bytes_without_dit_hub(
    parameterization: str, make_model: MakeModel, make_vae: Callable[..., Any], tmp_path: Path
) -> None:
    import hashlib

    family = "sit" if parameterization == "sit" else None
    name = "SiT-XL-2-256x256.pt" if family else "DiT-XL-2-256x256.pt"
    source = official_file(make_model(**SHARED), tmp_path / name)
    make_vae().save_pretrained(tmp_path / "vae")
    folder = tmp_path / "folder"
    convert(source, folder, self_contained=True, num_attention_heads=4, vae=str(tmp_path / "vae"), family=family)
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = ["golden retriever", 3]
    images = pipe(labels, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    script = WITHOUT_DIT_HUB.format(folder=str(folder), labels=labels)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [hashlib.sha256(images.tobytes()).hexdigest(), "True", "True"]
    assert "trust_remote_code=True" in card_of(folder)[1]


def test_the_code_of_a_self_contained_folder_is_what_it_needs(tmp_path: Path) -> None:
    """Libraries check its imports before they load it, and every name that it uses is defined."""
    convert("dit-toy-shapes", tmp_path / "out", self_contained=True)
    libraries = {"diffusers", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
    for file in (tmp_path / "out").glob("*.py"):
        source = file.read_text()
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {getattr(node, "module", None) or node.names[0].name for node in imports}
        assert {name.split(".")[0] for name in imported} <= libraries | sys.stdlib_module_names, file
        module = symtable.symtable(source, str(file), "exec")
        scopes = [module]
        for scope in scopes:
            scopes += scope.get_children()
        used = {name.get_name() for scope in scopes for name in scope.get_symbols() if name.is_global()}
        given = {name.get_name() for name in module.get_symbols() if name.is_assigned() or name.is_imported()}
        assert used - given - set(dir(builtins)) - {"__file__", "__name__"} == set(), file
        # Joined modules that define the same name would share the last definition.
        defined = [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assigned = [node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign)]
        defined += [target.id for targets in assigned for target in targets if isinstance(target, ast.Name)]
        assert len(defined) == len(set(defined)), file


# --- The command line ------------------------------------------------------------------------------------------------


def test_convert_and_card_at_the_command_line(golden_a: Golden, tmp_path: Path) -> None:
    source = golden_a.folder / "released.pt"
    run = dit_hub("convert", source, "out", cwd=tmp_path)
    assert run.returncode == 2
    assert "--num-attention-heads" in run.stderr
    run = dit_hub("convert", source, "out", "--num-attention-heads", 4, "--vae", "none", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for words in ("before against after, read back", "Converted to out (dit-hub layout)", "--license"):
        assert words in run.stdout
    (error,) = re.findall(r"\b\d\.\de[+-]\d\d\b", run.stdout)
    assert float(error) < ROUNDING
    run = dit_hub("card", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == (tmp_path / "out" / "README.md").read_text().strip()
    run = dit_hub("convert", "out", "stock", "--to", "diffusers", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "12.8 %" in run.stdout
    assert pipelines.OFFICIAL_NUMERICS_PATCH in run.stdout
    run = dit_hub("convert", "out", "stock", "--to", "official", cwd=tmp_path)
    assert run.returncode == 2
    assert "stock is not empty" in run.stderr
    assert dit_hub("convert", "out", "stock", "--to", "official", "--overwrite", cwd=tmp_path).returncode == 0
    files = [".dit-hub.json", "README.md", "model.pt", "origin.json"]
    assert sorted(path.name for path in (tmp_path / "stock").iterdir()) == files


def test_the_code_of_a_card_runs(golden_a: Golden, make_vae: Callable[..., Any], tmp_path: Path) -> None:
    """The code of every layout's card, as it stands there."""
    make_vae().save_pretrained(tmp_path / "vae")
    source = golden_a.folder / "released.pt"
    convert(source, tmp_path / "ours", num_attention_heads=4, vae=str(tmp_path / "vae"))
    convert(tmp_path / "ours", tmp_path / "stock", to="diffusers")
    convert(tmp_path / "ours", tmp_path / "ours-with-code", self_contained=True)
    for folder in ("ours", "stock", "ours-with-code"):
        text = card_of(tmp_path / folder)[1]
        code = (
            text.split("```python\n")[1]
            .split("```")[0]
            .replace("pipe(", "pipe.set_progress_bar_config(disable=True)\npipe(", 1)
        )
        run = python("-c", code, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        (tmp_path / "sample.png").unlink()


def test_the_official_layouts_card_loads_what_it_describes(golden_a: Golden, tmp_path: Path) -> None:
    convert(golden_a.folder / "released.pt", tmp_path / "official", to="official", num_attention_heads=4, vae=None)
    text = card_of(tmp_path / "official")[1]
    assert 'from_single_file("official/model.pt", num_attention_heads=4)' in text
    model, _ = load_single_file(tmp_path / "official" / "model.pt", num_attention_heads=4)
    official = torch.load(golden_a.folder / "released.pt", weights_only=True)
    assert_same_weights(to_official(model.state_dict(), model.config), official)
