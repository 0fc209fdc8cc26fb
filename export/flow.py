"""The steps that every export takes: stage, build, measure, describe, publish; a target says what differs."""

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_hub.files import check_free, new_folder
from dit_hub.pipeline_dit import DiTPipeline

from .component import MODEL_FILE, Component
from .ort import ORTDiTTransformer, ORTSampler, ORTVAEDecoder
from .parts import PARTS, Plan, write_decoder, write_denoiser
from .quantize import calibrate, quantize_dynamic, quantize_static
from .reference import Evaluate, Parity, measure_parity, read_bounds, read_reference, write_report
from .sampler import sample_latents, write_sampler

WEIGHT_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# The components that run the parts on ONNX Runtime, and the precisions of the files that it runs on processors.
ORT_COMPONENTS: dict[str, type[Component]] = {
    "denoiser": ORTDiTTransformer,
    "decoder": ORTVAEDecoder,
    "sampler": ORTSampler,
}
ORT_PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Part:
    """A part of a pipeline as ONNX files."""

    name: str  # of its component and folder: "transformer", "vae" or "sampler"
    role: str  # of `PARTS`
    folder: Path  # with the files, config.json and the reference
    bound: float  # of the relative error
    precision: str = "fp32"  # of the files
    rounded: Evaluate | None = None  # the same in PyTorch, with that precision
    scheduler: Any = None  # for a pipeline of it


class Target:
    """A runtime to export for. This one is ONNX Runtime with the files as they are; others override what differs."""

    components = ORT_COMPONENTS

    def build(self, part: Part, folder: Path) -> None:
        """Make a component's folder of a part."""
        part.folder.rename(folder)

    def open(self, part: Part, folder: Path) -> Any:
        """The built component, or None where this machine cannot run it."""
        return self.components[part.role].from_pretrained(folder)

    def details(self, part: Part, component: Any, pipeline: DiTPipeline) -> dict[str, Any]:
        """Entries of the report about a part, beside its errors."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Entries of the report about the export as a whole."""
        return {}

    def describe(self, folder: Path, pipeline: DiTPipeline, parts: dict[str, Part], report: dict[str, Any]) -> None:
        """Make a pipeline folder of the components, with the report."""
        components = {name: self.components[part.role].unopened(folder / name) for name, part in parts.items()}
        scheduler, vae = parts["transformer"].scheduler, components.get("vae")
        DiTPipeline(components["transformer"], scheduler, vae, pipeline.id2label).save_pretrained(folder)
        write_report(folder, self.settings(), report)


def export(
    source: DiTPipeline, plan: Plan, target: Target, output_dir: str | os.PathLike, overwrite: bool
) -> dict[str, Parity]:
    """Stage, build, measure, describe and publish: the errors of each component.

    The pipeline is one in PyTorch, or an export to ONNX, whose files are staged already.
    """
    pipeline, in_pytorch = source, isinstance(source.transformer, nn.Module)
    if in_pytorch:
        pipeline = DiTPipeline(in_float32(source.transformer), source.scheduler, source.vae, source.id2label)
        if plan.dynamic_size and pipeline.transformer.config.pos_embed == "learned":
            raise ValueError("This model has learned positions, which cover one height and width only.")
    parts: dict[str, Part] = {}
    errors: dict[str, Parity] = {}
    report: dict[str, Any] = {}
    with new_folder(output_dir, overwrite) as folder:
        (staging := folder / ".onnx").mkdir()  # on the same disk, and gone with the folder if anything fails
        for part in stage(pipeline, plan, staging) if in_pytorch else staged(pipeline):
            cases, place = read_reference(part.folder), folder / part.name
            target.build(part, place)
            component = target.open(part, place)
            evaluate, runtime = _stand_in(part) if component is None else (component.evaluate, component.runtime)
            errors[part.name] = measure_parity(part.name, evaluate, cases, part.bound, runtime)
            report[part.name] = asdict(errors[part.name]) | target.details(part, component, pipeline)
            parts[part.name] = part
        shutil.rmtree(staging)
        target.describe(folder, pipeline, parts, report)
        source.save_facts(folder)  # the licence goes where the weights go
    return errors  # and the folder has its name


def stage(pipeline: DiTPipeline, plan: Plan, folder: Path) -> Iterator[Part]:
    """Write the parts of a pipeline in float32 as ONNX files, each part into a folder of its own."""
    exact: Any = pipeline.transformer
    exported = in_precision(pipeline, plan.weights, plan.static)
    vae = None if pipeline.vae is None else in_float32(pipeline.vae)

    def new(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    def finished(name: str, role: str, rounded: Any, scheduler: Any) -> Part:
        if plan.weights == "int8" and not plan.static:
            quantize_dynamic(folder / name / MODEL_FILE)
        return Part(name, role, folder / name, plan.bound(role), plan.weights, rounded, scheduler)

    if "denoiser" in plan.parts:
        write_denoiser(exact, exported, new("transformer"), plan)
        yield finished("transformer", "denoiser", lambda inputs: exported(**inputs).sample, pipeline.scheduler)
    if "decoder" in plan.parts and vae is not None:
        write_decoder(vae, exact.config.sample_height_width, new("vae"), plan)
        yield Part("vae", "decoder", folder / "vae", plan.bound("decoder"))
    if "sampler" in plan.parts:
        name = "sampler" if "denoiser" in plan.parts else "transformer"
        scheduler = write_sampler(pipeline, exported, vae if plan.decode else None, new(name), plan)
        rounded = DiTPipeline(exported, scheduler)
        yield finished(name, "sampler", lambda inputs: sample_latents(rounded, len(inputs["latents"])), scheduler)


def staged(pipeline: DiTPipeline) -> Iterator[Part]:
    """The parts of an export to ONNX."""
    bounds = read_bounds(Path(pipeline.transformer.folder).parent)
    for name, component in (("transformer", pipeline.transformer), ("vae", pipeline.vae)):
        for role, kind in ORT_COMPONENTS.items():
            if type(component) is kind:
                yield Part(name, role, component.folder, bounds.get(name, 0.0), scheduler=pipeline.scheduler)


def _stand_in(part: Part) -> tuple[Evaluate, str]:
    """What measures a part whose target does not run here: ONNX Runtime, or PyTorch for precisions that it lacks."""
    if part.precision in ORT_PRECISIONS:
        component = ORT_COMPONENTS[part.role].from_pretrained(part.folder)
        return component.evaluate, component.runtime
    assert part.rounded is not None
    return torch.no_grad()(part.rounded), "pytorch"


def in_precision(pipeline: DiTPipeline, precision: str, static: bool) -> Any:
    """The transformer with weights of that type; modulation, gates and residual sum stay float32 in the model itself.

    With `static` the linear layers of "int8" and "fp8" round as their files will.
    """
    if precision not in WEIGHT_TYPES and not static:
        return pipeline.transformer
    exported: Any = copy.deepcopy(pipeline.transformer).to(WEIGHT_TYPES.get(precision, torch.float32))
    if static:
        quantize_static(exported, precision, calibrate(pipeline))
    return exported


def in_float32(module: Any) -> Any:
    """The module itself where it is float32, on the CPU and in evaluation mode; else a copy that is."""
    if module.dtype == torch.float32 and module.device.type == "cpu" and not module.training:
        return module
    return copy.deepcopy(module).float().cpu().eval()


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts that are asked for, with "all" written out.

    Raises:
        ValueError: an unknown one, or none that a pipeline could run.
    """
    parts = [parts] if isinstance(parts, str) else parts
    chosen = PARTS if "all" in parts else tuple(parts)
    if unknown := [part for part in chosen if part not in PARTS]:
        raise ValueError(f"There is no part {unknown[0]!r}; known: {', '.join(PARTS)}, all.")
    if not {"denoiser", "sampler"} & set(chosen):
        raise ValueError("Without a denoiser or a sampler there is no pipeline; add one to the parts.")
    return chosen


def check_output(model: str | os.PathLike | DiTPipeline, output_dir: str | os.PathLike, overwrite: bool) -> None:
    """Raise ValueError where an export could not be written, or would replace what it is made of."""
    if not isinstance(model, DiTPipeline) and Path(model).exists():
        source, target = Path(model).resolve(), Path(output_dir).resolve()
        if source == target or target in source.parents:
            raise ValueError(f"{output_dir} is the model itself, or holds it; choose another folder.")
    check_free(output_dir, overwrite)


def load_pytorch(model: str | os.PathLike | DiTPipeline) -> DiTPipeline:
    """The pipeline of a model in PyTorch.

    Raises:
        ValueError: it is an export, its weights are bitsandbytes', which only its own kernels read, or it has hooks.
    """
    if not isinstance(model, DiTPipeline) and Path(model).suffix in (".onnx", ".engine"):
        raise ValueError(f"{model} is an export already; give the model that it was made from.")
    pipeline: DiTPipeline = model if isinstance(model, DiTPipeline) else DiTPipeline.from_pretrained(model)
    if not isinstance(pipeline.transformer, nn.Module):
        name = type(pipeline.transformer).__name__
        raise ValueError(f"{name} is an export already; give the model in PyTorch that it was made from.")
    if getattr(pipeline.transformer, "quantization_method", None) == "bitsandbytes":
        raise ValueError("bitsandbytes has quantised the denoiser; give the model that it was made from, and say the "
                         "precision of the export.")  # fmt: skip
    registries = (getattr(module, "_diffusers_hook", None) for module in pipeline.transformer.modules())
    if any(registry is not None and registry.hooks for registry in registries):
        raise ValueError("diffusers' hooks (offloading, casting, caches) change how the denoiser computes; give one "
                         "without them.")  # fmt: skip
    return pipeline
