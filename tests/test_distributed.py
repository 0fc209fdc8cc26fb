"""Two processes on one machine see what one would: DDP, and FSDP2."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SETTINGS = ["train", "toy", "images_per_class=8", "epochs=4", "batch_size=32", "ema_decay=0.9"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(out: Path, processes: int, *settings: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses and weights of a run."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    module = ["-m", "dit_hub.cli"]
    command = [sys.executable, *(launcher if processes > 1 else []), *module, *SETTINGS, *settings, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = json.loads((out / "training.json").read_text())["epoch_losses"]
    return torch.tensor(losses), load_file(out / "transformer" / "model.safetensors")


@pytest.mark.parametrize("settings", [[], ["fsdp=true"]])
def test_two_processes_train_as_one(tmp_path: Path, settings: list[str]) -> None:
    one_losses, one = launch(tmp_path / "one", 1)
    two_losses, two = launch(tmp_path / "two", 2, *settings)
    torch.testing.assert_close(two_losses, one_losses, atol=2e-5, rtol=0)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-3, rtol=0)
