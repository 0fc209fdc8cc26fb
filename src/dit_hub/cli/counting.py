"""`dit-hub flops`."""

import csv
import json
import sys
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries
from .common import find_config, make_table

_FORMATS = ("text", "csv", "json")

# So that a table fits a terminal of 80 columns.
_SHORT = {"embedding": "emb.", "attention": "attn", "modulation": "mod.", "final": "fin."}


def flops(
    model: Annotated[str | None, typer.Argument(help="A size (DiT-XL/2), a Hub id, or a folder.")] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="All models of the paper, beside its figures: sizes, conditionings, 512x512.")
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the image in pixels, for sizes given by name; default: 256.")
    ] = None,
    output: Annotated[str, typer.Option("--format", help="text, csv or json.")] = "text",
) -> None:
    """Count parameters, multiply-accumulates and memory of a forward pass of one image in float32, by part."""
    if (model is None) != all_models:
        raise ValueError("Give a model, or --all for all models of the paper.")
    if output not in _FORMATS:
        raise ValueError(f"--format is {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}, not {output!r}.")
    quiet_libraries()
    rows = _count_all(image_size) if model is None else [_count_one(model, image_size)]
    if output == "json":
        print(json.dumps(rows, indent=2))
    elif output == "csv":
        _print_csv(rows)
    elif model is None:
        _print_all(rows)
    else:
        _print_one(rows[0])


def _count_one(model: str, image_size: int | None) -> dict[str, Any]:
    from ..paper import paper_models

    side = 256 if image_size is None else image_size
    same = [paper for paper in paper_models() if paper.model.casefold() == model.casefold()
            and paper.conditioning == "adaln_zero" and paper.image_size == side]  # fmt: skip
    return _row(model, find_config(model, side), same[0] if same else None)


def _count_all(image_size: int | None) -> list[dict[str, Any]]:
    """The paper's models, or its sizes and conditionings at another resolution."""
    from ..configuration_dit import DiTConfig
    from ..paper import paper_models

    rows = []
    for paper in paper_models():
        if image_size is None or paper.image_size == 256:
            side = image_size or paper.image_size
            config = DiTConfig.from_name(paper.model, side, conditioning=paper.conditioning)
            own = next((other for other in paper_models() if (other.model, other.conditioning, other.image_size)
                        == (paper.model, paper.conditioning, side)), None)  # fmt: skip
            label = paper.label if own or side == 256 else f"{paper.label} at {side}"
            rows.append(_row(own.label if own else label, config, own))
    return rows


def _row(label: str, config: Any, paper: Any) -> dict[str, Any]:
    """Counts of a model as plain values, beside the paper's."""
    from ..flops import count

    counted = count(config)
    row: dict[str, Any] = {
        "model": label,
        "parameters": counted.parameters,
        "gmacs": counted.gmacs,
        "tokens": counted.tokens,
        "weights_bytes": counted.weights,
        "activations_bytes": counted.peak,
        "parts": {name: {"parameters": part.parameters, "gmacs": part.macs / 1e9, "activations_bytes": part.peak}
                  for name, part in counted.parts.items()},
    }  # fmt: skip
    if paper is not None:
        row["paper"] = {
            "million_parameters": paper.million_parameters,
            "gmacs": paper.gmacs,
            "tokens": paper.tokens,
            "parameters_difference_percent": 100 * (counted.parameters / paper.million_parameters / 1e6 - 1),
            "gmacs_difference_percent": 100 * (counted.gmacs / paper.gmacs - 1),
        }
    return row


def _print_csv(rows: list[dict[str, Any]]) -> None:
    """A line for each part of each model, and one for the whole, which has the paper's figures."""
    columns = ("model", "part", "parameters", "gmacs", "tokens", "weights_bytes", "activations_bytes",
               "paper_million_parameters", "paper_gmacs", "parameters_difference_percent",
               "gmacs_difference_percent")  # fmt: skip
    writer: csv.DictWriter[str] = csv.DictWriter(sys.stdout, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        for name, part in row["parts"].items():
            writer.writerow({"model": row["model"], "part": name, **part})
        paper = row.get("paper", {})
        figures = {f"paper_{name}": paper.get(name) for name in ("million_parameters", "gmacs")}
        writer.writerow({**row, "part": "whole", **paper, "gmacs": row["gmacs"], "tokens": row["tokens"], **figures})


def _print_all(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from ..flops import PARTS

    title = "Million parameters and GMACs of one image, beside the paper's"
    table = make_table(title, "model", "params", "paper", "%", "GMACs", "paper", "%")
    shares = make_table("Memory of one image (weights, activations), and shares of the GMACs in %", "model",
                        "tokens", "MB", *(_SHORT.get(part, part) for part in PARTS))  # fmt: skip
    for row in rows:
        paper = row.get("paper")
        cells = ("", "", "", "") if paper is None else (
            str(paper["million_parameters"]), f"{paper['parameters_difference_percent']:+.2f}",
            f"{paper['gmacs']:.2f}", f"{paper['gmacs_difference_percent']:+.2f}",
        )  # fmt: skip
        table.add_row(row["model"], f"{row['parameters'] / 1e6:.2f}", *cells[:2], f"{row['gmacs']:.2f}", *cells[2:])
        memory = (row["weights_bytes"] + row["activations_bytes"]) / 1e6
        parts = (f"{100 * row['parts'][part]['gmacs'] / row['gmacs']:.1f}" for part in PARTS)
        shares.add_row(row["model"], f"{row['tokens']:,}", f"{memory:,.0f}", *parts)
    for narrow in (table, shares):
        narrow.columns[0].no_wrap = True
    console = Console()
    console.print(table)
    console.print(shares)


def _print_one(row: dict[str, Any]) -> None:
    from rich.console import Console

    table = make_table(f"{row['model']}: one image of {row['tokens']:,} tokens, float32", "part", "parameters", "GMACs",
                       "%", "weights, MB", "activations, MB")  # fmt: skip
    for name, part in row["parts"].items():
        _add_counts(table, name, part, 4 * part["parameters"], row["gmacs"])
    table.add_section()
    _add_counts(table, "whole", row, row["weights_bytes"], row["gmacs"])
    if paper := row.get("paper"):
        table.add_row("paper", f"{paper['million_parameters']} M", f"{paper['gmacs']:.2f}")
        table.add_row("difference", f"{paper['parameters_difference_percent']:+.2f} %",
                      f"{paper['gmacs_difference_percent']:+.2f} %")  # fmt: skip
    Console().print(table)
    print("Activations: the most that live at once, in the whole pass or while a part computes.")


def _add_counts(table: Any, name: str, counts: dict[str, Any], weights: int, all_gmacs: float) -> None:
    share, megabytes = 100 * counts["gmacs"] / all_gmacs, (weights / 1e6, counts["activations_bytes"] / 1e6)
    table.add_row(name, f"{counts['parameters']:,}", f"{counts['gmacs']:.4g}", f"{share:.1f}",
                  *(f"{value:,.2f}" for value in megabytes))  # fmt: skip
