"""What a process sends and computes, counted: the collectives and messages of torch.distributed, and operations."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_KINDS = {
    "all_gather": ("all_gather_into_tensor", "all_gather_single", "_allgather_base_", "allgather_"),
    "all_reduce": ("all_reduce", "all_reduce_", "allreduce_"),
    "all_to_all": ("all_to_all_single", "alltoall_base_"),
    "broadcast": ("broadcast", "broadcast_"),
    "send": ("send",),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
_FAMILIES = ("c10d", "_c10d_functional", "c10d_functional")


class CountedSends(TorchDispatchMode):
    """Counts by kind the calls, and the bytes of this process' part of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        family, _, name = func._schema.name.partition("::")
        if family in _FAMILIES and name in _KIND_OF:
            own = args[1] if name in ("allgather_", "_allgather_base_", "alltoall_base_") else args[0]
            self.calls[_KIND_OF[name]] += 1
            self.sizes[_KIND_OF[name]] += sum(leaf.nbytes for leaf in tree_leaves(own) if isinstance(leaf, Tensor))
        elif family in _FAMILIES and name not in ("wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier"):
            self.unknown.add(name)
        return func(*args, **(kwargs or {}))


def counted(function: Any) -> tuple[dict[str, tuple[int, int]], int]:
    """Calls and bytes by kind, and the operations, of a call."""
    with FlopCounterMode(display=False) as flops, CountedSends() as sends:
        function()
    assert not sends.unknown, sends.unknown
    return {kind: (calls, sends.sizes[kind]) for kind, calls in sends.calls.items()}, flops.get_total_flops()
