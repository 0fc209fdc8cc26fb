"""The layout of diffusers' `DiTTransformer2DModel`: one table of names, used in both directions.

diffusers splits query, key and value, and stores a copy of the timestep and label embedders in every block.
"""

from typing import Any

import torch
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig

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


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The arguments of `DiTTransformer2DModel` for a model of ours.

    Raises:
        ValueError: diffusers' class cannot express this model.
    """
    fixed = {"conditioning": "adaln_zero", "pos_embed": "sincos", "timestep_freq_dim": 256, "mlp_ratio": 4}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"diffusers' DiT has {name} {value!r} only, not {getattr(config, name)!r}.")
    if config.null_class is None or not isinstance(config.sample_size, int):
        raise ValueError("diffusers' DiT always has a null class and a square input.")
    return {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.hidden_size // config.num_attention_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_hidden_layers,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm_eps,
    }


def to_diffusers(state_dict: dict[str, Tensor], num_hidden_layers: int) -> dict[str, Tensor]:
    """Weights of a model of ours -> those of `DiTTransformer2DModel`; the values stay as they are."""
    converted = {}
    for kind in ("weight", "bias"):
        for ours, theirs in _numbered(_RENAMED, num_hidden_layers):
            _copy(state_dict, f"{ours}.{kind}", converted, f"{theirs}.{kind}")
        for ours, parts in _numbered(_SPLIT, num_hidden_layers):
            for part, tensor in zip(parts, state_dict[f"{ours}.{kind}"].chunk(3), strict=True):
                converted[f"{part}.{kind}"] = tensor.contiguous()
        for ours, theirs in _COPIED.items():
            for block in range(num_hidden_layers):
                _copy(state_dict, f"{ours}.{kind}", converted, f"{theirs}.{kind}".replace("{N}", str(block)))
    return converted


def from_diffusers(state_dict: dict[str, Tensor], num_hidden_layers: int) -> dict[str, Tensor]:
    """Weights of a `DiTTransformer2DModel` -> those of a model of ours; the values stay as they are.

    Raises:
        ValueError: the copies of an embedder differ between blocks.
    """
    converted = {}
    for kind in ("weight", "bias"):
        for ours, theirs in _numbered(_RENAMED, num_hidden_layers):
            _copy(state_dict, f"{theirs}.{kind}", converted, f"{ours}.{kind}")
        for ours, parts in _numbered(_SPLIT, num_hidden_layers):
            converted[f"{ours}.{kind}"] = torch.cat([state_dict[f"{part}.{kind}"] for part in parts])
        for ours, theirs in _COPIED.items():
            copies = [f"{theirs}.{kind}".replace("{N}", str(block)) for block in range(num_hidden_layers)]
            for copy in copies:
                if copy in state_dict and not torch.equal(state_dict[copy], state_dict[copies[0]]):
                    raise ValueError(f"{copy} differs from {copies[0]}: the embedders of the blocks must be equal.")
            _copy(state_dict, copies[0], converted, f"{ours}.{kind}")
    return converted


def _numbered(table: dict[str, Any], num_hidden_layers: int) -> list[tuple[str, Any]]:
    """The rows of a table, those of blocks once for every block."""

    def numbered(name: Any, block: int) -> Any:
        if isinstance(name, tuple):
            return tuple(numbered(part, block) for part in name)
        return name.replace("{N}", str(block))

    rows = []
    for ours, theirs in table.items():
        blocks = range(num_hidden_layers) if "{N}" in ours else range(1)
        rows.extend((numbered(ours, block), numbered(theirs, block)) for block in blocks)
    return rows


def _copy(source: dict[str, Tensor], name: str, target: dict[str, Tensor], new_name: str) -> None:
    if name in source or not name.endswith(".bias"):  # an embedding table has no bias
        target[new_name] = source[name]
