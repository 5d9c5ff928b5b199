"""What is kept of a model between calls: caches of fixed capacity, with the graphs and compiled code on them.

A call borrows them, so that no other call can use them meanwhile, and gives them back however it ends. Calls of one
model that run at once, or with other numbers of rows, each leave their own. The least recently used go first.
"""

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cache.ragged import RaggedCache
from ..device import current_stream
from ..kernels import packing
from .compiled import HOOKED, has_adapters
from .graphs import WIDTHS, StaticForwards, bucket
from .parts import Parts, parts_of

logger = logging.get_logger(__name__)

# The most memory to keep between calls, over all models: this share of a CUDA device's memory on each, elsewhere so
# many bytes.
SHARE_OF_DEVICE = 0.25
MOST_BYTES = 4 << 30


class _Kept(NamedTuple):
    forwards: StaticForwards
    stream: object  # the CUDA stream that owns the storage; work on another one would not wait for it
    number: int  # later ones are larger


_kept: "weakref.WeakKeyDictionary[nn.Module, list[_Kept]]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_numbers = itertools.count()


def borrow(
    model: PreTrainedModel,
    rows: int,
    device: torch.device,
    capacity: int,
    compiles: Sequence[int] = (),
    widths: Sequence[int] = (),
) -> tuple[RaggedCache, StaticForwards]:
    """An empty cache of at least `capacity` slots and a block, and the forwards on it.

    Those of an earlier call are reused where they fit and the model's parts have not changed.

    Args:
        compiles: the widths to compile, unless that has been done.
        widths: the widths that the call can need; on CUDA their graphs are captured, unless that has been done.
    """
    capacity += WIDTHS[-1]
    parts = parts_of(model)
    captures = _can_be_captured(model, device, parts)
    stored = bucket(rows) if captures else rows
    forwards = _take(model, parts, compiles, (stored, device, capacity))
    if forwards is None:
        if compiles:
            step = max(256, 1 << capacity.bit_length() - 3)  # a somewhat longer call can reuse the compiled code
            capacity = -(-capacity // step) * step
        forwards = StaticForwards(RaggedCache(rows, device, capacity, capacity, storage_rows=stored), compiles)
    else:
        forwards.cache.clear(rows)
    forwards.begin(parts, captures)
    forwards.compile(model)
    if not has_adapters(model):  # as nothing is kept of it, only what is needed more than once is worth a capture
        forwards.capture(model, widths)
    return forwards.cache, forwards


def give_back(model: PreTrainedModel, forwards: StaticForwards) -> None:
    """The call is over: keep its cache and forwards for the next one."""
    if has_adapters(model):  # captured graphs would not notice a switch of adapters between calls
        return
    device = forwards.cache.device
    most = _most_bytes(device)
    if forwards.nbytes > most:
        logger.warning_once(
            f"The cache of {type(model).__name__} takes {forwards.nbytes / 2**30:.1f} GiB and is not kept for the next "
            f"call, which will make a new one: at most {most / 2**30:.1f} GiB are kept on {device}."
        )
        return
    with _lock:
        _kept.setdefault(model, []).append(_Kept(forwards, current_stream(device), next(_numbers)))
        on_device = [(kept, own) for own in _kept.values() for kept in own if kept.forwards.cache.device == device]
        total = sum(kept.forwards.nbytes for kept, _ in on_device)
        for kept, own in sorted(on_device, key=lambda pair: pair[0].number):
            if total <= most:
                break
            own.remove(kept)
            total -= kept.forwards.nbytes


def release(model: nn.Module | None = None) -> None:
    """Free the memory that is kept between calls of `generate(strategy="spec")`; models themselves are untouched.

    That is caches of fixed size with their CUDA graphs and compiled code (`cache_implementation="static"`,
    `speculation_compile`), and packed weights (`speculation_pack_weights`). The next call makes what it needs anew.
    Calls in progress go on, and leave what they use when they end. On CUDA the memory goes back to PyTorch;
    `torch.cuda.empty_cache()` gives it back to the device.

    Args:
        model: a target or a draft; by default what is kept of all models is freed.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"release() takes a model, or nothing for all models, got {type(model).__name__}")
    with _lock:
        if model is None:
            _kept.clear()
        else:
            for module in model.modules():  # it may be a wrapper around the model that generates
                _kept.pop(module, None)
    packing.forget(model)


def _take(
    model: PreTrainedModel, parts: Parts, compiles: Sequence[int], size: tuple[int, torch.device, int]
) -> StaticForwards | None:
    """Kept forwards that suit a call, the latest ones. Those that no call can use any more are dropped.

    Args:
        size: the rows to store, the device, and the least capacity.
    """
    rows, device, capacity = size
    chosen, left = None, []
    with _lock:
        for kept in _kept.pop(model, []):
            forwards, cache = kept.forwards, kept.forwards.cache
            if (forwards.parts.kind, forwards.parts.hooked) != (parts.kind, parts.hooked) or cache.device != device:
                continue
            alike = (forwards.compiles, forwards.parts.modes, kept.stream) == (
                compiles,
                parts.modes,
                current_stream(device),
            )
            if alike and cache.storage_rows == rows:
                if cache.capacity >= capacity:
                    chosen, unused = kept, chosen
                    left += [unused] if unused else []
                continue  # a larger one will take its place
            left.append(kept)
        if left:
            _kept[model] = left
    return None if chosen is None else chosen.forwards


def _can_be_captured(model: PreTrainedModel, device: torch.device, parts: Parts) -> bool:
    """Whether replays do what forwards do; logs once why not."""
    if device.type != "cuda":
        return False
    reason = HOOKED if parts.hooked else "it is in train mode" if model.training else ""
    if reason:
        logger.warning_once(f"{type(model).__name__} runs without CUDA graphs: {reason}.")
    return not reason


def _most_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return MOST_BYTES
    return int(SHARE_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory)
