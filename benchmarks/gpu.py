"""Latency of DiT-XL/2 on an NVIDIA GPU: eager, compiled with CUDA graphs, and TensorRT (`make bench-gpu`).

Random weights; a batch of 1 or 32 images with guidance is 2 or 64 rows of one forward pass, with the modulations
computed ahead as in the pipeline. Each contender is a process of its own. The share of the peak is the pass's
operations (twice the multiply-accumulates of `dit-hub info`) per second over those of the best matrix product measured
in the same precision.
"""

import argparse
import datetime
import importlib.util
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cpu import make_model

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def eager(model: Any, precision: str, rows: int) -> Forward:
    model = model.to("cuda", PRECISIONS[precision])
    return lambda latents, condition: model(latents, precomputed=condition).sample


def compiled(model: Any, precision: str, rows: int) -> Forward:
    model = torch.compile(model.to("cuda", PRECISIONS[precision]), mode="reduce-overhead")  # with CUDA graphs
    return lambda latents, condition: model(latents, precomputed=condition).sample


def tensorrt(model: Any, precision: str, rows: int) -> Forward:
    from diffusers import DDIMScheduler

    from dit_hub import DiTPipeline
    from dit_hub.export import export_tensorrt

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "engine"
        export_tensorrt(DiTPipeline(model, DDIMScheduler()), folder, precision=precision, profile=(1, rows, rows))
        denoiser = DiTPipeline.from_pretrained(folder, cuda_graphs=True).transformer
    return lambda latents, condition: denoiser(latents, precomputed=condition).sample


CONTENDERS: dict[str, Callable[[Any, str, int], Forward]] = {
    "eager": eager,
    "compiled, CUDA graphs": compiled,
    "TensorRT, CUDA graphs": tensorrt,
}


def seconds_of(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call on the GPU, after warming up."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def contend(contender: str, name: str, precision: str, rows: int, repeats: int, pipe: Connection) -> None:
    """The process of one contender: (seconds of each pass, relative error), or why it does not run."""
    try:
        model = make_model(name, {})
        config = model.config
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(rows, config.in_channels, *config.sample_height_width, generator=generator).cuda()
        labels = torch.arange(rows).cuda() % config.num_classes
        with torch.inference_mode():
            exact = model.cuda()
            condition = exact.precompute(torch.full((rows,), 321.0).cuda(), labels)
            expected = exact(latents[:2], precomputed=condition[:2]).sample.cpu()
            forward = CONTENDERS[contender](model.cpu(), precision, rows)
            actual = forward(latents, condition)[:2].float().cpu()
            times = seconds_of(lambda: forward(latents, condition), repeats)
        pipe.send((times, ((actual - expected).norm() / expected.norm()).item()))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        pipe.send(str(error).split("\n")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32], help="with guidance, two rows each")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: PyTorch sees no NVIDIA GPU here.")
    from dit_hub import DiTConfig
    from dit_hub.flops import matmul_peak, measure

    operations = 2e9 * measure(DiTConfig.from_name(options.model)).gmacs
    table = Table(title=f"{options.model} on {torch.cuda.get_device_name()}, {datetime.date.today()}")
    for column in ("images", "contender", "precision", "median ms", "share of matmul peak", "relative error"):
        table.add_column(column, justify="left" if column in ("contender", "precision") else "right")
    context = multiprocessing.get_context("spawn")
    peaks = {precision: matmul_peak("cuda", PRECISIONS[precision], 8192) for precision in PRECISIONS}
    for images in options.images:
        for precision in PRECISIONS:
            for contender in CONTENDERS:
                here, there = context.Pipe()
                arguments = (contender, options.model, precision, 2 * images, options.repeats, there)
                process = context.Process(target=contend, args=arguments)
                process.start()
                there.close()
                try:
                    outcome = here.recv()
                except EOFError:
                    outcome = "it ended without a word"
                process.join()
                if isinstance(outcome, str):
                    table.add_row(str(images), contender, precision, "—", "—", outcome)
                    continue
                median, error = statistics.median(outcome[0]), outcome[1]
                share = 2 * images * operations / median / peaks[precision]
                cells = (f"{median * 1e3:.2f}", f"{share:.0%}", f"{error:.1e}")
                table.add_row(str(images), contender, precision, *cells)
    console = Console(width=130)
    console.print(table)
    for precision, peak in peaks.items():
        console.print(f"Matrix product, {precision}: {peak / 1e12:.0f} TFLOP/s")
    for name in ("tensorrt", "tensorrt_rtx"):
        console.print(f"{name}: {'installed' if importlib.util.find_spec(name) else 'not installed'}")


if __name__ == "__main__":
    main()
