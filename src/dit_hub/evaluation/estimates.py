"""Metrics with standard errors: which features each needs, its value, and how far another draw of samples may lie."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import metrics
from .statistics import Moments, Statistics

# Groups of samples that are left out in turn for a standard error.
GROUPS = 20

# Of a normal distribution, for intervals of 95 %.
QUANTILE = 1.96

# Samples whose kernels with each other tell KID's error; of all 50,000 they would take minutes.
_WITNESSES = 10_000

# Naeem et al. 2020 recommend five.
DENSITY_NEIGHBOURS = 5


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error over draws of the samples; NaN where it is not known."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that holds 95 % of other draws' values."""
        return self.value - QUANTILE * self.error, self.value + QUANTILE * self.error


@dataclass
class Collected:
    """What an extractor has seen of a set of images.

    Args:
        rows: (N, D) float32 by output, of the images that were kept.
        statistics: by output, over all images.
        count: number of images.
        labels: (count,) classes, where they are known.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    count: int = 0
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Options:
    """Choices of a metric: float16 distances as ADM has them, and the seed of random subsets and directions."""

    half: bool = True
    seed: int = 0


def jackknife_error(left_out: Sequence[float]) -> float:
    """The standard error from values that lack one group of samples each (Efron 1982, delete-a-group jackknife).

    NaN for no values.
    """
    if not left_out:
        return math.nan
    values = np.asarray(left_out)
    return float(np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


def order_of(count: int, seed: int, labels: np.ndarray | None = None) -> np.ndarray:
    """The samples in a random order, of which each part has as many of each class where `labels` are balanced.

    Balanced samples are no independent draws: parts whose classes vary would make every error too large.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    if labels is None:
        return order
    labels, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    if counts.max() - counts.min() > 1:
        return order
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank = np.concatenate([np.arange(size) for size in counts])  # of each sample among those of its class
    return by_class[np.lexsort((random.random(count), rank))]  # within a rank the classes are in random order


def groups_of(fake: "Collected", seed: int) -> list[np.ndarray]:
    """The samples in groups of almost one size; see `order_of`. None where they are too few to tell an error."""
    if fake.count < 2 * GROUPS:
        return []
    return [np.sort(part) for part in np.array_split(order_of(fake.count, seed, fake.labels), GROUPS)]


def mean_error(values: np.ndarray, fake: "Collected", seed: int) -> float:
    """The standard error of the mean of a value of each sample, from the means of groups; NaN for too few."""
    if not (parts := groups_of(fake, seed)):
        return math.nan
    means = np.array([values[part].mean() for part in parts])
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def _frechet(name: str, output: str) -> "Compute":
    def compute(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
        reference, rows = metrics.FrechetReference(real.statistics[output]), fake.rows[output]
        parts = groups_of(fake, options.seed)
        everything = Moments(rows.shape[1]).add(rows)
        left_out = [
            reference.distance(everything.without(Moments(rows.shape[1]).add(rows[part])).statistics) for part in parts
        ]
        return {name: Estimate(reference.distance(everything.statistics), jackknife_error(left_out))}

    return compute


def _frechet_infinity(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    rows = fake.rows["features"]
    order = order_of(fake.count, options.seed, fake.labels)
    limit, _ = metrics.frechet_extrapolation(real.statistics["features"], rows[order])
    return {"fid_infinity": Estimate(limit, math.nan)}  # its points share samples, so that the fit tells no error


def _inception_score(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    rows = fake.rows["probabilities"]
    left_out = [metrics.inception_score(np.delete(rows, part, axis=0)) for part in groups_of(fake, options.seed)]
    return {"is": Estimate(metrics.inception_score(rows), jackknife_error(left_out))}


def _kernel_distance(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    x, y = real.rows["features"], fake.rows["features"]
    part = order_of(fake.count, options.seed, fake.labels)[:_WITNESSES]
    few = Collected(count=len(part), labels=None if fake.labels is None else fake.labels[part])
    # To first order a sample moves the squared distance by twice its witness.
    error = 2 * mean_error(metrics.kernel_witness(x, y[part]), few, options.seed) * math.sqrt(len(part) / len(y))
    values = metrics.kernel_distances(x, y, seed=metrics.KERNEL_SEED + options.seed)
    drawing = values.std(ddof=1) / math.sqrt(len(values))  # that of the random subsets
    return {"kid": Estimate(float(values.mean()), math.hypot(error, drawing))}


def _gaussian_mmd(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    value, witness = metrics.gaussian_mmd_witness(real.rows["features"], fake.rows["features"])
    return {"cmmd": Estimate(value, 2 * mean_error(witness, fake, options.seed))}


def _precision_recall(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    inside_real, inside_fake = metrics.neighbourhood_hits(
        real.rows["features"], fake.rows["features"], half=options.half
    )
    return {"precision": _mean(inside_real, fake, options), "recall": _mean_of_reference(inside_fake)}


def _density_coverage(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    counts, covered = metrics.neighbourhood_counts(real.rows["features"], fake.rows["features"], DENSITY_NEIGHBOURS)
    return {
        "density": _mean(counts / DENSITY_NEIGHBOURS, fake, options),
        "coverage": _mean_of_reference(covered),
    }


def _mean(values: np.ndarray, fake: Collected, options: Options) -> Estimate:
    """The mean of a value that each sample has."""
    return Estimate(float(values.mean()), mean_error(values, fake, options.seed))


def _mean_of_reference(values: np.ndarray) -> Estimate:
    """The mean of a value that each real image has; its error is that of as many independent draws."""
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def _monge_distance(real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    x, y = real.rows["features"], fake.rows["features"]
    left_out = [  # a tenth of the directions, the same for all, so that they add nothing to the differences
        metrics.monge_distance(x, np.delete(y, part, axis=0), projections=100, seed=options.seed)
        for part in groups_of(fake, options.seed)
    ]
    return {"mind": Estimate(metrics.monge_distance(x, y, seed=options.seed), jackknife_error(left_out))}


Compute = Callable[[Collected, Collected, Options], dict[str, Estimate]]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        label: its name with Inception's features, or with those that it is defined on.
        output: of the extractor, from which it is computed.
        of_reference: what it needs of the reference: "statistics", "images" or "nothing".
        compute: (real, fake, options) -> values, with those of metrics that come along.
        lower_is_better: the direction.
        least: where the interval ends at the latest.
    """

    label: str
    output: str
    of_reference: str
    compute: Compute
    lower_is_better: bool = True
    least: float = 0.0


METRICS = {
    "fid": Metric("FID", "features", "statistics", _frechet("fid", "features")),
    "fid_infinity": Metric("FID-infinity", "features", "statistics", _frechet_infinity, least=-math.inf),
    "sfid": Metric("sFID", "spatial", "statistics", _frechet("sfid", "spatial")),
    "is": Metric("Inception Score", "probabilities", "nothing", _inception_score, lower_is_better=False),
    "precision": Metric("Precision", "features", "images", _precision_recall, lower_is_better=False),
    "recall": Metric("Recall", "features", "images", _precision_recall, lower_is_better=False),
    "kid": Metric("KID", "features", "images", _kernel_distance, least=-math.inf),
    "density": Metric("Density", "features", "images", _density_coverage, lower_is_better=False),
    "coverage": Metric("Coverage", "features", "images", _density_coverage, lower_is_better=False),
    "mind": Metric("MIND", "features", "images", _monge_distance),
    "cmmd": Metric("CMMD", "features", "images", _gaussian_mmd),
}


def compute(names: Sequence[str], real: Collected, fake: Collected, options: Options) -> dict[str, Estimate]:
    """The estimates of metrics by name; what two of them share is computed once."""
    found: dict[str, Estimate] = {}
    for name in names:
        if name not in found:
            found |= METRICS[name].compute(real, fake, options)
    return {name: found[name] for name in names}
