"""Logits processors over a block of positions: each position is processed as vanilla `generate()` would process it.

Three kinds, distinguished by exact type, since a subclass may do anything:

- *prefix-blind*: see only the scores; run once over the whole block.
- *prefix-pure*: stateless functions of (tokens so far, scores); run per position, each on its own prefix.
- all others (classifier-free guidance, grammar matchers, user-written ones): may keep state between calls or read
  other rows, so they are called exactly as vanilla calls them: once per step, in order, on committed tokens only, with
  all rows at the same step. `loop/decoding.py` then advances the rows in lockstep.
"""

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList

from ..device import to_device
from .context import Context

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


BLIND = _classes(_BLIND)
PURE = _classes(_PURE)


class BlockProcessors:
    """A list of prefix-blind and prefix-pure processors, applied to several positions per row."""

    def __init__(self, processors: LogitsProcessorList):
        split = next((i for i, processor in enumerate(processors) if type(processor) not in BLIND), len(processors))
        self.blind = processors[:split]
        self.rest = LogitsProcessorList(processors[split:])  # order matters: blind ones after a pure one wait

    def __call__(self, logits: Tensor, context: Context, offset: int = 0) -> Tensor:
        """Process scores for the next positions of the active rows; the context must already hold the drafts.

        Args:
            logits: `[rows, k, vocab]` float32; `logits[r, j]` is for column `context.ends[r] + offset + j`.
            context: its columns before that one are the prefix.

        Returns: `[rows, k, vocab]` scores.
        """
        rows, k, vocab = logits.shape
        if self.blind:
            ids, scores = context.tokens.new_zeros(rows * k, 1), logits.reshape(rows * k, vocab)
            for processor in self.blind:  # a `LogitsProcessorList` would inspect every signature each time
                scores = processor(ids, scores)
            logits = scores.view(rows, k, vocab)
        return self._by_prefix(logits, context, offset) if self.rest else logits

    def _by_prefix(self, logits: Tensor, context: Context, offset: int) -> Tensor:
        # Processors may hold tensors with an entry per row of the batch, so each call passes all rows, in batch order.
        scores = logits.clone()
        starts = [end + offset for end in context.active_ends]
        for end in range(min(starts), min(max(starts) + logits.shape[1], context.max_length + 1)):
            here = [(i, end - start) for i, start in enumerate(starts) if 0 <= end - start < logits.shape[1]]
            if not here:
                continue
            slots, positions = (to_device(index, logits.device) for index in zip(*here))
            batch_rows = context.row_index[slots]
            full = logits.new_zeros(context.batch_size, logits.shape[2])
            full[batch_rows] = logits[slots, positions]
            # Other rows may hold padding after their ends that is not a valid token: pass zeros for them instead.
            prefix = context.view(end)
            prefix = torch.zeros_like(prefix).index_copy(0, batch_rows, prefix[batch_rows])
            scores[slots, positions] = self.rest(prefix, full)[batch_rows]
        return scores


def known(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that may be called on prefixes that are never committed."""
    return LogitsProcessorList([p for p in processors if type(p) in BLIND or type(p) in PURE])


def unknown_names(processors: LogitsProcessorList) -> list[str]:
    """Class names of the processors that must be called in order, on committed prefixes."""
    return [type(p).__name__ for p in processors if type(p) not in BLIND and type(p) not in PURE]
