"""Layers that attend to a window: their storage is bounded by the window, not by the context.

Owns which slots of a sliding or chunked layer are still held, and where. `RaggedCache` calls it before each forward. A
rollback still only changes the cache's `lengths`, because slots that it may need are not dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..device import to_device
from .storage import RaggedLayer, round_up

_SLACK = 64  # at least so many slots after a window take new entries before the oldest are dropped
_LAYER_TYPES = ("sliding_attention", "chunked_attention")


class _Cache(Protocol):
    """The parts of `RaggedCache` that a window uses."""

    layers: list[Any]
    lengths: list[int]
    capacity: int
    device: torch.device

    @property
    def rows(self) -> list[int]: ...

    @property
    def active_lengths(self) -> list[int]: ...


class Window:
    """The slots that layers of one window size hold; one object serves all of them.

    Two rows, size 4, after a long and a short prompt (`.` is free or rolled back). Storage index i of row r is slot
    `base[r] + i`:

        row 0   s17 s18 s19 s20 s21  .   .   .        base[0] = 17, length 22
        row 1   s0  s1  s2   .   .   .   .   .        base[1] = 0,  length 3

    When a row runs out of room, each row's last `size` settled entries move to the front: one copy per many tokens.

    Args:
        size: keys that a query can see, including its own; for chunks, the chunk size, which is never less.
        layer_type: type of the layers, as in transformers' masks.
        rows: batch size.
        max_capacity: the most slots that the call can need.
    """

    def __init__(self, size: int, layer_type: str, rows: int, max_capacity: int):
        self.size = size
        self.layer_type = layer_type
        self.slack = max(_SLACK, size // 8)
        self.limit = min(size + self.slack, round_up(max_capacity))
        self.capacity = 0
        self.base = [0] * rows  # by row of the batch
        self.view = _View([0] * rows, 0)

    def prepare(self, cache: _Cache, ends: Sequence[int], query_length: int, prefill: bool) -> None:
        """Make room for `query_length` entries per active row and set the view; see `RaggedCache.prepare`."""
        self._allow(cache)
        if prefill or query_length > self.slack:
            self.view = self._join(cache, ends, query_length, prefill)
        else:
            self.view = self._in_place(cache, ends, query_length)

    def slots(self, device: torch.device) -> Tensor:
        """`[active rows, used]`: the slots that the prepared forward sees."""
        return to_device(self.view.origins, device)[:, None] + torch.arange(self.view.used, device=device)

    def load(self, cache: _Cache) -> None:
        """Prepare for the entries of another cache; `cache.lengths` already counts them."""
        self._allow(cache)
        self.base = [max(length - self.size + 1, 0) for length in cache.lengths]

    def _in_place(self, cache: _Cache, ends: Sequence[int], query_length: int) -> "_InPlace":
        """Append a few entries to those in storage."""
        rows, lengths = cache.rows, cache.active_lengths
        starts = [length - self.base[row] for row, length in zip(rows, lengths)]
        if max(starts) + query_length > self.capacity:
            self._compact(cache, [min(length, end) - self.size for length, end in zip(lengths, ends)])
            starts = [length - self.base[row] for row, length in zip(rows, lengths)]
        stop = max(starts) + query_length
        if stop > self.capacity:  # drafts longer than the slack
            self._grow(cache, stop + self.slack)
        first = min(max(start - self.size + 1, -self.base[row]) for row, start in zip(rows, starts))
        assert first >= 0, "a row was rolled back further than announced"
        origins = [self.base[row] + first for row in rows]
        if min(starts) == max(starts):
            return _InPlace(origins, stop - first, first, starts[0], None)
        slots = to_device(starts, cache.device)[:, None] + torch.arange(query_length, device=cache.device)
        return _InPlace(origins, stop - first, first, 0, slots)

    def _join(self, cache: _Cache, ends: Sequence[int], query_length: int, prefill: bool) -> "_Joined":
        """Show many new entries joined to those held; store only the entries needed later."""
        rows, lengths = cache.rows, cache.active_lengths
        settled = lengths if prefill else [min(length, end) for length, end in zip(lengths, ends)]
        origins = [max(length - self.size + 1, 0) for length in settled]
        held = [(o - self.base[row], length - self.base[row]) for row, o, length in zip(rows, origins, lengths)]
        kept: list[tuple[int, int] | None] = []
        for i, row in enumerate(rows):
            written = lengths[i] + query_length
            stop = min(written, ends[i]) if prefill else written
            if stop <= lengths[i]:
                kept.append(None)
                continue
            self.base[row] = max(min(written, ends[i]) - self.size, origins[i])
            kept.append((self.base[row] - origins[i], stop - origins[i]))
        longest = max((stop - start for start, stop in filter(None, kept)), default=0)
        if longest > self.capacity:
            self._grow(cache, longest if longest <= self.limit else longest + self.slack)
        used = max(stop - start for start, stop in held) + query_length
        return _Joined(origins, used, held, kept)

    def _compact(self, cache: _Cache, oldest: list[int]) -> None:
        """Drop the slots before `oldest` in each active row."""
        moves = []
        for row, length, slot in zip(cache.rows, cache.active_lengths, oldest):
            shift = max(slot - self.base[row], 0)
            moves.append((shift, length - self.base[row]))
            self.base[row] += shift
        for layer in self._layers(cache):
            layer.move_to_front(moves)

    def _allow(self, cache: _Cache) -> None:
        """Allow no more slots than other layers have: short contexts do not fill the window."""
        if self.capacity < min(cache.capacity, self.limit):
            self._grow(cache, min(cache.capacity, self.limit))

    def _grow(self, cache: _Cache, capacity: int) -> None:
        self.capacity = capacity
        for layer in self._layers(cache):
            layer.grow_to(self.capacity)

    def _layers(self, cache: _Cache) -> "list[WindowLayer]":
        return [
            layer
            for layer in cache.layers
            if isinstance(layer, WindowLayer) and layer.window is self and layer.is_initialized
        ]


@dataclass
class _View:
    """What a forward sees of each active row: `used` entries, starting at slot `origins[i]`."""

    origins: list[int]
    used: int

    @property
    def is_uniform(self) -> bool:
        return min(self.origins) == max(self.origins)

    def put(self, storage: Tensor, states: Tensor) -> Tensor:
        raise NotImplementedError("prepare() comes before a forward")


@dataclass
class _InPlace(_View):
    """New entries go into storage, at `start` or at `slots` `[rows, q]`; entries from `first` on are shown.

    All of these are storage indices.
    """

    first: int
    start: int
    slots: Tensor | None

    def put(self, storage: Tensor, states: Tensor) -> Tensor:
        if self.slots is None:
            storage.narrow(2, self.start, states.shape[2]).copy_(states)
        else:
            row_index = torch.arange(len(storage), device=storage.device)[:, None]
            storage[row_index, :, self.slots.to(storage.device)] = states.transpose(1, 2)
        return storage.narrow(2, self.first, self.used)


@dataclass
class _Joined(_View):
    """Shows each row's storage indices `held[i]`, then its new entries; stores indices `kept[i]` of the two joined."""

    held: list[tuple[int, int]]
    kept: list[tuple[int, int] | None]

    def put(self, storage: Tensor, states: Tensor) -> Tensor:
        joined = self._join(storage, states)
        if self.kept[0] is not None and len(set(self.kept)) == 1:
            start, stop = self.kept[0]
            storage[:, :, : stop - start] = joined[:, :, start:stop]
            return joined
        for row, part in enumerate(self.kept):
            if part is not None:
                storage[row, :, : part[1] - part[0]] = joined[row, :, part[0] : part[1]]
        return joined

    def _join(self, storage: Tensor, states: Tensor) -> Tensor:
        start, stop = self.held[0]
        if len(set(self.held)) == 1 and stop <= storage.shape[2]:
            return states if start == stop else torch.cat([storage[:, :, start:stop], states], dim=2)
        joined = states.new_zeros(states.shape[0], states.shape[1], self.used, states.shape[3])
        for row, (start, stop) in enumerate(self.held):
            there = storage[row, :, start:stop]  # fewer if the row is past its end
            joined[row, :, : there.shape[1]] = there
            joined[row, :, stop - start : stop - start + states.shape[2]] = states[row]
        return joined


class WindowLayer(RaggedLayer):
    """One layer's storage, `[rows, kv_heads, window.capacity, head_dim]`."""

    is_sliding = True
    window: Window

    def __init__(self, window: Window):
        super().__init__()
        self.window = window

    def base(self, row: int) -> int:
        return self.window.base[row]

    def allocate(self, rows: int, capacity: int, key_states: Tensor, value_states: Tensor) -> None:
        super().allocate(rows, self.window.capacity, key_states, value_states)

    def grow(self, capacity: int, used: int) -> None:
        """Does nothing: the window itself grows, up to its limit."""

    def grow_to(self, capacity: int) -> None:
        super().grow(capacity, self.keys.shape[2])

    def move_to_front(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move storage indices `[start, stop)` of each active row to `[0, stop - start)`."""
        for states in (self.keys, self.values):
            if len(set(moves)) == 1:
                start, stop = moves[0]
                states[: len(moves), :, : stop - start] = states[: len(moves), :, start:stop].clone()
                continue
            for row, (start, stop) in enumerate(moves):
                states[row, :, : stop - start] = states[row, :, start:stop].clone()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write into the first rows of the storage, as the window's view defines."""
        rows, view = len(key_states), self.window.view
        return view.put(self.keys[:rows], key_states), view.put(self.values[:rows], value_states)


def window_layers(layers: Sequence[Any], config: Any, rows: int, max_capacity: int) -> list[RaggedLayer]:
    """Create a layer for each layer of a transformers cache, windowed where that one is.

    Args:
        layers: layers of a `transformers.Cache` made for the model.
        config: the model's config.
        rows: batch size.
        max_capacity: the most slots that the call can need.

    Returns: an empty list if no layer slides, or if one mask per layer type cannot serve all layers of a type.
    """
    config = config.get_text_config(decoder=True)
    names: list[str] = getattr(config, "layer_types", None) or [_only_type(config)] * len(layers)
    sizes: dict[str, set[int]] = {}  # 0 for layers that hold everything
    for layer, name in zip(layers, names):
        if not _shares_entries(layer):
            sizes.setdefault(name, set()).add(_size(layer))
    sliding = {name for name, found in sizes.items() if found != {0}}
    bounded = all(name in _LAYER_TYPES and len(sizes[name]) == 1 for name in sliding)
    if not sliding or not bounded or len(names) < len(layers):
        return []
    windows = {name: Window(sizes[name].pop(), name, rows, max_capacity) for name in sliding}
    return [
        WindowLayer(windows[name]) if name in windows and not _shares_entries(layer) else RaggedLayer()
        for layer, name in zip(layers, names)
    ]


def _only_type(config: Any) -> str:
    """The type of all layers if the config does not name their types, as in `create_masks_for_generate`."""
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def _shares_entries(layer: Any) -> bool:
    """Whether the layer has no entries of its own."""
    return layer.is_initialized is True and layer.keys is None


def _size(layer: Any) -> int:
    if not getattr(layer, "is_sliding", False):
        return 0
    return getattr(layer, "sliding_window", None) or layer.max_cache_len
