"""ONNX Runtime as a runtime of `DiTPipeline`: the denoiser, the whole sampler and the VAE decoder.

Names and folders follow optimum (`ORT…`), whose ONNX part cannot be installed beside transformers 5.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions

from .component import RuntimeComponent, RuntimeDecoder, RuntimeDenoiser, RuntimeSampler, Session

# Providers whose inputs and outputs stay on an NVIDIA GPU.
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_TYPES = {torch.float32: np.float32, torch.int64: np.int64}


class _ORTComponent(RuntimeComponent):
    runtime = "onnxruntime"

    def _open(self, path: Path, options: RuntimeOptions) -> Session:
        onnxruntime = require("onnxruntime", "onnx")
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = 3  # errors; warnings tell of what its own optimiser removes
        if options.num_threads is not None:
            session_options.intra_op_num_threads = options.num_threads
        providers = list(options.providers or ["CPUExecutionProvider"])
        available = onnxruntime.get_available_providers()
        if unknown := [name for name in providers if name not in available]:
            raise ValueError(f"ONNX Runtime has no provider {unknown[0]!r} here; available: {', '.join(available)}.")
        try:
            session = onnxruntime.InferenceSession(path, session_options, providers=providers)
        except Exception as error:  # onnxruntime's errors share no public base class
            raise ValueError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error
        if session.get_providers()[0] != providers[0]:  # it only warns, and takes the next
            raise ValueError(f"ONNX Runtime's {providers[0]} does not start here; are its driver and libraries there?")
        if providers[0] in _ON_CUDA:
            self.device = torch.device("cuda", 0)
        name, kind = session.get_outputs()[0].name, self.device.type

        def run(inputs: dict[str, Tensor]) -> Tensor:
            """Bound to the tensors' own memory, so that nothing passes through the host."""
            binding = session.io_binding()
            for key, value in inputs.items():
                binding.bind_input(key, kind, 0, _TYPES[value.dtype], tuple(value.shape), value.data_ptr())
            binding.bind_output(name, kind)
            if kind == "cuda":
                torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
            session.run_with_iobinding(binding)
            return torch.from_dlpack(binding.get_outputs()[0]._ortvalue)

        return run


class ORTDiTTransformer(_ORTComponent, RuntimeDenoiser):
    """The denoiser on ONNX Runtime; as `DiTTransformer`, a component of a `DiTPipeline`."""


class ORTSampler(_ORTComponent, RuntimeSampler):
    """The whole denoising loop on ONNX Runtime; in place of the denoiser, a component of a `DiTPipeline`."""


class ORTVAEDecoder(_ORTComponent, RuntimeDecoder):
    """The decoder of an `AutoencoderKL` on ONNX Runtime, as the `vae` of a `DiTPipeline`."""
