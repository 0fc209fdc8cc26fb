"""Speed of one forward pass on a CPU against stock diffusers: `make bench`.

Every contender lives in a process of its own (several ONNX Runtime sessions in one process slow each other down) and
all take turns, so that a change of the machine's speed meets them alike. All hold the same random weights.
"""

import argparse
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# Sizes as stock diffusers can express them: fixed positions, a null class, its own frequencies.
STOCK = {"timestep_freq_shift": 1.0, "timestep_freq_dim": 256}
TOY = {"pos_embed": "sincos", "class_dropout_prob": 0.1}
# Name: (model, fields, batch). Two rows of S/2 are one image with guidance.
WORKLOADS = {"toy, batch 16": ("toy", TOY, 16), "S/2, batch 2 (1 image, guided)": ("DiT-S/2", {}, 2)}

BASELINE = "diffusers fp32 eager"
Forward = Callable[..., Any]
Inputs = dict[str, torch.Tensor]


def make_model(name: str, fields: dict[str, Any]) -> Any:
    """Our model with random weights; a fresh one would predict zero."""
    from dit_hub import DiTConfig, DiTTransformer

    torch.manual_seed(0)
    model = DiTTransformer(DiTConfig.from_name(name, **{**STOCK, **fields})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def diffusers_stock(model: Any) -> Any:
    """diffusers' own model with the same weights."""
    from diffusers import DiTTransformer2DModel

    from dit_hub.conversion import diffusers_config, to_diffusers

    stock = DiTTransformer2DModel(**diffusers_config(model.config)).eval()
    stock.load_state_dict(to_diffusers(model.state_dict(), model.config.num_hidden_layers), strict=True)
    return stock


def diffusers_eager(model: Any) -> Forward:
    stock = diffusers_stock(model)
    return lambda hidden_states, timestep, class_labels: (
        stock(hidden_states, timestep=timestep, class_labels=class_labels).sample
    )


def diffusers_compiled(model: Any, dtype: torch.dtype = torch.float32) -> Forward:
    compiled = torch.compile(diffusers_stock(model).to(dtype))
    return lambda hidden_states, timestep, class_labels: (
        compiled(hidden_states.to(dtype), timestep=timestep, class_labels=class_labels).sample
    )


def ours_eager(model: Any) -> Forward:
    return lambda **inputs: model(**inputs).sample


def ours_precomputed(model: Any) -> Forward:
    """As in the pipeline's loop, where the modulations of all steps are computed ahead."""
    conditions: dict[int, torch.Tensor] = {}

    def forward(hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        if not conditions:
            conditions[0] = model.precompute(timestep, class_labels)
        return model(hidden_states, precomputed=conditions[0]).sample

    return forward


def ours_compiled(model: Any) -> Forward:
    compiled = torch.compile(model)
    return lambda **inputs: compiled(**inputs).sample


def ours_compiled_bf16(model: Any) -> Forward:
    return ours_compiled(model.to(torch.bfloat16))


def exported(model: Any, **options: Any) -> Forward:
    """An export of the model, run as in the pipeline's loop: with `precompute`, the modulations are computed ahead."""
    from diffusers import DDIMScheduler

    from dit_hub import DiTPipeline
    from dit_hub.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(DiTPipeline(model, DDIMScheduler()), Path(folder, "export"), **options)
        threads = 1 if torch.get_num_threads() == 1 else None
        denoiser = DiTPipeline.from_pretrained(Path(folder, "export"), num_threads=threads).transformer
    if not hasattr(denoiser, "precompute"):
        return lambda **inputs: denoiser(**inputs).sample
    conditions: dict[int, torch.Tensor] = {}

    def forward(hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        if not conditions:
            conditions[0] = denoiser.precompute(timestep, class_labels)
        return denoiser(hidden_states, precomputed=conditions[0]).sample

    return forward


CONTENDERS: dict[str, Callable[[Any], Forward]] = {
    BASELINE: diffusers_eager,
    "diffusers fp32 compiled": diffusers_compiled,
    "diffusers bf16 compiled": partial(diffusers_compiled, dtype=torch.bfloat16),
    "dit-hub fp32 eager": ours_eager,
    "dit-hub fp32 eager, modulations ahead": ours_precomputed,
    "dit-hub fp32 compiled": ours_compiled,
    "dit-hub bf16 compiled": ours_compiled_bf16,
    "dit-hub ONNX Runtime fp32": exported,
    "dit-hub ONNX Runtime fp32, modulations ahead": partial(exported, precompute=True),
    "dit-hub ONNX Runtime int8": partial(exported, precision="int8"),
    "dit-hub ONNX Runtime int8, modulations ahead": partial(exported, precision="int8", precompute=True),
    "dit-hub OpenVINO bf16, modulations ahead": partial(
        exported, precision="bf16", precompute=True, runtime="openvino"
    ),
    "dit-hub OpenVINO int8, modulations ahead": partial(
        exported, precision="int8", precompute=True, runtime="openvino"
    ),
}


def contend(contender: str, workload: str, shared: bool, pipe: Connection) -> None:
    """The process of one contender: its output first, then the seconds of as many passes as it is asked for."""
    clock = time.process_time if shared else time.perf_counter
    if shared:
        torch.set_num_threads(1)
    name, fields, batch = WORKLOADS[workload]
    model = make_model(name, fields)
    forward = CONTENDERS[contender](model)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    inputs: Inputs = {
        "hidden_states": torch.randn(batch, config.in_channels, *config.sample_height_width, generator=generator),
        "timestep": torch.full((batch,), 321),
        "class_labels": torch.randint(0, config.num_classes, (batch,), generator=generator),
    }
    with torch.inference_mode():
        for _ in range(5):
            output = forward(**inputs)
        pipe.send(output.float().numpy())
        while passes := pipe.recv():
            start = clock()
            for _ in range(passes):
                forward(**inputs)
            pipe.send((clock() - start) / passes)


def measure(workload: str, contenders: list[str], rounds: int, shared: bool, console: Console) -> Table:
    """Let the contenders take turns and put the outcome in a table."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    outputs: dict[str, torch.Tensor] = {}
    for contender in contenders:
        with console.status(f"{workload}: preparing {contender}"):
            here, there = context.Pipe()
            context.Process(target=contend, args=(contender, workload, shared, there), daemon=True).start()
            there.close()  # so that a contender that fails ends the wait for it
            outputs[contender] = torch.from_numpy(here.recv())
            pipes[contender] = here
    passes = 30 if workload.startswith("toy") else 3
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for done in range(rounds):
        with console.status(f"{workload}: round {done + 1} of {rounds}"):
            for contender, pipe in pipes.items():
                time.sleep(0.05)  # lets the threads of the one before stop waiting for work
                pipe.send(passes)
                seconds[contender].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0)

    table = Table("contender", title=workload, title_justify="left")
    for column in ("median ms", "min ms", f"times {BASELINE}", "relative error"):
        table.add_column(column, justify="right")
    baseline = outputs[BASELINE]
    for contender, times in seconds.items():
        ratio = statistics.median(b / s for b, s in zip(seconds[BASELINE], times, strict=True))
        error = (outputs[contender] - baseline).norm() / baseline.norm()
        cells = (f"{statistics.median(times) * 1e3:.2f}", f"{min(times) * 1e3:.2f}", f"{ratio:.2f}", f"{error:.1e}")
        table.add_row(contender, *cells)
    return table


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default 15)")
    parser.add_argument(
        "--shared", action="store_true", help="one thread, and processor time: for a machine that others use as well"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="words; contenders and workloads with one of them")
    arguments = parser.parse_args()
    console = Console(width=110)
    import diffusers
    import onnxruntime

    from dit_hub.flops import matmul_peak

    console.print(
        f"{processor()}, {torch.get_num_threads()} threads; {platform.system()}, Python {platform.python_version()}"
    )
    console.print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    peaks = (f"{matmul_peak('cpu', dtype, 2048) / 1e9:.0f} ({dtype})" for dtype in (torch.float32, torch.bfloat16))
    console.print(f"matrix products of 2048x2048, G operations/s: {', '.join(peaks)}")
    words = arguments.only
    chosen = [name for name in CONTENDERS if name == BASELINE or any(word in name for word in words)]
    for workload in [name for name in WORKLOADS if any(word in name for word in words)] or WORKLOADS:
        console.print(measure(workload, chosen, arguments.rounds, arguments.shared, console))


if __name__ == "__main__":
    main()
