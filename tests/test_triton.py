"""Model repositories for Triton: config.pbtxt by its own schema, and what the files compute."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from torch import Tensor
from tritonclient.grpc import model_config_pb2

from dit_hub import DiTPipeline
from dit_hub.configuration_dit import DiTConfig
from dit_hub.export import export_onnx, export_tensorrt, export_triton
from dit_hub.export.parts import denoiser_inputs
from dit_hub.export.sampler import sample_latents
from dit_hub.vaes import decode_latents

from .command_line import dit_hub
from .conftest import MakePipeline

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

GROUP: Any = model_config_pb2.ModelInstanceGroup
TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)", "TYPE_UINT8": "tensor(uint8)"}


def read_config(model: Path) -> Any:
    """config.pbtxt, by Triton's schema."""
    config: Any = model_config_pb2.ModelConfig()
    return text_format.Parse((model / "config.pbtxt").read_text(), config)


def parameters(config: Any) -> dict[str, Any]:
    return {key: json.loads(value.string_value) for key, value in config.parameters.items()}


def shapes(config: Any, entries: Any) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor as the file must have them, by Triton's rules: -1 where they are dynamic."""
    batch = [-1] if config.max_batch_size else []
    found = {}
    for entry in entries:
        dims = entry.reshape.shape if entry.HasField("reshape") else entry.dims
        assert len(entry.dims) > 0  # requests have no scalars
        assert batch or len(dims) > 0
        name = model_config_pb2.DataType.Name(entry.data_type)
        found[entry.name] = (TYPES[name], [*batch, *dims])
    return found


def run(model: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Run a model's file, as a server does with what it knows of config.pbtxt alone."""
    config, session = read_config(model), onnxruntime.InferenceSession(model / "1" / "model.onnx")
    for entries, of_file in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        plain = {each.name: (each.type, [n if isinstance(n, int) else -1 for n in each.shape]) for each in of_file}
        assert shapes(config, entries) == plain
    assert set(inputs) == {entry.name for entry in config.input}
    outputs = session.run([entry.name for entry in config.output], {name: x.numpy() for name, x in inputs.items()})
    return [torch.from_numpy(np.asarray(output)) for output in outputs]


@pytest.fixture(scope="module")
def latent(make_pipeline: MakePipeline) -> DiTPipeline:
    return make_pipeline(latent=True)


@pytest.fixture(scope="module")
def exported(latent: DiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to ONNX of every part, with a conditioner."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(latent, folder, ["all"], precompute=True)
    return folder


def test_the_denoiser_is_batched_and_has_its_decoder(latent: DiTPipeline, tmp_path: Path) -> None:
    models = export_triton(latent, tmp_path / "repository", max_batch=16)
    assert [(model.name, model.max_batch_size) for model in models] == [("denoiser", 16), ("decoder", 16)]
    config = read_config(denoiser := tmp_path / "repository" / "denoiser")
    assert (config.platform, config.backend, config.max_batch_size) == ("onnxruntime_onnx", "onnxruntime", 16)
    assert config.HasField("dynamic_batching")
    assert config.instance_group[0].kind == GROUP.KIND_AUTO
    transformer: Any = latent.transformer
    assert DiTConfig(**parameters(config)["dit_hub.config"]).to_dict() == transformer.config.to_dict()
    for batch in (1, 5):  # rows of several requests, put together
        inputs = denoiser_inputs(transformer.config, batch)
        with torch.no_grad():
            expected = transformer(**inputs).sample
        torch.testing.assert_close(run(denoiser, inputs)[0], expected, rtol=1e-4, atol=1e-5)
    decoder = tmp_path / "repository" / "decoder"
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = parameters(read_config(decoder))["dit_hub.config"]["scaling_factor"]
    with torch.no_grad():
        torch.testing.assert_close(run(decoder, {"latents": latents / scale})[0], decode_latents(latent.vae, latents),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
    assert not any(path.name.startswith(".export") for path in (tmp_path / "repository").iterdir())


def test_the_sampler_draws_the_pipelines_images_from_what_its_config_says(latent: DiTPipeline, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    assert [model.max_batch_size for model in export_triton(latent, repository, "sampler")] == [0]
    config = read_config(repository / "sampler")
    assert not config.HasField("dynamic_batching")
    facts = parameters(config)
    table = torch.tensor(facts["dit_hub.table"])
    steps, null = len(table), facts["dit_hub.null_class"]
    noise = torch.randn(2, *facts["dit_hub.latents"], generator=torch.Generator().manual_seed(2))
    scale = torch.tensor([4.0])
    inputs = {"latents": noise, "table": table, "noise": torch.zeros(steps, *noise.shape),
              "class_labels": torch.tensor([0, 1, null, null]), "guidance_scale": scale}  # fmt: skip
    sample, images = run(repository / "sampler", inputs)
    pipeline = DiTPipeline(latent.transformer, latent.scheduler)
    expected = sample_latents(pipeline, 2, steps)  # of the same seed
    assert (sample - expected).norm() / expected.norm() < 1e-4
    with torch.no_grad():
        pixels = ((decode_latents(latent.vae, expected) / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert (images.float() - pixels).abs().max() < 1
    unguided, _ = run(repository / "sampler", {**inputs, "guidance_scale": torch.ones(1)})
    assert (unguided - expected).norm() / expected.norm() > 1e-3  # the vector of one number is read


def test_an_export_is_taken_as_it_is(exported: Path, latent: DiTPipeline, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    models = export_triton(exported, repository)
    batches = {model.name: model.max_batch_size for model in models}
    assert batches == {"conditioner": 1024, "denoiser": 32, "decoder": 32}
    transformer: Any = latent.transformer
    inputs = denoiser_inputs(transformer.config, 3)
    pairs = {name: inputs.pop(name) for name in ("timestep", "class_labels")}
    condition = run(repository / "conditioner", pairs)[0]
    with torch.no_grad():
        expected = transformer(**inputs, **pairs).sample
    sample = run(repository / "denoiser", {**inputs, "condition": condition})[0]
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
    assert (repository / "report.json").read_text() == (exported / "report.json").read_text()
    assert [model.name for model in export_triton(exported, tmp_path / "other", "sampler")] == ["sampler", "decoder"]


def test_weights_beside_the_graph_go_along(exported: Path, latent: DiTPipeline, tmp_path: Path) -> None:
    shutil.copytree(exported, folder := tmp_path / "large")
    for part in ("sampler", "vae"):
        file = folder / part / "model.onnx"
        onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    export_triton(folder, tmp_path / "repository", "sampler")
    shutil.rmtree(folder)
    latents = torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        expected = latent.vae.decode(latents).sample
    torch.testing.assert_close(run(tmp_path / "repository" / "decoder", {"latents": latents})[0], expected,
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    table = torch.zeros(1, 9)
    inputs = {"latents": latents, "table": table, "noise": torch.zeros(1, 1, 4, 8, 8),
              "class_labels": torch.tensor([1]), "guidance_scale": torch.ones(1)}  # fmt: skip
    assert run(tmp_path / "repository" / "sampler", inputs)[0].shape == (1, 4, 8, 8)


def test_sizes_and_unconditional_models(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    export_onnx(make_pipeline(), tmp_path / "onnx", dynamic_size=True)
    export_triton(tmp_path / "onnx", tmp_path / "repository")
    config = read_config(tmp_path / "repository" / "denoiser")
    assert list(config.input[0].dims)[1:] == [-1, -1]
    pipeline = make_pipeline(num_classes=0)
    export_triton(pipeline, tmp_path / "unconditional", max_batch=4)
    inputs = denoiser_inputs(pipeline.transformer.config, 2)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        expected = pipeline.transformer(**inputs).sample  # pyright: ignore[reportCallIssue]
    sample = run(tmp_path / "unconditional" / "denoiser", inputs)[0]
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)


def test_engines_are_served_within_their_profile(latent: DiTPipeline, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="waits for the package tensorrt_rtx, which builds without a GPU")
    export_tensorrt(latent, folder := tmp_path / "engines", ["all"], "fp32", (1, 2, 8), runtime="rtx")
    with pytest.raises(ValueError, match=r"made for tensorrt_rtx, and Triton runs engines of tensorrt alone"):
        export_triton(folder, tmp_path / "repository")
    for file in folder.glob("*/manifest.json"):  # as TensorRT itself would say it, which needs a GPU to build
        file.write_text(file.read_text().replace('"tensorrt_rtx"', '"tensorrt"'))
    models = {model.name: model for model in export_triton(folder, tmp_path / "repository")}
    assert {name: model.max_batch_size for name, model in models.items()} == {
        "conditioner": 1024, "denoiser": 8, "decoder": 8}  # fmt: skip
    config = read_config(tmp_path / "repository" / "denoiser")
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.instance_group[0].kind == GROUP.KIND_GPU
    transformer: Any = latent.transformer
    length, width = transformer.config.precomputed_length, transformer.config.hidden_size
    assert shapes(config, config.input) == {
        "hidden_states": ("tensor(float)", [-1, 4, 8, 8]), "condition": ("tensor(float)", [-1, length, width])
    }  # fmt: skip
    assert shapes(config, config.output) == {"sample": ("tensor(float)", [-1, 8, 8, 8])}
    engine = tmp_path / "repository" / "denoiser" / "1" / "model.plan"
    assert engine.read_bytes() == (folder / "transformer" / "model.engine").read_bytes()
    with pytest.raises(ValueError, match=r"Triton takes no scalars, and the engine of this sampler has one"):
        export_triton(folder, tmp_path / "sampler", "sampler")
    assert not (tmp_path / "sampler").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "decoder"}, r"There is no part 'decoder' for Triton; known: denoiser, sampler\."),
        ({"runtime": "openvino"}, r"There is no runtime 'openvino' for Triton; known: onnxruntime, tensorrt\."),
        ({"max_batch": 0}, r"max_batch must be 1 or more, not 0\."),
        ({"precision": "fp17"}, r"onnxruntime does not run 'fp17'"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_triton("dit-toy-shapes", tmp_path / "repository", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_openvino_is_refused(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    export_onnx(make_pipeline(), tmp_path / "openvino", runtime="openvino")
    with pytest.raises(ValueError, match="is an export to OpenVINO"):
        export_triton(tmp_path / "openvino", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_the_command_line(exported: Path, tmp_path: Path) -> None:
    result = dit_hub("export", "triton", exported, "repository", "--max-batch", 8, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tritonserver --model-repository=repository" in result.stdout
    assert read_config(tmp_path / "repository" / "denoiser").max_batch_size == 8
    again = dit_hub("export", "triton", exported, "repository", cwd=tmp_path)
    assert again.returncode == 2
    assert "The folder repository is not empty" in again.stderr
    shutil.copytree(exported, tmp_path / "denoiser", ignore=shutil.ignore_patterns("sampler"))
    for arguments, message in ((["--part", "sampler"], "has no sampler; export the model with --parts sampler"),
                               (["--runtime", "tensorrt"], "is an export, which has its runtime")):  # fmt: skip
        refused = dit_hub("export", "triton", "denoiser", "other", *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())
        assert not (tmp_path / "other").exists()
