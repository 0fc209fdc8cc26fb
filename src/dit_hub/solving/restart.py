"""Restart sampling (Xu et al. 2023, Algorithm 1) as a table."""

from typing import Any

import torch

from ..checks import rising_pair, whole_number
from ..schedulers import TableScheduler
from ..tables import COLUMNS
from .trajectories import Path

_A, _B, _C, _NOISE = (COLUMNS.index(name) for name in ("a", "b", "c", "noise"))


def restart_scheduler(
    scheduler: Any,
    steps: int,
    interval: tuple[float, float] = (0.1, 0.4),
    restarts: int = 2,
    restart_steps: int = 4,
) -> TableScheduler:
    """A solver of the second order that goes back: at the lower end of an interval it adds noise up to the upper one.

    What errors the steps before have made contracts with each restart, which costs `restart_steps` evaluations. The
    published setting of a model is a matter of search.

    Args:
        scheduler: of the model.
        steps: from noise to data, but for the restarts.
        interval: its ends, as shares of the training timesteps.
        restarts: how many.
        restart_steps: evaluations in the interval, in each restart.

    Returns:
        A scheduler with a table of `steps + restarts * restart_steps` steps.

    Raises:
        ValueError: an interval that the steps do not reach into, or counts below one.
    """
    steps, restarts = whole_number("steps", steps, 2), whole_number("restarts", restarts, 1)
    restart_steps = whole_number("restart_steps", restart_steps, 1)
    path = Path(scheduler)
    low, high = (share * path.first_timestep for share in rising_pair("interval", interval))
    before = round(steps * (1 - low / path.first_timestep))
    if not 0 < before < steps or low == high:
        raise ValueError(f"interval {interval} leaves no step of {steps} on one of its sides; take more steps.")
    descent = _segment(path, path.first_timestep, low, before)
    again = _segment(path, high, low, restart_steps)
    ends = path.levels(torch.tensor([low, high], dtype=torch.float64))
    for segment in (descent, again):
        _add_noise(segment, *ends)
    last = _segment(path, high, low, restart_steps)
    rows = [descent, *[again] * (restarts - 1), last, _segment(path, low, 0.0, steps - before)]
    return path.scheduler([torch.cat(rows)], "restart", "Xu et al., Restart Sampling, NeurIPS 2023, arXiv 2306.14878")


def _segment(path: Path, first: float, last: float, steps: int) -> torch.Tensor:
    """(steps, columns) of the second order from one timestep to another; 0 is clean data."""
    timesteps = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    ends = path.ends(timesteps[:-1]) if last == 0 else path.levels(timesteps)
    return path.table(timesteps[:-1], path.second_order(timesteps[:-1], ends), ends)[:, : len(COLUMNS)]


def _add_noise(segment: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> None:
    """Have a segment's last row go on from the lower level to the upper one, in place."""
    share = alpha[1] / alpha[0]
    segment[-1, [_A, _B, _C]] *= share
    segment[-1, _NOISE] = (sigma[1] ** 2 - (share * sigma[0]) ** 2).sqrt()
