"""The layout of diffusers' `DiTTransformer2DModel`: one table of names, used in both directions.

diffusers splits query, key and value, and stores a copy of the timestep and label embedders in every block.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.modeling_dit import DiTTransformer

from .official import POS_EMBED
from .reading import read_checkpoint

# The first and the present name of diffusers' class.
DIFFUSERS_CLASSES = ("Transformer2DModel", "DiTTransformer2DModel")

# Repositories in this layout that hold official weights, which need official numerics.
OFFICIAL_WEIGHTS = ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512")

# The fields of `DiTConfig` in which diffusers' class differs from the official code: the frequencies of the timestep
# (12.8 % of the output of a model with random weights), and one epsilon.
DIFFUSERS_NUMERICS = {"timestep_freq_shift": 1.0, "norm_eps": 1e-6, "mlp_norm_eps": 1e-5}

# The line that makes a `DiTTransformer2DModel` with official weights compute as the official code does.
OFFICIAL_NUMERICS_PATCH = (
    "for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"
)

# Ours -> diffusers'. {N} is the number of a block.
_RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "blocks.{N}.adaLN_modulation.1": "transformer_blocks.{N}.norm1.linear",
    "blocks.{N}.attn.proj": "transformer_blocks.{N}.attn1.to_out.0",
    "blocks.{N}.mlp.fc1": "transformer_blocks.{N}.ff.net.0.proj",
    "blocks.{N}.mlp.fc2": "transformer_blocks.{N}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_SPLIT = {"blocks.{N}.attn.qkv": tuple(f"transformer_blocks.{{N}}.attn1.to_{part}" for part in "qkv")}
_COPIED = {
    "t_embedder.mlp.0": "transformer_blocks.{N}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{N}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.{N}.norm1.emb.class_embedder.embedding_table",
}


def is_diffusers(state_dict: dict[str, Tensor]) -> bool:
    """Whether the names are those of diffusers' DiT."""
    return "pos_embed.proj.weight" in state_dict


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The arguments of `DiTTransformer2DModel` for a model of ours.

    They do not include `timestep_freq_shift`: diffusers' class always divides by half - 1, so weights trained with the
    official 0 need `OFFICIAL_NUMERICS_PATCH` after loading.

    Raises:
        ValueError: diffusers' class cannot express this model.
    """
    fixed = {
        "conditioning": "adaln_zero",
        "pos_embed": "sincos",
        "timestep_freq_dim": 256,
        "mlp_ratio": 4,
        "norm_eps": 1e-6,
        "parameterization": "diffusion",
    }
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"diffusers' DiT has {name} {value!r} only, not {getattr(config, name)!r}.")
    if config.null_class is None or not isinstance(config.sample_size, int):
        raise ValueError("diffusers' DiT always has a null class and a square input.")
    if config.timestep_freq_shift not in (0, 1):
        raise ValueError(f"diffusers' DiT has timestep_freq_shift 1, not {config.timestep_freq_shift}.")
    return {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.hidden_size // config.num_attention_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_hidden_layers,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps or config.norm_eps,
    }


def config_from_diffusers(fields: dict[str, Any], **overrides: Any) -> DiTConfig:
    """The `DiTConfig` for the config.json of a diffusers DiT.

    Args:
        fields: its content.
        overrides: fields of `DiTConfig`; `timestep_freq_shift` above all.

    Raises:
        ValueError: the model is no DiT.
    """
    name = fields.get("_class_name")
    if name not in DIFFUSERS_CLASSES or fields.get("norm_type") != "ada_norm_zero" or not fields.get("patch_size"):
        raise ValueError(f"The config is of a {name} of norm_type {fields.get('norm_type')!r}, which is no DiT.")
    try:
        in_channels = fields["in_channels"]
        translated = {
            "sample_size": fields["sample_size"],
            "patch_size": fields["patch_size"],
            "in_channels": in_channels,
            "hidden_size": fields["num_attention_heads"] * fields["attention_head_dim"],
            "num_hidden_layers": fields["num_layers"],
            "num_attention_heads": fields["num_attention_heads"],
            "num_classes": fields["num_embeds_ada_norm"],
            "learn_sigma": (fields.get("out_channels") or in_channels) == 2 * in_channels,
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"The config of the {name} is not complete: {error}.") from None
    numerics = {**DIFFUSERS_NUMERICS, "mlp_norm_eps": fields.get("norm_eps", DIFFUSERS_NUMERICS["mlp_norm_eps"])}
    return DiTConfig(**{**translated, **numerics, **overrides})


def load_diffusers_folder(folder: Path, variant: str | None = None, **overrides: Any) -> DiTTransformer:
    """Load the transformer/ folder of a diffusers pipeline as a model of ours.

    Args:
        folder: config.json and weights, .safetensors or .bin, sharded or not.
        variant: part of the weights' file names, such as "fp16".
        overrides: fields of `DiTConfig`.

    Raises:
        ValueError: files that are missing, damaged or not a DiT's; embedders that differ between blocks.
    """
    fields = read_config(folder)
    try:
        config = config_from_diffusers(fields, **overrides)
        checkpoint = read_checkpoint(_weights_file(folder, variant))
        tensors = from_diffusers(checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    tensors.pop(POS_EMBED, None)
    return DiTTransformer.from_state_dict(config, tensors, name=str(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """A component's config.json.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json.") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: it holds no fields.")
    return fields


def _weights_file(folder: Path, variant: str | None) -> Path:
    stem, part = "diffusion_pytorch_model", f".{variant}" if variant else ""
    names = [
        name
        for ending in (".safetensors", ".bin")
        for name in (f"{stem}{part}{ending}", f"{stem}{ending}.index{part}.json", f"{stem}{part}{ending}.index.json")
    ]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"there are no weights named {names[0]} or alike.")
    return found


def to_diffusers(state_dict: dict[str, Tensor], num_hidden_layers: int) -> dict[str, Tensor]:
    """Weights of a model of ours -> those of `DiTTransformer2DModel`, with the same values."""
    converted = {}
    for kind in ("weight", "bias"):
        for ours, theirs in _numbered(_RENAMED, num_hidden_layers):
            converted[f"{theirs}.{kind}"] = state_dict[f"{ours}.{kind}"]
        for ours, parts in _numbered(_SPLIT, num_hidden_layers):
            for part, tensor in zip(parts, state_dict[f"{ours}.{kind}"].chunk(3), strict=True):
                converted[f"{part}.{kind}"] = tensor.contiguous()
        for ours, theirs in _COPIED.items():
            if f"{ours}.{kind}" in state_dict:  # an embedding table has no bias
                for block in range(num_hidden_layers):  # cloned, since safetensors refuses shared tensors
                    converted[f"{theirs}.{kind}".replace("{N}", str(block))] = state_dict[f"{ours}.{kind}"].clone()
    return converted


def from_diffusers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `DiTTransformer2DModel` -> those of a model of ours, with the same values.

    What is missing stays missing, and names that are not in the table are kept.

    Raises:
        ValueError: the copies of an embedder differ between blocks.
    """
    rest, converted = dict(state_dict), {}
    blocks = [int(found[1]) for name in rest if (found := re.match(r"transformer_blocks\.(\d+)\.", name))]
    num_hidden_layers = len(set(blocks))
    for kind in ("weight", "bias"):
        for ours, theirs in _numbered(_RENAMED, num_hidden_layers):
            if f"{theirs}.{kind}" in rest:
                converted[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")
        for ours, parts in _numbered(_SPLIT, num_hidden_layers):
            if all(f"{part}.{kind}" in rest for part in parts):
                converted[f"{ours}.{kind}"] = torch.cat([rest.pop(f"{part}.{kind}") for part in parts])
        for ours, theirs in _COPIED.items():
            names = [f"{theirs}.{kind}".replace("{N}", str(block)) for block in range(num_hidden_layers)]
            copies = {name: rest.pop(name) for name in names if name in rest}
            for name, copy in copies.items():
                if not torch.equal(copy, copies.get(names[0], copy)):
                    raise ValueError(f"{name} differs from {names[0]}: the embedders of the blocks must be equal.")
            if len(copies) == len(names) and names:
                converted[f"{ours}.{kind}"] = copies[names[0]]
    if "pos_embed.pos_embed" in rest:  # older versions saved the fixed table
        converted[POS_EMBED] = rest.pop("pos_embed.pos_embed")
    return {**converted, **rest}


def _numbered(table: dict[str, Any], num_hidden_layers: int) -> list[tuple[str, Any]]:
    """The rows of a table, with those of blocks repeated for every block."""

    def numbered(name: Any, block: int) -> Any:
        if isinstance(name, tuple):
            return tuple(numbered(part, block) for part in name)
        return name.replace("{N}", str(block))

    rows = []
    for ours, theirs in table.items():
        blocks = range(num_hidden_layers) if "{N}" in ours else range(1)
        rows.extend((numbered(ours, block), numbered(theirs, block)) for block in blocks)
    return rows
