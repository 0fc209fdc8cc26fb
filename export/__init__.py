"""Export to other runtimes, and those runtimes as components of a `DiTPipeline`."""

from .onnx_export import export_onnx
from .ort import ORTDiTTransformer, ORTVAEDecoder

__all__ = ["ORTDiTTransformer", "ORTVAEDecoder", "export_onnx"]
