"""The shapes, the recipe, the loop and what a run leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_hub import DiTPipeline
from dit_hub.files import new_folder
from dit_hub.hub import EMBEDDED_MODELS
from dit_hub.model_cards import render_card
from dit_hub.objectives import noise_prediction, uniform_timesteps
from dit_hub.training.loop import TrainingResult, train
from dit_hub.training.output import save_result
from dit_hub.training.recipe import RECIPES, Recipe, get_recipe
from dit_hub.training.shapes import COLOURS, ID2LABEL, SHAPES, shapes

SHORT = Recipe(images_per_class=16, epochs=3, batch_size=64)


def test_the_shapes_are_16_classes_of_16x16_rgb_and_the_same_for_the_same_seed() -> None:
    pictures, labels = shapes()
    assert pictures.shape == (3200, 3, 16, 16)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert torch.bincount(labels).tolist() == [200] * 16
    assert torch.equal(pictures, shapes()[0])
    assert not torch.equal(pictures, shapes(seed=1)[0])
    assert len(torch.unique(pictures.flatten(1), dim=0)) > 2500  # position and size vary
    assert ID2LABEL[0] == "red-circle"
    assert len(set(ID2LABEL.values())) == 16


def test_every_class_has_its_colour_and_its_form() -> None:
    pictures, _ = shapes(images_per_class=50)
    by_class = pictures.unflatten(0, (len(COLOURS), len(SHAPES), 50))
    for row, colour in enumerate(COLOURS.values()):
        expected = torch.tensor(colour) / 127.5 - 1
        centre = by_class[row, :, :, :, 8, 8].flatten(0, 1)  # every shape covers the middle
        torch.testing.assert_close(centre, expected.expand_as(centre))
    mask = (by_class - by_class[..., :1, :1]).abs().sum(3) > 0.5  # what is not background
    areas = dict(zip(SHAPES, mask.float().sum((-1, -2)).mean((0, 2)).tolist(), strict=True))
    assert areas["circle"] > areas["square"] > areas["cross"] > 30
    assert areas["square"] > areas["triangle"] > 30


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8, 8)], ids=["points", "pictures"])
def test_the_noise_objective_takes_data_of_any_shape(shape: tuple[int, ...]) -> None:
    scheduler = DDPMScheduler(200)
    clean, noise = torch.randn(shape), torch.randn(shape)
    timestep = torch.tensor([0, 1, 50, 150, 199])

    def exact(noisy: Tensor, timestep: Tensor, /) -> Tensor:
        alpha_bar = scheduler.alphas_cumprod[timestep].view(-1, *[1] * (noisy.dim() - 1))
        return (noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()

    loss = noise_prediction(exact, scheduler, clean, noise, timestep)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    ignorant = noise_prediction(lambda noisy, timestep: torch.zeros_like(noisy), scheduler, clean, noise, timestep)
    torch.testing.assert_close(ignorant, noise.square().flatten(1).mean(1))


def test_timesteps_cover_the_whole_schedule() -> None:
    drawn = uniform_timesteps(20_000, DDPMScheduler(200))
    assert drawn.unique().tolist() == list(range(200))


@pytest.mark.parametrize("recipe", [SHORT, Recipe(images_per_class=16, epochs=3, batch_size=64, ema_decay=0.5)])
def test_training_learns_and_repeats_itself_bit_for_bit(recipe: Recipe) -> None:
    steps: list[tuple[int, int]] = []
    first = train(recipe, lambda step, epoch, loss: steps.append((step, epoch)))
    second = train(recipe)
    assert steps == [(step, 1 + (step - 1) // 4) for step in range(1, 13)]
    assert len(first.epoch_losses) == 3
    assert first.epoch_losses == second.epoch_losses
    assert first.epoch_losses[-1] < first.epoch_losses[0] < 1.2
    for ours, theirs in zip(weights(first), weights(second), strict=True):
        assert torch.equal(ours, theirs)


def test_the_moving_average_is_what_gets_saved() -> None:
    plain, averaged = train(SHORT), train(Recipe(images_per_class=16, epochs=3, batch_size=64, ema_decay=0.99))
    assert plain.epoch_losses == averaged.epoch_losses
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain), weights(averaged), strict=True))


def test_another_seed_is_another_run() -> None:
    assert train(SHORT).epoch_losses != train(Recipe(images_per_class=16, epochs=3, batch_size=64, seed=1)).epoch_losses


def test_half_precision_trains_and_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    # In a process of its own: accelerate fixes the precision of a process once.
    settings = ["images_per_class=16", "epochs=3", "batch_size=64", "mixed_precision=bf16"]
    command = [sys.executable, "-m", "dit_hub.cli", "train", "toy", *settings, "--out", str(tmp_path / "toy")]
    subprocess.run(command, check=True, capture_output=True)
    losses = json.loads((tmp_path / "toy" / "training.json").read_text())["epoch_losses"]
    assert losses[-1] < losses[0]
    assert losses != [round(loss, 6) for loss in train(SHORT).epoch_losses]
    weights = load_file(tmp_path / "toy" / "transformer" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_run_leaves_a_pipeline_folder_whose_card_can_be_rendered_again(tmp_path: Path) -> None:
    result = train(SHORT)
    save_result(result, tmp_path / "out" / "toy", "dit-hub train toy epochs=3")
    folder = tmp_path / "out" / "toy"
    loaded = DiTPipeline.from_pretrained(folder)
    trained = dict(result.pipeline.transformer.named_parameters())
    for name, weight in loaded.transformer.named_parameters():
        assert torch.equal(weight, trained[name])
    assert loaded.id2label == ID2LABEL
    assert json.loads((folder / "training.json").read_text())["recipe"]["epochs"] == 3
    assert str(render_card(folder, str(folder))) == (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="not empty"):
        save_result(result, folder, "again")


def test_the_embedded_model_draws_every_class_so_that_the_nearest_training_picture_agrees() -> None:
    pictures, labels = shapes()
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.set_progress_bar_config(disable=True)
    wanted = torch.arange(16).repeat_interleave(4)
    generator = torch.Generator().manual_seed(1)
    images = pipeline(wanted, num_inference_steps=50, generator=generator, output_type="pt").images
    distances = torch.cdist((images * 2 - 1).flatten(1), pictures.flatten(1))
    recognised = labels[distances.argmin(1)]
    assert (recognised == wanted).float().mean() >= 0.95
    # Negative control: against the labels of other classes the same measure fails.
    assert (recognised == wanted.roll(4)).float().mean() < 0.3


def test_the_embedded_folder_is_complete_small_and_has_the_card_of_its_recipe() -> None:
    folder = EMBEDDED_MODELS["dit-toy-shapes"]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2e6
    training = json.loads((folder / "training.json").read_text())
    assert Recipe(**training["recipe"]) == RECIPES["toy-shapes"]
    assert str(render_card(folder, "dit-toy-shapes")) == (folder / "README.md").read_text()
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    assert sum(weight.numel() for weight in pipeline.transformer.parameters()) == 323_696


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "no field 'epoch'.*epochs"),
        ({"epochs": "x"}, "epochs must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"ema_decay": 1}, "ema_decay"),
        ({"beta_start": 0.5}, "beta_start"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
    ],
)
def test_a_recipe_refuses_what_it_cannot_do(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_recipe("toy").with_settings(settings)


def test_a_model_of_other_pictures_is_refused_before_the_work() -> None:
    with pytest.raises(ValueError, match=r"The shapes are 16x16 .* which DiT-S/2 does not take"):
        train(get_recipe("toy").with_settings({"model": "DiT-S/2"}))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"

    def fail_half_way() -> None:
        with new_folder(target) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []  # the folder on the way is gone as well
    with new_folder(target) as folder:
        (folder / "whole").write_text("whole")
        assert not target.exists()
    assert (target / "whole").read_text() == "whole"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), new_folder(tmp_path / "file"):
        pass


def weights(result: TrainingResult) -> list[nn.Parameter]:
    return list(result.pipeline.transformer.parameters())
