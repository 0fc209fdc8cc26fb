"""Watching a run: logs, rates, samples."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit_hub import DiTPipeline
from dit_hub.training.loop import Progress, train
from dit_hub.training.output import save_result
from dit_hub.training.progress import training_progress
from dit_hub.training.recipe import Recipe

from .command_line import dit_hub
from .conftest import TOYS_NOISE

SHORT = Recipe(images_per_class=16, epochs=5, batch_size=64)  # 20 steps
SHORT_SETTINGS = ("images_per_class=16", "epochs=5", "batch_size=64")


def events(folder: Path) -> EventAccumulator:
    log = EventAccumulator(str(folder))
    log.Reload()
    return log


def test_losses_rates_and_samples_are_logged(tmp_path: Path) -> None:
    run = dit_hub("train", "toy", *SHORT_SETTINGS, "sample_every=15", "--out", "toy", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    log = events(tmp_path / "toy" / "runs")
    losses = [(event.step, event.value) for event in log.Scalars("loss")]
    assert [step for step, _ in losses] == [10, 20]
    assert losses[1][1] < losses[0][1]
    assert log.Scalars("images_per_second")[1].value > 0
    assert 0 < log.Scalars("mfu")[1].value < 1
    assert [event.step for event in log.Images("samples")] == [15, 20]
    for step in (15, 20):
        image = Image.open(tmp_path / "toy" / "runs" / f"samples-{step:08d}.png")
        assert image.width > 300  # four columns of captioned images
    assert not (tmp_path / "toy.run").exists()


def test_samples_change_nothing_in_the_training(tmp_path: Path) -> None:
    plain, drawn = train(SHORT), train(replace(SHORT, sample_every=3), run_folder=tmp_path / "run")
    assert plain.epoch_losses == drawn.epoch_losses
    state = drawn.pipeline.transformer.state_dict()
    assert all(state[name].equal(weight) for name, weight in plain.pipeline.transformer.state_dict().items())
    assert len(list((tmp_path / "run" / "runs").glob("samples-*.png"))) == 7


def test_progress_tells_the_rate_and_the_share_of_the_peak() -> None:
    seen: list[Progress] = []
    train(SHORT, seen.append)
    assert seen[0].images_per_second == 0
    assert seen[-1].images_per_second > 10
    assert 0 < seen[-1].mfu < 1
    assert (seen[-1].step, seen[-1].last, seen[-1].epoch) == (20, 20, 5)


def shown(width: int, last: int, terminal: bool = True) -> list[str]:
    """The states of the progress line of a run of 80 epochs."""
    output = io.StringIO()
    console = Console(width=width, file=output, force_terminal=terminal, color_system=None, legacy_windows=False)
    with training_progress(console) as report:
        for step in (1, last // 2, last):
            report(Progress(step, last, 80 * step // last, 0.12345, 0 if step == 1 else 4321.4, 0.123))
    return [line.rstrip() for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n", output.getvalue()) if line.strip()]


@pytest.mark.parametrize(
    ("width", "last", "end"),
    [
        (60, 400_000, " 400000/400000 0:00:00<0:00:00 4321/s"),
        (80, 400_000, " 400000/400000 0:00:00<0:00:00 4321 images/s"),
        (80, 750, " 750/750 0:00:00<0:00:00 4321 images/s, 12% of peak"),
        (120, 400_000, " 400000/400000 0:00:00<0:00:00 4321 images/s, 12% of peak"),
    ],
)
def test_the_progress_line_is_whole_at_any_width(width: int, last: int, end: str) -> None:
    lines = shown(width, last)
    assert lines[-1].startswith("epoch 80 loss 0.1235 ")
    assert lines[-1].endswith(end)
    assert ("━" in lines[-1]) == (width > 60)
    assert all(len(line) <= width and "…" not in line for line in lines)


def test_a_run_that_writes_to_a_file_leaves_whole_lines() -> None:
    assert shown(40, 400_000, terminal=False) == [
        "epoch 0 loss 0.1235 1/400000 0:00:00<-:--:--",
        "epoch 80 loss 0.1235 400000/400000 0:00:00<0:00:00 4321 images/s, 12% of peak",
    ]


def test_the_command_shows_a_whole_line_in_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = dit_hub("train", "toy", *SHORT_SETTINGS, "--out", "toy", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run.stdout)
    assert "…" not in text.replace("Drawing samples…", "")
    assert re.search(r"epoch 5 loss \d\.\d{4} ━+ 20/20 \d:\d\d:\d\d<0:00:00 \d+ images/s, \d+% of peak", text)


@pytest.mark.parametrize(
    ("recipe", "title"),
    [
        (SHORT, "toy trained on shapes"),
        (replace(SHORT, epochs=1, init_from="dit-toy-shapes", **TOYS_NOISE), "dit-toy-shapes trained on shapes"),
        (replace(SHORT, epochs=1, model={"sample_size": 16, "patch_size": 8, "in_channels": 3, "hidden_size": 16,
                                         "num_hidden_layers": 1, "num_attention_heads": 2, "learn_sigma": False}),
         "DiT of 16,400 parameters trained on shapes"),
    ],
)  # fmt: skip
def test_the_loss_plot_says_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, title: str
) -> None:
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
    save_result(train(recipe), tmp_path / "out", "")
    axes = pyplot.gcf().axes[0]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (title, "epoch", "mean training loss")
    assert all(tick == round(tick) for tick in axes.get_xticks())
    pyplot.clf()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tracker": "paper"}, "There is no tracker 'paper'; the known ones are none, aim,"),
        ({"tracker": "wandb"}, "The tracker wandb needs its package: pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_sentence(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ImportError), match=words):
        train(replace(SHORT, **settings), run_folder=tmp_path / "run")


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "runs").write_text("a file where the log's folder goes")
    result = train(replace(SHORT, sample_every=5), run_folder=tmp_path)
    assert result.finished
    assert [record.message for record in caplog.records if "Nothing more is logged" in record.message][1:] == []
    assert "Training continues." in caplog.text


def test_several_averages_are_kept_as_variants_and_survive_a_resume(tmp_path: Path) -> None:
    recipe = replace(SHORT, ema_decay=[0.5, 0.9], save_every=7)
    whole = train(recipe)

    def cut(progress: Progress) -> None:
        if progress.step == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path / "run")
    resumed = train(recipe, run_folder=tmp_path / "run")
    for name, weight in whole.averages["ema-9"].items():
        assert resumed.averages["ema-9"][name].equal(weight)
    save_result(resumed, tmp_path / "out", "")
    first, other = (DiTPipeline.from_pretrained(tmp_path / "out", variant=variant) for variant in (None, "ema-9"))
    for pipeline, expected in (
        (first, train(replace(SHORT, ema_decay=0.5))),
        (other, train(replace(SHORT, ema_decay=0.9))),
    ):
        state = expected.pipeline.transformer.state_dict()
        assert all(state[name].equal(weight) for name, weight in pipeline.transformer.state_dict().items())
