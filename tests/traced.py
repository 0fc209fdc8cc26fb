"""PyTorch's exporter, called once for modules and inputs that are equal, in all processes of one run of the tests.

Tracing takes 2 to 12 s of an export, and the rest 0.3 s; there are 130 exports, of 50 different graphs. What becomes of
the traced graph is done each time.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Where the folder of traced graphs is said to processes that tests start; without it they trace anew.
VARIABLE = "DIT_HUB_TESTS_TRACED"


def trace_once(trace: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """What `torch.onnx.export` does, where it was not done before.

    Args:
        trace: `torch.onnx.export`.
        folder: of the graphs.
    """
    import onnx_ir
    import torch

    class Pickler(pickle.Pickler):
        fast = True  # by value alone, whichever objects are one

        def persistent_id(self, obj: Any) -> Any:  # of a tensor its bytes; as a rule its address goes into a pickle too
            if isinstance(obj, torch.Tensor):
                plain = obj.detach().cpu().contiguous().view(-1).view(torch.uint8)
                return str(obj.dtype), tuple(obj.shape), plain.numpy().tobytes()
            return None

    def traced(module: Any, *arguments: Any, dynamic_shapes: Any = None, **options: Any) -> Any:
        if arguments:  # a test that exports by itself
            return trace(module, *arguments, **options)
        content = io.BytesIO()
        content.write(repr(dynamic_shapes).encode())
        Pickler(content).dump((module, options))
        file = folder / f"{hashlib.sha256(content.getvalue()).hexdigest()}.onnx"
        if not file.exists():
            program = trace(module, dynamic_shapes=dynamic_shapes, **options)
            building = file.with_suffix(f".{os.getpid()}")
            onnx_ir.save(program.model, building)
            building.replace(file)
        return torch.onnx.ONNXProgram(onnx_ir.load(file), None)

    return traced


def install() -> None:
    """In a process that tests started."""
    if folder := os.environ.get(VARIABLE):
        import torch

        torch.onnx.export = trace_once(torch.onnx.export, Path(folder))
