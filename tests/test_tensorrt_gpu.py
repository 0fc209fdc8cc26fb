"""TensorRT engines on the GPU they are for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from dit_hub import DiTPipeline
from dit_hub.export import TensorRTDiTTransformer, export_tensorrt, verify_export
from dit_hub.export.tensorrt_build import PRODUCTS, Machine

from .conftest import MakePipeline

_HERE = Machine.this()
# tensorrt_rtx has no engines for the H100 and H200.
_FITS = "tensorrt" in _HERE.products or (
    PRODUCTS["rtx"] in _HERE.products and _HERE.compute_capability not in (None, "9.0")
)
pytestmark = pytest.mark.skipif(
    _HERE.compute_capability is None or not _FITS, reason="waits for an NVIDIA GPU and the TensorRT that runs on it"
)


def sample(pipeline: DiTPipeline, count: int, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    labels = [index % pipeline.transformer.config.num_classes for index in range(count)]
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 10, "output_type": "latent", **options}
    return pipeline(labels, generator=generator, **options).images.cpu()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engines_sample_as_pytorch_does(make_pipeline: MakePipeline, tmp_path: Path, cuda_graphs: bool) -> None:
    pipeline = make_pipeline(latent=True)
    export_tensorrt(pipeline, tmp_path / "trt", precision="fp32")
    assert verify_export(tmp_path / "trt")["transformer"].measured_on.startswith("tensorrt")
    engines = DiTPipeline.from_pretrained(tmp_path / "trt", cuda_graphs=cuda_graphs)
    assert isinstance(engines.transformer, TensorRTDiTTransformer)
    for count in (3, 1, 3, 1):  # shapes that take turns
        for options in ({}, {"guidance_interval": (0.2, 0.7)}):
            expected = sample(pipeline, count, **options)
            assert ((sample(engines, count, **options) - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_whole_sampler_runs(make_pipeline: MakePipeline, tmp_path: Path, cuda_graphs: bool) -> None:
    pipeline = make_pipeline(scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=False))
    export_tensorrt(pipeline, tmp_path / "trt", ["sampler"], "fp32")
    engine = DiTPipeline.from_pretrained(tmp_path / "trt", cuda_graphs=cuda_graphs)
    expected = sample(pipeline, 3)
    for _ in range(3):
        assert ((sample(engine, 3) - expected).norm() / expected.norm()) < 1e-4
