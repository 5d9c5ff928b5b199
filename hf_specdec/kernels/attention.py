"""Decode attention that never copies K and V: the queries that share a K/V head become queries of one head.

With grouped queries and a mask, transformers repeats every K and V head for each of its query heads, at every layer of
every step. With a long context that costs more than the rest of the model. Here `[rows, heads, q, d]` queries are
viewed as `[rows, kv_heads, groups·q, d]`, which needs no copy. Prefill, and anything else that this cannot express, is
left to the function that was registered before.

On CUDA, several queries of rows of equal lengths need no mask at all: FlashAttention can align causal attention at the
last key. Such masks are made all the same, and marked (`mark_causal`), so that whoever else reads them sees a mask.

On CPUs, calls can request a compiled library instead, which is built on this machine (compiled_attention.py).

While calls of `generate(strategy="spec")` run, `sdpa` of transformers' `AttentionInterface` is this module's function,
which folds only in threads that are inside such a call. Models and configs are not touched.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..device import mask_width
from . import compiled_attention
from .swap import Swap, compiles_ours, operators

logger = logging.get_logger(__name__)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_NAME = "sdpa"
# Above this many folded queries, the copies cost little compared with the products.
_MAX_QUERIES = 256
# Arguments that a folded call does not support, unless they are None.
_UNFOLDABLE = frozenset({"position_bias", "softcap", "cache", "s_aux", "sinks"})


class _Thread(threading.local):
    calls = 0  # our nested calls in this thread
    compiled = False  # whether the innermost one uses compiled attention

    def __init__(self) -> None:
        self.causal: tuple[Tensor, ...] = ()  # masks of the last forwards that say no more than "causal"
        self.masks: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}  # mask, value when folded, folded


_thread = _Thread()


@contextmanager
def folded_attention(compiled: bool = False) -> Iterator[None]:
    """Inside, "sdpa" attention of this thread is compiled if `compiled`, else folded, where possible."""
    outer, _thread.compiled = _thread.compiled, compiled
    _thread.calls += 1
    try:
        with _exchanged():
            yield
    finally:
        _thread.compiled = outer
        _thread.calls -= 1
        if _thread.calls == 0:
            _thread.masks.clear()
            _thread.causal = ()


def mark_causal(mask: Tensor) -> Tensor:
    """Remember that a mask `[1, 1, q, k]` says: the last query sees all keys, each one before it one fewer."""
    _thread.causal = mask, *_thread.causal[:3]
    return mask


def compile_attention(models: Iterable[PreTrainedModel]) -> float:
    """Build the library for `folded_attention(compiled=True)`; warn once about models without it. Returns: seconds."""
    for model in models:
        kind = model.config._attn_implementation
        if kind != _NAME:
            logger.warning_once(
                f"Attention of {type(model).__name__} is {kind!r}, and only {_NAME!r} is compiled: "
                f"load the model with `attn_implementation={_NAME!r}`, if it supports that."
            )
    return compiled_attention.build()


def _attend(
    original: AttentionFunction,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if (
        _thread.calls
        and dropout == 0.0
        and (_UNFOLDABLE.isdisjoint(kwargs) or all(kwargs.get(name) is None for name in _UNFOLDABLE))
    ):
        if torch.compiler.is_compiling():
            if compiles_ours() and attention_mask is not None and _is_decoding(query, key, attention_mask):
                return torch.ops.hf_specdec.attention(query, key, value, attention_mask, scaling), None
        elif _compiles(query, key, value, attention_mask):
            return compiled_attention.attend(query, key, value, attention_mask, scaling), None
        elif _flashes(query, key, value, attention_mask):
            return flashed(query, key, value, scaling), None
        elif _folds(query, key, attention_mask):
            return folded(query, key, value, attention_mask, scaling), None
    return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _compiled_step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    if _compiles(query, key, value, mask):
        return compiled_attention.attend(query, key, value, mask, scaling)
    return folded(query, key, value, mask, scaling)


def _fake_step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    rows, heads, queries, _ = query.shape
    return query.new_empty(rows, queries, heads, value.shape[3])


operators.define("attention(Tensor query, Tensor key, Tensor value, Tensor mask, float? scaling) -> Tensor")
operators.impl("attention", _compiled_step, "CompositeExplicitAutograd")
torch.library.register_fake("hf_specdec::attention", _fake_step, lib=operators)

_exchanged = Swap(
    lambda: ALL_ATTENTION_FUNCTIONS[_NAME],
    functools.partial(AttentionInterface.register, _NAME),
    lambda original: functools.partial(_attend, original),
)


def _is_decoding(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether there are few queries, with a mask or just one; several without a mask are a causal prefill."""
    heads, queries = query.shape[1:3]
    if heads // key.shape[1] * queries > _MAX_QUERIES:
        return False
    return queries == 1 if mask is None else mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == queries


def _compiles(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    decodes = _thread.compiled and _is_decoding(query, key, mask)
    return decodes and compiled_attention.takes(query, key, value, mask)


def _flashes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if query.device.type != "cuda" or not any(known is mask for known in _thread.causal):
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, query.shape[1] != key.shape[1]))


def flashed(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Causal attention of the last queries, by FlashAttention where it can be used.

    Args:
        query: `[rows, heads, q, d]`.
        key, value: `[rows, kv_heads, k, d]`; heads is a multiple of kv_heads.
        scaling: factor of the scores; by default `1 / sqrt(d)`.

    Returns: `[rows, q, heads, d]`.
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _folds(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    # SDPA is fast for a single query without a mask, except on CPUs in half precision.
    if mask is None and (query.dtype == torch.float32 or query.device.type != "cpu"):
        return False
    groups, rest = divmod(query.shape[1], key.shape[1])
    return groups > 1 and rest == 0 and _is_decoding(query, key, mask)


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None) -> Tensor:
    """Attention with grouped queries, without copying `key` or `value`.

    Args:
        query: `[rows, heads, q, d]`.
        key, value: `[rows, kv_heads, k, d]`; heads is a multiple of kv_heads.
        mask: `[rows or 1, 1, q, k]`, bool (True = attend) or additive; `None` attends to everything.
        scaling: factor of the scores; by default `1 / sqrt(d)`.

    Returns: `[rows, q, heads, d]`, as transformers' attention functions do.
    """
    rows, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if mask is not None:
        mask = _folded_mask(mask, groups, query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, heads // groups, groups * queries, width), key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(rows, heads, queries, value.shape[3]).transpose(1, 2).contiguous()


def _folded_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[rows, 1, groups·q, k]`, additive; made once per forward, not once per layer."""
    counts = not mask.is_inference()  # inference mode counts no changes: compare values, which on CUDA would wait
    if not counts and mask.device.type != "cpu":
        return _fold_mask(mask, groups, dtype)
    name = (id(mask), mask._version if counts else -1, groups, dtype)
    known = _thread.masks.get(name)
    if known is None or not (counts or torch.equal(known[1], mask)):
        if len(_thread.masks) >= 4:  # layer types of one forward, or target and draft; older ones are no longer needed
            _thread.masks.clear()
        # Keeping `mask` alive prevents reuse of its id.
        known = _thread.masks[name] = mask, mask if counts else mask.clone(), _fold_mask(mask, groups, dtype)
    return known[2]


def _fold_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    additive = mask
    if mask.dtype == torch.bool:
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        additive.masked_fill_(~mask, torch.finfo(dtype).min)
    rows, _, queries, keys = mask.shape
    folded = additive.new_empty(rows, groups, queries, mask_width(keys, mask.device))[..., :keys]
    return folded.copy_(additive.expand_as(folded)).view(rows, 1, groups * queries, keys)
