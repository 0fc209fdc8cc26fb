"""OpenVINO as a runtime of `DiTPipeline`, for processors."""

import json
from pathlib import Path

from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions

from .component import OnnxDenoiser, Session

# Beside the model: what OpenVINO is to compute in, {"precision": "bf16"}. It would choose by the processor otherwise.
RUNTIME_FILE = "runtime.json"
_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVINODiTTransformer(OnnxDenoiser):
    """The denoiser on OpenVINO; as `DiTTransformer`, a component of a `DiTPipeline`."""

    def _open(self, path: Path, options: RuntimeOptions) -> Session:
        openvino = require("openvino", "openvino")
        precision = "fp32"
        if path.stem == "model" and (self.folder / RUNTIME_FILE).is_file():  # the conditioner stays in float32
            precision = json.loads((self.folder / RUNTIME_FILE).read_text())["precision"]
        settings = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if options.num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(options.num_threads)
        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot load {path}: {str(error).splitlines()[0]}") from error
        request = compiled.create_infer_request()

        def run(inputs: dict) -> object:
            return request.infer(inputs, share_inputs=True)[0]

        return run  # pyright: ignore[reportReturnType]
