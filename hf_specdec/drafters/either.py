"""Either: of a draft model and a drafter that copies, the one that is expected to have more tokens accepted, by row."""

import copy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..device import to_device
from ..sampling.context import Context
from .base import Draft, Drafter, DraftRequest
from .parallel import drafter_of
from .suffix import as_far_as_it_pays, score

_PRIOR = 2.0  # tokens that a draft of the model is expected to bring, before any was seen
_GAIN = 0.03  # the least weight of a new outcome
_DOUBT, _KEPT = 10.0, 0.98  # tokens that copies are believed without any outcome; weight of one after an iteration


class Either(Drafter):
    """Each row takes the draft of `suffix` where it promises more than drafts of the model have brought so far.

    It promises the tokens that `suffix` expects to be accepted, fewer as far as earlier promises were not kept.
    Where all rows take its drafts, the model does not run; it reads what it has missed when it drafts again.

    Args:
        model_draft: a draft model, or any drafter.
        suffix: a drafter that says how sure it is (`Draft.confidence`), such as `SuffixDrafter`.

    Raises:
        TypeError, ValueError: if these are not drafters, or not two, or draft on the target's cache or states.
    """

    def __init__(self, model_draft: PreTrainedModel | Drafter, suffix: Drafter):
        if not isinstance(model_draft, (Drafter, torch.nn.Module)):
            raise TypeError(
                f"`model_draft` must be a transformers model or a hf_specdec.Drafter, got {type(model_draft).__name__}"
            )
        if not isinstance(suffix, Drafter):
            raise TypeError(f"`suffix` must be a hf_specdec.Drafter, got {type(suffix).__name__}")
        if getattr(model_draft, "uses_target", False) or suffix.uses_target:
            raise ValueError(
                "hf_specdec.Either cannot use drafters that work on the target's own cache or hidden states: "
                "pass others"
            )
        if suffix is model_draft:
            raise ValueError("`model_draft` and `suffix` are the same drafter: pass two")
        self.first = model_draft if isinstance(model_draft, Drafter) else drafter_of(model_draft)
        self.given_model = None if isinstance(model_draft, Drafter) else model_draft
        self.suffix = suffix
        self.in_vocabulary = self.first.in_vocabulary and suffix.in_vocabulary
        self.shows_confidence = self.first.shows_confidence
        self.reads_prompts = self.first.reads_prompts
        self.drafts_at_once = self.first.drafts_at_once
        self._seen, self._mean = 0, _PRIOR  # drafts of the model that were judged, tokens that each brought
        # By row, its end before the iteration: of rows that take the model's draft, and of those that copy beside them.
        self._asked: dict[int, int] = {}
        self._promised: dict[int, tuple[int, float]] = {}  # of all that copy, with what was expected of their drafts
        self._brought = self._hoped = 0.0  # what copies have brought, and what was expected of them
        self._copied: dict[int, int] = {}

    @property
    def owner(self) -> object:
        return self

    @property
    def model(self) -> PreTrainedModel:
        """The draft model, if there is one."""
        return getattr(self.first, "model")  # noqa: B009

    @property
    def draft_model(self) -> torch.nn.Module | None:
        return self.first.draft_model

    @property
    def cached(self) -> object:
        """The draft model with its cache, if there is one."""
        return getattr(self.first, "cached")  # noqa: B009

    @property
    def own(self) -> Context:
        """The text in the draft's tokens, if they are not the target's."""
        return getattr(self.first, "own")  # noqa: B009

    @property
    def takes_ragged_rows(self) -> bool:
        return bool(getattr(self.first, "takes_ragged_rows", True))

    @property
    def forwards(self) -> int:
        return self.first.forwards + self.suffix.forwards

    @property
    def prefill_forwards(self) -> int:
        return self.first.prefill_forwards + self.suffix.prefill_forwards

    def expected(self, max_tokens: int) -> float:
        """How many tokens of the model's draft are expected to be accepted, by earlier iterations."""
        return min(self._mean, max_tokens)

    def start(self, call: DraftRequest, context: Context) -> None:
        self._call, self._asked, self._copied, self._promised = call, {}, {}, {}
        self.first.start(replace(call, go_on=None if call.go_on is None else self._go_on), context)
        try:
            self.suffix.start(replace(call, go_on=None), context)
        except BaseException:
            self.first.end()  # else it would not be told that this call is over
            raise
        self.compile_seconds = self.first.compile_seconds + self.suffix.compile_seconds

    def propose(self, context: Context, max_tokens: int) -> Draft:
        copied = self.suffix.propose(context, max_tokens)
        if copied.confidence is None:
            raise ValueError(
                f"{type(self.suffix).__name__} does not say how sure it is of its drafts (`Draft.confidence`), so "
                "hf_specdec.Either cannot compare them: pass a drafter that does, such as SuffixDrafter"
            )
        expected = self.expected(max_tokens)
        trust = (self._brought + _DOUBT) / (self._hoped + _DOUBT)
        self._copies = [sure if trust * score(sure) > expected else None for sure in copied.confidence]
        ends = list(zip(context.rows, context.active_ends, self._copies))
        self._asked = {row: end for row, end, copy in ends if copy is None}
        if not self._asked:
            copied = copied if self._call.go_on is None else as_far_as_it_pays(copied, self._call.go_on)
            self._promise(ends, copied)
            return copied
        self._copied = {row: end for row, end, copy in ends if copy is not None}
        self._steps, self._stopped = 0, False
        made = self.first.propose(context, max_tokens)
        if not self._copied:
            return made
        if self._stopped:
            copied = copied.cut([min(length, self._steps) for length in copied.row_lengths])
        self._promise(ends, copied)
        return _mixed(made, copied, [copy is not None for copy in self._copies], self._call.vocab_size)

    def _promise(self, ends: list[tuple[int, int, list[float] | None]], copied: Draft) -> None:
        """Keep what is expected of the rows that copy, as far as their drafts go."""
        rows = zip(ends, copied.row_lengths)
        self._promised = {row: (end, score(sure[:n])) for (row, end, sure), n in rows if sure is not None}

    def _go_on(self, confidence: list[float]) -> bool:
        """What the model's drafter asks after each token: the rows that copy are as sure as their copies."""
        go_on, at = self._call.go_on, self._steps
        assert go_on is not None
        self._steps += 1
        rows = zip(confidence, self._copies)
        sure = [own if copy is None else (copy[at] if at < len(copy) else 0.0) for own, copy in rows]
        self._stopped = not go_on(sure)
        return not self._stopped

    def commit(self, context: Context) -> None:
        for row, end in self._asked.items():
            self._seen += 1
            brought = max(context.ends[row] - end - 1, 0)
            self._mean += max(1 / (self._seen + 2), _GAIN) * (brought - self._mean)
        self._brought, self._hoped = _KEPT * self._brought, _KEPT * self._hoped
        for row, (end, promised) in self._promised.items():
            self._brought += max(context.ends[row] - end - 1, 0)
            self._hoped += promised
        self.suffix.commit(context)
        if self._copied:  # there the model has drafted too, but others' tokens were committed: as after a rejection
            first_only = copy.copy(context)
            first_only.ends = [min(self._copied.get(row, end) + 1, end) for row, end in enumerate(context.ends)]
            self.first.commit(first_only)
        self.first.commit(context)
        self._asked, self._copied, self._promised = {}, {}, {}

    @property
    def refills(self) -> bool:
        return self.first.refills and self.suffix.refills

    def restart(self, context: Context, row: int) -> None:
        self.first.restart(context, row)
        self.suffix.restart(context, row)

    def read(self, context: Context, count: int) -> None:
        self.first.read(context, count)
        self.suffix.read(context, count)

    def unread(self, context: Context) -> int:
        return self.first.unread(context) + self.suffix.unread(context)

    def end(self) -> None:
        try:
            self.first.end()
        finally:
            self.suffix.end()


def _mixed(made: Draft, copied: Draft, copies: list[bool], vocab_size: int) -> Draft:
    """The rows of `copied` where `copies` says so, else those of `made`."""
    width = max(made.tokens.shape[1], copied.tokens.shape[1])
    here = to_device(copies, made.tokens.device)
    probs = None
    if made.probs is not None or copied.probs is not None:
        probs = torch.where(here[:, None, None], _q(copied, width, vocab_size), _q(made, width, vocab_size))
    return Draft(
        torch.where(here[:, None], _padded(copied, width), _padded(made, width)),
        probs,
        [pair[copy] for copy, *pair in zip(copies, made.row_lengths, copied.row_lengths)],
        _chosen(here, copied.valid, made.valid, True),
        _chosen(here, copied.limits, made.limits, width),
    )


def _padded(draft: Draft, width: int) -> Tensor:
    """`[rows, width]`: its tokens, filled with 0."""
    return torch.nn.functional.pad(draft.tokens, (0, width - draft.tokens.shape[1]))


def _q(draft: Draft, width: int, vocab_size: int) -> Tensor:
    """`[rows, width, vocab]`: the distributions that its tokens were drawn from; one-hot for those that were not."""
    tokens = _padded(draft, width).clamp(0, vocab_size - 1)
    q = torch.zeros(*tokens.shape, vocab_size, device=tokens.device).scatter_(-1, tokens[..., None], 1.0)
    if draft.probs is not None:
        q[:, : draft.probs.shape[1]] = draft.probs
    return q


def _chosen(here: Tensor, copied: Tensor | None, made: Tensor | None, otherwise: int | bool) -> Tensor | None:
    """`[rows]`: what the chosen draft says, or `otherwise` if it says nothing; `None` if neither says anything."""
    if copied is None and made is None:
        return None
    one, other = (otherwise if values is None else values for values in (copied, made))
    return torch.where(here, one, other)
