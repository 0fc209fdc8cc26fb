"""HubPipeline: what goes into a pipeline and out of it. Folders, the Hub, single files; saving, pushing with a card."""

import inspect
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

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
from dit_hub.model_cards import is_own_card, render_card

from .adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapters
from .configuration_dit import DiTConfig, nearest
from .flops import measure
from .labels import imagenet_id2label
from .manifest import note_written
from .modeling_dit import DiTTransformer
from .runtime import Provider, RuntimeOptions, use_options
from .schedulers import official_scheduler, scheduler_from_dict
from .sources import CARD_FILE, fetch, fetch_url, is_url, local_folder, plain_hub_errors
from .visualize import sample_grid

logger = logging.getLogger(__name__)

# Facts about the weights that lie beside them, which the card is made from and which go where the weights go.
FACT_FILES = (ORIGIN_FILE, "training.json", "evaluation.json")

# Of huggingface_hub's downloads; and of diffusers' download, which tells variants and kinds of weights apart.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_DOWNLOAD_OPTIONS = (*_HUB_OPTIONS, "variant", "use_safetensors")

# In model_index.json: what diffusers' config of the transformer cannot say.
SHIFT_KEY = "_timestep_freq_shift"
GUIDANCE_KEY = "_guidance_channels"

# The picture of the card. Drawn while pushing where it costs no more than this many multiply-accumulates in all, which
# are seconds on a CPU, or where there is a GPU.
SAMPLES_FILE = "samples.png"
_CHEAP = 1e12
_SAMPLES, _SAMPLE_STEPS = 16, 50


class HubPipeline(DiffusionPipeline):
    """A `DiffusionPipeline` that loads every layout of a DiT and pushes with a card; `DiTPipeline` samples."""

    origin: Origin | None = None
    _facts: dict[str, str] = {}
    _loaded_weights: tuple[int, int] | None = None

    # --- In ----------------------------------------------------------------------------------------------------------

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
            ValueError, OSError: no such folder or repository, files that are missing or damaged, or an argument that
                neither this nor diffusers takes.
        """
        name = str(pretrained_model_name_or_path)
        known = [*_arguments(HubPipeline.from_pretrained), *_arguments(cls), *_stock_options()]
        _refuse_unknown(kwargs, known, "from_pretrained")
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
        with _unsound_values(f"{name} does not load"), use_options(RuntimeOptions(providers, num_threads, cuda_graphs)):
            pipeline = super().from_pretrained(folder, **kwargs)
        pipeline._remember(name, folder, layout)
        return pipeline

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
        _refuse_unknown(overrides, [*_arguments(HubPipeline.from_single_file), *fields], "from_single_file")
        for name, given in (("dtype", dtype), ("torch_dtype", torch_dtype)):
            if given is not None and not isinstance(given, torch.dtype):
                raise ValueError(f"{name} must be a torch.dtype, not {given!r}.")
        dtype = dtype or torch_dtype
        given = (cache_dir, force_download, local_files_only, revision, token)
        hub_options = {name: value for name, value in zip(_HUB_OPTIONS, given, strict=True) if value is not None}
        file = fetch_url(str(path), hub_options) if is_url(path) else path
        transformer, origin = load_single_file(file, weights, family, num_attention_heads, **overrides)
        beside = official_export(file)
        if scheduler is None and "scheduler" in beside:
            scheduler = scheduler_from_dict(beside["scheduler"])
        if id2label is None and "id2label" in beside:
            id2label = {int(index): name for index, name in beside["id2label"].items()}
        if dtype is not None:
            cast(Any, transformer).to(dtype)
        config = transformer.config
        if id2label is None and config.num_classes == 1000 and origin.is_imagenet:
            id2label = imagenet_id2label()
        if isinstance(vae, (str, os.PathLike)):
            hub_options.pop("revision", None)  # of another repository
            vae = _load_vae(str(vae), hub_options) if config.in_channels == 4 else None
        pipeline = cast(Any, cls)(transformer, scheduler or official_scheduler(config), vae, id2label)
        pipeline.origin = origin
        pipeline._loaded_weights = _weights_state(transformer)
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

    def _remember(self, name: str, folder: Path, layout: str) -> None:
        """Keep where the pipeline comes from, for the card."""
        pipeline = cast(Any, self)
        pipeline.register_to_config(_name_or_path=name)
        self.origin = origin_of_repository(name, folder, layout)
        self._facts = {key: (folder / key).read_text() for key in FACT_FILES[1:] if (folder / key).is_file()}
        self._loaded_weights = _weights_state(pipeline.transformer)
        is_imagenet = pipeline.transformer.config.num_classes == 1000 and self.origin.is_imagenet
        if layout == "diffusers" and not pipeline.config.id2label and is_imagenet:
            pipeline.register_to_config(id2label=imagenet_id2label())

    def load_adapters(self, folder: str | os.PathLike) -> None:
        """Merge adapters that were trained with `merge_adapters=false`; the classes become theirs.

        Args:
            folder: of `dit-hub train`, or a Hub id.

        Raises:
            ValueError, OSError, ImportError: see `dit_hub.adapters.load_adapters`.
        """
        pipeline = cast(Any, self)
        path = Path(folder)
        if not path.is_dir() and str(folder).count("/") == 1:
            with plain_hub_errors(f"load {folder} from"):
                path = Path(snapshot_download(str(folder), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        id2label = load_adapters(pipeline.transformer, path)
        if id2label:
            pipeline.register_to_config(id2label=id2label)

    # --- Out ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As diffusers' `save_pretrained`, with the facts about the weights beside them.

        Raises:
            ValueError: a component that cannot be saved, which diffusers would leave out; nothing is written.
        """
        for name, component in cast(Any, super()).components.items():
            _check_saveable(name, getattr(component, "_orig_mod", component))  # itself, where it is compiled
        super().save_pretrained(save_directory, **kwargs)
        self.save_facts(save_directory)

    def save_facts(self, folder: str | os.PathLike) -> None:
        """Write what is known of the weights into a folder that they were written to.

        The licence stays whatever happened to the weights; what was measured goes only with weights that are as loaded.
        """
        unchanged = self._loaded_weights == _weights_state(cast(Any, self).transformer)
        if self.origin is not None:
            checked_here = unchanged and self.origin.conversion.get("to") == "dit-hub"
            origin = replace(self.origin, modified=self.origin.modified or not unchanged)
            (origin if checked_here else replace(origin, conversion={})).save(Path(folder))
        for name, text in self._facts.items() if unchanged else ():
            Path(folder, name).write_text(text)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> str:
        """Push the pipeline with its card to the Hub; the repository is made where it does not exist.

        Args:
            repo_id: "organisation/name", or a name of your own.
            commit_message: of the one commit that holds everything.
            private: whether a new repository is.
            token: of the Hub; None means the one you logged in with.
            create_pr: propose the files instead of committing them.
            variant, max_shard_size: as for `save_pretrained`.
            kwargs: further arguments of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            OSError: the Hub refuses, or cannot be reached. Files it has received need not be sent again.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size, **kwargs)
            self.draw_samples(folder)
            return push_folder(folder, repo_id, commit_message, private, token, create_pr)

    @property
    def draws_quickly(self) -> bool:
        """Whether the card's picture takes seconds, and can be drawn at all."""
        pipeline = cast(Any, self)
        config = pipeline.transformer.config
        passes = _SAMPLES * _SAMPLE_STEPS * (1 if config.null_class is None else 2)
        cheap = pipeline.device.type == "cuda" or measure(config).gmacs * 1e9 * passes <= _CHEAP
        return cheap and (pipeline.vae is not None or config.in_channels in (1, 3))

    def draw_samples(self, folder: str | os.PathLike, force: bool = False) -> bool:
        """Draw the card's picture into a folder, unless it is there; False where that would take long.

        Args:
            folder: the pipeline's.
            force: draw it whatever it costs, and anew if it is there.

        Raises:
            ValueError: the pipeline has no decoder for its latents, and `force` is on.
        """
        pipeline, target = cast(Any, self), Path(folder, SAMPLES_FILE)
        if target.is_file() and not force:
            return True
        if not force and not self.draws_quickly:
            return False
        shown = getattr(pipeline, "_progress_bar_config", {})
        pipeline.set_progress_bar_config(disable=not force)
        with _unsound_values(f"{pipeline.config.get('_name_or_path')} draws no samples"):
            sample_grid(pipeline, count=_SAMPLES, steps=_SAMPLE_STEPS).save(target)
        note_written(target)
        pipeline.set_progress_bar_config(**shown)
        return True


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Push a folder to the Hub in one commit; arguments, result and errors as for `DiTPipeline.push_to_hub`.

    A README.md that a person wrote is pushed as it is; one that `write_card` made is made anew for the repository.
    """
    api, folder = HfApi(token=token), Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    ours = not (folder / CARD_FILE).is_file() or is_own_card(folder / CARD_FILE)
    if ours:
        render_card(folder, repo_id)  # what cannot be described is refused before a repository is made for it
    repository = make_repository(repo_id, private, token)
    with plain_hub_errors(f"push to {repo_id} on"):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if ours:
            card = CommitOperationAdd(CARD_FILE, str(render_card(folder, repository)).encode())
            additions = [card, *(addition for addition in additions if addition.path_in_repo != CARD_FILE)]
        message = commit_message or f"Upload {folder.name if folder.name else 'pipeline'}"
        commit = api.create_commit(
            repository, additions, commit_message=message, create_pr=create_pr, revision=revision
        )
        return commit.commit_url


def make_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository on the Hub, unless it is there; returns its whole name. Errors as for `push_folder`."""
    with plain_hub_errors(f"push to {repo_id} on"):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


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
    """The transformer of a folder in diffusers' layout, with the numerics that its weights were trained with."""
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
    transformer = load_diffusers_folder(folder / "transformer", options.get("variant"), **numerics)
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get("transformer", dtype.get("default"))
    return transformer.to(dtype) if dtype is not None else transformer


def _arguments(door: Any) -> list[str]:
    """The names of the arguments of a class or one of its methods."""
    parameters = inspect.signature(door).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]


def _stock_options() -> list[str]:
    """What diffusers' `from_pretrained` takes: it reads its options by name, so that only its code says them."""
    constants = inspect.unwrap(DiffusionPipeline.from_pretrained).__code__.co_consts
    return [name for name in constants if isinstance(name, str) and name.isidentifier()]


def _refuse_unknown(given: dict[str, Any], known: list[str], door: str) -> None:
    """ValueError for an argument that nothing would read."""
    for name in given.keys() - set(known):
        raise ValueError(f"{door} takes no {name!r}. The nearest names: {nearest(name, known)}.")


def _check_saveable(name: str, component: Any) -> None:
    """ValueError for a component that diffusers would leave out of a folder, or write only a part of."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # without it nothing holds adapters
    modules = component.modules() if isinstance(component, torch.nn.Module) and tuners else ()
    if any(isinstance(module, tuners.BaseTunerLayer) for module in modules):
        whole = hasattr(component, "merge_and_unload")
        merge = f"pipe.{name} = pipe.{name}.merge_and_unload()" if whole else f"merge_adapters(pipe.{name})"
        raise ValueError(
            f"The {name} holds adapters, which a pipeline folder has no place for, so nothing was written; add them to "
            f"its weights first: {merge}{'' if whole else ', of dit_hub.adapters'}."
        )
    bases = (
        getattr(sys.modules[library], base, None)
        for library, classes in LOADABLE_CLASSES.items()
        if library in sys.modules
        for base in classes
    )
    if component is not None and not any(isinstance(component, base) for base in bases if base is not None):
        kind = type(component).__name__
        raise ValueError(f"The {name} is a {kind}, which diffusers cannot save, so nothing was written.")


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


def _weights_state(transformer: Any) -> tuple[int, int]:
    """Changes when the weights do: another model, or a write to one of its parameters."""
    parameters = transformer.parameters() if isinstance(transformer, torch.nn.Module) else ()
    return id(transformer), sum(parameter._version for parameter in parameters)


@contextmanager
def _unsound_values(problem: str) -> Iterator[None]:
    """ValueError for what libraries do when a folder's JSON files hold values that they do not expect."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{problem}; are its JSON files sound? {type(error).__name__}: {reason}") from error
