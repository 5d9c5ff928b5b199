"""Bare forwards of heads on a filled cache, as `bare.py` has them of models. What they compute does not matter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.ragged import RaggedCache
from ..drafters.heads import DFlashHead, Eagle3Head, MtpHead
from ..pairs.heads import as_head


def bare_step(draft: Any, target: PreTrainedModel, rows: int, length: int) -> Callable[[], None] | None:
    """One forward of a head that drafts, with its output layer, after `length` tokens of each row.

    Args:
        draft: the head; or a model of transformers that is one.

    Returns: `None` for kinds whose forwards depend on the drafts of the iteration, or on the target's cache.
    """
    head = as_head(draft)
    if isinstance(head, DFlashHead):
        return _block(head, target, rows, length)
    if isinstance(head, MtpHead):
        return _layer(head, target, rows, length)
    if isinstance(head, Eagle3Head) and head.parts.mask_token is None:
        return _token(head, target, rows, length)
    return None


def _token(head: Eagle3Head, target: PreTrainedModel, rows: int, length: int) -> Callable[[], None]:
    """The next token, from the head's own output for the one before."""
    cache, width = RaggedCache(rows, head.device, length + 1, length + 1), head.parts.layer.hidden_size
    embeddings: Any = head.embed_tokens if head.parts.has_embeddings else target.get_input_embeddings()
    shared = head.shared_output(target)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=embeddings.weight.device)

    @torch.inference_mode()
    def run(given: Tensor, positions: Tensor) -> Tensor:
        embedded = embeddings(ids).to(head.device, head.dtype).expand(-1, given.shape[1], -1)
        cache.prepare(given.shape[1])
        hidden: Tensor = head(given, embedded, positions, cache)
        return hidden

    run(_noise(head, rows, length, width), _positions(head, rows, 0, length))
    cache.lengths = [length] * rows
    last, at = _noise(head, rows, 1, width), _positions(head, rows, length, 1)

    @torch.inference_mode()
    def step() -> None:
        head.logits(run(last, at), shared)

    return step


def _layer(head: MtpHead, target: PreTrainedModel, rows: int, length: int) -> Callable[[], None]:
    """The same of a target's last MTP layer."""
    cache, width = RaggedCache(rows, head.device, length + 1, length + 1), head.config.hidden_size
    output: Any = target.get_output_embeddings()

    @torch.inference_mode()
    def run(given: Tensor, positions: Tensor, layer: int) -> Tensor:
        cache.prepare(given.shape[1])
        hidden: Tensor = head(given, given, positions, cache, None, layer)
        return hidden

    for layer in range(len(head.layers)):
        run(_noise(head, rows, length, width), _positions(head, rows, 0, length), layer)
    cache.lengths = [length] * rows
    last, at = _noise(head, rows, 1, width), _positions(head, rows, length, 1)

    @torch.inference_mode()
    def step() -> None:
        output(run(last, at, len(head.layers) - 1))

    return step


def _block(head: DFlashHead, target: PreTrainedModel, rows: int, length: int) -> Callable[[], None]:
    """The entry of one more token, a whole block, and the logits of all of its drafts."""
    size, width = head.parts.block_size, head.parts.layer.hidden_size
    cache = RaggedCache(rows, head.device, length + 1 + size, length + 1 + size)
    shared = head.shared_output(target)

    @torch.inference_mode()
    def remember(states: Tensor, at: Tensor) -> None:
        cache.prepare(states.shape[1])
        head.remember(states, at, cache)

    remember(_noise(head, rows, length, width), _positions(head, rows, 0, length))
    entry, place = _noise(head, rows, 1, width), _positions(head, rows, length, 1)
    block, at = _noise(head, rows, size, width), _positions(head, rows, length + 1, size)

    @torch.inference_mode()
    def step() -> None:
        cache.lengths = [length] * rows
        remember(entry, place)
        cache.lengths = [length + 1] * rows
        cache.prepare(size)
        hidden = head(block, at, cache)
        head.logits(hidden[:, -head.parts.longest :], shared)

    return step


def _noise(head: Any, rows: int, count: int, width: int) -> Tensor:
    return torch.randn(rows, count, width, device=head.device, dtype=head.dtype)


def _positions(head: Any, rows: int, begin: int, count: int) -> Tensor:
    return torch.arange(begin, begin + count, device=head.device).expand(rows, -1)
