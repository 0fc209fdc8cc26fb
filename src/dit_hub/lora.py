"""LoRA on a pipeline, as diffusers' pipelines have it: several adapters at once, with weights, fused and unfused."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin, _func_optionally_disable_offloading
from huggingface_hub import snapshot_download
from torch import Tensor

from .adapters import ADAPTER_FILES, CONFIG_FILE, Adapters, read_adapters, set_class_table
from .sources import plain_hub_errors


class LoraMixin(LoraBaseMixin):
    """The LoRA methods of a pipeline whose denoiser is a `DiTTransformer`.

    Adapters that bring a table of classes of their own set the classes of the model: the last of the active ones.
    """

    _lora_loadable_modules = ["transformer"]
    transformer: Any
    _loaded_weights: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Put adapters into the denoiser, beside those that are there.

        Args:
            pretrained_model_name_or_path_or_dict: a folder that peft wrote or `dit-hub train` with
                `merge_adapters=false`, a Hub id, or what diffusers' `load_lora_adapter` takes: a file or a dictionary
                whose names start with "transformer.".
            adapter_name: to call them by; None numbers them.
            kwargs: of diffusers' `load_lora_adapter`: `weight_name`, `revision`, `token`, `hotswap`, …

        Raises:
            ValueError: no adapters, damaged ones, those of another model, or a denoiser of another runtime or one that
                `torch.compile` has wrapped.
            OSError: the Hub has no such repository or cannot be reached.
            ImportError: peft is missing.
        """
        given = pretrained_model_name_or_path_or_dict
        kind = type(self.transformer)
        if not issubclass(kind, torch.nn.Module):
            raise ValueError(f"Adapters are put into a model in PyTorch, and this is a {kind.__name__}; merge them "
                             "first, and export then.")  # fmt: skip
        if hasattr(self.transformer, "_orig_mod"):
            raise ValueError("torch.compile has wrapped the denoiser, where adapters cannot be reached; load them "
                             "before that, or compile it in place: pipe.transformer.compile().")  # fmt: skip
        self._refuse_while_fused()
        folder = None if isinstance(given, Mapping) else _adapter_folder(given, kwargs)
        if folder is None:
            options = {"prefix": "transformer", "adapter_name": adapter_name, "_pipeline": self, **kwargs}
            before = set(getattr(self.transformer, "peft_config", None) or ())
            self.transformer.load_lora_adapter(given, **options)
            if before == set(getattr(self.transformer, "peft_config", None) or ()) and not kwargs.get("hotswap"):
                raise ValueError('No adapters were loaded: there the names of their weights start with "transformer."; '
                                 "of what peft wrote, give the folder.")  # fmt: skip
            return
        adapters = read_adapters(folder, self.transformer)
        trainable = {parameter: parameter.requires_grad for parameter in self.transformer.parameters()}
        known = set(getattr(self.transformer, "peft_config", None) or ())
        read = {"prefix": None, "metadata": adapters.config.to_dict(), "_pipeline": self}
        self.transformer.load_lora_adapter(adapters.lora, **{**kwargs, **read, "adapter_name": adapter_name})
        (name,) = set(self.transformer.peft_config) - known or {
            adapter_name
        }  # with `hotswap` it is in the place of one
        for parameter, was_trainable in trainable.items():  # peft freezes all but the adapters
            parameter.requires_grad = was_trainable
        self._own_classes = {**self._own_classes, name: adapters}
        self._choose_classes()

    def load_adapters(self, folder: str | os.PathLike) -> None:
        """Merge adapters into the weights for good; the classes become theirs.

        Args:
            folder: as for `load_lora_weights`.

        Raises:
            ValueError, OSError, ImportError: as for `load_lora_weights`; other adapters that are loaded already.
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("The denoiser holds adapters already; fuse_lora and unload_lora_weights first.")
        self.load_lora_weights(folder)
        self.fuse_lora()
        self.unload_lora_weights()

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """As diffusers' `set_adapters`: these adapters are active, each with its weight."""
        self._refuse_while_fused()
        super().set_adapters(adapter_names, adapter_weights)
        self._choose_classes()

    def fuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """As diffusers' `fuse_lora`: add the active adapters to the weights, so that they cost no time."""
        if getattr(self.transformer, "is_quantized", False):
            raise ValueError("Quantised weights would be rounded anew with each adapter that is fused into them and "
                             "taken out; use the adapters beside them.")  # fmt: skip
        self._loaded_weights = None  # peft adds past the count of writes that would tell that they changed
        with _weights_in_place(self):
            super().fuse_lora(components=list(components), **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """As diffusers' `unfuse_lora`: take what was fused out of the weights."""
        with _weights_in_place(self):
            super().unfuse_lora(components=list(components), **kwargs)

    def disable_lora(self) -> None:
        """As diffusers' `disable_lora`: the model computes, and has the classes, as without adapters."""
        super().disable_lora()
        self._choose_classes()

    def enable_lora(self) -> None:
        """As diffusers' `enable_lora`: take back what `disable_lora` did."""
        super().enable_lora()
        self._choose_classes()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As diffusers' `delete_adapters`."""
        self._refuse_while_fused()
        with _weights_in_place(self):
            super().delete_adapters(adapter_names)
        gone = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._own_classes = {name: own for name, own in self._own_classes.items() if name not in gone}
        self._choose_classes()

    def unload_lora_weights(self) -> None:
        """As diffusers' `unload_lora_weights`: take all adapters out; what is fused stays in the weights."""
        fused = bool(self.num_fused_loras)
        with _weights_in_place(self):
            super().unload_lora_weights()
        if not fused:
            self._own_classes = {}
            self._choose_classes()
        self._own_classes, self._base_classes = {}, None
        self._merged_adapters = set()

    def _refuse_while_fused(self) -> None:
        if self.num_fused_loras:
            raise ValueError("Adapters are fused into the weights: unfuse_lora first, or keep them there with "
                             "unload_lora_weights.")  # fmt: skip

    # --- The classes of adapters -------------------------------------------------------------------------------------

    _own_classes: dict[str, Adapters] = {}
    _base_classes: tuple[dict[str, Tensor], dict[int, str]] | None = None

    def _choose_classes(self) -> None:
        """Give the model the table of the last active adapter that has one, or its own."""
        layers = (module for module in self.transformer.modules() if hasattr(module, "disable_adapters"))
        in_use = self._own_classes and not any(layer.disable_adapters is True for layer in layers)
        active = self.get_active_adapters() if in_use else []
        chosen = next((self._own_classes[name] for name in reversed(active)
                       if name in self._own_classes and self._own_classes[name].table), None)  # fmt: skip
        pipeline: Any = self
        if chosen is not None and self._base_classes is None:
            with _weights_in_place(pipeline):
                table = {name: self.transformer.get_parameter(name).detach().clone() for name in chosen.table}
            self._base_classes = table, pipeline.id2label
        if chosen is not None or self._base_classes is not None:
            table, id2label = (chosen.table, chosen.id2label) if chosen is not None else self._base_classes or ({}, {})
            with _weights_in_place(pipeline):
                set_class_table(self.transformer, table)
            if id2label:
                pipeline.register_to_config(id2label=id2label)


@contextmanager
def _weights_in_place(pipeline: Any) -> Iterator[None]:
    """Take offloading off a pipeline within the block, as diffusers' `load_lora_adapter` does, and put it on again.

    Sequentially offloaded weights are elsewhere, and group offloading knows the modules that it was applied to.
    """
    by_component, sequential, by_group = _func_optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if by_component:
            pipeline.enable_model_cpu_offload(device=pipeline._offload_device)
        elif sequential:
            pipeline.enable_sequential_cpu_offload(device=pipeline._offload_device)
        elif by_group:
            _maybe_remove_and_reapply_group_offloading(pipeline.transformer)


def _adapter_folder(given: str | os.PathLike, options: dict[str, Any]) -> Path | None:
    """A folder in peft's format, from here or the Hub; None for what diffusers reads itself."""
    path = Path(given)
    if "weight_name" in options:
        return None
    if path.is_dir():
        return path if (path / CONFIG_FILE).is_file() or not any(path.glob("*.safetensors")) else None
    if path.is_file() or str(given).count("/") != 1:
        return None
    hub_options = {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
    with plain_hub_errors(f"load {given} from"):
        folder = Path(snapshot_download(str(given), allow_patterns=list(ADAPTER_FILES), **hub_options))
    return folder if (folder / CONFIG_FILE).is_file() else None
