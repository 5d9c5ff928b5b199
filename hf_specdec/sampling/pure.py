"""Functions and processors that users declare to be pure: what they return depends on one row's tokens alone.

A `prefix_allowed_tokens_fn` is one as a rule, but could keep a state or count its calls. So it is taken for one only if
it says so: by an attribute `is_pure` that is True, by `pure(fn)`, or by a method that promises as much.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor

from .context import Context
from .row_processors import Constraint, Mask

F = TypeVar("F", bound=Callable[..., Any])


def pure(function: F) -> F:
    """Declare a `prefix_allowed_tokens_fn`, or a logits processor, a pure function of each row's own tokens.

    It may then be called on drafts that are rejected later, in any order, and a processor with some rows of the batch
    only, so batches need not advance in lockstep. With `HF_SPECDEC_CHECK=1`, such functions are called twice and must
    give the same result.

    Returns: the same object, with an attribute `is_pure`; a wrapper if it takes no attributes (a method).
    """
    if not callable(function):
        raise TypeError(f"Expected a function or a logits processor, got {type(function).__name__}")
    try:
        function.is_pure = True  # type: ignore[attr-defined]
        return function
    except AttributeError:
        wrapped = functools.partial(function)
        wrapped.is_pure = True  # type: ignore[attr-defined]
        return wrapped  # type: ignore[return-value]


def is_pure(function: Any) -> bool:
    """Whether a function or processor says that it is pure. lm-format-enforcer's do by what they call."""
    declared = getattr(function, "is_pure", None)
    enforcer = getattr(function, "token_enforcer", None)
    return bool(declared) if declared is not None else callable(getattr(enforcer, "get_allowed_tokens", None))


def checks() -> bool:
    """Whether what is declared pure is called twice."""
    return os.environ.get("HF_SPECDEC_CHECK", "") not in ("", "0")


def twice(function: Callable[[], Any], name: str) -> Any:
    """What a pure function returns.

    Raises:
        ValueError: if checks are on and a second call gives something else.
    """
    result = function()
    if checks():
        again = function()
        same = torch.equal(result, again) if isinstance(result, Tensor) else list(result) == list(again)
        if not same:
            raise ValueError(
                f"{name} was declared pure, but two calls with the same tokens differ: do not declare it "
                "(`hf_specdec.pure`, `is_pure`)"
            )
    return result


class PrefixConstraint(Constraint):
    """A pure `prefix_allowed_tokens_fn`."""

    def __init__(self, processor: PrefixConstrainedLogitsProcessor, vocab_size: int):
        self._processor = processor
        self._function = processor._prefix_allowed_tokens_fn
        self._vocab_size = vocab_size
        self._known: dict[int, tuple[int, dict[tuple[int, ...], Mask]]] = {}  # by row: its end, and masks by drafts

    def masks(self, context: Context, row: int, drafts: list[int], first: int) -> list[Mask | None]:
        end = context.ends[row]
        if self._known.get(row, (-1,))[0] != end:
            self._known[row] = (end, {})
        known, found = self._known[row][1], []
        mask = None
        for count in range(len(drafts) + 1):
            if mask is not None and drafts[count - 1] not in mask:
                break
            key = tuple(drafts[:count])
            if key not in known:
                known[key] = self._mask(row, context.view(end + count)[row])
            mask = known[key]
            found.append(mask)
        return [*found, *[None] * (len(drafts) + 1 - len(found))][first:]

    def _mask(self, row: int, ids: Tensor) -> Mask:
        name = f"`prefix_allowed_tokens_fn` ({getattr(self._function, '__name__', type(self._function).__name__)})"
        tokens = twice(lambda: self._function(row, ids), name)
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[list(tokens)] = True
        return Mask.of(allowed, self._processor)

    def apply(self, scores: Tensor, masks: Sequence[Mask | None]) -> Tensor:
        """By transformers' own code, which has a rule for rows that other processors leave nothing."""
        some = [i for i, mask in enumerate(masks) if mask is not None]
        if not some:
            return scores
        allowed = [masks[i].allowed.nonzero()[:, 0].tolist() for i in some]  # type: ignore[union-attr]
        processor = PrefixConstrainedLogitsProcessor(lambda i, _: allowed[i], num_beams=1)
        ids = torch.zeros(len(some), 1, dtype=torch.int64, device=scores.device)
        if len(some) == len(scores):
            return processor(ids, scores)
        result = scores.clone()
        result[some] = processor(ids, scores[some])
        return result
