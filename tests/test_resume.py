"""Runs that are killed, and resume as if nothing had happened."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_hub.training import fingerprint as fingerprint_module
from dit_hub.training.checkpoints import checkpoints
from dit_hub.training.data import Batch, CachedLatents, Dataset, ImageFolder, InMemoryImages, Key
from dit_hub.training.fingerprint import fingerprint
from dit_hub.training.latents import cache_latents
from dit_hub.training.loop import Progress, train
from dit_hub.training.recipe import Recipe
from dit_hub.training.shapes import ID2LABEL, shapes

from .command_line import Command, dit_hub
from .conftest import SMALL_MODEL, small_vae

SETTINGS = [
    f"model={json.dumps(SMALL_MODEL)}",
    "images_per_class=16",
    "batch_size=64",
    "ema_decay=0.99",
    "save_every=4",
]


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
    ("kills", "epochs"), [(3, "epochs=50"), pytest.param(50, "epochs=1200", marks=pytest.mark.slow)]
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
    assert run_and_kill(out, 0.1, "epochs=40", "num_workers=2") == -signal.SIGKILL
    assert run_and_kill(out, 0.1, "epochs=40", "num_workers=1") == -signal.SIGKILL
    same_outcome(finished(out, "epochs=40"), finished(tmp_path / "whole", "epochs=40", "num_workers=1"))


def test_sigterm_saves_and_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    settings = ("epochs=80", "save_every=50")
    command = start(out, *settings)
    while command.running() and not list(tmp_path.glob("toy.run/step-*")):
        time.sleep(0.005)
    command.send_signal(signal.SIGTERM)
    run = command.wait()
    assert run.returncode == 0, run.stderr
    assert "resumes from it" in run.stdout
    steps = [json.loads(path.read_text())["step"] for path in tmp_path.glob("toy.run/step-*/state.json")]
    assert max(steps) > 50
    assert max(steps) < 320
    same_outcome(finished(out, *settings), finished(tmp_path / "whole", *settings))


def test_a_run_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
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


def test_a_run_of_other_data_is_not_resumed(tmp_path: Path) -> None:
    images, labels = shapes(16, 0)
    recipe = Recipe(images_per_class=16, epochs=3, batch_size=64, save_every=1)

    def cut(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path)
    fewer = InMemoryImages(images[:-64], labels[:-64], ID2LABEL, "", "")
    with pytest.raises(ValueError, match="belongs to other data: images 256 there, 192 here"):
        train(recipe, run_folder=tmp_path, dataset=fewer)
    assert train(recipe, run_folder=tmp_path).finished


def test_a_checkpoint_of_an_older_release_is_resumed(tmp_path: Path) -> None:
    """One whose facts have the names of the release before."""
    recipe = Recipe(images_per_class=16, epochs=2, batch_size=64, save_every=2, random_flip=True, ema_decay=0.9)

    def cut(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, cut, run_folder=tmp_path)
    state = checkpoints(tmp_path)[-1] / "state.json"
    facts = json.loads(state.read_text())
    for part, old_names in (
        ("recipe", {"random_flip": "mirror", "gradient_accumulation_steps": "gradient_accumulation",
                    "lr_scheduler": "learning_rate_schedule", "num_workers": "workers"}),
        ("data", {"images": "pictures"}),
    ):  # fmt: skip
        assert facts[part].keys() >= old_names.keys()
        facts[part] = {old_names.get(name, name): value for name, value in facts[part].items()}
    state.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="random_flip is True there and False here"):
        train(replace(recipe, random_flip=False), run_folder=tmp_path)
    steps: list[int] = []
    resumed = train(recipe, lambda progress: steps.append(progress.step), run_folder=tmp_path).pipeline.transformer
    assert steps == [3, 4, 5, 6, 7, 8]
    whole = train(recipe).pipeline.transformer.state_dict()
    assert all(weight.equal(whole[name]) for name, weight in resumed.state_dict().items())


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    """Checkpoints of 5 MB meet a limit of 3 MB; the pipeline, of 1.3 MB, does not."""
    out = tmp_path / "toy"
    run = start(out, "model=toy", "epochs=2", file_limit=2_000_000).wait()
    assert run.returncode == 0, run.stderr
    assert "No checkpoint at step 4" in run.stderr + run.stdout
    assert (out / "model_index.json").is_file()


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[None]:
    """Ctrl-C as in a terminal; what runs in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path, workers: int) -> None:
    command = start(tmp_path / "toy", "epochs=800", f"num_workers={workers}")
    while command.running() and not list(tmp_path.glob("toy.run/step-*")):
        time.sleep(0.005)
    command.send_signal(signal.SIGINT)
    run = command.wait()
    assert run.returncode == 130, run.stderr
    last = checkpoints(tmp_path / "toy.run")[-1]
    assert f"Stopped. The checkpoint {last} stays, and the same command resumes from it." in run.stdout
    assert "Ctrl-C again stops at once." in run.stderr
    assert not (tmp_path / "toy").exists()


SHORT = Recipe(images_per_class=16, epochs=2, batch_size=64, tracker="none")  # 8 steps


def press_ctrl_c(at: int, *pauses: float) -> Callable[[Progress], None]:
    """Press it at a step, and again after each pause of so many seconds."""

    def report(progress: Progress) -> None:
        if progress.step == at:
            os.kill(os.getpid(), signal.SIGINT)
            for pause in pauses:
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGINT)

    return report


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("pauses", [(), (0.01,)])  # the second: a launcher passes the signal on
def test_ctrl_c_ends_within_the_next_steps_and_the_run_resumes_from_there(tmp_path: Path, pauses: tuple[float]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped after step [456], with a checkpoint"):
        train(SHORT, press_ctrl_c(3, *pauses), run_folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    (kept,) = checkpoints(tmp_path)
    steps = []
    assert train(SHORT, lambda at: steps.append(at.step), run_folder=tmp_path).finished
    assert [int(kept.name.removeprefix("step-")), *steps] == list(range(9))[-len(steps) - 1 :]


@pytest.mark.usefixtures("terminal")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, press_ctrl_c(3, 1.1), run_folder=tmp_path)
    assert checkpoints(tmp_path) == []


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_stops_at_once_where_nothing_is_saved() -> None:
    steps = []

    def report(progress: Progress) -> None:
        steps.append(progress.step)
        press_ctrl_c(3)(progress)

    with pytest.raises(KeyboardInterrupt):
        train(SHORT, report)
    assert steps == [1, 2, 3]


# --- One run, one folder ---------------------------------------------------------------------------------------------


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    first = start(tmp_path / "toy", "epochs=800")
    while first.running() and not list(tmp_path.glob("toy.run/step-*")):
        time.sleep(0.005)
    run = start(tmp_path / "toy", "epochs=800").wait()
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert f"Another training is running in {tmp_path / 'toy.run'}; wait for it to end" in run.stderr
    with pytest.raises(ValueError, match="Another training is running"):
        train(SHORT, run_folder=tmp_path / "toy.run", resume=False)
    assert first.running()
    first.send_signal(signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    assert start(tmp_path / "toy", "epochs=1", "--resume", "never").wait().returncode == 0


def test_a_result_whose_name_is_taken_meanwhile_is_kept_beside(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    command = start(out, "epochs=8")
    while command.running() and not list(tmp_path.glob("toy.run/step-*")):
        time.sleep(0.005)
    out.mkdir()
    (out / "precious.txt").touch()
    run = command.wait()
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert f"{out} was filled meanwhile; the result is in {out}-1." in run.stderr
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert (tmp_path / "toy-1" / "README.md").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy", "toy-1"]


def test_what_others_put_into_the_folder_of_a_run_stays(tmp_path: Path) -> None:
    notes = tmp_path / "toy.run" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    (tmp_path / "toy.run" / "step-00000004").mkdir()
    (tmp_path / "toy.run" / "step-00000004" / "drawn.png").write_text("precious")
    run = start(tmp_path / "toy", "epochs=2").wait()
    assert run.returncode == 0, run.stderr
    assert "No checkpoint at step 4" in run.stderr + run.stdout
    left = [path.relative_to(notes.parent).as_posix() for path in notes.parent.rglob("*") if path.is_file()]
    assert sorted(left) == ["notes.txt", "step-00000004/drawn.png"]


def test_a_result_that_the_disk_does_not_hold_is_not_lost(tmp_path: Path) -> None:
    """The checkpoints fit under the limit, the decoder of the pipeline does not."""
    images, labels = shapes(4, 0)
    cache_latents(InMemoryImages(images, labels, ID2LABEL, "", ""), small_vae(), tmp_path / "latents")
    small_vae(block_out_channels=(64, 128)).save_pretrained(tmp_path / "vae")
    model = {"sample_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_classes": 16}
    recipe = {"model": model, "data": "latents", "vae": "vae", "epochs": 2, "batch_size": 16, "tracker": "none"}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    command = ("train", "mine.yaml", "--out", "out")
    run = dit_hub(*command, cwd=tmp_path, file_limit=1_000_000)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "out could not be written: the disk is full or a limit is reached. The checkpoint " in run.stderr
    assert "out.run/step-00000008 stays, and the same command resumes from it." in run.stderr
    losses = json.loads((tmp_path / "out.run" / "step-00000008" / "state.json").read_text())["epoch_losses"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "mine.yaml", "out.run", "vae"]
    run = dit_hub(*command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "out" / "training.json").read_text())["epoch_losses"]
    assert saved == [round(loss, 6) for loss in losses]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "mine.yaml", "out", "vae"]


def test_a_finished_run_without_a_result_is_not_trained_again(tmp_path: Path) -> None:
    first = train(SHORT, run_folder=tmp_path).pipeline.transformer.state_dict()
    steps = []
    again = train(SHORT, lambda at: steps.append(at.step), run_folder=tmp_path)
    assert (steps, again.finished) == ([], True)
    weights = again.pipeline.transformer.state_dict()
    assert all(weights[name].equal(weight) for name, weight in first.items())


# --- The same data ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("terminal")
def test_a_run_resumes_with_the_same_content_only(tmp_path: Path) -> None:
    images, labels = shapes(16, 0)
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, press_ctrl_c(3), run_folder=tmp_path)
    other = images.clone()
    other[7] = -other[7]
    with pytest.raises(ValueError, match="belongs to other data: as many images, but with other content"):
        train(SHORT, run_folder=tmp_path, dataset=InMemoryImages(other, labels, ID2LABEL, "", ""))
    with pytest.raises(ValueError, match="belongs to other data: as many images, but with other content"):
        train(SHORT, run_folder=tmp_path, dataset=InMemoryImages(images, labels.flip(0), ID2LABEL, "", ""))
    state = checkpoints(tmp_path)[-1] / "state.json"
    facts = json.loads(state.read_text())
    del facts["data"]["fingerprint"]  # as in a checkpoint of an older release
    state.write_text(json.dumps(facts))
    assert train(SHORT, run_folder=tmp_path).finished


def image_folder(folder: Path) -> Path:
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (16, 16), (60 * index, 0, 9 * len(name))).save(folder / name / f"{index}.png")
    return folder


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_fingerprint_of_files_is_of_names_and_content(tmp_path: Path) -> None:
    def of(folder: Path) -> str:
        return fingerprint(ImageFolder(folder, 16))

    folder = image_folder(tmp_path / "pets")
    before = of(folder)
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)  # with times of its own
    assert of(Path(copied)) == before
    change_a_byte(folder / "dogs" / "2.png")
    assert of(folder) != before
    change_a_byte(folder / "dogs" / "2.png")
    assert of(folder) == before
    (folder / "dogs" / "2.png").rename(folder / "dogs" / "3.png")
    assert of(folder) != before
    (folder / "dogs" / "3.png").rename(folder / "dogs" / "2.png")
    (folder / "cats" / "0.png").rename(folder / "dogs" / "x.png")
    assert of(folder) != before
    (folder / "cats" / "1.png").chmod(0)
    (folder / "cats" / "2.png").unlink()
    (folder / "cats" / "2.png").symlink_to("nowhere.png")
    assert of(folder)  # what cannot be read is left out while training


def test_the_fingerprint_of_latents_and_of_images(tmp_path: Path) -> None:
    images, labels = shapes(4, 0)
    whole = (images + 1) * 127.5
    data = [InMemoryImages(values, labels, ID2LABEL, "", "") for values in (images, images + 1e-7, images.flip(0))]
    assert fingerprint(data[0]) == fingerprint(data[1]) != fingerprint(data[2])  # rounding is no change
    of_bytes = InMemoryImages(whole.byte(), labels, ID2LABEL, "", "")
    assert fingerprint(of_bytes) == fingerprint(InMemoryImages(of_bytes.data / 127.5 - 1, labels, ID2LABEL, "", ""))
    prints = set()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        drawn = InMemoryImages(*shapes(4, seed), ID2LABEL, "", "")
        prints.add(fingerprint(CachedLatents(cache_latents(drawn, small_vae(), tmp_path / name))))
    assert len(prints) == 2


def test_the_fingerprint_of_a_large_archive_is_of_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet in 64x64 is 15 GB."""
    hashed: list[int] = []
    real = hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self.digest = real()

        def update(self, content: bytes) -> None:
            hashed.append(len(content))
            assert sum(hashed) < 2**23
            self.digest.update(content)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counted)
    monkeypatch.setattr(fingerprint_module, "_NUMBERS", 2**20)
    data, labels = torch.zeros(1000, 3, 64, 64, dtype=torch.uint8), torch.zeros(1000, dtype=torch.long)
    before = fingerprint(InMemoryImages(data, labels, {}, "", ""))
    hashed.clear()
    data[999] = 1
    other = fingerprint(InMemoryImages(data, labels, {}, "", ""))
    hashed.clear()
    labels[123] = 1
    assert len({before, other, fingerprint(InMemoryImages(data, labels, {}, "", ""))}) == 3


class Own:
    """A data set that `fingerprint` does not know."""

    id2label, sample_shape, is_latent, scaling_factor = {}, (1, 2, 2), False, 1.0
    description = license = ""
    shift_factor, notes = 0.0, ()

    def __init__(self, shift: float):
        self.shift = shift

    def __len__(self) -> int:
        return 1000

    def read(self, keys: Sequence[Key]) -> Batch:
        positions = [position for position, _ in keys]
        data = torch.tensor(positions)[:, None, None, None].expand(-1, 1, 2, 2) / 1000 + self.shift
        return Batch(data, torch.zeros(len(positions), dtype=torch.long), positions, [])


def test_the_fingerprint_of_data_of_ones_own() -> None:
    data: list[Dataset] = [Own(0), Own(0), Own(0.1)]
    assert fingerprint(data[0]) == fingerprint(data[1]) != fingerprint(data[2])


def test_latents_are_not_written_among_other_files(tmp_path: Path) -> None:
    drawn = InMemoryImages(*shapes(1, 0), ID2LABEL, "", "")
    (tmp_path / "shard-00000.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"plan\.json is damaged, and does not say which data its latents belong to"):
        cache_latents(drawn, small_vae(), tmp_path)
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 1
