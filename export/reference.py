"""Random inputs and what PyTorch makes of them, beside each part, so that any machine can measure a runtime."""

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
Evaluate = Callable[[dict[str, Tensor]], Tensor]


class UnsupportedShapeError(ValueError):
    """An input has a shape that a file was not built for."""


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
    """The bound of each component's error, from an export's report.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / REPORT_FILE
    try:
        return {name: float(entry["bound"]) for name, entry in json.loads(path.read_text())["parity"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder} is no export: its {REPORT_FILE} is missing or damaged.") from None


def write_reference(folder: Path, cases: Sequence[Case]) -> None:
    """Keep the cases in a component's folder, the inputs of the first as "0.timestep", its output as "0."."""
    named = {f"{index}.{name}": value for index, (inputs, expected) in enumerate(cases)
             for name, value in {**inputs, "": expected}.items()}  # fmt: skip
    save_file({name: value.contiguous() for name, value in named.items()}, folder / REFERENCE_FILE)


def read_reference(folder: Path) -> list[Case]:
    """The cases in a component's folder.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    path = folder / REFERENCE_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, so there is nothing to compare with: {error}") from error
    cases: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        cases.setdefault(index, {})[name] = value
    if not cases or not all("" in case and len(case) > 1 for case in cases.values()):
        raise ValueError(f"{path} is no reference of an export.")
    return [(case, case.pop("")) for _, case in sorted(cases.items())]


def measure_parity(name: str, evaluate: Evaluate, cases: Sequence[Case], bound: float, measured_on: str) -> Parity:
    """The distance of a runtime from the expected outputs, on those cases whose shapes it was built for.

    Raises:
        ValueError: it is above the bound, or no case can be tried.
    """
    tried: list[tuple[float, float, int]] = []
    refusal = ValueError(f"The reference of the {name} holds nothing to try.")
    for inputs, expected in cases:
        try:
            actual = evaluate(inputs).to(expected)
        except UnsupportedShapeError as error:
            refusal = error
            continue
        except TypeError:  # of an argument that is missing, or one too many
            raise ValueError(
                f"The reference of the {name} is not of this export: it holds {', '.join(inputs)}."
            ) from None
        if actual.shape != expected.shape:
            raise ValueError(f"The reference of the {name} is not of this export: it has the shape "
                             f"{list(expected.shape)}, not {list(actual.shape)}.")  # fmt: skip
        difference = (actual - expected).double()
        norm = expected.double().norm().item() or 1.0  # a fresh model predicts exactly zero
        error = difference.norm().item() / norm
        if not error <= bound:  # also catches NaN
            raise ValueError(f"The exported {name} differs from PyTorch by {error:.1e} (relative L2), "
                             f"more than {bound:.0e}.")  # fmt: skip
        tried.append((error, difference.abs().max().item(), len(expected)))
    if not tried:
        raise refusal
    errors, differences, batches = zip(*tried, strict=True)
    return Parity(max(errors), max(differences), batches, bound, measured_on)
