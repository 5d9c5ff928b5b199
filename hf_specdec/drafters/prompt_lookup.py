"""Prompt look-up: propose the tokens that followed an earlier occurrence of the last n-gram (Saxena 2023; transformers
has it as `PromptLookupCandidateGenerator`). It needs no model and costs next to nothing; it suits outputs that repeat
their context. It reads the host's copy of the context, so it never waits for a device.
"""

import torch
from torch import Tensor

from ..device import CPU
from ..sampling.context import Context
from .base import Draft, Drafter, DraftRequest


class PromptLookupDrafter(Drafter):
    """Looks up the context's last n-gram in the context itself and in the encoder's input, longest n first.

    The occurrence with the most tokens after it wins (up to the number asked for); among equals, the latest.

    Args:
        max_matching_ngram_size: the longest n-gram to try.
    """

    in_vocabulary = True

    def __init__(self, max_matching_ngram_size: int = 2):
        if max_matching_ngram_size < 1:
            raise ValueError(f"`max_matching_ngram_size` must be at least 1, got {max_matching_ngram_size}")
        self.max_matching_ngram_size = max_matching_ngram_size

    def start(self, call: DraftRequest, context: Context) -> None:
        self._vocab_size = call.vocab_size
        encoded = None if call.encoder is None else call.encoder.token_ids()
        self._encoded = None if encoded is None else encoded.to(CPU)

    def restart(self, context: Context, row: int) -> None:
        """Nothing to do: it knows nothing but the context."""

    def propose(self, context: Context, max_tokens: int) -> Draft:
        ends, rows = torch.tensor(context.active_ends), torch.tensor(context.rows)
        first = torch.tensor([context.first[row] for row in context.rows])
        tokens = context.host[rows, : max(context.active_ends)]  # [rows, width]
        if self._encoded is not None:  # comes first; -1 stands for ids that are not tokens, and matches nothing
            padding = torch.arange(tokens.shape[1]) < first[:, None]
            tokens = torch.cat([self._encoded[rows], tokens.masked_fill(padding, -1)], dim=1)
            first, ends = torch.zeros_like(first), ends + self._encoded.shape[1]

        source = torch.zeros_like(ends)  # the column after the chosen occurrence
        found = torch.zeros_like(ends)  # how many tokens to copy from there
        for size in range(min(self.max_matching_ngram_size, tokens.shape[1] - 1), 0, -1):
            column, count = _best_match(tokens, first, ends, size, max_tokens)
            better = (found == 0) & (count > 0)
            source, found = torch.where(better, column, source), torch.where(better, count, found)

        offsets = torch.arange(max_tokens)
        drafts = tokens.gather(1, (source[:, None] + offsets).clamp(max=tokens.shape[1] - 1))
        # A source may contain ids that are not tokens (image placeholders, padding): copy only up to the first of them.
        copied = (offsets < found[:, None]) & (drafts >= 0) & (drafts < self._vocab_size)
        lengths: list[int] = copied.long().cumprod(dim=1).sum(dim=1).tolist()
        drafts = drafts[:, : max(lengths)].clamp(0, self._vocab_size - 1)
        return Draft(drafts.to(context.tokens.device, non_blocking=True), lengths=lengths)


def _best_match(tokens: Tensor, first: Tensor, ends: Tensor, size: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Per row, the column after the best earlier occurrence of the last `size` tokens, and how many tokens follow."""
    windows = tokens.unfold(1, size, 1)  # [rows, starts, size]
    starts = torch.arange(windows.shape[1])
    tail_columns = (ends[:, None] - size + torch.arange(size)).clamp(min=0)
    matches = (windows == tokens.gather(1, tail_columns)[:, None]).all(dim=-1)
    following = (ends[:, None] - (starts + size)).clamp(max=max_tokens)  # tokens after each window
    usable = matches & (starts >= first[:, None]) & (following > 0)
    score = torch.where(usable, following * windows.shape[1] + starts, -1)
    best, start = score.max(dim=1)
    return start + size, torch.where(best >= 0, following.gather(1, start[:, None]).squeeze(1), 0)
