"""Cached latents against what the VAE gives, file by file."""

import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_hub.training import latents
from dit_hub.training.data import Batch, CachedLatents, InMemoryImages, Key
from dit_hub.training.latents import cache_latents


class Config(SimpleNamespace):
    """Fields of a VAE's config."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class HalvingVAE:
    """Four latent channels of half the size: means are the even pixels, deviations a share of the odd ones."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.config = Config(
            in_channels=3, scaling_factor=0.25, _name_or_path="halving", block_out_channels=(8, 8), shift_factor=None
        )
        self.batches: list[int] = []
        self.with_gradients = False

    def encode(self, images: Tensor) -> Any:
        self.batches.append(len(images))
        self.with_gradients |= torch.is_grad_enabled()
        four = torch.cat([images, images.mean(1, keepdim=True)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=four[..., ::2, ::2], std=four[..., 1::2, 1::2].abs()))


class Unreadable(InMemoryImages):
    """Images of which some cannot be read."""

    def __init__(self, *args: Any, lost: Sequence[int]):
        super().__init__(*args)
        self.lost = lost

    def read(self, keys: Sequence[Key]) -> Batch:
        positions = [position for position, _ in keys if position not in self.lost]
        lost = [f"image {position}" for position, _ in keys if position in self.lost]
        index = torch.tensor(positions, dtype=torch.long)
        return Batch(self.data[index], self.labels[index], positions, lost)


def images(count: int = 10, kind: Any = InMemoryImages, **options: Any) -> InMemoryImages:
    data, labels = torch.rand(count, 3, 4, 6) * 2 - 1, torch.arange(count) % 3
    return kind(data, labels, {0: "a", 1: "b", 2: "c"}, "Ten images.", "cc0-1.0", **options)


def test_shards_hold_means_and_deviations_of_each_image_and_its_mirror_image(tmp_path: Path) -> None:
    dataset, vae, seen = images(), HalvingVAE(), []
    folder = cache_latents(
        dataset, vae, tmp_path / "a" / "b", batch_size=3, shard_size=4, progress=lambda *done: seen.append(done)
    )
    assert folder == tmp_path / "a" / "b"
    names = ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["latents.json", "plan.json", *names]
    shards = [load_file(folder / name) for name in names]
    assert [len(shard["labels"]) for shard in shards] == [4, 4, 2]
    assert torch.equal(torch.cat([shard["labels"] for shard in shards]), dataset.labels)
    for name, data in (("upright", dataset.data), ("mirrored", dataset.data.flip(3))):
        stored = torch.cat([shard[name] for shard in shards])
        distribution = HalvingVAE().encode(data).latent_dist
        assert torch.equal(stored, torch.cat([distribution.mean, distribution.std], dim=1).half())
    # Upright and mirrored, three and one of each shard of four.
    assert vae.batches == [3, 3, 1, 1, 3, 3, 1, 1, 2, 2]
    assert not vae.with_gradients
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {done for done, _ in seen} == {3, 4, 7, 8, 10}
    assert {count for _, count in seen} == {10}

    facts = json.loads((folder / "latents.json").read_text())
    assert (facts["shape"], facts["image_shape"], facts["count"]) == ([4, 2, 3], [3, 4, 6], 10)
    assert (facts["vae"], facts["scaling_factor"], facts["license"]) == ("halving", 0.25, "cc0-1.0")
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert facts["shards"] == [
        {"file": name, "count": count, "sha256": digest}
        for name, count, digest in zip(names, (4, 4, 2), digests, strict=True)
    ]
    assert "shift_factor" not in facts  # as in the folders of older releases
    cached = CachedLatents(folder)
    assert cached.shift_factor == 0
    assert (len(cached), cached.sample_shape, cached.scaling_factor) == (10, (4, 2, 3), 0.25)
    assert torch.equal(cached.read([(9, True)]).data[0], shards[2]["mirrored"][1].float())


def test_only_what_is_missing_or_damaged_is_encoded_again(tmp_path: Path) -> None:
    dataset = images()
    folder = cache_latents(dataset, HalvingVAE(), tmp_path, shard_size=3)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for damage in ("missing", "torn", "foreign"):
        path = folder / "shard-00001.safetensors"
        if damage == "missing":
            path.unlink()
        elif damage == "torn":
            path.write_bytes(whole[path.name][:50])
        else:
            save_file({"upright": torch.zeros(3)}, path)
        vae, seen = HalvingVAE(), []
        cache_latents(dataset, vae, folder, shard_size=3, progress=lambda *done, seen=seen: seen.append(done))
        assert vae.batches == [3, 3], damage
        assert (seen[0], seen[-1]) == ((3, 10), (10, 10))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_batch_is_sixteen_images_and_a_shard_1024_unless_told(tmp_path: Path) -> None:
    vae = HalvingVAE()
    folder = cache_latents(images(1030), vae, tmp_path)
    assert vae.batches == [16] * 128 + [6, 6]
    assert [shard["count"] for shard in json.loads((folder / "latents.json").read_text())["shards"]] == [1024, 6]


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path: Path) -> None:
    names: list[str] = []
    # A whole batch of two among them, of which nothing is left to encode.
    dataset = images(400, Unreadable, lost=[2, 3, 301])
    folder = cache_latents(
        dataset, HalvingVAE(), tmp_path / "some", batch_size=2, shard_size=200, left_out=names.append
    )
    assert names == ["image 2", "image 3", "image 301"]
    shards = json.loads((folder / "latents.json").read_text())["shards"]
    assert [shard["count"] for shard in shards] == [198, 199]
    first = load_file(folder / "shard-00000.safetensors")
    assert {len(tensor) for tensor in first.values()} == {198}
    assert torch.equal(first["labels"], torch.cat([dataset.labels[:2], dataset.labels[4:200]]))
    with pytest.raises(ValueError, match=r"5 of 400 images cannot be read, more than 1%"):
        cache_latents(images(400, Unreadable, lost=range(5)), HalvingVAE(), tmp_path / "many")
    with pytest.raises(ValueError, match=r"None of the images 4 to 7 can be read\."):
        cache_latents(images(10, Unreadable, lost=range(4, 8)), HalvingVAE(), tmp_path / "none", shard_size=4)


def test_other_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    vae = HalvingVAE()
    vae.config.in_channels = 1
    with pytest.raises(ValueError, match=r"The images have 3 channels, and the VAE takes 1\."):
        cache_latents(images(), vae, tmp_path / "out")
    odd = images()
    odd.sample_shape = (3, 4, 5)
    with pytest.raises(ValueError, match=r"sides are divisible by 2, not of 4x5\."):
        cache_latents(odd, HalvingVAE(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ten = images()
    folder = cache_latents(ten, HalvingVAE(), tmp_path / "out", shard_size=5)
    for dataset, size in ((ten, 4), (images(9), 5)):
        with pytest.raises(ValueError, match="holds latents of other data, of another size or VAE"):
            cache_latents(dataset, HalvingVAE(), folder, shard_size=size)


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, written = images(), []

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(latents, "save_file", save)
        with pytest.raises(OSError, match="No space left"):
            cache_latents(dataset, HalvingVAE(), tmp_path, shard_size=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "shard-00000.safetensors"]
    vae = HalvingVAE()
    cache_latents(dataset, vae, tmp_path, shard_size=4)
    assert vae.batches == [4, 4, 2, 2]


def test_a_shift_of_the_latents_is_noted(tmp_path: Path) -> None:
    vae = HalvingVAE()
    vae.config.shift_factor = 0.125
    assert CachedLatents(cache_latents(images(), vae, tmp_path)).shift_factor == 0.125


def test_latents_of_an_older_release_are_resumed(tmp_path: Path) -> None:
    """Its plan had neither a fingerprint nor a shift, and another name for the shape."""
    dataset, vae = images(), HalvingVAE()
    cache_latents(dataset, vae, tmp_path, shard_size=4)
    plan = tmp_path / "plan.json"
    noted = json.loads(plan.read_text())
    del noted["fingerprint"]
    plan.write_text(json.dumps(noted).replace("image_shape", "picture_shape"))
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "latents.json").unlink()
    vae.config.shift_factor, vae.batches = 0.125, []
    cached = CachedLatents(cache_latents(dataset, vae, tmp_path, shard_size=4))
    assert (len(cached), cached.shift_factor, vae.batches) == (10, 0.125, [4, 4])
    assert json.loads(plan.read_text()).keys() == noted.keys() | {"fingerprint", "shift_factor"}
    with pytest.raises(ValueError, match="latents of other data"):
        cache_latents(images(), vae, tmp_path, shard_size=4)
    noted["count"] = 11
    plan.write_text(json.dumps(noted))
    with pytest.raises(ValueError, match="latents of other data"):
        cache_latents(dataset, vae, tmp_path, shard_size=4)


def test_each_process_encodes_its_own_shards_and_the_last_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, alone = images(400, Unreadable, lost=[0, 250]), tmp_path / "alone"
    cache_latents(dataset, HalvingVAE(), alone, shard_size=100)
    whole = {path.name: path.read_bytes() for path in alone.iterdir()}
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, own, total in ((2, ["shard-00002.safetensors"], 100), (0, ["shard-00000", "shard-00003"], 200)):
        monkeypatch.setenv("RANK", str(rank))
        seen: list[tuple[int, int]] = []
        before = {path.name for path in (tmp_path / "out").glob("shard*")}
        cache_latents(dataset, HalvingVAE(), tmp_path / "out", shard_size=100,
                      progress=lambda *done, seen=seen: seen.append(done))  # fmt: skip
        new = sorted({path.name for path in (tmp_path / "out").glob("shard*")} - before)
        assert [name.split(".")[0] for name in new] == [name.split(".")[0] for name in own]
        assert seen[0] == (16, total)
        assert seen[-1] == (total, total)
        assert not (tmp_path / "out" / "latents.json").exists()
    (tmp_path / "out" / "shard-00002.safetensors").write_bytes(b"")  # which the last process encodes in its place
    monkeypatch.setenv("RANK", "1")
    cache_latents(dataset, HalvingVAE(), tmp_path / "out", shard_size=100)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    too_many = images(400, Unreadable, lost=range(100, 105))
    with pytest.raises(ValueError, match="5 of 400 images cannot be read"):
        cache_latents(too_many, HalvingVAE(), tmp_path / "many", shard_size=100)
