"""What PyTorch makes of random inputs, kept beside each exported part, so that any machine can measure a runtime."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

REFERENCE_FILE = "reference.safetensors"  # in a component's folder
REPORT_FILE = "report.json"  # in the pipeline's

# Largest error of a precision: relative L2 distance from PyTorch in float32.
MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 5e-2, "fp8": 5e-2}

# Inputs by name, and what PyTorch in float32 makes of them.
Case = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """How far a runtime is from PyTorch on random inputs.

    Args:
        relative_error: largest L2 distance over L2 norm, of all batches tried.
        max_abs_error: largest difference of one value.
        batch_sizes: the batches tried.
        bound: what the relative error must not exceed.
        measured_on: what ran: "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", or "pytorch" with the rounding of
            the precision, where nothing on this machine runs the file.
    """

    relative_error: float
    max_abs_error: float
    batch_sizes: tuple[int, ...]
    bound: float
    measured_on: str


def write_report(folder: Path, settings: dict[str, Any], parity: dict[str, Any]) -> None:
    """Write what was exported and how far each component is from PyTorch."""
    (folder / REPORT_FILE).write_text(json.dumps({**settings, "parity": parity}, indent=2) + "\n")


def read_bounds(folder: Path) -> dict[str, float]:
    """The bound of each component's error, of an export's report.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / REPORT_FILE
    try:
        return {name: float(entry["bound"]) for name, entry in json.loads(path.read_text())["parity"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder} is no export: its {REPORT_FILE} is missing or damaged.") from None


def write_reference(folder: Path, cases: Sequence[Case]) -> None:
    """Keep the cases in a component's folder."""
    named = {f"{index}.{name}": value for index, (inputs, _) in enumerate(cases) for name, value in inputs.items()}
    named |= {f"{index}.": expected for index, (_, expected) in enumerate(cases)}
    save_file({name: value.contiguous() for name, value in named.items()}, folder / REFERENCE_FILE)


def read_reference(folder: Path) -> list[Case]:
    """The cases of a component's folder.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    path = folder / REFERENCE_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, so there is nothing to compare with: {error}") from error
    cases: dict[str, tuple[dict[str, Tensor], list[Tensor]]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        inputs, expected = cases.setdefault(index, ({}, []))
        if name:
            inputs[name] = value
        else:
            expected.append(value)
    if not cases or not all(inputs and len(expected) == 1 for inputs, expected in cases.values()):
        raise ValueError(f"{path} is no reference of an export.")
    return [(inputs, expected[0]) for _, (inputs, expected) in sorted(cases.items())]


def measure_parity(
    name: str, evaluate: Callable[[dict[str, Tensor]], Tensor], cases: Sequence[Case], bound: float, measured_on: str
) -> Parity:
    """The distance of a runtime from the expected outputs.

    Raises:
        ValueError: it is above the bound.
    """
    relative_error, max_abs_error = 0.0, 0.0
    for inputs, expected in cases:
        try:
            actual = evaluate(inputs).to(expected)
        except KeyError as error:
            raise ValueError(f"The reference of the {name} is not of this export: it lacks {error}.") from None
        if actual.shape != expected.shape:
            raise ValueError(f"The reference of the {name} is not of this export: it has the shape "
                             f"{list(expected.shape)}, not {list(actual.shape)}.")  # fmt: skip
        difference = (actual - expected).double()
        norm = expected.double().norm().item() or 1.0  # a fresh model predicts exactly zero
        error = difference.norm().item() / norm
        if not error <= bound:  # also catches NaN
            raise ValueError(
                f"The exported {name} differs from PyTorch by {error:.1e} (relative L2), more than {bound:.0e}."
            )
        relative_error = max(relative_error, error)
        max_abs_error = max(max_abs_error, difference.abs().max().item())
    return Parity(relative_error, max_abs_error, tuple(len(expected) for _, expected in cases), bound, measured_on)
