"""dit-hub: Diffusion Transformers for the Hugging Face ecosystem.

Names are imported when first used, so that `import dit_hub` does not wait for torch. It also makes dit_hub's classes
known to diffusers and transformers, as soon as those are imported: `DiffusionPipeline.from_pretrained` then opens our
pipelines as `DiTPipeline.from_pretrained` does, and `AutoModel.from_pretrained` our models, from the Hub too.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from dit_hub.configuration_dit import DiTConfig
    from dit_hub.ecosystem import cache_preset
    from dit_hub.export import (
        OpenVINODiTTransformer,
        ORTDiTTransformer,
        ORTSampler,
        ORTVAEDecoder,
        TensorRTDiTTransformer,
        TensorRTSampler,
        TensorRTVAEDecoder,
    )
    from dit_hub.modeling_dit import DiTTransformer, DiTTransformerOutput
    from dit_hub.pipeline_dit import DiTPipeline
    from dit_hub.table_scheduler import TableScheduler

__version__ = "0.1.0"

# Public name -> the module it lives in.
_HOMES = {
    "DiTConfig": "configuration_dit",
    "DiTTransformer": "modeling_dit",
    "DiTTransformerOutput": "modeling_dit",
    "DiTPipeline": "pipeline_dit",
    "TableScheduler": "table_scheduler",
    "ORTDiTTransformer": "export",
    "ORTSampler": "export",
    "ORTVAEDecoder": "export",
    "OpenVINODiTTransformer": "export",
    "TensorRTDiTTransformer": "export",
    "TensorRTSampler": "export",
    "TensorRTVAEDecoder": "export",
    "cache_preset": "ecosystem",
}

__all__ = [
    "DiTConfig",
    "DiTPipeline",
    "DiTTransformer",
    "DiTTransformerOutput",
    "ORTDiTTransformer",
    "ORTSampler",
    "ORTVAEDecoder",
    "OpenVINODiTTransformer",
    "TableScheduler",
    "TensorRTDiTTransformer",
    "TensorRTSampler",
    "TensorRTVAEDecoder",
    "__version__",
    "cache_preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dit_hub' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


register()
