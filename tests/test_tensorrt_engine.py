"""What runs an engine, without a GPU: the products' interface, computed on the processor in their place."""

import contextlib
import ctypes
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dit_hub import DiTConfig
from dit_hub.export.tensorrt import TensorRTDiTTransformer, TensorRTSampler, TensorRTSession
from dit_hub.export.tensorrt_build import EngineFacts, Machine, Manifest, choose_capabilities
from dit_hub.files import check_free, file_sha256, new_folder

PROFILES = {"x": [[1], [8], [64]]}


class Product(ModuleType):
    """A TensorRT whose engines double their input. Attributes as both products may have them one day.

    Args:
        name: "tensorrt" or "tensorrt_rtx".
        refusal: what happens where a pass is recorded: None (it is), "clean" (it returns False), "in the pass" (it
            raises), "at the end" or "for the graph" (CUDA's error).
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
        self.graphs: dict[int, list[Context]] = {}  # CUDA's, by handle
        self.streams: list[Stream] = []
        self.passes: set[object] = set()
        self.copies: set[object] = set()  # of outputs
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
        (stream,) = self.product.streams
        assert self.product.copies <= stream.done  # an output is not written again before it is copied
        stream.add_to(self.product.passes)
        kind = ctypes.c_float * math.prod(self.shape)
        x, y = (np.ctypeslib.as_array(kind.from_address(self.addresses[name])) for name in "xy")
        y[:] = 2 * x


class Driver:
    """CUDA's, as far as graphs need it."""

    def __init__(self, product: Product):
        self.product = product

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:  # noqa: N802
        assert (stream.value, mode, self.product.recorded) == (7, 1, None)
        self.product.recorded = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        recorded, self.product.recorded = self.product.recorded, None
        if recorded is None or self.product.refusal in ("in the pass", "at the end"):
            return 901
        return self._new(graph, recorded)

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        return (
            801 if self.product.refusal == "for the graph" else self._new(executable, self.product.graphs[graph.value])
        )

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802
        assert stream.value == 7
        for context in self.product.graphs[executable.value]:
            context.compute()
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        del self.product.graphs[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def _new(self, pointer: Any, recorded: list[Context]) -> int:
        pointer._obj.value = max(self.product.graphs, default=0) + 1
        self.product.graphs[pointer._obj.value] = recorded
        return 0


class Stream:
    """A stream of CUDA: which work is done before what comes next."""

    cuda_stream = 7
    current: list["Stream"] = []

    def __init__(self, device: Any = None):
        self.done: set[object] = set()

    def add_to(self, kind: set[object]) -> object:
        """Work of a kind, to be done by this stream."""
        kind.add(work := object())
        self.done.add(work)
        return work

    def wait_stream(self, other: "Stream") -> None:
        self.done |= other.done

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def current(stream: Stream) -> Iterator[None]:
    """What PyTorch does in the block goes to a stream."""
    Stream.current.append(stream)
    try:
        yield
    finally:
        Stream.current.pop()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[TensorRTSession, Product]]:
    """A function (arguments of `Product`, cuda_graphs) -> its engine and it."""

    def make(
        name: str, refusal: str | None = None, cuda_graphs: bool = True, folder: Path = tmp_path
    ) -> tuple[TensorRTSession, Product]:
        product = Product(name, refusal)

        def new_stream(device: Any) -> Stream:
            product.streams.append(Stream())
            return product.streams[-1]

        def clone(tensor: torch.Tensor) -> torch.Tensor:
            stream = Stream.current[-1]
            assert product.passes <= stream.done  # what is copied has been computed
            stream.add_to(product.copies)
            return torch.empty_like(tensor).copy_(tensor)

        def mark(*_: Any) -> None:
            raise AssertionError("memory that is marked for a stream does not come back while a graph is recorded")

        monkeypatch.setitem(sys.modules, name, product)
        monkeypatch.setattr(ctypes, "CDLL", lambda library: Driver(product))
        for attribute, value in {"Stream": new_stream, "stream": current, "CUDAGraph": None,
                                 "current_stream": lambda device: Stream.current[-1]}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, attribute, value)
        monkeypatch.setattr(Stream, "current", [Stream()])
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        monkeypatch.setattr(torch.Tensor, "record_stream", mark)
        path = folder / "model.engine"
        path.write_bytes(b"")
        manifest = Manifest(name, "1", ["8.9"], "fp32", weight_streaming=False)
        return TensorRTSession(path, manifest, PROFILES, torch.device("cpu"), cuda_graphs), product

    return make


def check(engine: TensorRTSession, count: int) -> None:
    x = torch.randn(count)
    torch.testing.assert_close(engine({"x": x}), 2 * x, rtol=0, atol=0)


@pytest.mark.parametrize("refusal", ["clean", "in the pass", "at the end", "for the graph"])
def test_what_cannot_be_recorded_runs_without(load: Any, refusal: str) -> None:
    engine, product = load("tensorrt", refusal)
    for count in (3, 3, 4, 3):
        check(engine, count)
        assert not product.graphs
        assert product.recorded is None
    assert product.attempts == 1  # not again at each call, nor for other shapes
    assert len(product.contexts) == 1


def test_what_is_recorded_is_launched_as_a_graph_and_goes_with_its_engine(load: Any) -> None:
    engine, product = load("tensorrt")
    for count in (3, 4, 3, 3, 4):
        check(engine, count)
    assert product.attempts == len(product.graphs) == 2
    del engine
    assert not product.graphs


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_contexts_and_buffers_are_few(load: Any, name: str) -> None:
    engine, product = load(name)
    for count in (*range(1, 13), *range(1, 13)):
        check(engine, count)
        check(engine, count)
    assert len(product.contexts) == 4


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_without_graphs_one_context_serves_every_shape(load: Any, cuda_graphs: bool) -> None:
    engine, product = load("tensorrt", cuda_graphs=cuda_graphs)
    assert len(product.contexts) == (0 if cuda_graphs else 1)
    for count in (1, 2, 1, 3):
        check(engine, count)
    assert len(product.contexts) == (3 if cuda_graphs else 1)
    assert (product.attempts > 0) == cuda_graphs


@pytest.mark.parametrize("refusal", [None, "clean"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_streams_wait_for_each_other(load: Any, cuda_graphs: bool, refusal: str | None) -> None:
    """What a caller's stream has made is read, and what it gets is written, before either goes on."""
    engine, product = load("tensorrt", refusal, cuda_graphs)
    (own,), callers = product.streams, (Stream(), Stream())
    for caller in callers * 3:
        made = caller.add_to(set())
        with current(caller):
            check(engine, 2)
        assert made in own.done
        assert product.passes <= caller.done


@pytest.mark.parametrize("kind", [TensorRTSampler, TensorRTDiTTransformer])
def test_loops_are_not_recorded(load: Any, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, product = load("tensorrt")
    file = tmp_path / "model.engine"
    facts = EngineFacts(file_sha256(file), "", PROFILES)
    Manifest("tensorrt", "1", ["8.9"], "fp32", weight_streaming=False, engines={file.name: facts}).write(tmp_path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Machine, "this", lambda: Machine({"tensorrt": "1"}, "8.9"))
    DiTConfig().save_pretrained(tmp_path)
    engine = kind.from_pretrained(tmp_path, cuda_graphs=True)._run
    engine.device = torch.device("cpu")
    product.streams.pop(0)
    for _ in range(3):
        check(engine, 2)
    assert product.attempts == (kind is TensorRTDiTTransformer)


def test_a_cache_that_a_kill_leaves_half_written_stays_not(load: Any, tmp_path: Path) -> None:
    with new_folder(tmp_path / "export") as folder:
        (folder / "model.engine").write_bytes(b"")
    engine, _ = load("tensorrt_rtx", folder=tmp_path / "export")
    if (child := os.fork()) == 0:
        os.replace = Path.replace = Path.rename = lambda *_: os._exit(9)  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(BaseException):
            check(engine, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = {path.name for path in tmp_path.rglob("*")} - {"export", "model.engine", ".dit-hub.json"}
    assert "model.cache" in left  # what was being written
    check_free(tmp_path / "export", overwrite=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"export", "model.engine", ".dit-hub.json"}
    check(engine, 1)
    assert (tmp_path / "export" / "model.cache").read_bytes() == b"compiled"
    check_free(tmp_path / "export", overwrite=True)


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


def test_what_was_used_long_ago_goes_first(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_hub.export.tensorrt._MOST_RECORDINGS", 2)
    engine, product = load("tensorrt")
    made: list[int] = []
    waited: list[int] = []
    new_context = product.create_execution_context

    def create(config: Any) -> Any:
        if made[-1:] == [0]:
            return None
        return new_context(config)

    def run(count: int) -> None:
        shapes = set(engine._recordings)
        check(engine, count)
        made.extend(shape[0][1][0] for shape in set(engine._recordings) - shapes)

    product.create_execution_context = create
    monkeypatch.setattr(Stream, "synchronize", lambda stream: waited.append(len(made)))
    for count in (1, 2, 1, 3, 1, 2):
        run(count)
    assert made == [1, 2, 3, 2]  # 3 took the place of 2, and 2 that of 3
    # Each new one waits once to be recorded; those that take a place wait before that, for what runs there.
    assert waited == [0, 1, 2, 2, 3, 3]

    made.append(0)  # no memory for another
    with pytest.raises(ValueError, match="does the GPU have the memory"):
        check(engine, 4)
    made.pop()
    run(2)
    assert made == [1, 2, 3, 2]  # what could not be made takes no place but one
