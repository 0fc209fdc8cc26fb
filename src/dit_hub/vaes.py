"""What diffusers' autoencoders differ in: pixels per latent pixel, the scale of latents, the range of images."""

from typing import Any

import torch
from torch import Tensor


def spatial_compression(vae: Any) -> int:
    """Pixels per latent pixel along a side: 8 for Stable Diffusion's VAE, 32 for DC-AE; 1 for None, without a VAE."""
    if vae is None:
        return 1
    for name in ("spatial_compression_ratio", "decoder_patch_size"):  # of DC-AE and most later ones; of RAE
        if (factor := getattr(vae, name, None)) is not None:
            return int(factor)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """(N, C, H, W) latents, as a model was trained on them -> (N, 3, height, width) images in -1..1, in `vae.dtype`.

    Scale and shift are the config's: `latents_mean` and `latents_std` where it has them, as SDXL's may.
    """
    config = vae.config
    if hasattr(vae, "decoder_patch_size"):  # RAE scales latents itself, and its images are in 0..1
        return vae.decode(latents.to(_execution_device(vae), vae.dtype)).sample * 2 - 1
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    latents = latents / config.scaling_factor
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
    else:
        latents = latents + (getattr(config, "shift_factor", None) or 0.0)
    return vae.decode(latents.to(_execution_device(vae), vae.dtype)).sample


def _execution_device(vae: Any) -> torch.device:
    """Where an autoencoder computes: where accelerate's hooks, which offload it, move its weights to."""
    for module in vae.modules() if hasattr(vae, "modules") else ():  # exports have none
        if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
            return torch.device(device)
    return vae.device
