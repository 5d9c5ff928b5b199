"""Logits processors that have a state per row and can go back: grammars, mostly.

Such a processor allows some tokens at each position. It is brought to any prefix of a row by going back and accepting
other tokens, so drafts are drawn under it, and a whole block is verified with it, in batches whose rows have different
lengths.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .context import Context

METHODS = ("accept", "rollback", "mask")


class RowProcessor(LogitsProcessor):
    """A logits processor with a state per row that can go back, such as a grammar.

    `generate()` without us can use it too. `strategy="spec"` recognises it by its methods `accept`, `rollback` and
    `mask`; it need not be a subclass. One object serves one `generate()` call at a time.
    """

    allows_beyond = False  # whether it allows the ids after those of its masks
    _seen: Tensor | None = None  # ids of the last call, where `generate()` calls it

    def begin(self, prompts: Tensor) -> None:
        """A `generate()` call begins with these prompts, `[batch, columns]`, left padding included.

        Every row is where it was before its first new token.
        """

    @abstractmethod
    def accept(self, row: int, token: int) -> None:
        """A row of the batch goes on with `token`, which its `mask` allows."""

    @abstractmethod
    def rollback(self, row: int, count: int) -> None:
        """Undo the last `count` calls of `accept` for a row."""

    @abstractmethod
    def mask(self, row: int) -> Tensor | None:
        """`[n]` bool on the CPU: the tokens that the row may go on with; `None` for all.

        If the model has more than n scores, the others are not allowed, unless `allows_beyond` is True.
        """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `generate()` calls after each step: the scores of tokens that are not allowed become -inf."""
        ids, seen = input_ids.to("cpu"), self._seen
        if seen is not None and seen.shape == (len(ids), ids.shape[1] - 1) and bool((ids[:, :-1] == seen).all()):
            for row, token in enumerate(ids[:, -1].tolist()):
                if token in Mask.of(self.mask(row), self):  # else the row has ended, and this is padding
                    self.accept(row, token)
        else:
            self.begin(ids)
        self._seen = ids.clone()
        masks = [Mask.of(self.mask(row), self) for row in range(len(ids))]
        return apply(scores, masks)


@dataclass(frozen=True)
class Mask:
    """The tokens that a row may go on with.

    Attributes:
        allowed: `[n]` bool on the CPU; `None` for all.
        beyond: whether ids from n on are allowed.
        only: the one allowed token, if there is just one.
    """

    allowed: Tensor | None = None
    beyond: bool = True
    only: int | None = None

    @classmethod
    def of(cls, allowed: Tensor | None, processor: Any) -> "Mask":
        """From what the `mask` of a `RowProcessor` has returned.

        Raises:
            TypeError: if that is not a mask.
        """
        if allowed is None:
            return cls()
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.ndim != 1:
            found = f"{allowed.dtype} {list(allowed.shape)}" if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"{type(processor).__name__}.mask must return a bool tensor [vocab] or None, got {found}")
        beyond = bool(getattr(processor, "allows_beyond", False))
        is_one = not beyond and int(allowed.count_nonzero()) == 1
        return cls(allowed.clone(), beyond, int(allowed.int().argmax()) if is_one else None)

    def __contains__(self, token: int) -> bool:
        return self.allowed is None or (bool(self.allowed[token]) if token < len(self.allowed) else self.beyond)

    def of_width(self, width: int) -> Tensor:
        """`[width]` bool."""
        if self.allowed is None:
            return torch.ones(width, dtype=torch.bool)
        missing = width - len(self.allowed)
        return torch.nn.functional.pad(self.allowed, (0, missing), value=self.beyond) if missing else self.allowed


def apply(scores: Tensor, masks: Sequence[Mask | None]) -> Tensor:
    """`[n, vocab]` scores with -inf for the tokens that the n masks do not allow."""
    if all(mask is None or mask.allowed is None for mask in masks):
        return scores
    allowed = torch.stack([(mask or Mask()).of_width(scores.shape[1]) for mask in masks])
    return scores.masked_fill(~allowed.to(scores.device, non_blocking=True), float("-inf"))


class Constraint(ABC):
    """What one processor allows in one call: masks for the positions of rows."""

    @abstractmethod
    def masks(self, context: Context, row: int, drafts: list[int], first: int) -> list[Mask | None]:
        """The masks of a row after `first`, `first + 1`, ... all of `drafts`, which follow its committed tokens.

        `None` after a draft that is not allowed: it is rejected, so nothing comes after it.
        """

    def apply(self, scores: Tensor, masks: Sequence[Mask | None]) -> Tensor:
        """`[n, vocab]` scores as the processor changes them, given the n masks."""
        return apply(scores, masks)


def forced_token(constraints: Sequence[Constraint], context: Context, row: int, drafts: list[int]) -> int | None:
    """The one token that may follow a row's drafts; `None` if there are several, or a draft is not allowed."""
    masks = [constraint.masks(context, row, drafts, len(drafts))[0] for constraint in constraints]
    return next((mask.only for mask in masks if mask is not None and mask.only is not None), None)


class RowStates(Constraint):
    """The states of one such processor in one call: brings each row to the prefix that is asked for.

    Args:
        processor: an object with the methods of `RowProcessor`.
        prompts: `[batch, columns]` on the CPU.
    """

    def __init__(self, processor: Any, prompts: Tensor):
        self.processor = processor
        batch, self._prompt_width = prompts.shape
        self._settled = [0] * batch  # by row, how many new tokens are committed for good
        self._after: list[list[int]] = [[] for _ in range(batch)]  # tokens accepted after these
        self._masks: list[dict[int, Mask]] = [{} for _ in range(batch)]  # by number of new tokens
        if callable(begin := getattr(processor, "begin", None)):
            begin(prompts)

    def masks(self, context: Context, row: int, drafts: list[int], first: int) -> list[Mask | None]:
        settled, after, known = self._settled[row], self._after[row], self._masks[row]
        committed = context.host[row, self._prompt_width + settled : context.ends[row]].tolist()
        line = committed + drafts
        same = next((i for i, pair in enumerate(zip(after, line)) if pair[0] != pair[1]), min(len(after), len(line)))
        if same < len(after):
            self._go_back(row, same)
        self._go_on(row, line, len(committed), len(committed))
        found: list[Mask | None] = []
        for count in range(len(committed) + first, len(line) + 1):
            number = settled + count
            if number not in known:
                if len(after) > count:
                    self._go_back(row, count)
                if not self._go_on(row, line, count, len(committed)):
                    break
                known[number] = Mask.of(self.processor.mask(row), self.processor)
            found.append(known[number])
        found += [None] * (len(drafts) + 1 - first - len(found))
        self._settle(row, len(committed))
        return found

    def _go_back(self, row: int, count: int) -> None:
        """Keep the first `count` tokens after the settled ones."""
        self.processor.rollback(row, len(self._after[row]) - count)
        del self._after[row][count:]
        last = self._settled[row] + count
        for number in [number for number in self._masks[row] if number > last]:
            del self._masks[row][number]

    def _go_on(self, row: int, line: list[int], count: int, committed: int) -> bool:
        """Accept tokens until there are `count`. Returns False at a draft that is not allowed."""
        after, known = self._after[row], self._masks[row]
        while len(after) < count:
            token, mask = line[len(after)], known.get(self._settled[row] + len(after))
            if len(after) >= committed and mask is not None and token not in mask:
                return False
            self.processor.accept(row, token)
            after.append(token)
        return True

    def _settle(self, row: int, committed: int) -> None:
        """Forget what was before the committed tokens: no row goes back there."""
        self._settled[row] += committed
        del self._after[row][:committed]
        for number in [number for number in self._masks[row] if number < self._settled[row]]:
            del self._masks[row][number]
