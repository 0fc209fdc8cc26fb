"""TensorRT as a runtime of `DiTPipeline`: the denoiser, the whole sampler and the VAE decoder, on NVIDIA GPUs.

Tensors of torch are the engine's buffers and torch's stream its stream; nothing passes through the host.
"""

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.files import workplace
from dit_hub.manifest import MANIFEST_FILE, note_written
from dit_hub.runtime import RuntimeOptions

from .component import RuntimeComponent, RuntimeDecoder, RuntimeDenoiser, RuntimeSampler, Session
from .cuda_graph import CudaGraph, record
from .tensorrt_build import Machine, Manifest, file_sha256, is_rtx, misfit

ENGINE_FILE = "model.engine"
CONDITIONER_ENGINE_FILE = "conditioner.engine"

# Shapes that hold a context, buffers and a graph at a time: the guided and the unguided steps of a batch, and those of
# the last, smaller one.
_MOST_RECORDINGS = 4

Value = TypeVar("Value")


class _TensorRTComponent(RuntimeComponent):
    model_file = ENGINE_FILE
    conditioner_file = CONDITIONER_ENGINE_FILE
    elsewhere = "an engine runs on the GPU that is current when it is loaded; see torch.cuda.set_device"
    has_loop = False  # which CUDA graphs cannot hold

    @classmethod
    def described(cls, folder: Path) -> Any:
        """The component without its engine, for a pipeline to be saved on a machine that need not run it."""
        component = cls.__new__(cls)
        component.folder, component.config = folder, cls.load_config(folder)
        return component

    def _open(self, path: Path, options: RuntimeOptions) -> Session:
        manifest = Manifest.read(self.folder)
        self.runtime = manifest.product
        if (reason := misfit(manifest, Machine.this())) is not None:
            raise ValueError(f"{path} does not run here: {reason}.")
        facts = manifest.engines.get(path.name)
        if facts is None or file_sha256(path) != facts.sha256:  # TensorRT itself may crash on a damaged engine
            raise ValueError(f"{path} is not the engine that its manifest describes; build it anew.")
        self.device = torch.device("cuda", torch.cuda.current_device())
        return _Engine(path, manifest, facts.profiles, self.device, options.cuda_graphs and not self.has_loop)


class TensorRTDiTTransformer(_TensorRTComponent, RuntimeDenoiser):
    """The denoiser as a TensorRT engine; as `DiTTransformer`, a component of a `DiTPipeline`."""


class TensorRTSampler(_TensorRTComponent, RuntimeSampler):
    """The whole denoising loop as a TensorRT engine; in place of the denoiser, a component of a `DiTPipeline`."""

    has_loop = True


class TensorRTVAEDecoder(_TensorRTComponent, RuntimeDecoder):
    """The decoder of an `AutoencoderKL` as a TensorRT engine, as the `vae` of a `DiTPipeline`."""


def check_shapes(profiles: Mapping[str, list[list[int]]], inputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError where an input lies outside what the engine is built for."""
    for name, value in inputs.items():
        if name not in profiles:
            raise ValueError(f"The engine has no input {name}; it takes {', '.join(profiles)}.")
        smallest, _, largest = profiles[name]
        shape = list(value.shape)
        if len(shape) != len(smallest) or not all(
            a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True)
        ):
            raise ValueError(
                f"The engine is built for {name} of {smallest} to {largest}, not {shape}; guidance doubles the batch. "
                "Build it with another --profile, or sample fewer pictures at a time."
            )
    if missing := [name for name in profiles if name not in inputs]:
        raise ValueError(f"The engine needs the input {missing[0]}.")


class RecentlyUsed(Generic[Value]):
    """At most a few values by key; the one that was asked for the longest ago goes first.

    Args:
        most: how many.
        before_going: called before a value goes.
    """

    def __init__(self, most: int, before_going: Callable[[], Any]):
        self._most, self._before_going = most, before_going
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where there is none."""
        if key not in self._values:
            if len(self._values) == self._most:  # before another is made, as memory may not hold both
                self._before_going()
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        """Let all go."""
        self._values.clear()


class _Engine:
    """A loaded engine: tensors by input name -> its first output, on PyTorch's stream.

    With CUDA graphs each set of shapes has a context and buffers of its own, as the addresses that a graph holds must
    stay; inputs are copied in and the output is copied out. The last few sets are held. TensorRT for RTX records by
    itself; TensorRT's launches are recorded after the first call. An engine that cannot be recorded runs without.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        profiles: dict[str, list[list[int]]],
        device: torch.device,
        cuda_graphs: bool,
    ):
        trt = require(manifest.product, manifest.product.replace("_", "-"))
        self._name, self._profiles, self._device = manifest.product, profiles, device
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(f"{self._name} cannot load {path}.")
        if manifest.weight_streaming:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._config = self._engine.create_runtime_config()
        self._records_itself = is_rtx(trt)
        if cuda_graphs and self._records_itself:
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # tensorrt_rtx compiles for the GPU when it first runs; what it compiled lies beside the engine.
        self._cache, self._cache_file = None, path.with_suffix(".cache")
        if is_rtx(trt):
            self._cache = self._config.create_runtime_cache()
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())
            self._config.set_runtime_cache(self._cache)
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.UINT8: torch.uint8,
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        outputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self._outputs = {name: types[self._engine.get_tensor_dtype(name)] for name in outputs}
        self._stream = torch.cuda.Stream(device)  # on the default one TensorRT synchronises the device each time
        # Of all shapes; where each has one of its own it would only take memory.
        self._context = None if cuda_graphs else self._new_context()
        self._recordings = RecentlyUsed[_Recording](_MOST_RECORDINGS, self._stream.synchronize)
        self._calls: Counter[tuple] = Counter()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        check_shapes(self._profiles, inputs)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        caller = torch.cuda.current_stream(self._device)
        if self._context is None:
            output = self._run_recorded(self._recordings.get(shapes, lambda: self._recording(inputs)), inputs, caller)
        else:
            output = self._run(self._context, inputs, caller)
        self._calls[shapes] += 1
        if self._calls[shapes] <= 2:  # kernels for a shape may be compiled after its first call
            self._save_cache()
        return output

    def _run(self, context: Any, inputs: dict[str, Tensor], caller: torch.cuda.Stream) -> Tensor:
        # The caller's stream owns the outputs. It waits for the engine, so nobody gets their memory too early.
        output, *_others = self._bind(context, inputs)
        with self._after(caller):
            self._enqueue(context)
        return output

    def _run_recorded(self, recording: "_Recording", inputs: dict[str, Tensor], caller: torch.cuda.Stream) -> Tensor:
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
        """The block's work follows what the caller's stream has to do, and what that gets to do later follows it."""
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def _recording(self, inputs: dict[str, Tensor]) -> "_Recording":
        with torch.cuda.stream(self._stream):  # which alone uses their memory, now and later
            held = {name: value.new_empty(value.shape) for name, value in inputs.items()}
            context = self._new_context()
            return _Recording(context, held, self._bind(context, held))

    def _record(self, recording: "_Recording") -> None:
        """Record a pass. Where that is refused it would be for all shapes, and one context serves them from now on."""
        self._stream.synchronize()
        recording.graph = record(self._stream.cuda_stream, lambda: self._enqueue(recording.context), self._device)
        if recording.graph is None:
            self._context = recording.context
            self._recordings.clear()

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise ValueError(f"{self._name} cannot run this engine; does the GPU have the memory for it?")
        return context

    def _bind(self, context: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Give a context its inputs and new memory for its outputs, which must be kept while it runs."""
        for name, value in inputs.items():
            context.set_input_shape(name, tuple(value.shape))
            context.set_tensor_address(name, value.data_ptr())
        outputs = []
        for name, dtype in self._outputs.items():
            outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self._device))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        return outputs

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise ValueError(f"{self._name} could not run the engine.")

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


@dataclass
class _Recording:
    """A context with buffers of its own, and its graph once there is one."""

    context: Any
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    graph: CudaGraph | None = None
