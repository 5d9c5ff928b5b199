"""The "optimal" schedule: draft for as long as one more draft is expected to bring more tokens per second.

Owns running estimates of what drafts are worth and what forwards cost, both measured while decoding. Decoding stays
lossless whatever the estimates are: a decision depends only on past iterations, and on drafts that are verified or
dropped together with all drafts after them.

The decision. An iteration that drafts γ tokens in each row takes V(γ + 1) + γ·D seconds, where V is the target's
forward and D a forward of the draft. It commits 1 + a1 + a1·a2 + ... tokens per row, where aj is the probability that
draft j is accepted if all drafts before it are. The best γ maximises their ratio R. On a CPU, the draft's confidence
can be read without waiting for a device, so the decision is made token by token: a draft is worth its probability of
being accepted, and none is made once that is below R·(D + V') seconds, where V' is what one more token adds to V
(optimal stopping of a renewal process). γ is 0 where even the best R is below that of plain decoding; now and then a
draft of one token checks whether that has changed, each time after a longer pause.
"""

import itertools
import operator
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from ..drafters.base import GoOn
from ..records.stats import Iteration

MAX_GAMMA = 16
_FORGET = 0.97  # weight of an observation after one more of its kind
_RECENT = 0.9  # weight of an iteration after one more
_BINS = 10  # of the draft's confidence
_LEAN = 64.0  # the weight of the prior for V': that of one measurement 8 tokens away from the others
_LIKELY = 0.3  # while costs are unknown, draft tokens that are accepted with at least this probability
_ENOUGH = 2  # iterations to time before costs are believed
_INSTANT = 1e-9  # seconds; a clock may not advance between two readings
_FIRST_PROBE, _LAST_PROBE = 16, 256  # iterations between drafts while speculation does not pay


class Share:
    """A probability estimated from outcomes; older ones count less."""

    def __init__(self) -> None:
        self._hits = self._seen = 0.0
        self._doubt = 2.0  # weight of the prior

    def add(self, hit: bool) -> None:
        self._hits = _FORGET * self._hits + hit
        self._seen = _FORGET * self._seen + 1
        self._doubt *= _FORGET

    def value(self, prior: float) -> float:
        """The estimate; without outcomes it is `prior`."""
        return (self._hits + self._doubt * prior) / (self._seen + self._doubt)


class Costs(NamedTuple):
    """Seconds of an iteration.

    Attributes:
        plain: without drafts; `None` if not measured.
        block: the target's forward over one token and drafts, without what the drafts add to it.
        token: what each draft adds to that forward (V').
        draft: making one draft token (D); 0 for drafters without a model.
    """

    plain: float | None
    block: float
    token: float
    draft: float

    def iteration(self, gamma: int) -> float:
        """With γ > 0 drafts."""
        return max(self.block + gamma * (self.token + self.draft), _INSTANT)


class Estimates:
    """Estimates for one target with one drafter, kept from call to call.

    Costs are in seconds, by size class of the batch: 1, 2-3, 4-7, 8-15... rows.
    """

    def __init__(self) -> None:
        self.by_position: list[Share] = []
        self.by_confidence = [Share() for _ in range(_BINS)]
        self._verify: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(lambda: deque(maxlen=9)))
        self._draft: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=33))
        self.idle = 0  # iterations without drafts
        self.probe_after = _FIRST_PROBE

    def add_costs(self, iteration: Iteration) -> None:
        rows = len(iteration.rows).bit_length()
        width = max(len(step.drafted) for step in iteration.rows) + 1
        self._verify[rows][width].append(iteration.verify_seconds + iteration.other_seconds)
        if iteration.draft_forwards and not self.idle:  # after a pause the draft model had to catch up
            self._draft[rows].append(iteration.draft_seconds / iteration.draft_forwards)

    def costs(self, rows: int) -> Costs | None:
        """The cost of iterations over about this many rows; `None` while too few were measured."""
        measured = self._verify[rows.bit_length()]
        if sum(map(len, measured.values())) < _ENOUGH:
            return None
        plain = _typical(measured[1]) if 1 in measured else None
        # A single token may be much cheaper (matrix-vector products), which says nothing about further ones.
        points = [(w, _typical(s), len(s)) for w, s in measured.items() if w > 1 or len(measured) == 1]
        total = sum(n for _, _, n in points)
        center, seconds = (sum(point[k] * point[2] for point in points) / total for k in (0, 1))
        # The fit has a prior: few and noisy measurements would keep drafts short, and thereby stay few. With one row
        # the prior is V' = 0. Several rows are several tokens even without drafts: there it is the slope from plain.
        believed = 0.0 if rows == 1 or plain is None or center == 1 else (seconds - plain) / (center - 1)
        spread = sum(n * (w - center) ** 2 for w, _, n in points) + _LEAN
        rise = sum(n * (w - center) * (s - seconds) for w, s, n in points) + _LEAN * believed
        rise = max(rise / spread, 0.0)
        draft = self._draft[rows.bit_length()]
        return Costs(
            plain=plain,
            block=seconds - rise * (center - 1),
            token=rise,
            draft=_typical(draft) if draft else 0.0,
        )

    def space_probes(self, drafted: bool, hit: bool) -> None:
        """A failed probe doubles the wait for the next one; a successful one is followed by another at once."""
        if not drafted:
            self.idle += 1
        elif not hit:
            if self.idle >= self.probe_after:
                self.probe_after = min(2 * self.probe_after, _LAST_PROBE)
            self.idle = 0

    def acceptance(self, gamma: int) -> list[float]:
        """a1 .. aγ; the prior of a position is the estimate of the one before."""
        self.by_position.extend(Share() for _ in range(gamma - len(self.by_position)))
        chain = itertools.accumulate(self.by_position[:gamma], lambda prior, share: share.value(prior), initial=0.7)
        return list(chain)[1:]

    def confidence(self, given: float) -> float:
        """The probability that a draft token is accepted, given the draft model's probability for it."""
        return self.by_confidence[_bin(given)].value(given**0.5)


_estimates: "weakref.WeakKeyDictionary[object, weakref.WeakKeyDictionary[object, Estimates]]"
_estimates = weakref.WeakKeyDictionary()


def estimates_for(target: object, drafter: object) -> Estimates:
    """The estimates of this target with this draft model (or the target itself, for drafters without a model)."""
    return _estimates.setdefault(target, weakref.WeakKeyDictionary()).setdefault(drafter, Estimates())


class Optimal:
    """See the top of this file.

    Args:
        max_gamma: the longest draft.
        estimates: those of earlier calls; updated here.
        reads_confidence: the drafter asks `go_on` after each token.
    """

    def __init__(self, max_gamma: int, estimates: Estimates, reads_confidence: bool = False):
        self._max_gamma = max_gamma
        self.longest: int | None = max_gamma
        self._estimates = estimates
        self._reads_confidence = reads_confidence
        self.go_on: GoOn | None = self._go_on if reads_confidence else None
        self._has_begun = False
        self._paused = False  # speculation does not pay
        self._confidence: list[list[float]] = []  # by draft position, by active row
        self._alive: list[float] = []  # by active row, the probability that all its drafts so far are accepted
        self._costs: Costs | None = None
        self._acceptance: list[float] = []
        self._rate = 0.0  # R: tokens per second with drafts, over all rows
        self._rows = 0
        self._tokens = self._seconds = 0.0  # of recent iterations that drafted: per row, and as expected

    def plan(self, rows: int) -> int:
        """The longest draft of the next iteration over this many rows."""
        known = self._estimates
        if self._paused and known.idle < known.probe_after:
            return 0
        if rows.bit_length() != self._rows.bit_length():
            self._tokens = self._seconds = 0.0  # other costs
        self._rows, self._confidence, self._alive = rows, [], [1.0] * rows
        self._costs, self._acceptance = known.costs(rows), known.acceptance(self._max_gamma)
        expected = list(itertools.accumulate(self._acceptance, operator.mul))
        if self._costs is None:
            return self._max_gamma if self._reads_confidence else max(1, sum(p > _LIKELY for p in expected))
        if self._costs.plain is None:
            return 0  # once, to measure it
        tokens = itertools.accumulate(expected, initial=1.0)
        rates = [rows * n / self._costs.iteration(gamma) for gamma, n in enumerate(tokens) if gamma]
        self._rate = max(rates)
        if self._reads_confidence and self._seconds:
            # Only confident drafts reach late positions, so the acceptance there is too optimistic.
            self._rate = max(rows * self._tokens / self._seconds, rates[0])
        self._paused = self._rate <= rows / self._costs.plain
        if not self._paused:
            known.probe_after = _FIRST_PROBE
            return self._max_gamma if self._reads_confidence else rates.index(self._rate) + 1
        return 0 if known.idle < known.probe_after else 1

    def _go_on(self, confidence: list[float]) -> bool:
        """Whether to draft another token, given the draft's probabilities for the last ones, by row."""
        known = self._estimates
        self._confidence.append(confidence)
        self._alive = [p * known.confidence(c) for p, c in zip(self._alive, confidence)]
        drafted = len(self._confidence)
        if drafted >= self._max_gamma:
            return False
        if self._costs is None:
            return sum(self._alive) > _LIKELY * len(self._alive)
        return sum(self._alive) * self._acceptance[drafted] > (self._costs.draft + self._costs.token) * self._rate

    def update(self, iteration: Iteration) -> None:
        """Learn from one iteration."""
        known = self._estimates
        for slot, step in enumerate(iteration.rows):
            # A row that was cut by its end or by other rows says nothing about the drafts after that.
            for i in range(step.accepted + (step.kind == "correction")):
                known.by_position[i].add(i < step.accepted)
                if i < len(self._confidence):
                    known.by_confidence[_bin(self._confidence[i][slot])].add(i < step.accepted)
        longest = max(len(step.drafted) for step in iteration.rows)
        if self._has_begun:  # the first iteration also reads the prompts
            known.add_costs(iteration)
            if longest and self._costs is not None:
                committed = sum(len(step.committed) for step in iteration.rows) / len(iteration.rows)
                self._tokens = _RECENT * self._tokens + committed
                self._seconds = _RECENT * self._seconds + self._costs.iteration(longest)
        self._has_begun = True
        known.space_probes(longest > 0, hit=self._paused and any(step.accepted for step in iteration.rows))


def _typical(seconds: Sequence[float]) -> float:
    """The time without disturbances, which can only add to it: the lower quartile."""
    return max(sorted(seconds)[len(seconds) // 4], _INSTANT)


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
