"""CUDA graphs of another library's launches, recorded through CUDA's driver as in NVIDIA's own samples.

`torch.cuda.graph` is for what PyTorch launches: while it records, PyTorch's memory and random numbers belong to the
graph, and if a recording is refused they stay so for ever. A recording that is refused here leaves nothing behind.
"""

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads are not restricted meanwhile


class CudaGraph:
    """The launches recorded on a stream, to be launched again as one."""

    def __init__(self, driver: Any, graph: ctypes.c_void_p):
        self._driver, self._executable = driver, ctypes.c_void_p()
        _check(driver.cuGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)))
        # A graph that is still running is freed when it ends; the driver frees everything at the end of the process.
        weakref.finalize(self, driver.cuGraphExecDestroy, self._executable).atexit = False

    def launch(self, stream: int) -> None:
        """Launch it on a stream, given by its handle."""
        _check(self._driver.cuGraphLaunch(self._executable, ctypes.c_void_p(stream)))


def record(stream: int, launch: Callable[[], None], device: torch.device) -> CudaGraph | None:
    """The graph of a function's launches on a stream, which do not run; None where they cannot be recorded.

    Args:
        stream: its handle; nothing else may use it meanwhile.
        launch: raises ValueError or RuntimeError where it notices that it cannot be recorded.
        device: of the stream.
    """
    driver, graph, handle = _driver(), ctypes.c_void_p(), ctypes.c_void_p(stream)
    try:
        _check(driver.cuStreamBeginCapture_v2(handle, _THREAD_LOCAL))
        try:
            launch()
        finally:  # else the stream would record for ever
            ended = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        _check(ended)
        return CudaGraph(driver, graph)
    except (ValueError, RuntimeError):
        # CUDA's runtime keeps the error of a refused call until it is asked, as PyTorch does after its next kernel.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
        return None
    finally:
        if graph.value:
            driver.cuGraphDestroy(graph)


def _driver() -> Any:
    """CUDA's driver, which is loaded wherever a GPU computes."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA's driver refuses with CUresult {status}.")
