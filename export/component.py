"""What the runtimes of ONNX files share: a component of a pipeline folder, and the denoiser.

A folder is as optimum's: `<component>/model.onnx` beside its config.json.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.runtime import RuntimeOptions, current_options

MODEL_FILE = "model.onnx"
CONDITIONER_FILE = "conditioner.onnx"

# A loaded file: arrays by input name -> its first output.
Session = Callable[[dict[str, np.ndarray]], np.ndarray]


class RuntimeOutput(NamedTuple):
    """A tuple of one tensor, with its name; transformers' output class takes 45 us to make, 3 % of a toy's pass."""

    sample: Tensor


class OnnxComponent:
    """A file and its config.json, loaded by the runtime that a subclass's `_open` stands for."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, folder: Path, config: Any, options: RuntimeOptions):
        self.folder, self.config = folder, config
        self._call = self._load(MODEL_FILE, options)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Copy the model files to another folder."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for path in (*self.folder.glob("*.onnx*"), *self.folder.glob("*.json")):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)

    def _load(self, name: str, options: RuntimeOptions) -> Session:
        if not (self.folder / name).is_file():
            raise ValueError(f"{self.folder} has no {name}.")
        return self._open(self.folder / name, options)

    def _open(self, path: Path, options: RuntimeOptions) -> Session:
        raise NotImplementedError

    def _run(self, **inputs: np.ndarray) -> Tensor:
        return torch.from_numpy(self._call(inputs))


class OnnxDenoiser(OnnxComponent):
    """The denoiser; as `DiTTransformer`, a component of a `DiTPipeline`."""

    config: DiTConfig

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, options: RuntimeOptions | None = None, **kwargs: Any) -> Any:
        """Load an exported denoiser.

        Args:
            folder: the component's folder, with model.onnx and config.json.
            options: providers and threads; None means those given to `DiTPipeline.from_pretrained`, else the defaults.
            kwargs: ignored; diffusers passes its loading options to every component.

        Raises:
            ValueError: a missing or damaged file, or a provider that is not available.
            ImportError: the runtime is not installed.
        """
        return cls(Path(folder), DiTConfig.from_pretrained(folder), options or current_options())

    def __init__(self, folder: Path, config: DiTConfig, options: RuntimeOptions):
        super().__init__(folder, config, options)
        if (folder / CONDITIONER_FILE).is_file():  # exported with hoist: the pipeline then computes conditions ahead
            self._conditioner = self._load(CONDITIONER_FILE, options)
            self.condition = self._condition

    def _condition(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As `DiTTransformer.condition`: (N,) timesteps and labels -> (N, K, D)."""
        inputs = {"timestep": to_array(timestep, np.float32)}
        if class_labels is not None:
            inputs["class_labels"] = to_array(class_labels, np.int64)
        return torch.from_numpy(self._conditioner(inputs))

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> RuntimeOutput:
        """As `DiTTransformer.forward`: (N, C, H, W) latents -> `sample` (N, C or 2C, H, W).

        `condition` is for exports with hoist. `return_dict` changes nothing: the output is a tuple whose only entry has
        a name.
        """
        if tuple(hidden_states.shape[2:]) != self.config.sample_height_width:
            height, width = self.config.sample_height_width
            raise ValueError(f"This export takes inputs of {height}x{width}, not {list(hidden_states.shape[2:])}.")
        inputs = {"hidden_states": to_array(hidden_states, np.float32)}
        if condition is None:
            if timestep is None:
                raise ValueError("Give a timestep, or the condition that was computed from one.")
            timesteps = to_array(timestep, np.float32)
            if timesteps.size == 1:
                timesteps = np.full(len(hidden_states), timesteps, np.float32)
            if hasattr(self, "condition"):
                condition = self._condition(torch.from_numpy(timesteps), class_labels)
            else:
                inputs["timestep"] = timesteps
                if class_labels is not None:
                    inputs["class_labels"] = to_array(class_labels, np.int64)
        if condition is not None:
            inputs["condition"] = to_array(condition, np.float32)
        return RuntimeOutput(self._run(**inputs).to(hidden_states))


def to_array(tensor: Tensor | float, dtype: type) -> np.ndarray:
    """A tensor or number as a contiguous array."""
    # One call each into torch and numpy: between the runs of a small model every further one is felt.
    values = tensor.numpy(force=True) if isinstance(tensor, Tensor) else tensor
    return np.ascontiguousarray(values, dtype)
