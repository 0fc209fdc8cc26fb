"""What diffusers offers its own models, taken by a model of transformers: backends, caches, offloading, parallelism."""

from typing import Any

import torch
from diffusers.hooks import FasterCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .checks import whole_number
from .extras import require

# In `config._attn_implementation`: attention through diffusers' backends, as its environment variable and its context
# manager `attention_backend` choose them.
DIFFUSERS_ATTENTION = "diffusers"


class DiTAttnProcessor:
    """The choices that diffusers makes for one attention: `set_attention_backend`, context parallelism."""

    def __init__(self, is_cross_attention: bool = False) -> None:
        self._attention_backend: Any = None
        if not is_cross_attention:  # the sequence of condition vectors is whole in each process
            self._parallel_config: Any = None

    @property
    def implementation(self) -> str | None:
        """The attention function that serves these choices; None where there are none."""
        chosen = self._attention_backend is not None or getattr(self, "_parallel_config", None) is not None
        return DIFFUSERS_ATTENTION if chosen else None


def diffusers_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers that calls diffusers' `dispatch_attention_fn`.

    Args:
        module: an attention with a `DiTAttnProcessor`.
        query, key, value: (N, heads, T, head size).
        attention_mask: none is supported.
        scaling: of the products of queries and keys.

    Returns:
        (N, T, heads, head size), and None for the weights.
    """
    choices = module.processor
    output = dispatch_attention_fn(
        query.transpose(1, 2),  # (N, T, heads, head size)
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        backend=choices._attention_backend,
        parallel_config=getattr(choices, "_parallel_config", None),
    )
    return output, None


ALL_ATTENTION_FUNCTIONS[DIFFUSERS_ATTENTION] = diffusers_attention_forward


class DiffusersModelMixin(CacheMixin, PeftAdapterMixin):
    """The public methods of diffusers' `ModelMixin` that ask nothing else of it; they are its own functions.

    Its blocks return one bare tensor and compute their own modulations, so that hooks can skip, move, cast or compile
    each of them alone.
    """

    set_attention_backend = ModelMixin.set_attention_backend
    reset_attention_backend = ModelMixin.reset_attention_backend
    compile_repeated_blocks = ModelMixin.compile_repeated_blocks
    enable_group_offload = ModelMixin.enable_group_offload
    enable_layerwise_casting = ModelMixin.enable_layerwise_casting
    enable_parallelism = ModelMixin.enable_parallelism
    _resolve_parallel_config = ModelMixin._resolve_parallel_config

    _repeated_blocks = ["DiTBlock", "DiTTokenBlock"]
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["norm"]
    _parallel_config: Any = None
    # The tokens are shared out before the first block and gathered after the final layer.
    _cp_plan: Any = {
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "final_layer": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    def enable_cache(self, config: Any) -> None:
        """As diffusers' `CacheMixin.enable_cache`; its caches hold hidden states of the blocks from step to step."""
        blocks: Any = self.blocks  # pyright: ignore[reportAttributeAccessIssue]
        metadata = TransformerBlockMetadata(return_hidden_states_index=0)
        # Here rather than on import: the registry imports all of diffusers' transformers, which takes 0.6 s.
        TransformerBlockRegistry.register(type(blocks[0]), metadata)
        if isinstance(config, FasterCacheConfig):  # which drops the first half of these arguments, the unconditional
            names = ["hidden_states", "timestep", "class_labels", "precomputed"]
            config._unconditional_conditional_input_kwargs_identifiers = names
        super().enable_cache(config)


def cache_preset(transformer: Any, every: int = 3) -> TaylorSeerCacheConfig:
    """diffusers' TaylorSeer cache as it pays for a DiT: a config for `transformer.enable_cache`.

    The first two steps and every `every`-th are computed in full. In the others all blocks are left out: the tokens
    after the last one are forecast along the line through the last two computed, and the final layer, modulated as the
    step asks, predicts from them. (diffusers' `use_lite_mode` looks for a layer `proj_out`, which a DiT has not, and
    its default leaves out the attentions alone.)

    Args:
        transformer: a denoiser in PyTorch.
        every: 2 or more.

    Raises:
        ValueError: a denoiser of another runtime, which takes no caches, or a smaller `every`.
    """
    every = whole_number("every", every, 2)
    if not isinstance(transformer, DiffusersModelMixin):
        raise ValueError(f"Caches are for denoisers in PyTorch, and this is a {type(transformer).__name__}.")
    blocks: Any = transformer.blocks  # pyright: ignore[reportAttributeAccessIssue]
    last = len(blocks) - 1
    return TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=2,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        skip_predict_identifiers=[rf"blocks\.(?!{last}$)\d+"],
        cache_identifiers=[rf"blocks\.{last}"],
    )


def check_quantization(config: Any, device_map: Any = None) -> None:
    """Try a quantisation of torchao on one layer, so that what this machine lacks is one sentence, not a long report.

    Args:
        config: the `quantization_config` of a model that is to be loaded; those of other libraries check themselves.
        device_map: where the model goes.

    Raises:
        ValueError: it does not run there.
    """
    if type(config).__name__ != "TorchAoConfig":
        return
    quantize = require("torchao.quantization", "quantization").quantize_
    kind = config.get_apply_tensor_subclass()
    device = torch.device(device_map if isinstance(device_map, (str, int, torch.device)) and device_map not in _SPREAD
                          else "cuda" if device_map is not None and torch.cuda.is_available() else "cpu")  # fmt: skip
    layer = nn.Linear(1024, 1024, device=device, dtype=torch.bfloat16)
    try:
        quantize(layer, kind)
        layer(torch.zeros(1, 1024, device=device, dtype=torch.bfloat16))
    except (ImportError, AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{type(kind).__name__} does not run on this machine's {device.type}: {reason}") from error


_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that name no device


def check_cache_of_unguided_steps(transformer: Any) -> None:
    """Raise ValueError where the cache of a model takes the first half of every batch for the unconditional one."""
    config = getattr(transformer, "_cache_config", None)
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise ValueError("FasterCache takes half of every batch for the unconditional one, which some steps of this "
                         "run lack; guide in all, or set is_guidance_distilled=True in its config.")  # fmt: skip


def takes_precomputed(transformer: Any) -> bool:
    """Whether a denoiser can be handed the modulations that its `precompute` made ahead of the loop.

    Exports without that method cannot. Nor can a model whose weights hooks or FSDP bring when its `forward` or a
    block's is called, and only then, or whose blocks cache-dit calls with one set of arguments for all: there each
    block computes its own.
    """
    if not hasattr(transformer, "precompute") or getattr(transformer, "_is_cached", False):
        return False
    modules = transformer.modules() if isinstance(transformer, nn.Module) else ()
    brought = (FSDPModule, FullyShardedDataParallel)
    return not any(
        isinstance(module, brought) or hasattr(module, "_hf_hook") or _is_offloaded(module) for module in modules
    )


def _is_offloaded(module: Any) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any("group_offloading" in name for name in registry.hooks)
