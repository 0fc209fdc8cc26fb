"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: added for training, merged, written and read in its format."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .extras import require
from .modeling_dit import DiTTransformer

CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE = "adapter_config.json", "adapter_model.safetensors", "id2label.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE)

# The linear layers of attention and MLP, and the table of classes, which is trained whole, as own classes need rows.
_TARGETS = r"blocks\..*\.(qkv|proj|fc1|fc2)"
_TABLE = "y_embedder"

_PREFIX = "base_model.model."  # of every name in a file of peft


@dataclass(frozen=True)
class Adapters:
    """The content of a folder of adapters.

    Args:
        config: peft's `LoraConfig`, without the modules that are saved whole.
        lora: low-rank matrices by name: "blocks.0.attn.qkv.lora_A.weight".
        table: the table of classes by name, where it was trained.
        id2label: names of the classes; empty where the folder has none.
    """

    config: Any
    lora: dict[str, Tensor]
    table: dict[str, Tensor]
    id2label: dict[int, str]


def add_adapters(model: DiTTransformer, rank: int) -> DiTTransformer:
    """Put adapters of a rank into the blocks and freeze all else but the table of classes; they change nothing yet."""
    peft = require("peft", "train")
    peft.inject_adapter_in_model(_new_config(rank), model)
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
    """Write the adapters and the table of classes as `PeftModel.from_pretrained` reads them.

    Args:
        model: one with adapters in it.
        rank: of the adapters.
        base: the pipeline they belong to: a folder or Hub id.
        id2label: names of the classes, for id2label.json.
        folder: gets adapter_config.json, adapter_model.safetensors and id2label.json.
    """
    config = _new_config(rank, base_model_name_or_path=base, inference_mode=True)
    state = model.state_dict()
    table = [name for name in state if name.startswith(_TABLE)]
    config.modules_to_save = [_TABLE] if table else None
    config.save_pretrained(folder)
    (folder / CLASSES_FILE).write_text(json.dumps(id2label, indent=2) + "\n")
    names = [*table, *(name for name in state if "lora_" in name)]
    tensors = {_PREFIX + name.replace(".default", ""): state[name].contiguous() for name in names}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapters(folder: str | os.PathLike, model: DiTTransformer) -> Adapters:
    """The adapters of a folder that peft or `save_adapters` wrote, also its first versions.

    Raises:
        ValueError: the folder holds no adapters, damaged ones, or those of another model than `model`.
        ImportError: peft is missing.
    """
    folder, peft = Path(folder), require("peft", "train")
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text())
        classes = folder / CLASSES_FILE
        named = json.loads(classes.read_text()) if classes.is_file() else facts.pop("id2label", {})
        id2label = {int(index): str(name) for index, name in named.items()}
        config = peft.LoraConfig(**{**facts, "modules_to_save": None, "inference_mode": True})
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no adapters: it takes {CONFIG_FILE} and {WEIGHTS_FILE}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"The adapters of {folder} are damaged: {error}.") from None
    # The first versions of our files have peft's names in a model: no prefix, but the adapter's name.
    tensors = {name.removeprefix(_PREFIX).replace(".default", ""): tensor for name, tensor in tensors.items()}
    lora = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    table = {name: tensor for name, tensor in tensors.items() if name not in lora}
    _check_shapes(model, lora, table, folder)
    return Adapters(config, lora, table, id2label)


def set_class_table(model: DiTTransformer, table: dict[str, Tensor]) -> None:
    """Give a model another table of classes, with as many rows as it has."""
    for name, tensor in table.items():
        classes = len(tensor) - (model.config.null_class is not None)
        if classes != model.config.num_classes:
            model.resize_class_labels(classes)
        with torch.no_grad():
            model.get_parameter(name).copy_(tensor)


def _new_config(rank: int, **fields: Any) -> Any:
    return require("peft", "train").LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS, **fields)


def _check_shapes(model: DiTTransformer, lora: dict[str, Tensor], table: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError where the adapters are not made for the model."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items() if name.startswith(_TABLE)}
    modules = dict(model.named_modules())
    fits = bool(lora) and all(name in shapes and tensor.shape[1:] == shapes[name][1:] for name, tensor in table.items())
    for name, tensor in lora.items():
        layer, _, kind = name.partition(".lora_")
        fits = fits and layer in modules
        if fits and kind in ("A.weight", "B.weight"):  # a quantised weight has the shape of its packing
            side, features = (1, "in_features") if kind == "A.weight" else (0, "out_features")
            fits = tensor.shape[side] == getattr(modules[layer], features, tensor.shape[side])
    if not fits:
        raise ValueError(f"The adapters of {folder} are of another model than this one.")
    if not all(torch.isfinite(tensor).all() for tensor in (*lora.values(), *table.values())):
        raise ValueError(f"The adapters of {folder} hold values that are not finite.")
