"""A model from one checkpoint file of any family."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from dit_hub.modeling_dit import DiTTransformer

from .diffusers_layout import DIFFUSERS_NUMERICS, from_diffusers, is_diffusers
from .official import POS_EMBED, config_from_official
from .origin import Origin, official_export, origin_of_file
from .reading import Checkpoint, read_checkpoint

logger = logging.getLogger(__name__)

FAMILIES = ("dit", "sit")

# Heads that only training uses (REPA's projections onto other features).
_TRAINING_ONLY = re.compile(r"^projectors\.")


def load_single_file(
    path: str | os.PathLike,
    weights: str | None = None,
    family: str | None = None,
    num_attention_heads: int | None = None,
    **overrides: Any,
) -> tuple[DiTTransformer, Origin]:
    """Load a checkpoint that has no configuration: a released or a training one, in official or diffusers' names.

    Args:
        path: see `read_checkpoint`.
        weights: see `read_checkpoint`.
        family: "dit" or "sit", which name their weights alike but differ in time and sign. None means SiT if the
            training script's arguments or the file's name say so.
        num_attention_heads: see `config_from_official`.
        overrides: fields of `DiTConfig`.

    Returns:
        The model, in evaluation mode and the dtype of the file, and its origin.

    Raises:
        ValueError: see `read_checkpoint` and `config_from_official`; weights that do not fit; a SiT that was not
            trained on the velocity of the linear path.
    """
    checkpoint = read_checkpoint(path, weights)
    overrides = {**official_export(path).get("config", {}), **overrides}
    heads_beside = overrides.pop("num_attention_heads", None)
    heads = heads_beside if num_attention_heads is None else num_attention_heads
    family = family or ("sit" if overrides.get("parameterization") == "sit" else _family(checkpoint))
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}.")
    if family == "sit":
        _check_sit(checkpoint)
        overrides = {"parameterization": "sit", **overrides}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not _TRAINING_ONLY.match(name)}
    if dropped := len(checkpoint.tensors) - len(tensors):
        logger.warning("%s: left out %d weights of heads that only training uses.", path, dropped)
    layout = "official"
    try:
        if is_diffusers(tensors):
            layout, tensors = "diffusers", from_diffusers(tensors)
            overrides = {**DIFFUSERS_NUMERICS, **overrides}
        config = config_from_official(tensors, heads, **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config.pos_embed == "sincos":
        tensors.pop(POS_EMBED, None)
    model = DiTTransformer.from_state_dict(config, tensors, name=str(path))
    origin = origin_of_file(Path(path), "sit" if family == "sit" else layout, checkpoint.weights, checkpoint.arguments)
    return model, origin


def _family(checkpoint: Checkpoint) -> str:
    trained_as = str(checkpoint.arguments.get("model", ""))
    if trained_as:
        return "sit" if trained_as.startswith("SiT") else "dit"
    return "sit" if re.search(r"(?i)(?<![a-z])sit(?![a-z])", checkpoint.path.name) else "dit"


def _check_sit(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless a SiT predicts the velocity of the linear path, which flow-matching schedulers need."""
    for name, expected in (("path_type", ("linear",)), ("prediction", ("velocity", "v"))):  # "v" is REPA's word
        value = str(checkpoint.arguments.get(name, expected[0]))
        if value.lower() not in expected:
            raise ValueError(f"{checkpoint.path}: this SiT was trained with {name} {value!r}; only {expected[0]!r} "
                             "maps to a flow-matching scheduler.")  # fmt: skip
