"""What forwards cost relative to one another, from times on a machine that may be busy with other work.

The unit is the target's forward over one token per row. A busy machine makes all forwards slower for a while, and some
of them much slower by chance. So times are compared with others of about the same time: a Kalman filter follows the
unit's seconds, which change, together with three numbers, which hardly do:

    target forward over w > 1 tokens per row    block * w ** growth
    draft forward                               draft

All of its arithmetic is on logarithms, where this is linear. How much times scatter is estimated too. A time that
surprises by more than a few standard deviations counts the less, the more it surprises.
"""

from math import exp, log, sqrt
from typing import NamedTuple

INSTANT = 1e-9  # seconds; a clock may not advance between two readings
_NOISE, _LEAST_NOISE = 0.1**2, 0.03**2  # variance of a logarithm: first guess, and the least
_NOISE_GAIN = 0.05
_MOST_SIGMAS = 2.5  # of a surprise that is fully believed
_UNIT_DRIFT = 0.1  # variance that the unit gains per iteration, relative to the noise
_FREE = 1e-3  # units; no less matters
# The first belief by number of rows: the block's standard deviation; the growth, and its standard deviation.
_ONE_ROW, _SEVERAL_ROWS = (0.7, 0.0, 0.15), (0.3, 0.2, 0.3)
_USUAL = 8  # a usual draft length
_DRIFT = 1e-4  # variance that each ratio gains per iteration: contexts become longer


class Costs(NamedTuple):
    """What forwards cost, in units.

    Attributes:
        block, growth: of the target; see the top of this file.
        draft: a forward of the draft (D).
        at_once: one such forward makes all drafts of an iteration.
    """

    block: float
    growth: float
    draft: float
    at_once: bool = False

    def verify(self, width: int) -> float:
        """The target's forward over so many tokens per row (V)."""
        return 1.0 if width == 1 else self.block * width**self.growth

    def iteration(self, gamma: int) -> float:
        """With γ drafts."""
        return self.verify(gamma + 1) + self.draft_forwards(gamma) * self.draft

    def draft_forwards(self, gamma: int) -> int:
        """Of the draft, for γ drafts."""
        return min(gamma, 1) if self.at_once else gamma

    @property
    def one_more(self) -> float:
        """What another draft adds to an iteration (D + V'), as a mean over drafts of usual lengths."""
        return self.draft * (not self.at_once) + (self.verify(_USUAL + 1) - self.verify(2)) / (_USUAL - 1)


class CostEstimates:
    """The costs of iterations over about the same number of rows.

    Args:
        rows: of the batch. Few measurements cannot tell whether a block costs more because it is one, or because of the
            number of its tokens. The first is believed of a single row, whose one token may be read by a special
            matrix-vector product; the second of several rows, which are several tokens even without drafts.
        draft: what a draft's forward is believed to cost before it was measured.
        at_once: see `Costs`.

    Attributes:
        plain_seen, drafted_seen: how many iterations without and with drafts were measured.
        since_plain: how many with drafts since the last one without.
        draft_seen: how often a forward of the draft was.
    """

    def __init__(self, rows: int, draft: float, at_once: bool = False):
        self._at_once = at_once
        block_sd, growth, growth_sd = _ONE_ROW if rows == 1 else _SEVERAL_ROWS
        self._x = [0.0, 0.0, growth, log(draft)]  # logarithms, except for the growth: unit, block, growth, draft
        variances = (100.0, block_sd**2, growth_sd**2, 0.5)
        self._p = [[v if i == j else 0.0 for j in range(4)] for i, v in enumerate(variances)]
        self._noise = _NOISE
        self.plain_seen = self.drafted_seen = self.since_plain = self.draft_seen = 0

    @property
    def unit(self) -> float:
        """Seconds of the target's forward over one token per row, at present."""
        return exp(self._x[0])

    @property
    def costs(self) -> Costs:
        has_draft = self.draft_seen > 0 or self.drafted_seen == 0  # some drafters have no model
        return Costs(exp(self._x[1]), max(self._x[2], 0.0), exp(self._x[3]) if has_draft else 0.0, self._at_once)

    def doubt(self, gamma: int) -> float:
        """The standard deviation of the cost of an iteration with γ > 0 drafts, as a share of it."""
        costs = self.costs
        verify = costs.verify(gamma + 1)
        slope = [0.0, verify, verify * log(gamma + 1), costs.draft_forwards(gamma) * costs.draft]
        variance = sum(slope[i] * slope[j] * self._p[i][j] for i in range(1, 4) for j in range(1, 4))
        return sqrt(max(variance, 0.0)) / max(costs.iteration(gamma), _FREE)

    def add(self, width: int, verify_seconds: float, draft_seconds: float | None) -> None:
        """Learn from one iteration.

        Args:
            width: tokens per row in the target's forward.
            draft_seconds: of one draft forward; `None` if there was none that says anything about others.
        """
        self._p[0][0] += _UNIT_DRIFT * self._noise
        for i in (1, 2, 3):
            self._p[i][i] += _DRIFT
        if width == 1:
            self.plain_seen, self.since_plain = self.plain_seen + 1, 0
            self._observe(verify_seconds, [1.0, 0.0, 0.0, 0.0])
        else:
            self.drafted_seen, self.since_plain = self.drafted_seen + 1, self.since_plain + 1
            self._observe(verify_seconds, [1.0, 1.0, log(width), 0.0])
        if draft_seconds is not None:
            self.draft_seen += 1
            self._observe(max(draft_seconds, _FREE * self.unit), [1.0, 0.0, 0.0, 1.0])

    def _observe(self, seconds: float, slope: list[float]) -> None:
        """One step of the filter: of these seconds, the logarithm is expected to be the state times `slope`."""
        surprise = log(max(seconds, INSTANT)) - sum(x * h for x, h in zip(self._x, slope))
        gain = [sum(p * h for p, h in zip(row, slope)) for row in self._p]
        known = sum(h * g for h, g in zip(slope, gain))  # variance of what was expected
        variance = known + self._noise
        if surprise**2 > _MOST_SIGMAS**2 * variance:  # it is believed less, the more surprising it is
            variance = surprise**2 / _MOST_SIGMAS**2
        unexplained = min(max(surprise**2 - known, 0.0), _MOST_SIGMAS**2 * self._noise)
        self._noise = max(self._noise + _NOISE_GAIN * (unexplained - self._noise), _LEAST_NOISE)
        for i in range(4):
            self._x[i] += gain[i] / variance * surprise
            for j in range(4):
                self._p[i][j] -= gain[i] * gain[j] / variance
