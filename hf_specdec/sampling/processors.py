"""Logits processors over a block of positions: each position is processed as vanilla `generate()` would process it.

Four kinds. Those of transformers are told apart by their exact type, since a subclass may do anything:

- *prefix-blind*: see only the scores; run once over the whole block.
- *prefix-pure*: functions of (tokens so far, scores), by type or declared (`pure.py`); see `prefixes.py`.
- *constraints*: allow some tokens, by a state per row that can go back (`row_processors.py`, `matchers.py`), or by a
  pure `prefix_allowed_tokens_fn` (`pure.py`).
- all others (classifier-free guidance, user-written ones): may keep state between calls or read other rows, so they are
  called exactly as vanilla calls them: once per step, in order, on committed tokens only, with all rows at the same
  step. `loop/decoding.py` then advances the rows in lockstep.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from ..device import to_device, to_host
from .by_row import OwnProcessors, RowAlone
from .context import Context
from .matchers import could_be_by_row, row_processor
from .prefixes import Positions, process, reads_the_batch
from .pure import PrefixConstraint, is_pure
from .row_processors import Constraint, Mask, RowStates

_BLIND = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
_PURE = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
)


def _classes(names: tuple[str, ...]) -> frozenset[type]:
    """The processors with these names in the installed transformers."""
    module = transformers.generation.logits_process
    return frozenset(getattr(module, name) for name in names if hasattr(module, name))


_SAME = _classes(
    (
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
    )
)
BLIND = _classes(_BLIND)
PURE = _classes(_PURE)


class BlockProcessors:
    """A list of processors that are blind, pure or constraints, applied to several positions per row."""

    def __init__(self, processors: LogitsProcessorList):
        self.processors = processors

    def __call__(self, logits: Tensor, context: Context, offset: int = 0) -> Tensor:
        """Process scores for the next positions of the active rows; the context must already hold the drafts.

        Args:
            logits: `[rows, k, vocab]` float32; `logits[r, j]` is for column `context.ends[r] + offset + j`.
            context: its columns before that one are the prefix.

        Returns: `[rows, k, vocab]` scores.
        """
        rows, k, vocab = logits.shape
        if not self.processors:
            return logits
        if isinstance(self.processors, OwnProcessors):
            return _own(self.processors, logits, context, offset)
        positions = Positions.after(context, offset, k)
        constrained = any(isinstance(processor, Constraint) for processor in self.processors)
        drafts = drafts_of(context, offset + k - 1 if constrained else 0)
        scores, unread = logits.reshape(rows * k, vocab), context.tokens.new_zeros(rows * k, 1)
        for processor in self.processors:  # a `LogitsProcessorList` would inspect every signature each time
            if type(processor) in BLIND:
                scores = processor(unread, scores)
            elif isinstance(processor, Constraint):
                masks: list[Mask | None] = []
                for row, own in zip(context.rows, drafts):
                    found = processor.masks(context, row, own, offset) if len(own) >= offset else []
                    masks += [*found, *[None] * (k - len(found))]
                scores = processor.apply(scores, masks)
            else:
                scores = process(processor, positions, scores)
        return scores.view(rows, k, vocab)


def _own(own: OwnProcessors, logits: Tensor, context: Context, offset: int) -> Tensor:
    """The same for rows with lists of their own: each row as if it were alone."""
    scores, k = logits, logits.shape[1]
    drafts = drafts_of(context, offset + k - 1 if own.constrained else 0)
    for alike in own.groups(context.rows):
        for processor, slots in alike:
            whole = len(slots) == len(context.rows)
            index = to_device(slots, scores.device)
            given = scores if whole else scores[index]
            new = _one(processor, context, slots, given, [drafts[slot] for slot in slots], offset)
            scores = new if whole else scores.index_copy(0, index, new)
    return scores


def _one(
    processor: Any, context: Context, slots: list[int], scores: Tensor, drafts: list[list[int]], offset: int
) -> Tensor:
    """One processor over some of the active rows, which are at `slots`: `[len(slots), k, vocab]`."""
    n, k, vocab = scores.shape
    flat = scores.reshape(n * k, vocab)
    rows = [context.rows[slot] for slot in slots]
    if type(processor) in BLIND:
        flat = processor(context.tokens.new_zeros(n * k, 1), flat)
    elif isinstance(processor, Constraint):
        own = drafts[0]  # no two rows share a constraint
        alone = RowAlone(context, rows[0])
        found = processor.masks(alone, 0, own, offset) if len(own) >= offset else []
        flat = processor.apply(flat, [*found, *[None] * (k - len(found))])
    elif reads_the_batch(processor):
        parts = [
            process(processor, Positions.after(RowAlone(context, row), offset, k), part)
            for row, part in zip(rows, scores)
        ]
        flat = torch.cat(parts)
    else:
        pairs = [(row, context.ends[row] + offset + j) for row in rows for j in range(k)]
        flat = process(processor, Positions(context, *map(list, zip(*pairs))), flat)
    return flat.view(n, k, vocab)


def drafts_of(context: Context, width: int) -> list[list[int]]:
    """By active row, the `width` drafts after its end, but none past the row's limit. Reading waits for a device."""
    if width == 0:
        return [[] for _ in context.rows]
    drafts = to_host(context.gather(context.active_ends, width)).tolist()
    return [own[: max(context.limits[row] - context.ends[row], 0)] for row, own in zip(context.rows, drafts)]


def for_call(processors: LogitsProcessorList, prompts: Tensor, vocab_size: int) -> LogitsProcessorList:
    """The processors of one call, with a `Constraint` in place of each that can be one.

    Args:
        prompts: `[batch, columns]` on the CPU.
    """
    return LogitsProcessorList([_constraint(p, prompts, vocab_size) or p for p in processors])


def _constraint(processor: Any, prompts: Tensor, vocab_size: int) -> Constraint | None:
    if type(processor) is PrefixConstrainedLogitsProcessor:
        pure = is_pure(processor._prefix_allowed_tokens_fn)
        return PrefixConstraint(processor, vocab_size) if pure else None
    by_row = row_processor(processor, prompts, vocab_size)
    return None if by_row is None else RowStates(by_row, prompts)


def is_known(processor: Any) -> bool:
    """Whether a processor of one call may be called on prefixes that are never committed."""
    return (
        type(processor) in BLIND or type(processor) in PURE or isinstance(processor, Constraint) or is_pure(processor)
    )


def fits_any_prompt(processor: Any) -> bool:
    """Whether `generate()` prepares the same processor whatever the prompt is."""
    ignores = getattr(processor, "prompt_ignore_length", None) is not None
    same = type(processor) in BLIND or type(processor) in _SAME or is_pure(processor) or could_be_by_row(processor)
    return same and not ignores


def could_be_known(processor: Any) -> bool:
    """Whether `for_call` may put something known in a processor's place. Asks nothing of the processor."""
    if type(processor) is PrefixConstrainedLogitsProcessor:
        return is_pure(processor._prefix_allowed_tokens_fn)
    return is_known(processor) or could_be_by_row(processor)


def known(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that may be called on prefixes that are never committed."""
    return LogitsProcessorList(filter(is_known, processors))


def unknown_names(processors: LogitsProcessorList) -> list[str]:
    """Class names of the processors that must be called in order, on committed prefixes."""
    return [type(p).__name__ for p in processors if not is_known(p)]
