"""One model of a study: trained, sampled and scored in a folder of its own, each part once."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import locked, new_file
from ..flops import count
from ..modeling_dit import DiTTransformer
from ..pipeline_dit import DiTPipeline
from ..schedulers import switch_scheduler
from ..training.budget import short_training
from ..training.checkpoints import checkpoints, remove_checkpoints
from ..training.loop import train
from ..training.monitor import Report
from ..training.output import save_result
from .extractors import full_precision
from .study_claims import Cell, Score
from .study_plan import Plan, PlannedCell, recipe_facts

CELL_FILE = "cell.json"

# What a cell was begun with; nothing of another plan is taken for its own.
_SETUP = "setup.json"
MODEL_FOLDER, _RUN = "model", "run"


class StoppedError(RuntimeError):
    """Training was asked to stop; a checkpoint is saved, and the same study resumes from it."""


@dataclass(frozen=True)
class Tools:
    """How a study draws samples and scores them; see `dit_hub.evaluation`.

    Args:
        sample: `sample_images(pipeline, folder, num, **sampling)`.
        evaluate: `evaluate(folder, reference, metrics, extractor, device)`, with `results` as `Result`.
    """

    sample: Callable[..., Any]
    evaluate: Callable[..., Any]


def finished_cell(folder: Path) -> dict[str, Any] | None:
    """The record of a finished cell, or None.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / CELL_FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        as_cell(record, record["results"][-1]["scores"][0]["metric"])
        return record
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it to do this model again.") from None


def check_same_plan(cell: PlannedCell, plan: Plan, folder: Path) -> None:
    """Raise ValueError if a cell that was begun is one of another plan."""
    ours, file = json.loads(json.dumps(_setup(cell, plan))), folder / _SETUP
    if not file.is_file():
        return
    try:
        theirs = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file} is damaged; remove {folder} to do this model again.") from None
    if differing := [name for name in ours if theirs.get(name) != ours[name]]:
        raise ValueError(f"{folder} was made by another plan: {differing[0]} is {theirs.get(differing[0])!r} there and "
                         f"{ours[differing[0]]!r} here; choose another --out.")  # fmt: skip


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a cell's folder while the block runs; False where another process, here or elsewhere, holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, ""))
        except ValueError:
            yield False
            return
        yield True


def run_cell(cell: PlannedCell, plan: Plan, folder: Path, tools: Tools, report: Report) -> dict[str, Any]:
    """Do what is left of a cell, and write its record.

    Args:
        cell: the model.
        plan: of the study.
        folder: of the cell; the caller holds it.
        tools: to sample and score with.
        report: told of training's steps.

    Raises:
        StoppedError: training was asked to stop.
        ValueError: as `train`, and what the tools raise.
    """
    check_same_plan(cell, plan, folder)
    with new_file(folder / _SETUP, overwrite=True) as file:
        file.write_text(json.dumps(_setup(cell, plan)) + "\n", encoding="utf-8")
    facts = {} if cell.recipe is None else _train(cell, folder, report)
    source = cell.folder or str(folder / MODEL_FOLDER)
    last = facts.get("steps", 0)
    results = []
    for path in checkpoints(folder / _RUN) if plan.every else []:
        step = int(path.name.removeprefix("step-"))
        if step % plan.every == 0 and step < last:
            results.append({"step": step, "scores": _score(str(path), plan, folder / f"samples-{step}", tools)})
    results.append({"step": last, "scores": _score(source, plan, folder / "samples", tools)})
    config: Any = DiTPipeline.from_pretrained(source).transformer.config
    record = {"name": cell.name, **_size_facts(cell, config), **facts, "results": results,
              "setup": _setup(cell, plan)}  # fmt: skip
    with new_file(folder / CELL_FILE, overwrite=True) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    remove_checkpoints(folder / _RUN)
    return record


def _setup(cell: PlannedCell, plan: Plan) -> dict[str, Any]:
    return {**plan.facts(), "recipe": recipe_facts(cell)}


def _train(cell: PlannedCell, folder: Path, report: Report) -> dict[str, Any]:
    """Train a cell unless it is; its checkpoints stay for their scores."""
    facts_file, model = folder / "training.json", folder / MODEL_FOLDER
    if facts_file.is_file() and model.is_dir():
        return json.loads(facts_file.read_text(encoding="utf-8"))
    assert cell.recipe is not None
    result = train(cell.recipe, report, run_folder=folder / _RUN)
    if not result.finished:
        raise StoppedError(f"Stopped while {cell.name} was trained; the same command resumes from its checkpoint.")
    save_result(result, model, f"dit-hub study, {cell.name}", overwrite=True)
    recipe, images = cell.recipe, len(result.dataset)
    steps = recipe.steps or recipe.epochs * (images // recipe.batch_size)
    facts = {
        "steps": steps,
        "batch_size": recipe.batch_size,
        "seconds": round(result.seconds, 1),
        "losses": [round(loss, 6) for loss in result.epoch_losses],
        "warning": short_training(steps, recipe.batch_size, images),
    }
    with new_file(facts_file, overwrite=True) as file:
        file.write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _score(source: str, plan: Plan, samples: Path, tools: Tools) -> list[dict[str, Any]]:
    """The scores of a pipeline, drawn and computed unless they are there."""
    file = samples.with_name(f"{samples.name}.json")
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    return score(DiTPipeline.from_pretrained(source), plan, samples, tools, file)


def score(pipeline: Any, plan: Plan, samples: Path, tools: Tools, file: Path) -> list[dict[str, Any]]:
    """Draw samples into a folder, score them and write the scores: dicts of metric, value, low and high."""
    sampling = dict(plan.sampling)
    if "scheduler" in sampling:
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, sampling.pop("scheduler"))
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    with full_precision():  # as `dit-hub sample` draws
        tools.sample(pipeline, samples, plan.samples, **sampling)
    reference, extractor = plan.references
    evaluation = tools.evaluate(samples, reference, metrics=list(plan.metrics), extractor=extractor,
                                device=pipeline.device)  # fmt: skip
    ranked = next((result for result in evaluation.results if result.id == plan.metric), None)
    if ranked is None or ranked.low is None or math.isnan(ranked.low):
        raise ValueError(f"The evaluation gives no {plan.metric} with an interval, by which models could be told "
                         "apart; put another metric first.")  # fmt: skip
    scores = [{"metric": result.id, "name": result.metric, "value": result.value, "low": _known(result.low, result),
               "high": _known(result.high, result)} for result in evaluation.results]  # fmt: skip
    with new_file(file, overwrite=True) as path:
        path.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def _known(end: float | None, result: Any) -> float:
    """An end of an interval; the value itself where it has none."""
    return result.value if end is None or math.isnan(end) else end


def untrained(source: str, plan: Plan, folder: Path, tools: Tools) -> float:
    """The score of a model without training, which predicts zero whatever its size; computed unless it is there."""
    file = folder / "samples.json"
    if not file.is_file():
        pipeline: Any = DiTPipeline.from_pretrained(source)
        pipeline.transformer = DiTTransformer(pipeline.transformer.config).eval()
        score(pipeline, plan, folder / "samples", tools, file)
    return next(found["value"] for found in json.loads(file.read_text()) if found["metric"] == plan.metric)


def _size_facts(cell: PlannedCell, config: Any) -> dict[str, Any]:
    counted = count(config)
    size = cell.size if cell.recipe is not None else f"{config.num_hidden_layers} layers of {config.hidden_size}"
    return {"size": size, "patch": config.patch_size, "parameters": counted.parameters, "gmacs": counted.gmacs,
            "tokens": counted.tokens}  # fmt: skip


def as_cell(record: dict[str, Any], metric: str) -> Cell:
    """A cell's record as the claims and figures take it, with the scores of one metric."""
    scores = []
    for result in record["results"]:
        found = next(score for score in result["scores"] if score["metric"] == metric)
        scores.append(Score(result["step"], found["value"], found["low"], found["high"]))
    return Cell(record["name"], record["size"], record["patch"], record["parameters"], record["gmacs"], tuple(scores),
                tuple(record.get("losses", ())), record.get("warning", ""))  # fmt: skip
