"""Latents cached once: what a VAE makes of each picture and of its mirror image, in shards."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import locked
from .data import LATENTS_FILE, PLAN_FILE, Dataset, check_unreadable
from .fingerprint import fingerprint

# Called with the number of pictures done and of all.
Progress = Callable[[int, int], None]


@torch.no_grad()
def cache_latents(
    dataset: Dataset,
    vae: Any,
    output_dir: str | os.PathLike,
    batch_size: int = 16,
    shard_size: int = 1024,
    progress: Progress = lambda done, count: None,
    left_out: Callable[[str], None] = lambda name: None,
) -> Path:
    """Encode a data set; one that was cut goes on with the first shard that is missing or damaged.

    Memory holds one shard, whatever the size of the data set.

    Args:
        dataset: pictures.
        vae: an `AutoencoderKL`, on the device to encode on.
        output_dir: gets shard-00000.safetensors and so on (`upright` and `mirrored`: (n, 2C, h, w) means and deviations
            in float16; `labels`), and at the end latents.json.
        batch_size: pictures at a time.
        shard_size: pictures of a shard.
        progress: called after each batch.
        left_out: called with the name of each picture that cannot be read.

    Returns:
        The folder, which a recipe may name as its data.

    Raises:
        ValueError: the folder holds something else, or latents of other data, or another process is at work in it; the
            VAE takes other pictures; more than 1 % of the pictures cannot be read.
        OSError: the disk is full; what is written stays for the next attempt.
    """
    folder = Path(output_dir)
    if dataset.sample_shape[0] != vae.config.in_channels:
        raise ValueError(f"The pictures have {dataset.sample_shape[0]} channels, and the VAE takes "
                         f"{vae.config.in_channels}.")  # fmt: skip
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if any(side % factor for side in dataset.sample_shape[1:]):
        raise ValueError(f"The VAE takes pictures whose sides are divisible by {factor}, not of "
                         f"{dataset.sample_shape[1]}x{dataset.sample_shape[2]}.")  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and latents go to a folder.")
    with locked(folder, f"Another process caches latents in {folder}; wait for it to end, or choose another folder."):
        return _cache_shards(dataset, vae, folder, batch_size, shard_size, progress, left_out)


def _cache_shards(
    dataset: Dataset,
    vae: Any,
    folder: Path,
    batch_size: int,
    shard_size: int,
    progress: Progress,
    left_out: Callable[[str], None],
) -> Path:
    """Encode what is missing; see `cache_latents`."""
    count = len(dataset)
    facts: dict[str, Any] = {
        "count": count,
        "picture_shape": list(dataset.sample_shape),
        "vae": vae.config.get("_name_or_path", ""),
        "shard_size": shard_size,
        "id2label": dataset.id2label,
        "scaling_factor": vae.config.scaling_factor,
        **({"shift_factor": shift} if (shift := getattr(vae.config, "shift_factor", None)) else {}),
        "description": dataset.description,
        "license": dataset.license,
        "fingerprint": fingerprint(dataset),
    }
    _plan(folder, facts)
    shards, shape, unreadable = [], None, 0
    for index, start in enumerate(range(0, count, shard_size)):
        end = min(start + shard_size, count)
        path = folder / f"shard-{index:05d}.safetensors"
        tensors = _finished(path)
        if tensors is None:
            tensors = _encode(dataset, vae, range(start, end), batch_size, lambda done: progress(done, count), left_out)
            _write(path, partial(save_file, tensors))
        shape = tensors["upright"].shape[1:]
        digest_of_shard = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"file": path.name, "count": len(tensors["labels"]), "sha256": digest_of_shard})
        unreadable += end - start - len(tensors["labels"])
        check_unreadable(unreadable, count)
        progress(end, count)
    assert shape is not None
    facts |= {"shape": [shape[0] // 2, *shape[1:]], "shards": shards}
    _write(folder / LATENTS_FILE, lambda path: path.write_text(json.dumps(facts) + "\n"))
    return folder


def _plan(folder: Path, facts: dict[str, Any]) -> None:
    """Note of what the shards of a folder are, or compare with what a run that was cut has noted."""
    plan, text = folder / PLAN_FILE, json.dumps(facts, sort_keys=True)
    names = [file.name for file in folder.iterdir()]
    if foreign := [name for name in names if not _OURS.fullmatch(name)]:
        raise ValueError(f"{folder} holds something else than latents ({foreign[0]}); choose another folder.")
    noted, planned = _noted(plan), json.loads(text)
    if noted is None and any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{plan} is damaged, and does not say what its latents are of; delete the folder.")
    # An older release noted less; what it encoded is the same.
    if noted is not None and any(name not in planned or planned[name] != value for name, value in noted.items()):
        raise ValueError(f"{folder} holds latents of other data, of another size or VAE; choose another folder.")
    if noted != planned:
        _write(plan, lambda path: path.write_text(text))


# Files of a folder of latents; those with another ending are being written, or were.
_OURS = re.compile(rf"({re.escape(PLAN_FILE)}|{re.escape(LATENTS_FILE)}|shard-\d{{5,}}(\.safetensors)?)(\.part)?|\..*")


def _noted(plan: Path) -> dict[str, Any] | None:
    """What a plan says; None where there is none, or a damaged one."""
    try:
        return dict(json.loads(plan.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A file, whole or not at all, whatever ends the program meanwhile."""
    building = path.with_name(f"{path.name}.part")
    try:
        write(building)
        with building.open("rb") as file:
            os.fsync(file.fileno())
        building.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}). What is encoded stays; with room on the disk the same "
                      "command goes on.") from error  # fmt: skip
    finally:
        building.unlink(missing_ok=True)


def _finished(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a shard that is whole."""
    try:
        tensors = load_file(path)
        return tensors if tensors.keys() == {"upright", "mirrored", "labels"} else None
    except (OSError, SafetensorError):
        return None


def _encode(
    dataset: Dataset,
    vae: Any,
    positions: range,
    batch_size: int,
    progress: Callable[[int], None],
    left_out: Callable[[str], None],
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"upright": [], "mirrored": [], "labels": []}
    for start in range(positions.start, positions.stop, batch_size):
        end = min(start + batch_size, positions.stop)
        batch = dataset.read([(position, False) for position in range(start, end)])
        for name in batch.unreadable:
            left_out(name)
        for name, data in (("upright", batch.data), ("mirrored", batch.data.flip(3))):
            if len(data):
                latents = vae.encode(data.to(vae.device, vae.dtype)).latent_dist
                parts[name].append(torch.cat([latents.mean, latents.std], dim=1).half().cpu())
        parts["labels"].append(batch.labels)
        progress(end)
    if not parts["upright"]:
        raise ValueError(f"None of the pictures {positions.start} to {positions.stop - 1} can be read.")
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}
