"""diffusers' schedulers for DiT: which ones fit, the official timesteps, the learned variance."""

import inspect
import itertools
from collections.abc import Container, Sequence
from typing import Any, Literal, cast

import diffusers
import numpy as np
import torch
from torch import Tensor

from .checks import real_number, shown, whole_number
from .configuration_dit import FLOW_TIMESTEPS, DiTConfig
from .table_scheduler import TableScheduler
from .tables import published

# Short names for the command line. In Python, the pipeline takes every scheduler that `check_scheduler` accepts.
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
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}

# Steps of consistency models, which take any few.
_CONSISTENCY_STEPS = 4

# Parts of the names of schedulers that step with a velocity, and of those for other kinds of models.
_VELOCITY = ("FlowMatch", "FlowMap", "EulerAncestralRF")
_OTHER_MODELS = {
    "LCM": "samples consistency models, which predict the result at every step",
    "Inverse": "steps from data to noise",
    "Helios": "samples in stages of growing size",
}

# Config fields that determine the noise levels, with the value of one that a config lacks.
_NOISE_FIELDS = {
    "num_train_timesteps": None,
    "beta_schedule": None,
    "beta_start": None,
    "beta_end": None,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 1.0,
}

# Settings that clip the predicted data to the range of pixels.
_BOUNDS = ("clip_sample", "thresholding")


def switch_scheduler(scheduler: Any, name: str) -> Any:
    """A scheduler of another kind for the same noise levels.

    Args:
        scheduler: the one whose configuration is taken over.
        name: a short name of `SCHEDULERS`, a published solver, or a solver's file.

    Raises:
        ValueError: an unknown name, or a damaged file.
    """
    if name.endswith(".json"):
        return TableScheduler.from_file(name)
    if name in published():
        return TableScheduler.from_name(name)
    if name not in SCHEDULERS:
        known = ", ".join([*SCHEDULERS, *published()])
        raise ValueError(f"There is no scheduler named {name!r}; known: {known}. A solver's file ends in .json.")
    # Without diffusers' record of which values were defaults: classes put their own in place of those.
    left_out = ("_use_default_values", "tables", "name", "source", "init_noise_sigma")  # the last four of tables
    config = {key: value for key, value in scheduler.config.items() if key not in left_out}
    kind: Any = getattr(diffusers, SCHEDULERS[name])
    if "clip_sample" not in settings_of(kind):
        return kind.from_config(config)
    if name == "ddim":  # which, clipping, mixes clipped data with the noise of unclipped ones: digits are lost
        config["clip_sample"] = False
    # Some classes clip to -1..1 by default, and the config of a class that cannot clip says nothing of it.
    return kind.from_config({"clip_sample": False, **config})


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
    """The scheduler that a config describes; "_class_name" there is its class, of diffusers or `TableScheduler`.

    Raises:
        ValueError: no such scheduler.
    """
    if config.get("_class_name") == TableScheduler.__name__:
        return TableScheduler.from_config(config)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {config.get('_class_name')!r}.")
    return cast(Any, kind).from_config(config)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the scheduler steps with a velocity along the straight path."""
    kind = type(scheduler)
    if any(part in kind.__name__ for part in _VELOCITY):
        return True
    asked = scheduler.config.get("prediction_type") == "flow_prediction"
    return asked and (isinstance(scheduler, TableScheduler) or "use_flow_sigmas" in settings_of(kind))


def check_scheduler(scheduler: Any, config: DiTConfig, own: Any, latent: bool) -> None:
    """Raise ValueError for a scheduler that does not sample what the model has learned.

    Args:
        scheduler: the one to sample with.
        config: of the model.
        own: the scheduler that came with the model, whose noise levels it was trained for.
        latent: whether the model predicts latents, which have no fixed range as pixels do.
    """
    name, flow = type(scheduler).__name__, config.parameterization != "diffusion"
    if flow:
        advice = "use FlowMatchEulerDiscreteScheduler"
    else:
        advice = "use DDPMScheduler, DPMSolverMultistepScheduler or another of that kind"
    if not _steps_alone(scheduler):
        raise ValueError(f"{name} does not step from noise to data by the model's prediction alone; {advice}.")
    reason = next((why for part, why in _OTHER_MODELS.items() if part in name), "")
    if reason and type(scheduler) is not type(own):  # a consistency model comes with a scheduler for it
        raise ValueError(f"{name} {reason}; {advice}.")
    if not flow and is_flow_matching(scheduler):
        raise ValueError(f"{name} steps with a velocity, but this model was trained as a diffusion model; {advice}.")
    if flow and not is_flow_matching(scheduler):
        raise ValueError(f"This model predicts a velocity (flow matching), which {name} does not step with; {advice}.")
    if flow:
        _check_straight_path(scheduler)
    elif _noise_levels(scheduler) is None:
        raise ValueError(f"{name} does not step through the noise levels of DDPM; {advice}.")
    else:
        _check_noise_levels(scheduler, config, own)
    if latent:
        _check_bounds(scheduler, own)


def _steps_alone(scheduler: Any) -> bool:
    """Whether a step takes only the prediction, the timestep and the sample."""
    try:
        inspect.signature(scheduler.step).bind(None, None, None, return_dict=False)
    except (AttributeError, TypeError):
        return False
    return True


def _noise_levels(scheduler: Any) -> Tensor | None:
    """(T,) the signal's share of the variance by timestep, float32 on the CPU; None if the scheduler has none."""
    levels = getattr(scheduler, "alphas_cumprod", None)
    return levels.float().cpu() if isinstance(levels, Tensor) else None


def _check_straight_path(scheduler: Any) -> None:
    name, fields = type(scheduler).__name__, scheduler.config
    if isinstance(scheduler, TableScheduler):  # has checked itself
        return
    if not any(part in name for part in _VELOCITY) and not fields.get("use_flow_sigmas"):
        raise ValueError(f"{name} steps along the straight path with use_flow_sigmas=True only.")
    if fields.num_train_timesteps != FLOW_TIMESTEPS:
        raise ValueError(f"Flow models count the time in {FLOW_TIMESTEPS} steps, and this {name} in "
                         f"{fields.num_train_timesteps}; set num_train_timesteps={FLOW_TIMESTEPS}.")  # fmt: skip


def _check_noise_levels(scheduler: Any, config: DiTConfig, own: Any) -> None:
    name, fields = type(scheduler).__name__, scheduler.config
    if fields.get("timestep_type") == "continuous":
        raise ValueError(f'{name} with timestep_type="continuous" gives the model logarithms of noise levels '
                         'instead of timesteps; set timestep_type="discrete".')  # fmt: skip
    levels, trained = _noise_levels(scheduler), _noise_levels(own)
    unequal = levels is not None and trained is not None and not _equal(levels, trained)
    kinds = [one.config.get("prediction_type", "epsilon") for one in (scheduler, own)]
    if isinstance(scheduler, TableScheduler) and (unequal or kinds[0] != kinds[1]):
        raise ValueError(f"This {name} has other noise levels than this model was trained for, or is for another kind "
                         "of prediction; fit one to the model with `dit-hub solver fit`.")  # fmt: skip
    if unequal:
        raise ValueError(f"This {name} has other noise levels than this model was trained for; make it with "
                         f"{name}.from_config(pipe.scheduler.config{_differing(fields, own.config)}).")  # fmt: skip
    if kinds[0] != kinds[1]:
        raise ValueError(f"This {name} takes the prediction for {kinds[0]!r}, but this model predicts {kinds[1]!r}; "
                         f"set prediction_type={kinds[1]!r}.")  # fmt: skip
    if uses_learned_variance(scheduler) and not config.learn_sigma:
        raise ValueError("The scheduler wants a learned variance, which this model does not predict; official sampling "
                         'of such models uses variance_type="fixed_large".')  # fmt: skip


def _check_bounds(scheduler: Any, own: Any) -> None:
    """Refuse a scheduler that clips the predicted data to -1..1 if the model's own does not."""
    name = type(scheduler).__name__
    for setting in _BOUNDS:
        here = setting in settings_of(type(scheduler)) and scheduler.config.get(setting)
        if here and not own.config.get(setting):
            raise ValueError(f"This {name} clips the prediction to -1..1, and latents go beyond; make it with "
                             f"{name}.from_config(pipe.scheduler.config, {setting}=False).")  # fmt: skip


def settings_of(kind: type) -> Container[str]:
    """The settings that a class of schedulers reads; its configs may hold others."""
    return inspect.signature(kind).parameters


def _equal(levels: Tensor, others: Tensor) -> bool:
    """Whether two noise schedules are the same; a last level of 0 is a small number in some schedulers."""
    return levels.shape == others.shape and torch.allclose(levels, others, rtol=1e-3, atol=1e-6)


def _differing(fields: Any, own: Any) -> str:
    """Further arguments for `from_config`: the model's own noise settings where the other's differ."""
    pairs = {name: (fields.get(name, default), own.get(name, default)) for name, default in _NOISE_FIELDS.items()}
    return "".join(f", {name}={shown(value)}" for name, (other, value) in pairs.items() if other != value)


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


def default_steps(scheduler: Any, usual: int = 50) -> int:
    """The number of steps of a run that names none.

    Args:
        scheduler: of the run; a `TableScheduler` takes the most that it has a table of, and an `LCMScheduler` 4, or its
            `original_inference_steps` if fewer.
        usual: of other schedulers, at most as many as the noise schedule has timesteps.
    """
    if isinstance(scheduler, TableScheduler):
        return max(scheduler.steps)
    if isinstance(scheduler, diffusers.LCMScheduler):
        return min(_CONSISTENCY_STEPS, scheduler.config["original_inference_steps"])
    return min(usual, scheduler.config.num_train_timesteps)


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[int] | Literal["official"] | None,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
) -> None:
    """Prepare a scheduler for a run; see `DiTPipeline.__call__` for the arguments.

    Raises:
        ValueError: fewer than one step or too many, or timesteps or sigmas given to a scheduler that takes none.
    """
    if sigmas is not None:
        _set_sigmas(scheduler, sigmas, timesteps, device)
        return
    flow, trained = is_flow_matching(scheduler), scheduler.config.num_train_timesteps
    between = flow or hasattr(scheduler, "table")  # can step to times between whole timesteps
    steps = whole_number("num_inference_steps", num_inference_steps, 1, None if between else trained)
    if timesteps is None:
        scheduler.set_timesteps(steps, device=device)
        return
    if isinstance(timesteps, str) and timesteps != "official":
        raise ValueError(f'timesteps must be a list of numbers or "official", not {timesteps!r}.')
    name, accepted = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    if flow and ("sigmas" not in accepted or "Flow" not in name):  # the others take something else under these names
        raise ValueError(f"{name} takes no list of timesteps; FlowMatchEulerDiscreteScheduler does.")
    if isinstance(timesteps, str) and flow:  # evenly from 1 down to 0
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)
        return
    if "timesteps" not in accepted:
        raise ValueError(
            f"{name} takes no list of timesteps; DDPMScheduler does, and for DDIM "
            'DPMSolverMultistepScheduler(solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero").'
        )
    visited = official_timesteps(steps, trained) if isinstance(timesteps, str) else _falling(timesteps, trained, flow)
    scheduler.set_timesteps(timesteps=visited, device=device)


def _set_sigmas(scheduler: Any, sigmas: Any, timesteps: Any, device: torch.device | str) -> None:
    if timesteps is not None:
        raise ValueError("Give timesteps or sigmas, not both.")
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        name = type(scheduler).__name__
        raise ValueError(f"{name} takes no sigmas; EulerDiscreteScheduler and FlowMatchEulerDiscreteScheduler do.")
    try:
        levels = [real_number("sigmas", sigma, 0) for sigma in sigmas]
    except TypeError:
        raise ValueError(f"sigmas must be a list of numbers, not {shown(sigmas)}.") from None
    if not levels or any(later >= earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError(f"sigmas must fall from step to step, not {shown(sigmas)}.")
    scheduler.set_timesteps(sigmas=levels, device=device)


def _falling(timesteps: Any, trained: int, flow: bool) -> list[Any]:
    """A caller's falling list of timesteps, checked for a model with `trained` of them."""
    values = timesteps.tolist() if isinstance(timesteps, (np.ndarray, Tensor)) else timesteps
    if not isinstance(values, Sequence) or not values:
        raise ValueError(f'timesteps must be a list of numbers or "official", not {shown(timesteps)}.')
    checked = [real_number("A timestep", value, 0, trained if flow else trained - 1) for value in values]
    if not flow:
        checked = [whole_number("A timestep", int(value) if value.is_integer() else value) for value in checked]
    if any(later >= earlier for earlier, later in itertools.pairwise(checked)):
        raise ValueError(f"timesteps must fall, from noise to data, not {shown(timesteps)}.")
    return checked


def checked_eta(scheduler: Any, eta: Any) -> float:
    """The DDIM paper's eta.

    Raises:
        ValueError: it is not within 0 and 1, or the scheduler takes none.
    """
    eta = real_number("eta", eta, 0, 1)
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta {eta} is for DDIMScheduler; {type(scheduler).__name__} takes none.")
    return eta


def uses_learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler takes the variance from the prediction, as only a DDPM or its table does, when set to.

    Others keep a DDPM's `variance_type` in their config when they are made from it.
    """
    if isinstance(scheduler, TableScheduler):
        return scheduler.uses_variance
    takes_variance = isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler))
    return takes_variance and str(scheduler.config.get("variance_type")).startswith("learned")


def without_foreign_variance(scheduler: Any) -> Any:
    """The scheduler, or a copy that ignores the learned variance, if the scheduler would misread it.

    DPM solvers made from a DDPM's config act on its `variance_type`: they keep 3 channels of any prediction.
    """
    inherited = str(scheduler.config.get("variance_type")).startswith("learned")
    acts_on_it = "variance_type" in settings_of(type(scheduler))
    if inherited and acts_on_it and not uses_learned_variance(scheduler):
        return type(scheduler).from_config(scheduler.config, variance_type=None)
    return scheduler


def prediction_for(scheduler: Any, prediction: Tensor, channels: int) -> Tensor:
    """(N, C or 2C, H, W) -> what the scheduler steps with: all of it, or no variance if it uses none."""
    return prediction if uses_learned_variance(scheduler) else prediction[:, :channels]


def scaled_input(scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
    """What the model sees of a sample; schedulers of flow matching leave it alone, and have no such method."""
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
