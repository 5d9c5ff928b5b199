"""BlockDrafter: drafts with heads that see all drafts of an iteration in one forward; and the entries of such heads.

EAGLE-3 heads for parallel drafts (P-EAGLE) continue their entries with mask tokens. DFlash and DSpark heads read a
block beside their entries, which are the context alone:

    entries       the  cat  sat       from the target's states, kept
    block              on   [mask]  [mask]        "on" is committed, but the target has not read it yet
    predicts                 a       mat          dropped as soon as the forward is over

Drafts are drawn after that forward, position by position where a processor or a DSpark head looks at the drafts before.
Each one's distribution is then known exactly.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...device import mask_width, to_device
from ...models.cached import CachedModel
from ...models.masks import Mask
from ...sampling.context import Context
from ..base import Draft
from .dflash import DFlashHead
from .drafter import HeadDrafter
from .eagle3 import Eagle3Head
from .entries import HeadEntries, embed
from .head import Head


def drafter_of(head: Head, target: PreTrainedModel, confidence_threshold: float = 0.0) -> HeadDrafter:
    """The drafter for a head; arguments as for `HeadDrafter`."""
    kind = HeadDrafter if isinstance(head, Eagle3Head) and head.parts.mask_token is None else BlockDrafter
    return kind(head, target, confidence_threshold)


class BlockDrafter(HeadDrafter):
    """Drafts with a head that sees all drafts of an iteration in one forward. Otherwise it is a `HeadDrafter`.

    Args:
        confidence_threshold: as for `ModelDrafter`. Where the head predicts how probable it is that a draft is
            accepted, that counts instead, and a row stops before a draft for which it is below the threshold. This
            depends on the drafts before that one only. The first is always proposed.
    """

    drafts_at_once = True

    def _make_entries(self, context: Context, target: CachedModel) -> HeadEntries:
        kind = ContextEntries if isinstance(self.model, DFlashHead) else HeadEntries
        return kind(self.model, context, target)

    def _room(self, context: Context) -> int:
        return self.model.parts.longest or super()._room(context)

    def _propose(self, context: Context, max_tokens: int) -> Draft:
        self._ahead: Tensor | None = None  # `[rows, k, hidden]`, h for the drafts from the first on
        return super()._propose(context, max_tokens)

    def _forced_scores(self, context: Context, step: int) -> Tensor | None:
        self._step = step
        return super()._forced_scores(context, step)

    def _logits(self, context: Context, step: int, most: int, drawn: Tensor | None) -> Tensor:
        if self._ahead is None:
            self._ahead = self.cached.catch_up(context, step + most)
        if not getattr(self.model.parts, "markov_rank", 0):
            logits: Tensor = self.cached.logits(self._ahead[:, step : step + most])
            return logits
        before = context.gather([end - 1 for end in context.active_ends], 1) if drawn is None else drawn[:, -1:]
        logits = self.cached.logits(self._ahead[:, step : step + 1])
        added: Tensor = self.model.correction(before.to(self.model.device))
        return logits + added.to(logits.device)

    def _confidence(self, scores: Tensor, drawn: Tensor) -> Tensor:
        if not getattr(self.model.parts, "confidence_width", 0):
            return super()._confidence(scores, drawn)
        said = torch.ones_like(drawn, dtype=torch.float32)  # nothing, of drafts after the last one
        if self._ahead is not None:
            after = self._ahead[:, self._step + 1 : self._step + 1 + drawn.shape[1]]
            if after.shape[1]:
                before = drawn[:, : after.shape[1]].to(after.device)
                said[:, : after.shape[1]] = self.model.confidence(after, before).to(said.device)
        return said


class ContextEntries(HeadEntries):
    """The entries of a head that reads blocks: keys and values of the target's states, at its tokens' positions."""

    def catch_up(self, context: Context, count: int = 1) -> Tensor:
        """Make the entries of all committed tokens that have states, and read a block after them.

        Returns: `[rows, k, hidden]`, h for the next k tokens, which are at least `count`.
        """
        rows, parts = context.rows, self.head.parts
        todo = [max(n - 1, 0) for n in self.missing(context)]
        self._make_entries(rows, todo)
        self._forget_states()
        self.forwards += 1
        last = context.gather([end - 1 for end in context.active_ends], 1).to(self.device)
        ids = torch.nn.functional.pad(last, (0, parts.block_size - 1), value=parts.mask_token)
        _, positions, starts = self._prepare(rows, parts.block_size)
        embedded = self._embed(ids).to(self.device, self.head.dtype)
        hidden: Tensor = self.head(embedded, positions, self.cache, self._block_mask(starts))
        return hidden if parts.from_anchor else hidden[:, 1:]  # lengths are as before: the block's entries are gone

    def _make_entries(self, rows: list[int], counts: list[int], masks: int = 0) -> Tensor:
        begins = [self._first[row] + self.cache.lengths[row] for row in rows]
        given: Tensor = self.head.mix(self._states(rows, begins, max(counts)))
        _, positions, _ = self._prepare(rows, given.shape[1])
        self.head.remember(given, positions, self.cache)
        for row, count in zip(rows, counts):
            self.cache.lengths[row] += count
        return given

    def _embed(self, ids: Tensor) -> Tensor:
        # Some targets scale their embeddings, which belongs to them; or norm them, which is done for the target only.
        if self.head.parts.has_embeddings or hasattr(self._embeddings, "embed_norm"):
            return super()._embed(ids)
        return embed(self._embeddings, ids)

    def _block_mask(self, starts: list[int]) -> Mask | None:
        """For the tokens of blocks in these slots: they see their row's entries, and each other."""
        config, width = self.head.config, self.head.parts.block_size
        types = set(getattr(config, "layer_types", None) or ("full_attention",))
        used, is_uniform = max(starts) + width, min(starts) == max(starts)
        windowed = "sliding_attention" in types and (used > config.sliding_window + 1 or self.head.parts.causal_windows)
        if is_uniform and not windowed:
            return None
        keys = torch.arange(mask_width(used, self.device), device=self.device)
        queries = to_device(starts, self.device)[:, None] + torch.arange(width, device=self.device)
        queries = queries[:, None, :, None]
        whole = (keys < to_device(starts, self.device)[:, None, None, None] + width).expand(-1, -1, width, -1)
        if "sliding_attention" not in types:
            return whole[..., :used]
        seen = whole & ((queries - keys).abs() <= config.sliding_window)
        if self.head.parts.causal_windows:
            seen = seen & (keys <= queries)
        return {"full_attention": whole[..., :used], "sliding_attention": seen[..., :used]}
