"""Plain functions that replace flash-attn's kernels, called through transformers' own integration of them.

Their inputs and outputs follow the documentation of flash-attn 2.1 and later: no masks, only lengths; queries aligned
with the end of the keys; a window counted from each query's position. Wrong use raises an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def attend(q: Tensor, k: Tensor, v: Tensor, aligned_to: str, options: dict[str, Any]) -> Tensor:
    """One row: `q` `[queries, heads, d]`, `k` and `v` `[keys, kv_heads, d]`; attention by the kernels' definition."""
    queries, keys = len(q), len(k)
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (options.get("softmax_scale") or q.shape[2] ** -0.5)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    place = torch.arange(queries)[:, None] + (keys - queries if aligned_to == "end" else 0)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if options["causal"] and not (aligned_to == "start" and queries == 1):  # as transformers calls such kernels
        seen &= torch.arange(keys) <= place
    if "window_size" in options:
        seen &= torch.arange(keys) >= place - options["window_size"][0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v)


def kernels(aligned_to: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The function for rows of equal lengths, `[rows, tokens, heads, d]`, and the one for concatenated rows."""

    def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert all(states.stride(-1) == 1 for states in (q, k, v)), "kernels need contiguous heads"
        return torch.stack([attend(*row, aligned_to, options) for row in zip(q, k, v, strict=True)])

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softcap: float = 0.0, window_size: tuple[int, int] = (-1, -1), **options: Any,
    ) -> Tensor:  # fmt: skip
        assert len(cu_seqlens_q) == len(cu_seqlens_k) and cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
        options |= {"softcap": softcap} | ({"window_size": window_size} if window_size[0] >= 0 else {})
        bounds = zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])
        return torch.cat([attend(q[a:b], k[c:d], v[c:d], aligned_to, options) for a, b, c, d in bounds])

    return dense, varlen


@contextmanager
def flash_attention(*models: PreTrainedModel, aligned_to: str = "end") -> Iterator[list[tuple[int, ...]]]:
    """Inside, `models` run on transformers' "flash_attention_2". Yields a list of all query shapes."""
    utils: Any = modeling_flash_attention_utils
    dense, varlen = kernels(aligned_to)
    shapes: list[tuple[int, ...]] = []

    def counted(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            shapes.append(tuple(q.shape))
            return kernel(q, *args, **kwargs)

        return call

    masks: list[int] = []  # their ranks; with more than two dimensions, real kernels would read foreign memory
    unpad = utils._upad_input

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *args: Any) -> Any:
        masks.append(mask.ndim)
        return unpad(q, k, v, mask, *args)

    process = utils._lazy_define_process_function(varlen)
    functions = (counted(dense), counted(varlen), None, utils._pad_input, utils._unpad_input), (process, dict)
    before = [model.config._attn_implementation for model in models]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_upad_input", watched)
        patch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
        try:
            for model in models:
                model.config._attn_implementation = "flash_attention_2"
            yield shapes
        finally:
            for model, implementation in zip(models, before):
                model.config._attn_implementation = implementation
    assert set(masks) <= {2}
