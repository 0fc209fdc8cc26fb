"""Latency of servers against the rate of requests (`make bench-serving`): one at a time, batches of requests, ours.

Requests arrive by a Poisson process whatever the server does (open loop), over HTTP on this machine, each with 10, 20,
50 or 100 steps, or with any number between (`--any-steps`). Every contender gets the same arrivals; they take turns,
each in a process of its own that idles while the others work. The runtime has one thread, so that the other core is for
HTTP and the client. Rates are shares of what it draws offline, in full batches.

    python benchmarks/serving.py --model toy --runtime onnxruntime --out docs/serving-toy
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
from rich.console import Console
from rich.table import Table

STEPS = (10, 20, 50, 100)
THREADS = 1
HERE = Path(__file__).parent

# Of which latencies are told; the first requests find an idle server.
WARM_UP = 0.1

# Requests that come at once, for the throughput at saturation.
BURST = 192


def make_folder(model: str, runtime: str, folder: Path) -> Path:
    """A pipeline folder of the toy or of S/2 with random weights, for a runtime."""
    import torch
    from diffusers import DDIMScheduler

    from dit_hub import DiTConfig, DiTPipeline, DiTTransformer
    from dit_hub.export import export_onnx

    if model == "toy":
        pipeline: Any = DiTPipeline.from_pretrained("dit-toy-shapes")
    else:
        torch.manual_seed(0)
        pipeline = DiTPipeline(
            DiTTransformer(DiTConfig.from_name("DiT-S/2", image_size=128, in_channels=3, learn_sigma=False)).eval(),
            DDIMScheduler(clip_sample=False),
        )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.save_pretrained(folder / "model")
    if runtime == "pytorch":
        return folder / "model"
    export_onnx(folder / "model", folder / runtime, runtime=runtime)
    return folder / runtime


def offline(folder: Path, batch: int, rounds: int, steps: Sequence[int]) -> float:
    """Images of the mixed steps per second, drawn in full batches of one number of steps: the most that there is."""
    script = f"""
import time, torch, json
from dit_hub import DiTPipeline
torch.set_num_threads({THREADS})
pipeline = DiTPipeline.from_pretrained({str(folder)!r}, num_threads={THREADS})
pipeline.set_progress_bar_config(disable=True)
labels = [0] * {batch}
pipeline(labels, guidance_scale=1, num_inference_steps=2)
times = []
for _ in range({rounds}):
    began = time.perf_counter()
    for steps in {STEPS}:
        pipeline(labels, guidance_scale=1, num_inference_steps=steps)
    times.append(time.perf_counter() - began)
print(json.dumps(sorted(times)[{rounds} // 2]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    drawn = batch * len(STEPS) * statistics.mean(STEPS) / statistics.mean(steps)
    return drawn / json.loads(result.stdout.splitlines()[-1])


def servers(folder: Path, batch: int) -> dict[str, list[str]]:
    """The contenders' command lines, with PORT for a port."""
    batching, folder_name = str(HERE / "request_batching.py"), str(folder)
    serve = [
        "-m",
        "dit_hub.cli",
        "serve",
        folder_name,
        "--port",
        "PORT",
        "--max-batch",
        str(batch),
        "--threads",
        str(THREADS),
    ]
    found = {
        "one at a time": [batching, folder_name, "PORT", "1", str(THREADS)],
        "request-level batching": [batching, folder_name, "PORT", str(batch), str(THREADS)],
    }
    if "litserve" in os.environ.get("PYTHONPATH", ""):
        found["LitServe"] = [str(HERE / "litserve_batching.py"), folder_name, "PORT", str(batch), str(THREADS)]
    return {**found, "dit-hub serve": [*serve, "--max-steps", "100", "--max-waiting", "4096"]}


def arrivals(rate: float, count: int, seed: int, steps: Sequence[int]) -> list[tuple[float, dict[str, Any]]]:
    """Times and requests."""
    chance, now, requests = random.Random(seed), 0.0, []
    for number in range(count):
        now += chance.expovariate(rate) if rate else 0.0
        body = {"prompt": str(number % 4), "seed": number, "num_inference_steps": chance.choice(steps),
                "guidance_scale": 1.0}  # fmt: skip
        requests.append((now, body))
    return requests


async def load(port: int, requests: list[tuple[float, dict[str, Any]]]) -> tuple[list[float], float]:
    """The latency of each request, from when it was due, and the seconds until the last was answered."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        began = time.perf_counter()

        async def ask(due: float, body: dict[str, Any]) -> float:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            answer = await client.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body)
            answer.raise_for_status()
            assert answer.json()["data"][0]["b64_json"]
            return time.perf_counter() - began - due

        latencies = await asyncio.gather(*(ask(due, body) for due, body in requests))
        return list(latencies), time.perf_counter() - began


async def load_all(processes: dict[str, tuple[int, Any]], steps: int) -> None:
    """One request to each server."""
    for port, _ in processes.values():
        await load(port, [(0.0, {"prompt": "0", "num_inference_steps": steps, "guidance_scale": 1.0})])


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until a server draws."""
    body = {"prompt": "0", "num_inference_steps": 2, "guidance_scale": 1.0}
    for _ in range(600):
        assert process.poll() is None, "A server ended."
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=60)
            if answer.status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError("A server did not start.")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Results by contender and share of the offline throughput; 0 stands for saturation."""
    batch, shares, most, deadline = arguments.batch, arguments.shares, arguments.most, arguments.deadline
    mixture = range(10, 101) if arguments.any_steps else STEPS
    capacity = offline(folder, batch, rounds=3 if arguments.model == "toy" else 1, steps=mixture)
    results: dict[str, Any] = {"images_per_second_offline": capacity, "deadline": deadline, "contenders": {}}
    processes: dict[str, tuple[int, subprocess.Popen]] = {}
    try:
        for number, (name, command) in enumerate(servers(folder, batch).items()):
            if arguments.only and name not in arguments.only:
                continue
            port = 18500 + number
            line = [sys.executable, *(str(port) if part == "PORT" else part for part in command)]
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            processes[name] = port, process
            wait_for(port, process)
            results["contenders"][name] = {}
        for steps in (
            mixture if arguments.any_steps else STEPS * 2
        ):  # the first request of a number of steps measures its solver
            asyncio.run(load_all(processes, steps))
        for share in [*shares, 0.0]:
            count = min(most, max(20, int(share * capacity * arguments.seconds))) if share else min(most, BURST)
            requests = arrivals(share * capacity, count, int(share * 100), mixture)
            for name, (port, _) in processes.items():
                latencies, took = asyncio.run(load(port, requests))
                told = sorted(latencies[int(WARM_UP * count) if share else 0 :])
                results["contenders"][name][str(share)] = {
                    "requests": count,
                    "per_second": count / took,
                    "mean": statistics.mean(told),
                    "p50": told[len(told) // 2],
                    "p90": told[int(0.9 * len(told))],
                    "p99": told[int(0.99 * len(told))],
                    "in_time": sum(latency <= deadline for latency in told) / len(told),
                }
                print(share, name, results["contenders"][name][str(share)], file=sys.stderr, flush=True)
    finally:
        for _, process in processes.values():
            process.terminate()
    return results


def show(title: str, results: dict[str, Any]) -> None:
    """Print the tables."""
    capacity = results["images_per_second_offline"]
    table = Table("load", "server", "requests", "images/s", "mean s", "P50 s", "P90 s", "P99 s",
                  f"within {results['deadline']:g} s", title=title)  # fmt: skip
    for share in next(iter(results["contenders"].values())):
        for name, rows in results["contenders"].items():
            row = rows[share]
            load = f"{float(share):.0%}" if float(share) else "all at once"
            times = [f"{row[key]:.2f}" for key in ("mean", "p50", "p90", "p99")]
            table.add_row(load, name, str(row["requests"]), f"{row['per_second']:.2f}", *times, f"{row['in_time']:.0%}")
    console = Console(width=120)
    console.print(table)
    ours = results["contenders"]["dit-hub serve"]
    console.print(f"Offline, in full batches: {capacity:.2f} images/s. At saturation dit-hub serve draws "
                  f"{ours['0.0']['per_second'] / capacity:.0%} of it.")  # fmt: skip


def plot(path: Path, title: str, results: dict[str, Any]) -> None:
    """Latency against the rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("mean", "p99"), ("mean", "99th percentile"), strict=True):
        for name, rows in results["contenders"].items():
            shares = [share for share in rows if float(share)]
            rates = [float(share) * results["images_per_second_offline"] for share in shares]
            axes.plot(rates, [rows[share][key] for share in shares], marker="o", label=name)
        axes.set(xlabel="requests per second", ylabel=f"latency, {label} (s)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=["toy", "S/2"], default="toy")
    parser.add_argument("--runtime", choices=["pytorch", "onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--batch", type=int, default=16, help="most images of a pass or a call")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85])
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals at each rate")
    parser.add_argument("--most", type=int, default=600, help="requests at each rate")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds, of which the share in time is told")
    parser.add_argument("--any-steps", action="store_true", help="from 10 to 100, not four numbers of them")
    parser.add_argument("--only", nargs="+", help="contenders, of those in the table")
    parser.add_argument("--out", type=Path, help="PNG and JSON are written beside this name")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    steps = "10 to 100" if arguments.any_steps else ", ".join(map(str, STEPS))
    title = f"{arguments.model} on {arguments.runtime}, steps of {steps}, batches of {arguments.batch}"
    with tempfile.TemporaryDirectory() as folder:
        served = make_folder(arguments.model, arguments.runtime, Path(folder))
        results = measure(served, arguments)
    show(title, results)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        plot(arguments.out.with_suffix(".png"), title, results)


if __name__ == "__main__":
    main()
