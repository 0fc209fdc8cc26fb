"""Cards: what ships is what the facts say, and no more than the facts."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.conversion.origin import RELEASED_FILES, Origin
from dit_hub.flops import measure
from dit_hub.labels import imagenet_id2label
from dit_hub.model_cards import is_own_card, render_card
from dit_hub.training.recipe import Recipe

from .command_line import dit_hub

CARDS = Path(__file__).parents[1] / "model_cards"
PUBLISHED = {"dit-xl-2-256": "facebook/DiT-XL-2-256", "dit-xl-2-512": "facebook/DiT-XL-2-512"}

RESULT = {"metric": "FID-50K", "value": 2.27, "dataset_name": "ImageNet 256x256"}


@pytest.fixture
def folder(make_model: Callable[..., DiTTransformer], tmp_path: Path) -> Path:
    """A pipeline folder without a word of its origin."""
    DiTPipeline(make_model(), DDIMScheduler()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def with_results(folder: Path, *results: Any) -> Path:
    (folder / "evaluation.json").write_text(json.dumps({"results": results}))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_cards_are_made_from_their_facts(name: str) -> None:
    card = render_card(CARDS / name, PUBLISHED[name])
    assert str(card) == (CARDS / name / "README.md").read_text()
    data: Any = ModelCard(str(card)).data
    assert data.license == "cc-by-nc-4.0"
    metrics = {result.metric_name: result.metric_value for result in data.eval_results}
    assert set(metrics) == {"FID-50K", "sFID", "IS", "precision", "recall"}
    assert all(isinstance(value, float) for value in metrics.values())
    config = DiTConfig.from_pretrained(CARDS / name / "transformer")
    assert f"| parameters | {measure(config).parameters:,} |" in card.text
    assert PUBLISHED[name] in {source.base_model for source in RELEASED_FILES.values()}


def test_every_card_is_in_the_index() -> None:
    index = (CARDS / "README.md").read_text()
    for path in CARDS.glob("*/README.md"):
        assert f"({path.relative_to(CARDS)})" in index


def test_a_card_says_nothing_that_is_not_known(folder: Path) -> None:
    text = str(render_card(folder))
    for heading in ("## Origin", "## Checked", "## Results", "## Training", "## Limits", "base_model", "model-index"):
        assert heading not in text
    assert "license: unknown" in text
    assert "unknown: ask the authors" in text


def test_1000_classes_of_something_else_are_not_called_imagenets(
    make_model: Callable[..., DiTTransformer], tmp_path: Path
) -> None:
    pipe = DiTPipeline(make_model(num_classes=1000), DDIMScheduler())
    for name, id2label in (("shop", {0: "soap"}), ("unnamed", None), ("imagenet", imagenet_id2label())):
        pipe.register_to_config(id2label=id2label)
        pipe.save_pretrained(tmp_path / name)
        card = render_card(tmp_path / name)
        assert ("ImageNet" in card.text) == (name == "imagenet")
        assert card.data.to_dict().get("datasets") == (["ILSVRC/imagenet-1k"] if name == "imagenet" else None)
        assert ("imagenet" in card.data.to_dict()["tags"]) == (name == "imagenet")
    Origin("a file", "official", dataset="ILSVRC/imagenet-1k").save(tmp_path / "unnamed")
    assert "for ImageNet's 1000 classes" in render_card(tmp_path / "unnamed").text


@pytest.mark.parametrize(
    ("changes", "shown", "hidden"),
    [
        ({}, {"model", "epochs", "images_per_class", "beta_start", "seed", "lr_scheduler"},
         {"steps", "mixed_precision", "ema_decay"}),
        ({"steps": 9, "data": "digits", "gradient_accumulation_steps": 2},
         {"steps", "data", "gradient_accumulation_steps"}, {"epochs", "images_per_class"}),
        ({"objective": "flow", "ema_decay": [0.9, 0.99]}, {"objective", "ema_decay"},
         {"beta_start", "beta_end"}),
        ({"init_from": "org/name", "lora_rank": 4, "mixed_precision": "bf16", "save_every": 5, "num_workers": 2},
         {"init_from", "lora_rank", "merge_adapters", "mixed_precision"}, {"model", "save_every", "num_workers"}),
    ],
)  # fmt: skip
def test_only_settings_that_say_something_are_listed(
    changes: dict[str, Any], shown: set[str], hidden: set[str], folder: Path
) -> None:
    recipe = asdict(Recipe(**changes))
    (folder / "training.json").write_text(json.dumps({"recipe": recipe, "data": "Shapes."}))
    table = render_card(folder).text.split("| setting | value |\n|---|---|\n")[1].split("\n\n")[0]
    listed = {line.split(" | ")[0].strip("| "): line.split(" | ")[1].strip(" |") for line in table.splitlines()}
    assert shown <= set(listed)
    assert not (hidden | {"keep_last", "tracker", "streaming", "fsdp", "freeze", "lora_rank"} - shown) & set(listed)
    assert {name for name, value in listed.items() if value in ("0", "0.0", "no", "none", "False", "")} <= {"seed"}


def test_the_fields_of_a_model_are_listed_as_words(folder: Path) -> None:
    recipe = asdict(Recipe(model={"sample_size": 8, "learn_sigma": False}))
    (folder / "training.json").write_text(json.dumps({"recipe": recipe}))
    assert "| model | sample_size 8, learn_sigma False |" in render_card(folder).text


def test_results_become_the_hubs_and_a_table(folder: Path) -> None:
    result = {**RESULT, "how": "guidance 1.5", "source": "the paper"}
    card = ModelCard(str(render_card(with_results(folder, result))))
    data: Any = card.data
    assert [(entry.metric_name, entry.metric_value) for entry in data.eval_results] == [("FID-50K", 2.27)]
    assert "| ImageNet 256x256 | FID-50K | 2.27 | guidance 1.5 | the paper |" in card.text


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([{"metric": "FID"}], "a result has no value"),
        ([{**RESULT, "value": "good"}], "'good' is no number"),
        ([3], "a result has no metric"),
    ],
)
def test_damaged_facts_are_one_sentence(folder: Path, results: list[Any], words: str) -> None:
    run = dit_hub("card", with_results(folder, *results), cwd=folder)
    assert run.returncode == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1
    (folder / "evaluation.json").write_text("[")
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
        render_card(folder)


def test_a_persons_card_is_told_from_ours(folder: Path) -> None:
    render_card(folder).save(folder / "README.md")
    assert is_own_card(folder / "README.md")
    (folder / "README.md").write_text("# My model")
    assert not is_own_card(folder / "README.md")


def test_a_folder_without_a_model_has_no_card(tmp_path: Path) -> None:
    run = dit_hub("card", tmp_path, cwd=tmp_path)
    assert run.returncode == 2
    assert "has no folder transformer" in run.stderr
    assert dit_hub("card", "nothing", cwd=tmp_path).returncode == 2
