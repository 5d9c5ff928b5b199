"""The protocol between the decoding loop and drafters, which propose tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from ..device import to_device
from ..models.encoder_side import EncoderSide
from ..models.target import Target
from ..sampling.context import Context
from ..sampling.rules import Rule

# Whether to draft another token, given the draft's probabilities for the latest ones, by active row.
GoOn = Callable[[list[float]], bool]


@dataclass(frozen=True)
class Draft:
    """A drafter's proposals for the active rows of a context.

    Attributes:
        tokens: `[rows, k]` int64 on the device of `Context.tokens`; k is at least 0, and at most `max_tokens`.
        probs: `[rows, k, vocab]` float32, the distributions that they were *really drawn from* (q of the
            acceptance test); `None` if the tokens were not drawn at all (argmax, look-up): then q is one-hot.
        lengths: how many of the k tokens each row proposes; `None` means all of them.
        valid: `[rows]` bool, False where the draft model gave no distribution (NaN, or all -inf).
        limits: `[rows]` int64, the same as `lengths` where only the device knows: of the two, the smaller one counts.
        given: the tokens before they were cut to the vocabulary, if they may be outside it.
        confidence: by row, for each of its tokens the probability that it is accepted if those before it are, where the
            drafter knows that without waiting for a device.
    """

    tokens: Tensor
    probs: Tensor | None = None
    lengths: list[int] | None = None
    valid: Tensor | None = None
    limits: Tensor | None = None
    given: Tensor | None = None
    confidence: list[list[float]] | None = None

    @property
    def row_lengths(self) -> list[int]:
        """How many tokens each row proposes at most."""
        return [self.tokens.shape[1]] * len(self.tokens) if self.lengths is None else self.lengths

    @property
    def proposed(self) -> Tensor:
        """`[rows, k]`: the tokens as the drafter proposed them."""
        return self.tokens if self.given is None else self.given

    def lengths_on(self, device: torch.device) -> Tensor:
        """`[rows]`: how many tokens each row proposes."""
        lengths = to_device(self.row_lengths, device)
        return lengths if self.limits is None else lengths.minimum(self.limits.to(device))

    def cut(self, lengths: list[int]) -> "Draft":
        """The first so many tokens of each row."""
        longest = max(lengths)
        return replace(
            self,
            tokens=self.tokens[:, :longest],
            probs=None if self.probs is None else self.probs[:, :longest],
            lengths=lengths,
            given=None if self.given is None else self.given[:, :longest],
        )

    def up_to(self, limits: Tensor) -> "Draft":
        """At most so many tokens of each row, `[rows]` on the device."""
        return replace(self, limits=limits if self.limits is None else limits.minimum(self.limits))


def no_draft(context: Context) -> Draft:
    """Nothing, for every active row."""
    rows = len(context.rows)
    return Draft(context.tokens.new_empty(rows, 0), lengths=[0] * rows)


@dataclass(frozen=True)
class DraftRequest:
    """What a drafter may need to know about a `generate()` call, besides its context.

    Attributes:
        rule: draws draft tokens as the target's choice of tokens asks for (`Rule.draw`).
        vocab_size: ids below this are the target's tokens.
        processors: those of the call's logits processors that may be applied to drafts.
        lockstep: all rows always have the same number of columns.
        prefill_chunk_size: feed at most this many tokens per row at once; `None` for no limit.
        static: forwards should have fixed shapes.
        inputs: the prompt as given to `generate()`, if it is more than tokens; else empty.
        encoder: the encoder's side of an encoder-decoder target.
        prompt_is_embeds: the prompt has no tokens, only `inputs_embeds`.
        target: the model that verifies; only for drafters that say so with `uses_target`.
        go_on: drafters with `shows_confidence` call it after each token but the last, and stop when it returns False.
    """

    rule: Rule
    vocab_size: int
    lockstep: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    prefill_chunk_size: int | None = None
    static: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    encoder: EncoderSide | None = None
    prompt_is_embeds: bool = False
    target: Target | None = None
    go_on: GoOn | None = None

    @property
    def do_sample(self) -> bool:
        """Whether the target samples. Then drafts may be drawn, with their distributions in `Draft.probs`."""
        return self.rule.samples


class Drafter(ABC):
    """Proposes tokens for all active rows of a context. One object serves one `generate()` call at a time.

    Attributes:
        in_vocabulary: proposals are always in the target's vocabulary, so the loop need not check.
        shows_confidence: it calls `DraftRequest.go_on`, and reading its probabilities does not wait for a device.
        drafts_at_once: it makes all drafts of an iteration in one forward, so their number costs nothing.
        reads_prompts: its first proposal takes longer for longer prompts.
        uses_target: it drafts with the target itself, on its cache, or from its hidden states.
        taps_target: it reads the hidden states of the target's forwards, which then have no fixed shapes.
        cost_share: what one of its forwards costs, as a share of the target's; `None` to believe in parameters.
        compile_seconds: wall time that the last `start` spent compiling.
    """

    in_vocabulary = False
    shows_confidence = False
    drafts_at_once = False
    reads_prompts = False
    uses_target = False
    taps_target = False
    cost_share: float | None = None
    compile_seconds = 0.0

    def start(self, call: DraftRequest, context: Context) -> None:
        """A new `generate()` call begins. `context` holds the prompts; drop the state of earlier calls."""

    @abstractmethod
    def propose(self, context: Context, max_tokens: int) -> Draft:
        """Up to `max_tokens` tokens for each row in `context.rows`, in that order."""

    @property
    def refills(self) -> bool:
        """Whether `restart` can be called. `generate_many` decodes static batches with drafters that do not have it."""
        return type(self).restart is not Drafter.restart

    def restart(self, context: Context, row: int) -> None:
        """Another prompt, which `context` holds, has taken the place of a row that had ended: drop that row's state.

        The row is not active before the target has read the prompt. Other rows go on.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `restart`")

    def read(self, context: Context, count: int) -> None:
        """Read at most `count` more tokens of each active row, which will begin soon. Reading ahead is optional."""

    def commit(self, context: Context) -> None:
        """The committed tokens are in the context now; forget rejected drafts."""

    @property
    def use_of_target(self) -> str:
        """What it needs the target for, as the subject and verb of a message; for those with `uses_target`."""
        if self.taps_target:
            return "`assistant_model` is a head that reads hidden states as the target's cache is filled"
        return "`assistant_early_exit` drafts on the target's cache"

    def unread(self, context: Context) -> int:
        """How many committed tokens of the active rows, in all, it would read before it can draft."""
        return 0

    def end(self) -> None:
        """The `generate()` call is over, or has raised an error after `start`."""

    @property
    def owner(self) -> object:
        """What estimates belong to that a schedule keeps: the draft model, or else all drafters of this kind."""
        return getattr(self, "model", type(self))

    @property
    def draft_model(self) -> nn.Module | None:
        """The model that it runs; `None` where it has none, or runs parts of the target."""
        return None

    @property
    def forwards(self) -> int:
        """Model forwards since `start` that drafted."""
        return 0

    @property
    def prefill_forwards(self) -> int:
        """Model forwards since `start` that only filled a cache."""
        return 0


def check_draft(draft: Draft, rows: int, max_tokens: int, vocab_size: int, drafter: Drafter) -> None:
    """Raise an error for proposals that violate the protocol of `Drafter.propose`."""
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
            f"{name} proposed tokens of shape {tuple(tokens.shape)}, expected [{rows}, k]: one line per active row"
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


def within_vocabulary(draft: Draft, vocab_size: int) -> Draft:
    """The same with tokens that can be fed to a model. `check_proposed` sees the given ones, later and on the host."""
    return replace(draft, tokens=draft.tokens.clamp(0, vocab_size - 1), given=draft.tokens)


def check_proposed(drafted: list[list[int]], vocab_size: int, drafter: Drafter) -> None:
    """Raise a ValueError for proposals, by row, that are not tokens of the target."""
    ids = [] if drafter.in_vocabulary else [token for tokens in drafted for token in tokens]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(
            f"{type(drafter).__name__} proposed token ids from {min(ids)} to {max(ids)}, but the target's vocabulary "
            f"has ids 0 to {vocab_size - 1}"
        )
