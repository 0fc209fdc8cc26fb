"""The scaling study: its claims on numbers made for them, its plans, and a small study with real training."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_hub import DiTPipeline
from dit_hub.evaluation.study import paper_study, run_study
from dit_hub.evaluation.study_cells import StoppedError, Tools, claimed
from dit_hub.evaluation.study_claims import (
    NOT_ENOUGH,
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    Cell,
    Score,
    correlation,
    judge,
)
from dit_hub.evaluation.study_plan import Plan, read_plan
from dit_hub.evaluation.study_plot import paper_cells, plot_gmacs, plot_steps
from dit_hub.paper import paper_correlations, paper_sizes

from .command_line import dit_hub
from .conftest import SMALL_MODEL

# --- The paper -------------------------------------------------------------------------------------------------------


def test_the_papers_figure_has_its_correlation() -> None:
    """Figure 8: -0.93."""
    assert round(correlation(paper_cells()), 2) == paper_correlations()["fid"] == -0.93
    assert abs(correlation(paper_cells(), lambda cell: cell.parameters)) < 0.5


def test_the_papers_own_numbers_support_its_claims() -> None:
    study = paper_study()
    assert [claim.verdict for claim in study.claims()] == [SUPPORTED] * 3
    assert {record["name"] for record in study.records} == {model.model for model in paper_sizes()}


def test_the_command_line_redraws_the_papers_figures(tmp_path: Path) -> None:
    run = dit_hub("study", "paper", "--out", "paper", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("SUPPORTED") == 3
    page = (tmp_path / "paper" / "study.md").read_text()
    assert "| DiT-XL/2 | 675,000,000 | 118.6 |" in page
    docs = Path(__file__).parents[1] / "docs"
    assert page == (docs / "studies" / "paper" / "study.md").read_text()
    claims = [line for line in page.splitlines() if "**" in line]
    assert len(claims) == 3
    assert all(claim in (docs / "scaling.md").read_text() for claim in claims)
    for name in ("fid-gmacs.png", "fid-parameters.png"):
        assert f"({name})" in page
        image = Image.open(tmp_path / "paper" / name).convert("RGB")
        assert image.width > 600
        assert len(image.getcolors(1 << 20) or ()) > 100  # not an empty page
    facts = json.loads((tmp_path / "paper" / "study.json").read_text())
    assert facts["version"] == 1
    assert round(facts["correlations"]["gmacs"], 2) == -0.93


# --- The claims ------------------------------------------------------------------------------------------------------


def grid(fid: Callable[[float, int], float], width: float = 0.5, **fields: Any) -> list[Cell]:
    """Sizes of 1, 4 and 16 parameters with two patches; half the patch takes four times the multiply-accumulates."""
    cells = []
    for size, parameters in (("S", 1.0), ("M", 4.0), ("L", 16.0)):
        for patch in (4, 2):
            gmacs = parameters * (4 if patch == 2 else 1)
            value = fid(parameters, patch)
            score = Score(100, value, value - width, value + width)
            cells.append(Cell(f"{size}/{patch}", size, patch, parameters, gmacs, (score,), **fields))
    return cells


def by_gmacs(parameters: float, patch: int) -> float:
    return 100 - 20 * np.log10(parameters * (4 if patch == 2 else 1))


def verdicts(cells: list[Cell], **options: Any) -> list[str]:
    return [claim.verdict for claim in judge(cells, **options)]


def test_scores_that_fall_with_gmacs_support_all_claims() -> None:
    assert verdicts(grid(by_gmacs)) == [SUPPORTED] * 3
    assert "In 4 of 4 pairs of neighbours" in judge(grid(by_gmacs))[0].reason


def test_scores_that_fall_with_parameters_alone_support_only_the_first() -> None:
    claims = judge(grid(lambda parameters, patch: 100 - 20 * np.log10(parameters)))
    assert [claim.verdict for claim in claims] == [SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED]
    assert "do not differ clearly" in claims[1].reason
    assert "-1.00 with that of the parameters" in claims[2].reason


def test_a_difference_within_the_intervals_is_none() -> None:
    assert verdicts(grid(by_gmacs, width=30)) == [NOT_SUPPORTED] * 3


def test_one_clear_step_backwards_refutes_a_claim() -> None:
    def fid(parameters: float, patch: int) -> float:
        return by_gmacs(parameters, patch) + (30 if (parameters, patch) == (4, 2) else 0)

    claims = judge(grid(fid))
    assert claims[0].verdict == NOT_SUPPORTED
    assert "of M/2" in claims[0].reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"losses": tuple(np.geomspace(1, 0.1, 50))}, "The loss of 6 of 6 models was still falling (S/4 among them)."),
        ({"warning": "Too few steps."}, "Too few steps."),
    ],
)
def test_claims_that_short_training_may_hide_are_left_open(fields: dict[str, Any], words: str) -> None:
    claims = judge(grid(lambda parameters, patch: 50 + parameters, **fields))
    assert {claim.verdict for claim in claims} == {NOT_ENOUGH}
    assert all(claim.reason.endswith(words) for claim in claims)
    # What shows although training was short has shown.
    assert verdicts(grid(by_gmacs, **fields)) == [SUPPORTED] * 3


def test_models_that_are_hardly_better_than_noise_tell_nothing() -> None:
    claims = judge(grid(by_gmacs), untrained=120.0)
    assert {claim.verdict for claim in claims} == {NOT_ENOUGH}
    assert "more than half of the untrained model's 120" in claims[0].reason
    assert verdicts(grid(by_gmacs), untrained=500.0) == [SUPPORTED] * 3


def test_a_study_without_pairs_says_so() -> None:
    claims = judge([cell for cell in grid(by_gmacs) if cell.size == "S"])
    assert [claim.verdict for claim in claims] == [NOT_TESTED, SUPPORTED, NOT_TESTED]
    assert "no two models that differ only in this" in claims[0].reason
    assert "at least two sizes" in claims[2].reason


def test_settled_losses_are_not_short_training() -> None:
    settled = tuple(0.1 + 0.9 * np.exp(-np.arange(50) / 3))
    assert verdicts(grid(lambda parameters, patch: 50.0 + patch, losses=settled))[0] == NOT_SUPPORTED


def test_figures_are_drawn_for_any_number_of_cells(tmp_path: Path) -> None:
    scores = tuple(Score(step, 100 / step, 90 / step, 110 / step) for step in (10, 20, 30))
    cells = [Cell("a/2", "a", 2, 1.0, 1.0, scores)]
    plot_steps(cells, tmp_path / "steps.png")
    plot_gmacs(cells, tmp_path / "gmacs.png")
    assert Image.open(tmp_path / "steps.png").width > 300


# --- Plans -----------------------------------------------------------------------------------------------------------

SMALL_SIZES = {"S": {"hidden_size": 16}, "M": {"hidden_size": 32}}
PLAN: dict[str, Any] = {
    "title": "A small study",
    "recipe": "toy",
    "settings": {"model": SMALL_MODEL, "images_per_class": 4, "batch_size": 32, "epochs": 4, "ema_decay": 0.9},
    "sizes": SMALL_SIZES,
    "patches": [8, 4],
    "every": 4,
    "samples": 40,
    "sampling": {"steps": 2},
}


def test_a_plan_names_its_cells() -> None:
    cells = Plan(**PLAN).cells()
    assert [cell.name for cell in cells] == ["S/8", "S/4", "M/8", "M/4"]
    last = cells[-1].recipe
    assert last is not None
    assert (last.config.patch_size, last.config.hidden_size, last.config.num_attention_heads) == (4, 32, 2)
    assert (last.epochs, last.save_every, last.tracker) == (4, 4, "none")
    paper = Plan(recipe="imagenet-256", sizes=["DiT-S", "DiT-B/2"], patches=[8, 4], reference="x.npz").cells()
    assert [cell.name for cell in paper] == ["DiT-S/8", "DiT-S/4", "DiT-B/2"]
    toy = Plan(recipe="toy-shapes", sizes=SMALL_SIZES, patches=[8]).cells()[0].recipe
    assert toy is not None
    assert (toy.config.pos_embed, toy.config.patch_size, toy.config.hidden_size) == ("learned", 8, 16)


def test_the_shipped_plans_are_sound() -> None:
    files = sorted((Path(__file__).parents[1] / "examples" / "studies").glob("*.yaml"))
    assert [len(read_plan(str(file)).cells()) for file in files] == [8, 12, 8]
    assert read_plan(str(files[0])).references == ("digits", "digits")
    assert read_plan(str(files[1])).references == ("VIRTUAL_imagenet256_labeled.npz", "inception")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {}}, "A plan has no field 'size'. The nearest names: sizes"),
        ({"sizes": {}}, "A plan needs sizes with patches, or models that are trained"),
        ({"sizes": ["DiT-M"]}, "DiT-M/8: There is no DiT size named 'DiT-M/8'"),
        ({"sizes": ["DiT-S/x"]}, "The size 'DiT-S/x' has no number after its slash"),
        ({"sizes": ["DiT-S"], "patches": []}, "The size DiT-S needs patches, or one of its own: DiT-S/2"),
        ({"sizes": {"S": 3}}, "The size S must be fields of a configuration, not 3"),
        ({"sizes": {"S": {"hiden_size": 3}}}, "S/8: A model has no field 'hiden_size'"),
        ({"patches": [3]}, "S/3: sample_size 16 is not divisible by patch_size 3"),
        ({"patches": [8, 8]}, "Two models of the plan are named S-8"),
        ({"patches": 4}, "patches must be a list of whole numbers, not 4"),
        ({"samples": 39}, "samples must be 40 or more, not 39"),
        ({"metrics": []}, "metrics must name at least one metric"),
        ({"metrics": ["fdi"]}, "There is no metric 'fdi'. The nearest names: fid"),
        ({"metrics": ["precision", "fid"]}, "metrics begins with 'precision', by which higher is better"),
        ({"recipe": "toi"}, "There is no recipe 'toi'"),
        ({"settings": {"epoch": 3}}, "A recipe has no field 'epoch'"),
        ({"settings": {"init_from": "dit-toy-shapes"}}, "the recipe has init_from; remove it"),
        ({"settings": {"data": "elsewhere"}}, "A plan for the data 'elsewhere' needs a reference"),
        ({"sampling": {"stepps": 3}}, "sampling has no field 'stepps'. The nearest names: timesteps, seed"),
    ],
)
def test_bad_plans_are_one_sentence(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(json.dumps({**PLAN, "sampling": {}, **changes}))
    run = dit_hub("study", "plan.yaml", "--out", "out", cwd=tmp_path)
    assert run.returncode == 2
    assert re.fullmatch(rf"error: [^\n]*{re.escape(words)}[^\n]*\n", run.stderr), run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not valid YAML"), ("[1]", "must hold fields of a plan, not list"), (None, "There is no file")],
)
def test_files_that_are_no_plans_are_refused(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_plan(str(tmp_path / "plan.yaml"))


# --- A small study ---------------------------------------------------------------------------------------------------


class FewSteps:
    """Draws with the pipeline in two steps, and scores by the difference of the mean image: quick, and real."""

    def __init__(self) -> None:
        self.drawn: list[Path] = []

    def sample(self, pipeline: Any, out: Path, num: int, steps: int = 1) -> None:
        out.mkdir(parents=True, exist_ok=True)
        images = pipeline([index % 16 for index in range(num)], num_inference_steps=steps, output_type="np").images
        np.savez(out / "samples.npz", arr_0=images)
        self.drawn.append(out)

    def evaluate(self, samples: Path, reference: str, metrics: list[str], extractor: str, device: Any) -> Any:
        assert (reference, extractor) == ("shapes", "shapes")
        value = float(np.abs(np.load(samples / "samples.npz")["arr_0"] - 0.2).mean())
        return SimpleNamespace(results=[
            SimpleNamespace(id=name, metric=name.upper(), value=value, low=value - 1e-3, high=value + 1e-3)
            for name in metrics
        ])  # fmt: skip

    @property
    def tools(self) -> Tools:
        return Tools(self.sample, self.evaluate)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FewSteps]:
    folder, tools = tmp_path_factory.mktemp("study") / "out", FewSteps()
    study = run_study(Plan(**PLAN), folder, tools=tools.tools)
    assert study is not None
    return folder, tools


def test_a_study_trains_scores_and_judges(finished: tuple[Path, FewSteps]) -> None:
    folder, tools = finished
    facts = json.loads((folder / "study.json").read_text())
    assert [cell["name"] for cell in facts["cells"]] == ["S/8", "S/4", "M/8", "M/4"]
    for cell in facts["cells"]:
        # 64 images in batches of 32: 8 steps, scored after 4 and at the end.
        assert [result["step"] for result in cell["results"]] == [4, 8]
        assert len(cell["losses"]) == 4
        assert "8 steps of 32 are 256 images" in cell["warning"]
        place = folder / "cells" / cell["name"].replace("/", "-")
        pipeline: Any = DiTPipeline.from_pretrained(place / "model")
        assert pipeline.transformer.config.patch_size == cell["patch"]
        assert pipeline.transformer.num_parameters() == cell["parameters"]
        assert not list(place.glob("run/step-*"))  # no checkpoints stay
    assert len(tools.drawn) == 4 * 2 + 1  # and those of the untrained model
    assert facts["untrained"] > 0
    assert len(facts["claims"]) == 3
    assert {claim["verdict"] for claim in facts["claims"]} <= {SUPPORTED, NOT_ENOUGH}
    page = (folder / "study.md").read_text()
    for name in ("fid-gmacs.png", "fid-parameters.png", "fid-steps.png"):
        assert f"({name})" in page
        assert (folder / name).is_file()


def test_a_study_of_dit_hubs_own_samples_and_metrics(tmp_path: Path) -> None:
    plan = {**PLAN, "every": 0, "samples": 48, "sampling": {"num_inference_steps": 2, "scheduler": "ddim"}}
    (tmp_path / "plan.yaml").write_text(json.dumps({**plan, "metrics": ["fid", "precision"]}))
    run = dit_hub("study", "plan.yaml", "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    for cell in facts["cells"]:
        (result,) = cell["results"]
        assert [score["metric"] for score in result["scores"]] == ["fid", "precision"]
        fid = result["scores"][0]
        assert fid["low"] < fid["value"] < fid["high"]
        assert fid["name"] == "FD-shapes"
        place = tmp_path / "out" / "cells" / cell["name"].replace("/", "-") / "samples"
        assert np.load(place / "samples.npz")["arr_0"].shape == (48, 16, 16, 3)
    # Models of eight steps draw noise, as the untrained one does.
    assert {claim["verdict"] for claim in facts["claims"]} == {NOT_ENOUGH}
    assert "more than half of the untrained model's" in facts["claims"][0]["reason"]
    assert run.stdout.count("Warning: 8 steps of 32 are 256 images, 4 passes") == 1  # before the work


def test_a_dry_run_shows_budgets_and_writes_nothing(tmp_path: Path) -> None:
    sizes = {"S": SMALL_SIZES["S"]}
    (tmp_path / "plan.yaml").write_text(json.dumps({**PLAN, "sampling": {}, "sizes": sizes}))
    run = dit_hub("study", "plan.yaml", "--dry-run", "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for words in ("S/8", "S/4", "hours in all", "Warning: 8 steps of 32 are 256 images, 4 passes"):
        assert words in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_models_are_not_ranked_by_a_metric_without_interval(tmp_path: Path) -> None:
    plan, tools = Plan(**{**PLAN, "metrics": ["fid_infinity"]}), FewSteps()

    def without(samples: Path, *arguments: Any, **options: Any) -> Any:
        evaluation = tools.evaluate(samples, *arguments, **options)
        evaluation.results[0].low = evaluation.results[0].high = float("nan")
        return evaluation

    with pytest.raises(ValueError, match="gives no fid_infinity with an interval"):
        run_study(plan, tmp_path / "out", tools=Tools(tools.sample, without))


def test_a_finished_study_is_not_done_again(finished: tuple[Path, FewSteps]) -> None:
    folder, tools = finished
    before, count = (folder / "study.json").read_bytes(), len(tools.drawn)
    assert run_study(Plan(**PLAN), folder, tools=tools.tools) is not None
    assert len(tools.drawn) == count
    assert (folder / "study.json").read_bytes() == before


def test_a_plan_may_grow_and_another_one_is_refused(finished: tuple[Path, FewSteps]) -> None:
    folder, tools = finished
    with pytest.raises(ValueError, match="was made by another plan: samples is 40 there and 41 here"):
        run_study(Plan(**{**PLAN, "samples": 41}), folder, tools=tools.tools)
    settings = {**PLAN["settings"], "learning_rate": 1e-2}
    with pytest.raises(ValueError, match="was made by another plan: recipe is"):
        run_study(Plan(**{**PLAN, "settings": settings}), folder, tools=tools.tools)


def test_trained_models_can_be_cells(finished: tuple[Path, FewSteps], tmp_path: Path) -> None:
    folder, _ = finished
    models = {name: str(folder / "cells" / name / "model") for name in ("S-8", "S-4", "M-8")}
    plan = Plan(**{**PLAN, "sizes": {}, "patches": [], "every": 0, "models": models})
    study = run_study(plan, tmp_path / "out", tools=FewSteps().tools)
    assert study is not None
    assert [(cell.size, cell.patch) for cell in study.cells] == [
        ("2 layers of 16", 8), ("2 layers of 16", 4), ("2 layers of 32", 8),
    ]  # fmt: skip


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    plan = Plan(**{**PLAN, "sizes": {"S": {"hidden_size": 16}}, "every": 0})
    tools = FewSteps()
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with claimed(tmp_path / "out" / "cells" / "S-8") as ours:
            assert ours
            holding.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    holding.wait(60)
    try:
        assert run_study(plan, tmp_path / "out", tools=tools.tools) is None
    finally:
        done.set()
        other.join()
    assert (tmp_path / "out" / "cells" / "S-4" / "cell.json").is_file()
    assert not (tmp_path / "out" / "study.json").exists()
    assert run_study(plan, tmp_path / "out", tools=tools.tools) is not None


def test_a_study_that_was_cut_resumes(tmp_path: Path) -> None:
    plan = Plan(**{**PLAN, "sizes": {"S": {"hidden_size": 16}}})
    tools = FewSteps()

    def cut(samples: Path, *arguments: Any, **options: Any) -> Any:
        if samples.parent.name == "S-4" and samples.name == "samples":
            raise OSError("the disk is full")
        return tools.evaluate(samples, *arguments, **options)

    with pytest.raises(OSError, match="the disk is full"):
        run_study(plan, tmp_path / "out", tools=Tools(tools.sample, cut))
    assert (tmp_path / "out" / "cells" / "S-8" / "cell.json").is_file()
    losses = json.loads((tmp_path / "out" / "cells" / "S-4" / "training.json").read_text())["losses"]
    drawn = len(tools.drawn)
    study = run_study(plan, tmp_path / "out", tools=tools.tools)
    assert study is not None
    assert [path.parent.name for path in tools.drawn[drawn:]] == ["S-4", "untrained"]
    assert list(study.cells[1].losses) == losses


def test_a_request_to_stop_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tools = Plan(**{**PLAN, "sizes": {"S": {"hidden_size": 16}}}), FewSteps()

    def report(cell: Any) -> Callable[[Any], None]:
        return lambda at: os.kill(os.getpid(), signal.SIGTERM) if at.step == 2 else None

    with pytest.raises(StoppedError, match="Stopped while S/8 was trained; the same command resumes"):
        run_study(plan, tmp_path / "out", report, tools.tools)
    assert list((tmp_path / "out" / "cells" / "S-8" / "run").glob("step-*"))
    assert run_study(plan, tmp_path / "out", tools=tools.tools) is not None


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    plan = Plan(**{**PLAN, "every": 0})
    cell = tmp_path / "out" / "cells" / "S-8"
    cell.mkdir(parents=True)
    (cell / "cell.json").write_text("{")
    with pytest.raises(ValueError, match=r"cell\.json is damaged \(.*\); remove it to do this model again"):
        run_study(plan, tmp_path / "out", tools=FewSteps().tools)
