"""TensorRT as a runtime of `DiTPipeline`: the denoiser, the whole sampler and the VAE decoder, on NVIDIA GPUs.

PyTorch's tensors are the engine's buffers and its stream the engine's stream; nothing passes through the host.
"""

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.files import file_sha256, workplace
from dit_hub.manifest import MANIFEST_FILE, note_written
from dit_hub.runtime import RuntimeOptions, few_batch_sizes

from .component import Decoder, Denoiser, Sampler, Session
from .cuda_graph import CudaGraph, record
from .reference import UnsupportedShapeError
from .tensorrt_build import Manifest, is_rtx, misfit

# Shapes that hold a context, buffers and a graph at a time: the guided and the unguided steps of a batch, and those of
# the last, smaller one.
_MOST_RECORDINGS = 4


@dataclass
class _Recording:
    """A context with buffers of its own, and its graph once there is one."""

    context: Any
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    graph: CudaGraph | None = None


class TensorRTSession(Session):
    """An engine, on PyTorch's stream.

    With CUDA graphs each set of shapes has a context and buffers of its own, as the addresses in a graph must stay
    valid; inputs are copied in and the output is copied out. The last few sets are kept. TensorRT for RTX records by
    itself; TensorRT's launches are recorded after the first call. An engine that cannot be recorded runs without.
    """

    suffix = ".engine"
    elsewhere = "an engine runs on the GPU that is current when it is loaded; see torch.cuda.set_device"

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        profiles: dict[str, list[list[int]]],
        device: torch.device,
        cuda_graphs: bool,
    ):
        trt = require(manifest.product, manifest.product.replace("_", "-"))
        self.name, self.device, self._profiles = manifest.product, device, profiles
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(f"{self.name} cannot load {path}.")
        if manifest.weight_streaming:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._config = self._engine.create_runtime_config()
        self._records_itself = is_rtx(trt)
        # tensorrt_rtx compiles for the GPU when it first runs; the result lies beside the engine.
        self._cache, self._cache_file = None, path.with_suffix(".cache")
        if is_rtx(trt):
            if cuda_graphs:
                self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._cache = self._config.create_runtime_cache()
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())
            self._config.set_runtime_cache(self._cache)
        self._outputs = _output_types(trt, self._engine)
        self._stream = torch.cuda.Stream(device)  # on the default one TensorRT synchronises the device each time
        # For all shapes; where each has one of its own, this one would only take memory.
        self._context = None if cuda_graphs else self._new_context()
        self._recordings: OrderedDict[tuple, _Recording] = OrderedDict()  # the one used last is the last
        self._calls: Counter[tuple] = Counter()

    @classmethod
    def open(cls, path: Path, options: RuntimeOptions, settings: dict[str, Any], is_loop: bool) -> "TensorRTSession":
        manifest = Manifest.read(path.parent)
        if (reason := misfit(manifest)) is not None:
            raise ValueError(f"{path} does not run here: {reason}.")
        facts = manifest.engines.get(path.name)
        if facts is None or file_sha256(path) != facts.sha256:  # TensorRT itself may crash on a damaged engine
            raise ValueError(f"{path} is not the engine that its manifest describes; build it anew.")
        device = torch.device("cuda", torch.cuda.current_device())
        # CUDA graphs cannot hold loops.
        return cls(path, manifest, facts.profiles, device, options.cuda_graphs and not is_loop)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        check_shapes(self._profiles, inputs)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        caller = torch.cuda.current_stream(self.device)
        if self._context is None:
            output = self._run_recorded(self._recording(shapes, inputs), inputs, caller)
        else:
            # The caller's stream owns the outputs. It waits for the engine, so nobody gets their memory too early.
            output, *_others = self._bind(self._context, inputs)
            with self._after(caller):
                self._enqueue(self._context)
        self._calls[shapes] += 1
        if self._calls[shapes] <= 2:  # kernels for a shape may be compiled after its first call
            self._save_cache()
        return output

    def batch_sizes(self, most: int) -> list[int]:
        """Few within the profile: kernels are chosen, and graphs recorded, for each."""
        smallest, _, largest = (shape[0] for shape in self._profiles["hidden_states"])
        return [smallest, *(size for size in few_batch_sizes(min(most, largest)) if size > smallest)]

    def _run_recorded(self, recording: _Recording, inputs: dict[str, Tensor], caller: torch.cuda.Stream) -> Tensor:
        with self._after(caller):
            for name, value in inputs.items():
                recording.inputs[name].copy_(value)
            if recording.graph is not None:
                recording.graph.launch(self._stream.cuda_stream)
            else:
                self._enqueue(recording.context)
                if not self._records_itself:  # after a plain call, which updates what depends on the shapes
                    self._record(recording)
        output = recording.outputs[0].clone()
        self._stream.wait_stream(caller)  # before the next pass, which may be another stream's, writes there
        return output

    @contextlib.contextmanager
    def _after(self, caller: torch.cuda.Stream) -> Iterator[None]:
        """Put the block's work after what the caller's stream has queued, and before what it gets later."""
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def _recording(self, shapes: tuple, inputs: dict[str, Tensor]) -> _Recording:
        """The recording for these shapes; a new one takes the place of the one used longest ago."""
        if shapes not in self._recordings:
            if len(self._recordings) == _MOST_RECORDINGS:  # before another is made, as memory may not hold both
                self._stream.synchronize()
                self._recordings.popitem(last=False)
            with torch.cuda.stream(self._stream):  # which alone uses their memory, now and later
                held = {name: value.new_empty(value.shape) for name, value in inputs.items()}
                context = self._new_context()
                self._recordings[shapes] = _Recording(context, held, self._bind(context, held))
        self._recordings.move_to_end(shapes)
        return self._recordings[shapes]

    def _record(self, recording: _Recording) -> None:
        """Record a pass. Where that fails it would for all shapes, so from now on one context serves them."""
        self._stream.synchronize()
        recording.graph = record(self._stream.cuda_stream, lambda: self._enqueue(recording.context), self.device)
        if recording.graph is None:
            self._context = recording.context
            self._recordings.clear()

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise ValueError(f"{self.name} cannot run this engine; does the GPU have the memory for it?")
        return context

    def _bind(self, context: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Give a context its inputs and new memory for its outputs, which must be kept while it runs."""
        for name, value in inputs.items():
            context.set_input_shape(name, tuple(value.shape))
            context.set_tensor_address(name, value.data_ptr())
        outputs = []
        for name, dtype in self._outputs.items():
            outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        return outputs

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise ValueError(f"{self.name} could not run the engine.")

    def _save_cache(self) -> None:
        if self._cache is None:
            return
        file = self._cache_file
        folder = next((each for each in file.parents[:2] if (each / MANIFEST_FILE).is_file()), file.parent)
        # Beside the pipeline, where the next command for it removes what a process that is killed leaves; beside the
        # file where that cannot be. A folder that cannot be written to only starts slowly each time.
        for place in (folder, file):
            with contextlib.suppress(OSError), workplace(place) as work:
                (work / file.name).write_bytes(memoryview(self._cache.serialize()))
                (work / file.name).replace(file)
                note_written(file)
                return


def _output_types(trt: Any, engine: Any) -> dict[str, torch.dtype]:
    """The dtype of each of an engine's outputs, in their order."""
    types = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.UINT8: torch.uint8,
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    return {name: types[engine.get_tensor_dtype(name)] for name in outputs}


def check_shapes(profiles: Mapping[str, list[list[int]]], inputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError where an engine with these profiles does not take the inputs."""
    for name, value in inputs.items():
        if name not in profiles:
            raise ValueError(f"The engine has no input {name}; it takes {', '.join(profiles)}.")
        smallest, _, largest = profiles[name]
        shape = list(value.shape)
        fits = (a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))
        if len(shape) != len(smallest) or not all(fits):
            raise UnsupportedShapeError(
                f"The engine is built for {name} of {smallest} to {largest}, not {shape}; guidance doubles the batch. "
                "Build it with another --profile, or sample fewer images at a time."
            )
    if missing := [name for name in profiles if name not in inputs]:
        raise ValueError(f"The engine needs the input {missing[0]}.")


class TensorRTDiTTransformer(Denoiser):
    """The denoiser as a TensorRT engine; as `DiTTransformer`, a component of a `DiTPipeline`."""

    session_type = TensorRTSession


class TensorRTSampler(Sampler):
    """The whole denoising loop as a TensorRT engine; in place of the denoiser, a component of a `DiTPipeline`."""

    session_type = TensorRTSession


class TensorRTVAEDecoder(Decoder):
    """The decoder of an `AutoencoderKL` as a TensorRT engine, as the `vae` of a `DiTPipeline`."""

    session_type = TensorRTSession
