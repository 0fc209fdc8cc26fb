"""`dit-hub study`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries, require


def study(
    plan: Annotated[
        str, typer.Argument(help="A YAML file, or paper: the paper's own twelve models, from its figures.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for models and results; an interrupted study resumes.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what training would take.")] = False,
) -> None:
    """Train several sizes and patches with one recipe, score them, and judge the paper's claims about scaling.

    Started on several machines with one --out, each trains models that no other one does.
    """
    quiet_libraries()
    if out is None and not dry_run:
        raise ValueError("Give --out: a folder for the study.")
    for module in ("accelerate", "matplotlib"):
        require(module, "train")
    from ..evaluation.study import paper_study

    if plan == "paper" and out is not None and not dry_run:
        whole = paper_study()
        whole.save(out)
        _print_claims(whole, out)
        return
    from ..evaluation.study_plan import read_plan

    planned = read_plan(plan)
    planned.check()
    if dry_run or out is None or not (out / "cells").exists():  # not each time that the work resumes
        _print_budgets(planned)
    if out is not None and not dry_run:
        _run(planned, out)


def _run(planned: Any, out: Path) -> None:
    from rich.console import Console

    from ..evaluation.study import run_study
    from ..evaluation.study_cells import StoppedError
    from ..training.progress import training_progress

    console = Console()
    with training_progress(console) as bar:

        def report(cell: Any) -> Any:
            console.print(f"{cell.name}: training and scoring", highlight=False)
            return bar

        try:
            whole = run_study(planned, out, report)
        except StoppedError as stopped:
            print(stopped)
            return
        except KeyboardInterrupt:
            print("Stopped; the same command resumes.")
            sys.exit(130)  # the status of Ctrl-C in shells
    if whole is None:
        print(f"Other processes still work on {out}; the last one to end writes the study.")
        return
    _print_claims(whole, out)


def _print_claims(whole: Any, out: Path) -> None:
    for claim in whole.claims():
        print(f"{claim.claim} {claim.verdict.upper()}. {claim.reason}")
    print(f"The study is in {out / 'study.md'}")


def _print_budgets(planned: Any) -> None:
    from rich.console import Console

    from ..training.budget import plan_budget
    from .common import make_table

    table = make_table("What training takes", "model", "parameters", "GMACs", "steps", "s/step", "hours", "MB")
    hours, warnings = 0.0, dict[str, str]()
    for cell in planned.cells():
        if cell.recipe is None:
            continue
        budget = plan_budget(cell.recipe)
        hours += budget.hours
        warnings[budget.warning] = cell.name
        counts = (f"{budget.parameters:,}", f"{budget.gmacs:.4g}", f"{budget.steps:,}")
        table.add_row(cell.name, *counts, f"{budget.step_seconds:.3g}", f"{budget.hours:.3g}",
                      f"{budget.memory.total / 1e6:,.0f}")  # fmt: skip
    if not warnings:
        return
    Console().print(table)
    print(f"{hours:.3g} hours in all, without sampling and scoring.")
    for warning in filter(None, warnings):
        print(f"Warning: {warning}")
