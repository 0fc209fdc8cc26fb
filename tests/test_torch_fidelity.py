"""The metrics and the Inception network of torch-fidelity, which follows TensorFlow's, give the numbers of ours.

It lies apart, in build/ecosystem, since it asks for torchvision; `make test` runs these with that on the path.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dit_hub.evaluation import frechet_distance, inception_score, kernel_distance, precision_recall
from dit_hub.evaluation.inception import Inception, inception_from, resize_as_tensorflow

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("waits for torch-fidelity: `make test` installs it in build/ecosystem", allow_module_level=True)


class Nothing(types.ModuleType):
    """A module in whose place an import is content; what is asked of it are empty classes."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="module", autouse=True)
def without_torchvision() -> Iterator[None]:
    """torch-fidelity is imported without torchvision, which it needs for data sets only."""
    names = [f"torchvision{part}" for part in ("", ".transforms", ".transforms.functional", ".datasets", ".models")]
    for name in names:
        module = sys.modules[name] = Nothing(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torch_fidelity")]:
        del sys.modules[name]


def theirs(module: str) -> Any:
    return importlib.import_module(f"torch_fidelity.{module}")


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    """Real and generated ones, above zero as Inception's."""
    random = np.random.default_rng(0)
    real, fake = (np.abs(random.normal(shift, 1, (count, 64))) for shift, count in ((0.0, 1500), (0.1, 1200)))
    return real.astype(np.float32), fake.astype(np.float32)


def test_the_frechet_distance(features: tuple[np.ndarray, np.ndarray]) -> None:
    metric = theirs("metric_fid")
    statistics = [metric.fid_features_to_statistics(torch.from_numpy(rows)) for rows in features]
    expected = metric.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*features) == pytest.approx(expected, rel=1e-5)  # their mean is summed in float32


def test_the_kernel_distance(features: tuple[np.ndarray, np.ndarray]) -> None:
    real, fake = map(torch.from_numpy, features)
    options = {"kid_subsets": 20, "kid_subset_size": 500, "rng_seed": 2020, "verbose": False}
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None,
              "kid_kernel_poly_coef0": 1}  # fmt: skip
    found = theirs("metric_kid").kid_features_to_metric(fake, real, **options, **kernel)
    # Theirs are differences of float32 sums near 1.
    assert kernel_distance(real, fake, 500, 20) == pytest.approx(found["kernel_inception_distance_mean"], abs=1e-6)


def test_precision_and_recall(features: tuple[np.ndarray, np.ndarray]) -> None:
    real, fake = map(torch.from_numpy, features)
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    expected = theirs("metric_prc").prc_features_to_metric(fake, real, **options)
    found = precision_recall(real, fake, half=False)
    # A sample on the edge of a neighbourhood may be in or out.
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=2 / 1200)


def test_the_inception_score() -> None:
    logits = 3 * torch.randn(3000, 10, generator=torch.Generator().manual_seed(0))
    expected = theirs("metric_isc").isc_features_to_metric(logits, 6, False, 0)["inception_score_mean"]
    assert inception_score(logits.softmax(dim=1), split_size=500) == pytest.approx(expected, rel=1e-6)


def test_the_inception_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Inception()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):  # so that a swapped layer shows
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias)
            part.running_mean, part.running_var = torch.randn(part.num_features), torch.rand(part.num_features) + 0.5
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    peer = theirs("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    images = torch.randint(0, 256, (2, 3, 100, 140), dtype=torch.uint8)
    with torch.no_grad():
        features, logits = peer(images)
        found = inception_from(network.state_dict())(images)
    torch.testing.assert_close(found["features"], features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["probabilities"], logits.softmax(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [16, 64, 256, 299, 301])
def test_images_are_resized_as_tensorflow_does(side: int) -> None:
    resize = theirs("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = torch.randint(0, 256, (1, 3, side, side + 7)).float()
    expected = resize(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize_as_tensorflow(images, 299), expected)  # the same operations, each exactly rounded
