"""`dit-hub export …`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries
from .common import Model, Overwrite, make_table

export_app = typer.Typer(help="Export a model to another runtime.", no_args_is_help=True, rich_markup_mode=None)

MaxError = Annotated[float | None, typer.Option(help="Accept a larger error than the precision's bound.")]


@export_app.command("onnx")
def export_onnx_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it runs in the same pipeline.")],
    parts: Annotated[
        list[str] | None,
        typer.Option(help="denoiser, decoder, sampler (the whole loop in one file) or all; default: the first two."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the denoiser: fp32, fp16 or int8; with openvino fp32, bf16 or int8.")
    ] = "fp32",
    opset: Annotated[int, typer.Option(help="Version of the ONNX operators: 23 is fastest, 20 most portable.")] = 23,
    precompute: Annotated[
        bool,
        typer.Option("--precompute/--no-precompute", help="Precompute the modulation, in a file of its own."),
    ] = False,
    runtime: Annotated[str, typer.Option(help="Of the denoiser: onnxruntime or openvino.")] = "onnxruntime",
    decode: Annotated[bool, typer.Option("--decode", help="Put the VAE into the sampler's file.")] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Accept every height and width; for sin-cos positions.")
    ] = False,
    static: Annotated[
        bool,
        typer.Option(
            "--static", help="For int8: fix the scales ahead, from sampling runs (Q/DQ); always for openvino."
        ),
    ] = False,
    max_error: MaxError = None,
    overwrite: Overwrite = False,
) -> None:
    """Export to ONNX, checked against PyTorch, for ONNX Runtime or OpenVINO."""
    from ..files import check_free

    check_free(out, overwrite)
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import DEFAULT_PARTS, export_onnx

    console = Console()
    with console.status("Exporting and checking…"):
        report = export_onnx(model, out, parts or DEFAULT_PARTS, precision, opset, precompute, runtime, decode,
                             dynamic_size, static, max_error, overwrite)  # fmt: skip
    _print_parity(f"ONNX {precision} against PyTorch", report)
    print(f"Exported to {out}")


@export_app.command("tensorrt")
def export_tensorrt_command(
    model: Annotated[
        str, typer.Argument(help="A Hub id, a folder, dit-toy-shapes, an export to ONNX or a .onnx file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it runs in the same pipeline.")],
    parts: Annotated[
        list[str] | None,
        typer.Option(help="denoiser, decoder, sampler (the whole loop in one engine) or all; default: the first two."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, fp8 or int8; default: fp16, or as the ONNX file.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Smallest, usual and largest batch; with guidance, twice the images.")
    ] = "1,8,64",
    size: Annotated[
        str | None, typer.Option(help="The same for height and width, in (latent) pixels; default: the training size.")
    ] = None,
    precompute: Annotated[
        bool,
        typer.Option("--precompute/--no-precompute", help="Precompute the modulation, by an engine of its own."),
    ] = True,
    runtime: Annotated[
        str, typer.Option(help="tensorrt (data-centre GPUs), rtx (builds without a GPU) or auto, what is installed.")
    ] = "auto",
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="Of a GPU to build for, such as 8.9; repeatable, for rtx; default: 8.0 up.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Keep weights in the host's memory where the GPU's is too small.")
    ] = False,
    max_error: MaxError = None,
    overwrite: Overwrite = False,
) -> None:
    """Build TensorRT engines; with tensorrt_rtx on a machine without a GPU too."""
    from ..files import check_free

    check_free(out, overwrite)
    batch, sides = _numbers("--profile", profile), _numbers("--size", size) if size else None
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import DEFAULT_PARTS, export_tensorrt

    with Console().status("Exporting…") as status:
        report = export_tensorrt(
            model,
            out,
            parts or DEFAULT_PARTS,
            precision,
            batch,
            sides,
            precompute,
            runtime,
            compute_capability or (),
            weight_streaming,
            max_error,
            overwrite,
            lambda phase, done, total: status.update(f"{phase}: {done} of {total}"),
        )
    if report:
        _print_parity("Error against PyTorch", report)
        if not any(parity.measured_on.startswith("tensorrt") for parity in report.values()):
            print("The engines did not run here: `dit-hub export verify` measures them on the GPU they are for.")
    print(f"Exported to {out}")


@export_app.command("web")
def export_web_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; any file server serves it.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a page that samples in the browser."""
    from ..files import check_free

    check_free(out, overwrite)
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import export_web

    with Console().status("Exporting and checking…"):
        parity = export_web(model, out, overwrite)
    _print_parity("Error against PyTorch", {"sampler": parity})
    print(f"Exported to {out}; serve it with: {Path(sys.executable).name} -m http.server --directory {out}")


@export_app.command("triton")
def export_triton_command(
    model: Annotated[str, typer.Argument(help="A Hub id, a folder, dit-toy-shapes, or an export to ONNX or TensorRT.")],
    repository: Annotated[Path, typer.Argument(help="Folder to write, for tritonserver --model-repository.")],
    part: Annotated[
        str | None, typer.Option(help="denoiser (the default; batched by the server) or sampler (the whole loop).")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime (the default) or tensorrt; of an export, its own.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="As for `export onnx` and `export tensorrt`; of an export, its own.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Rows that the server may put together.")] = 32,
    overwrite: Overwrite = False,
) -> None:
    """Write a model repository for Triton Inference Server."""
    from ..files import check_free

    check_free(repository, overwrite)
    quiet_libraries()
    from rich.console import Console

    from dit_hub.export import export_triton

    console = Console()
    with console.status("Exporting…"):
        models = export_triton(model, repository, part, runtime, precision, max_batch, overwrite)
    table = make_table("Models", "name", "backend", "largest batch", "inputs", "outputs")
    for each in models:
        names = (", ".join(tensor.name for tensor in tensors) for tensors in (each.inputs, each.outputs))
        table.add_row(each.name, each.backend, str(each.max_batch_size or "not batched"), *names)
    console.print(table)
    print(f"Exported to {repository}; serve it with: tritonserver --model-repository={repository}")


@export_app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="An export.")],
    max_error: MaxError = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Of ONNX Runtime, the preferred first; repeatable; default: the CPU's.")
    ] = None,
) -> None:
    """Measure an export on this machine, against what PyTorch computed when it was made."""
    quiet_libraries()
    from dit_hub.export import verify_export

    _print_parity("Error against PyTorch", verify_export(folder, max_error, provider))


def _numbers(option: str, text: str) -> tuple[int, int, int]:
    """Three numbers of "1,8,64"."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} takes three numbers such as 1,8,64, not {text!r}.")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _print_parity(title: str, report: Any) -> None:
    from rich.console import Console

    table = make_table(title, "component", "runs on", "relative error", "bound", "largest difference")
    for name, parity in report.items():
        errors = (f"{error:.1e}" for error in (parity.relative_error, parity.bound, parity.max_abs_error))
        table.add_row(name, parity.measured_on, *errors)
    Console().print(table)
