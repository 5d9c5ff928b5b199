"""RaggedLayer: the storage of one layer's keys and values, by row and slot."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

_ROUND = 64  # capacities are multiples of this many tokens


class RaggedLayer(CacheLayerMixin):
    """One layer's storage: `keys` and `values`, `[rows, kv_heads, capacity, head_dim]`, filled from slot 0."""

    is_croppable = True
    supports_early_init = False

    def base(self, row: int) -> int:
        """The first slot held for a row of the batch; it is at index 0 of the storage."""
        return 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("RaggedCache allocates its layers itself")

    def allocate(self, rows: int, capacity: int, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            _storage(states, rows, states.shape[1], capacity, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def grow(self, capacity: int, used: int) -> None:
        """Move the first `used` slots to storage of `capacity` slots."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _storage(old, old.shape[0], old.shape[1], capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def swap(self, i: int, j: int, used: int) -> None:
        """Exchange the first `used` slots of two rows."""
        for states in (self.keys, self.values):
            swap_rows(states[:, :, :used], i, j)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("layers are updated through RaggedCache.update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("ask RaggedCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask RaggedCache")

    def get_max_length(self) -> int:
        return -1


def swap_rows(states: Tensor, i: int, j: int) -> None:
    """Exchange two rows in place. An index made of a list would wait for the device."""
    row = states[i].clone()
    states[i] = states[j]
    states[j] = row


def _storage(like: Tensor, *shape: int) -> Tensor:
    """Zeros that can be written both in and outside inference mode."""
    with torch.inference_mode(False):
        return like.new_zeros(shape)


def round_up(tokens: int) -> int:
    return -(-max(tokens, 1) // _ROUND) * _ROUND
