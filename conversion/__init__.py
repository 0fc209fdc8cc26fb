"""Foreign checkpoints to ours and back. `DiTPipeline.from_single_file` and `pipelines.convert` use it."""

from .diffusers_layout import diffusers_config, from_diffusers, to_diffusers
from .official import config_from_official, to_official
from .origin import Origin, read_origin
from .reading import Checkpoint, read_checkpoint
from .single_file import load_single_file

__all__ = [
    "Checkpoint",
    "Origin",
    "config_from_official",
    "diffusers_config",
    "from_diffusers",
    "load_single_file",
    "read_checkpoint",
    "read_origin",
    "to_diffusers",
    "to_official",
]
