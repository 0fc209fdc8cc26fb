"""What only shows at full size. `make test-slow` runs these: minutes, and 8 GB of disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open

from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
from dit_hub.conversion import to_official


@pytest.mark.slow
def test_an_xl_checkpoint_converts_in_little_more_memory_than_its_size(tmp_path: Path) -> None:
    source = tmp_path / "DiT-XL-2-256x256.pt"
    model = DiTTransformer(DiTConfig.from_name("DiT-XL/2"))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    torch.save(to_official(model.state_dict(), model.config), source)
    command = [sys.executable, "-m", "dit_hub.cli", "convert", str(source), str(tmp_path / "out"), "--vae", "none"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert usage.ru_maxrss * 1024 < 1.5 * source.stat().st_size
    with safe_open(tmp_path / "out" / "transformer" / "model.safetensors", "pt") as written:
        names = set(written.keys())
        assert names == set(model.state_dict())
        for name in ("blocks.27.mlp.fc2.weight", "final_layer.linear.weight", "x_embedder.proj.bias"):
            assert torch.equal(written.get_tensor(name), model.state_dict()[name])


@pytest.mark.slow
def test_an_xl_export_has_its_weights_outside_and_takes_little_memory(tmp_path: Path) -> None:
    model = DiTTransformer(DiTConfig.from_name("DiT-XL/2"))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    DiTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "xl")
    weights = (tmp_path / "xl" / "transformer" / "model.safetensors").stat().st_size
    command = [sys.executable, "-m", "dit_hub.cli", "export", "onnx", str(tmp_path / "xl"), str(tmp_path / "onnx")]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert usage.ru_maxrss * 1024 < 3.5 * weights  # 1.9 times, in 49 s on 2 cores
    assert (tmp_path / "onnx" / "transformer" / "model.onnx").stat().st_size < 1e6
    assert (tmp_path / "onnx" / "transformer" / "model.onnx.data").stat().st_size > 0.99 * weights
    report = json.loads((tmp_path / "onnx" / "report.json").read_text())
    assert report["parity"]["transformer"]["relative_error"] < 1e-5
