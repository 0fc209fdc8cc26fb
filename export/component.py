"""What the runtimes share: the denoiser, the whole sampler and the VAE decoder as components of a pipeline folder.

A folder is as optimum's: `<component>/model.onnx` beside its config.json.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.runtime import RuntimeOptions, current_options

MODEL_FILE = "model.onnx"
CONDITIONER_FILE = "conditioner.onnx"

# Names of dynamic dimensions besides "batch".
PAIRS_DIMENSION = "pairs"  # of timestep and class
GRID_DIMENSIONS = ("grid_height", "grid_width")  # in patches
STEPS_DIMENSION = "steps"
DRAWS_DIMENSION = "draws"  # of noise: one for each step, or a single one
ROWS_DIMENSION = "rows"  # as many as the batch, or twice that for guidance

# What the runtime must know of the file beyond config.json: "height_width", the only size it takes, or null for every
# one; "hoist", whether a conditioner lies beside it; and for OpenVINO "precision", in which to compute.
SETTINGS_FILE = "runtime.json"

# Most pairs of timestep and class that the conditioner takes at a time; engines are built for as many.
MAX_PAIRS = 1024

# A loaded file: contiguous tensors by input name, on the component's device -> its first output, there too.
Session = Callable[[dict[str, Tensor]], Tensor]


class RuntimeOutput(NamedTuple):
    """A tuple of one tensor, with its name; transformers' output class takes 45 us to make, 3 % of a toy's pass."""

    sample: Tensor


class RuntimeComponent:
    """A file and its config.json, loaded by the runtime that a subclass's `_open` stands for."""

    dtype = torch.float32  # of inputs and outputs, whatever the runtime computes in
    device = torch.device("cpu")
    runtime = ""  # its name in reports
    elsewhere = ""  # how to compute on another device, in words
    model_file = MODEL_FILE
    conditioner_file = CONDITIONER_FILE

    def __init__(self, folder: Path, config: Any, options: RuntimeOptions):
        self.folder, self.config, self.options = folder, config, options
        self.settings = _read_settings(folder / SETTINGS_FILE)
        self._run = self._load(self.model_file, options)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Copy the model files to another folder."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as what it is loaded from: a session is of one process."""
        return type(self), (self.folder.absolute(), self.config, self.options)

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """The component itself, for diffusers' `to`: it stays where it was loaded, in its precision.

        Args:
            device, dtype: as for a module; or the dtype alone. "cpu" is fine wherever it computes, since diffusers asks
                for it after each call of an offloaded pipeline.
            kwargs: ignored.

        Raises:
            ValueError: another device or dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        wanted = self.device if device is None else torch.device(device)
        here = wanted.type == self.device.type and wanted.index in (None, self.device.index)
        if wanted.type != "cpu" and not here:
            raise ValueError(f"{type(self).__name__} cannot move from {self.device} to {wanted}: {self.elsewhere}.")
        if dtype not in (None, self.dtype):
            raise ValueError(f"{type(self).__name__} cannot become {dtype}: its precision is that of its export, which "
                             "`dit-hub export … --precision` chooses.")  # fmt: skip
        return self

    def _load(self, name: str, options: RuntimeOptions) -> Session:
        if not (self.folder / name).is_file():
            raise ValueError(f"{self.folder} has no {name}.")
        return self._open(self.folder / name, options)

    def _open(self, path: Path, options: RuntimeOptions) -> Session:
        raise NotImplementedError

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        """The part's output for a case of its reference."""
        raise NotImplementedError

    def _check_size(self, latents: Tensor) -> None:
        """Raise ValueError for another height and width than the file's, where it has one."""
        size = self.settings.get("height_width")
        if size is not None and list(latents.shape[2:]) != size:
            raise ValueError(
                f"This export takes inputs of {size[0]}x{size[1]}, not {list(latents.shape[2:])}; "
                "a denoiser and a decoder exported with --dynamic-size take others."
            )

    @classmethod
    def load_config(cls, folder: str | os.PathLike) -> Any:
        """What config.json says."""
        return DiTConfig.from_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, options: RuntimeOptions | None = None, **kwargs: Any) -> Any:
        """Load an exported component.

        Args:
            folder: with its file and config.json.
            options: providers, threads, …; None means those given to `DiTPipeline.from_pretrained`, else the defaults.
            kwargs: ignored; diffusers passes its loading options to every component.

        Raises:
            ValueError: a missing or damaged file, or one that does not run here.
            ImportError: the runtime is not installed.
        """
        return cls(Path(folder), cls.load_config(folder), options or current_options())

    def _floats(self, values: Tensor | float) -> Tensor:
        return to_device(values, torch.float32, self.device)

    def _integers(self, values: Tensor) -> Tensor:
        return to_device(values, torch.int64, self.device)


class RuntimeDenoiser(RuntimeComponent):
    """The denoiser; as `DiTTransformer`, a component of a `DiTPipeline`."""

    config: DiTConfig

    def __init__(self, folder: Path, config: DiTConfig, options: RuntimeOptions):
        super().__init__(folder, config, options)
        if self.settings.get("hoist") or (folder / self.conditioner_file).is_file():  # the pipeline computes them ahead
            self._conditioner = self._load(self.conditioner_file, options)
            self.precompute = self._precompute

    def _precompute(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As `DiTTransformer.precompute`: (N,) timesteps and labels -> (N, K, D)."""
        inputs = {"timestep": self._floats(timestep)}
        if class_labels is not None:
            inputs["class_labels"] = self._integers(class_labels)
        chunks = [{name: value[i : i + MAX_PAIRS] for name, value in inputs.items()}
                  for i in range(0, len(inputs["timestep"]), MAX_PAIRS)]  # fmt: skip
        return torch.cat([self._conditioner(chunk) for chunk in chunks])

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        return self(inputs["hidden_states"], inputs["timestep"], inputs.get("class_labels")).sample

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        precomputed: Tensor | None = None,
        return_dict: bool = True,
    ) -> RuntimeOutput:
        """As `DiTTransformer.forward`: (N, C, H, W) latents -> `sample` (N, C or 2C, H, W).

        `precomputed` is for exports with hoist. `return_dict` changes nothing: the output is a tuple whose only entry
        has a name.
        """
        self._check_size(hidden_states)
        inputs = {"hidden_states": self._floats(hidden_states)}
        if precomputed is None:
            if timestep is None:
                raise ValueError("Give a timestep, or what `precompute` returned for one.")
            timesteps = self._floats(timestep)
            if timesteps.numel() == 1:
                timesteps = timesteps.expand(len(hidden_states)).contiguous()
            if hasattr(self, "precompute"):
                precomputed = self._precompute(timesteps, class_labels)
            else:
                inputs["timestep"] = timesteps
                if class_labels is not None:
                    inputs["class_labels"] = self._integers(class_labels)
        if precomputed is not None:
            inputs["condition"] = self._floats(precomputed)
        return RuntimeOutput(self._run(inputs).to(hidden_states))


class RuntimeSampler(RuntimeComponent):
    """The whole denoising loop; in place of the denoiser, a component of a `DiTPipeline`."""

    config: DiTConfig

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
        self._check_size(latents)
        inputs = {
            "latents": self._floats(latents),
            "table": self._floats(torch.from_numpy(table)),
            "noise": self._floats(noise),
        }
        if class_labels is not None:
            inputs["class_labels"] = self._integers(class_labels)
        if (null := self.config.null_class) is not None:
            inputs["guidance_scale"] = self._floats(guidance_scale)
            if guidance_scale != 1:
                labels = inputs["class_labels"]
                inputs["class_labels"] = torch.cat([labels, torch.full_like(labels, null)])
        return self._run(inputs)

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        scale = float(inputs.get("guidance_scale", 1.0))
        return self.sample(
            inputs["latents"], inputs.get("class_labels"), scale, inputs["table"].numpy(), inputs["noise"]
        )


class RuntimeDecoder(RuntimeComponent):
    """The decoder of an `AutoencoderKL`, as the `vae` of a `DiTPipeline`."""

    @classmethod
    def load_config(cls, folder: str | os.PathLike) -> Any:
        return FrozenDict(AutoencoderKL.load_config(folder))

    def decode(self, latents: Tensor, return_dict: bool = True) -> RuntimeOutput:
        """(N, C, H, W) latents, already divided by the scaling factor -> `sample` (N, 3, 8H, 8W) in -1..1."""
        self._check_size(latents)
        return RuntimeOutput(self._run({"latents": self._floats(latents)}).to(latents))

    def evaluate(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.decode(inputs["latents"]).sample


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged.")
    return settings


def to_device(values: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor or number as a contiguous tensor there."""
    return torch.as_tensor(values, dtype=dtype, device=device).contiguous()
