"""Means and covariances of features in float64: streamed, merged over processes, kept in ADM's format."""

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

    Rows are held until there are enough to be worth a product of matrices. Then they are centred by their own mean and
    merged by the formula of Chan et al. (1979), which loses no digits.
    """

    def __init__(self, size: int):
        self.size, self._merged = size, 0
        self._mean = torch.zeros(size, dtype=torch.float64)
        self._scatter = torch.zeros(size, size, dtype=torch.float64)
        self._held: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """The number of samples."""
        return self._merged + sum(len(rows) for rows in self._held)

    def add(self, features: Features) -> "Moments":
        """Add (N, D) features; returns itself."""
        for start in range(0, len(features), _ROWS):
            self._held.append(as_array(features[start : start + _ROWS], offset=start))
            if sum(len(rows) for rows in self._held) >= _ROWS:
                self._merge_held()
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Add what another has seen; returns itself."""
        self._merge_held()
        other._merge_held()
        self._merge(other._merged, other._mean, other._scatter)
        return self

    def without(self, other: "Moments") -> "Moments":
        """The moments of what this has seen and `other`, a part of it, has not."""
        self._merge_held()
        other._merge_held()
        rest = Moments(self.size)
        rest._merged = self._merged - other._merged
        rest._mean = (self._merged * self._mean - other._merged * other._mean) / rest._merged
        shift = other._mean - rest._mean
        rest._scatter = self._scatter - other._scatter
        rest._scatter -= torch.outer(shift, shift) * (rest._merged * other._merged / self._merged)
        return rest

    def _merge_held(self) -> None:
        if self._held:
            rows = torch.from_numpy(np.concatenate(self._held)).double()
            self._held = []
            mean = rows.mean(dim=0)
            rows -= mean
            self._merge(len(rows), mean, rows.T @ rows)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._merged + count
        if not count:
            return
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += torch.outer(shift, shift) * (self._merged * count / total)
        self._mean = self._mean + shift * (count / total)
        self._merged = total

    @property
    def statistics(self) -> Statistics:
        """Mean and covariance of at least two samples."""
        self._merge_held()
        if self._merged < 2:
            raise ValueError(f"Statistics need two samples or more, not {self._merged}.")
        return Statistics(self._mean.numpy(), (self._scatter / (self._merged - 1)).numpy(), self._merged)


def as_array(features: Features, dtype: Any = None, offset: int = 0) -> np.ndarray:
    """(N, D) features as a numpy array of finite numbers; `offset` is the number of the first one, for messages.

    Raises:
        ValueError: another shape, or a feature that is NaN or infinite.
    """
    if isinstance(features, Tensor):
        array = (features if features.dtype == torch.float64 else features.float()).detach().cpu().numpy()
    else:
        array = np.asarray(features)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ValueError(f"Features must be numbers of up to 64 bits, not {array.dtype}.")
    array = array.astype(
        np.float32 if array.dtype.itemsize <= 4 and array.dtype.kind == "f" else np.float64, copy=False
    )
    if array.ndim != 2 or not array.size:
        raise ValueError(f"Features must be (N, D), not {array.shape}.")
    if not np.isfinite(array).all():
        row = offset + int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"The features of sample {row} are not finite; are the images or the extractor damaged?")
    return array if dtype is None else array.astype(dtype, copy=False)


def statistics_of(features: "Features | Statistics") -> Statistics:
    """The statistics of (N, D) features; statistics are returned as they are."""
    if isinstance(features, Statistics):
        return features
    if not isinstance(features, (np.ndarray, Tensor)) or features.ndim != 2:
        features = as_array(features)  # which says what is wrong with it
    return Moments(features.shape[1]).add(features).statistics


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
        side: (height, width) of the images; None where the file does not say.
    """

    statistics: dict[str, Statistics] = field(default_factory=dict)
    extractor: str | None = None
    fingerprint: str | None = None
    side: tuple[int, int] | None = None


def save_statistics(file: StatisticsFile, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write statistics as ADM's archives hold them (`mu`, `sigma`, `mu_s`, `sigma_s`), with the extractor's name."""
    arrays: dict[str, Any] = {}
    for output, statistics in file.statistics.items():
        mean, covariance = _KEYS[output]
        arrays |= {mean: statistics.mean, covariance: statistics.covariance, "count": np.array(statistics.count)}
    if file.extractor is not None:
        arrays |= {"extractor": np.array(file.extractor), "fingerprint": np.array(file.fingerprint)}
    if file.side is not None:
        arrays["side"] = np.array(file.side)
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
            side = tuple(int(length) for length in archive["side"]) if "side" in names else None
            count = int(notes.get("count", 0))
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
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
        if not _is_covariance(arrays[mean], arrays[covariance]):
            raise ValueError(f"{path}: {covariance} is no covariance of the features of {mean}.")
        found[output] = Statistics(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), count)
    height_width = (side[0], side[1]) if side and len(side) == 2 else None
    return StatisticsFile(found, notes.get("extractor"), notes.get("fingerprint"), height_width)


def _is_covariance(mean: np.ndarray, covariance: np.ndarray) -> bool:
    """Whether a matrix has the form of a covariance: square, symmetric, without negative variances."""
    fitting = covariance.shape == (len(mean), len(mean))
    scale = np.abs(covariance).max() if fitting else 0
    return fitting and bool(
        np.allclose(covariance, covariance.T, atol=1e-6 * scale) and (covariance.diagonal() >= 0).all()
    )
