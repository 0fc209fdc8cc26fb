"""What a request means for one pipeline: its solver's table, the guided steps, the shape of a sample."""

import dataclasses
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checks import real_number, rising_pair, shown, whole_number
from ..configuration_dit import DiTConfig
from ..guidance import resolved_guidance
from ..schedulers import (
    check_scheduler,
    checked_eta,
    default_steps,
    is_flow_matching,
    switch_scheduler,
    without_foreign_variance,
)
from ..solvers import initial_scale, solver_table
from ..tables import COLUMNS, DiscreteLevels, data_weights, straight_levels
from .requests import ImageRequest

# Tables held; one of 250 steps takes 9 KB.
_MOST_SOLVERS = 256

_LARGEST_SEED, _MOST_IMAGES, _MOST_PRIORITY = 2**63 - 1, 2**16, 8


@dataclass(frozen=True)
class Solver:
    """A scheduler and a number of steps, as numbers.

    Args:
        table: (S, columns) float32; see `dit_hub.tables`.
        depth: how many earlier estimates its steps need.
        scale: of the noise of unit variance that a run starts from.
        data: (S, 2), the weights of the sample and the prediction in the estimate of the data, for previews.
        times: (S,) the share of the training's timesteps, for guidance intervals.
    """

    table: np.ndarray
    depth: int
    scale: float
    data: np.ndarray
    times: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A request that was checked.

    Args:
        request: with nothing left open.
        label: the class id; None for unconditional models.
        scale: of the guidance.
        solver: of all its images.
        guided: of each step, whether it is guided.
        shape: (C, H, W) of a sample.
        weight: of an image in a pass: its tokens in multiples of the training size's, rounded up.
    """

    request: ImageRequest
    label: int | None
    scale: float
    solver: Solver
    guided: tuple[bool, ...]
    shape: tuple[int, int, int]
    weight: int

    @property
    def evaluations(self) -> int:
        """What an image takes, in rows of the model's own size."""
        return (len(self.guided) + sum(self.guided)) * self.weight

    @property
    def state_bytes(self) -> int:
        """Memory of an image in flight: its sample, noise and estimates, with those of the next step."""
        return (3 + self.solver.depth) * 4 * int(np.prod(self.shape))


class Planner:
    """Makes plans for the requests of a pipeline; any thread may ask.

    Args:
        pipeline: a `DiTPipeline`.

    Raises:
        ValueError: its own scheduler cannot be written as a table.
    """

    def __init__(self, pipeline: Any):
        self.pipeline, self.config = pipeline, pipeline.transformer.config
        self._own = without_foreign_variance(pipeline.scheduler)
        self._solvers: OrderedDict[tuple, tuple[Solver, int]] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._solver(ImageRequest())
        except ValueError as error:
            raise ValueError(f"{error} Serve this model with another scheduler, such as ddim.") from None

    def __call__(self, request: ImageRequest) -> Plan:
        """The plan of a request.

        Raises:
            ValueError: what the model or the solver cannot serve.
        """
        config: DiTConfig = self.config
        count = whole_number("n", request.n, 1, _MOST_IMAGES)
        whole_number("seed", request.seed, 0, _LARGEST_SEED - count)
        whole_number("priority", request.priority, -_MOST_PRIORITY, _MOST_PRIORITY)
        whole_number("preview_every", request.preview_every, 0)
        if request.output_type not in ("image", "latent"):
            raise ValueError(f"output_type must be image or latent, not {shown(request.output_type)}.")
        if request.deadline is not None:
            real_number("deadline", request.deadline, 0)
        interval = rising_pair("guidance_interval", request.guidance_interval)
        scale = resolved_guidance(config, request.guidance_scale)
        solver, steps = self._solver(request)
        guided = tuple(bool(scale != 1 and interval[0] <= time <= interval[1]) for time in solver.times.tolist())
        shape, label = self._shape(request), self._label(request.label)
        resolved = dataclasses.replace(
            request,
            label=label,
            num_inference_steps=steps,
            guidance_scale=scale,
            guidance_interval=interval,
        )
        own_height, own_width = config.sample_height_width
        weight = -(-shape[1] * shape[2] // (own_height * own_width))
        return Plan(resolved, label, scale, solver, guided, shape, weight)

    def _label(self, label: int | str | None) -> int | None:
        if not self.config.num_classes:
            if label is not None:
                raise ValueError(f"This model is unconditional and takes no label, but got {shown(label)}.")
            return None
        if label is None:
            raise ValueError(f"Give a label of the {self.config.num_classes} classes.")
        return self.pipeline.get_label_ids([label])[0]

    def _shape(self, request: ImageRequest) -> tuple[int, int, int]:
        height, width = self.pipeline.latent_height_width(request.height, request.width)
        return self.config.in_channels, height, width

    def _solver(self, request: ImageRequest) -> tuple[Solver, int]:
        name, steps = request.scheduler, request.num_inference_steps
        if name is not None and not isinstance(name, str):
            raise ValueError(f"scheduler must be a name, not {shown(name)}.")
        if steps is not None:
            steps = whole_number("num_inference_steps", steps, 1)
        key = name, steps, real_number("eta", request.eta, 0, 1)
        with self._lock:
            if key in self._solvers:
                self._solvers.move_to_end(key)
                return self._solvers[key]
        scheduler = self._own if name is None else without_foreign_variance(switch_scheduler(self._own, name))
        checked_eta(scheduler, request.eta)
        steps = default_steps(scheduler) if steps is None else steps
        latent = self.pipeline.vae is not None or not self.config.draws_pixels
        check_scheduler(scheduler, self.config, self.pipeline.scheduler, latent)
        solver = _measured(scheduler, steps, request.eta)
        with self._lock:
            self._solvers[key] = solver, steps
            if len(self._solvers) > _MOST_SOLVERS:
                self._solvers.popitem(last=False)
        return solver, steps


def _measured(scheduler: Any, steps: int, eta: float) -> Solver:
    table = solver_table(scheduler, steps, eta=eta)
    weights = np.column_stack([table[:, COLUMNS.index("c")], table[:, len(COLUMNS) :]])  # c, c2, c3, …
    used = np.flatnonzero(weights.any(axis=0))
    timesteps = torch.from_numpy(table[:, 0].astype(np.float64))
    if is_flow_matching(scheduler):
        _, sigma = straight_levels(timesteps)
        data = torch.ones_like(sigma), -sigma
    else:
        alpha, sigma = DiscreteLevels(scheduler.alphas_cumprod)(timesteps)
        data = data_weights(alpha, sigma, scheduler.config.get("prediction_type", "epsilon"))
    return Solver(
        table=table.astype(np.float32),
        depth=int(used[-1]) + 1 if len(used) else 0,
        scale=initial_scale(scheduler, steps),
        data=torch.stack(data, dim=1).float().numpy(),
        times=table[:, COLUMNS.index("timestep")].astype(np.float64) / scheduler.config.num_train_timesteps,
    )
