"""What only shows at full size. `make test-slow` runs these: minutes, and 8 GB of disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dit_hub import DiTConfig, DiTTransformer
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
