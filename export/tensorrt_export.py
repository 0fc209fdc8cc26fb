"""Export to TensorRT: a pipeline folder of engines with a manifest, or one engine of an ONNX file."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_hub.files import check_free, new_folder
from dit_hub.pipeline_dit import DiTPipeline

from .component import CONDITIONER_FILE, MODEL_FILE
from .onnx_export import check_other_folder, check_parts, exportable, in_precision, measure_component
from .ort import ORTDiTTransformer, ORTSampler, ORTVAEDecoder
from .parts import DEFAULT_OPSET, DEFAULT_PARTS, in_float32, write_decoder, write_denoiser
from .reference import (
    MAX_RELATIVE_ERROR,
    REFERENCE_FILE,
    Parity,
    measure_parity,
    read_bounds,
    read_reference,
    write_report,
)
from .sampler import SAMPLER_OPSET, sample_reference, write_sampler
from .tensorrt import CONDITIONER_ENGINE_FILE, ENGINE_FILE, TensorRTDiTTransformer, TensorRTSampler, TensorRTVAEDecoder
from .tensorrt_build import (
    Machine,
    Manifest,
    Profile,
    Progress,
    build_engine,
    choose_capabilities,
    load_product,
    misfit,
)

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")

DEFAULT_PROFILE: Profile = (1, 8, 64)

_EIGHT_BITS = ("fp8", "int8")

# Their files run on a processor, so that what TensorRT reads can be measured without a GPU.
_RUN_BY_ORT = ("fp32", "fp16", "int8")


def export_tensorrt(
    model: str | os.PathLike | DiTPipeline,
    output_dir: str | os.PathLike,
    parts: Sequence[str] = DEFAULT_PARTS,
    precision: str | None = None,
    profile: Profile = DEFAULT_PROFILE,
    size: Profile | None = None,
    hoist: bool = True,
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
            are; `parts`, `precision`, `size` and `hoist` are for models in PyTorch.
        output_dir: the new folder; it appears only when all engines are built.
        parts: as for `export_onnx`.
        precision: of the weights and products of denoiser and sampler, of `PRECISIONS`; None means fp16. Modulation,
            gates and residual sum stay float32. "int8" and "fp8" take their scales from sampling runs in PyTorch and
            compute the rest in fp16. The decoder is float32.
        profile: smallest, usual and largest batch of the denoiser; with guidance, twice the pictures.
        size: the same of height and width in (latent) pixels, for models with sin-cos positions; None means the
            training size alone.
        hoist: compute what depends on timestep and class ahead, by an engine of its own.
        runtime: "tensorrt" (data-centre GPUs; builds on the GPU it is for), "rtx" (builds without a GPU), or "auto",
            the first of these that is installed.
        compute_capabilities: of the GPUs to build for, such as "8.9"; none means 8.0 and later. Only for "rtx".
        weight_streaming: keep weights in the host's memory where the GPU's does not hold them.
        max_error: bound of the relative error in place of that of `MAX_RELATIVE_ERROR`.
        overwrite: replace a folder that is there.
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
    check_free(output_dir, overwrite)
    check_other_folder(model, output_dir)
    path = None if isinstance(model, DiTPipeline) else Path(model)
    if path is not None and path.suffix == ".onnx":
        pipeline, of_onnx = None, True
        if not path.is_file():
            raise ValueError(f"There is no file {path}.")
    else:
        pipeline = model if isinstance(model, DiTPipeline) else DiTPipeline.from_pretrained(model)
        of_onnx = isinstance(pipeline.transformer, ORTDiTTransformer | ORTSampler)
    if of_onnx and precision is not None:
        raise ValueError("An ONNX file has its precision already; leave this option out.")
    precision = precision or ("fp32" if of_onnx else "fp16")
    build = _Build(
        trt,
        choose_capabilities(trt, tuple(compute_capabilities), precision),
        "as the ONNX file" if of_onnx else precision,
        profile,
        size,
        weight_streaming,
        progress,
    )
    if size is not None:
        _check_profile("size", size)
        fixed = of_onnx and pipeline is not None and pipeline.transformer.settings.get("height_width")
        patch = 1 if pipeline is None else pipeline.transformer.config.patch_size
        if fixed:
            raise ValueError("This export takes one size only; make it with --dynamic-size for others.")
        if any(side % patch for side in size):
            raise ValueError(f"size {size} is not divisible by the patch size {patch}.")
    bound = MAX_RELATIVE_ERROR[precision] if max_error is None else max_error
    report: dict[str, Parity] = {}
    with new_folder(output_dir, overwrite) as folder:
        if pipeline is None or (path is not None and path.suffix == ".onnx"):
            assert path is not None
            build.engines({path: folder / ENGINE_FILE}).write(folder)
            return report
        staging = folder / ".onnx"  # on the same disk, and gone with the folder if anything fails
        staging.mkdir()
        if of_onnx:
            staged = _stage_onnx(pipeline)
        else:
            exact = exportable(pipeline, size is not None)[1]
            staged = _stage(exact, staging, chosen, precision, size, hoist, bound)
        components: dict[str, Any] = {}
        for part in staged:
            (target := folder / part.name).mkdir()
            for file in (*part.folder.glob("*.json"), *part.folder.glob(REFERENCE_FILE)):
                shutil.copyfile(file, target / file.name)
            manifest = build.engines(
                {
                    part.folder / source: target / engine
                    for source, engine in ((MODEL_FILE, ENGINE_FILE), (CONDITIONER_FILE, CONDITIONER_ENGINE_FILE))
                    if (part.folder / source).is_file()
                }
            )
            manifest.write(target)
            if misfit(manifest, Machine.this()) is None:
                components[part.name] = part.runtime.from_pretrained(target)
                parity = measure_component(part.name, components[part.name], part.bound)
            else:
                components[part.name] = part.runtime.described(target)
                cases = read_reference(target)
                parity = measure_parity(part.name, part.evaluate, cases, part.bound, part.measured_on)
            manifest.parity = asdict(parity)
            manifest.write(target)
            report[part.name] = parity
        shutil.rmtree(staging)
        runner = components["transformer"]
        scheduler = next(part.scheduler for part in staged if part.name == "transformer")
        DiTPipeline(runner, scheduler, components.get("vae"), pipeline.id2label).save_pretrained(folder)
        pipeline.save_facts(folder)
        settings = {"runtime": trt.__name__, "precision": build.precision, "profile": profile, "size": size}
        write_report(folder, settings, {name: asdict(parity) for name, parity in report.items()})
    return report


@dataclass(frozen=True)
class _Build:
    """What all engines of an export share."""

    trt: Any
    capabilities: list[str]
    precision: str
    profile: Profile
    size: Profile | None
    weight_streaming: bool
    progress: Progress | None

    def engines(self, files: dict[Path, Path]) -> Manifest:
        """Build an engine of each ONNX file."""
        trt = self.trt
        manifest = Manifest(trt.__name__, trt.__version__, self.capabilities, self.precision, self.weight_streaming)
        for source, target in files.items():
            manifest.engines[target.name] = build_engine(
                trt, source, target, self.profile, self.size, self.capabilities, self.weight_streaming, self.progress
            )
        return manifest


@dataclass(frozen=True)
class _Part:
    """A component as ONNX: where it lies, what will run it, and what stands in for that on a machine without a GPU."""

    name: str
    folder: Path
    runtime: type
    evaluate: Callable[[dict[str, Tensor]], Tensor]
    measured_on: str
    bound: float
    scheduler: Any = None


def _stage(
    pipeline: DiTPipeline,
    staging: Path,
    parts: Sequence[str],
    precision: str,
    size: Profile | None,
    hoist: bool,
    bound: float,
) -> list[_Part]:
    """Export a pipeline of PyTorch to ONNX folders, in the form that TensorRT builds."""
    base = DiTPipeline(pipeline.transformer, pipeline.scheduler)
    exported = in_precision(base, precision, static=precision in _EIGHT_BITS)
    config: Any = pipeline.transformer.config
    staged = []
    if "denoiser" in parts:
        (folder := staging / "transformer").mkdir()
        write_denoiser(pipeline.transformer, exported, folder, DEFAULT_OPSET, hoist, size is not None)
        measure = _on_processor(folder, ORTDiTTransformer, precision, lambda inputs: exported(**inputs).sample)
        staged.append(_Part("transformer", folder, TensorRTDiTTransformer, *measure, bound, pipeline.scheduler))
    if "decoder" in parts and pipeline.vae is not None:
        (folder := staging / "vae").mkdir()
        write_decoder(
            in_float32(pipeline.vae), config.sample_height_width, folder, DEFAULT_OPSET, dynamic_size=size is not None
        )
        measure = _on_processor(folder, ORTVAEDecoder, "fp32")
        staged.append(_Part("vae", folder, TensorRTVAEDecoder, *measure, MAX_RELATIVE_ERROR["fp32"]))
    if "sampler" in parts:
        name = "sampler" if staged and staged[0].name == "transformer" else "transformer"
        (folder := staging / name).mkdir()
        opset = 22 if precision == "bf16" else SAMPLER_OPSET  # the first with convolutions in bf16
        # TensorRT has no uint8 within a graph, so that pictures are made of the latents outside.
        scheduler = write_sampler(pipeline, exported, folder, pictures=False, opset=opset)
        rounded = DiTPipeline(exported, scheduler)
        measure = _on_processor(folder, ORTSampler, precision, lambda inputs: sample_reference(rounded, inputs))
        staged.append(_Part(name, folder, TensorRTSampler, *measure, bound, scheduler))
    return staged


def _on_processor(folder: Path, runtime: Any, precision: str, rounded: Any = None) -> tuple[Any, str]:
    """What measures an ONNX file without a GPU: ONNX Runtime where it runs the precision, else PyTorch with it."""
    if precision in _RUN_BY_ORT:
        return runtime.from_pretrained(folder).evaluate, runtime.runtime
    return torch.no_grad()(rounded), "pytorch"


def _stage_onnx(pipeline: DiTPipeline) -> list[_Part]:
    """The components of a pipeline that runs on ONNX Runtime."""
    classes = {
        ORTDiTTransformer: TensorRTDiTTransformer,
        ORTVAEDecoder: TensorRTVAEDecoder,
    }
    if isinstance(pipeline.transformer, ORTSampler):
        raise ValueError("A sampler's file draws pictures of bytes, which TensorRT does not know; build the sampler of "
                         "the model in PyTorch.")  # fmt: skip
    components = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    bounds = read_bounds(pipeline.transformer.folder.parent)
    return [
        _Part(
            name,
            component.folder,
            classes[type(component)],
            component.evaluate,
            component.runtime,
            bounds.get(name, 0.0),
            pipeline.scheduler,
        )
        for name, component in components.items()
        if type(component) in classes
    ]


def _check_profile(name: str, profile: Profile) -> None:
    smallest, usual, largest = profile
    if not 1 <= smallest <= usual <= largest < 2**31:
        raise ValueError(f"{name} must be three rising numbers (smallest, usual, largest), not {profile}.")
