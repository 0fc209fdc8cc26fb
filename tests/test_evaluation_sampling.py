"""Sampling for evaluation: the same images whatever the interruptions, processes, batches and runtimes."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.evaluation import sample_images
from dit_hub.evaluation.sampling import label_of_each, noise_seed
from dit_hub.export import export_onnx
from dit_hub.files import locked

from .command_line import Command, Python, dit_hub
from .conftest import MakePipeline
from .test_cli import assert_refused
from .test_lora import write_with_peft
from .together import environment, free_port

TOY = "dit-toy-shapes"
NUM = 40

# All draw on one thread, since another number of them sums in another order.
COMMAND = ("sample", TOY, "--num", NUM, "--batch-size", 4, "--steps", 20, "--threads", 1, "--out")


@pytest.fixture(scope="module")
def toy() -> Any:
    return DiTPipeline.from_pretrained(TOY)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run = dit_hub(*COMMAND, "out", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert f"{NUM} images in out, and together in out/samples.npz" in run.stdout
    return folder / "out"


def drawn(folder: Path) -> list[Path]:
    return sorted(folder.glob("images/*/[0-9]*.png"))


def archive(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "samples.npz") as arrays:
        return dict(arrays)


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sampling.json").read_text())


def levels(folder: Path) -> np.ndarray:
    return archive(folder)["arr_0"].astype(int)


# --- The same bytes --------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path, alone: Path) -> None:
    out, kills = tmp_path / "out", 0
    for wanted in (1, 9, 18, 30):
        process = Command(*COMMAND, "out", cwd=tmp_path)
        while process.running() and len(drawn(out)) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait().returncode == -signal.SIGKILL
        assert not (out / "samples.npz").exists()
        assert not facts(out)["finished"]
    assert kills == 4
    before = {path: path.stat().st_mtime_ns for path in drawn(out)}
    (out / "images" / "00000" / ".000039.png.1.part").write_bytes(b"cut")  # as a kill may leave, of another process
    assert dit_hub(*COMMAND, "out", cwd=tmp_path).returncode == 0
    assert (out / "samples.npz").read_bytes() == (alone / "samples.npz").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing is drawn twice
    assert facts(out) == facts(alone)
    left = {path.name for path in out.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert left == {"sampling.json", "samples.npz"}


def test_two_processes_draw_what_one_draws(tmp_path: Path, alone: Path) -> None:
    """Started by accelerate, which knows multi_gpu only."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()),
                "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    command = [sys.executable, *launcher, "-m", "dit_hub.cli", *map(str, COMMAND), str(tmp_path / "out")]
    on_the_cpu = os.environ | {"ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, capture_output=True, text=True, env=on_the_cpu, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (alone / "samples.npz").read_bytes()
    assert [one["processes"] for one in facts(tmp_path / "out")["runs"]] == [2]


def share(rank: int, out: Path, *more: object) -> Python:
    """One of two processes, started."""
    told = os.environ | environment(rank, 2, rank, 2, free_port())
    return Python("-m", "dit_hub.cli", *COMMAND, out, *more, cwd=out.parent, environment=told)


def test_a_process_draws_its_own_batches_and_the_last_one_ends(tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "out"
    run = share(1, out).wait()
    assert run.returncode == 0, run.stderr
    assert "Process 1 has drawn its share; the last one to end writes" in run.stdout
    assert [int(path.stem) // 4 % 2 for path in drawn(out)] == [1] * (NUM // 2)
    assert not (out / "samples.npz").exists()
    run = share(0, out).wait()
    assert f"{NUM} images in" in run.stdout
    assert (out / "samples.npz").read_bytes() == (alone / "samples.npz").read_bytes()


def test_a_share_that_is_lost_is_drawn_by_another_number_of_processes(tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "out"
    assert share(1, out).wait().returncode == 0
    drawn(out)[5].unlink()
    drawn(out)[9].write_bytes(b"")
    assert dit_hub(*COMMAND, "out", cwd=tmp_path).returncode == 0
    assert (out / "samples.npz").read_bytes() == (alone / "samples.npz").read_bytes()
    assert [one["processes"] for one in facts(out)["runs"]] == [2, 1]


@pytest.mark.parametrize("damage", ["empty", "torn", "no image", "another size", "grey"])
def test_a_damaged_image_is_drawn_again(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    def run(images: int) -> Path:
        return sample_images(toy, tmp_path / "out", images, batch_size=4, num_inference_steps=3)

    whole, batches = (run(12) / "samples.npz").read_bytes(), []
    call = DiTPipeline.__call__

    def listening(self: Any, labels: Any, **options: Any) -> Any:
        batches.append(list(labels))
        return call(self, labels, **options)

    monkeypatch.setattr(DiTPipeline, "__call__", listening)
    (tmp_path / "out" / "samples.npz").unlink()
    for number in (5, 6, 11):
        path = tmp_path / "out" / "images" / "00000" / f"{number:06d}.png"
        content = path.read_bytes()
        if damage in ("another size", "grey"):
            Image.new("L" if damage == "grey" else "RGB", (16, 16) if damage == "grey" else (8, 8)).save(path)
        else:
            path.write_bytes({"empty": b"", "torn": content[:-40], "no image": bytes(len(content))}[damage])
    assert (run(12) / "samples.npz").read_bytes() == whole
    # Each beside the same others as before, whose number may change its last bits.
    assert batches == [[4, 5, 6, 7], [8, 9, 10, 11]]
    drawn(tmp_path / "out")[5].unlink()
    (tmp_path / "out" / "samples.npz").unlink()
    assert (run(12) / "samples.npz").read_bytes() == whole
    assert batches[2:] == [[4, 5, 6, 7]]


# --- What an image depends on ----------------------------------------------------------------------------------------


def test_the_noise_of_an_image_depends_on_the_seed_and_its_number() -> None:
    seeds = [noise_seed(0, index) for index in range(200_000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)  # all that the generator reads
    assert noise_seed(0, 2**32 - 1) == noise_seed(0, 0) - 1
    assert noise_seed(1, 0) not in seeds
    assert noise_seed(0, 7) == noise_seed(0, 7 + 2**32)
    # For ever: samples of today can be drawn again.
    assert (noise_seed(0, 0), noise_seed(123, 5)) == (1726737503, 1503946155)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_an_image_is_what_the_pipeline_draws_with_its_generator(
    make_pipeline: MakePipeline, tmp_path: Path, scheduler: str
) -> None:
    """Whatever its place in its batch, and also where every step draws noise."""
    kind = DDIMScheduler(clip_sample=False) if scheduler == "ddim" else DDPMScheduler(clip_sample=False)
    pipeline = make_pipeline(scheduler=kind, in_channels=3)
    folder = sample_images(pipeline, tmp_path / "out", 7, seed=3, batch_size=3, num_inference_steps=5)
    pipeline.set_progress_bar_config(disable=True)
    for index, image in enumerate(levels(folder)):
        generator = torch.Generator().manual_seed(noise_seed(3, index))
        (expected,) = pipeline(
            index, num_inference_steps=5, guidance_scale=1.0, generator=generator, output_type="latent"
        ).images
        exact = (127.5 * expected + 128).clamp(0, 255).permute(1, 2, 0).numpy()
        # Batches sum in another order, so that a value just below a whole number may be just above.
        assert (np.floor(exact + 1e-3) >= image).all()
        assert (np.floor(exact - 1e-3) <= image).all()


def test_batches_of_other_sizes_have_the_same_noise_and_labels(toy: Any, tmp_path: Path) -> None:
    folders = [
        sample_images(toy, tmp_path / str(size), 20, labels="random", seed=5, batch_size=size, num_inference_steps=5)
        for size in (1, 6, 64)
    ]
    first, *others = (archive(folder) for folder in folders)
    for other in others:
        assert np.array_equal(first["arr_1"], other["arr_1"])
        # A sum in another order differs by 1e-6, which may cross the border between two levels.
        assert np.abs(first["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    assert np.abs(np.diff(levels(folders[0]), axis=0)).max() > 100  # while different images differ


def test_more_images_leave_the_first_ones_as_they_are(toy: Any, tmp_path: Path) -> None:
    def run(num: int) -> Path:
        return sample_images(toy, tmp_path / "out", num, labels="random", batch_size=4, num_inference_steps=3)

    few = archive(run(10))
    assert not np.array_equal(few["arr_1"], np.arange(10))
    before = {path: path.read_bytes() for path in drawn(tmp_path / "out")}
    many = archive(run(23))
    assert [len(values) for values in many.values()] == [23, 23]
    assert all(np.array_equal(many[name][:10], values) for name, values in few.items())
    assert {path: path.read_bytes() for path in before} == before
    assert facts(tmp_path / "out")["num"] == 23
    with pytest.raises(ValueError, match=r"out is for 23 images, and this run wants only 10; choose another folder\."):
        run(10)


def test_a_finished_run_draws_nothing_and_resumes_with_what_is_not_part_of_an_image(toy: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def run(size: int) -> Path:
        seen.clear()
        return sample_images(toy, tmp_path / "out", 10, batch_size=size, num_inference_steps=2,
                             progress=lambda *done: seen.append(done))  # fmt: skip

    run(4)
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    run(5)
    assert seen == []
    for path in ("samples.npz", "images/00000/000006.png"):
        (tmp_path / "out" / path).unlink()
    run(5)
    assert seen == [(9, 10), (10, 10)]
    assert [one["batch_size"] for one in facts(tmp_path / "out")["runs"]] == [4, 5]


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_balanced_random_or_listed(toy: Any, tmp_path: Path) -> None:
    def labels(name: str, num: int, **options: Any) -> list[int]:
        folder = sample_images(toy, tmp_path / name, num, num_inference_steps=1, **options)
        return archive(folder)["arr_1"].tolist()

    assert labels("balanced", 20) == [*range(16), 0, 1, 2, 3]
    # Of PCG64's raw numbers, which numpy keeps for ever.
    assert labels("random", 8, labels="random") == [15, 1, 8, 13, 11, 14, 15, 5]
    assert labels("longer", 10, labels="random") == [15, 1, 8, 13, 11, 14, 15, 5, 15, 13]
    assert labels("other", 8, labels="random", seed=1) != labels("random", 8, labels="random")
    (tmp_path / "labels.txt").write_text("blue-cross\n3\nred_circle\n\n0\n")
    listed = labels("file", 4, labels=tmp_path / "labels.txt")
    assert listed == toy.get_label_ids(["blue-cross", 3, "red-circle", 0])
    assert labels("given", 3, labels=["blue-cross", 3, "red-circle", 0]) == listed[:3]
    policies = [facts(tmp_path / name)["labels"]["policy"] for name in ("balanced", "random", "file", "given")]
    assert policies == ["balanced", "random", "given", "given"]
    digest = hashlib.sha256(np.array(listed, "<i8").tobytes()).hexdigest()
    assert facts(tmp_path / "file")["labels"]["sha256"] == digest


def test_random_labels_are_uniform() -> None:
    model = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(num_classes=10)))
    classes = label_of_each("random", 100_000, 0, model)
    assert classes is not None
    counts = np.bincount(classes)
    assert len(counts) == 10
    assert np.abs(counts - 10_000).max() < 400  # four standard deviations


# --- Kinds of models -------------------------------------------------------------------------------------------------


def test_a_grey_model_without_classes_gives_equal_channels_and_no_labels(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    pipeline = make_pipeline(in_channels=1, num_classes=0, sample_size=(8, 12))
    folder = sample_images(pipeline, tmp_path / "out", 5, batch_size=2, num_inference_steps=2)
    arrays = archive(folder)
    assert arrays.keys() == {"arr_0"}
    assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((5, 8, 12, 3), np.uint8)
    assert (arrays["arr_0"] == arrays["arr_0"][..., :1]).all()
    assert arrays["arr_0"].std() > 10
    assert facts(folder)["labels"] is None
    assert Image.open(drawn(folder)[0]).mode == "RGB"


def test_latents_are_decoded_with_guidance(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(latent=True)
    options: dict[str, Any] = {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.9), "guidance_channels": 2}
    folder = sample_images(pipeline, tmp_path / "out", 3, num_inference_steps=4, **options)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(noise_seed(0, index)) for index in range(3)]
    images = pipeline([0, 1, 2], num_inference_steps=4, generator=generators, output_type="pt", **options).images
    expected = (images.permute(0, 2, 3, 1).numpy() * 255 + 0.5).astype(int)
    assert expected.shape == (3, 16, 16, 3)
    assert np.abs(expected - levels(folder)).max() <= 1
    noted = facts(folder)
    assert noted["guidance"] == {"scale": 3.0, "interval": [0.2, 0.9], "channels": 2}
    assert noted["precision"] == {"transformer": "float32", "decoder": "float32", "tf32": False}
    assert noted["weights"].keys() == {"transformer", "vae"}  # of no files
    assert noted["image_size"] == [16, 16]


def test_levels_are_rounded_as_the_official_code_rounds(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_pipeline(in_channels=1, num_classes=0)
    values = torch.linspace(-1.01, 1.01, 64).reshape(1, 1, 8, 8)
    monkeypatch.setattr(DiTPipeline, "_denoise", lambda *_: values)
    folder = sample_images(pipeline, tmp_path / "out", 1, num_inference_steps=1)
    expected = [min(max(int(127.5 * value + 128), 0), 255) for value in values.flatten().tolist()]
    assert levels(folder)[0, ..., 0].flatten().tolist() == expected
    assert expected[0] == 0
    assert expected[-1] == 255


@pytest.mark.parametrize("part", ["denoiser", "sampler"])
def test_another_runtime_draws_the_same(make_pipeline: MakePipeline, tmp_path: Path, part: str) -> None:
    pipeline = make_pipeline(in_channels=3, scheduler=DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "model")
    export_onnx(pipeline, tmp_path / "onnx", parts=[part])
    options: dict[str, Any] = {"batch_size": 3, "num_inference_steps": 5, "guidance_scale": 2.0, "labels": "random"}
    folders = [
        sample_images(DiTPipeline.from_pretrained(tmp_path / name), tmp_path / f"of-{name}", 7, **options)
        for name in ("model", "onnx")
    ]
    ours, other = (archive(folder) for folder in folders)
    assert np.array_equal(ours["arr_1"], other["arr_1"])
    assert np.abs(ours["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    noted = facts(folders[1])
    assert noted["runtime"] == {"denoiser": "ORTDiTTransformer", "sampler": "ORTSampler"}[part]
    assert "onnxruntime" in noted["runs"][0]["versions"]
    file = tmp_path / "onnx" / "transformer" / "model.onnx"
    assert noted["weights"]["transformer/model.onnx"] == hashlib.sha256(file.read_bytes()).hexdigest()
    # Images of one are not among those of the other.
    with pytest.raises(ValueError, match="of-model holds images of other weights; choose another folder"):
        sample_images(DiTPipeline.from_pretrained(tmp_path / "onnx"), folders[0], 7, **options)


# --- How the images were made ----------------------------------------------------------------------------------------


def test_the_folder_says_how_the_images_were_made(alone: Path) -> None:
    noted = facts(alone)
    weights = Path(DiTPipeline.from_pretrained(TOY).source_folder("transformer"), "model.safetensors").read_bytes()
    assert noted["schema_version"] == 1
    assert noted["model"] == TOY
    assert noted["weights"] == {"transformer/model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert (noted["runtime"], noted["seed"], noted["num"], noted["image_size"]) == ("DiTTransformer", 0, NUM, [16, 16])
    assert noted["scheduler"]["_class_name"] == "DDPMScheduler"
    assert noted["scheduler"]["num_train_timesteps"] == 200
    assert (noted["steps"], len(noted["timesteps"]), noted["timesteps"][0]) == (20, 20, 190)
    (run,) = noted["runs"]
    assert (run["batch_size"], run["processes"], run["device"]) == (4, 1, "cpu")
    assert run["versions"]["torch"] == torch.__version__
    assert noted["finished"]
    assert noted["sha256"] == hashlib.sha256((alone / "samples.npz").read_bytes()).hexdigest()


def test_weights_that_are_not_those_of_files_are_hashed_themselves(toy: Any, tmp_path: Path) -> None:
    noted = []
    for change in (0.0, 0.0, 1e-3):
        pipeline = DiTPipeline.from_pretrained(TOY)
        with torch.no_grad():
            pipeline.transformer.final_layer.linear.bias.add_(change)
        sample_images(pipeline, tmp_path / str(len(noted)), 1, num_inference_steps=1)
        noted.append(facts(tmp_path / str(len(noted)))["weights"])
    assert noted[0].keys() == {"transformer"}
    assert noted[0] == noted[1] != noted[2]


def test_weights_with_adapters_are_not_those_of_the_files(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline(latent=True).save_pretrained(tmp_path / "model")
    write_with_peft(tmp_path / "adapters", make_pipeline().transformer)
    noted = []
    for fused in (False, True):
        pipeline = DiTPipeline.from_pretrained(tmp_path / "model")
        if fused:
            pipeline.load_adapters(tmp_path / "adapters")
        folder = sample_images(pipeline, tmp_path / str(fused), 1, num_inference_steps=1)
        noted.append(next(iter(facts(folder)["weights"])))
    assert noted == ["transformer/model.safetensors", "transformer"]


def test_the_archive_is_as_numpy_would_write_it(alone: Path) -> None:
    expected = io.BytesIO()
    np.savez(expected, arr_0=archive(alone)["arr_0"], arr_1=archive(alone)["arr_1"])
    assert (alone / "samples.npz").read_bytes() == expected.getvalue()
    for index, path in enumerate(drawn(alone)):
        assert np.array_equal(np.asarray(Image.open(path)), archive(alone)["arr_0"][index])
        assert path == alone / "images" / "00000" / f"{index:06d}.png"


def test_the_official_timesteps_and_half_precision(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(in_channels=3, scheduler=DDPMScheduler(clip_sample=False, timestep_spacing="leading"))
    pipeline.save_pretrained(tmp_path / "model")
    run = dit_hub("sample", "model", "--num", 2, "--steps", 4, "--timesteps", "official", "--guidance", 1.5,
                  "--guidance-interval", 0.1, 0.7, "--dtype", "bfloat16", "--out", "out", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    noted = facts(tmp_path / "out")
    assert noted["timesteps"] == [999, 666, 333, 0]
    assert noted["guidance"] == {"scale": 1.5, "interval": [0.1, 0.7], "channels": 3}
    assert noted["precision"]["transformer"] == "bfloat16"


def test_the_paper_draws_in_250_steps(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    small: dict[str, Any] = {"sample_size": 2, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for trained, steps in ((1000, 250), (50, 50)):
        pipeline = make_pipeline(scheduler=DDPMScheduler(trained), in_channels=3, learn_sigma=False, **small)
        folder = sample_images(pipeline, tmp_path / str(steps), 1)
        assert (facts(folder)["steps"], facts(folder)["guidance"]["scale"]) == (steps, 1.0)


def test_another_decoder(make_pipeline: MakePipeline, make_vae: Callable[..., Any], tmp_path: Path) -> None:
    make_pipeline(latent=True).save_pretrained(tmp_path / "model")
    other = make_vae()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    make_vae(latent_channels=8).save_pretrained(tmp_path / "eight")
    command = ("sample", "model", "--num", 2, "--steps", 2, "--out")
    assert dit_hub(*command, "own", cwd=tmp_path).returncode == 0
    assert dit_hub(*command, "others", "--vae", "other", cwd=tmp_path).returncode == 0
    own, others = facts(tmp_path / "own"), facts(tmp_path / "others")
    assert (own["decoder"], others["decoder"]) == (None, "other")
    assert own["weights"].keys() == {"transformer/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert others["weights"].keys() == {"transformer/model.safetensors", "vae"}
    assert np.abs(levels(tmp_path / "own") - levels(tmp_path / "others")).max() > 1
    assert_refused(dit_hub(*command, "out", "--vae", "eight", cwd=tmp_path),
                   "eight decodes latents of 8 channels, and the model draws 4")  # fmt: skip
    assert_refused(dit_hub("sample", TOY, "--num", 2, "--out", "out", "--vae", "other", cwd=tmp_path),
                   "--vae is for models of latents")  # fmt: skip


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num", 0), "num must be 1 or more, not 0"),
        (("--batch-size", 0), "batch_size must be 1 or more, not 0"),
        (("--seed", -1), "seed must be 0 or more, not -1"),
        (("--steps", 0), "num_inference_steps must be 1 or more"),
        (("--steps", 201), "num_inference_steps must be at most 200, not 201"),
        (("--guidance", 2), "guidance_scale 2.0 needs a null class"),
        (("--guidance", "nan"), "guidance_scale must be a finite number"),
        (("--guidance-interval", 0.5, 0.1), "guidance_interval must be two rising numbers"),
        (("--timesteps", "mine"), "--timesteps is official or left out, not 'mine'"),
        (("--scheduler", "ddim", "--timesteps", "official"), "DDIMScheduler takes no list of timesteps"),
        (("--scheduler", "flow-euler"), "steps with a velocity"),
        (("--dtype", "int8"), "--dtype must be float32, bfloat16, float16, not 'int8'"),
        (("--device", "tpu"), "There is no device 'tpu' here"),
        (("--revision", "main"), "--revision is for models on the Hub, and dit-toy-shapes is none"),
        (("--labels", "nowhere.txt"), "The labels are balanced, random or a text file, and nowhere.txt cannot be read"),
        (("--labels", "two.txt"), "There are 2 labels for 4 images; give one for each"),
        (("--labels", "unknown.txt"), "There is no class named 'red-circel'. The nearest names: red-circle"),
        (("--labels", "high.txt"), "The label 16 is out of range"),
        (("--out", "two.txt"), "two.txt is a file, and samples go to a folder"),
        (("--out", "mine"), "mine holds other files than samples (notes.txt); choose another folder"),
        (("--out", "pictures"), "pictures holds images without sampling.json"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, options: Sequence[object], words: str) -> None:
    for name, text in (("two", "0\n1\n"), ("unknown", "red-circel\n" * 4), ("high", "16\n" * 4)):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "pictures" / "images").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    run = dit_hub("sample", TOY, "--num", 4, "--out", "out", *options, cwd=tmp_path)
    assert_refused(run, words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, r"another seed \(0, not 1\)"),
        ({"num_inference_steps": 3}, r"another number of steps \(2, not 3\)"),
        ({"timesteps": "official"}, "other timesteps"),
        ({"guidance_interval": (0, 0.5)}, r"another guidance \(interval \[0.0, 1.0\], not \[0.0, 0.5\]\)"),
        ({"labels": "random"}, "other labels"),
        ({"labels": [0, 1, 3]}, "other labels"),
    ],
)
def test_a_folder_is_resumed_with_its_own_images_only(
    toy: Any, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    same: dict[str, Any] = {"num_inference_steps": 2}
    folder = sample_images(toy, tmp_path / "out", 3, **same)
    files = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(ValueError, match=rf"out holds images of {words}.*; choose another folder\."):
        sample_images(toy, folder, 3, **{**same, **options})
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == files
    sample_images(toy, folder, 3, labels=[0, 1, 2], **same)  # which are the balanced ones


def test_a_folder_is_not_resumed_with_another_scheduler_precision_or_model(toy: Any, tmp_path: Path) -> None:
    folder = sample_images(toy, tmp_path / "out", 3, num_inference_steps=2)
    others = [DiTPipeline.from_pretrained(TOY) for _ in range(3)]
    others[0].scheduler = DDIMScheduler.from_config(toy.scheduler.config)
    others[1].to(torch.bfloat16)
    with torch.no_grad():
        others[2].transformer.final_layer.linear.bias.add_(1)
    words = (
        r"another scheduler \(_class_name 'DDPMScheduler', not 'DDIMScheduler'\)",
        r"another precision \(transformer 'float32', not 'bfloat16'\)",
        "other weights",
    )
    for other, refusal in zip(others, words, strict=True):
        with pytest.raises(ValueError, match=f"out holds images of {refusal}; choose another folder"):
            sample_images(other, folder, 3, num_inference_steps=2)


def test_facts_that_cannot_be_read_are_one_sentence(toy: Any, tmp_path: Path) -> None:
    folder = sample_images(toy, tmp_path / "out", 1, num_inference_steps=1)
    for text, words in (("{", "is damaged"), ("[]", "is damaged"), ('{"schema_version": 2}', "has the version 2")):
        (folder / "sampling.json").write_text(text)
        with pytest.raises(ValueError, match=f"sampling.json {words}"):
            sample_images(toy, folder, 1, num_inference_steps=1)


def test_a_model_that_draws_no_images_is_refused(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"draws latents of 4 channels and the pipeline has no decoder for them; give"):
        sample_images(make_pipeline(), tmp_path / "out", 1)
    unconditional = make_pipeline(in_channels=3, num_classes=0)
    with pytest.raises(ValueError, match="This model has no classes; leave the labels out"):
        sample_images(unconditional, tmp_path / "out", 1, labels=[0])
    assert not (tmp_path / "out").exists()


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for lock, run in ((".lock", lambda: Command(*COMMAND, out, cwd=tmp_path)), (".lock-1", lambda: share(1, out))):
        with locked(out, "never", lock):
            words = f"Another process draws samples in {out}; wait for it to end, or choose another folder"
            assert_refused(run().wait(), words)
        assert not out.exists()


def test_variables_of_no_launcher_are_one_sentence(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, count in (("2", "2"), ("first", "2"), ("-1", "2")):
        monkeypatch.setenv("RANK", index)
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match="RANK and WORLD_SIZE must be a process's number and how many there are"):
            sample_images(toy, tmp_path / "out", 1)


def test_a_full_disk_loses_nothing(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline(in_channels=3, sample_size=64, patch_size=16).save_pretrained(tmp_path / "model")
    command = ("sample", "model", "--num", 6, "--batch-size", 2, "--steps", 1, "--threads", 1, "--out")
    assert dit_hub(*command, "whole", cwd=tmp_path).returncode == 0
    image, archive_size = (
        path.stat().st_size for path in (drawn(tmp_path / "whole")[0], tmp_path / "whole/samples.npz")
    )
    assert (tmp_path / "whole" / "sampling.json").stat().st_size < image - 1000 < archive_size - 2000
    # First no image fits, then not the archive.
    for limit, what, count in ((image - 1000, "000000.png", 0), (archive_size - 1, "samples.npz", 6)):
        run = dit_hub(*command, "out", cwd=tmp_path, file_limit=limit)
        assert_refused(run, f"{what} could not be written", "What is finished stays", "the same command resumes")
        assert len(drawn(tmp_path / "out")) == count
        left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".png"}
        assert left == {"sampling.json"}
    assert dit_hub(*command, "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()


def test_interrupting_says_how_far_it_is(tmp_path: Path) -> None:
    process = Command(*COMMAND, "out", cwd=tmp_path)
    while process.running() and len(drawn(tmp_path / "out")) < 4:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    run = process.wait()
    assert run.returncode == 130, run.stderr
    said = run.stdout.splitlines()[-1]
    assert said.endswith(f"of {NUM} images; the same command resumes.")
    assert said.startswith("Stopped after ")
    assert 0 <= len(drawn(tmp_path / "out")) - int(said.split()[2]) < 5  # those of a batch that was being written


def test_the_pipeline_is_left_as_it_was(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(in_channels=3)
    pipeline.set_progress_bar_config(desc="mine")
    sample_images(pipeline, tmp_path / "out", 1, num_inference_steps=1)
    assert pipeline._progress_bar_config == {"desc": "mine"}
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_folder_can_be_moved(toy: Any, tmp_path: Path) -> None:
    sample_images(toy, tmp_path / "out", 3, num_inference_steps=1)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    (tmp_path / "moved" / "samples.npz").unlink()
    assert (sample_images(toy, tmp_path / "moved", 3, num_inference_steps=1) / "samples.npz").is_file()


def test_names_of_the_model_are_not_needed(make_model: Callable[..., DiTTransformer], tmp_path: Path) -> None:
    folder = sample_images(DiTPipeline(make_model(in_channels=3), DDIMScheduler()), tmp_path / "out", 1,
                           num_inference_steps=1)  # fmt: skip
    assert facts(folder)["model"] is None
