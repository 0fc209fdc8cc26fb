"""Runs that are killed, and go on as if nothing had happened."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SETTINGS = ["images_per_class=16", "batch_size=64", "ema_decay=0.99", "save_every=4"]


# One thread each: two processes of two threads on two cores wait for one another.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(out: Path, *settings: str) -> list[str]:
    arguments = ["train", "toy", *SETTINGS, *settings, "--out", str(out)]
    return [sys.executable, "-m", "dit_hub.cli", *arguments]


def uninterrupted(folder: Path, *settings: str) -> Path:
    out = folder / "whole"
    subprocess.run(command(out, *settings), check=True, capture_output=True, env=ENVIRONMENT)
    return out


def same_outcome(one: Path, other: Path) -> None:
    """Weights bit for bit, and the losses of every epoch."""
    ours, theirs = (load_file(folder / "transformer" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    losses = [json.loads((folder / "training.json").read_text())["epoch_losses"] for folder in (one, other)]
    assert losses[0] == losses[1]


def run_and_kill(out: Path, wait: float, *settings: str) -> int | None:
    """Start, let it train for `wait` seconds after its first new checkpoint, kill; the status if it ended before."""
    run_folder = Path(f"{out}.run")
    before = {path.name for path in run_folder.glob("step-*")}
    process = subprocess.Popen(command(out, *settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=ENVIRONMENT)  # fmt: skip
    while process.poll() is None and {path.name for path in run_folder.glob("step-*")} <= before:
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode


# Three kills always; `make test-slow` kills 50 times.
@pytest.mark.parametrize(
    ("kills", "epochs"), [(3, "epochs=40"), pytest.param(50, "epochs=300", marks=pytest.mark.slow)]
)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path: Path, kills: int, epochs: str) -> None:
    dice, out, steps = random.Random(0), tmp_path / "toy", []
    for _ in range(kills):
        assert run_and_kill(out, dice.random() * 0.3, epochs) == -signal.SIGKILL
        steps.append(max(path.name for path in Path(f"{out}.run").glob("step-*")))
        assert not out.exists()
    print(f"killed {kills} times, after the checkpoints {', '.join(steps)}")
    subprocess.run(command(out, epochs), check=True, capture_output=True, env=ENVIRONMENT)
    same_outcome(out, uninterrupted(tmp_path, epochs))
    assert not Path(f"{out}.run").exists()


def test_sigterm_saves_and_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    process = subprocess.Popen(command(out, "epochs=40", "save_every=1000"), stdout=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)  # fmt: skip
    time.sleep(7)  # well into the steps
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "goes on from it" in output
    (checkpoint,) = Path(f"{out}.run").glob("step-*")
    assert json.loads((checkpoint / "state.json").read_text())["step"] > 0
    subprocess.run(command(out, "epochs=40", "save_every=1000"), check=True, capture_output=True, env=ENVIRONMENT)
    same_outcome(out, uninterrupted(tmp_path, "epochs=40"))


def test_a_run_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    run_and_kill(out, 0.0, "epochs=40")
    for settings, words in (
        (["epochs=40", "learning_rate=1e-3"], "learning_rate is 0.0005 there and 0.001 here"),
        (["epochs=50", "seed=1"], "epochs is 40 there and 50 here; seed is 0 there and 1 here"),
    ):
        run = subprocess.run(command(out, *settings), capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert words in run.stderr
    newest = max(Path(f"{out}.run").glob("step-*"))
    (newest / "model.safetensors").write_bytes(b"torn")
    run = subprocess.run(command(out, "epochs=40"), capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "is damaged" in run.stderr


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    """Checkpoints of 5 MB meet a limit of 3 MB; the pipeline, of 1.3 MB, does not."""
    out = tmp_path / "toy"
    run = subprocess.run(
        command(out, "epochs=2"),
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )
    assert run.returncode == 0, run.stderr
    assert "No checkpoint at step 4" in run.stderr + run.stdout
    assert (out / "model_index.json").is_file()
