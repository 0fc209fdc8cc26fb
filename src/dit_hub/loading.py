"""LoadingPipeline: what goes into a pipeline. Folders of every layout, the Hub, single files."""

import importlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP
from huggingface_hub import snapshot_download

from dit_hub.conversion.diffusers_layout import DIFFUSERS_CLASSES, OFFICIAL_WEIGHTS, load_diffusers_folder
from dit_hub.conversion.origin import (
    DEFAULT_VAE,
    ORIGIN_FILE,
    Origin,
    official_export,
    origin_of_repository,
    published_repository,
)
from dit_hub.conversion.single_file import load_single_file

from .adapters import CONFIG_FILE
from .checks import unsound_values
from .configuration_dit import DiTConfig, nearest
from .labels import imagenet_id2label
from .modeling_dit import DiTTransformer
from .runtime import Provider, RuntimeOptions
from .schedulers import official_scheduler, scheduler_from_dict
from .sources import CARD_FILE, fetch, fetch_url, is_url, local_folder, plain_hub_errors

logger = logging.getLogger(__name__)

# Facts about the weights that lie beside them, which the card is made from and which go where the weights go.
FACT_FILES = (ORIGIN_FILE, "training.json", "evaluation.json")

# Of huggingface_hub's downloads; and of diffusers' download, which tells variants and kinds of weights apart.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_DOWNLOAD_OPTIONS = (*_HUB_OPTIONS, "variant", "use_safetensors")

# Of diffusers' `from_pretrained`, which names them nowhere but in its code.
STOCK_OPTIONS = (
    *_DOWNLOAD_OPTIONS,
    "custom_pipeline",
    "custom_revision",
    "device_map",
    "disable_mmap",
    "dtype",
    "load_connected_pipeline",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "provider",
    "provider_options",
    "proxies",
    "quantization_config",
    "sess_options",
    "torch_dtype",
    "trust_remote_code",
    "use_flashpack",
    "use_onnx",
)

# In model_index.json: what diffusers' config of the transformer cannot say.
SHIFT_KEY = "_timestep_freq_shift"
GUIDANCE_KEY = "_guidance_channels"


class LoadingPipeline(DiffusionPipeline):
    """A `DiffusionPipeline` that loads every layout of a DiT."""

    transformer: Any
    scheduler: Any
    vae: Any
    config: Any
    origin: Origin | None = None
    _facts: dict[str, str] = {}
    _loaded_weights: tuple[int, int] | None = None
    _sources: dict[str, tuple[Path, tuple[int, int]]] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        providers: Sequence[Provider] | None = None,
        num_threads: int | None = None,
        cuda_graphs: bool = False,
        timestep_freq_shift: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline from the Hub, from a folder, or one of `EMBEDDED_MODELS` by name.

        Args:
            pretrained_model_name_or_path: a Hub id, a folder, or "dit-toy-shapes". A folder or repository in diffusers'
                layout is converted while loading.
            providers, num_threads, cuda_graphs: see `RuntimeOptions`; for components of other runtimes.
            timestep_freq_shift: for diffusers' layout only, which does not say it. None: 0, the official numbers, for
                repositories known to hold official weights; 1, diffusers' own, for all others.
            kwargs: as for `diffusers.DiffusionPipeline.from_pretrained`: `revision`, `variant`, `token`, `cache_dir`,
                `local_files_only`, … A single `dtype` leaves the VAE in float32, where half precision loses detail;
                `dtype={"default": ..., "vae": ...}` says otherwise.

        Raises:
            ValueError, OSError: no such folder or repository, files that are missing or damaged, an argument that
                neither this nor diffusers takes, or a dtype for an export, whose precision is fixed.
        """
        name = str(pretrained_model_name_or_path)
        known = [*_arguments(LoadingPipeline.from_pretrained), *_arguments(cls), *STOCK_OPTIONS]
        _refuse_unknown(kwargs, known, "from_pretrained")
        given = set(kwargs)
        if (device_map := kwargs.get("device_map")) is not None and device_map not in SUPPORTED_DEVICE_MAP:
            strategies = ", ".join(dict.fromkeys(SUPPORTED_DEVICE_MAP))
            raise ValueError(f"device_map must be one of {strategies} on this machine, not {device_map!r}.")
        folder = local_folder(pretrained_model_name_or_path)
        if folder is None:
            folder = Path(cls.download(name, **{key: kwargs[key] for key in _DOWNLOAD_OPTIONS if key in kwargs}))
        for key in ("dtype", "torch_dtype"):  # the older name still works in diffusers
            if isinstance(dtype := kwargs.get(key), torch.dtype):
                kwargs[key] = {"default": dtype, "vae": torch.float32}
        index = cls._checked_index(folder, kwargs)
        layout = "diffusers" if _is_foreign(index.get("transformer")) else "dit-hub"
        if layout == "diffusers" and "transformer" not in kwargs:
            kwargs["transformer"] = _load_foreign(name, folder, index, timestep_freq_shift, kwargs)
        elif timestep_freq_shift is not None:
            raise ValueError(f"timestep_freq_shift: for diffusers' layout only; {name} has a configuration of its own.")
        options = RuntimeOptions(providers, num_threads, cuda_graphs)
        with unsound_values(f"{name} does not load"):
            kwargs |= _load_exported(folder, index, kwargs, options)
            pipeline = super().from_pretrained(folder, **kwargs)
        if not isinstance(pipeline.transformer, torch.nn.Module):  # diffusers does not tell an export
            pipeline.transformer.to(dtype=_transformers_dtype(kwargs))
        pipeline._remember(name, folder, layout, given)
        return pipeline

    def source_folder(self, name: str) -> Path | None:
        """The folder that the weights of a component were loaded from; None if they are not those now."""
        folder, loaded = self._sources.get(name, (None, None))
        if name == "transformer":
            loaded = self._loaded_weights  # which adapters reset
        return folder if loaded == weights_state(getattr(self, name)) else None

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike,
        vae: Any = DEFAULT_VAE,
        scheduler: Any = None,
        id2label: dict[int, str] | None = None,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        family: str | None = None,
        num_attention_heads: int | None = None,
        torch_dtype: torch.dtype | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Any:
        """Load a checkpoint file that comes without a configuration, such as `DiT-XL-2-256x256.pt`.

        Args:
            path: a local file, or "https://huggingface.co/ORG/NAME/resolve/REVISION/FILE".
            vae: the decoder of a latent model: an `AutoencoderKL`, a folder or a Hub id. Models of pixels get none, and
                None leaves it out.
            scheduler: None means that of the conversion to the official layout, or else `official_scheduler`.
            id2label: names of the classes; None means those of the conversion, or else ImageNet's for the 1000 classes
                of weights that are known to be of ImageNet (see `Origin.dataset`).
            dtype: of the transformer's weights; None keeps the file's.
            weights, family, num_attention_heads, overrides: see `dit_hub.conversion.load_single_file`.
            torch_dtype: the older name of `dtype`.
            cache_dir, force_download, local_files_only, token: for what is downloaded, the file or the decoder.
            revision: of the file, before that in its address.

        Raises:
            ValueError, OSError: see `dit_hub.conversion.load_single_file`; an argument that nothing takes.
        """
        fields = list(DiTConfig.__annotations__)
        _refuse_unknown(overrides, [*_arguments(LoadingPipeline.from_single_file), *fields], "from_single_file")
        for name, given in (("dtype", dtype), ("torch_dtype", torch_dtype)):
            if given is not None and not isinstance(given, torch.dtype):
                raise ValueError(f"{name} must be a torch.dtype, not {given!r}.")
        dtype = dtype or torch_dtype
        given = (cache_dir, force_download, local_files_only, revision, token)
        hub_options = {name: value for name, value in zip(_HUB_OPTIONS, given, strict=True) if value is not None}
        file = fetch_url(str(path), hub_options) if is_url(path) else path
        transformer: Any
        transformer, origin = load_single_file(file, weights, family, num_attention_heads, **overrides)
        beside = official_export(file)
        if scheduler is None and "scheduler" in beside:
            scheduler = scheduler_from_dict(beside["scheduler"])
        if id2label is None and "id2label" in beside:
            id2label = {int(index): name for index, name in beside["id2label"].items()}
        if dtype is not None:
            transformer.to(dtype=dtype)
        config = transformer.config
        if id2label is None and config.num_classes == 1000 and origin.is_imagenet:
            id2label = imagenet_id2label()
        if isinstance(vae, (str, os.PathLike)):
            hub_options.pop("revision", None)  # of another repository
            vae = _load_vae(str(vae), hub_options) if config.in_channels == 4 else None
        make: Any = cls
        pipeline = make(transformer, scheduler or official_scheduler(config), vae, id2label)
        pipeline.origin = origin
        pipeline._loaded_weights = weights_state(transformer)
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Read model_index.json; a transformer of another layout, or that carries its code, is named as ours.

        diffusers reads through here when it downloads and when it loads. No code of a repository runs.
        """
        index = cast(Any, super())._dict_from_json_file(json_file)
        if _is_foreign(index.get("transformer")) or _carries_code(index.get("transformer")):
            index["transformer"] = ["dit_hub", "DiTTransformer"]
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = cls.__name__
        return index

    @classmethod
    def _checked_index(cls, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
        """What model_index.json says, as it stands there.

        Raises:
            ValueError: a component is missing, whose files diffusers would look for in the folder itself.
        """
        path = folder / cls.config_name
        if not path.is_file():
            if (folder.parent / cls.config_name).is_file():
                raise ValueError(f"{folder} is a part of the pipeline {folder.parent}; give that folder.")
            if (folder / CONFIG_FILE).is_file():
                raise ValueError(f"{folder} holds adapters; load the model that they adapt, then load_lora_weights.")
            raise ValueError(f"{folder} is no pipeline folder: it has no {cls.config_name}.")
        try:
            index = json.loads(path.read_text())
            components = {name: entry for name, entry in index.items() if _names_a_class(name, entry)}
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path} is damaged.") from None
        for name in ("transformer", "scheduler"):
            if name not in components and name not in given:
                raise ValueError(f"{path} names no {name}.")
        for name in components:
            if Path(name).name != name or name == "..":
                raise ValueError(f"{path} names {name!r}, which is not a folder in it.")
            if name not in given and not (folder / name).is_dir():
                raise ValueError(f"{folder} has no folder {name}, which its {cls.config_name} names.")
        return index

    @classmethod
    def download(cls, pretrained_model_name: Any, **kwargs: Any) -> Any:
        """As diffusers' `download`, but with the facts, and the files of other runtimes, fetched as whole folders."""
        hub_options = {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS and value is not None}
        path = Path(fetch(pretrained_model_name, cls.config_name, hub_options, ", which is no folder here,"))
        index = json.loads(path.read_text())
        components = {name: entry for name, entry in index.items() if _names_a_class(name, entry)}
        wanted = [*FACT_FILES, CARD_FILE]
        ours = [entry[1] for entry in components.values() if entry[0] == "dit_hub"]
        if any(name != "DiTTransformer" for name in ours):
            wanted += [cls.config_name, "report.json", *(f"{name}/*" for name in components)]
        else:
            super().download(pretrained_model_name, **kwargs)
        with plain_hub_errors(f"load {pretrained_model_name} from"):
            return snapshot_download(pretrained_model_name, allow_patterns=wanted, **hub_options)

    def _remember(self, name: str, folder: Path, layout: str, given: set[str]) -> None:
        """Keep where the pipeline comes from, but for the components that were given, for the card and for samples."""
        self.register_to_config(_name_or_path=name)
        self.origin = origin_of_repository(name, folder, layout)
        self._facts = {key: (folder / key).read_text() for key in FACT_FILES[1:] if (folder / key).is_file()}
        self._loaded_weights = weights_state(self.transformer)
        self._sources = {part: (folder / part, weights_state(getattr(self, part)))
                         for part in {"transformer", "vae"} - given if getattr(self, part) is not None}  # fmt: skip
        is_imagenet = self.transformer.config.num_classes == 1000 and self.origin.is_imagenet
        if layout == "diffusers" and not self.config.id2label and is_imagenet:
            self.register_to_config(id2label=imagenet_id2label())


# --- Details ---------------------------------------------------------------------------------------------------------


def _names_a_class(name: str, entry: Any) -> bool:
    """Whether an entry of model_index.json is a component: [library, class]."""
    return not name.startswith("_") and isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[0] is not None


def _is_foreign(entry: Any) -> bool:
    """Whether an entry of model_index.json is diffusers' DiT."""
    return isinstance(entry, (list, tuple)) and tuple(entry[:1]) == ("diffusers",) and entry[1] in DIFFUSERS_CLASSES


def _carries_code(entry: Any) -> bool:
    """Whether an entry of model_index.json is our class from a file of the repository."""
    return isinstance(entry, (list, tuple)) and list(entry) == ["modeling_dit", "DiTTransformer"]


def _load_foreign(
    name: str, folder: Path, index: dict[str, Any], shift: float | None, options: dict[str, Any]
) -> DiTTransformer:
    """The transformer of a folder in diffusers' layout, with the numerics that its weights were trained with.

    It is where `device_map` says, since diffusers moves only what it loads itself.
    """
    if options.get("device_map") == "balanced":
        raise ValueError(
            f"{name} is in diffusers' layout, which is converted while loading, and device_map 'balanced' places no "
            "transformer that is; run `dit-hub convert` on it first, or name one device."
        )
    official = published_repository(name) in OFFICIAL_WEIGHTS or index.get(SHIFT_KEY) == 0
    if shift is None:
        shift = 0.0 if official else 1.0
        reason = "it holds official weights" if official else "as diffusers itself computes"
        other = "1 for diffusers' own numbers" if official else "0 if these are converted official weights"
        logger.warning(
            "%s is in diffusers' layout: timestep_freq_shift=%g, since %s; pass %s.", name, shift, reason, other
        )
    numerics: dict[str, Any] = {"timestep_freq_shift": shift, **({"mlp_norm_eps": None} if shift == 0 else {})}
    numerics["guidance_channels"] = index.get(GUIDANCE_KEY)
    transformer: Any = load_diffusers_folder(folder / "transformer", options.get("variant"), **numerics)
    return transformer.to(device=options.get("device_map"), dtype=_transformers_dtype(options))


def _load_exported(
    folder: Path, index: dict[str, Any], given: dict[str, Any], options: RuntimeOptions
) -> dict[str, Any]:
    """The components of other runtimes, loaded here because diffusers does not pass on their options."""
    loaded = {}
    for name, entry in index.items():
        if name not in given and _names_a_class(name, entry) and entry[0] == "dit_hub":
            kind: Any = getattr(importlib.import_module("dit_hub"), entry[1], None)  # of a higher layer
            if hasattr(kind, "session_type"):
                loaded[name] = kind.from_pretrained(folder / name, **vars(options))
    return loaded


def _transformers_dtype(options: dict[str, Any]) -> torch.dtype | None:
    """The one that is asked for, if any; `dtype` is for all components, or a dictionary by component."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    return dtype.get("transformer", dtype.get("default")) if isinstance(dtype, dict) else dtype


def _arguments(door: Any) -> list[str]:
    """The names of the arguments of a class or one of its methods."""
    parameters = inspect.signature(door).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]


def _refuse_unknown(given: dict[str, Any], known: list[str], door: str) -> None:
    """ValueError for an argument that nothing would read."""
    for name in given.keys() - set(known):
        raise ValueError(f"{door} takes no {name!r}. The nearest names: {nearest(name, known)}.")


def _load_vae(name: str, hub_options: dict[str, Any]) -> Any:
    """A decoder, or None with a word of advice where it cannot be had now."""
    try:
        with warnings.catch_warnings():  # diffusers' own use of a deprecated argument
            warnings.simplefilter("ignore")
            return AutoencoderKL.from_pretrained(name, **hub_options)
    except (OSError, ValueError):
        logger.warning(
            "The decoder %s cannot be loaded now, so this pipeline draws latents only; pass vae= another, or set "
            'pipe.vae = AutoencoderKL.from_pretrained("%s") later.',
            name,
            name,
        )
        return None


def weights_state(transformer: Any) -> tuple[int, int]:
    """Changes when the weights do: another model, or a write to one of its parameters."""
    parameters = transformer.parameters() if isinstance(transformer, torch.nn.Module) else ()
    return id(transformer), sum(parameter._version for parameter in parameters)
