"""MtpDrafter: drafts with a target's MTP layers, one layer per token, then with the last one again and again."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...device import to_device
from ...models.cached import CachedModel
from ...models.masks import Mask
from ...models.tap import FINAL, Tap
from ...models.target import aligned
from ...sampling.context import Context
from .drafter import HeadDrafter
from .entries import HeadEntries, embed
from .mtp import check_mtp


class MtpDrafter(HeadDrafter):
    """Drafts with the MTP layers of the target; see `HeadDrafter` for the arguments."""

    cached: "MtpEntries"

    def _check_fit(self, head: Any, target: PreTrainedModel) -> None:
        check_mtp(head, target)

    def _make_entries(self, context: Context, target: CachedModel) -> "MtpEntries":
        return MtpEntries(self.model, context, target)

    def _make_tap(self, target: PreTrainedModel) -> Tap:
        return Tap(target, [FINAL], self.cached.read)


class MtpEntries(HeadEntries):
    """The entries of layers that run one after the other. Layer k joins what layer k - 1 made with token t + k + 1.

    Of n tokens, the last k + 1 have no entry in layer k that depends on committed tokens only:

        n = 5, two layers     t = 0     1     2     3
        layer 0              h0|x1 h1|x2 h2|x3 h3|x4      the last one yields draft d
        layer 1              g0|x2 g1|x3 g2|x4 g3|d       g3|d is dropped, so slots of both layers are counted alike

    What is dropped is made again, from the target's states, which are kept for these few tokens.
    """

    def __init__(self, head: Any, context: Context, target: CachedModel):
        super().__init__(head, context, target)
        self._depth = len(head.layers)
        self._unsettled = max(self._depth, 2)
        self._layer = 0  # the one that runs
        self._rows: list[int] = []  # of the draft in progress
        self._lengths: list[int] = []  # by row, before it
        self._counts: list[int] = []  # by row, the entries that its layers make
        self._done = 0  # layers that have
        self._is_short = False  # the last draft did not come to all layers

    def _borrow(self, target: PreTrainedModel) -> None:
        self._embeddings = target.get_input_embeddings()
        self._output: Any = target.get_output_embeddings()

    def catch_up(self, context: Context, count: int = 1) -> Tensor:
        if self._is_short:  # else the tokens that are read again would become more and more
            self.read_ahead()
        self._rows, self._lengths = list(context.rows), self.lengths(context)
        self._counts = [max(n - 1, 0) for n in self.missing(context)]
        self._ids = self._tokens(self._rows, [b + 1 for b in self._columns()], max(self._counts))
        self._hidden = super()._make_entries(self._rows, self._counts)
        self._done = 1
        self.forwards += 1
        return self._last_of(self._hidden)

    def step(self, context: Context, tokens: Tensor, hidden: Tensor) -> Tensor:
        self.forwards += 1
        self._layer = min(self._done, self._depth - 1)
        if self._done == self._depth:
            hidden = self._forward(self._rows, hidden, tokens.to(self.device))
        else:
            last = to_device([max(n - 1, 0) for n in self._counts], self.device)[:, None]
            self._ids = torch.cat([self._ids[:, 1:], self._ids[:, -1:]], dim=1)
            self._ids = self._ids.scatter(1, last, tokens.to(self.device))
            self._hidden = self._over_the_same(self._rows, self._lengths, self._counts, self._hidden, self._ids)
            self._done += 1
            hidden = self._last_of(self._hidden)
        self._layer = 0
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._output(hidden)
        return logits

    def end_draft(self, context: Context) -> None:
        """Drop the entries that depend on drafts, and the states of tokens that need no more entries."""
        if not self._done:
            return  # no layer was asked
        self._is_short = self._done < self._depth
        if self._is_short:
            self.roll_back(self._rows, self._lengths)
        self._done = 0
        self.commit(context)
        self._keep({*self._rows, *self._coming})
        self.waiting = 0

    def commit(self, context: Context) -> None:
        super().commit(context)
        most = [max(context.ends[row] - self._first[row] - self._depth, 0) for row in context.rows]
        self.roll_back(context.rows, [min(pair) for pair in zip(self.lengths(context), most)])

    def _last_of(self, hidden: Tensor) -> Tensor:
        """`[rows, 1, hidden]`, of the last of each row's own entries."""
        last = [max(n - 1, 0) for n in self._counts]
        return aligned(hidden[:, min(last) :], last, 1)

    def _columns(self) -> list[int]:
        """By row of the draft, the column of its first token without an entry."""
        return [self._first[row] + self.cache.lengths[row] for row in self._rows]

    def _make_entries(self, rows: list[int], counts: list[int], masks: int = 0) -> Tensor:
        """Those of all layers, of tokens that are all known."""
        lengths = [self.cache.lengths[row] for row in rows]
        begins = [self._first[row] + length for row, length in zip(rows, lengths)]
        hidden = super()._make_entries(rows, counts)
        for layer in range(1, self._depth):
            self._layer = layer
            ids = self._tokens(rows, [begin + 1 + layer for begin in begins], max(counts))
            hidden = self._over_the_same(rows, lengths, counts, hidden, ids)
        self._layer = 0
        return hidden

    def _over_the_same(
        self, rows: list[int], lengths: list[int], counts: list[int], hidden: Tensor, ids: Tensor
    ) -> Tensor:
        """Run a layer over the entries that the layer before it has just made."""
        self.roll_back(rows, lengths)
        hidden = self._forward(rows, hidden, ids)
        self.roll_back(rows, [length + count for length, count in zip(lengths, counts)])
        return hidden

    def _run(self, given: Tensor, ids: Tensor, positions: Tensor, mask: Mask | None) -> Tensor:
        embedded = embed(self._embeddings, ids).to(self.device, self.head.dtype)
        hidden: Tensor = self.head(given, embedded, positions + 1 + self._layer, self.cache, mask, self._layer)
        return hidden
