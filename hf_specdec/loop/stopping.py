"""Exact stopping: where in a block of new tokens vanilla `generate()` would have ended a row.

Criteria of transformers that depend only on one row's tokens (or on the clock) are evaluated per row on the committed
block. Any other criterion may count calls or look at other rows, so it is called exactly as vanilla calls it: once per
step, on the whole batch, with all rows at the same step. It cannot change tokens, only where a row ends. So rows do not
wait for each other: the call for a step comes when every row has reached it, and rows that were ahead are cut.

All of them read the host's copy of the tokens, so they do not wait for a device.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..sampling.context import Context
from ..sampling.pure import is_pure

Scores = Callable[[int], "tuple[Tensor, ...] | None"]

_KNOWN = {
    EosTokenCriteria: "eos",
    MaxLengthCriteria: "max_length",
    StopStringCriteria: "stop_string",
    MaxTimeCriteria: "max_time",
}


class Stopping:
    """Decides where rows end.

    Args:
        criteria: the prepared criteria of `generate()`.
        max_length: columns that the output may have at most.

    Attributes:
        pads_finished_rows: vanilla pads a finished row only if some criterion has `eos_token_id`; otherwise every row
            goes on until all have met a criterion.
        unknown: the criteria that may keep state between calls: neither transformers' own nor declared pure.
        columns: by row that has met a criterion, the column after the token at which it did.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int):
        self.criteria = criteria
        self.max_length = max_length
        self.pads_finished_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.unknown = [c for c in criteria if type(c) not in _KNOWN and not is_pure(c)]
        self.columns: dict[int, int] = {}
        self._time_is_up: bool | None = None  # what `MaxTimeCriteria` shall answer; `None` for their own clock
        self._asked: int | None = None  # `unknown` have been called for the steps of the columns before this one
        self._eos = {
            token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.flatten().tolist()
        }
        # These must see the tokens (or the clock) to decide.
        self._by_call = [c for c in criteria if type(c) in (StopStringCriteria, MaxTimeCriteria) or is_pure(c)]
        self._limits = [c for c in criteria if type(c) is MaxLengthCriteria and c.max_position_embeddings is not None]

    def first_end(self, context: Context, row: int, tokens: list[int]) -> tuple[int, str] | None:
        """How many of a row's next `tokens` vanilla would keep, and why it would end there.

        Returns: `(count, reason)` when the row ends within them, else `None`.
        """
        if self._by_call:
            context.write_on_host(row, tokens)
        for i, token in enumerate(tokens):
            end = context.ends[row] + i + 1
            reason = self.reason(context, row, token, end)
            if reason is not None:
                return i + 1, reason
        return None

    def reason(self, context: Context, row: int, token: int, end: int) -> str | None:
        """Which known criterion ends a row after `token`, its last one before column `end`."""
        if token in self._eos:
            return "eos"
        if end >= self.max_length:
            return "max_length"
        view = _on_host(context, slice(row, row + 1), end)
        for criterion in self._limits:
            if end > criterion.max_position_embeddings:
                criterion(view, None)  # for its warning
        reasons = (_KNOWN.get(type(c), "stopping_criteria") for c in self._by_call if _holds(self._ask(c, view)))
        return next(reasons, None)

    def ask_time(self, rows: list[int]) -> list[bool]:
        """By row, whether its time is up by the clock of this process."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        return [any(_holds(c(nothing, None)) for c in self.criteria if type(c) is MaxTimeCriteria)] * len(rows)

    def set_time(self, rows: list[int], are_up: list[bool]) -> None:
        """From now on criteria go by these answers to `ask_time`, instead of a clock."""
        self._time_is_up = any(are_up)

    def _ask(
        self, criterion: StoppingCriteria, view: Tensor, scores: tuple[Tensor, ...] | None = None
    ) -> Tensor | bool:
        if self._time_is_up is not None and type(criterion) is MaxTimeCriteria:
            return self._time_is_up
        answer: Tensor | bool = criterion(view, scores)
        return answer

    def width(self, context: Context) -> int:
        """Columns of the output: `max_length` until every row has met a criterion."""
        return max(self.columns.values()) if len(self.columns) == context.batch_size else context.max_length

    def ask_unknown(self, context: Context, ends: list[int], scores: Scores) -> None:
        """Call the unknown criteria for each step that all rows have reached, and note in `columns` the rows they end.

        Args:
            ends: by row of the batch, one past its last token on the host, committed or about to be.
            scores: those of a number of steps.
        """
        step = context.prompt_width if self._asked is None else self._asked
        while True:
            # After its end, a row has padding for all steps to come; or it goes on until all have ended.
            going = [row for row in range(context.batch_size) if not (self.pads_finished_rows and row in self.columns)]
            reached = min([self.width(context), *(ends[row] for row in going)])
            if step >= reached:
                self._asked = step
                return
            step += 1
            done = self.after_step(self.unknown, context, step, scores(step - context.prompt_width))
            for row in range(context.batch_size):
                if done[row] and step < self.columns.get(row, step + 1):
                    self.columns[row] = step
                    if self.pads_finished_rows:
                        context.pad_on_host(row, step, ends[row])

    def after_step(
        self, criteria: Iterable[StoppingCriteria], context: Context, end: int, scores: tuple[Tensor, ...] | None
    ) -> list[bool]:
        """By row of the batch, whether some criterion ends it, as vanilla asks after the step of column `end - 1`."""
        view = _on_host(context, slice(None), end)
        done = [False] * context.batch_size
        for criterion in criteria:
            answer = self._ask(criterion, view, scores)
            answers = answer.expand(context.batch_size).tolist() if isinstance(answer, Tensor) else [answer] * len(done)
            done = [bool(before or now) for before, now in zip(done, answers)]
        return done


class OwnStopping(Stopping):
    """For rows that have each their own criteria, and end by them whatever others do.

    Args:
        rows: batch size.
    """

    def __init__(self, rows: int):
        super().__init__(StoppingCriteriaList(), max_length=0)
        self.pads_finished_rows = True
        self._of: list[Stopping | None] = [None] * rows

    def restart(self, row: int, own: Stopping) -> None:
        """Another text takes the place of a row."""
        self._of[row] = own
        self.columns.pop(row, None)

    def first_end(self, context: Context, row: int, tokens: list[int]) -> tuple[int, str] | None:
        own = self._of[row]
        return None if own is None else own.first_end(context, row, tokens)

    def ask_time(self, rows: list[int]) -> list[bool]:
        return [own.ask_time([row])[0] for row in rows if (own := self._of[row]) is not None]

    def set_time(self, rows: list[int], are_up: list[bool]) -> None:
        for row, is_up in zip(rows, are_up):
            if (own := self._of[row]) is not None:
                own.set_time([row], [is_up])

    def width(self, context: Context) -> int:
        return context.max_length


def _on_host(context: Context, rows: slice, end: int) -> Tensor:
    """`[rows, end]`: the first columns of these rows, for criteria."""
    view = context.host[rows, :end]
    return view if context.host is context.tokens else view.as_subclass(HostIds)


def _holds(answer: Tensor | bool) -> bool:
    """What a criterion answers for one row."""
    return bool(answer.any()) if isinstance(answer, Tensor) else bool(answer)


class HostIds(Tensor):
    """Token ids on the host, for criteria that expect them on the model's device.

    What is computed from ids alone stays on the host. Where other tensors take part, the ids move to these' device.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = args, kwargs or {}
        others = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and not isinstance(leaf, cls)]
        device = next((other.device for other in others if other.device.type != "cpu"), None)
        if device is None:
            return super().__torch_function__(func, types, *inputs)
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(cls, lambda ids: ids.as_subclass(Tensor).to(device, non_blocking=True), inputs)
            return func(*args, **kwargs)
