"""Metrics against closed forms, and against references that are written out with numpy and scipy."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial import KDTree

from dit_hub.evaluation import (
    Moments,
    Statistics,
    density_coverage,
    frechet_distance,
    frechet_extrapolation,
    frechet_ratio,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    load_statistics,
    monge_distance,
    precision_recall,
    save_statistics,
)
from dit_hub.evaluation.estimates import METRICS, Collected, Options, compute, order_of
from dit_hub.evaluation.metrics import kernel_distances
from dit_hub.evaluation.statistics import StatisticsFile

RANDOM = np.random.default_rng(0)


def drawn(count: int, size: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return (RANDOM.normal(shift, scale, (count, size))).astype(np.float32)


def covariance(size: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T / size


# --- Statistics ------------------------------------------------------------------------------------------------------


def test_batches_and_processes_together_have_the_statistics_of_all() -> None:
    # An offset a million times the spread: sums of squares would lose every digit of the covariance.
    features = drawn(500, 6).astype(np.float64) + 1e6
    parts = [Moments(6).add(features[:7]), Moments(6).add(torch.from_numpy(features[7:300]).double().numpy())]
    whole = parts[0].merge(parts[1]).add(features[300:])
    np.testing.assert_allclose(whole.statistics.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.statistics.covariance, np.cov(features, rowvar=False), atol=1e-8)
    rest = whole.without(Moments(6).add(features[:100])).statistics
    np.testing.assert_allclose(rest.covariance, np.cov(features[100:], rowvar=False), atol=1e-8)
    assert rest.count == 400


def test_statistics_are_kept_as_adm_keeps_them(tmp_path: Any) -> None:
    statistics = Moments(3).add(drawn(10, 3)).statistics
    path = tmp_path / "stats.npz"
    save_statistics(StatisticsFile({"features": statistics, "spatial": statistics}, "shapes", "abc"), path)
    with np.load(path) as archive:
        assert set(archive.files) >= {"mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_array_equal(archive["sigma"], statistics.covariance)
    found = load_statistics(path)
    assert found is not None
    assert (found.extractor, found.fingerprint) == ("shapes", "abc")
    np.testing.assert_array_equal(found.statistics["features"].mean, statistics.mean)


# --- Gaussians -------------------------------------------------------------------------------------------------------


def test_two_gaussians_have_the_distance_of_the_closed_form() -> None:
    first, second = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    shift = np.array([1.0, -2.0, 0.5])
    exact = (shift**2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    found = frechet_distance(Statistics(np.zeros(3), np.diag(first)), Statistics(shift, np.diag(second)))
    assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("count", [400, 20])  # more and fewer samples than features
def test_the_frechet_distance_is_that_of_scipys_matrix_root(count: int) -> None:
    real, fake = drawn(400, 30) @ covariance(30, 1).astype(np.float32), drawn(count, 30, 0.3)
    means = [rows.mean(axis=0, dtype=np.float64) for rows in (real, fake)]
    spreads = [np.cov(rows.astype(np.float64), rowvar=False) for rows in (real, fake)]
    root = np.real(np.asarray(scipy.linalg.sqrtm(spreads[0] @ spreads[1])))
    exact = ((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0] + spreads[1] - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(exact, rel=1e-6)
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == frechet_distance(real, fake)


def test_a_set_is_at_no_distance_from_itself() -> None:
    rows = drawn(40, 60)
    assert abs(frechet_distance(rows, rows)) < 1e-6 * np.trace(np.cov(rows, rowvar=False))
    assert abs(gaussian_mmd(rows, rows)) < 1e-9
    assert monge_distance(rows, rows) == 0
    assert precision_recall(rows, rows, half=False) == (1, 1)


def test_more_samples_would_lower_the_frechet_distance_to_the_extrapolated_one() -> None:
    real = Statistics(np.zeros(40), np.eye(40))
    random = np.random.default_rng(3)
    fake = random.normal(0.1, 1, (1000, 40))  # 0.4 away; 1,000 samples add (40^2 + 3 * 40) / 4 / 1000 to first order
    limit, line = frechet_extrapolation(real, fake)
    assert len(line) == 8
    assert line[0][0] == 500
    assert line[-1] == (1000, pytest.approx(frechet_distance(real, fake)))
    assert abs(limit - 0.4) < 0.1 < line[-1][1] - 0.4


def test_the_ratio_is_in_units_of_held_out_images() -> None:
    real, fake, held_out = drawn(200, 4), drawn(200, 4, 1.0), drawn(200, 4, 0.1)
    assert frechet_ratio(real, fake, held_out) == pytest.approx(
        frechet_distance(real, fake) / frechet_distance(real, held_out)
    )
    assert frechet_ratio(real, held_out, held_out) == 1


# --- Kernels and sorting ---------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_the_unbiased_estimate() -> None:
    real, fake = drawn(30, 5), drawn(30, 5, 0.5)
    size, total = 30, 0.0
    for rows, others, sign in ((real, real, 1), (fake, fake, 1), (fake, real, -2)):
        kernel = (rows.astype(np.float64) @ others.astype(np.float64).T / 5 + 1) ** 3
        same = rows is others
        total += sign * (kernel.sum() - np.trace(kernel)) / (size * (size - 1)) if same else sign * kernel.mean()
    assert kernel_distance(real, fake, subset_size=100, subsets=1) == pytest.approx(total, rel=1e-9)
    other = np.random.default_rng(5).normal(size=(2, 3000, 8)).astype(np.float32)
    values = kernel_distances(other[0], other[1])
    # Two draws of one distribution: near zero, as far as three sets of 1,000 tell.
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(3)


def test_the_gaussian_mmd_is_that_of_unit_vectors() -> None:
    real, fake = drawn(20, 6), drawn(25, 6, 1.0)
    unit = [rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1)[:, None] for rows in (real, fake)]

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((a - b) ** 2).sum() / 200) for b in y] for a in x]))

    exact = mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(unit[0], unit[1])
    assert gaussian_mmd(real, fake) == pytest.approx(1000 * exact, rel=1e-6)


def test_a_shift_is_at_the_monge_distance_of_its_length() -> None:
    real, shift = drawn(300, 16), RANDOM.normal(size=16).astype(np.float32)
    exact = 3 * (shift**2).sum()  # the mean of (u·v)^2 over directions is |v|^2 / D
    # 4,000 directions tell that mean to 2 %.
    assert monge_distance(real, real + shift, projections=4000) == pytest.approx(exact, rel=0.1)
    assert monge_distance(real, np.repeat(real, 2, axis=0)) == pytest.approx(0, abs=1e-9)
    other = drawn(300, 16, 0.5)
    directions = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    x, y = (np.sort(rows @ directions.numpy(), axis=0) for rows in (real, other))
    assert monge_distance(real, other, projections=100) == pytest.approx(3 * 16 * ((x - y) ** 2).mean(), rel=1e-4)
    # Of two and three samples on a line: the quantiles meet in pieces of 1/3, 1/6, 1/6, 1/3.
    x, y = np.array([[0.0], [3.0]], np.float32), np.array([[0.0], [1.0], [2.0]], np.float32)
    assert monge_distance(x, y) == pytest.approx(3 * (0 + 1 / 6 + 4 / 6 + 1 / 3), rel=1e-6)


# --- Neighbours ------------------------------------------------------------------------------------------------------


def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ((x[:, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(axis=2)


def test_precision_and_recall_are_counts_of_neighbourhoods() -> None:
    real, fake = drawn(200, 8), drawn(150, 8, 0.5)
    radii = [np.sort(squared(rows, rows), axis=1)[:, 3] for rows in (real, fake)]
    across = squared(real, fake)
    exact = (across <= radii[0][:, None]).any(axis=0).mean(), (across <= radii[1][None]).any(axis=1).mean()
    assert precision_recall(real, fake, half=False) == pytest.approx(exact)
    inside = across < np.sort(squared(real, real), axis=1)[:, 5][:, None]
    assert density_coverage(real, fake) == pytest.approx((inside.sum(axis=0).mean() / 5, inside.any(axis=1).mean()))


def in_half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distances of float16's precision, as ADM's formula has them, with sums in float32."""
    x, y = x.astype(np.float16), y.astype(np.float16)
    norms = [(rows * rows).astype(np.float32).sum(axis=1).astype(np.float16) for rows in (x, y)]
    product = (x.astype(np.float32) @ y.astype(np.float32).T).astype(np.float16)
    return np.maximum((norms[0][:, None] - np.float16(2) * product) + norms[1], np.float16(0)).astype(np.float32)


def test_distances_have_the_precision_of_adm() -> None:
    random = np.random.default_rng(7)
    real, fake = (np.abs(random.normal(shift, 1, (300, 64))).astype(np.float32) for shift in (0.0, 0.2))
    radii = [np.sort(in_half(rows, rows), axis=1)[:, 3] for rows in (real, fake)]
    across = in_half(real, fake)
    exact = (across <= radii[0][:, None]).any(axis=0).mean(), (across <= radii[1][None]).any(axis=1).mean()
    assert precision_recall(real, fake) == pytest.approx(exact)
    assert precision_recall(real, fake) != precision_recall(real, fake, half=False)


def test_distances_that_float16_cannot_hold_are_those_of_float32() -> None:
    real, fake = drawn(100, 64) * 100, drawn(100, 64, 0.2) * 100
    with np.errstate(all="ignore"):
        assert not np.isfinite(in_half(real, fake)).all()
    assert precision_recall(real, fake) == precision_recall(real, fake, half=False)


def test_many_samples_are_compared_in_blocks() -> None:
    random = np.random.default_rng(8)
    real, fake = (random.normal(size=(10_300, 3)).astype(np.float32) for _ in range(2))
    shares = []
    for x, y in ((real, fake), (fake, real)):  # of y near x
        radii = KDTree(x).query(x, 4)[0][:, 3]
        near = np.zeros(len(y), bool)
        for hits in KDTree(y).query_ball_point(x, radii):
            near[hits] = True
        shares.append(near.mean())
    # Float32 decides otherwise for samples that lie on the edge of a neighbourhood.
    assert precision_recall(real, fake, half=False) == pytest.approx(shares, abs=2e-3)


# --- Classes ---------------------------------------------------------------------------------------------------------


def test_the_inception_score_counts_classes() -> None:
    assert inception_score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7)
    assert inception_score(np.tile([0.2, 0.8], (10, 1))) == pytest.approx(1)
    one_class_a_split = np.eye(2)[np.repeat([0, 1], 50)]
    assert inception_score(one_class_a_split, split_size=50) == pytest.approx(1)
    assert inception_score(one_class_a_split) == pytest.approx(2)
    uneven = np.eye(2)[[0, 1, 0, 1, 0]]  # the last split has one image
    assert inception_score(uneven, split_size=4) == pytest.approx((2 + 1) / 2)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(drawn(5, 3), drawn(5, 4)), "3 and 4 features"),
        (lambda: precision_recall(drawn(5, 3), drawn(5, 4)), "3 and 4 features"),
        (lambda: precision_recall(drawn(3, 2), drawn(9, 2)), "3 neighbours need more than 3 samples"),
        (lambda: frechet_distance(drawn(5, 3), drawn(1, 3)), "two samples or more, not 1"),
        (lambda: frechet_distance(drawn(5, 3), np.full((4, 3), np.nan)), "sample 0 are not finite"),
        (lambda: kernel_distance(drawn(5, 3), drawn(5, 3)[0]), r"must be \(N, D\)"),
        (lambda: inception_score(drawn(5, 3)), "needs probabilities"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- Standard errors -------------------------------------------------------------------------------------------------


def test_standard_errors_are_the_spread_of_other_draws() -> None:
    random = np.random.default_rng(9)
    real = random.normal(size=(400, 6)).astype(np.float32)
    reference = Collected({"features": real}, {"features": Moments(6).add(real).statistics}, 400)
    names = ["fid", "precision", "density", "cmmd"]
    draws = []
    for _ in range(40):
        fake = random.normal(0.3, 1.1, (300, 6)).astype(np.float32)
        found = compute(names, reference, Collected({"features": fake}, {}, 300), Options())
        draws.append([(found[name].value, found[name].error) for name in names])
    values, errors = np.array(draws).transpose(2, 0, 1)
    # 40 draws tell a spread to 11 %, and 20 groups each error to 16 %.
    np.testing.assert_allclose(errors.mean(axis=0), values.std(axis=0), rtol=0.35)


def test_balanced_samples_are_compared_in_balanced_parts() -> None:
    labels = np.repeat(np.arange(5), 40)
    order = order_of(200, 0, labels)
    assert sorted(order) == list(range(200))
    for part in np.array_split(order, 20):
        assert np.bincount(labels[part], minlength=5).tolist() == [2] * 5
    assert np.bincount(labels[order_of(200, 0)[:10]], minlength=5).tolist() != [2] * 5


def test_every_metric_is_public_by_name() -> None:
    assert list(METRICS) == ["fid", "fid_infinity", "sfid", "is", "precision", "recall", "kid", "density", "coverage",
                             "mind", "cmmd"]  # fmt: skip
