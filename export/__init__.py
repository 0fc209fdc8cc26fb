"""Export to other runtimes, and those runtimes as components of a `DiTPipeline`."""

from .onnx_export import export_onnx
from .openvino import OpenVINODiTTransformer
from .ort import ORTDiTTransformer, ORTSampler, ORTVAEDecoder
from .parts import DEFAULT_PARTS
from .tensorrt import TensorRTDiTTransformer, TensorRTSampler, TensorRTVAEDecoder
from .tensorrt_export import export_tensorrt
from .triton import export_triton
from .verify import verify_export
from .web import export_web

__all__ = [
    "DEFAULT_PARTS",
    "ORTDiTTransformer",
    "ORTSampler",
    "ORTVAEDecoder",
    "OpenVINODiTTransformer",
    "TensorRTDiTTransformer",
    "TensorRTSampler",
    "TensorRTVAEDecoder",
    "export_onnx",
    "export_tensorrt",
    "export_triton",
    "export_web",
    "verify_export",
]
