"""The shapes, the recipe, the loop and what a run leaves."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.configuration_dit import PUBLISHED_MODELS
from dit_hub.files import new_folder
from dit_hub.model_cards import render_card
from dit_hub.objectives import (
    flow_matching,
    flow_timesteps,
    min_snr_weight,
    noise_and_variance,
    noise_prediction,
    uniform_timesteps,
    v_prediction,
)
from dit_hub.sources import EMBEDDED_MODELS
from dit_hub.training.data import CachedLatents, ImageFolder, InMemoryImages, ResumableSampler
from dit_hub.training.images import center_crop
from dit_hub.training.latents import cache_latents
from dit_hub.training.loader import open_dataset
from dit_hub.training.loop import Progress, TrainingError, train
from dit_hub.training.output import save_result
from dit_hub.training.recipe import Recipe, get_recipe, shipped_recipes
from dit_hub.training.result import TrainingResult
from dit_hub.training.shapes import COLOURS, ID2LABEL, SHAPES, shapes
from dit_hub.training.weights import Weights

from .command_line import dit_hub
from .conftest import TOYS_NOISE, TOYS_NOISE_SETTINGS, Golden

SHORT = Recipe(images_per_class=16, epochs=3, batch_size=64)


def test_the_shapes_are_16_classes_of_16x16_rgb_and_the_same_for_the_same_seed() -> None:
    images, labels = shapes()
    assert images.shape == (3200, 3, 16, 16)
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.bincount(labels).tolist() == [200] * 16
    assert torch.equal(images, shapes()[0])
    assert not torch.equal(images, shapes(seed=1)[0])
    assert len(torch.unique(images.flatten(1), dim=0)) > 2500  # position and size vary
    assert ID2LABEL[0] == "red-circle"
    assert len(set(ID2LABEL.values())) == 16


def test_every_class_has_its_colour_and_its_form() -> None:
    images, _ = shapes(images_per_class=50)
    by_class = images.unflatten(0, (len(COLOURS), len(SHAPES), 50))
    for row, colour in enumerate(COLOURS.values()):
        expected = torch.tensor(colour) / 127.5 - 1
        centre = by_class[row, :, :, :, 8, 8].flatten(0, 1)  # every shape covers the middle
        torch.testing.assert_close(centre, expected.expand_as(centre))
    mask = (by_class - by_class[..., :1, :1]).abs().sum(3) > 0.5  # what is not background
    areas = dict(zip(SHAPES, mask.float().sum((-1, -2)).mean((0, 2)).tolist(), strict=True))
    assert areas["circle"] > areas["square"] > areas["cross"] > 30
    assert areas["square"] > areas["triangle"] > 30


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8, 8)], ids=["points", "images"])
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
    steps: list[tuple[int, int, int]] = []
    first = train(recipe, lambda progress: steps.append(progress[:3]))
    second = train(recipe)
    assert steps == [(step, 12, 1 + (step - 1) // 4) for step in range(1, 13)]
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
    run = dit_hub("train", "toy", *settings, "--out", "toy", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
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


def test_what_cannot_be_drawn_or_copied_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (logs := tmp_path / "logs").mkdir()
    (logs / "events").write_text("events")
    (logs / "link").symlink_to("nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # any import of it fails
    result = train(Recipe(images_per_class=1, epochs=1, batch_size=16))
    save_result(replace(result, logs=logs), tmp_path / "out", "")
    assert "No losses were drawn" in caplog.text
    assert "The logs were not copied completely" in caplog.text
    assert (tmp_path / "out" / "runs" / "events").is_file()
    assert DiTPipeline.from_pretrained(tmp_path / "out").id2label == ID2LABEL


def test_the_embedded_model_draws_every_class_so_that_the_nearest_training_image_agrees() -> None:
    known, labels = shapes()
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.set_progress_bar_config(disable=True)
    wanted = torch.arange(16).repeat_interleave(4)
    generator = torch.Generator().manual_seed(1)
    images = pipeline(wanted, num_inference_steps=50, generator=generator, output_type="pt").images
    distances = torch.cdist((images * 2 - 1).flatten(1), known.flatten(1))
    recognised = labels[distances.argmin(1)]
    assert (recognised == wanted).float().mean() >= 0.95
    # Negative control: against the labels of other classes the same measure fails.
    assert (recognised == wanted.roll(4)).float().mean() < 0.3


def test_the_embedded_folder_is_complete_small_and_has_the_card_of_its_recipe() -> None:
    folder = EMBEDDED_MODELS["dit-toy-shapes"]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2e6
    training = json.loads((folder / "training.json").read_text())
    assert Recipe().with_settings(training["recipe"]) == get_recipe("toy-shapes")
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
        ({"mixed_precision": "fp8"}, "mixed_precision must be no, tf32, bf16 or fp16, not 'fp8'"),
        ({"objective": "score"}, "objective must be noise, v or flow"),
        ({"random_flip": "perhaps"}, "random_flip must be true or false, not 'perhaps'"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
        ({"model": 3}, "model must be a name or fields of a configuration"),
        ({"objective": "flow", "min_snr_gamma": 5}, "min_snr_gamma is for the objectives noise and v"),
        ({"lora_rank": 2}, "lora_rank adapts a trained model; set init_from"),
        ({"merge_adapters": False}, "merge_adapters=false needs lora_rank, and at most one ema_decay"),
        ({"learning_rate": "inf"}, "learning_rate must be above 0, not inf"),
        ({"num_workers": 1_000_000}, "num_workers must be at most 1024, not 1000000"),
        ({"epochs": 10**12}, "epochs must be at most 1000000, not 1000000000000"),
        ({"init_from": "toy", "lora_rank": 10**6}, "lora_rank must be at most 4096, not 1000000"),
        ({"mirror": True, "random_flip": True}, "mirror is the old name of random_flip, and both are set"),
        ({"mirrors": True}, "no field 'mirrors'"),
        ({"pictures": 3}, "no field 'pictures'"),
        ({"num_train_timesteps": 10_000}, "num_train_timesteps 10000 with .* leave no signal"),
        ({"seed": 2**40}, "seed must be from 0 to"),
        ({"ema_decay": "[0.9"}, "ema_decay is not valid YAML"),
        ({"ema_decay": "[0.9, 0.9]"}, "or a list of different ones"),
        ({"model": "{a"}, "model is not valid YAML"),
        ({1: 2}, "no field '1'"),
        ({"push_to_hub": False}, "push_to_hub must be text, not False"),
        ({"data": ["a"]}, "data must be text, not"),
    ],
)
def test_a_recipe_refuses_what_it_cannot_do(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_recipe("toy").with_settings(settings)


def test_words_that_yaml_takes_for_values_are_taken_as_they_are_meant() -> None:
    settings = {"mixed_precision": False, "tracker": False, "push_to_hub": None, "ema_decay": "[0.9, 0.99]"}
    recipe = get_recipe("digits").with_settings(settings)
    assert (recipe.mixed_precision, recipe.tracker, recipe.push_to_hub) == ("no", "none", "")
    assert recipe.ema_decays == [0.9, 0.99]
    assert get_recipe("digits").with_settings({"objective": "flow"}).config.parameterization == "flow"


def test_a_recipe_of_an_older_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("{mirror: true, gradient_accumulation: 2, workers: 1, images_per_class: 8}")
    recipe = get_recipe(str(tmp_path / "old.yaml")).with_settings({"learning_rate_schedule": "constant"})
    assert recipe == Recipe(
        random_flip=True, gradient_accumulation_steps=2, num_workers=1, images_per_class=8, lr_scheduler="constant"
    )


def test_a_model_of_other_images_is_refused_before_the_work() -> None:
    with pytest.raises(ValueError, match=r"The data are 16x16 in 3 channels, and the model takes 32x32 in 4"):
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


# --- Objectives ------------------------------------------------------------------------------------------------------


def test_the_loss_with_a_learned_variance_is_the_official_one(golden_a: Golden) -> None:
    model, expected = golden_a.model(), golden_a.expected
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    clean, noise, timestep = (expected[f"loss.{name}"] for name in ("x_start", "noise", "t"))
    labels = {"class_labels": expected["loss.y"]}

    def denoiser(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return model(noisy, timestep, **conditions).sample

    with torch.no_grad():
        loss = noise_and_variance(denoiser, scheduler, clean, noise, timestep, **labels)
        simple = noise_prediction(
            lambda noisy, timestep, **conditions: denoiser(noisy, timestep, **conditions).chunk(2, dim=1)[0],
            scheduler, clean, noise, timestep, **labels,
        )  # fmt: skip
    torch.testing.assert_close(simple, expected["loss.mse"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss - simple, expected["loss.vb"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["loss.loss"], atol=1e-5, rtol=0)
    assert 0 in timestep  # the likelihood of the first step is among them


def test_the_bound_trains_the_variance_alone(golden_a: Golden) -> None:
    scheduler = DDPMScheduler(1000)
    clean, noise, timestep = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 5, 900])
    output = torch.randn(3, 4, 4, 4, requires_grad=True)
    loss = noise_and_variance(lambda noisy, timestep: output, scheduler, clean, noise, timestep)
    simple = (output[:, :2] - noise).square().flatten(1).mean(1)
    of_loss, of_simple = (torch.autograd.grad(value.sum(), output, retain_graph=True)[0] for value in (loss, simple))
    torch.testing.assert_close(of_loss[:, :2], of_simple[:, :2])
    assert (of_loss[:, 2:] != 0).any()


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8, 8)])
def test_exact_networks_have_no_loss_whatever_the_shape(shape: tuple[int, ...]) -> None:
    scheduler = DDPMScheduler(1000, prediction_type="v_prediction")
    clean, noise = torch.randn(shape), torch.randn(shape)
    timestep = torch.tensor([0, 10, 500, 900, 999])
    level = (
        (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64))
        .cumprod(0)[timestep]
        .float()
        .view(-1, *[1] * (len(shape) - 1))
    )
    velocity = level.sqrt() * noise - (1 - level).sqrt() * clean
    assert v_prediction(lambda noisy, timestep: velocity, scheduler, clean, noise, timestep).max() < 1e-10
    assert v_prediction(lambda noisy, timestep: noise, scheduler, clean, noise, timestep).mean() > 0.1
    # Along the straight path, a step of the predicted velocity leads from noisy data to clean ones.
    times = torch.tensor([1.0, 250.0, 500.0, 999.0, 1000.0])
    seen = {}

    def straight(noisy: Tensor, timestep: Tensor) -> Tensor:
        seen["clean"] = noisy - (timestep / 1000).view(-1, *[1] * (len(shape) - 1)) * (noise - clean)
        return noise - clean

    assert flow_matching(straight, scheduler, clean, noise, times).max() == 0
    torch.testing.assert_close(seen["clean"], clean, atol=1e-5, rtol=0)


def test_weights_and_times() -> None:
    scheduler = DDPMScheduler(1000)
    timestep = torch.arange(1000)
    alpha_bar = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    ratio = (alpha_bar / (1 - alpha_bar)).float()
    weights = min_snr_weight(scheduler, timestep, gamma=5.0)
    assert weights[ratio < 5].eq(1).all()  # as without, where there is much noise
    assert weights[0] < 1e-3
    torch.testing.assert_close(min_snr_weight(scheduler, timestep, 5.0, "v") * (ratio + 1), ratio.clamp(max=5.0))
    even, middle = flow_timesteps(20_000, scheduler), flow_timesteps(20_000, scheduler, logit_normal=True)
    assert 280 < even.std() < 300  # 1000 / sqrt(12)
    assert middle.std() < 220
    assert min(even.min(), middle.min()) >= 0
    assert max(even.max(), middle.max()) <= 1000


# --- Recipes and data ------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_loads_and_names_a_model() -> None:
    names = shipped_recipes()
    assert names == ["digits", "distill", "finetune", "imagenet-256", "imagenet-256-flow", "toy", "toy-shapes"]
    assert all(get_recipe(name).config.num_hidden_layers > 0 for name in names)
    flow = get_recipe("imagenet-256-flow").config
    assert (flow.parameterization, flow.learn_sigma) == ("flow", False)


@pytest.mark.parametrize("size", PUBLISHED_MODELS)
def test_the_published_sizes_train_as_the_paper_does(size: str) -> None:
    """Section 4 of the paper."""
    recipe = get_recipe("imagenet-256").with_settings({"model": size})
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (400_000, 256, 1e-4)
    assert (recipe.ema_decay, recipe.weight_decay, recipe.random_flip, recipe.max_grad_norm) == (0.9999, 0, True, 0)
    assert (recipe.lr_scheduler, recipe.objective, recipe.num_train_timesteps) == ("constant", "noise", 1000)
    assert (recipe.beta_start, recipe.beta_end) == (1e-4, 2e-2)
    assert recipe.config.learn_sigma
    assert recipe.config.class_dropout_prob == 0.1
    assert recipe.config.patch_size == int(size[-1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "A recipe has no field 'epoch'. The nearest names: epochs"),
        ("[1, 2]", "must hold fields of a recipe"),
        ("a: [", "is not valid YAML"),
        ("model: {hiden_size: 3}", "A model has no field 'hiden_size'. The nearest names: hidden_size"),
        ("model: {architectures: 3}", "A model has no field 'architectures'. The nearest names: sample_size"),
        ("data: nowhere", "There is no data 'nowhere'"),
        ("batch_size: 5000", "batch_size 5000 is larger than the data set of 3200"),
        ("gradient_accumulation_steps: 3", "batch_size 128 cannot be divided equally"),
        ("data: one", "The data have only one class"),
        ("data: empty", "has no images"),
        ("{data: mixed.npz}", "must hold images"),
        ("{data: torn.npz}", "torn.npz is not an archive"),
        ("{data: words.npz}", "integer labels (N,)"),
        ("init_from: nowhere", "nowhere"),
        (
            "{init_from: dit-toy-shapes, objective: flow}",
            "parameterization 'diffusion' cannot be trained with the objective 'flow'",
        ),
        ("{init_from: dit-toy-shapes, num_train_timesteps: 1000}", "was trained with num_train_timesteps 200 and beta"),
        ("{vae: vae}", "The decoder vae takes 4 channels, and the data have 3"),
        ("fsdp: true", "start with `accelerate launch`"),
        (
            "{data: labels.npz, model: {sample_size: 16, in_channels: 3, num_classes: 3, learn_sigma: false}}",
            "5 classes",
        ),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    (tmp_path / "one" / "cats").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "one" / "cats" / "1.png")
    np.savez(tmp_path / "mixed.npz", images=np.zeros((4, 16, 16)), labels=np.zeros(3))
    np.savez(tmp_path / "labels.npz", images=np.zeros((200, 16, 16, 3), np.uint8), labels=np.arange(200) % 5)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:100])
    np.savez(tmp_path / "words.npz", images=np.zeros((4, 16, 16, 3), np.uint8), labels=np.array(["a"] * 4))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 4}')
    (tmp_path / "mine.yaml").write_text(text)
    run = dit_hub("train", "mine.yaml", "--out", "out", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert words in run.stderr
    assert not (tmp_path / "out").exists()


def image_folder(folder: Path, count: int = 20, size: int = 24) -> Path:
    """Two classes of random images, wider than high."""
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng(index).integers(0, 256, (size, size + 8, 3), np.uint8)
            Image.fromarray(noise).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_of_images_trains_and_unreadable_ones_are_left_out(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets", count=100)
    image = (folder / "dogs" / "7.png").read_bytes()  # with a damaged chunk, which PIL calls a syntax error
    (folder / "dogs" / "7.png").write_bytes(image.replace(b"IDAT", b"\1\1\1\1"))
    dataset = ImageFolder(folder, 16)
    assert (len(dataset), dataset.id2label, dataset.sample_shape) == (200, {0: "cats", 1: "dogs"}, (3, 16, 16))
    model = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "hidden_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_classes": 2, "learn_sigma": False}  # fmt: skip
    recipe = Recipe(model=model, data=str(folder), epochs=2, batch_size=20, random_flip=True)
    result = train(recipe)
    assert len(result.epoch_losses) == 2
    assert result.pipeline.id2label == {0: "cats", 1: "dogs"}
    for index in range(5):
        (folder / "cats" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"of 200 images cannot be read, more than 1%; the last one is .*png"):
        train(recipe)


def test_the_crop_is_the_middle_square_and_flips_flip(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), (0, 0, 0))
    image.paste((255, 0, 0), (100, 0, 150, 100))  # the left half of the middle square
    cropped = np.asarray(center_crop(image, 20))
    assert cropped.shape == (20, 20, 3)
    assert cropped[:, 2:8, 0].min() > 200
    assert cropped[:, 12:18, 0].max() < 50
    image.save(tmp_path / "1.png")
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    image.save(tmp_path / "pets" / "cats" / "1.png")
    upright, flipped = (ImageFolder(tmp_path / "pets", 20).read([(0, flip)]).data[0] for flip in (False, True))
    assert torch.equal(upright.flip(2), flipped)


def test_the_samples_are_a_function_of_seed_and_step() -> None:
    def keys(first: int, last: int, parts: int = 1, own: tuple[int, ...] = (0,)) -> list:
        return list(ResumableSampler(50, 12, parts, own, True, 3, first, last))

    whole = keys(0, 12)
    assert keys(5, 12) == whole[5:]  # resumed
    two = [keys(0, 12, 2, (rank,)) for rank in (0, 1)]  # two processes
    assert [first + second for first, second in zip(*two, strict=True)] == whole
    for epoch in range(3):  # every sample at most once in a pass of four steps
        positions = [position for step in whole[4 * epoch : 4 * epoch + 4] for position, _ in step]
        assert len(set(positions)) == 48
    assert 0.3 < np.mean([flipped for step in whole for _, flipped in step]) < 0.7


def test_latents_are_cached_once_and_trained_from(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    folder, vae = image_folder(tmp_path / "pets"), make_vae()
    vae.save_pretrained(tmp_path / "vae")
    run = dit_hub("latents", folder, "latents", "--vae", "vae", "--size", "16", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    cached = CachedLatents(tmp_path / "latents")
    assert (len(cached), cached.sample_shape, cached.id2label) == (40, (4, 8, 8), {0: "cats", 1: "dogs"})
    images = ImageFolder(folder, 16).read([(3, False), (30, True)])
    with torch.no_grad():
        latents = vae.encode(images.data).latent_dist
    read = cached.read([(3, False), (30, True)])
    torch.testing.assert_close(read.data, torch.cat([latents.mean, latents.std], dim=1), atol=5e-3, rtol=2e-3)
    assert read.labels.tolist() == [0, 1]
    model = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_classes": 2}  # fmt: skip
    result = train(Recipe(model=model, data=str(tmp_path / "latents"), steps=4, batch_size=8, num_train_timesteps=1000))
    assert result.pipeline.scheduler.config["variance_type"] == "learned_range"
    # The whole command, which has no decoder to draw images with at its end.
    (tmp_path / "mine.yaml").write_text(json.dumps({"model": model, "data": "latents", "steps": 4, "batch_size": 8,
                                                    "objective": "flow", "num_train_timesteps": 1000}))  # fmt: skip
    run = dit_hub("train", "mine.yaml", "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert DiTPipeline.from_pretrained(tmp_path / "out").transformer.config.out_channels == 4


def test_latents_tell_what_they_leave_out_and_refuse_other_images(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    folder = image_folder(tmp_path / "pets")
    make_vae().save_pretrained(tmp_path / "vae")
    (folder / "cats" / "3.png").write_bytes(b"no image")
    run = dit_hub("latents", folder, "latents", "--vae", "vae", "--size", "16", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3.png cannot be read and is left out" in run.stdout.replace("\n", "")
    assert "39 images are encoded" in run.stdout
    for arguments, words in (
        ((folder, "latents", "--size", "24"), "holds latents of other data, of another size or VAE"),
        (("digits", "other"), "The images have 1 channels, and the VAE takes 3"),
        ((folder, "other", "--device", "cuda:7"), "There is no device 'cuda:7' here"),
    ):
        run = dit_hub("latents", *arguments, "--vae", "vae", cwd=tmp_path)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert words in run.stderr
    (tmp_path / "latents" / "shard-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged; run dit-hub latents again"):
        CachedLatents(tmp_path / "latents")


def test_latents_resume_where_they_stopped(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    dataset, vae = ImageFolder(image_folder(tmp_path / "pets"), 16), make_vae()
    whole = cache_latents(dataset, vae, tmp_path / "whole", shard_size=16)
    cut = cache_latents(dataset, vae, tmp_path / "cut", shard_size=16)
    (cut / "latents.json").unlink()
    (cut / "shard-00002.safetensors").unlink()
    (cut / "shard-00001.safetensors").write_bytes(b"torn")
    kept = (cut / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="There is no data"):
        open_dataset(str(cut / "nothing"), 16, 1, 0)
    cache_latents(dataset, vae, cut, shard_size=16)
    assert (cut / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert (cut / "latents.json").read_text() == (whole / "latents.json").read_text()
    with pytest.raises(ValueError, match="latents of other data"):
        cache_latents(dataset, vae, cut, shard_size=8)


# --- Kinds of training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "v"},
        {"objective": "flow", "logit_normal": True, "num_train_timesteps": 1000},
        {"min_snr_gamma": 5.0},
        {"gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"lr_scheduler": "constant", "weight_decay": 0.01},
    ],
)
def test_settings_train_and_their_pipeline_samples(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(SHORT, **settings)
    result = train(recipe)
    assert result.epoch_losses[-1] < result.epoch_losses[0]
    if set(settings) & {"gradient_accumulation_steps", "gradient_checkpointing"}:  # the same sums in another order
        torch.testing.assert_close(
            torch.tensor(result.epoch_losses), torch.tensor(train(SHORT).epoch_losses), atol=1e-4, rtol=0
        )
    result.pipeline.save_pretrained(tmp_path / "out")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(["red-circle"], num_inference_steps=3).images) == 1


def test_fine_tuning_keeps_what_it_does_not_train(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", size=16)
    recipe = Recipe(init_from="dit-toy-shapes", data=str(tmp_path / "pets"), steps=3, batch_size=8, lora_rank=2,
                    **TOYS_NOISE)  # fmt: skip
    trained = dict(train(recipe).pipeline.transformer.state_dict())
    before = DiTPipeline.from_pretrained("dit-toy-shapes").transformer.state_dict()
    assert trained.keys() == before.keys()  # adapters are merged
    changed = {
        name for name in trained if trained[name].shape != before[name].shape or not trained[name].equal(before[name])
    }
    assert changed == {name for name in trained if name.startswith("y_embedder") or name.endswith(
        ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight"))}  # fmt: skip
    DiTPipeline.from_pretrained("dit-toy-shapes").save_pretrained(tmp_path / "base")
    origin = {"source": "x", "layout": "dit-hub", "license": "cc-by-nc-4.0"}
    (tmp_path / "base" / "origin.json").write_text(json.dumps(origin))
    whole = train(replace(recipe, lora_rank=0, init_from=str(tmp_path / "base"))).pipeline
    whole.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "origin.json").read_text())["license"] == "cc-by-nc-4.0"
    assert whole.transformer.config.num_classes == 2
    assert whole.id2label == {0: "cats", 1: "dogs"}


def test_a_model_in_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    start = DiTPipeline.from_pretrained("dit-toy-shapes")
    start.transformer.bfloat16()
    start.save_pretrained(tmp_path / "half")
    trained = train(
        replace(SHORT, init_from=str(tmp_path / "half"), ema_decay=0.999, **TOYS_NOISE)
    ).pipeline.transformer
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    assert any(not weight.equal(weight.bfloat16().float()) for weight in trained.parameters())


def test_one_process_trains_in_one_precision_after_another() -> None:
    losses = [train(replace(SHORT, mixed_precision=name)).epoch_losses for name in ("no", "bf16", "tf32")]
    assert losses[0] != losses[1]
    assert torch.get_float32_matmul_precision() == "highest"


def test_adapters_are_kept_apart_and_merged_when_loaded(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", size=16)
    settings = ("init_from=dit-toy-shapes", "data=pets", "steps=3", "batch_size=8", "lora_rank=2", *TOYS_NOISE_SETTINGS)
    for name, merge in (("merged", "true"), ("apart", "false")):
        run = dit_hub("train", "toy", *settings, f"merge_adapters={merge}", "--out", name, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    files = {path.name for path in (tmp_path / "apart").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "training.json"} <= files
    assert not {"transformer", "model_index.json"} & files
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.load_adapters(tmp_path / "apart")
    assert pipeline.id2label == {0: "cats", 1: "dogs"}
    merged = DiTPipeline.from_pretrained(tmp_path / "merged").transformer.state_dict()
    loaded = pipeline.transformer.state_dict()
    assert loaded.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(loaded[name], weight, atol=1e-6, rtol=0)
    card = (tmp_path / "apart" / "README.md").read_text()
    assert "The model draws these classes and nothing else" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert 'from_pretrained("dit-toy-shapes")\npipe.load_adapters("apart")' in code
    other = DiTPipeline.from_pretrained(tmp_path / "merged")
    other.transformer = DiTTransformer(get_recipe("digits").config)
    with pytest.raises(ValueError, match="are of another model than this one"):
        other.load_adapters(tmp_path / "apart")
    (tmp_path / "apart" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="are damaged"):
        pipeline.load_adapters(tmp_path / "apart")
    with pytest.raises(ValueError, match="holds no adapters"):
        pipeline.load_adapters(tmp_path / "merged")


def test_weights_are_shared_on_the_device_of_the_run(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the machine has a GPU that the run does not use."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = Weights(Recipe(fsdp=True), make_model(), Accelerator(cpu=True))
        assert {cast(Any, weight).device_mesh.device_type for weight in weights.trainable} == {"cpu"}
    finally:
        dist.destroy_process_group()


def test_frozen_parts_stay_as_they_were() -> None:
    recipe = replace(SHORT, init_from="dit-toy-shapes", freeze=r"^blocks\.[01]\.|embedder", **TOYS_NOISE)
    trained = train(recipe).pipeline.transformer.state_dict()
    for name, before in DiTPipeline.from_pretrained("dit-toy-shapes").transformer.state_dict().items():
        frozen = name.startswith(("blocks.0.", "blocks.1.")) or "embedder" in name
        assert trained[name].equal(before) == frozen, name
    for pattern, words in (("nothing", "matches no parameter; they have names like"), (".", "leaves nothing to train"),
                           ("(", "is not a regular expression")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            train(replace(recipe, freeze=pattern))


@pytest.mark.parametrize(
    "settings", [{"freeze": r"^blocks\.0\."}, {"init_from": "dit-toy-shapes", "lora_rank": 2, **TOYS_NOISE}]
)
def test_a_run_that_trains_a_part_resumes_where_it_was_cut(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(SHORT, save_every=4, ema_decay=0.9, **settings)
    whole = train(recipe).pipeline.transformer.state_dict()

    def cut(progress: Progress) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path)
    resumed = train(recipe, run_folder=tmp_path).pipeline.transformer.state_dict()
    assert all(resumed[name].equal(weight) for name, weight in whole.items())


def test_latents_get_the_decoder_that_the_recipe_names(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    cache_latents(ImageFolder(image_folder(tmp_path / "pets"), 16), vae, tmp_path / "latents")
    model = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_classes": 2}  # fmt: skip
    recipe = Recipe(model=model, data=str(tmp_path / "latents"), steps=4, batch_size=8, sample_every=2)
    with pytest.raises(ValueError, match="sample_every needs a decoder"):
        train(recipe)
    with pytest.raises(ValueError, match="The decoder nowhere cannot be loaded"):
        train(replace(recipe, vae="nowhere"))
    result = train(replace(recipe, vae=str(tmp_path / "vae")), run_folder=tmp_path / "run")
    assert result.pipeline.vae is not None
    assert len(list((tmp_path / "run" / "runs").glob("samples-*.png"))) == 2


def test_a_loss_that_is_not_finite_stops_or_is_skipped() -> None:
    images, labels = shapes(16, 0)
    images[37] = float("nan")
    dataset = InMemoryImages(images, labels, ID2LABEL, "", "")
    with pytest.raises(TrainingError, match=r"The loss of step \d+ is nan, on the samples .* There is no checkpoint."):
        train(SHORT, dataset=dataset)
    pictures_without = InMemoryImages(images * float("nan"), labels, ID2LABEL, "", "")
    with pytest.raises(TrainingError, match="20 steps in a row were skipped"):
        train(replace(SHORT, skip_nan=True, epochs=30), dataset=pictures_without)
    result = train(replace(SHORT, skip_nan=True), dataset=dataset)
    assert result.skipped == 3  # once in each pass
    assert all(np.isfinite(result.epoch_losses))
    assert all(weight.isfinite().all() for weight in result.pipeline.transformer.parameters())
