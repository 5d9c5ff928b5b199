"""The protocol between the decoding loop and whatever proposes tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..models.encoder_side import EncoderSide
from ..sampling.context import Context

# Whether to draft another token, given the probabilities of the latest ones, by active row.
GoOn = Callable[[list[float]], bool]


@dataclass(frozen=True)
class Draft:
    """What a drafter proposes for the active rows of a context.

    Attributes:
        tokens: `[rows, k]` int64, k >= 0 and at most what was asked for, on the device of `Context.tokens`; so is the
            rest.
        probs: `[rows, k, vocab]` float32, the distributions the tokens were *really drawn from* (the q of the
            acceptance test), or `None` when the tokens were not drawn at all (argmax, look-up): then q is one-hot.
        lengths: how many of its k tokens each row proposes; `None` means k for all.
        valid: `[rows]` bool, False where the drafter's model gave no distribution (NaN, or nothing but -inf).
    """

    tokens: Tensor
    probs: Tensor | None = None
    lengths: list[int] | None = None
    valid: Tensor | None = None

    @property
    def row_lengths(self) -> list[int]:
        """How many tokens each row proposes."""
        return [self.tokens.shape[1]] * len(self.tokens) if self.lengths is None else self.lengths

    def cut(self, lengths: list[int]) -> "Draft":
        """The first so many tokens of each row."""
        longest = max(lengths)
        probs = None if self.probs is None else self.probs[:, :longest]
        return Draft(self.tokens[:, :longest], probs, lengths, self.valid)


def no_draft(context: Context) -> Draft:
    """Nothing, for every active row."""
    rows = len(context.rows)
    return Draft(context.tokens.new_empty(rows, 0), lengths=[0] * rows)


@dataclass(frozen=True)
class DraftRequest:
    """What a drafter may want to know about the `generate()` call that it works for, besides its context.

    Attributes:
        do_sample: whether the target samples. Drafts may be drawn then, in which case `Draft.probs` must say from what.
        vocab_size: ids below this are the target's tokens.
        processors: the call's logits processors that may be run on drafts.
        lockstep: all rows always have the same number of columns.
        prefill_chunk_size: feed at most so many tokens per row at once, `None` for all.
        static: forwards are to have fixed shapes.
        inputs: the prompt as it was given to `generate()`, where it is more than tokens; else empty.
        encoder: what the target's decoder is conditioned on, where it has an encoder.
        go_on: asked after each token but the last by drafters with `shows_confidence`; they stop when told False.
    """

    do_sample: bool
    vocab_size: int
    lockstep: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    prefill_chunk_size: int | None = None
    static: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    encoder: EncoderSide | None = None
    go_on: GoOn | None = None


class Drafter(ABC):
    """Proposes tokens for all active rows of a context. One object serves one `generate()` call at a time.

    Attributes:
        in_vocabulary: proposals are the target's tokens by construction, so that the loop need not look.
        shows_confidence: it asks `DraftRequest.go_on`, and reading its probabilities does not wait for a device.
        reads_prompts: its first proposal takes the longer, the longer the prompts are.
        compile_seconds: wall time that the last `start` took to compile.
    """

    in_vocabulary = False
    shows_confidence = False
    reads_prompts = False
    compile_seconds = 0.0

    def start(self, call: DraftRequest, context: Context) -> None:
        """A new `generate()` call begins. `context` holds the prompts; state of an earlier call must go."""

    @abstractmethod
    def propose(self, context: Context, max_tokens: int) -> Draft:
        """Up to `max_tokens` tokens for each row in `context.rows`, in that order."""

    def commit(self, context: Context) -> None:
        """The context now ends after what was committed; rejected drafts must be forgotten."""

    def end(self) -> None:
        """The `generate()` call is over."""

    @property
    def forwards(self) -> int:
        """Model forwards since `start` that drafted."""
        return 0

    @property
    def prefill_forwards(self) -> int:
        """Model forwards since `start` that only filled a cache."""
        return 0


def check_draft(draft: Draft, rows: int, max_tokens: int, vocab_size: int, drafter: Drafter) -> None:
    """Raise on proposals that break the protocol of `Drafter.propose`."""
    name = type(drafter).__name__
    if not isinstance(draft, Draft):
        raise TypeError(f"{name}.propose must return a Draft, got {type(draft).__name__}")
    tokens = draft.tokens
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(
            f"{name} proposed tokens of type {getattr(tokens, 'dtype', type(tokens))}, expected torch.int64"
        )
    if tokens.ndim != 2 or tokens.shape[0] != rows:
        raise ValueError(
            f"{name} proposed tokens of shape {tuple(tokens.shape)}, expected [{rows}, k]: one line for each active row"
        )
    if tokens.shape[1] > max_tokens:
        raise ValueError(f"{name} proposed {tokens.shape[1]} tokens per row, asked for at most {max_tokens}")
    lengths = draft.lengths
    counts = range(tokens.shape[1] + 1)
    if lengths is not None and (len(lengths) != rows or not all(isinstance(n, int) and n in counts for n in lengths)):
        raise ValueError(f"{name} gave draft lengths {lengths} for {rows} rows and {tokens.shape[1]} tokens per row")
    expected = (*tokens.shape, vocab_size)
    if draft.probs is not None and tuple(draft.probs.shape) != expected:
        raise ValueError(f"{name} gave probs of shape {tuple(draft.probs.shape)}, expected {list(expected)}")
    if not drafter.in_vocabulary and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"{name} proposed token ids from {int(tokens.min())} to {int(tokens.max())}, but the target's vocabulary "
            f"has ids 0 to {vocab_size - 1}"
        )
