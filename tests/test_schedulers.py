"""Every scheduler class of diffusers in the pipeline: it samples what DDPM samples, or is refused before sampling.

The denoiser is exact: the data are normal and independent, so the best prediction at every noise level is known.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.schedulers
import pytest
import torch
from torch import Tensor

from dit_hub import DiTConfig, DiTPipeline
from dit_hub.schedulers import (
    check_scheduler,
    official_scheduler,
    official_timesteps,
    scheduler_from_dict,
    switch_scheduler,
)
from dit_hub.solving import restart_scheduler

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

# The data: the mean of each channel, and the deviation of every number from it.
MEAN, DEVIATION = torch.linspace(-1, 1, 4).view(1, 4, 1, 1), 0.5

# Schedulers that draw no further noise, after 50 steps: relative error of the samples against the exact flow.
# First-order solvers make 3 %, a wrong noise level 20 % and more.
STEPS, LARGEST_ERROR = 50, 0.05

# Those that draw noise at every step, after 100 steps: error of each channel's mean and of the deviation, in deviations
# and against DDPM of 250 steps. 4096 numbers give a mean to within 0.016, and few steps make deviations small.
STOCHASTIC_STEPS, LARGEST_SHIFT = 100, 0.08

DETERMINISTIC = {
    "DDIMParallelScheduler", "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
STOCHASTIC = {
    "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "SASolverScheduler",
}  # fmt: skip
FLOW_DETERMINISTIC = {
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
FLOW_STOCHASTIC = {"LTXEulerAncestralRFScheduler", "SASolverScheduler"}

# Schedulers of models that are no DiTs, or that step from data to noise.
OTHERS = {
    "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler", "CosineDPMSolverMultistepScheduler", "DDIMInverseScheduler",
    "DDPMWuerstchenScheduler", "DPMSolverMultistepInverseScheduler", "DiscreteDDIMScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EntropyBoundScheduler", "FlowMatchLCMScheduler",
    "HeliosDMDScheduler", "HeliosScheduler", "IPNDMScheduler", "KarrasVeScheduler", "LCMScheduler",
    "MiniMaxH3Scheduler", "PiflowScheduler", "RFD4ProteinaScheduler", "RePaintScheduler", "SCMScheduler",
    "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "UnCLIPScheduler", "VQDiffusionScheduler",
}  # fmt: skip
REFUSED = OTHERS | ((FLOW_DETERMINISTIC | FLOW_STOCHASTIC) - (DETERMINISTIC | STOCHASTIC))
FLOW_REFUSED = OTHERS | ((DETERMINISTIC | STOCHASTIC) - (FLOW_DETERMINISTIC | FLOW_STOCHASTIC))

NEEDED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
NEED_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}


def own_scheduler() -> Any:
    """The scheduler that the diffusion model comes with."""
    noise = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    return diffusers.DDPMScheduler(**noise, variance_type="fixed_small", clip_sample=False, timestep_spacing="linspace")


class ExactDenoiser:
    """The best prediction for the data above: of the noise at DDPM's levels, or of the velocity."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, parameterization: str = "diffusion"):
        tiny: dict[str, Any] = {"sample_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.config = DiTConfig(**tiny, num_classes=0, learn_sigma=False, parameterization=parameterization)
        levels = own_scheduler().alphas_cumprod.double()
        self.log_noise_to_signal = ((1 - levels) / levels).log()
        self.calls = 0

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: None) -> Any:
        self.calls += 1
        signal, noise = self.path(timestep.double().view(-1, 1, 1, 1))
        whitened = (hidden_states - signal * MEAN) / (signal**2 * DEVIATION**2 + noise**2)
        best = {"noise": noise * whitened, "data": MEAN + signal * DEVIATION**2 * whitened}
        flow = self.config.parameterization == "flow"
        return SimpleNamespace(sample=(best["noise"] - best["data"] * flow).to(hidden_states.dtype))

    def path(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of data and noise in a sample; between two timesteps of DDPM, interpolated as Karras solvers do."""
        if self.config.parameterization == "flow":
            return 1 - timestep / 1000, timestep / 1000
        below = timestep.floor().long().clamp(0, 998)
        first, second = self.log_noise_to_signal[below], self.log_noise_to_signal[below + 1]
        share = torch.sigmoid(first + (timestep - below) * (second - first))
        return (1 - share).sqrt(), share.sqrt()


def make(name: str, config: Any = None, **fields: Any) -> Any:
    """A scheduler by its name, from the config of another one if possible."""
    kind = getattr(diffusers.schedulers, name)
    needed = {**NEEDED.get(name, {}), **fields}
    return kind(**needed) if config is None else kind.from_config(config, **needed)


def pipeline(scheduler: Any, parameterization: str = "diffusion") -> DiTPipeline:
    """The exact denoiser with this scheduler instead of its own."""
    own = own_scheduler() if parameterization == "diffusion" else diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = DiTPipeline(ExactDenoiser(parameterization), own)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    return pipe


def noise() -> Tensor:
    return torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(pipe: DiTPipeline, steps: int, **arguments: Any) -> Tensor:
    fixed = {"generator": torch.Generator().manual_seed(1), "output_type": "latent", "latents": noise()}
    return pipe(None, num_inference_steps=steps, **fixed, **arguments).images


def error_of_the_flow(samples: Tensor) -> float:
    exact = MEAN + DEVIATION * noise()
    return ((samples - exact).norm() / exact.norm()).item()


def for_velocities(name: str) -> Any:
    """A scheduler that steps along the straight path; general ones are set to."""
    general = name in DETERMINISTIC | STOCHASTIC
    return make(name, **({"prediction_type": "flow_prediction", "use_flow_sigmas": True} if general else {}))


def test_every_scheduler_class_of_diffusers_is_in_a_list() -> None:
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    names |= {"ConsistencyDecoderScheduler"}  # not named there
    assert names == DETERMINISTIC | STOCHASTIC | FLOW_DETERMINISTIC | FLOW_STOCHASTIC | OTHERS


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_deterministic_schedulers_follow_the_exact_flow(name: str) -> None:
    assert error_of_the_flow(draw(pipeline(make(name, own_scheduler().config)), STEPS)) < LARGEST_ERROR


@pytest.mark.parametrize("name", sorted(DETERMINISTIC | STOCHASTIC - {"DPMSolverSDEScheduler"}))
def test_bare_schedulers_draw_the_same_or_are_refused(name: str, drawn_by_ddpm: Tensor) -> None:
    official = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    pipe = pipeline(make(name, **official))
    if pipe.scheduler.config.get("clip_sample"):
        assert_refused(pipe, f"make it with {name}.from_config(pipe.scheduler.config, clip_sample=False).")
        pipe.scheduler = make(name, pipe.scheduler.config, clip_sample=False)
    if name in DETERMINISTIC:
        assert error_of_the_flow(draw(pipe, STEPS)) < LARGEST_ERROR
    else:
        assert_alike(draw(pipe, STOCHASTIC_STEPS), drawn_by_ddpm)


def test_latents_are_not_cut_to_the_range_of_pixels() -> None:
    """diffusers' DDIM clips by default, and configs of classes that cannot clip do not say otherwise."""
    own = make("DPMSolverMultistepScheduler", beta_start=1e-4, beta_end=0.02)
    pipe = DiTPipeline(ExactDenoiser(), own)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make("DDIMScheduler", own.config)
    assert_refused(pipe, "clip_sample=False")
    pipe.scheduler = make("DPMSolverMultistepScheduler", own.config, thresholding=True)
    assert_refused(pipe, "thresholding=False")
    pipe.scheduler = switch_scheduler(own, "ddim")
    assert error_of_the_flow(draw(pipe, STEPS)) < LARGEST_ERROR


def test_pixels_may_be_cut_and_so_may_what_the_models_own_scheduler_cuts() -> None:
    for channels, own in ((3, own_scheduler()), (1, own_scheduler()), (4, diffusers.DDPMScheduler())):
        config = DiTConfig(in_channels=channels)
        check_scheduler(make("DDIMScheduler"), config, own, latent=channels == 4)


@pytest.mark.parametrize("name", sorted(FLOW_DETERMINISTIC))
def test_deterministic_flow_schedulers_follow_the_exact_flow(name: str) -> None:
    assert error_of_the_flow(draw(pipeline(for_velocities(name), "flow"), STEPS)) < LARGEST_ERROR


@pytest.fixture(scope="module")
def drawn_by_ddpm() -> Tensor:
    samples = draw(pipeline(own_scheduler()), 250)
    assert abs(samples.sub(MEAN).std().item() / DEVIATION - 1) < 0.04
    return samples


def assert_alike(samples: Tensor, expected: Tensor) -> None:
    """The same means and deviation."""
    shift = (samples.mean((0, 2, 3)) - expected.mean((0, 2, 3))).abs().max() / DEVIATION
    assert shift < LARGEST_SHIFT
    assert abs((samples - MEAN).std() - (expected - MEAN).std()) / DEVIATION < LARGEST_SHIFT


@pytest.mark.parametrize("name", sorted(STOCHASTIC - {"DPMSolverSDEScheduler"}))
def test_stochastic_schedulers_draw_what_ddpm_draws(name: str, drawn_by_ddpm: Tensor) -> None:
    assert_alike(draw(pipeline(make(name, own_scheduler().config)), STOCHASTIC_STEPS), drawn_by_ddpm)


@pytest.mark.parametrize("name", sorted(FLOW_STOCHASTIC))
def test_stochastic_flow_schedulers_draw_what_ddpm_draws(name: str, drawn_by_ddpm: Tensor) -> None:
    assert_alike(draw(pipeline(for_velocities(name), "flow"), STOCHASTIC_STEPS), drawn_by_ddpm)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_restarts_draw_what_ddpm_draws(kind: str, drawn_by_ddpm: Tensor) -> None:
    own = own_scheduler() if kind == "diffusion" else diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler = restart_scheduler(own, 40, (0.1, 0.5), restarts=2, restart_steps=10)
    samples = draw(pipeline(scheduler, kind), 60)
    assert_alike(samples, drawn_by_ddpm)
    exact = MEAN + DEVIATION * noise()
    assert (samples - exact).norm() > 0.3 * exact.norm()  # the noise is fresh
    for interval, words in (((0.01, 0.5), "leaves no step of 40"), ((0.5, 0.1), "interval"), ((0.2, 0.2), "no step")):
        with pytest.raises(ValueError, match=words):
            restart_scheduler(own, 40, interval)


@pytest.mark.parametrize("name", sorted(NEED_TORCHSDE))
def test_schedulers_of_torchsde_draw_too_or_ask_for_it(name: str, drawn_by_ddpm: Tensor) -> None:
    if not diffusers.utils.is_torchsde_available():
        with pytest.raises(ImportError, match="requires the torchsde library"):
            make(name)
    elif name in STOCHASTIC:
        assert_alike(draw(pipeline(make(name, own_scheduler().config)), STEPS), drawn_by_ddpm)
    else:
        assert_refused(pipeline(make(name)))


VISITING = {
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "TCDScheduler",
}  # fmt: skip
FLOW_VISITING = {"FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"}

given_timesteps = pytest.mark.parametrize("timesteps", ["official", list(range(999, 0, -20))], ids=["official", "list"])


@given_timesteps
@pytest.mark.parametrize("name", sorted(DETERMINISTIC | FLOW_DETERMINISTIC | FLOW_STOCHASTIC))
def test_given_timesteps_are_visited_or_refused(name: str, timesteps: Any) -> None:
    pipes = []
    if name in DETERMINISTIC:
        pipes.append((pipeline(make(name, own_scheduler().config)), name in VISITING))
    if name in FLOW_DETERMINISTIC | FLOW_STOCHASTIC:
        pipes.append((pipeline(for_velocities(name), "flow"), name in FLOW_VISITING))
    for pipe, visits in pipes:
        if visits:
            assert error_of_the_flow(draw(pipe, STEPS, timesteps=timesteps)) < LARGEST_ERROR
            assert len(set(pipe.scheduler.timesteps.tolist())) == 50
        else:
            assert_refused(pipe, "takes no list of timesteps", timesteps=timesteps)


# --- Refused ---------------------------------------------------------------------------------------------------------


def assert_refused(pipe: DiTPipeline, words: str = "", **arguments: Any) -> None:
    """One sentence, before the model is called or noise is drawn."""
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError) as caught:
        pipe(None, num_inference_steps=10, generator=generator, output_type="latent", **arguments)
    message = str(caught.value)
    assert type(pipe.scheduler).__name__ in message
    assert message.endswith(".")
    assert "\n" not in message
    assert words in message
    assert pipe.transformer.calls == 0
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def makers(name: str, own: Any) -> list[Callable[[], Any]]:
    """Bare, and from the config of the model's scheduler."""
    kind: Any = getattr(diffusers.schedulers, name, None)
    if name == "ConsistencyDecoderScheduler":
        kind = diffusers.schedulers.scheduling_consistency_decoder.ConsistencyDecoderScheduler
    needed = NEEDED.get(name, {})
    bare: list[Callable[[], Any]] = [lambda: kind(**needed)]
    # diffusers refuses to create this one with linear noise levels.
    return bare if name == "UnCLIPScheduler" else [*bare, lambda: kind.from_config(own.config, **needed)]


@pytest.mark.parametrize("name", sorted(REFUSED - NEED_TORCHSDE))
def test_schedulers_of_other_models_are_refused(name: str) -> None:
    for maker in makers(name, own_scheduler()):
        assert_refused(pipeline(maker()))


@pytest.mark.parametrize("name", sorted(FLOW_REFUSED - NEED_TORCHSDE))
def test_schedulers_of_other_models_are_refused_for_velocities(name: str) -> None:
    assert_refused(pipeline(makers(name, None)[0](), "flow"))


def test_a_scheduler_of_other_noise_levels_draws_something_else() -> None:
    """The bound above tells the two apart: here the pipeline treats the wrong scheduler as the model's own."""
    pipe = DiTPipeline(ExactDenoiser(), diffusers.CogVideoXDDIMScheduler.from_config(own_scheduler().config))
    pipe.set_progress_bar_config(disable=True)
    assert error_of_the_flow(draw(pipe, STEPS)) > 4 * LARGEST_ERROR


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_bare_scheduler_of_other_noise_levels_is_refused(name: str) -> None:
    own = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe = DiTPipeline(ExactDenoiser(), own)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make(name)
    assert_refused(pipe, f"other noise levels than this model was trained for; make it with {name}.from_config(")
    assert_refused(pipe, "pipe.scheduler.config, beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012).")
    pipe.scheduler = make(name, own.config)
    draw(pipe, 4)
    assert pipe.transformer.calls == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prediction_type": "v_prediction"}, "takes the prediction for 'v_prediction', but this model predicts"),
        ({"timestep_type": "continuous"}, 'set timestep_type="discrete"'),
        ({"num_train_timesteps": 500}, "num_train_timesteps=1000)"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=False)"),
        ({"trained_betas": [1e-3] * 1000}, "trained_betas=None)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_the_model_was_not_trained_for_are_refused(fields: dict[str, Any], words: str) -> None:
    assert_refused(pipeline(make("EulerDiscreteScheduler", own_scheduler().config, **fields)), words)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 100}, "set num_train_timesteps=1000"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas=True only"),
        ("DPMSolverMultistepScheduler", {}, "predicts a velocity"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "predicts a velocity"),
    ],
)
def test_settings_that_leave_the_straight_path_are_refused(name: str, fields: dict[str, Any], words: str) -> None:
    assert_refused(pipeline(make(name, **fields), "flow"), words)


def test_settings_that_keep_the_noise_levels_are_free() -> None:
    for fields in ({"use_karras_sigmas": True}, {"solver_order": 3}, {"final_sigmas_type": "zero"}):
        pipe = pipeline(make("DPMSolverMultistepScheduler", own_scheduler().config, **fields))
        assert error_of_the_flow(draw(pipe, STEPS)) < LARGEST_ERROR


def test_the_advice_helps_where_defaults_of_classes_differ() -> None:
    """diffusers' `from_config` replaces the old class's defaults by the new one's."""
    pipe = DiTPipeline(ExactDenoiser(), diffusers.DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    kind: Any = diffusers.HeunDiscreteScheduler
    own = pipe.scheduler
    pipe.scheduler = kind.from_config(own.config)
    assert_refused(pipe, "HeunDiscreteScheduler.from_config(pipe.scheduler.config, beta_start=0.0001, beta_end=0.02).")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, beta_start=0.0001, beta_end=0.02)
    assert error_of_the_flow(draw(pipe, STEPS)) < LARGEST_ERROR
    pipe.scheduler = switch_scheduler(own, "heun")
    assert error_of_the_flow(draw(pipe, STEPS)) < LARGEST_ERROR


# --- The official ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("learned", "variance"), [(True, "learned_range"), (False, "fixed_large")])
def test_the_official_scheduler_is_ddpm_with_adms_noise(learned: bool, variance: str) -> None:
    scheduler = official_scheduler(DiTConfig(learn_sigma=learned))
    assert type(scheduler) is diffusers.DDPMScheduler
    expected = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "variance_type": variance, "clip_sample": False, "timestep_spacing": "linspace", "prediction_type": "epsilon",
    }  # fmt: skip
    assert {name: scheduler.config[name] for name in expected} == expected


@pytest.mark.parametrize("kind", ["flow", "sit"])
def test_the_straight_path_is_sampled_with_eulers_steps(kind: str) -> None:
    scheduler = official_scheduler(DiTConfig(parameterization=kind, learn_sigma=False))
    assert type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert scheduler.config["num_train_timesteps"] == 1000


@pytest.mark.parametrize("name", ["AutoencoderKL", "logging", "NoScheduler", None])
def test_a_config_names_a_scheduler_of_diffusers(name: str | None) -> None:
    with pytest.raises(ValueError, match=f"diffusers has no scheduler {name!r}"):
        scheduler_from_dict({"_class_name": name})
    assert type(scheduler_from_dict({"_class_name": "DDIMScheduler"})) is diffusers.DDIMScheduler


def test_official_timesteps_are_as_many_as_asked_for() -> None:
    assert official_timesteps(1000) == list(range(999, -1, -1))
    assert official_timesteps(1) == [0]
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"must lie between 1 and 1000, not {count}"):
            official_timesteps(count)
