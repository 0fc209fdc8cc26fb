"""Our metrics beside torch-fidelity's and scipy's, on the same numbers: the table of docs/evaluation.md.

    make build/ecosystem/.installed
    PYTHONPATH=build/ecosystem .venv/bin/python examples/metric_agreement.py

torch-fidelity follows TensorFlow's evaluators. It asks for torchvision, but uses it for its data sets only, so that a
stand-in will do here.
"""

import importlib
import importlib.machinery
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dit_hub.evaluation import frechet_distance, inception_score, kernel_distance, precision_recall
from dit_hub.evaluation.inception import SIDE, Inception, inception_from, resize_as_tensorflow


class Row(NamedTuple):
    """A figure of ours and of a peer; arrays are compared by the relative length of their difference."""

    what: str
    ours: Any
    theirs: Any
    peer: str

    @property
    def difference(self) -> float:
        """Absolute for numbers, relative for arrays."""
        if isinstance(self.ours, float):
            return abs(self.ours - self.theirs)
        return float((self.ours - self.theirs).norm() / self.theirs.norm())


class _Nothing(types.ModuleType):
    """A module in whose place an import is content; what is asked of it are empty classes."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def fidelity(module: str) -> Any:
    """A module of torch-fidelity."""
    for part in ("", ".transforms", ".transforms.functional", ".datasets", ".models"):
        name = f"torchvision{part}"
        if name not in sys.modules:
            sys.modules[name] = stand_in = _Nothing(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            if part:
                setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], stand_in)
    return importlib.import_module(f"torch_fidelity.{module}")


def of_features() -> list[Row]:
    """Metrics of 1,500 real and 1,200 generated features, above zero as Inception's."""
    random = np.random.default_rng(0)
    real, fake = (np.abs(random.normal(shift, 1, (count, 64))) for shift, count in ((0.0, 1500), (0.1, 1200)))
    x, y = (torch.from_numpy(rows.astype(np.float32)) for rows in (real, fake))
    spreads = [np.cov(rows.numpy().astype(np.float64), rowvar=False) for rows in (x, y)]
    shift = x.double().mean(dim=0).numpy() - y.double().mean(dim=0).numpy()
    root = np.real(np.asarray(scipy.linalg.sqrtm(spreads[0] @ spreads[1])))
    by_scipy = float(shift @ shift + np.trace(spreads[0] + spreads[1] - 2 * root))
    metric = fidelity("metric_fid")
    statistics = [metric.fid_features_to_statistics(rows) for rows in (x, y)]
    by_fidelity = metric.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None,
              "kid_kernel_poly_coef0": 1}  # fmt: skip
    options = {"kid_subsets": 20, "kid_subset_size": 500, "rng_seed": 2020, "verbose": False}
    kid = fidelity("metric_kid").kid_features_to_metric(y, x, **options, **kernel)["kernel_inception_distance_mean"]
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    neighbours = fidelity("metric_prc").prc_features_to_metric(y, x, **options)
    precision, recall = precision_recall(x, y, half=False)
    logits = 3 * torch.randn(3000, 10, generator=torch.Generator().manual_seed(0))
    score = fidelity("metric_isc").isc_features_to_metric(logits, 6, False, 0)["inception_score_mean"]
    return [
        Row("Fréchet distance", frechet_distance(x, y), by_scipy, "scipy"),
        Row("Fréchet distance", frechet_distance(x, y), by_fidelity, "torch-fidelity"),
        Row("KID", kernel_distance(x, y, 500, 20), kid, "torch-fidelity"),
        Row("precision (float32)", precision, neighbours["precision"], "torch-fidelity"),
        Row("recall (float32)", recall, neighbours["recall"], "torch-fidelity"),
        Row("Inception Score", inception_score(logits.softmax(dim=1), 500), score, "torch-fidelity"),
    ]


def of_inception() -> list[Row]:
    """The Inception network with random weights, and the resizing before it."""
    torch.manual_seed(0)
    network = Inception()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):  # so that a swapped layer shows
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias)
            part.running_mean, part.running_var = torch.randn(part.num_features), torch.rand(part.num_features) + 0.5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(network.state_dict(), path)
        peer = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    images = torch.randint(0, 256, (2, 3, 100, 140), dtype=torch.uint8)
    resize = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    with torch.no_grad():
        features, logits = peer(images)
        found = inception_from(network.state_dict())(images)
    resized = resize(images.float(), size=(SIDE, SIDE), align_corners=False)
    return [
        Row("resizing to 299x299", resize_as_tensorflow(images.float(), SIDE), resized, "torch-fidelity"),
        Row("Inception, features", found["features"], features, "torch-fidelity"),
        Row("Inception, probabilities", found["probabilities"], logits.softmax(dim=1), "torch-fidelity"),
    ]


def main() -> None:
    table = Table("what", "ours", "theirs", "difference", "peer")
    for row in [*of_features(), *of_inception()]:
        shown = [f"{value:.7f}" if isinstance(value, float) else "" for value in (row.ours, row.theirs)]
        table.add_row(row.what, *shown, f"{row.difference:.1e}", row.peer)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
