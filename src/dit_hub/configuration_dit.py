"""DiTConfig: what distinguishes one Diffusion Transformer from another, and the published sizes by name."""

import difflib
import functools
import inspect
from typing import Any, Literal, TypeVar, get_args

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .checks import whole_number

ConfigClass = TypeVar("ConfigClass", bound=type)
Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
Parameterization = Literal["diffusion", "flow", "sit"]

# Paper, Table 1: (layers, hidden size, heads). Every size exists with patches of 8, 4 and 2.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PUBLISHED_HEADS = {width: heads for _, width, heads in _SIZES.values()}
PUBLISHED_MODELS = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in (8, 4, 2))

# The embedded toy: 16x16 RGB images of 4 colours x 4 shapes, 323,696 parameters.
TOY: dict[str, Any] = dict(
    sample_size=16,
    patch_size=4,
    in_channels=3,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_classes=16,
    class_dropout_prob=0.0,
    learn_sigma=False,
    pos_embed="learned",
    timestep_freq_dim=64,
)

# Factor between pixels and the latents of Stable Diffusion's VAE, which all published models use.
_VAE_SCALE_FACTOR = 8

# Flow-matching schedulers of diffusers count the time from data (0) to noise in thousandths.
FLOW_TIMESTEPS = 1000

# Keys of config.json that are no fields of `DiTConfig`: transformers' own properties, and what loading, quantising,
# training or sharing a model adds.
_LIBRARY_KEYS = {
    *(name for name, _ in inspect.getmembers(PreTrainedConfig, lambda member: isinstance(member, property))),
    *("attn_implementation", "auto_map", "fusion_config", "model_type", "quantization_config", "use_cache"),
}


def nearest(name: str, known: list[str] | tuple[str, ...], count: int = 5) -> str:
    """The known names most like `name`, as words for an error message."""
    by_folded = {known_name.casefold(): known_name for known_name in known}
    matches = difflib.get_close_matches(name.casefold(), list(by_folded), n=count, cutoff=0.4)
    return ", ".join(by_folded[match] for match in matches) or ", ".join(known[:count])


# The largest of any size in a config: a damaged file must not ask for 2**70 layers.
_LARGEST = 65536


def _plain_errors(config_class: ConfigClass) -> ConfigClass:
    """Make the strict dataclass raise ValueError in one sentence for a value of the wrong type."""
    strict_init = config_class.__init__

    @functools.wraps(strict_init)
    def init(self: Any, *args: Any, **fields: Any) -> None:
        try:
            strict_init(self, *args, **fields)
        except StrictDataclassError as error:
            raise ValueError(f"{config_class.__name__}: {error.__cause__ or error}.") from None

    config_class.__init__ = init
    return config_class


@_plain_errors
@strict
class DiTConfig(PreTrainedConfig):
    """Configuration of a `DiTTransformer`. The defaults are DiT-XL/2 at 256x256 as published (Peebles & Xie 2023).

    Args:
        sample_size: height and width of the input in latent pixels; one int where they are equal.
        patch_size: side of a square patch, in latent pixels.
        in_channels: channels of the input.
        hidden_size: width of the token vectors; a multiple of `num_attention_heads`.
        num_hidden_layers: number of blocks.
        num_attention_heads: attention heads per block.
        mlp_ratio: width of a block's MLP, as a multiple of `hidden_size`.
        num_classes: number of classes; 0 makes the model unconditional.
        class_dropout_prob: share of the labels replaced by the null class in training. Above 0 the label table has one
            more row, the null class `num_classes`, and the model can be guided.
        learn_sigma: predict the variance too: twice the output channels, noise first.
        conditioning: how timestep and class enter the blocks (paper, Section 3.2): "adaln_zero", "adaln",
            "cross_attention" or "in_context".
        pos_embed: "sincos" (fixed, any input size) or "learned" (the training size only).
        timestep_freq_dim: width of the sinusoidal timestep embedding.
        timestep_freq_shift: frequencies are exp(-ln(10000) k / (half - shift)): 0 in the official code, 1 in diffusers.
        norm_eps: epsilon of every LayerNorm.
        mlp_norm_eps: epsilon of the LayerNorm before the MLP, which diffusers sets separately; None means `norm_eps`.
        guidance_channels: how many leading channels classifier-free guidance changes. None: see `guided_channels`.
        parameterization: what the network predicts. "diffusion": what DDPM's schedulers step with, noise unless
            theirs says otherwise, at timesteps 0 to T - 1. "flow": the velocity noise - data of the straight path, at
            timesteps 0 (data) to 1000 (noise), for flow-matching schedulers. "sit": the same for callers; inside,
            the network was trained as SiT (Ma et al. 2024) on data - noise at times 0 (noise) to 1 (data).

    Raises:
        ValueError: an unknown field, or values that do not fit together.
    """

    model_type = "diffusion_transformer"

    sample_size: int | list[int] | tuple[int, ...] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    mlp_ratio: float | int = 4.0
    num_classes: int = 1000
    class_dropout_prob: float | int = 0.1
    learn_sigma: bool = True
    conditioning: str = "adaln_zero"
    pos_embed: str = "sincos"
    timestep_freq_dim: int = 256
    timestep_freq_shift: float | int = 0.0
    norm_eps: float = 1e-6
    mlp_norm_eps: float | None = None
    guidance_channels: int | None = None
    parameterization: str = "diffusion"

    def __post_init__(self, **kwargs: Any):
        # transformers keeps unknown keys as attributes; a typo must not pass as a setting.
        unknown = [key for key in kwargs if key not in _LIBRARY_KEYS and not key.startswith("_")]
        if unknown:
            fields = list(DiTConfig.__annotations__)
            raise ValueError(
                f"DiTConfig has no field {unknown[0]!r}. The nearest names: {nearest(unknown[0], fields)}."
            )
        if not isinstance(self.sample_size, int):  # JSON knows no tuples
            height_width = tuple(self.sample_size)
            self.sample_size = (
                height_width[0] if height_width and height_width == height_width[:1] * 2 else height_width
            )
        super().__post_init__(**kwargs)
        self._check_ranges()
        self._check_choices()
        self._check_shapes()

    def _check_ranges(self) -> None:
        names = ("patch_size", "in_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio")
        for name in names:
            if not 0 < getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} must be above 0 and at most {_LARGEST}, not {getattr(self, name)}.")
        if self.guidance_channels is not None:
            whole_number("guidance_channels", self.guidance_channels, 1, self.in_channels)
        if not 0 <= self.num_classes <= _LARGEST:
            raise ValueError(
                f"num_classes must be 0 (unconditional) or more, and at most {_LARGEST}, not {self.num_classes}."
            )
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie between 0 and 1, not {self.class_dropout_prob}.")
        if not 0 <= self.timestep_freq_shift < self.timestep_freq_dim // 2:
            raise ValueError(f"timestep_freq_shift must be 0 or more and below half of timestep_freq_dim "
                             f"{self.timestep_freq_dim}, not {self.timestep_freq_shift}.")  # fmt: skip
        for name in ("norm_eps", "mlp_norm_eps"):
            if (epsilon := getattr(self, name)) is not None and epsilon <= 0:
                raise ValueError(f"{name} must be above 0, not {epsilon}.")
        if self.timestep_freq_dim < 4 or self.timestep_freq_dim % 2:
            raise ValueError(f"timestep_freq_dim must be an even number of 4 or more, not {self.timestep_freq_dim}.")

    def _check_shapes(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}."
            )
        if self.pos_embed == "sincos" and self.hidden_size % 4:
            raise ValueError(f'hidden_size {self.hidden_size} must be divisible by 4 for pos_embed="sincos".')
        if not isinstance(self.sample_size, int) and len(self.sample_size) != 2:
            raise ValueError(f"sample_size must be one int or (height, width), not {self.sample_size}.")
        for side in self.sample_height_width:
            if not 0 < side <= _LARGEST:
                raise ValueError(f"sample_size must be above 0 and at most {_LARGEST}, not {self.sample_size}.")
            if side % self.patch_size:
                raise ValueError(f"sample_size {self.sample_size} is not divisible by patch_size {self.patch_size}.")

    def _check_choices(self) -> None:
        for name, choices in (("conditioning", Conditioning), ("parameterization", Parameterization)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}.")
        if self.pos_embed not in ("sincos", "learned"):
            raise ValueError(f'pos_embed must be "sincos" or "learned", not {self.pos_embed!r}.')

    @property
    def sample_height_width(self) -> tuple[int, int]:
        """Height and width of the input in latent pixels."""
        if isinstance(self.sample_size, int):
            return self.sample_size, self.sample_size
        return self.sample_size[0], self.sample_size[1]

    @property
    def draws_pixels(self) -> bool:
        """Whether the model draws grey or RGB images, in 1 or 3 channels, rather than a VAE's latents."""
        return self.in_channels in (1, 3)

    @property
    def out_channels(self) -> int:
        """Channels of the output: the noise, then the variance where it is learned."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    @property
    def guided_channels(self) -> int:
        """How many leading channels guidance changes: `guidance_channels`, or as many as the family's code guides.

        The official code guides 3 of the 4 latent channels; diffusers' class, for which `timestep_freq_shift` is 1,
        guides all of them, and so do models of other inputs. The variance is never guided.
        """
        if self.guidance_channels is not None:
            return self.guidance_channels
        return 3 if self.in_channels == 4 and self.timestep_freq_shift == 0 else self.in_channels

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class", or None where the model was not trained with one."""
        return self.num_classes if self.num_classes > 0 and self.class_dropout_prob > 0 else None

    @property
    def modulation_rows(self) -> int:
        """Modulation vectors per block: shift, scale and gate twice; adaLN has no gates, the others no modulation."""
        return {"adaln_zero": 6, "adaln": 4}.get(self.conditioning, 0)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How transformers' tensor parallelism (`tp_plan="auto"`) splits the blocks among processes.

        The fused projections are split without regard to heads, so their output is gathered before the attention. The
        modulations, a third of the weights, stay whole: a plan cannot name one layer of a sequence.
        """
        plan = {"blocks.*.mlp.fc1": "colwise", "blocks.*.mlp.fc2": "rowwise"}
        projections = ["attn.qkv"]
        if self.conditioning == "cross_attention":
            projections += ["cross_attn.q", "cross_attn.kv"]
        plan |= {f"blocks.*.{name}": "colwise_gather_output" for name in projections}
        outputs = {name.split(".")[0] for name in projections}
        return plan | {f"blocks.*.{attention}.proj": "rowwise_split_input" for attention in sorted(outputs)}

    @property
    def precomputed_length(self) -> int:
        """K: how many vectors `DiTTransformer.precompute` returns for each sample."""
        if self.modulation_rows:
            return self.num_hidden_layers * self.modulation_rows + 2
        return 2 if self.num_classes else 1

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; old files that guide 3 channels of fewer, then the default, still load."""
        if config_dict.get("guidance_channels") == 3 and config_dict.get("in_channels") in (1, 2):
            config_dict = {**config_dict, "guidance_channels": None}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_name(cls, name: str, image_size: int = 256, **overrides: Any) -> "DiTConfig":
        """The configuration of a published model ("DiT-XL/2") or of the "toy".

        Args:
            name: one of `PUBLISHED_MODELS`, or "toy", in upper or lower case.
            image_size: side of the image in pixels, for the published models (8 times the latent's).
            overrides: any field of `DiTConfig`.

        Raises:
            ValueError: an unknown name, or an image size that is out of range or not divisible by 8 and the patch.
        """
        if name.casefold() == "toy":
            return cls(**{**TOY, **overrides})
        by_folded = {known.casefold(): known for known in PUBLISHED_MODELS}
        if name.casefold() not in by_folded:
            known = (*PUBLISHED_MODELS, "toy")
            raise ValueError(f"There is no DiT size named {name!r}. The nearest names: {nearest(name, known)}.")
        size, patch = by_folded[name.casefold()].removeprefix("DiT-").split("/")
        if not 0 < image_size <= _LARGEST * _VAE_SCALE_FACTOR:
            raise ValueError(f"image_size must be above 0 and at most {_LARGEST * _VAE_SCALE_FACTOR}, "
                             f"not {image_size}.")  # fmt: skip
        if image_size % (_VAE_SCALE_FACTOR * int(patch)):
            raise ValueError(f"image_size {image_size} is not divisible by {_VAE_SCALE_FACTOR * int(patch)}, "
                             f"as {by_folded[name.casefold()]} needs.")  # fmt: skip
        layers, width, heads = _SIZES[size]
        published: dict[str, Any] = dict(
            sample_size=image_size // _VAE_SCALE_FACTOR,
            patch_size=int(patch),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
        return cls(**{**published, **overrides})


AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
