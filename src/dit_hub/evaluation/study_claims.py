"""What a study measured of its models, and the paper's three claims judged by it."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SUPPORTED, NOT_SUPPORTED, NOT_ENOUGH = "supported", "not supported", "not enough training"
NOT_TESTED = "not tested"

# Loss that fell by more than this share between the last two fifths of a run is still falling.
_FALLING = 0.03

# Scores above this share of the untrained model's say little about the models.
_NEAR_UNTRAINED = 0.5

# The share of draws from the intervals in which the claim about Gflops must hold, and how many there are.
_CONFIDENCE, _DRAWS = 0.975, 4000


class Score(NamedTuple):
    """A metric of a model after a step, with the ends of its 95 % interval."""

    step: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """A model of a study.

    Args:
        name: such as "DiT-S/2".
        size: of the model without its patch: "DiT-S".
        patch: side of a patch.
        parameters, gmacs: as `dit_hub.flops.measure` counts them.
        scores: of the metric that the study judges by, lower is better; by step, the last one of the finished model.
        losses: mean loss of each epoch, or empty.
        warning: why its training is too short, or "".
    """

    name: str
    size: str
    patch: int
    parameters: float
    gmacs: float
    scores: tuple[Score, ...]
    losses: tuple[float, ...] = ()
    warning: str = ""

    @property
    def score(self) -> Score:
        """Of the finished model."""
        return self.scores[-1]


class Claim(NamedTuple):
    """A claim of the paper, and how a study bears on it."""

    claim: str
    verdict: str
    reason: str


def correlation(cells: Sequence[Cell], by: Callable[[Cell], float] = lambda cell: cell.gmacs) -> float:
    """Pearson's correlation of the scores with the logarithm of `by`, the multiply-accumulates by default.

    Raises:
        ValueError: fewer than three cells, or cells without any difference.
    """
    return _pearson(np.array([cell.score.value for cell in cells]), np.log10([by(cell) for cell in cells]))


def _pearson(scores: np.ndarray, logs: np.ndarray) -> float:
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(logs) == 0:
        raise ValueError("A correlation needs at least three models that differ.")
    return float(np.corrcoef(scores, logs)[0, 1])


def judge(cells: Sequence[Cell], metric: str = "FID", untrained: float | None = None) -> list[Claim]:
    """The paper's three claims in the light of some models (paper, Section 5).

    A difference between two models counts where their intervals do not overlap. A claim that the models do not bear out
    is "not enough training" rather than "not supported" where their training was too short to tell, and "not tested"
    where no two of them could bear it out.

    Args:
        cells: the models.
        metric: what their scores are called.
        untrained: score of a model without training.
    """
    if cells and untrained is not None and min(cell.score.value for cell in cells) > _NEAR_UNTRAINED * untrained:
        best = min(cells, key=lambda cell: cell.score.value)
        reason = (f"The best {metric}, {best.score.value:.4g} of {best.name}, is more than half of the untrained "
                  f"model's {untrained:.4g}.")  # fmt: skip
        return [Claim(claim, NOT_ENOUGH, reason) for claim in _CLAIMS]
    by_size = _compare(_groups(cells, lambda cell: cell.patch), metric)
    by_patch = _compare(_groups(cells, lambda cell: cell.size), metric)
    outcomes = (by_size, by_patch, _compare_correlations(cells, metric))
    short = "; ".join(_short_runs(cells))
    claims = []
    for claim, (holds, reason) in zip(_CLAIMS, outcomes, strict=True):
        if holds is None:
            claims.append(Claim(claim, NOT_TESTED, reason))
            continue
        verdict = SUPPORTED if holds else NOT_ENOUGH if short else NOT_SUPPORTED
        claims.append(Claim(claim, verdict, reason if holds or not short else f"{reason} {short}."))
    return claims


_CLAIMS = (
    "At a fixed patch size, larger models are better.",
    "At a fixed model size, smaller patches are better.",
    "Multiply-accumulates, not parameters, predict the quality.",
)


def _groups(cells: Iterable[Cell], key: Callable[[Cell], object]) -> list[list[Cell]]:
    """The cells that are alike in one respect and differ in cost, the cheapest first; groups of two and more."""
    groups: dict[object, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.gmacs):
        groups.setdefault(key(cell), []).append(cell)
    return [group for group in groups.values() if len(group) > 1]


def _compare(groups: list[list[Cell]], metric: str) -> tuple[bool | None, str]:
    """Whether in each group no model is worse than a cheaper neighbour, and the dearest better than the cheapest."""
    if not groups:
        return None, "The study has no two models that differ only in this."
    pairs = [pair for group in groups for pair in itertools.pairwise(group)]
    worse = [pair for pair in pairs if pair[0].score.high < pair[1].score.low]
    better = sum(pair[1].score.high < pair[0].score.low for pair in pairs)
    counts = f"In {better} of {len(pairs)} pairs of neighbours the costlier model has the lower {metric}"
    if worse:
        return False, f"{counts}, in {len(worse)} the higher one: {_pair(*worse[0], metric)}."
    ends = [(group[0], group[-1]) for group in groups]
    alike = [end for end in ends if not end[1].score.high < end[0].score.low]
    if alike:
        return False, f"{counts}; the ends of a row do not differ clearly: {_pair(*alike[0], metric)}."
    even = len(pairs) - better
    return True, counts + (f"; in {even} the intervals overlap." if even else ".")


def _pair(cheap: Cell, dear: Cell, metric: str) -> str:
    return " and ".join(f"{metric} {cell.score.value:.4g} ({cell.score.low:.4g} to {cell.score.high:.4g}) of "
                        f"{cell.name}" for cell in (cheap, dear))  # fmt: skip


def _compare_correlations(cells: Sequence[Cell], metric: str) -> tuple[bool | None, str]:
    """Whether scores fall with multiply-accumulates, and more closely than with parameters.

    The second is asked in draws of the models, with replacement, and of their scores within the intervals.
    """
    if len(cells) < 4 or not _groups(cells, lambda cell: cell.patch) or not _groups(cells, lambda cell: cell.size):
        return None, "This needs at least two sizes, each with two patches."
    logs = [np.log10([by(cell) for cell in cells]) for by in (lambda c: c.gmacs, lambda c: c.parameters)]
    scores = np.array([cell.score.value for cell in cells])
    gmacs, parameters = (_pearson(scores, log) for log in logs)
    # Fisher's transformation: above 1.96 the correlation is not zero.
    significant = gmacs < 0 and (gmacs == -1 or -math.atanh(gmacs) * math.sqrt(len(cells) - 3) > 1.96)
    spread = np.array([(cell.score.high - cell.score.low) / (2 * 1.96) for cell in cells])
    random, closer = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        models = random.integers(len(cells), size=len(cells))
        draw = (scores + spread * random.standard_normal(len(cells)))[models]
        if len(np.unique(models)) > 2 and all(np.ptp(log[models]) for log in logs):
            closer.append(_pearson(draw, logs[0][models]) < _pearson(draw, logs[1][models]))
    share = float(np.mean(closer))
    reason = (f"The correlation of the {metric} is {gmacs:.2f} with the logarithm of the multiply-accumulates and "
              f"{parameters:.2f} with that of the parameters")  # fmt: skip
    if not significant:
        return False, f"{reason}; the first is not clearly below zero for {len(cells)} models."
    if share < _CONFIDENCE:
        return False, f"{reason}; the first is the stronger one in {share:.1%} of draws of the models only."
    return True, f"{reason}; the first is the stronger one in {share:.1%} of draws of the models."


def _short_runs(cells: Sequence[Cell]) -> list[str]:
    """Sentences about cells whose training was too short, without full stops."""
    found = []
    if falling := [cell.name for cell in cells if still_falling(cell.losses)]:
        found.append(f"The loss of {len(falling)} of {len(cells)} models was still falling ({falling[0]} among them)")
    if warned := [cell for cell in cells if cell.warning]:
        found.append(warned[0].warning.rstrip("."))
    return found


def still_falling(losses: Sequence[float]) -> bool:
    """Whether the mean loss of the last fifth of the epochs is over 3 % below that of the fifth before."""
    fifth = len(losses) // 5
    if not fifth:
        return False
    before, last = losses[-2 * fifth : -fifth], losses[-fifth:]
    return sum(last) < (1 - _FALLING) * sum(before)
