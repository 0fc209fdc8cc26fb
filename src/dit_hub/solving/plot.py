"""Figures of solvers."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..extras import require
from ..files import new_file
from ..tables import COLUMNS

_MARKERS = "os^DvPX*<>"


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike,
    title: str,
    across: str,
    up: str,
    marked: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> None:
    """Draw lines on logarithmic axes.

    Args:
        lines: points by name.
        path: of the image.
        title, across, up: words.
        marked: a point to circle.
        overwrite: replace a file.
    """
    pyplot, ticker = require("matplotlib.pyplot", "eval"), require("matplotlib.ticker", "eval")
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for index, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), marker=_MARKERS[index % len(_MARKERS)], markersize=5, label=name)
    if marked is not None:
        axes.plot(*marked, "o", markersize=14, fillstyle="none", color="black", label="fewest within the bound")
    axes.set(xlabel=across, ylabel=up, xscale="log", yscale="log")
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with new_file(path, overwrite) as building:
        figure.savefig(building, dpi=150)
    pyplot.close(figure)


def plot_tables(tables: Mapping[str, np.ndarray], path: str | os.PathLike, overwrite: bool = False) -> None:
    """Draw tables side by side: the timesteps above, and below the weights of the estimates of each step.

    The weights are relative to their sum, so that a solver of the first order is a diagonal of ones.

    Args:
        tables: by title, of `dit_hub.solvers.solver_table`.
        path: of the image.
        overwrite: replace a file.
    """
    pyplot = require("matplotlib.pyplot", "eval")
    figure, axes = pyplot.subplots(
        2,
        len(tables),
        figsize=(1.2 + 3.2 * len(tables), 5.2),
        layout="constrained",
        squeeze=False,
        height_ratios=(1, 2),
    )
    shown: Any = None
    for column, (title, table) in enumerate(tables.items()):
        upper, lower = axes[0, column], axes[1, column]
        upper.plot(range(1, len(table) + 1), table[:, 0], "o-", markersize=4)
        upper.set(ylabel="timestep" if column == 0 else "", xlim=(0.5, len(table) + 0.5))
        upper.set_title(title, fontsize=10, parse_math=False)
        upper.grid(alpha=0.3)
        shown = lower.imshow(relative_weights(table), cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto",
                             extent=(0.5, len(table) + 0.5, len(table) + 0.5, 0.5))  # fmt: skip
        lower.set(xlabel="estimate of step", ylabel="step" if column == 0 else "")
    figure.colorbar(shown, ax=axes[1].tolist(), label="weight, relative to the sum")
    with new_file(path, overwrite) as building:
        figure.savefig(building, dpi=150)
    pyplot.close(figure)


def relative_weights(table: np.ndarray) -> np.ndarray:
    """(S, S) weights of the estimates by step, relative to their sum; NaN after the step itself."""
    weights = np.concatenate([table[:, [COLUMNS.index("b"), COLUMNS.index("c")]], table[:, len(COLUMNS) :]], axis=1)
    steps = len(table)
    square = np.full((steps, steps), np.nan)
    for step in range(steps):
        square[step, : step + 1] = 0.0
        for back in range(min(step + 1, weights.shape[1])):
            square[step, step - back] = weights[step, back]
        square[step] /= np.nansum(square[step]) or 1.0
    return square
