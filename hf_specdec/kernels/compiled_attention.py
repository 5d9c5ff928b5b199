"""Decode attention in C++ for CPUs (`decode_attention.cpp`), built on request by this machine's compiler.

PyTorch's attention takes three times as long as reading keys and values from memory; this one takes hardly longer. The
library is built once per machine, in about two seconds, and kept in `~/.cache/hf_specdec` (`$XDG_CACHE_HOME`).
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .machine import cache_folder

logger = logging.get_logger(__name__)

_SOURCE = Path(__file__).with_name("decode_attention.cpp")
# No fast math: it would optimize the rounding away and assume that there are no infinities.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
_DTYPES = (torch.float32, torch.bfloat16)
# Columns of values summed together (SLICE in the C++ code).
_SLICE = 32


def find_compiler() -> str | None:
    """The C++ compiler that builds the library: `$CXX`, or the machine's default."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    return next(filter(None, map(shutil.which, names)), None)


def build() -> float:
    """Build the library, unless this process has loaded it already; if that fails, warn once. Returns: seconds."""
    began, loaded = perf_counter(), _function.cache_info().misses
    _function()
    return perf_counter() - began if _function.cache_info().misses > loaded else 0.0


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` supports these inputs; shapes as there."""
    return (
        _function() is not None
        and all(type(x) is Tensor and x.device.type == "cpu" and x.dtype == query.dtype for x in (query, key, value))
        and query.dtype in _DTYPES
        and all(x.stride(3) == 1 for x in (query, key, value))
        and query.shape[1] % key.shape[1] == query.shape[3] % 2 == value.shape[3] % _SLICE == 0
        and (mask is None or _takes_mask(mask, (query.shape[0], 1, query.shape[2], key.shape[2])))
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    )


def _takes_mask(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.dtype == torch.bool and mask.shape[1:] == shape[1:] and mask.shape[0] in (1, shape[0])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None) -> Tensor:
    """Attention for few queries that reads keys and values in place; only for inputs that `takes` accepts.

    Args:
        query: `[rows, heads, q, d]`, float32 or bfloat16.
        key, value: `[rows, kv_heads, k, d]`; heads is a multiple of kv_heads.
        mask: `[rows or 1, 1, q, k]`, bool (True = attend); `None` attends to everything.
        scaling: factor of the scores; by default `1 / sqrt(d)`.

    Returns: `[rows, q, heads, d]`, zeros where a query attends to nothing.
    """
    function = _function()
    assert function is not None
    rows, heads, queries, width = query.shape
    _, kv_heads, keys, value_width = value.shape
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    # A mask shared by all rows has a row stride of 0.
    mask_strides = (0, 0) if mask is None else mask.expand(rows, 1, queries, keys).stride()[:3:2]
    sizes = (rows, kv_heads, heads // kv_heads, queries, keys, width, value_width)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides)
    out = query.new_empty(rows, queries, heads, value_width)
    function(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        (ctypes.c_int64 * 18)(*sizes, *strides),
        query.dtype == torch.bfloat16,
        (width**-0.5 if scaling is None else scaling) * math.log2(math.e),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def _function() -> Callable[..., None] | None:
    try:
        function: Any = ctypes.CDLL(str(_library())).decode_attention
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning_once(f"Attention could not be compiled, so PyTorch's is used: {reason}")
        return None
    pointer = ctypes.c_void_p
    function.argtypes = (*(pointer,) * 6, ctypes.c_int, ctypes.c_float, ctypes.c_int)
    function.restype = None
    built: Callable[..., None] = function
    return built


def _library() -> Path:
    """The library for this source, compiler and processor, built if it does not exist."""
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found: install one (g++, clang++), or name it in $CXX")

    def run(*arguments: str) -> bytes:
        return subprocess.run([compiler, *_FLAGS, *arguments], check=True, capture_output=True, text=False).stdout

    # Predefined macros identify compiler version and processor features: machines may share a home folder.
    kind = hashlib.sha256(_SOURCE.read_bytes() + run("-dM", "-E", "-x", "c++", os.devnull)).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"decode_attention-{kind}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            run(str(_SOURCE), "-o", str(made))
            made.replace(library)  # atomic: nobody loads half of it
    return library
