"""Two processes on one machine see what one would: DDP, and FSDP2."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from dit_hub.training.data import Batch, InMemoryImages, Key
from dit_hub.training.loop import Progress, train
from dit_hub.training.recipe import Recipe, get_recipe
from dit_hub.training.shapes import ID2LABEL, shapes

from .command_line import Python, dit_hub
from .conftest import SMALL_MODEL, TOYS_NOISE, TOYS_NOISE_SETTINGS
from .together import PROCESSES, Together, environment, free_port

SETTINGS = ["train", "toy", "images_per_class=8", "epochs=4", "batch_size=32", "ema_decay=0.9"]


def outcome(out: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses and weights of a run."""
    losses = json.loads((out / "training.json").read_text())["epoch_losses"]
    return torch.tensor(losses), load_file(out / "transformer" / "model.safetensors")


def start_together(outs: Sequence[Path], *settings: str) -> list[Python]:
    """The command in a process for each folder, in the environment that a launcher gives; of one folder on one machine.

    Only `test_two_processes_train_as_one` uses the launcher itself, which imports everything once more.
    """
    machines, port = len(set(outs)), free_port()
    started = []
    for rank, out in enumerate(outs):
        place = environment(rank, len(outs), rank if machines == 1 else 0, len(outs) // machines, port)
        command = ("-m", "dit_hub.cli", *SETTINGS, *settings, "--out", out)
        started.append(Python(*command, cwd=out.parent, environment=os.environ | place))
    return started


def run_together(outs: Sequence[Path], *settings: str) -> str:
    """Such processes to their end; what the first one said."""
    runs = [process.wait() for process in start_together(outs, *settings)]
    assert [run.returncode for run in runs] == [0] * len(outs), runs
    return runs[0].stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "one"
    run = dit_hub(*SETTINGS, "--out", out, cwd=out.parent)
    assert run.returncode == 0, run.stderr
    return out


def assert_as_alone(out: Path, alone: Path) -> None:
    (losses, weights), (expected_losses, expected) = outcome(out), outcome(alone)
    torch.testing.assert_close(losses, expected_losses, atol=2e-5, rtol=0)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-3, rtol=0)


def test_two_processes_train_as_one(tmp_path: Path, alone: Path) -> None:
    """Started by accelerate, which knows multi_gpu only, on the CPU by the environment."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()),
                "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    command = [sys.executable, *launcher, "-m", "dit_hub.cli", *SETTINGS, "--out", str(tmp_path / "two")]
    on_the_cpu = os.environ | {"ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, capture_output=True, text=True, env=on_the_cpu, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "by 2 processes" in run.stdout
    assert_as_alone(tmp_path / "two", alone)


def test_two_processes_train_as_one_with_a_part_of_the_weights_each(tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "two"
    assert "by 2 processes" in run_together([out, out], "fsdp=true", "ema_decay=[0.9,0.5]", "sample_every=10")
    assert_as_alone(out, alone)


def test_two_machines_train_as_one(tmp_path: Path, alone: Path) -> None:
    """Two processes that meet by address, as on two machines; each has a folder of its own."""
    assert "by 2 processes" in run_together([tmp_path / "machine-0", tmp_path / "machine-1"])
    assert_as_alone(tmp_path / "machine-0", alone)
    assert not (tmp_path / "machine-1").exists()  # the first machine writes


def test_machines_that_share_no_disk_do_not_resume_differently(tmp_path: Path) -> None:
    """The first machine has a checkpoint and the second has not."""

    def cut(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    settings = dict(setting.split("=") for setting in SETTINGS[2:])
    recipe = get_recipe("toy").with_settings({**settings, "save_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path / "machine-0.run")
    runs = start_together([tmp_path / "machine-0", tmp_path / "machine-1"], "save_every=2")
    assert all("must lie on a disk that all machines share" in run.wait().stderr for run in runs)


def test_a_share_that_cannot_be_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(folder / name / f"{index}.png")
    (folder / "dogs" / "0.png").write_bytes(b"no image")
    for settings in ((), ("fsdp=true",)):
        out = tmp_path / f"out{len(settings)}"
        run_together(
            [out, out], f"data={folder}", "batch_size=2", "init_from=dit-toy-shapes", *TOYS_NOISE_SETTINGS, *settings
        )
        assert out.is_dir()


def test_sharded_and_killed_and_resumed_by_other_numbers_of_processes(tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "two"
    processes = start_together([out, out], "fsdp=true", "save_every=2")
    while processes[0].running() and not list(tmp_path.glob("two.run/step-*")):
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait().returncode for process in processes] == [-signal.SIGKILL] * 2
    assert not out.exists()
    run = dit_hub(*SETTINGS, "save_every=2", "--out", out, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_as_alone(out, alone)


# --- Ways to train together, forked rather than launched -------------------------------------------------------------

FEW = {
    "model": SMALL_MODEL,
    "images_per_class": 4,
    "steps": 4,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "ema_decay": 0.9,
}
# Three stages, in each of which every process has the student of the stage before for a teacher.
LADDER = {"distill": "progressive", "objective": "v", "student_steps": 1, "teacher_steps": 8, "learning_rate": 1e-3}
WAYS: dict[str, dict[str, Any]] = {
    "parts": {"gradient_accumulation_steps": 4},
    "sharded": {"fsdp": True},
    "sharded parts": {"fsdp": True, "gradient_accumulation_steps": 4},
    "checkpointing": {"fsdp": True, "gradient_checkpointing": True},
    "compiled": {"fsdp": True, "compile": True},
    "adapters": {"fsdp": True, "lora_rank": 2},
    "bf16": {"fsdp": True, "mixed_precision": "bf16"},
    "student": LADDER,
    "sharded student": {"fsdp": True, **LADDER},
    "bf16 adapters": {"fsdp": True, "mixed_precision": "bf16", "lora_rank": 2},
}

COUNTED = ("parts", "sharded", "sharded parts")

# What torch calls the sums of DDP and of FSDP2.
SUMS = ("gloo:all_reduce", "gloo:reduce_scatter", "gloo:_reduce_scatter_base")


def other_classes() -> InMemoryImages:
    """The shapes; half of the classes are others than the embedded model's."""
    names = {index: name if index % 2 else f"thing {index}" for index, name in ID2LABEL.items()}
    return InMemoryImages(*shapes(4), names, "", "")


def run_of(settings: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and weights of a run; adapters and students start from the embedded model."""
    seen: list[Progress] = []
    base = {"init_from": "dit-toy-shapes", **TOYS_NOISE} if {"lora_rank", "distill"} & settings.keys() else {}
    recipe = Recipe(**{**FEW, **base, **settings})
    result = train(recipe, seen.append, dataset=other_classes() if "lora_rank" in settings else None)
    return [progress.loss for progress in seen], dict(result.pipeline.transformer.state_dict())


def run_in_all_ways(results: Path) -> None:
    """In each process: `WAYS` in turn, and how often gradients were summed; the first one notes it."""
    reached = {}
    for name, settings in WAYS.items():
        watches = profile(activities=[ProfilerActivity.CPU]) if name in COUNTED else contextlib.nullcontext()
        with watches as watched:
            losses, weights = run_of(settings)
        reached[name] = {"losses": losses, "weights": weights}
        if watched and os.environ["RANK"] == "0":
            watched.export_chrome_trace(str(results.with_suffix(".json")))  # a tenth of the time of its averages
            trace = results.with_suffix(".json").read_text()
            reached[name]["sums"] = sum(trace.count(f'"name": "{event}"') for event in SUMS)
    if os.environ["RANK"] == "0":
        torch.save(reached, results)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("ways") / "results.pt"
    running = Together(run_in_all_ways, results)
    for rank in range(PROCESSES):
        status, said = running.wait(rank)
        assert status == 0, said
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_share_the_work_is_that_of_one_process(ways: dict[str, Any], name: str) -> None:
    alone = {**WAYS[name], "fsdp": False, "compile": False}
    losses, weights = run_of(alone)
    half = alone.get("mixed_precision") == "bf16"  # sums of gradients are rounded to 8 bits, in two halves
    torch.testing.assert_close(ways[name]["losses"], losses, atol=2e-3 if half else 2e-5, rtol=0)
    assert ways[name]["weights"].keys() == weights.keys()
    if not half:
        for key, weight in weights.items():
            torch.testing.assert_close(ways[name]["weights"][key], weight, atol=2e-3, rtol=0)


def test_processes_sum_gradients_once_a_step(ways: dict[str, Any]) -> None:
    assert ways["parts"]["sums"] == FEW["steps"]  # the model is so small that DDP takes it for one
    assert ways["sharded parts"]["sums"] == ways["sharded"]["sums"] > 0


class Failing(InMemoryImages):
    """Data that one process cannot read any more after two steps."""

    def read(self, keys: Sequence[Key]) -> Batch:
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads == 3 and os.environ["RANK"] == "1":
            raise OSError("the disk is gone")
        return super().read(keys)


def run_that_fails_in_one(released: Path) -> None:
    """The process that fails lives on until it is released, as one whose end takes long."""
    try:
        train(Recipe(**{**FEW, "steps": 1000}), dataset=Failing(*shapes(4), ID2LABEL, "", ""))
    except OSError:
        while os.environ["RANK"] == "1" and not released.exists():
            time.sleep(0.1)
        raise


@pytest.mark.parametrize("at_once", [True, False])
def test_a_process_that_fails_ends_the_others_with_a_sentence(tmp_path: Path, at_once: bool) -> None:
    released = tmp_path / "released"
    if at_once:
        released.touch()
    running = Together(run_that_fails_in_one, released)
    status, said = running.wait(0, timeout=200)
    released.touch()
    assert status in (1, 2)
    assert said.splitlines()[-1] == "error: Process 1 has failed, and with it the run: the disk is gone"
    assert "Traceback" not in said
    status, said = running.wait(1)
    assert (status, said.splitlines()[-1]) == (2, "error: the disk is gone")
