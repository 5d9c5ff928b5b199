"""The rule of a call: how drafts are drawn, and which of them the target keeps. Both halves belong together.

`speculation_acceptance` names the rule of calls that sample. Every rule is exact: "token" and "block" commit samples of
the target's distribution, "coupled" the very tokens that a seed stands for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from .acceptance import Verdict, accept_block, accept_greedy, accept_sampled, draw
from .context import Context
from .noise import GumbelNoise

logger = logging.get_logger(__name__)


class Rule(ABC):
    """Draws a draft's tokens and judges them.

    Attributes:
        samples: whether the call samples.
        judges_blocks: it judges all drafts of a block together, not one position after the other.
    """

    samples = True
    judges_blocks = False

    @abstractmethod
    def draw(self, scores: Tensor, context: Context, offset: int) -> tuple[Tensor, Tensor | None]:
        """Choose draft tokens.

        Args:
            scores: `[rows, k, vocab]` float32, the draft's processed scores for the tokens at `offset` to
                `offset + k - 1` after each active row's last committed one.

        Returns: `[rows, k]` tokens, and the distributions `[rows, k, vocab]` that they were drawn from (q), or `None`
            for those that count as deterministic.
        """

    @abstractmethod
    def judge(
        self, tokens: Tensor, lengths: Tensor, q: Tensor | None, scores: Tensor, context: Context, offset: int = 0
    ) -> Verdict:
        """Keep drafts, and choose one token more; arguments as in `acceptance.py`.

        Args:
            offset: how many tokens of this iteration come before.
        """


class Greedy(Rule):
    """The likeliest token, of the draft and of the target."""

    samples = False

    def draw(self, scores: Tensor, context: Context, offset: int) -> tuple[Tensor, Tensor | None]:
        return scores.argmax(dim=-1), None

    def judge(
        self, tokens: Tensor, lengths: Tensor, q: Tensor | None, scores: Tensor, context: Context, offset: int = 0
    ) -> Verdict:
        return accept_greedy(tokens, lengths, scores)


class TokenRule(Rule):
    """Speculative sampling: each draft is kept with probability min(1, p / q)."""

    def draw(self, scores: Tensor, context: Context, offset: int) -> tuple[Tensor, Tensor | None]:
        q = scores.softmax(dim=-1).nan_to_num(nan=1.0)
        return draw(q.flatten(0, 1)).view(q.shape[:2]), q

    def judge(
        self, tokens: Tensor, lengths: Tensor, q: Tensor | None, scores: Tensor, context: Context, offset: int = 0
    ) -> Verdict:
        return accept_sampled(tokens, lengths, q, scores)


class BlockRule(TokenRule):
    """Block verification: drafts are drawn as for "token", and judged together."""

    judges_blocks = True

    def judge(
        self, tokens: Tensor, lengths: Tensor, q: Tensor | None, scores: Tensor, context: Context, offset: int = 0
    ) -> Verdict:
        return accept_block(tokens, lengths, q, scores)


class CoupledRule(Rule):
    """Draft and target draw with the same noise, and drafts are kept while equal (Daliri, Musco and Suresh 2024).

    The target's choice is its sample with that noise, whatever was drafted.
    """

    def __init__(self, noise: GumbelNoise):
        self.noise = noise

    def draw(self, scores: Tensor, context: Context, offset: int) -> tuple[Tensor, Tensor | None]:
        return self._noisy(scores, context, offset).argmax(dim=-1), None

    def judge(
        self, tokens: Tensor, lengths: Tensor, q: Tensor | None, scores: Tensor, context: Context, offset: int = 0
    ) -> Verdict:
        return accept_greedy(tokens, lengths, self._noisy(scores, context, offset))

    def _noisy(self, scores: Tensor, context: Context, offset: int) -> Tensor:
        return scores + self.noise.at(context, offset, scores.shape[1], scores.shape[2])


def make_rule(do_sample: bool, acceptance: str, seed: int | Sequence[int] | None, rows: int) -> Rule:
    """The rule of one call.

    Args:
        acceptance: one of `options.ACCEPTANCE_RULES`; greedy calls have but one rule.
        seed: for "coupled": one per row, or the first of consecutive ones; `None` draws it from torch's generator.
        rows: of the batch, as decoded.

    Raises:
        ValueError: if there is not one seed per row.
    """
    if not do_sample:
        if acceptance != "token":
            logger.warning_once(f"`speculation_acceptance={acceptance!r}` changes nothing: the call is greedy.")
        return Greedy()
    if acceptance != "coupled":
        return BlockRule() if acceptance == "block" else TokenRule()
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    seeds = [int(s) for s in seed] if isinstance(seed, Iterable) else [int(seed) + row for row in range(rows)]
    if len(seeds) != rows:
        raise ValueError(
            f"`speculation_seed` has {len(seeds)} seeds, but {rows} rows are decoded (each prompt "
            "`num_return_sequences` times): pass one seed per row, or a single one"
        )
    return CoupledRule(GumbelNoise(seeds))
