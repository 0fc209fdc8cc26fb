"""ONNX Runtime as a runtime of `DiTPipeline`: the denoiser and the VAE decoder, each one session.

Names and folders follow optimum (`ORT…`, `<component>/model.onnx` beside its config.json), whose ONNX part cannot be
installed beside transformers 5.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions, current_options

MODEL_FILE = "model.onnx"
CONDITIONER_FILE = "conditioner.onnx"


class ORTOutput(NamedTuple):
    """A tuple of one tensor, with its name; transformers' output class takes 45 us to make, 3 % of a toy's pass."""

    sample: Tensor


class _ORTComponent:
    """An ONNX Runtime session over `model.onnx` in a component folder, with the config.json beside it."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, folder: Path, config: Any, options: RuntimeOptions):
        self.session = _session(folder / MODEL_FILE, options)
        self.folder = folder
        self.config = config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Copy the model files to another folder."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for path in (*self.folder.glob("*.onnx*"), self.folder / "config.json"):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)

    def _run(self, **inputs: np.ndarray) -> Tensor:
        return torch.from_numpy(self.session.run(None, inputs)[0])


def _session(path: Path, options: RuntimeOptions) -> Any:
    onnxruntime = require("onnxruntime", "onnx")
    session_options = onnxruntime.SessionOptions()
    if options.num_threads is not None:
        session_options.intra_op_num_threads = options.num_threads
    providers = list(options.providers or ["CPUExecutionProvider"])
    available = onnxruntime.get_available_providers()
    if unknown := [name for name in providers if name not in available]:
        raise ValueError(f"ONNX Runtime has no provider {unknown[0]!r} here; available: {', '.join(available)}.")
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}.")
    try:
        return onnxruntime.InferenceSession(path, session_options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no public base class
        raise ValueError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error


def _array(tensor: Tensor | float, dtype: type) -> np.ndarray:
    # One call each into torch and numpy: between the runs of a small model every further one is felt.
    values = tensor.numpy(force=True) if isinstance(tensor, Tensor) else tensor
    return np.ascontiguousarray(values, dtype)


class ORTDiTTransformer(_ORTComponent):
    """The denoiser on ONNX Runtime; as `DiTTransformer`, a component of a `DiTPipeline`."""

    config: DiTConfig

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        options: RuntimeOptions | None = None,
        **kwargs: Any,
    ) -> "ORTDiTTransformer":
        """Load an exported denoiser.

        Args:
            folder: the component's folder, with model.onnx and config.json.
            options: providers and threads; None means those given to `DiTPipeline.from_pretrained`, else the defaults.
            kwargs: ignored; diffusers passes its loading options to every component.

        Raises:
            ValueError: a missing or damaged file, or a provider that is not available.
            ImportError: onnxruntime is not installed.
        """
        return cls(Path(folder), DiTConfig.from_pretrained(folder), options or current_options())

    def __init__(self, folder: Path, config: DiTConfig, options: RuntimeOptions):
        super().__init__(folder, config, options)
        if (folder / CONDITIONER_FILE).is_file():  # exported with hoist: the pipeline then computes conditions ahead
            self.conditioner = _session(folder / CONDITIONER_FILE, options)
            self.condition = self._condition

    def _condition(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As `DiTTransformer.condition`: (N,) timesteps and labels -> (N, K, D)."""
        inputs = {"timestep": _array(timestep, np.float32)}
        if class_labels is not None:
            inputs["class_labels"] = _array(class_labels, np.int64)
        return torch.from_numpy(self.conditioner.run(None, inputs)[0])

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> ORTOutput:
        """As `DiTTransformer.forward`: (N, C, H, W) latents -> `sample` (N, C or 2C, H, W).

        `condition` is for exports with hoist. `return_dict` changes nothing: the output is a tuple whose only entry has
        a name.
        """
        if tuple(hidden_states.shape[2:]) != self.config.sample_height_width:
            height, width = self.config.sample_height_width
            raise ValueError(f"This export takes inputs of {height}x{width}, not {list(hidden_states.shape[2:])}.")
        inputs = {"hidden_states": _array(hidden_states, np.float32)}
        if condition is None:
            if timestep is None:
                raise ValueError("Give a timestep, or the condition that was computed from one.")
            timesteps = _array(timestep, np.float32)
            if timesteps.size == 1:
                timesteps = np.full(len(hidden_states), timesteps, np.float32)
            if hasattr(self, "condition"):
                condition = self._condition(torch.from_numpy(timesteps), class_labels)
            else:
                inputs["timestep"] = timesteps
                if class_labels is not None:
                    inputs["class_labels"] = _array(class_labels, np.int64)
        if condition is not None:
            inputs["condition"] = _array(condition, np.float32)
        return ORTOutput(self._run(**inputs).to(hidden_states))


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
            guidance_scale: for models with a null class.
            table: (S, 9) of `dit_hub.solvers.solver_table`.
            noise: (M, N, C, H, W), of each step of a stochastic solver; the last one stands for all further steps.

        Returns:
            (N, C, H, W) latents.
        """
        inputs = {"latents": _array(latents, np.float32), "table": table, "noise": _array(noise, np.float32)}
        if class_labels is not None:
            inputs["class_labels"] = _array(class_labels, np.int64)
        if self.config.null_class is not None:
            inputs["guidance_scale"] = _array(guidance_scale, np.float32)
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

    def decode(self, latents: Tensor, return_dict: bool = True) -> ORTOutput:
        """(N, C, H, W) latents, already divided by the scaling factor -> `sample` (N, 3, 8H, 8W) in -1..1."""
        return ORTOutput(self._run(latents=_array(latents, np.float32)).to(latents))
