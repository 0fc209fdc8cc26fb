"""Export to ONNX: a pipeline folder for ONNX Runtime or OpenVINO, checked against PyTorch before it appears."""

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_hub.extras import require
from dit_hub.files import check_free, new_folder
from dit_hub.pipeline_dit import DiTPipeline

from .component import MODEL_FILE, RuntimeDenoiser
from .openvino import OpenVINODiTTransformer
from .ort import ORTDiTTransformer, ORTSampler, ORTVAEDecoder
from .parts import DEFAULT_OPSET, DEFAULT_PARTS, OPSETS, PARTS, WEIGHT_TYPES, in_float32, write_decoder, write_denoiser
from .quantize import calibrate, quantize_dynamic, quantize_static
from .reference import MAX_RELATIVE_ERROR, Parity, measure_parity, read_reference, write_report
from .sampler import SAMPLER_OPSET, sample_latents, write_sampler

# What runs the denoiser, and its precisions there.
RUNTIMES: dict[str, type[RuntimeDenoiser]] = {"onnxruntime": ORTDiTTransformer, "openvino": OpenVINODiTTransformer}
PRECISIONS = {"onnxruntime": ("fp32", "fp16", "int8"), "openvino": ("fp32", "bf16")}

# The sampling run after which the error of 8 bits is reported: pictures and steps.
_RUN_BATCH, _RUN_STEPS = 4, 20


def export_onnx(
    model: str | os.PathLike | DiTPipeline,
    output_dir: str | os.PathLike,
    parts: Sequence[str] = DEFAULT_PARTS,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    hoist: bool = False,
    runtime: str = "onnxruntime",
    decode: bool = False,
    dynamic_size: bool = False,
    static: bool = False,
    max_error: float | None = None,
    overwrite: bool = False,
) -> dict[str, Parity]:
    """Export a pipeline to ONNX.

    The result is a pipeline folder again: `DiTPipeline.from_pretrained(output_dir)` runs it on ONNX Runtime. Every
    graph has passed onnx.checker, shape inference and a comparison with PyTorch, which report.json records.

    Args:
        model: a pipeline, or what `DiTPipeline.from_pretrained` takes.
        output_dir: the new folder; it appears only when all checks have passed.
        parts: of `PARTS`, or "all". "denoiser": one pass. "decoder": the VAE's, where there is one. "sampler": the
            whole loop in one file, in the folder sampler, or, without the denoiser, as the pipeline's transformer.
        precision: of the weights and products of denoiser and sampler, of `PRECISIONS`. "fp16" keeps the modulation,
            the gates and the residual sum in float32; "int8" quantises all but the modulation, the first and the last
            layer; "bf16" leaves the file as it is and tells OpenVINO. The decoder is float32.
        opset: version of the ONNX operators, 20 to 25; the sampler's is always 20.
        hoist: leave what depends on timestep and class alone to a file of its own, conditioner.onnx, a third of the
            weights of an adaLN model. The pipeline then computes it for all steps ahead, in float32.
        runtime: of the denoiser, "onnxruntime" or "openvino". The others run on ONNX Runtime.
        decode: put the VAE into the sampler's file, so that it draws pictures; models of pixels always do.
        dynamic_size: accept every height and width that the patches tile; for models with sin-cos positions.
        static: for "int8": the scales of the activations are fixed ahead, from sampling runs in PyTorch, rather than
            found while it runs. Slower on ONNX Runtime, but the form (Q/DQ) that other runtimes read.
        max_error: bound of the relative error in place of that of `MAX_RELATIVE_ERROR`.
        overwrite: replace a folder that is there.

    Returns:
        The errors of each exported component.

    Raises:
        ValueError: an unknown part, precision or opset, a full output folder, or an error above the bound.
        ImportError: the extra "onnx" is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    if runtime not in RUNTIMES:
        raise ValueError(f"There is no runtime {runtime!r}; known: {', '.join(RUNTIMES)}.")
    if runtime == "openvino":
        require("openvino", "openvino")
    chosen = check_parts(parts)
    check_other_folder(model, output_dir)
    for given, name, part in (
        (hoist, "hoist", "denoiser"),
        (dynamic_size, "dynamic_size", "denoiser"),
        (decode, "decode", "sampler"),
    ):
        if given and part not in chosen:
            raise ValueError(f"{name} is for the {part}, which is not among the parts.")
    if precision not in PRECISIONS[runtime]:
        known = ", ".join(PRECISIONS[runtime])
        raise ValueError(f"{runtime} does not run {precision!r} on a processor; it runs {known}.")
    if opset not in OPSETS:
        raise ValueError(f"opset must lie between {OPSETS[0]} and {OPSETS[-1]}, not {opset}.")
    if static and precision != "int8":
        raise ValueError("static is for int8.")
    check_free(output_dir, overwrite)
    source, pipeline = exportable(model, dynamic_size)
    if decode and pipeline.vae is None and not pipeline.transformer.config.draws_pixels:
        raise ValueError("decode puts a VAE into the sampler's file, and this pipeline has none.")

    bound = MAX_RELATIVE_ERROR[precision] if max_error is None else max_error
    exact = MAX_RELATIVE_ERROR["fp32"] if max_error is None else max_error
    # OpenVINO computes in bf16 by itself, of a file in float32.
    exported = in_precision(pipeline, "fp32" if precision == "bf16" else precision, static)
    report: dict[str, Parity] = {}
    errors: dict[str, float] = {}
    with new_folder(output_dir, overwrite) as folder:
        transformer: Any = None
        decoder = None
        if "denoiser" in chosen:
            (place := folder / "transformer").mkdir()
            write_denoiser(pipeline.transformer, exported, place, opset, hoist, dynamic_size, precision)
            if precision == "int8" and not static:
                quantize_dynamic(place / MODEL_FILE)
            transformer = RUNTIMES[runtime].from_pretrained(place)
            report["transformer"] = measure_component("transformer", transformer, bound)
            if precision == "int8":
                errors["transformer"] = sampling_error(pipeline, transformer)
        if "decoder" in chosen and pipeline.vae is not None:
            (place := folder / "vae").mkdir()
            size = pipeline.transformer.config.sample_height_width
            write_decoder(in_float32(pipeline.vae), size, place, opset, dynamic_size)
            decoder = ORTVAEDecoder.from_pretrained(place)
            report["vae"] = measure_component("vae", decoder, exact)
        scheduler = pipeline.scheduler
        if "sampler" in chosen:
            (place := folder / ("transformer" if transformer is None else "sampler")).mkdir()
            scheduler_of_table = write_sampler(pipeline, exported, place, decode)
            if precision == "int8" and not static:
                quantize_dynamic(place / MODEL_FILE)
            sampler = ORTSampler.from_pretrained(place)
            report[place.name] = measure_component("sampler", sampler, exact if precision == "bf16" else bound)
            if precision == "int8":
                errors[place.name] = sampling_error(pipeline, sampler, scheduler_of_table)
            if transformer is None:
                transformer, scheduler = sampler, scheduler_of_table
        DiTPipeline(transformer, scheduler, decoder, pipeline.id2label).save_pretrained(folder)
        source.save_facts(folder)  # the licence goes where the weights go
        opsets = {"sampler": SAMPLER_OPSET} if "sampler" in chosen else {}
        opsets |= {"denoiser": opset} if "denoiser" in chosen else {}
        settings = {"opset": opsets, "precision": precision, "static": static, "hoist": hoist, "runtime": runtime}
        entries = {name: asdict(parity) for name, parity in report.items()}
        for name, error in errors.items():
            entries[name] |= {"sampling_error": error, "sampling_steps": _RUN_STEPS}
        write_report(folder, settings, entries)
    return report


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts that are meant.

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


def check_other_folder(model: str | os.PathLike | DiTPipeline, output_dir: str | os.PathLike) -> None:
    """Raise ValueError where an export would replace what it is made of."""
    if not isinstance(model, DiTPipeline) and Path(model).exists():
        source, target = Path(model).resolve(), Path(output_dir).resolve()
        if source == target or target in source.parents:
            raise ValueError(f"{output_dir} is the model itself, or holds it; choose another folder.")


def exportable(model: str | os.PathLike | DiTPipeline, dynamic_size: bool = False) -> tuple[DiTPipeline, DiTPipeline]:
    """The pipeline, and the same with its transformer in float32 on the CPU.

    Raises:
        ValueError: it is an export, or takes one size only where all are asked for.
    """
    if not isinstance(model, DiTPipeline) and Path(model).suffix in (Path(MODEL_FILE).suffix, ".engine"):
        raise ValueError(f"{model} is an export already; give the model that it was made from.")
    source: DiTPipeline = model if isinstance(model, DiTPipeline) else DiTPipeline.from_pretrained(model)
    if not isinstance(source.transformer, nn.Module):
        name = type(source.transformer).__name__
        raise ValueError(f"{name} is an export already; give the model in PyTorch that it was made from.")
    config: Any = source.transformer.config
    if dynamic_size and config.pos_embed == "learned":
        raise ValueError("This model has learned positions, which cover one height and width only.")
    return source, DiTPipeline(in_float32(source.transformer), source.scheduler, source.vae, source.id2label)


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


def measure_component(name: str, component: Any, bound: float) -> Parity:
    """The distance of a loaded component from the reference that lies beside it."""
    return measure_parity(name, component.evaluate, read_reference(component.folder), bound, component.runtime)


def sampling_error(pipeline: DiTPipeline, transformer: Any, scheduler: Any = None) -> float:
    """The relative distance of what a runtime and PyTorch sample, after a whole run."""
    scheduler = scheduler or pipeline.scheduler
    expected, actual = (
        sample_latents(DiTPipeline(component, scheduler), _RUN_BATCH, _RUN_STEPS)
        for component in (pipeline.transformer, transformer)
    )
    return ((actual - expected).norm() / expected.norm()).item()
