"""The "optimal" schedule: draft for as long as one more draft is expected to bring more tokens per second.

Owns running estimates of what drafts are worth and what forwards cost, both measured while decoding. Lossless whatever
they are: a decision depends only on past iterations and on drafts that are verified or dropped with all behind them.

The decision. An iteration that drafts γ tokens in each row takes V(γ + 1) + γ·D seconds, V the target's forward and D a
forward of the draft, and commits 1 + a1 + a1·a2 + ... tokens per row, aj the probability that draft j is accepted if
all before it are. The best γ maximises their ratio R. Where the draft's confidence can be read without waiting for a
device (CPU), it is decided token by token instead: a draft is worth its probability of being accepted, and is not made
once that is below R·(D + V') seconds, V' being what one more token adds to V (optimal stopping of a renewal process).
γ = 0 where even the best R is below that of plain decoding; a draft of one token, ever more rarely, then probes whether
that has changed.
"""

import itertools
import operator
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence

from .drafters.base import GoOn
from .stats import Iteration

MAX_GAMMA = 16
_FORGET = 0.97  # weight of an observation after one more of its kind
_RECENT = 0.9  # weight of an iteration after one more
_BINS = 10  # of the draft's confidence
_LEAN = 64.0  # how strongly V' leans towards 0: as one measurement 8 tokens off the others would
_LIKELY = 0.3  # while costs are unknown, drafts are made that are accepted with this probability
_CLEARLY = 1.5  # above this estimated speed-up plain decoding need not be measured
_FIRST_PROBE, _LAST_PROBE = 16, 256  # iterations between drafts while speculation does not pay


class Share:
    """A probability estimated from outcomes, old ones counting less."""

    def __init__(self) -> None:
        self._hits = self._seen = 0.0

    def add(self, hit: bool) -> None:
        self._hits = _FORGET * self._hits + hit
        self._seen = _FORGET * self._seen + 1

    def value(self, prior: float) -> float:
        """The estimate, where two outcomes of mean `prior` count as seen."""
        return (self._hits + 2 * prior) / (self._seen + 2)


class Estimates:
    """What is known of one target with one drafter; kept from call to call.

    Costs are in seconds, by size class of the batch: 1, 2-3, 4-7, 8-15... rows.
    """

    def __init__(self) -> None:
        self.by_position = [Share() for _ in range(MAX_GAMMA)]
        self.by_confidence = [Share() for _ in range(_BINS)]
        self._verify: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(lambda: deque(maxlen=9)))
        self._draft: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=33))
        self.idle = 0  # iterations without drafts
        self.probe_after = _FIRST_PROBE

    def add_costs(self, iteration: Iteration) -> None:
        rows = len(iteration.rows).bit_length()
        width = max(len(step.drafted) for step in iteration.rows) + 1
        self._verify[rows][width].append(iteration.verify_seconds + iteration.other_seconds)
        if iteration.draft_forwards:
            self._draft[rows].append(iteration.draft_seconds / iteration.draft_forwards)

    def has_costs(self, rows: int, width: int | None = None) -> bool:
        """Whether anything was measured with about so many rows; with `width` tokens per row."""
        measured = self._verify[rows.bit_length()]
        return bool(measured) if width is None else width in measured

    def draft_seconds(self, rows: int) -> float:
        """D: one forward of the draft; 0 for drafters without a model."""
        seconds = self._draft[rows.bit_length()]
        return _typical(seconds) if seconds else 0.0

    def verify_seconds(self, rows: int, width: int) -> float:
        """V: an iteration without its drafting; the shortest that was measured where `width` is 1 and was not."""
        measured = self._verify[rows.bit_length()]
        if width in (1, *measured) and (width == 1 or len(measured) == 1):
            return _typical(measured[min(measured)])
        center, seconds, rise = self._line(rows)
        return seconds + rise * (width - center)

    def token_seconds(self, rows: int) -> float:
        """V': what one more token per row adds to V."""
        return self._line(rows)[2]

    def _line(self, rows: int) -> tuple[float, float, float]:
        """V over more than one token as a straight line: a width, V there, and V'.

        One token alone may be much cheaper (matrix-vector products), which says nothing of further ones. The fit leans
        towards V' = 0, so that few and noisy measurements do not keep drafts short, and it from being corrected.
        """
        measured = self._verify[rows.bit_length()]
        points = [(w, _typical(s), len(s)) for w, s in measured.items() if w > 1 or len(measured) == 1]
        total = sum(n for _, _, n in points)
        center, seconds = (sum(point[k] * point[2] for point in points) / total for k in (0, 1))
        spread = sum(n * (w - center) ** 2 for w, _, n in points)
        rise = sum(n * (w - center) * (s - seconds) for w, s, n in points) / (spread + _LEAN)
        return center, seconds, max(rise, 0.0)

    def acceptance(self, gamma: int) -> list[float]:
        """a1 .. aγ; what is not known of a position is taken from the one before."""
        chain = itertools.accumulate(self.by_position[:gamma], lambda prior, share: share.value(prior), initial=0.7)
        return list(chain)[1:]

    def confidence(self, given: float) -> float:
        """The probability that a draft is accepted which the draft model gave this probability."""
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
        estimates: what earlier calls have learned; updated here.
        reads_confidence: the drafter asks `go_on` after each token.
    """

    def __init__(self, max_gamma: int, estimates: Estimates, reads_confidence: bool = False):
        self._max_gamma = max_gamma
        self._estimates = estimates
        self._reads_confidence = reads_confidence
        self.go_on: GoOn | None = self._go_on if reads_confidence else None
        self._has_begun = False
        self._rows = 1
        self._confidence: list[list[float]] = []  # by draft position, by active row
        self._alive: list[float] = []  # by active row, the probability that all its drafts so far are accepted
        self._tokens = self._seconds = 0.0  # of recent iterations that drafted; the seconds are expected ones

    def plan(self, rows: int) -> int:
        """The longest draft of the next iteration, over so many rows."""
        known = self._estimates
        self._rows, self._confidence, self._alive = rows, [], [1.0] * rows
        if not known.has_costs(rows):
            return self._max_gamma if self._reads_confidence else self._likely_gamma()
        gamma = max(range(1, self._max_gamma + 1), key=self._expected_rate)
        plain = rows / known.verify_seconds(rows, 1)
        if not known.has_costs(rows, width=1):  # plain decoding is at least as fast as this
            plain *= _CLEARLY
        if self._rate(gamma) > plain:
            known.probe_after = _FIRST_PROBE
            return self._max_gamma if self._reads_confidence else gamma
        if known.idle < known.probe_after:
            return 0
        known.probe_after = min(2 * known.probe_after, _LAST_PROBE)
        return 1

    def _go_on(self, confidence: list[float]) -> bool:
        """Whether to draft another token, the draft having given its last ones these probabilities, by row."""
        known = self._estimates
        self._confidence.append(confidence)
        self._alive = [p * known.confidence(c) for p, c in zip(self._alive, confidence)]
        drafted = len(self._confidence)
        if drafted >= self._max_gamma:
            return False
        if not known.has_costs(self._rows):
            return sum(self._alive) > _LIKELY * self._rows
        price = known.draft_seconds(self._rows) + known.token_seconds(self._rows)
        return sum(self._alive) * known.acceptance(drafted + 1)[-1] > price * self._rate(drafted)

    def update(self, iteration: Iteration) -> None:
        """Learn from one iteration."""
        known = self._estimates
        for slot, step in enumerate(iteration.rows):
            # A row cut off by its end or by the other rows says nothing of the drafts behind.
            for i in range(step.accepted + (step.kind == "correction")):
                known.by_position[i].add(i < step.accepted)
                if i < len(self._confidence):
                    known.by_confidence[_bin(self._confidence[i][slot])].add(i < step.accepted)
        longest = max(len(step.drafted) for step in iteration.rows)
        known.idle = 0 if longest else known.idle + 1
        if self._has_begun:  # the first iteration had the prompts to do as well
            known.add_costs(iteration)
            if longest:
                self._tokens = _RECENT * self._tokens + sum(len(step.committed) for step in iteration.rows)
                self._seconds = _RECENT * self._seconds + self._cost(longest)
        self._has_begun = True

    def _likely_gamma(self) -> int:
        alive = itertools.accumulate(self._estimates.acceptance(self._max_gamma), operator.mul)
        return max(1, sum(p > _LIKELY for p in alive))

    def _rate(self, gamma: int) -> float:
        """Tokens per second with drafts, over all rows."""
        expected = self._expected_rate(gamma)
        if not self._reads_confidence or not self._seconds:
            return expected
        # Late positions are reached by confident drafts only, so their acceptance promises too much.
        return max(self._tokens / self._seconds, self._expected_rate(1))

    def _expected_rate(self, gamma: int) -> float:
        alive = itertools.accumulate(self._estimates.acceptance(gamma), operator.mul)
        return self._rows * (1 + sum(alive)) / self._cost(gamma)

    def _cost(self, gamma: int) -> float:
        known = self._estimates
        return known.verify_seconds(self._rows, gamma + 1) + gamma * known.draft_seconds(self._rows)


def _typical(seconds: Sequence[float]) -> float:
    """What a machine takes that is not disturbed: disturbances only ever add to it."""
    return sorted(seconds)[len(seconds) // 4]


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
