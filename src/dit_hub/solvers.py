"""Diffusers' schedulers as tables of numbers, for runtimes without Python: one row a step.

A solver that is linear in the sample, the prediction and one earlier estimate needs nine numbers a step:

    D  = clamp(p * x + q * prediction, -clip, clip)      the estimate that the solver remembers
    x' = a * x + b * D + c * D_prev + noise * exp(exponent * variance) * z

with z of unit variance, and `variance` the learned one of the model (in -1..1) if it has one. DDIM, DPM-Solver++ of
first and second order, Euler along the straight path and DDPM are of this form. Coefficients are not copied from
diffusers but measured: each step of the scheduler is run on random inputs and the three unknowns are solved for, so
that a scheduler of any other form is detected.
"""

import copy
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import Tensor

from .schedulers import is_flow_matching, set_timesteps, settings_of, uses_learned_variance, without_foreign_variance

# Columns of a table.
COLUMNS = ("timestep", "p", "q", "clip", "a", "b", "c", "noise", "exponent")

# In place of infinity, which gives NaN where it is multiplied by zero.
_NO_CLIP = 1e30

# The largest residue of the fit, relative to the step's output; above it, a scheduler is of another form.
_MAX_RESIDUE = 1e-5
_EXPERIMENTS = (64, 1, 1, 1)  # a batch of one-pixel images

# Tables by scheduler and steps: measuring 50 steps takes 6 ms, a tenth of sampling 16 toy images.
_measured: dict[tuple, np.ndarray] = {}
_MOST_MEASURED = 100

_OTHER_FORM = (
    "{} cannot be written as a table: a step of it needs more than the sample, the prediction and the estimate before. "
    "DPMSolverMultistepScheduler, DDIMScheduler, DDPMScheduler and FlowMatchEulerDiscreteScheduler can."
)


def solver_table(
    scheduler: Any, num_inference_steps: int, timesteps: Sequence[int] | Literal["official"] | None = None
) -> np.ndarray:
    """The table of a scheduler for a number of steps.

    Args:
        scheduler: DDIM, DPMSolverMultistep (orders 1 and 2), FlowMatchEulerDiscrete, DDPM, or another of the same form.
        num_inference_steps: steps.
        timesteps: as for `DiTPipeline.__call__`.

    Returns:
        (steps, len(COLUMNS)), float32, from noise to data.

    Raises:
        ValueError: the scheduler is of another form.
    """
    if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
        raise ValueError(_OTHER_FORM.format(type(scheduler).__name__))
    visited = timesteps if timesteps is None or isinstance(timesteps, str) else tuple(map(float, timesteps))
    key = (
        type(scheduler),
        json.dumps(dict(scheduler.config), sort_keys=True, default=str),
        num_inference_steps,
        visited,
    )
    if key not in _measured:
        if len(_measured) >= _MOST_MEASURED:
            _measured.clear()
        _measured[key] = _measure(scheduler, num_inference_steps, timesteps)
    return _measured[key].copy()


def _measure(scheduler: Any, num_inference_steps: int, timesteps: Any) -> np.ndarray:
    """The table, by running each step of the scheduler on random numbers."""
    probe = copy.deepcopy(without_foreign_variance(scheduler))
    set_timesteps(probe, num_inference_steps, timesteps, "cpu")
    clip = _take_clip(probe)
    rows, previous, generator = [], None, torch.Generator().manual_seed(0)
    for index, timestep in enumerate(probe.timesteps):
        sample, prediction = torch.randn(2, *_EXPERIMENTS, generator=generator, dtype=torch.float64)
        p, q = _estimate_weights(probe, timestep, index)
        estimate = p * sample + q * prediction
        if isinstance(probe, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler)):
            coefficients = _stochastic_step(probe, timestep, sample, prediction, estimate)
        else:
            coefficients = _deterministic_step(probe, timestep, sample, prediction, estimate, previous)
        rows.append([float(timestep), p, q, clip, *coefficients])
        previous = estimate
    return np.array(rows, dtype=np.float32)


def _take_clip(scheduler: Any) -> float:
    """The bound of the estimate; clipping is then switched off in the scheduler."""
    config = scheduler.config
    if config.get("thresholding"):
        raise ValueError(f"{type(scheduler).__name__} thresholds, which no table can express; set thresholding=False.")
    # A scheduler made from another's config keeps fields that it does not use.
    if not config.get("clip_sample") or "clip_sample_range" not in settings_of(type(scheduler)):
        return _NO_CLIP
    if isinstance(scheduler, diffusers.DDIMScheduler):  # mixes a clipped estimate with an unclipped prediction
        raise ValueError("DDIMScheduler clips, which no table can express; set clip_sample=False.")
    scheduler.register_to_config(clip_sample=False)
    return float(config["clip_sample_range"])


def _estimate_weights(scheduler: Any, timestep: Tensor, index: int) -> tuple[float, float]:
    """p and q: the data that noise-predicting solvers estimate; the velocity itself along the straight path."""
    if is_flow_matching(scheduler):
        return 0.0, 1.0
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM solvers interpolate the noise levels
        signal, noise = map(float, scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index].double()))
    else:
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    kinds = {"epsilon": (1 / signal, -noise / signal), "sample": (0.0, 1.0), "v_prediction": (signal, -noise)}
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise ValueError(f"A table cannot express prediction_type {kind!r}.")
    return kinds[kind]


def _deterministic_step(
    scheduler: Any, timestep: Tensor, sample: Tensor, prediction: Tensor, estimate: Tensor, previous: Tensor | None
) -> list[float]:
    """The columns a, b, c, noise and exponent of a step."""
    result = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    unknowns = [sample, estimate, *([] if previous is None else [previous])]
    solution = _solve(unknowns, result, scheduler)
    return [*solution, *[0.0] * (3 - len(solution)), 0.0, 0.0]


def _stochastic_step(
    scheduler: Any, timestep: Tensor, sample: Tensor, prediction: Tensor, estimate: Tensor
) -> list[float]:
    """The same columns of a DDPM, whose noise is known from its seed; a learned variance is tried at both ends."""

    def run(variance: float) -> list[float]:
        noise = torch.randn(_EXPERIMENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        output = prediction
        if uses_learned_variance(scheduler):
            output = torch.cat([output, torch.full_like(output, variance)], dim=1)
        generator = torch.Generator().manual_seed(1)
        result = scheduler.step(output, timestep, sample, generator=generator, return_dict=False)[0]
        return _solve([sample, estimate, noise], result, scheduler)

    (a, b, least), (_, _, most) = run(-1.0), run(1.0)
    if int(timestep) == 0:  # the last step draws no noise
        return [a, b, 0.0, 0.0, 0.0]
    return [a, b, 0.0, math.sqrt(least * most), math.log(most / least) / 2]


def _solve(unknowns: list[Tensor], result: Tensor, scheduler: Any) -> list[float]:
    """The weights with which the unknowns sum to the result."""
    columns, target = torch.stack([unknown.flatten() for unknown in unknowns], dim=1), result.double().flatten()
    solution = torch.linalg.lstsq(columns, target).solution
    if (columns @ solution - target).norm() > _MAX_RESIDUE * target.norm():
        raise ValueError(_OTHER_FORM.format(type(scheduler).__name__))
    return solution.tolist()
