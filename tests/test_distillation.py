"""Students: what they learn from their teachers, in runs that are killed, and how their folders sample."""

import itertools
import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.distillation import (
    Predictor,
    consistency_distillation,
    ddim_step,
    guidance_distillation,
    guided,
    progressive_distillation,
    timestep_grid,
    two_steps,
)
from dit_hub.export import export_onnx
from dit_hub.model_cards import render_card
from dit_hub.table_scheduler import TableScheduler
from dit_hub.training.checkpoints import checkpoints
from dit_hub.training.data import Batch, InMemoryImages
from dit_hub.training.distilling import Distillation
from dit_hub.training.loop import Progress, train
from dit_hub.training.loss import TrainingLoss
from dit_hub.training.recipe import Recipe, get_recipe
from dit_hub.training.shapes import ID2LABEL, shapes

from .command_line import Command, dit_hub
from .conftest import SMALL_MODEL, TOYS_NOISE, TOYS_NOISE_SETTINGS, MakePipeline

MakeModel = Callable[..., DiTTransformer]

NOISE: Any = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
FLOW: Any = FlowMatchEulerDiscreteScheduler(1000)

# Three stages of two steps, from the embedded model, which has no null class.
LADDER = Recipe(init_from="dit-toy-shapes", distill="progressive", objective="v", student_steps=1, teacher_steps=8,
                steps=6, batch_size=16, images_per_class=2, ema_decay=0.5, save_every=1, tracker="none",
                **TOYS_NOISE)  # fmt: skip


def target_of(loss: Callable[[Predictor], Tensor], prediction: str, shape: torch.Size) -> Tensor:
    """What an objective wants a student to predict: where its mean square is least."""
    answer = torch.zeros(shape, requires_grad=True)
    loss(Predictor(lambda noisy, timestep, **conditions: answer, prediction)).sum().backward()
    assert answer.grad is not None
    return -answer.grad * answer[0].numel() / 2


def wavy(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
    """A network that is linear in nothing."""
    return torch.sin(3 * noisy + timestep.view(-1, 1, 1, 1) / 300)


def noisy_batch(scheduler: Any, timestep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise, and both at a timestep, (4, 3, 8, 8)."""
    clean, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    return clean, noise, scheduler.add_noise(clean, noise, torch.full((4,), timestep))


def timesteps_at(grid: Tensor, *positions: int) -> Any:
    """Of each position, its timestep for a batch of four."""
    return tuple(grid[position].expand(4) for position in positions)


# --- Objectives ------------------------------------------------------------------------------------------------------


def test_a_guided_teacher_predicts_what_the_pipeline_does(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    config, latents, held = pipeline.transformer.config, torch.randn(3, 4, 8, 8), []

    def hold(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        held.append((timestep, tensors["noise_pred"].clone()))
        return {}

    pipeline([1, 5, 7], guidance_scale=2.5, num_inference_steps=1, latents=latents, output_type="latent",
             callback_on_step_end=hold, callback_on_step_end_tensor_inputs=["noise_pred"])  # fmt: skip
    ((timestep, expected),) = held

    def network(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return pipeline.transformer(noisy, timestep, **conditions).sample

    teacher = Predictor(guided(network, 2.5, config.null_class, config.guided_channels), "noise")
    labels, timesteps = torch.tensor([1, 5, 7]), torch.full((3,), int(timestep))
    with torch.no_grad():
        prediction = teacher.predict(latents, timesteps, class_labels=labels)
    torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
    unguided = network(latents, timesteps, class_labels=labels)[:, :4]
    assert (prediction - unguided).norm() > 0.05 * prediction.norm()


@pytest.mark.parametrize(("teacher", "student"), [("noise", "noise"), ("noise", "v"), ("v", "v"), ("flow", "flow")])
def test_guidance_distillation_wants_the_teachers_estimate(teacher: str, student: str) -> None:
    scheduler: Any = FLOW if teacher == "flow" else NOISE
    clean, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    timestep = torch.full((4,), 500)
    target = target_of(
        lambda learner: guidance_distillation(learner, Predictor(wavy, teacher), scheduler, clean, noise, timestep),
        student,
        clean.shape,
    )
    signal, sigma = (0.5, 0.5) if teacher == "flow" else (
        float(NOISE.alphas_cumprod[500]) ** 0.5, (1 - float(NOISE.alphas_cumprod[500])) ** 0.5)  # fmt: skip
    noisy = signal * clean + sigma * noise
    expected = wavy(noisy, timestep)
    if teacher != student:  # v of the data and the noise that the predicted noise means
        expected = signal * expected - sigma * (noisy - sigma * expected) / signal
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("clips", [False, True])
def test_the_teachers_two_steps_are_those_of_diffusers_ddim(prediction: str, clips: bool) -> None:
    kind = {"noise": "epsilon", "v": "v_prediction"}[prediction]
    scheduler: Any = DDIMScheduler.from_config(
        NOISE.config, timestep_spacing="trailing", clip_sample=clips, prediction_type=kind
    )
    scheduler.set_timesteps(8)
    grid = timestep_grid(NOISE, 8)
    assert grid.tolist() == [-1, *scheduler.timesteps.flip(0).tolist()]
    for first in (8, 4, 2):  # the last one ends at the data
        _, _, noisy = noisy_batch(NOISE, int(grid[first]))
        expected = noisy
        for timestep in grid[[first, first - 1]]:
            output = wavy(expected, timestep.expand(4))
            expected = scheduler.step(output, int(timestep), expected, use_clipped_model_output=clips).prev_sample
        through = timesteps_at(grid, first, first - 1, first - 2)
        reached = two_steps(Predictor(wavy, prediction, clips), NOISE, noisy, through)
        torch.testing.assert_close(reached, expected, rtol=1e-4, atol=1e-4)


def test_the_teachers_two_steps_along_the_straight_path_are_eulers() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(1000, shift_terminal=0.25)
    scheduler.set_timesteps(4)
    grid = timestep_grid(scheduler, 4)
    assert grid.tolist() == [0, *scheduler.timesteps.flip(0).tolist()] == [0, 250, 500, 750, 1000]
    expected = noisy = torch.randn(4, 3, 8, 8)
    for timestep in scheduler.timesteps[:2]:
        expected = scheduler.step(wavy(expected, timestep.expand(4)), timestep, expected).prev_sample
    reached = two_steps(Predictor(wavy, "flow"), FLOW, noisy, timesteps_at(grid, 4, 3, 2))
    torch.testing.assert_close(reached, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "flow"])
@pytest.mark.parametrize("step", [2, 1])  # the second one ends at the data
def test_one_step_of_a_progressive_student_ends_where_two_of_its_teacher_do(prediction: str, step: int) -> None:
    schedule: Any = FLOW if prediction == "flow" else NOISE
    grid, teacher = timestep_grid(schedule, 4), Predictor(wavy, "flow" if prediction == "flow" else "noise")
    clean, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    start, middle, end = through = timesteps_at(grid, 2 * step, 2 * step - 1, 2 * step - 2)
    target = target_of(
        lambda student: progressive_distillation(student, teacher, schedule, clean, noise, through),
        prediction,
        clean.shape,
    )
    noisy = ddim_step(schedule, (clean, noise), start)
    if prediction == "flow":
        sampler: Any = FlowMatchEulerDiscreteScheduler(1000, shift_terminal=0.5)
    else:
        sampler = DDIMScheduler.from_config(NOISE.config, timestep_spacing="trailing", clip_sample=False,
                                            prediction_type="v_prediction")  # fmt: skip
    sampler.set_timesteps(2)
    reached = sampler.step(target, sampler.timesteps[2 - step], noisy).prev_sample
    torch.testing.assert_close(reached, two_steps(teacher, schedule, noisy, through), rtol=1e-4, atol=1e-4)
    assert (reached - ddim_step(schedule, teacher.estimate(schedule, noisy, start), end)).norm() > 0.01
    assert int(middle[0]) not in (int(start[0]), int(end[0]))


def test_a_consistent_student_estimates_what_it_does_one_step_later() -> None:
    grid, teacher = timestep_grid(NOISE, 50), Predictor(wavy, "noise")
    clean, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)

    def answer(noisy: Tensor, timestep: Tensor) -> Tensor:
        return torch.cos(noisy) * (1 + timestep.view(-1, 1, 1, 1) / 1000)

    class Student(Predictor):
        """Predicts one thing for the later timestep, and learns another one for the first."""

        def predict(self, noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            return self.denoiser(noisy, timestep) if int(timestep[0]) == start else answer(noisy, timestep)

    for position in (30, 1):
        start, end = int(grid[position]), int(grid[position - 1])
        steps = torch.full((4,), start), torch.full((4,), end)

        def loss(learner: Predictor, steps: Any = steps) -> Tensor:
            return consistency_distillation(Student(learner.denoiser, "v"), teacher, NOISE, clean, noise, steps)

        target = target_of(loss, "v", clean.shape)
        noisy = NOISE.add_noise(clean, noise, steps[0])
        signal, sigma = float(NOISE.alphas_cumprod[start]) ** 0.5, (1 - float(NOISE.alphas_cumprod[start])) ** 0.5
        estimate = signal * noisy - sigma * target
        reached = ddim_step(NOISE, teacher.estimate(NOISE, noisy, steps[0]), steps[1])
        expected = reached
        if end >= 0:  # at the data, it estimates what it is given
            signal, sigma = float(NOISE.alphas_cumprod[end]) ** 0.5, (1 - float(NOISE.alphas_cumprod[end])) ** 0.5
            expected = signal * reached - sigma * answer(reached, steps[1])
        torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        (
            {"distill": "progressive", "student_steps": 1, "teacher_steps": 4, "guidance_scale": 2.0},
            [99, 99, 99, 199, 199],
        ),
        ({"distill": "consistency", "teacher_steps": 50}, [3, 51, 99, 103, 199]),
        ({"distill": "guidance", "guidance_scale": 2.0}, [0, 49, 99, 100, 199]),
    ],
)
def test_students_learn_at_the_timesteps_where_steps_start(
    make_model: MakeModel, settings: dict[str, Any], starts: list[int]
) -> None:
    scheduler, seen = DDPMScheduler(200, **TOYS_NOISE), []

    def student(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        seen.append(timestep.tolist())
        return torch.zeros_like(noisy)

    recipe = replace(LADDER, **settings)
    distillation = Distillation(recipe, make_model(**SMALL_MODEL), scheduler, torch.device("cpu"))
    clean, noise = torch.randn(2, 5, 3, 16, 16)
    drawn = torch.tensor([0, 49, 99, 100, 199])
    losses = distillation(student, scheduler, clean, noise, drawn, class_labels=torch.arange(5))
    assert losses.shape == (5,)
    assert seen[-1] == starts
    if recipe.distill == "progressive":  # a later stage has half as many steps, and an unguided teacher
        distillation.begin(1, make_model(**{**SMALL_MODEL, "class_dropout_prob": 0.0}))
        distillation(student, scheduler, clean, noise, drawn, class_labels=torch.arange(5))
        assert seen[-1] == [199] * 5


@pytest.mark.parametrize("distill", ["", "guidance", "progressive", "consistency"])
def test_a_process_without_a_sample_calls_the_model_as_often_as_the_others(make_model: MakeModel, distill: str) -> None:
    dataset, model = InMemoryImages(*shapes(2), ID2LABEL, "", ""), make_model(**SMALL_MODEL)
    recipe = replace(LADDER, distill=distill, guidance_scale=2.0 if distill else 1.0)
    accelerator = Accelerator(cpu=True)
    distillation = None
    if distill:
        distillation = Distillation(recipe, make_model(**SMALL_MODEL), DDPMScheduler(200, **TOYS_NOISE),
                                    accelerator.device)  # fmt: skip
    loss, calls = TrainingLoss(recipe, dataset, model.config, accelerator, distillation), []

    def counted(*arguments: Any, **conditions: Any) -> Any:
        calls[-1].append(torch.is_grad_enabled())  # sharded weights are gathered in either case
        return model(*arguments, **conditions)

    data, labels = shapes(1)
    (draws,) = loss.draw(0, 1)
    for count in (4, 0):
        calls.append([])
        loss(counted, Batch(data[:count], labels[:count], list(range(count)), []), draws).backward()
    assert calls[0] == calls[1]
    assert calls[0][-1]


def test_the_timesteps_of_a_stage_are_made_once(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(scheduler: Any, steps: int, *arguments: Any) -> Tensor:
        made.append(steps)
        return timestep_grid(scheduler, steps, *arguments)

    monkeypatch.setattr("dit_hub.training.distilling.timestep_grid", counted)
    scheduler = DDPMScheduler(200, **TOYS_NOISE)
    distillation = Distillation(LADDER, make_model(**SMALL_MODEL), scheduler, torch.device("cpu"))
    for stage in range(3):
        if stage:
            distillation.begin(stage, make_model(**SMALL_MODEL))
        for _ in range(2):
            clean, noise = torch.randn(2, 5, 3, 16, 16)
            distillation(wavy, scheduler, clean, noise, torch.arange(5), class_labels=torch.arange(5))
    assert made == [8, 4, 2]


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided_base(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> str:
    """A pipeline with a null class and random weights, of the embedded model's data and noise."""
    folder = tmp_path_factory.mktemp("base") / "base"
    model = make_model(**SMALL_MODEL)
    DiTPipeline(model, DDPMScheduler(200, **TOYS_NOISE), None, dict(enumerate(map(str, range(16))))).save_pretrained(
        folder
    )
    return str(folder)


def same_weights(one: Any, other: Any) -> bool:
    ours, theirs = one.transformer.state_dict(), other.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    return all(weight.equal(theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])  # in and between stages of two steps each
def test_a_ladder_cut_anywhere_ends_in_the_same_bits(tmp_path: Path, step: int) -> None:
    def cut(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(LADDER, cut, run_folder=tmp_path)
    resumed = train(LADDER, run_folder=tmp_path)
    whole = train(replace(LADDER, save_every=0))
    assert same_weights(resumed.pipeline, whole.pipeline)
    assert resumed.epoch_losses == whole.epoch_losses


def test_each_stage_has_the_student_of_the_one_before_for_a_teacher(tmp_path: Path) -> None:
    train(replace(LADDER, keep_last=6), run_folder=tmp_path)
    saved = [sorted(path.stem for path in one.glob("*.safetensors")) for one in checkpoints(tmp_path)]
    assert ["teacher" in names for names in saved] == [False, False, True, True, True, True]
    for first, end_of_the_one_before in ((3, 2), (4, 2), (5, 4), (6, 4)):
        teacher = load_file(tmp_path / f"step-{first:08d}" / "teacher.safetensors")
        student = load_file(tmp_path / f"step-{end_of_the_one_before:08d}" / "ema-5.safetensors")
        assert teacher.keys() == student.keys()
        assert all(teacher[name].equal(weight) for name, weight in student.items())


def test_the_learning_rate_falls_to_zero_in_each_stage(tmp_path: Path) -> None:
    train(replace(LADDER, keep_last=18, ema_decay=0.0, steps=18, student_steps=2), run_folder=tmp_path)
    weights = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path)]
    moved = [
        max(float((after[name] - weight).abs().max()) for name, weight in before.items())
        for before, after in itertools.pairwise(weights)
    ]  # by steps 2 to 18, of two stages of nine
    assert moved[7] < 0.2 * moved[8]
    assert moved[16] < 0.2 * moved[8]


def test_a_checkpoint_without_its_teacher_is_damaged(tmp_path: Path) -> None:
    def cut(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(LADDER, cut, run_folder=tmp_path)
    (checkpoints(tmp_path)[-1] / "teacher.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is damaged \('teacher'\); remove it to resume from an older one"):
        train(LADDER, run_folder=tmp_path)


def test_a_killed_ladder_resumes(tmp_path: Path, guided_base: str) -> None:
    settings = [
        f"init_from={guided_base}", "data=shapes", "images_per_class=16", "guidance_scale=2", "epochs=12",
        "student_steps=2", "teacher_steps=8", "batch_size=64", "num_train_timesteps=200", "save_every=4",
        "sample_every=0", "tracker=none", *TOYS_NOISE_SETTINGS,
    ]  # fmt: skip

    def start(name: str) -> Command:
        return Command("train", "distill", *settings, "--out", tmp_path / name, cwd=tmp_path)

    whole = start("whole")
    command = start("killed")
    while command.running() and not list(tmp_path.glob("killed.run/step-*/teacher.safetensors")):
        time.sleep(0.005)
    command.send_signal(signal.SIGKILL)
    assert command.wait().returncode == -signal.SIGKILL
    for run in (start("killed"), whole):
        ended = run.wait()
        assert ended.returncode == 0, ended.stderr
    one, other = (DiTPipeline.from_pretrained(tmp_path / name) for name in ("killed", "whole"))
    assert same_weights(one, other)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "num_inference_steps=2)" in card
    assert "distilled to draw in 2 steps, and in no other number of them. Guidance of 2 is built in" in card


@pytest.mark.parametrize(
    "settings",
    [
        {"distill": "progressive", "objective": "v", "student_steps": 2, "teacher_steps": 4},
        {"distill": "guidance", "guidance_scale": 2.0},
    ],
)
def test_a_student_learns_from_its_teacher(guided_base: str, settings: dict[str, Any]) -> None:
    losses: list[float] = []
    teacher = guided_base if settings["distill"] == "guidance" else "dit-toy-shapes"
    recipe = Recipe(init_from=teacher, steps=60, batch_size=32, images_per_class=8, learning_rate=2e-3,
                    tracker="none", **TOYS_NOISE, **settings)  # fmt: skip
    result = train(recipe, lambda progress: losses.append(progress.loss))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    config = result.pipeline.transformer.config
    assert (config.null_class, config.class_dropout_prob, config.num_classes) == (None, 0.0, 16)


def test_a_consistency_student_comes_nearer_to_what_its_teacher_draws() -> None:
    labels, noise = list(range(16)), torch.randn(16, 3, 16, 16)

    def drawn(pipeline: Any, steps: int) -> Tensor:
        return pipeline(labels, num_inference_steps=steps, latents=noise, output_type="latent").images

    teacher: Any = DiTPipeline.from_pretrained("dit-toy-shapes")
    teacher.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, clip_sample=False)
    expected, distances = drawn(teacher, 50), []
    for steps in (1, 60):
        recipe = replace(LADDER, distill="consistency", teacher_steps=50, steps=steps,
                         images_per_class=8, learning_rate=1e-3, ema_decay=0.0, save_every=0)  # fmt: skip
        distances.append(float((drawn(train(recipe).pipeline, 1) - expected).norm() / expected.norm()))
    assert distances[1] < 0.8 * distances[0], distances


def test_the_teacher_is_clipped_where_its_scheduler_clips(tmp_path: Path, make_pipeline: MakePipeline) -> None:
    losses: list[float] = []
    for clips in (True, False):
        scheduler = DDPMScheduler(200, **TOYS_NOISE, clip_sample=clips)
        make_pipeline(scheduler=scheduler, **SMALL_MODEL).save_pretrained(tmp_path / str(clips))
        recipe = replace(LADDER, init_from=str(tmp_path / str(clips)), teacher_steps=2, steps=1)
        train(recipe, lambda progress: losses.append(progress.loss))
    assert losses[0] < 0.5 * losses[1]  # random noise predictions mean data far beyond


def test_low_rank_adapters_and_micro_batches_learn_from_a_teacher_too(guided_base: str) -> None:
    recipe = replace(LADDER, init_from=guided_base, guidance_scale=2.0, lora_rank=2, gradient_accumulation_steps=2)
    result = train(recipe)
    assert result.pipeline.transformer.config.null_class is None
    plain = train(replace(recipe, lora_rank=0))
    assert not same_weights(result.pipeline, plain.pipeline)
    joined = train(replace(recipe, lora_rank=0, gradient_accumulation_steps=1))
    for name, weight in joined.pipeline.transformer.state_dict().items():
        torch.testing.assert_close(plain.pipeline.transformer.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_a_flow_model_goes_down_the_ladder(tmp_path: Path, make_pipeline: MakePipeline) -> None:
    fields = {**SMALL_MODEL, "parameterization": "flow"}
    make_pipeline(scheduler=FLOW, **fields).save_pretrained(tmp_path / "flow")
    recipe = replace(LADDER, init_from=str(tmp_path / "flow"), objective="flow", num_train_timesteps=1000,
                     guidance_scale=1.5, student_steps=2)  # fmt: skip
    pipeline: Any = train(recipe).pipeline
    pipeline([1])
    assert pipeline.scheduler.timesteps.tolist() == [1000, 500]
    with pytest.raises(ValueError, match="'student' has tables of 2 steps, not of 50"):
        pipeline([1], num_inference_steps=50)
    pipeline = train(replace(recipe, student_steps=1)).pipeline
    pipeline([1])
    assert pipeline.scheduler.timesteps.tolist() == [1000]


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_a_student_samples_unguided_at_its_own_timesteps(tmp_path: Path, guided_base: str) -> None:
    recipe = replace(LADDER, init_from=guided_base, guidance_scale=2.0, student_steps=4)
    train(recipe).pipeline.save_pretrained(tmp_path / "student")
    pipeline: Any = DiTPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipeline.scheduler, TableScheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 16, 16)
    images = pipeline([1, 2], latents=noise, output_type="latent").images
    assert pipeline.guidance_scale == 1
    assert pipeline.scheduler.timesteps.tolist() == [199, 149, 99, 49]
    stock: Any = DDIMScheduler(200, **TOYS_NOISE, prediction_type="v_prediction", clip_sample=False,
                               timestep_spacing="trailing")  # fmt: skip
    other: Any = DiTPipeline(pipeline.transformer, stock)
    expected = other([1, 2], latents=noise, num_inference_steps=4, output_type="latent").images
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'student' has tables of 4 steps, not of 50"):
        pipeline([1], num_inference_steps=50)
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 needs a null class"):
        pipeline([1], guidance_scale=2.0)
    for target in ("official", "dit-hub"):
        source = "student" if target == "official" else "official/model.pt"
        options = ["--num-attention-heads", 2, "--num-classes", 16] if target == "dit-hub" else []
        run = dit_hub("convert", source, target, "--to", target, *options, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    weights = DiTPipeline.from_pretrained(tmp_path / "dit-hub").transformer.state_dict()
    table = "y_embedder.embedding_table.weight"
    assert weights[table].shape[0] == 16
    assert weights[table].equal(pipeline.transformer.state_dict()[table])


def test_a_students_folder_is_sampled_and_exported_in_its_own_steps(tmp_path: Path, guided_base: str) -> None:
    recipe = replace(LADDER, init_from=guided_base, student_steps=2)
    train(recipe).pipeline.save_pretrained(tmp_path / "student")
    run = dit_hub("sample", "student", "--num", 2, "--out", "samples", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "samples" / "sampling.json").read_text())["timesteps"] == [199, 99]
    run = dit_hub("sample", "student", "--num", 2, "--steps", 50, "--out", "others", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "tables of 2 steps, not of 50" in run.stderr
    assert not (tmp_path / "others").exists()
    export_onnx(tmp_path / "student", tmp_path / "onnx", ["sampler"])
    noise = torch.randn(2, 3, 16, 16)
    images = []
    for folder in ("student", "onnx"):
        pipeline: Any = DiTPipeline.from_pretrained(tmp_path / folder)
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline([1, 2], latents=noise, output_type="latent").images)
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-3)


def test_a_student_is_a_teacher_of_fewer_steps(tmp_path: Path, guided_base: str) -> None:
    recipe = replace(LADDER, init_from=guided_base, student_steps=4)
    train(recipe).pipeline.save_pretrained(tmp_path / "student")
    recipe = replace(LADDER, init_from=str(tmp_path / "student"), teacher_steps=4, student_steps=2)
    pipeline: Any = train(recipe).pipeline
    pipeline([1])
    assert pipeline.scheduler.timesteps.tolist() == [199, 99]


@pytest.mark.parametrize("settings", [{"distill": "guidance", "objective": "noise"}, {"student_steps": 4}])
def test_students_have_no_learned_variance(
    tmp_path: Path, make_pipeline: MakePipeline, settings: dict[str, Any]
) -> None:
    scheduler: Any = DDPMScheduler(200, **TOYS_NOISE, variance_type="learned_range")
    base = make_pipeline(scheduler=scheduler, **{**SMALL_MODEL, "learn_sigma": True})
    base.save_pretrained(tmp_path / "base")
    recipe = replace(LADDER, init_from=str(tmp_path / "base"), guidance_scale=2.0, **settings)
    train(recipe).pipeline.save_pretrained(tmp_path / "student")
    pipeline: Any = DiTPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    pipeline([1])
    kind = pipeline.scheduler.config.prediction_type
    pipeline.scheduler = DDPMScheduler(200, **TOYS_NOISE, variance_type="learned_range", prediction_type=kind)
    with pytest.raises(ValueError, match="wants a learned variance, which this model does not predict"):
        pipeline([1])


def test_a_model_predicts_the_same_without_its_variance(make_model: MakeModel) -> None:
    model, noisy, labels = make_model(learn_sigma=True), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    before = model(noisy, torch.tensor([3, 4]), labels).sample
    after = model.remove_learned_variance()(noisy, torch.tensor([3, 4]), labels).sample
    torch.testing.assert_close(after, before[:, :4])
    assert not model.config.learn_sigma
    assert model.remove_learned_variance() is model


def test_the_rows_of_the_classes_stay_when_the_null_class_goes(make_model: MakeModel) -> None:
    model = make_model()
    rows = model.state_dict()["y_embedder.embedding_table.weight"].clone()
    model.remove_null_class()
    assert model.state_dict()["y_embedder.embedding_table.weight"].equal(rows[:-1])
    assert model.remove_null_class() is model
    assert make_model(num_classes=0).remove_null_class().config.null_class is None


def test_a_consistency_model_comes_with_its_scheduler_and_no_other_model_takes_it(
    tmp_path: Path, guided_base: str
) -> None:
    recipe = replace(LADDER, init_from=guided_base, distill="consistency", teacher_steps=50, guidance_scale=2.0)
    train(recipe).pipeline.save_pretrained(tmp_path / "student")
    pipeline: Any = DiTPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipeline.scheduler, LCMScheduler)
    for steps, visited in ((1, [199]), (2, [199, 99])):
        pipeline([1, 2], num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        assert pipeline.scheduler.timesteps.tolist() == visited
    other: Any = DiTPipeline.from_pretrained(guided_base)
    other.scheduler = pipeline.scheduler
    (tmp_path / "student" / "training.json").write_text(json.dumps({"recipe": asdict(recipe)}))
    card = str(render_card(tmp_path / "student"))
    assert 'pipe(["red-circle", "red-square"]).images' in card
    assert "draw in a few steps, from 1 to 8" in card
    for teacher_steps, steps in ((50, 4), (2, 2)):  # no more than the teacher takes
        pipeline = train(replace(recipe, teacher_steps=teacher_steps)).pipeline
        pipeline([1])
        assert len(pipeline.scheduler.timesteps) == steps
    with pytest.raises(ValueError, match="LCMScheduler samples consistency models"):
        other([1])


def test_what_distilling_takes_is_known_before(tmp_path: Path, guided_base: str) -> None:
    settings = [f"init_from={guided_base}", "data=shapes", "images_per_class=2", "batch_size=16", "steps=600",
                "student_steps=1", "teacher_steps=128", "num_train_timesteps=200", *TOYS_NOISE_SETTINGS]  # fmt: skip
    run = dit_hub("train", "distill", *settings, "--dry-run", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert run.returncode == 0, run.stderr
    assert "600 of 16 images" in run.stdout


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_from": ""}, "distill needs a teacher; set init_from"),
        ({"distill": "progresive"}, "distill must be guidance, progressive or consistency, not 'progresive'"),
        ({"distill": "", "guidance_scale": 2.0}, "guidance_scale 2.0 is of a teacher; set distill too"),
        ({"distill": "guidance"}, "1 is no guidance; set another"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be 1 \\(none\\) or above, not nan"),
        ({"objective": "noise"}, "distill=progressive needs a student .* set objective=v"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma weights"),
        ({"student_steps": 5}, "teacher_steps 8 cannot be halved until they are student_steps 5; set teacher_steps=40"),
        ({"student_steps": 8}, "cannot be halved until they are student_steps 8"),
        ({"student_steps": 16, "teacher_steps": 64}, "student_steps 16 do not divide num_train_timesteps 200 evenly, "
         "as samplers do; set student_steps=10"),
        ({"teacher_steps": 256}, "teacher_steps 256 are more than num_train_timesteps 200"),
        ({"distill": "consistency", "teacher_steps": 64}, "teacher_steps 64 do not divide .* set teacher_steps=50"),
        ({"distill": "consistency", "objective": "flow"}, "a flow model takes progressive"),
        ({"student_steps": 0}, "student_steps must be above 0, not 0"),
        ({"guidance_scale": 2.0}, "dit-toy-shapes has no null class, so it cannot be guided at guidance_scale 2; set"),
        ({"data": "digits"}, "The data have other classes than dit-toy-shapes"),
        ({"steps": 2}, "2 steps are too few for the 3 stages from 8 steps to 1"),
        ({"objective": "flow", "num_train_timesteps": 500}, "set num_train_timesteps=1000"),
        ({"objective": "flow", "num_train_timesteps": 1000}, "cannot be trained with the objective 'flow'"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_refused_in_a_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(replace(LADDER, **settings))


def test_the_shipped_recipe_says_what_it_lacks(tmp_path: Path) -> None:
    assert get_recipe("distill").distill == "progressive"
    run = dit_hub("train", "distill", "init_from=", "--out", "student", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "distill needs a teacher" in run.stderr
    assert json.dumps(list(map(str, tmp_path.iterdir()))) == "[]"
