"""The folder of a run: its lock and its checkpoints, which appear whole or not at all.

`torch.distributed.checkpoint.save` is not used for them: it writes shards in place with pickled metadata, or
safetensors without the optimizer's settings. These are safetensors and JSON, and open as a pipeline.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import locked, new_folder, remove_folder
from ..manifest import MANIFEST_FILE

# Logs lie beside the checkpoints, and then in the pipeline's folder; the Hub shows TensorBoard's from "runs".
LOGS_FOLDER = "runs"

STATE_FILE = "state.json"
_NAME = "step-{:08d}"


@dataclass
class Checkpoint:
    """The state of a run after a step.

    Args:
        step: optimizer steps done.
        tensors: by part ("model", "ema-9999", "optimizer") and name.
        facts: what JSON can hold: the recipe, the losses so far, counters.
        pipeline: a `DiTPipeline` of the model's configuration, whose weights are not used. With it, the folder is also
            a pipeline for `DiTPipeline.from_pretrained`; None for adapters.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]
    pipeline: Any = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then remove all but the last `keep`. The disk is synced before an older one is removed.

    Raises:
        OSError: it cannot be written; the older ones stay.
    """
    target = folder / _NAME.format(checkpoint.step)
    try:
        with new_folder(target, overwrite=True) as building:
            for part, tensors in checkpoint.tensors.items():
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(contiguous, building / f"{part}.safetensors", metadata={"format": "pt"})
            if checkpoint.pipeline is not None:
                _add_pipeline_files(checkpoint, building)
            facts = {"step": checkpoint.step, **checkpoint.facts}
            (building / STATE_FILE).write_text(json.dumps(facts) + "\n")
    except ValueError as error:  # the user's files are in its place
        raise OSError(str(error)) from error
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def _add_pipeline_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Make a pipeline of a checkpoint's folder; its weights, the first average if there is one, are a link."""
    pipeline = checkpoint.pipeline
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.transformer.config.save_pretrained(folder / "transformer")
    part = next((name for name in checkpoint.tensors if name.startswith("ema-")), "model")
    link = folder / "transformer" / "model.safetensors"
    try:
        link.symlink_to(Path("..", f"{part}.safetensors"))
    except OSError:  # a file system without links
        shutil.copyfile(folder / f"{part}.safetensors", link)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))
    return sorted(path for path in found if (path / STATE_FILE).is_file())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    try:
        facts = json.loads((path / STATE_FILE).read_text())
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return Checkpoint(int(facts.pop("step")), {"model": tensors.pop("model"), **tensors}, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> ValueError:
    """The error about a checkpoint from which a run cannot resume."""
    return ValueError(f"The checkpoint {path} is damaged ({error}); remove it to resume from an older one.")


def remove_checkpoints(folder: Path | None) -> None:
    """Remove the checkpoints of a run, from which the next run would resume. The user's own files stay."""
    for path in checkpoints(folder) if folder else []:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    if (checkpoint / MANIFEST_FILE).is_file():
        remove_folder(checkpoint)
    else:  # written by an older release
        shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def lock_run(folder: Path | None) -> Iterator[None]:
    """Reserve a run's folder, if it has one, for this run. All processes of the run must enter.

    Raises:
        ValueError: another run uses it.
    """
    if folder is None:
        yield
        return
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    problem = [""]
    with ExitStack() as stack:
        if state.is_main_process:
            try:
                stack.enter_context(locked(folder, f"Another training is running in {folder}; wait for it to end, or "
                                           "train to another --out."))  # fmt: skip
            except (OSError, ValueError) as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0]:
            raise ValueError(problem[0])
        yield


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state, by parameter name, as tensors "name/key" and the settings of its groups."""
    tensors = {f"{name}/{key}": value for name, values in state["state"].items() for key, value in values.items()}
    return tensors, state["param_groups"]


def unflatten_optimizer(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = value
    return {"state": state, "param_groups": groups}
