"""Logits processors that are functions of a row's own tokens, called for many positions of many rows at once.

A processor takes a rectangle of token ids, but there are rarely equally many tokens before two positions. What the
processors of transformers do with them decides which positions one call can serve:

- by their number: those of equal effect;
- by the last tokens, or by the set of them: all, with shorter prefixes filled on the left;
- by the row of the batch too (a processor that keeps the encoder's ids): those of equal length, with the whole batch;
- anything else: those of equal length.
"""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from ..device import to_device
from .context import Context
from .pure import is_pure, twice

NO_TOKEN = -1


@dataclass(frozen=True)
class Positions:
    """The positions of a block, one after another: of each active row in turn, its `k` next ones.

    Attributes:
        rows: by position, the row of the batch.
        ends: by position, how many columns of the context come before it.
    """

    context: Context
    rows: list[int]
    ends: list[int]

    @classmethod
    def after(cls, context: Context, offset: int, k: int) -> "Positions":
        """The `k` positions of each active row from `offset` after its end, without those past the last column."""
        pairs = [(row, context.ends[row] + offset + j) for row in context.rows for j in range(k)]
        return cls(context, [row for row, _ in pairs], [end for _, end in pairs])

    def ids(self, chosen: list[int], fill: bool | None = None) -> Tensor:
        """`[len(chosen), width]`: the tokens before these positions, right-aligned.

        Args:
            fill: what to put before shorter prefixes: their own first token (True), or `NO_TOKEN`.
        """
        tokens, ends = self.context.tokens, [self.ends[i] for i in chosen]
        rows = to_device([self.rows[i] for i in chosen], tokens.device)
        width = max(ends)
        if min(ends) == width:
            return tokens[:, :width].index_select(0, rows)
        columns = torch.arange(width, device=tokens.device) - (width - to_device(ends, tokens.device))[:, None]
        ids = tokens[rows[:, None], columns.clamp(min=0)]
        return ids if fill else ids.masked_fill(columns < 0, NO_TOKEN)


def _classes(names: dict[str, Any]) -> dict[type, Any]:
    """The same by class, for those that the installed transformers has."""
    module = transformers.generation.logits_process
    return {getattr(module, name): value for name, value in names.items() if hasattr(module, name)}


# By class: a function of the processor and a number of tokens. Equal values, equal effect.
_BY_NUMBER: dict[type, Callable[[Any, int], Hashable]] = _classes(
    {
        "MinLengthLogitsProcessor": lambda p, n: n < p.min_length,
        "MinNewTokensLengthLogitsProcessor": lambda p, n: n - p.prompt_length_to_skip < p.min_new_tokens,
        "ForcedBOSTokenLogitsProcessor": lambda p, n: n == 1,
        "ForcedEOSTokenLogitsProcessor": lambda p, n: n == p.max_length - 1,
        "ExponentialDecayLengthPenalty": lambda p, n: max(n, p.regulation_start),
        "SuppressTokensAtBeginLogitsProcessor": lambda p, n: n == p.begin_index,
    }
)
# By class: how many last tokens it reads at most. Before them, `NO_TOKEN` has no effect.
_BY_LAST: dict[type, Callable[[Any], int]] = _classes(
    {
        "NoRepeatNGramLogitsProcessor": lambda p: p.ngram_size,
        "SequenceBiasLogitsProcessor": lambda p: max(map(len, p.sequence_bias), default=0),
        "NoBadWordsLogitsProcessor": lambda p: max(map(len, p.sequence_bias), default=0),
        "WatermarkLogitsProcessor": lambda p: p.context_width,
    }
)
_OF_BATCH = _classes(dict.fromkeys(("EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor")))
_SET = _classes(dict.fromkeys(("RepetitionPenaltyLogitsProcessor",)))


def reads_the_batch(processor: Any) -> bool:
    """Whether a processor looks up something by a row's index in the batch."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    return type(processor) in _OF_BATCH or isinstance(ignored, Tensor)


def process(processor: Any, positions: Positions, scores: Tensor) -> Tensor:
    """Call a processor for each position, in as few calls as it allows.

    Args:
        scores: `[positions, vocab]`.

    Returns: the same, processed. Positions past the last column keep their scores: no token goes there.
    """
    within = [i for i, end in enumerate(positions.ends) if end <= positions.context.max_length]
    fill = _fill(processor, min((positions.ends[i] for i in within), default=0))
    result = None
    for chosen in _by_number(processor, positions, within) if fill is None else [within]:
        whole = len(chosen) == len(scores)
        index = to_device(chosen, scores.device)
        new = _call(processor, positions, chosen, scores if whole else scores[index], fill)
        if whole:
            return new
        result = scores.clone() if result is None else result
        result[index] = new
    return scores if result is None else result


def _fill(processor: Any, shortest: int) -> bool | None:
    """How one call can serve all positions after at least `shortest` tokens (`Positions.ids`); `None` if it cannot."""
    if type(processor) in _SET:
        ignored = getattr(processor, "prompt_ignore_length", None)
        return True if shortest > 0 and (ignored is None or isinstance(ignored, Tensor)) else None
    if type(processor) not in _BY_LAST or shortest < _BY_LAST[type(processor)](processor):
        return None
    return getattr(processor, "ngram_size", None) == 1  # n-grams of one token are a set of tokens


def _by_number(processor: Any, positions: Positions, within: list[int]) -> list[list[int]]:
    """Groups of positions before which there are so many tokens that one call can serve them."""
    key = _BY_NUMBER.get(type(processor), lambda _, n: n)
    groups: dict[Hashable, list[int]] = {}
    for i in within:
        groups.setdefault(key(processor, positions.ends[i]), []).append(i)
    return list(groups.values())


def _call(processor: Any, positions: Positions, chosen: list[int], given: Tensor, fill: bool | None) -> Tensor:
    """One call for the chosen positions, whose scores are `given`."""
    if type(processor) in _OF_BATCH:
        return _in_batch(processor, positions, chosen, given)
    if type(processor) in _BY_NUMBER:
        return processor(positions.context.tokens.new_zeros(1, 1).expand(len(chosen), positions.ends[chosen[0]]), given)
    ids = positions.ids(chosen, fill)
    if is_pure(processor):
        return twice(lambda: processor(ids, given.clone()), type(processor).__name__)  # it may write into its input
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):  # by row of the batch
        filled = [ids.shape[1] - positions.ends[i] for i in chosen]
        processor = copy.copy(processor)
        rows = [positions.rows[i] for i in chosen]
        processor.prompt_ignore_length = ignored[to_device(rows, ignored.device)] + to_device(filled, ignored.device)
    return processor(ids, given)


def _in_batch(processor: Any, positions: Positions, chosen: list[int], given: Tensor) -> Tensor:
    """One call for positions of equal length, at the places of their rows in a batch whose other rows are zeros."""
    context, ids = positions.context, positions.ids(chosen)
    rows = to_device([positions.rows[i] for i in chosen], given.device)
    batch = ids.new_zeros(context.batch_size, ids.shape[1]).index_copy(0, rows, ids)
    scores = given.new_zeros(context.batch_size, given.shape[1]).index_copy(0, rows, given)
    return processor(batch, scores)[rows]
