"""What the training loop does within a step, seen from outside."""

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import get_worker_info

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.objectives import min_snr_weight, noise_and_variance, v_prediction
from dit_hub.training import loop, publish
from dit_hub.training.checkpoints import STATE_FILE
from dit_hub.training.data import Batch, CachedLatents, InMemoryImages, Key
from dit_hub.training.latents import cache_latents
from dit_hub.training.loop import Progress, TrainingError, train
from dit_hub.training.recipe import Recipe, get_recipe
from dit_hub.training.shapes import ID2LABEL, shapes

from .command_line import python
from .conftest import SMALL_MODEL

TINY = {**SMALL_MODEL, "num_hidden_layers": 1}
SHORT = Recipe(model=TINY, images_per_class=8, steps=6, batch_size=32)


def losses_of(recipe: Recipe, **options: Any) -> list[float]:
    """The loss of each step."""
    seen: list[Progress] = []
    train(recipe, seen.append, **options)
    return [progress.loss for progress in seen]


# --- Waiting for the device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_every", [0, 3])
def test_a_step_is_looked_at_when_the_next_one_is_under_way(save_every: int, tmp_path: Path) -> None:
    """So that a GPU never waits for what is said; a checkpoint does, since it must hold nothing that is not finite."""
    events: list[str] = []

    class Watched(InMemoryImages):
        def read(self, keys: Sequence[Key]) -> Batch:
            events.append("read")
            return super().read(keys)

    dataset = Watched(*shapes(8), ID2LABEL, "", "")
    recipe = replace(SHORT, save_every=save_every)
    train(recipe, lambda progress: events.append(f"said {progress.step}"), run_folder=tmp_path, dataset=dataset)
    if save_every:
        assert events == ["read", "read", "said 1", "read", "said 2", "said 3"] + [
            "read", "read", "said 4", "read", "said 5", "said 6"]  # fmt: skip
    else:
        assert events == ["read", *(word for step in range(1, 6) for word in ("read", f"said {step}")), "said 6"]


STOPPED_WHILE_IT_PUSHES = f"""
import os, signal, threading
from pathlib import Path
from dit_hub.training import publish
from dit_hub.training.loop import train
from dit_hub.training.recipe import Recipe

pushed, told = [], []

def push(folder, repository, message):
    pushed.append(message)
    threading.Event().wait(60)
    pushed.append("waited for")

def stop(progress):
    if pushed and not told:
        told.append(progress.step)
        os.kill(os.getpid(), signal.SIGTERM)

publish.make_repository, publish.push_folder = str, push
recipe = Recipe(model={TINY}, images_per_class=8, batch_size=32, steps=10_000, save_every=4, push_to_hub="me/model")
print(train(recipe, stop, run_folder=Path("run")).finished, pushed)
"""


def test_a_run_that_is_to_stop_does_not_wait_for_the_hub(tmp_path: Path) -> None:
    run = python("-c", STOPPED_WHILE_IT_PUSHES, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "False ['Step 4']"


class Stuck(InMemoryImages):
    """What is read ahead of the first batch waits for a network."""

    def read(self, keys: Sequence[Key]) -> Batch:
        if (worker := get_worker_info()) and worker.id == 1:
            time.sleep(60)
        return super().read(keys)


def test_a_process_that_reads_and_is_stuck_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # 5 s; how long torch asks it to end

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(SHORT, save_every=1, num_workers=2), stop, dataset=Stuck(*shapes(8), ID2LABEL, "", ""))
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert not left


class Moved(Tensor):
    """A tensor that notes how it is moved."""

    waited_for: list[bool] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            cls.waited_for.append(not (kwargs or {}).get("non_blocking", False))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_data_that_are_not_pinned_are_waited_for() -> None:
    """They are for CUDA alone."""

    class Watched(InMemoryImages):
        def read(self, keys: Sequence[Key]) -> Batch:
            batch = super().read(keys)
            return replace(batch, data=batch.data.as_subclass(Moved))

    Moved.waited_for = []
    train(replace(SHORT, steps=1), dataset=Watched(*shapes(8), ID2LABEL, "", ""))
    assert Moved.waited_for
    assert all(Moved.waited_for)


class Operations(TorchDispatchMode):
    """The names of what torch computes, with the dtype of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.add(f"{func.overloadpacket} {getattr(result, 'dtype', '')}")
        return result


def test_the_tables_of_noise_are_computed_once() -> None:
    scheduler, timestep = DDPMScheduler(1000), torch.tensor([0, 5, 900])
    clean, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def step() -> None:
        noise_and_variance(lambda noisy, timestep: torch.zeros(3, 4, 4, 4), scheduler, clean, noise, timestep)
        v_prediction(lambda noisy, timestep: noise, scheduler, clean, noise, timestep)
        min_snr_weight(scheduler, timestep, 5.0)

    with Operations() as first:
        step()
    with Operations() as second:
        step()
    assert any("float64" in operation for operation in first.seen)
    assert not [operation for operation in second.seen if "float64" in operation or "cumprod" in operation]


def test_tables_that_were_first_used_without_gradients_serve_training() -> None:
    scheduler, timestep = DDPMScheduler(1000), torch.tensor([0, 5, 900])
    clean, noise, weight = torch.randn(3, 2), torch.randn(3, 2), torch.ones((), requires_grad=True)
    with torch.inference_mode():
        v_prediction(lambda noisy, timestep: noisy, scheduler, clean, noise, timestep)
    v_prediction(lambda noisy, timestep: weight * noisy, scheduler, clean, noise, timestep).sum().backward()
    assert weight.grad is not None


def test_a_schedule_that_ends_in_pure_noise_is_not_taken_for_a_linear_one() -> None:
    scheduler = DDPMScheduler(1000, rescale_betas_zero_snr=True)
    seen: list[Tensor] = []

    def denoiser(noisy: Tensor, timestep: Tensor) -> Tensor:
        seen.append(noisy)
        return noisy

    noise = torch.randn(1, 2)
    v_prediction(denoiser, scheduler, torch.full((1, 2), 100.0), noise, torch.tensor([999]))
    torch.testing.assert_close(seen[0], noise)


# --- Losses that are not finite --------------------------------------------------------------------------------------


class Spoilt(InMemoryImages):
    """Data of which some steps alone are finite."""

    def __init__(self, finite: Collection[int]) -> None:
        super().__init__(*shapes(8), ID2LABEL, "", "")
        self.finite, self.step = finite, 0

    def read(self, keys: Sequence[Key]) -> Batch:
        self.step += 1
        batch = super().read(keys)
        return batch if self.step in self.finite else replace(batch, data=batch.data * float("nan"))


def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    recipe = replace(SHORT, steps=12, save_every=1)
    with pytest.raises(TrainingError, match="The loss of step 5 is nan") as error:
        train(recipe, run_folder=tmp_path, dataset=Spoilt(finite=range(1, 5)))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert f"The last good checkpoint is {tmp_path / 'step-00000004'}." in str(error.value)


def test_steps_that_are_skipped_in_half_precision_leave_the_scaler_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate has a scaler on GPUs alone; here it gets torch's for the CPU."""

    def with_scaler(recipe: Recipe, folder: Path | None) -> Accelerator:
        accelerator = make_accelerator(recipe, folder)
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
        return accelerator

    make_accelerator = loop.make_accelerator
    monkeypatch.setattr(loop, "make_accelerator", with_scaler)
    recipe = replace(SHORT, steps=12, mixed_precision="fp16", skip_nan=True)
    result = train(recipe, dataset=Spoilt(finite={*range(1, 13)} - {2, 6, 10}))
    assert result.skipped == 3
    assert all(weight.isfinite().all() for weight in result.pipeline.transformer.parameters())
    finite = losses_of(recipe, dataset=InMemoryImages(*shapes(8), ID2LABEL, "", ""))
    assert finite[-1] < finite[0]


# --- Latents and weights of the loss ---------------------------------------------------------------------------------


class Latents:
    """Latents of one mean and one standard deviation, as `CachedLatents` reads them."""

    id2label: dict[int, str] = {}
    sample_shape, is_latent = (4, 8, 8), True
    description = license = ""
    notes: Sequence[str] = ()

    def __init__(self, mean: float, std: float, scale: float = 1.0, shift: float = 0.0):
        self.mean, self.std, self.scaling_factor, self.shift_factor = mean, std, scale, shift

    def __len__(self) -> int:
        return 64

    def read(self, keys: Sequence[Key]) -> Batch:
        data = torch.full((len(keys), 8, 8, 8), self.mean)
        data[:, 4:] = self.std
        return Batch(data, torch.zeros(len(keys), dtype=torch.long), [position for position, _ in keys], [])


# Its fresh model predicts zero, so that the first loss is the mean square of noise - data.
FLOW = Recipe(model={**TINY, "sample_size": 8, "in_channels": 4, "num_classes": 0}, objective="flow", steps=1,
              batch_size=64, num_train_timesteps=1000)  # fmt: skip


def test_training_sees_latents_with_the_noise_of_the_vae() -> None:
    # The mean of 16,384 squares of variance s^2 spreads by s^2 * sqrt(2 / 16384) = 0.011 s^2.
    for std in (0.0, 1.0, 3.0):
        loss = losses_of(FLOW, dataset=Latents(mean=0.0, std=std))[0]
        assert loss == pytest.approx(1 + std**2, rel=0.06)


def test_training_sees_latents_shifted_and_then_scaled() -> None:
    plain = losses_of(FLOW, dataset=Latents(mean=2.0, std=0.5))[0]
    moved = losses_of(FLOW, dataset=Latents(mean=0.75, std=0.125, scale=4.0, shift=0.25))[0]
    assert moved == pytest.approx(plain, rel=1e-5)


def test_the_cache_knows_the_shift_of_its_vae(tmp_path: Path, make_vae: Callable[..., Any]) -> None:
    images, labels = shapes(1)
    dataset = InMemoryImages(images, labels, ID2LABEL, "", "")
    for name, fields, shift in (("old", {}, 0.0), ("new", {"shift_factor": 0.25}, 0.25)):
        folder = cache_latents(dataset, make_vae(**fields), tmp_path / name)
        assert CachedLatents(folder).shift_factor == shift
        # A folder that was begun by a release that knew no shifts is resumed.
        assert ("shift_factor" in json.loads((folder / "plan.json").read_text())) == bool(shift)


@pytest.mark.parametrize(("objective", "weight"), [("noise", 5 / 49), ("v", 5 / 50)])
def test_min_snr_weighs_the_loss_of_a_run(objective: str, weight: float) -> None:
    """A single noise level, whose signal-to-noise ratio is 0.98 / 0.02 = 49."""
    recipe = replace(SHORT, objective=objective, steps=1, num_train_timesteps=1, beta_start=0.02, beta_end=0.02)
    plain, weighted = (losses_of(replace(recipe, min_snr_gamma=gamma))[0] for gamma in (0.0, 5.0))
    assert weighted == pytest.approx(weight * plain, rel=1e-5)


@pytest.mark.parametrize("name", ["imagenet-256", "imagenet-256-flow", "finetune"])
def test_recipes_of_large_data_read_ahead(name: str) -> None:
    assert get_recipe(name).num_workers > 0


# --- Steps that are left out, and shares that hold nothing -----------------------------------------------------------


def weights_of(recipe: Recipe, **options: Any) -> dict[str, Tensor]:
    return dict(train(recipe, **options).pipeline.transformer.state_dict())


def test_where_all_is_finite_no_step_is_left_out() -> None:
    plain, careful = weights_of(SHORT), weights_of(replace(SHORT, skip_nan=True))
    assert all(careful[name].equal(weight) for name, weight in plain.items())


class Holed(InMemoryImages):
    """Data of which a step can read nothing."""

    def read(self, keys: Sequence[Key]) -> Batch:
        self.reads = getattr(self, "reads", 0) + 1
        batch = super().read(keys)
        return Batch(batch.data[:0], batch.labels[:0], [], []) if self.reads == 2 else batch


@pytest.mark.parametrize("classes", [16, 0])
def test_a_step_without_images_has_no_loss_and_trains_nothing(classes: int) -> None:
    images, labels = shapes(8)
    names = ID2LABEL if classes else {}
    recipe = replace(SHORT, model={**TINY, "num_classes": classes}, steps=2, ema_decay=0.0)
    options = {"dataset": Holed(images, labels if classes else labels * 0, names, "", "")}
    losses = losses_of(recipe, **options)
    assert losses[0] > 0
    assert losses[1] == 0


def test_labels_are_dropped_as_often_as_the_model_says() -> None:
    """The rows move that are seen, once the gates are open: those of the batch's classes, or the null class's alone."""

    def moved(share: float) -> set[int]:
        recipe = replace(SHORT, model={**TINY, "class_dropout_prob": share}, steps=4, batch_size=128, ema_decay=0.0)
        slow, fast = (weights_of(replace(recipe, learning_rate=rate)) for rate in (1e-30, 1e-2))
        name = "y_embedder.embedding_table.weight"
        return set((slow[name] != fast[name]).any(1).nonzero().flatten().tolist())

    assert moved(1 - 1e-6) == {16}
    assert moved(1e-9) == set(range(16))


# --- What is drawn, and the learning rate ----------------------------------------------------------------------------


def test_noise_is_of_the_seed_and_of_the_step() -> None:
    """The model predicts zero, and learns too little to tell: a loss is the mean square of its noise."""
    recipe = replace(FLOW, steps=2, learning_rate=1e-12)
    losses = [losses_of(replace(recipe, seed=seed), dataset=Latents(0.0, 0.0)) for seed in (0, 1, 0)]
    assert losses[0] == losses[2]
    four = [*losses[0], *losses[1]]
    assert all(abs(one - other) > 1e-5 for one, other in itertools.combinations(four, 2))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_falls_as_pytorchs_schedule_does(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def step(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return pytorchs_step(self, *arguments)

    pytorchs_step = AdamW.step
    monkeypatch.setattr(AdamW, "step", step)
    train(replace(SHORT, learning_rate=0.02, lr_scheduler=schedule))
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    expected = CosineAnnealingLR(optimizer, SHORT.steps) if schedule == "cosine" else ConstantLR(optimizer, factor=1.0)
    for rate in rates:
        assert rate == pytest.approx(expected.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        expected.step()
    assert len(rates) == SHORT.steps


def test_a_velocity_leaves_the_channels_of_a_variance_alone(tmp_path: Path) -> None:
    model = DiTTransformer(DiTConfig(**{**TINY, "learn_sigma": True}, parameterization="flow"))
    DiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    recipe = replace(SHORT, model="toy", init_from=str(tmp_path), objective="flow", num_train_timesteps=1000)
    trained = train(recipe).pipeline.transformer.final_layer.linear.bias.reshape(-1, 6)  # (pixels of a patch, channels)
    assert trained[:, :3].abs().min() > 0
    assert trained[:, 3:].abs().max() == 0


# --- What a step comes to --------------------------------------------------------------------------------------------


def test_a_step_in_parts_has_the_mean_of_their_gradients() -> None:
    """With a bound that the gradients of some steps pass, so that their size counts, which Adam does not see."""
    recipe = replace(SHORT, objective="flow", steps=8, learning_rate=5e-3, max_grad_norm=0.3, num_train_timesteps=1000)
    whole, parts = (weights_of(replace(recipe, gradient_accumulation_steps=count)) for count in (1, 4))
    for name, weight in whole.items():  # 1.2e-6 here; sums in place of means: 1.7e-3
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-4)


def test_twenty_steps_in_a_row_that_are_not_finite_are_the_end() -> None:
    recipe = replace(SHORT, steps=40, skip_nan=True)
    result = train(recipe, dataset=Spoilt(finite=[20, 40]))
    assert result.skipped == 38
    assert result.epoch_losses[0] == 0  # of four steps without a loss
    with pytest.raises(TrainingError, match="The loss of step 21 is nan"):
        train(recipe, dataset=Spoilt(finite=[1]))


def test_a_step_whose_gradients_are_not_finite_is_none(tmp_path: Path) -> None:
    """The model predicts zero, of numbers so large that the gradients' squares overflow."""
    model = DiTTransformer(DiTConfig(**TINY))
    for parameter in model.final_layer.adaLN_modulation.parameters():
        torch.nn.init.constant_(parameter, 1e25)
    DiTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="The norm of the gradients of step 1 is inf"):
        train(replace(SHORT, model="toy", init_from=str(tmp_path), num_train_timesteps=1000))


# --- Checkpoints -----------------------------------------------------------------------------------------------------

SAVED = replace(SHORT, save_every=2, ema_decay=0.9)


def train_to_the_fifth_step(run_folder: Path) -> None:
    """Stopped in it, so that the last checkpoint is of the fourth."""

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(SAVED, stop, run_folder=run_folder)


def test_a_run_resumes_from_the_last_checkpoint_which_is_a_pipeline(tmp_path: Path) -> None:
    train_to_the_fifth_step(tmp_path)
    assert DiTPipeline.from_pretrained(tmp_path / "step-00000004").id2label == ID2LABEL
    assert losses_of(SAVED, run_folder=tmp_path) == losses_of(SHORT)[4:]


@pytest.mark.parametrize(
    "change",
    [{"losses": ...}, {"unreadable": None}, {"ema_steps": []}, {"groups": None}],
)
def test_a_checkpoint_that_is_damaged_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    train_to_the_fifth_step(tmp_path)
    file = tmp_path / "step-00000004" / STATE_FILE
    facts = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({name: value for name, value in facts.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"The checkpoint .*step-00000004 is damaged .* remove it"):
        train(SAVED, run_folder=tmp_path)


def test_sigterm_ends_a_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(replace(SHORT, steps=10_000), stop, run_folder=tmp_path).finished
    assert 3 < seen[-1] <= 6  # the fourth was under way; within two steps of that
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{seen[-1]:08d}"]


def test_what_data_leave_out_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InMemoryImages, "notes", ["3 files are not images."])
    train(replace(SHORT, steps=1))
    assert "3 files are not images." in caplog.messages


# The last is pushed with its result.
@pytest.mark.parametrize(("steps", "expected"), [(3, ["Step 2 to me/model"]), (2, [])])
def test_checkpoints_are_pushed_while_a_run_goes_on(
    steps: int, expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pushed: list[str] = []

    def push(folder: str, repository: str, message: str) -> None:
        DiTPipeline.from_pretrained(folder)
        pushed.append(f"{message} to {repository}")

    monkeypatch.setattr(publish, "make_repository", str)
    monkeypatch.setattr(publish, "push_folder", push)
    train(replace(SHORT, steps=steps, save_every=2, push_to_hub="me/model"), run_folder=tmp_path)
    assert pushed == expected


# --- What a run leaves -----------------------------------------------------------------------------------------------


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps() -> None:
    losses: list[float] = []
    result = train(SHORT, lambda progress: losses.append(progress.loss))  # a pass takes four steps
    means = [sum(part) / len(part) for part in (losses[:4], losses[4:])]
    assert result.epoch_losses == pytest.approx(means, rel=1e-6)
    assert 0 < result.seconds < 100


def test_the_first_average_is_the_model_and_the_others_are_beside_it() -> None:
    result = train(replace(SHORT, ema_decay=[0.5, 0.9]))
    assert set(result.averages) == {"ema-9"}
    for decay, weights in ((0.5, result.pipeline.transformer.state_dict()), (0.9, result.averages["ema-9"])):
        alone = weights_of(replace(SHORT, ema_decay=decay))
        assert all(weights[name].equal(weight) for name, weight in alone.items())


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_are_kept_where_they_are_asked_for(merged: bool, tmp_path: Path) -> None:
    DiTPipeline(DiTTransformer(DiTConfig(**TINY)), DDIMScheduler(), id2label=ID2LABEL).save_pretrained(tmp_path)
    recipe = replace(SHORT, init_from=str(tmp_path), lora_rank=2, merge_adapters=merged, num_train_timesteps=1000)
    result = train(recipe)
    assert (result.adapted is None) == merged
    assert not any("lora" in name for name in result.pipeline.transformer.state_dict())
