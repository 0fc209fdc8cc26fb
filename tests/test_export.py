"""ONNX export and ONNX Runtime as a runtime of the pipeline."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from onnx import numpy_helper
from PIL import Image
from torch import Tensor

from dit_hub import DiTPipeline, ORTSampler
from dit_hub.export import DEFAULT_PARTS, export_onnx, export_web, quantize, verify_export
from dit_hub.export.flow import in_precision
from dit_hub.export.reference import Parity
from dit_hub.schedulers import TableScheduler
from dit_hub.solvers import table_scheduler

from .command_line import Command, dit_hub
from .conftest import MakePipeline

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def exported_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model on ONNX Runtime, to copy and damage."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx("dit-toy-shapes", folder)
    return folder


@pytest.fixture(scope="module")
def small(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `make_pipeline()`."""
    folder = tmp_path_factory.mktemp("small") / "onnx"
    export_onnx(make_pipeline(), folder)
    return folder


@pytest.fixture(scope="module")
def parts(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Parity]]:
    """All parts of `make_pipeline(latent=True)`, and their errors."""
    folder = tmp_path_factory.mktemp("parts") / "onnx"
    return folder, export_onnx(make_pipeline(latent=True), folder, ["all"], decode=True)


def sample(pipeline: DiTPipeline, labels: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 5, **options}
    return pipeline(labels, generator=generator, output_type="pt", **options).images


def latents(pipeline: DiTPipeline, labels: Any, **options: Any) -> Tensor:
    """As `sample`, before images clamp what a random model draws."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 5, **options}
    return pipeline(labels, generator=generator, output_type="latent", **options).images


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("opset", [20, 23])
def test_a_latent_pipeline_runs_on_onnx_runtime(
    make_pipeline: MakePipeline, parts: tuple[Path, dict[str, Parity]], tmp_path: Path, opset: int
) -> None:
    pipeline = make_pipeline(latent=True)
    folder, report = parts
    if opset != 23:
        report = export_onnx(pipeline, folder := tmp_path / "onnx", opset=opset)
    exported = DiTPipeline.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["dit_hub", "ORTDiTTransformer"]
    assert index["vae"] == ["dit_hub", "ORTVAEDecoder"]
    # Guided, so the denoiser sees 6 rows: a batch that neither the export nor its check used.
    difference = (sample(exported, [1, 2, 3]) - sample(pipeline, [1, 2, 3])).abs().max().item()
    assert difference <= 1 / 255
    assert report["transformer"].relative_error < 1e-5
    written = json.loads((folder / "report.json").read_text())
    assert written["opset"]["denoiser"] == opset
    assert written["parity"]["vae"]["relative_error"] == report["vae"].relative_error
    assert ("Attention" in operators(folder / "transformer" / "model.onnx")) == (opset == 23)


@pytest.mark.parametrize(
    "fields",
    [
        {"conditioning": "adaln"},
        {"conditioning": "cross_attention"},
        {"conditioning": "in_context"},
        {"num_classes": 0, "learn_sigma": False},
        {"pos_embed": "learned", "class_dropout_prob": 0.0, "sample_size": (8, 12)},
    ],
    ids=str,
)
def test_every_kind_of_model_exports(make_pipeline: MakePipeline, tmp_path: Path, fields: dict[str, Any]) -> None:
    pipeline = make_pipeline(**fields)
    export_onnx(pipeline, tmp_path / "onnx")
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    labels = None if fields.get("num_classes") == 0 else [1, 2]
    torch.testing.assert_close(sample(exported, labels), sample(pipeline, labels), rtol=0, atol=1e-4)


def test_the_learned_variance_reaches_ddpm_on_onnx_runtime(make_pipeline: MakePipeline, small: Path) -> None:
    pipeline = make_pipeline(scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=False))
    exported = DiTPipeline.from_pretrained(small, scheduler=pipeline.scheduler)
    torch.testing.assert_close(sample(exported, [1]), sample(pipeline, [1]), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("traced_anew")
def test_the_file_names_no_local_path_and_is_the_same_each_time(
    make_pipeline: MakePipeline, small: Path, tmp_path: Path
) -> None:
    export_onnx(make_pipeline(), tmp_path / "again")
    files = [(folder / "transformer" / "model.onnx").read_bytes() for folder in (small, tmp_path / "again")]
    assert files[0] == files[1]
    for trace in (b"site-packages", b"/home", b"dit_hub/", b".py", str(Path.cwd()).encode()):
        assert trace not in files[0]


def test_an_export_past_its_bound_fails_and_leaves_nothing(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differs from PyTorch by"):
        export_onnx(make_pipeline(), tmp_path / "onnx", max_error=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_folder_and_a_failed_one_keeps_it(
    make_pipeline: MakePipeline, small: Path, tmp_path: Path
) -> None:
    shutil.copytree(small, tmp_path / "onnx")
    before = (tmp_path / "onnx" / "report.json").read_text()
    with pytest.raises(ValueError, match="not empty"):
        export_onnx(make_pipeline(), tmp_path / "onnx")
    with pytest.raises(ValueError, match="differs"):
        export_onnx(make_pipeline(), tmp_path / "onnx", max_error=1e-12, overwrite=True)
    assert (tmp_path / "onnx" / "report.json").read_text() == before
    export_onnx(make_pipeline(), tmp_path / "onnx", opset=20, overwrite=True)
    assert json.loads((tmp_path / "onnx" / "report.json").read_text())["opset"] == {"denoiser": 20}
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_sessions_take_threads_and_providers_and_save(make_pipeline: MakePipeline, small: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    single = DiTPipeline.from_pretrained(small, num_threads=1, providers=["CPUExecutionProvider"])
    if Path("/proc/self/task").is_dir():  # the calling thread is one of those asked for
        before = len(list(Path("/proc/self/task").iterdir()))
        three = DiTPipeline.from_pretrained(small, num_threads=3)
        assert len(list(Path("/proc/self/task").iterdir())) == before + 2
        torch.testing.assert_close(sample(three, [1]), sample(single, [1]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no provider 'NoSuchProvider'"):
        DiTPipeline.from_pretrained(small, providers=["NoSuchProvider"])
    single.save_pretrained(tmp_path / "copy")
    copy = DiTPipeline.from_pretrained(tmp_path / "copy")
    torch.testing.assert_close(sample(copy, [1]), sample(pipeline, [1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign"])
def test_a_damaged_file_is_one_sentence(exported_toy: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(exported_toy, tmp_path / "onnx")
    path = tmp_path / "onnx" / "transformer" / "model.onnx"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "foreign": b"GIF89a" * 99}[damage])
    with pytest.raises(ValueError, match=r"model\.onnx") as error:
        DiTPipeline.from_pretrained(tmp_path / "onnx")
    assert "\n" not in str(error.value)


def test_without_onnxruntime_the_error_names_the_extra(exported_toy: Path) -> None:
    script = (
        "import sys\nsys.modules['onnxruntime'] = None\nfrom dit_hub import DiTPipeline\n"
        f"DiTPipeline.from_pretrained({str(exported_toy)!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert '[onnx]"' in run.stderr.splitlines()[-1]


# --- Precisions and precomputed modulation ---------------------------------------------------------------------------


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_a_denoiser_with_precomputed_modulation_samples_as_the_plain_one(
    make_pipeline: MakePipeline, tmp_path: Path, conditioning: str
) -> None:
    pipeline = make_pipeline(conditioning=conditioning)
    export_onnx(pipeline, tmp_path / "onnx", precompute=True)
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    torch.testing.assert_close(sample(exported, [1, 2]), sample(pipeline, [1, 2]), rtol=0, atol=1e-4)
    inputs = {entry.name for entry in onnx.load(tmp_path / "onnx" / "transformer" / "model.onnx").graph.input}
    assert inputs == {"hidden_states", "condition"}
    latents = torch.randn(2, 4, 8, 8)  # called as the plain one, it computes the condition itself
    expected = pipeline.transformer(latents, 321, torch.tensor([1, 10])).sample.detach()
    actual = exported.transformer(latents, 321, torch.tensor([1, 10])).sample
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    timesteps, labels = torch.rand(3000) * 999, torch.arange(3000) % 10  # more pairs than the file takes at a time
    with torch.no_grad():
        expected = pipeline.transformer.precompute(timesteps, labels)
    torch.testing.assert_close(exported.transformer.precompute(timesteps, labels), expected, atol=1e-5, rtol=1e-5)
    exported.save_pretrained(tmp_path / "copy")
    again = DiTPipeline.from_pretrained(tmp_path / "copy")
    torch.testing.assert_close(sample(again, [1, 2]), sample(exported, [1, 2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precompute", [False, True])
def test_int8_keeps_modulation_and_last_layer_in_float(tmp_path: Path, precompute: bool) -> None:
    report = export_onnx("dit-toy-shapes", tmp_path / "onnx", precision="int8", precompute=precompute)
    assert 1e-4 < report["transformer"].relative_error < 2e-2
    kinds = nodes(tmp_path / "onnx" / "transformer" / "model.onnx")
    assert kinds.count("MatMulInteger") == 16  # four products in each of four blocks
    # Five modulations, two layers of the timestep and the last layer; or the last layer alone.
    assert kinds.count("MatMul") + kinds.count("Gemm") == (1 if precompute else 8)
    written = json.loads((tmp_path / "onnx" / "report.json").read_text())
    assert (written["precision"], written["precompute"], written["parity"]["transformer"]["bound"]) == (
        "int8",
        precompute,
        5e-2,
    )


def test_fp16_does_not_overflow_where_a_naive_one_does(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    with torch.no_grad():  # gates of 3e4 push the residual sum past 65504, the largest half
        for block in pipeline.transformer.blocks:
            block.adaLN_modulation[1].bias.view(6, -1)[[2, 5]] = 3e4
    hidden, condition = [], pipeline.transformer.precompute(torch.tensor([321.0]), torch.tensor([1]))
    pipeline.transformer.blocks[-1].register_forward_hook(lambda _, __, output: hidden.append(output))
    pipeline.transformer(torch.randn(1, 4, 8, 8), precomputed=condition)
    assert hidden[0].abs().max() > 65504
    assert not hidden[0].half().isfinite().all()
    pipeline.transformer.blocks[-1]._forward_hooks.clear()
    report = export_onnx(pipeline, tmp_path / "onnx", precision="fp16")
    assert report["transformer"].relative_error < 2e-2
    types = {entry.data_type for entry in onnx.load(tmp_path / "onnx" / "transformer" / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": ["encoder"]}, "There is no part 'encoder'; known: denoiser, decoder, sampler, all"),
        ({"parts": "encoder"}, "There is no part 'encoder'"),
        ({"parts": ["decoder"]}, "Without a denoiser or a sampler there is no pipeline"),
        ({"precision": "fp8"}, "onnxruntime does not run 'fp8' on a processor; it runs fp32, fp16, int8"),
        ({"precision": "bf16"}, "onnxruntime does not run 'bf16' on a processor"),
        (
            {"precision": "fp16", "runtime": "openvino"},
            "openvino does not run 'fp16' on a processor; it runs fp32, bf16, int8",
        ),
        ({"runtime": "coreml"}, "There is no runtime 'coreml'; known: onnxruntime, openvino"),
        ({"opset": 26}, "opset must lie between 20 and 25"),
        ({"static": True}, "static is for int8"),
        ({"decode": True}, "decode is for the sampler, which is not among the parts"),
        ({"precompute": True, "parts": ["sampler"]}, "precompute is for the denoiser, which is not among the parts"),
        ({"dynamic_size": True}, "learned positions, which cover one height and width only"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export_onnx("dit-toy-shapes", tmp_path / "onnx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("runtime", "precompute", "opset"), [("onnxruntime", False, 23), ("onnxruntime", True, 20), ("openvino", True, 23)]
)
def test_a_model_of_sincos_positions_can_take_every_size(
    make_pipeline: MakePipeline, tmp_path: Path, runtime: str, precompute: bool, opset: int
) -> None:
    pipeline = make_pipeline(latent=True)
    parts = ["denoiser"] if precompute else DEFAULT_PARTS
    report = export_onnx(
        pipeline, tmp_path / "onnx", parts, runtime=runtime, precompute=precompute, opset=opset, dynamic_size=True
    )
    assert report["transformer"].batch_sizes == (1, 2, 5, 2)  # the last one of another size
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx", **({"vae": pipeline.vae} if precompute else {}))
    for height, width in ((16, 16), (8, 24), (32, 12)):
        expected = latents(pipeline, [1, 2], height=height, width=width)
        assert distance(latents(exported, [1, 2], height=height, width=width), expected) < 1e-5
    if not precompute:
        assert type(exported.vae).__name__ == "ORTVAEDecoder"
        expected = sample(pipeline, [1, 2], height=24, width=32)
        assert (sample(exported, [1, 2], height=24, width=32) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("part", ["denoiser", "sampler"])
def test_without_it_another_size_is_refused(parts: tuple[Path, dict[str, Parity]], part: str) -> None:
    pipeline = DiTPipeline.from_pretrained(parts[0])
    if part == "sampler":
        pipeline.transformer = ORTSampler.from_pretrained(parts[0] / "sampler")
    with pytest.raises(ValueError, match=r"takes inputs of 8x8, not \[16, 8\]"):
        latents(pipeline, [1], height=32, width=16)
    with pytest.raises(ValueError, match=r"takes inputs of 8x8, not \[16, 8\]"):
        pipeline.decode(torch.zeros(1, 4, 16, 8))


def test_weights_outside_the_file_count_for_its_size(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for models of more than 2 GB: weights in model.onnx.data, dropped with int8, and one session only."""
    monkeypatch.setattr("dit_hub.export.graphs._LARGEST_PROTOBUF", 0)
    monkeypatch.setattr("dit_hub.export.ort._SMALL_BYTES", 150_000)
    pipeline = make_pipeline(hidden_size=64)
    for precision, has_weights in (("fp32", True), ("int8", False)):
        export_onnx(pipeline, tmp_path / precision, ["sampler"], precision=precision, max_error=1.0)
        folder = tmp_path / precision / "transformer"
        assert (folder / "model.onnx.data").exists() == has_weights
        loaded = DiTPipeline.from_pretrained(tmp_path / precision)
        assert distance(latents(loaded, [1, 2, 3]), latents(pipeline, [1, 2, 3])) < 0.2
        if has_weights:
            assert (folder / "model.onnx").stat().st_size < 150_000
            assert len(loaded.transformer._run._sessions) == 1


@pytest.mark.parametrize("precompute", [False, True])
def test_static_int8_rounds_all_but_what_is_kept(tmp_path: Path, precompute: bool) -> None:
    report = export_onnx("dit-toy-shapes", tmp_path / "onnx", precision="int8", static=True, precompute=precompute)
    assert 1e-4 < report["transformer"].relative_error < 5e-2
    graph = onnx.load(tmp_path / "onnx" / "transformer" / "model.onnx").graph
    # Of each of the four blocks: qkv, proj, fc1, fc2.
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 16
    assert (
        sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2 for tensor in graph.initializer) == 16
    )
    written = json.loads((tmp_path / "onnx" / "report.json").read_text())["parity"]["transformer"]
    assert written["sampling_steps"] == 20
    assert 1e-4 < written["sampling_error"] < 5e-2
    images = sample(DiTPipeline.from_pretrained(tmp_path / "onnx"), [0, 4, 8])
    assert (images - sample(DiTPipeline.from_pretrained("dit-toy-shapes"), [0, 4, 8])).abs().mean() < 0.02


@pytest.mark.parametrize("static", [False, True])
def test_int8_scales_each_output_channel_by_itself(make_pipeline: MakePipeline, tmp_path: Path, static: bool) -> None:
    """Channels of very different size, for which the gates make up; a scale for all of them would round most to 0."""
    pipeline = make_pipeline()
    latents, timestep, labels = torch.randn(2, 4, 8, 8), torch.tensor([321.0, 7.0]), torch.tensor([1, 10])
    with torch.no_grad():
        expected = pipeline.transformer(latents, timestep, labels).sample
        for block in pipeline.transformer.blocks:
            for layer, gate in ((block.attn.proj, 2), (block.mlp.fc2, 5)):
                sizes = torch.logspace(-4, 0, len(layer.bias))
                layer.weight.mul_(sizes[:, None])
                layer.bias.mul_(sizes)
                modulation = block.adaLN_modulation[1]
                modulation.weight.view(6, len(sizes), -1)[gate].div_(sizes[:, None])
                modulation.bias.view(6, -1)[gate].div_(sizes)
        assert distance(pipeline.transformer(latents, timestep, labels).sample, expected) < 1e-5
    if static:
        with torch.no_grad():
            rounded = in_precision(pipeline, "int8", static=True)(latents, timestep, labels).sample
        assert 1e-4 < distance(rounded, expected) < 1e-2  # 6e-2 with one scale for all
    else:
        report = export_onnx(pipeline, tmp_path / "onnx", precision="int8", max_error=1.0)
        assert report["transformer"].relative_error < 1e-2


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"precision": "fp16"}, 1e-5, 2e-2),
        ({"precision": "int8"}, 1e-4, 5e-2),
        ({"precision": "int8", "static": True}, 1e-4, 5e-2),
    ],
)
def test_a_sampler_in_other_precisions(tmp_path: Path, options: dict[str, Any], low: float, high: float) -> None:
    report = export_onnx("dit-toy-shapes", tmp_path / "onnx", ["sampler"], **options)
    assert low < report["transformer"].relative_error < high
    assert verify_export(tmp_path / "onnx").keys() == {"transformer"}
    if options == {"precision": "int8"}:  # whose quantiser notes things of its own in the file
        draw_with_onnxruntime_alone("onnx/transformer/model.onnx", tmp_path)
    images = sample(DiTPipeline.from_pretrained(tmp_path / "onnx"), [0, 4, 8])
    assert (images - sample(DiTPipeline.from_pretrained("dit-toy-shapes"), [0, 4, 8])).abs().mean() < 0.02


def test_verify_measures_an_export_again(parts: tuple[Path, dict[str, Parity]], tmp_path: Path) -> None:
    shutil.copytree(parts[0], tmp_path / "onnx")
    exported = parts[1]
    assert set(exported) == {"transformer", "vae", "sampler"}
    assert verify_export(tmp_path / "onnx") == exported
    run = dit_hub("export", "verify", "onnx", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert all(name in run.stdout for name in exported)
    run = dit_hub("export", "verify", "onnx", "--max-error", "1e-12", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "differs from PyTorch by" in run.stderr
    # Another file in its place, as one that was exported from other weights would be.
    model = onnx.load(path := tmp_path / "onnx" / "transformer" / "model.onnx")
    last = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("final_layer.linear.bias"))
    last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) + 1, last.name))
    onnx.save(model, path)
    with pytest.raises(ValueError, match="transformer differs from PyTorch by"):
        verify_export(tmp_path / "onnx")


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        (["onnx"], 100_000),
        (["onnx", "--precision", "int8", "--precompute"], 300_000),
        (["tensorrt", "--runtime", "rtx"], 3_000_000),
        (["web"], 1_000_000),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, command: list[str], limit: int) -> None:
    arguments = ("export", command[0], "dit-toy-shapes", "out", *command[1:])
    run = dit_hub(*arguments, cwd=tmp_path, file_limit=limit)
    assert run.returncode == 2, run.stderr
    assert run.stderr == "error: out could not be written: the disk is full or a limit is reached.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_stopped_leaves_no_result(tmp_path: Path, how: signal.Signals) -> None:
    command = Command("export", "onnx", "dit-toy-shapes", "out", cwd=tmp_path)
    while command.running() and not list(tmp_path.rglob("config.json")):
        time.sleep(0.01)
    command.send_signal(how)
    run = command.wait()
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
    if how == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []


def test_a_provider_that_is_not_there_is_one_sentence(exported_toy: Path) -> None:
    with pytest.raises(ValueError, match=r"has no provider 'CUDAExecutionProvider' here; available: .*CPUExecution"):
        DiTPipeline.from_pretrained(exported_toy, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.mark.parametrize("export", [export_onnx, export_web])
def test_what_is_an_export_already_is_told(small: Path, tmp_path: Path, export: Any) -> None:
    with pytest.raises(ValueError, match="ORTDiTTransformer is an export already; give the model in PyTorch"):
        export(small, tmp_path / "out")
    for file in (small / "transformer" / "model.onnx", "nowhere.onnx", "nowhere.engine"):
        with pytest.raises(ValueError, match=f"{file} is an export already; give the model that it was made from"):
            export(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_vae_nothing_is_decoded(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decode puts a VAE into the sampler's file, and this pipeline has none"):
        export_onnx(make_pipeline(), tmp_path / "onnx", ["sampler"], decode=True)


def test_verify_wants_the_folder_of_an_export(small: Path, tmp_path: Path) -> None:
    for path, words in (
        (small / "transformer" / "model.onnx", "is a file; give the folder of the export"),
        (tmp_path / "nowhere", "There is no folder .*nowhere"),
        (small / "transformer", r"transformer is no export: its report\.json is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            verify_export(path)


def test_the_model_itself_is_not_replaced(tmp_path: Path) -> None:
    DiTPipeline.from_pretrained("dit-toy-shapes").save_pretrained(tmp_path / "toy")
    for target in (tmp_path / "toy", tmp_path):
        with pytest.raises(ValueError, match="is the model itself, or holds it"):
            export_onnx(tmp_path / "toy", target, overwrite=True)


def test_the_facts_of_the_weights_go_with_an_export_which_leaves_them_as_they_were(
    exported_toy: Path, tmp_path: Path
) -> None:
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes", dtype=torch.bfloat16)
    pipeline.transformer.train()
    export_onnx(pipeline, tmp_path / "onnx", max_error=0.1)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.transformer.training
    for folder in (tmp_path / "onnx", exported_toy):
        assert (folder / "training.json").is_file()
        assert not json.loads((folder / "origin.json").read_text()).get("modified")


@pytest.mark.parametrize("damage", ["report", "reference", "foreign"])
def test_verify_says_what_is_missing(exported_toy: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported_toy, folder)
    if damage == "report":
        (folder / "report.json").write_text("[]")
    elif damage == "reference":
        (folder / "transformer" / "reference.safetensors").write_bytes(b"no tensors")
    else:
        (folder / "transformer" / "reference.safetensors").unlink()
    run = dit_hub("export", "verify", "onnx", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert ("is no export" if damage == "report" else "nothing to compare with") in run.stderr


# --- The sampler -----------------------------------------------------------------------------------------------------

# Every kind of noise, condition and guidance.
SAMPLERS: dict[str, dict[str, Any]] = {
    "learned variance": {"scheduler": DDPMScheduler(variance_type="learned_range", clip_sample=False)},
    "SiT": {"scheduler": FlowMatchEulerDiscreteScheduler(), "parameterization": "sit"},
    "unconditional, clipped": {"scheduler": DDPMScheduler(), "num_classes": 0, "learn_sigma": False},
    "no null class": {"class_dropout_prob": 0.0, "pos_embed": "learned", "conditioning": "adaln"},
    "in-context": {"conditioning": "in_context"},
    "cross-attention": {"conditioning": "cross_attention"},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_what_the_pipeline_draws(make_pipeline: MakePipeline, tmp_path: Path, name: str) -> None:
    pipeline = make_pipeline(**SAMPLERS[name])
    export_onnx(pipeline, tmp_path / "onnx", parts=["sampler"])
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    assert type(exported.transformer).__name__ == "ORTSampler"
    labels = [1, 2, 9] if pipeline.transformer.config.num_classes else None
    expected = latents(pipeline, labels)
    assert distance(latents(exported, labels), expected) < 1e-5
    assert {node.op_type for node in onnx.load(tmp_path / "onnx" / "transformer" / "model.onnx").graph.node} >= {"Loop"}
    if pipeline.transformer.config.null_class is not None:  # guidance is an input of the file
        stronger, ours = (latents(each, labels, guidance_scale=7.0) for each in (pipeline, exported))
        assert distance(ours, stronger) < 1e-5
        assert distance(stronger, expected) > 1e-4


TABLES: tuple[Any, ...] = (
    DPMSolverMultistepScheduler(),
    DPMSolverMultistepScheduler(solver_order=3),
    DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    UniPCMultistepScheduler(),
    HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
    DDPMScheduler(clip_sample=False),
    TableScheduler.from_name("searched", steps=8),
)


def test_a_sampler_takes_any_scheduler_that_is_a_table(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(**SAMPLERS["learned variance"])
    export_onnx(pipeline, tmp_path / "onnx", parts=["sampler"])
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    for scheduler in TABLES:
        pipeline.scheduler = exported.scheduler = scheduler
        drawn, expected = (latents(each, [1, 2], num_inference_steps=8) for each in (exported, pipeline))
        assert distance(drawn, expected) < 2e-5, type(scheduler).__name__
    exported.scheduler = KDPM2AncestralDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    with pytest.raises(ValueError, match="KDPM2AncestralDiscreteScheduler cannot be written as a table"):
        latents(exported, [1])
    pipeline.scheduler = exported.scheduler = DDIMScheduler(clip_sample=False)
    drawn, expected = (latents(each, [1, 2], eta=1.0) for each in (exported, pipeline))
    assert distance(drawn, expected) < 1e-5
    for options in ({"sigmas": [1.0]}, {"guidance_interval": (0.2, 0.8)}, {"guidance_every": 2},
                    {"guidance_channels": 4}, {"callback_on_step_end": lambda *_: {}}):  # fmt: skip
        with pytest.raises(ValueError, match="An exported sampler runs its loop as a whole"):
            latents(exported, [1], **options)


def test_one_table_draws_the_same_on_every_runtime(tmp_path: Path) -> None:
    """PyTorch, ONNX Runtime by steps and in one file, OpenVINO; test_web.py has the browser."""
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    unipc = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=3)
    pipeline.scheduler = table_scheduler(unipc, [6])
    export_onnx(pipeline, tmp_path / "steps", precompute=True)
    export_onnx(pipeline, tmp_path / "whole", parts=["sampler"])
    export_onnx(pipeline, tmp_path / "openvino", runtime="openvino")
    expected = sample(pipeline, [3, 9], num_inference_steps=None)
    for name in ("steps", "whole", "openvino"):
        drawn = sample(DiTPipeline.from_pretrained(tmp_path / name), [3, 9], num_inference_steps=None)
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1 / 255)


def test_an_older_sampler_refuses_what_it_cannot_remember(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """Files from before 0.2 take tables of nine numbers a step and say nothing of it."""
    export_onnx(make_pipeline(), tmp_path / "onnx", parts=["sampler"])
    settings = tmp_path / "onnx" / "transformer" / "runtime.json"
    settings.write_text(json.dumps({"height_width": json.loads(settings.read_text())["height_width"]}))
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    exported.scheduler = DPMSolverMultistepScheduler()
    latents(exported, [1])
    exported.scheduler = TableScheduler.from_name("searched", steps=8)
    with pytest.raises(ValueError, match="needs 7 estimates of earlier steps, and this export holds 1"):
        latents(exported, [1], num_inference_steps=8)


def test_the_table_of_the_folder_is_the_default(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(scheduler=TableScheduler.from_name("searched"))
    export_onnx(pipeline, tmp_path / "onnx", parts=["sampler"])
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    assert exported.scheduler.steps == [5, 6, 7, 8, 9, 10]
    drawn, expected = (latents(each, [1], num_inference_steps=None) for each in (exported, pipeline))
    assert (exported.num_timesteps, distance(drawn, expected) < 1e-5) == (10, True)


def test_all_parts_lie_side_by_side(make_pipeline: MakePipeline, parts: tuple[Path, dict[str, Parity]]) -> None:
    pipeline, (folder, report) = make_pipeline(latent=True), parts
    assert set(report) == {"transformer", "vae", "sampler"}
    exported = DiTPipeline.from_pretrained(folder)
    assert type(exported.transformer).__name__ == "ORTDiTTransformer"
    whole = DiTPipeline(ORTSampler.from_pretrained(folder / "sampler"), exported.scheduler, exported.vae)
    torch.testing.assert_close(sample(whole, [1, 2]), sample(pipeline, [1, 2]), rtol=0, atol=1 / 255)
    graph = onnx.load(folder / "sampler" / "model.onnx").graph
    assert [output.name for output in graph.output] == ["sample", "images"]


def test_the_sampler_file_draws_in_the_pipeline_and_with_onnxruntime_alone(tmp_path: Path) -> None:
    run = dit_hub("export", "onnx", "dit-toy-shapes", "onnx", "--parts", "sampler", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "transformer" in run.stdout
    for model, name in (("onnx", "ort.png"), ("dit-toy-shapes", "torch.png")):
        run = dit_hub("generate", model, "red-circle", "--steps", 10, "--out", name, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    images = [np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("ort.png", "torch.png")]
    assert np.abs(images[0] - images[1]).max() <= 1
    draw_with_onnxruntime_alone("onnx/transformer/model.onnx", tmp_path)


def draw_with_onnxruntime_alone(path: str, folder: Path) -> None:
    """The example, in a Python that refuses torch, diffusers, transformers and dit_hub."""
    example = Path(__file__).parents[1] / "examples" / "sample_with_onnxruntime.py"
    script = (
        "import sys, runpy\n"
        "for name in ('torch', 'diffusers', 'transformers', 'dit_hub'):\n    sys.modules[name] = None\n"
        f"sys.argv = ['x', {path!r}, 'red-circle', 'blue-cross', 'yellow-square']\n"
        f"runpy.run_path({str(example)!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    drawn = [np.asarray(Image.open(folder / f"sample-{number}.png")) for number in range(3)]
    for image, colour in zip(drawn, ([230, 60, 60], [70, 110, 240], [240, 210, 60]), strict=True):
        assert np.abs(image[8, 8].astype(int) - colour).max() < 30  # the middle of a shape has its colour


# --- OpenVINO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "precompute", "bound"), [("fp32", False, 1e-5), ("fp32", True, 1e-5), ("bf16", True, 1e-2)]
)
def test_openvino_runs_in_the_same_pipeline(
    make_pipeline: MakePipeline, tmp_path: Path, precision: str, precompute: bool, bound: float
) -> None:
    pipeline = make_pipeline()
    report = export_onnx(pipeline, tmp_path / "ov", precision=precision, precompute=precompute, runtime="openvino")
    assert report["transformer"].relative_error < bound
    exported = DiTPipeline.from_pretrained(tmp_path / "ov", num_threads=1)
    assert type(exported.transformer).__name__ == "OpenVINODiTTransformer"
    assert distance(latents(exported, [1, 2]), latents(pipeline, [1, 2])) < 2 * bound
    exported.save_pretrained(tmp_path / "copy")
    again = DiTPipeline.from_pretrained(tmp_path / "copy")
    assert distance(latents(again, [1, 2]), latents(exported, [1, 2])) < 1e-5
    (tmp_path / "copy" / "transformer" / "model.onnx").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"OpenVINO cannot load .*model\.onnx"):
        DiTPipeline.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("precompute", [False, True])
def test_openvino_in_int8_draws_as_pytorch(tmp_path: Path, precompute: bool) -> None:
    report = export_onnx("dit-toy-shapes", tmp_path / "ov", precision="int8", runtime="openvino", precompute=precompute)
    assert 1e-3 < report["transformer"].relative_error < 1.5e-2
    assert report["transformer"].measured_on == "openvino"
    written = json.loads((tmp_path / "ov" / "report.json").read_text())
    assert (written["runtime"], written["precision"], written["static"]) == ("openvino", "int8", True)
    assert 1e-3 < written["parity"]["transformer"]["sampling_error"] < 3e-2  # 20 guided steps
    # The products of the blocks alone are rounded: x_embedder, what makes the modulation and the last layer are not.
    graph = onnx.load(tmp_path / "ov" / "transformer" / "model.onnx").graph
    rounded = [tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert rounded
    assert all(name.startswith("transformer.blocks.") and "adaLN" not in name for name in rounded)
    images = sample(DiTPipeline.from_pretrained(tmp_path / "ov"), [0, 4, 8])
    assert (images - sample(DiTPipeline.from_pretrained("dit-toy-shapes"), [0, 4, 8])).abs().mean() < 0.02


def test_the_last_layer_in_int8_would_nearly_double_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"precision": "int8", "runtime": "openvino"}
    kept = export_onnx("dit-toy-shapes", tmp_path / "kept", **options)["transformer"].relative_error
    others = tuple(part for part in quantize._KEPT if part != "final_layer")
    monkeypatch.setattr("dit_hub.export.quantize._KEPT", others)
    with pytest.raises(ValueError, match="The exported transformer differs from PyTorch by"):
        export_onnx("dit-toy-shapes", tmp_path / "rounded", **options, max_error=1.5 * kept)
    assert not (tmp_path / "rounded").exists()
