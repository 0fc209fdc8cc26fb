"""The metrics and the Inception network of torch-fidelity, which follows TensorFlow's, give the numbers of ours.

It lies apart, in build/ecosystem, since it asks for torchvision; `make test` runs these with that on the path.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_hub.evaluation.inception import resize_as_tensorflow

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("waits for torch-fidelity: `make test` installs it in build/ecosystem", allow_module_level=True)


@pytest.fixture(scope="module")
def agreement() -> Iterator[Any]:
    """examples/metric_agreement.py; what it puts in the place of torchvision is taken away again."""
    path = Path(__file__).parents[1] / "examples" / "metric_agreement.py"
    spec = importlib.util.spec_from_file_location("metric_agreement", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torch_fidelity")]:
        del sys.modules[name]


def test_metrics_agree(agreement: Any) -> None:
    bounds = {
        "Fréchet distance": 1e-5,  # torch-fidelity's mean is summed in float32
        "KID": 1e-6,  # its kernels are float32 sums near 1
        "precision (float32)": 2 / 1200,  # a sample on the edge of a neighbourhood may be in or out
        "recall (float32)": 2 / 1500,
        "Inception Score": 1e-5,
    }
    rows = agreement.of_features()
    assert {row.what for row in rows} == bounds.keys()
    for row in rows:
        assert row.difference <= bounds[row.what], row


def test_the_inception_network_agrees(agreement: Any) -> None:
    for row in agreement.of_inception():
        assert row.difference <= 1e-5, row.what


@pytest.mark.parametrize("side", [16, 64, 256, 299, 301])
def test_images_are_resized_as_tensorflow_does(side: int, agreement: Any) -> None:
    resize = agreement.fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = torch.randint(0, 256, (1, 3, side, side + 7)).float()
    expected = resize(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize_as_tensorflow(images, 299), expected)  # the same operations, each exactly rounded
