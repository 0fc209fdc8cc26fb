"""Time and memory of converting and loading an XL/2 checkpoint: `make bench-checkpoints`.

The contenders are a plain copy of the file and `safetensors.torch.load_file`. Each run is a process of its own and they
take turns. The weights are random, in a temporary folder that needs four times the checkpoint's size (11 GB).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

MAKE = """
import sys, torch
from dit_hub import DiTConfig, DiTTransformer
from dit_hub.conversion import to_official
model = DiTTransformer(DiTConfig.from_name(sys.argv[1]))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
torch.save(to_official(model.state_dict(), model.config), sys.argv[2])
"""

# Weights are mapped into memory; a model is ready when its numbers are there, so both sum one of each page.
LOAD = """
import sys, time
from safetensors.torch import load_file
from dit_hub import DiTTransformer

def touch(tensors):
    return sum(float(tensor.reshape(-1)[:: 4096 // tensor.element_size()].sum()) for tensor in tensors)

DiTTransformer.from_pretrained(sys.argv[2])  # a small one, which imports what loading needs
start = time.perf_counter()
if sys.argv[1] == "ours":
    touch(DiTTransformer.from_pretrained(sys.argv[3]).state_dict().values())
else:
    touch(load_file(sys.argv[3] + "/model.safetensors").values())
print(time.perf_counter() - start)
"""


def run(command: Sequence[str | Path]) -> tuple[float, float]:
    """Wall-clock seconds and peak memory in bytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed with status {os.waitstatus_to_exitcode(status)}.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copying_and_converting(source: Path, folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, peak memory) of each round; both contenders end once the bytes are on the disk."""
    copy = ["sh", "-c", f"cp '{source}' '{folder}/copy' && sync '{folder}/copy'"]
    convert = [sys.executable, "-m", "dit_hub.cli", "convert", source, folder / "ours", "--vae", "none", "--overwrite"]
    results: dict[str, list[tuple[float, float]]] = {"plain copy, synced": [], "dit-hub convert": []}
    for _ in range(rounds):
        for name, command in zip(results, (copy, convert), strict=True):
            results[name].append(run(command))
            (folder / "copy").unlink(missing_ok=True)
    return results


def loading(folder: Path, rounds: int, from_disk: bool) -> dict[str, list[float]]:
    """Seconds of each round, after the imports; the file is read from the disk or from the system's cache."""
    small, large = folder / "small", folder / "ours" / "transformer"
    script = f"from dit_hub import *; DiTTransformer(DiTConfig.from_name('toy')).save_pretrained({str(small)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    results: dict[str, list[float]] = {"load_file": [], "DiTTransformer.from_pretrained": []}
    for _ in range(rounds):
        for name, who in zip(results, ("theirs", "ours"), strict=True):
            if from_disk:
                forget(large / "model.safetensors")
            command = [sys.executable, "-c", LOAD, who, str(small), str(large)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(float(output))
    return results


def forget(file: Path) -> None:
    """Drop a file from the system's cache, as after a restart of the machine."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", help="size of the model")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "weights.pt"
        with console.status("Making the checkpoint…"):
            run([sys.executable, "-c", MAKE, arguments.model, source])
        size = source.stat().st_size
        with console.status("Copying and converting…"):
            converted = copying_and_converting(source, folder, arguments.rounds)
        with console.status("Loading…"):
            loaded = {
                f"{name}, {place}": times
                for place, from_disk in (("from disk", True), ("from the system's cache", False))
                for name, times in loading(folder, arguments.rounds, from_disk).items()
            }
    title = f"{arguments.model}, a checkpoint of {size / 1e9:.2f} GB, {arguments.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("", "median s", "ratio", "peak memory / file"):
        table.add_column(column, justify="right" if column else "left")
    rows = {name: [seconds for seconds, _ in runs] for name, runs in converted.items()} | loaded
    peaks = {name: f"{max(peak for _, peak in runs) / size:.2f}" for name, runs in converted.items()}
    baseline = 1.0
    for index, (name, times) in enumerate(rows.items()):
        median = statistics.median(times)
        baseline = median if index % 2 == 0 else baseline  # the baseline comes first
        table.add_row(
            name, f"{median:.3f}", f"{median / baseline:.2f}", peaks.get(name, ""), end_section=index % 2 == 1
        )
    console.print(table)


if __name__ == "__main__":
    main()
