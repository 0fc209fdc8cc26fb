"""What training regresses, as pure functions of tensors of any shape (N, ...)."""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from torch import Tensor

# A network that predicts from noisy data (N, ...) and timesteps (N,), under any further named arguments.
Denoiser = Callable[..., Tensor]


def noise_prediction(
    denoiser: Denoiser,
    scheduler: DDPMScheduler,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """L_simple: the mean squared error of the predicted noise (Ho et al. 2020, equation 14).

    Args:
        denoiser: predicts the noise.
        scheduler: gives the noise levels.
        clean: data (N, ...).
        noise: standard normal (N, ...).
        timestep: integers (N,) below `scheduler.config.num_train_timesteps`.
        conditions: passed on to the denoiser.

    Returns:
        The loss of each sample, (N,).
    """
    # q(x_t | x_0): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (equation 4)
    noisy = scheduler.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
    prediction = denoiser(noisy, timestep, **conditions)
    return (prediction - noise).square().flatten(1).mean(dim=1)


def uniform_timesteps(count: int, scheduler: DDPMScheduler, device: torch.device | str = "cpu") -> Tensor:
    """(count,) timesteps, each equally likely."""
    return torch.randint(0, scheduler.config["num_train_timesteps"], (count,), device=device)
