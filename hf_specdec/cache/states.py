"""States: what layers keep that has no entry per token, and how it goes back to committed tokens.

A recurrent layer folds every token into one state, from which none can be taken out again. So before each forward the
states are copied (a *mark*), and a row whose drafts were not all committed goes back to its mark:

    marked at                 fed                                          now stands for
    row 0   the cat sat       on a mat | three drafts, all kept            the cat sat on a mat
    row 1   a dog             ran off to | "to" is rejected                a dog               ("ran off" is pending)
    row 2   one               two two two | nothing is kept                one                 (nothing is pending)

What is committed behind the mark is *pending*: fed again, in front of the next drafts. All rows are fed equally many
tokens, since padding would change a state that goes on.

Layers of kinds that we do not know (compressed caches, say) are copied whole, so that their rows can only go back
together. No layer is asked for its name: it is recurrent if it has `recurrent_states` and `conv_states`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..device import to_device

_BY_ROW = ("conv_states", "recurrent_states")


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of transformers' caches keeps states that are tensors `[rows, ...]`."""
    return all(hasattr(layer, name) for name in _BY_ROW)


# Layers of which everything is known: keys and values, recurrent states, or both. A subclass may keep more.
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
    """Whether a layer of transformers' caches keeps nothing but keys and values for each token, and states."""
    name = type(layer).__name__
    return name in _KNOWN and type(layer) is getattr(cache_utils, name, None)


def has_states(cache: Cache) -> bool:
    """Whether layers of a cache of transformers keep anything besides keys and values."""
    return any(is_recurrent(layer) or not is_known(layer) for layer in cache.layers)


def rows_are_independent(cache: Cache) -> bool:
    """Whether a row of a cache of transformers can go back without the others."""
    return all(is_known(layer) for layer in cache.layers)


def copy_states(source: Any, target: Any) -> None:
    """Give one layer what another of its kind keeps besides keys and values."""
    only_states = is_known(source) or is_known(target)
    names = vars(LinearAttentionLayer(source.number_of_states)) if only_states else vars(source)
    vars(target).update({name: _copied(getattr(source, name)) for name in names})


@dataclass
class _Mark:
    """A copy of all states.

    Attributes:
        lengths: by active row, how many tokens it stands for.
        by_row: of recurrent layers, in the order of `_by_row`; fewer if they were not all made yet, being zero then.
        whole: of other layers, all attributes.
    """

    lengths: list[int]
    by_row: list[Tensor]
    whole: list[dict[str, Any]]


class States:
    """The states of one cache's active rows.

    Args:
        recurrent: layers whose states can go back row by row.
        whole: layers that can only go back whole, with all rows.
    """

    def __init__(self, recurrent: list[Any], whole: list[Any]):
        self._recurrent = recurrent
        self.whole = whole
        self._marks: list[_Mark] = []

    def __bool__(self) -> bool:
        return bool(self._recurrent or self.whole)

    def mark(self, lengths: list[int]) -> None:
        """Remember the states as they are; they stand for so many tokens of each active row."""
        by_row = [states.clone() for states in self._by_row()]
        self._marks.append(_Mark(list(lengths), by_row, [_copied(vars(layer)) for layer in self.whole]))

    def settle(self) -> None:
        """Forget the marks: everything that was fed is committed."""
        self._marks.clear()

    def roll_back(self, held: list[int], most: list[int]) -> list[int]:
        """Go back, row by row, to the latest mark that stands for no more than `most` tokens; then forget the marks.

        Args:
            held: by active row, how many tokens the states stand for now.
            most: by active row, how many of them are committed.

        Returns: by active row, how many tokens the states stand for.
        """
        known = [*(mark.lengths for mark in self._marks), held]
        chosen = [max(i for i, lengths in enumerate(known) if lengths[row] <= end) for row, end in enumerate(most)]
        with torch.inference_mode():  # in which the states may have been made
            for index in set(chosen) - {len(self._marks)}:
                rows = [row for row, choice in enumerate(chosen) if choice == index]
                self._restore(self._marks[index], rows, all_rows=len(rows) == len(chosen))
        self.settle()
        return [known[choice][row] for row, choice in enumerate(chosen)]

    def select(self, index: list[int]) -> None:
        """Keep only these of the active rows, in this order."""
        self.settle()
        for layer in (*self._recurrent, *self.whole):
            reorder = getattr(layer, "select_rows", layer.reorder_cache)
            reorder(torch.tensor(index))  # which each layer moves to its own device

    def _by_row(self) -> list[Tensor]:
        return [states for layer in self._recurrent for states in states_of(layer)]

    def _restore(self, mark: _Mark, rows: list[int], all_rows: bool) -> None:
        if self.whole and not all_rows:
            names = sorted({type(layer).__name__ for layer in self.whole})
            raise RuntimeError(f"The rows of {', '.join(names)} can only go back together: a bug in hf_specdec")
        for i, states in enumerate(self._by_row()):
            index = to_device(rows, states.device)
            if i >= len(mark.by_row):  # made by the forward that is undone
                states.index_fill_(0, index, 0)
            elif all_rows:
                states.copy_(mark.by_row[i])
            else:
                states.index_copy_(0, index, mark.by_row[i].index_select(0, index))
        for layer, attributes in zip(self.whole, mark.whole):
            vars(layer).update(_copied(attributes))


def states_of(layer: Any) -> list[Tensor]:
    """A recurrent layer's states, each `[rows, ...]`, as far as they were made; there may be several of a kind."""
    found = [state for name in _BY_ROW for state in getattr(layer, name).values()]
    return [state for state in found if state is not None]


def _copied(value: Any) -> Any:
    """A copy whose tensors are copies too; anything else is shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return copy.copy(value)
