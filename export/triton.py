"""Export to Triton Inference Server: a model repository of ONNX files or TensorRT engines, with their config.pbtxt."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_hub.checks import whole_number
from dit_hub.extras import require
from dit_hub.files import new_folder
from dit_hub.pipeline_dit import DiTPipeline
from dit_hub.sources import local_folder

from .component import CONDITIONER_FILE, MAX_PAIRS, MODEL_FILE
from .flow import check_output, load_pytorch
from .onnx_export import export_onnx
from .parts import MAX_DECODED
from .reference import REPORT_FILE, read_reference
from .tensorrt_build import PRODUCTS, Manifest
from .tensorrt_export import export_tensorrt

TRITON_PARTS = ("denoiser", "sampler")
TRITON_RUNTIMES = ("onnxruntime", "tensorrt")

CONFIG_FILE = "config.pbtxt"

DEFAULT_MAX_BATCH = 32

_FACTS = (REPORT_FILE, "origin.json")  # of an export: its errors; where the weights are from, and their licence

# The server's ONNX Runtime is that of its container; 20 runs on nearly every version.
_OPSET = 20

# By backend: the older name that servers also know, and the file in a version's folder.
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8",
}
_TORCH_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "uint8": "UINT8"}

# Of one dimension: its extent, or a name where it is dynamic; dimensions of one name are equal.
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TritonTensor:
    """An input or output of a file: its name there, its data type as Triton says it, and its whole shape."""

    name: str
    data_type: str
    shape: Shape


@dataclass(frozen=True)
class TritonModel:
    """A model of a repository.

    Args:
        name: of its folder.
        backend: of `TRITON_RUNTIMES`.
        max_batch_size: rows that the server may put together; 0 where requests stay apart.
        inputs, outputs: of its file, in that order.
        parameters: facts for clients, which ask the server for the model's configuration.
    """

    name: str
    backend: str
    max_batch_size: int
    inputs: list[TritonTensor]
    outputs: list[TritonTensor]
    parameters: dict[str, str] = field(default_factory=dict)

    def config(self) -> str:
        """The text of config.pbtxt. It leaves the name out, so that of the folder holds, which may be renamed."""
        kind = "KIND_GPU" if self.backend == "tensorrt" else "KIND_AUTO"  # a GPU where there is one
        lines = [
            f"platform: {_quoted(_PLATFORMS[self.backend])}",
            f"backend: {_quoted(self.backend)}",
            f"max_batch_size: {self.max_batch_size}",
            *(f"input {self._tensor(each)}" for each in self.inputs),
            *(f"output {self._tensor(each)}" for each in self.outputs),
            *["dynamic_batching { }"] * (self.max_batch_size > 0),
            f"instance_group {{ count: 1 kind: {kind} }}",
            *(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
              for key, value in self.parameters.items()),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _tensor(self, tensor: TritonTensor) -> str:
        dims = [each if isinstance(each, int) else -1 for each in tensor.shape[self.max_batch_size > 0 :]]
        reshape = "" if dims else " reshape { shape: [ ] }"  # requests have no empty shapes: (N, 1) stands for (N,)
        facts = f"name: {_quoted(tensor.name)} data_type: {tensor.data_type}"
        return f"{{ {facts} dims: {dims or [1]}{reshape} }}"


def export_triton(
    model: str | os.PathLike | DiTPipeline,
    repository: str | os.PathLike,
    part: str | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    overwrite: bool = False,
) -> list[TritonModel]:
    """Write a model repository for Triton Inference Server.

    Args:
        model: a pipeline in PyTorch, which is exported and measured first, or the folder of an export to ONNX or
            TensorRT, whose files are taken as they are.
        repository: the new folder, with a folder for each model.
        part: "denoiser": one pass, which the server batches over requests, beside the decoder of a latent model; its
            clients run the solver. "sampler": the whole loop with the decoder in one file, a request at a time. None
            means the denoiser where there is one.
        runtime: "onnxruntime" or "tensorrt"; None means the first, or that of the export.
        precision: as for `export_onnx` and `export_tensorrt`.
        max_batch: rows that the server may put together; of an engine, those of its profile.
        overwrite: replace a folder that is there.

    Returns:
        What was written.

    Raises:
        ValueError: options that do not go together, an export without the part, or one that Triton does not run.
        ImportError: the extra "onnx" is not installed, or TensorRT where it is asked for.
    """
    require("onnx", "onnx")
    max_batch = whole_number("max_batch", max_batch, 1)
    for name, given, known in (("part", part, TRITON_PARTS), ("runtime", runtime, TRITON_RUNTIMES)):
        if given not in (None, *known):
            raise ValueError(f"There is no {name} {given!r} for Triton; known: {', '.join(known)}.")
    check_output(model, repository, overwrite)
    exported = _exported_folder(model)
    if exported is not None and (runtime or precision):
        raise ValueError(f"{exported} is an export, which has its runtime and its precision already; leave these "
                         "options out.")  # fmt: skip
    pipeline = load_pytorch(model) if exported is None else None
    with new_folder(repository, overwrite) as folder:
        staging = folder / ".export"  # on the same disk, and gone with the folder if anything fails
        if pipeline is not None:
            _export(pipeline, staging, part or "denoiser", runtime or "onnxruntime", precision, max_batch)
        source = exported or staging
        models = [_write_model(folder / name, role, file, max_batch) for name, role, file in _files(source, part)]
        for fact in _FACTS:
            if (source / fact).is_file():
                shutil.copyfile(source / fact, folder / fact)
        if pipeline is not None:
            pipeline.save_facts(folder)  # the licence goes where the weights go
            shutil.rmtree(staging)
    return models


# --- Sources ---------------------------------------------------------------------------------------------------------


def _exported_folder(model: str | os.PathLike | DiTPipeline) -> Path | None:
    """The folder of an export, which need not run here; None for a pipeline in PyTorch."""
    if isinstance(model, DiTPipeline):
        place = getattr(model.transformer, "folder", None)
        return None if place is None else Path(place).parent
    folder = None if Path(model).is_file() else local_folder(model)
    return folder if folder is not None and _model_file(folder / "transformer", MODEL_FILE) else None


def _export(
    pipeline: DiTPipeline, folder: Path, part: str, runtime: str, precision: str | None, max_batch: int
) -> None:
    if runtime == "tensorrt":
        profile = (1, max(1, max_batch // 4), max_batch)
        export_tensorrt(pipeline, folder, [part, "decoder"], precision, profile, precompute=False, runtime=runtime)
        return
    decode = part == "sampler" and (pipeline.vae is not None or pipeline.transformer.config.draws_pixels)
    parts = [part] if part == "sampler" else [part, "decoder"]
    export_onnx(pipeline, folder, parts, precision or "fp32", _OPSET, decode=decode)


def _files(source: Path, part: str | None) -> Iterator[tuple[str, str, Path]]:
    """Name, role and file of each model to write."""
    index = json.loads((source / "model_index.json").read_text())
    kind = str(index["transformer"][-1])
    if kind.startswith("OpenVINO"):
        raise ValueError(f"{source} is an export to OpenVINO, by which its error was measured; take one to ONNX "
                         "Runtime, or the model in PyTorch.")  # fmt: skip
    main = "sampler" if "Sampler" in kind else "denoiser"
    places = {main: source / "transformer"}
    if (source / "sampler").is_dir():
        places["sampler"] = source / "sampler"
    part = part or main
    if part not in places:
        raise ValueError(f"{source} has no {part}; export the model with --parts {part}, or leave --part out.")
    if part == "denoiser" and (conditioner := _model_file(places[part], CONDITIONER_FILE)) is not None:
        yield "conditioner", "conditioner", conditioner
    found = [(part, places[part]), ("decoder", source / "vae")]
    for role, place in found:
        if (file := _model_file(place, MODEL_FILE)) is not None:
            yield role, role, file


def _model_file(folder: Path, name: str) -> Path | None:
    files = (folder / name, (folder / name).with_suffix(".engine"))
    return next((file for file in files if file.is_file()), None)


# --- Models ----------------------------------------------------------------------------------------------------------


def _write_model(folder: Path, role: str, file: Path, max_batch: int) -> TritonModel:
    """Write a model's folder: config.pbtxt and its only version."""
    (version := folder / "1").mkdir(parents=True)
    facts = {"dit_hub.config": json.dumps(json.loads((file.parent / "config.json").read_text()))}
    most = {"decoder": min(max_batch, MAX_DECODED), "conditioner": MAX_PAIRS, "sampler": 0}.get(role, max_batch)
    if file.suffix == ".onnx":
        inputs, outputs, metadata = _take_onnx(file, version / _FILES["onnxruntime"])
        backend, facts = "onnxruntime", facts | metadata
    else:
        inputs, outputs, most = _take_engine(file, version / _FILES["tensorrt"], role)
        backend = "tensorrt"
    model = TritonModel(folder.name, backend, most if _is_batched(inputs + outputs) else 0, inputs, outputs, facts)
    (folder / CONFIG_FILE).write_text(model.config(), encoding="utf-8")
    return model


def _is_batched(tensors: list[TritonTensor]) -> bool:
    """Whether one dynamic dimension comes first in all of them, so that a server can put requests together."""
    firsts = {tensor.shape[0] if tensor.shape else 0 for tensor in tensors}
    return len(firsts) == 1 and isinstance(firsts.pop(), str)


def _take_onnx(file: Path, target: Path) -> tuple[list[TritonTensor], list[TritonTensor], dict[str, str]]:
    """Copy an ONNX file with its weights; its inputs, outputs and metadata.

    Triton has no scalars: a request cannot hold one, nor can a model that is not batched be given one by a reshape. The
    guidance scale of a sampler becomes a vector of one number, which its graph multiplies as it does a scalar.
    """
    onnx = require("onnx", "onnx")
    proto = onnx.load(file, load_external_data=False)
    scalars = [entry for entry in proto.graph.input if not entry.type.tensor_type.shape.dim]
    for entry in scalars:
        entry.type.tensor_type.shape.dim.add().dim_value = 1
    weights = file.with_name(f"{file.name}.data")
    if weights.is_file():
        shutil.copyfile(weights, target.with_name(weights.name))
    if scalars:
        _forget_inferred_shapes(proto.graph)
        onnx.save(proto, target)
        onnx.checker.check_model(str(target), full_check=True)
    else:
        shutil.copyfile(file, target)

    def tensor(entry: Any) -> TritonTensor:
        kind = entry.type.tensor_type
        shape = tuple(each.dim_param or each.dim_value for each in kind.shape.dim)
        return TritonTensor(entry.name, _TYPES[onnx.TensorProto.DataType.Name(kind.elem_type)], shape)

    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return [*map(tensor, proto.graph.input)], [*map(tensor, proto.graph.output)], metadata


def _forget_inferred_shapes(graph: Any) -> None:
    """Drop the shapes noted of a graph's inner values, which those of its inputs decide."""
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_inferred_shapes(attribute.g)


def _take_engine(file: Path, target: Path, role: str) -> tuple[list[TritonTensor], list[TritonTensor], int]:
    """Copy an engine; its inputs and outputs, as its profile and its reference have them, and its largest batch."""
    manifest = Manifest.read(file.parent)
    if manifest.product != PRODUCTS["tensorrt"]:
        raise ValueError(f"{file} is made for {manifest.product}, and Triton runs engines of {PRODUCTS['tensorrt']} "
                         f"alone; export with --runtime {PRODUCTS['tensorrt']}, or take ONNX.")  # fmt: skip
    if file.name not in manifest.engines:
        raise ValueError(f"{file} is not in the manifest beside it; build it anew.")
    profiles = manifest.engines[file.name].profiles
    if scalars := [name for name, (_, _, largest) in profiles.items() if not largest]:
        raise ValueError(f"Triton takes no scalars, and the engine of this {role} has one, {scalars[0]}; serve the "
                         "denoiser, or the sampler in ONNX.")  # fmt: skip
    shapes = {
        name: tuple(low if low == high else f"{low} to {high}" for low, high in zip(smallest, largest, strict=True))
        for name, (smallest, _, largest) in profiles.items()
    }
    cases = read_reference(file.parent)
    inputs = [TritonTensor(name, _data_type(cases[0][0].get(name)), shape) for name, shape in shapes.items()]
    if role == "conditioner":
        precomputed = Manifest.read(file.parent).engines["model.engine"].profiles["condition"][2][1:]
        outputs = [TritonTensor("condition", "TYPE_FP32", (inputs[0].shape[0], *precomputed))]
    else:
        sizes = [tuple(expected.shape[1:]) for _, expected in cases]
        fixed = tuple(sizes[0][axis] if len({size[axis] for size in sizes}) == 1 else "any" for axis in range(3))
        outputs = [TritonTensor("sample", _data_type(cases[0][1]), (inputs[0].shape[0], *fixed))]
    shutil.copyfile(file, target)
    most = 0 if role == "sampler" else next(iter(profiles.values()))[2][0]
    return inputs, outputs, most


def _data_type(tensor: Any) -> str:
    """Triton's name of a tensor's type; float32 where the reference lacks it, as of a condition computed ahead."""
    return "TYPE_FP32" if tensor is None else _TYPES[_TORCH_TYPES[str(tensor.dtype).removeprefix("torch.")]]


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
