"""TensorRT engines: really built, by tensorrt_rtx, on any machine; and what must hold before one is run."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from onnx import TensorProto, helper

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.export import export_onnx, export_tensorrt
from dit_hub.export.reference import Parity, measure_parity
from dit_hub.export.tensorrt import check_shapes
from dit_hub.export.tensorrt_build import Machine, Manifest, misfit
from dit_hub.solvers import table_scheduler

from .command_line import Command, dit_hub
from .conftest import MakePipeline

pytest.importorskip("tensorrt_rtx", reason="waits for the package tensorrt_rtx, which has wheels for Linux and Windows")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


# What a build tells of its progress: phase, steps done, all its steps.
Phases = list[tuple[str, int, int]]


def build(folder: Path, precision: str | None) -> tuple[Path, dict[str, Parity], Phases]:
    """The embedded model as engines, their errors and what was told meanwhile."""
    phases: Phases = []
    report = export_tensorrt(
        "dit-toy-shapes", folder, precision=precision, runtime="rtx", profile=(1, 4, 32),
        progress=lambda phase, done, total: phases.append((phase, done, total)),
    )  # fmt: skip
    return folder, report, phases


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Parity], Phases]:
    """The embedded model as engines of the default precision, fp16."""
    return build(tmp_path_factory.mktemp("engines") / "trt", None)


@pytest.fixture(scope="module")
def engines(built: tuple[Path, dict[str, Parity], Phases]) -> Path:
    """The folder of these, to copy and damage."""
    return built[0]


def manifest_of(folder: Path, component: str = "transformer") -> dict[str, Any]:
    return json.loads((folder / component / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("precision", "bound", "measured_on"),
    [
        ("fp32", 1e-5, "onnxruntime"),
        ("fp16", 2e-2, "onnxruntime"),
        ("bf16", 2e-2, "pytorch"),
        ("int8", 5e-2, "onnxruntime"),
        ("fp8", 5e-2, "pytorch"),
    ],
)
def test_the_toy_builds_in_every_precision(
    built: tuple[Path, dict[str, Parity], Phases], tmp_path: Path, precision: str, bound: float, measured_on: str
) -> None:
    folder, report, phases = built if precision == "fp16" else build(tmp_path / "trt", precision)
    parity = report["transformer"]
    assert 0 < parity.relative_error < bound
    if not torch.cuda.is_available():
        assert parity.measured_on == measured_on
    assert phases[-1][0] == "Building engine"
    assert all(0 < done <= total for _, done, total in phases)
    manifest = manifest_of(folder)
    assert (manifest["product"], manifest["precision"]) == ("tensorrt_rtx", precision)
    assert manifest["parity"]["relative_error"] == parity.relative_error
    assert manifest["engines"]["model.engine"]["profiles"]["hidden_states"] == [[n, 3, 16, 16] for n in (1, 4, 32)]
    assert manifest["engines"]["conditioner.engine"]["profiles"]["timestep"] == [[1], [64], [1024]]
    assert ("8.0" in manifest["compute_capabilities"]) == (precision != "fp8")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["dit_hub", "TensorRTDiTTransformer"]
    assert json.loads((folder / "origin.json").read_text())["license"] == "apache-2.0"
    leftovers = {each.name for each in folder.parent.rglob("*") if each.suffix == ".onnx" or each.name.startswith(".")}
    assert leftovers == {".dit-hub.json"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_sampler_builds(tmp_path: Path, precision: str) -> None:
    pipeline = DiTPipeline.from_pretrained("dit-toy-shapes")
    unipc = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=3)
    pipeline.scheduler = table_scheduler(unipc, [6])  # which remembers four estimates
    report = export_tensorrt(pipeline, tmp_path / "trt", ["sampler"], precision, runtime="rtx", profile=(1, 2, 8))
    assert report["transformer"].relative_error < 2e-2
    assert json.loads((tmp_path / "trt" / "model_index.json").read_text())["scheduler"] == ["dit_hub", "TableScheduler"]
    profiles = manifest_of(tmp_path / "trt")["engines"]["model.engine"]["profiles"]
    assert profiles["table"] == [[1, 9], [50, 9], [1000, 72]]
    assert profiles["class_labels"] == [[1], [2], [8]]


def test_a_latent_pipeline_builds_with_its_decoder_and_takes_sizes(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    report = export_tensorrt(make_pipeline(latent=True), tmp_path / "trt", ["all"], "fp32", (1, 2, 4), runtime="rtx")
    assert {name: parity.relative_error < 1e-5 for name, parity in report.items()} == dict.fromkeys(
        ("transformer", "vae", "sampler"), True
    )
    assert manifest_of(tmp_path / "trt", "vae")["engines"]["model.engine"]["profiles"]["latents"][2] == [4, 4, 8, 8]
    profiles = manifest_of(tmp_path / "trt", "sampler")["engines"]["model.engine"]["profiles"]
    assert profiles["class_labels"] == [[1], [4], [8]]  # guidance doubles them
    assert profiles["guidance_scale"] == [[], [], []]
    latent = make_pipeline(latent=True)
    export_tensorrt(latent, tmp_path / "sizes", profile=(1, 2, 4), size=(8, 16, 32), runtime="rtx")
    decoder = manifest_of(tmp_path / "sizes", "vae")["engines"]["model.engine"]["profiles"]["latents"]
    assert decoder == [[1, 4, 8, 8], [2, 4, 16, 16], [4, 4, 32, 32]]
    profiles = manifest_of(tmp_path / "sizes")["engines"]["model.engine"]["profiles"]
    assert profiles["hidden_states"] == [[1, 4, 8, 8], [2, 4, 16, 16], [4, 4, 32, 32]]


def test_exports_to_onnx_build_as_they_are(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    exported = export_onnx(make_pipeline(latent=True), tmp_path / "onnx", precompute=True, precision="fp16")
    assert export_tensorrt(tmp_path / "onnx", tmp_path / "trt", runtime="rtx", profile=(1, 2, 4)) == exported
    assert set(manifest_of(tmp_path / "trt")["engines"]) == {"model.engine", "conditioner.engine"}
    file = tmp_path / "onnx" / "transformer" / "model.onnx"
    run = dit_hub("export", "tensorrt", file, "lone", "--runtime", "rtx", "--profile", "1,1,2", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (tmp_path / "lone").iterdir()) == [
        ".dit-hub.json",
        "manifest.json",
        "model.engine",
    ]
    source = json.loads((tmp_path / "lone" / "manifest.json").read_text())["engines"]["model.engine"]["source_sha256"]
    assert source == manifest_of(tmp_path / "trt")["engines"]["model.engine"]["source_sha256"]


@pytest.mark.slow
def test_s2_builds(tmp_path: Path) -> None:
    from dit_hub import DiTConfig

    pipeline = DiTPipeline(DiTTransformer(DiTConfig.from_name("DiT-S/2")), _ddim())
    torch.nn.init.normal_(pipeline.transformer.final_layer.linear.weight, std=0.02)
    report = export_tensorrt(pipeline, tmp_path / "trt", precision="fp16", runtime="rtx")
    assert report["transformer"].relative_error < 2e-2
    assert (tmp_path / "trt" / "transformer" / "model.engine").stat().st_size > 30e6


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler()


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], name="the_culprit")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    onnx.save(model, tmp_path / "odd.onnx")
    run = dit_hub("export", "tensorrt", "odd.onnx", "trt", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "cannot read odd.onnx: node 'the_culprit' (Mystery)" in run.stderr
    export_onnx("dit-toy-shapes", tmp_path / "int8", precision="int8")
    run = dit_hub("export", "tensorrt", "int8", "trt", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "(DynamicQuantizeLinear)" in run.stderr
    assert "node '" in run.stderr
    assert not (tmp_path / "trt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profile": (8, 1, 4)}, "profile must be three rising numbers"),
        ({"profile": (0, 1, 4)}, "profile must be three rising numbers"),
        ({"profile": (1, 8, 10**20)}, "profile must be three rising numbers"),
        ({"size": (0, 16, 32)}, "size must be three rising numbers"),
        ({"precision": "fp4"}, "There is no precision 'fp4'; known: fp32, fp16, bf16, fp8, int8"),
        ({"runtime": "trt"}, "There is no runtime 'trt'; known: auto, tensorrt, rtx"),
        ({"compute_capabilities": ["9.0"]}, "does not build for compute capability 9.0; it does for 7.5, 8.0"),
        ({"precision": "fp8", "compute_capabilities": ["8.6"]}, "have no fp8; 8.9 and later have"),
        ({"size": (16, 16, 32)}, "learned positions, which cover one height and width only"),
        ({"parts": ["sampler"], "precision": "int8"}, "weights of 8 bits outside of loops only"),
        ({"parts": ["encoder"]}, "There is no part 'encoder'"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        export_tensorrt("dit-toy-shapes", tmp_path / "trt", **{"runtime": "rtx", **options})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "1,2"], "--profile takes three numbers such as 1,8,64, not '1,2'"),
        (["--size", "16,16,32"], "learned positions, which cover one height and width only"),
    ],
)
def test_at_the_command_line_too(tmp_path: Path, arguments: list[str], words: str) -> None:
    run = dit_hub("export", "tensorrt", "dit-toy-shapes", "trt", *arguments, cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert words in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 200])
def test_a_damaged_onnx_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    run = dit_hub("export", "tensorrt", "model.onnx", "trt", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert not (tmp_path / "trt").exists()


def test_an_engine_says_why_it_does_not_run_here(engines: Path) -> None:
    manifest = Manifest.read(engines / "transformer")
    fitting = Machine({"tensorrt_rtx": manifest.version}, "8.9")
    assert misfit(manifest, fitting) is None
    for machine, words in (
        (Machine(fitting.products, None), "needs an NVIDIA GPU"),
        (Machine({}, "8.9"), '[tensorrt-rtx]"'),
        (
            Machine({"tensorrt_rtx": "1.2.0"}, "8.9"),
            f"built with tensorrt_rtx {manifest.version}, and 1.2.0 is installed",
        ),
        (Machine(fitting.products, "9.0"), "for compute capability 8.0, 8.6, 8.9, 12.0, 12.1, and this GPU has 9.0"),
    ):
        assert words in str(misfit(manifest, machine))


@without_gpu
def test_without_a_gpu_loading_is_one_sentence(engines: Path, tmp_path: Path) -> None:
    for command in (["generate", engines], ["export", "verify", engines]):
        run = dit_hub(*command, cwd=tmp_path)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert "needs an NVIDIA GPU, and PyTorch sees none" in run.stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"engines": 3}'])
def test_a_damaged_manifest_is_one_sentence(engines: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(engines, tmp_path / "trt")
    (tmp_path / "trt" / "transformer" / "manifest.json").write_text(content)
    run = dit_hub("generate", "trt", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "manifest.json cannot be read" in run.stderr


def test_inputs_outside_the_profile_are_refused() -> None:
    profiles = {"x": [[1, 4], [2, 4], [8, 4]], "y": [[1], [2], [8]]}
    check_shapes(profiles, {"x": torch.zeros(8, 4), "y": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"built for x of \[1, 4\] to \[8, 4\], not \[9, 4\]; guidance doubles"):
        check_shapes(profiles, {"x": torch.zeros(9, 4), "y": torch.zeros(8)})
    with pytest.raises(ValueError, match="no input z"):
        check_shapes(profiles, {"z": torch.zeros(1)})
    with pytest.raises(ValueError, match="needs the input y"):
        check_shapes(profiles, {"x": torch.zeros(1, 4)})


def test_an_engine_is_measured_on_the_shapes_that_it_takes() -> None:
    def engine(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        check_shapes({"x": [[2], [2], [4]]}, inputs)
        return inputs["x"] + 0.1

    cases = [({"x": torch.ones(count)}, torch.ones(count)) for count in (1, 2, 4, 5)]
    parity = measure_parity("transformer", engine, cases, 0.5, "tensorrt")
    assert parity.batch_sizes == (2, 4)
    assert parity.relative_error == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"built for x of \[2\] to \[4\], not \[5\]"):
        measure_parity("transformer", engine, cases[3:], 0.5, "tensorrt")


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_no_result(tmp_path: Path, how: signal.Signals) -> None:
    command = Command("export", "tensorrt", "dit-toy-shapes", "trt", cwd=tmp_path)
    while command.running() and not list(tmp_path.rglob("*.engine")) and not list(tmp_path.rglob("model.onnx")):
        time.sleep(0.01)
    command.send_signal(how)
    run = command.wait()
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "trt").exists()
    if how == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
