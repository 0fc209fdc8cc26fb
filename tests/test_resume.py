"""Runs that are killed, and go on as if nothing had happened."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit_hub.training.data import Pictures
from dit_hub.training.loop import Progress, train
from dit_hub.training.recipe import Recipe
from dit_hub.training.shapes import ID2LABEL, shapes

from .command_line import Command, dit_hub

SETTINGS = ["images_per_class=16", "batch_size=64", "ema_decay=0.99", "save_every=4"]


def start(out: Path, *settings: str, file_limit: int | None = None) -> Command:
    return Command("train", "toy", *SETTINGS, *settings, "--out", out, cwd=out.parent, file_limit=file_limit)


def finished(out: Path, *settings: str) -> Path:
    """A run that ends by itself."""
    run = start(out, *settings).wait()
    assert run.returncode == 0, run.stderr
    return out


def same_outcome(one: Path, other: Path) -> None:
    """Weights bit for bit, and the losses of every epoch."""
    ours, theirs = (load_file(folder / "transformer" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    losses = [json.loads((folder / "training.json").read_text())["epoch_losses"] for folder in (one, other)]
    assert losses[0] == losses[1]


def run_and_kill(out: Path, wait: float, *settings: str) -> int:
    """Start, let it train for `wait` seconds after its first new checkpoint, kill; its status."""
    run_folder = Path(f"{out}.run")
    before = {path.name for path in run_folder.glob("step-*")}
    command = start(out, *settings)
    while command.running() and {path.name for path in run_folder.glob("step-*")} <= before:
        time.sleep(0.005)
    time.sleep(wait)
    command.send_signal(signal.SIGKILL)
    return command.wait().returncode


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
    same_outcome(finished(out, epochs), finished(tmp_path / "whole", epochs))
    assert not Path(f"{out}.run").exists()


def test_a_checkpoint_is_a_pipeline_of_the_average(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    run_and_kill(out, 0.0, "epochs=40")
    checkpoint = max(Path(f"{out}.run").glob("step-*"))
    run = dit_hub("generate", checkpoint, "red-circle", "--steps", 3, "--out", "x.png", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = dit_hub("convert", checkpoint, "official", "--to", "official", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    converted = torch.load(tmp_path / "official" / "model.pt", weights_only=True)
    average, model = (load_file(checkpoint / f"{part}.safetensors") for part in ("ema-99", "model"))
    name = "final_layer.linear.weight"
    assert converted[name].equal(average[name])
    assert not converted[name].equal(model[name])


def test_another_number_of_workers_ends_in_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    assert run_and_kill(out, 0.1, "epochs=40", "workers=2") == -signal.SIGKILL
    assert run_and_kill(out, 0.1, "epochs=40", "workers=1") == -signal.SIGKILL
    same_outcome(finished(out, "epochs=40"), finished(tmp_path / "whole", "epochs=40", "workers=1"))


def test_sigterm_saves_and_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    settings = ("epochs=80", "save_every=50")
    command = start(out, *settings)
    while command.running() and not list(tmp_path.glob("toy.run/step-*")):
        time.sleep(0.005)
    command.send_signal(signal.SIGTERM)
    run = command.wait()
    assert run.returncode == 0, run.stderr
    assert "goes on from it" in run.stdout
    steps = [json.loads(path.read_text())["step"] for path in tmp_path.glob("toy.run/step-*/state.json")]
    assert max(steps) > 50
    assert max(steps) < 320
    same_outcome(finished(out, *settings), finished(tmp_path / "whole", *settings))


def test_a_run_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    run_and_kill(out, 0.0, "epochs=40")
    for settings, words in (
        (["epochs=40", "learning_rate=1e-3"], "learning_rate is 0.0005 there and 0.001 here"),
        (["epochs=50", "seed=1"], "epochs is 40 there and 50 here; seed is 0 there and 1 here"),
    ):
        run = start(out, *settings).wait()
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert words in run.stderr
    run = start(out, "epochs=40", "images_per_class=20").wait()
    assert run.returncode == 2
    run = dit_hub("train", "toy", "data=typo", "--resume", "never", "--out", out, cwd=tmp_path)
    assert "There is no data 'typo'" in run.stderr
    newest = max(Path(f"{out}.run").glob("step-*"))
    (newest / "model.safetensors").write_bytes(b"torn")
    run = start(out, "epochs=40").wait()
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "is damaged" in run.stderr
    (newest / "model.safetensors").unlink()
    (newest / "ema-99.safetensors").rename(newest / "model.safetensors")
    run = start(out, "epochs=40").wait()
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "is damaged" in run.stderr


def test_a_run_of_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    pictures, labels = shapes(16, 0)
    recipe = Recipe(images_per_class=16, epochs=3, batch_size=64, save_every=1)

    def cut(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path)
    fewer = Pictures(pictures[:-64], labels[:-64], ID2LABEL, "", "")
    with pytest.raises(ValueError, match="is of other data: pictures 256 there, 192 here"):
        train(recipe, run_folder=tmp_path, dataset=fewer)
    assert train(recipe, run_folder=tmp_path).finished


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    """Checkpoints of 5 MB meet a limit of 3 MB; the pipeline, of 1.3 MB, does not."""
    out = tmp_path / "toy"
    run = start(out, "epochs=2", file_limit=2_000_000).wait()
    assert run.returncode == 0, run.stderr
    assert "No checkpoint at step 4" in run.stderr + run.stdout
    assert (out / "model_index.json").is_file()
