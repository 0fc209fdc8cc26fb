"""What DiT needs to know of diffusers' schedulers: their short names, the official timesteps, the learned variance."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, cast

import diffusers
import numpy as np
import torch
from torch import Tensor

from .configuration_dit import FLOW_TIMESTEPS, DiTConfig

# Short names for the command line. Every scheduler of diffusers that steps from noise to data works in the pipeline.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}


def switch_scheduler(scheduler: Any, name: str) -> Any:
    """A scheduler of another kind for the same noise levels.

    Args:
        scheduler: the one whose configuration to take over.
        name: a short name of `SCHEDULERS`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"There is no scheduler named {name!r}; known: {', '.join(SCHEDULERS)}.")
    return getattr(diffusers, SCHEDULERS[name]).from_config(scheduler.config)


def official_scheduler(config: DiTConfig) -> Any:
    """The scheduler that samples a model as its authors did.

    DDPM with the official noise levels for diffusion models, the learned variance or the larger fixed one; Euler steps
    along the straight path for flow and SiT models.
    """
    if config.parameterization != "diffusion":
        return diffusers.FlowMatchEulerDiscreteScheduler(FLOW_TIMESTEPS)
    variance = "learned_range" if config.learn_sigma else "fixed_large"
    return diffusers.DDPMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type=variance,
        clip_sample=False,
        timestep_spacing="linspace",
    )


def scheduler_from_dict(config: dict[str, Any]) -> Any:
    """The scheduler of diffusers that a config describes, which names its class under "_class_name".

    Raises:
        ValueError: no such scheduler.
    """
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {config.get('_class_name')!r}.")
    return cast(Any, kind).from_config(config)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the scheduler steps with a velocity along the straight path."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def check_parameterization(scheduler: Any, config: DiTConfig) -> None:
    """Raise ValueError for a scheduler that would misread the model's prediction and draw noise."""
    name = type(scheduler).__name__
    if config.parameterization == "diffusion" and is_flow_matching(scheduler):
        raise ValueError(f"{name} steps with a velocity, but this model was trained as a diffusion model; "
                         "use DDPMScheduler, DPMSolverMultistepScheduler or another of that kind.")  # fmt: skip
    if config.parameterization != "diffusion" and not is_flow_matching(scheduler):
        raise ValueError(f"This model predicts a velocity (flow matching), which {name} does not step with; "
                         "use FlowMatchEulerDiscreteScheduler.")  # fmt: skip


def official_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps of the official respacing, from noise to data: `num_inference_steps` of `num_train_timesteps`.

    The stride (T - 1) / (S - 1) is accumulated in floating point and rounded half to even, as the official
    `space_timesteps` does; diffusers' "linspace" differs from it for 278 of the step counts from 1 to 1000.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must lie between 1 and {num_train_timesteps}, not {num_inference_steps}."
        )
    stride = (num_train_timesteps - 1) / max(num_inference_steps - 1, 1)
    position, timesteps = 0.0, []
    for _ in range(num_inference_steps):
        timesteps.append(round(position))
        position += stride
    return timesteps[::-1]


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[int] | Literal["official"] | None,
    device: torch.device | str,
) -> None:
    """Prepare a scheduler for a run; see `DiTPipeline.__call__` for the arguments.

    Raises:
        ValueError: fewer than one step, or timesteps given to a scheduler that takes none.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be 1 or more, not {num_inference_steps}.")
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
        return
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if timesteps == "official" and is_flow_matching(scheduler) and "sigmas" in accepted:  # evenly from 1 down to 0
        sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        return
    if "timesteps" not in accepted:
        raise ValueError(
            f"{type(scheduler).__name__} takes no list of timesteps; DDPMScheduler does, and for DDIM "
            'DPMSolverMultistepScheduler(solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero").'
        )
    if isinstance(timesteps, str):
        if timesteps != "official":
            raise ValueError(f'timesteps must be a list of numbers or "official", not {timesteps!r}.')
        timesteps = official_timesteps(num_inference_steps, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(timesteps=list(timesteps), device=device)


def uses_learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler takes the variance from the prediction: a DDPM set to, and no other.

    The others keep a DDPM's `variance_type` in their config when they are made from it.
    """
    takes_variance = isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler))
    return takes_variance and str(scheduler.config.get("variance_type")).startswith("learned")


def without_foreign_variance(scheduler: Any) -> Any:
    """The scheduler itself, or one that leaves the variance alone.

    DPM solvers made from a DDPM's config act on its learned variance: they keep 3 channels of any prediction.
    """
    inherited = str(scheduler.config.get("variance_type")).startswith("learned")
    acts_on_it = "variance_type" in inspect.signature(type(scheduler)).parameters
    if inherited and acts_on_it and not uses_learned_variance(scheduler):
        return type(scheduler).from_config(scheduler.config, variance_type=None)
    return scheduler


def prediction_for(scheduler: Any, prediction: Tensor, channels: int) -> Tensor:
    """(N, C or 2C, H, W) -> what the scheduler steps with: the learned variance too where it uses one.

    Raises:
        ValueError: the scheduler wants a learned variance and the prediction has none.
    """
    if not uses_learned_variance(scheduler):
        return prediction[:, :channels]
    if prediction.shape[1] == channels:
        raise ValueError(
            "The scheduler wants a learned variance, which this model does not predict; official sampling of such "
            'models uses variance_type="fixed_large".'
        )
    return prediction
