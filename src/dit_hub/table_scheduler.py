"""A scheduler of diffusers that reads its solver from a table."""

import json
import os
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import real_number, shown, whole_number
from .configuration_dit import FLOW_TIMESTEPS
from .tables import (
    COLUMNS,
    PREDICTION_TYPES,
    DiscreteLevels,
    Levels,
    advance,
    check_table,
    published,
    published_tables,
    steps_of,
    straight_levels,
)

# Config fields of the noise levels, as diffusers' DDPMScheduler has them.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


# Between which the noise of a run starts. Heun's starts at its largest noise level, a little below one.
_STARTS = (0.5, 1.01)


class TableScheduler(SchedulerMixin, ConfigMixin):
    """Samples with a table of `dit_hub.tables`: any linear multistep solver, at any timesteps, as data.

    Its `scheduler_config.json` carries the tables, so that a pipeline folder does, and pipelines of diffusers can step
    with it as with their own.

    Args:
        tables: rows of a table by number of steps, `{"8": [[999.0, …], …]}`.
        name: of the solver, for people.
        source: where it comes from: a paper, a command.
        prediction_type: of the model: "epsilon", "v_prediction", "sample" or "flow_prediction".
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
            levels of the model, as in diffusers' `DDPMScheduler`; models of velocities have the straight path's.
        init_noise_sigma: factor of the noise that a run starts from.

    Raises:
        ValueError: a table that is damaged, or not for these noise levels or predictions.
    """

    config: Any
    order = 1

    @register_to_config
    def __init__(
        self,
        tables: dict[Any, list[list[float]]] | None = None,
        name: str = "",
        source: str = "",
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        init_noise_sigma: float = 1.0,
    ):
        self.init_noise_sigma = real_number("init_noise_sigma", init_noise_sigma, *_STARTS)
        if prediction_type not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type must be one of {known}, not {shown(prediction_type)}.")
        levels: Levels = straight_levels
        if prediction_type != "flow_prediction":
            self.alphas_cumprod = _alphas_cumprod({key: self.config[key] for key in NOISE_SCHEDULE})
            levels = DiscreteLevels(self.alphas_cumprod)
        elif num_train_timesteps != FLOW_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is {FLOW_TIMESTEPS} for flow_prediction, not {num_train_timesteps}.")
        if not isinstance(tables, dict) or not tables:
            raise ValueError(
                f"tables must be rows by number of steps, not {shown(tables)}; see TableScheduler.from_name."
            )
        title = name or "table"
        self._tables = {str(steps): table for steps, table in tables.items()}
        for steps, table in self._tables.items():
            check_table(f"{title!r} of {steps} steps", table, levels, prediction_type)
            if str(len(table)) != str(steps):
                raise ValueError(f"{title!r} of {steps} steps has {len(table)} rows.")
        self._title = title
        self.set_timesteps(max(map(int, self._tables)))

    @classmethod
    def from_name(cls, name: str, steps: int | None = None) -> "TableScheduler":
        """A published solver.

        Args:
            name: "searched" for DiT's noise levels, "searched-flow" for the straight path (Wang et al., ICML 2025).
            steps: with the table of this many steps only; None for all.

        Raises:
            ValueError: an unknown name or number of steps.
        """
        solvers = published()
        if name not in solvers:
            raise ValueError(f"There is no published solver {name!r}; known: {', '.join(solvers)}.")
        tables = published_tables(name)
        if steps is not None:
            tables = {str(steps): _of_steps(name, tables, steps)}
        kind = "flow_prediction" if solvers[name].path == "flow" else "epsilon"
        return cls(tables=tables, name=name, source=solvers[name].source, prediction_type=kind)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "TableScheduler":
        """A solver in a JSON file, as `dit-hub solver fit` writes it.

        Raises:
            ValueError: no such file, or not a solver.
        """
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError:
            raise ValueError(f"{path} is not valid JSON.") from None
        if not isinstance(config, dict) or "tables" not in config:
            raise ValueError(f"{path} is no solver; `dit-hub solver fit` writes one.")
        config.setdefault("name", Path(path).stem)
        scheduler: Any = cls.from_config(config)
        return scheduler

    @property
    def steps(self) -> list[int]:
        """The numbers of steps that there are tables for, rising."""
        return sorted(map(int, self._tables))

    @property
    def table(self) -> np.ndarray:
        """(S, columns) float32, of the number of steps that is set."""
        return self._table.numpy()

    @property
    def uses_variance(self) -> bool:
        """Whether the table that is set takes the variance from the model's prediction."""
        return bool(self.table[:, COLUMNS.index("exponent")].any())

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the table.

        Raises:
            ValueError: there is none of this many steps.
        """
        rows = _of_steps(self._title, self._tables, whole_number("num_inference_steps", num_inference_steps))
        self._table = torch.tensor(rows, dtype=torch.float32)
        self.num_inference_steps = num_inference_steps
        self.timesteps = self._table[:, 0].to(device or "cpu")
        self._step, self._history = 0, []

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next row of the table.

        Args:
            model_output: (N, C, H, W), or (N, 2C, H, W) with a learned variance.
            timestep: ignored; rows follow each other from `set_timesteps` on.
            sample: (N, C, H, W).
            generator: source of the noise of stochastic solvers.
            return_dict: return a `SchedulerOutput` rather than a tuple.

        Raises:
            ValueError: more steps than the table has.
        """
        if self._step == len(self._table):
            raise ValueError(f"{self._title!r} has {len(self._table)} steps, and all were taken; call set_timesteps.")

        def noise() -> Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

        row = self._table[self._step].tolist()  # numbers, for which no device waits
        result = advance(row, sample.float(), model_output.float(), self._history, noise).to(sample.dtype)
        self._step += 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _alphas_cumprod(schedule: dict[str, Any]) -> Tensor:
    try:
        return diffusers.DDPMScheduler(**schedule).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"These settings are no noise schedule: {shown(schedule)} ({reason}).") from None


def _of_steps(name: str, tables: dict[str, Any], steps: int) -> Any:
    if str(steps) not in tables:
        raise ValueError(f"The solver {name!r} has tables of {steps_of(list(tables))}, not of {steps}.")
    return tables[str(steps)]
