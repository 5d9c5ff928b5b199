"""RaggedCache: a model's cache for rows of different lengths.

Owns the storage of one model's keys and values and the length of each row. Its caller decides what is committed. A
rollback only sets a smaller length: nothing is copied or cleared. Layer states other than keys and values are in
`states.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..device import to_device
from .states import States, copy_states, is_known, is_recurrent
from .storage import RaggedLayer, round_up
from .window import WindowLayer


@dataclass(frozen=True)
class _Write:
    """Where the next forward writes: at `start` if all rows write at the same slot, else at `slots` `[rows, q]`."""

    used: int  # slots in use after the write, maximum over rows
    start: int
    slots: Tensor | None


class RaggedCache(Cache):
    """A cache whose rows have individual lengths and no padding.

    Three rows after a prefill and one iteration (`.` is free or rolled back, and always masked):

        row 0   the cat sat on  a   .   .   .        lengths[0] = 5
        row 1   a   dog .   .   .   .   .   .        lengths[1] = 2
        row 2   one two six ten .   .   .   .        lengths[2] = 4

    Only the rows in `rows` take part in a forward; `activate` moves them to the front of the storage.

    Memory: each row takes 2 · layers · kv_heads · head_dim · capacity numbers, whatever its length. Capacity
    starts slightly above the longest prompt and at most doubles, up to the most that the call can need. Layers grow one
    at a time, keys before values: the peak is the grown cache plus one layer's old keys or values.

    Args:
        batch_size: number of rows.
        device: device of index tensors.
        capacity: slots to allocate initially.
        max_capacity: the most slots that the call can need; growth is geometric up to it.
        layers: the model's layers (see `layers.py`); by default they are created on first use and hold every slot.
        storage_rows: rows to store, where forwards of fixed shapes need more than the batch has.
    """

    def __init__(
        self,
        batch_size: int,
        device: torch.device,
        capacity: int,
        max_capacity: int,
        layers: Sequence[Any] = (),
        storage_rows: int | None = None,
    ):
        super().__init__(layers=list(layers))
        mine = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        windows = [layer.window for layer in mine if isinstance(layer, WindowLayer)]
        self.windows = list({id(window): window for window in windows}.values())
        self.states = States(
            recurrent=[layer for layer in layers if is_recurrent(layer) and (layer in mine or is_known(layer))],
            whole=[layer for layer in layers if layer not in mine and not is_known(layer)],
        )
        self.device = device
        self.capacity = min(round_up(capacity), round_up(max_capacity))
        self.max_capacity = round_up(max_capacity)
        self.storage_rows = storage_rows or batch_size
        self.lengths = [0] * batch_size  # by row of the batch
        self._storage = list(range(batch_size))  # storage index -> row of the batch
        self._active = batch_size
        self._write: _Write | None = None

    @property
    def rows(self) -> list[int]:
        """The rows of the batch that take part in forwards, in order."""
        return self._storage[: self._active]

    def activate(self, rows: list[int]) -> None:
        """Run forwards over these rows from now on, in this order. Other rows keep their entries, not their states."""
        if rows == self.rows:
            return
        if self.states:
            self.states.select([self.rows.index(row) for row in rows])
        for i, row in enumerate(rows):
            j = self._storage.index(row)
            if i != j:
                used = max(self.lengths[row], self.lengths[self._storage[i]])
                for layer in self._with_entries():
                    layer.swap(i, j, used)
                self._storage[i], self._storage[j] = self._storage[j], self._storage[i]
        self._active = len(rows)

    @property
    def active_lengths(self) -> list[int]:
        return [self.lengths[row] for row in self.rows]

    @property
    def has_entries(self) -> bool:
        """Whether any layer has an entry per token."""
        return not self.layers or any(not is_recurrent(layer) or hasattr(layer, "keys") for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all active rows have the same length."""
        return len(set(self.active_lengths)) <= 1

    @property
    def sees_one_span(self) -> bool:
        """Whether the next forward sees the same slots of all active rows, so transformers can make its masks."""
        return self.is_uniform and all(window.view.is_uniform for window in self.windows)

    def prepare(self, query_length: int, ends: Sequence[int] | None = None, prefill: bool = False) -> None:
        """Announce a forward of `query_length` tokens per row. Each row writes after its own length.

        Args:
            ends: by active row, the length that a rollback will leave, once it is reached; its length by default.
            prefill: whether rows are certain to be rolled back to `ends`, because fill follows their own tokens.
        """
        lengths = self.active_lengths
        if self.states:
            self.states.take_snapshot(lengths)
        used = max(lengths) + query_length
        if used > self.capacity:
            self._grow(used)
        for window in self.windows:
            window.prepare(self, lengths if ends is None else ends, query_length, prefill)
        if self.is_uniform:
            self._write = _Write(used, lengths[0], None)
        else:
            starts = to_device(lengths, self.device)
            self._write = _Write(used, 0, starts[:, None] + torch.arange(query_length, device=self.device))

    def roll_back(self, rows: list[int], most: list[int]) -> None:
        """Keep at most `most` tokens of each of these rows; with states, as many as a snapshot covers."""
        limits = dict(zip(rows, most))
        kept = [min(self.lengths[row], limits.get(row, self.lengths[row])) for row in self.rows]
        if self.states:
            kept = self.states.roll_back(self.active_lengths, kept)
        for row, length in zip(self.rows, kept):
            self.lengths[row] = length

    def prepare_slots(self, slots: Tensor) -> None:
        """Announce a forward that writes to `slots` `[rows, q]` of the first rows stored and sees the whole capacity.

        Rows after the active ones must be given slots that hold no entry of theirs.
        """
        self._write = _Write(self.capacity, 0, slots)

    def restart(self, row: int) -> None:
        """Forget a row, which is not active: another one takes its place. For caches without states."""
        self.lengths[row] = 0
        for window in self.windows:
            window.base[row] = 0

    def allow(self, capacity: int) -> None:
        """From now on, rows may need as many slots as this."""
        self.max_capacity = max(self.max_capacity, round_up(capacity))
        for window in self.windows:
            window.limit = max(window.limit, min(window.size + window.slack, self.max_capacity))

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._with_entries())

    def clear(self, batch_size: int) -> None:
        """Discard all entries but keep the storage, for another batch of at most as many rows as are stored."""
        self.lengths = [0] * batch_size
        self._storage = list(range(batch_size))
        self._active = batch_size
        for layer in self._with_entries():
            layer.keys.zero_()
            layer.values.zero_()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write q new entries per row, `[rows, kv_heads, q, head_dim]`; return views of the slots in use."""
        write = self._write
        assert write is not None, "prepare() comes before a forward"
        layer = self._layer(layer_idx, key_states, value_states)
        if not isinstance(layer, RaggedLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if isinstance(layer, WindowLayer):
            return layer.update(key_states, value_states)
        return self._put(layer.keys, key_states, write), self._put(layer.values, value_states, write)

    def _put(self, storage: Tensor, states: Tensor, write: _Write) -> Tensor:
        """Write into the active rows, or as many as were announced; return a view of their slots in use."""
        rows = self._active if write.slots is None else len(write.slots)
        if rows < len(storage):
            storage = storage.narrow(0, 0, rows)
        if write.slots is None:
            storage.narrow(2, write.start, states.shape[2]).copy_(states)
        else:
            row_index = torch.arange(len(storage), device=storage.device)[:, None]
            storage[row_index, :, write.slots.to(storage.device)] = states.transpose(1, 2)
        return storage.narrow(2, 0, write.used)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the longest active row; of every active row when the cache is uniform."""
        return max(self.active_lengths)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, WindowLayer):
            return layer.window.view.used, min(layer.window.view.origins)
        if layer in self.states.whole:
            return layer.get_mask_sizes(query_length)
        return self.get_seq_length() + query_length, 0

    def _with_entries(self) -> Iterator[RaggedLayer]:
        """The layers that hold keys and values in our storage."""
        return (layer for layer in self.layers if isinstance(layer, RaggedLayer) and layer.is_initialized)

    def _layer(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(RaggedLayer())
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, RaggedLayer) and not layer.is_initialized:
            layer.allocate(self.storage_rows, self.capacity, key_states, value_states)
        return layer

    def _grow(self, needed: int) -> None:
        used = max(self.lengths)
        self.capacity = round_up(max(needed, min(2 * self.capacity, self.max_capacity)))
        for layer in self._with_entries():
            layer.grow(self.capacity, used)

    # Exchange with transformers caches, which hold all rows in equal columns.

    def load(self, source: Cache, first: list[int]) -> None:
        """Copy another cache's entries, dropping each row's left padding.

        Args:
            source: a transformers cache whose layers hold `[rows, kv_heads, columns, head_dim]`.
            first: each row's first column that is not padding; it becomes slot 0.
        """
        past = entries(source)
        self.lengths = [max(past - f, 0) for f in first]
        self.capacity = max(self.capacity, round_up(past))
        for window in self.windows:
            window.load(self)
        for mine, theirs in zip(self.layers, source.layers):
            if is_recurrent(mine) or mine in self.states.whole:
                copy_states(theirs, mine)
        for index, layer in enumerate(source.layers):
            if getattr(layer, "keys", None) is None or (
                index < len(self.layers) and self.layers[index] in self.states.whole
            ):
                continue
            keys, values = layer.keys, layer.values
            mine = self._layer(index, keys, values)
            held = min(keys.shape[-2], past)  # a sliding layer has dropped the oldest columns
            for row, f in enumerate(first):
                if f >= past:
                    continue
                base = mine.base(row)
                begin = max(past - held, f + base)  # columns [begin, past) are held, no padding, and needed
                columns, slots = slice(begin - (past - held), held), slice(begin - f - base, past - f - base)
                mine.keys[row, :, slots] = keys[row, :, columns]
                mine.values[row, :, slots] = values[row, :, columns]

    def columns(self, first: list[int], width: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each layer's entries in equal columns, `(layer_idx, keys, values)`: the inverse of `load`.

        Args:
            first: the column of each row's slot 0.
            width: number of columns; those without entries are zero.
        """
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RaggedLayer) or not layer.is_initialized:
                continue
            out = []
            for storage in (layer.keys, layer.values):
                states = storage.new_zeros(len(first), storage.shape[1], width, storage.shape[3])
                for position, row in enumerate(self._storage):
                    begin, end = first[row] + layer.base(row), min(first[row] + self.lengths[row], width)
                    states[row, :, begin:end] = storage[position, :, : end - begin]
                out.append(states)
            yield index, out[0], out[1]

    def copy_states_to(self, other: Cache) -> None:
        """Copy everything except keys and values to a transformers cache with the same kinds of layers."""
        for mine, theirs in zip(self.layers, other.layers):
            if is_recurrent(mine) or mine in self.states.whole:
                copy_states(mine, theirs)


def entries(cache: Cache) -> int:
    """How many tokens a transformers cache has keys and values for; 0 if no layer holds any.

    The cache's own `get_seq_length` asks one layer, which is empty if another pipeline stage owns it.
    """
    counts = (int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length"))
    return next(filter(None, counts), 0)
