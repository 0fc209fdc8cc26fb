"""Caching latents: a VAE's distribution for each image and its mirror image, in shards."""

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
from .old_names import renamed

# Called with the number of images that are done, and of all.
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
    """Encode a data set; a run that was cut resumes at the first shard that is missing or damaged.

    Memory holds one shard, whatever the size of the data set.

    Args:
        dataset: images.
        vae: an `AutoencoderKL`, on the device to encode on.
        output_dir: gets shard-00000.safetensors and so on (`upright` and `mirrored`: (n, 2C, h, w) means and standard
            deviations in float16; `labels`: (n,) int64), and at the end latents.json.
        batch_size: images per forward pass.
        shard_size: images per shard.
        progress: called after each batch.
        left_out: called with the name of each image that cannot be read.

    Returns:
        The folder, which a recipe may name as its data.

    Raises:
        ValueError: the folder holds other files, or latents of other data, or another process uses it; the VAE takes
            other images; more than 1 % of the images cannot be read.
        OSError: the disk is full; the shards that are written stay for the next attempt.
    """
    folder = Path(output_dir)
    if dataset.sample_shape[0] != vae.config.in_channels:
        raise ValueError(f"The images have {dataset.sample_shape[0]} channels, and the VAE takes "
                         f"{vae.config.in_channels}.")  # fmt: skip
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if any(side % factor for side in dataset.sample_shape[1:]):
        raise ValueError(f"The VAE takes images whose sides are divisible by {factor}, not of "
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
    """Encode the shards that are missing; see `cache_latents`."""
    count = len(dataset)
    facts: dict[str, Any] = {
        "count": count,
        "image_shape": list(dataset.sample_shape),
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
    """Write the plan of a folder, the facts about its shards, or compare it with that of a run that was cut."""
    plan, text = folder / PLAN_FILE, json.dumps(facts, sort_keys=True)
    names = [file.name for file in folder.iterdir()]
    if foreign := [name for name in names if not _OURS.fullmatch(name)]:
        raise ValueError(f"{folder} holds other files than latents ({foreign[0]}); choose another folder.")
    noted, planned = _noted(plan), json.loads(text)
    if noted is None and any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{plan} is damaged, and does not say which data its latents belong to; delete the folder.")
    # An older release noted less about the same latents.
    if noted is not None and any(name not in planned or planned[name] != value for name, value in noted.items()):
        raise ValueError(f"{folder} holds latents of other data, of another size or VAE; choose another folder.")
    if noted != planned:
        _write(plan, lambda path: path.write_text(text))


# Files in a folder of latents; the endings are those of files that are being written, or were when a run was cut.
_OURS = re.compile(rf"({re.escape(PLAN_FILE)}|{re.escape(LATENTS_FILE)}|shard-\d{{5,}}(\.safetensors)?)(\.part)?|\..*")


def _noted(plan: Path) -> dict[str, Any] | None:
    """The facts in a plan, under today's names; None if it is missing or damaged."""
    try:
        return renamed(dict(json.loads(plan.read_text())))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, whatever ends the program meanwhile."""
    building = path.with_name(f"{path.name}.part")
    try:
        write(building)
        with building.open("rb") as file:
            os.fsync(file.fileno())
        building.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}). The finished shards stay; with room on the disk, the "
                      "same command resumes.") from error  # fmt: skip
    finally:
        building.unlink(missing_ok=True)


def _finished(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a finished shard; None if it is missing or damaged."""
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
    """The tensors of the shard of these positions."""
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
        raise ValueError(f"None of the images {positions.start} to {positions.stop - 1} can be read.")
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}
