"""Makes dit_hub's classes known to the loaders of diffusers and transformers, without importing those libraries.

`import dit_hub` takes 0.03 s, and importing them 5 s. So their modules are changed right after they are imported, by
whomever, be it before or after `import dit_hub`.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Classes that model_index.json may name as components of a pipeline folder, all living in `dit_hub`.
COMPONENTS = (
    "DiTTransformer",
    "ORTDiTTransformer",
    "ORTSampler",
    "ORTVAEDecoder",
    "OpenVINODiTTransformer",
    "TableScheduler",
    "TensorRTDiTTransformer",
    "TensorRTSampler",
    "TensorRTVAEDecoder",
)


def _register_components(loading: ModuleType) -> None:
    """Let diffusers load our components, from the Hub too, and name them in model_index.json as of "dit_hub"."""
    methods = {name: ["save_pretrained", "from_pretrained"] for name in COMPONENTS}
    loading.LOADABLE_CLASSES["dit_hub"] = methods
    loading.ALL_IMPORTABLE_CLASSES.update(methods)


class _OurPipelineError(Exception):
    """Raised where diffusers has read the index of a pipeline of ours."""


def _redirect_our_pipelines(pipelines: ModuleType) -> None:
    """Let `DiffusionPipeline.from_pretrained` open our pipelines with our class, not with diffusers' `DiTPipeline`.

    It loads with a subclass of the same name, which stops it as soon as it has read the index of a pipeline of ours. So
    other pipelines load as ever, without a further request to the Hub.
    """
    generic: Any = pipelines.DiffusionPipeline
    stock = generic.from_pretrained.__func__

    class DiffusionPipeline(generic):
        __module__ = generic.__module__

        @classmethod
        def _dict_from_json_file(cls, json_file: Any) -> Any:
            index = super()._dict_from_json_file(json_file)
            if _is_our_pipeline(index):
                raise _OurPipelineError
            return index

    @functools.wraps(stock)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        if cls is not generic or kwargs.get("custom_pipeline") is not None:
            return stock(cls, pretrained_model_name_or_path, **kwargs)
        with contextlib.suppress(_OurPipelineError):
            return stock(DiffusionPipeline, pretrained_model_name_or_path, **kwargs)
        ours = importlib.import_module("dit_hub.pipeline_dit").DiTPipeline
        return ours.from_pretrained(pretrained_model_name_or_path, **kwargs)

    generic.from_pretrained = classmethod(from_pretrained)


def _is_our_pipeline(index: Any) -> bool:
    """Whether the content of a model_index.json names our pipeline with a component of ours."""
    if not isinstance(index, dict) or index.get("_class_name") != "DiTPipeline":
        return False
    return any(isinstance(entry, list) and entry[:1] == ["dit_hub"] for entry in index.values())


_AUTO_CLASSES, _ADAPTERS = "transformers.models.auto.modeling_auto", "diffusers.loaders.peft"
_ECOSYSTEM = "dit_hub.ecosystem"


def _register_model(_: ModuleType) -> None:
    """Import our model, which registers itself with transformers' auto classes.

    It is built on diffusers' adapters and on our `ecosystem`, whose own imports may be what imports the auto classes;
    then it comes after all of them.
    """
    adapters, ecosystem = sys.modules.get(_ADAPTERS), sys.modules.get(_ECOSYSTEM)
    are_whole = (adapters is None or hasattr(adapters, "PeftAdapterMixin")) and (
        ecosystem is None or hasattr(ecosystem, "takes_precomputed")
    )
    if _AUTO_CLASSES in sys.modules and are_whole:
        importlib.import_module("dit_hub.modeling_dit")


# What to do with a module once it is imported.
_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.pipelines.pipeline_loading_utils": _register_components,
    "diffusers.pipelines.pipeline_utils": _redirect_our_pipelines,
    _AUTO_CLASSES: _register_model,
    _ADAPTERS: _register_model,
    _ECOSYSTEM: _register_model,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_AFTER_IMPORT` as Python does, and has their loaders call the function after them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            _AFTER_IMPORT[fullname](module)

        spec.loader.exec_module = execute_and_call
        return spec


def register() -> None:
    """Change what is imported already, and the rest after its import."""
    for name, function in _AFTER_IMPORT.items():
        if name in sys.modules:
            function(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
