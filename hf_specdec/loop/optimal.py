"""The "optimal" schedule: draft for as long as one more draft is expected to bring more tokens per second.

Owns running estimates of what drafts are worth and what forwards cost, both measured while decoding. Decoding stays
lossless whatever the estimates are: a decision depends only on past iterations, and on drafts that are verified or
dropped together with all drafts after them.

The decision. An iteration that drafts γ tokens in each row costs V(γ + 1) + γ·D, where V is the target's forward and D
a forward of the draft (just one D if that forward makes all drafts). It commits 1 + a1 + a1·a2 + ... tokens per row,
where aj is the probability that draft j is accepted if all drafts before it are. The best γ maximises their ratio R. On
a CPU, the draft's confidence can be read without waiting for a device, so the decision is made token by token: a draft
is worth its probability of being accepted, and none is made once that is below R·(D + V'), where V' is what one more
token adds to V (optimal stopping of a renewal process). Drafts of one forward are cut there; how many it makes is
decided before, by position. Costs are relative to plain decoding (see `costs.py`).

Where even the best R is below that of plain decoding, γ is 0: drafting *pauses*. Now and then a draft checks whether
that has changed. What it costs more than plain decoding is a debt, which is paid off by 0.5% of the time of the plain
iterations that follow. So probes cost that much where they cost anything, and are frequent where they cost nothing.

A draft model must read a prompt, or what came since it drafted last, before it can draft. So R counts what that costs,
spread over the tokens that a row may still get. Near the end of a call, or where drafts bring little, it does not pay.
"""

import itertools
import operator
import weakref
from collections.abc import Hashable

from torch import nn

from ..drafters.base import Drafter, GoOn
from ..records.stats import Iteration
from .costs import INSTANT, CostEstimates, Costs

MAX_GAMMA = 16
_FORGET = 0.97  # weight of an observation after one more of its kind
_RECENT = 0.95  # weight of an iteration after one more
_SCATTER = 0.3  # of the tokens of one row and iteration, as a share of their mean
_BINS = 10  # of the draft's confidence
_DRAFT_COST = 0.1  # of a draft's forward, before anything is known
_PROBING = 0.005  # the share of time that probes may cost while drafting pauses
_MOST_REGRET = 1.0  # units that drafts may have cost more than they brought, if there is doubt that they do
_LEAST_PAUSE, _MOST_DEBT = 16, 20.0  # iterations without drafts after evidence against them; units
_DOUBTFUL = 2.0  # standard deviations within which drafting may or may not pay
_FIRST_GAMMA, _KNOWN = 4, 3  # the longest draft until so many were measured
_MORE = 12  # iterations with drafts, of which one drafts a token more than seems best
_HORIZON = 256  # tokens of a row over which the cost of reading is spread at most: calls may end before their limit
_READS = 16  # tokens, of which reading takes long enough to be measured
_BETWEEN_PLAIN = 4  # iterations with drafts between two without, while it is doubtful


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

    def hope(self, value: float) -> float:
        """How high the probability may well be: its estimate, plus how far outcomes may have lowered it by chance."""
        return min(value + (value * (1 - value) * self._seen) ** 0.5 / (self._seen + self._doubt), 1.0)


class Rate:
    """Tokens per row and unit of the recent iterations that drafted; older ones count less."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._tokens = self._spent = self._seen = 0.0

    def add(self, tokens: float, spent: float) -> None:
        self._tokens = _RECENT * self._tokens + tokens
        self._spent = _RECENT * self._spent + spent
        self._seen = _RECENT * self._seen + 1

    @property
    def value(self) -> float:
        """0 if none was seen."""
        return self._tokens / self._spent if self._spent else 0.0

    @property
    def doubt(self) -> float:
        """How far the true value may be from this one by chance, as a share of it."""
        return _SCATTER / (max(self._seen, 1.0) * self._rows) ** 0.5


class Estimates:
    """Estimates for one target with one drafter, kept from call to call.

    Costs are kept by size class of the batch: 1, 2-3, 4-7, 8-15... rows.

    Args:
        draft_cost: the cost of a draft's forward before it was measured, relative to the target's.
        at_once: one forward makes all drafts of an iteration (`Drafter.drafts_at_once`).
    """

    def __init__(self, draft_cost: float = _DRAFT_COST, at_once: bool = False) -> None:
        self.at_once = at_once
        self.by_position: list[Share] = []
        self.by_confidence = [Share() for _ in range(_BINS)]
        self._draft_cost = draft_cost
        self._costs: dict[int, CostEstimates] = {}
        self._rates: dict[int, Rate] = {}
        self.paused: set[int] = set()  # the size classes for which speculation does not pay
        self.debt = 0.0  # what probes have cost, in units; less what was paid off
        self.regret = 0.0  # what drafts have probably cost since they seemed to pay, in units
        self.idle = 0  # iterations without drafts
        self.reading: float | None = None  # seconds that the draft model takes to read a token, if measured

    def costs(self, rows: int) -> CostEstimates:
        """The cost of iterations over about this many rows."""
        size = rows.bit_length()
        if size not in self._costs:
            self._costs[size] = CostEstimates(rows, self._draft_cost, self.at_once)
        return self._costs[size]

    def rate(self, rows: int) -> Rate:
        """How fast iterations with drafts over about this many rows were."""
        return self._rates.setdefault(rows.bit_length(), Rate(rows))

    def add_costs(self, iteration: Iteration) -> None:
        """Learn what an iteration has cost."""
        width = max(len(step.drafted) for step in iteration.rows) + 1
        seconds, per_forward = iteration.verify_seconds + iteration.other_seconds, None
        if not iteration.draft_forwards:
            seconds += iteration.draft_seconds
        if iteration.draft_forwards and not self.idle:  # after a pause the draft model had to catch up
            per_forward = iteration.draft_seconds / iteration.draft_forwards
        self.costs(len(iteration.rows)).add(width, seconds, per_forward)

    def acceptance(self, gamma: int) -> list[float]:
        """a1 .. aγ; the prior of a position is the estimate of the one before."""
        self.by_position.extend(Share() for _ in range(gamma - len(self.by_position)))
        chain = itertools.accumulate(self.by_position[:gamma], lambda prior, share: share.value(prior), initial=0.7)
        return list(chain)[1:]

    def hopes(self, acceptance: list[float]) -> list[float]:
        """How high `acceptance` may well be. A draft is judged by this, or an unlucky one would not be tried again."""
        return [share.hope(value) for share, value in zip(self.by_position, acceptance)]

    def confidence(self, given: float) -> float:
        """The probability that a draft token is accepted, given the draft model's probability for it."""
        return self.by_confidence[_bin(given)].value(given**0.5)


# By target, by owner of the drafter, by kind of call.
_estimates: "weakref.WeakKeyDictionary[object, weakref.WeakKeyDictionary[object, dict[Hashable, Estimates]]]"
_estimates = weakref.WeakKeyDictionary()


def estimates_for(target: object, drafter: Drafter, kind: Hashable = ()) -> Estimates:
    """The estimates of this target with the drafters of one owner (`Drafter.owner`), for one kind of call."""
    known = _estimates.setdefault(target, weakref.WeakKeyDictionary()).setdefault(drafter.owner, {})
    kind = kind, drafter.drafts_at_once
    if kind not in known:
        known[kind] = Estimates(_believed_cost(target, drafter), drafter.drafts_at_once)
    return known[kind]


def _believed_cost(target: object, drafter: Drafter) -> float:
    """Of a draft's forward: its share of the target's parameters, because decoding is bound by reading them."""
    if drafter.cost_share is not None:
        return drafter.cost_share
    models = (target, getattr(drafter, "model", None))
    sizes = [sum(map(_size, model.parameters())) for model in models if isinstance(model, nn.Module)]
    return min(max(sizes[1] / sizes[0], 0.02), 1.0) if len(sizes) == 2 and sizes[0] else _DRAFT_COST


def _size(parameter: nn.Parameter) -> int:
    """Its number of elements; DeepSpeed ZeRO-3 leaves none in those that it divides, and notes how many there were."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


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
        self._confidence: list[list[float]] = []  # by draft position, by active row
        self._alive: list[float] = []  # by active row, the probability that all its drafts so far are accepted
        self._costs = Costs(1.0, 0.0, _DRAFT_COST)
        self._acceptance: list[float] = []
        self._hopes: list[float] = []  # the same, as high as it may well be
        self._rate = 0.0  # R: tokens per unit with drafts, over all rows
        self._gain = 1.0  # the same, relative to plain decoding
        self._price = 0.0  # tokens that another draft must be expected to bring
        self._bound = max_gamma  # on drafts, while little is known of their costs
        self._unread = 0
        self._read: tuple[float, int, int] | None = None  # seconds, forwards, tokens: a draft after reading these

    def plan(self, rows: int, left: int = _HORIZON, unread: int = 0) -> int:
        """The longest draft of the next iteration over this many rows.

        Args:
            left: how many tokens a row may still get.
            unread: how many tokens, of all rows, the draft model has to read before it can draft.
        """
        known = self._estimates
        size = rows.bit_length()
        was_paused = size in known.paused
        if was_paused and known.debt > 0:
            return 0
        self._confidence, self._alive, self._unread = [], [1.0] * rows, unread
        estimates = known.costs(rows)
        self._costs, self._acceptance = estimates.costs, known.acceptance(self._max_gamma)
        self._hopes = known.hopes(self._acceptance)
        tokens = itertools.accumulate(itertools.accumulate(self._acceptance, operator.mul), initial=1.0)
        rates = [rows * n / self._costs.iteration(gamma) for gamma, n in enumerate(tokens) if gamma]
        self._rate, gamma = max(rates), rates.index(max(rates)) + 1
        recent = known.rate(rows)
        if self._reads_confidence and recent.value:
            # Only confident drafts reach late positions, so the acceptance there is too optimistic.
            self._rate = max(rows * recent.value, rates[0])
        self._price = self._costs.one_more * self._rate
        self._bound = self._max_gamma
        if estimates.drafted_seen < _KNOWN:
            self._bound = min(self._bound, _FIRST_GAMMA)
        self._gain, doubt = self._rate / rows, estimates.doubt(gamma)
        if estimates.drafted_seen and not estimates.plain_seen:
            return 0  # to compare with
        at_best = self._gain * (1 + doubt / 2 + (recent.doubt if self._reads_confidence else 0.0))
        is_doubtful = at_best >= 1 and known.regret < _MOST_REGRET
        known.paused.discard(size)
        plain = float(max(min(left, _HORIZON), 1))
        loss = (known.reading or 0.0) * unread / max(estimates.unit, INSTANT) + plain / self._gain - plain
        if unread >= _READS and self._gain >= 1 and loss > 0 and estimates.drafted_seen:
            if known.debt > 0:
                return 0
            known.debt = min(loss, _MOST_DEBT)
        if self._gain < 1 and estimates.drafted_seen and (was_paused or not is_doubtful):
            known.paused.add(size)
            known.regret = 0.0
            if was_paused:
                return self._max_gamma if self._reads_confidence and not known.at_once else gamma
            known.debt = max(known.debt, _LEAST_PAUSE * _PROBING, min(self._costs.iteration(1) - 1, 1.0))
            return 0
        if self._gain < 1 + _DOUBTFUL * doubt and estimates.since_plain >= _BETWEEN_PLAIN:
            return 0
        if self._reads_confidence and not known.at_once:  # else γ is chosen before the draft's forward
            return self._bound
        tries_more = estimates.drafted_seen % _MORE == 0  # else an unlucky position would never be tried again
        return min(self._bound, gamma + tries_more)

    def _go_on(self, confidence: list[float]) -> bool:
        """Whether to draft another token, given the draft's probabilities for the last ones, by row."""
        known = self._estimates
        self._confidence.append(confidence)
        self._alive = [p * known.confidence(c) for p, c in zip(self._alive, confidence)]
        drafted = len(self._confidence)
        return drafted < self._bound and sum(self._alive) * self._hopes[drafted] > self._price

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
        committed = sum(len(step.committed) for step in iteration.rows) / len(iteration.rows)
        if longest and self._unread >= _READS and iteration.draft_forwards:
            self._read = iteration.draft_seconds, iteration.draft_forwards, self._unread
        self._unread = 0
        if self._has_begun:  # the first iteration also reads the prompts
            known.add_costs(iteration)
            if longest:
                spent = self._costs.iteration(longest)
                known.rate(len(iteration.rows)).add(committed, spent)
                known.regret = max(known.regret + spent * (1 - self._gain), 0.0)
                if len(iteration.rows).bit_length() in known.paused:
                    seconds = iteration.draft_seconds + iteration.verify_seconds + iteration.other_seconds
                    loss = seconds / known.costs(len(iteration.rows)).unit - committed
                    least = 0.0 if any(step.accepted for step in iteration.rows) else _LEAST_PAUSE * _PROBING
                    known.debt = min(max(known.debt + loss, least), _MOST_DEBT)
        self._has_begun = True
        self._learn_reading(known.costs(len(iteration.rows)))
        known.idle = 0 if longest else known.idle + 1
        if not longest:
            known.debt = max(known.debt - _PROBING, 0.0)

    def _learn_reading(self, estimates: CostEstimates) -> None:
        """Once it is known what a forward of the draft model costs: what reading has cost in the iteration before."""
        if self._read is None or not estimates.draft_seen:
            return
        seconds, forwards, tokens = self._read
        found = max(seconds - forwards * estimates.costs.draft * estimates.unit, 0.0) / tokens
        before = self._estimates.reading
        self._estimates.reading = found if before is None else (before + found) / 2
        self._read = None


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
