"""The official layout, which is ours: only the config has to be read off the names and shapes."""

import math
from typing import Any

from torch import Tensor

from dit_hub.configuration_dit import PUBLISHED_HEADS, DiTConfig

# In official state dicts, and in our models where it is learned.
POS_EMBED = "pos_embed"


def config_from_official(
    state_dict: dict[str, Tensor], num_attention_heads: int | None = None, **overrides: Any
) -> DiTConfig:
    """The configuration of a model, from the names and shapes of its official weights.

    Args:
        state_dict: official names; `pos_embed` is needed to know the grid, and assumed to be the fixed sin-cos table.
        num_attention_heads: heads leave no trace in shapes; None takes those of the published model of this width.
        overrides: fields of `DiTConfig` that cannot be seen, or are known better.

    Raises:
        ValueError: a missing weight, or a width that no published model has and no `num_attention_heads` given.
    """
    try:
        width, in_channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
        out_features = state_dict["final_layer.linear.weight"].shape[0]
        grid = math.isqrt(state_dict[POS_EMBED].shape[1])
        rows = state_dict["y_embedder.embedding_table.weight"].shape[0]
        freq_dim = state_dict["t_embedder.mlp.0.weight"].shape[1]
        mlp_width = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"This is no official DiT checkpoint: the weight {error} is missing.") from None
    heads = num_attention_heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise ValueError(f"No published model is {width} wide, so the number of attention heads must be given.")
    fields = {
        "sample_size": grid * patch,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
        "num_attention_heads": heads,
        "mlp_ratio": mlp_width / width,
        "num_classes": rows - 1,  # the last row is the null class
        "learn_sigma": out_features == patch**2 * in_channels * 2,
        "timestep_freq_dim": freq_dim,
    }
    return DiTConfig(**{**fields, **overrides})
