"""The command line, run as a user runs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import dit_hub as dit_hub_package
from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.cli import main
from dit_hub.configuration_dit import PUBLISHED_MODELS
from dit_hub.files import new_file
from dit_hub.sources import EMBEDDED_MODELS

from .command_line import dit_hub

TOY = "dit-toy-shapes"


def assert_refused(run: subprocess.CompletedProcess[str], *words: str) -> None:
    assert run.returncode == 2, run.stdout + run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_help_names_the_commands_without_loading_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom dit_hub.cli import main\nsys.argv = ['dit-hub', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    for command in ("generate", "info", "train", "export"):
        assert command in run.stdout


def test_generate_writes_a_grid_and_the_same_seed_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        run = dit_hub("generate", TOY, "red-circle", "blue-cross", "--steps", 4, "--out", name, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert "2 images" in run.stdout
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    other = dit_hub(
        "generate", TOY, "red-circle", "blue-cross", "--steps", 4, "--seed", 1, "--out", "c.png", cwd=tmp_path
    )
    assert other.returncode == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    run = dit_hub(
        "generate", TOY, "red-circle", "blue-cross", "--steps", 4, "--cache", 2, "--out", "d.png", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "d.png").read_bytes()


def test_a_number_that_is_a_name_is_that_class(tmp_path: Path, make_model: Callable[..., DiTTransformer]) -> None:
    """As in Python: folders named 1, 2 and 3 become the classes 0, 1 and 2."""
    model = make_model(in_channels=3, learn_sigma=False, num_classes=3)
    DiTPipeline(model, DDIMScheduler(), None, {0: "1", 1: "2", 2: "3"}).save_pretrained(tmp_path / "model")
    for label in ("0", "1"):
        run = dit_hub("generate", "model", label, "--steps", 2, "--out", f"{label}.png", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    # 0 is not a name, so it is the first class.
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_export_then_generate_runs_on_onnx_runtime(tmp_path: Path) -> None:
    run = dit_hub("export", "onnx", TOY, "onnx", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "transformer" in run.stdout
    arguments = ("red-circle", "3", "--steps", 4, "--scheduler", "ddim", "--threads", 1)
    for model, name in ((TOY, "torch.png"), ("onnx", "ort.png")):
        run = dit_hub("generate", model, *arguments, "--out", name, "--trajectory", f"trajectory-{name}", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    images = [Image.open(tmp_path / name).convert("RGB") for name in ("torch.png", "ort.png")]
    differences = [abs(a - b) for a, b in zip(images[0].tobytes(), images[1].tobytes(), strict=True)]
    assert max(differences) <= 1
    assert Image.open(tmp_path / "trajectory-ort.png").width > 400
    assert_refused(dit_hub("export", "onnx", TOY, "onnx", cwd=tmp_path), "onnx is not empty", "--overwrite")


def test_info_prints_the_published_sizes_beside_the_papers(tmp_path: Path) -> None:
    run = dit_hub("info", "--all", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for name in PUBLISHED_MODELS:
        assert name in run.stdout
    assert "118.62" in run.stdout
    assert "323,696" in dit_hub("info", "toy", cwd=tmp_path).stdout


def test_train_reports_losses_and_leaves_a_pipeline_with_card_and_images(tmp_path: Path) -> None:
    settings = ("images_per_class=8", "epochs=6", "batch_size=64", "ema_decay=0.9")  # 12 steps
    run = dit_hub("train", "toy", *settings, "--out", "run/toy", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert " images/s, " in run.stdout
    assert "% of peak" in run.stdout
    assert "Mean loss" in run.stdout
    for name in ("README.md", "training.json", "samples.png", "loss.png", "trajectory.png", "model_index.json"):
        assert (tmp_path / "run" / "toy" / name).is_file()
    assert "images_per_class=8" in (tmp_path / "run" / "toy" / "README.md").read_text()
    again = dit_hub("generate", "run/toy", "red-circle", "--steps", 2, "--out", "x.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "no-such-model"), ("no-such-model", TOY)),
        (("generate", "./nope"), ("There is no folder ./nope.",)),
        (("generate", "../nope"), ("There is no folder ../nope.",)),
        (("generate", "/no/where"), ("There is no folder /no/where.",)),
        (("generate", "~/nope"), ("There is no folder ~/nope.",)),
        (("generate", "runs/toy/"), ("There is no folder runs/toy/.",)),
        (("generate", "a/b/c"), ("There is no folder a/b/c.",)),
        (("generate", "nope.onnx"), ("There is no file nope.onnx.",)),
        (("info", "./nope"), ("There is no folder ./nope.",)),
        (("card", "./nope"), ("There is no folder ./nope.",)),
        (("card", "org/nope"), ("There is no folder org/nope.",)),
        (("convert", "./nope", "out"), ("There is no folder ./nope.",)),
        (("export", "onnx", "./nope", "out"), ("There is no folder ./nope.",)),
        (("generate", TOY, "red-cirle"), ("red-cirle", "red-circle")),
        (("generate", TOY, "16"), ("16", "0 to 15")),
        (("generate", TOY, "--steps", "0"), ("num_inference_steps", "0")),
        (("generate", TOY, "--guidance", "2"), ("null class",)),
        (("generate", TOY, "--scheduler", "dim"), ("dim", "ddim")),
        (("generate", TOY, "--cache", "1"), ("--cache must be 2 or more, not 1.",)),
        (("generate", TOY, "--threads", "0"), ("threads",)),
        (("generate", TOY, "--threads", "1025"), ("num_threads must be at most 1024, not 1025.",)),
        (("generate", TOY, "--threads", "99999999999999"), ("num_threads must be at most 1024",)),
        (("generate", TOY, "--device", "gpu"), ("gpu",)),
        (("generate", TOY, "--device", "meta"), ("--device must be cpu, cuda or mps, not 'meta'.",)),
        (("generate", TOY, "--out", "a.png", "--trajectory", "a.png"), ("--out and --trajectory are both a.png",)),
        (("generate", TOY, "--out", "a.png", "--trajectory", "./a.png", "--overwrite"), ("are both a.png",)),
        (("generate", TOY, "--out", "grid.h5"), ("grid.h5 cannot be written", "choose .png")),
        (("generate", TOY, "--trajectory", "steps.xbm"), ("steps.xbm cannot be written", "choose .png")),
        (("generate", TOY, "--seed", "-1"), ("--seed must be from 0 to", "not -1")),
        (("generate", TOY, "--seed", "99999999999999999999"), ("--seed must be from 0 to",)),
        (("generate", "org/not-here"), ("org/not-here, which is no folder here,", "cannot be reached")),
        (("generate", TOY, "--out", "grid.docx"), ("grid.docx",)),
        (("generate", TOY, "--out", "/tmp.png/x.png"), ("There is no folder /tmp.png",)),
        (("generate", TOY, "²"), ("no class named '²'",)),
        (("generate", TOY, "--out", "no/folder/grid.png"), ("no/folder",)),
        (("info", "DiT-XL3"), ("DiT-XL3", "DiT-XL/2")),
        (("info",), ("--all",)),
        (("info", "DiT-XL/8", "--image-size", "200"), ("200", "64")),
        (("info", "DiT-XL/2", "--image-size", "0"), ("image_size must be above 0 and at most 524288, not 0.",)),
        (("info", "DiT-XL/2", "--image-size", "100000000"), ("at most 524288, not 100000000.",)),
        (("train", "toyy"), ("toyy", "toy")),
        (("train", "my.yaml"), ("There is no file my.yaml.",)),
        (("train", "./nope/my.yml"), ("There is no file ./nope/my.yml.",)),
        (("train", "toy", "epoch=3"), ("epoch", "epochs")),
        (("train", "toy", "epochs=many"), ("epochs", "many")),
        (("train", "toy", "epochs"), ("key=value",)),
        (("train", "toy", "batch_size=5000"), ("5000", "3200")),
        (("export", "onnx", TOY, "out", "--opset", "26"), ("opset", "26")),
        (("export", "onnx", ".", "out"), ("model_index.json",)),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process, which has the libraries already: a new one takes seconds to load them.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dit-hub", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    assert_refused(subprocess.CompletedProcess(arguments, exit_.value.code, captured.out, captured.err), *words)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_model_without_classes_are_refused(
    tmp_path: Path,
    make_model: Callable[..., DiTTransformer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(in_channels=3, learn_sigma=False, num_classes=0)
    DiTPipeline(model, DDIMScheduler(), None).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for label in ("0", "cat"):
        monkeypatch.setattr(sys, "argv", ["dit-hub", "generate", "model", label])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "error: This model has no classes; leave the labels out."


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**55), lambda: bytearray(2**60)])
def test_too_little_memory_is_one_sentence(
    allocate: Callable[[], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiTPipeline, "__call__", lambda *_, **__: allocate())
    monkeypatch.setattr(sys, "argv", ["dit-hub", "generate", TOY, "0"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: There is not enough memory for this; draw fewer")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_pipeline_is_told_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DiTPipeline.from_pretrained(TOY).save_pretrained(tmp_path / "toy")
    onnx = tmp_path / "toy" / "transformer" / "model.onnx"
    onnx.touch()
    monkeypatch.chdir(tmp_path)

    capsys.readouterr()  # the progress bars of loading and saving

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dit-hub", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        return captured.err

    file = "toy/transformer/model.onnx"
    for command in (("export", "onnx", file, "out"), ("export", "web", file, "out")):
        assert f"{file} is an export already; give the model that it was made from." in said(*command)
    for command in (("generate", file), ("info", file)):
        line = said(*command)
        assert f"{file} is a file for ONNX Runtime already: give toy, the folder it is a part of" in line
        assert "`dit-hub export tensorrt` takes it" in line
    onnx.rename(tmp_path / "model.onnx")
    assert "model.onnx is a file for ONNX Runtime already: give the folder of its pipeline" in said(
        "info", "model.onnx"
    )
    file = "toy/transformer/model.safetensors"
    assert f"{file} is a part of the pipeline toy; give that folder." in said("generate", file)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").touch()
    assert "lora holds adapters; load the model that they adapt, then load_lora_weights." in said("generate", "lora")
    assert "toy/transformer is a part of the pipeline toy; give that folder." in said("generate", "toy/transformer")
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is a folder, not an image." in said("generate", TOY, "--out", "folder.png", "--overwrite")
    assert "model.onnx is a file for ONNX Runtime already" in said("convert", "model.onnx", "out")


def test_the_embedded_models_card_is_shown_by_its_name(tmp_path: Path) -> None:
    run = dit_hub("card", TOY, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == (EMBEDDED_MODELS[TOY] / "README.md").read_text().strip()


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert dit_hub("--version", cwd=tmp_path).stdout == f"dit-hub {dit_hub_package.__version__}\n"


def test_an_image_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    arguments = ("generate", TOY, "0", "--steps", 1, "--out", "grid.png")
    said = "error: grid.png could not be written: the disk is full or a limit is reached."

    def last_line(*options: str) -> str:
        run = dit_hub(*arguments, *options, cwd=tmp_path, file_limit=900)
        assert run.returncode == 2
        return run.stderr.splitlines()[-1]

    assert last_line() == said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "grid.png").write_bytes(b"mine")
    assert last_line("--overwrite") == said
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_file_that_appears_while_one_is_made_is_kept(tmp_path: Path) -> None:
    def write_late(overwrite: bool) -> None:
        with new_file(tmp_path / "grid.png", overwrite) as path:
            path.write_bytes(b"new")
            (tmp_path / "grid.png").write_bytes(b"theirs")

    with pytest.raises(ValueError, match=r"grid\.png exists"):
        write_late(overwrite=False)
    assert (tmp_path / "grid.png").read_bytes() == b"theirs"
    write_late(overwrite=True)
    assert (tmp_path / "grid.png").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_an_existing_image_is_kept_unless_told(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"mine")
    assert_refused(dit_hub("generate", TOY, "0", "--steps", 1, cwd=tmp_path), "grid.png", "--overwrite")
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
    assert dit_hub("generate", TOY, "0", "--steps", 1, "--overwrite", cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "grid.png").width > 96
