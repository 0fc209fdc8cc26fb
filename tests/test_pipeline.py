"""`DiTPipeline`: the official samples, diffusers' schedulers, and everything a caller can ask for."""

import gc
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_hub import DiTPipeline, DiTTransformer, DiTTransformerOutput

from .command_line import python
from .conftest import Golden

# diffusers' schedulers pass tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

MakeModel = Callable[..., DiTTransformer]

# Relative error of whole sampling runs against the official code, in float32.
SAMPLE_RTOL = 1e-5

OFFICIAL_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
}

NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "white shark, great white", 3: "crane", 4: "Siamese cat"}


def new_scheduler(name: str, **fields: Any) -> Any:
    return getattr(diffusers, name)(**{**OFFICIAL_NOISE, **fields})


def official_ddpm(variance_type: str = "learned_range", **fields: Any) -> Any:
    official = {"variance_type": variance_type, "timestep_spacing": "linspace", "clip_sample": False}
    return new_scheduler("DDPMScheduler", **{**official, **fields})


def official_ddim() -> Any:
    fields = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    return new_scheduler("DPMSolverMultistepScheduler", **fields)


def ddim() -> Any:
    return new_scheduler("DDIMScheduler", clip_sample=False)


def pipeline_of(transformer: Any, scheduler: Any = None, **components: Any) -> DiTPipeline:
    pipe = DiTPipeline(transformer, scheduler or ddim(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: DiTPipeline, labels: Any = (1, 2), **arguments: Any) -> Any:
    """A short run from a fixed seed, undecoded unless asked otherwise."""
    fixed = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    return pipe(labels, **{**fixed, **arguments}).images


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_equal_weights(actual: DiTPipeline, expected: DiTPipeline) -> None:
    """Every weight bit for bit. Images may differ: where weights lie in memory decides how some processors sum."""
    for name, module in expected.components.items():
        if isinstance(module, torch.nn.Module):
            weights = dict(actual.components[name].state_dict())
            torch.testing.assert_close(weights, dict(module.state_dict()), rtol=0, atol=0)


def assert_close_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Latents of a random model reach hundreds: the tolerance is a share of the largest."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def assert_different(actual: Tensor, expected: Tensor) -> None:
    assert relative_error(actual, expected) > 1e-4


@pytest.fixture
def pipe(make_model: MakeModel) -> DiTPipeline:
    """A small model of 4 channels in 10 classes, with learned variance, sampled by DDIM; no VAE."""
    return pipeline_of(make_model(), id2label=NAMES)


@pytest.fixture
def latent_pipe(make_model: MakeModel, make_vae: Callable[..., Any]) -> DiTPipeline:
    """The same with a VAE of 2 pixels per latent pixel: 16x16 images."""
    return pipeline_of(make_model(), vae=make_vae())


@pytest.fixture
def unconditional_pipe(make_model: MakeModel) -> DiTPipeline:
    return pipeline_of(make_model(num_classes=0))


# --- The official samples --------------------------------------------------------------------------------------------


def ddpm_error(golden: Golden, monkeypatch: pytest.MonkeyPatch, scheduler: Any, **arguments: Any) -> float:
    """Relative error against the official ancestral sampling with guidance 4 and the same noises."""
    expected = golden.expected
    noises = iter(expected["ddpm.noises"])  # of the doubled batch
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: next(noises)[: shape[0]]
    )
    pipe = pipeline_of(golden.model(), scheduler)
    arguments = {"num_inference_steps": len(expected["ddpm.timesteps"]), "latents": expected["ddpm.z"], **arguments}
    images = sample(pipe, expected["ddpm.y"][:2], guidance_scale=4.0, **arguments)
    return relative_error(images, expected["ddpm.out"])


def ddim_error(golden: Golden, scheduler: Any, **arguments: Any) -> float:
    """Relative error against the official deterministic sampling with guidance 4."""
    expected = golden.expected
    arguments = {"num_inference_steps": len(expected["ddim.timesteps"]), "latents": expected["ddim.z"], **arguments}
    images = sample(pipeline_of(golden.model(), scheduler), expected["ddim.y"][:2], guidance_scale=4.0, **arguments)
    return relative_error(images, expected["ddim.out"])


def official_variance(golden: Golden) -> str:
    return "learned_range" if golden.config["learn_sigma"] else "fixed_large"


@pytest.mark.parametrize("timesteps", [None, "official"])
def test_ddpm_equals_the_official_code(golden: Golden, timesteps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = official_ddpm(official_variance(golden))
    assert ddpm_error(golden, monkeypatch, scheduler, timesteps=timesteps) < SAMPLE_RTOL


@pytest.mark.parametrize("fields", [{"variance_type": "fixed_small"}, {"timestep_spacing": "leading"}])
def test_ddpm_with_other_settings_is_not_the_official_code(
    golden: Golden, fields: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = official_ddpm(**{"variance_type": official_variance(golden), **fields})
    assert ddpm_error(golden, monkeypatch, scheduler) > 50 * SAMPLE_RTOL


def test_ddpm_that_guides_all_channels_is_not_the_official_code(
    golden_a: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ddpm_error(golden_a, monkeypatch, official_ddpm(), guidance_channels=4) > 50 * SAMPLE_RTOL


def test_ddim_equals_the_official_code(golden: Golden) -> None:
    assert ddim_error(golden, official_ddim(), timesteps="official") < SAMPLE_RTOL


@pytest.mark.parametrize("scheduler", [official_ddim, ddim])
def test_ddim_at_other_timesteps_is_not_the_official_code(golden: Golden, scheduler: Callable[[], Any]) -> None:
    assert ddim_error(golden, scheduler()) > 50 * SAMPLE_RTOL


@pytest.mark.parametrize("test", ["ddpm", "ddim"])
def test_official_timesteps_are_the_official_codes(golden: Golden, test: str) -> None:
    expected = golden.expected[f"{test}.timesteps"].tolist()[::-1]
    pipe = pipeline_of(golden.model(), official_ddpm(official_variance(golden)))
    sample(pipe, num_inference_steps=len(expected), timesteps="official")
    assert pipe.scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize("steps", [1, 2, 21, 23, 59, 250])
def test_official_timesteps_accumulate_their_stride_in_floating_point(pipe: DiTPipeline, steps: int) -> None:
    positions = itertools.accumulate(itertools.repeat(999 / max(steps - 1, 1), steps - 1), initial=0.0)
    expected = [round(position) for position in positions][::-1]
    pipe.scheduler = official_ddpm()
    sample(pipe, 1, num_inference_steps=steps, timesteps="official", guidance_scale=1.0)
    assert pipe.scheduler.timesteps.tolist() == expected
    evenly_rounded = np.linspace(0, 999, steps).round()[::-1].tolist()
    assert (expected == evenly_rounded) == (steps not in (21, 23, 59))


def test_timesteps_are_visited_as_given(pipe: DiTPipeline) -> None:
    seen: list[int] = []
    pipe.scheduler = official_ddpm()
    sample(pipe, timesteps=[900, 500, 7], callback_on_step_end=lambda _, step, t, values: seen.append(int(t)))
    assert seen == [900, 500, 7]


def test_timesteps_for_a_scheduler_that_takes_none_are_an_error(pipe: DiTPipeline) -> None:
    with pytest.raises(ValueError, match="DDIMScheduler takes no list of timesteps"):
        sample(pipe, timesteps=[900, 500, 7])


@pytest.mark.parametrize(
    "timesteps", [(900, 500, 7), range(900, 0, -400), np.array([900, 500, 7]), [900.0, 500.0, 7.0]]
)
def test_timesteps_come_in_many_forms(pipe: DiTPipeline, timesteps: Any) -> None:
    pipe.scheduler = official_ddpm()
    assert_same(sample(pipe, timesteps=timesteps), sample(pipe, timesteps=[int(t) for t in timesteps]))


@pytest.mark.parametrize(
    ("timesteps", "complaint"),
    [
        ([], "timesteps must be a list of numbers or"),
        (500, "timesteps must be a list of numbers or"),
        ([500, 900], r"timesteps must fall, from noise to data, not \[500, 900\]"),
        ([500, 500], "timesteps must fall"),
        ([1000, 500], "A timestep must be at most 999, not 1000"),
        ([500, -1], "A timestep must be 0 or more, not -1"),
        ([500.5], "A timestep must be a whole number, not 500.5"),
        (["500"], "A timestep must be a finite number, not '500'"),
        ([[900, 500]], "A timestep must be a finite number, not"),
    ],
)
def test_timesteps_that_cannot_be_visited_are_errors(pipe: DiTPipeline, timesteps: Any, complaint: str) -> None:
    pipe.scheduler = official_ddpm()
    with pytest.raises(ValueError, match=complaint):
        sample(pipe, timesteps=timesteps)


def test_timesteps_by_an_unknown_word_are_an_error(pipe: DiTPipeline) -> None:
    pipe.scheduler = official_ddpm()
    with pytest.raises(ValueError, match="\"official\", not 'oficial'"):
        sample(pipe, timesteps="oficial")


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (7, [7]),
        ([7, 0, 7], [7, 0, 7]),
        (torch.tensor([[3], [9]]), [3, 9]),
        ("tench", [0]),
        ("Tinca tinca", [0]),
        ("tench, Tinca tinca", [0]),
        (" GREAT WHITE ", [2]),
        (["siamese cat", 1], [4, 1]),
        ("siamese-cat", [4]),
        (["Great_White", "great  white"], [2, 2]),
        (np.int64(3), [3]),
        (np.array(3), [3]),
        (np.array([[3], [9]], dtype=np.uint8), [3, 9]),
        (np.array(["tench", "Siamese cat"]), [0, 4]),
        ([np.int32(3), torch.tensor(9), 1], [3, 9, 1]),
        (range(2, 4), [2, 3]),
        ({5: "of a dictionary, the keys"}, [5]),
        ([], []),
        (None, []),
    ],
)
def test_labels_by_id_and_by_name(pipe: DiTPipeline, labels: Any, ids: list[int]) -> None:
    assert pipe.get_label_ids(labels) == ids


def test_labels_by_name_draw_what_their_ids_draw(pipe: DiTPipeline) -> None:
    assert_same(sample(pipe, ["tench", "Siamese cat"]), sample(pipe, [0, 4]))
    assert_same(sample(pipe, "great white"), sample(pipe, torch.tensor([2])))


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("crane", r"names the classes 1 \(crane\), 3 \(crane\)"),
        ("white sharkk", "There is no class named 'white sharkk'. The nearest names: white shark"),
        ("t", "There is no class named 't'"),
        (10, "The label 10 is out of range: the classes are 0 to 9"),
        (-1, "The label -1 is out of range"),
        (1.5, "A label is a name or a whole number, not 1.5"),
        (1.0, "A label is a name or a whole number, not 1.0"),
        (True, "A label is a name or a whole number, not True"),
        (np.float32(2), "A label is a name or a whole number, not "),
        (np.bool_(True), "A label is a name or a whole number, not "),
        (torch.tensor(1.0), "A label is a name or a whole number, not tensor"),
        (None, "A label is a name or a whole number, not None"),
        ([1, 2], r"A label is a name or a whole number, not \[1, 2\]"),
        (b"tench", "A label is a name or a whole number, not b'tench'"),
    ],
)
def test_label_that_names_no_single_class_is_an_error(pipe: DiTPipeline, label: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        sample(pipe, [0, label])


@pytest.mark.parametrize("labels", [None, [], torch.tensor([], dtype=torch.long)])
def test_no_label_is_an_error(pipe: DiTPipeline, labels: Any) -> None:
    with pytest.raises(ValueError, match="Give at least one label of the 10 classes"):
        sample(pipe, labels)


def test_names_for_a_model_without_names_are_an_error(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="classes have no names"):
        sample(pipeline_of(make_model()), "tench")


def test_images_per_label_come_one_label_after_the_other(pipe: DiTPipeline) -> None:
    latents = torch.randn(4, 4, 8, 8)
    images = sample(pipe, [1, 2], num_images_per_label=2, latents=latents)
    assert_same(images, sample(pipe, [1, 1, 2, 2], latents=latents))
    assert_different(images, sample(pipe, [1, 2, 1, 2], latents=latents))


def test_unconditional_model_draws_as_many_as_asked(unconditional_pipe: DiTPipeline) -> None:
    assert sample(unconditional_pipe, None).shape == (1, 4, 8, 8)
    assert sample(unconditional_pipe, None, num_images_per_label=3).shape == (3, 4, 8, 8)
    assert sample(unconditional_pipe, None, latents=torch.randn(5, 4, 8, 8)).shape == (5, 4, 8, 8)


def test_labels_for_an_unconditional_model_are_an_error(unconditional_pipe: DiTPipeline) -> None:
    with pytest.raises(ValueError, match="takes no class_labels"):
        sample(unconditional_pipe, [1])


@pytest.mark.parametrize("labels", [1.0, True, np.array([1.0]), np.array([True]), torch.tensor([0.5]), np.float64(1)])
def test_labels_that_are_no_whole_numbers_are_errors(pipe: DiTPipeline, labels: Any) -> None:
    with pytest.raises(ValueError, match=r"^A label is a name or a whole number, not "):
        sample(pipe, labels)


# --- Numbers that callers pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["num_images_per_label", "num_inference_steps"])
def test_counts_below_one_are_errors(pipe: DiTPipeline, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be 1 or more, not 0"):
        sample(pipe, **{argument: 0})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, not 2.5"),
        ({"num_inference_steps": 4.0}, "num_inference_steps must be a whole number, not 4.0"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number, not True"),
        ({"num_inference_steps": "4"}, "num_inference_steps must be a whole number, not '4'"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most 1000, not 1001"),
        ({"num_images_per_label": 2.5}, "num_images_per_label must be a whole number, not 2.5"),
        ({"num_images_per_label": False}, "num_images_per_label must be a whole number, not False"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number, not nan"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a finite number, not inf"),
        ({"guidance_scale": True}, "guidance_scale must be a finite number, not True"),
        ({"guidance_scale": "4"}, "guidance_scale must be a finite number, not '4'"),
        ({"guidance_scale": [4.0]}, r"guidance_scale must be a finite number, not \[4.0\]"),
        ({"guidance_channels": 0}, "guidance_channels must be 1 or more, not 0"),
        ({"guidance_channels": -1}, "guidance_channels must be 1 or more, not -1"),
        ({"guidance_channels": 5}, "guidance_channels must be at most 4, not 5"),
        ({"guidance_channels": 2.5}, "guidance_channels must be a whole number, not 2.5"),
        ({"guidance_channels": True}, "guidance_channels must be a whole number, not True"),
        ({"eta": math.nan}, "eta must be a finite number, not nan"),
        ({"eta": -0.1}, "eta must be 0 or more, not -0.1"),
        ({"eta": 1.5}, "eta must be at most 1, not 1.5"),
        ({"eta": None}, "eta must be a finite number, not None"),
        ({"height": 8.0}, "height must be a whole number, not 8.0"),
        ({"width": "8"}, "width must be a whole number, not '8'"),
        ({"height": True}, "height must be a whole number, not True"),
        ({"generator": 0}, r"generator must be a torch.Generator, such as .* or a list of them, not 0"),
        ({"generator": [0, 1]}, r"generator must be a torch.Generator, such as .* or a list of them, not \[0, 1\]"),
        ({"generator": np.random.default_rng(0)}, "generator must be a torch.Generator"),
        ({"latents": [[0.0]]}, r"latents must be a tensor of floats, not \[\[0.0\]\]"),
        ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, "latents must be a tensor of floats, not tensor"),
        ({"latents": np.zeros((2, 4, 8, 8), dtype=int)}, "latents must be a tensor of floats, not array"),
        ({"latents": torch.tensor(0.0)}, r"latents must have the shape \(2, 4, 8, 8\), not \(1,\)"),
        ({"callback_on_step_end": "print"}, "callback_on_step_end must be a function, not 'print'"),
        ({"callback_on_step_end": lambda *_: 1}, "callback_on_step_end must return None, or a dict"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, r"callback.* shape \(2, 4, 8, 8\), not"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, "callback_on_step_end must return None, or a dict"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_are_refused_in_one_sentence(
    pipe: DiTPipeline, arguments: dict[str, Any], complaint: str
) -> None:
    generator = seeded()
    with pytest.raises(ValueError, match=f"^{complaint}") as caught:
        sample(pipe, **{"generator": generator, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    if "callback_on_step_end" not in arguments:
        assert torch.equal(generator.get_state(), seeded().get_state())  # nothing was drawn


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({"num_inference_steps": np.int64(3)}, {"num_inference_steps": 3}),
        ({"num_images_per_label": np.int64(2)}, {"num_images_per_label": 2}),
        ({"guidance_scale": np.float32(2)}, {"guidance_scale": 2.0}),
        ({"guidance_scale": torch.tensor(2.0)}, {"guidance_scale": 2}),
        ({"guidance_channels": np.int64(2)}, {"guidance_channels": 2}),
        ({"height": np.int64(12)}, {"height": 12}),
        ({"eta": np.float64(0.5)}, {"eta": 0.5}),
        ({"guidance_interval": [0.0, 0.6]}, {"guidance_interval": (0.0, 0.6)}),
        ({"guidance_interval": np.array([0.0, 0.6])}, {"guidance_interval": (0.0, 0.6)}),
        ({"latents": np.full((2, 4, 8, 8), 0.5)}, {"latents": torch.full((2, 4, 8, 8), 0.5)}),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_are_numbers(
    pipe: DiTPipeline, arguments: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert_same(sample(pipe, **arguments), sample(pipe, **plain))


# --- Guidance --------------------------------------------------------------------------------------------------------


def test_guidance_defaults_to_4_where_there_is_a_null_class(pipe: DiTPipeline) -> None:
    assert_same(sample(pipe), sample(pipe, guidance_scale=4.0))
    assert_different(sample(pipe), sample(pipe, guidance_scale=1.0))


def test_guidance_is_off_where_there_is_no_null_class(make_model: MakeModel, unconditional_pipe: DiTPipeline) -> None:
    pipe = pipeline_of(make_model(class_dropout_prob=0.0))
    assert_same(sample(pipe), sample(pipe, guidance_scale=1.0))
    for other, labels in ((pipe, [1]), (unconditional_pipe, None)):
        with pytest.raises(ValueError, match=r"guidance_scale 1.5 needs a null class"):
            sample(other, labels, guidance_scale=1.5)


def test_guidance_never_touches_the_variance(make_model: MakeModel) -> None:
    """Whatever the number of channels: here with one, of which the official three would be noise and variance."""
    for channels in (1, 2, 4):
        model = make_model(in_channels=channels)
        with torch.no_grad():  # a variance that depends on the class
            model.final_layer.linear.weight.mul_(5.0)
        seen: list[Tensor] = []
        pipe = pipeline_of(model, official_ddpm())
        step: Any = pipe.scheduler.step

        def watch(output: Tensor, *rest: Any, step: Any = step, seen: list[Tensor] = seen, **more: Any) -> Any:
            seen.append(output)
            return step(output, *rest, **more)

        pipe.scheduler.step = watch
        sample(pipe, guidance_scale=7.0, num_inference_steps=1)
        noise = torch.randn(2, channels, 8, 8, generator=seeded())
        timestep = pipe.scheduler.timesteps[:1].expand(2)
        with torch.no_grad():
            conditional = model(noise, timestep, torch.tensor([1, 2])).sample
            null = model(noise, timestep, torch.tensor([10, 10])).sample
        guided = null + 7.0 * (conditional - null)
        count = model.config.guided_channels
        torch.testing.assert_close(seen[0][:, :count], guided[:, :count], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[0][:, count:], conditional[:, count:], rtol=1e-5, atol=1e-5)
        assert count == (3 if channels == 4 else channels)
        assert_different(conditional[:, channels:], guided[:, channels:])


def test_guidance_channels_default_to_the_models(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model(guidance_channels=2))
    assert_same(sample(pipe), sample(pipe, guidance_channels=2))
    assert_different(sample(pipe), sample(pipe, guidance_channels=3))


def forward_rows(pipe: DiTPipeline, **arguments: Any) -> list[int]:
    """How many rows the model computed at each step."""
    rows: list[int] = []
    hook = pipe.transformer.register_forward_hook(lambda _, inputs, output: rows.append(len(output[0])))
    sample(pipe, **arguments)
    hook.remove()
    return rows


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({}, [4, 4, 4, 4, 4]),
        ({"guidance_scale": 1.0}, [2, 2, 2, 2, 2]),
        ({"guidance_interval": (0.2, 0.8)}, [2, 4, 4, 4, 2]),
        ({"guidance_interval": (0.25, 0.5)}, [2, 2, 4, 4, 2]),  # both ends included
        ({"guidance_interval": (0.0, 0.0)}, [2, 2, 2, 2, 4]),
        ({"guidance_every": 2}, [4, 2, 4, 2, 4]),
        ({"guidance_every": 9}, [4, 2, 2, 2, 2]),
        ({"guidance_every": 2, "guidance_interval": (0.2, 0.8)}, [2, 4, 2, 4, 2]),  # of the guided ones
        ({"guidance_every": 2, "guidance_scale": 1.0}, [2, 2, 2, 2, 2]),
    ],
)
def test_steps_outside_the_guidance_interval_or_between_cost_one_pass(
    pipe: DiTPipeline, arguments: dict[str, Any], rows: list[int]
) -> None:
    pipe.scheduler = official_ddpm()
    assert forward_rows(pipe, timesteps=[999, 750, 500, 250, 0], **arguments) == rows


def test_guidance_interval_of_everything_and_of_nothing(pipe: DiTPipeline) -> None:
    assert_same(sample(pipe, guidance_interval=(0.0, 1.0)), sample(pipe))
    # The null class is among the conditions computed ahead, and the number of rows decides how some processors sum.
    never = sample(pipe, guidance_interval=(0.999, 1.0))
    assert_close_relative(never, sample(pipe, guidance_scale=1.0), 1e-6)


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.5,), 0.5, None, "01", (math.nan, 1.0)])
def test_guidance_interval_that_is_none_is_an_error(pipe: DiTPipeline, interval: Any) -> None:
    with pytest.raises(ValueError, match="guidance_interval must be two rising numbers between 0 and 1"):
        sample(pipe, guidance_interval=interval)


@pytest.mark.parametrize("plain", [False, True])  # modulations ahead of the loop, or as other runtimes
def test_a_step_between_guides_by_the_last_difference(make_model: MakeModel, plain: bool) -> None:
    model = make_model()
    seen: list[Tensor] = []
    options: dict[str, Any] = {
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "callback_on_step_end": lambda _, __, ___, tensors: seen.extend(tensors.values()),
        "callback_on_step_end_tensor_inputs": ["noise_pred", "latents"],
    }
    pipe = pipeline_of(PlainDenoiser(model) if plain else model)
    last = sample(pipe, **options, guidance_every=2)
    first, latents, second, _ = seen

    def predict(latents: Tensor, timestep: Any, labels: list[int]) -> Tensor:
        with torch.no_grad():
            return model(latents, timestep, torch.tensor(labels)).sample[:, :4]

    begin, end = pipe.scheduler.timesteps
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    difference = (predict(noise, begin, [1, 2]) - predict(noise, begin, [10, 10]))[:, :3]  # three channels of four
    for actual, conditional in ((first, predict(noise, begin, [1, 2])), (second, predict(latents, end, [1, 2]))):
        expected = torch.cat([conditional[:, :3] + 2 * difference, conditional[:, 3:]], dim=1)
        assert_close_relative(actual, expected, 1e-5)
    assert_different(last, sample(pipe, guidance_scale=3.0, num_inference_steps=2))


def test_guidance_in_every_step_is_the_default(pipe: DiTPipeline) -> None:
    assert_same(sample(pipe, guidance_every=1), sample(pipe))
    assert_different(sample(pipe, guidance_every=2), sample(pipe))


@pytest.mark.parametrize("every", [0, -1, 1.5, None, "2", True])
def test_guidance_every_no_step_is_an_error(pipe: DiTPipeline, every: Any) -> None:
    with pytest.raises(ValueError, match="guidance_every must be"):
        sample(pipe, guidance_every=every)


def test_a_difference_of_the_step_before_is_nearer_than_none(pipe: DiTPipeline) -> None:
    options: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 50}
    expected = sample(pipe, **options)
    drift = [relative_error(sample(pipe, **options, guidance_every=every), expected) for every in (2, 4, 50)]
    without = relative_error(sample(pipe, guidance_scale=1.0, num_inference_steps=50), expected)
    assert 1e-4 < drift[0] < drift[1] < drift[2] < without


# --- Schedulers ------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_a_model_with_learned_variance(pipe: DiTPipeline, name: str) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(ddim().config)
    images = sample(pipe)
    assert images.shape == (2, 4, 8, 8)
    assert images.isfinite().all()
    assert images.std() > 0
    assert_different(images, sample(pipe, [3, 4]))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "DDPMScheduler"])
def test_schedulers_made_from_a_ddpms_config_leave_its_learned_variance(pipe: DiTPipeline, name: str) -> None:
    kind, config = getattr(diffusers, name), official_ddpm().config
    pipe.scheduler = kind.from_config({key: value for key, value in config.items() if key != "variance_type"})
    expected = sample(pipe)
    pipe.scheduler = kind.from_config(config)
    assert_same(sample(pipe), expected)


@pytest.mark.parametrize("parameterization", ["flow", "sit"])
def test_flow_schedulers_sample_flow_models_and_no_others(make_model: MakeModel, parameterization: str) -> None:
    model = make_model(parameterization=parameterization)
    images = sample(pipeline_of(model, diffusers.FlowMatchEulerDiscreteScheduler()))
    assert images.isfinite().all()
    with pytest.raises(ValueError, match="predicts a velocity"):
        sample(pipeline_of(model, ddim()))
    with pytest.raises(ValueError, match="trained as a diffusion model"):
        sample(pipeline_of(make_model(), diffusers.FlowMatchEulerDiscreteScheduler()))


def test_only_ddpm_uses_the_learned_variance(make_model: MakeModel) -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():  # other variances, the same noise
        other.final_layer.linear.bias.unflatten(0, (2, 2, 8))[..., 4:] += 1.0
    for scheduler, is_used in ((official_ddpm(), True), (official_ddpm("fixed_large"), False), (ddim(), False)):
        images = [sample(pipeline_of(transformer, scheduler)) for transformer in (model, other)]
        assert (not torch.equal(*images)) == is_used


def test_learned_variance_of_a_model_without_one_is_an_error(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match='variance_type="fixed_large"'):
        sample(pipeline_of(make_model(learn_sigma=False), official_ddpm()))


def test_scaled_noise_solver_equals_the_unscaled_one(pipe: DiTPipeline) -> None:
    # Euler's method on the ODE in x / alpha is DDIM, and the first-order DPM solver as well.
    timesteps = [750, 500, 250, 0]
    pipe.scheduler = official_ddim()
    expected = sample(pipe, timesteps=timesteps)
    pipe.scheduler = new_scheduler("EulerDiscreteScheduler", timestep_spacing="leading")
    assert_close_relative(sample(pipe), expected, 1e-5)
    assert pipe.scheduler.timesteps.tolist() == timesteps


def test_eta_reaches_ddim(pipe: DiTPipeline) -> None:
    stochastic = sample(pipe, eta=1.0)
    assert_same(sample(pipe, eta=1.0), stochastic)
    assert_different(stochastic, sample(pipe))


def test_eta_for_schedulers_that_take_none_is_an_error(pipe: DiTPipeline) -> None:
    pipe.scheduler = official_ddpm()
    with pytest.raises(ValueError, match=r"eta 1.0 is for DDIMScheduler; DDPMScheduler takes none\."):
        sample(pipe, eta=1.0)
    assert_same(sample(pipe, eta=0.0), sample(pipe))


# --- Noise -----------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(pipe: DiTPipeline) -> None:
    pipe.scheduler = official_ddpm()
    assert_same(sample(pipe, generator=seeded(5)), sample(pipe, generator=seeded(5)))
    assert_different(sample(pipe, generator=seeded(5)), sample(pipe, generator=seeded(6)))


def test_sample_with_its_own_generator_does_not_depend_on_its_batch(pipe: DiTPipeline) -> None:
    pipe.scheduler = official_ddpm()
    batch = sample(pipe, [1, 2, 3], generator=[seeded(7), seeded(8), seeded(9)])
    alone = sample(pipe, [2], generator=[seeded(8)])
    assert_close_relative(batch[1:2], alone, 1e-6)
    with_one_generator = sample(pipe, [1, 2, 3], generator=seeded(8))
    assert_different(with_one_generator[1:2], alone)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_generators_that_do_not_match_the_pictures_are_an_error(pipe: DiTPipeline, count: int) -> None:
    with pytest.raises(ValueError, match="generator"):
        sample(pipe, [1, 2, 3], generator=[seeded(seed) for seed in range(count)])


def test_a_tuple_of_generators_is_as_good_as_a_list(pipe: DiTPipeline) -> None:
    assert_same(sample(pipe, generator=(seeded(7), seeded(8))), sample(pipe, generator=[seeded(7), seeded(8)]))


def test_latents_given_are_the_noise_drawn(pipe: DiTPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    before = latents.clone()
    assert_same(sample(pipe, latents=latents), sample(pipe))
    assert_same(latents, before)


def test_latents_are_scaled_to_the_schedulers_noise(pipe: DiTPipeline) -> None:
    pipe.scheduler = new_scheduler("EulerDiscreteScheduler")
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    assert_same(sample(pipe, latents=latents), sample(pipe))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 3, 8, 8), (2, 4, 8, 12)])
def test_latents_of_another_shape_are_an_error(pipe: DiTPipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must have the shape \(2, 4, 8, 8\)"):
        sample(pipe, latents=torch.randn(shape))


def test_latents_without_labels_say_how_many_unless_a_number_is_asked_for(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model(num_classes=0))
    assert len(sample(pipe, None, latents=torch.randn(3, 4, 8, 8))) == 3
    with pytest.raises(ValueError, match=r"latents must have the shape \(2, 4, 8, 8\)"):
        sample(pipe, None, latents=torch.randn(3, 4, 8, 8), num_images_per_label=2)


# --- Size ------------------------------------------------------------------------------------------------------------


def test_pictures_have_the_training_size_or_the_one_asked_for(make_model: MakeModel, latent_pipe: DiTPipeline) -> None:
    assert sample(pipeline_of(make_model(sample_size=(4, 12)))).shape == (2, 4, 4, 12)
    assert sample(latent_pipe, output_type="pt").shape == (2, 3, 16, 16)
    assert sample(latent_pipe, height=24, output_type="pt").shape == (2, 3, 24, 16)
    assert sample(latent_pipe, height=8, width=32, output_type="pt").shape == (2, 3, 8, 32)


@pytest.mark.parametrize("side", [{"height": 18}, {"width": 1}, {"width": -16}, {"height": 0}])
def test_sizes_that_the_patches_do_not_tile_are_errors(latent_pipe: DiTPipeline, side: dict[str, int]) -> None:
    ((name, value),) = side.items()
    with pytest.raises(ValueError, match=f"{name} {value} is not divisible by 4"):
        sample(latent_pipe, **side)


def test_other_sizes_of_a_model_with_learned_positions_are_an_error(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model(pos_embed="learned", sample_size=(8, 12)))
    assert sample(pipe).shape == (2, 4, 8, 12)
    with pytest.raises(ValueError, match="draws 12x8 images only, not 8x12"):
        sample(pipe, height=12, width=8)


# --- Outputs ---------------------------------------------------------------------------------------------------------


def test_output_types_show_the_same_images(latent_pipe: DiTPipeline) -> None:
    pt, array, drawn = (sample(latent_pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.shape == (2, 3, 16, 16)
    assert 0 <= pt.min() < pt.max() <= 1
    assert_same(torch.from_numpy(array), pt.permute(0, 2, 3, 1))
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in drawn)
    assert_same(torch.from_numpy(np.stack(drawn)), (torch.from_numpy(array) * 255).round().to(torch.uint8))


def test_pixel_models_need_no_vae(make_model: MakeModel) -> None:
    pipe = pipeline_of(make_model(in_channels=3))
    assert pipe.vae_scale_factor == 1
    assert_same(sample(pipe, output_type="pt"), (sample(pipe) / 2 + 0.5).clamp(0, 1))


def test_one_channel_gives_grey_pictures(make_model: MakeModel) -> None:
    image = sample(pipeline_of(make_model(in_channels=1, num_classes=0)), None, output_type="pil")[0]
    assert (image.mode, image.size) == ("L", (8, 8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pixels_are_pictures_and_may_be_cut_to_their_range(make_model: MakeModel, channels: int, mode: str) -> None:
    pipe = pipeline_of(make_model(in_channels=channels), new_scheduler("DDIMScheduler", clip_sample=False))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    assert [image.mode for image in sample(pipe, output_type="pil")] == [mode, mode]


def test_default_output_is_pil(latent_pipe: DiTPipeline) -> None:
    assert isinstance(latent_pipe([1], num_inference_steps=1).images[0], Image.Image)


def test_return_dict_false_gives_a_tuple(pipe: DiTPipeline) -> None:
    (images,) = pipe([1, 2], num_inference_steps=4, generator=seeded(), output_type="latent", return_dict=False)
    assert_same(images, sample(pipe))


def test_unknown_output_type_is_an_error(pipe: DiTPipeline) -> None:
    with pytest.raises(ValueError, match="output_type must be pil, np, pt or latent, not 'jpg'"):
        sample(pipe, output_type="jpg")


def test_callback_sees_every_step(pipe: DiTPipeline) -> None:
    seen: list[tuple[Any, int, int]] = []
    last: dict[str, Tensor] = {}

    def watch(caller: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> None:
        seen.append((caller, step, int(timestep)))
        last.update(values)

    images = sample(pipe, callback_on_step_end=watch)
    assert seen == [(pipe, step, timestep) for step, timestep in enumerate([750, 500, 250, 0])]
    assert_same(last["latents"], images)


def test_callback_may_return_other_things_in_its_dict(pipe: DiTPipeline) -> None:
    assert_same(sample(pipe, callback_on_step_end=lambda *_: {"seen": 1}), sample(pipe))


def test_callback_replaces_the_latents(pipe: DiTPipeline) -> None:
    def stop_at_the_second_step(caller: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else {}

    images = sample(pipe, callback_on_step_end=stop_at_the_second_step)
    other_noise = sample(pipe, callback_on_step_end=stop_at_the_second_step, generator=seeded(3))
    assert_same(images, other_noise)
    assert_different(images, sample(pipe))


# --- VAE -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_divided_by_the_scaling_factor(latent_pipe: DiTPipeline) -> None:
    latents = sample(latent_pipe)
    assert latent_pipe.vae.config.scaling_factor == 0.18215
    decoded = latent_pipe.vae.decode(latents / 0.18215).sample
    assert_same(sample(latent_pipe, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))


def test_slicing_decodes_the_same_pictures(latent_pipe: DiTPipeline) -> None:
    expected = sample(latent_pipe, [1, 2, 3], output_type="pt")
    latent_pipe.vae.enable_slicing()
    torch.testing.assert_close(sample(latent_pipe, [1, 2, 3], output_type="pt"), expected, rtol=0, atol=1e-5)


def test_tiling_decodes_large_pictures_in_tiles(latent_pipe: DiTPipeline) -> None:
    sizes: list[int] = []
    latent_pipe.vae.decoder.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[-1]))
    latent_pipe.vae.enable_tiling()
    images = sample(latent_pipe, height=32, width=32, output_type="pt")
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    assert len(sizes) > 1
    assert max(sizes) == 16


def test_half_precision_leaves_the_vae_in_float32(latent_pipe: DiTPipeline, tmp_path: Path) -> None:
    latent_pipe.save_pretrained(tmp_path)
    expected = sample(latent_pipe)
    loaded = pipeline_from(tmp_path, dtype=torch.bfloat16)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    latents = sample(loaded)
    assert latents.dtype == torch.float32
    # Bounded by the weights' rounding; the solver's sums stay float32.
    assert relative_error(latents, expected) < 2 * torch.finfo(torch.bfloat16).eps
    expected = latent_pipe.decode(latents, "pt")
    torch.testing.assert_close(sample(loaded, output_type="pt"), expected, rtol=0, atol=1e-5)


def test_vae_takes_another_dtype_where_told(latent_pipe: DiTPipeline, tmp_path: Path) -> None:
    latent_pipe.save_pretrained(tmp_path)
    loaded = pipeline_from(tmp_path, dtype={"default": torch.float32, "vae": torch.bfloat16})
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.float32, torch.bfloat16)
    images, expected = sample(loaded, output_type="pt"), sample(latent_pipe, output_type="pt")
    assert images.dtype == torch.float32
    assert 0 < relative_error(images, expected) < 4 * torch.finfo(torch.bfloat16).eps


# --- The condition, computed ahead -----------------------------------------------------------------------------------


class PlainDenoiser:
    """The least that a pipeline asks of a denoiser: another runtime's, which has no `condition`."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, model: DiTTransformer):
        self.model, self.config = model, model.config

    def __call__(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None) -> DiTTransformerOutput:
        assert timestep.shape == (len(hidden_states),)
        return self.model(hidden_states, timestep, class_labels)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_conditions_computed_ahead_equal_the_plain_path(
    make_model: MakeModel, conditioning: str, interval: tuple[float, float]
) -> None:
    model, labels = make_model(conditioning=conditioning), [2, 1, 2]
    expected = sample(pipeline_of(PlainDenoiser(model)), labels, guidance_interval=interval)
    assert_close_relative(sample(pipeline_of(model), labels, guidance_interval=interval), expected, 1e-6)


def test_conditions_of_an_unconditional_model_equal_the_plain_path(unconditional_pipe: DiTPipeline) -> None:
    expected = sample(pipeline_of(PlainDenoiser(unconditional_pipe.transformer)), None, num_images_per_label=3)
    assert_close_relative(sample(unconditional_pipe, None, num_images_per_label=3), expected, 1e-6)


# One step with two classes and the null class: 3 x 14 vectors of 32 float32 numbers.
BYTES_PER_STEP = 3 * 14 * 32 * 4


@pytest.mark.parametrize(
    ("limit", "rows"),
    [
        (5 * BYTES_PER_STEP, [15]),
        (2 * BYTES_PER_STEP, [6, 6, 3]),
        (3 * BYTES_PER_STEP - 1, [6, 6, 3]),
        (0, [3, 3, 3, 3, 3]),  # one step at least
    ],
)
def test_conditions_are_computed_in_bounded_memory(
    pipe: DiTPipeline, limit: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [2, 1, 2, 1]
    expected = sample(pipe, labels, num_inference_steps=5)
    seen: list[int] = []
    pipe.transformer.t_embedder.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    monkeypatch.setattr("dit_hub.guidance.MODULATION_BYTES", limit)
    assert_close_relative(sample(pipe, labels, num_inference_steps=5), expected, 1e-6)
    assert seen == rows


def test_few_conditions_are_held_at_a_time(pipe: DiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five steps with three classes each, those of two steps fit; counted at each step among all living tensors."""
    monkeypatch.setattr("dit_hub.guidance.MODULATION_BYTES", 2 * BYTES_PER_STEP)
    held: list[int] = []
    gc.collect()  # what earlier tests left behind

    def count(*_: Any) -> None:
        living = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == (3, 14, 32)]
        held.append(len({tensor.untyped_storage().data_ptr() for tensor in living}))

    sample(pipe, [2, 1], num_inference_steps=5, callback_on_step_end=count)
    assert held == [1, 1, 1, 1, 1]


# --- Modes of the model ----------------------------------------------------------------------------------------------


def modes(pipe: DiTPipeline) -> list[bool]:
    return [part.training for module in (pipe.transformer, pipe.vae) for part in module.modules()]


def test_a_model_in_training_samples_as_in_evaluation(make_model: MakeModel, make_vae: Callable[..., Any]) -> None:
    pipe = pipeline_of(make_model(class_dropout_prob=0.9), vae=make_vae())
    expected = sample(pipe, output_type="pt")
    pipe.transformer.train()
    pipe.transformer.blocks[0].eval()  # a part that was frozen stays so
    before = modes(pipe)
    assert_same(sample(pipe, output_type="pt"), expected)
    assert modes(pipe) == before
    pipe.vae.train()
    before = modes(pipe)
    assert_same(sample(pipe, output_type="pt"), expected)
    assert modes(pipe) == before


def test_a_model_in_training_is_so_again_after_an_error(latent_pipe: DiTPipeline) -> None:
    def fail(*_: Any) -> None:
        assert not any(modes(latent_pipe))
        raise RuntimeError("stop")

    latent_pipe.transformer.train()
    before = modes(latent_pipe)
    with pytest.raises(RuntimeError, match="stop"):
        sample(latent_pipe, callback_on_step_end=fail)
    assert modes(latent_pipe) == before
    with pytest.raises(ValueError, match="num_inference_steps"):
        sample(latent_pipe, num_inference_steps=0)
    assert modes(latent_pipe) == before


# --- Files and other loaders -----------------------------------------------------------------------------------------


def pipeline_from(folder: Path, **arguments: Any) -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sampling_keeps_no_gradients(latent_pipe: DiTPipeline) -> None:
    drawn = sample(latent_pipe)
    assert not drawn.requires_grad
    assert not latent_pipe.decode(drawn, "pt").requires_grad


def test_latents_are_scaled_and_then_shifted_for_the_decoder(
    make_model: MakeModel, make_vae: Callable[..., Any]
) -> None:
    vae = make_vae(scaling_factor=0.25, shift_factor=0.5)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = (vae.decode(latents * 4 + 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline_of(make_model(), vae=vae).decode(latents, "pt"), expected, atol=1e-5, rtol=0)


def test_fifty_steps_unless_told_otherwise(pipe: DiTPipeline) -> None:
    timesteps: list[int] = []
    pipe([1], output_type="latent", callback_on_step_end=lambda _, step, timestep, values: timesteps.append(timestep))
    assert len(timesteps) == 50


def test_every_level_of_a_vae_halves_the_picture(make_model: MakeModel, make_vae: Callable[..., Any]) -> None:
    levels = {"block_out_channels": (8, 16, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    pipe = pipeline_of(make_model(), vae=make_vae(**levels))
    assert pipe.vae_scale_factor == 8
    assert sample(pipe, [1], output_type="pt").shape == (1, 3, 64, 64)


def test_save_and_load_draw_the_same_pictures(
    make_model: MakeModel, make_vae: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = pipeline_of(make_model(sample_size=(8, 12)), official_ddpm(), vae=make_vae(), id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    loaded = pipeline_from(tmp_path)
    assert type(loaded) is DiTPipeline
    assert loaded.id2label == NAMES
    assert loaded.scheduler.config.variance_type == "learned_range"
    assert_equal_weights(loaded, pipe)
    expected = sample(pipe, [0], output_type="pt")
    torch.testing.assert_close(sample(loaded, "tench", output_type="pt"), expected, rtol=0, atol=1e-5)


def test_pixel_pipeline_saves_and_loads_without_vae(make_model: MakeModel, tmp_path: Path) -> None:
    pipe = pipeline_of(make_model(in_channels=3))
    pipe.save_pretrained(tmp_path)
    loaded = pipeline_from(tmp_path)
    assert loaded.vae is None
    assert_equal_weights(loaded, pipe)
    assert_close_relative(sample(loaded), sample(pipe), 1e-6)


def test_model_index_names_the_package_not_a_file_in_it(latent_pipe: DiTPipeline, tmp_path: Path) -> None:
    latent_pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["dit_hub", "DiTTransformer"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["scheduler", "transformer", "vae"]


STOCK_DIFFUSERS = """
import sys
import dit_hub
import numpy, torch
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained(sys.argv[1])
assert type(pipe.transformer) is dit_hub.DiTTransformer, type(pipe.transformer)
labels = [*pipe.get_label_ids(["Tinca tinca"]), 999]
images = pipe(labels, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
numpy.save(sys.argv[2], images)
"""


def test_stock_diffusers_draws_the_same_pictures(
    make_model: MakeModel, make_vae: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = pipeline_of(make_model(num_classes=1000), vae=make_vae(), id2label=NAMES)
    pipe.save_pretrained(tmp_path / "pipe")
    result = python("-c", STOCK_DIFFUSERS, tmp_path / "pipe", tmp_path / "images.npy", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    stock = torch.from_numpy(np.load(tmp_path / "images.npy"))
    # diffusers' pipeline guides every channel.
    ours = sample(pipe, [0, 999], guidance_channels=4, output_type="np")
    torch.testing.assert_close(stock, torch.from_numpy(ours), rtol=0, atol=1e-5)
    assert_different(stock, torch.from_numpy(sample(pipe, [0, 999], output_type="np")))


def test_a_pipeline_of_another_ones_components_is_the_same(latent_pipe: DiTPipeline) -> None:
    latent_pipe.register_to_config(id2label=NAMES)
    expected = sample(latent_pipe, "tench", output_type="pt")
    for other in (
        DiTPipeline(**latent_pipe.components),
        DiTPipeline.from_pipe(latent_pipe),
        DiTPipeline.from_pipe(DiTPipeline(**latent_pipe.components)),
    ):
        other.set_progress_bar_config(disable=True)
        assert other.id2label == NAMES
        assert other.transformer is latent_pipe.transformer
        assert_same(sample(other, "tench", output_type="pt"), expected)
    assert DiTPipeline.from_pipe(latent_pipe, id2label={3: "perch"}).id2label == {3: "perch"}
    assert sorted(latent_pipe.components) == ["id2label", "scheduler", "transformer", "vae"]


def test_components_without_names_stay_without(pipe: DiTPipeline) -> None:
    pipe.register_to_config(id2label=None)
    assert DiTPipeline(**pipe.components).id2label == {}


def test_stock_diffusers_draws_the_same_pictures_of_its_own_folder(
    make_vae: Callable[..., Any], tmp_path: Path
) -> None:
    """With its own numerics, and guidance of all latent channels."""
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
    }
    model = diffusers.DiTTransformer2DModel(**tiny, in_channels=4, out_channels=8, num_embeds_ada_norm=1000).eval()
    stock: Any = diffusers.DiTPipeline(model, make_vae(), ddim())  # pyright: ignore[reportArgumentType]
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    arguments = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "np"}
    expected = torch.from_numpy(stock([1, 2], generator=seeded(), **arguments).images)
    ours = pipeline_from(tmp_path)
    images = torch.from_numpy(sample(ours, **arguments))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    three = torch.from_numpy(sample(ours, **arguments, guidance_channels=3))
    assert (three - expected).abs().max() > 1e-4
    official = pipeline_from(tmp_path, timestep_freq_shift=0)
    assert (ours.transformer.config.guided_channels, official.transformer.config.guided_channels) == (4, 3)


def test_cpu_offload_draws_the_same_pictures(latent_pipe: DiTPipeline) -> None:
    expected = sample(latent_pipe, output_type="pt")
    latent_pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(sample(latent_pipe, output_type="pt"), expected, rtol=0, atol=1e-5)


def loading_error(path: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        DiTPipeline.from_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def test_unknown_name_is_an_error_that_lists_the_embedded_models() -> None:
    message = loading_error("dit-toy-shape")
    assert "'dit-toy-shape'" in message
    assert "dit-toy-shapes" in message.replace("'dit-toy-shape'", "")


def test_folder_without_model_index_is_an_error(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    message = loading_error(tmp_path)
    assert str(tmp_path) in message
    assert "model_index.json" in message


@pytest.mark.parametrize("component", ["transformer", "scheduler", "vae"])
def test_folder_without_a_component_is_an_error(latent_pipe: DiTPipeline, component: str, tmp_path: Path) -> None:
    latent_pipe.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / component)
    message = loading_error(tmp_path)
    assert str(tmp_path) in message
    assert component in message
