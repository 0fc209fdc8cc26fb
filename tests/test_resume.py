"""Runs that are killed, and go on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SETTINGS = ["images_per_class=16", "epochs=40", "batch_size=64", "ema_decay=0.99", "save_every=4"]


# One thread each: two processes of two threads on two cores wait for one another.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(out: Path, *settings: str) -> list[str]:
    arguments = ["train", "toy", *SETTINGS, *settings, "--out", str(out)]
    return [sys.executable, "-m", "dit_hub.cli", *arguments]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "toy"
    subprocess.run(command(out), check=True, capture_output=True, env=ENVIRONMENT)
    return out


def same_outcome(one: Path, other: Path) -> None:
    """Weights bit for bit, and the losses of every epoch."""
    ours, theirs = (load_file(folder / "transformer" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    losses = [json.loads((folder / "training.json").read_text())["epoch_losses"] for folder in (one, other)]
    assert losses[0] == losses[1]


def run_and_kill(out: Path, wait: float) -> int | None:
    """Start, let it train for `wait` seconds after its first new checkpoint, kill; the status if it ended before."""
    run_folder = Path(f"{out}.run")
    before = {path.name for path in run_folder.glob("step-*")}
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=ENVIRONMENT)  # fmt: skip
    while process.poll() is None and {path.name for path in run_folder.glob("step-*")} <= before:
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    dice = random.Random(int(os.environ.get("DIT_HUB_KILL_SEED", "0")))
    kills = int(os.environ.get("DIT_HUB_KILLS", "3"))
    out = tmp_path / "toy"
    killed = 0
    while killed < kills and run_and_kill(out, dice.random() * 0.3) == -signal.SIGKILL:
        killed += 1
        assert not out.exists()
    assert killed == kills
    subprocess.run(command(out), check=True, capture_output=True, env=ENVIRONMENT)
    same_outcome(out, uninterrupted)
    assert not Path(f"{out}.run").exists()
