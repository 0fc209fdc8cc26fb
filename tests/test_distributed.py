"""Two processes on one machine see what one would: DDP, and FSDP2."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_hub.training.loop import Progress, train
from dit_hub.training.recipe import get_recipe

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SETTINGS = ["train", "toy", "images_per_class=8", "epochs=4", "batch_size=32", "ema_decay=0.9"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def outcome(out: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses and weights of a run."""
    losses = json.loads((out / "training.json").read_text())["epoch_losses"]
    return torch.tensor(losses), load_file(out / "transformer" / "model.safetensors")


def launch(out: Path, *settings: str, processes: int = 2, machines: int = 1, rank: int = 0, port: int = 0) -> list[str]:
    """A command; of several processes through accelerate, which knows multi_gpu only, on the CPU by ENVIRONMENT."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
                "--num_machines", str(machines), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                "--main_process_port", str(port or free_port()), "--mixed_precision", "no",
                "--dynamo_backend", "no"]  # fmt: skip
    command = ["-m", "dit_hub.cli", *SETTINGS, *settings, "--out", str(out)]
    return [sys.executable, *(launcher if processes > 1 else []), *command]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run_together(*commands: list[str]) -> str:
    """Run commands at once, to their end; what the first one said."""
    running = [start(command) for command in commands]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(commands), said
    return said[0][0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "one"
    run_together(launch(out, processes=1))
    return out


def assert_as_alone(out: Path, alone: Path) -> None:
    (losses, weights), (expected_losses, expected) = outcome(out), outcome(alone)
    torch.testing.assert_close(losses, expected_losses, atol=2e-5, rtol=0)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-3, rtol=0)


@pytest.mark.parametrize("settings", [(), ("fsdp=true", "ema_decay=[0.9,0.5]", "sample_every=10")])
def test_two_processes_train_as_one(tmp_path: Path, alone: Path, settings: tuple[str, ...]) -> None:
    assert "by 2 processes" in run_together(launch(tmp_path / "two", *settings))
    assert_as_alone(tmp_path / "two", alone)


def test_two_machines_train_as_one(tmp_path: Path, alone: Path) -> None:
    """Two launches that meet by address, as on two machines; each has a folder of its own."""
    port = free_port()
    said = run_together(*(launch(tmp_path / f"machine-{rank}", machines=2, rank=rank, port=port) for rank in range(2)))
    assert "by 2 processes" in said
    assert_as_alone(tmp_path / "machine-0", alone)
    assert not (tmp_path / "machine-1").exists()  # the first machine writes


def test_machines_that_share_no_disk_do_not_go_on_differently(tmp_path: Path) -> None:
    """The first machine has a checkpoint and the second has not."""

    def cut(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    settings = dict(setting.split("=") for setting in SETTINGS[2:])
    recipe = get_recipe("toy").with_settings({**settings, "save_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path / "machine-0.run")
    port = free_port()
    commands = [
        launch(tmp_path / f"machine-{rank}", "save_every=2", machines=2, rank=rank, port=port) for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in [start(command) for command in commands]]
    assert all("must lie on a disk that all machines share" in said for said in errors)


def test_a_share_that_cannot_be_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(folder / name / f"{index}.png")
    (folder / "dogs" / "0.png").write_bytes(b"no picture")
    for settings in ((), ("fsdp=true",)):
        out = tmp_path / f"out{len(settings)}"
        run_together(launch(out, f"data={folder}", "batch_size=2", "init_from=dit-toy-shapes", *settings))
        assert out.is_dir()


def test_sharded_and_killed_and_gone_on_with_by_other_numbers_of_processes(tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "two"
    process = start(launch(out, "fsdp=true", "save_every=2"))
    while process.poll() is None and not list(tmp_path.glob("two.run/step-*")):
        time.sleep(0.01)
    for killed in [*psutil.Process(process.pid).children(recursive=True), process]:
        killed.kill()
    process.communicate()
    assert not out.exists()
    run_together(launch(out, "save_every=2", processes=1))
    assert_as_alone(out, alone)
