"""Fitting solvers to a model, comparing them, and the commands that do."""

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dit_hub import DiTPipeline, TableScheduler
from dit_hub.export import export_onnx
from dit_hub.schedulers import switch_scheduler
from dit_hub.solvers import solver_table
from dit_hub.solving import Comparison, Row, compare_solvers, fit_solver, plot_tables, reference_scheduler
from dit_hub.solving.fit import remove_state
from dit_hub.solving.plot import relative_weights

from .command_line import Command, dit_hub
from .conftest import MakePipeline
from .together import PROCESSES, Together

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

QUICK: dict[str, Any] = {"trajectories": 16, "batch_size": 4, "iterations": 20}


@pytest.fixture(scope="module")
def toy() -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiTPipeline, scheduler: Any, steps: int | None = None, **options: Any) -> torch.Tensor:
    """Latents of 12 other noises than a fit sees."""
    pipe = DiTPipeline(pipeline.transformer, pipeline.scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    count = pipeline.transformer.config.num_classes
    generator = torch.Generator().manual_seed(99)
    return pipe([index % count for index in range(12)], num_inference_steps=steps, generator=generator,
                output_type="latent", **options).images  # fmt: skip


def distance(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()


# --- Fitting ---------------------------------------------------------------------------------------------------------


def test_a_fit_comes_nearer_on_noise_that_it_has_not_seen(toy: DiTPipeline) -> None:
    exact = draw(toy, reference_scheduler(toy.scheduler))
    seen = []
    solver = fit_solver(toy, 4, **QUICK, report=lambda *what: seen.append(what))
    start = reference_scheduler(toy.scheduler, 4)
    fitted, plain = (distance(draw(toy, each), exact) for each in (solver, start))
    assert fitted < 0.9 * plain
    assert ({what[0] for what in seen}, seen[-1][1:3]) == ({"trajectories", "fit"}, (20, 20))
    assert (solver.steps, solver.config.source.startswith("fitted to dit-toy-shapes at guidance 1:")) == ([4], True)
    assert all(parameter.requires_grad for parameter in toy.transformer.parameters())


def test_the_timesteps_can_be_fitted_alone(toy: DiTPipeline) -> None:
    solver = fit_solver(toy, 4, timesteps_only=True, **QUICK)
    weights = relative_weights(solver.table)
    assert not weights[2:, 0].any() and not weights[3, 1]  # noqa: PT018, the second order has one estimate before
    start = reference_scheduler(toy.scheduler, 4)
    assert (solver.table[0, 0], solver.config.name) == (start.table[0, 0], "fitted timesteps")
    assert np.abs(solver.table[1:, 0] - start.table[1:, 0]).max() > 1


@pytest.mark.parametrize("parameterization", ["flow", "sit"])
def test_velocities_and_guidance_can_be_fitted(make_pipeline: MakePipeline, parameterization: str) -> None:
    pipeline = make_pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), parameterization=parameterization, learn_sigma=False
    )
    quick = {**QUICK, "iterations": 10}
    solver = fit_solver(pipeline, 3, guidance_scale=2.0, **quick)
    exact = draw(pipeline, reference_scheduler(pipeline.scheduler), guidance_scale=2.0)
    start = reference_scheduler(pipeline.scheduler, 3)
    fitted, plain = (distance(draw(pipeline, each, guidance_scale=2.0), exact) for each in (solver, start))
    assert fitted < plain


class StoppedError(Exception):
    """Raised in a report, as Ctrl-C would be."""


def test_a_fit_resumes_where_it_was(toy: DiTPipeline, tmp_path: Path) -> None:
    whole = fit_solver(toy, 3, **QUICK)

    def stop(phase: str, done: int, total: int, best: float | None) -> None:
        if phase == "fit" and done == 15:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit_solver(toy, 3, **QUICK, work=tmp_path, report=stop)
    phases = []
    resumed = fit_solver(toy, 3, **QUICK, work=tmp_path, report=lambda *what: phases.append(what[:2]))
    assert phases[0] == ("fit", 10)  # trajectories are kept, and the state of every tenth iteration
    np.testing.assert_array_equal(resumed.table, whole.table)


@pytest.mark.parametrize("damaged", ["state", "trajectories"])
def test_a_file_that_was_cut_off_is_made_anew(toy: DiTPipeline, tmp_path: Path, damaged: str) -> None:
    whole = fit_solver(toy, 3, **QUICK, work=tmp_path)
    [file] = tmp_path.glob(f"{damaged}-*")
    file.write_bytes(file.read_bytes()[:-100])
    phases = []
    again = fit_solver(toy, 3, **QUICK, work=tmp_path, report=lambda *what: phases.append(what[:2]))
    assert phases[0] == {"state": ("fit", 0), "trajectories": ("trajectories", 0)}[damaged]
    np.testing.assert_array_equal(again.table, whole.table)


def test_the_state_stays_until_it_is_removed(toy: DiTPipeline, tmp_path: Path) -> None:
    first = fit_solver(toy, 3, **QUICK, work=tmp_path)
    fit_solver(toy, 4, **QUICK, work=tmp_path)
    phases = []
    again = fit_solver(toy, 3, **QUICK, work=tmp_path, report=lambda *what: phases.append(what[:2]))
    assert phases == [("fit", 20)]
    np.testing.assert_array_equal(again.table, first.table)
    (tmp_path / "notes.txt").touch()
    remove_state(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_fit_says_where_it_comes_no_nearer(toy: DiTPipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "learning_rate": 1e6}
    solver = fit_solver(toy, 3, **options)
    assert ", but no better than where it started: relative distance" in solver.config.source
    np.testing.assert_array_equal(solver.table[:, 0], reference_scheduler(toy.scheduler, 3).table[:, 0])
    with pytest.raises(ValueError, match="The fit diverged after"):
        fit_solver(toy, 3, **{**QUICK, "learning_rate": 1e40}, work=tmp_path)
    assert [file.name.split("-")[0] for file in tmp_path.iterdir()] == ["trajectories"]


def test_another_model_or_plan_does_not_resume(toy: DiTPipeline, make_pipeline: MakePipeline, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int, best: float | None) -> None:
        if phase == "fit" and done == 5:
            raise StoppedError

    other = make_pipeline(num_classes=4)
    for pipeline, steps, guided in ((toy, 3, None), (toy, 4, None), (other, 3, None), (other, 3, 1)):
        pipeline.transformer.config.guidance_channels = guided
        with pytest.raises(StoppedError):  # and so begins at 0
            fit_solver(pipeline, steps, **QUICK, work=tmp_path, report=stop)
    assert len(list(tmp_path.glob("state-*"))) == 4
    assert len(list(tmp_path.glob("trajectories-*"))) == 3  # which do not depend on the steps


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 1}, "steps must"),
        ({"steps": 65}, "steps must"),
        ({"trajectories": 3}, "trajectories must"),
        ({"iterations": 0}, "iterations must"),
        ({"guidance_scale": 2.0}, "guidance 2.0 needs a null class"),
        ({"learning_rate": 1e40}, "The fit diverged after"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(toy: DiTPipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_solver(toy, **{"steps": 3, **QUICK, **options})


def test_a_model_that_draws_no_numbers_is_not_fitted(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.transformer.final_layer.linear.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="The model's own trajectories of 250 steps hold numbers that are not finite"):
        fit_solver(pipeline, 3, **QUICK, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def fit_in_one_of_two(folder: Path, options: dict[str, Any]) -> None:
    """Fit the toy, with trajectories that one process cannot use where `broken`."""
    torch.set_num_threads(1)
    rank, broken = os.environ["RANK"], options.pop("broken", False)
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    seen = []
    if broken and rank == "1":
        [file] = folder.glob("trajectories-*-1-of-2.safetensors")
        save_file({"ends": torch.full_like(load_file(file)["ends"], math.nan)}, file)
    solver = fit_solver(pipeline, 3, **{**QUICK, **options}, work=folder, report=lambda *what: seen.append(what))
    torch.save((torch.tensor(solver.table), seen), folder / f"result-{rank}.pt")


def fit_together(folder: Path, **options: Any) -> list[tuple[int, str]]:
    running = Together(fit_in_one_of_two, folder, options)
    return [running.wait(rank, timeout=250) for rank in range(PROCESSES)]


def test_two_processes_fit_one_solver(toy: DiTPipeline, tmp_path: Path) -> None:
    """They resume from the state of the first, and raise together."""
    results = []
    for _ in range(2):
        assert [status for status, _ in fit_together(tmp_path)] == [0, 0]
        results += [torch.load(tmp_path / f"result-{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
        for state in tmp_path.glob("state-*"):
            state.write_bytes(state.read_bytes()[:-100])
    tables, seen = [table for table, _ in results], [reports for _, reports in results]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert all(reports[-1] == seen[0][-1] for reports in seen)
    assert seen[0][-1][3] < 0.8 * next(best for phase, *_, best in seen[0] if phase == "fit")
    assert len(list(tmp_path.glob("trajectories-*-of-2.safetensors"))) == PROCESSES
    refused = [({"trajectories": 8}, "trajectories must be at least 16, 8 for each of 2 processes, not 8"),
               ({"broken": True}, "trajectories of 250 steps hold numbers that are not finite")]  # fmt: skip
    for options, words in refused:
        for status, said in fit_together(tmp_path, **options):
            assert (status, words in said.splitlines()[-1]) == (2, True), said


def test_other_runtimes_have_no_gradients(toy: DiTPipeline, tmp_path: Path) -> None:
    export_onnx(toy, tmp_path / "onnx")
    with pytest.raises(ValueError, match="Fitting needs gradients, and ORTDiTTransformer has none"):
        fit_solver(DiTPipeline.from_pretrained(tmp_path / "onnx"), 4)


GENERATE = ("generate", "dit-toy-shapes")
FIT = ("solver", "fit", "dit-toy-shapes", "--steps", 3, "--out", "solver.json", "--trajectories", 16, "--batch-size", 4)


def test_the_command_fits_and_other_commands_take_the_file(tmp_path: Path) -> None:
    run = dit_hub(*FIT, "--iterations", 10, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "dit-hub generate dit-toy-shapes --scheduler solver.json --steps 3" in run.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["solver.json"]
    run = dit_hub("generate", "dit-toy-shapes", "red-circle", "--scheduler", "solver.json", cwd=tmp_path)
    assert (run.returncode, (tmp_path / "grid.png").is_file()) == (0, True), run.stderr
    run = dit_hub(
        "generate", "dit-toy-shapes", "--scheduler", "solver.json", "--steps", 50, "--out", "x.png", cwd=tmp_path
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "The solver 'fitted' has tables of 3 steps, not of 50" in run.stderr
    run = dit_hub("solver", "show", "solver.json", "unipc", "--out", "show.png", cwd=tmp_path)
    assert (run.returncode, run.stdout.count("fitted to dit-toy-shapes")) == (0, 1), run.stderr
    assert Image.open(tmp_path / "show.png").size[0] > 500
    run = dit_hub(*FIT, cwd=tmp_path)
    assert (run.returncode, "solver.json exists" in run.stderr) == (2, True)


def test_a_fit_that_is_killed_goes_on_to_the_same_file(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert dit_hub(*FIT, "--iterations", 40, cwd=folders[0]).returncode == 0
    command = Command(*FIT, "--iterations", 40, cwd=folders[1])
    while command.running() and not list(folders[1].rglob("state-*")):
        time.sleep(0.01)
    command.send_signal(signal.SIGKILL)
    assert command.wait().returncode != 0
    assert not (folders[1] / "solver.json").exists()
    assert dit_hub(*FIT, "--iterations", 40, cwd=folders[1]).returncode == 0
    first, second = ((folder / "solver.json").read_bytes() for folder in folders)
    assert first == second


def test_a_result_that_cannot_be_written_is_not_lost(tmp_path: Path) -> None:
    command = Command(*FIT, "--iterations", 20, cwd=tmp_path)
    while command.running() and not list(tmp_path.rglob("state-*")):
        time.sleep(0.01)
    (tmp_path / "solver.json").touch()  # a name that is taken meanwhile
    run = command.wait()
    assert (run.returncode, "solver.json exists" in run.stderr) == (2, True), run.stderr
    assert list(tmp_path.glob("solver.json.part/state-*"))
    (tmp_path / "solver.json").unlink()
    run = dit_hub(*FIT, "--iterations", 20, cwd=tmp_path)
    assert (run.returncode, [each.name for each in tmp_path.iterdir()]) == (0, ["solver.json"]), run.stderr


# --- Comparing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(toy: DiTPipeline) -> Comparison:
    # From the first timestep on, as the exact trajectory; the toy's own spacing starts at a later one.
    config = {**toy.scheduler.config, "timestep_spacing": "linspace"}
    solvers = {name: switch_scheduler(SimpleNamespace(config=config), name) for name in ("ddim", "dpm++", "heun")}
    return compare_solvers(toy, solvers, [5, 20, 50], count=16, reference="shapes", extractor="shapes")


def test_more_steps_come_nearer_to_the_exact_trajectory(comparison: Comparison) -> None:
    for solver in ("ddim", "dpm++", "heun"):
        rows = [row for row in comparison.rows if row.solver == solver]
        assert [row.steps for row in rows] == [5, 20, 50]
        assert rows[0].distance > rows[1].distance > rows[2].distance
        psnr = [row.psnr or 0 for row in rows]
        assert psnr == sorted(psnr)
        assert all(row.score is not None for row in rows)
        assert [row.evaluations for row in rows] == ([9, 39, 99] if solver == "heun" else [5, 20, 50])
    few = {row.solver: row.distance for row in comparison.rows if row.steps == 5}
    assert few["dpm++"] < 0.5 * few["ddim"]  # the second order against the first
    assert comparison.metric == "FD-shapes"


def test_a_comparison_recommends(comparison: Comparison) -> None:
    best = comparison.recommend()
    ddim = next(row for row in comparison.rows if (row.solver, row.steps) == ("ddim", 50))
    assert best is not None
    assert (best.evaluations <= 50, best.distance <= ddim.distance) == (True, True)
    assert comparison.recommend(distance=0.0) is None
    within = comparison.recommend(seconds=math.inf)
    assert within is not None
    assert within.distance == min(row.distance for row in comparison.rows)
    frontier = comparison.frontier()
    assert [row.evaluations for row in frontier] == sorted({row.evaluations for row in frontier})
    assert all(earlier.distance > later.distance for earlier, later in itertools.pairwise(frontier))


def test_recommendations_follow_from_the_rows() -> None:
    def row(solver: str, evaluations: int, far: float, seconds: float) -> Row:
        return Row(solver, evaluations, evaluations, far, None, seconds)

    rows = [row("a", 50, 0.1, 5), row("b", 8, 0.1, 1), row("b", 6, 0.2, 0.5), row("c", 9, 0.01, 2)]
    comparison = Comparison(rows, "model", 1.0, 4, 0, bound=0.1)
    assert comparison.recommend() == rows[1]
    assert comparison.recommend(distance=0.05) == rows[3]
    assert comparison.recommend(seconds=1.5) == rows[1]
    assert comparison.recommend(distance=0.05, seconds=1.5) is None
    assert comparison.frontier() == [rows[2], rows[1], rows[3]]


def test_the_command_compares_draws_and_recommends(tmp_path: Path) -> None:
    command = ("solver", "compare", "dit-toy-shapes", "--steps", "5,50", "--num", 4, "--out", "report")
    run = dit_hub(*command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "In Python: pipe.scheduler = dit_hub." in run.stdout
    noted = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert {row["solver"] for row in noted["rows"]} == {"ddim", "dpm++", "unipc", "deis", "heun", "second-order"}
    assert Image.open(tmp_path / "report" / "frontier.png").size[0] > 500
    run = dit_hub(*command, cwd=tmp_path)
    assert (run.returncode, "comparison.json exists" in run.stderr) == (2, True)
    for arguments, words in ((("--steps", "5,x"), "--steps must be whole numbers from 1 on"),
                             (("--num", 0), "count must"),
                             (("--seconds", 0), "--seconds must be above 0"),
                             (("--seconds", 1, "--within", 1), "not both"),
                             (("searched",), "has other noise levels than this model")):  # fmt: skip
        run = dit_hub("solver", "compare", "dit-toy-shapes", *arguments, cwd=tmp_path)
        assert (run.returncode, run.stderr.count("\n"), words in run.stderr) == (2, 1, True), run.stderr


def test_latents_without_a_decoder_have_distances_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    solvers = {"searched": TableScheduler.from_name("searched")}
    rows = compare_solvers(pipeline, solvers, [8], count=2).rows
    assert [(row.steps, row.psnr, row.score) for row in rows] == [(steps, None, None) for steps in (5, 6, 7, 8)]
    with pytest.raises(ValueError, match="draws latents and has no decoder"):
        compare_solvers(pipeline, solvers, [8], count=2, reference="shapes", extractor="shapes")
    with pytest.raises(ValueError, match="No solver has a table of any of these steps: 3"):
        compare_solvers(pipeline, solvers, [3], count=2)


def test_an_export_is_compared_as_the_model_is(toy: DiTPipeline, tmp_path: Path) -> None:
    export_onnx(toy, tmp_path / "onnx", parts=["sampler"])
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    solvers = {"unipc": switch_scheduler(toy.scheduler, "unipc")}
    ours, theirs = (compare_solvers(each, solvers, [6], count=3).rows[0] for each in (toy, exported))
    assert theirs.distance == pytest.approx(ours.distance, rel=1e-3)


def test_weights_of_a_table_are_relative_to_their_sum(tmp_path: Path) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero")
    np.testing.assert_allclose(np.nan_to_num(relative_weights(solver_table(scheduler, 4))), np.eye(4), atol=1e-6)
    plot_tables({"first order": solver_table(scheduler, 4)}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png exists"):
        plot_tables({"first order": solver_table(scheduler, 4)}, tmp_path / "x.png")
