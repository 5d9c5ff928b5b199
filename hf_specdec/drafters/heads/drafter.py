"""HeadDrafter: drafts with a head on the target's hidden states, token by token, for all rows."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.cached import CachedModel
from ...models.tap import Tap
from ...sampling.context import Context
from ..base import Draft, DraftRequest, no_draft
from ..model import ModelDrafter
from .entries import HeadEntries
from .fit import check_fit


class HeadDrafter(ModelDrafter):
    """Drafts with a head. It reads the text through the target's hidden states, so no prompt is read twice.

    Tokens that the head does not know are never drafted. Where processors allow no other, the row stops drafting.

    Args:
        head: of this target; for this class an EAGLE-3 head.
        target: the model whose hidden states it reads.
        confidence_threshold: as for `ModelDrafter`.

    Raises:
        ValueError: if the head was made for another target.
    """

    reads_prompts = False
    uses_target = True
    taps_target = True
    takes_ragged_rows = True
    model: Any
    cached: Any

    def __init__(self, head: Any, target: PreTrainedModel, confidence_threshold: float = 0.0):
        self._check_fit(head, target)
        super().__init__(head, confidence_threshold)

    def start(self, call: DraftRequest, context: Context) -> None:
        target = call.target
        assert isinstance(target, CachedModel), "the session refuses other targets"
        self._serve(call)
        self._target = target
        self.cached = self._make_entries(context, target)
        self._tap = self._make_tap(target.model)
        target.tap = self._tap

    def _check_fit(self, head: Any, target: PreTrainedModel) -> None:
        """Raise a ValueError unless the head can draft for this target."""
        check_fit(head, target)

    def _make_entries(self, context: Context, target: CachedModel) -> Any:
        """What feeds the head; see `HeadEntries`."""
        return HeadEntries(self.model, context, target)

    def _make_tap(self, target: PreTrainedModel) -> Tap:
        layers = target.config.get_text_config(decoder=True).num_hidden_layers
        return Tap(target, self.model.parts.states_of(layers), self.cached.read)

    def _propose(self, context: Context, max_tokens: int) -> Draft:
        entries = self.cached
        unread = [max(n - 1, 0) for n in entries.missing(context)]
        if max_tokens == 0 or not entries.can_draft or not any(unread):
            return no_draft(context)
        self._hidden: Tensor | None = None  # `[rows, 1, hidden]`, of the last token that was fed
        self._fed = 0  # drafts that were
        self._says: list[Tensor] = []  # each `[rows, 1]`, whether processors leave a token that the head knows
        draft = super()._propose(context, max_tokens)
        entries.end_draft(context)
        if self._says:
            draft = draft.up_to(torch.cat(self._says, dim=1).long().cumprod(dim=1).sum(dim=1))
        if not all(unread):  # the states of a row with a single token are not known yet
            draft = draft.cut([n if own else 0 for n, own in zip(draft.row_lengths, unread)])
        return draft

    @property
    def refills(self) -> bool:
        return True

    def restart(self, context: Context, row: int) -> None:
        self.cached.restart(row, context.limits[row])

    def read(self, context: Context, count: int) -> None:
        """What the target has just read."""
        self.cached.read_ahead()

    def unread(self, context: Context) -> int:
        """Usually nothing: what the last verification has left costs no forward of its own."""
        return sum(self.cached.missing(context)) - len(context.rows) if self.cached.waiting > 1 else 0

    def end(self) -> None:
        if hasattr(self, "_tap"):
            self._tap.close()
            self._target.tap = None
            del self._tap, self._target
        super().end()

    def _room(self, context: Context) -> int:
        return context.max_length

    def _catch_up(self, context: Context, most: int) -> None:
        """Nothing to do: the first step does."""

    def _forced_scores(self, context: Context, step: int) -> Tensor | None:
        scores = super()._forced_scores(context, step)
        if scores is not None:
            self._says.append(scores.new_ones(len(scores), 1, dtype=torch.bool))
        return scores

    def _logits(self, context: Context, step: int, most: int, drawn: Tensor | None) -> Tensor:
        entries = self.cached
        if self._hidden is None:
            self._hidden = entries.catch_up(context)
        while self._fed < step:  # several, where tokens were forced
            is_last = self._fed + 1 == step and drawn is not None
            ends = [end + self._fed for end in context.active_ends]
            self._hidden = entries.step(context, drawn if is_last else context.gather(ends, 1), self._hidden)
            self._fed += 1
        logits: Tensor = entries.logits(self._hidden)
        return logits

    def _usable(self, scores: Tensor, logits: Tensor) -> Tensor:
        # Processors may subtract infinities; a token that the head does not know stays unknown.
        scores = scores.masked_fill(scores.isnan() & logits.isneginf(), -math.inf)
        self._says.append(scores.amax(dim=-1).isfinite())  # where they leave nothing, what is drawn is not proposed
        return super()._usable(scores, logits)

    def _in_vocabulary(self, logits: Tensor) -> Tensor:
        """-inf for tokens that the head does not know."""
        ids = getattr(self.model, "target_ids", None)
        if ids is None:
            return super()._in_vocabulary(logits)
        whole = logits.new_full((*logits.shape[:2], self._call.vocab_size), -math.inf)
        return whole.index_copy_(2, ids.to(logits.device), logits)
