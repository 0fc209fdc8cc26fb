"""What runs an engine, without a GPU: the products' interface, computed on the processor in their place."""

import contextlib
import ctypes
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dit_hub.export.tensorrt import RecentlyUsed, _Engine
from dit_hub.export.tensorrt_build import Manifest, choose_capabilities

PROFILES = {"x": [[1], [8], [64]]}


class Product(ModuleType):
    """A TensorRT whose engines double their input. Attributes as both products may have them one day.

    Args:
        name: "tensorrt" or "tensorrt_rtx".
        refusal: what happens where a pass is recorded: None (it is), "clean" (it returns False), "in the pass" or "at
            the end" (CUDA's error).
    """

    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    ComputeCapability = SimpleNamespace(__members__={"SM90": 90})
    DataType = SimpleNamespace(FLOAT=0, HALF=1, BF16=2, UINT8=3)
    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    weight_streaming_budget_v2 = 0
    num_io_tensors = 2

    def __init__(self, name: str, refusal: str | None = None):
        super().__init__(name)
        self.refusal = refusal
        self.recorded: list[Context] | None = None  # while a graph is recorded
        self.attempts = 0
        self.strategy: Any = None
        self.caches = 0
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda *_: None})  # noqa: N806
        self.Logger, self.Runtime = Logger, lambda logger: self

    # Runtime, engine and configuration in one.
    def deserialize_cuda_engine(self, content: bytes) -> Any:
        return self

    def create_runtime_config(self) -> Any:
        product = self

        class Config:
            def __setattr__(self, name: str, value: Any) -> None:
                product.strategy = value

            def create_runtime_cache(self) -> Any:
                product.caches += 1
                return SimpleNamespace(serialize=lambda: b"compiled", deserialize=lambda content: True)

            def set_runtime_cache(self, cache: Any) -> None:
                pass

        return Config()

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> int:
        return int(name == "y")

    def get_tensor_dtype(self, name: str) -> int:
        return self.DataType.FLOAT

    def create_execution_context(self, config: Any) -> "Context":
        self.contexts.add(context := Context(self))
        return context


class Context:
    """Reads and writes the addresses it is given."""

    def __init__(self, product: Product):
        self.product, self.shape = product, (0,)
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        if self.product.recorded is None:
            self.compute()
            return True
        self.product.attempts += 1
        if self.product.refusal == "in the pass":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.product.recorded.append(self)
        return self.product.refusal != "clean"

    def compute(self) -> None:
        kind = ctypes.c_float * math.prod(self.shape)
        x, y = (np.ctypeslib.as_array(kind.from_address(self.addresses[name])) for name in "xy")
        y[:] = 2 * x


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[_Engine, Product]]:
    """A function (arguments of `Product`, cuda_graphs) -> its engine and it; PyTorch's streams do nothing."""

    def make(name: str, refusal: str | None = None, cuda_graphs: bool = True) -> tuple[_Engine, Product]:
        product = Product(name, refusal)

        class Stream:
            cuda_stream = 7

            def __init__(self, device: Any = None):
                pass

            def wait_stream(self, other: Any) -> None:
                pass

            def synchronize(self) -> None:
                pass

        class Graph:
            passes: list[Context] = []

            def replay(self) -> None:
                for context in self.passes:
                    context.compute()

        @contextlib.contextmanager
        def record(graph: Graph, **options: Any) -> Iterator[None]:
            product.recorded = []
            try:
                yield
                if product.refusal == "at the end":
                    raise RuntimeError("the capture was invalidated")
                graph.passes = product.recorded
            finally:
                product.recorded = None

        monkeypatch.setitem(sys.modules, name, product)
        for attribute, value in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": record,
                                 "stream": lambda stream: contextlib.nullcontext()}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, attribute, value)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        path = tmp_path / "model.engine"
        path.write_bytes(b"")
        manifest = Manifest(name, "1", ["8.9"], "fp32", weight_streaming=False)
        return _Engine(path, manifest, PROFILES, torch.device("cpu"), cuda_graphs), product

    return make


def check(engine: _Engine, count: int) -> None:
    x = torch.randn(count)
    torch.testing.assert_close(engine({"x": x}), 2 * x, rtol=0, atol=0)


@pytest.mark.parametrize("refusal", [None, "clean", "in the pass", "at the end"])
def test_what_cannot_be_recorded_runs_without(load: Any, refusal: str | None) -> None:
    engine, product = load("tensorrt", refusal)
    for _ in range(3):
        check(engine, 3)
    assert product.attempts == 1  # not again at each call


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_contexts_and_buffers_are_few(load: Any, name: str) -> None:
    engine, product = load(name)
    for count in (*range(1, 13), *range(1, 13)):
        check(engine, count)
        check(engine, count)
    assert len(product.contexts) <= 5  # one for the shapes that hold no recording, and four that do


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_without_graphs_one_context_serves_every_shape(load: Any, cuda_graphs: bool) -> None:
    engine, product = load("tensorrt", cuda_graphs=cuda_graphs)
    for count in (1, 2, 1, 3):
        check(engine, count)
    assert len(product.contexts) == (4 if cuda_graphs else 1)
    assert (product.attempts > 0) == cuda_graphs


def test_the_products_are_told_apart_by_name(load: Any, tmp_path: Path) -> None:
    """Whatever else one of them comes to offer."""
    engine, product = load("tensorrt")
    check(engine, 1)
    assert (product.strategy, product.caches, product.attempts) == (None, 0, 1)  # PyTorch records
    with pytest.raises(ValueError, match="only rtx takes compute capabilities"):
        choose_capabilities(product, ("9.0",), "fp16")
    engine, product = load("tensorrt_rtx")
    check(engine, 1)
    assert (product.strategy, product.caches, product.attempts) == ("whole", 1, 0)  # it records by itself
    assert (tmp_path / "model.cache").read_bytes() == b"compiled"
    assert choose_capabilities(product, ("9.0",), "fp16") == ["9.0"]
    engine, product = load("tensorrt_rtx", cuda_graphs=False)
    assert product.strategy is None


def test_what_was_used_long_ago_goes_first() -> None:
    gone: list[int] = []
    values = RecentlyUsed[str](2, lambda: gone.append(len(made)))
    made: list[str] = []

    def get(key: str) -> str:
        return values.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "abacab"] == list("ABACAB")
    assert made == list("abcb")  # c took the place of b, and b that of c
    assert gone == [2, 3]  # told before the next was made

    with pytest.raises(ZeroDivisionError):
        values.get("d", lambda: str(1 / 0))
    assert get("b") == "B"
    assert made == list("abcb")  # what could not be made takes no place but one
