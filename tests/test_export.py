"""ONNX export and ONNX Runtime as a runtime of the pipeline."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import dit_hub.export.onnx_export as onnx_export
from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.export import export_onnx

MakePipeline = Callable[..., DiTPipeline]


@pytest.fixture
def make_pipeline(make_model: Callable[..., DiTTransformer], make_vae: Callable[..., Any]) -> MakePipeline:
    """A function (fields of the config) -> pipeline with random weights."""

    def make(latent: bool = False, scheduler: Any = None, **fields: Any) -> DiTPipeline:
        vae = make_vae() if latent else None
        return DiTPipeline(make_model(**fields), scheduler or DDIMScheduler(clip_sample=False), vae)

    return make


def sample(pipeline: DiTPipeline, labels: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(labels, num_inference_steps=5, generator=generator, output_type="pt", **options).images


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("opset", [20, 23])
def test_a_latent_pipeline_runs_on_onnx_runtime(make_pipeline: MakePipeline, tmp_path: Path, opset: int) -> None:
    pipeline = make_pipeline(latent=True)
    report = export_onnx(pipeline, tmp_path / "onnx", opset=opset)
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    index = json.loads((tmp_path / "onnx" / "model_index.json").read_text())
    assert index["transformer"] == ["dit_hub", "ORTDiTTransformer"]
    assert index["vae"] == ["dit_hub", "ORTVAEDecoder"]
    # Guided, so the denoiser sees 6 rows: a batch that neither the export nor its check used.
    difference = (sample(exported, [1, 2, 3]) - sample(pipeline, [1, 2, 3])).abs().max().item()
    assert difference <= 1 / 255
    assert report["transformer"].relative_error < 1e-5
    written = json.loads((tmp_path / "onnx" / "report.json").read_text())
    assert written["opset"] == opset
    assert written["parity"]["vae"]["relative_error"] == report["vae"].relative_error
    assert ("Attention" in operators(tmp_path / "onnx" / "transformer" / "model.onnx")) == (opset == 23)


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


def test_the_learned_variance_reaches_ddpm_on_onnx_runtime(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=False))
    export_onnx(pipeline, tmp_path / "onnx")
    exported = DiTPipeline.from_pretrained(tmp_path / "onnx")
    torch.testing.assert_close(sample(exported, [1]), sample(pipeline, [1]), rtol=0, atol=1e-4)


def test_the_file_names_no_local_path_and_is_the_same_each_time(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(make_pipeline(), tmp_path / name)
    files = [(tmp_path / name / "transformer" / "model.onnx").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    for trace in (b"site-packages", b"/home", b"dit_hub/", b".py", str(Path.cwd()).encode()):
        assert trace not in files[0]


def test_the_exported_pipeline_stays_as_it_was(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline().to(torch.bfloat16)
    pipeline.transformer.train()
    export_onnx(pipeline, tmp_path / "onnx")
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.transformer.training


def test_an_export_past_its_bound_fails_and_leaves_nothing(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_RELATIVE_ERROR", 1e-12)
    with pytest.raises(ValueError, match="differs from PyTorch by"):
        export_onnx(make_pipeline(), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_folder_and_a_failed_one_keeps_it(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(make_pipeline(), tmp_path / "onnx", opset=20)
    before = (tmp_path / "onnx" / "report.json").read_text()
    with pytest.raises(ValueError, match="not empty"):
        export_onnx(make_pipeline(), tmp_path / "onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "MAX_RELATIVE_ERROR", 1e-12)
        with pytest.raises(ValueError, match="differs"):
            export_onnx(make_pipeline(), tmp_path / "onnx", overwrite=True)
    assert (tmp_path / "onnx" / "report.json").read_text() == before
    export_onnx(make_pipeline(), tmp_path / "onnx", overwrite=True)
    assert json.loads((tmp_path / "onnx" / "report.json").read_text())["opset"] == 23
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_sessions_take_threads_and_providers_and_save(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    export_onnx(pipeline, tmp_path / "onnx")
    single = DiTPipeline.from_pretrained(tmp_path / "onnx", num_threads=1, providers=["CPUExecutionProvider"])
    assert single.transformer.session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(ValueError, match="no provider 'NoSuchProvider'"):
        DiTPipeline.from_pretrained(tmp_path / "onnx", providers=["NoSuchProvider"])
    single.save_pretrained(tmp_path / "copy")
    copy = DiTPipeline.from_pretrained(tmp_path / "copy")
    torch.testing.assert_close(sample(copy, [1]), sample(pipeline, [1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign"])
def test_a_damaged_file_is_one_sentence(make_pipeline: MakePipeline, tmp_path: Path, damage: str) -> None:
    export_onnx(make_pipeline(), tmp_path / "onnx")
    path = tmp_path / "onnx" / "transformer" / "model.onnx"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "foreign": b"GIF89a" * 99}[damage])
    with pytest.raises(ValueError, match=r"model\.onnx") as error:
        DiTPipeline.from_pretrained(tmp_path / "onnx")
    assert "\n" not in str(error.value)


def test_without_onnxruntime_the_error_names_the_extra(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    export_onnx(make_pipeline(), tmp_path / "onnx")
    script = (
        "import sys\nsys.modules['onnxruntime'] = None\nfrom dit_hub import DiTPipeline\n"
        f"DiTPipeline.from_pretrained({str(tmp_path / 'onnx')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert 'pip install "dit-hub[onnx]"' in run.stderr.splitlines()[-1]
