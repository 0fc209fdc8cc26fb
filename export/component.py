"""The exported parts of a pipeline as its components: the denoiser, the whole sampler and the VAE decoder.

A component is a role on a runtime: `ORTDiTTransformer` is a `Denoiser` with `ORTSession`s. Its folder is as optimum's:
`<component>/model.onnx` beside config.json.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from dit_hub.configuration_dit import DiTConfig
from dit_hub.runtime import Provider, RuntimeOptions
from dit_hub.tables import COLUMNS

MODEL_FILE, CONDITIONER_FILE = "model.onnx", "conditioner.onnx"

# Names of dynamic dimensions besides "batch": pairs of timestep and class; height and width in patches; steps; numbers
# of a step; draws of noise, one for each step or a single one; rows, as many as the batch, or twice that for guidance.
PAIRS, GRID, STEPS, NUMBERS = "pairs", ("grid_height", "grid_width"), "steps", "numbers"
DRAWS, ROWS = "draws", "rows"

# What the runtime must know of the file beyond config.json: "height_width", the only size it takes, or null for every
# one; "precompute" ("hoist" in older exports), whether a conditioner lies beside it; and for OpenVINO "precision".
SETTINGS_FILE = "runtime.json"

# The largest number of pairs of timestep and class that the conditioner takes at a time; engines are built for as many.
MAX_PAIRS = 1024


class Session:
    """A file that a runtime has opened: contiguous tensors by input name -> its first output, all on `device`.

    `open` takes a file in its component's folder, the content of `SETTINGS_FILE`, and whether the file holds the whole
    denoising loop. It raises ValueError for a file that is damaged or does not run here.
    """

    name: str  # of the runtime, in reports
    suffix = ".onnx"
    elsewhere: str  # how to compute on another device, in words
    device = torch.device("cpu")

    @classmethod
    def open(cls, path: Path, options: RuntimeOptions, settings: dict[str, Any], is_loop: bool) -> "Session":
        raise NotImplementedError

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def batch_sizes(self, most: int) -> list[int]:
        """The numbers of rows that it should see, up to about `most`; none where it takes any as well."""
        return []


class RuntimeOutput(NamedTuple):
    """A tuple of one tensor, with its name; transformers' output class takes 45 us to make, 3 % of a toy's pass."""

    sample: Tensor


class Component:
    """A folder with a file and its config.json, in a role that a subclass plays, run by a `session_type`."""

    session_type: ClassVar[type[Session]]
    is_loop: ClassVar[bool] = False
    dtype = torch.float32  # of inputs and outputs, whatever the runtime computes in
    device = torch.device("cpu")

    def __init__(self, folder: Path, config: Any, options: RuntimeOptions):
        self.folder, self.config, self.options = folder, config, options
        self.settings = _read_settings(folder / SETTINGS_FILE)
        self._run = self._open(MODEL_FILE)
        self.device, self.runtime = self._run.device, self._run.name

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        providers: Sequence[Provider] | None = None,
        num_threads: int | None = None,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an exported component.

        Args:
            folder: with its file and config.json.
            providers, num_threads, cuda_graphs: see `dit_hub.runtime.RuntimeOptions`.
            kwargs: ignored; diffusers passes its loading options to every component.

        Raises:
            ValueError: a missing or damaged file, or one that does not run here.
            ImportError: the runtime is not installed.
        """
        return cls(Path(folder), cls.load_config(folder), RuntimeOptions(providers, num_threads, cuda_graphs))

    @classmethod
    def unopened(cls, folder: Path) -> Any:
        """The component without its file, for a pipeline to be saved on a machine that need not run it."""
        component = cls.__new__(cls)
        component.folder, component.config = folder, cls.load_config(folder)
        return component

    @classmethod
    def load_config(cls, folder: str | os.PathLike) -> Any:
        """The configuration in config.json."""
        return DiTConfig.from_pretrained(folder)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Copy the model files to another folder."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its folder: a session belongs to one process."""
        return type(self), (self.folder.absolute(), self.config, self.options)

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """The component itself, for diffusers' `to`: it stays where it was loaded, in its precision.

        Args:
            device, dtype: as for a module; or the dtype alone. "cpu" is always accepted, since diffusers asks for it
                after each call of an offloaded pipeline.
            kwargs: ignored.

        Raises:
            ValueError: another device or dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        wanted = self.device if device is None else torch.device(device)
        here = wanted.type == self.device.type and wanted.index in (None, self.device.index)
        name = type(self).__name__
        if wanted.type != "cpu" and not here:
            raise ValueError(f"{name} cannot move from {self.device} to {wanted}: {self.session_type.elsewhere}.")
        if dtype not in (None, self.dtype):
            raise ValueError(f"{name} cannot become {dtype}: its precision is that of its export, which "
                             "`dit-hub export … --precision` chooses.")  # fmt: skip
        return self

    def evaluate(self, inputs: dict[str, Any]) -> Tensor:
        """The component's output for a case of its reference."""
        raise NotImplementedError

    def _open(self, name: str) -> Session:
        path = (self.folder / name).with_suffix(self.session_type.suffix)
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {path.name}.")
        return self.session_type.open(path, self.options, self.settings, self.is_loop)

    def _place(self, **inputs: Any) -> dict[str, Tensor]:
        """The inputs that are not None, as a session takes them."""
        types = {"class_labels": torch.int64}
        return {
            name: torch.as_tensor(value, dtype=types.get(name, torch.float32), device=self.device).contiguous()
            for name, value in inputs.items()
            if value is not None
        }

    def _check_size(self, latents: Tensor) -> None:
        """Raise ValueError for another height and width than the file's, where it has one."""
        size = self.settings.get("height_width")
        if size is not None and list(latents.shape[2:]) != size:
            raise ValueError(f"This export takes inputs of {size[0]}x{size[1]}, not {list(latents.shape[2:])}; "
                             "a denoiser and a decoder exported with --dynamic-size take others.")  # fmt: skip


class Denoiser(Component):
    """The denoiser: one pass."""

    config: DiTConfig

    def __init__(self, folder: Path, config: DiTConfig, options: RuntimeOptions):
        super().__init__(folder, config, options)
        expected = self.settings.get("precompute") or self.settings.get("hoist")
        if expected or any(folder.glob("conditioner.*")):
            self._conditioner = self._open(CONDITIONER_FILE)
            self.precompute = self._precompute  # by which the pipeline knows

    def _precompute(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The same as `DiTTransformer.precompute`: (N,) timesteps and labels -> (N, K, D)."""
        inputs = self._place(timestep=timestep, class_labels=class_labels)
        chunks = [{name: value[i : i + MAX_PAIRS] for name, value in inputs.items()}
                  for i in range(0, len(inputs["timestep"]), MAX_PAIRS)]  # fmt: skip
        return torch.cat([self._conditioner(chunk) for chunk in chunks])

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        precomputed: Tensor | None = None,
        return_dict: bool = True,
    ) -> RuntimeOutput:
        """The same as `DiTTransformer.forward`: (N, C, H, W) latents -> `sample` (N, C or 2C, H, W).

        `precomputed` is for exports with `precompute`. `return_dict` changes nothing: the output is a tuple whose only
        entry has a name.
        """
        self._check_size(hidden_states)
        if precomputed is None:
            if timestep is None:
                raise ValueError("Give a timestep, or what `precompute` returned for one.")
            timestep = torch.as_tensor(timestep).expand(len(hidden_states))
            if hasattr(self, "precompute"):
                precomputed = self.precompute(timestep, class_labels)
        if precomputed is not None:
            timestep = class_labels = None
        condition = {"timestep": timestep, "class_labels": class_labels, "condition": precomputed}
        return RuntimeOutput(self._run(self._place(hidden_states=hidden_states, **condition)).to(hidden_states))

    def batch_sizes(self, most: int) -> list[int]:
        """As `Session.batch_sizes`."""
        return self._run.batch_sizes(most)

    def evaluate(self, inputs: dict[str, Any]) -> Tensor:
        return self(**inputs).sample


class Sampler(Component):
    """The whole denoising loop, in place of the denoiser."""

    config: DiTConfig
    is_loop = True

    def sample(
        self, latents: Tensor, class_labels: Tensor | None, guidance_scale: float, table: Any, noise: Tensor
    ) -> Tensor:
        """Denoise from the first row of the table to the last.

        Args:
            latents: (N, C, H, W) noise.
            class_labels: (N,) integers, or None for unconditional models.
            guidance_scale: for models with a null class; 1 means no guidance and takes half the time.
            table: (S, 9 or more) of `dit_hub.solvers.solver_table`, an array or a tensor.
            noise: (M, N, C, H, W), of each step of a stochastic solver; the last one stands for all further steps.

        Returns:
            (N, C, H, W) latents.

        Raises:
            ValueError: a table that remembers more estimates than the file does.
        """
        self._check_size(latents)
        self._check_history(table)
        null = self.config.null_class
        if class_labels is not None and null is not None and guidance_scale != 1:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, null)])
        scale = None if null is None else guidance_scale
        inputs = {"latents": latents, "table": table, "noise": noise}
        return self._run(self._place(**inputs, class_labels=class_labels, guidance_scale=scale))

    def _check_history(self, table: Any) -> None:
        needed, held = table.shape[1] - len(COLUMNS) + 1, self.settings.get("history", 1)
        if needed > held:
            raise ValueError(f"This solver needs {needed} estimates of earlier steps, and this export holds {held}; "
                             "export the model again, or take a solver of order 2.")  # fmt: skip

    def evaluate(self, inputs: dict[str, Any]) -> Tensor:
        return self.sample(**{"class_labels": None, "guidance_scale": 1.0, **inputs})


class Decoder(Component):
    """The decoder of an `AutoencoderKL`, as the `vae` of a pipeline."""

    @classmethod
    def load_config(cls, folder: str | os.PathLike) -> Any:
        return FrozenDict(AutoencoderKL.load_config(folder))

    def decode(self, latents: Tensor, return_dict: bool = True) -> RuntimeOutput:
        """(N, C, H, W) latents, already divided by the scaling factor -> `sample` (N, 3, 8H, 8W) in -1..1."""
        self._check_size(latents)
        return RuntimeOutput(self._run(self._place(latents=latents)).to(latents))

    def evaluate(self, inputs: dict[str, Any]) -> Tensor:
        return self.decode(**inputs).sample


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged.")
    return settings
