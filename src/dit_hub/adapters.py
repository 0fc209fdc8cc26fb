"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: put in, merged, and kept as files of their own."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .extras import require
from .modeling_dit import DiTTransformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# The linear layers of attention and MLP, and the table of classes, which has rows of its own for own classes.
_TARGETS = r"blocks\..*\.(qkv|proj|fc1|fc2)"
_TABLE = "y_embedder"


def add_adapters(model: DiTTransformer, rank: int) -> DiTTransformer:
    """Put adapters of a rank into the blocks and freeze all else but the table of classes; they change nothing yet."""
    peft = require("peft", "train")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or name.startswith(_TABLE)
    return model


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights they adapt, and take them out."""
    layers = require("peft.tuners.tuners_utils", "train")
    for name, module in list(model.named_modules()):
        if isinstance(module, layers.BaseTunerLayer):
            adapted: Any = module
            adapted.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapted.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers' own note of what `add_adapter` put in
        vars(model).update(_hf_peft_config_loaded=False, peft_config={})


def save_adapters(model: nn.Module, rank: int, base: str, id2label: dict[int, str], folder: Path) -> None:
    """Write the adapters and the table of classes.

    Args:
        model: one with adapters in it.
        rank: of the adapters.
        base: the pipeline they belong to: a folder or Hub id.
        id2label: names of the classes.
        folder: gets adapter_config.json, as peft writes it with `id2label` added, and adapter_model.safetensors.
    """
    peft = require("peft", "train")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS, base_model_name_or_path=base)
    config.save_pretrained(folder)
    facts = json.loads((folder / CONFIG_FILE).read_text()) | {"id2label": id2label}
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    tensors = {name: weight for name, weight in model.state_dict().items() if "lora_" in name or _TABLE in name}
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, folder / WEIGHTS_FILE)


def load_adapters(model: DiTTransformer, folder: str | os.PathLike) -> dict[int, str]:
    """Merge the adapters of a folder of `save_adapters` into a model, whose table of classes becomes theirs.

    Returns:
        The names of the classes.

    Raises:
        ValueError: the folder holds no adapters, damaged ones, or those of another model; the model is as it was.
        ImportError: peft is missing.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text())
        rank, id2label = int(facts["r"]), {int(index): name for index, name in facts["id2label"].items()}
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no adapters: it takes {CONFIG_FILE} and {WEIGHTS_FILE}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"The adapters of {folder} are damaged: {error}.") from None
    _check_shapes(model, tensors, rank, folder)
    if id2label and len(id2label) != model.config.num_classes:
        model.resize_class_labels(len(id2label))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    add_adapters(model, rank)
    model.load_state_dict(tensors, strict=False)
    merge_adapters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trained[name]
    return id2label


def _check_shapes(model: DiTTransformer, tensors: dict[str, Tensor], rank: int, folder: Path) -> None:
    """Raise ValueError where the adapters are not made for the model."""
    weights = dict(model.named_parameters())
    expected = {}
    for name, weight in weights.items():
        if re.fullmatch(_TARGETS, layer := name.removesuffix(".weight")) and name.endswith(".weight"):
            rows, columns = weight.shape
            expected[f"{layer}.lora_A.default.weight"] = (rank, columns)
            expected[f"{layer}.lora_B.default.weight"] = (rows, rank)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith(_TABLE)}
    table = {name: tensor for name, tensor in tensors.items() if name.startswith(_TABLE)}
    fits = all(name in weights and tensor.shape[1:] == weights[name].shape[1:] for name, tensor in table.items())
    if found != expected or not fits:
        raise ValueError(f"The adapters of {folder} are of another model than this one.")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"The adapters of {folder} hold values that are not finite.")
