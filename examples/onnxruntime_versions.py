"""Run exports of the embedded model on several versions of ONNX Runtime and print which run which, as docs/export.md
shows it. pip fetches each version into a folder that is gone at the end.

    python examples/onnxruntime_versions.py 1.20.1 1.23.2 1.31.1
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from dit_hub.export import export_onnx
from dit_hub.extras import quiet_libraries

EXPORTS: dict[str, dict[str, Any]] = {
    "`--opset 20`": {"opset": 20},
    "`--opset 21`": {"opset": 21},
    "`--opset 22`": {"opset": 22},
    "`--opset 23`, the default": {},
    "`--opset 24`": {"opset": 24},
    "`--opset 25`": {"opset": 25},
    "`--precision fp16 --opset 20`": {"precision": "fp16", "opset": 20},
    "`--precision int8 --static`": {"precision": "int8", "static": True},
    "`--precision int8 --static --opset 20`": {"precision": "int8", "static": True, "opset": 20},
    "`--parts sampler`": {"parts": ["sampler"]},
    "`--parts sampler --precision int8`": {"parts": ["sampler"], "precision": "int8"},
    "`--parts sampler --precision int8 --static`": {"parts": ["sampler"], "precision": "int8", "static": True},
}

# In a Python that has this version: prints the error of a file on its reference, or what ONNX Runtime says.
RUN = """
import sys, numpy, onnxruntime
onnxruntime.set_default_logger_severity(4)
for folder in sys.argv[1:]:
    case = dict(numpy.load(folder + "/case.npz"))
    expected = case.pop("expected")
    try:
        session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
        inputs = {entry.name: case[entry.name] for entry in session.get_inputs()}
        error = numpy.linalg.norm(session.run(["sample"], inputs)[0] - expected) / numpy.linalg.norm(expected)
        print("yes" if error < 5e-2 else f"wrong by {error:.0e}")
    except Exception as error:
        print("no", str(error).splitlines()[0], file=sys.stderr)
        print("no")
"""


def main(versions: list[str]) -> None:
    quiet_libraries()
    columns = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for number, options in enumerate(EXPORTS.values()):
            export_onnx("dit-toy-shapes", Path(scratch, str(number)), **options)
            folders.append(Path(scratch, str(number), "transformer"))
            reference = load_file(folders[-1] / "reference.safetensors")
            case = {name[2:] or "expected": value.numpy() for name, value in reference.items() if name[0] == "1"}
            np.savez(folders[-1] / "case.npz", allow_pickle=False, **case)
        for version in versions:
            target = str(Path(scratch, version))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
            subprocess.run([*pip, f"onnxruntime=={version}"], check=True)
            command = [sys.executable, "-c", RUN, *map(str, folders)]
            environment = {**os.environ, "PYTHONPATH": target}
            run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            columns.append(run.stdout.split())
    print("| `dit-hub export onnx` |", " | ".join(versions), "|\n|" + "---|" * (1 + len(versions)))
    for name, *cells in zip(EXPORTS, *columns, strict=True):
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
