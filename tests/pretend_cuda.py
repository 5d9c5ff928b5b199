"""A CUDA device simulated on a CPU, as far as generation and graph captures need it.

    with pretend_cuda.device() as cuda:
        pretend_cuda.move(model)
        model.generate(prompt.to("cuda"))
    cuda.waits, cuda.captures, cuda.replays

Its tensors are in the CPU's memory and report the device "cuda:0". A capture records the calls of PyTorch's functions;
a replay repeats them, on the same memory and without the surrounding Python code. Operations that would wait for the
device are counted, and raise an error during a capture.

Graphs of a pool destroy each other's memory at every replay, and their own that is older. A capture that has failed
leaves its stream as the current one, and a pool without graphs is not accepted any more, as in PyTorch. Other threads
use the device inside `with cuda:`.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import pretend_waits
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class CudaTensor(Tensor):
    """The memory of a CPU tensor; all operations on it go through the device's mode."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, stream: "Stream") -> None:
        self.waited_for.append(stream)


class Pool:
    """The handle of a memory pool."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.was_used = False
        self.lock = threading.Lock()


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    current: "Device"

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.pool = Pool()
        self.memory: list[Tensor] = []  # what the capture has allocated

    def replay(self) -> None:
        self.current.replays += 1
        self.current.replayed.add(self)
        if not self.pool.lock.acquire(blocking=False):
            self.current.overlaps += 1
            self.pool.lock.acquire()
        try:
            with torch._C.DisableTorchFunction(), torch.inference_mode():  # which may write all tensors
                for tensor in [tensor for graph in self.pool.graphs for tensor in graph.memory]:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
                for function, args, kwargs, before in self.calls:
                    for old, new in zip(before, tree_leaves(function(*args, **kwargs))):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)
        finally:
            self.pool.lock.release()

    def end(self) -> None:
        """The capture has ended."""
        known: set[int] = set()
        for _, args, kwargs, after in self.calls:
            known |= {address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            new = [leaf for leaf in after if isinstance(leaf, Tensor) and address(leaf) not in known]
            known |= {address(leaf) for leaf in new}
            self.memory += [leaf for leaf in new if not _is_expanded(leaf)]


def address(tensor: Tensor) -> int:
    """Of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that they cannot be written."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))


class _Thread(threading.local):
    in_subclass = False

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.streams: list[Stream] = []
        self.devices: list[Any] = [None]


class Device(TorchFunctionMode):
    """
    Attributes:
        waits: for each wait of the host, the reason and the line of code.
        clock: the device's time in seconds.
        captures: for each capture, the device that was the current one.
        options: for each capture, its arguments, and whether autocast may cache casts of weights.
        replays: how many graphs were launched.
        replayed: these graphs.
        overlaps: how many replays began before another one of the same pool had ended.
        total_memory: of the device, in bytes.
        fail: called in each capture before it ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.clock: Callable[[], float] = perf_counter
        self.captures: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.replays = 0
        self.replayed: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.overlaps = 0
        self.total_memory = 1 << 40
        self.fail: Callable[[], None] = lambda: None
        self.default_stream = Stream()
        self._thread = _Thread()
        self._capturing: list[tuple[int, str]] = []  # threads, with their modes of errors

    @property
    def _graph(self) -> Graph | None:
        """The graph that this thread captures."""
        return self._thread.graph

    @property
    def _is_forbidden(self) -> bool:
        """Whether waiting for the device would make a capture fail."""
        me = threading.get_ident()
        return any(thread == me or mode == "global" for thread, mode in self._capturing)

    def stream(self, device: Any = None) -> Stream:
        """The current stream of this thread."""
        return self._thread.streams[-1] if self._thread.streams else self.default_stream

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        before = self._thread.streams[:]
        self._thread.streams.append(stream)
        try:
            yield
        finally:
            self._thread.streams = before

    @contextmanager
    def capture(
        self, graph: Graph, pool: Pool | None = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.captures.append(self._thread.devices[-1])
        casts = torch.is_autocast_cache_enabled()
        self.options.append({"pool": pool, "stream": stream, "mode": capture_error_mode, "caches_casts": casts})
        if self._capturing:
            raise RuntimeError("another thread is capturing")
        if pool is not None:
            if pool.was_used and not pool.graphs:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            graph.pool, pool.was_used = pool, True
            pool.graphs.add(graph)
        self._thread.streams.append(stream or Stream())
        self._thread.graph = graph
        self._capturing.append((threading.get_ident(), capture_error_mode))
        try:
            yield
            self.fail()
        except BaseException as error:  # as in PyTorch, the stream stays the current one
            raise RuntimeError("operation failed due to a previous error during capture") from error
        else:
            self._thread.streams.pop()
            with torch._C.DisableTorchFunction():
                graph.end()
        finally:
            self._thread.graph = None
            self._capturing.pop()

    @contextmanager
    def use(self, device: Any) -> Iterator[None]:
        self._thread.devices.append(device)
        yield
        self._thread.devices.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        if not self._thread.in_subclass and (subclass := _subclass((args, kwargs))) is not None:
            self._thread.in_subclass = True
            try:
                with self:
                    return subclass.__torch_function__(func, types, args, kwargs or {})
            finally:
                self._thread.in_subclass = False
        leaves = tree_leaves((args, kwargs or {}))
        asked = [torch.device(leaf) for leaf in leaves if _is_device(leaf)]
        given = any(isinstance(leaf, CudaTensor) for leaf in leaves)
        on_cuda = asked[-1].type == "cuda" if asked else given and func is not Tensor.cpu
        if pretend_waits.mixed(func, args, kwargs or {}):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} at {pretend_waits.caller()}")
        reason = pretend_waits.wait(func, args, kwargs or {}, given, on_cuda)
        if reason is not None:
            self.wait(f"{reason} ({pretend_waits.caller()})")
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if given and not on_cuda:
            return tree_map(lambda leaf: leaf.as_subclass(Tensor).clone() if isinstance(leaf, Tensor) else leaf, out)
        if self._graph is not None:
            self._graph.calls.append((func, args, kwargs, tree_leaves(out)))
        return tree_map(lambda leaf: _on_cuda(leaf) if on_cuda and isinstance(leaf, Tensor) else leaf, out)

    def wait(self, name: str) -> None:
        """The host waits."""
        self.waits.append(name)
        if self._is_forbidden:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


class Event:
    """Stands for `torch.cuda.Event`: the time is that of `Device.clock` when it was recorded."""

    current: "Device"

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = self.current.clock()

    def synchronize(self) -> None:
        self.current.wait(f"synchronize ({pretend_waits.caller()})")

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


def _subclass(args: Any) -> Any:
    """The class of a tensor among `args` that has rules of its own for PyTorch's functions, if there is one."""
    tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return next((type(t) for t in tensors if type(t) not in (Tensor, nn.Parameter, CudaTensor)), None)


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or leaf in ("cpu", "cuda") if isinstance(leaf, (str, torch.device)) else False


def _on_cpu(leaf: Any) -> Any:
    return CPU if _is_device(leaf) else leaf


def _on_cuda(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, CudaTensor) else tensor.as_subclass(CudaTensor)


def move(model: nn.Module) -> nn.Module:
    """Move a model from the CPU to the simulated device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, CudaTensor):
                    moved = _on_cuda(tensor.detach())
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


@contextmanager
def device() -> Iterator[Device]:
    """Inside the block, there is a CUDA device."""
    cuda = Device()
    with pytest.MonkeyPatch.context() as patch, cuda:
        patch.setattr(Graph, "current", cuda, raising=False)
        patch.setattr(Event, "current", cuda, raising=False)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", cuda.capture)
        patch.setattr(torch.cuda, "graph_pool_handle", Pool)
        patch.setattr(torch.cuda, "device", cuda.use)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", cuda.stream)
        patch.setattr(torch.cuda, "stream", cuda.use_stream)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: cuda)
        yield cuda
