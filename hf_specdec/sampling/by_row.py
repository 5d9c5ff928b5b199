"""Processors of rows that have each their own: those that `generate()` would prepare for the row alone.

Owns which row has which. Rows whose processors do the same are processed together (`processors.py`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .context import Context
from .row_processors import Constraint


class OwnProcessors(LogitsProcessorList):
    """A list of processors for each row of a batch.

    Args:
        rows: batch size.
    """

    def __init__(self, rows: int):
        super().__init__()
        self._of: list[list[Any]] = [[] for _ in range(rows)]

    def __bool__(self) -> bool:
        return any(self._of)

    @property
    def constrained(self) -> bool:
        """Whether any row has a constraint."""
        return any(isinstance(processor, Constraint) for own in self._of for processor in own)

    def restart(self, row: int, processors: LogitsProcessorList) -> None:
        """Another text takes the place of a row; an object of another row stands in for each one that is the same."""
        self._of[row] = []
        others = [own for own in self._of if own]
        self._of[row] = [
            next((other[i] for other in others if i < len(other) and _does_the_same(other[i], processor)), processor)
            for i, processor in enumerate(processors)
        ]

    def groups(self, rows: list[int]) -> list[list[tuple[Any, list[int]]]]:
        """By place in the lists: each processor there, and the indices of those of `rows` that have it."""
        found = []
        for i in range(max(len(self._of[row]) for row in rows)):
            by_object: dict[int, tuple[Any, list[int]]] = {}
            for slot, row in enumerate(rows):
                if i < len(self._of[row]):
                    processor = self._of[row][i]
                    by_object.setdefault(id(processor), (processor, []))[1].append(slot)
            found.append(list(by_object.values()))
        return found


class RowAlone(Context):
    """One row of a context, as the only row of a batch."""

    def __init__(self, context: Context, row: int):
        self.pad_token_id = context.pad_token_id
        self.prompt_width = context.prompt_width
        self.max_length = context.limits[row]
        self.tokens, self.host = context.tokens[row : row + 1], context.host[row : row + 1]
        self.first, self.ends, self.limits = [context.first[row]], [context.ends[row]], [context.limits[row]]
        self.rows = [0]


def _does_the_same(one: Any, other: Any) -> bool:
    """Whether two processors of transformers are the same but for their identity."""
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, Constraint):
        return False
    ours, theirs = vars(one), vars(other)
    return ours.keys() == theirs.keys() and all(_is_equal(value, theirs[name]) for name, value in ours.items())


def _is_equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.device == other.device and bool(torch.equal(one, other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_equal(value, other[key]) for key, value in one.items())
    return one is other or (isinstance(one, (int, float, str, bool, torch.device)) and one == other)
