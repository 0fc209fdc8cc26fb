"""Makes dit_hub's classes known to diffusers and transformers when those are imported, if ever."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

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


def _register_auto_classes(auto: ModuleType) -> None:
    importlib.import_module(".modeling_dit", __package__)  # registers itself and its config


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.pipelines.pipeline_loading_utils": _register_components,
    "transformers.models.auto.modeling_auto": _register_auto_classes,
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
