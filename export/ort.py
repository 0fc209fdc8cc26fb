"""ONNX Runtime as a runtime of `DiTPipeline`: the denoiser, the whole sampler and the VAE decoder.

Names and folders follow optimum (`ORT…`), whose ONNX part cannot be installed beside transformers 5.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions, current_options

from .component import OnnxComponent, OnnxDenoiser, RuntimeOutput, Session, to_array


class _ORTComponent(OnnxComponent):
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
        return lambda inputs: session.run(None, inputs)[0]


class ORTDiTTransformer(_ORTComponent, OnnxDenoiser):
    """The denoiser on ONNX Runtime; as `DiTTransformer`, a component of a `DiTPipeline`."""


class ORTSampler(_ORTComponent):
    """The whole denoising loop on ONNX Runtime; in place of the denoiser, a component of a `DiTPipeline`."""

    config: DiTConfig

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        options: RuntimeOptions | None = None,
        **kwargs: Any,
    ) -> "ORTSampler":
        """Load an exported sampler; arguments and errors as for `ORTDiTTransformer.from_pretrained`."""
        return cls(Path(folder), DiTConfig.from_pretrained(folder), options or current_options())

    def sample(
        self, latents: Tensor, class_labels: Tensor | None, guidance_scale: float, table: np.ndarray, noise: Tensor
    ) -> Tensor:
        """Denoise from the first row of the table to the last.

        Args:
            latents: (N, C, H, W) noise.
            class_labels: (N,) integers, or None for unconditional models.
            guidance_scale: for models with a null class; 1 means no guidance and takes half the time.
            table: (S, 9) of `dit_hub.solvers.solver_table`.
            noise: (M, N, C, H, W), of each step of a stochastic solver; the last one stands for all further steps.

        Returns:
            (N, C, H, W) latents.
        """
        inputs = {"latents": to_array(latents, np.float32), "table": table, "noise": to_array(noise, np.float32)}
        if class_labels is not None:
            inputs["class_labels"] = to_array(class_labels, np.int64)
        if (null := self.config.null_class) is not None:
            inputs["guidance_scale"] = to_array(guidance_scale, np.float32)
            if guidance_scale != 1:
                labels = inputs["class_labels"]
                inputs["class_labels"] = np.concatenate([labels, np.full_like(labels, null)])
        return self._run(**inputs)


class ORTVAEDecoder(_ORTComponent):
    """The decoder of an `AutoencoderKL` on ONNX Runtime, as the `vae` of a `DiTPipeline`."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        options: RuntimeOptions | None = None,
        **kwargs: Any,
    ) -> "ORTVAEDecoder":
        """Load an exported decoder; arguments and errors as for `ORTDiTTransformer.from_pretrained`."""
        config = FrozenDict(AutoencoderKL.load_config(folder))
        return cls(Path(folder), config, options or current_options())

    def decode(self, latents: Tensor, return_dict: bool = True) -> RuntimeOutput:
        """(N, C, H, W) latents, already divided by the scaling factor -> `sample` (N, 3, 8H, 8W) in -1..1."""
        return RuntimeOutput(self._run(latents=to_array(latents, np.float32)).to(latents))
