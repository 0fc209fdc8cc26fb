"""The memory that training takes, by part, counted without taking it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.module_tracker import ModuleTracker

from ..configuration_dit import DiTConfig
from ..flops import LiveMemory, count, example_inputs
from ..modeling_dit import DiTTransformer
from .recipe import Recipe

_BYTES = 4  # of a weight, its gradient, each of Adam's two moments, and each average: all in float32

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Each block adds the same activations, so those of any model follow from two that are this deep.
_DEPTHS = (3, 5)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process takes for training, by part.

    Args:
        weights, gradients, optimizer, averages: for as long as training runs; a teacher's weights are among the first.
        activations: the most that live at once in the forward and backward pass of a micro-batch.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations


def training_memory(recipe: Recipe, model: DiTTransformer, processes: int = 1) -> TrainingMemory:
    """Count the memory of training a model.

    Args:
        recipe: how it is trained; what `compile` saves is not counted.
        model: as `make_model` returns it, its weights on any device.
        processes: over which a batch is shared.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    teacher = parameters if recipe.distill else 0  # whole in each process
    held = gathered = 0
    if recipe.fsdp and processes > 1:
        # Each process holds a share, and the root's weights whole: all but attention and MLP.
        blocks: Any = model.blocks
        inner = sum(p.numel() for block in blocks for part in (block.attn, block.mlp) for p in part.parameters())
        gathered, parameters, trained = parameters - inner, -(-parameters // processes), -(-trained // processes)
    elif processes > 1:
        held = trained  # DDP's buckets
    micro_batch = recipe.batch_size // (processes * recipe.gradient_accumulation_steps)
    return TrainingMemory(
        weights=_BYTES * (parameters + gathered + teacher),
        gradients=_BYTES * (trained + held),
        optimizer=2 * _BYTES * trained,
        averages=len(recipe.ema_decays) * _BYTES * trained,
        activations=activation_memory(
            model.config, max(micro_batch, 1), recipe.mixed_precision, recipe.gradient_checkpointing
        ),
    )


def activation_memory(config: DiTConfig, batch_size: int, mixed_precision: str, checkpointing: bool) -> int:
    """The most bytes of activations in a forward and backward pass that trains all weights, with fused attention.

    With checkpointing this is a bound, up to a fifth above what is needed in half precision.
    """
    small, large = (_activations(_with_layers(config, depth), batch_size, mixed_precision) for depth in _DEPTHS)
    of_block = (large - small) // (_DEPTHS[1] - _DEPTHS[0])
    if not checkpointing:
        return small + of_block * (config.num_hidden_layers - _DEPTHS[0])
    height, width = (side // config.patch_size for side in config.sample_height_width)
    tokens = height * width + 2 * (config.conditioning == "in_context")
    inputs = batch_size * tokens * config.hidden_size * _BYTES  # of a block, from which it is computed again
    copies = 0  # of a block's weights, which autocast holds until the end of the forward pass
    if mixed_precision in _HALF:
        parts = count(_with_layers(config, 1)).parts
        copies = 2 * (parts["attention"].parameters + parts["MLP"].parameters)
    one_block = small - of_block * (_DEPTHS[0] - 1)
    return one_block + inputs * config.num_hidden_layers + copies * (config.num_hidden_layers - 1)


def _with_layers(config: DiTConfig, layers: int) -> DiTConfig:
    fields = {name: getattr(config, name) for name in DiTConfig.__annotations__}
    return DiTConfig(**{**fields, "num_hidden_layers": layers})


def _activations(config: DiTConfig, batch_size: int, mixed_precision: str) -> int:
    half = _HALF.get(mixed_precision)
    with FakeTensorMode():
        model: Any = DiTTransformer._from_config(config, attn_implementation="sdpa").train()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # counted on their own
        inputs = example_inputs(config, batch_size, "cpu")
        with ModuleTracker() as tracker, LiveMemory(tracker) as live:
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = model(*inputs).sample.float().square().mean()
            loss.backward()
    return live.peak


def settings_that_fit(
    recipe: Recipe, model: DiTTransformer, processes: int, room: int
) -> list[tuple[dict[str, Any], TrainingMemory]]:
    """Settings with which training takes at most `room` bytes, the least costly first; empty if none does.

    These are each of mixed_precision=bf16, gradient accumulation, gradient checkpointing and, for several processes,
    FSDP2 that is enough alone, or else all that the recipe does not have yet.
    """
    single: list[dict[str, Any]] = []
    if recipe.mixed_precision in ("no", "tf32"):
        single.append({"mixed_precision": "bf16"})
    single += [{"gradient_accumulation_steps": steps} for steps in _more_accumulation(recipe, processes)]
    if not recipe.gradient_checkpointing:
        single.append({"gradient_checkpointing": True})
    if not recipe.fsdp and processes > 1:
        single.append({"fsdp": True})
    found: list[tuple[dict[str, Any], TrainingMemory]] = []
    for settings in single:
        if any(settings.keys() == known.keys() for known, _ in found):  # more accumulation than is needed
            continue
        memory = training_memory(replace(recipe, **settings), model, processes)
        if memory.total <= room:
            found.append((settings, memory))
    if found:
        return found
    together = {name: value for settings in single for name, value in settings.items()}
    memory = training_memory(replace(recipe, **together), model, processes)
    return [(together, memory)] if together and memory.total <= room else []


def _more_accumulation(recipe: Recipe, processes: int) -> list[int]:
    """Doublings of the recipe's accumulation, up to one image at a time."""
    steps, found = 2 * recipe.gradient_accumulation_steps, []
    while recipe.batch_size % (steps * processes) == 0:
        found.append(steps)
        steps *= 2
    return found
