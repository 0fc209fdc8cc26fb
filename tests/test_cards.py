"""Cards: what ships is what the facts say, and no more than the facts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.conversion.origin import RELEASED_FILES
from dit_hub.flops import measure
from dit_hub.model_cards import is_own_card, render_card

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
