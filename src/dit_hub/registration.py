"""Makes dit_hub's classes known to diffusers and transformers when those are imported, if ever."""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# Classes that model_index.json may name as components of a pipeline folder, all living in `dit_hub`.
COMPONENTS = (
    "DiTTransformer",
    "ORTDiTTransformer",
    "ORTSampler",
    "ORTVAEDecoder",
    "OpenVINODiTTransformer",
    "TensorRTDiTTransformer",
    "TensorRTSampler",
    "TensorRTVAEDecoder",
)


def _register_components(loading: ModuleType) -> None:
    # Without this, diffusers refuses a component of an unknown library in a Hub repository, and writes the file a
    # class lives in, not "dit_hub", into model_index.json.
    methods = {name: ["save_pretrained", "from_pretrained"] for name in COMPONENTS}
    loading.LOADABLE_CLASSES["dit_hub"] = methods
    loading.ALL_IMPORTABLE_CLASSES.update(methods)


class _OurPipelineError(Exception):
    """Where diffusers has read the index of a pipeline of ours."""


def _open_our_pipelines(pipelines: ModuleType) -> None:
    # diffusers has a DiTPipeline of its own, which its generic loader would take for ours. The stand-in for that loader
    # stops where the index has been read, so that other pipelines load as ever, without a request more.
    generic: Any = pipelines.DiffusionPipeline
    stock = vars(generic)["from_pretrained"].__func__

    @classmethod
    def read_index(cls: type, json_file: Any) -> Any:
        index = generic._dict_from_json_file(json_file)
        if _is_our_pipeline(index):
            raise _OurPipelineError
        return index

    members = {"__module__": generic.__module__, "_dict_from_json_file": read_index}
    reader = type(generic.__name__, (generic,), members)

    @functools.wraps(stock)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        looks = cls is generic and kwargs.get("custom_pipeline") is None
        with contextlib.suppress(_OurPipelineError):
            return stock(reader if looks else cls, pretrained_model_name_or_path, **kwargs)
        ours: Any = importlib.import_module(".pipeline_dit", __package__)
        return ours.DiTPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)

    generic.from_pretrained = classmethod(from_pretrained)


def _is_our_pipeline(index: Any) -> bool:
    """Whether the content of a model_index.json names our pipeline with a component of ours."""
    if not isinstance(index, dict) or index.get("_class_name") != "DiTPipeline":
        return False
    return any(isinstance(entry, list) and entry[:1] == ["dit_hub"] for entry in index.values())


# What imports transformers' auto classes may be the import of diffusers' loaders, on which our model is built.
_AUTO_CLASSES, _LOADERS = "transformers.models.auto.modeling_auto", "diffusers.loaders.peft"


def _register_auto_classes(module: ModuleType) -> None:
    loaders = sys.modules.get(_LOADERS)
    if _AUTO_CLASSES in sys.modules and (loaders is None or hasattr(loaders, "PeftAdapterMixin")):
        importlib.import_module(".modeling_dit", __package__)  # registers itself and its config


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.pipelines.pipeline_loading_utils": _register_components,
    "diffusers.pipelines.pipeline_utils": _open_our_pipelines,
    _AUTO_CLASSES: _register_auto_classes,
    _LOADERS: _register_auto_classes,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs a hook of `_HOOKS` right after its module. wrapt has this too, but importing wrapt takes 60 ms."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _HOOKS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _HOOKS[fullname](module)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Run every hook: now where its module is imported already, else after its import."""
    for name, hook in _HOOKS.items():
        if name in sys.modules:
            hook(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
