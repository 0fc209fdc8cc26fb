"""Tables of solvers against the schedulers they are taken from."""

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.solvers import initial_scale, solver_table
from dit_hub.tables import COLUMNS

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

MakeModel = Callable[..., DiTTransformer]

OFFICIAL = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}

DETERMINISTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM, v-prediction": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "DPM-Solver++ 2M, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ 1": ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "zero"}),
    "UniPC, no corrector": ("UniPCMultistepScheduler", {"disable_corrector": list(range(1000))}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Heun, clipped": ("HeunDiscreteScheduler", {"clip_sample": True}),
}
# What else draws noise, each in one place a step.
DRAWING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SDE-DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "Euler, ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "DDIM, eta 0.7": ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
}
STOCHASTIC: dict[str, dict[str, Any]] = {
    "fixed": {"clip_sample": False, "variance_type": "fixed_large"},
    "learned": {"clip_sample": False, "variance_type": "learned_range", "timestep_spacing": "linspace"},
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
}


def run_table(table: np.ndarray, predict: Callable[[Tensor, float], Tensor], latents: Tensor, noises: Any) -> Tensor:
    """The loop that a table describes, written from its definition."""
    sample, history = latents, [torch.zeros_like(latents)] * (table.shape[1] - len(COLUMNS) + 1)
    for row, noise in zip(table, noises, strict=True):
        t, p, q, clip, a, b, c, scale, exponent, *further = map(float, row)
        output = predict(sample, t)
        prediction, variance = output[:, : sample.shape[1]], output[:, sample.shape[1] :]
        estimate = (p * sample + q * prediction).clamp(-clip, clip)
        sample = a * sample + b * estimate
        for weight, earlier in zip([c, *further], history, strict=True):
            sample = sample + weight * earlier
        if scale:
            sample = sample + scale * (exponent * variance).exp() * noise if exponent else sample + scale * noise
        history = [estimate, *history[:-1]]
    return sample


def compare(model: DiTTransformer, scheduler: Any, steps: int, **arguments: Any) -> float:
    """Relative error of the table's loop against the pipeline's, with the same noise."""
    pipe = DiTPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 7])
    fixed: dict[str, Any] = {"latents": latents, "guidance_scale": 1.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    expected = pipe(labels, num_inference_steps=steps, generator=generator, **fixed, **arguments).images

    @torch.no_grad()
    def predict(sample: Tensor, t: float) -> Tensor:
        return model(sample, torch.tensor(t), labels).sample

    table = solver_table(scheduler, steps, **arguments)
    latents = latents * initial_scale(scheduler, steps)
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(latents.shape, generator=generator) for _ in table]
    actual = run_table(table, predict, latents, noises)
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_table_samples_as_its_scheduler(name: str, steps: int, make_model: MakeModel) -> None:
    kind, fields = DETERMINISTIC[name]
    scheduler = getattr(diffusers, kind)(**OFFICIAL, **fields)
    # float32 on both sides; at 20 steps the latents of a random model have grown, and their rounding errors with them.
    # Heun of two steps needs the first sample from the second, which holds 6e-5 of it: rounding errors grow as much.
    coarse = kind == "HeunDiscreteScheduler" and steps == 2
    assert compare(make_model(), scheduler, steps) < (2e-2 if coarse else 2e-4 if "Heun" in kind else 2e-5)


@pytest.mark.parametrize("name", DRAWING)
def test_a_table_draws_the_noise_of_its_scheduler(name: str, make_model: MakeModel) -> None:
    kind, fields, arguments = DRAWING[name]
    scheduler = getattr(diffusers, kind)(**OFFICIAL, **fields)
    assert compare(make_model(), scheduler, 9, **arguments) < 2e-5


@pytest.mark.parametrize("parameterization", ["flow", "sit"])
def test_a_table_follows_the_straight_path(parameterization: str, make_model: MakeModel) -> None:
    model = make_model(parameterization=parameterization)
    for arguments in ({}, {"timesteps": "official"}):
        assert compare(model, diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), 12, **arguments) < 1e-6


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_table_of_ddpm_draws_the_same_noise(name: str, make_model: MakeModel) -> None:
    scheduler = diffusers.DDPMScheduler(**OFFICIAL, **STOCHASTIC[name])
    assert compare(make_model(), scheduler, 15) < 2e-5


def test_official_timesteps_make_a_table(make_model: MakeModel) -> None:
    scheduler = diffusers.DDPMScheduler(**OFFICIAL, **STOCHASTIC["learned"])
    assert compare(make_model(), scheduler, 21, timesteps="official") < 2e-5
    assert not np.array_equal(solver_table(scheduler, 21), solver_table(scheduler, 21, "official"))


def test_every_column_counts(make_model: MakeModel) -> None:
    """Negative control: a change of any column that is not zero changes the samples."""
    scheduler = diffusers.DDPMScheduler(**OFFICIAL, **STOCHASTIC["learned"], rescale_betas_zero_snr=False)
    for kind, table in (
        ("DDPM", solver_table(scheduler, 6)),
        ("2M", solver_table(diffusers.DPMSolverMultistepScheduler(**OFFICIAL), 6)),
        ("clipped", solver_table(diffusers.DDPMScheduler(**OFFICIAL, **STOCHASTIC["clipped"]), 6)),
    ):
        model, latents = make_model(), torch.randn(1, 4, 8, 8)
        noises = torch.randn(6, 1, 4, 8, 8)

        @torch.no_grad()
        def predict(sample: Tensor, t: float, model: DiTTransformer = model) -> Tensor:
            return model(sample, torch.tensor(t), torch.tensor([2])).sample

        base = run_table(table, predict, latents, noises)
        for column, name in enumerate(COLUMNS):
            used = np.abs(table[:, column]).max() > 1e-6 and table[0, column] < 1e29
            changed = table.copy()
            changed[:, column] *= 1.05
            assert torch.equal(run_table(changed, predict, latents, noises), base) == (not used), (kind, name)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("SASolverScheduler", {}, "cannot be written as a table"),
        ("KDPM2AncestralDiscreteScheduler", {}, "cannot be written as a table"),
        ("DDIMScheduler", {"clip_sample": True}, "DDIMScheduler clips, which no table can express"),
        ("DDPMScheduler", {"thresholding": True}, "thresholds, which no table can express"),
    ],
)
def test_schedulers_of_another_form_are_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solver_table(getattr(diffusers, kind)(**OFFICIAL, **fields), 5)


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = diffusers.DDPMScheduler(**OFFICIAL)
    before = dict(scheduler.config)
    solver_table(scheduler, 5)
    assert dict(scheduler.config) == before
    assert len(scheduler.timesteps) == 1000
