"""Diffusers' schedulers as tables of numbers, for runtimes without Python; see `dit_hub.tables`.

Coefficients are not copied from diffusers but measured: each step of the scheduler is run on random inputs and the
unknowns are solved for, so that a scheduler of any other form is detected.
"""

import copy
import inspect
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import diffusers
import numpy as np
import torch
from torch import Tensor

from .checks import shown
from .schedulers import (
    TableScheduler,
    is_flow_matching,
    scaled_input,
    set_timesteps,
    settings_of,
    uses_learned_variance,
    without_foreign_variance,
)
from .table_scheduler import NOISE_SCHEDULE
from .tables import MAX_HISTORY, NO_CLIP, advance, data_weights

# The largest residue of the fit, relative to the step's output; above it, a scheduler is of another form.
_MAX_RESIDUE = 1e-6

# Weights below this share of the step's largest are rounding errors of the fit.
_NOTHING = 1e-6

# And the largest error of a whole run. Heun's own, of two steps in float32, is 1e-4.
_MAX_RUN_ERROR = 3e-4

# Where a step needs a sample before, that is computed from the latest one, whose rounding errors grow by as much.
_MUCH_GROWTH, _MOST_GROWTH = 4, 100

# Estimates that most solvers remember at most; others take a fit with all that came before.
_SHORT = 4

# Tables by scheduler and steps: measuring 50 steps takes 9 ms, a seventh of sampling 16 toy images.
_measured: dict[tuple, np.ndarray] = {}
_MOST_MEASURED = 100

_OTHER_FORM = (
    "{} cannot be written as a table: its steps are not sums of the sample, the predictions so far and fresh noise."
)


def solver_table(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[int] | Literal["official"] | None = None,
    eta: float = 0.0,
) -> np.ndarray:
    """The table of a scheduler for a number of steps, each an evaluation of the model.

    Args:
        scheduler: any of diffusers' that is linear in the sample and the predictions, or a `TableScheduler`.
        num_inference_steps, timesteps, eta: as for `DiTPipeline.__call__`.

    Returns:
        (evaluations, len(COLUMNS) or more), float32, from noise to data; for a sample that starts as the scheduler's
        `scale_model_input` makes it.

    Raises:
        ValueError: the scheduler is of another form.
    """
    if isinstance(scheduler, TableScheduler):
        probe = copy.copy(scheduler)
        set_timesteps(probe, num_inference_steps, timesteps, "cpu")
        return probe.table.copy()
    visited = timesteps if timesteps is None or isinstance(timesteps, str) else tuple(map(float, timesteps))
    key = (
        type(scheduler),
        json.dumps(dict(scheduler.config), sort_keys=True, default=str),
        num_inference_steps,
        visited,
        eta,
    )
    table = _measured.get(key)
    if table is None:
        if len(_measured) >= _MOST_MEASURED:
            _measured.clear()
        table = _measured[key] = _measure(scheduler, num_inference_steps, timesteps, eta)
    return table.copy()


def table_scheduler(scheduler: Any, steps: Sequence[int], name: str = "", eta: float = 0.0) -> TableScheduler:
    """The scheduler as tables, which carry their numbers with them.

    Args:
        scheduler: as for `solver_table`.
        steps: numbers of steps to have tables of. One that evaluates the model twice a step counts as twice as many.
        name: of the solver.
        eta: as for `solver_table`.

    Raises:
        ValueError: the scheduler is of another form, or has no such number of steps.
    """
    if isinstance(steps, int) or not steps:
        raise ValueError(f"steps must be a list of numbers of steps, not {shown(steps)}.")
    tables = [solver_table(scheduler, count, eta=eta) for count in steps]
    noise_levels: dict[str, Any] = {key: scheduler.config[key] for key in NOISE_SCHEDULE if key in scheduler.config}
    if is_flow_matching(scheduler):
        noise_levels = {"prediction_type": "flow_prediction"}
    elif "prediction_type" in scheduler.config:
        noise_levels["prediction_type"] = scheduler.config["prediction_type"]
    return TableScheduler(
        tables={str(len(table)): table.astype(float).tolist() for table in tables},
        name=name or type(scheduler).__name__,
        init_noise_sigma=initial_scale(scheduler, max(steps)),
        **noise_levels,
    )


def initial_scale(scheduler: Any, num_inference_steps: int, timesteps: Any = None) -> float:
    """The share of noise of unit variance that a table's first sample is; 1 for most schedulers."""
    probe = copy.deepcopy(scheduler)
    set_timesteps(probe, num_inference_steps, timesteps, "cpu")
    first = torch.full((1,), float(getattr(probe, "init_noise_sigma", 1.0)), dtype=torch.float64)
    return scaled_input(probe, first, probe.timesteps[0]).item()


def starts_from_unit_noise(scheduler: Any, num_inference_steps: int) -> bool:
    """Whether noise of unit variance is where a run starts, so that a table alone says all of it."""
    return abs(initial_scale(scheduler, num_inference_steps) - 1) < 1e-6


def _measure(scheduler: Any, num_inference_steps: int, timesteps: Any, eta: float) -> np.ndarray:
    """The table of estimates of the data, or of the noise where that is the more exact or the smaller."""
    found: list[tuple[bool, int, np.ndarray]] = []
    scheduler = without_foreign_variance(scheduler)
    clips = _clip_of(scheduler) < NO_CLIP  # the data, not the noise
    for of_noise in (False,) if clips or is_flow_matching(scheduler) else (False, True):
        probe = copy.deepcopy(scheduler)
        set_timesteps(probe, num_inference_steps, timesteps, "cpu")
        try:
            table, growth = _Probe(probe, of_noise, eta).table()
        except _OtherFormError:
            continue
        if not growth:  # no sample but the latest one is needed
            return table
        if _follows(table, copy.deepcopy(scheduler), num_inference_steps, timesteps):
            found.append((growth > _MUCH_GROWTH, table.shape[1], table))
    if not found:
        raise ValueError(_OTHER_FORM.format(type(scheduler).__name__))
    return min(found, key=lambda entry: entry[:2])[2]


def _follows(table: np.ndarray, scheduler: Any, num_inference_steps: int, timesteps: Any) -> bool:
    """Whether a table draws what the scheduler does, for a made-up model."""
    set_timesteps(scheduler, num_inference_steps, timesteps, "cpu")
    sample: Tensor = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, actual = sample * getattr(scheduler, "init_noise_sigma", 1.0), None
    history: list[Tensor] = []
    for row, timestep in zip(table.tolist(), scheduler.timesteps, strict=True):
        seen = scaled_input(scheduler, expected, timestep)
        actual = seen if actual is None else actual
        expected = scheduler.step(2 * seen.tanh(), timestep, expected, return_dict=False)[0]
        actual = advance(row, actual, 2 * actual.tanh(), history)
    assert actual is not None
    return bool((actual - expected).norm() <= _MAX_RUN_ERROR * expected.norm())


class _OtherFormError(Exception):
    """A step is not the sum that was tried."""


class _Step(NamedTuple):
    """A step as measured: weights of the samples and of the estimates so far, the latest last, and of the noise."""

    samples: np.ndarray
    estimates: np.ndarray
    noise: float
    exponent: float


class _Probe:
    """Measures the table of a scheduler whose timesteps are set.

    Args:
        scheduler: changed by the measuring.
        of_noise: the estimates are of the noise rather than of the data, as some solvers remember.
        eta: for DDIM.
    """

    def __init__(self, scheduler: Any, of_noise: bool, eta: float):
        self.scheduler, self.of_noise = scheduler, of_noise
        self.clip = _clip_of(scheduler)
        if self.clip < NO_CLIP:
            scheduler.register_to_config(clip_sample=False)
        accepted = inspect.signature(scheduler.step).parameters
        self.arguments = {"eta": eta} if eta and "eta" in accepted else {}
        self.draws = "generator" in accepted
        count = len(scheduler.timesteps)
        self.shape = (2 * count + 64, 1, 1, 1)  # a batch of one-pixel images, more than there are unknowns
        self.generator = torch.Generator().manual_seed(0)
        self.samples: list[Tensor] = []
        self.estimates: list[Tensor] = []

    def table(self) -> tuple[np.ndarray, float]:
        """The table, and by how much rounding errors of the latest sample grow where a sample before is needed."""
        timesteps, rows, steps = self.scheduler.timesteps, [], []
        for index, timestep in enumerate(timesteps):
            p, q = self._estimate_weights(timestep, index)
            # The scheduler's own sample, of which the model sees `scale` times as much.
            sample, prediction = torch.randn(2, *self.shape, generator=self.generator, dtype=torch.float64)
            scale = self._input_scale(sample, timestep)
            self.samples.append(scale * sample)
            self.estimates.append(p * scale * sample + q * prediction)
            steps.append(self._fit(timestep, sample, prediction))
            rows.append([float(timestep), p, q, self.clip])
        return self._assemble(rows, steps)

    def _input_scale(self, sample: Tensor, timestep: Tensor) -> float:
        scaled = scaled_input(self.scheduler, sample, timestep)
        return ((scaled * sample).sum() / sample.square().sum()).item()

    def _next_scale(self) -> float:
        """The scale of the sample after a step, which diffusers' schedulers count for themselves."""
        index = getattr(self.scheduler, "step_index", None)
        if index is None or index >= len(self.scheduler.timesteps):
            return 1.0
        probe = copy.copy(self.scheduler)
        return scaled_input(probe, torch.ones(1, dtype=torch.float64), probe.timesteps[index]).item()

    def _fit(self, timestep: Tensor, sample: Tensor, prediction: Tensor) -> _Step:
        if isinstance(self.scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler)):
            return self._fit_ddpm(timestep, sample, prediction)
        result = self._run(timestep, sample, prediction) * self._next_scale()
        # The sample before matters to solvers of two evaluations a step, and the first to correctors.
        for samples, estimates in ((1, _SHORT), (2, _SHORT), (len(self.samples), len(self.samples))):
            fixed = [*self.samples[-samples:], *self.estimates[-estimates:]]
            for noise in self._noises():
                try:
                    weights = _solve([*fixed, *noise], result)
                except _OtherFormError:
                    continue
                taken, rest = np.split(weights, [len(self.samples[-samples:])])
                kept, scale = np.split(rest, [len(self.estimates[-estimates:])])
                return _Step(taken, kept, float(scale.sum()), 0.0)
        raise _OtherFormError

    def _run(self, timestep: Tensor, sample: Tensor, prediction: Tensor) -> Tensor:
        arguments: dict[str, Any] = dict(self.arguments)
        if self.draws:
            arguments["generator"] = self._seeded()
        return self.scheduler.step(prediction, timestep, sample, return_dict=False, **arguments)[0].double()

    def _seeded(self) -> torch.Generator:
        """Of the noise of this step, unlike that of others."""
        return torch.Generator().manual_seed(len(self.samples))

    def _noises(self) -> list[list[Tensor]]:
        """Noise that the step may have drawn: none, or as either type of float."""
        if not self.draws:
            return [[]]
        types = (torch.float32, torch.float64)
        drawn = [torch.randn(self.shape, dtype=kind, generator=self._seeded()) for kind in types]
        return [[], *([noise.double()] for noise in drawn)]

    def _fit_ddpm(self, timestep: Tensor, sample: Tensor, prediction: Tensor) -> _Step:
        """The step of a DDPM; a learned variance is tried at both ends."""
        noise = torch.randn(self.shape, dtype=torch.float64, generator=self._seeded())

        def run(variance: float) -> np.ndarray:
            output = prediction
            if uses_learned_variance(self.scheduler):
                output = torch.cat([output, torch.full_like(output, variance)], dim=1)
            return _solve([self.samples[-1], self.estimates[-1], noise], self._run(timestep, sample, output))

        (a, b, least), (_, _, most) = run(-1.0), run(1.0)
        if int(timestep) == 0:  # the last step draws no noise
            return _Step(np.array([a]), np.array([b]), 0.0, 0.0)
        exponent = math.log(most / least) / 2 if uses_learned_variance(self.scheduler) else 0.0
        return _Step(np.array([a]), np.array([b]), math.sqrt(least * most), exponent)

    def _estimate_weights(self, timestep: Tensor, index: int) -> tuple[float, float]:
        """p and q: of the data or the noise; the velocity itself along the straight path."""
        scheduler = self.scheduler
        if is_flow_matching(scheduler):
            return 0.0, 1.0
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM solvers interpolate the noise levels
            alpha, sigma = map(float, scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index].double()))
        elif hasattr(scheduler, "sigmas"):  # of a sample whose data has weight one
            ratio = float(scheduler.sigmas[index])
            alpha, sigma = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
        else:
            alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
            alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        p, q = data_weights(alpha, sigma, scheduler.config.get("prediction_type", "epsilon"))
        return ((1 - alpha * p) / sigma, -alpha * q / sigma) if self.of_noise else (p, q)

    def _assemble(self, rows: list[list[float]], steps: list[_Step]) -> tuple[np.ndarray, float]:
        """The table, with earlier samples expressed by the latest one and the estimates."""
        count = len(steps)
        # Sample i, as run from the start: its weights of the first sample and of the estimates before it.
        closed, growth = [np.eye(1, count + 1)[0]], 0.0
        weights = np.zeros((count, count + 1))  # by step: of the sample, and of the estimates, the latest first
        for index, step in enumerate(steps):
            samples = dict(zip(range(index, -1, -1), step.samples[::-1], strict=False))
            direct = np.zeros(count + 1)
            direct[1 + index + 1 - len(step.estimates) : 2 + index] = step.estimates
            earlier = [k for k, weight in samples.items() if k != index and abs(weight) > _NOTHING]
            if earlier and any(before.noise for before in steps[:index]):
                raise _OtherFormError  # a sample before is then not known from the estimates
            result = direct + sum(weight * closed[k] for k, weight in samples.items())
            a = samples[index]
            if earlier:
                a = result[0] / closed[index][0]
                growth = max(growth, abs(a)) if math.isfinite(a) else math.inf
                direct = result - a * closed[index]
                direct[0] = 0.0
            closed.append(result)
            direct[np.abs(direct) < _NOTHING * np.abs(direct).max()] = 0.0
            weights[index, 0] = a
            weights[index, 1 : index + 2] = direct[index + 1 : 0 : -1]
        remembered = max(2, np.flatnonzero(weights[:, 1:].any(axis=0)).max() + 1)
        if remembered > MAX_HISTORY or growth > _MOST_GROWTH:
            raise _OtherFormError
        a, b = weights[:, 0], weights[:, 1 : 1 + remembered]
        if count == 1:
            b = np.pad(b, ((0, 0), (0, 1)))
        noise = np.array([[step.noise, step.exponent] for step in steps])
        table = np.column_stack([np.array(rows), a, b[:, :2], noise, b[:, 2:]])
        return table.astype(np.float32), growth


def _clip_of(scheduler: Any) -> float:
    """The bound of the estimate of the data.

    Raises:
        ValueError: clipping that no table can express.
    """
    config = scheduler.config
    if config.get("thresholding"):
        raise ValueError(f"{type(scheduler).__name__} thresholds, which no table can express; set thresholding=False.")
    # A scheduler made from another's config keeps fields that it does not use.
    if not config.get("clip_sample") or "clip_sample_range" not in settings_of(type(scheduler)):
        return NO_CLIP
    if isinstance(scheduler, diffusers.DDIMScheduler):  # mixes a clipped estimate with an unclipped prediction
        raise ValueError("DDIMScheduler clips, which no table can express; set clip_sample=False.")
    return float(config["clip_sample_range"])


def _solve(unknowns: list[Tensor], result: Tensor) -> np.ndarray:
    """The weights with which the unknowns sum to the result."""
    columns, target = torch.stack([unknown.flatten() for unknown in unknowns], dim=1), result.flatten()
    if not target.isfinite().all():
        raise _OtherFormError
    solution = torch.linalg.lstsq(columns, target).solution
    if not (columns @ solution - target).norm() <= _MAX_RESIDUE * target.norm():
        raise _OtherFormError
    return solution.numpy()
