"""Exports as components of a pipeline: where they compute, what moving them says, and their copies."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_hub import DiTPipeline, ORTDiTTransformer, ORTVAEDecoder
from dit_hub.export import export_onnx, openvino, verify_export
from dit_hub.export.ort import ORTSession, device_of, providers_with_options
from dit_hub.runtime import RuntimeOptions
from dit_hub.training.loop import train
from dit_hub.training.recipe import Recipe

from .command_line import dit_hub, python
from .conftest import MakePipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def exported(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small denoiser by runtime; that of ONNX Runtime with a conditioner."""
    folders = {name: tmp_path_factory.mktemp("exported") / name for name in ("onnxruntime", "openvino")}
    for name, folder in folders.items():
        export_onnx(make_pipeline(), folder, runtime=name, precompute=name == "onnxruntime")
    return folders


def latents(pipeline: DiTPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=3, generator=generator, output_type="latent").images


def test_without_openvino_the_error_names_the_extra(exported: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['openvino'] = None\nfrom dit_hub import DiTPipeline\n"
        f"DiTPipeline.from_pretrained({str(exported['openvino'])!r})\n"
    )
    run = python("-c", script, cwd=tmp_path)
    assert '[openvino]"' in run.stderr.splitlines()[-1]


def test_an_export_is_not_trained_further(exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a ORTDiTTransformer, which cannot be trained; give the model that"):
        train(Recipe(init_from=str(exported["onnxruntime"])))
    with pytest.raises(ValueError, match="put into a model in PyTorch, and this is a ORTDiTTransformer"):
        DiTPipeline.from_pretrained(exported["onnxruntime"]).load_adapters(tmp_path)


# --- Options ---------------------------------------------------------------------------------------------------------


def test_options_reach_every_component(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    export_onnx(make_pipeline(latent=True), tmp_path / "onnx")
    options = RuntimeOptions(providers=[CPU], num_threads=1, cuda_graphs=True)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "onnx", **vars(options))
    assert pipeline.transformer.options == pipeline.vae.options == options
    alone = ORTDiTTransformer.from_pretrained(tmp_path / "onnx" / "transformer", num_threads=3)
    assert alone.options == RuntimeOptions(num_threads=3)
    with pytest.raises(ValueError, match="num_threads must be"):
        ORTVAEDecoder.from_pretrained(tmp_path / "onnx" / "vae", num_threads=0)
    mixed = DiTPipeline.from_pretrained(tmp_path / "onnx", num_threads=2, transformer=alone)
    assert (mixed.transformer, mixed.vae.options) == (alone, RuntimeOptions(num_threads=2))


@pytest.mark.parametrize("settings", [{"hoist": True}, None])
def test_exports_of_earlier_versions_open(exported: dict[str, Path], tmp_path: Path, settings: Any) -> None:
    """The setting had another name, and before that there was none."""
    shutil.copytree(exported["onnxruntime"], tmp_path / "onnx")
    file = tmp_path / "onnx" / "transformer" / "runtime.json"
    file.write_text(json.dumps({"height_width": [8, 8], **settings})) if settings else file.unlink()
    old, new = (DiTPipeline.from_pretrained(folder) for folder in (tmp_path / "onnx", exported["onnxruntime"]))
    assert hasattr(old.transformer, "precompute")
    torch.testing.assert_close(latents(old), latents(new), rtol=1e-5, atol=1e-5)


# --- Providers and devices -------------------------------------------------------------------------------------------

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("providers", "device"),
    [
        (None, "cpu"),
        ([CPU], "cpu"),
        ([CUDA, CPU], "cuda:0"),
        ([(CUDA, {"device_id": 1}), CPU], "cuda:1"),
        ([(TENSORRT, {"device_id": "2"}), (CUDA, {"device_id": 2})], "cuda:2"),
        ([[CUDA, {"arena_extend_strategy": "kSameAsRequested"}]], "cuda:0"),
        ([(CPU, {}), (CUDA, {"device_id": 1})], "cpu"),
        (CUDA, "cuda:0"),
    ],
)
def test_the_preferred_provider_says_the_device(providers: Any, device: str) -> None:
    assert device_of(providers_with_options(providers)) == torch.device(device)


def test_options_of_a_provider_are_added_to_ours() -> None:
    configured = providers_with_options([(CUDA, {"device_id": 1}), CPU])
    assert configured == [(CUDA, {"use_tf32": "0", "device_id": 1}), (CPU, {})]
    assert providers_with_options([(CUDA, {"use_tf32": "1"})]) == [(CUDA, {"use_tf32": "1"})]


@pytest.mark.parametrize(
    ("providers", "words"),
    [
        ([3], "A provider is a name or a pair such as .* not 3"),
        ([(CUDA, "1")], "not \\('CUDAExecutionProvider', '1'\\)"),
        ([(CUDA, {}, {})], "A provider is a name or a pair"),
        ([("NoSuchProvider", {"device_id": 1})], "no provider 'NoSuchProvider'"),
    ],
)
def test_what_is_no_provider_is_one_sentence(exported: dict[str, Path], providers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DiTPipeline.from_pretrained(exported["onnxruntime"], providers=providers)


@pytest.mark.parametrize("device_id", ["one", -1, 0.5, None])
def test_a_device_id_is_a_number(device_id: Any) -> None:
    with pytest.raises(ValueError, match="The device_id of CUDAExecutionProvider is a whole number from 0 up, not '"):
        device_of([(CUDA, {"device_id": device_id})])


def test_pairs_run(exported: dict[str, Path]) -> None:
    plain = DiTPipeline.from_pretrained(exported["onnxruntime"])
    paired = DiTPipeline.from_pretrained(exported["onnxruntime"], providers=[(CPU, {"device_id": 0})])
    assert paired.transformer.device == torch.device("cpu")
    torch.testing.assert_close(latents(paired), latents(plain), rtol=1e-5, atol=1e-5)
    assert verify_export(exported["onnxruntime"], providers=[(CPU, {})])["transformer"].relative_error < 1e-5


def test_verify_takes_a_provider(exported: dict[str, Path], tmp_path: Path) -> None:
    run = dit_hub("export", "verify", exported["onnxruntime"], "--provider", CPU, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = dit_hub("export", "verify", exported["onnxruntime"], "--provider", "NoSuchProvider", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "has no provider 'NoSuchProvider' here" in run.stderr


def test_tensors_are_bound_to_the_device_of_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see which one is named: a session that notes what it is bound to."""
    bound: list[tuple[str, int]] = []

    class Session:
        _ortvalue = torch.ones(2)  # which torch.from_dlpack reads

        def get_outputs(self) -> list[Any]:
            return [self]

        name = "sample"

        def io_binding(self) -> Any:
            return self

        def bind_input(self, name: str, kind: str, index: int, *rest: Any) -> None:
            bound.append((kind, index))

        def bind_output(self, name: str, kind: str, index: int) -> None:
            bound.append((kind, index))

        def run_with_iobinding(self, binding: Any) -> None:
            pass

    streams: list[Any] = []

    class Stream:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.append(device) or Stream())
    ORTSession([Session()], {}, torch.device("cuda", 1))({"x": torch.zeros(2)})
    assert bound == [("cuda", 1), ("cuda", 1)]
    assert streams == [torch.device("cuda", 1)]


# --- Moving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "arguments", "words"),
    [
        ("onnxruntime", ("cuda",), r"ORTDiTTransformer cannot move from cpu to cuda: .*providers=\["),
        ("onnxruntime", (torch.device("cuda", 1),), "cannot move from cpu to cuda:1"),
        ("onnxruntime", (torch.float16,), "ORTDiTTransformer cannot become torch.float16: .*--precision"),
        ("onnxruntime", ("cpu", torch.bfloat16), "cannot become torch.bfloat16"),
        ("openvino", ("cuda",), "OpenVINODiTTransformer cannot move from cpu to cuda: OpenVINO computes on"),
    ],
)  # fmt: skip
def test_moving_an_export_says_what_to_do(
    exported: dict[str, Path], runtime: str, arguments: tuple[Any, ...], words: str
) -> None:
    pipeline = DiTPipeline.from_pretrained(exported[runtime])
    with pytest.raises(ValueError, match=words) as error:
        pipeline.to(*arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):
        pipeline.transformer.to(*arguments)


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"torch_dtype": {"default": torch.float16}}])
def test_an_export_is_not_loaded_in_another_precision(exported: dict[str, Path], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ORTDiTTransformer cannot become torch\.float16: .*--precision"):
        DiTPipeline.from_pretrained(exported["onnxruntime"], **options)
    DiTPipeline.from_pretrained(exported["onnxruntime"], dtype={"transformer": torch.float32, "vae": torch.float16})


def test_staying_where_it_is_is_no_error(exported: dict[str, Path]) -> None:
    pipeline = DiTPipeline.from_pretrained(exported["onnxruntime"])
    for arguments in (("cpu",), (torch.device("cpu"),), (torch.float32,), ("cpu", torch.float32), ()):
        assert pipeline.to(*arguments) is pipeline
    pipeline.transformer.device = torch.device("cuda", 1)  # as where it is loaded for that GPU
    for device in ("cuda:1", "cuda", "cpu"):
        pipeline.transformer.to(device)
    with pytest.raises(ValueError, match="cannot move from cuda:1 to cuda:0"):
        pipeline.transformer.to("cuda:0")


def test_a_part_in_pytorch_beside_an_export_stays_where_it_is_when_the_pipeline_cannot_move(
    make_pipeline: MakePipeline, exported: dict[str, Path]
) -> None:
    vae = make_pipeline(latent=True).vae
    mixed = DiTPipeline.from_pretrained(exported["onnxruntime"], vae=vae)
    with pytest.raises(ValueError, match=r"ORTDiTTransformer cannot become torch\.float64"):
        mixed.to(torch.float64)
    assert vae.dtype == torch.float32
    expected = mixed.decode(latents(mixed), "pt")
    assert isinstance(mixed.vae, nn.Module)
    mixed.vae.to(torch.float64)  # by itself it moves
    torch.testing.assert_close(mixed.decode(latents(mixed), "pt").float(), expected, rtol=0, atol=1e-4)
    mixed.vae.to(torch.float32)
    mixed.enable_model_cpu_offload(device="cpu")  # which asks for "cpu" after each call
    torch.testing.assert_close(mixed.decode(latents(mixed), "pt"), expected, rtol=0, atol=1e-4)


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]", '{"height_width": '])
def test_damaged_settings_are_one_sentence(exported: dict[str, Path], tmp_path: Path, content: str) -> None:
    shutil.copytree(exported["onnxruntime"], tmp_path / "onnx")
    (tmp_path / "onnx" / "transformer" / "runtime.json").write_text(content)
    with pytest.raises(ValueError, match=r"transformer/runtime\.json is damaged"):
        DiTPipeline.from_pretrained(tmp_path / "onnx")


def test_a_missing_conditioner_is_one_sentence(exported: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(exported["onnxruntime"], tmp_path / "onnx")
    (tmp_path / "onnx" / "transformer" / "conditioner.onnx").unlink()
    with pytest.raises(ValueError, match=r"transformer has no conditioner\.onnx"):
        DiTPipeline.from_pretrained(tmp_path / "onnx")


def test_an_input_that_the_file_has_not_is_one_sentence(exported: dict[str, Path]) -> None:
    denoiser = DiTPipeline.from_pretrained(exported["onnxruntime"]).transformer
    del denoiser.precompute  # as if the file were that of a denoiser without a conditioner
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run this: .*timestep") as error:
        denoiser(torch.zeros(1, 4, 8, 8), 1, torch.tensor([1]))
    assert "\n" not in str(error.value)


def test_openvino_takes_every_batch_and_refuses_other_sizes(exported: dict[str, Path]) -> None:
    """More batches than it compiles for, each twice."""
    denoiser, plain = (DiTPipeline.from_pretrained(exported[name]).transformer for name in ("openvino", "onnxruntime"))
    for count in (*range(1, 8), *range(1, 8)):
        noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(count))
        inputs = (noise, torch.full((count,), 321.0), torch.arange(count))
        torch.testing.assert_close(denoiser(*inputs).sample, plain(*inputs).sample, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="OpenVINO cannot run this: ") as error:
        denoiser(torch.zeros(2, 3, 8, 8), 1, torch.tensor([1, 2]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["small", "large"])
def test_openvino_packs_the_weights_of_a_large_file_once(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    pipeline = DiTPipeline.from_pretrained(exported["openvino"])
    transformer = exported["openvino"] / "transformer"
    weights = sum(file.stat().st_size for file in transformer.glob("model.onnx*"))
    monkeypatch.setattr("dit_hub.export.openvino._LARGEST", weights if size == "small" else weights - 1)
    pipeline = DiTPipeline.from_pretrained(exported["openvino"])
    compiled = []
    core = openvino._core()
    compile_model = core.compile_model
    monkeypatch.setattr(core, "compile_model", lambda *given: compiled.append(given) or compile_model(*given))
    for count in (1, 2, 3, 1):
        inputs = (torch.zeros(count, 4, 8, 8), torch.full((count,), 321.0), torch.arange(count))
        assert torch.isfinite(pipeline.transformer(*inputs).sample).all()
    assert len(compiled) == (3 if size == "small" else 1)


# --- Copies ----------------------------------------------------------------------------------------------------------


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("copied", [pickled, copy.copy, copy.deepcopy])
def test_exports_can_be_copied_and_pickled(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: str, copied: Any
) -> None:
    monkeypatch.chdir(exported[runtime].parent)
    pipeline = DiTPipeline.from_pretrained(runtime, num_threads=1)
    whole = copied(pipeline)
    part = copied(pipeline.transformer)
    assert (type(part), part.options, part.config.hidden_size) == (
        type(pipeline.transformer),
        pipeline.transformer.options,
        32,
    )
    monkeypatch.chdir(tmp_path)  # a copy holds wherever it goes
    expected = latents(pipeline)
    assert part is not pipeline.transformer
    for other in (whole, DiTPipeline(copied(part), pipeline.scheduler)):
        torch.testing.assert_close(latents(other), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_whose_folder_is_gone_is_one_sentence(exported: dict[str, Path], tmp_path: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(exported["onnxruntime"])
    pipeline.save_pretrained(tmp_path / "copy")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "transformer" / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"copy/transformer has no model\.onnx"):
        copy.deepcopy(pipeline)


# Of what is open, the oldest goes first. Python's handlers run on the stack for signals, which OpenVINO replaces.
OPENED_AND_DROPPED = """
import os, signal, sys
from dit_hub import DiTPipeline, ORTDiTTransformer, ORTVAEDecoder

first, second = (DiTPipeline.from_pretrained(sys.argv[1], num_threads=1) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_openvino(exported: dict[str, Path], tmp_path: Path) -> None:
    """On a processor with AMX they ended the process."""
    run = python("-c", OPENED_AND_DROPPED, exported["openvino"], cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "handled\n")
