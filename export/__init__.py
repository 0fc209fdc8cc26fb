"""Export to other runtimes, and those runtimes as components of a `DiTPipeline`."""

from .onnx_export import DEFAULT_PARTS, export_onnx
from .openvino import OpenVINODiTTransformer
from .ort import ORTDiTTransformer, ORTSampler, ORTVAEDecoder

__all__ = ["DEFAULT_PARTS", "ORTDiTTransformer", "ORTSampler", "ORTVAEDecoder", "OpenVINODiTTransformer", "export_onnx"]
