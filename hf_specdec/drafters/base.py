"""The protocol between the decoding loop and whatever proposes tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..context import Context


@dataclass(frozen=True)
class Draft:
    """What a drafter proposes for the active rows of a context.

    Attributes:
        tokens: `[rows, k]` int64, k >= 0 and at most what was asked for.
        probs: `[rows, k, vocab]` float32, the distributions the tokens were *really drawn from* (the q of the
            acceptance test), or `None` when the tokens were not drawn at all (argmax, look-up): then q is one-hot.
        lengths: how many of its k tokens each row proposes; `None` means k for all.
        valid: `[rows]` bool, False where the drafter's model gave no distribution (NaN, or nothing but -inf).
    """

    tokens: Tensor
    probs: Tensor | None = None
    lengths: list[int] | None = None
    valid: Tensor | None = None


@dataclass(frozen=True)
class DraftRequest:
    """What a drafter may want to know about the `generate()` call that it works for.

    Attributes:
        do_sample: whether the target samples. Drafts may be drawn then, in which case `Draft.probs` must say from what.
        vocab_size: ids below this are the target's tokens.
        processors: the call's logits processors that may be run on drafts.
        device: where `Draft.tokens` and `Draft.probs` must be.
        first: by row of the batch, the column where its tokens begin.
        lockstep: all rows always have the same number of columns.
    """

    do_sample: bool
    vocab_size: int
    device: torch.device
    first: list[int]
    lockstep: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)


class Drafter(ABC):
    """Proposes tokens for all active rows of a context. One object serves one `generate()` call at a time.

    Attributes:
        in_vocabulary: proposals are the target's tokens by construction, so that the loop need not look.
    """

    in_vocabulary = False

    def start(self, request: DraftRequest, context: Context) -> None:
        """A new `generate()` call begins. `context` holds the prompts; state of an earlier call must go."""

    @abstractmethod
    def propose(self, context: Context, max_tokens: int) -> Draft:
        """Up to `max_tokens` tokens for each row in `context.rows`, in that order."""

    def commit(self, context: Context) -> None:
        """The context now ends behind what was committed; rejected drafts must be forgotten."""

    @property
    def forwards(self) -> int:
        """Model forwards since `start`."""
        return 0
