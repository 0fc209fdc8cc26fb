"""The layers around the blocks: embeddings of patches, positions, timesteps and labels; layers that stay in float32.

Letters in shape comments: N batch, C channels, H and W latent height and width, T tokens, D hidden size.
"""

import math
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_dit import FLOW_TIMESTEPS, DiTConfig

Module = TypeVar("Module", bound=nn.Module)

# How many position tables are cached for other sizes than the trained one; that of XL/2 at 512x512 has 4.7 MB.
POSITION_TABLES = 16
_held_tables: dict[tuple[int, int, int, torch.device], Tensor] = {}


def initialised_by(kind: str, module: Module) -> Module:
    """Mark how a layer is initialised: "xavier", "normal" or "zeros"; `DiTTransformer._init_weights` reads it.

    transformers calls that function only on layers without children, so each of these carries its own mark.
    """
    module.dit_init = kind  # pyright: ignore[reportArgumentType]
    return module


def for_layer(layer: nn.Module, input: Tensor) -> Tensor:
    """A tensor in the dtype that a layer computes in.

    It is the bias's, since a quantised weight may be no float, or that of diffusers' layerwise casting, which stores
    the layer in fewer bits. For a layer with adapters it is that of the layer they adapt, which is what is cast.
    """
    if type(layer) is not nn.Linear and hasattr(layer, "get_base_layer"):
        layer = cast(Any, layer).get_base_layer()
    registry = layer.__dict__.get("_diffusers_hook")  # getattr takes 2 % of the toy's time to find nothing
    casting = None if registry is None else registry.get_hook("layerwise_casting")
    return input.to(cast(Any, layer).bias.dtype if casting is None else casting.compute_dtype)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever dtype its weights have, also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if hasattr(weight, "qdata"):  # torchao's own products would be in the dtype that it was quantised from
            if type(weight).dequantize is Tensor.dequantize:  # but it has nothing else for some kinds, such as int4
                bias = None if self.bias is None else self.bias.to(weight.dtype)
                return F.linear(input.to(weight.dtype), weight, bias).float()
            weight = weight.dequantize()
        bias = None if self.bias is None else self.bias.float()
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return F.linear(input.float(), weight.float(), bias)
        return F.linear(input.float(), weight.float(), bias)


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm over the float32 residual stream, whatever dtype its weights have."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


def sincos_positions(height: int, width: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """The fixed position table of a `height` x `width` grid of tokens: (1, height * width, dim), float32.

    The first half of the channels encodes the column and the second the row, each as sines, then cosines, of the
    position times 10000^(-k / (dim / 4)). Computed in float64, as the official code does.
    """
    frequencies = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(positions: Tensor) -> Tensor:
        angles = positions.flatten()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows = torch.arange(height, dtype=torch.float64)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.float64)[None, :].expand(height, width)
    table = torch.cat([encode(columns), encode(rows)], dim=1)
    return table.to(dtype=torch.float32, device=device)[None]


def held_sincos_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """As `sincos_positions`, with the last `POSITION_TABLES` cached: a tensor to read, not to write to."""
    key = (height, width, dim, device)
    table = _held_tables.get(key)
    if table is None:
        with torch.inference_mode(mode=False):  # or autograd could not use a table that was made in it
            table = sincos_positions(height, width, dim, device)
        if type(table) is Tensor:  # a tracer's tensors are of no use outside it
            while len(_held_tables) >= POSITION_TABLES:
                _held_tables.pop(next(iter(_held_tables)), None)
            _held_tables[key] = table
    return table


def sinusoid(timestep: Tensor, dim: int, freq_shift: float = 0.0) -> Tensor:
    """The sinusoidal embedding of (N,) timesteps, which may be fractional: (N, dim), float32, cosines first.

    Never below float32: a frequency table cast to bfloat16 raises the model's error from 1.0e-2 to 6.7e-2.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - freq_shift)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D): one linear map of every patch, row by row."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(for_layer(self.proj, hidden_states)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(N,) timesteps -> (N, D), float32."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.runs_backwards = config.parameterization == "sit"
        self.frequencies = (config.timestep_freq_dim, config.timestep_freq_shift)
        first = initialised_by("normal", Float32Linear(config.timestep_freq_dim, config.hidden_size))
        second = initialised_by("normal", Float32Linear(config.hidden_size, config.hidden_size))
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, timestep: Tensor) -> Tensor:
        if self.runs_backwards:  # from 1000 (noise) .. 0 (data) to SiT's 0 .. 1
            timestep = 1 - timestep.float() / FLOW_TIMESTEPS
        return self.mlp(sinusoid(timestep, *self.frequencies))


class LabelEmbedder(nn.Module):
    """(N,) labels -> (N, D), float32. In training, a label is dropped (becomes the null class) with `dropout_prob`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.null_class, self.dropout_prob = config.null_class, config.class_dropout_prob
        rows = config.num_classes + (self.null_class is not None)
        self.embedding_table = initialised_by("normal", nn.Embedding(rows, config.hidden_size))

    def forward(self, class_labels: Tensor) -> Tensor:
        if self.training and self.null_class is not None:
            drop = torch.rand(class_labels.shape, device=class_labels.device) < self.dropout_prob
            class_labels = torch.where(drop, self.null_class, class_labels)
        return self.embedding_table(class_labels).float()
