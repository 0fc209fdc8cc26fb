"""What a model costs, counted on the model itself: parameters, multiply-accumulates, memory of a forward pass."""

import time
import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from .configuration_dit import DiTConfig
from .modeling_dit import DiTTransformer

# The parts of a model, and the part that a module or parameter belongs to, by the first known word of its name.
PARTS = ("embedding", "attention", "MLP", "modulation", "final")
_PART_OF = {
    **dict.fromkeys(("x_embedder", "t_embedder", "y_embedder", "pos_embed"), "embedding"),
    **dict.fromkeys(("norm1", "attn", "norm_cross", "cross_attn"), "attention"),
    **dict.fromkeys(("norm2", "mlp"), "MLP"),
    "adaLN_modulation": "modulation",
    **dict.fromkeys(("norm_final", "linear"), "final"),
}


class Size(NamedTuple):
    """Size of a model: `parameters`, and `gmacs`, 10^9 multiply-accumulates of a forward pass of one image."""

    parameters: int
    gmacs: float


class Part(NamedTuple):
    """A part of a model: `parameters`, `macs` of one image, and `peak`, the most bytes alive while it computes."""

    parameters: int
    macs: int
    peak: int


class Count(NamedTuple):
    """What a model costs for one image, in float32.

    Args:
        parts: by the names in `PARTS`; parameters and multiply-accumulates add up to the model's.
        tokens: patches of an image.
        weights: bytes of the weights and of a fixed position table.
        peak: the most bytes of activations that live at once in a forward pass; fused attention, no gradients.
    """

    parts: dict[str, Part]
    tokens: int
    weights: int
    peak: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts.values())

    @property
    def gmacs(self) -> float:
        return sum(part.macs for part in self.parts.values()) / 1e9

    @property
    def memory(self) -> int:
        """Bytes that a forward pass of one image takes: weights and activations."""
        return self.weights + self.peak


def measure(config: DiTConfig) -> Size:
    """The parameters and multiply-accumulates of a configuration, counted without memory for its weights.

    The paper's "Gflops" are multiply-accumulates; a counter of floating-point operations shows twice as many.
    """
    model, counts = _count_operations(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, sum(counts["Global"].values()) / 2e9)


def count(config: DiTConfig) -> Count:
    """What a configuration costs, by part, counted without memory for its weights. Takes a second for XL/2."""
    model, counts = _count_operations(config)
    parameters, macs = Counter[str | None](), Counter[str | None]()
    for name, parameter in model.named_parameters():
        parameters[_part_of(name)] += parameter.numel()
    for name, operations in counts.items():  # a module's count has those of its modules in it
        _, _, inside = name.partition(".")
        outer, _, last = inside.rpartition(".")
        if last in _PART_OF and _part_of(outer) is None:
            macs[_PART_OF[last]] += sum(operations.values()) // 2
    peak, peaks = _forward_memory(config)
    parts = {part: Part(parameters[part], macs[part], peaks[part]) for part in PARTS}
    height, width = (side // config.patch_size for side in config.sample_height_width)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Count(parts, height * width, held, peak)


def _part_of(name: str) -> str | None:
    return next((_PART_OF[word] for word in name.split(".") if word in _PART_OF), None)


def _count_operations(config: DiTConfig) -> tuple[DiTTransformer, dict[str, dict[Any, int]]]:
    """A model without memory, and the operations of one image by module and operator."""
    with torch.device("meta"):
        # Written-out attention: the counter does not see inside the fused one on every device.
        model = DiTTransformer._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example_inputs(config, 1, "meta"))
    return model, counter.get_flop_counts()


def example_inputs(config: DiTConfig, batch_size: int, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, timesteps and labels of the shapes that a model takes; the labels None if it has no classes."""
    latents = torch.zeros(batch_size, config.in_channels, *config.sample_height_width, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device) if config.num_classes else None
    return latents, torch.zeros(batch_size, device=device), labels


def _forward_memory(config: DiTConfig) -> tuple[int, Counter[str | None]]:
    """The most bytes that live at once in a forward pass of one image, and while each part computes."""
    with FakeTensorMode(), torch.no_grad():
        model = DiTTransformer._from_config(config, attn_implementation="sdpa").eval()
        inputs = example_inputs(config, 1, "cpu")
        with ModuleTracker() as tracker, LiveMemory(tracker) as live:
            model(*inputs)
    return live.peak, live.peaks


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live.

    Args:
        tracker: knows which modules compute.

    Attributes:
        peak: the most bytes at once.
        peaks: the same while each part of the model computes.
    """

    def __init__(self, tracker: ModuleTracker):
        super().__init__()
        self.tracker = tracker
        self.live = self.peak = 0
        self.peaks: Counter[str | None] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf) for leaf in tree_leaves((args, kwargs))}  # an operation in place makes nothing
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf) not in known and not func.is_view:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        for part in {_part_of(name) for name in self.tracker.parents}:
            self.peaks[part] = max(self.peaks[part], self.live)
        return output

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def matmul_peak(device: torch.device | str, dtype: torch.dtype, side: int, repeats: int = 20) -> float:
    """The best rate of products of two square matrices, in operations per second (two for a multiply-add)."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, side, side, device=device, generator=generator).to(dtype)
    wait = (lambda: None) if left.device.type == "cpu" else torch.accelerator.synchronize
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.matmul(left, right)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
