"""Schedulers that read a table: published ones, those of folders and files, and what they refuse."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dit_hub import DiTPipeline, TableScheduler
from dit_hub.solvers import solver_table, table_scheduler
from dit_hub.tables import advance, published

from .command_line import dit_hub
from .conftest import MakePipeline

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

OFFICIAL: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2}


# --- Published tables, on data whose noise is known exactly ----------------------------------------------------------


class Mixture:
    """Gaussians of deviation 0.12 about 12 means in 4 dimensions, and starts of trajectories, float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.starts = torch.randn(400, 4, generator=generator, dtype=torch.float64)

    def noise(self, sample: Tensor, alpha: float, sigma: float) -> Tensor:
        """The best prediction of the noise in (N, 4) samples."""
        variance = alpha**2 * 0.12**2 + sigma**2
        away = sample[:, None] - alpha * self.means
        share = torch.softmax(-away.square().sum(2) / (2 * variance), dim=1)
        return sigma / variance * (share[:, :, None] * away).sum(1)


def vp(timestep: float) -> tuple[float, float]:
    """Alpha and sigma of betas from 0.1 to 20 in continuous time (Song et al. 2021)."""
    time = max(timestep / 1000, 1e-3)
    alpha_bar = np.exp(-(9.95 * time**2 + 0.1 * time))
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def straight(timestep: float) -> tuple[float, float]:
    return 1 - timestep / 1000, timestep / 1000


def ddim(mixture: Mixture, levels: Callable[[float], tuple[float, float]], timesteps: np.ndarray) -> Tensor:
    """The equation of DDIM, written out."""
    sample = mixture.starts
    for now, then in itertools.pairwise(timesteps):
        (alpha, sigma), (next_alpha, next_sigma) = levels(now), levels(then)
        noise = mixture.noise(sample, alpha, sigma)
        sample = next_alpha * (sample - sigma * noise) / alpha + next_sigma * noise
    return sample


def run_table(mixture: Mixture, levels: Callable[[float], tuple[float, float]], table: np.ndarray) -> Tensor:
    sample, history = mixture.starts[..., None, None], []
    for row in table.astype(float).tolist():
        alpha, sigma = levels(row[0])
        flat = sample[:, :, 0, 0]
        prediction = mixture.noise(flat, alpha, sigma)
        if levels is straight:  # velocities are noise minus data
            data = (flat - sigma * prediction) / alpha if alpha else torch.zeros_like(flat) + mixture.means.mean(0)
            prediction = prediction - data
        sample = advance(row, sample, prediction[..., None, None], history)
    return sample[:, :, 0, 0]


def error(sample: Tensor, exact: Tensor) -> float:
    return (sample - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("steps", [5, 6, 7, 8, 9, 10])
def test_the_searched_solver_is_its_formula(steps: int) -> None:
    """x' = (sigma' / sigma) x + sigma' (lambda' - lambda) D, D the weighted sum of all estimates so far."""
    mixture, solver = Mixture(), published()["searched"].solvers[str(steps)]
    time, sample, estimates = 0.999, mixture.starts, []
    for step, (delta, row) in enumerate(zip(solver["timedeltas"], solver["coefficients"], strict=True)):
        (alpha, sigma), (next_alpha, next_sigma) = vp(1000 * time), vp(1000 * (time - delta))
        estimates.append((sample - sigma * mixture.noise(sample, alpha, sigma)) / alpha)
        mixed = sum(row[j] * estimates[j] for j in range(step)) + (1 - sum(row[:step])) * estimates[-1]
        sample = next_sigma / sigma * sample + next_sigma * (next_alpha / next_sigma - alpha / sigma) * mixed
        time -= delta
    table = TableScheduler.from_name("searched", steps).table
    # The table is in float32, and its first estimate 150 times what the others are.
    assert error(run_table(mixture, vp, table), sample) < 2e-5


@pytest.mark.parametrize("steps", [5, 6, 7, 8, 9, 10])
def test_the_searched_solver_is_nearer_than_ddim(steps: int) -> None:
    mixture = Mixture()
    exact = ddim(mixture, vp, np.linspace(999, 1, 2001))
    searched = error(run_table(mixture, vp, TableScheduler.from_name("searched", steps).table), exact)
    plain = error(ddim(mixture, vp, np.linspace(999, 1, steps + 1)), exact)
    assert searched < 0.85 * plain


@pytest.mark.parametrize("steps", [6, 8, 10, 15])
def test_the_searched_solver_of_the_straight_path_is_nearer_than_euler(steps: int) -> None:
    mixture = Mixture()
    exact = ddim(mixture, straight, np.linspace(999, 0, 2001))
    searched = error(run_table(mixture, straight, TableScheduler.from_name("searched-flow", steps).table), exact)
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    plain = error(run_table(mixture, straight, solver_table(euler, steps, "official")), exact)
    assert searched < 0.85 * plain


def test_published_solvers_say_where_they_are_from() -> None:
    solver = published()["searched"]
    assert ("2505.21114" in solver.source, solver.license, solver.fid["10"]) == (True, "MIT", 2.33)
    assert "2505.21114" in TableScheduler.from_name("searched").config.source


# --- In pipelines ----------------------------------------------------------------------------------------------------


def latents(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], generator=generator, output_type="latent", **options).images


def test_a_folder_carries_its_tables(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(scheduler=TableScheduler.from_name("searched"))
    pipeline.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["scheduler"] == [
        "dit_hub",
        "TableScheduler",
    ]
    again = DiTPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(latents(again), latents(pipeline, num_inference_steps=10))  # the most that it has
    torch.testing.assert_close(latents(again, num_inference_steps=6), latents(pipeline, num_inference_steps=6))
    with pytest.raises(ValueError, match="has tables of 5, 6, 7, 8, 9 and 10 steps, not of 50"):
        latents(again, num_inference_steps=50)
    back = diffusers.DDIMScheduler.from_config(again.scheduler.config, clip_sample=False)
    again.scheduler = back  # a table's noise levels are enough for others
    latents(again, num_inference_steps=50)


def test_a_table_of_ddpm_takes_the_learned_variance_and_draws_its_noise(make_pipeline: MakePipeline) -> None:
    ddpm = diffusers.DDPMScheduler(**OFFICIAL, variance_type="learned_range", clip_sample=False)
    pipeline = make_pipeline(scheduler=ddpm)
    expected = latents(pipeline, num_inference_steps=9)
    pipeline.scheduler = table_scheduler(ddpm, [9])
    torch.testing.assert_close(latents(pipeline, num_inference_steps=9), expected, rtol=1e-4, atol=1e-4)


def test_heun_starts_where_diffusers_has_it_start(make_pipeline: MakePipeline) -> None:
    heun = diffusers.HeunDiscreteScheduler(**{**OFFICIAL, "num_train_timesteps": 200})
    pipeline = make_pipeline(scheduler=heun)
    expected = latents(pipeline, num_inference_steps=6)
    pipeline.scheduler = table_scheduler(heun, [6])
    assert pipeline.scheduler.init_noise_sigma < 0.95
    torch.testing.assert_close(latents(pipeline, num_inference_steps=11), expected, rtol=1e-4, atol=1e-4)


def test_diffusers_own_pipeline_steps_with_it() -> None:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=1000, patch_size=2,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, latent_channels=4)
    unipc = diffusers.UniPCMultistepScheduler(**OFFICIAL)

    def images(scheduler: Any) -> np.ndarray:
        pipe = diffusers.DiTPipeline(transformer, vae, scheduler)
        pipe.set_progress_bar_config(disable=True)
        output: Any = pipe([1], generator=torch.Generator().manual_seed(0), num_inference_steps=7, output_type="np")
        return output.images

    expected, drawn = images(unipc), images(table_scheduler(unipc, [7]))
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert np.abs(images(TableScheduler.from_name("searched", 7)) - expected).max() > 1e-3


def test_the_searched_tables_and_others_of_the_same_levels_pass(make_pipeline: MakePipeline) -> None:
    """Positive controls of the check, many steps and few."""
    linspace = {**OFFICIAL, "timestep_spacing": "linspace"}
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler):
        assert table_scheduler(kind(**linspace), [2, 5, 250]).steps == [2, 5, 250]
    assert table_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), [3, 500]).steps == [3, 500]
    ddpm = table_scheduler(diffusers.DDPMScheduler(**linspace, clip_sample=False), [250])
    assert (ddpm.steps, ddpm.uses_variance) == ([250], False)
    tables = TableScheduler.from_name("searched", 6).config.tables
    assert TableScheduler(tables={6: tables["6"]}).steps == [6]  # numbers of steps as numbers


def test_running_again_starts_anew(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(scheduler=TableScheduler.from_name("searched"))
    first = latents(pipeline)
    pipeline._interrupt = True
    assert torch.equal(latents(pipeline), first)
    scheduler = pipeline.scheduler
    with pytest.raises(ValueError, match="'searched' has 10 steps, and all were taken"):
        scheduler.step(first, 0, first)


# --- What is refused -------------------------------------------------------------------------------------------------


def searched(**changes: Any) -> dict[str, Any]:
    config = {**TableScheduler.from_name("searched", 6).config, **changes}
    del config["_use_default_values"]  # what diffusers takes from the class instead
    return config


def damaged(row: int, column: int, value: Any) -> dict[str, Any]:
    rows = [list(each) for each in searched()["tables"]["6"]]
    rows[row][column] = value
    return searched(tables={"6": rows})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another schedule": (searched(num_train_timesteps=200), "step 3 of 6 leaves .* other noise levels"),
    "another prediction": (searched(prediction_type="v_prediction"), "another kind of prediction"),
    "the straight path": (searched(prediction_type="flow_prediction"), "another kind of prediction"),
    "inconsistent": (damaged(3, 5, 0.9), "step 4 of 6 leaves .* do not sum to what a consistent solver needs"),
    "not a number": (damaged(2, 6, float("nan")), "'searched' of 6 steps holds nan in row 3, column 7"),
    "another length": (searched(tables={"7": searched()["tables"]["6"]}), "of 7 steps has 6 rows"),
    "ragged": (searched(tables={"2": [[1.0] * 9, [1.0] * 8]}), "must be rows of as many numbers, 9 to 72"),
    "words": (searched(tables={"1": [["a"] * 9]}), "must be rows of as many numbers"),
    "upside down": (damaged(5, 4, -0.9), "do not sum to what a consistent solver needs"),
    "many lazy steps": (
        {
            "prediction_type": "flow_prediction",
            "tables": {"100": [[1000 - 10 * i, 0, 1, 1e30, 1, 0, 0, 0, 0] for i in range(100)]},
        },
        "step 11 of 100 leaves 0.1 of the data",
    ),
    "clipped to nothing": (damaged(1, 3, 0.0), "clip must be from 1e-06 to inf in every row"),
    "exploding noise": (damaged(1, 8, 1e6), "exponent must be from -100 to 100"),
    "noise at the end": (damaged(5, 7, 0.5), "step 6 of 6 leaves .* of the noise"),
    "a loud start": (searched(init_noise_sigma=14.0), "init_noise_sigma must be at most 1.01"),
    "no prediction": (searched(prediction_type="velocity"), "prediction_type must be one of epsilon, v_prediction"),
    "no schedule": (searched(beta_schedule="foo"), "These settings are no noise schedule"),
    "a huge number": (damaged(1, 1, 10**400), "must be rows of as many numbers"),
    "none": (searched(tables={}), "tables must be rows by number of steps"),
    "a list": (searched(tables=[1]), "tables must be rows by number of steps"),
    "no steps": (searched(tables={"many": searched()["tables"]["6"]}), "of many steps has 6 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_does_not_fit_is_one_sentence(name: str) -> None:
    fields, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        TableScheduler.from_config(fields)


@pytest.mark.parametrize("name", ["inconsistent", "not a number"])
def test_the_command_line_says_it_too(name: str, tmp_path: Path) -> None:
    fields, words = REFUSED[name]
    (tmp_path / "solver.json").write_text(json.dumps(fields))
    run = dit_hub("generate", "dit-toy-shapes", "--scheduler", "solver.json", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n"), list(tmp_path.iterdir())) == (2, 1, [tmp_path / "solver.json"])
    assert words.split(" .* ")[0] in run.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "solver.json cannot be read: No such file"),
        ("GIF89a", "solver.json is not valid JSON"),
        ("[]", "solver.json is no solver"),
        ('{"_class_name": "DDIMScheduler"}', "solver.json is no solver"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "solver.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        TableScheduler.from_file(tmp_path / "solver.json")


def test_a_solver_of_other_noise_levels_than_the_models_is_refused(tmp_path: Path) -> None:
    run = dit_hub("generate", "dit-toy-shapes", "--scheduler", "searched", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "This TableScheduler has other noise levels than this model was trained for" in run.stderr
    assert "`dit-hub solver fit`" in run.stderr
    run = dit_hub("generate", "dit-toy-shapes", "--scheduler", "searched-flow", cwd=tmp_path)
    assert "TableScheduler steps with a velocity, but this model was trained as a diffusion model" in run.stderr
    assert not list(tmp_path.iterdir())
