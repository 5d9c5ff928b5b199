"""Encoded: the encoder inputs of one decoder, and its cross-attention cache.

They stay the same for the whole call: the encoder's outputs, its padding mask, and the keys and values of
cross-attention, which the decoder computes from them in its first forward. Owns these for one decoder and returns those
of the active rows. `encoder_side.py` reads them from the call and decides which ones a target or draft gets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from ..cache.storage import swap_rows
from ..device import row_index
from ..sampling.context import Context

# Where the model also has an encoder, the decoder's inputs have this prefix.
PREFIX = "decoder_"
_PREFIXED = ("input_ids", "attention_mask", "position_ids")


class Encoded:
    """Constant inputs of one decoder's forwards, and its cross-attention cache.

    Args:
        inputs: the same for every forward, by name; tensors in them have one entry for each row of the batch.
        batch_size: rows in all.
        prefix: of the forward's parameters for ids, mask and positions: `PREFIX`, or "" for a model without encoder.
        uncounted: a token that later tokens of the same forward do not count in their positions, if there is one.
    """

    def __init__(self, inputs: dict[str, Any], batch_size: int, prefix: str = PREFIX, uncounted: int | None = None):
        self.prefix = prefix
        self.uncounted = uncounted
        self._inputs = {name: value for name, value in inputs.items() if value is not None}
        self._batch_size = batch_size
        self._rows = list(range(batch_size))  # those of the next forward
        self._selected = self._inputs  # of these rows
        self._cross = DynamicCache()
        self._storage: list[tuple[Tensor, Tensor]] = []  # keys and values by layer, of all rows
        self._order: list[int] = []  # storage index -> row of the batch

    def join(self, inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """A forward's `inputs` for `rows`, under this decoder's names, with the constant inputs added."""
        self._activate(rows)
        inputs = {self.prefix + name if name in _PREFIXED else name: value for name, value in inputs.items()}
        inputs["past_key_values"] = EncoderDecoderCache(inputs["past_key_values"], self._cross)
        return inputs | self._selected

    def until_uncounted(self, draft_tokens: Tensor) -> Tensor:
        """`[active rows]`: how many of these drafts `[active rows, k]` may be accepted together.

        Nothing may follow an uncounted token in one forward, because vanilla feeds it a step later.
        """
        assert self.uncounted is not None
        uncounted = (draft_tokens == self.uncounted).long()
        return (uncounted.cumsum(dim=1) == uncounted).sum(dim=1)

    def all_counted(self, context: Context, missing: list[int]) -> list[bool]:
        """By active row, whether drafts may follow its last `missing` tokens in one forward: none is uncounted."""
        ends = [(row, context.ends[row]) for row in context.rows]
        tails = [context.host[row, end - n : end].tolist() for (row, end), n in zip(ends, missing)]
        return [self.uncounted not in tail for tail in tails]

    def of_row(self, row: int) -> "Encoded":
        """The same for a single row of the batch, with nothing cached."""
        inputs = {name: select(value, [row], self._batch_size) for name, value in self._inputs.items()}
        return Encoded(inputs, 1, self.prefix)

    def load(self, cross: Cache) -> None:
        """Load the cross-attention of a cache that was used with the same encoder outputs."""
        for index, layer in enumerate(cross.layers):
            if layer.is_initialized and cross.get_seq_length(index):
                self._cross.update(layer.keys, layer.values, index)

    def hand_back(self, cache: EncoderDecoderCache) -> None:
        """Fill the cross-attention of a reset transformers cache; all rows must be active."""
        self._activate(list(range(self._batch_size)))
        for index, layer in enumerate(self._cross.layers):
            cache.cross_attention_cache.update(layer.keys.clone(), layer.values.clone(), index)
            cache.is_updated[index] = True

    def _activate(self, rows: list[int]) -> None:
        """Later forwards are over these rows, in this order; rows only move when some have finished."""
        if rows == self._rows:
            return
        self._selected = {name: select(value, rows, self._batch_size) for name, value in self._inputs.items()}
        layers = self._cross.layers
        if layers and not self._storage:
            self._storage = [(layer.keys, layer.values) for layer in layers]
            self._order = self._rows
        for i, row in enumerate(rows if self._storage else ()):
            j = self._order.index(row)
            if i != j:
                with torch.inference_mode():  # they may have been made in inference mode
                    for states in (states for layer in self._storage for states in layer):
                        swap_rows(states, i, j)
                self._order[i], self._order[j] = self._order[j], self._order[i]
        for layer, (keys, values) in zip(layers, self._storage):
            layer.keys, layer.values = keys[: len(rows)], values[: len(rows)]
        self._rows = list(rows)


def select(value: Any, rows: Sequence[int], batch_size: int) -> Any:
    """`value` with only these `rows` of each tensor in it that has one entry for each row of the batch."""
    if isinstance(value, Tensor):
        return value[row_index(rows, value.device)] if value.shape[:1] == (batch_size,) else value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: select(part, rows, batch_size) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(select(part, rows, batch_size) for part in value)
    return value
