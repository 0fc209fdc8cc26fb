"""What training will take: steps, hours and memory, found without training."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from allocated import most_allocated
from dit_hub import DiTConfig, DiTTransformer
from dit_hub.flops import example_inputs, measure
from dit_hub.training import budget as budget_module
from dit_hub.training.budget import plan_budget, short_training
from dit_hub.training.memory import activation_memory, settings_that_fit, training_memory
from dit_hub.training.recipe import Recipe, get_recipe

from .command_line import dit_hub
from .conftest import SMALL_MODEL, TOYS_NOISE

SHORT = Recipe(model=SMALL_MODEL, images_per_class=8, batch_size=32, epochs=3, ema_decay=0.9)


def allocated_at_once(config: DiTConfig, batch_size: int, half: torch.dtype | None, checkpointing: bool) -> int:
    """The most bytes that PyTorch's profiler sees allocated in a forward and backward pass, but for gradients."""
    model: Any = DiTTransformer._from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    inputs = example_inputs(config, batch_size, "cpu")

    def step() -> None:
        with torch.autocast("cpu", half, enabled=half is not None):
            loss = model(*inputs).sample.float().square().mean()
        loss.backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return most_allocated(profiler)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_pytorch_allocates(precision: str, checkpointing: bool) -> None:
    config = DiTConfig.from_name("DiT-S/4", num_hidden_layers=8)
    counted = activation_memory(config, 4, precision, checkpointing)
    half = torch.bfloat16 if precision == "bf16" else None
    allocated = allocated_at_once(config, 4, half, checkpointing)
    # With checkpointing it is a bound: what a block computes again need not live at the same time as all copies.
    assert allocated <= counted <= (1.2 * allocated if checkpointing else allocated)


def test_memory_by_part_counts_bytes_of_trained_weights() -> None:
    with torch.device("meta"):
        model = DiTTransformer(DiTConfig.from_name("DiT-S/4"))
    count = model.num_parameters()
    recipe = get_recipe("imagenet-256").with_settings({"ema_decay": [0.999, 0.9999]})
    memory = training_memory(recipe, model)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.averages) == (
        4 * count, 4 * count, 8 * count, 8 * count,
    )  # fmt: skip
    assert memory.total == 24 * count + memory.activations
    accumulated = training_memory(recipe.with_settings({"gradient_accumulation_steps": 4}), model)
    assert memory.activations == pytest.approx(4 * accumulated.activations, rel=0.02)
    model.x_embedder.requires_grad_(False)
    assert training_memory(recipe, model).optimizer < memory.optimizer
    model.x_embedder.requires_grad_(True)
    sharded = training_memory(recipe.with_settings({"fsdp": True}), model, processes=4)
    assert sharded.optimizer == 2 * count
    assert sharded.total < training_memory(recipe, model, processes=4).total


def test_what_fits_is_named_and_fits() -> None:
    with torch.device("meta"):
        model = DiTTransformer(DiTConfig.from_name("DiT-S/2"))
    recipe = get_recipe("imagenet-256")
    whole = training_memory(recipe, model).total
    found = settings_that_fit(recipe, model, 1, whole // 2)
    assert [list(settings) for settings, _ in found] == [["gradient_accumulation_steps"], ["gradient_checkpointing"]]
    assert found[0][0] == {"gradient_accumulation_steps": 4}
    for settings, memory in found:
        assert memory.total <= whole // 2
        assert training_memory(recipe.with_settings(settings), model).total == memory.total
    all_at_once = settings_that_fit(recipe, model, 1, int(0.034 * whole))
    assert [set(settings) for settings, _ in all_at_once] in ([], [{"gradient_accumulation_steps"}])
    assert settings_that_fit(recipe, model, 1, 4 * model.num_parameters()) == []


def test_a_budget_is_measured_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    budget = plan_budget(SHORT)
    assert (budget.steps, budget.images, budget.data, budget.passes) == (12, 384, 128, 3)
    assert budget.how == "measured on 4 steps"
    assert 0 < budget.step_seconds < 10
    assert budget.hours == budget.steps * budget.step_seconds / 3600
    assert (budget.parameters, budget.gmacs) == measure(SHORT.config)
    assert "12 steps of 32 are 384 images, 3 passes" in budget.warning
    assert budget.fits == []
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_is_measured_by_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = SHORT.with_settings({"model": {**SMALL_MODEL, "num_hidden_layers": 6}, "batch_size": 128})
    monkeypatch.setattr(budget_module, "_PATIENCE", 1e-7)
    budget = plan_budget(deep)
    assert budget.how == "scaled up from 2 layers and a batch of 1"
    assert budget.step_seconds > 0


def test_a_trained_model_is_not_compared_with_the_papers() -> None:
    settings = {**TOYS_NOISE, "init_from": "dit-toy-shapes", "images_per_class": 8, "lora_rank": 2}
    budget = plan_budget(get_recipe("toy").with_settings(settings))
    assert budget.warning == ""
    assert "beside the paper" not in dict(budget.lines())
    assert budget.memory.gradients < budget.memory.weights / 10  # of the adapters alone


def test_data_that_are_elsewhere_need_steps() -> None:
    recipe = SHORT.with_settings({"data": "elsewhere"})
    with pytest.raises(ValueError, match="The data 'elsewhere' are not here, so that 3 epochs have no number"):
        plan_budget(recipe)
    budget = plan_budget(recipe.with_settings({"steps": 100}))
    assert (budget.steps, budget.data, budget.passes) == (100, None, None)
    assert budget.how.endswith("without the data")


@pytest.mark.parametrize(
    ("steps", "batch_size", "data", "short"),
    [
        (52_000, 256, 1_281_167, True),  # a published study that found none of the claims
        (52_000, 256, None, True),
        (400_000, 256, 1_281_167, False),
        (800_000, 128, None, False),
        (2_000, 128, 3_200, False),  # 80 passes over a small data set
        (1_900, 128, 3_200, True),
    ],
)
def test_training_below_the_papers_is_called_short(steps: int, batch_size: int, data: int | None, short: bool) -> None:
    assert bool(short_training(steps, batch_size, data)) == short


def test_a_full_run_lands_on_its_own_model() -> None:
    """The compute of XL/2's 400,000 steps is that of XL/2 in the paper."""
    budget = plan_budget(SHORT)
    small = budget_module.replace(budget, steps=400_000, batch_size=256, gmacs=118.62)
    assert small.landing.startswith("100.0% of the images")
    assert "the compute of DiT-XL/2 there, which has an FID of 19.47" in small.landing
    assert "of the compute of its smallest, DiT-S/8" in budget.landing


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path) -> None:
    run = dit_hub("train", "toy", "images_per_class=8", "epochs=2", "--dry-run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for words in ("323,696 parameters", "2 of 128 images", "measured on 4 steps", "activations", "Warning: 2 steps"):
        assert words in run.stdout
    assert list(tmp_path.iterdir()) == []
    run = dit_hub("train", "imagenet-256", "epochs=2", "steps=0", "--dry-run", cwd=tmp_path)
    assert run.returncode == 2
    assert re.fullmatch(r"error: The data 'imagenet-latents' are not here[^\n]*\n", run.stderr)
