"""OpenVINO as a runtime of `DiTPipeline`, for processors."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions

from .component import MODEL_FILE, Denoiser, Session

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVINOSession(Session):
    """A file that OpenVINO has compiled for the processor."""

    name = "openvino"
    elsewhere = "OpenVINO computes on the processor here"

    def __init__(self, request: Any):
        self._request = request

    @classmethod
    def open(cls, path: Path, options: RuntimeOptions, settings: dict[str, Any], is_loop: bool) -> "OpenVINOSession":
        # It would choose by the processor otherwise. The conditioner stays in float32.
        precision = settings.get("precision", "fp32") if path.name == MODEL_FILE else "fp32"
        hints = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if options.num_threads is not None:
            hints["INFERENCE_NUM_THREADS"] = str(options.num_threads)
        try:
            return cls(_core().compile_model(str(path), "CPU", hints).create_infer_request())
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot load {path}: {str(error).splitlines()[0]}") from error

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self._request.infer(arrays, share_inputs=True)[0])


class OpenVINODiTTransformer(Denoiser):
    """The denoiser on OpenVINO; as `DiTTransformer`, a component of a `DiTPipeline`."""

    session_type = OpenVINOSession


@functools.cache
def _core() -> Any:
    """OpenVINO, loaded once and for good.

    On processors with AMX each `Core` takes the thread's stack for signals, and gives back the one before it when it is
    dropped: after two that went in the order in which they came, the next signal ends the process (2026.4).
    """
    return require("openvino", "openvino").Core()
