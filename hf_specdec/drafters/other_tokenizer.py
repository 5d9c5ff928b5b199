"""A draft model with another tokenizer: it reads the text in its own tokens, and its drafts are translated.

The draft model runs as any other (`model.py`), over a second context in its own tokens. After each commit the end of
the text is encoded anew. What the draft has read stays in its cache as far as the tokens are the same. Its modules are
not touched.

Drafts are passed on in one of two ways:

- *by token* where the two vocabularies share enough: the draft's distribution, restricted to shared tokens, is a
  distribution over the target's tokens. The call's rule draws from it, so it knows the true q (the "token-level
  intersection" of Timor et al. 2025).
- *as text* elsewhere: the draft's likeliest tokens become text, which the target's tokenizer encodes. These tokens are
  deterministic, so q is one-hot (the "string-level exact match" of the same authors).

Either way the target's output does not depend on what a tokenizer does.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..cache.states import has_states
from ..device import to_host
from ..models.abilities import Abilities
from ..models.cached import CachedModel
from ..sampling.context import Context
from .base import Draft, DraftRequest
from .bridge import RowText, bridge_between
from .model import ModelDrafter

_UNBOUNDED = 1 << 30  # columns of the draft's context: a target's token may become any number of the draft's
_MOST_STEPS = 4  # forwards per token of the target, for drafts with short tokens


class OtherTokenizerDrafter(ModelDrafter):
    """Drafts with a language model that has another tokenizer than the target.

    Args:
        model: the draft model (`assistant_model` in `generate()`).
        tokenizer: the target's tokenizer.
        assistant_tokenizer: the draft's tokenizer.
        confidence_threshold: as for `ModelDrafter`.
        by: "token" draws target tokens from the draft's distribution over shared tokens, "text" translates its
            likeliest text; `None` chooses by the overlap: "token" if at least a quarter of the target's tokens and half
            of the draft's are tokens of the other too.

    Raises:
        ValueError: if one tokenizer's tokens cannot be mapped to bytes, if a tokenizer has more tokens than its model,
            or if the draft model cannot go back to an earlier token.

    Attributes:
        own: the text of the call in the draft's tokens.
    """

    own: Context

    _bounds_windows = False  # where its tokens change, it goes back by more than it drafted

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        assistant_tokenizer: PreTrainedTokenizerBase,
        confidence_threshold: float = 0.0,
        by: Literal["token", "text"] | None = None,
    ):
        super().__init__(model, confidence_threshold)
        if by not in ("token", "text", None):
            raise ValueError(f"`by` must be 'token', 'text' or None, got {by!r}")
        check_kind(model)
        self.bridge = bridge_between(tokenizer, assistant_tokenizer)
        self.by_token = self.bridge.by_token if by is None else by == "token"
        check_size("assistant_tokenizer", self.bridge.draft.size, "`assistant_model`", model)
        if not self.by_token:
            self.shows_confidence = False  # it knows that of its own tokens, not of the target's

    def start(self, call: DraftRequest, context: Context) -> None:
        if call.prompt_is_embeds:
            raise ValueError(
                "The prompt is `inputs_embeds` alone, which is no text that a draft with another tokenizer could read: "
                "pass its `input_ids` too, or use a draft of the target's family"
            )
        if context.batch_size > 1 and not self.takes_ragged_rows:
            raise ValueError(
                f"`assistant_model` ({type(self.model).__name__}) has another tokenizer, so its rows differ in length, "
                "but it cannot decode rows of different lengths together: use another draft, or one row per call"
            )
        self._texts = [RowText(self.bridge) for _ in range(context.batch_size)]
        self._read = [context.ends[row] for row in range(context.batch_size)]  # by row, columns that are in its text
        self._drafted: dict[int, list[int]] = {}  # by row, the draft's latest tokens where the host knows them
        for row, text in enumerate(self._texts):
            text.read(context.row(row).tolist())
        self.own = self._own_context(context)
        size = self.model.config.get_text_config(decoder=True).vocab_size
        shared = self.bridge.shared(call.vocab_size, size) if self.by_token else None
        self._shared = None if shared is None else shared.to(context.tokens.device)
        self._draft_ids = None if shared is None else shared.to_draft  # on the host
        self._measure(context)
        own = replace(call, lockstep=False, static=False, inputs={}, encoder=None)
        super().start(own, self.own)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        self.own.rows = list(context.rows)
        return super().propose(context, max_tokens)

    def commit(self, context: Context) -> None:
        """Bring the draft's context up to date, and its cache back to where the two have the same tokens."""
        assert isinstance(self.cached, CachedModel)
        own, lengths = self.own, self.cached.cache.lengths
        own.rows = list(context.rows)
        new = []
        for row in context.rows:
            text, first = self._texts[row], own.first[row]
            tokens = context.host[row, self._read[row] : context.ends[row]].tolist()
            self._read[row] = max(context.ends[row], self._read[row])
            kept = text.read(tokens, self._fed(row, tokens)[: max(lengths[row] - len(text.ids), 0)])
            lengths[row] = min(lengths[row], kept)
            begin = min(kept, own.ends[row] - first)
            own.ends[row] = first + begin
            new.append(text.ids[begin:])
        self._drafted = {}
        own.append(new)
        super().commit(own)

    def restart(self, context: Context, row: int) -> None:
        text = self._texts[row] = RowText(self.bridge)
        text.read(context.row(row).tolist())
        self._read[row] = context.ends[row]
        self._drafted.pop(row, None)
        self.own.restart(row, text.ids, _UNBOUNDED)
        self._measure(context)
        super().restart(self.own, row)

    def read(self, context: Context, count: int) -> None:
        self.own.rows = list(context.rows)
        super().read(self.own, count)

    def unread(self, context: Context) -> int:
        self.own.rows = list(context.rows)
        return super().unread(self.own)

    def _fed(self, row: int, committed: Sequence[int]) -> list[int]:
        """The draft's tokens that it has read after the row's text, as far as they may have been accepted."""
        if self._draft_ids is None:
            return self._drafted.get(row, [])
        # All committed tokens but the last, which is the target's own, were drafts.
        ids: list[int] = self._draft_ids[torch.tensor(committed[:-1], dtype=torch.int64)].tolist()
        return ids

    def _measure(self, context: Context) -> None:
        """How many of its tokens stand for one of the target's."""
        own = sum(len(text.ids) for text in self._texts)
        given = sum(end - first for end, first in zip(context.ends, context.first))
        self._steps_per_token = min(max(own / max(given, 1), 1 / _MOST_STEPS), _MOST_STEPS)

    def _own_context(self, context: Context) -> Context:
        ids = [text.ids for text in self._texts]
        width = max(map(len, ids))
        pad = self.bridge.draft.roles.get("pad", 0)
        padded = [[pad] * (width - len(row)) + row for row in ids]
        prompt = torch.tensor(padded, dtype=torch.int64).to(context.tokens.device)
        own = Context(prompt, [width - len(row) for row in ids], _UNBOUNDED, pad)
        own.rows = list(context.rows)
        return own

    # By token: `ModelDrafter` draws target tokens, and each is translated as it is fed.

    def _logits(self, context: Context, step: int, most: int, drawn: Tensor | None) -> Tensor:
        return super()._logits(self.own, step, most, None if drawn is None else self._translated(drawn))

    def _in_vocabulary(self, logits: Tensor) -> Tensor:
        assert self._shared is not None
        return self._shared.target_scores(logits, self._call.vocab_size)

    def _write(self, context: Context, drawn: Tensor, step: int) -> None:
        super()._write(context, drawn, step)
        super()._write(self.own, self._translated(drawn), step)

    def _translated(self, drawn: Tensor) -> Tensor:
        """The draft's ids of shared tokens `[rows, 1]`; any id for others, which constraints may force."""
        assert self._shared is not None
        return self._shared.to_draft[drawn].clamp(min=0)

    def _room(self, context: Context) -> int:
        return super()._room(self.own)

    def _catch_up(self, context: Context, most: int) -> None:
        super()._catch_up(self.own, most)

    # As text.

    def _propose(self, context: Context, max_tokens: int) -> Draft:
        if self.by_token:
            return super()._propose(context, max_tokens)
        steps = min(math.ceil(max_tokens * self._steps_per_token), self._room(context))
        if steps > 0:
            self._catch_up(context, steps)
        tokens: list[Tensor] = []  # each [rows, 1]
        best: list[Tensor] = []  # each [rows, 1], the score of the likeliest token
        sure: list[Tensor] = []  # each [rows, 1], whether another one may follow
        for step in range(steps):
            scores = super()._logits(self.own, step, 1, tokens[-1] if tokens else None)[:, -1:].float()
            best.append(scores.amax(dim=-1))
            tokens.append(scores.argmax(dim=-1))
            if self.confidence_threshold:
                sure.append(self._confidence(scores, tokens[-1]) >= self.confidence_threshold)
        self._drafted = dict(zip(context.rows, _on_host(tokens, sure))) if tokens else {}
        translated = []
        for row in context.rows:
            draft = self._drafted.get(row, [])
            ids = self._texts[row].continued(draft)[:max_tokens] if draft else []
            unknown = next((i for i, token in enumerate(ids) if token >= self._call.vocab_size), len(ids))
            translated.append(ids[:unknown])
        width = max(map(len, translated))
        filled = [ids + [0] * (width - len(ids)) for ids in translated]
        block = torch.tensor(filled, dtype=torch.int64).to(context.tokens.device, non_blocking=True)
        valid = torch.cat(best, dim=1).isfinite().all(dim=1) if best else None
        return Draft(block, lengths=list(map(len, translated)), valid=valid)


def _on_host(tokens: list[Tensor], sure: list[Tensor]) -> list[list[int]]:
    """By row, the draft's tokens up to the first unsure one. The host waits here: it needs them to make text of them.

    Args:
        tokens: each `[rows, 1]`.
        sure: the same, whether another one may follow; empty if one may follow all.
    """
    table: list[list[int]] = to_host(torch.cat([*tokens, *(s.long() for s in sure)], dim=1)).tolist()
    count = len(tokens)
    return [row[: row[count:].index(0) + 1 if 0 in row[count:] else count] for row in table]


def check_kind(model: PreTrainedModel) -> None:
    """Raise a ValueError for models that cannot go back to any earlier token."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`assistant_model` ({name}) is an encoder-decoder model with another tokenizer than the target's: use a "
            "decoder-only draft"
        )
    able, config = Abilities.of(model), model.config.get_text_config(decoder=True)
    if not able.own_cache or has_states(DynamicCache(config=config)) or able.needs_own_code:
        raise ValueError(
            f"`assistant_model` ({name}) has another tokenizer than the target and carries a state that cannot go back "
            "to an earlier token, as it must where the two cut a text differently: use a draft with attention layers "
            "only, or one of the target's family"
        )


def check_size(argument: str, size: int, owner: str, model: PreTrainedModel) -> None:
    """Raise a ValueError if a tokenizer has more tokens than its model: it must be another model's.

    Args:
        size: of its base vocabulary; tokens that were added to it may be unknown to the model.
    """
    known = model.config.get_text_config(decoder=True).vocab_size
    if size > known:
        raise ValueError(
            f"`{argument}` has {size} tokens, but {owner} ({type(model).__name__}) knows only {known}: it is not its "
            "tokenizer. `tokenizer` is the target's, `assistant_tokenizer` the draft's; are they swapped?"
        )
