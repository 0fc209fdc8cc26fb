"""Options of the runtimes that run exports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import whole_number

# Far more than help, and few enough to start.
_MOST_THREADS = 1024

# An execution provider of ONNX Runtime: its name, or that and its options.
Provider = str | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of runtimes other than PyTorch; each takes those that it has.

    Args:
        providers: ONNX Runtime's execution providers, the preferred first: names, or pairs of a name and its options,
            such as `("CUDAExecutionProvider", {"device_id": 1})`. None means the CPU.
        num_threads: threads within an operator, on processors, at most 1024; None means one per core.
        cuda_graphs: record TensorRT's launches once for each shape and replay them, which takes the processor out of
            the loop; the inputs and outputs of each shape then stay on the GPU.

    Raises:
        ValueError: a number of threads that is none, or out of range.
    """

    providers: Sequence[Provider] | None = None
    num_threads: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.num_threads is not None:
            whole_number("num_threads", self.num_threads, 1, _MOST_THREADS)


def few_batch_sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … up to `most`, which is the last: where each number of rows costs a compilation."""
    sizes = [size for power in range(most.bit_length()) for size in (2**power, 3 * 2**power) if size < most]
    return [*sorted(sizes), most]
