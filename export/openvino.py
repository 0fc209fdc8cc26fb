"""OpenVINO as a runtime of `DiTPipeline`, for processors."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions

from .component import MODEL_FILE, Denoiser, Session

# Shapes of inputs for each of which a denoiser is compiled: guided and unguided steps, of a batch and of the last,
# smaller one. Further ones share a compilation for all shapes, 8 % slower.
_MOST_SHAPES = 4

# Bytes of the largest file that is compiled by shape, B/2 in float32: each compilation packs the weights for itself;
# five of XL/2 would take 13 GB. Larger files have the compilation for all shapes alone.
_LARGEST = 512 * 2**20


class OpenVINOSession(Session):
    """A file that OpenVINO has read, compiled for the processor when it first runs.

    Args:
        model: openvino's own.
        hints: for its compilation.
        by_shape: whether to compile for the shapes of the inputs, which takes about a second each.
    """

    name = "openvino"
    elsewhere = "OpenVINO computes on the processor here"

    def __init__(self, model: Any, hints: dict[str, str], by_shape: bool):
        self._model, self._hints, self._by_shape = model, hints, by_shape
        self._requests: dict[Any, Any] = {}

    @classmethod
    def open(cls, path: Path, options: RuntimeOptions, settings: dict[str, Any], is_loop: bool) -> "OpenVINOSession":
        float_type = _float_type(path, settings)
        hints = {"INFERENCE_PRECISION_HINT": float_type, "PERFORMANCE_HINT": "LATENCY"}
        if options.num_threads is not None:
            hints["INFERENCE_NUM_THREADS"] = str(options.num_threads)
        try:
            model = _core().read_model(str(path))
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot load {path}: {str(error).splitlines()[0]}") from error
        if float_type == "bf16":
            _use_exact_gelu(model)
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))  # with weights in `.data`
        return cls(model, hints, by_shape=path.name == MODEL_FILE and size <= _LARGEST)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        try:
            return torch.from_numpy(self._request(arrays).infer(arrays, share_inputs=True)[0])
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot run this: {str(error).splitlines()[0]}") from error

    def _request(self, arrays: dict[str, Any]) -> Any:
        shapes = tuple((name, array.shape) for name, array in arrays.items()) if self._by_shape else None
        if shapes not in self._requests and len(self._requests) >= _MOST_SHAPES:
            shapes = None  # of all others
        if shapes not in self._requests:
            model = self._model.clone()
            if shapes is not None:
                model.reshape({name: list(shape) for name, shape in shapes})
            self._requests[shapes] = _core().compile_model(model, "CPU", self._hints).create_infer_request()
        return self._requests[shapes]


class OpenVINODiTTransformer(Denoiser):
    """The denoiser on OpenVINO; as `DiTTransformer`, a component of a `DiTPipeline`."""

    session_type = OpenVINOSession


def _float_type(path: Path, settings: dict[str, Any]) -> str:
    """What a file computes in where it is not in 8 bits; OpenVINO would choose by the processor otherwise.

    What makes the modulation stays in float32, so that a denoiser in int8 computes the rest in bf16 only where the
    modulation is made by a file of its own.
    """
    precision = settings.get("precision", "fp32") if path.name == MODEL_FILE else "fp32"
    half = precision == "bf16" or (precision == "int8" and settings.get("precompute"))
    return "bf16" if half else "f32"


def _use_exact_gelu(model: Any) -> None:
    """Take GELU itself in place of its approximation by tanh, in place.

    OpenVINO computes it faster: a pass of S/2 in int8 takes a tenth less. The two differ by 5e-4 at most, less than
    bf16 rounds, and the error of an export is measured with it.
    """
    gelu = require("openvino.opset15", "openvino").gelu
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Gelu":
            node.output(0).replace(gelu(node.input_value(0), "ERF").output(0))


@functools.cache
def _core() -> Any:
    """OpenVINO, loaded once and for good.

    On processors with AMX each `Core` takes the thread's stack for signals, and gives back the one before it when it is
    dropped: after two that went in the order in which they came, the next signal ends the process (2026.4).
    """
    return require("openvino", "openvino").Core()
