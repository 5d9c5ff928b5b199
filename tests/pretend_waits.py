"""Which calls of PyTorch's functions make the host wait for a CUDA device, as far as their arguments show it."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Functions that pass tensor values to Python, or whose result has a shape that depends on values.
_READ = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal,
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__,
    torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, torch.unique_consecutive, torch.bincount,
    Tensor.bincount, torch.allclose, Tensor.allclose,
}  # fmt: skip
_REPEAT = {torch.repeat_interleave, Tensor.repeat_interleave}
_FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
_INDEX = {Tensor.__getitem__, Tensor.__setitem__}
_COPY = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.copy_}


def wait(func: Any, args: Any, kwargs: Any, given: bool, on_cuda: bool) -> str | None:
    """Why a call waits; `None` if it only queues work.

    Args:
        given: any tensor among the arguments is on the device.
        on_cuda: the result is.
    """
    name = getattr(func, "__name__", str(func))
    if given and func in _READ:
        return name
    if given and func in _REPEAT and "output_size" not in kwargs and isinstance(args[1], Tensor):
        return f"{name} by a tensor"
    if on_cuda and func in _FROM_HOST and not any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in args[:1]):
        return f"{name} on the device"
    if given and func in _INDEX and (reason := _index(args, func)) is not None:
        return f"{name} by {reason}"
    crosses = given != on_cuda or (func is Tensor.copy_ and args[0].is_cuda != args[1].is_cuda)
    if crosses and func in _COPY and not _is_non_blocking(func, args, kwargs):
        return f"{name}, to the {'device' if on_cuda else 'host'}"
    if given and not on_cuda and func not in _COPY:
        return name
    return None


def _index(args: Any, func: Any) -> str | None:
    for index in args[1] if isinstance(args[1], tuple) else (args[1],):
        if isinstance(index, list):
            return "a list"
        if isinstance(index, Tensor) and index.ndim and not index.is_cuda:
            return "a tensor on the host"
        if isinstance(index, Tensor) and not index.ndim:
            return "a single number on the device"
        sets_one = func is Tensor.__setitem__ and not (isinstance(args[2], Tensor) and args[2].ndim)
        if isinstance(index, Tensor) and index.dtype == torch.bool and not sets_one:
            return "a mask"
    if func is Tensor.__setitem__ and isinstance(args[2], Tensor) and args[2].ndim and not args[2].is_cuda:
        return "place, to the device"
    return None


def _is_non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    if kwargs.get("non_blocking"):
        return True
    return func in (Tensor.copy_, Tensor.to) and any(value is True for value in args[2:])


def mixed(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call mixes tensors of device and host, which CUDA refuses; single numbers may be on the host."""
    if func in _COPY | _INDEX | _FROM_HOST:
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return any(t.is_cuda for t in tensors) and any(not t.is_cuda and t.ndim for t in tensors)


def caller() -> str:
    """The innermost line of hf_specdec, with that of transformers which it called."""
    frame, through = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/hf_specdec/" in name:
            return f"{name.rsplit('/hf_specdec/', 1)[1]}:{frame.f_lineno}{through}"
        if "/transformers/" in name and not through:
            through = f" through {name.rsplit('/transformers/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return through or "?"
