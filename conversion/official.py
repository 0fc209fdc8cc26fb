"""The official layout: its weights are named as ours, and the config is read from their names and shapes."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from dit_hub.configuration_dit import PUBLISHED_HEADS, DiTConfig
from dit_hub.layers import sincos_positions

# In official state dicts, and in our models where it is learned.
POS_EMBED = "pos_embed"

# Modulation vectors per block -> conditioning. Blocks without any attend to the condition or get it as tokens.
_CONDITIONINGS = {6: "adaln_zero", 4: "adaln"}


def config_from_official(
    state_dict: dict[str, Tensor], num_attention_heads: int | None = None, **overrides: Any
) -> DiTConfig:
    """The configuration of a model, from the names and shapes of its official weights.

    Args:
        state_dict: official names. Without `pos_embed` the grid is unknown, and `sample_size` must be given.
        num_attention_heads: heads leave no trace in shapes; None means those of the published model of this width.
        overrides: fields of `DiTConfig` that the weights do not show, or that take precedence. `num_classes` also says
            whether the last row of the label table is a class or the null class.

    Raises:
        ValueError: a missing or misshapen weight, or a field that neither the weights nor a published model show.
    """
    try:
        fields = _visible(state_dict, overrides)
    except KeyError as error:
        raise ValueError(f"This is no DiT checkpoint: the weight {error} is missing.") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"This is no DiT checkpoint: a weight has an unexpected shape ({error}).") from None
    width = fields["hidden_size"]
    heads = PUBLISHED_HEADS.get(width) if num_attention_heads is None else num_attention_heads
    if heads is None:
        raise ValueError(f"No published model is {width} wide, so the number of attention heads cannot be known; "
                         "give --num-attention-heads (num_attention_heads= in Python).")  # fmt: skip
    if fields["sample_size"] is None:
        raise ValueError("The weights have no pos_embed, so the input size cannot be known; give --sample-size, in "
                         "latent pixels (sample_size= in Python): 32 for 256x256 images, 64 for 512x512.")  # fmt: skip
    return DiTConfig(**{**fields, "num_attention_heads": heads, **overrides})


def _visible(state_dict: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of `DiTConfig` that names and shapes show."""
    width, in_channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
    numbers = {int(found[1]) for name in state_dict if (found := re.match(r"blocks\.(\d+)\.", name))}
    modulation = state_dict.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is not None:
        conditioning = _CONDITIONINGS.get(modulation.shape[0] // width, "adaln_zero")
    else:
        conditioning = "cross_attention" if "blocks.0.cross_attn.q.weight" in state_dict else "in_context"
    fields = {
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": width,
        "num_hidden_layers": len(numbers),
        "mlp_ratio": state_dict["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": state_dict["final_layer.linear.weight"].shape[0] == patch**2 * in_channels * 2,
        "timestep_freq_dim": state_dict["t_embedder.mlp.0.weight"].shape[1],
        "conditioning": conditioning,
    }
    return {**fields, **_classes(state_dict, overrides), **_positions(state_dict, width, patch, overrides)}


def _classes(state_dict: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    """The number of classes, and no dropout where there is no null class; officially it is the table's last row."""
    if "y_embedder.embedding_table.weight" not in state_dict:
        return {"num_classes": 0}
    rows = state_dict["y_embedder.embedding_table.weight"].shape[0]
    # 1000 rows are ImageNet's classes; 999 classes and a null class do not occur in practice.
    num_classes = overrides.get("num_classes", rows if rows in (1, 1000) else rows - 1)
    return {"num_classes": num_classes, **({"class_dropout_prob": 0.0} if num_classes == rows else {})}


def _positions(state_dict: dict[str, Tensor], width: int, patch: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The input size, and whether the positions are the fixed table or learned."""
    if POS_EMBED not in state_dict:
        return {"sample_size": overrides.get("sample_size")}
    table = state_dict[POS_EMBED]
    _, tokens, _ = table.shape
    side = math.isqrt(tokens)
    size = overrides.get("sample_size", side * patch if side * side == tokens else None)
    if size is None:
        return {"sample_size": None}
    height, width_in_pixels = (size, size) if isinstance(size, int) else size
    fixed = sincos_positions(height // patch, width_in_pixels // patch, width) if width % 4 == 0 else None
    return {"sample_size": size, "pos_embed": "sincos" if fixed is not None and _equal(table, fixed) else "learned"}


def _equal(table: Tensor, fixed: Tensor) -> bool:
    """Whether tables are equal up to the dtype one was stored in, and an ulp of another machine's sine."""
    tolerance = max(1e-6, torch.finfo(table.dtype).eps)
    return table.shape == fixed.shape and torch.allclose(table.float(), fixed, rtol=0.0, atol=tolerance)


def check_official(config: DiTConfig) -> None:
    """Raise ValueError for a model that the official code, or SiT's, would compute differently or not at all."""
    fixed = {"conditioning": "adaln_zero", "timestep_freq_shift": 0, "norm_eps": 1e-6, "mlp_norm_eps": None}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"The official code has {name} {value!r} only, not {getattr(config, name)!r}.")


def to_official(state_dict: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Weights of a model of ours -> an official state dict, with its fixed position table."""
    if config.pos_embed == "learned":
        return dict(state_dict)
    height, width = (side // config.patch_size for side in config.sample_height_width)
    dtype = state_dict["x_embedder.proj.weight"].dtype
    return {POS_EMBED: sincos_positions(height, width, config.hidden_size).to(dtype), **state_dict}
