"""The scaling study: several sizes and patches with one recipe, and what follows for the paper's three claims."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import new_file
from ..training.monitor import Report
from .study_cells import MODEL_FOLDER, Tools, as_cell, check_same_plan, claimed, finished_cell, run_cell, untrained
from .study_claims import Cell, Claim, correlation, judge
from .study_plan import Plan, PlannedCell, check_sampling
from .study_plot import paper_cells, plot_gmacs, plot_parameters, plot_steps

VERSION = 1  # of study.json


@dataclass(frozen=True)
class Study:
    """The models of a study with their scores.

    Args:
        title: of the page.
        metric: ranks the models.
        cells: the models.
        records: the same with all their facts, for JSON.
        untrained: the metric of a model without training, if known.
        plan: for JSON.
    """

    title: str
    metric: str
    cells: list[Cell]
    records: list[dict[str, Any]]
    untrained: float | None = None
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """What the metrics are called, by id: "FID-50K", "FD-shapes"."""
        return {score["metric"]: score["name"] for record in self.records for score in record["results"][-1]["scores"]}

    def claims(self) -> list[Claim]:
        """The paper's claims, judged by these models."""
        return judge(self.cells, self.names[self.metric], self.untrained)

    def correlations(self) -> dict[str, float]:
        """Of the metric with the logarithms of multiply-accumulates and parameters; empty for too few models."""
        try:
            return {"gmacs": correlation(self.cells), "parameters": correlation(self.cells, lambda c: c.parameters)}
        except ValueError:
            return {}

    def save(self, folder: str | os.PathLike) -> None:
        """Write study.json, study.md and the figures into a folder; those of an earlier run are replaced."""
        folder, metric = Path(folder), self.names[self.metric]
        folder.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Callable[..., None]] = {"gmacs": plot_gmacs, "parameters": plot_parameters}
        if any(len(cell.scores) > 1 for cell in self.cells):
            figures["steps"] = plot_steps
        for name, plot in figures.items():
            with new_file(folder / f"{self.metric}-{name}.png", overwrite=True) as file:
                plot(self.cells, file, metric, self.title)
        facts = {"version": VERSION, "title": self.title, "metric": self.metric, "plan": self.plan,
                 "untrained": self.untrained, "correlations": self.correlations(),
                 "claims": [claim._asdict() for claim in self.claims()], "cells": self.records}  # fmt: skip
        with new_file(folder / "study.json", overwrite=True) as file:
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        with new_file(folder / "study.md", overwrite=True) as file:
            file.write_text(self.page([f"{self.metric}-{name}.png" for name in figures]), encoding="utf-8")

    def page(self, figures: list[str]) -> str:
        """The study as Markdown: verdicts, a table of the models, figures by file name."""
        lines = [f"# {self.title}", "", "| claim | verdict | reason |", "|---|---|---|"]
        lines += [f"| {claim.claim} | **{claim.verdict}** | {claim.reason} |" for claim in self.claims()]
        lines += ["", *self.table()]
        if self.untrained is not None:
            lines += ["", f"A model without training has {self.names[self.metric]} {self.untrained:.4g}."]
        lines += ["", "Ranges are 95 % intervals. GMACs: 10^9 multiply-accumulates of a forward pass of one image."]
        for figure in figures:
            lines += ["", f"![{figure.removesuffix('.png').replace('-', ' against ')}]({figure})"]
        return "\n".join(lines) + "\n"

    def table(self) -> list[str]:
        """A row for each model, the cheapest first, as lines of Markdown."""
        head = ["model", "parameters", "GMACs", "steps", "minutes", "last loss", *self.names.values()]
        lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        for record in sorted(self.records, key=lambda record: record["gmacs"]):
            scores = {score["metric"]: score for score in record["results"][-1]["scores"]}
            seconds, losses = record.get("seconds"), record.get("losses")
            row = [record["name"], f"{record['parameters']:,}", f"{record['gmacs']:.4g}",
                   f"{record['results'][-1]['step']:,}", "" if seconds is None else f"{seconds / 60:.1f}",
                   f"{losses[-1]:.4f}" if losses else "",
                   *(_interval(scores[name]) if name in scores else "" for name in self.names)]  # fmt: skip
            lines.append("| " + " | ".join(row) + " |")
        return lines


def _interval(score: dict[str, Any]) -> str:
    if score["low"] == score["high"]:
        return f"{score['value']:.4g}"
    return f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})"


def paper_study() -> Study:
    """The paper's own twelve models, with its published FID-50K."""
    cells = paper_cells()
    records = []
    for cell in cells:
        step, value, low, high = cell.score
        score = {"metric": "fid", "name": "FID-50K", "value": value, "low": low, "high": high}
        size = {"size": cell.size, "patch": cell.patch, "parameters": round(cell.parameters), "gmacs": cell.gmacs}
        records.append({"name": cell.name, **size, "results": [{"step": step, "scores": [score]}]})
    return Study("The twelve models of the DiT paper", "fid", cells, records)


def run_study(
    plan: Plan,
    out: str | os.PathLike,
    report: Callable[[PlannedCell], Report] = lambda cell: lambda progress: None,
    tools: Tools | None = None,
) -> Study | None:
    """Do the cells of a plan that are not done, and write the study when all are.

    Several processes and machines may work on one folder: each takes cells that no other holds, and the last to end
    writes the study. A run that was cut resumes.

    Args:
        plan: what to do.
        out: the study's folder; each cell has one in `out`/cells.
        report: makes the function that is told of the steps of a cell's training.
        tools: to sample and score with, in place of dit-hub's.

    Returns:
        The study; None where other processes still hold cells.

    Raises:
        ValueError: a plan that cannot be, or `out` holds cells of another plan.
        StoppedError: the process was asked to stop.
    """
    if PartialState().num_processes > 1:
        raise ValueError("A study runs in one process; start it once for each machine or GPU, with the same --out, and "
                         "they share its models.")  # fmt: skip
    planned, folder, _ = plan.cells(), Path(out), plan.references
    tools = tools or _own_tools()
    check_sampling(plan.sampling, tools.sample)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder.")
    places = [folder / "cells" / cell.folder_name for cell in planned]
    for cell, place in zip(planned, places, strict=True):  # before the work
        check_same_plan(cell, plan, place)
    for cell, place in zip(planned, places, strict=True):
        with claimed(place) as ours:
            if ours and finished_cell(place) is None:
                run_cell(cell, plan, place, tools, report(cell))
    records = [record for place in places if (record := finished_cell(place))]
    if len(records) < len(places):
        return None
    apart = folder / "cells" / "untrained"
    with claimed(apart) as ours:
        if not ours:
            return None
        baseline = untrained(planned[0].folder or str(places[0] / MODEL_FOLDER), plan, apart, tools)
    return _save(plan, records, baseline, folder)


def _save(plan: Plan, records: list[dict[str, Any]], baseline: float, folder: Path) -> Study:
    cells = [as_cell(record, plan.metric) for record in records]
    study = Study(plan.title, plan.metric, cells, records, baseline, json.loads(json.dumps(asdict(plan))))
    study.save(folder)
    return study


def _own_tools() -> Tools:
    from .evaluate import evaluate
    from .sampling import sample_images

    return Tools(sample_images, evaluate)
