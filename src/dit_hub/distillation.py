"""Distillation objectives, as pure functions of tensors of any shape (N, ...): a student learns from a teacher.

Both see noisy data z = signal x + sigma noise. Each objective returns the loss of each sample, (N,): the mean squared
error of what the student predicts, where the teacher's estimates stand for the truth. For a student that predicts v or
a velocity this is the error of its estimated data, weighted by 1 / sigma^2: one plus the signal-to-noise ratio
(Salimans and Ho 2022, Section 4), which is bounded from below.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guidance import guide
from .objectives import Denoiser, mean_square, noise_levels
from .schedulers import is_flow_matching


@dataclass(frozen=True)
class Predictor:
    """A network, and what its prediction means.

    Args:
        denoiser: predicts from noisy data (N, C, ...) and timesteps (N,); channels after the first C are left alone.
        prediction: "noise", "v" or "flow", the velocity of the straight path.
        clips: clip the estimated data to -1..1, as schedulers do for pixels.
    """

    denoiser: Denoiser
    prediction: str
    clips: bool = False

    def predict(self, noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The prediction, (N, C, ...)."""
        return self.denoiser(noisy, timestep, **conditions)[:, : noisy.shape[1]]

    def estimate(self, scheduler: Any, noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> tuple[Tensor, Tensor]:
        """The data and the noise that the prediction means, each (N, C, ...)."""
        signal, sigma = levels(scheduler, noisy, timestep)
        prediction = self.predict(noisy, timestep, **conditions)
        if self.prediction == "noise":
            data, noise = (noisy - sigma * prediction) / signal, prediction
        elif self.prediction == "v":
            data, noise = signal * noisy - sigma * prediction, sigma * noisy + signal * prediction
        else:
            data, noise = noisy - sigma * prediction, noisy + signal * prediction
        if self.clips:
            data = data.clamp(-1, 1)
            noise = (noisy - signal * data) / sigma
        return data, noise

    def target(self, data: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """What it would have predicted to mean these data and this noise."""
        if self.prediction == "noise":
            return noise
        return signal * noise - sigma * data if self.prediction == "v" else noise - data


def guided(denoiser: Denoiser, guidance_scale: float, null_class: int, channels: int) -> Denoiser:
    """A network whose predictions are guided (paper, Section 3.1), as the pipeline guides them.

    Args:
        denoiser: takes `class_labels` (N,).
        guidance_scale, channels: see `dit_hub.guidance.guide`.
        null_class: the label that stands for no class.
    """

    def predict(noisy: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        labels = torch.cat([torch.full_like(class_labels, null_class), class_labels])
        both = denoiser(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), class_labels=labels)
        uncond, cond = both.chunk(2)
        return guide(cond, uncond, guidance_scale, channels)

    return predict


def levels(scheduler: Any, data: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of data and noise at timesteps (N,), each (N, 1, ...) beside `data` (N, ...).

    The straight path has 1 - t / T and t / T. Elsewhere timesteps are integers, and -1 stands for the data themselves.
    """
    if is_flow_matching(scheduler):
        sigma = (timestep / scheduler.config["num_train_timesteps"]).view(-1, *[1] * (data.dim() - 1))
        return 1 - sigma, sigma
    signal, sigma = noise_levels(scheduler, data, timestep.clamp_min(0))
    clean = (timestep < 0).view(signal.shape)
    return signal.masked_fill(clean, 1.0), sigma.masked_fill(clean, 0.0)


def timestep_grid(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """The timesteps between which a sampler of so many steps moves, (steps + 1,), from data to noise.

    Evenly spaced down from the last timestep, as diffusers' "trailing" spacing: those of half as many steps are among
    them. The first stands for the data; see `levels`.
    """
    trained = scheduler.config["num_train_timesteps"]
    grid = torch.arange(steps + 1, dtype=torch.float64) * trained / steps
    flow = is_flow_matching(scheduler)
    return (grid.float() if flow else (grid.round() - 1).long()).to(device)


def ddim_step(scheduler: Any, estimate: tuple[Tensor, Tensor], timestep: Tensor) -> Tensor:
    """The noisy data at another timestep, by estimated data and noise (Song et al. 2021a, equation 12 with sigma 0).

    Along the straight path this is an Euler step.
    """
    data, noise = estimate
    signal, sigma = levels(scheduler, data, timestep)
    return signal * data + sigma * noise


def guidance_distillation(
    student: Predictor,
    teacher: Predictor,
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """The student predicts in one pass what its guided teacher does in two (Meng et al. 2023, Section 3.1).

    Args:
        student, teacher: the teacher is guided; see `guided`.
        scheduler: its betas, or the straight path, are the noise levels.
        clean: data (N, C, ...).
        noise: standard normal (N, C, ...).
        timestep: (N,), as the networks take them.
        conditions: further arguments of both networks.

    Returns:
        The loss of each sample, (N,).
    """
    signal, sigma = levels(scheduler, clean, timestep)
    noisy = signal * clean + sigma * noise
    with torch.no_grad():
        target = student.target(*teacher.estimate(scheduler, noisy, timestep, **conditions), signal, sigma)
    return mean_square(student.predict(noisy, timestep, **conditions) - target)


def progressive_distillation(
    student: Predictor,
    teacher: Predictor,
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    timesteps: tuple[Tensor, Tensor, Tensor],
    **conditions: Tensor,
) -> Tensor:
    """One DDIM step of the student ends where two of its teacher do (Salimans and Ho 2022, algorithm 2).

    Arguments as for `guidance_distillation`, with the start, the middle and the end of the step as `timesteps`.
    """
    start, _, end = timesteps
    (signal, sigma), (last_signal, last_sigma) = levels(scheduler, clean, start), levels(scheduler, clean, end)
    noisy = signal * clean + sigma * noise
    with torch.no_grad():
        reached = two_steps(teacher, scheduler, noisy, timesteps, **conditions)
        # The data for which one step gets there.
        data = (reached - last_sigma / sigma * noisy) / (last_signal - last_sigma / sigma * signal)
        target = student.target(data, (noisy - signal * data) / sigma, signal, sigma)
    return mean_square(student.predict(noisy, start, **conditions) - target)


def two_steps(
    teacher: Predictor, scheduler: Any, noisy: Tensor, timesteps: tuple[Tensor, Tensor, Tensor], **conditions: Tensor
) -> Tensor:
    """Noisy data (N, ...) of the first timestep after DDIM steps to the second and the third."""
    start, middle, end = timesteps
    between = ddim_step(scheduler, teacher.estimate(scheduler, noisy, start, **conditions), middle)
    return ddim_step(scheduler, teacher.estimate(scheduler, between, middle, **conditions), end)


def consistency_distillation(
    student: Predictor,
    teacher: Predictor,
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    timesteps: tuple[Tensor, Tensor],
    **conditions: Tensor,
) -> Tensor:
    """The student estimates the same data from both ends of a DDIM step of its teacher (Song et al. 2023, equation 7).

    The step skips timesteps, as in latent consistency models (Luo et al. 2023, Section 4.3). The estimate of a student
    that predicts v is a consistency function as it is: it returns its input where there is no noise. The target is the
    student itself, without gradients (Song and Dhariwal 2024, Section 3.2).

    Arguments as for `guidance_distillation`, with the start and the end of the teacher's step as `timesteps`.
    """
    start, end = timesteps
    signal, sigma = levels(scheduler, clean, start)
    noisy = signal * clean + sigma * noise
    with torch.no_grad():
        reached = ddim_step(scheduler, teacher.estimate(scheduler, noisy, start, **conditions), end)
        data, _ = student.estimate(scheduler, reached, end.clamp_min(0), **conditions)
        _, left = levels(scheduler, clean, end)
        data = torch.where(left == 0, reached, data)
        target = student.target(data, (noisy - signal * data) / sigma, signal, sigma)
    return mean_square(student.predict(noisy, start, **conditions) - target)
