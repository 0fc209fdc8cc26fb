"""What a run changes: the weights of its model, its optimizer and its averages, in one process or shared by several."""

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
    """A model in training with its optimizer and averages: whole in each process (DDP), or sharded (FSDP2).

    Args:
        recipe: how it is trained.
        model: as `make_model` returns it.
        accelerator: of the run.

    Attributes:
        model: what to call, so that processes exchange their gradients.
        plain: the model itself.
        decays: of the averages.
    """

    def __init__(self, recipe: Recipe, model: DiTTransformer, accelerator: Accelerator):
        self.recipe, self.accelerator, self.decays = recipe, accelerator, recipe.ema_decays
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if recipe.compile:
            for block in model.blocks:
                block.compile()
        self.plain = model.train().to(accelerator.device)
        if recipe.fsdp:
            shard(self.plain, recipe.mixed_precision, accelerator)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # fused: one kernel for all weights, 0.8 ms a step on a CPU rather than 3.0
        self.optimizer: Any = torch.optim.AdamW(
            self.trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.model: Any = model if recipe.fsdp else accelerator.prepare(model)
        if accelerator.scaler is not None:  # else accelerate's wrapper does nothing, in 0.8 ms a step
            self.optimizer = accelerator.prepare(self.optimizer)
        self.averages = {decay: EMAModel(self.trained, decay=decay, foreach=True) for decay in self.decays}

    # --- A step ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exchange(self, now: bool) -> Iterator[None]:
        """Whether processes exchange gradients after this backward pass; else they add them up for a later one."""
        if self.recipe.fsdp:
            cast(Any, self.plain).set_requires_gradient_sync(now)
        with contextlib.nullcontext() if now else self.accelerator.no_sync(self.model):
            yield

    def clip(self) -> Tensor:
        """Clip the gradients, if the recipe says so; returns their norm before, on the device."""
        norm: Any = self.accelerator.clip_grad_norm_(self.trained, self.recipe.max_grad_norm or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self.accelerator.device)

    def step(self, learning_rate: float) -> None:
        """Take a step along the gradients; in fp16 the scaler leaves out one whose gradients overflow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for average in self.averages.values():
            average.step(self.trained)
        self.optimizer.zero_grad()

    def skip(self) -> None:
        """Forget the gradients."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it waits for the end of each step that it has unscaled
        self.optimizer.zero_grad()

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What a checkpoint holds: tensors by part and name, and facts; whole, in the main process alone if sharded."""
        model, optimizer_state = get_state_dict(self.plain, _bare(self.optimizer), options=_WHOLE)
        optimizer, groups = flatten_optimizer(cast(Any, optimizer_state)) if optimizer_state else ({}, [])
        averages = {average_name(decay): self.averaged(decay) for decay in self.decays}
        scaler = self.accelerator.scaler
        facts = {
            "groups": groups,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_steps": [average.optimization_step for average in self.averages.values()],
        }
        return {"model": cast(Any, model), "optimizer": optimizer, **averages}, facts

    def restore(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Take up what `state` returned.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, RuntimeError: it is damaged.
        """
        whole: Any = tensors
        optimizer: Any = unflatten_optimizer(tensors["optimizer"], facts["groups"])
        if tensors["model"].keys() != self.plain.state_dict().keys():
            raise ValueError("its weights have other names")
        for (decay, average), steps in zip(self.averages.items(), facts["ema_steps"], strict=True):
            set_model_state_dict(self.plain, whole[average_name(decay)], options=_WHOLE)
            average.shadow_params = [parameter.clone().detach() for parameter in self.trained]
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

    # --- The end -----------------------------------------------------------------------------------------------------

    def averaged(self, decay: float | None) -> dict[str, Tensor]:
        """Weights by name, averaged with a decay or as they are, in memory of their own; with adapters apart."""
        average = None if decay is None else self.averages[decay]
        if average is not None:
            average.foreach = False  # sharded weights cannot be copied all at once
            average.store(self.trained)
            average.copy_to(self.trained)
        state: dict[str, Any] = get_model_state_dict(self.plain, options=_WHOLE)
        state = {name: value.clone() for name, value in state.items()}
        if average is not None:
            average.restore(self.trained)
            average.foreach = True
        return state

    def whole(self, weights: dict[str, Tensor]) -> DiTTransformer:
        """A model with these weights; only the main process has them where they are sharded."""
        model = DiTTransformer(self.plain.config)
        if self.recipe.lora_rank:
            add_adapters(model, self.recipe.lora_rank)
        if weights:
            model.load_state_dict(weights)
        return model.eval()


def shard(model: DiTTransformer, mixed_precision: str, accelerator: Accelerator) -> None:
    """Share the weights of a model among the processes.

    Attention and MLP each; what makes the modulation stays with the root, since it runs before all blocks. In bf16 they
    are gathered as what autocast would make of them, so that the numbers are DDP's; gradients are summed in float32.
    """
    half = torch.bfloat16 if mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    # By itself PyTorch would take the machine's GPUs, also for a run on its processors.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block.attn, mesh=mesh, mp_policy=policy)
        fully_shard(block.mlp, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


# Whole tensors on the processor, whatever the sharding, so that any number of processes can go on from them.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def average_name(decay: float) -> str:
    """Of the weights of a moving average: "ema-9999" for 0.9999, since diffusers takes no dots in a variant's name."""
    return "ema-" + f"{decay:.10f}".rstrip("0").partition(".")[2]


def merged_state(model: DiTTransformer) -> dict[str, Tensor]:
    """The weights of a model whose adapters are merged."""
    merge_adapters(model)
    return model.state_dict()


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
