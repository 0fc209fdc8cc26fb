"""The objectives against the equations of their papers, evaluated by other means."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dit_hub.objectives import (
    flow_matching,
    flow_timesteps,
    min_snr_weight,
    noise_and_variance,
    noise_prediction,
    uniform_timesteps,
    v_prediction,
    variational_bound,
)

OFFICIAL = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
LEVELS = (1 - BETAS).cumprod(0)  # alpha bar
GRID = torch.linspace(-1, 1, 256, dtype=torch.float64)  # the values of an image


class Recorder:
    """A network that keeps what it is given and answers with a constant."""

    def __init__(self, answer: Tensor):
        self.answer = answer

    def __call__(self, noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        self.noisy, self.timestep, self.conditions = noisy, timestep, conditions
        return self.answer


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- Noise and velocity ----------------------------------------------------------------------------------------------


def test_data_are_noised_as_in_equation_4_and_errors_are_squared() -> None:
    """Ho et al. 2020; in double precision, since the official levels are."""
    clean, noise, timestep = random(4, 2, 3), random(4, 2, 3), torch.tensor([0, 1, 500, 999])
    labels = torch.arange(4)
    levels = LEVELS[timestep].view(4, 1, 1)
    for objective, target in (
        (noise_prediction, noise),
        (v_prediction, levels.sqrt() * noise - (1 - levels).sqrt() * clean),
    ):
        network = Recorder(random(4, 2, 3))
        loss = objective(network, OFFICIAL, clean, noise, timestep, class_labels=labels)
        torch.testing.assert_close(
            network.noisy, levels.sqrt() * clean + (1 - levels).sqrt() * noise, rtol=0, atol=1e-12
        )
        torch.testing.assert_close(loss, ((network.answer - target) ** 2).mean((1, 2)), rtol=1e-12, atol=0)
        assert network.timestep is timestep
        assert network.conditions == {"class_labels": labels}


@pytest.mark.parametrize(
    "fields",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "trained_betas": [0.1, 0.3, 0.2, 0.5, 0.4]},
    ],
    ids=str,
)
def test_other_noise_levels_are_the_schedulers(fields: dict[str, Any]) -> None:
    scheduler, network = DDPMScheduler(5, **fields), Recorder(torch.zeros(5, 1))
    clean, noise, timestep = random(5, 1), random(5, 1), torch.arange(5)
    noise_prediction(network, scheduler, clean, noise, timestep)
    expected = scheduler.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(network.noisy, expected, rtol=0, atol=5e-6)  # its tables are float32


def test_the_straight_path_is_its_equation() -> None:
    """x_t = (1 - t) data + t noise, whose velocity is noise - data (Lipman et al. 2023)."""
    clean, noise, times = random(3, 2, 2), random(3, 2, 2), torch.tensor([0.0, 250.0, 1000.0], dtype=torch.float64)
    network = Recorder(random(3, 2, 2))
    loss = flow_matching(network, DDPMScheduler(1000), clean, noise, times, class_labels=times)
    torch.testing.assert_close(network.noisy, torch.stack([clean[0], 0.75 * clean[1] + 0.25 * noise[1], noise[2]]))
    torch.testing.assert_close(loss, ((network.answer - noise + clean) ** 2).mean((1, 2)))
    assert network.timestep is times
    assert network.conditions == {"class_labels": times}


# --- The variational bound -------------------------------------------------------------------------------------------


def posterior(timestep: int) -> tuple[float, float, float]:
    """Weights of data and of noisy data in the mean of q(x_t-1 | x_t, x_0), and its variance (Ho, equation 7)."""
    level, before, beta = (values[timestep].item() for values in (LEVELS, LEVELS / (1 - BETAS), BETAS))
    return (
        math.sqrt(before) * beta / (1 - level),
        math.sqrt(1 - beta) * (1 - before) / (1 - level),
        (1 - before) / (1 - level) * beta,
    )


@pytest.mark.parametrize("timestep", [1, 2, 40, 999])
@pytest.mark.parametrize("fraction", [-1.0, -0.3, 1.0])
def test_the_bound_is_the_divergence_of_two_normal_distributions(timestep: int, fraction: float) -> None:
    clean, noise, predicted = random(2, 3, 4).float(), random(2, 3, 4).float(), random(2, 3, 4).float()
    level = LEVELS[timestep].item()
    noisy = math.sqrt(level) * clean + math.sqrt(1 - level) * noise
    of_clean, of_noisy, least = posterior(timestep)
    most = BETAS[timestep].item()
    share = (fraction + 1) / 2
    estimate = (noisy - math.sqrt(1 - level) * predicted) / math.sqrt(level)
    model = Normal(
        of_clean * estimate + of_noisy * noisy,
        math.exp(0.5 * (share * math.log(most) + (1 - share) * math.log(least))),
        validate_args=False,
    )
    true = Normal(of_clean * clean + of_noisy * noisy, math.sqrt(least))
    expected = kl_divergence(true, model).mean((1, 2)) / math.log(2)
    fractions = torch.full_like(clean, fraction)
    actual = variational_bound(OFFICIAL, clean, noisy, torch.full((2,), timestep), predicted, fractions)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def first_step(mean: float, fraction: float) -> tuple[Tensor, float]:
    """The bound of each value of an image at t = 0, in bits, where the model expects `mean`; and its std."""
    noisy = torch.full((256, 1), mean * math.sqrt(LEVELS[0]))
    zeros = torch.zeros(256, 1)
    bits = variational_bound(
        OFFICIAL, GRID[:, None].float(), noisy, torch.zeros(256, dtype=torch.long), zeros, zeros + fraction
    )
    share = (fraction + 1) / 2
    # The posterior of t = 0 has no variance, so that of t = 1 stands for it.
    variance = share * math.log(BETAS[0]) + (1 - share) * math.log(posterior(1)[2])
    return bits.double(), math.exp(0.5 * variance)


@pytest.mark.parametrize("mean", [-1.003, -0.1, 0.5, 1.003])
@pytest.mark.parametrize("fraction", [-1.0, 0.4, 1.0])
def test_at_the_first_step_the_bound_is_the_likelihood_of_an_image(mean: float, fraction: float) -> None:
    bits, deviation = first_step(mean, fraction)
    expected = Normal(mean, deviation, validate_args=False)
    edges = torch.cat([torch.tensor([-torch.inf]), GRID[1:] - 1 / 255, torch.tensor([torch.inf])]).double()
    probability = expected.cdf(edges[1:]) - expected.cdf(edges[:-1])
    # The tanh form of the normal distribution function is within 3e-4 of it.
    torch.testing.assert_close(2**-bits, probability, rtol=0, atol=6e-4)
    assert (2**-bits).max() > 0.2  # a value that is likely, so that the bound says something
    torch.testing.assert_close((2**-bits).sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(bits.max(), torch.tensor(-math.log2(1e-12)).double())  # no value is impossible


def test_the_bound_of_a_batch_is_that_of_its_samples() -> None:
    clean, predicted, fraction = torch.rand(4, 2, 3, 3) * 2 - 1, torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    noise, timestep = torch.randn(4, 2, 3, 3), torch.tensor([0, 7, 0, 500])
    answer = torch.cat([predicted, fraction], dim=1)
    network = Recorder(answer)
    losses = noise_and_variance(network, OFFICIAL, clean, noise, timestep, class_labels=timestep)
    assert network.conditions == {"class_labels": timestep}
    for index in range(4):
        one = slice(index, index + 1)
        bound = variational_bound(
            OFFICIAL, clean[one], network.noisy[one], timestep[one], predicted[one], fraction[one]
        )
        simple = (predicted[one] - noise[one]).square().mean()
        torch.testing.assert_close(losses[one], bound + simple, rtol=1e-5, atol=1e-5)


# --- Weights and times -----------------------------------------------------------------------------------------------


def test_min_snr_is_its_equation() -> None:
    """Hang et al. 2023, Section 3.4: min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for v."""
    timestep = torch.tensor([0, 100, 300, 999])
    for gamma in (1.0, 5.0):
        for index, t in enumerate(timestep.tolist()):
            ratio = LEVELS[t].item() / (1 - LEVELS[t].item())
            noise, v = (min_snr_weight(OFFICIAL, timestep, gamma, kind)[index].item() for kind in ("noise", "v"))
            assert noise == pytest.approx(min(ratio, gamma) / ratio, rel=1e-3)
            assert v == pytest.approx(min(ratio, gamma) / (ratio + 1), rel=1e-3)


def test_draws_are_those_of_their_generator() -> None:
    def draw(function: Any, **options: Any) -> Tensor:
        return function(200, DDPMScheduler(40), generator=torch.Generator().manual_seed(3), **options)

    for function, options in ((uniform_timesteps, {}), (flow_timesteps, {}), (flow_timesteps, {"logit_normal": True})):
        drawn = draw(function, **options)
        assert drawn.shape == (200,)
        assert torch.equal(drawn, draw(function, **options))
    assert uniform_timesteps(5, DDPMScheduler(40)).dtype == torch.long
    normal = torch.randn(200, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draw(flow_timesteps, logit_normal=True), 40 / (1 + (-normal).exp()))
    even = torch.rand(200, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draw(flow_timesteps), 40 * even)
