"""Engines of TensorRT and of TensorRT for RTX, built from ONNX files.

One module for both products, whose Python interfaces agree in all that is needed here. `tensorrt_rtx` (PyPI) builds for
GPUs that need not be there; `tensorrt` (NVIDIA's own index) builds for the GPU of this machine.
"""

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from dit_hub.extras import install_command, require
from dit_hub.files import file_sha256
from dit_hub.tables import COLUMNS, MAX_HISTORY

from .component import DRAWS, GRID, MAX_PAIRS, NUMBERS, PAIRS, ROWS, STEPS

MANIFEST_FILE = "manifest.json"
# What the builder of tensorrt measured. Also in the cache of huggingface_hub, so that the next build is quick.
TIMING_CACHE_FILE = "timing.cache"

PRODUCTS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # by the name of the runtime; both are import names


def is_rtx(trt: Any) -> bool:
    """Whether a product's module is TensorRT for RTX, by its name: what either offers depends on its version."""
    return trt.__name__ == PRODUCTS["rtx"]


# Compute capabilities to build for by default. Turing (7.5) has no bf16 and must be asked for.
_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
_LEAST_CAPABILITY = {"bf16": 8.0, "fp8": 8.9}

# The smallest, usual and largest extent of dynamic dimensions besides batch and size.
_EXTENTS = {
    PAIRS: (1, 64, MAX_PAIRS),
    STEPS: (1, 50, 1000),
    NUMBERS: (len(COLUMNS), len(COLUMNS), len(COLUMNS) + MAX_HISTORY - 1),
    DRAWS: (1, 1, 1000),
}

Profile = tuple[int, int, int]

# Called with the name of a phase, the steps done and all its steps.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineFacts:
    """An engine file: its hash, that of the ONNX file it is made from, and (smallest, usual, largest) input shapes."""

    sha256: str
    source_sha256: str
    profiles: dict[str, list[list[int]]]


@dataclass
class Manifest:
    """How the engines of a folder were built, and so what they need."""

    product: str
    version: str
    compute_capabilities: list[str]
    precision: str
    weight_streaming: bool
    engines: dict[str, EngineFacts] = field(default_factory=dict)
    parity: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder; ValueError where there is none, or it is damaged."""
        path = folder / MANIFEST_FILE
        try:
            facts = json.loads(path.read_text())
            facts["engines"] = {name: EngineFacts(**engine) for name, engine in facts["engines"].items()}
            manifest = cls(**facts)
            manifest.compute_capabilities = [str(capability) for capability in manifest.compute_capabilities]
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read, so it is unknown what the engine needs: {error}") from None
        return manifest


@dataclass(frozen=True)
class Machine:
    """Versions by installed product, and the GPU's compute capability, which decide whether an engine runs."""

    products: dict[str, str]
    compute_capability: str | None

    @classmethod
    def this(cls) -> "Machine":
        return cls({name: trt.__version__ for name, trt in _installed().items()}, _gpu_capability())


def _installed() -> dict[str, Any]:
    """The products that are installed, by the names of their modules."""
    modules = {}
    for name in PRODUCTS.values():
        with contextlib.suppress(ImportError, OSError):  # OSError: its libraries do not load
            modules[name] = require(name, "")
    return modules


def _gpu_capability() -> str | None:
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def misfit(manifest: Manifest, machine: Machine | None = None) -> str | None:
    """The reason why a manifest's engines do not run on a machine, by default this one; None where they do."""
    machine = machine or Machine.this()
    product, extra = manifest.product, manifest.product.replace("_", "-")
    if product not in PRODUCTS.values():
        return f"it is made for {product}, which is unknown here"
    if machine.compute_capability is None:
        return "it needs an NVIDIA GPU, and PyTorch sees none"
    if product not in machine.products:
        return f"it needs {product} {manifest.version}, which is not installed: {install_command(extra)}"
    if (version := machine.products[product]) != manifest.version:
        return f"it is built with {product} {manifest.version}, and {version} is installed"
    if machine.compute_capability not in manifest.compute_capabilities:
        built_for = ", ".join(manifest.compute_capabilities)
        return f"it is built for compute capability {built_for}, and this GPU has {machine.compute_capability}"
    return None


def load_product(runtime: str) -> Any:
    """The module of a product: "tensorrt", "rtx", or "auto", the first of the two that is installed.

    Raises:
        ValueError: an unknown name.
        ImportError: it is not installed.
    """
    if runtime not in ("auto", *PRODUCTS):
        raise ValueError(f"There is no runtime {runtime!r}; known: auto, {', '.join(PRODUCTS)}.")
    if runtime != "auto":
        return require(PRODUCTS[runtime], PRODUCTS[runtime].replace("_", "-"))
    if installed := _installed():
        return next(iter(installed.values()))
    raise ImportError(f"This needs TensorRT, which is not installed: {install_command('tensorrt-rtx')}; for "
                      f"data-centre GPUs such as the H100: {install_command('tensorrt')}.")  # fmt: skip


def choose_capabilities(trt: Any, wanted: tuple[str, ...], precision: str) -> list[str]:
    """The compute capabilities to build for, such as "8.9".

    Raises:
        ValueError: one that the product does not build for or that has no such precision; or no GPU for `tensorrt`.
    """
    if not is_rtx(trt):
        if wanted:
            raise ValueError("tensorrt builds for the GPU of this machine; only rtx takes compute capabilities.")
        if (capability := _gpu_capability()) is None:
            raise ValueError("tensorrt builds on the GPU that the engine is for, and PyTorch sees none here; "
                             "tensorrt_rtx builds without one.")  # fmt: skip
        return [capability]
    least = _LEAST_CAPABILITY.get(precision, 0.0)
    known = [f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    for capability in wanted:
        if capability not in known:
            others = ", ".join(sorted(known, key=float))
            hint = " The H100 and H200 (9.0) need tensorrt." if capability == "9.0" else ""
            raise ValueError(f"{trt.__name__} does not build for compute capability {capability}; "
                             f"it does for {others}.{hint}")  # fmt: skip
        if float(capability) < least:
            raise ValueError(f"GPUs of compute capability {capability} have no {precision}; {least} and later have.")
    return list(wanted) or [capability for capability in _CAPABILITIES if float(capability) >= least]


@dataclass(frozen=True)
class EngineBuilder:
    """Builds engines of ONNX files; all engines of an export share its settings."""

    trt: Any  # of `load_product`
    capabilities: list[str]  # of `choose_capabilities`
    precision: str  # of the files, for the manifest
    batch: Profile
    size: Profile | None = None  # of height and width, for files that take any
    weight_streaming: bool = False
    progress: Progress | None = None

    def build(self, files: dict[Path, Path]) -> Manifest:
        """Build an engine of each ONNX file: {source: target}.

        Raises:
            ValueError: a file cannot be read or has an operator that TensorRT does not know, or its build fails.
            KeyboardInterrupt: Ctrl-C was pressed; the build ends at its next step.
        """
        trt = self.trt
        manifest = Manifest(trt.__name__, trt.__version__, self.capabilities, self.precision, self.weight_streaming)
        for source, target in files.items():
            with _watched(trt, self.progress) as monitor:
                profiles = self._build(source, target, monitor)
            manifest.engines[target.name] = EngineFacts(file_sha256(target), source_sha256(source), profiles)
        return manifest

    def _build(self, source: Path, target: Path, monitor: Any) -> dict[str, list[list[int]]]:
        """Build one engine and return its profiles."""
        trt, messages = self.trt, []

        class Logger(trt.ILogger):
            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    messages.append(message)

        logger = Logger()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(source)):
            raise ValueError(f"{trt.__name__} cannot read {source.name}: {_parse_errors(parser)}")
        for layer in (network.get_layer(index) for index in range(network.num_layers)):
            if layer.type == trt.LayerType.ATTENTION_INPUT:  # float32 has no kernel of its own: let it be decomposed
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and 1e-3 off; fp16 is for those who want less
        if self.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if is_rtx(trt):
            config.num_compute_capabilities = len(self.capabilities)
            for index, capability in enumerate(self.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
        profiles = self._add_profile(config, builder.create_optimization_profile(), network)
        config.progress_monitor = monitor
        with contextlib.nullcontext() if is_rtx(trt) else self._timings(config, target.parent):
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                reason = messages[-1] if messages else "no reason given"
                raise ValueError(f"{trt.__name__} cannot build {source.name}: {reason}")
        target.write_bytes(memoryview(engine))
        return profiles

    def _add_profile(self, config: Any, profile: Any, network: Any) -> dict[str, list[list[int]]]:
        """Tell the build the extents of each input: its smallest, usual and largest shape."""
        profiles: dict[str, list[list[int]]] = {}
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            extents = [
                self._extents(tensor.get_dimension_name(axis) or "") if extent == -1 else (extent,) * 3
                for axis, extent in enumerate(tensor.shape)
            ]
            profiles[tensor.name] = [list(shape) for shape in zip(*extents, strict=True)] or [[], [], []]
            if -1 in tensor.shape:
                profile.set_shape(tensor.name, *profiles[tensor.name])
        if config.add_optimization_profile(profile) < 0:
            raise ValueError(f"{self.trt.__name__} refuses the profile {profiles}.")
        return profiles

    def _extents(self, name: str) -> Profile:
        """The extents of a dynamic dimension, by its name."""
        base = name.rpartition("*")[2]  # "2*grid_height" is in latent pixels, as `size` is
        known = {"batch": self.batch, ROWS: (self.batch[0], 2 * self.batch[1], 2 * self.batch[2]), **_EXTENTS}
        if base in GRID:
            if self.size is None:
                raise ValueError("The file takes every height and width; say which with size "
                                 "(smallest, usual, largest).")  # fmt: skip
            return self.size
        if base not in known:
            raise ValueError(f"The file has a dynamic dimension {name!r}, whose extents are unknown.")
        return known[base]

    @contextlib.contextmanager
    def _timings(self, config: Any, folder: Path) -> Iterator[None]:
        """Use the timings that tensorrt has measured before, and keep those of this build, in `folder` too."""
        version = f"{self.trt.__version__}-{self.capabilities[0]}"
        timings = cached_assets_path("dit-hub", self.trt.__name__, version) / TIMING_CACHE_FILE
        cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=True)
        yield
        measured = bytes(memoryview(cache.serialize()))
        building = timings.with_suffix(f".{os.getpid()}")
        building.write_bytes(measured)
        building.replace(timings)  # in one step, for others who read it now
        (folder / TIMING_CACHE_FILE).write_bytes(measured)


def _parse_errors(parser: Any) -> str:
    """The nodes that the parser refused, with name and operator, at most three."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    described = [
        f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().strip()}"
        if error.node_operator()
        else error.desc().strip()
        for error in errors
    ]
    return "; ".join(described[:3]) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else "") + "."


@contextlib.contextmanager
def _watched(trt: Any, progress: Progress | None) -> Iterator[Any]:
    """A monitor that reports a build's progress, and ends it on Ctrl-C.

    Python cannot raise KeyboardInterrupt through TensorRT's own code, so it is raised when the block ends.
    """
    interrupted, steps = threading.Event(), {}

    class Monitor(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None:
                progress(phase_name, step + 1, steps[phase_name])
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set()) if in_main_thread else None
    try:
        yield Monitor()
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)
        if interrupted.is_set():
            raise KeyboardInterrupt


def source_sha256(path: Path) -> str:
    """The hash of an ONNX file and the weights beside it."""
    digest = hashlib.sha256()
    for part in sorted(path.parent.glob(f"{path.name}*")):
        digest.update(file_sha256(part).encode())
    return digest.hexdigest()
