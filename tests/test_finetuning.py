"""What a model brings along when it is trained on: its noise, what it predicts, its classes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.labels import same_classes
from dit_hub.training.data import InMemoryImages
from dit_hub.training.loop import train
from dit_hub.training.recipe import Recipe
from dit_hub.training.shapes import ID2LABEL, shapes

from .command_line import dit_hub
from .conftest import TOYS_NOISE, TOYS_NOISE_SETTINGS, MakePipeline

MakeModel = Callable[..., DiTTransformer]

# A step that moves no weight: what is seen is what training starts from.
START = Recipe(
    init_from="dit-toy-shapes", steps=1, batch_size=16, images_per_class=1, learning_rate=1e-30, **TOYS_NOISE
)


def base(folder: Path, **fields: Any) -> str:
    """The embedded model, with other fields of its scheduler."""
    pipeline: Any = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **fields)
    pipeline.save_pretrained(folder / "base")
    return str(folder / "base")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"beta_schedule": "scaled_linear"},
            "with beta_schedule scaled_linear, and recipes train with linear betas only",
        ),
        ({"beta_schedule": "squaredcos_cap_v2"}, "with beta_schedule squaredcos_cap_v2, and"),
        ({"trained_betas": [0.01] * 200}, "with betas of its own, and"),
        ({"rescale_betas_zero_snr": True}, "with betas of its own, and"),
        ({"prediction_type": "sample"}, "predicts 'sample', which no objective trains; only noise and v do"),
        ({"prediction_type": "v_prediction"}, "predicts 'v_prediction', .* another target; set objective=v"),
        (
            {"beta_start": 1e-4, "beta_end": 0.02},
            "with beta_start 0.0001 and beta_end 0.02, and the recipe has beta_start 0.0005 and beta_end 0.1; set "
            "beta_start=0.0001 beta_end=0.02",
        ),
    ],
)
def test_a_base_whose_noise_or_target_is_not_trained_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(replace(START, init_from=base(tmp_path, **fields)))


def test_a_base_that_predicts_v_is_trained_with_v_and_one_that_predicts_noise_is_not(tmp_path: Path) -> None:
    recipe = replace(START, objective="v")
    result = train(replace(recipe, init_from=base(tmp_path, prediction_type="v_prediction")))
    assert result.pipeline.scheduler.config["prediction_type"] == "v_prediction"
    with pytest.raises(ValueError, match=r"predicts 'epsilon', and the objective 'v' .* set objective=noise"):
        train(recipe)


def test_a_flow_model_is_trained_with_its_own_timesteps(tmp_path: Path, make_pipeline: MakePipeline) -> None:
    fields = {"sample_size": 16, "in_channels": 3, "num_classes": 16, "learn_sigma": False, "parameterization": "flow"}
    make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(1000), **fields).save_pretrained(tmp_path / "flow")
    recipe = replace(START, init_from=str(tmp_path / "flow"), objective="flow")
    with pytest.raises(
        ValueError, match="was trained with num_train_timesteps 1000, and the recipe has num_train_timesteps 200"
    ):
        train(recipe)
    assert train(replace(recipe, num_train_timesteps=1000)).finished


# --- Classes ---------------------------------------------------------------------------------------------------------


def table_after(names: list[str], **settings: Any) -> Tensor:
    """The rows of the classes, the null class last, of a model that starts from the embedded one."""
    labels = torch.arange(16) % len(names)
    dataset = InMemoryImages(shapes(1)[0], labels, dict(enumerate(names)), "", "")
    model = train(replace(START, **settings), dataset=dataset).pipeline.transformer
    return model.state_dict()["y_embedder.embedding_table.weight"]


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Those of the embedded model."""
    return DiTPipeline.from_pretrained("dit-toy-shapes").transformer.state_dict()["y_embedder.embedding_table.weight"]


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}])
def test_classes_that_the_base_knows_by_name_are_kept_and_others_start_anew(rows: Tensor, settings: dict) -> None:
    table = table_after(["my cat", "RED-Square", "blue-cross"], **settings)
    known = {name: index for index, name in ID2LABEL.items()}
    assert table[1].equal(rows[known["red-square"]])
    assert table[2].equal(rows[known["blue-cross"]])
    assert not any(table[0].equal(row) for row in rows)
    assert 0.01 < table[0].std() < 0.03  # as a new model's


def test_as_many_classes_of_other_names_are_other_classes(rows: Tensor) -> None:
    names = [*list(ID2LABEL.values())[1:], "my cat"]
    table = table_after(names)
    assert table[:15].equal(rows[1:16])
    assert not any(table[15].equal(row) for row in rows)


def test_the_null_class_keeps_its_row(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model(sample_size=16, in_channels=3, learn_sigma=False, num_classes=2)
    DiTPipeline(model, DDPMScheduler(200, **TOYS_NOISE), None, {0: "cat", 1: "red-cross"}).save_pretrained(
        tmp_path / "base"
    )
    table = table_after(["my cat", "my dog", "a cross", "red-cross"], init_from=str(tmp_path / "base"))
    assert table.shape[0] == 5
    assert table[3:].equal(model.state_dict()["y_embedder.embedding_table.weight"][1:])


def test_new_rows_are_drawn_from_the_seed_of_the_recipe() -> None:
    first, again, other = (table_after(["my cat", "my dog"], seed=seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first[0].equal(other[0])
    assert not first[0].equal(first[1])


def test_classes_without_names_are_as_many_or_anew(rows: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    assert table_after([str(index) for index in range(16)]).equal(rows)
    assert "The 16 classes of the data are taken for those of dit-toy-shapes, since not both have names." in caplog.text
    table = table_after(["0", "1", "2"])
    assert not any(row.equal(known) for row in table[:3] for known in rows)


def test_the_same_class_is_found_by_any_of_its_names_and_never_guessed() -> None:
    known = {0: "tench, Tinca tinca", 1: "crane", 2: "great white shark, white shark", 3: "crane"}
    assert same_classes(["Tinca Tinca", "crane", "WHITE SHARK, shark", "crane"], known) == [0, 1, 2, 3]
    assert same_classes(["crane", "my cat", "crane"], known) == [None, None, None]


def test_the_command_says_how_many_classes_are_kept(tmp_path: Path) -> None:
    for name in ("my cat", "red-circle"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(8):
            noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "pets" / name / f"{index}.png")
    settings = ("init_from=dit-toy-shapes", "data=pets", "steps=1", "batch_size=16", "tracker=none",
                *TOYS_NOISE_SETTINGS)  # fmt: skip
    run = dit_hub("train", "toy", *settings, "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = " ".join((run.stdout + run.stderr).split())
    assert "1 of 2 classes start from the class of the same name in dit-toy-shapes; the others are new." in said
