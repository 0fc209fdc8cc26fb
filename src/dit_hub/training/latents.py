"""Caching latents: a VAE's distribution for each image and its mirror image, in shards."""

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

from ..files import file_sha256
from ..sharing import Progress, Worker
from ..vaes import spatial_compression
from .data import LATENTS_FILE, PLAN_FILE, Dataset, check_unreadable
from .fingerprint import fingerprint
from .old_names import renamed


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

    Memory holds one shard, whatever the size of the data set. Processes that `accelerate launch` or torchrun starts
    share the work: each encodes its own shards, and the last to end writes latents.json. What the shards hold does not
    depend on the number of processes.

    Args:
        dataset: images.
        vae: an `AutoencoderKL`, on the device to encode on.
        output_dir: gets shard-00000.safetensors and so on (`upright` and `mirrored`: (n, 2C, h, w) means and standard
            deviations in float16; `labels`: (n,) int64), and at the end latents.json.
        batch_size: images per forward pass.
        shard_size: images per shard.
        progress: called after each batch, with the number of images of this process that are done, and of all its own.
        left_out: called with the name of each image that cannot be read.

    Returns:
        The folder, which a recipe may name as its data.

    Raises:
        ValueError: the folder holds other files, or latents of other data, or another process uses it; the VAE takes
            other images; more than 1 % of the images cannot be read.
        OSError: the disk is full; the shards that are written stay for the next attempt.
    """
    folder = Path(output_dir)
    _check_size(dataset, vae)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and latents go to a folder.")
    worker = Worker.from_environment()
    busy = f"Another process caches latents in {folder}; wait for it to end, or choose another folder."
    with worker.at_work(folder, busy):
        cache = _Cache(folder, worker, dataset, vae, batch_size, shard_size, left_out)
        _plan(folder, worker, cache.facts)
        cache.fill(progress)
        if cache.is_filled():
            with worker.as_last(folder) as last:
                if last:
                    cache.finish()
    return folder


def _check_size(dataset: Dataset, vae: Any) -> None:
    """Raise ValueError for images that the VAE does not take."""
    if dataset.sample_shape[0] != vae.config.in_channels:
        raise ValueError(f"The images have {dataset.sample_shape[0]} channels, and the VAE takes "
                         f"{vae.config.in_channels}.")  # fmt: skip
    factor = spatial_compression(vae)
    if any(side % factor for side in dataset.sample_shape[1:]):
        raise ValueError(f"The VAE takes images whose sides are divisible by {factor}, not of "
                         f"{dataset.sample_shape[1]}x{dataset.sample_shape[2]}.")  # fmt: skip


class _Cache:
    """The shards of a data set in a folder; see `cache_latents`."""

    def __init__(
        self,
        folder: Path,
        worker: Worker,
        dataset: Dataset,
        vae: Any,
        batch_size: int,
        shard_size: int,
        left_out: Callable[[str], None],
    ):
        self.folder, self.worker, self.dataset, self.vae = folder, worker, dataset, vae
        self.batch_size, self.left_out = batch_size, left_out
        self.shards = [
            range(start, min(start + shard_size, len(dataset))) for start in range(0, len(dataset), shard_size)
        ]
        # What latents.json says of each shard that this process has seen, by the shard's number.
        self.seen: dict[int, dict[str, Any]] = {}
        self.shape: torch.Size | None = None
        self.facts: dict[str, Any] = {
            "count": len(dataset),
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

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def fill(self, progress: Progress) -> None:
        """Encode this process's shards, but for those that are finished."""
        own = self.worker.share(range(len(self.shards)))
        count, done = sum(len(self.shards[index]) for index in own), 0
        for index in own:
            positions = self.shards[index]
            self._see(index, lambda at, before=done - positions.start: progress(before + at, count))
            done += len(positions)
            progress(done, count)

    def is_filled(self) -> bool:
        """Whether all shards are there, those of other processes too."""
        return all(self.path(index).is_file() for index in range(len(self.shards)))

    def finish(self) -> None:
        """Write latents.json, after a look at the other processes' shards."""
        for index in range(len(self.shards)):
            if index not in self.seen:
                self._see(index, lambda at: None)
        assert self.shape is not None
        facts = {**self.facts, "shape": [self.shape[0] // 2, *self.shape[1:]],
                 "shards": [self.seen[index] for index in range(len(self.shards))]}  # fmt: skip
        self.worker.write(self.folder / LATENTS_FILE, lambda path: path.write_text(json.dumps(facts) + "\n"))

    def _see(self, index: int, progress: Callable[[int], None]) -> None:
        """Note the facts of a shard, which is encoded if it is missing or damaged."""
        path = self.path(index)
        tensors = _finished(path)
        if tensors is None:
            tensors = _encode(self.dataset, self.vae, self.shards[index], self.batch_size, progress, self.left_out)
            self.worker.write(path, partial(save_file, tensors))
        self.shape = tensors["upright"].shape[1:]
        self.seen[index] = {"file": path.name, "count": len(tensors["labels"]), "sha256": file_sha256(path)}
        unreadable = sum(len(self.shards[number]) - facts["count"] for number, facts in self.seen.items())
        check_unreadable(unreadable, len(self.dataset))


def _plan(folder: Path, worker: Worker, facts: dict[str, Any]) -> None:
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
        worker.write(plan, lambda path: path.write_text(text))


# Files in a folder of latents; an older release wrote to names that end in .part until it was done.
_OURS = re.compile(rf"({re.escape(PLAN_FILE)}|{re.escape(LATENTS_FILE)}|shard-\d{{5,}}(\.safetensors)?)(\.part)?|\..*")


def _noted(plan: Path) -> dict[str, Any] | None:
    """The facts in a plan, under today's names; None if it is missing or damaged."""
    try:
        return renamed(dict(json.loads(plan.read_text())))
    except (OSError, ValueError, TypeError):
        return None


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
