"""The training loop, on accelerate."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from ..configuration_dit import DiTConfig
from ..modeling_dit import DiTTransformer
from ..objectives import noise_prediction, uniform_timesteps
from ..pipeline_dit import DiTPipeline
from .recipe import Recipe
from .shapes import ID2LABEL, SIZE, shapes

# Called after each step as report(step, epoch, loss), steps and epochs counted from 1.
Report = Callable[[int, int, float], None]


@dataclass
class TrainingResult:
    """What a run leaves.

    Args:
        pipeline: the trained model, ready to sample.
        recipe: how it was trained.
        epoch_losses: mean training loss of each epoch.
        seconds: wall time of all steps.
    """

    pipeline: DiTPipeline
    recipe: Recipe
    epoch_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def steps_per_epoch(recipe: Recipe) -> int:
    """Optimizer steps of one pass over the data; a last batch that is not full is left out."""
    return max(1, recipe.images_per_class * len(ID2LABEL) // recipe.batch_size)


def train(recipe: Recipe, report: Report = lambda step, epoch, loss: None) -> TrainingResult:
    """Train a model of the shapes.

    Args:
        recipe: what to do.
        report: called after each step.

    Raises:
        ValueError: a batch larger than the data set, or a model of other pictures.
    """
    config = DiTConfig.from_name(recipe.model)
    if (config.in_channels, config.sample_size, config.num_classes) != (3, SIZE, len(ID2LABEL)):
        raise ValueError(f"The shapes are {SIZE}x{SIZE} pictures of {len(ID2LABEL)} classes in 3 channels, "
                         f"which {recipe.model} does not take; the model toy does.")  # fmt: skip
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    set_seed(recipe.seed)
    model = DiTTransformer(config).train()
    scheduler = make_scheduler(recipe)
    # fused: one kernel for all weights, 0.8 ms a step on a CPU rather than 3.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    learning_rate = CosineAnnealingLR(optimizer, recipe.epochs * steps_per_epoch(recipe))
    loader = _batches(recipe)
    model, optimizer, learning_rate, loader = accelerator.prepare(model, optimizer, learning_rate, loader)
    ema = EMAModel(model.parameters(), decay=recipe.ema_decay) if recipe.ema_decay else None

    def denoiser(noisy: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        return model(noisy, timestep, **conditions).sample

    epoch_losses, step, start = [], 0, time.perf_counter()
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        for pictures, labels in loader:
            timestep = uniform_timesteps(len(pictures), scheduler, pictures.device)
            noise = torch.randn_like(pictures)
            loss = noise_prediction(denoiser, scheduler, pictures, noise, timestep, class_labels=labels).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            learning_rate.step()
            if ema is not None:
                ema.step(model.parameters())
            losses.append(loss.item())
            step += 1
            report(step, epoch, losses[-1])
        epoch_losses.append(sum(losses) / len(losses))
    seconds = time.perf_counter() - start

    trained = accelerator.unwrap_model(model).eval()
    if ema is not None:
        ema.copy_to(trained.parameters())
    return TrainingResult(DiTPipeline(trained, scheduler, id2label=ID2LABEL), recipe, epoch_losses, seconds)


def make_scheduler(recipe: Recipe) -> DDPMScheduler:
    """The noise schedule of a recipe; pictures are clipped to -1..1 while sampling, as they were trained."""
    return DDPMScheduler(
        recipe.num_train_timesteps,
        beta_start=recipe.beta_start,
        beta_end=recipe.beta_end,
        beta_schedule="linear",
        clip_sample=True,
    )


def _batches(recipe: Recipe) -> DataLoader:
    dataset = _Pictures(*shapes(recipe.images_per_class, recipe.seed))
    if recipe.batch_size > len(dataset):
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the data set of {len(dataset)} pictures.")
    # __getitems__ slices a whole batch at once, which leaves nothing to collate; one picture at a time is slower.
    return DataLoader(dataset, recipe.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch)


class _Pictures(TensorDataset):
    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        return self[torch.tensor(indices)]
