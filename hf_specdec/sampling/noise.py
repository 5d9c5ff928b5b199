"""Gumbel noise that is a function of a seed, a position and a token: the same for draft and target, in any batch.

The largest of log p(x) + g(x), with independent standard Gumbel g, is a sample from p (Gumbel 1954; Maddison et al.
2014). Here g comes from a counter-based generator, SplitMix64 (Steele, Lea and Flood 2014): its state is a hash of seed
and position, and token x takes 31 bits of one half of its output number x // 2. Integers only, so all devices draw the
same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .context import Context

_STEP = 0x9E3779B97F4A7C15  # odd, 2**64 divided by the golden ratio
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_BITS = 64
_MASK = 2**_BITS - 1
_HALF = 2**31  # of each half of a number, the highest bit is left out


class GumbelNoise:
    """The noise of one `generate()` call.

    Args:
        seeds: by row of the batch, any whole numbers.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = list(seeds)
        self._place: object = None
        self._known: list[Tensor] = []  # by offset from the ends at that place, `[active rows, vocab]`

    def restart(self, row: int, seed: int) -> None:
        """Another text takes the place of a row."""
        self.seeds[row] = seed
        self._place = None  # it may look the same

    def at(self, context: Context, offset: int, count: int, vocab_size: int) -> Tensor:
        """`[active rows, count, vocab]` float32, for the tokens `offset`, `offset + 1`... after each row's last one.

        A position counts a row's tokens, the prompt included and padding not. What was asked for at the same place is
        remembered, since draft and target both need it.
        """
        place = (tuple(context.rows), tuple(context.active_ends), vocab_size)
        if place != self._place:
            self._place, self._known = place, []
        todo = range(len(self._known), offset + count)
        if todo:
            starts = [(self.seeds[row], length) for row, length in zip(context.rows, context.lengths)]
            states = [state(seed, length + i) for seed, length in starts for i in todo]
            new = gumbel(states, vocab_size, context.tokens.device).view(len(starts), len(todo), vocab_size)
            self._known += new.unbind(dim=1)
        return torch.stack(self._known[offset : offset + count], dim=1)


def state(seed: int, position: int) -> int:
    """The generator's state for one position of a text, 64 bits."""
    return _mixed(_mixed(seed & _MASK) + (position + 1) * _STEP & _MASK)


def gumbel(states: Sequence[int], size: int, device: torch.device) -> Tensor:
    """`[states, size]` float32 standard Gumbel noise."""
    signed = torch.tensor([s - 2**_BITS if s >= 2 ** (_BITS - 1) else s for s in states])
    step = _STEP - 2**_BITS
    numbers = torch.arange(1, (size + 1) // 2 + 1, device=device)
    bits = signed.to(device, non_blocking=True)[:, None] + numbers * step  # int64 arithmetic wraps around
    for shift, factor in _MIX:
        bits ^= (bits >> shift) & (2 ** (_BITS - shift) - 1)
        bits *= factor - 2**_BITS if factor >= 2 ** (_BITS - 1) else factor
    halves = bits.view(torch.int32).bitwise_and_(_HALF - 1)[:, :size]
    u = halves.float().add_(0.5).mul_(1 / _HALF).clamp_(max=1 - 2**-24)
    # log1p keeps small u apart, where the noise is large.
    return u.neg_().log1p_().neg_().log_().neg_()


def _mixed(x: int) -> int:
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor & _MASK
    return x
