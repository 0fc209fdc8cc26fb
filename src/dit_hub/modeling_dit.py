"""DiTTransformer: Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023).

    latents --patchify--> tokens + positions --L blocks--> final layer --unpatchify--> noise (and variance)
    timestep, label --condition--> a vector, from which every block computes its own modulations

Parameter names are those of the official checkpoints, which therefore load as they are. Where the weights are half
precision, matrix products and attention run in it; the sinusoid, the modulations, the gates and the residual sum stay
in float32, since the residual stream of deep DiTs overflows float16.

Letters in shape comments: N batch, C channels, H and W latent height and width, T tokens, D hidden size, L blocks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

from .configuration_dit import DiTConfig
from .ecosystem import DiTAttnProcessor
from .layers import (
    Float32LayerNorm,
    Float32Linear,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    for_layer,
    held_sincos_positions,
    initialised_by,
    sincos_positions,
)
from .pretrained import DiTPreTrainedModel


@dataclass
class DiTTransformerOutput(ModelOutput):
    """What `DiTTransformer` returns.

    Args:
        loss: the mean squared error to the target, where one was given.
        sample: (N, C or 2C, H, W), the prediction: noise or velocity, then the variance where it is learned.
        attentions: for each block asked for, (N, heads, T, T) attention weights.
    """

    loss: Tensor | None = None
    sample: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * scale + shift, with (N, T, D) x and (N, 1, D) shift and scale; the paper's scale is this one less 1."""
    return torch.addcmul(shift, hidden_states, scale)


def add_gated(hidden_states: Tensor, output: Tensor, gate: Tensor | None = None) -> Tensor:
    """hidden_states + gate * output in float32, the dtype of the residual stream."""
    return hidden_states + output if gate is None else torch.addcmul(hidden_states, gate, output.float())


# --- Blocks ----------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v on (N, heads, T, head size), written out: the attention that has its weights."""
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = module.weights(weights)
    return (weights @ value).transpose(1, 2), weights


class AttentionWeights(nn.Identity):
    """The place for a forward hook that wants an attention's (N, heads, T, T) weights.

    An attention with such a hook computes eagerly; other implementations never hold their weights.
    """


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with one projection for query, key and value: (N, T, D) -> (N, T, D)."""

    is_causal = False
    is_cross_attention = False
    _supports_qkv_fusion = False  # they are fused already

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.weights = AttentionWeights()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.processor: Any = DiTAttnProcessor(self.is_cross_attention)

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv(for_layer(self.qkv, hidden_states))  # (N, T, 3D)
        return self.attend(*qkv.split(qkv.shape[2] // 3, dim=2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(N, T, D) query, key and value -> (N, T, D)."""
        # (N, T, D) -> (N, heads, T, head size)
        query, key, value = (x.unflatten(2, (-1, self.head_size)).transpose(1, 2) for x in (query, key, value))
        implementation = self.processor.implementation or self.config._attn_implementation or "eager"
        if self.weights._forward_hooks:
            implementation = "eager"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attention(self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.proj(output.flatten(2))


class DiTCrossAttention(DiTAttention):
    """Attention from the (N, T, D) tokens to the (N, K, D) sequence of condition vectors."""

    is_cross_attention = True

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        del self.qkv
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        kv = self.kv(for_layer(self.kv, condition))  # (N, K, 2D)
        return self.attend(self.q(for_layer(self.q, hidden_states)), *kv.split(kv.shape[2] // 2, dim=2))


class DiTMLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(for_layer(self.fc1, hidden_states)), approximate="tanh"))


class Modulation(nn.Sequential):
    """(N, D) condition -> `rows` modulations, each (N, 1, D): shift, scale and, but in the final layer, gate.

    They are zero at the start of training (paper, Section 3.2); 1 is added to the scales here.
    """

    def __init__(self, config: DiTConfig, rows: int, per_layer: int):
        linear = initialised_by("zeros", Float32Linear(config.hidden_size, rows * config.hidden_size))
        super().__init__(nn.SiLU(), linear)
        self.per_layer, self.width = per_layer, config.hidden_size

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        # Vectors get a dimension of their own: the backward of chunk on the last one is wrong on Apple's MPS.
        vectors = super().forward(condition)
        rows = vectors.view(vectors.shape[0], -1, 1, self.width).unbind(1)
        return tuple([row + 1 if index % self.per_layer == 1 else row for index, row in enumerate(rows)])


_HOOKS = frozenset(["_hf_hook", "_diffusers_hook"])  # accelerate's and diffusers' mark on a module


class DiTBlock(GradientCheckpointingLayer):
    """The block of adaLN-Zero, or of adaLN, which has no gates (paper, Figure 3)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.rows = config.modulation_rows
        self.norm1 = Float32LayerNorm(config.hidden_size, config.norm_eps, elementwise_affine=False)
        self.attn = DiTAttention(config)
        self.norm2 = Float32LayerNorm(
            config.hidden_size, config.mlp_norm_eps or config.norm_eps, elementwise_affine=False
        )
        self.mlp = DiTMLP(config)
        self.adaLN_modulation = Modulation(config, self.rows, self.rows // 2)

    def forward(
        self, hidden_states: Tensor, condition: Tensor | None = None, modulations: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(N, T, D) tokens and the (N, D) condition, or the modulations made of it, each (N, 1, D) -> (N, T, D)."""
        rows = self.adaLN_modulation(condition) if modulations is None else modulations
        # Each (N, 1, D): shift, scale and gate of the attention, then of the MLP. adaLN has no gates.
        of_attn, of_mlp = rows[: self.rows // 2], rows[self.rows // 2 :]
        output = self.attn(modulate(self.norm1(hidden_states), *of_attn[:2]))
        hidden_states = add_gated(hidden_states, output, *of_attn[2:])
        output = self.mlp(modulate(self.norm2(hidden_states), *of_mlp[:2]))
        return add_gated(hidden_states, output, *of_mlp[2:])


class DiTTokenBlock(GradientCheckpointingLayer):
    """The block of the in-context and the cross-attention conditioning: a plain ViT block (paper, Figure 3).

    In-context models carry the condition as tokens of the sequence. Cross-attention models attend to it after the
    self-attention.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = Float32LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = DiTAttention(config)
        self.cross_attn = None
        if config.conditioning == "cross_attention":
            self.norm_cross = Float32LayerNorm(config.hidden_size, config.norm_eps)
            self.cross_attn = DiTCrossAttention(config)
        self.norm2 = Float32LayerNorm(config.hidden_size, config.mlp_norm_eps or config.norm_eps)
        self.mlp = DiTMLP(config)

    def forward(self, hidden_states: Tensor, condition: Tensor | None = None, modulations: None = None) -> Tensor:
        """(N, T, D) tokens and, for cross-attention, the (N, K, D) condition -> (N, T, D)."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        if self.cross_attn is not None and condition is not None:
            hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), condition)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class FinalLayer(nn.Module):
    """(N, T, D) -> (N, T, patch * patch * output channels)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        adaptive = config.modulation_rows > 0
        self.norm_final = Float32LayerNorm(config.hidden_size, config.norm_eps, elementwise_affine=not adaptive)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        initialised_by("zeros", self.linear)
        self.adaLN_modulation: Any = Modulation(config, 2, 2) if adaptive else None

    def forward(
        self, hidden_states: Tensor, condition: Tensor | None = None, modulations: Sequence[Tensor] | None = None
    ) -> Tensor:
        hidden_states = self.norm_final(hidden_states)
        if self.adaLN_modulation is not None:
            rows = self.adaLN_modulation(condition) if modulations is None else modulations
            hidden_states = modulate(hidden_states, *rows)
        return self.linear(for_layer(self.linear, hidden_states))


# --- The model -------------------------------------------------------------------------------------------------------


class DiTTransformer(DiTPreTrainedModel):
    """The Diffusion Transformer. `model(hidden_states, timestep, class_labels).sample` is its prediction.

    Args:
        config: the architecture.

    A fresh model predicts exactly zero: the final layer starts at zero, as do the gates of adaLN-Zero.
    """

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        height, width = (side // config.patch_size for side in config.sample_height_width)
        self.x_embedder = PatchEmbed(config)
        if config.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, height * width, config.hidden_size))
        else:
            table = sincos_positions(height, width, config.hidden_size)
            self.register_buffer("pos_embed", table, persistent=False)
        self.t_embedder = TimestepEmbedder(config)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config)
        block = DiTBlock if config.modulation_rows else DiTTokenBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.final_layer = FinalLayer(config)
        self.post_init()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        precomputed: Tensor | None = None,
        target: Tensor | None = None,
        output_attentions: bool | Sequence[int] = False,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise (or velocity) of noisy latents.

        Args:
            hidden_states: (N, C, H, W), any float dtype.
            timestep: (N,) or a scalar, integer or float, in the units of the training schedule (0 to 999 officially).
            class_labels: (N,) integers; `config.null_class` stands for no class. None for unconditional models.
            precomputed: (N, K, D), what `precompute` returns; given instead of timestep and labels.
            target: (N, C, H, W), what to predict, for other trainers, such as transformers' `Trainer`: the output then
                has a `loss`. A learned variance stays untrained; `dit-hub train` trains it too.
            output_attentions: True, or indices of the blocks whose attention weights to return; they attend eagerly.
            return_dict: return a `DiTTransformerOutput` rather than a tuple.

        Returns:
            `sample` of shape (N, C or 2C, H, W) in the dtype of `hidden_states`, and `attentions` where asked for.

        Raises:
            ValueError: a height or width that the patches do not tile or the learned positions do not cover, or
                labels missing or given without need.
        """
        condition = precomputed
        if precomputed is None:
            if timestep is None:
                raise ValueError("Give a timestep, or what `precompute` returned for one.")
            timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(hidden_states.shape[0])
            condition = self.condition(timestep, class_labels)
        with self._attention_weights(output_attentions) as attentions:
            tokens = self.transform(self.embed(hidden_states), condition, precomputed)
        sample = self.unpatchify(tokens, *hidden_states.shape[-2:]).to(hidden_states.dtype)
        if self.config.parameterization == "sit":  # data - noise -> noise - data
            sample = -sample
        loss = None if target is None else F.mse_loss(sample[:, : target.shape[1]].float(), target.float())
        output = DiTTransformerOutput(loss=loss, sample=sample, attentions=tuple(attentions) or None)
        return output if return_dict else output.to_tuple()

    def condition(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What the blocks are told of timestep and class.

        Args:
            timestep: (N,), integer or float.
            class_labels: (N,) integers, or None for unconditional models.

        Returns:
            In float32: (N, D), the sum of both embeddings, for adaLN-Zero and adaLN; (N, K, D), the timestep's token
            and, where the model has classes, the label's, for in-context and cross-attention.
        """
        if (class_labels is None) == bool(self.config.num_classes):
            needs = f"labels of {self.config.num_classes} classes" if self.config.num_classes else "no class_labels"
            raise ValueError(f"This model takes {needs}; class_labels is {class_labels}.")
        embedding = self.t_embedder(timestep)
        label_embedding = None if class_labels is None else self.y_embedder(class_labels)
        if self.config.modulation_rows:
            return embedding if label_embedding is None else embedding + label_embedding
        return torch.stack([embedding] if label_embedding is None else [embedding, label_embedding], dim=1)

    def precompute(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """All that depends on timestep and class alone, so that a sampler can compute it once, ahead of its loop.

        Args:
            timestep, class_labels: as for `condition`.

        Returns:
            (N, K, D) in float32. adaLN-Zero: K = 6L + 2 modulations, per block shift, 1 + scale and gate of the
            attention, then of the MLP, and last the final layer's shift and 1 + scale. adaLN: K = 4L + 2, no gates.
            In-context and cross-attention: what `condition` returns.
        """
        condition = self.condition(timestep, class_labels)
        return torch.cat(self._modulations(condition), dim=1) if self.config.modulation_rows else condition

    def _modulations(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(N, D) condition -> K modulations of all layers, each (N, 1, D); see `precompute`."""
        layers: Any = (*self.blocks, self.final_layer)
        return tuple([row for layer in layers for row in layer.adaLN_modulation(condition)])

    @property
    def _modulations_are_small(self) -> bool:
        """Whether the weights of all modulations lie in a processor's cache together: up to 1 MB."""
        return self.config.precomputed_length * self.config.hidden_size**2 * 4 <= 2**20

    @property
    def _blocks_are_bare(self) -> bool:
        """Whether no library moves, shards or replaces the blocks, so that parts of them can be called from outside."""
        bare = [type(block) is DiTBlock and _HOOKS.isdisjoint(block.__dict__) for block in self.blocks]
        return len(bare) == self.config.num_hidden_layers and all(bare)

    def embed(self, hidden_states: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, D) tokens with positions, float32."""
        height, width = hidden_states.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"An input of {height}x{width} is not divisible by the patch size {patch}.")
        return self.x_embedder(hidden_states).float() + self.positions(height // patch, width // patch)

    def positions(self, height: int, width: int) -> Tensor:
        """(1, T, D) float32 positions of a grid of tokens; sin-cos ones exist for every size."""
        trained = tuple(side // self.config.patch_size for side in self.config.sample_height_width)
        if (height, width) == trained:
            return self.pos_embed.float()
        if self.config.pos_embed == "learned":
            raise ValueError(f"The learned positions cover {trained[0]}x{trained[1]} patches, not {height}x{width}.")
        # What is traced becomes operators of the graph, for any size.
        traced = torch.compiler.is_compiling() or type(self.pos_embed) is not Tensor
        table = sincos_positions if traced else held_sincos_positions
        return table(height, width, self.config.hidden_size, self.pos_embed.device)

    def transform(self, tokens: Tensor, condition: Tensor | None, precomputed: Tensor | None = None) -> Tensor:
        """(N, T, D) tokens -> (N, T, patch * patch * output channels); condition and precomputed as in `forward`."""
        per_block, extra = self.config.modulation_rows, 0
        ahead: tuple[Tensor, ...] | None = None
        if per_block and precomputed is not None:
            condition, ahead = None, precomputed.unsqueeze(2).unbind(1)  # K of (N, 1, D)
        elif per_block and condition is not None and self._modulations_are_small and self._blocks_are_bare:
            # Faster than in turns with the blocks: 5 % of the toy's time. S/2, of 43 MB, takes 12 % longer so.
            ahead = self._modulations(condition)
        if self.config.conditioning == "in_context" and condition is not None:
            tokens, extra = torch.cat([tokens, condition], dim=1), condition.shape[1]
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, condition, ahead and ahead[index * per_block : (index + 1) * per_block])
        output = self.final_layer(tokens, condition, ahead and ahead[-2:])
        return output[:, :-extra] if extra else output

    @contextlib.contextmanager
    def _attention_weights(self, blocks: bool | Sequence[int]) -> Iterator[list[Tensor]]:
        """Within it, the attention weights of the named blocks gather in the list."""
        indices = range(len(self.blocks)) if blocks is True else blocks or ()
        if outside := [index for index in indices if not 0 <= index < len(self.blocks)]:
            last = len(self.blocks) - 1
            raise ValueError(f"output_attentions names block {outside[0]}, but the blocks are 0 to {last}.")
        gathered: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            for index in sorted(set(indices)):
                weights = cast(Any, self.blocks[index]).attn.weights
                hook = weights.register_forward_hook(lambda module, args, output: gathered.append(output))
                hooks.callback(hook.remove)
            yield gathered

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(N, T, patch * patch * channels) -> (N, channels, height, width)."""
        patch = self.config.patch_size
        grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, width // patch))
        # (N, h, w, p, q, c) -> (N, c, h, p, w, q)
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


AutoModel.register(DiTConfig, DiTTransformer, exist_ok=True)
