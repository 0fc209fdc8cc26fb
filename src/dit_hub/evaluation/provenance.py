"""How samples were made: the facts of `sampling.json`, and whether a run can resume what they describe."""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import shown
from ..files import file_sha256
from ..sharing import Worker

FACTS_FILE = "sampling.json"

# Of `FACTS_FILE`; raised by a change that its readers must know of.
SCHEMA_VERSION = 1

# Facts that an image depends on, besides its label, with their words; a run agrees in them with one that it resumes.
_DETERMINING = {
    "weights": "other weights",
    "runtime": "another runtime",
    "precision": "another precision",
    "scheduler": "another scheduler",
    "steps": "another number of steps",
    "timesteps": "other timesteps",
    "guidance": "another guidance",
    "seed": "another seed",
    "image_size": "another size",
}

# What other code reads of the facts, which a person may have changed.
_KINDS = {"runtime": str, "precision": dict, "scheduler": dict, "steps": int, "guidance": dict, "num": int,
          "finished": bool, "weights": dict, "seed": int, "runs": list, "labels": (dict, type(None))}  # fmt: skip

_PACKAGES = ("dit-hub", "torch", "diffusers", "transformers", "numpy", "pillow")

# Suffixes of files in a component's folder that hold no weights.
_NO_WEIGHTS = (".json", ".py", ".md", ".txt")


def model_facts(pipeline: Any) -> dict[str, Any]:
    """What a pipeline draws with, as JSON holds it: its model, weights, runtime and precision."""
    transformer, vae = pipeline.transformer, pipeline.vae
    source = pipeline.source_folder("transformer")
    snapshot = None if source is None or source.parents[1].name != "snapshots" else source.parent  # of the Hub
    replaced = None if vae is None or pipeline.source_folder("vae") is not None else vae
    config = json.loads(pipeline.scheduler.to_json_string())
    return {
        "model": pipeline.config.get("_name_or_path"),
        "revision": None if snapshot is None else snapshot.name,
        "decoder": None
        if replaced is None
        else getattr(replaced.config, "_name_or_path", None),  # None: the model's own
        "weights": {**_weights(pipeline, "transformer"), **({} if vae is None else _weights(pipeline, "vae"))},
        "runtime": type(transformer).__name__,
        "precision": {
            "transformer": _name(transformer.dtype),
            "decoder": None if vae is None else _name(vae.dtype),
            "tf32": pipeline._execution_device.type == "cuda" and _allows_tf32(),
        },
        "scheduler": {name: value for name, value in config.items() if name != "_diffusers_version"},
    }


def run_facts(pipeline: Any, batch_size: int, worker: Worker) -> dict[str, Any]:
    """What may differ between the runs that draw a set of samples."""
    device = pipeline._execution_device
    runtime = getattr(pipeline.transformer, "runtime", None)  # of an export, under the name of its distribution
    packages = (*_PACKAGES, runtime, f"{runtime}-gpu") if runtime else _PACKAGES
    return {
        "batch_size": batch_size,
        "processes": worker.count,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of a folder of samples; None where it has none.

    Raises:
        ValueError: they are damaged, or a later version wrote them.
    """
    path = folder / FACTS_FILE
    try:
        facts = json.loads(path.read_text())
        version = facts["schema_version"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path} is damaged, and does not say how the images were made; delete the folder.") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has the version {shown(version)}, and this dit-hub reads {SCHEMA_VERSION}; update "
                         "dit-hub.")  # fmt: skip
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(facts.get(name, ""), kind)]:
        raise ValueError(f"{path} is damaged: its {wrong[0]} is {shown(facts.get(wrong[0]))}.")
    return facts


def check_same(folder: Path, noted: dict[str, Any], planned: dict[str, Any]) -> None:
    """Raise ValueError where images of a run would not be those that the folder is for.

    Args:
        folder: of the samples.
        noted, planned: the facts that it has, and those of the run.
    """
    for name, words in _DETERMINING.items():
        old, new = noted.get(name), planned[name]
        if isinstance(old, dict):  # a later version may note more
            differing = [key for key, value in old.items() if new.get(key) != value]
            details = [f"{key} {shown(old[key])}, not {shown(new.get(key))}" for key in differing[:1]]
        else:
            details = [f"{shown(old)}, not {shown(new)}"] if old != new else []
        if details:
            detail = f" ({details[0]})" if name not in ("weights", "timesteps") else ""
            raise ValueError(f"{folder} holds images of {words}{detail}; choose another folder.")


# --- Details ---------------------------------------------------------------------------------------------------------


def _weights(pipeline: Any, name: str) -> dict[str, str]:
    """SHA-256 by file of a component; where its weights are not those of files, of its tensors, under its name."""
    component = getattr(pipeline, name)
    folder = pipeline.source_folder(name) or getattr(component, "folder", None)  # an export's
    if folder is None:
        return {name: _tensors_sha256(component)}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix not in _NO_WEIGHTS]
    return {f"{name}/{file.name}": file_sha256(file) for file in files}


def _tensors_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        for part in _plain(tensor):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantised one consists of; any other itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return [part for name in names for part in _plain(getattr(tensor, name))]


def _allows_tf32() -> bool:
    backends: Any = torch.backends
    return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
