"""Parameters and multiply-accumulates of a model, counted on the model itself, and the paper's figures."""

import time
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from .configuration_dit import DiTConfig
from .modeling_dit import DiTTransformer


class Size(NamedTuple):
    """Size of a model: `parameters`, and `gmacs`, 10^9 multiply-accumulates of a forward pass of one image."""

    parameters: int
    gmacs: float


# From the paper: million parameters, "Gflops" (which are multiply-accumulates), FID-50K after 400K steps.
PUBLISHED = {
    "DiT-S/8": (33, 0.36, 153.60),
    "DiT-S/4": (33, 1.41, 100.41),
    "DiT-S/2": (33, 6.06, 68.40),
    "DiT-B/8": (131, 1.42, 122.74),
    "DiT-B/4": (130, 5.56, 68.38),
    "DiT-B/2": (130, 23.01, 43.47),
    "DiT-L/8": (459, 5.01, 118.87),
    "DiT-L/4": (458, 19.70, 45.64),
    "DiT-L/2": (458, 80.71, 23.33),
    "DiT-XL/8": (676, 7.39, 106.41),
    "DiT-XL/4": (675, 29.05, 43.01),
    "DiT-XL/2": (675, 118.64, 19.47),
}

# The same by conditioning, all DiT-XL/2.
PUBLISHED_CONDITIONINGS = {
    "in_context": (449, 119.37, 35.24),
    "cross_attention": (598, 137.62, 26.14),
    "adaln": (600, 118.56, 25.21),
    "adaln_zero": (675, 118.64, 19.47),
}


def measure(config: DiTConfig) -> Size:
    """The parameters and multiply-accumulates of a configuration, counted without memory for its weights.

    The paper's "Gflops" are multiply-accumulates; a counter of floating-point operations shows twice as many.
    """
    with torch.device("meta"):
        # Written-out attention: the counter does not see inside the fused one on every device.
        model = DiTTransformer._from_config(config, attn_implementation="eager").eval()
        latents = torch.empty(1, config.in_channels, *config.sample_height_width)
        timestep, labels = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, timestep, labels if config.num_classes else None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, counter.get_total_flops() / 2e9)


def matmul_peak(device: torch.device | str, dtype: torch.dtype, side: int, repeats: int = 20) -> float:
    """The best rate of products of two square matrices, in operations per second (two for a multiply-add)."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, side, side, device=device, generator=generator).to(dtype)
    wait = (lambda: None) if left.device.type == "cpu" else torch.accelerator.synchronize
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.matmul(left, right)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
