"""Training objectives, as pure functions of tensors of any shape (N, ...).

Each takes the network, the noise schedule, clean data, noise and timesteps, and returns the loss of each sample, (N,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

# A network that predicts from noisy data (N, ...) and timesteps (N,), with any further keyword arguments.
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
        scheduler: its betas are the noise levels.
        clean: data (N, ...).
        noise: standard normal (N, ...).
        timestep: integers (N,) below `scheduler.config.num_train_timesteps`.
        conditions: further arguments of the denoiser.

    Returns:
        The loss of each sample, (N,).
    """
    noisy = _noisy(scheduler, clean, noise, timestep)
    return mean_square(denoiser(noisy, timestep, **conditions) - noise)


def noise_and_variance(
    denoiser: Denoiser,
    scheduler: DDPMScheduler,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """L_simple plus the variational bound of a learned variance (Nichol and Dhariwal 2021, Section 3.1; the paper's).

    Arguments as for `noise_prediction`; the denoiser returns twice the channels (dimension 1): the noise, then the
    position of the log variance between its bounds, in -1..1. The bound trains only the variance.
    """
    noisy = _noisy(scheduler, clean, noise, timestep)
    predicted, fraction = denoiser(noisy, timestep, **conditions).chunk(2, dim=1)
    bound = variational_bound(scheduler, clean, noisy, timestep, predicted.detach(), fraction)
    return mean_square(predicted - noise) + bound


def variational_bound(
    scheduler: DDPMScheduler, clean: Tensor, noisy: Tensor, timestep: Tensor, predicted: Tensor, fraction: Tensor
) -> Tensor:
    """One term of the variational bound, (N,) in bits per dimension.

    For t > 0 it is the KL divergence between the true posterior and the model's step (Ho et al. 2020, equations 5 to
    7); at t = 0 the negative log-likelihood of data in steps of 1/127.5 (their Section 3.3).

    Args:
        scheduler, clean, timestep: as for `noise_prediction`.
        noisy: the data at `timestep`, (N, ...).
        predicted: the predicted noise (N, ...).
        fraction: (N, ...) in -1..1, from the posterior's log variance to the logarithm of beta (Nichol and Dhariwal,
            equation 15).
    """
    tables = _tables(scheduler, clean.device, torch.float32)

    def at(values: Tensor) -> Tensor:
        return _at(values, timestep, clean)

    clean_weight, noisy_weight = at(tables.clean_weight), at(tables.noisy_weight)
    estimate = (noisy - at(tables.noise_scale) * predicted) / at(tables.signal_scale)
    mean = clean_weight * estimate + noisy_weight * noisy
    true_mean, true_log_variance = clean_weight * clean + noisy_weight * noisy, at(tables.log_variance)
    share = (fraction + 1) / 2
    model_log_variance = share * at(tables.log_beta) + (1 - share) * true_log_variance

    divergence = 0.5 * (
        model_log_variance
        - true_log_variance
        + (true_log_variance - model_log_variance).exp()
        + (true_mean - mean).square() * (-model_log_variance).exp()
        - 1
    )
    negative_log_likelihood = -_log_likelihood(clean, mean, (0.5 * model_log_variance).exp())
    first = (timestep == 0).view(-1, *[1] * (clean.dim() - 1))
    return torch.where(first, negative_log_likelihood, divergence).flatten(1).mean(dim=1) / math.log(2)


def v_prediction(
    denoiser: Denoiser,
    scheduler: DDPMScheduler,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """The mean squared error of v = sqrt(abar) noise - sqrt(1 - abar) data (Salimans and Ho 2022, Section 4).

    Arguments as for `noise_prediction`.
    """
    signal, sigma = noise_levels(scheduler, clean, timestep)
    noisy, target = signal * clean + sigma * noise, signal * noise - sigma * clean
    return mean_square(denoiser(noisy, timestep, **conditions) - target)


def flow_matching(
    denoiser: Denoiser,
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """The mean squared error of the velocity, noise - data, along the straight path (Lipman et al. 2023).

    Arguments as for `noise_prediction`, but `timestep` is a float from 0 (data) to `num_train_timesteps` (noise).
    """
    time = timestep / scheduler.config["num_train_timesteps"]
    time = time.view(-1, *[1] * (clean.dim() - 1))
    noisy = (1 - time) * clean + time * noise
    return mean_square(denoiser(noisy, timestep, **conditions) - (noise - clean))


def min_snr_weight(scheduler: DDPMScheduler, timestep: Tensor, gamma: float, prediction: str = "noise") -> Tensor:
    """Weights (N,) that keep easy, nearly clean samples from dominating the loss (Hang et al. 2023, Section 3.4).

    Args:
        scheduler, timestep: as for `noise_prediction`.
        gamma: bound of the signal-to-noise ratio; 5 in the paper.
        prediction: "noise" or "v".
    """
    snr = _tables(scheduler, timestep.device, torch.float32).snr[timestep]
    return snr.clamp(max=gamma) / (snr if prediction == "noise" else snr + 1)


def uniform_timesteps(
    count: int, scheduler: Any, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Draw (count,) timesteps, int64, each equally likely."""
    steps = scheduler.config["num_train_timesteps"]
    return torch.randint(0, steps, (count,), device=device, generator=generator)


def flow_timesteps(
    count: int,
    scheduler: Any,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    logit_normal: bool = False,
) -> Tensor:
    """Draw (count,) float timesteps, uniform or logit-normal (Esser et al. 2024, Section 3.1)."""
    draw = torch.randn if logit_normal else torch.rand
    times = draw(count, device=device, generator=generator)
    return (times.sigmoid() if logit_normal else times) * scheduler.config["num_train_timesteps"]


def _noisy(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Draw from q(x_t | x_0): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4)."""
    signal, sigma = noise_levels(scheduler, clean, timestep)
    return signal * clean + sigma * noise


def noise_levels(scheduler: DDPMScheduler, clean: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), (N, 1, ...): the scheduler's, but exact, as in the official code."""
    tables = _tables(scheduler, clean.device, clean.dtype)
    return _at(tables.signal_scale, timestep, clean), _at(tables.noise_scale, timestep, clean)


def _at(values: Tensor, timestep: Tensor, data: Tensor) -> Tensor:
    """Values of a table (T,) at timesteps (N,), as (N, 1, ...) beside data (N, ...)."""
    return values[timestep].view(-1, *[1] * (data.dim() - 1))


@dataclass(frozen=True)
class _Tables:
    """Tables that the objectives look up by timestep, each (T,).

    Args:
        signal_scale, noise_scale: sqrt(abar) and sqrt(1 - abar).
        snr: the signal-to-noise ratio, abar / (1 - abar).
        log_beta, log_variance: the bounds of a learned log variance; the lower one is the posterior's.
        clean_weight, noisy_weight: weights in the posterior's mean (Ho et al. 2020, equation 7).
    """

    signal_scale: Tensor
    noise_scale: Tensor
    snr: Tensor
    log_beta: Tensor
    log_variance: Tensor
    clean_weight: Tensor
    noisy_weight: Tensor


@lru_cache(maxsize=8)
def _tables(scheduler: DDPMScheduler, device: torch.device, dtype: torch.dtype) -> _Tables:
    """The tables of a scheduler; cached, since training looks them up several times a step."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # tensors of a first use in inference mode could not be trained with
        betas = _exact_betas(scheduler)
        alpha_bar = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alpha_bar[:-1]])
        variance = betas * (1 - before) / (1 - alpha_bar)
        values = {
            "signal_scale": alpha_bar.sqrt(),
            "noise_scale": (1 - alpha_bar).sqrt(),
            "snr": alpha_bar / (1 - alpha_bar),
            "log_beta": betas.log(),
            # The variance at t = 0 is zero; the next one stands in for it.
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
            "clean_weight": betas * before.sqrt() / (1 - alpha_bar),
            "noisy_weight": (1 - before) * (1 - betas).sqrt() / (1 - alpha_bar),
        }
        return _Tables(**{name: value.to(dtype).to(device) for name, value in values.items()})  # MPS has no float64


def _exact_betas(scheduler: DDPMScheduler) -> Tensor:
    """The betas (T,) in float64; the scheduler's float32 ones move the bound by 1e-4 at the first step."""
    config = scheduler.config
    changed = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr")
    if config["beta_schedule"] == "linear" and not changed:
        steps = config["num_train_timesteps"]
        return torch.linspace(config["beta_start"], config["beta_end"], steps, dtype=torch.float64, device="cpu")
    return scheduler.betas.double().cpu()


def mean_square(difference: Tensor) -> Tensor:
    """(N, ...) -> (N,)."""
    return difference.square().flatten(1).mean(dim=1)


def _log_likelihood(data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The log-likelihood of data in -1..1 on a grid of 1/127.5 under a normal distribution; the end bins are open."""

    def below(edge: Tensor) -> Tensor:
        """The normal CDF in the tanh approximation, with which the official numbers were made."""
        scaled = (edge - mean) / std
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scaled + 0.044715 * scaled**3)))

    upper, lower = below(data + 1 / 255), below(data - 1 / 255)
    inside = torch.where(data < -0.999, upper, torch.where(data > 0.999, 1 - lower, upper - lower))
    return inside.clamp_min(1e-12).log()
