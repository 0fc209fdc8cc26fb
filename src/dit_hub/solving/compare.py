"""Solvers side by side: how near each comes to the exact trajectory, and how long it takes."""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..checks import real_number, whole_number
from ..files import new_file
from ..guidance import default_guidance
from ..pipeline_dit import DiTPipeline
from ..schedulers import TableScheduler, check_scheduler, is_flow_matching, switch_scheduler
from .trajectories import reference_scheduler, second_order_scheduler

# What is compared unless told otherwise, by name; of velocities, and of other predictions.
_FLOW_SOLVERS = ("flow-euler", "flow-heun", "searched-flow")
_SOLVERS = ("ddim", "dpm++", "unipc", "deis", "heun", "searched")

DEFAULT_STEPS = (5, 6, 8, 10, 15, 20, 30, 50)

# The distance of these steps of the first solver bounds what is recommended, where no bound is given.
_BOUND_STEPS = 50


@dataclass(frozen=True)
class Row:
    """One solver at one number of steps.

    Args:
        solver: its name.
        steps: as asked for.
        evaluations: of the model, for an image; guidance doubles them for all alike.
        distance: of the latents to those of the exact trajectory, relative to these (L2).
        psnr: of the images to the exact ones, in dB, at most 200; None for latents without a decoder.
        seconds: for an image, within a batch.
        score: of the metric, where a reference was given.
        low, high: its interval of 95 %.
    """

    solver: str
    steps: int
    evaluations: int
    distance: float
    psnr: float | None
    seconds: float
    score: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows by solver and steps.

    Args:
        rows: in the order of the solvers.
        model: what was sampled.
        guidance_scale, count, seed: how.
        metric: name of the rows' scores; empty without a reference.
        exact_score: the score of the exact trajectory.
        bound: the distance that recommendations keep by default; None where 50 steps of no solver were run.
    """

    rows: list[Row]
    model: str
    guidance_scale: float
    count: int
    seed: int
    metric: str = ""
    exact_score: float | None = None
    bound: float | None = None

    def recommend(self, distance: float | None = None, seconds: float | None = None) -> Row | None:
        """The fewest evaluations within a distance; or, within a time, the nearest; None where no solver is.

        Args:
            distance: at most; None means that of 50 steps of the first solver, unless there is a bound on the time.
            seconds: at most, for an image.

        Raises:
            ValueError: no bound at all.
        """
        if distance is None:
            if self.bound is None and seconds is None:
                raise ValueError(f"Compare {_BOUND_STEPS} steps too, or give the distance or the time to stay within.")
            distance = self.bound if seconds is None and self.bound is not None else math.inf
        rows = [row for row in self.rows if row.distance <= distance * (1 + 1e-9)]
        if seconds is None:
            return min(rows, key=lambda row: (row.evaluations, row.distance), default=None)
        return min((row for row in rows if row.seconds <= seconds), key=lambda row: row.distance, default=None)

    def frontier(self) -> list[Row]:
        """The rows that are nearer than all of as many evaluations or fewer."""
        best, nearest = [], math.inf
        for row in sorted(self.rows, key=lambda row: (row.evaluations, row.distance)):
            if row.distance < nearest:
                best.append(row)
                nearest = row.distance
        return best

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write all of it as JSON."""
        with new_file(path, overwrite) as building:
            building.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def default_solvers(pipeline: DiTPipeline, steps: Sequence[int] = DEFAULT_STEPS) -> dict[str, Any]:
    """Schedulers by name: those of diffusers that sample the model well, and what is published for its noise levels.

    Diffusers' take the spacing of the pipeline's timesteps; "second-order" has even ones from the very first, as the
    exact trajectory and the start of a fit.

    Args:
        pipeline: of the model.
        steps: numbers of steps of "second-order".
    """
    flow = is_flow_matching(pipeline.scheduler)
    solvers = {}
    for name in _FLOW_SOLVERS if flow else _SOLVERS:
        scheduler = switch_scheduler(pipeline.scheduler, name)
        if scheduler.config.get("clip_sample"):  # the exact trajectory does not clip
            scheduler = type(scheduler).from_config(scheduler.config, clip_sample=False)
        if name == "ddim" and scheduler.config.timestep_spacing == "linspace":
            # diffusers' DDIM then steps to other timesteps than it visits; this is DDIM at those that it visits.
            first_order = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
            scheduler = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, **first_order)
        try:
            check_scheduler(scheduler, pipeline.transformer.config, pipeline.scheduler, latent=False)
        except ValueError:  # published for other noise levels
            continue
        solvers[name] = scheduler
    return {**solvers, "second-order": second_order_scheduler(pipeline.scheduler, steps)}


def compare_solvers(
    pipeline: DiTPipeline,
    solvers: Mapping[str, Any] | None = None,
    steps: Sequence[int] = DEFAULT_STEPS,
    guidance_scale: float | None = None,
    count: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    reference: Any = None,
    extractor: Any = "inception",
    metric: str = "fid",
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> Comparison:
    """Sample the same noise with each solver, and with 250 steps of the second order, which counts as exact.

    Args:
        pipeline: of any runtime; its scheduler says what the noise levels are.
        solvers: schedulers by name; None for `default_solvers`. A `TableScheduler` takes the steps that it has.
        steps: numbers of steps.
        guidance_scale: None means the pipeline's default.
        count: images, of classes in turn.
        seed: of the noise.
        batch_size: images at a time.
        reference: real images for a metric, as `dit_hub.evaluation.evaluate` takes them; None for none.
        extractor, metric: of the score, likewise.
        report: called with what is sampled, how many runs are done, and all of them.

    Raises:
        ValueError: a solver that does not fit the model, or arguments that it cannot take.
    """
    count, batch_size = whole_number("count", count, 1), whole_number("batch_size", batch_size, 1)
    counts = sorted({whole_number("steps", each, 1) for each in steps})
    solvers = default_solvers(pipeline, counts) if solvers is None else solvers
    config = pipeline.transformer.config
    for scheduler in solvers.values():
        check_scheduler(scheduler, config, pipeline.scheduler, latent=False)
    if guidance_scale is None:
        guidance_scale = default_guidance(config)
    sampling = _Sampling(pipeline, real_number("guidance_scale", guidance_scale), count, seed, batch_size)
    runs = [(name, scheduler, number) for name, scheduler in solvers.items() for number in _steps(scheduler, counts)]
    if not runs:
        raise ValueError(f"No solver has a table of any of these steps: {', '.join(map(str, counts))}.")
    report("exact", 0, len(runs) + 1)
    exact, _, _ = sampling.run(reference_scheduler(pipeline.scheduler), None)
    pictures = sampling.images(exact)
    scores = _Scores(reference, extractor, metric)
    exact_score = scores(pictures)[0]
    rows = []
    for done, (name, scheduler, number) in enumerate(runs, start=1):
        report(f"{name}, {number} steps", done, len(runs) + 1)
        sampling.run(scheduler, number, warm_up=True)
        latents, seconds, evaluations = sampling.run(scheduler, number)
        distance = ((latents - exact).norm() / exact.norm()).item()
        drawn = sampling.images(latents)
        rows.append(Row(name, number, evaluations, distance, _psnr(drawn, pictures), seconds / count, *scores(drawn)))
    report("done", len(runs) + 1, len(runs) + 1)
    bound = next((row.distance for row in rows if row.steps == _BOUND_STEPS), None)
    source = pipeline.origin.source if pipeline.origin else str(pipeline.config.get("_name_or_path", ""))
    return Comparison(rows, source, guidance_scale, count, seed, scores.label, exact_score, bound)


def _steps(scheduler: Any, counts: list[int]) -> list[int]:
    """Those that a scheduler can take: of tables, the ones that there are."""
    if isinstance(scheduler, TableScheduler):
        return [number for number in scheduler.steps if number <= max(counts)]
    return [number for number in counts if number <= scheduler.config.num_train_timesteps]


class _Sampling:
    """Runs of a pipeline from one noise."""

    def __init__(self, pipeline: DiTPipeline, guidance_scale: float, count: int, seed: int, batch_size: int):
        config = pipeline.transformer.config
        self.pipeline = DiTPipeline(pipeline.transformer, pipeline.scheduler, pipeline.vae)
        self.pipeline.set_progress_bar_config(disable=True)
        self.guidance_scale, self.batch_size, self.seed = guidance_scale, batch_size, seed
        shape = (count, config.in_channels, *config.sample_height_width)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.labels = [index % config.num_classes for index in range(count)] if config.num_classes else None

    def run(self, scheduler: Any, steps: int | None, warm_up: bool = False) -> tuple[Tensor, float, int]:
        """Latents, seconds, and evaluations of the model; of the first batch alone to warm up."""
        self.pipeline.scheduler = copy.deepcopy(scheduler)
        latents, started = [], time.perf_counter()
        for start in range(0, 1 if warm_up else len(self.noise), self.batch_size):
            part = slice(start, start + self.batch_size)
            output = self.pipeline(
                None if self.labels is None else self.labels[part],
                guidance_scale=self.guidance_scale,
                num_inference_steps=steps,
                latents=self.noise[part],
                generator=torch.Generator().manual_seed(self.seed),
                output_type="latent",
            )
            latents.append(output.images.cpu())  # waits for a GPU
        return torch.cat(latents), time.perf_counter() - started, self.pipeline.num_timesteps

    def images(self, latents: Tensor) -> Tensor | None:
        """(N, C, H, W) in 0..1; None for latents without a decoder."""
        if self.pipeline.vae is None and not self.pipeline.transformer.config.draws_pixels:
            return None
        parts = latents.to(self.pipeline._execution_device).split(self.batch_size)
        return torch.cat([self.pipeline.decode(part, "pt").cpu() for part in parts])


class _Scores:
    """Scores of images against a reference."""

    def __init__(self, reference: Any, extractor: Any, metric: str):
        self.reference, self.extractor, self.metric, self.label = reference, extractor, metric, ""

    def __call__(self, images: Tensor | None) -> tuple[float | None, float | None, float | None]:
        """Value and interval; nothing without a reference."""
        if self.reference is None:
            return None, None, None
        if images is None:
            raise ValueError("This model draws latents and has no decoder, so that no metric can see images of it.")
        from ..evaluation import evaluate

        arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        arrays = arrays.repeat(3, axis=3) if arrays.shape[3] == 1 else arrays
        result = evaluate(arrays, self.reference, metrics=[self.metric], extractor=self.extractor)[self.metric]
        self.label = result.metric
        return result.value, result.low, result.high


def _psnr(images: Tensor | None, exact: Tensor | None) -> float | None:
    if images is None or exact is None:
        return None
    return -10 * math.log10(max((images - exact).square().mean().item(), 1e-20))


def plot_comparison(comparison: Comparison, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Draw the distance by evaluations, a line for each solver, and the recommended row."""
    from .plot import plot_lines

    lines = {}
    for row in comparison.rows:
        lines.setdefault(row.solver, []).append((row.evaluations, row.distance))
    best = None if comparison.bound is None else comparison.recommend()
    marked = None if best is None else (best.evaluations, best.distance)
    title = f"{Path(comparison.model).name or 'Solvers'}, guidance {comparison.guidance_scale:g}"
    plot_lines(lines, path, title, "evaluations of the model", "relative distance to the exact latents", marked,
               overwrite)  # fmt: skip
