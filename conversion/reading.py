"""Checkpoint files to tensors, without running code that they may hold."""

import argparse
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_hub.checks import listed
from dit_hub.shards import check_shards

# A weight of every DiT, by its official name and by diffusers'.
_ANCHOR = "x_embedder.proj.weight"
_DIFFUSERS_ANCHOR = "pos_embed.proj.weight"

# Wrappers put their name before, or between, the names of what they wrap.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# "….safetensors.index.json", and with a variant "….safetensors.index.fp16.json".
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")

# Parts of the errors of torch's restricted unpickler.
_FOREIGN_CALL = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL|Unsupported class|Can not load) ([\w.]+)")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The keys under which training scripts keep the weights, the preferred first.
_WEIGHT_KEYS = ("ema", "model")


@dataclass
class Checkpoint:
    """Weights, and what a file says of them.

    Args:
        path: the file or folder that was read.
        tensors: by name, without the prefixes of wrappers.
        weights: their key in the file; None if it holds nothing but weights.
        arguments: those of the training script, if the file has them.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike, weights: str | None = None) -> Checkpoint:
    """Read a checkpoint file, or the index of a sharded one.

    PyTorch files are opened with `weights_only`, which builds tensors and plain containers and calls nothing;
    the only class allowed is `argparse.Namespace`, which official training checkpoints hold. Tensors stay on disk until
    they are used.

    Args:
        path: .safetensors, .pt, .pth, .ckpt or .bin, told apart by their content, or `….index.json`.
        weights: key of a training checkpoint, such as "model"; None takes "ema", then "model". Keys of keys are joined
            by dots ("state_dict.ema_model").

    Raises:
        ValueError: no such file, a damaged or unknown one, one that holds code, or one without weights of a DiT.
    """
    path = Path(path)
    if path.is_dir() and (path / "model_index.json").is_file():
        raise ValueError(f"{path} is the folder of a pipeline; load it with DiTPipeline.from_pretrained.")
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder without a model_index.json, so no pipeline; give a checkpoint file in it."
        )
    if _INDEX.search(path.name):
        content: Any = {}
        for shard in check_shards(path):
            content.update(_mapping_in(shard))
    else:
        content = _mapping_in(path)
    tensors, key = _select(content, weights, path)
    arguments = content.get("args")
    return Checkpoint(
        path,
        tensors=_checked(_without_prefixes(tensors, path), path),
        weights=key,
        arguments=vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
    )


def _mapping_in(path: Path) -> Mapping[str, Any]:
    """The content of a file, by name."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if not head.strip(b"\0"):
        raise ValueError(f"{path} is empty: {size} bytes{', all zero' if head else ''}.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`.")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not a checkpoint; the download went wrong.")
    if head[8:9] == b"{":
        try:
            content: Any = load_file(path)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is a damaged safetensors file: {_first_sentence(str(error))}.") from error
    elif path.suffix == ".safetensors":  # torch.load goes by the name
        raise ValueError(f"{path} is not a safetensors file, despite its name; if it is PyTorch's, rename it to .pt.")
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        content = _load_pickle(path, with_mmap=head.startswith(b"PK"))
    else:
        raise ValueError(f"{path} is neither a safetensors nor a PyTorch file.")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name.")
    return content


def _load_pickle(path: Path, with_mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols other than torch's own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=with_mmap)
    except Exception as error:  # a damaged pickle can raise anything
        if found := _FOREIGN_CALL.search(str(error)):
            raise ValueError(
                f"{path} is not opened: it would call {found[1]}, and a checkpoint needs only tensors. "
                "If you trust its origin, save its weights alone, as safetensors."
            ) from None
        reason = re.sub(r"(?s)^.*WeightsUnpickler error:\s*", "", str(error)) or type(error).__name__
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint: {_first_sentence(reason)}.") from None


def _select(content: Mapping[str, Any], weights: str | None, path: Path) -> tuple[Mapping[str, Tensor], str | None]:
    """The weights by name within the content of a file, and their key."""
    if weights is not None:
        return _at(content, weights, path), weights
    if any(isinstance(value, Tensor) for value in content.values()):
        return _tensors(content, path), None
    for key in _WEIGHT_KEYS:
        if isinstance(content.get(key), Mapping):
            return _tensors(content[key], f"{path}, {key}"), key
    holders = [key for key, value in content.items() if isinstance(value, Mapping) and _prefixes(value)]
    if holders:
        maker = "Lightning's" if "pytorch-lightning_version" in content else "another trainer's"
        prefixes = [prefix for prefix in _prefixes(content[holders[0]]) if prefix]
        key = ".".join([holders[0], *([prefixes[0].rstrip(".")] if len(prefixes) > 1 else [])])
        raise ValueError(f"{path} is {maker} checkpoint and keeps its weights under {holders[0]!r}; "
                         f"choose them with --weights {key} (weights={key!r} in Python).")  # fmt: skip
    raise ValueError(f"{path} holds no weights of a DiT; its keys are {listed(sorted(map(str, content)))}.")


def _at(content: Mapping[str, Any], weights: str, path: Path) -> Mapping[str, Tensor]:
    """The weights under a key; its part beyond the last mapping is a prefix of their names."""
    found, rest = content, weights
    while rest:
        key = next((key for key in (rest, rest.split(".")[0]) if isinstance(found.get(key), Mapping)), None)
        if key is None:
            break
        found, rest = found[key], rest[len(key) :].lstrip(".")
    prefix = f"{rest}." if rest else ""
    chosen = {name.removeprefix(prefix): value for name, value in found.items() if str(name).startswith(prefix)}
    if found is content and not chosen:
        raise ValueError(f"{path} has nothing under {weights!r}; its keys are {listed(sorted(map(str, content)))}.")
    return _tensors(chosen, f"{path}, {weights}")


def _tensors(content: Mapping[str, Any], where: Any) -> Mapping[str, Tensor]:
    if not content:
        raise ValueError(f"{where}: there are no weights.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{where}: {str(name)!r} is a {type(value).__name__}, not a weight.")
    return content


def _prefixes(tensors: Mapping[str, Any]) -> list[str]:
    """The prefixes of the names of a DiT, one for each copy of it."""
    anchors = [str(name) for name in tensors if str(name).endswith((_ANCHOR, _DIFFUSERS_ANCHOR))]
    return sorted({name.removesuffix(_ANCHOR).removesuffix(_DIFFUSERS_ANCHOR) for name in anchors})


def _without_prefixes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(names) < len(tensors):
        raise ValueError(f"{path} holds some weights twice, once with and once without a wrapper's prefix.")
    if lora := next((name for name in names if "lora" in name.lower()), None):
        raise ValueError(f"{path} is a LoRA adapter ({lora}), not a whole model; load the model it was made from, "
                         f"then pipe.load_adapters({str(path.parent)!r}).")  # fmt: skip
    prefixes = _prefixes(names)
    if not prefixes:
        raise ValueError(f"{path} holds no weights of a DiT; its names are {listed(sorted(names))}.")
    if len(prefixes) > 1:
        models = ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes)
        raise ValueError(f"{path} holds {len(prefixes)} models, {models}; choose one with --weights.")
    return {name.removeprefix(prefixes[0]): tensor for name, tensor in names.items()}


def _checked(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Dense floating-point tensors of finite numbers, each with its own memory."""
    bad = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, {tensor.layout}; weights are dense floats "
                             "of 16, 32 or 64 bits.")  # fmt: skip
        if tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name} has a shape and no numbers.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # terabytes in a few bytes
            raise ValueError(f"{path} is damaged: {name} claims to be larger than what is stored.")
        # A sum takes a fifth of the time of a look at every number, and is finite if they are, but for rare overflows.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            bad.append(name)
    if bad:
        noun = "weight has" if len(bad) == 1 else "weights have"
        raise ValueError(f"{path}: {len(bad)} {noun} NaN or infinite numbers: {listed(sorted(bad))}.")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _first_sentence(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")[:200]
