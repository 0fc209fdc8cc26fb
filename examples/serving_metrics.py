"""A server's metrics under a load that rises and falls, as a dashboard shows them: `docs/serving-metrics.png`.

    python examples/serving_metrics.py --out docs/serving-metrics.png

starts `dit-hub serve MODEL`, sends requests of 10 to 100 steps at random times, reads `/metrics` twice a second, and
draws the load, the queue, the rows of a pass and percentiles of the latency. The percentiles are those of Prometheus'
`histogram_quantile`: interpolated within the buckets of the last four seconds.
"""

import argparse
import asyncio
import math
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx2

IMAGES = "/v1/images/generations"

# Seconds between two readings, and how many of these a rate is taken over.
_EVERY, _WINDOW = 0.5, 8

# One reading: its time, and each series' value.
Reading = tuple[float, dict[str, float]]


def start_server(model: str) -> tuple[subprocess.Popen[str], str]:
    """A server's process and its address, once it is ready."""
    command = [sys.executable, "-m", "dit_hub.cli", "serve", model, "--port", "0", "--max-steps", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+(?=;)", process.stdout.readline())
    if not found:
        raise RuntimeError("The server did not start.")
    for _ in range(600):
        try:
            if httpx2.get(f"{found[0]}/ready").status_code == 200:
                break
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    return process, found[0]


def rate(share: float, most: float) -> float:
    """Requests a second at a share of the run: up, a plateau at the top, down, and a short peak near the end."""
    wave = most * (0.15 + 0.85 * math.sin(math.pi * min(share / 0.75, 1.0)) ** 2)
    return most * 1.3 if 0.85 < share < 0.9 else wave


async def load(url: str, seconds: float, most: float) -> list[Reading]:
    """Send requests at random times, and read the metrics meanwhile."""
    chance, readings, tasks = random.Random(0), [], set()
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def watch() -> None:
            while True:
                text = (await client.get("/metrics")).text
                readings.append((time.monotonic() - began, parsed(text)))
                await asyncio.sleep(_EVERY)

        began = time.monotonic()
        watching = asyncio.create_task(watch())
        while (passed := time.monotonic() - began) < seconds:
            fields = {"prompt": chance.randrange(10), "num_inference_steps": chance.choice((10, 20, 50, 100))}
            task = asyncio.create_task(client.post(IMAGES, json=fields))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(chance.expovariate(rate(passed / seconds, most)))
        await asyncio.gather(*tasks)
        await asyncio.sleep(4 * _EVERY)
        watching.cancel()
    return readings


def parsed(text: str) -> dict[str, float]:
    """Prometheus' text as numbers by series."""
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("dit_hub")]
    return {series: float(value) for series, value in rows}


def summed(values: dict[str, float], name: str) -> float:
    """A metric over all its labels."""
    return sum(value for series, value in values.items() if series.split("{")[0] == name)


def buckets(values: dict[str, float], name: str) -> dict[float, float]:
    """Cumulative counts of a histogram by upper bound."""
    found: dict[float, float] = defaultdict(float)
    for series, value in values.items():
        if series.startswith(f"{name}_bucket") and (bound := re.search(r'le="([^"]+)"', series)):
            found[float(bound[1])] += value
    return dict(sorted(found.items()))


def quantile(share: float, now: dict[float, float], before: dict[float, float]) -> float:
    """`histogram_quantile` of what came between two readings."""
    counts = {bound: count - before.get(bound, 0.0) for bound, count in now.items()}
    total, low, below = counts.get(math.inf, 0.0), 0.0, 0.0
    for bound, count in counts.items():
        if total and count >= share * total:
            return (
                low if math.isinf(bound) else low + (bound - low) * (share * total - below) / max(count - below, 1e-9)
            )
        low, below = bound, count
    return math.nan


def draw(readings: list[Reading], out: Path, title: str) -> None:
    """Four panels over time."""
    from matplotlib.figure import Figure

    times = [moment for moment, _ in readings]
    pairs = [(readings[max(0, index - _WINDOW)], now) for index, now in enumerate(readings)]

    def rates(name: str) -> list[float]:
        return [(summed(now[1], name) - summed(then[1], name)) / max(now[0] - then[0], 1e-9) for then, now in pairs]

    def means(name: str) -> list[float]:
        sums, counts = rates(f"{name}_sum"), rates(f"{name}_count")
        return [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]

    def quantiles(name: str, share: float) -> list[float]:
        return [quantile(share, buckets(now[1], name), buckets(then[1], name)) for then, now in pairs]

    seconds = "dit_hub_request_seconds"
    panels: dict[str, dict[str, list[float]]] = {
        "images a second": {"drawn": rates("dit_hub_images_total")},
        "images": {"running": [summed(values, "dit_hub_images_running") for _, values in readings],
                   "waiting": [summed(values, "dit_hub_queue_waiting") for _, values in readings]},
        "rows of a pass": {"mean": means("dit_hub_pass_rows")},
        "latency in seconds": {f"P{share:.0%}"[:-1]: quantiles(seconds, share) for share in (0.5, 0.9, 0.99)},
    }  # fmt: skip
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained", facecolor="#181b1f")
    figure.suptitle(title, color="#ccccdc", fontsize=11)
    for place, (name, lines) in enumerate(panels.items(), start=1):
        _panel(figure.add_subplot(2, 2, place), name, times, lines)
    figure.savefig(out)


def _panel(axes: Any, name: str, times: list[float], lines: dict[str, list[float]]) -> None:
    axes.set_facecolor("#111217")
    axes.set_title(name, color="#ccccdc", fontsize=10, loc="left")
    for (label, values), colour in zip(lines.items(), ("#73bf69", "#f2cc0c", "#f2495c"), strict=False):
        axes.plot(times, values, color=colour, linewidth=1.3, label=label)
        axes.fill_between(times, values, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlim(0, times[-1])
    axes.set_ylim(bottom=0)
    axes.grid(color="#2c3235", linewidth=0.6)
    axes.tick_params(colors="#9fa7b3", labelsize=8)
    axes.set_xlabel("seconds", color="#9fa7b3", fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(loc="upper left", fontsize=8, frameon=False, labelcolor="#ccccdc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-toy-shapes")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--rate", type=float, default=60.0, help="Requests a second at the top.")
    parser.add_argument("--out", type=Path, default=Path("serving-metrics.png"))
    options = parser.parse_args()
    process, url = start_server(options.model)
    try:
        readings = asyncio.run(load(url, options.seconds, options.rate))
    finally:
        process.terminate()
        process.wait(60)
    images = summed(readings[-1][1], "dit_hub_images_total")
    draw(readings, options.out, f"dit-hub serve {options.model}: {images:.0f} images of 10 to 100 steps")
    print(f"{images:.0f} images; the figure is in {options.out}")


if __name__ == "__main__":
    main()
