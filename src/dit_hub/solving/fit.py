"""Solvers fitted to a model: timesteps and weights by gradient descent through the sampler (Wang et al. 2025)."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checks import real_number, whole_number
from ..configuration_dit import DiTConfig
from ..files import new_file
from ..guidance import default_guidance
from ..modeling_dit import DiTTransformer
from ..pipeline_dit import DiTPipeline
from ..schedulers import TableScheduler
from ..tables import MAX_HISTORY
from ..training.together import failing_together
from .trajectories import Path, draw, reference_scheduler

# Called with the name of a phase, what is done, all of it, and the best distance so far, where there is one.
Report = Callable[[str, int, int, float | None], None]

# Of the learning rate of Adam: it falls to a tenth along a cosine.
_LAST_RATE = 0.1

# Of the trajectories: one in so many is held out, to choose the best solver by.
_HELD_OUT = 4

_EVERY = 10  # iterations between two measurements on the held-out ones


@dataclass(frozen=True)
class Plan:
    """What is fitted, and how; see `fit_solver`."""

    steps: int
    guidance_scale: float
    timesteps_only: bool
    trajectories: int
    batch_size: int
    iterations: int
    learning_rate: float
    seed: int


def fit_solver(
    pipeline: DiTPipeline,
    steps: int,
    guidance_scale: float | None = None,
    timesteps_only: bool = False,
    trajectories: int = 256,
    batch_size: int = 32,
    iterations: int = 300,
    learning_rate: float = 0.02,
    seed: int = 0,
    work: str | os.PathLike | None = None,
    report: Report = lambda *_: None,
) -> TableScheduler:
    """Fit timesteps and weights of a solver to a model, so that it ends where many small steps do.

    It starts as DPM-Solver++ 2M of evenly spaced timesteps (Adams-Bashforth for velocities), and minimises the mean
    squared distance to a second-order trajectory of 250 steps from the same noise. A fourth of the trajectories is held
    out, and the solver nearest to these is returned; it is never worse on them than the start. Started in several
    processes by `accelerate launch`, each fits to a share of every batch.

    Args:
        pipeline: in PyTorch.
        steps: of the solver, 2 or more.
        guidance_scale: that it is meant for; None means 4.0 where the model has a null class, else 1.0.
        timesteps_only: fit the timesteps alone and keep the weights of the second order.
        trajectories: how many noises and random classes.
        batch_size: trajectories in an iteration, over all processes.
        iterations: steps of Adam.
        learning_rate: of Adam; it falls to a tenth.
        seed: of noises, classes and order.
        work: folder for trajectories and state, from which the same call resumes; they stay until `remove_state`.
        report: called with the phase, what is done, all of it and the best relative distance on the held-out ones.

    Returns:
        A scheduler with the table; its `source` tells the model and the settings.

    Raises:
        ValueError: settings out of range, a pipeline of another runtime, or a fit that diverges.
        ConnectionError: another process failed.
    """
    model = pipeline.transformer
    if not isinstance(model, DiTTransformer):
        raise ValueError(f"Fitting needs gradients, and {type(model).__name__} has none; give the model in PyTorch.")
    if guidance_scale is None:
        guidance_scale = default_guidance(model.config)
    plan = Plan(
        whole_number("steps", steps, 2, MAX_HISTORY),
        real_number("guidance_scale", guidance_scale),
        timesteps_only,
        whole_number("trajectories", trajectories, 2 * _HELD_OUT),
        whole_number("batch_size", batch_size, 1),
        whole_number("iterations", iterations, 1),
        real_number("learning_rate", learning_rate, 0),
        whole_number("seed", seed, 0),
    )
    if plan.guidance_scale != 1 and model.config.null_class is None:
        raise ValueError(f"guidance {plan.guidance_scale} needs a null class, which this model was trained without.")
    return _Fit(pipeline, plan, None if work is None else FilePath(work), report).run()


class _Fit:
    """A fit in one of several processes."""

    def __init__(self, pipeline: DiTPipeline, plan: Plan, work: FilePath | None, report: Report):
        self.accelerator = Accelerator()
        _check_shares(plan, self.accelerator.num_processes)
        self.pipeline, self.plan, self.work, self.report = pipeline, plan, work, report
        self.path = Path(pipeline.scheduler)
        self.device = pipeline.transformer.device
        # On the processor, in float64, which not every device has. Deltas are logarithms of the shares of time, but for
        # a constant.
        self.deltas = torch.zeros(plan.steps, dtype=torch.float64)
        self.weights = self.path.second_order(self._timesteps(self.deltas)).tril(-1).requires_grad_()
        self.deltas.requires_grad_()
        learned = [self.deltas] if plan.timesteps_only else [self.deltas, self.weights]
        self.optimizer = torch.optim.Adam(learned, plan.learning_rate)
        self.iteration = self.best_iteration = 0
        self.best, self.distance = self.table().detach(), float("inf")

    def run(self) -> TableScheduler:
        model, was_training = self.pipeline.transformer, self.pipeline.transformer.training
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.eval().requires_grad_(False)
        try:
            with failing_together(self.accelerator):
                noise, labels, ends = self._trajectories()
                self._resume()
                self._descend(noise, labels, ends)
                self.accelerator.wait_for_everyone()
        finally:
            model.train(was_training)
            for parameter in trainable:
                parameter.requires_grad_(True)
        return self.path.scheduler([self.best], self._name(), self._source())

    def _timesteps(self, deltas: Tensor) -> Tensor:
        """(S,) from the first timestep on, by shares of time that are above zero and sum to one."""
        shares = torch.softmax(deltas, 0)
        return self.path.first_timestep * (1 - (shares.cumsum(0) - shares))

    def table(self) -> Tensor:
        """The table of the present timesteps and weights."""
        timesteps = self._timesteps(self.deltas)
        if self.plan.timesteps_only:
            return self.path.table(timesteps, self.path.second_order(timesteps))
        weights = self.weights.tril(-1)
        return self.path.table(timesteps, weights + torch.diag(1 - weights.sum(1)))

    # --- What is aimed at --------------------------------------------------------------------------------------------

    def _trajectories(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Noise, labels and ends of this process's share of the trajectories."""
        accelerator, config, plan = self.accelerator, self.pipeline.transformer.config, self.plan
        generator = torch.Generator().manual_seed(plan.seed)
        shape = (plan.trajectories, config.in_channels, *config.sample_height_width)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        noise = torch.randn(shape, generator=generator)[mine]
        labels = torch.randint(max(config.num_classes, 1), (plan.trajectories,), generator=generator)[mine]
        file = None
        if self.work is not None:
            share = f"{accelerator.process_index}-of-{accelerator.num_processes}"
            made_by = self._fingerprint("guidance_scale", "trajectories", "seed")
            file = self.work / f"trajectories-{made_by}-{share}.safetensors"
        saved = _load(file)
        ends = self._ends(noise, labels) if saved is None else saved["ends"]
        if self._reduce(ends.isfinite().all(), "mean") < 1:  # so that all processes raise
            raise ValueError("The model's own trajectories of 250 steps hold numbers that are not finite.")
        if file is not None and saved is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            _save({"ends": ends}, file)
        classes = labels.to(self.device) if config.num_classes else None
        return noise.to(self.device), classes, ends.to(self.device)

    def _ends(self, noise: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W) where the exact trajectories end."""
        sampling = DiTPipeline(self.pipeline.transformer, reference_scheduler(self.pipeline.scheduler))
        sampling.set_progress_bar_config(disable=True)
        size, ends = self.plan.batch_size, []
        for start in range(0, len(noise), size):
            part = slice(start, start + size)
            self.report("trajectories", start, len(noise), None)
            ends.append(sampling(labels[part] if self.pipeline.transformer.config.num_classes else None,
                                 guidance_scale=self.plan.guidance_scale, latents=noise[part],
                                 output_type="latent").images.cpu())  # fmt: skip
        return torch.cat(ends)

    # --- The descent -------------------------------------------------------------------------------------------------

    def _descend(self, noise: Tensor, labels: Tensor | None, ends: Tensor) -> None:
        held = len(noise) // _HELD_OUT
        batch = self.plan.batch_size // self.accelerator.num_processes
        scale = self._reduce(ends.square().mean(), "mean").item()
        while True:
            if self.iteration % _EVERY == 0 or self.iteration == self.plan.iterations:
                self._keep_best(noise[:held], None if labels is None else labels[:held], ends[:held])
                self._save_state()
            self.report("fit", self.iteration, self.plan.iterations, self.distance)
            if self.iteration == self.plan.iterations:
                return
            order = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.iteration)
            chosen = held + torch.randperm(len(noise) - held, generator=order)[:batch].to(self.device)
            drawn = self._draw(self.table(), noise[chosen], None if labels is None else labels[chosen])
            self._step((drawn - ends[chosen]).square().mean() / scale)

    def _draw(self, table: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        return draw(self.pipeline.transformer, table, noise, labels, self.plan.guidance_scale)

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        """The sum or mean of all processes' values, float64 on the processor."""
        if self.accelerator.num_processes > 1:  # on the device that they exchange on, which may lack float64
            values = cast(Tensor, self.accelerator.reduce(values.float().to(self.accelerator.device), how))
        return values.cpu().double()

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            share = 0.5 + 0.5 * math.cos(math.pi * self.iteration / self.plan.iterations)
            group["lr"] = self.plan.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * share)
            for values in group["params"]:
                values.grad = self._reduce(values.grad, "mean")
                if not values.grad.isfinite().all():
                    raise self._diverged("a gradient is not finite")
        self.optimizer.step()
        self.iteration += 1

    @torch.no_grad()
    def _keep_best(self, noise: Tensor, labels: Tensor | None, ends: Tensor) -> None:
        table, size = self.table(), self.plan.batch_size
        errors = [self._draw(table, noise[i : i + size], None if labels is None else labels[i : i + size])
                  - ends[i : i + size] for i in range(0, len(noise), size)]  # fmt: skip
        sums = torch.stack([torch.cat(errors).square().sum(), ends.square().sum()])
        error, total = self._reduce(sums, "sum").tolist()
        distance = (error / total) ** 0.5
        if distance < self.distance:
            self.best, self.distance, self.best_iteration = table, distance, self.iteration
        if not distance < float("inf"):
            raise self._diverged("a solver draws numbers that are not finite")

    def _diverged(self, how: str) -> ValueError:
        """The error of a fit that cannot go on; its state is removed, from which it would diverge again."""
        file = self._state_file()
        if file is not None and self.accelerator.is_main_process:
            file.unlink(missing_ok=True)
        return ValueError(f"The fit diverged after {self.iteration} iterations: {how}. Take a learning rate below "
                          f"{self.plan.learning_rate}, or more steps.")  # fmt: skip

    # --- The state, to resume from -----------------------------------------------------------------------------------

    def _state_file(self) -> FilePath | None:
        return None if self.work is None else self.work / f"state-{self._fingerprint()}.safetensors"

    def _save_state(self) -> None:
        file = self._state_file()
        if file is None or not self.accelerator.is_main_process:
            return
        moments = {f"{index}.{key}": value for index, state in self.optimizer.state_dict()["state"].items()
                   for key, value in state.items()}  # fmt: skip
        numbers = torch.tensor([self.iteration, self.best_iteration, self.distance], dtype=torch.float64)
        _save({"deltas": self.deltas.detach(), "weights": self.weights.detach(), "best": self.best,
               "numbers": numbers, **moments}, file)  # fmt: skip

    def _resume(self) -> None:
        read = [_load(self._state_file()) if self.accelerator.is_main_process else None]
        [state] = broadcast_object_list(read)  # so that all processes resume from one state, or none does
        if state is None:
            return
        iteration, best_iteration, self.distance = state.pop("numbers").tolist()
        self.iteration, self.best_iteration, self.best = int(iteration), int(best_iteration), state.pop("best")
        with torch.no_grad():
            self.deltas.copy_(state.pop("deltas"))
            self.weights.copy_(state.pop("weights"))
        whole = self.optimizer.state_dict()
        for name, value in state.items():
            index, key = name.split(".")
            whole["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(whole)

    def _fingerprint(self, *fields: str) -> str:
        """Of what a file belongs to: the model, its noise levels, and these fields of the plan."""
        digest = hashlib.sha256(self._model_digest.encode())
        plan = asdict(self.plan)
        digest.update(json.dumps([plan[name] for name in fields or plan]).encode())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _model_digest(self) -> str:
        model = self.pipeline.transformer
        config = {name: getattr(model.config, name) for name in DiTConfig.__annotations__}
        settings = [self.path.settings, config]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _name(self) -> str:
        return "fitted timesteps" if self.plan.timesteps_only else "fitted"

    def _source(self) -> str:
        origin = self.pipeline.origin
        model = origin.source if origin else "a model"
        failed = "" if self.best_iteration else ", but no better than where it started"
        held = self.plan.trajectories // _HELD_OUT
        return (f"fitted to {model} at guidance {self.plan.guidance_scale:g}{failed}: relative distance "
                f"{self.distance:.3g} to 250 steps of the second order, on {held} noises held out")  # fmt: skip


def remove_state(work: str | os.PathLike) -> None:
    """Remove all trajectories and states that fits left in a folder, and the folder where it holds nothing else."""
    work = FilePath(work)
    if not work.is_dir():
        return
    for file in [*work.glob("state-*.safetensors"), *work.glob("trajectories-*.safetensors")]:
        file.unlink()
    if not any(work.iterdir()):
        work.rmdir()


def _check_shares(plan: Plan, processes: int) -> None:
    """Raise ValueError unless a batch divides among the processes, and each has trajectories to hold out and to use."""
    if plan.batch_size % processes:
        raise ValueError(f"batch_size {plan.batch_size} does not divide among {processes} processes.")
    least = 2 * _HELD_OUT * processes
    if plan.trajectories < least:
        raise ValueError(f"trajectories must be at least {least}, {2 * _HELD_OUT} for each of {processes} processes, "
                         f"not {plan.trajectories}.")  # fmt: skip


def _load(file: FilePath | None) -> dict[str, Tensor] | None:
    """The content of a file of the state; None where there is none, or one that is damaged and will be replaced."""
    if file is None or not file.is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError:
        return None


def _save(tensors: dict[str, Tensor], file: FilePath) -> None:
    """Replace a file of the state by a whole one."""
    with new_file(file, overwrite=True) as building:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, building)
