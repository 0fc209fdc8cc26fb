"""ONNX Runtime as a runtime of `DiTPipeline`: the denoiser, the whole sampler and the VAE decoder.

Names and folders follow optimum (`ORT…`), whose ONNX part cannot be installed beside transformers 5.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_hub.extras import require
from dit_hub.runtime import Provider, RuntimeOptions

from .component import PAIRS, ROWS, Decoder, Denoiser, Sampler, Session

_CPU = "CPUExecutionProvider"
# Providers whose inputs and outputs stay on an NVIDIA GPU.
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_TYPES = {torch.float32: np.float32, torch.int64: np.int64}

# Operators of small files are too short to be shared by threads: the toy's sampler takes as long with two threads as
# with one. There each core gets a session and a part of the batch instead, 1.86 times as fast on two cores; a session
# that two threads share gains 1.4 only. Larger files would be held in memory too often, and a single pass of the toy
# is over before another thread has begun.
_SMALL_BYTES, _MOST_SESSIONS = 32 * 2**20, 8

# Up to here a pass takes longer with two threads than with one: the toy in int8 (0.3 MB with precomputed modulation)
# 1.16 ms with two, 0.96 with one. In float32 (0.8 MB) it takes 1.15 ms with two, 1.28 with one.
_TINY_BYTES = 750_000

_BATCH_DIMENSIONS = ("batch", PAIRS, ROWS)


class ORTSession(Session):
    """One session of ONNX Runtime, or several that share a batch.

    Args:
        sessions: onnxruntime's own.
        axes: by input, which axis counts samples.
        device: of inputs and outputs.
    """

    name = "onnxruntime"
    elsewhere = 'choose the device when loading the pipeline, such as providers=["CUDAExecutionProvider"]'

    def __init__(self, sessions: list[Any], axes: dict[str, int], device: torch.device):
        self._sessions, self._axes, self.device = sessions, axes, device
        self._output = sessions[0].get_outputs()[0].name
        self._threads = ThreadPoolExecutor(len(sessions) - 1) if len(sessions) > 1 else None

    @classmethod
    def open(cls, path: Path, options: RuntimeOptions, settings: dict[str, Any], is_loop: bool) -> "ORTSession":
        onnxruntime = require("onnxruntime", "onnx")
        configured = providers_with_options(options.providers)
        providers = [name for name, _ in configured]
        available = onnxruntime.get_available_providers()
        if unknown := [name for name in providers if name not in available]:
            raise ValueError(f"ONNX Runtime has no provider {unknown[0]!r} here; available: {', '.join(available)}.")
        device = device_of(configured)

        def session(num_threads: int | None) -> Any:
            session_options = onnxruntime.SessionOptions()
            session_options.log_severity_level = (
                3  # errors; the warnings are about nodes that its own optimiser removes
            )
            session_options.intra_op_num_threads = num_threads or 0  # 0: one for each core
            try:
                return onnxruntime.InferenceSession(path, session_options, providers=configured)
            except Exception as error:  # onnxruntime's errors share no public base class
                raise ValueError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error

        size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))  # with weights beside the graph
        on_processor = providers == [_CPU]
        small = is_loop and on_processor and size <= _SMALL_BYTES
        tiny = options.num_threads is None and on_processor and size <= _TINY_BYTES
        sessions = [session(1 if small or tiny else options.num_threads)]
        if sessions[0].get_providers()[0] != providers[0]:  # it only warns, and takes the next
            raise ValueError(f"ONNX Runtime's {providers[0]} does not start here; are its driver and libraries there?")
        # None where the dimensions have no names of ours.
        axes = {entry.name: axis for entry in sessions[0].get_inputs() for axis, dimension in enumerate(entry.shape)
                if dimension in _BATCH_DIMENSIONS}  # fmt: skip
        if small and axes:
            sessions += [session(1) for _ in range(min(options.num_threads or _cores(), _MOST_SESSIONS) - 1)]
        return cls(sessions, axes, device)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        if self._threads is None:
            return self._run(self._sessions[0], inputs)
        parts = self._split(inputs)
        others = [self._threads.submit(self._run, *each) for each in zip(self._sessions[1:], parts[1:], strict=False)]
        first = self._run(self._sessions[0], parts[0])
        return torch.cat([first, *(other.result() for other in others)]) if others else first

    def _split(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The inputs in as many parts as there are sessions, or samples if these are fewer."""
        axes = {name: axis for name, axis in self._axes.items() if name in inputs}
        batch = min(inputs[name].shape[axis] for name, axis in axes.items())
        parts = [dict(inputs) for _ in range(min(batch, len(self._sessions)))]
        for name, axis in axes.items():
            value = inputs[name]
            guided = value.shape[axis] == 2 * batch  # the classes, then the null class as often
            value = value.unflatten(axis, (2, batch)) if guided else value
            for part, chunk in zip(parts, value.tensor_split(len(parts), dim=axis + guided), strict=True):
                part[name] = (chunk.flatten(axis, axis + 1) if guided else chunk).contiguous()
        return parts

    def _run(self, session: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Run a session bound to the tensors' own memory, so that nothing passes through the host."""
        binding, place = session.io_binding(), (self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime computes on a stream of its own
        try:
            for key, value in inputs.items():
                binding.bind_input(key, *place, _TYPES[value.dtype], tuple(value.shape), value.data_ptr())
            binding.bind_output(self._output, *place)
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no public base class
            raise ValueError(f"ONNX Runtime cannot run this: {str(error).splitlines()[0]}") from error
        return torch.from_dlpack(binding.get_outputs()[0]._ortvalue)


def providers_with_options(providers: Sequence[Provider] | None) -> list[tuple[str, dict[str, Any]]]:
    """Each provider's name and options, the preferred first; the CPU's where none are given.

    Raises:
        ValueError: an entry is neither a name nor a pair of a name and its options.
    """
    # TensorFloat-32 would be 1e-3 off; it is for those who ask for fp16.
    exact = {"CUDAExecutionProvider": {"use_tf32": "0"}}
    configured = []
    for provider in [providers] if isinstance(providers, str) else providers or [_CPU]:
        name, options = provider if isinstance(provider, tuple | list) and len(provider) == 2 else (provider, {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ValueError(f"A provider is a name or a pair such as ('CUDAExecutionProvider', {{'device_id': 1}}), "
                             f"not {provider!r}.")  # fmt: skip
        configured.append((name, {**exact.get(name, {}), **options}))
    return configured


def device_of(providers: Sequence[tuple[str, Mapping[str, Any]]]) -> torch.device:
    """The device on which the inputs and outputs of the preferred provider lie.

    Raises:
        ValueError: its device_id is no number of a GPU.
    """
    name, options = providers[0]
    if name not in _ON_CUDA:
        return torch.device("cpu")
    index = str(options.get("device_id", 0))
    if not index.isdecimal():
        raise ValueError(f"The device_id of {name} is a whole number from 0 up, not {index!r}.")
    return torch.device("cuda", int(index))


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ORTDiTTransformer(Denoiser):
    """The denoiser on ONNX Runtime; as `DiTTransformer`, a component of a `DiTPipeline`."""

    session_type = ORTSession


class ORTSampler(Sampler):
    """The whole denoising loop on ONNX Runtime; in place of the denoiser, a component of a `DiTPipeline`."""

    session_type = ORTSession


class ORTVAEDecoder(Decoder):
    """The decoder of an `AutoencoderKL` on ONNX Runtime, as the `vae` of a `DiTPipeline`."""

    session_type = ORTSession
