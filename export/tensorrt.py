"""TensorRT as a runtime of `DiTPipeline`: the denoiser, the whole sampler and the VAE decoder, on NVIDIA GPUs.

Tensors of torch are the engine's buffers and torch's stream its stream; nothing passes through the host.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.runtime import RuntimeOptions

from .component import RuntimeComponent, RuntimeDecoder, RuntimeDenoiser, RuntimeSampler, Session
from .tensorrt_build import RUNTIME_CACHE_FILE, Machine, Manifest, file_sha256, misfit

ENGINE_FILE = "model.engine"
CONDITIONER_ENGINE_FILE = "conditioner.engine"


class _TensorRTComponent(RuntimeComponent):
    model_file = ENGINE_FILE
    conditioner_file = CONDITIONER_ENGINE_FILE

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
        return _Engine(path, manifest, facts.profiles, self.device, options.cuda_graphs)


class TensorRTDiTTransformer(_TensorRTComponent, RuntimeDenoiser):
    """The denoiser as a TensorRT engine; as `DiTTransformer`, a component of a `DiTPipeline`."""


class TensorRTSampler(_TensorRTComponent, RuntimeSampler):
    """The whole denoising loop as a TensorRT engine; in place of the denoiser, a component of a `DiTPipeline`."""


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


class _Engine:
    """A loaded engine: tensors by input name -> its first output.

    With CUDA graphs, the second call of the same shapes is recorded and later ones are replayed, with inputs copied
    into the recording's own; the result is then copied out of it.
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
        self._profiles, self._device, self._cuda_graphs = profiles, device, cuda_graphs
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(f"{manifest.product} cannot load {path}.")
        if manifest.weight_streaming:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        config = self._engine.create_runtime_config()
        self._cache, self._cache_file = None, path.with_name(RUNTIME_CACHE_FILE)
        if hasattr(config, "create_runtime_cache"):  # tensorrt_rtx compiles for the GPU when it first runs
            self._cache = config.create_runtime_cache()
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)
        if self._context is None:
            raise ValueError(f"{manifest.product} cannot run {path}; does the GPU have the memory for it?")
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.UINT8: torch.uint8,
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        outputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self._outputs = {name: types[self._engine.get_tensor_dtype(name)] for name in outputs}
        self._calls: dict[tuple, int] = {}
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        check_shapes(self._profiles, inputs)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        calls = self._calls[shapes] = self._calls.get(shapes, 0) + 1
        if not self._cuda_graphs or calls == 1:  # the first call compiles and allocates, which no graph can hold
            output = self._enqueue(inputs)
            if calls == 1:
                self._save_cache()
            return output
        if shapes not in self._graphs:
            held = {name: value.clone() for name, value in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self._enqueue(held)
            self._graphs[shapes] = graph, held, output
        graph, held, output = self._graphs[shapes]
        for name, value in inputs.items():
            held[name].copy_(value)
        graph.replay()
        return output.clone()

    def _enqueue(self, inputs: dict[str, Tensor]) -> Tensor:
        for name, value in inputs.items():
            self._context.set_input_shape(name, tuple(value.shape))
            self._context.set_tensor_address(name, value.data_ptr())
        outputs = {}
        for name, dtype in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=dtype, device=self._device)
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError("TensorRT could not run the engine.")
        return next(iter(outputs.values()))

    def _save_cache(self) -> None:
        if self._cache is None:
            return
        building = self._cache_file.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a folder that cannot be written to only starts slowly each time
            building.write_bytes(memoryview(self._cache.serialize()))
            building.replace(self._cache_file)
