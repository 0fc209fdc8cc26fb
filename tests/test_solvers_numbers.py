"""Tables of solvers against the equations of their papers."""

# Modules by name, and settings of schedulers as plain words.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

import math
from typing import Any

import diffusers
import numpy as np
import pytest

from dit_hub.solvers import solver_table
from dit_hub.tables import COLUMNS

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

OFFICIAL = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
LEVELS = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # alpha bar

# diffusers computes its levels in float32.
RTOL, ATOL = 2e-4, 2e-6


def columns(table: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(COLUMNS, table.T, strict=True))


def assert_columns(table: np.ndarray, row: int, **expected: float) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(columns(table)[name][row], value, RTOL, ATOL, err_msg=f"{name} of step {row}")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_its_equation(kind: str) -> None:
    """Song et al. 2021, equation 12, with sigma 0 and the noise written as (x - sqrt(abar) D) / sqrt(1 - abar)."""
    scheduler = diffusers.DDIMScheduler(**OFFICIAL, clip_sample=False, prediction_type=kind, set_alpha_to_one=True)
    table = solver_table(scheduler, 4)
    assert columns(table)["timestep"].tolist() == [750, 500, 250, 0]
    for row, timestep in enumerate([750, 500, 250, 0]):
        level, after = LEVELS[timestep], LEVELS[timestep - 250] if timestep else 1.0
        estimate = {
            "epsilon": (1 / math.sqrt(level), -math.sqrt(1 / level - 1)),
            "v_prediction": (math.sqrt(level), -math.sqrt(1 - level)),
            "sample": (0.0, 1.0),
        }[kind]
        a = math.sqrt((1 - after) / (1 - level))
        b = math.sqrt(after) - a * math.sqrt(level)
        assert_columns(table, row, p=estimate[0], q=estimate[1], a=a, b=b, c=0, noise=0, exponent=0)
        assert columns(table)["clip"][row] > 1e29


@pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
def test_ddpm_is_its_equation(variance: str) -> None:
    """Ho et al. 2020, equation 7; the learned variance of Nichol and Dhariwal 2021, equation 15."""
    scheduler = diffusers.DDPMScheduler(**OFFICIAL, variance_type=variance, clip_sample_range=1.5)
    table = solver_table(scheduler, 4)
    for row, timestep in enumerate([750, 500, 250, 0]):
        level, after = LEVELS[timestep], LEVELS[timestep - 250] if timestep else 1.0
        alpha = level / after
        beta, posterior = 1 - alpha, (1 - alpha) * (1 - after) / (1 - level)
        of_noisy, of_clean = math.sqrt(alpha) * (1 - after) / (1 - level), math.sqrt(after) * beta / (1 - level)
        least, most = {"learned_range": (posterior, beta), "fixed_large": (beta, beta)}.get(
            variance, (posterior, posterior)
        )
        noise = (least * most) ** 0.25 if timestep else 0
        exponent = math.log(most / least) / 4 if timestep else 0
        assert_columns(table, row, a=of_noisy, b=of_clean, c=0, noise=noise, exponent=exponent, clip=1.5)


def test_the_straight_path_is_its_equation() -> None:
    """Euler's steps, x + (sigma' - sigma) velocity; the estimate is the velocity itself."""
    table = solver_table(diffusers.FlowMatchEulerDiscreteScheduler(), 4, "official")
    for row in range(4):
        assert_columns(table, row, timestep=1000 - 250 * row, p=0, q=1, a=1, b=-0.25, c=0, noise=0, exponent=0)


def test_the_second_order_remembers_one_estimate() -> None:
    """DPM-Solver++ 2M, Lu et al. 2022, Algorithm 2; its first and last steps are of first order."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**OFFICIAL, final_sigmas_type="zero")
    table = solver_table(scheduler, 20)
    times = columns(table)["timestep"].astype(int)
    logs = 0.5 * np.log(LEVELS[times] / (1 - LEVELS[times]))
    for row in range(1, 19):
        level, after = LEVELS[times[row]], LEVELS[times[row + 1]]
        step = logs[row + 1] - logs[row]
        ratio = (logs[row] - logs[row - 1]) / step
        weight = -math.sqrt(after) * math.expm1(-step)
        assert_columns(
            table, row, p=1 / math.sqrt(level), q=-math.sqrt(1 / level - 1), a=math.sqrt((1 - after) / (1 - level)),
            b=weight * (1 + 0.5 / ratio), c=-weight * 0.5 / ratio, noise=0, exponent=0,
        )  # fmt: skip
    assert_columns(table, 0, c=0)
    assert_columns(table, 19, a=0, b=1, c=0)


def test_timesteps_given_are_those_of_the_table() -> None:
    scheduler = diffusers.DDPMScheduler(**OFFICIAL, clip_sample=False)
    for timesteps in ([900, 400, 3], [900, 401, 3]):
        assert columns(solver_table(scheduler, 3, timesteps))["timestep"].tolist() == timesteps
    assert columns(solver_table(scheduler, 3))["timestep"].tolist() == [666, 333, 0]
    noise = columns(solver_table(scheduler, 3, [2, 1, 0]))["noise"]
    assert noise[1] > 0
    assert noise[2] == 0  # only the step to the data draws none


class CountedScheduler(diffusers.DDIMScheduler):
    """Counts the runs that it is prepared for."""

    runs = 0

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        type(self).runs += 1
        super().set_timesteps(*args, **kwargs)


def test_a_table_is_measured_once_and_is_the_callers_own() -> None:
    scheduler: Any = CountedScheduler(**OFFICIAL, clip_sample=False)
    CountedScheduler.runs = 0
    table, kept = solver_table(scheduler, 1), solver_table(scheduler, 1)
    solver_table(scheduler, 2)
    table[:] = 0
    np.testing.assert_array_equal(solver_table(scheduler, 1), kept)
    assert CountedScheduler.runs == 2
    # Other noise levels are another table.
    other = CountedScheduler(**{**OFFICIAL, "beta_end": 1e-2}, clip_sample=False)
    assert not np.array_equal(solver_table(other, 2), solver_table(scheduler, 2))


def test_a_hundred_tables_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_hub.solvers._measured", {})
    CountedScheduler.runs = 0

    def runs(beta_end: float) -> int:
        solver_table(CountedScheduler(**{**OFFICIAL, "beta_end": beta_end}, clip_sample=False), 1)
        return CountedScheduler.runs

    for count in range(100):
        assert runs(0.02 + count / 10_000) == count + 1
    assert runs(0.02) == 100
    assert runs(0.03) == 101
    assert runs(0.02) == 102
