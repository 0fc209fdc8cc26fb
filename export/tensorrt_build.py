"""Engines of TensorRT and of TensorRT for RTX, built from ONNX files.

One code for both products, whose Python interfaces agree in all that is needed here. `tensorrt_rtx` (PyPI) builds for
GPUs that need not be there; `tensorrt` (NVIDIA's own index) builds for the GPU of this machine.
"""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from dit_hub.extras import install_command, require

from .component import (
    DRAWS_DIMENSION,
    GRID_DIMENSIONS,
    MAX_PAIRS,
    PAIRS_DIMENSION,
    ROWS_DIMENSION,
    STEPS_DIMENSION,
)

MANIFEST_FILE = "manifest.json"
# Of tensorrt: what the builder measured. Also in the cache of huggingface_hub, so that the next build is quick.
TIMING_CACHE_FILE = "timing.cache"

PRODUCTS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # by the name of the runtime; both are import names


def is_rtx(trt: Any) -> bool:
    """Whether a product's module is TensorRT for RTX, by its name: what either offers changes with its version."""
    return trt.__name__ == PRODUCTS["rtx"]


# What an engine is built for where nothing is said. Turing (7.5) has no bf16 and must be asked for.
_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
_LEAST_CAPABILITY = {"bf16": 8.0, "fp8": 8.9}

# The smallest, usual and largest extent of dynamic dimensions besides batch and size.
_PROFILES = {PAIRS_DIMENSION: (1, 64, MAX_PAIRS), STEPS_DIMENSION: (1, 50, 1000), DRAWS_DIMENSION: (1, 1, 1000)}

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
    """What the engines of a folder were built with, and so need."""

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
        """That of a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = folder / MANIFEST_FILE
        try:
            facts = json.loads(path.read_text())
            facts["engines"] = {name: EngineFacts(**engine) for name, engine in facts["engines"].items()}
            manifest = cls(**facts)
            manifest.compute_capabilities = [str(capability) for capability in manifest.compute_capabilities]
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read, so that it is unknown what the engine needs: {error}") from None
        return manifest


@dataclass(frozen=True)
class Machine:
    """What of it decides whether an engine runs: versions by installed product, and the GPU's compute capability."""

    products: dict[str, str]
    compute_capability: str | None

    @classmethod
    def this(cls) -> "Machine":
        products = {}
        for name in PRODUCTS.values():
            try:
                products[name] = require(name, "").__version__
            except (ImportError, OSError):  # OSError: its libraries do not load
                continue
        capability = None
        if torch.cuda.is_available():
            capability = "{}.{}".format(*torch.cuda.get_device_capability())
        return cls(products, capability)


def misfit(manifest: Manifest, machine: Machine) -> str | None:
    """Why the engines of a manifest do not run on a machine, in words; None where they do."""
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
    for name in PRODUCTS.values():
        try:
            return require(name, "")
        except (ImportError, OSError):
            continue
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
        if not torch.cuda.is_available():
            raise ValueError("tensorrt builds on the GPU that the engine is for, and PyTorch sees none here; "
                             "tensorrt_rtx builds without one.")  # fmt: skip
        return ["{}.{}".format(*torch.cuda.get_device_capability())]
    least = _LEAST_CAPABILITY.get(precision, 0.0)
    known = [f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    for capability in wanted:
        if capability not in known:
            others = ", ".join(sorted(known, key=float))
            hint = " The H100 and H200 (9.0) need tensorrt." if capability == "9.0" else ""
            raise ValueError(
                f"{trt.__name__} does not build for compute capability {capability}; it does for {others}.{hint}"
            )
        if float(capability) < least:
            raise ValueError(f"GPUs of compute capability {capability} have no {precision}; {least} and later have.")
    return list(wanted) or [capability for capability in _CAPABILITIES if float(capability) >= least]


def dimension_profile(name: str, batch: Profile, size: Profile | None) -> Profile:
    """The extents of a dynamic dimension of ours.

    Raises:
        ValueError: it is none of ours.
    """
    base = name.rpartition("*")[2]  # "2*grid_height" is in latent pixels, as `size` is
    if base == "batch":
        return batch
    if base == ROWS_DIMENSION:
        return batch[0], 2 * batch[1], 2 * batch[2]
    if base in _PROFILES:
        return _PROFILES[base]
    if base in GRID_DIMENSIONS:
        if size is None:
            raise ValueError("The file takes every height and width; say which with size (smallest, usual, largest).")
        return size
    raise ValueError(f"The file has a dynamic dimension {name!r}, whose extents are unknown.")


def build_engine(
    trt: Any,
    source: Path,
    target: Path,
    batch: Profile,
    size: Profile | None,
    capabilities: list[str],
    weight_streaming: bool = False,
    progress: Progress | None = None,
) -> EngineFacts:
    """Build the engine of an ONNX file.

    Args:
        trt: of `load_product`.
        source, target: the ONNX file and the engine to write.
        batch: smallest, usual and largest batch.
        size: the same of height and width, for files that take any.
        capabilities: of `choose_capabilities`.
        weight_streaming: keep weights in the host's memory where the GPU's does not hold them.
        progress: told of each step.

    Raises:
        ValueError: the file cannot be read or has an operator that TensorRT does not know, or the build fails.
        KeyboardInterrupt: Ctrl-C was pressed; the build ends at its next step.
    """
    messages: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

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
    profile = builder.create_optimization_profile()
    profiles: dict[str, list[list[int]]] = {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        extents = [
            dimension_profile(tensor.get_dimension_name(axis) or "", batch, size) if extent == -1 else (extent,) * 3
            for axis, extent in enumerate(tensor.shape)
        ]
        profiles[tensor.name] = [list(shape) for shape in zip(*extents, strict=True)] or [[], [], []]
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *profiles[tensor.name])
    if config.add_optimization_profile(profile) < 0:
        raise ValueError(f"{trt.__name__} refuses the profile {profiles}.")
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and 1e-3 off; fp16 is for those who want less
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    timing_cache = timings = None
    if is_rtx(trt):
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            member = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
            config.set_compute_capability(member, index)
    else:
        place = cached_assets_path("dit-hub", trt.__name__, f"{trt.__version__}-{capabilities[0]}")
        timings = place / TIMING_CACHE_FILE
        timing_cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
        config.set_timing_cache(timing_cache, ignore_mismatch=True)

    with _watched(trt, config, progress):
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(
            f"{trt.__name__} cannot build {source.name}: {messages[-1] if messages else 'no reason given'}"
        )
    target.write_bytes(memoryview(engine))
    if timing_cache is not None and timings is not None:
        measured = bytes(memoryview(timing_cache.serialize()))
        building = timings.with_suffix(f".{os.getpid()}")
        building.write_bytes(measured)
        building.replace(timings)  # in one step, for others who read it now
        (target.parent / TIMING_CACHE_FILE).write_bytes(measured)
    return EngineFacts(file_sha256(target), source_sha256(source), profiles)


def _parse_errors(parser: Any) -> str:
    """What the parser stumbled over: the name and operator of each node, at most three."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    described = [
        f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().strip()}"
        if error.node_operator()
        else error.desc().strip()
        for error in errors
    ]
    return "; ".join(described[:3]) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else "") + "."


@contextmanager
def _watched(trt: Any, config: Any, progress: Progress | None) -> Iterator[None]:
    """Tell of a build's progress and end it on Ctrl-C, which Python cannot raise through TensorRT's own code."""
    interrupted = threading.Event()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None:
                progress(phase_name, step + 1, self.steps[phase_name])
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    config.progress_monitor = monitor = Monitor()
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set()) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)
        del monitor
    if interrupted.is_set():
        raise KeyboardInterrupt


def file_sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def source_sha256(path: Path) -> str:
    """Of an ONNX file and the weights beside it."""
    digest = hashlib.sha256()
    for part in sorted(path.parent.glob(f"{path.name}*")):
        digest.update(file_sha256(part).encode())
    return digest.hexdigest()
