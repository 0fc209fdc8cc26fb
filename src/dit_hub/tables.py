"""Solvers as tables of numbers, for every runtime: one row a step.

A linear multistep solver needs these numbers a step:

    D  = clamp(p * x + q * prediction, -clip, clip)      the estimate that the solver remembers
    x' = a * x + b * D + c * D_1 + c2 * D_2 + … + noise * exp(exponent * variance) * z

where D_k is the estimate of k steps before, z has unit variance, and `variance` is the learned one of the model (in
-1..1) if it has one. All that differs between solvers is in the numbers: DDIM, DPM-Solver++ of any order, UniPC with
its corrector, DEIS, PNDM, Adams methods, Euler, Heun (whose two evaluations are two rows), searched and fitted ones.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import shown

# Columns of a table; those of further weights, c2, c3, …, follow. A table without them remembers one estimate.
COLUMNS = ("timestep", "p", "q", "clip", "a", "b", "c", "noise", "exponent")
_P, _Q, _CLIP, _A, _B, _C, _NOISE, _EXPONENT = range(1, len(COLUMNS))

# In place of infinity, which gives NaN where it is multiplied by zero.
NO_CLIP = 1e30

# The most estimates that a table may remember; TensorRT engines are built for as many.
MAX_HISTORY = 64

# How far a step of exact predictions may leave the noise levels. The published tables count them by a formula, which
# differs from DDPM's products by 0.004.
_MAX_DRIFT, _MAX_WHOLE_DRIFT = 0.02, 0.1  # in a step, and of all together

# How far the noise of a step that draws some may exceed the level, and by no more than it draws.
_MAX_EXCESS = 0.5

# Kinds of predictions that a table may be for, by diffusers' names.
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")

Levels = Callable[[Tensor], tuple[Tensor, Tensor]]


class Published(NamedTuple):
    """A published solver: who searched it on what, and its tables by number of steps."""

    source: str
    license: str
    model: str
    guidance_scale: float | None
    fid: dict[str, float]
    path: str  # "diffusion" or "flow"
    solvers: dict[str, Any]


class DiscreteLevels:
    """The signal's and the noise's share at timesteps of a noise schedule, also between the whole ones.

    Args:
        alphas_cumprod: (T,) of a scheduler.
    """

    def __init__(self, alphas_cumprod: Tensor):
        self._logarithms = alphas_cumprod.double().cpu().log()

    def __call__(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) -> (S,) alpha and (S,) sigma, float64, differentiable; the logarithm of alpha is interpolated."""
        logarithms = self._logarithms.to(timesteps.device)
        below = timesteps.detach().floor().long().clamp(0, max(len(logarithms) - 2, 0))
        above = (below + 1).clamp(max=len(logarithms) - 1)
        share = timesteps.double() - below
        alpha_bar = (logarithms[below] * (1 - share) + logarithms[above] * share).exp()
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def straight_levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the straight path, whose timesteps are thousandths of the noise's share."""
    sigma = timesteps.double() / 1000
    return 1 - sigma, sigma


def vp_levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the continuous variance-preserving schedule, betas from 0.1 to 20 (Song et al. 2021, Appendix C).

    Its timesteps are thousandths of time, which ends at 1e-3, as in the code of the published tables.
    """
    time = (timesteps.double() / 1000).clamp(1e-3, 1)
    alpha_bar = (-(0.5 * 19.9 * time**2 + 0.1 * time)).exp()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def multistep_table(
    timesteps: Tensor,
    weights: Tensor,
    levels: tuple[Tensor, Tensor],
    prediction_type: str = "epsilon",
) -> Tensor:
    """The table of a linear multistep solver, differentiable in all of its arguments.

    A step of a diffusion model solves its equation exactly for constant data, x' = (sigma' / sigma) x + (alpha' -
    alpha sigma' / sigma) D, and one of a flow model for a constant velocity, x' = x + (sigma' - sigma) D, where D is
    the weighted sum of all estimates so far.

    Args:
        timesteps: (S,) from noise to data.
        weights: (S, S); row i holds those of the estimates 0 to i, which sum to one.
        levels: (S + 1,) alpha and sigma, of the timesteps and of the end.
        prediction_type: of the model: "epsilon", "v_prediction", "sample" or "flow_prediction".

    Returns:
        (S, 8 + max(S - 1, 1)), float64.
    """
    alpha, sigma = levels
    if prediction_type == "flow_prediction":
        a, reach = torch.ones_like(alpha[1:]), sigma[1:] - sigma[:-1]
        p, q = torch.zeros_like(a), torch.ones_like(a)
    else:
        a = sigma[1:] / sigma[:-1]
        reach = alpha[1:] - a * alpha[:-1]
        p, q = data_weights(alpha[:-1], sigma[:-1], prediction_type)
    zero = torch.zeros_like(a)
    steps = torch.arange(len(timesteps), device=weights.device)
    before = steps[:, None] - torch.arange(max(len(steps), 2), device=weights.device)  # (S, S): the latest first
    scaled = weights.double().gather(1, before.clamp(min=0)).where(before >= 0, 0) * reach[:, None]
    columns = [timesteps.double(), p, q, zero + NO_CLIP, a, scaled[:, 0], scaled[:, 1], zero, zero]
    return torch.cat([torch.stack(columns, dim=1), scaled[:, 2:]], dim=1) + 0.0  # no negative zeros


def data_weights(alpha: Any, sigma: Any, prediction_type: str) -> tuple[Any, Any]:
    """p and q of the estimate of the data, at levels alpha and sigma.

    Raises:
        ValueError: another kind of prediction.
    """
    kinds = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (0 * alpha, 0 * alpha + 1),
        "v_prediction": (alpha, -sigma),
    }
    if prediction_type not in kinds:
        raise ValueError(f"A table cannot express prediction_type {prediction_type!r}.")
    return kinds[prediction_type]


def advance(
    row: Sequence[Any] | Tensor, sample: Tensor, prediction: Tensor, history: list[Tensor], noise: Any = None
) -> Tensor:
    """A step: x' of a row, (N, C, H, W); the estimate goes to the front of `history`.

    Args:
        row: of a table: numbers; a tensor on the device of the sample, where gradients are wanted; or a list of both,
            where tensors (N, 1, 1, 1) hold a number for each sample.
        sample: (N, C, H, W).
        prediction: (N, C, H, W), or (N, 2C, H, W) with a learned variance.
        history: earlier estimates, the latest first; changed in place.
        noise: () -> (N, C, H, W) of unit variance, called if the row needs it.
    """
    channels = sample.shape[1]
    clip, scale = row[_CLIP], row[_NOISE]
    weights = [row[_C], *row[len(COLUMNS) :]]
    estimate = row[_P] * sample + row[_Q] * prediction[:, :channels]
    if isinstance(clip, Tensor) or clip < NO_CLIP:
        estimate = estimate.clamp(-clip, clip)
    result = row[_A] * sample + row[_B] * estimate
    for weight, earlier in zip(weights, history, strict=False):
        result = result + weight * earlier
    if noise is not None and (isinstance(scale, Tensor) or scale):
        if prediction.shape[1] > channels:
            scale = scale * (row[_EXPONENT] * prediction[:, channels:]).exp()
        result = result + scale * noise()
    history.insert(0, estimate)
    del history[len(weights) :]
    return result


def check_table(name: str, table: Any, levels: Levels, prediction_type: str) -> None:
    """Raise ValueError unless a table samples a model of these noise levels.

    Each step is followed for exact predictions of one datum and one noise, whose shares must be those of the levels.

    Args:
        name: of the table, for messages.
        table: rows of numbers.
        levels: of the model.
        prediction_type: of the model.
    """
    rows = _as_rows(name, table)
    alpha, sigma = (values.numpy() for values in levels(torch.as_tensor(rows[:, 0].copy())))
    targets = [*zip(alpha[1:], sigma[1:], strict=True), (1.0, 0.0)]
    history: list[np.ndarray] = []
    drift = np.zeros(2)  # of all steps: many small ones may sum up
    for step, row in enumerate(rows):
        state = np.array([alpha[step], sigma[step]])
        estimate = row[_P] * state + row[_Q] * _exact_prediction(alpha[step], sigma[step], prediction_type)
        state = row[_A] * state + row[_B] * estimate
        for weight, earlier in zip([row[_C], *row[len(COLUMNS) :]], history, strict=False):
            state = state + weight * earlier
        history.insert(0, estimate)
        if row[_NOISE]:
            state[1] = np.hypot(state[1], row[_NOISE])
        excess = state - targets[step]
        if row[_NOISE] and step < len(rows) - 1:  # DDPM's larger variance is more than exact predictions need
            excess[1] -= np.clip(excess[1], 0, min(row[_NOISE], _MAX_EXCESS))
        drift += excess
        if not (np.abs(excess) <= _MAX_DRIFT).all() or not (np.abs(drift) <= _MAX_WHOLE_DRIFT).all():
            due = targets[step]
            raise ValueError(
                f"{name}: step {step + 1} of {len(rows)} leaves {state[0]:.3g} of the data and {state[1]:.3g} of the "
                f"noise where {due[0]:.3g} and {due[1]:.3g} are due. Its weights do not sum to what a consistent "
                "solver needs, or it is for other noise levels, other timesteps or another kind of prediction."
            )


def _as_rows(name: str, table: Any) -> np.ndarray:
    """(S, columns) float64, checked but for consistency."""
    try:
        rows: np.ndarray = np.array(table, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        rows = np.zeros(0)
    if rows.ndim != 2 or not len(rows) or not len(COLUMNS) <= rows.shape[1] < len(COLUMNS) + MAX_HISTORY:
        raise ValueError(
            f"{name} must be rows of as many numbers, {len(COLUMNS)} to {len(COLUMNS) + MAX_HISTORY - 1} "
            f"({', '.join(COLUMNS)}, and weights of estimates before), not {shown(table)}."
        )
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"{name} holds {rows[row, column]} in row {row + 1}, column {column + 1}.")
    for column, least, most in ((_CLIP, 1e-6, math.inf), (_NOISE, 0, 100), (_EXPONENT, -100, 100)):
        if not ((rows[:, column] >= least) & (rows[:, column] <= most)).all():
            raise ValueError(f"{name}: {COLUMNS[column]} must be from {least:g} to {most:g} in every row.")
    return rows


def _exact_prediction(alpha: float, sigma: float, prediction_type: str) -> np.ndarray:
    """Its shares of the data and of the noise."""
    shares = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-sigma, alpha), "flow_prediction": (-1, 1)}
    return np.array(shares[prediction_type], dtype=np.float64)


@functools.cache
def published() -> dict[str, Published]:
    """The published solvers that come with the package, by name."""
    folder = resources.files("dit_hub") / "assets" / "solvers"
    files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {entry.pop("name"): Published(**entry) for entry in sorted(entries, key=lambda entry: entry["name"])}


def published_tables(name: str) -> dict[str, list[list[float]]]:
    """The tables of a published solver, by number of steps."""
    solver = published()[name]
    tables = {}
    for steps, entry in solver.solvers.items():
        ends = torch.tensor([0.0, *np.cumsum(entry["timedeltas"])], dtype=torch.float64)
        weights = torch.tensor(entry["coefficients"], dtype=torch.float64)
        weights = weights + torch.diag(1 - weights.sum(1))
        if solver.path == "flow":
            times, kind = (1 - ends).clamp(min=0) * 1000, "flow_prediction"
            levels = straight_levels(times)
        else:
            times, kind = (0.999 - ends) * 1000, "epsilon"
            levels = vp_levels(times)
        table = multistep_table(times[:-1], weights, levels, kind)
        tables[steps] = without_idle(table.numpy()).tolist()
    return tables


def without_idle(table: np.ndarray) -> np.ndarray:
    """The table without columns at its end that are zero, so that no runtime remembers more than it must."""
    used = np.flatnonzero(table.any(axis=0))
    return table[:, : max(used[-1] + 1, len(COLUMNS))]


def steps_of(tables: Sequence[str]) -> str:
    """Numbers of steps in words: "5, 6 and 7 steps"."""
    counts = [str(count) for count in sorted(int(name) for name in tables)]
    listed = " and ".join(filter(None, [", ".join(counts[:-1]), counts[-1]]))
    return f"{listed} step{'s' if counts != ['1'] else ''}"
