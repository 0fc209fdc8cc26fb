"""Export to ONNX: a pipeline folder for ONNX Runtime or OpenVINO, checked against PyTorch before it appears."""

import os
from collections.abc import Sequence
from typing import Any

from dit_hub.extras import require
from dit_hub.pipeline_dit import DiTPipeline

from .flow import ORT_COMPONENTS, ORT_PRECISIONS, Part, Target, check_output, check_parts, export, load_pytorch
from .openvino import OpenVINODiTTransformer
from .parts import DEFAULT_OPSET, DEFAULT_PARTS, OPSETS, Plan
from .reference import Parity
from .sampler import sample_latents

# The precisions of the denoiser, by the runtime that runs it on a processor.
PRECISIONS = {"onnxruntime": ORT_PRECISIONS, "openvino": ("fp32", "bf16", "int8")}

# The sampling run after which the error of 8 bits is reported: images and steps.
_RUN_BATCH, _RUN_STEPS = 4, 20


class ONNXTarget(Target):
    """ONNX files for processors, and for ONNX Runtime's other providers."""

    def __init__(self, plan: Plan, runtime: str):
        self.plan, self.runtime = plan, runtime
        if runtime == "openvino":
            self.components = {**ORT_COMPONENTS, "denoiser": OpenVINODiTTransformer}

    def details(self, part: Part, component: Any, pipeline: DiTPipeline) -> dict[str, Any]:
        """The error after a whole sampling run, for 8 bits."""
        if part.precision != "int8":
            return {}
        expected, actual = (
            sample_latents(DiTPipeline(transformer, part.scheduler), _RUN_BATCH, _RUN_STEPS)
            for transformer in (pipeline.transformer, component)
        )
        error = (actual - expected).norm() / expected.norm()
        return {"sampling_error": error.item(), "sampling_steps": _RUN_STEPS}

    def settings(self) -> dict[str, Any]:
        plan = self.plan
        opsets = {"sampler": plan.sampler_opset, "denoiser": plan.opset}
        return {
            "opset": {part: opset for part, opset in opsets.items() if part in plan.parts},
            "precision": plan.precision,
            "static": plan.static,
            "precompute": plan.precompute,
            "runtime": self.runtime,
        }


def export_onnx(
    model: str | os.PathLike | DiTPipeline,
    output_dir: str | os.PathLike,
    parts: Sequence[str] = DEFAULT_PARTS,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    precompute: bool = False,
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
        precompute: put what depends on timestep and class alone into a file of its own, conditioner.onnx, a third of
            the weights of an adaLN model. The pipeline then computes the modulation of all steps ahead, in float32.
        runtime: of the denoiser, "onnxruntime" or "openvino". The others run on ONNX Runtime.
        decode: put the VAE into the sampler's file, so that it draws images; models of pixels always do.
        dynamic_size: accept every height and width that the patches tile; for models with sin-cos positions.
        static: for "int8": fix the scales of the activations ahead, from sampling runs in PyTorch, rather than find
            them while it runs. Slower on ONNX Runtime, but the form (Q/DQ) that other runtimes read; OpenVINO's int8
            is always of it.
        max_error: bound of the relative error in place of that of `MAX_RELATIVE_ERROR`.
        overwrite: replace a folder that is there.

    Returns:
        The errors of each exported component.

    Raises:
        ValueError: an unknown part, precision or opset, a full output folder, or an error above the bound.
        ImportError: the extra "onnx" is not installed.
    """
    require_onnx()
    if runtime not in PRECISIONS:
        raise ValueError(f"There is no runtime {runtime!r}; known: {', '.join(PRECISIONS)}.")
    if runtime == "openvino":
        require("openvino", "openvino")
    chosen = check_parts(parts)
    denoising, sampling = ("precompute", precompute), ("decode", decode)
    for part, (name, given) in (
        ("denoiser", denoising),
        ("denoiser", ("dynamic_size", dynamic_size)),
        ("sampler", sampling),
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
    static = static or (runtime == "openvino" and precision == "int8")  # which reads Q/DQ pairs
    check_output(model, output_dir, overwrite)
    pipeline = load_pytorch(model)
    if decode and pipeline.vae is None and not pipeline.transformer.config.draws_pixels:
        raise ValueError("decode puts a VAE into the sampler's file, and this pipeline has none.")
    weights = "fp32" if precision == "bf16" else precision  # OpenVINO computes in bf16 by itself
    plan = Plan(chosen, precision, weights, static, opset, precompute=precompute, dynamic_size=dynamic_size,
                decode=decode, max_error=max_error)  # fmt: skip
    return export(pipeline, plan, ONNXTarget(plan, runtime), output_dir, overwrite)


def require_onnx() -> None:
    """Raise ImportError where the extra "onnx" is not installed."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
