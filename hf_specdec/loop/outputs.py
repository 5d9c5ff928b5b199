"""The outputs of `generate()` besides tokens: scores, logits, hidden states and attentions, in vanilla's shapes.

Owns the records of the call. Rows reach a step in different iterations; each row's part waits here for the others.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from ..models.encoded import PREFIX
from ..sampling.context import Context

Steps = list[dict[int, Tensor]]  # by step, by row of the batch
Layers = tuple[tuple[Tensor | None, ...] | None, ...]  # by step, by layer, as far as the model gave any


class Recorder:
    """Collects what the user asked for with `output_*=True`.

    The part of a finished row is zero (vanilla returns the model's outputs for padding), and so is left padding.

    Columns here are those of the call's attention mask: the context's, plus `column_offset`.

    Args:
        config: the call's generation config.
        context: where the tokens are.
        first: by row of the batch, the column of cache slot 0.
        column_offset: columns that came before the context's.
        past: columns that were cached before the call.
        windows: by layer, how many columns a sliding layer of transformers' cache attends to; `None` for all.
        has_encoder: the model has an encoder too, and prefixes the decoder's outputs.
        name: of the model's class, for messages.
    """

    def __init__(
        self,
        config: GenerationConfig,
        context: Context,
        first: list[int],
        column_offset: int,
        past: int,
        windows: list[int | None],
        has_encoder: bool = False,
        name: str = "the model",
    ):
        wanted = bool(config.return_dict_in_generate)
        self.wants_scores = wanted and bool(config.output_scores)
        self.wants_logits = wanted and bool(config.output_logits)
        self.wants_hidden_states = wanted and bool(config.output_hidden_states)
        self.wants_attentions = wanted and bool(config.output_attentions)
        self._selects = config.output_hidden_states  # a flag, or the layers to record
        self._name = name
        self._context = context
        self._first = first
        self._past = past
        self._windows = windows
        self._has_encoder = has_encoder
        self._prompt_end = context.prompt_width + column_offset
        self._scores: Steps = []
        self._logits: Steps = []
        self._layout: dict[str, list[bool]] = {}  # by kind of record, for each layer, whether a forward gave a tensor
        # By row, its queries in order: [layers + 1, queries, width] and [layers, heads, queries, slots].
        self._hidden_states: list[list[Tensor]] = [[] for _ in first]
        self._attentions: list[list[Tensor]] = [[] for _ in first]
        self._cross_attentions: list[list[Tensor]] = [[] for _ in first]  # [layers, heads, queries, encoder columns]

    @property
    def forward_kwargs(self) -> dict[str, Any]:
        """What to pass to the target's forwards."""
        kwargs = {"output_hidden_states": self._selects} if self.wants_hidden_states else {}
        return kwargs | ({"output_attentions": True} if self.wants_attentions else {})

    def prompt(self, output: ModelOutput) -> None:
        """Record hidden states and attentions of a forward over the columns of all rows, padding included."""
        for row, first in enumerate(self._first):
            query = max(first - self._past, 0)
            if self.wants_hidden_states:
                given = self._given("hidden_states", output, 3)
                _append(self._hidden_states[row], [layer[row, query:] for layer in given])
            if self.wants_attentions:
                given = self._given("attentions", output, 4)
                _append(self._attentions[row], [layer[row, :, query:, first:] for layer in given])

    @property
    def wants_tokens(self) -> bool:
        """Whether `token` has anything to record."""
        return self.wants_scores or self.wants_logits

    def layers(self, output: ModelOutput, counts: list[int], skipped: list[int] | None = None) -> None:
        """Record hidden states and attentions, if any, of `counts[i]` queries of each row, after `skipped[i]`."""
        hidden_states = self._given("hidden_states", output, 3) if self.wants_hidden_states else []
        attentions = self._given("attentions", output, 4) if self.wants_attentions else []
        crossed = self._given("cross_attentions", output, 4) if self.wants_attentions and self._has_encoder else []
        for i, (row, count) in enumerate(zip(self._context.rows, counts)):
            begin = skipped[i] if skipped else 0
            own = slice(begin, begin + count)
            _append(self._hidden_states[row], [layer[i, own] for layer in hidden_states])
            _append(self._attentions[row], [layer[i, :, own] for layer in attentions])
            _append(self._cross_attentions[row], [layer[i, :, :count] for layer in crossed])

    def _given(self, kind: str, output: ModelOutput, axes: int) -> list[Tensor]:
        """The tensors of one kind of record in a forward's output, for the layers that have one.

        Raises:
            ValueError: if they do not have this many axes: rows and queries would be elsewhere.
        """
        layers = output.get(PREFIX + kind if self._has_encoder and kind != "cross_attentions" else kind)
        if layers is None:
            return []
        self._layout[kind] = [layer is not None for layer in layers]
        given = [layer for layer in layers if layer is not None]
        for layer in given:
            if layer.ndim != axes:
                option = "output_hidden_states" if kind == "hidden_states" else "output_attentions"
                expected = "[rows, tokens, width]" if axes == 3 else "[rows, heads, tokens, columns]"
                raise ValueError(
                    f"`{option}` asks for what strategy='spec' cannot record of {self._name}: its {kind} have the "
                    f"shape {list(layer.shape)}, not {expected}. Leave the option out, or drop strategy='spec'"
                )
        return given

    def _in_layers(self, kind: str, given: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """One entry per layer: its tensor, or `None` if it has none."""
        given = iter(given)
        return tuple(next(given) if has else None for has in self._layout[kind])

    def _nothing(self, kind: str, steps: int) -> tuple[Any, ...] | None:
        """What vanilla returns where forwards gave no tensors of a kind; `None` if they did."""
        layout = self._layout.get(kind)
        return None if layout and any(layout) else (None if layout is None else (None,) * len(layout),) * steps

    def token(self, row: int, column: int, logits: Tensor, scores: Tensor) -> None:
        """Record the raw logits and processed scores, `[vocab]` each, that chose the token of a context column."""
        for wanted, steps, record in (
            (self.wants_logits, self._logits, logits),
            (self.wants_scores, self._scores, scores),
        ):
            if wanted:
                step = column - self._context.prompt_width
                steps.extend({} for _ in range(step + 1 - len(steps)))
                steps[step][row] = record.clone()

    def cut(self, row: int, column: int) -> None:
        """Forget a row's records of the tokens from a context column on."""
        steps = column - self._context.prompt_width
        for recorded in (self._scores, self._logits):
            for by_row in recorded[steps:]:
                by_row.pop(row, None)
        # The query of a column chooses the next column's token.
        queries = self._prompt_end + steps - 1 - max(self._past, self._first[row])
        for kind in (self._hidden_states, self._attentions, self._cross_attentions):
            kind[row] = _first_queries(kind[row], queries)

    def scores(self, steps: int) -> tuple[Tensor, ...] | None:
        """`[batch, vocab]` for each of the first `steps` new tokens, as far as they are known."""
        return self._per_step(self._scores, steps) if self.wants_scores else None

    def logits(self, steps: int) -> tuple[Tensor, ...] | None:
        return self._per_step(self._logits, steps) if self.wants_logits else None

    def hidden_states(self, steps: int) -> Layers | None:
        """Per step, per layer: `[batch, queries, width]`; the first step has the prompt's queries."""
        if not self.wants_hidden_states:
            return None
        if (nothing := self._nothing("hidden_states", steps)) is not None:
            return nothing
        rows = [torch.cat(parts, dim=1) for parts in self._hidden_states]  # each [layers, queries, width]
        result = []
        for begin, end in self._query_columns(steps):
            step = rows[0].new_zeros(rows[0].shape[0], len(rows), end - begin, rows[0].shape[2])
            for row, states in enumerate(rows):
                columns, queries = self._overlap(row, begin, end, states.shape[1])
                step[:, row, columns] = states[:, queries]
            result.append(self._in_layers("hidden_states", step))
        return tuple(result)

    def attentions(self, steps: int) -> Layers | None:
        """Per step, per layer: `[batch, heads, queries, columns so far]`; sliding layers show those in their window."""
        if not self.wants_attentions:
            return None
        if (nothing := self._nothing("attentions", steps)) is not None:
            return nothing
        layers, heads = self._attentions[0][0].shape[:2]
        rows = []  # each [layers, heads, queries, slots]
        for parts in self._attentions:
            slots = max(part.shape[3] for part in parts)
            rows.append(torch.cat([torch.nn.functional.pad(p, (0, slots - p.shape[3])) for p in parts], dim=2))
        result = []
        for begin, end in self._query_columns(steps):
            step = rows[0].new_zeros(layers, len(rows), heads, end - begin, end)
            for row, weights in enumerate(rows):
                columns, queries = self._overlap(row, begin, end, weights.shape[2])
                first = self._first[row]
                if columns.start < columns.stop:  # else the row has ended, perhaps before there were so many slots
                    step[:, row, :, columns, first:end] = weights[:, :, queries, : end - first]
            windows = [*self._windows, *[None] * layers][:layers]  # a user's cache may not know them yet
            shown = [end if window is None else min(begin, window - 1) + end - begin for window in windows]
            result.append(self._in_layers("attentions", (layer[..., -width:] for layer, width in zip(step, shown))))
        return tuple(result)

    def cross_attentions(self, steps: int) -> Layers | None:
        """Per step, per layer: `[batch, heads, queries, encoder columns]`."""
        if not self.wants_attentions or not self._has_encoder:
            return None
        if (nothing := self._nothing("cross_attentions", steps)) is not None:
            return nothing
        rows = [torch.cat(parts, dim=2) for parts in self._cross_attentions]
        layers, heads, _, width = rows[0].shape
        result = []
        for begin, end in self._query_columns(steps):
            step = rows[0].new_zeros(layers, len(rows), heads, end - begin, width)
            for row, weights in enumerate(rows):
                columns, queries = self._overlap(row, begin, end, weights.shape[2])
                step[:, row, :, columns] = weights[:, :, queries]
            result.append(self._in_layers("cross_attentions", step))
        return tuple(result)

    def _per_step(self, recorded: Steps, steps: int) -> tuple[Tensor, ...]:
        result = []
        for by_row in recorded[:steps]:
            record = next(iter(by_row.values()))
            blank = torch.zeros_like(record)
            result.append(torch.stack([by_row.get(row, blank) for row in range(self._context.batch_size)]))
        return tuple(result)

    def _query_columns(self, steps: int) -> list[tuple[int, int]]:
        """The columns `[begin, end)` that vanilla feeds at each step."""
        return [
            (self._past if step == 0 else self._prompt_end + step - 1, self._prompt_end + step) for step in range(steps)
        ]

    def _overlap(self, row: int, begin: int, end: int, recorded: int) -> tuple[slice, slice]:
        """The columns in `[begin, end)` that a row has records for, as indices of the step and of its records."""
        origin = max(self._past, self._first[row])  # the column of its first recorded query
        low, high = max(begin, origin), min(end, origin + recorded)
        high = max(low, high)
        return slice(low - begin, high - begin), slice(low - origin, high - origin)


def _append(parts: list[Tensor], layers: list[Tensor]) -> None:
    if layers:
        parts.append(torch.stack(layers))


def _first_queries(parts: list[Tensor], count: int) -> list[Tensor]:
    """The first `count` queries, which are the last axis but one, of consecutive records of a row."""
    kept = []
    for part in parts:
        kept.append(part[..., :count, :])
        count = max(count - part.shape[-2], 0)
    return kept
