"""Layout: the cache slot, position and mask of each token of a context.

The cache counts slots, the context counts columns. In the *ragged* layout slot 0 is a row's first real token, so rows
hold no padding and differ in length. In the *aligned* layout slots equal columns, padding included. All rows always
have equal lengths, and a 2-D mask marks padding, as in vanilla `generate()`.

    column          0    1    2    3    4
    row 0          <p>  <p>  the  cat  sat      ragged: slots 0 to 2, first = 2     aligned: slots 0 to 4
    row 1           a   dog  ran  off  and      ragged: slots 0 to 4, first = 0     aligned: slots 0 to 4
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.ragged import RaggedCache
from ..device import row_index, to_device
from .masks import Mask, ragged_mask


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a context are in one cache.

    Attributes:
        first: by row of the batch, the column of slot 0; 0 for all rows in the aligned layout.
        column_offset: added to a context's columns; not 0 when the cache began before the context did.
        padding_mask: `[batch, columns]` bool, which columns are real, for the aligned layout; `None` if all are.
        position_offset: by row of the batch, position id minus slot.
        prompt_positions: `[batch, columns]` position ids of the first columns, where that offset does not give them.
        axes: `[axes, batch, 1]`, an offset for each axis, where a token has a position on several axes.
        max_slot: by row of the batch, the last slot that will ever be committed; no later slot gets a later position.
        own_masks: make all masks of several tokens, and of padded rows, because the model takes our 4-D masks. To make
            one from a padding mask, transformers waits for the device; ours may also be marked as causal.
    """

    first: Sequence[int]
    column_offset: int = 0
    padding_mask: Tensor | None = None
    position_offset: Sequence[int] | None = None
    prompt_positions: Tensor | None = None
    axes: Tensor | None = None
    max_slot: list[int] | None = None
    own_masks: bool = False

    def on(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        padding_mask, positions, axes = map(moved, (self.padding_mask, self.prompt_positions, self.axes))
        return replace(self, padding_mask=padding_mask, prompt_positions=positions, axes=axes)

    @cached_property
    def slot_offset(self) -> list[int]:
        """By row of the batch, slot minus column of the context."""
        return [self.column_offset - first for first in self.first]

    @cached_property
    def first_real(self) -> Tensor | None:
        """`[batch]`, the slot of each row's first real token, in the aligned layout with padding."""
        return None if self.padding_mask is None else self.padding_mask.long().argmax(dim=1)

    @property
    def _prompt_columns(self) -> int:
        return 0 if self.padding_mask is None else self.padding_mask.shape[1]

    def slots(self, starts: list[int], width: int, device: torch.device) -> Tensor:
        """`[rows, width]`: the slots of `width` tokens, from each row's start on."""
        return to_device(starts, device)[:, None] + torch.arange(width, device=device)

    def columns(self, slots: Tensor, rows: list[int]) -> Tensor:
        """`[rows, width]`: the columns of these slots, counted from the beginning of the cache."""
        return slots + to_device([self.first[row] for row in rows], slots.device)[:, None]

    def positions(self, rows: list[int], starts: list[int], slots: Tensor) -> Tensor:
        """Position ids of the tokens at `slots` `[rows, width]`, whose first column is `starts`.

        Returns: `[rows, width]`, or `[axes, rows, width]`.
        """

        def by_row(values: Sequence[int]) -> Tensor:
            return to_device([values[row] for row in rows], slots.device)[:, None]

        positions, width, last = slots, slots.shape[1], self.max_slot
        if last is not None and any(start + width - 1 > last[row] for row, start in zip(rows, starts)):
            positions = positions.clamp(max=by_row(last))  # fill must not use positions that do not exist
        if self.position_offset is not None and any(self.position_offset[row] for row in rows):
            positions = (positions + by_row(self.position_offset)).clamp(min=0)
        if self.axes is not None:
            positions = positions + self.axes[:, row_index(rows, slots.device)]
        if self.prompt_positions is None:
            return positions
        columns = self.columns(slots, rows)
        known = self.prompt_positions[row_index(rows, slots.device)]
        given = known.gather(1, columns.clamp(max=known.shape[1] - 1))
        return torch.where(columns < known.shape[1], given, positions)

    def mask(self, model: PreTrainedModel, cache: RaggedCache, slots: Tensor) -> Mask | None:
        """The attention mask of the active rows of a prepared cache, for queries at `slots` `[rows, width]`.

        Returns: a padding mask `[rows, columns]`, from which transformers makes the 4-D mask; our own 4-D mask where
            rows have different lengths (see `masks.py`); `None` where plain causal attention is right.
        """
        rows, past = cache.rows, cache.get_seq_length()
        used = past + slots.shape[1]
        if not cache.has_entries:  # recurrent layers only: which of these tokens are real
            mask = self._padding_up_to(rows, used)
            return None if mask is None or past >= self._prompt_columns else mask[:, past:]
        if not cache.sees_one_span or (self.own_masks and self._is_ours(past, slots.shape[1])):
            first = None if self.first_real is None else self.first_real[row_index(rows, slots.device)]
            held = {window.layer_type: window.slots(slots.device) for window in cache.windows}
            if cache.sees_one_span and first is None:
                held = {name: keys[:1] for name, keys in held.items()}
                return ragged_mask(model, slots[:1], used, held, uniform=True)
            return ragged_mask(model, slots, used, held, first)
        return self._padding_up_to(rows, used)

    def _is_ours(self, past: int, width: int) -> bool:
        """Whether rows of equal lengths get one of our masks, if possible."""
        if self.padding_mask is None:
            return past > 0 and width > 1
        return past >= self._prompt_columns

    def _padding_up_to(self, rows: list[int], used: int) -> Tensor | None:
        """`[rows, used]`, which of the first `used` columns are real, as in vanilla; `None` where all are."""
        if self.padding_mask is None:
            return None
        prompt = self.padding_mask[row_index(rows, self.padding_mask.device), :used]
        return torch.cat([prompt, prompt.new_ones(len(prompt), used - prompt.shape[1])], dim=1).long()
