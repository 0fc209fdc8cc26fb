"""Export to TensorRT: a pipeline folder of engines with a manifest, or one engine of an ONNX file."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_hub.files import new_folder
from dit_hub.pipeline_dit import DiTPipeline

from .component import CONDITIONER_FILE, MODEL_FILE, Component
from .flow import Part, Target, check_output, check_parts, export, load_pytorch
from .ort import ORTDiTTransformer, ORTSampler
from .parts import DEFAULT_PARTS, Plan
from .reference import REFERENCE_FILE, Parity
from .tensorrt import TensorRTDiTTransformer, TensorRTSampler, TensorRTVAEDecoder
from .tensorrt_build import EngineBuilder, Manifest, Profile, Progress, choose_capabilities, load_product, misfit

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
_EIGHT_BITS = ("fp8", "int8")

DEFAULT_PROFILE: Profile = (1, 8, 64)

ENGINE_FILE = "model.engine"


class TensorRTTarget(Target):
    """Engines, each built of an ONNX file, with a manifest."""

    components: dict[str, type[Component]] = {
        "denoiser": TensorRTDiTTransformer,
        "decoder": TensorRTVAEDecoder,
        "sampler": TensorRTSampler,
    }

    def __init__(self, builder: EngineBuilder):
        self.builder = builder

    def build(self, part: Part, folder: Path) -> None:
        folder.mkdir()
        for file in (*part.folder.glob("*.json"), part.folder / REFERENCE_FILE):
            shutil.copyfile(file, folder / file.name)
        sources = [part.folder / name for name in (MODEL_FILE, CONDITIONER_FILE) if (part.folder / name).is_file()]
        engines = {source: (folder / source.name).with_suffix(".engine") for source in sources}
        self.builder.build(engines).write(folder)

    def open(self, part: Part, folder: Path) -> Any:
        return super().open(part, folder) if misfit(Manifest.read(folder)) is None else None

    def settings(self) -> dict[str, Any]:
        builder = self.builder
        product = builder.trt.__name__
        return {"runtime": product, "precision": builder.precision, "profile": builder.batch, "size": builder.size}

    def describe(self, folder: Path, pipeline: DiTPipeline, parts: dict[str, Part], report: dict[str, Any]) -> None:
        for name in parts:
            manifest = Manifest.read(folder / name)
            manifest.parity = report[name]
            manifest.write(folder / name)
        super().describe(folder, pipeline, parts, report)


def export_tensorrt(
    model: str | os.PathLike | DiTPipeline,
    output_dir: str | os.PathLike,
    parts: Sequence[str] = DEFAULT_PARTS,
    precision: str | None = None,
    profile: Profile = DEFAULT_PROFILE,
    size: Profile | None = None,
    precompute: bool = True,
    runtime: str = "auto",
    compute_capabilities: Sequence[str] = (),
    weight_streaming: bool = False,
    max_error: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Parity]:
    """Build TensorRT engines.

    The result is a pipeline folder again: `DiTPipeline.from_pretrained(output_dir)` runs it on a GPU that the manifest
    of each component names. Of an ONNX file it is a folder with the engine and its manifest.

    Args:
        model: a pipeline, what `DiTPipeline.from_pretrained` takes, or an ONNX file. Exports to ONNX are built as they
            are; `parts`, `precision`, `size` and `precompute` apply to models in PyTorch.
        output_dir: the new folder; it appears only when all engines are built.
        precision: of the weights and products of denoiser and sampler, of `PRECISIONS`; None means fp16. Modulation,
            gates and residual sum stay float32. "int8" and "fp8" take their scales from sampling runs in PyTorch and
            compute the rest in float32. The decoder is float32.
        profile: smallest, usual and largest batch of the denoiser; with guidance, twice the images.
        size: the same of height and width in (latent) pixels, for models with sin-cos positions; None means the
            training size alone.
        precompute: compute what depends on timestep and class ahead, by an engine of its own.
        runtime: "tensorrt" (data-centre GPUs; builds on the GPU it is for), "rtx" (builds without a GPU), or "auto",
            the first of these that is installed.
        compute_capabilities: of the GPUs to build for, such as "8.9"; none means 8.0 and later. Only for "rtx".
        weight_streaming: keep weights in the host's memory where the GPU's does not hold them.
        parts, max_error, overwrite: as for `export_onnx`.
        progress: called with the phase, the steps done and all its steps.

    Returns:
        The errors of each component: of the engine where this machine runs it, else of its ONNX file on ONNX Runtime,
        or of the model in PyTorch with that rounding. None of a lone ONNX file.

    Raises:
        ValueError: arguments that do not go together, a file that TensorRT cannot read, an error above the bound.
        ImportError: TensorRT is not installed.
    """
    _check_profile("profile", profile)
    chosen = check_parts(parts)
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"There is no precision {precision!r}; known: {', '.join(PRECISIONS)}.")
    if "sampler" in chosen and precision in _EIGHT_BITS:
        raise ValueError("TensorRT takes weights of 8 bits outside of loops only, so there is no such sampler.")
    trt = load_product(runtime)
    check_output(model, output_dir, overwrite)
    pipeline = _load(model)
    of_onnx = pipeline is None or isinstance(pipeline.transformer, ORTDiTTransformer)
    if of_onnx and precision is not None:
        raise ValueError("An ONNX file has its precision already; leave this option out.")
    weights = precision or ("fp32" if of_onnx else "fp16")
    if size is not None:
        _check_size(size, pipeline)
    capabilities = choose_capabilities(trt, tuple(compute_capabilities), weights)
    stated = "as the ONNX file" if of_onnx else weights
    builder = EngineBuilder(trt, capabilities, stated, profile, size, weight_streaming, progress)
    if pipeline is None:
        with new_folder(output_dir, overwrite) as folder:
            builder.build({Path(str(model)): folder / ENGINE_FILE}).write(folder)
        return {}
    opset = 22 if weights == "bf16" else 20  # 22 is the first with convolutions in bf16
    # TensorRT has no uint8 within a graph, so images are made of the latents outside.
    plan = Plan(chosen, weights, weights, weights in _EIGHT_BITS, sampler_opset=opset, precompute=precompute,
                dynamic_size=size is not None, images=False, max_error=max_error)  # fmt: skip
    return export(pipeline, plan, TensorRTTarget(builder), output_dir, overwrite)


def _load(model: str | os.PathLike | DiTPipeline) -> DiTPipeline | None:
    """The pipeline, in PyTorch or an export to ONNX; None for a lone ONNX file."""
    if isinstance(model, DiTPipeline):
        pipeline = model
    elif Path(model).suffix == ".onnx":
        if not Path(model).is_file():
            raise ValueError(f"There is no file {model}.")
        return None
    else:
        pipeline = DiTPipeline.from_pretrained(model)
    if isinstance(pipeline.transformer, ORTSampler):
        raise ValueError("A sampler's file draws images of bytes, which TensorRT does not know; build the sampler of "
                         "the model in PyTorch.")  # fmt: skip
    return pipeline if isinstance(pipeline.transformer, ORTDiTTransformer) else load_pytorch(pipeline)


def _check_profile(name: str, profile: Profile) -> None:
    smallest, usual, largest = profile
    if not 1 <= smallest <= usual <= largest < 2**31:
        raise ValueError(f"{name} must be three rising numbers (smallest, usual, largest), not {profile}.")


def _check_size(size: Profile, pipeline: DiTPipeline | None) -> None:
    _check_profile("size", size)
    if pipeline is None:
        return
    transformer: Any = pipeline.transformer
    if isinstance(transformer, ORTDiTTransformer) and transformer.settings.get("height_width"):
        raise ValueError("This export takes one size only; make it with --dynamic-size for others.")
    if any(side % transformer.config.patch_size for side in size):
        raise ValueError(f"size {size} is not divisible by the patch size {transformer.config.patch_size}.")
