"""Checkpoints that are not what they seem: one sentence, exit status 2, no code run, nothing left behind."""

import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.cli import main
from dit_hub.conversion import to_official

from .command_line import dit_hub

MakeModel = Callable[..., DiTTransformer]
Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Convert:
    """A function: `dit-hub convert SOURCE tmp_path/out/converted …` -> (exit status, output)."""

    def run(source: Path, *arguments: str) -> tuple[int, str]:
        target = str(tmp_path / "out" / "converted")
        of_files = () if source.is_dir() else ("--num-attention-heads", "4", "--vae", "none")
        monkeypatch.setattr(sys, "argv", ["dit-hub", "convert", str(source), target, *of_files, *arguments])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        captured = capsys.readouterr()
        return status, captured.err if status else captured.out

    return run


@pytest.fixture
def refused(convert: Convert, tmp_path: Path) -> Callable[..., str]:
    """A function that converts, checks that it is refused in one line and leaves nothing, and returns that line."""

    def run(source: Path, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        status, said = convert(source, *arguments)
        lines = said.strip().splitlines()
        assert status == 2, said
        assert len(lines) == 1, said
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 1200
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


@pytest.fixture
def weights(make_model: MakeModel) -> dict[str, Tensor]:
    """An official state dict."""
    model = make_model()
    return to_official({name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config)


def bytes_of(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def file_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- Code ------------------------------------------------------------------------------------------------------------


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, target: Path, how: str = "open"):
        self.target, self.how = str(target), how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "system":
            return os.system, (f"touch {self.target}",)
        if self.how == "exec":
            return exec, (f"open({self.target!r}, 'w')",)
        return open, (self.target, "w")


HIDING_PLACES: dict[str, Callable[[Payload, dict[str, Tensor]], bytes]] = {
    "alone": lambda payload, _: bytes_of(payload),
    "as a weight": lambda payload, weights: bytes_of({**weights, "blocks.9": payload}),
    "in args": lambda payload, weights: bytes_of({"ema": weights, "args": payload}),
    "in the optimizer": lambda payload, weights: bytes_of({"ema": weights, "opt": {"state": [payload]}}),
    "old format": lambda payload, weights: bytes_of({**weights, "x": payload}, _use_new_zipfile_serialization=False),
    "bare pickle": lambda payload, _: pickle.dumps(payload),
    "bare pickle, protocol 0": lambda payload, _: pickle.dumps(payload, protocol=0),
}


CALLED = {"open": "io.open", "system": "posix.system", "exec": "exec"}


@pytest.mark.parametrize("how", CALLED)
@pytest.mark.parametrize("place", HIDING_PLACES)
def test_no_code_of_a_checkpoint_runs(
    place: str, how: str, weights: dict[str, Tensor], refused: Callable[..., str], tmp_path: Path
) -> None:
    payload = Payload(tmp_path / "made-by-the-payload", how)
    path = file_of(tmp_path / "weights.pt", HIDING_PLACES[place](payload, weights))
    said = refused(path)  # also checks that the payload's file is not there
    if "bare" not in place:
        assert f"it would call {CALLED[how]}, and a checkpoint needs only tensors" in said
    # The payload works: an unrestricted load runs it.
    torch.load(path, weights_only=False) if "bare" not in place else pickle.loads(path.read_bytes())
    assert (tmp_path / "made-by-the-payload").exists()


# --- Files -----------------------------------------------------------------------------------------------------------

HEADER = (
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}'
)

FILES = {
    "empty": (b"", "is empty: 0 bytes"),
    "zeros": (bytes(5000), "is empty: 5000 bytes, all zero"),
    "random": (random.Random(0).randbytes(5000), "neither a safetensors nor a PyTorch file"),
    "text": (b"hello, I am a checkpoint", "neither"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
    "page": (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 2\n", "is a pointer of Git LFS"),
    "list": (bytes_of([1, 2]), "holds a list, not weights by name"),
    "tensor": (bytes_of(torch.ones(3)), "holds a Tensor, not weights by name"),
    "nothing": (bytes_of({}), "holds no weights of a DiT"),
    "another model": (bytes_of({"conv.weight": torch.ones(3)}), "holds no weights of a DiT; its names are conv.weight"),
    "overlap": (struct.pack("<Q", len(HEADER)) + HEADER + bytes(24), "damaged safetensors"),
    "2^63 header": (struct.pack("<Q", 2**63) + b"{" + bytes(100), "damaged safetensors"),
    "long header": (struct.pack("<Q", 90_000_000) + b"{" + bytes(100), "damaged safetensors"),
    "deep header": (struct.pack("<Q", 100_000) + b'{"a":' * 20_000, "damaged safetensors"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoint(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    content, words = FILES[name]
    assert words in refused(file_of(tmp_path / "weights.pt", content))


def test_no_file_and_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "There is no file" in refused(tmp_path / "deep" / "nothing.pt")
    assert f"There is no folder {tmp_path / 'deep' / 'nothing'}." in refused(tmp_path / "deep" / "nothing")
    (tmp_path / "folder").mkdir()
    assert "has no model_index.json" in refused(tmp_path / "folder")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_truncated_files(
    kind: str, share: float, weights: dict[str, Tensor], refused: Callable[..., str], tmp_path: Path
) -> None:
    zipped = kind == "zip"
    content = save(weights) if kind == "safetensors" else bytes_of(weights, _use_new_zipfile_serialization=zipped)
    assert "damaged" in refused(file_of(tmp_path / "weights.pt", content[: int(share * len(content))]))


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_named(
    weights: dict[str, Tensor], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"

    def said(changes: dict[str, Tensor], without: str = "…") -> str:
        kept = {name: tensor for name, tensor in {**weights, **changes}.items() if without not in name}
        save_file(kept, path)
        return refused(path)

    line = said({}, without="blocks.1.attn.proj.bias")
    assert "1 weight is missing: blocks.1.attn.proj.bias" in line
    line = said({f"extra.{index:02}": torch.ones(1) for index in range(12)})
    assert "12 weights are unexpected: extra.00, extra.01" in line
    assert "extra.09" in line
    assert "extra.10" not in line
    line = said({"blocks.0.mlp.fc2.bias": torch.ones(7)})
    assert "blocks.0.mlp.fc2.bias" in line
    assert "is [7] and should be [32]" in line
    assert "the weight 'x_embedder" not in said({}, without="t_embedder.mlp.0.weight")
    assert "t_embedder.mlp.0.weight" in said({}, without="t_embedder.mlp.0.weight")
    assert "unexpected shape" in said({"x_embedder.proj.weight": torch.ones(32, 16)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(
    value: float, weights: dict[str, Tensor], refused: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("blocks.1.mlp.fc1.weight", "final_layer.linear.bias"):
        weights[name].view(-1)[3] = value
    weights["final_layer.linear.bias"][4] = -value
    torch.save(weights, tmp_path / "weights.pt")
    assert "2 weights have NaN or infinite numbers: blocks.1.mlp.fc1.weight, final_layer.linear.bias" in refused(
        tmp_path / "weights.pt"
    )


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(32, dtype=torch.int64),
        torch.ones(32, dtype=torch.complex64),
        torch.ones(32).to_sparse(),
        torch.ones(32).to(torch.float8_e4m3fn),
        torch.ones(32, device="meta"),
        torch.ones(1).expand(10**9),
        "a string",
        None,
    ],
    ids=["int64", "complex", "sparse", "float8", "meta", "expanded", "string", "none"],
)
def test_weights_of_an_odd_kind(
    odd: Any, weights: dict[str, Tensor], refused: Callable[..., str], tmp_path: Path
) -> None:
    torch.save({**weights, "x_embedder.proj.bias": odd}, tmp_path / "weights.pt")
    assert "x_embedder.proj.bias" in refused(tmp_path / "weights.pt")


def test_other_trainers_checkpoints_tell_their_key(
    weights: dict[str, Tensor], convert: Convert, refused: Callable[..., str], tmp_path: Path
) -> None:
    def prefixed(*prefixes: str) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for prefix in prefixes for name, tensor in weights.items()}

    path = tmp_path / "epoch=3.ckpt"
    lightning = {"pytorch-lightning_version": "2.5", "epoch": 3, "optimizer_states": []}
    for content, maker, key in (
        ({**lightning, "state_dict": prefixed("model.")}, "Lightning's", "state_dict"),
        ({**lightning, "state_dict": prefixed("ema.", "model.")}, "Lightning's", "state_dict.ema"),
        ({"step": 3, "net_state": weights}, "another trainer's", "net_state"),
    ):
        torch.save(content, path)
        said = refused(path, "--overwrite")
        assert maker in said
        assert f"--weights {key} " in said
        status, said = convert(path, "--weights", key, "--overwrite")
        assert status == 0, said


def test_a_lora_adapter_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    content = {f"base_model.model.blocks.0.attn.qkv.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save_file(content, tmp_path / "adapter_model.safetensors")
    said = refused(tmp_path / "adapter_model.safetensors")
    assert "is a LoRA adapter" in said
    assert f"pipe.load_adapters('{tmp_path}')" in said


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../weights.pt", "/etc/hostname", "deep/a.safetensors", "..", ""])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_shard_outside_its_folder_is_not_opened(
    where: str,
    name: str,
    make_model: MakeModel,
    weights: dict[str, Tensor],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    torch.save(weights, tmp_path / "weights.pt")
    folder = tmp_path / "pipeline" / "transformer"
    DiTPipeline.from_pretrained("dit-toy-shapes").save_pretrained(tmp_path / "pipeline")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"x_embedder.proj.bias": name}}))
    assert "which is not a file of its folder" in refused(index if where == "file" else tmp_path / "pipeline")


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
    "no transformer": (lambda folder: (folder / "transformer").rename(folder / "other"), "has no folder transformer"),
    "no config": (lambda folder: (folder / "transformer" / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "transformer" / "model.safetensors").unlink(), "model.safetensors"),
    "index not JSON": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is damaged"),
    "index a list": (lambda folder: (folder / "model_index.json").write_text("[1]"), "model_index.json is damaged"),
    "config not JSON": (lambda folder: (folder / "transformer" / "config.json").write_text("{,"), "config.json"),
    "shard index not JSON": (
        lambda folder: (folder / "transformer" / "model.safetensors").rename(
            folder / "transformer" / "model.safetensors.index.json"
        ),
        "is no index of a sharded checkpoint",
    ),
    "origin damaged": (lambda folder: (folder / "origin.json").write_text('{"x": 1}'), "origin.json is damaged"),
    "weights a folder": (
        lambda folder: ((folder / "transformer" / "model.safetensors").unlink(),
                        (folder / "transformer" / "model.safetensors").mkdir()),
        "model.safetensors",
    ),
    "weights truncated": (
        lambda folder: os.truncate(folder / "transformer" / "model.safetensors", 1000),
        "transformer are damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_broken_folders(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    DiTPipeline.from_pretrained("dit-toy-shapes").save_pretrained(tmp_path / "pipeline")
    break_it, words = BROKEN_FOLDERS[name]
    break_it(tmp_path / "pipeline")
    assert words in refused(tmp_path / "pipeline")


def test_folders_whose_json_files_say_something_else(convert: Convert, tmp_path: Path) -> None:
    """Each value of each file in turn, replaced by an odd one."""
    source = tmp_path / "pipeline"
    DiTPipeline.from_pretrained("dit-toy-shapes").save_pretrained(source)
    odd = [None, -1, 1.5, "x", [], {}, 2**70, "../.."]
    count = 0
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        sound = (source / name).read_text()
        for key in json.loads(sound):
            value = odd[(count := count + 1) % len(odd)]
            (source / name).write_text(json.dumps({**json.loads(sound), key: value}))
            status, said = convert(source, "--overwrite")
            assert status == 0 or (said.startswith("error: ") and said.count("\n") == 1), (name, key, value, said)
        (source / name).write_text(sound)
    assert convert(source, "--overwrite")[0] == 0


# --- The disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["dit-hub", "official", "diffusers"])
@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_a_full_disk_leaves_nothing(to: str, limit: int, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(hidden_size=64, num_classes=1000, timestep_freq_dim=256, mlp_norm_eps=1e-6)
    torch.save(to_official(model.state_dict(), model.config), tmp_path / "weights.pt")
    target = tmp_path / "out"
    arguments = ("--to", to, "--num-attention-heads", 4, "--vae", "none")
    run = dit_hub("convert", tmp_path / "weights.pt", target, *arguments, cwd=tmp_path, file_limit=limit)
    assert run.returncode == 2, run.stderr
    assert run.stderr.strip() == f"error: {target} could not be written: the disk is full or a limit is reached."
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


# --- Many ------------------------------------------------------------------------------------------------------------


def damaged(content: bytes, dice: random.Random) -> bytes:
    """A copy damaged in one to three random places, most of them near the start or the end, where the structure is."""
    injured = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        size = len(injured)
        place = dice.choice([dice.randrange(min(size, 12)), dice.randrange(min(size, 3000)),
                             max(0, size - 1 - dice.randrange(3000)), dice.randrange(size)])  # fmt: skip
        length = dice.choice([1, 1, 4, 64, 1000])
        injury = dice.randrange(6)
        if injury == 0:
            injured[place] ^= 1 << dice.randrange(8)
        elif injury == 1:
            injured[place : place + length] = dice.randbytes(length)
        elif injury == 2:
            injured[place : place + length] = bytes(length)
        elif injury == 3:
            del injured[place : place + length]
        elif injury == 4:
            injured[place:place] = dice.randbytes(length)
        else:
            del injured[max(place, 1) :]
        if not injured:
            return b""
    return bytes(injured)


def repacked(content: bytes, dice: random.Random) -> bytes:
    """A PyTorch file with a damaged pickle in a sound archive: zip's checksums would detect the damage first."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            part = source.read(name)
            archive.writestr(name, damaged(part, dice) if name.endswith("data.pkl") else part)
    return target.getvalue()


def edited_header(content: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header is valid JSON with other content."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = dice.choice([name for name in header if name != "__metadata__"])
    odd = dice.choice([-1, 0, 1, 2**31, 2**63, 2**64, 1.5, "x", None, [], {}])
    what = dice.randrange(5)
    if what == 0:
        header[name]["shape"] = dice.choice([odd, [odd], [odd, 2], [2**62, 4]])
    elif what == 1:
        header[name]["data_offsets"] = dice.choice([odd, [odd, 5], [5, odd], [0, 2**40]])
    elif what == 2:
        header[name]["dtype"] = dice.choice([odd, "I8", "F64", "BOOL", "F8_E4M3"])
    elif what == 3:
        header[dice.choice(["", name + "x", "\x00", "é" * 1000])] = header.pop(name)
    else:
        header[name] = odd
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_hundreds_of_damaged_files(weights: dict[str, Tensor], convert: Convert, tmp_path: Path) -> None:
    """400 damaged files: each is refused in one line, or loads as a model if the damage hits only numbers."""
    training = {"model": weights, "ema": weights, "opt": {"state": {}}, "args": None}
    zipped, trained = bytes_of(weights), bytes_of(training)
    old, tensors = bytes_of(weights, _use_new_zipfile_serialization=False), save(weights)
    injuries: list[tuple[bytes, Callable[[bytes, random.Random], bytes]]] = [
        (zipped, damaged), (trained, repacked), (zipped, repacked), (old, damaged), (tensors, damaged),
        (tensors, edited_header), (trained, damaged), (zipped, repacked),
    ]  # fmt: skip
    path, sound = tmp_path / "weights.pt", 0
    for seed in range(400):
        content, injure = injuries[seed % len(injuries)]
        path.write_bytes(injure(content, random.Random(seed)))
        status, said = convert(path, "--overwrite")
        assert status in (0, 2), (seed, said)
        if status == 2:
            assert said.startswith("error: "), (seed, said)
            assert said.count("\n") == 1, (seed, said)
            assert len(said) < 1200, (seed, said)
        elif (tmp_path / "out" / "converted" / "model_index.json").is_file():
            sound += 1
        left = {entry.name for entry in (tmp_path / "out").iterdir()} if (tmp_path / "out").is_dir() else set()
        assert left <= {"converted"}, (seed, left)
        assert {entry.name for entry in tmp_path.iterdir()} <= {"weights.pt", "out"}, seed
    assert 0 < sound < 100  # most damage is detected
