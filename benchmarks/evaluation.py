"""FID of 50,000 samples from stored features: seconds and peak memory.

    python benchmarks/evaluation.py

Two files of 50,000 x 2,048 float32, as Inception gives them, 400 MB each, are compared in a process of its own; the
limits are 60 s and 2 GB. ADM's evaluator takes scipy's root of the product of the covariances, timed beside it.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COUNT, SIZE = 50_000, 2048


def compare(folder: Path, how: str) -> None:
    """Print the seconds and megabytes of one comparison."""
    from dit_hub.evaluation import Moments, frechet_distance
    from dit_hub.evaluation.estimates import Collected, Options, compute

    started = time.perf_counter()
    real, fake = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("real", "fake"))
    if how == "distance":
        value = f"{frechet_distance(real, fake):.6f}"
    elif how == "with its interval":
        reference = Collected({}, {"features": Moments(SIZE).add(real).statistics}, COUNT)
        found = compute(["fid"], reference, Collected({"features": fake}, {}, COUNT), Options())["fid"]
        value = f"{found.value:.6f} ± {found.error:.6f}"
    else:
        import scipy.linalg

        means = [rows.mean(axis=0) for rows in (real, fake)]
        spreads = [np.cov(rows, rowvar=False) for rows in (real, fake)]
        root = scipy.linalg.sqrtm(spreads[0] @ spreads[1])
        value = f"{((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0] + spreads[1] - 2 * np.real(root)):.6f}"
    seconds = time.perf_counter() - started
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"{how}: {value} in {seconds:.1f} s, peak memory {int(peak.split()[1]) / 1e6:.2f} GB")


def main() -> None:
    if len(sys.argv) > 1:
        compare(Path(sys.argv[1]), sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as name:
        folder, random = Path(name), np.random.default_rng(0)
        mixing = random.normal(size=(SIZE, SIZE)).astype(np.float32) / SIZE**0.5
        for file, shift in (("real", 0.4), ("fake", 0.41)):
            rows = np.lib.format.open_memmap(folder / f"{file}.npy", "w+", np.float32, (COUNT, SIZE))
            for start in range(0, COUNT, 5000):
                rows[start : start + 5000] = np.abs(random.normal(shift, 0.3, (5000, SIZE)).astype(np.float32) @ mixing)
        for how in ("distance", "with its interval", "as ADM's evaluator"):
            subprocess.run([sys.executable, __file__, str(folder), how], check=True)


if __name__ == "__main__":
    main()
