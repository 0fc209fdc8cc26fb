"""Which distillations a recipe can ask for, and the stages of a run that halves the steps several times."""

import math
from typing import TYPE_CHECKING

from ..configuration_dit import FLOW_TIMESTEPS

if TYPE_CHECKING:
    from .recipe import Recipe

DISTILLATIONS = ("guidance", "progressive", "consistency")


def check_distillation(recipe: "Recipe") -> None:
    """Raise ValueError if the fields of a recipe that distills do not go together."""
    if not recipe.distill:
        raise ValueError(f"guidance_scale {recipe.guidance_scale} is of a teacher; set distill too.")
    if recipe.distill not in DISTILLATIONS:
        known = f"{', '.join(DISTILLATIONS[:-1])} or {DISTILLATIONS[-1]}"
        raise ValueError(f"distill must be {known}, not {recipe.distill!r}.")
    if not recipe.init_from:
        raise ValueError("distill needs a teacher; set init_from to a folder, a Hub id or a checkpoint.")
    if not 1 <= recipe.guidance_scale < math.inf:
        raise ValueError(f"guidance_scale must be 1 (none) or above, not {recipe.guidance_scale}.")
    if recipe.min_snr_gamma:
        raise ValueError("min_snr_gamma weights the loss of training on data, and distill has a loss of its own.")
    if recipe.distill == "guidance":
        if recipe.guidance_scale == 1:
            raise ValueError("distill=guidance builds in a guidance_scale, and 1 is no guidance; set another.")
        return
    if recipe.objective == "noise":
        raise ValueError(f"distill={recipe.distill} needs a student that predicts more than noise, which says nothing "
                         "of the image where there is nothing but noise; set objective=v.")  # fmt: skip
    if recipe.distill == "progressive":
        _check_divides(recipe, "student_steps", recipe.student_steps)
        _check_halvings(recipe)
    elif recipe.objective == "flow":
        raise ValueError("distill=consistency is for diffusion models; a flow model takes progressive.")
    else:
        if recipe.teacher_steps < 2:
            raise ValueError(f"distill=consistency needs teacher_steps of 2 or more, not {recipe.teacher_steps}.")
        _check_divides(recipe, "teacher_steps", recipe.teacher_steps)


def _check_halvings(recipe: "Recipe") -> None:
    student, teacher, trained = recipe.student_steps, recipe.teacher_steps, recipe.num_train_timesteps
    if not halvings(recipe) or student << halvings(recipe) != teacher:
        raise ValueError(f"teacher_steps {teacher} cannot be halved until they are student_steps {student}; set "
                         f"teacher_steps={student * 8}.")  # fmt: skip
    if recipe.objective == "flow" and trained != FLOW_TIMESTEPS:
        raise ValueError(f"Flow models count the time in {FLOW_TIMESTEPS} steps, not {trained}; set "
                         f"num_train_timesteps={FLOW_TIMESTEPS}.")  # fmt: skip
    if teacher > trained and recipe.objective != "flow":
        raise ValueError(f"teacher_steps {teacher} are more than num_train_timesteps {trained}.")


def _check_divides(recipe: "Recipe", name: str, steps: int) -> None:
    """Check that diffusers' samplers, which step by whole timesteps, visit those of the training."""
    trained = recipe.num_train_timesteps
    if recipe.objective != "flow" and trained % steps:
        fitting = max(divisor for divisor in range(1, min(steps, trained) + 1) if trained % divisor == 0)
        raise ValueError(f"{name} {steps} do not divide num_train_timesteps {trained} evenly, as samplers do; set "
                         f"{name}={fitting}.")  # fmt: skip


def halvings(recipe: "Recipe") -> int:
    """How often progressive distillation halves the steps; 0 for other training."""
    if recipe.distill != "progressive":
        return 0
    return max(recipe.teacher_steps // recipe.student_steps, 1).bit_length() - 1


def stage_of(recipe: "Recipe", step: int, last: int) -> tuple[int, int, int]:
    """The stage that the step after `step` of `last` steps belongs to, and its first step and the next stage's."""
    stages = max(halvings(recipe), 1)
    stage = min(step * stages // last, stages - 1)
    return stage, -(-stage * last // stages), -(-(stage + 1) * last // stages)
