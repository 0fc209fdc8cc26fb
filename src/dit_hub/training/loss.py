"""The training loss of a recipe: its random draws and its objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..configuration_dit import DiTConfig
from ..objectives import (
    flow_matching,
    flow_timesteps,
    min_snr_weight,
    noise_and_variance,
    noise_prediction,
    uniform_timesteps,
    v_prediction,
)
from .data import Batch, Dataset
from .distilling import Distillation
from .recipe import Recipe
from .setup import make_scheduler


class Draws(NamedTuple):
    """The random numbers of a micro-batch: noise (N, C, H, W), timesteps (N,), dropped labels (N,), VAE noise."""

    noise: Tensor
    timesteps: Tensor
    dropped: Tensor
    latent_noise: Tensor  # (N, C, H, W) for latents, else (N, 0)


class TrainingLoss:
    """The training loss of a recipe.

    Args:
        recipe, dataset: of the run.
        config: of the model.
        accelerator: of the run; the loss is computed on its device and in its precision.
        distillation: takes the place of the recipe's objective, if given.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        config: DiTConfig,
        accelerator: Accelerator,
        distillation: Distillation | None = None,
    ):
        self.recipe, self.dataset, self.config, self.accelerator = recipe, dataset, config, accelerator
        self.scheduler = make_scheduler(recipe, config)
        self.objective = distillation or _objective(recipe, config)
        self.passes = distillation.student_passes if distillation else 1

    def draw(self, step: int, micro_batches: int) -> list[Draws]:
        """The draws of a whole step, of all processes, by micro-batch.

        They are a function of seed and step alone (a CPU's generator reads 32 bits of it), so they need not be saved
        and are the same for any number of processes.
        """
        device, count = self.accelerator.device, self.recipe.batch_size
        generator = torch.Generator(device).manual_seed(self.recipe.seed * 1_000_000_007 + step)
        shape = (count, *self.dataset.sample_shape)
        noise = torch.randn(shape, generator=generator, device=device)
        if self.recipe.objective == "flow":
            timesteps = flow_timesteps(count, self.scheduler, device, generator, self.recipe.logit_normal)
        else:
            timesteps = uniform_timesteps(count, self.scheduler, device, generator)
        dropped = torch.rand(count, generator=generator, device=device) < self.config.class_dropout_prob
        latent_noise = torch.randn(shape if self.dataset.is_latent else (count, 0), generator=generator, device=device)
        parts = (values.chunk(micro_batches) for values in (noise, timesteps, dropped, latent_noise))
        return [Draws(*values) for values in zip(*parts, strict=True)]

    def __call__(self, model: Callable[..., Any], batch: Batch, draws: Draws) -> Tensor:
        """The mean loss of a micro-batch, a scalar; it holds fewer samples than draws where files are unreadable."""
        count = len(batch.data)
        if not count:
            return self._zero(model)
        noise, timesteps, dropped, latent_noise = (values[:count] for values in draws)
        clean, labels = self._on_device(batch, latent_noise)
        conditions = {}
        if self.dataset.id2label:
            null_class = self.config.null_class
            conditions["class_labels"] = labels if null_class is None else labels.where(~dropped, null_class)

        def denoiser(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            output = model(noisy, timestep, **conditions).sample
            # A model with a learned variance has channels that v and flow leave alone.
            return output if self.recipe.objective == "noise" else output[:, : clean.shape[1]]

        with self.accelerator.autocast():
            losses = self.objective(denoiser, self.scheduler, clean, noise, timesteps, **conditions)
        if self.recipe.min_snr_gamma:
            gamma = self.recipe.min_snr_gamma
            losses = losses * min_snr_weight(self.scheduler, timesteps, gamma, self.recipe.objective)
        return losses.mean()

    def _on_device(self, batch: Batch, latent_noise: Tensor) -> tuple[Tensor, Tensor]:
        """The clean data that the model sees, with latents sampled from their distribution, and the labels."""
        device = self.accelerator.device
        pinned = device.type == "cuda"  # elsewhere, data that nobody waits for may be read before they arrive
        clean, labels = (values.to(device, non_blocking=pinned) for values in (batch.data, batch.labels))
        if self.dataset.is_latent:
            mean, std = clean.chunk(2, dim=1)
            clean = (mean + std * latent_noise - self.dataset.shift_factor) * self.dataset.scaling_factor
        return clean, labels

    def _zero(self, model: Callable[..., Any]) -> Tensor:
        """A zero loss with zero gradients, for which the other processes wait.

        It calls the model as often as they do: wherever weights are sharded, all processes gather them in each call.
        """
        device = self.accelerator.device
        labels = {"class_labels": torch.zeros(1, dtype=torch.long, device=device)} if self.config.num_classes else {}
        noisy = torch.zeros(1, *self.dataset.sample_shape, device=device)
        timestep = torch.zeros(1, device=device)
        for _ in range(self.passes - 1):
            with torch.no_grad():
                model(noisy, timestep, **labels)
        return 0 * model(noisy, timestep, **labels).sample.sum()


def _objective(recipe: Recipe, config: DiTConfig) -> Callable[..., Tensor]:
    if recipe.objective == "flow":
        return flow_matching
    if recipe.objective == "v":
        return v_prediction
    return noise_and_variance if config.learn_sigma else noise_prediction
