"""The entries of a head: its keys and values for the text, made from true hidden states of the target.

Entry t of a row joins the target's states at token t with token t + 1, so a text of n tokens has n - 1 entries:

    column         2     3     4     5     6               row 0, first = 2
    token         the   cat   sat   on     a
    entry       the|cat  cat|sat  sat|on  on|a   .         4 entries; the last one yields the first draft

The target's states arrive with each of its forwards (`read`). Those of a prompt become entries at once, piece by piece.
The others wait for the next draft, which feeds all of them in one ragged forward. Entries of drafts are made from the
head's own output, and always dropped.

Where rows begin anew while others go on (`restart`), some forwards are over rows whose prompts are being read, and
others over rows that draft. States of both kinds of rows wait side by side.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...cache.ragged import RaggedCache
from ...device import no_bookkeeping, row_index, to_device
from ...models.cached import CachedModel
from ...models.masks import Mask, ragged_mask
from ...models.target import aligned
from ...sampling.context import Context

_CHUNK = 512  # entries per row that one forward makes of a prompt
_MOST_WAITING = 64  # states per row that wait for the next draft
_ELSEWHERE = 1 << 40  # column of rows that a piece holds nothing of: none of theirs is in it


@dataclass(frozen=True)
class _Piece:
    """The target's states from one of its forwards.

    Attributes:
        states: one tensor `[rows, width, hidden]` per tapped layer.
        rows: of the batch.
        begins: by row, the context's column of the first one.
    """

    states: list[Tensor]
    rows: list[int]
    begins: list[int]

    @property
    def width(self) -> int:
        return self.states[0].shape[1]

    def of(self, rows: list[int]) -> "_Piece":
        """The same of these rows only, in this order; of some of them it may hold nothing."""
        if rows == self.rows:
            return self
        places = {row: place for place, row in enumerate(self.rows)}
        index = [places.get(row, 0) for row in rows]
        states = [part[row_index(index, part.device)] for part in self.states]
        return _Piece(states, rows, [self.begins[places[row]] if row in places else _ELSEWHERE for row in rows])

    def since(self, needed: Mapping[int, int]) -> "_Piece | None":
        """Copies of the states from these columns on, by row, and of these rows only; `None` if there are none."""
        places = [place for place, row in enumerate(self.rows) if row in needed]
        first = max(min((needed[self.rows[p]] - self.begins[p] for p in places), default=self.width), 0)
        if first >= self.width:
            return None
        states = [part[:, first:] for part in self.states]
        is_whole = len(places) == len(self.rows)
        states = [part.clone() if is_whole else part[row_index(places, part.device)] for part in states]
        return _Piece(states, [self.rows[p] for p in places], [self.begins[p] + first for p in places])


class HeadEntries:
    """Feeds a head from the target's states and a context, and keeps its keys and values for each row.

    Args:
        head: the head.
        context: of the call; the target has been fed what its cache holds, and nothing else.
        target: the model whose states it reads.

    Attributes:
        waiting: how many forwards of the target over rows that draft have left states since the last draft.
    """

    at_once: int | None = None  # the interface of `CachedModel`: no limit
    _unsettled = 2  # tokens at a text's end whose entries are not made before the next draft

    def __init__(self, head: Any, context: Context, target: CachedModel):
        self.head, self.device, self._context = head, head.device, context
        self.cache = RaggedCache(context.batch_size, head.device, context.prompt_width + 256, context.max_length)
        held = [length - offset for length, offset in zip(target.cache.lengths, target.layout.slot_offset)]
        # By row of the batch, the column of its first entry: the first token whose states will be seen.
        self._first = [max(column, first, 0) for column, first in zip(held, context.first)]
        self._shift = [column - first for column, first in zip(self._first, context.first)]
        self._pieces: list[_Piece] = []
        self._coming: set[int] = set()  # rows that have begun anew, and have not been active yet
        self.waiting = 0
        self._masked: Tensor | None = None  # what stands for g of tokens that are not known, made once
        self._borrow(target.model)
        self.no_bookkeeping = no_bookkeeping(head, head.device)
        self.forwards = 0  # those that drafted
        self.prefill_forwards = 0

    def _borrow(self, target: PreTrainedModel) -> None:
        """Take what the head has not got from the target."""
        own = self.head.parts.has_embeddings
        self._embeddings: Any = self.head.embed_tokens if own else target.get_input_embeddings()
        self._shared = self.head.shared_output(target)

    def missing(self, context: Context) -> list[int]:
        """How many committed tokens of each active row have no entry yet; the last one never has one."""
        return [context.ends[row] - self._first[row] - self.cache.lengths[row] for row in context.rows]

    @property
    def can_draft(self) -> bool:
        """Whether the target has run: without its states there is nothing to draft from."""
        return bool(self._pieces)

    def read(self, states: list[Tensor], rows: list[int], columns: list[int]) -> None:
        """Take the states of one of the target's forwards; see `models.tap.Reader`."""
        self._pieces.append(_Piece(states, list(rows), columns))
        self.waiting += not self._coming.issuperset(rows)
        if sum(piece.width for piece in self._pieces) > _MOST_WAITING:
            self.read_ahead()

    def restart(self, row: int, slots: int) -> None:
        """Forget a row, which is not active: another one takes its place, and begins in column 0.

        Args:
            slots: the most that it can need.
        """
        self.cache.allow(slots)
        self.cache.restart(row)
        self._keep(self._heard - {row})
        self._coming.add(row)

    def catch_up(self, context: Context, count: int = 1) -> Tensor:
        """Make the entries of all committed tokens, and see the next `count` tokens ahead.

        Returns: `[rows, count, hidden]`, h of each row's last entry, and of count - 1 mask tokens after it, whose
            entries are dropped.
        """
        todo = [max(n - 1, 0) for n in self.missing(context)]  # at most what waits
        hidden = self._make_entries(context.rows, todo, count - 1)
        self._forget_states()
        self.forwards += 1
        last = [max(n - 1, 0) for n in todo]
        return aligned(hidden[:, min(last) :], last, count)

    def step(self, context: Context, tokens: Tensor, hidden: Tensor) -> Tensor:
        """h after one more token of each row, `[rows, 1]`, from h before it. The entry is the last in the cache."""
        self.forwards += 1
        return self._forward(context.rows, hidden, tokens.to(self.device))

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head.logits(hidden, self._shared)
        return logits

    def lengths(self, context: Context) -> list[int]:
        return [self.cache.lengths[row] for row in context.rows]

    def end_draft(self, context: Context) -> None:
        """Drop the entries of drafts."""
        self.commit(context)

    def commit(self, context: Context) -> None:
        """Drop entries of tokens that were taken back; those of drafts are gone already."""
        held = zip(self.lengths(context), self.missing(context))
        self.roll_back(context.rows, [length + min(n - 1, 0) for length, n in held])
        self._coming.difference_update(context.rows)

    def release(self) -> None:
        self._pieces.clear()

    def read_ahead(self) -> None:
        """Make entries of the context's rows now, but for each row's last one, from which it will draft."""
        heard = self._heard
        rows = [row for row in self._context.rows if row in heard]
        with self.no_bookkeeping():
            while True:
                todo = [self._settled(row) - self._first[row] - self.cache.lengths[row] for row in rows]
                if max(todo, default=0) <= 0:
                    break
                self._make_entries(rows, [min(max(n, 0), _CHUNK) for n in todo])
                self.prefill_forwards += 1
        if self._coming.issuperset(rows):  # the others are in the middle of their texts
            self._keep(heard)
        else:
            self._keep({*rows, *self._coming})
            self.waiting = 1

    @property
    def _heard(self) -> set[int]:
        """The rows whose states wait."""
        return {row for piece in self._pieces for row in piece.rows}

    def _keep(self, rows: Collection[int]) -> None:
        """Forget all states but those of these rows that are no entries yet."""
        needed = {row: self._first[row] + self.cache.lengths[row] for row in rows}
        kept = [piece.since(needed) for piece in self._pieces]
        self._pieces = [piece for piece in kept if piece is not None]

    def _forget_states(self) -> None:
        """All are entries now: of rows whose prompts are still being read too, since no draft begins there."""
        self._pieces.clear()
        self.waiting = 0

    def _settled(self, row: int) -> int:
        """The column after those whose entries can be made now and will not be drafted from."""
        ends = (piece.begins[piece.rows.index(row)] + piece.width for piece in self._pieces if row in piece.rows)
        return min(self._context.ends[row] - self._unsettled, max(ends))

    def _make_entries(self, rows: list[int], counts: list[int], masks: int = 0) -> Tensor:
        """The next entries of each row.

        Args:
            masks: how many mask tokens follow a row's own, at least; their entries are dropped.

        Returns: `[rows, widest count + masks, hidden]`, h of each; after a row's own, that of mask tokens, or fill.
        """
        width = max(counts)
        begins = [self._first[row] + self.cache.lengths[row] for row in rows]
        given = self.head.mix(self._states(rows, begins, width))
        before = [self.cache.lengths[row] for row in rows]
        ids = self._tokens(rows, [begin + 1 for begin in begins], width)
        if masks:
            at = torch.arange(width + masks, device=self.device)
            is_mask = at >= to_device(counts, self.device)[:, None]
            given = torch.nn.functional.pad(given, (0, 0, 0, masks))
            self._masked = self.head.masked() if self._masked is None else self._masked
            given = torch.where(is_mask[..., None], self._masked, given)
            ids = torch.nn.functional.pad(ids, (0, masks))
            ids = ids.masked_fill(is_mask, self.head.parts.mask_token)
        hidden = self._forward(rows, given, ids)
        self.roll_back(rows, [n + count for n, count in zip(before, counts)])
        return hidden

    def _tokens(self, rows: list[int], begins: list[int], width: int) -> Tensor:
        """`[rows, width]`, the context's tokens from each row's column in `begins` on."""
        tokens = self._context.tokens
        columns = to_device(begins, tokens.device)[:, None] + torch.arange(width, device=tokens.device)
        ids = tokens[row_index(rows, tokens.device)[:, None], columns.clamp(max=tokens.shape[1] - 1)]
        return ids.to(self.device)

    def _states(self, rows: list[int], begins: list[int], width: int) -> list[Tensor]:
        """The target's states from each row's column in `begins` on, `[rows, width, hidden]` per tapped layer."""
        pieces = [piece.of(rows) for piece in self._pieces if not set(rows).isdisjoint(piece.rows)]
        if len(pieces) == 1:
            starts = [begin - mine for begin, mine in zip(begins, pieces[0].begins)]
            if min(starts) == max(starts) and starts[0] + width <= pieces[0].width:
                return [part[:, starts[0] : starts[0] + width] for part in pieces[0].states]
            index = to_device(starts, self.device)[:, None] + torch.arange(width, device=self.device)
            joined = pieces[0].states
        else:
            places = [[_place(pieces, i, begin + j) for j in range(width)] for i, begin in enumerate(begins)]
            index = torch.tensor(places).to(self.device, non_blocking=True)
            joined = [torch.cat(parts, dim=1) for parts in zip(*(piece.states for piece in pieces))]
        index = index.clamp(0, joined[0].shape[1] - 1)  # fill
        return [part.gather(1, index.to(part.device)[..., None].expand(-1, -1, part.shape[2])) for part in joined]

    def _forward(self, rows: list[int], given: Tensor, ids: Tensor) -> Tensor:
        """h of the next tokens of each row, whose entries are written after those in the cache."""
        slots, positions, starts = self._prepare(rows, ids.shape[1])
        hidden = self._run(given, ids, positions, self._mask(slots, starts))
        for row in rows:
            self.cache.lengths[row] += ids.shape[1]
        return hidden

    def _prepare(self, rows: list[int], width: int) -> tuple[Tensor, Tensor, list[int]]:
        """Announce a forward over so many tokens per row.

        Returns: `[rows, width]`, the slots that it writes to and the positions of its tokens; by row, the first slot.
        """
        self.cache.activate(rows)
        starts = [self.cache.lengths[row] for row in rows]
        self.cache.prepare(width)
        slots = to_device(starts, self.device)[:, None] + torch.arange(width, device=self.device)
        shift = [self._shift[row] for row in rows]
        return slots, slots + to_device(shift, self.device)[:, None] if any(shift) else slots, starts

    def _embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix, whatever else the target does with them."""
        return embed(self._embeddings, ids, plainly=True)

    def _run(self, given: Tensor, ids: Tensor, positions: Tensor, mask: Mask | None) -> Tensor:
        """The head's own forward."""
        embedded = self._embed(ids).to(self.device, self.head.dtype)
        hidden: Tensor = self.head(given, embedded, positions, self.cache, mask)
        return hidden

    def _mask(self, slots: Tensor, starts: list[int]) -> Mask | None:
        width, is_uniform = slots.shape[1], min(starts) == max(starts)
        config = self.head.config
        windowed = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        causal = starts[0] == 0 and config._attn_implementation == "sdpa"  # others need a mask for that
        if is_uniform and not windowed and (width == 1 or causal):
            return None
        used = max(starts) + width
        return ragged_mask(self.head, slots[:1] if is_uniform else slots, used, uniform=is_uniform)

    def roll_back(self, rows: list[int], lengths: list[int]) -> None:
        """Keep so many entries of each of these rows."""
        for row, length in zip(rows, lengths):
            self.cache.lengths[row] = length


def embed(embeddings: Any, ids: Tensor, plainly: bool = False) -> Tensor:
    """Embeddings of tokens; ids that the matrix does not have, such as placeholders of images, take the nearest one.

    Args:
        embeddings: the module.
        plainly: rows of its matrix, whatever else it does with them.
    """
    weight = embeddings.weight
    ids = ids.to(weight.device).clamp(0, len(weight) - 1)
    embedded: Tensor = nn.functional.embedding(ids, weight) if plainly else embeddings(ids)
    return embedded


def _place(pieces: list[_Piece], row: int, column: int) -> int:
    """Where a row's column is in all pieces joined: in the latest one that has it."""
    place, offset = 0, 0
    for piece in pieces:
        at = column - piece.begins[row]
        if 0 <= at < piece.width:
            place = offset + at
        offset += piece.width
    return place
