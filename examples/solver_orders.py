"""Error against steps of every solver that is a table, on data whose noise is known exactly: `docs/solvers.png`.

The data are Gaussians of deviation 0.12 about 12 points of 4 dimensions, so that the best prediction of the noise is a
formula. The error is the root mean square distance from 4,000 steps of DDIM, over 4,000 starts. What a model adds, and
what its guidance does, is not in it: `dit-hub solver compare` measures that.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from dit_hub.extras import quiet_libraries
from dit_hub.schedulers import TableScheduler
from dit_hub.solvers import solver_table
from dit_hub.solving import plot_lines
from dit_hub.tables import DiscreteLevels, advance, multistep_table, vp_levels

OFFICIAL = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
STEPS = (5, 6, 8, 10, 15, 20, 30, 50, 100)
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "zero"}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "linspace"}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}
Levels = Callable[[Tensor], tuple[Tensor, Tensor]]


class Mixture:
    """The data, and starts of trajectories, float64."""

    def __init__(self, starts: int):
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.starts = torch.randn(starts, 4, generator=generator, dtype=torch.float64)

    def noise(self, sample: Tensor, timestep: float, levels: Levels) -> Tensor:
        """(N, 4) samples -> (N, 4), the best prediction of the noise in them."""
        alpha, sigma = (float(values[0]) for values in levels(torch.tensor([timestep], dtype=torch.float64)))
        variance = alpha**2 * 0.12**2 + sigma**2
        away = sample[:, None] - alpha * self.means  # (N, 12, 4)
        share = torch.softmax(-away.square().sum(2) / (2 * variance), dim=1)
        return sigma / variance * (share[:, :, None] * away).sum(1)

    def run(self, table: np.ndarray, levels: Levels) -> Tensor:
        """(N, 4) where a table ends."""
        sample, history = self.starts[:, :, None, None], []
        for row in table.astype(np.float64).tolist():
            prediction = self.noise(sample[:, :, 0, 0], row[0], levels)
            sample = advance(row, sample, prediction[:, :, None, None], history)
        return sample[:, :, 0, 0]

    def exact(self, levels: Levels, last: float, steps: int) -> Tensor:
        """(N, 4) where DDIM ends with many steps."""
        sample = self.starts
        timesteps = torch.linspace(999, last, steps + 1, dtype=torch.float64)
        alpha, sigma = levels(timesteps)
        for step in range(steps):
            noise = self.noise(sample, float(timesteps[step]), levels)
            data = (sample - sigma[step] * noise) / alpha[step]
            sample = alpha[step + 1] * data + sigma[step + 1] * noise
        return sample


def uniform(steps: int, order: int) -> np.ndarray:
    """The table of DPM-Solver++ at even times, from where the published tables start to where they end."""
    timesteps = torch.linspace(999, 1, steps + 1, dtype=torch.float64)
    alpha, sigma = vp_levels(timesteps)
    length = (alpha / sigma).log().diff()
    slope = 0.5 * length[1:] / length[:-1] * (order == 2)
    slope[-1:] = 0.0  # the last step, which is the longest, is of the first order
    weights = torch.diag(1 + torch.cat([torch.zeros(1), slope])) - torch.diag(slope, -1)
    return multistep_table(timesteps[:-1], weights, (alpha, sigma)).numpy()


def print_table(lines: Mapping[str, Sequence[tuple[float, float]]], evaluations: list[int]) -> None:
    print(f"| evaluations | {' | '.join(lines)} |")
    print("|---" * (len(lines) + 1) + "|")
    for count in evaluations:
        cells = [next((f"{value:.4f}" for steps, value in line if steps == count), "") for line in lines.values()]
        print(f"| {count} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4000)
    parser.add_argument("--exact-steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("solvers.png"))
    options = parser.parse_args()
    quiet_libraries()
    mixture = Mixture(options.starts)
    discrete = DiscreteLevels(diffusers.DDPMScheduler(**OFFICIAL).alphas_cumprod)

    def error(table: np.ndarray, levels: Levels, exact: Tensor) -> float:
        return (mixture.run(table, levels) - exact).square().sum(1).mean().sqrt().item() / 2  # 4 dimensions

    lines: dict[str, list[tuple[float, float]]] = {}
    exact = mixture.exact(discrete, 0, options.exact_steps)
    for name, (kind, fields) in SOLVERS.items():
        scheduler = getattr(diffusers, kind)(**OFFICIAL, **fields)
        tables = [solver_table(scheduler, (steps + 1) // 2 if name == "Heun" else steps) for steps in STEPS]
        lines[name] = [(len(table), error(table, discrete, exact)) for table in tables]
    # The published tables count their noise levels by a formula, and end at 1 of 1,000.
    exact = mixture.exact(vp_levels, 1, options.exact_steps)
    searched = TableScheduler.from_name("searched")
    tables = [solver_table(searched, steps) for steps in searched.steps]
    lines["searched"] = [(len(table), error(table, vp_levels, exact)) for table in tables]

    print_table(lines, sorted({*STEPS, 7, 9}))
    print()
    alike = {name: [(steps, error(uniform(steps, order), vp_levels, exact)) for steps in searched.steps]
             for name, order in (("DPM-Solver++ 2M, uniform t", 2), ("DDIM, uniform t", 1))}  # fmt: skip
    print_table({"searched": lines["searched"], **alike}, searched.steps)
    plot_lines(lines, options.out, "A mixture of Gaussians whose noise is exact", "evaluations of the noise",
               "root mean square distance", overwrite=True)  # fmt: skip
    print(f"The figure is in {options.out}")


if __name__ == "__main__":
    main()
