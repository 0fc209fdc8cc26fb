"""The weights that a run trains, with their optimizer and averages: whole in one process, or sharded over several."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..adapters import add_adapters, merge_adapters
from ..modeling_dit import DiTTransformer
from .checkpoints import flatten_optimizer, unflatten_optimizer
from .recipe import Recipe


class Weights:
    """A model in training, its optimizer and its moving averages: whole in each process (DDP), or sharded (FSDP2).

    Args:
        recipe: how it is trained.
        model: as `make_model` returns it.
        accelerator: of the run.

    Attributes:
        model: the model as it is called in training, so that processes exchange gradients.
        plain: the model itself.
        trainable: the parameters that are trained.
        averages: the moving averages, by decay.
    """

    def __init__(self, recipe: Recipe, model: DiTTransformer, accelerator: Accelerator):
        self.recipe, self.accelerator = recipe, accelerator
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if recipe.compile:
            for block in model.blocks:
                block.compile()
        self.plain = model.train().to(accelerator.device)
        if recipe.fsdp:
            shard(self.plain, recipe.mixed_precision, accelerator)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # fused: one kernel for all weights, 0.8 ms a step on a CPU rather than 3.0
        self.optimizer: Any = torch.optim.AdamW(
            self.trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.model: Any = model if recipe.fsdp else accelerator.prepare(model)
        if accelerator.scaler is not None:  # else accelerate's wrapper does nothing, in 0.8 ms a step
            self.optimizer = accelerator.prepare(self.optimizer)
        self.averages = {decay: EMAModel(self.trainable, decay=decay, foreach=True) for decay in recipe.ema_decays}

    # --- Steps -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sync_gradients(self, now: bool) -> Iterator[None]:
        """Exchange gradients between processes after this backward pass, or only accumulate them for a later one."""
        if self.recipe.fsdp:
            cast(Any, self.plain).set_requires_gradient_sync(now)
        with contextlib.nullcontext() if now else self.accelerator.no_sync(self.model):
            yield

    def clip(self) -> Tensor:
        """Clip the gradients, if the recipe says so; return their norm before, a scalar on the device."""
        norm: Any = self.accelerator.clip_grad_norm_(self.trainable, self.recipe.max_grad_norm or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self.accelerator.device)

    def step(self, learning_rate: float) -> None:
        """Take an optimizer step; in fp16 the scaler leaves out a step whose gradients overflow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for average in self.averages.values():
            average.step(self.trainable)
        self.optimizer.zero_grad()

    def skip(self) -> None:
        """Discard the gradients."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it expects an update after each time it has unscaled
        self.optimizer.zero_grad()

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by part and name, and facts, for a checkpoint; whole, if sharded in the main process only."""
        model, optimizer_state = get_state_dict(self.plain, _bare(self.optimizer), options=_WHOLE)
        optimizer, groups = flatten_optimizer(cast(Any, optimizer_state)) if optimizer_state else ({}, [])
        averages = {ema_variant(decay): self.averaged(decay) for decay in self.averages}
        scaler = self.accelerator.scaler
        facts = {
            "groups": groups,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": [average.optimization_step for average in self.averages.values()],
        }
        return {"model": cast(Any, model), "optimizer": optimizer, **averages}, facts

    def load_state_dict(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, RuntimeError: it is damaged.
        """
        whole: Any = tensors
        optimizer: Any = unflatten_optimizer(tensors["optimizer"], facts["groups"])
        if tensors["model"].keys() != self.plain.state_dict().keys():
            raise ValueError("its weights have other names")
        for (decay, average), steps in zip(self.averages.items(), facts["ema_steps"], strict=True):
            set_model_state_dict(self.plain, whole[ema_variant(decay)], options=_WHOLE)
            average.shadow_params = [parameter.clone().detach() for parameter in self.trainable]
            average.optimization_step = steps
        set_state_dict(
            self.plain,
            _bare(self.optimizer),
            model_state_dict=whole["model"],
            optim_state_dict=optimizer,
            options=_WHOLE,
        )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    # --- The result --------------------------------------------------------------------------------------------------

    def averaged(self, decay: float | None, everywhere: bool = False) -> dict[str, Tensor]:
        """A copy of the weights by name, averaged with a decay or as they are; adapters are not merged.

        Args:
            decay: of the average; None for the weights as they are.
            everywhere: give them to all processes, on their devices, where otherwise only the main process has them.
        """
        average = None if decay is None else self.averages[decay]
        if average is not None:
            average.foreach = False  # sharded weights cannot be copied all at once
            average.store(self.trainable)
            average.copy_to(self.trainable)
        options = StateDictOptions(full_state_dict=True) if everywhere else _WHOLE
        state: dict[str, Any] = get_model_state_dict(self.plain, options=options)
        state = {name: value.clone() for name, value in state.items()}
        if average is not None:
            average.restore(self.trainable)
            average.foreach = True
        return state

    def student(self) -> DiTTransformer:
        """A copy of the model, of its first average if there is one, in every process."""
        decay = next(iter(self.averages), None)
        return self.whole_model(self.averaged(decay, everywhere=True))

    def whole_model(self, weights: dict[str, Tensor]) -> DiTTransformer:
        """A model with these weights; where they are sharded, only the main process has them."""
        model = DiTTransformer(self.plain.config)
        if self.recipe.lora_rank:
            add_adapters(model, self.recipe.lora_rank)
        if weights:
            model.load_state_dict(weights)
        return model.eval()


def shard(model: DiTTransformer, mixed_precision: str, accelerator: Accelerator) -> None:
    """Shard the weights of a model over the processes (FSDP2).

    Attention and MLP are sharded each on their own; the modulations, which compute in float32, stay with the root and
    are gathered once a step. In bf16 attention and MLP are gathered in the dtype to which autocast would cast them, so
    that the numbers are DDP's; gradients are summed in float32.
    """
    half = torch.bfloat16 if mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    # Without a mesh, PyTorch would use the machine's GPUs even for a run on its CPU.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block.attn, mesh=mesh, mp_policy=policy)
        fully_shard(block.mlp, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


# Whole tensors on the CPU, whatever the sharding, so that any number of processes can resume from them.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def ema_variant(decay: float) -> str:
    """The variant of a moving average: "ema-9999" for 0.9999, since diffusers allows no dots in its name."""
    return "ema-" + f"{decay:.10f}".rstrip("0").partition(".")[2]


def merged_state(model: DiTTransformer) -> dict[str, Tensor]:
    """The weights of a model, after merging its adapters."""
    merge_adapters(model)
    return model.state_dict()


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
