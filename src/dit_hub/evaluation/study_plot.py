"""The figures of a study, after the paper's: scores against multiply-accumulates, parameters and training steps."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from ..extras import require
from ..paper import paper_sizes
from .study_claims import Cell, Score, correlation

# Okabe and Ito's colours, which the colour-blind tell apart; shapes tell the patches apart, so that grey prints do too.
_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")


def paper_cells() -> list[Cell]:
    """The twelve models of the paper as cells, with its FID-50K after 400,000 steps; it gives no intervals."""
    cells = []
    for model in paper_sizes():
        assert model.fid is not None
        size, _, patch = model.model.partition("/")
        score = Score(400_000, model.fid, model.fid, model.fid)
        cells.append(Cell(model.model, size, int(patch), model.million_parameters * 1e6, model.gmacs, (score,)))
    return cells


def plot_gmacs(cells: Sequence[Cell], path: str | os.PathLike, metric: str = "FID", title: str = "") -> None:
    """Plot scores against the logarithm of the multiply-accumulates, with their correlation (paper, Figure 8).

    `plot_gmacs(paper_cells(), "figure-8.png")` redraws the paper's.
    """
    pyplot, figure, axes = _new_figure((6.4, 4.4))
    _scatter(axes, cells, lambda cell: cell.gmacs)
    heading = title or "Quality and cost"
    if len({cell.gmacs for cell in cells}) > 2:
        heading += f", r = {correlation(cells):.2f}".replace("-", "\N{MINUS SIGN}")
    axes.set(xlabel="10⁹ multiply-accumulates of an image (the paper's Gflops)", ylabel=metric, title=heading)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    _finish(pyplot, figure, path)


def plot_parameters(cells: Sequence[Cell], path: str | os.PathLike, metric: str = "FID", title: str = "") -> None:
    """Plot scores against parameters; areas show the multiply-accumulates (after the paper's Figure 2)."""
    pyplot, figure, axes = _new_figure((6.4, 4.4))
    most = max(cell.gmacs for cell in cells)
    _scatter(axes, cells, lambda cell: cell.parameters / 1e6, lambda cell: 30 + 670 * cell.gmacs / most)
    axes.set(xlabel="million parameters; areas grow with the multiply-accumulates", ylabel=metric,
             title=title or "Quality and parameters")  # fmt: skip
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.margins(0.12, 0.12)
    _finish(pyplot, figure, path)


def plot_steps(cells: Sequence[Cell], path: str | os.PathLike, metric: str = "FID", title: str = "") -> None:
    """Plot scores against training steps, a panel for each patch and a panel for each size (paper, Figure 6)."""
    patches, sizes = _orders(cells)
    pyplot = require("matplotlib.pyplot", "eval")
    figure = pyplot.figure(figsize=(3.1 * max(len(patches), len(sizes), 2) + 0.6, 5.8), layout="constrained")
    above, below = figure.subfigures(2, 1)
    by_patch = above.subplots(1, len(patches), sharey=True, squeeze=False)[0]
    by_size = below.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, patch in zip(by_patch, patches, strict=True):
        _curves(axes, [cell for cell in cells if cell.patch == patch], cells, f"patch {patch}", lambda cell: cell.size)
    for axes, size in zip(by_size, sizes, strict=True):
        chosen = [cell for cell in cells if cell.size == size]
        _curves(axes, chosen, cells, size, lambda cell: f"patch {cell.patch}")
    for axes in (by_patch[0], by_size[0]):
        axes.set_ylabel(metric)
    figure.suptitle(title or f"{metric} in training")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curves(axes: Any, chosen: list[Cell], cells: Sequence[Cell], title: str, label: Callable[[Cell], str]) -> None:
    for cell in chosen:
        colour, marker, line = _style(cell, cells)
        steps, values = [score.step for score in cell.scores], [score.value for score in cell.scores]
        axes.plot(steps, values, line, color=colour, marker=marker, markersize=4, linewidth=1.3, label=label(cell))
        lows, highs = [score.low for score in cell.scores], [score.high for score in cell.scores]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel="steps", yscale="log")
    axes.grid(alpha=0.3, which="both")
    _plain_numbers(axes.yaxis)
    axes.legend(fontsize=8)


def _new_figure(size: tuple[float, float]) -> tuple[Any, Any, Any]:
    pyplot = require("matplotlib.pyplot", "eval")
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    return pyplot, figure, axes


def _scatter(
    axes: Any, cells: Sequence[Cell], across: Callable[[Cell], float], area: Callable[[Cell], float] = lambda cell: 55
) -> None:
    """A mark with its interval for each cell: the colour is the size's, the shape the patch's."""
    for cell in cells:
        colour, marker, _ = _style(cell, cells)
        x, score = across(cell), cell.score
        axes.vlines(x, score.low, score.high, color=colour, linewidth=1.5)
        axes.scatter(x, score.value, s=area(cell), color=colour, marker=marker, alpha=0.75, edgecolors="black",
                     linewidths=0.5)  # fmt: skip
    patches, sizes = _orders(cells)
    style: dict[str, Any] = {"s": 45, "edgecolors": "black", "linewidths": 0.5}
    by_size = [axes.scatter([], [], color=_COLOURS[index % len(_COLOURS)], label=size, **style)
               for index, size in enumerate(sizes)]  # fmt: skip
    by_patch = [axes.scatter([], [], marker=_MARKERS[index % len(_MARKERS)], label=f"patch {patch}",
                             **{**style, "facecolors": "none"}) for index, patch in enumerate(patches)]  # fmt: skip
    axes.legend(handles=[*by_size, *by_patch], fontsize=8)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _plain_numbers(axis: Any) -> None:
    """Put numbers such as 50 and 200 on a logarithmic axis."""
    ticker = require("matplotlib.ticker", "eval")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _style(cell: Cell, cells: Sequence[Cell]) -> tuple[str, str, str]:
    """Colour by size, marker and line by patch."""
    patches, sizes = _orders(cells)
    size, patch = sizes.index(cell.size), patches.index(cell.patch)
    return _COLOURS[size % len(_COLOURS)], _MARKERS[patch % len(_MARKERS)], _LINES[patch % len(_LINES)]


def _orders(cells: Sequence[Cell]) -> tuple[list[int], list[str]]:
    """Patches from the largest, and sizes from the one of fewest parameters."""
    patches = sorted({cell.patch for cell in cells}, reverse=True)
    sizes = list(dict.fromkeys(cell.size for cell in sorted(cells, key=lambda cell: cell.parameters)))
    return patches, sizes


def _finish(pyplot: Any, figure: Any, path: str | os.PathLike) -> None:
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
