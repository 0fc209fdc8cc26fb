"""DiTPreTrainedModel: how a `DiTTransformer` starts, loads, is saved and gets other classes."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .checks import listed
from .configuration_dit import DiTConfig
from .ecosystem import DiffusersModelMixin, check_quantization
from .layers import LabelEmbedder, PatchEmbed, sincos_positions
from .shards import check_shards


class DiTPreTrainedModel(PreTrainedModel, DiffusersModelMixin):
    """What `DiTTransformer` is besides its layers."""

    config_class = DiTConfig
    config: DiTConfig
    main_input_name = "hidden_states"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock", "DiTTokenBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # What quantisers leave alone: in 4 bits it raises the error of S/2 from 4e-3 to 9e-2 (examples/quantised.py).
    _keep_in_fp32_modules = ["final_layer"]
    pos_embed: Tensor
    x_embedder: PatchEmbed
    y_embedder: LabelEmbedder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        kind = getattr(module, "dit_init", "xavier")
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            if kind == "zeros":
                init.zeros_(module.weight)
            elif kind == "normal":
                init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):  # as the linear map it is: one row per output channel
                fan_in, fan_out = module.weight[0].numel(), module.weight.shape[0]
                bound = math.sqrt(6 / (fan_in + fan_out))
                init.uniform_(module.weight, -bound, bound)
            else:
                init.xavier_uniform_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif module is self and self.config.pos_embed == "learned":
            init.normal_(self.pos_embed, std=0.02)
        elif module is self:  # not in checkpoints, and memory without content after loading on the meta device
            init.copy_(self.pos_embed, self._position_table())

    def _position_table(self) -> Tensor:
        height, width = (side // self.config.patch_size for side in self.config.sample_height_width)
        return sincos_positions(height, width, self.config.hidden_size)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(dtype)` casts the weights, not the sin-cos table: it stays float32."""
        super()._apply(fn, recurse)
        table = self.pos_embed
        if self.config.pos_embed == "sincos" and table.dtype != torch.float32:
            self.pos_embed = self._position_table().to(table.device)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.x_embedder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, but weights must fit: a missing or foreign one is an error.

        Raises:
            ValueError: weights that are missing, unexpected or of another shape than the config says.
        """
        path = pretrained_model_name_or_path
        folder = Path(str(path), kwargs.get("subfolder") or "")
        if folder.is_dir():
            if kwargs.get("config") is None and not (folder / "config.json").is_file():
                raise ValueError(f"{folder} has no config.json.")  # transformers would take the defaults
            for index in folder.glob("*.index.json"):
                check_shards(index)
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        options = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        check_quantization(kwargs.get("quantization_config"), kwargs.get("device_map"))
        try:
            model, info = cast(Any, super()).from_pretrained(path, *args, **options)
        except SafetensorError as error:
            raise ValueError(f"The weights in {folder} are damaged: {error}.") from error
        mismatched = {} if may_mismatch else {name: shapes for name, *shapes in info["mismatched_keys"]}
        _require_fit(path, info["missing_keys"], info["unexpected_keys"], mismatched)
        return (model, info) if wants_info else model

    @classmethod
    def from_state_dict(cls, config: DiTConfig, state_dict: dict[str, Tensor], name: str = "state dict") -> Any:
        """A model in evaluation mode that holds these very tensors, without a copy of them.

        Args:
            config: the architecture.
            state_dict: every parameter by its official name, and nothing else.
            name: what to call the weights in an error.

        Raises:
            ValueError: weights that are missing, unexpected or of another shape than the config says.
        """
        with torch.device("meta"):
            model = cls(config)
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: list(tensor.shape) for name, tensor in state_dict.items()}
        shared = sorted(expected.keys() & found.keys())
        mismatched = {key: [found[key], expected[key]] for key in shared if found[key] != expected[key]}
        _require_fit(name, expected.keys() - found.keys(), found.keys() - expected.keys(), mismatched)
        model.load_state_dict(state_dict, assign=True)
        if config.pos_embed == "sincos":
            model.pos_embed = model._position_table()
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, always in the native layout."""
        # diffusers reads the signature to know that it may pass the named arguments on.
        options = {"save_original_format": False, "max_shard_size": max_shard_size, **kwargs}
        super().save_pretrained(save_directory, variant=variant, **options)
        if variant is not None:  # the config is shared with the other variants, whose dtype it must not name
            path = Path(save_directory, "config.json")
            config = json.loads(path.read_text())
            config.pop("dtype", None)
            path.write_text(json.dumps(config, indent=2) + "\n")

    def remove_null_class(self) -> Any:
        """Remove the null class, so that the model can no longer be guided; see `DiTConfig.class_dropout_prob`."""
        null, self.config.class_dropout_prob = self.config.null_class, 0.0
        if null is not None:
            table = self.y_embedder.embedding_table.weight
            self.y_embedder = LabelEmbedder(self.config).to(table).train(self.training)
            with torch.no_grad():
                self.y_embedder.embedding_table.weight.copy_(table[:null])
        return self

    def remove_learned_variance(self) -> Any:
        """Remove the output's channels of the variance; see `DiTConfig.learn_sigma`."""
        if self.config.learn_sigma:
            layer, channels = cast(Any, self).final_layer, self.config.in_channels
            wide, self.config.learn_sigma = layer.linear, False
            narrow = nn.Linear(wide.in_features, wide.out_features // 2).to(wide.weight).train(self.training)
            with torch.no_grad():  # rows are ordered by pixel of the patch, then by channel
                for ours, theirs in ((narrow.weight, wide.weight), (narrow.bias, wide.bias)):
                    ours.copy_(theirs.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1))
            layer.linear = narrow
        return self

    def resize_class_labels(
        self,
        num_classes: int,
        mapping: Sequence[int | None] | dict[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Give the model another number of classes, for fine-tuning; the null class keeps its row.

        Args:
            num_classes: the new number, above 0.
            mapping: for each new class, the old class whose row it takes; None for a new class drawn as at the start
                of training. A dictionary may leave new classes out. Without a mapping, classes keep their ids.
            generator: draws the new rows, on the model's device.

        Raises:
            ValueError: an unconditional model, or a class that does not exist.
        """
        old_classes, old_null = self.config.num_classes, self.config.null_class
        if not old_classes:
            raise ValueError("An unconditional model has no label table to resize.")
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, not {num_classes}.")
        if mapping is None:
            mapping = {index: index for index in range(min(num_classes, old_classes))}
        pairs = mapping.items() if isinstance(mapping, dict) else enumerate(mapping)
        kept = {new: old for new, old in pairs if old is not None}
        for index, count, which in (*((new, num_classes, "new") for new in kept),
                                    *((old, old_classes, "old") for old in kept.values())):  # fmt: skip
            if not 0 <= index < count:
                raise ValueError(f"mapping names the {which} class {index}, but those are 0 to {count - 1}.")
        old_table = self.y_embedder.embedding_table.weight
        self.config.num_classes = num_classes
        if old_null is not None:
            kept[num_classes] = old_null
        self.y_embedder = LabelEmbedder(self.config).to(old_table).train(self.training)
        table = self.y_embedder.embedding_table.weight
        with torch.no_grad():
            table.normal_(std=0.02, generator=generator)
            table[list(kept)] = old_table[list(kept.values())]
        table.requires_grad_(old_table.requires_grad)
        return self


def _require_fit(
    path: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Mapping[str, Sequence[Any]]
) -> None:
    """Raise ValueError, naming up to ten weights, where a checkpoint is not the model's."""
    for problem, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            verb = "weight is" if len(names) == 1 else "weights are"
            raise ValueError(f"{path}: {len(names)} {verb} {problem}: {listed(names)}.")
    if mismatched:
        shapes = [
            f"{name} is {list(found)} and should be {list(wanted)}"
            for name, (found, wanted) in sorted(mismatched.items())
        ]
        verb = "weight has" if len(shapes) == 1 else "weights have"
        raise ValueError(f"{path}: {len(shapes)} {verb} another shape than the config says: {listed(shapes)}.")
