"""Trajectories of a model: the nearly exact one, and one that gradients go through."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..guidance import guide
from ..schedulers import TableScheduler, is_flow_matching
from ..table_scheduler import NOISE_SCHEDULE
from ..tables import COLUMNS, DiscreteLevels, Levels, advance, multistep_table, straight_levels, without_idle

# Steps of the trajectory that counts as exact. Of the second order, their distance to twice as many is below 1e-3.
REFERENCE_STEPS = 250


class Path:
    """The noise levels that a model was trained for, and how its solvers count their time.

    Args:
        scheduler: of the model.
    """

    def __init__(self, scheduler: Any):
        self.is_flow = is_flow_matching(scheduler)
        config = scheduler.config
        if self.is_flow:
            self.levels: Levels = straight_levels
            self.first_timestep = 1000.0
            self.settings: dict[str, Any] = {"prediction_type": "flow_prediction"}
        else:
            self.levels = DiscreteLevels(scheduler.alphas_cumprod)
            self.first_timestep = float(config.num_train_timesteps - 1)
            self.settings = {key: config[key] for key in NOISE_SCHEDULE if key in config}
            self.settings["prediction_type"] = config.get("prediction_type", "epsilon")

    def ends(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) timesteps -> (S + 1,) alpha and sigma, the last ones of clean data."""
        alpha, sigma = self.levels(timesteps)
        return torch.cat([alpha, torch.ones_like(alpha[:1])]), torch.cat([sigma, torch.zeros_like(sigma[:1])])

    def uniform_timesteps(self, steps: int) -> Tensor:
        """(S,) evenly from the first timestep towards zero, float64."""
        return self.first_timestep * (1 - torch.arange(steps, dtype=torch.float64) / steps)

    def second_order(self, timesteps: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(S, S) weights that extrapolate from the estimate before, differentiable in the timesteps.

        DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2) in the logarithm of alpha / sigma, and the method of Adams and
        Bashforth for velocities. The first step has no estimate before; one of DPM-Solver++ to clean data is infinite.
        `ends` are the levels of the timesteps and of the end, by default of clean data.
        """
        alpha, sigma = self.ends(timesteps) if ends is None else ends
        finite = self.is_flow or bool(sigma[-1])
        position = sigma if self.is_flow else (alpha / sigma)[: None if finite else -1].log()
        length = position.diff()
        slope = torch.zeros(len(timesteps), dtype=length.dtype, device=length.device)
        inner = 0.5 * length[1:] / length[:-1]
        slope = torch.cat([slope[:1], inner, slope[: len(slope) - 1 - len(inner)]])
        return torch.diag(1 + slope) - torch.diag(slope[1:], -1)

    def table(self, timesteps: Tensor, weights: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See `dit_hub.tables.multistep_table`; `ends` as for `second_order`."""
        ends = self.ends(timesteps) if ends is None else ends
        return multistep_table(timesteps, weights, ends, self.settings["prediction_type"])

    def scheduler(self, tables: list[Tensor], name: str, source: str = "") -> TableScheduler:
        """A scheduler of tables.

        Raises:
            ValueError: one of them is not consistent.
        """
        rows = {str(len(table)): without_idle(table.detach().cpu().numpy()).tolist() for table in tables}
        return TableScheduler(tables=rows, name=name, source=source, **self.settings)


def reference_scheduler(scheduler: Any, steps: int = REFERENCE_STEPS) -> TableScheduler:
    """The second-order solver of many steps whose trajectory counts as exact.

    Args:
        scheduler: of the model.
        steps: how many.
    """
    return second_order_scheduler(scheduler, [steps])


def second_order_scheduler(scheduler: Any, steps: Sequence[int]) -> TableScheduler:
    """DPM-Solver++ 2M, or the method of Adams and Bashforth for velocities, at even timesteps.

    Args:
        scheduler: of the model.
        steps: numbers of steps to have tables of.
    """
    path, tables = Path(scheduler), []
    for count in steps:
        timesteps = path.uniform_timesteps(count)
        tables.append(path.table(timesteps, path.second_order(timesteps))[:, : len(COLUMNS)])
    return path.scheduler(tables, "second-order")


def draw(transformer: Any, table: Tensor, noise: Tensor, class_labels: Tensor | None, guidance_scale: float) -> Tensor:
    """(N, C, H, W) noise -> samples, with gradients to the table; activations are held of one step at a time.

    Args:
        transformer: a `DiTTransformer` whose parameters need no gradients.
        table: of `Path.table`, on the processor.
        noise: (N, C, H, W).
        class_labels: (N,); None for unconditional models.
        guidance_scale: 1 for none.
    """
    config, channels = transformer.config, noise.shape[1]

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        timesteps, labels = timestep.float().expand(len(sample)), class_labels
        if labels is None or guidance_scale == 1:
            return transformer(sample, timesteps, labels).sample[:, :channels]
        labels = torch.cat([labels, torch.full_like(labels, config.null_class)])
        both = transformer(torch.cat([sample, sample]), torch.cat([timesteps, timesteps]), labels).sample
        cond, uncond = both[:, :channels].chunk(2)
        return guide(cond, uncond, guidance_scale, config.guided_channels)

    sample, history = noise, []
    # Nothing here waits for the device: the bounds, which decide what is computed, are read on the processor.
    bounds = table[:, COLUMNS.index("clip")].tolist()
    for row, bound in zip(table.float().to(noise.device), bounds, strict=True):
        numbers: list[Any] = [*row]
        numbers[COLUMNS.index("clip")] = bound
        if torch.is_grad_enabled():
            prediction: Any = checkpoint(predict, sample, row[0], use_reentrant=False, preserve_rng_state=False)
        else:
            prediction = predict(sample, row[0])
        sample = advance(numbers, sample, prediction, history)
    return sample
