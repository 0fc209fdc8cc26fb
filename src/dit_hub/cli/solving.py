"""`dit-hub solver …`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries, require
from ..sharing import Worker
from .common import Model, Overwrite, check_device, check_new_file, make_table, own_device, phase_bar

solver_app = typer.Typer(
    help="Fit solvers to a model, look at them, and compare them.", no_args_is_help=True, rich_markup_mode=None
)

Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: 4 where possible, else 1.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps, for models in PyTorch.")]


@solver_app.command("fit")
def fit_command(
    model: Model,
    steps: Annotated[int, typer.Option(help="Steps of the solver, each an evaluation of the model.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; --scheduler of other commands takes it.")],
    guidance: Guidance = None,
    timesteps_only: Annotated[
        bool, typer.Option("--timesteps-only", help="Keep the weights of DPM-Solver++ 2M; cheaper and safer.")
    ] = False,
    trajectories: Annotated[int, typer.Option(help="Exact trajectories; a fourth is held out.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Trajectories in an iteration.")] = 32,
    iterations: Annotated[int, typer.Option(help="Iterations of gradient descent.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of noise, classes and order.")] = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Search the timesteps and weights with which few steps end where 250 do, by gradient descent.

    A run that was stopped resumes with the same command. Several GPUs share the batches: accelerate launch --multi_gpu
    -m dit_hub.cli solver fit …
    """
    _check_json(out, overwrite)
    quiet_libraries()
    require("accelerate", "train")
    from ..files import new_file
    from ..pipeline_dit import DiTPipeline
    from ..solving import fit_solver
    from ..solving.fit import remove_state

    worker = Worker.from_environment()
    device = own_device(device, worker)
    check_device(device)
    pipeline = DiTPipeline.from_pretrained(model).to(device)
    work = out.with_name(f"{out.name}.part")

    def stopped(done: int, total: int | None) -> str:
        return "Stopped; the same command resumes." if work.is_dir() else "Stopped."

    with phase_bar(worker, stopped) as (_, show):

        def report(phase: str, done: int, total: int, distance: float | None) -> None:
            show(phase, done, total, "" if distance is None or distance == math.inf else f"distance {distance:.4f}")

        solver = fit_solver(pipeline, steps, guidance, timesteps_only, trajectories, batch_size, iterations,
                            learning_rate, seed, work, report)  # fmt: skip
    if worker.index == 0:
        with new_file(out, overwrite) as path:
            solver.to_json_file(path)
        remove_state(work)
        print(f"{out}: {solver.config.source}")
        print(f"dit-hub generate {model} --scheduler {out} --steps {steps}")


@solver_app.command("show")
def show_command(
    solvers: Annotated[
        list[str], typer.Argument(help="Files, published solvers (searched, searched-flow), or schedulers (dpm++, …).")
    ],
    steps: Annotated[int | None, typer.Option(help="Steps; default: the most that a table has, or 10.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also draw them side by side, into this image.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print the tables of solvers, and draw them."""
    from .sampling import check_image_path

    if out is not None:
        check_image_path(out, overwrite)
    quiet_libraries()
    import diffusers

    from ..schedulers import TableScheduler, switch_scheduler
    from ..solvers import solver_table

    own = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="linspace")
    tables = {}
    for name in solvers:
        scheduler = switch_scheduler(own, name)
        is_table = isinstance(scheduler, TableScheduler)
        count = steps if steps is not None else max(scheduler.steps) if is_table else 10
        title = f"{Path(name).stem}, {count} steps"
        tables[title] = solver_table(scheduler, count)
        _print_solver(title, tables[title], scheduler.config.source if is_table else "")
    if out is not None:
        from ..solving.plot import plot_tables

        plot_tables(tables, out, overwrite)
        print(f"The tables are drawn in {out}")


@solver_app.command("compare")
def compare_command(
    model: Model,
    solvers: Annotated[
        list[str] | None, typer.Argument(help="As for show, besides; default: what fits the model.")
    ] = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas.")] = "5,6,8,10,15,20,30,50",
    guidance: Guidance = None,
    num: Annotated[int, typer.Option(help="Images.")] = 64,
    within: Annotated[
        float | None, typer.Option(help="Recommend the fewest steps within this distance; default: DDIM's of 50.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Recommend the nearest within this time for an image, instead.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Real images for a metric, as of evaluate.")] = None,
    extractor: Annotated[str, typer.Option(help="Network of the metric: inception, shapes, digits, …")] = "inception",
    metric: Annotated[str, typer.Option(help="fid, kid, …")] = "fid",
    out: Annotated[Path | None, typer.Option(help="Folder for frontier.png and comparison.json.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: one per core.")] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare solvers on a model: distance to 250 steps of the same noise, images, time; recommend one."""
    counts = _numbers(steps)
    if within is not None and seconds is not None:
        raise ValueError("Give --within or --seconds, not both.")
    for option, bound in (("--within", within), ("--seconds", seconds)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{option} must be above 0, not {bound}.")
    if out is not None:
        for name in ("comparison.json", "frontier.png"):
            if (out / name).exists() and not overwrite:
                raise ValueError(f"{out / name} exists; choose another folder or pass --overwrite.")
    quiet_libraries()
    from ..schedulers import switch_scheduler
    from ..solving import compare_solvers, default_solvers, plot_comparison
    from .sampling import load_pipeline

    pipeline = load_pipeline(model, None, threads, device)
    chosen = default_solvers(pipeline, counts)
    for name in solvers or []:
        title = name if Path(name).stem in chosen else Path(name).stem
        chosen[title] = switch_scheduler(pipeline.scheduler, name)
    with phase_bar(Worker.from_environment(), lambda *_: "Stopped; nothing was written.") as (_, report):
        comparison = compare_solvers(pipeline, chosen, counts, guidance, num, seed, reference=reference,
                                     extractor=extractor, metric=metric, report=report)  # fmt: skip
    _print_comparison(comparison)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        comparison.save(out / "comparison.json", overwrite)
        plot_comparison(comparison, out / "frontier.png", overwrite)
    if within is None and seconds is None and comparison.bound is None:
        print("To recommend one, compare 50 steps too, or give --within or --seconds.")
        return
    _print_recommended(model, comparison, comparison.recommend(within, seconds), solvers or [])


def _check_json(out: Path, overwrite: bool) -> None:
    if out.suffix != ".json":
        raise ValueError(f"--out must end in .json, not {out}.")
    check_new_file(out, overwrite, "a JSON file")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--steps must be whole numbers from 1 on, with commas, not {text!r}.")
    return [int(part) for part in parts]


def _print_solver(title: str, table: Any, source: str) -> None:
    from rich.console import Console

    from ..solving.plot import relative_weights

    shown = make_table(title, "step", "timestep", "sample", "weights of the estimates, the latest first")
    for index, (row, weights) in enumerate(zip(table, relative_weights(table), strict=True)):
        listed = "  ".join(f"{weight:+.3f}" for weight in weights[index::-1])
        shown.add_row(str(index + 1), f"{row[0]:.1f}", f"{row[4]:.4f}", listed)
    Console().print(shown)
    if source:
        print(source)


def _print_comparison(comparison: Any) -> None:
    from rich.console import Console

    metric = [comparison.metric] if comparison.metric else []
    table = make_table(f"{comparison.model}, guidance {comparison.guidance_scale:g}, {comparison.count} images",
                       "solver", "steps", "evaluations", "distance", "PSNR", "ms an image", *metric)  # fmt: skip
    for row in comparison.rows:
        psnr = "" if row.psnr is None else f"{row.psnr:.1f}"
        score = [] if row.score is None else [f"{row.score:.3g}"]
        table.add_row(row.solver, str(row.steps), str(row.evaluations), f"{row.distance:.4f}", psnr,
                      f"{row.seconds * 1e3:.1f}", *score)  # fmt: skip
    Console().print(table)
    if comparison.exact_score is not None:
        print(f"{comparison.metric} of the exact trajectory: {comparison.exact_score:.3g}")


def _print_recommended(model: str, comparison: Any, row: Any, files: list[str]) -> None:
    if row is None:
        print("No solver is within these bounds; allow more.")
        return
    print(f"{row.solver} with {row.steps} steps: distance {row.distance:.4f}, {row.seconds * 1e3:.1f} ms an image.")
    if row.solver == "second-order":
        choice = f"dit_hub.solving.second_order_scheduler(pipe.scheduler, [{row.steps}])"
    else:
        name = next((name for name in files if row.solver in (name, Path(name).stem)), row.solver)
        print(f"dit-hub generate {model} --scheduler {name} --steps {row.steps} "
              f"--guidance {comparison.guidance_scale:g}")  # fmt: skip
        choice = f"dit_hub.schedulers.switch_scheduler(pipe.scheduler, {name!r})"
    print(f"In Python: pipe.scheduler = {choice}; pipe(labels, num_inference_steps={row.steps})")
