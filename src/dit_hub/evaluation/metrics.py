"""Distances between real and generated images: functions of (N, D) features that return floats.

Features are those of any extractor, as numpy arrays or tensors; `real` may be `Statistics` where that is enough.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..checks import whole_number
from .statistics import Features, Moments, Statistics, as_array, statistics_of

# torch-fidelity's, whose random subsets these are.
KERNEL_SEED = 2020

# ADM's evaluator computes distances in blocks of this many rows and columns, and each in float32 whose float16 ones
# are not finite.
_BLOCK = 10_000

# Rows of a block that are computed at a time: 80 MB of float32 distances.
_ROWS = 2_000

# Rows whose kernel with all others is computed at a time: 80 MB in float64 with 20,000 others.
_STRIP = 500


# --- Gaussians -------------------------------------------------------------------------------------------------------


def frechet_distance(real: Features | Statistics, fake: Features | Statistics) -> float:
    """The Fréchet distance between Gaussians of the same mean and covariance: FID on Inception's features.

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), Heusel et al. 2017, eq. 6, in float64. The trace of the root is the sum of
    the roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric, so that it is real and needs no correction
    where there are fewer samples than features.

    Args:
        real, fake: (N, D) features of at least two samples, or statistics.
    """
    return FrechetReference(statistics_of(real)).distance(statistics_of(fake))


class FrechetReference:
    """Statistics that several others are compared with; the root of their covariance is computed once."""

    def __init__(self, statistics: Statistics):
        self.statistics = statistics
        values, vectors = torch.linalg.eigh(torch.from_numpy(statistics.covariance))
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: Statistics) -> float:
        """The Fréchet distance to other statistics."""
        ours = self.statistics
        if len(ours.mean) != len(other.mean):
            raise ValueError(f"{len(ours.mean)} and {len(other.mean)} features cannot be compared; they are of two "
                             "extractors.")  # fmt: skip
        shift = ours.mean - other.mean
        crossed = torch.linalg.eigvalsh(self._root @ torch.from_numpy(other.covariance) @ self._root)
        spread = np.trace(ours.covariance) + np.trace(other.covariance) - 2 * float(crossed.clamp(min=0).sqrt().sum())
        return float(shift @ shift + spread)


def frechet_ratio(real: Features | Statistics, fake: Features | Statistics, held_out: Features | Statistics) -> float:
    """The Fréchet distance to generated images as a multiple of that to real ones which `real` does not hold.

    FDr of one representation (arXiv 2604.28190); FDr_k is the mean of it over k representations.
    """
    reference = FrechetReference(statistics_of(real))
    return reference.distance(statistics_of(fake)) / reference.distance(statistics_of(held_out))


def frechet_extrapolation(
    real: Features | Statistics, fake: Features, points: int = 8
) -> tuple[float, list[tuple[int, float]]]:
    """The Fréchet distance that infinitely many samples would have (Chong and Forsyth 2020, FID-infinity).

    The bias of the distance falls as 1/N, so a line through it at several N tells the limit.

    Args:
        real: of the reference.
        fake: (N, D) features in random order; the first N/2 to N of them are compared.
        points: number of subsets.

    Returns:
        The limit, and the (N, distance) pairs of the line.
    """
    reference, fake = FrechetReference(statistics_of(real)), as_array(fake)
    sizes = np.unique(np.linspace(len(fake) / 2, len(fake), points).round().astype(int))
    moments, line, done = Moments(fake.shape[1]), [], 0
    for size in sizes:
        moments.add(fake[done:size])
        done = size
        line.append((int(size), reference.distance(moments.statistics)))
    slope_and_limit = np.polyfit([1 / size for size, _ in line], [distance for _, distance in line], 1)
    return float(slope_and_limit[1]), line


# --- Kernels and sorting ---------------------------------------------------------------------------------------------


def kernel_distance(
    real: Features, fake: Features, subset_size: int = 1000, subsets: int = 100, seed: int = KERNEL_SEED
) -> float:
    """The squared maximum mean discrepancy with the kernel (x·y / D + 1)^3: KID on Inception's features.

    Bińkowski et al. 2018, the unbiased estimate, as the mean over random subsets; with the same seed the subsets are
    those of torch-fidelity.
    """
    return float(np.mean(kernel_distances(real, fake, subset_size, subsets, seed)))


def kernel_distances(
    real: Features, fake: Features, subset_size: int = 1000, subsets: int = 100, seed: int = KERNEL_SEED
) -> np.ndarray:
    """The values of which `kernel_distance` is the mean; subsets are no larger than the smaller set."""
    real, fake = _pair(real, fake)
    size = min(whole_number("subset_size", subset_size, 2), len(real), len(fake))
    if size < 2:
        raise ValueError("The kernel distance needs two samples or more of each set.")
    random, values = np.random.RandomState(seed), []
    for _ in range(whole_number("subsets", subsets, 1)):
        x = fake[random.choice(len(fake), size, replace=False)]
        y = real[random.choice(len(real), size, replace=False)]
        within = sum(_off_diagonal(_cubic(one, one)) for one in (x, y)) / (size * (size - 1))
        values.append(within - 2 * _cubic(x, y).mean())
    return np.array(values)


def kernel_witness(real: Features, fake: Features) -> np.ndarray:
    """(N,) for each generated sample how much nearer it is to those than to the real ones, in this kernel."""
    real, fake = _pair(real, fake)
    return _mean_kernel(fake, fake, _cubic) - _mean_kernel(fake, real, _cubic)


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The polynomial kernel of each pair, in float64."""
    return (_products(x, y) / x.shape[1] + 1) ** 3


def _off_diagonal(kernel: np.ndarray) -> float:
    return float(kernel.sum() - np.trace(kernel))


def gaussian_mmd(real: Features, fake: Features, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """The squared maximum mean discrepancy with a Gaussian kernel: CMMD on CLIP's embeddings.

    Jayasumana et al. 2024: `scale` times the biased estimate, in which each sample also meets itself, over embeddings
    of length 1.
    """
    return gaussian_mmd_witness(real, fake, sigma, scale)[0]


def gaussian_mmd_witness(
    real: Features, fake: Features, sigma: float = 10.0, scale: float = 1000.0
) -> tuple[float, np.ndarray]:
    """`gaussian_mmd`, and (N,) for each generated sample how much nearer it is to those than to the real ones."""
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in _pair(real, fake, np.float64))
    kernel = partial(_gaussian, sigma=sigma)
    within_real, within_fake, across = (_mean_kernel(*pair, kernel) for pair in ((x, x), (y, y), (y, x)))
    value = within_real.mean() + within_fake.mean() - 2 * across.mean()
    return float(scale * value), scale * (within_fake - across)


def _mean_kernel(x: np.ndarray, y: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """(N,) mean of a kernel of each row of x with all rows of y."""
    return np.concatenate([kernel(x[at : at + _STRIP], y).mean(axis=1) for at in range(0, len(x), _STRIP)])


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) scalar products in float64, by PyTorch, whose threads a launcher does not fix at one."""
    return (torch.from_numpy(x).double() @ torch.from_numpy(y).double().T).numpy()


def _gaussian(x: np.ndarray, y: np.ndarray, sigma: float) -> np.ndarray:
    squared = (x**2).sum(axis=1)[:, None] - 2 * _products(x, y) + (y**2).sum(axis=1)
    return np.exp(-squared.clip(0) / (2 * sigma**2))


def monge_distance(real: Features, fake: Features, projections: int = 1000, seed: int = 0) -> float:
    """The sliced 2-Wasserstein distance, squared and times 3 D: MIND on Inception's features.

    Berthet et al. 2026 (arXiv 2605.06797): the mean over random directions of the squared differences of the sorted
    projections. Sets of two sizes are compared by their quantiles, which for equal sizes is the same.
    """
    real, fake = (torch.from_numpy(rows) for rows in _pair(real, fake, np.float32))
    generator, size = torch.Generator().manual_seed(seed), real.shape[1]
    projections = whole_number("projections", projections, 1)
    left, right, widths = _quantile_steps(len(real), len(fake))
    total, step = 0.0, 100
    for start in range(0, projections, step):
        directions = torch.randn(size, min(step, projections - start), generator=generator)
        directions /= directions.norm(dim=0)
        x, y = ((rows @ directions).sort(dim=0).values.double() for rows in (real, fake))
        total += float((widths[:, None] * (x[left] - y[right]) ** 2).sum())
    return 3 * size * total / projections


def _quantile_steps(first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the steps of two empirical distribution functions: which sorted sample of each, and the probability."""
    common = math.lcm(first, second)
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * (common // n) for n in (first, second)]))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    widths = (ends - starts).double() / common
    return starts // (common // first), starts // (common // second), widths


# --- Neighbours ------------------------------------------------------------------------------------------------------


def precision_recall(real: Features, fake: Features, k: int = 3, half: bool = True) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), as ADM's evaluator computes them.

    Precision is the share of generated samples that lie within the distance of some real sample to its k-th neighbour;
    recall the same with the roles changed.

    Args:
        real, fake: (N, D) features; each sample counts as its own neighbour, besides the k.
        k: neighbours.
        half: compute distances in float16, as ADM does in each block of 10,000 by 10,000 where all of them are finite.
            That has 11 bits: published values are those of float16, and float32's (`half=False`) differ.
    """
    inside_real, inside_fake = neighbourhood_hits(real, fake, k, half)
    return float(inside_real.mean()), float(inside_fake.mean())


def neighbourhood_hits(real: Features, fake: Features, k: int = 3, half: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """For each generated sample whether it lies near a real one, and the reverse; see `precision_recall`."""
    x, y = (torch.from_numpy(rows) for rows in _pair(real, fake, np.float32))
    radii = [_radii(rows, k, half) for rows in (x, y)]
    fake_hits, real_hits = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    for rows, columns, distances in _distances(x, y, half):
        real_hits[rows] |= (distances <= radii[1][columns]).any(dim=1)
        fake_hits[columns] |= (distances <= radii[0][rows][:, None]).any(dim=0)
    return fake_hits.numpy(), real_hits.numpy()


def density_coverage(real: Features, fake: Features, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020), in float32.

    Density is the mean number, divided by k, of real samples whose k-th neighbour is farther than the generated one;
    coverage is the share of real samples that have a generated one nearer than their k-th neighbour.
    """
    counts, covered = neighbourhood_counts(real, fake, k)
    return float(counts.mean() / k), float(covered.mean())


def neighbourhood_counts(real: Features, fake: Features, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """For each generated sample in how many real neighbourhoods it is, and for each real one whether one is in its."""
    x, y = (torch.from_numpy(rows) for rows in _pair(real, fake, np.float32))
    radii = _radii(x, k, half=False)
    counts, covered = torch.zeros(len(y)), torch.zeros(len(x), dtype=torch.bool)
    for rows, columns, distances in _distances(x, y, half=False):
        near = distances < radii[rows][:, None]
        counts[columns] += near.sum(dim=0)
        covered[rows] |= near.any(dim=1)
    return counts.numpy(), covered.numpy()


def _radii(features: Tensor, k: int, half: bool) -> Tensor:
    """(N,) squared distances to the k-th neighbour."""
    k = whole_number("k", k, 1)
    if len(features) <= k:
        raise ValueError(f"{k} neighbours need more than {len(features)} samples.")
    nearest = torch.full((len(features), k + 1), math.inf)
    for rows, _, distances in _distances(features, features, half):
        smallest = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], smallest], dim=1).topk(k + 1, dim=1, largest=False).values
    return nearest[:, -1]


def _distances(x: Tensor, y: Tensor, half: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """The squared distances of all pairs, a few rows of a block at a time: rows, columns, float32 (rows, columns)."""
    for top in range(0, len(x), _BLOCK):
        for left in range(0, len(y), _BLOCK):
            columns = slice(left, min(left + _BLOCK, len(y)))
            strips = [slice(at, min(at + _ROWS, top + _BLOCK, len(x)))
                      for at in range(top, min(top + _BLOCK, len(x)), _ROWS)]  # fmt: skip
            compute = _half_distances if half and _fits_half(x, y, strips, columns) else _float_distances
            for rows in strips:
                yield rows, columns, compute(x[rows], y[columns])


def _fits_half(x: Tensor, y: Tensor, strips: Sequence[slice], columns: slice) -> bool:
    """Whether all float16 distances of a block are finite; where lengths promise that, none is computed."""
    longest = [float(rows.norm(dim=1).max()) for rows in (x[strips[0].start : strips[-1].stop], y[columns])]
    if sum(longest) ** 2 < 60_000:  # float16 ends at 65,504
        return True
    return all(bool(_half_distances(x[rows], y[columns]).isfinite().all()) for rows in strips)


def _float_distances(x: Tensor, y: Tensor) -> Tensor:
    return ((x**2).sum(dim=1)[:, None] - 2 * (x @ y.T) + (y**2).sum(dim=1)).clamp(min=0)


def _half_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances as float16 gives them, rounded after each operation; sums over features are in float32."""
    x, y = _rounded(x), _rounded(y)
    norms = [_rounded(_rounded(rows**2).sum(dim=1)) for rows in (x, y)]
    products = _rounded(2 * _rounded(x @ y.T))
    return _rounded(_rounded(norms[0][:, None] - products) + norms[1]).clamp(min=0)


def _rounded(values: Tensor) -> Tensor:
    """Float32 values of float16's precision and range."""
    return values.half().float()


# --- Classes ---------------------------------------------------------------------------------------------------------


def inception_score(probabilities: Features, split_size: int = 5000) -> float:
    """The Inception Score: exp of the mean divergence of the classes of an image from those of all images.

    Salimans et al. 2016, as the mean over splits of consecutive images, as ADM's evaluator computes it: splits have
    `split_size` images, the last one fewer. Images must not be sorted by class where there is more than one split.

    Args:
        probabilities: (N, classes) that each row sums to 1.
        split_size: images of a split.
    """
    return float(np.mean(inception_scores(probabilities, split_size)))


def inception_scores(probabilities: Features, split_size: int = 5000) -> list[float]:
    """The scores of which `inception_score` is the mean."""
    rows = torch.from_numpy(as_array(probabilities, np.float64))
    if float(rows.min()) < 0 or not torch.allclose(rows.sum(dim=1), torch.ones(()).double(), atol=1e-3):
        raise ValueError("The Inception Score needs probabilities: rows of numbers from 0 that sum to 1.")
    scores = []
    for part in rows.split(whole_number("split_size", split_size, 1)):
        # x log x is 0 at 0, where ADM's logarithm would give NaN.
        divergences = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(dim=0))
        scores.append(math.exp(divergences.sum(dim=1).mean()))
    return scores


def _pair(real: Features, fake: Features, dtype: type | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of the same extractor."""
    real, fake = as_array(real, dtype), as_array(fake, dtype)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"{real.shape[1]} and {fake.shape[1]} features cannot be compared; they are of two "
                         "extractors.")  # fmt: skip
    return real, fake
