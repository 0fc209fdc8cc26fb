"""Means and covariances of features in float64: streamed, merged over processes, kept in ADM's format."""

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import listed
from ..files import new_file

# (N, D) features, on any device and of any float type.
Features = np.ndarray | Tensor

# Rows that are converted to float64 at a time: 64 MB of 2,048 features.
_ROWS = 4096


@dataclass
class Statistics:
    """Mean and covariance of features.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64, divided by N - 1 as numpy's `cov` does.
        count: number of samples N; 0 where a file does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0

    def __post_init__(self) -> None:
        (size,) = self.mean.shape
        if self.covariance.shape != (size, size):
            raise ValueError(f"A mean of {size} features does not go with a covariance of {self.covariance.shape}.")


class Moments:
    """Sums from which `Statistics` follow, of features that come in batches or from several processes.

    Batches are centred by their own mean and merged by the formula of Chan et al. (1979), which loses no digits.
    """

    def __init__(self, size: int):
        self.count = 0
        self.mean = np.zeros(size)
        self.scatter = np.zeros((size, size))

    def add(self, features: Features) -> "Moments":
        """Add (N, D) features; returns itself."""
        for start in range(0, len(features), _ROWS):
            rows = as_array(features[start : start + _ROWS], np.float64)
            mean = rows.mean(axis=0)
            rows = rows - mean
            self._merge(len(rows), mean, rows.T @ rows)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Add what another has seen; returns itself."""
        self._merge(other.count, other.mean, other.scatter)
        return self

    def without(self, other: "Moments") -> "Moments":
        """The moments of what this has seen and `other`, a part of it, has not."""
        rest = Moments(len(self.mean))
        rest.count = self.count - other.count
        rest.mean = (self.count * self.mean - other.count * other.mean) / rest.count
        shift = other.mean - rest.mean
        rest.scatter = self.scatter - other.scatter - np.outer(shift, shift) * (rest.count * other.count / self.count)
        return rest

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        if not count:
            return
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def statistics(self) -> Statistics:
        """Mean and covariance of at least two samples."""
        if self.count < 2:
            raise ValueError(f"Statistics need two samples or more, not {self.count}.")
        return Statistics(self.mean, self.scatter / (self.count - 1), self.count)


def as_array(features: Features, dtype: Any = None) -> np.ndarray:
    """(N, D) features as a numpy array of finite numbers.

    Raises:
        ValueError: another shape, or a feature that is NaN or infinite.
    """
    array = features.detach().cpu().float().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"Features must be (N, D), not {array.shape}.")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"The features of sample {row} are not finite; are the images or the extractor damaged?")
    return array if dtype is None else array.astype(dtype, copy=False)


def statistics_of(features: "Features | Statistics") -> Statistics:
    """The statistics of (N, D) features; statistics are returned as they are."""
    return features if isinstance(features, Statistics) else Moments(features.shape[1]).add(features).statistics


# --- Files -----------------------------------------------------------------------------------------------------------

# The names of statistics in ADM's archives, and the outputs of an extractor that they belong to.
_KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass
class StatisticsFile:
    """The contents of a file of statistics.

    Args:
        statistics: by the extractor's output: "features" and, where it is there, "spatial".
        extractor: name of the extractor; None where the file does not say, as ADM's do not.
        fingerprint: of the extractor's weights.
    """

    statistics: dict[str, Statistics] = field(default_factory=dict)
    extractor: str | None = None
    fingerprint: str | None = None


def save_statistics(file: StatisticsFile, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write statistics as ADM's archives hold them (`mu`, `sigma`, `mu_s`, `sigma_s`), with the extractor's name."""
    arrays: dict[str, Any] = {}
    for output, statistics in file.statistics.items():
        mean, covariance = _KEYS[output]
        arrays |= {mean: statistics.mean, covariance: statistics.covariance, "count": np.array(statistics.count)}
    if file.extractor is not None:
        arrays |= {"extractor": np.array(file.extractor), "fingerprint": np.array(file.fingerprint)}
    with new_file(path, overwrite) as building, open(building, "wb") as stream:
        np.savez(stream, **arrays)


def load_statistics(path: str | os.PathLike) -> StatisticsFile | None:
    """The statistics in an .npz archive; None if it holds none.

    Raises:
        ValueError: the archive is damaged, or what it holds is not a mean and a covariance.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            present = {output: keys for output, keys in _KEYS.items() if names.issuperset(keys)}
            arrays = {key: archive[key] for keys in present.values() for key in keys}
            notes = {key: archive[key].item() for key in ("extractor", "fingerprint", "count") if key in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"There is no file {path}.") from None
        raise ValueError(f"{path} is not an archive of numpy's: {str(error).removesuffix('.')}.") from None
    if not present:
        return None
    found = {}
    for output, (mean, covariance) in present.items():
        if arrays[mean].dtype.kind != "f" or arrays[covariance].dtype.kind != "f" or arrays[mean].ndim != 1:
            raise ValueError(f"{path}: {mean} must be (D,) floats and {covariance} (D, D).")
        if not (np.isfinite(arrays[mean]).all() and np.isfinite(arrays[covariance]).all()):
            raise ValueError(f"{path}: {listed([mean, covariance])} hold values that are not finite.")
        count = int(notes.get("count", 0))
        found[output] = Statistics(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), count)
    return StatisticsFile(found, notes.get("extractor"), notes.get("fingerprint"))
