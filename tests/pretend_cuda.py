"""A CUDA device simulated on a CPU, as far as generation and graph captures need it.

    with pretend_cuda.device() as cuda:
        pretend_cuda.move(model)
        model.generate(prompt.to("cuda"))
    cuda.waits, cuda.captures, cuda.replays

Its tensors are in the CPU's memory and report the device "cuda:0". A capture records the calls of PyTorch's functions;
a replay repeats them, on the same memory and without the surrounding Python code. Operations that would wait for the
device are counted, and raise an error during a capture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Functions that pass tensor values to Python.
_WAITS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal,
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
}  # fmt: skip


class CudaTensor(Tensor):
    """The memory of a CPU tensor; all operations on it go through the device's mode."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    current: "Device"

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []

    def replay(self) -> None:
        self.current.replays += 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, before in self.calls:
                for old, new in zip(before, tree_leaves(function(*args, **kwargs))):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Device(TorchFunctionMode):
    """
    Attributes:
        waits: names of the functions that made the host wait.
        captures: for each capture, the device that was the current one.
        replays: how many graphs were launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.captures: list[Any] = []
        self.replays = 0
        self.current: list[Any] = [None]
        self._graph: Graph | None = None

    @contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.captures.append(self.current[-1])
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None

    @contextmanager
    def use(self, device: Any) -> Iterator[None]:
        self.current.append(device)
        yield
        self.current.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        leaves = tree_leaves((args, kwargs or {}))
        asked = [torch.device(leaf) for leaf in leaves if _is_device(leaf)]
        given = any(isinstance(leaf, CudaTensor) for leaf in leaves)
        on_cuda = asked[-1].type == "cuda" if asked else given and func is not Tensor.cpu
        if given and (func in _WAITS or not on_cuda):
            self.waits.append(getattr(func, "__name__", str(func)))
            if self._graph is not None:
                raise RuntimeError(f"operation not permitted when stream is capturing: {self.waits[-1]}")
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if self._graph is not None:
            self._graph.calls.append((func, args, kwargs, tree_leaves(out)))
        return tree_map(lambda leaf: _on_cuda(leaf) if on_cuda and isinstance(leaf, Tensor) else leaf, out)


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


class _Stream:
    def wait_stream(self, stream: "_Stream") -> None: ...


@contextmanager
def device() -> Iterator[Device]:
    """Inside the block, there is a CUDA device."""
    cuda = Device()
    with pytest.MonkeyPatch.context() as patch, cuda:
        patch.setattr(Graph, "current", cuda, raising=False)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", cuda.capture)
        patch.setattr(torch.cuda, "device", cuda.use)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        yield cuda
