"""Foreign checkpoints to ours and back."""

from .diffusers_layout import diffusers_config, from_diffusers, to_diffusers
from .official import config_from_official

__all__ = ["config_from_official", "diffusers_config", "from_diffusers", "to_diffusers"]
