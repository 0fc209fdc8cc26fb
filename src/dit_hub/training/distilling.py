"""Distillation in a run: the teacher, its stages, the loss, and the scheduler with which a student samples."""

from typing import Any, cast

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from ..distillation import (
    Predictor,
    consistency_distillation,
    guidance_distillation,
    guided,
    progressive_distillation,
    timestep_grid,
)
from ..modeling_dit import DiTTransformer
from ..objectives import Denoiser
from ..solvers import table_scheduler
from ..table_scheduler import TableScheduler
from .recipe import Recipe

# The objectives by diffusers' name of the prediction.
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v"}


def check_teacher(recipe: Recipe, teacher: DiTTransformer) -> None:
    """Raise ValueError if the teacher cannot be guided as the recipe says."""
    if recipe.guidance_scale != 1 and teacher.config.null_class is None:
        raise ValueError(f"{recipe.init_from} has no null class, so it cannot be guided at guidance_scale "
                         f"{recipe.guidance_scale:g}; set guidance_scale=1 with distill=progressive or "
                         "consistency.")  # fmt: skip


class Distillation:
    """What stands in the place of an objective where a student learns from a teacher.

    A progressive run has a stage for each halving of the steps. The teacher of the first is the pipeline that the run
    started from; the teacher of each later one is the student as the stage before left it.

    Args:
        recipe: of the run.
        teacher: the model that the run started from, a copy of its own.
        scheduler: with which the teacher samples; it says what the teacher predicts, and whether that is clipped.
        device: of the run.

    Attributes:
        stage: the current stage, from 0.
    """

    def __init__(self, recipe: Recipe, teacher: DiTTransformer, scheduler: Any, device: torch.device):
        self.recipe, self.device, self.stage = recipe, device, 0
        self._grid: Tensor | None = None  # of the stage, on the device
        self.model = self._frozen(teacher)
        prediction = recipe.objective if recipe.objective == "flow" else (
            PREDICTIONS[scheduler.config.get("prediction_type", "epsilon")]
        )  # fmt: skip
        denoiser, config = self._denoise, teacher.config
        if recipe.guidance_scale != 1 and config.null_class is not None:
            denoiser = guided(denoiser, recipe.guidance_scale, config.null_class, config.guided_channels)
        self.teacher = Predictor(denoiser, prediction, bool(scheduler.config.get("clip_sample")))

    def _frozen(self, model: DiTTransformer) -> DiTTransformer:
        cast(Any, model.eval().requires_grad_(False)).to(self.device)
        return model

    def _denoise(self, noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return self.model(noisy, timestep, **conditions).sample

    def __call__(
        self, denoiser: Denoiser, scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor, **conditions: Tensor
    ) -> Tensor:
        """The loss of each sample, (N,); arguments as for an objective.

        Of a timestep, progressive and consistency distillation take the step of student or teacher that it lies in.
        """
        student = Predictor(denoiser, self.recipe.objective)
        if self.recipe.distill == "guidance":
            return guidance_distillation(student, self.teacher, scheduler, clean, noise, timestep, **conditions)
        if self._grid is None:
            self._grid = timestep_grid(scheduler, self.teacher_steps, self.device)
        grid = self._grid
        apart = 1 if self.recipe.distill == "consistency" else 2
        steps = self.teacher_steps // apart
        index = (timestep * steps / scheduler.config["num_train_timesteps"]).long().clamp(0, steps - 1)
        start, end = grid[apart * (index + 1)], grid[apart * index]
        if self.recipe.distill == "consistency":
            return consistency_distillation(student, self.teacher, scheduler, clean, noise, (start, end), **conditions)
        through = (start, grid[2 * index + 1], end)
        return progressive_distillation(student, self.teacher, scheduler, clean, noise, through, **conditions)

    @property
    def teacher_steps(self) -> int:
        """The teacher's steps in this stage; a progressive student has half of them."""
        return self.recipe.teacher_steps >> self.stage

    @property
    def student_passes(self) -> int:
        """How often a loss calls the student; the last time with gradients."""
        return 2 if self.recipe.distill == "consistency" else 1

    # --- Stages ------------------------------------------------------------------------------------------------------

    def begin(self, stage: int, student: DiTTransformer) -> None:
        """Begin a later stage, whose teacher is this former student."""
        self.stage, self.model, self._grid = stage, self._frozen(student), None
        self.teacher = Predictor(self._denoise, self.recipe.objective)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of the teacher: its weights, where it is a former student."""
        return {"teacher": dict(self.model.state_dict())} if self.stage else {}


def student_scheduler(recipe: Recipe, scheduler: Any) -> Any:
    """The scheduler that samples a student in the steps it was trained for, by the noise schedule of the run."""
    progressive = recipe.distill == "progressive"
    if recipe.objective == "flow":
        # From 1 down to 1 / steps and then 0; a single step starts at 1 in any case.
        many = progressive and recipe.student_steps > 1
        terminal: dict[str, Any] = {"shift_terminal": 1 / recipe.student_steps} if many else {}
        euler = FlowMatchEulerDiscreteScheduler(recipe.num_train_timesteps, **terminal)
        return _of_steps(euler, recipe.student_steps) if progressive else euler
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    settings: dict[str, Any] = {name: scheduler.config[name] for name in kept}
    if recipe.distill == "consistency":
        return LCMScheduler(**settings, original_inference_steps=recipe.teacher_steps)
    ddim = DDIMScheduler(**settings, clip_sample=False, timestep_spacing="trailing")
    return _of_steps(ddim, recipe.student_steps) if progressive else ddim


def _of_steps(scheduler: Any, steps: int) -> TableScheduler:
    """The scheduler in so many steps, and in no other number of them."""
    return table_scheduler(scheduler, steps=[steps], name="student")
