"""Whether a server's memory stays flat: many requests of one and two steps over HTTP.

    OMP_NUM_THREADS=1 python benchmarks/soak.py dit-toy-shapes --requests 20000

starts `dit-hub serve MODEL`, keeps 32 requests in flight (a tenth of them streams with previews, a tenth is wrong, a
tenth leaves before its answer), reads the resident memory after each 1 % of them, and fits a line by least squares
behind the first fifth, which warms caches up. It fails where the line climbs by more than 100 kB for 1,000 requests, or
where an answer has another status than it should.
"""

import argparse
import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections import Counter

import httpx2
import numpy as np
import psutil

IMAGES = "/v1/images/generations"
IN_FLIGHT = 32

# kB of resident memory for 1,000 requests: 20,000 of them then cost 2 MB, less than the allocator's own steps.
MOST_KILOBYTES = 100.0


def start_server(model: str) -> tuple[subprocess.Popen[str], str]:
    """A server's process and its address."""
    command = [sys.executable, "-m", "dit_hub.cli", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+(?=;)", process.stdout.readline())
    assert found, "the server did not start"
    while True:
        try:
            if httpx2.get(f"{found[0]}/ready").status_code == 200:
                return process, found[0]
        except httpx2.TransportError:
            pass
        time.sleep(0.2)


async def ask(client: httpx2.AsyncClient, index: int) -> str:
    """One request; what became of it."""
    fields = {"prompt": index % 16, "seed": index, "num_inference_steps": 1 + index % 2}
    kind = index % 10
    if kind == 0:
        streamed = {**fields, "num_inference_steps": 2, "stream": True, "partial_images": 1}
        async with client.stream("POST", IMAGES, json=streamed) as answer:
            lines = [line async for line in answer.aiter_lines()]
        return "streamed" if lines.count("event: image_generation.completed") == 1 else f"stream of {lines}"
    if kind == 1:
        return f"wrong: {(await client.post(IMAGES, json={**fields, 'prompt': 'nobody'})).status_code}"
    if kind == 2:
        with contextlib.suppress(httpx2.TimeoutException):
            await client.post(IMAGES, json={**fields, "n": 10}, timeout=0.005)
        return "left or answered"
    return f"drawn: {(await client.post(IMAGES, json=fields)).status_code}"


async def soak(url: str, requests: int, process: psutil.Process) -> tuple[np.ndarray, Counter[str]]:
    """(samples, 2) numbers of requests and kB of memory, and what became of the requests."""
    statuses: Counter[str] = Counter()
    samples: list[tuple[int, float]] = []
    numbers = iter(range(requests))
    every = max(1, requests // 100)

    async def work(client: httpx2.AsyncClient) -> None:
        for index in numbers:
            statuses[await ask(client, index)] += 1
            done = statuses.total()
            if done % every == 0:
                samples.append((done, process.memory_info().rss / 1024))

    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        await asyncio.gather(*(work(client) for _ in range(IN_FLIGHT)))
    return np.array(samples), statuses


def slope(samples: np.ndarray) -> tuple[float, float]:
    """kB for 1,000 requests behind the first fifth, and its standard error."""
    steady = samples[len(samples) // 5 :]
    (rate, _), covariance = np.polyfit(steady[:, 0] / 1000, steady[:, 1], 1, cov=True)
    return float(rate), float(np.sqrt(covariance[0, 0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="dit-toy-shapes")
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    process, url = start_server(options.model)
    try:
        began = time.monotonic()
        samples, statuses = asyncio.run(soak(url, options.requests, psutil.Process(process.pid)))
        seconds = time.monotonic() - began
        text = httpx2.get(f"{url}/metrics").text
    finally:
        process.terminate()
        status = process.wait(60)
    rate, error = slope(samples)
    left = sum(float(value) for value in re.findall(r"(?:queue_waiting|images_running)\{.*\} (\S+)", text))
    print(f"{options.requests} requests in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    print(f"memory: {samples[0, 1] / 1024:.0f} MB at first, {samples[-1, 1] / 1024:.0f} MB in the end; "
          f"{rate:+.1f} ± {error:.1f} kB for 1,000 requests; images left in the engine: {left:.0f}")  # fmt: skip
    sound = set(statuses) <= {"drawn: 200", "streamed", "wrong: 400", "left or answered"} and not left and not status
    flat = rate <= MOST_KILOBYTES
    print("flat" if flat and sound else "NOT flat" if sound else "NOT sound")
    sys.exit(not (flat and sound))


if __name__ == "__main__":
    main()
