"""States: layer contents without an entry per token, and their rollback to committed tokens.

A recurrent layer folds every token into one state, and no token can be removed again. So the states are copied before
each forward (a *snapshot*), and a row whose drafts were not all committed goes back to its snapshot:

    snapshot covers           fed                                          now covers
    row 0   the cat sat       on a mat | three drafts, all kept            the cat sat on a mat
    row 1   a dog             ran off to | "to" is rejected                a dog               ("ran off" is pending)
    row 2   one               two two two | nothing is kept                one                 (nothing is pending)

Tokens committed after the snapshot are *pending*: they are fed again, before the next drafts. All rows are fed the same
number of tokens, because padding would change a state that goes on.

Layers of unknown kinds (compressed caches, for example) are copied whole, so their rows can only go back together. A
layer is recurrent if it has `recurrent_states` and `conv_states`, whatever its name.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..device import CPU, row_index, to_device

_BY_ROW = ("conv_states", "recurrent_states")


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of a transformers cache keeps states that are tensors `[rows, ...]`."""
    return all(hasattr(layer, name) for name in _BY_ROW)


# Layers whose contents are fully known: keys and values, recurrent states, or both. A subclass may keep more.
_KNOWN = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "DummyLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
}


def is_known(layer: Any) -> bool:
    """Whether a layer of a transformers cache keeps only keys and values per token, and states."""
    name = type(layer).__name__
    return name in _KNOWN and type(layer) is getattr(cache_utils, name, None)


def has_states(cache: Cache) -> bool:
    """Whether any layer of a transformers cache keeps more than keys and values."""
    return any(is_recurrent(layer) or not is_known(layer) for layer in cache.layers)


def rows_are_independent(cache: Cache) -> bool:
    """Whether a row of a transformers cache can roll back without the others."""
    return all(is_known(layer) for layer in cache.layers)


def copy_states(source: Any, target: Any) -> None:
    """Copy everything except keys and values to a layer of the same kind."""
    only_states = is_known(source) or is_known(target)
    names = vars(LinearAttentionLayer(source.number_of_states)) if only_states else vars(source)
    vars(target).update({name: _copied(getattr(source, name)) for name in names})


@dataclass
class _Snapshot:
    """A copy of all states.

    Attributes:
        lengths: by active row, how many tokens it covers.
        by_row: states of recurrent layers, in the order of `_by_row`; those not created yet are absent, and count as 0.
        whole: all attributes of the other layers.
    """

    lengths: list[int]
    by_row: list[Tensor]
    whole: list[dict[str, Any]]


class States:
    """The states of one cache's active rows.

    Args:
        recurrent: layers that can roll back row by row.
        whole: layers that can only roll back all rows together.
    """

    def __init__(self, recurrent: list[Any], whole: list[Any]):
        self._recurrent = recurrent
        self.whole = whole
        self._snapshots: list[_Snapshot] = []

    def __bool__(self) -> bool:
        return bool(self._recurrent or self.whole)

    def take_snapshot(self, lengths: list[int]) -> None:
        """Copy the current states, which cover `lengths` tokens of the active rows."""
        by_row = [states.clone() for states in self._by_row()]
        self._snapshots.append(_Snapshot(list(lengths), by_row, [_copied(vars(layer)) for layer in self.whole]))

    def settle(self) -> None:
        """Discard the snapshots: everything that was fed is committed."""
        self._snapshots.clear()

    def roll_back(self, held: list[int], most: list[int]) -> list[int]:
        """Roll each row back to the latest snapshot of at most `most` tokens, then discard the snapshots.

        Args:
            held: by active row, how many tokens the states cover now.
            most: by active row, how many of them are committed.

        Returns: by active row, how many tokens the states cover after the rollback.
        """
        known = [*(snapshot.lengths for snapshot in self._snapshots), held]
        chosen = [max(i for i, lengths in enumerate(known) if lengths[row] <= end) for row, end in enumerate(most)]
        with torch.inference_mode():  # the states may have been created in it
            for index in set(chosen) - {len(self._snapshots)}:
                rows = [row for row, choice in enumerate(chosen) if choice == index]
                self._restore(self._snapshots[index], rows, all_rows=len(rows) == len(chosen))
        self.settle()
        return [known[choice][row] for row, choice in enumerate(chosen)]

    def select(self, index: list[int]) -> None:
        """Keep only these active rows, in this order."""
        self.settle()
        for layer in (*self._recurrent, *self.whole):
            reorder = getattr(layer, "select_rows", layer.reorder_cache)
            reorder(row_index(index, _device(layer)))

    def _by_row(self) -> list[Tensor]:
        return [states for layer in self._recurrent for states in states_of(layer)]

    def _restore(self, snapshot: _Snapshot, rows: list[int], all_rows: bool) -> None:
        if self.whole and not all_rows:
            names = sorted({type(layer).__name__ for layer in self.whole})
            raise RuntimeError(f"The rows of {', '.join(names)} can only roll back together: a bug in hf_specdec")
        for i, states in enumerate(self._by_row()):
            index = to_device(rows, states.device)
            if i >= len(snapshot.by_row):  # created by the undone forward
                states.index_fill_(0, index, 0)
            elif all_rows:
                states.copy_(snapshot.by_row[i])
            else:
                states.index_copy_(0, index, snapshot.by_row[i].index_select(0, index))
        for layer, attributes in zip(self.whole, snapshot.whole):
            vars(layer).update(_copied(attributes))


def states_of(layer: Any) -> list[Tensor]:
    """A recurrent layer's states that exist so far, each `[rows, ...]`; there may be several of a kind."""
    found = [state for name in _BY_ROW for state in getattr(layer, name).values()]
    return [state for state in found if state is not None]


def _device(layer: Any) -> torch.device:
    """Where a layer's tensors are."""
    found = (value for attribute in vars(layer).values() for value in _tensors(attribute))
    return next((tensor.device for tensor in found), CPU)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _copied(value: Any) -> Any:
    """A copy whose tensors are copies too; anything else is shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return copy.copy(value)
