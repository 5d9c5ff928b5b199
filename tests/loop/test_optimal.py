"""The "optimal" schedule: it finds the best draft length of a simulated pair, and is lossless for any clock.

The simulated pair has a true acceptance probability by draft position or by confidence, and true seconds per forward.
So brute force gives the best that any schedule could do.
"""

import copy
import gc
import itertools
import operator
import random
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, make_model, make_prompts, perturbed
from test_sampling import (
    ALARM,
    CHAINS,
    CONFIG,
    STATES,
    Case,
    MarkovModel,
    Rotate,
    law_and_suspect,
    p_value,
    p_value_of_transitions,
    processors,
    samples,
    transition_law,
)
from test_sampling import chains as chains  # a fixture
from torch import Tensor
from transformers import LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_specdec import SpeculationStats, options
from hf_specdec.drafters import EarlyExitDrafter, ModelDrafter, SuffixDrafter
from hf_specdec.generate import session
from hf_specdec.loop import clock, invariants, optimal, schedule
from hf_specdec.loop.costs import Costs
from hf_specdec.loop.optimal import MAX_GAMMA, Estimates, Optimal, Share, estimates_for
from hf_specdec.loop.schedule import Constant
from hf_specdec.records.stats import Iteration, RowStep


@pytest.fixture(autouse=True)
def nothing_learned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimal, "_estimates", type(optimal._estimates)())


# ----------------------------------------------------------------------------------------------------- a simulated pair


def linear(first: float, more: float) -> Callable[[int], float]:
    """The target's seconds by width: `first` for one token, and `more` for each further one."""
    return lambda width: first + more * (width - 1)


@dataclass
class Pair:
    """A target and a draft, as a schedule sees them.

    Attributes:
        accept: the probability that a draft is accepted; called for each, so it may draw a confidence (which it is).
        verify: the target's seconds by width.
        draft: the draft's seconds.
        rows: of the batch.
        at_once: one forward of the draft makes all drafts of an iteration.
        rng: decides what is accepted; `None`: as regularly as can be, so that estimates are not blurred by chance.
    """

    accept: Callable[[], float]
    verify: Callable[[int], float]
    draft: float
    rows: int = 1
    at_once: bool = False
    rng: random.Random | None = field(default_factory=lambda: random.Random(0))
    _due: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # by draft position

    def _holds(self, position: int, p: float) -> bool:
        if self.rng is not None:
            return self.rng.random() < p
        self._due[position] += p
        hit = self._due[position] >= 1
        self._due[position] -= hit
        return hit

    def iterate(self, schedule: Optimal, room: int = 1000) -> tuple[int, int, float]:
        """One iteration: how long its draft was, how many tokens it committed, how many seconds it took."""
        gamma, drafted = min(schedule.plan(self.rows), room), 0
        accepted, alive = [0] * self.rows, [True] * self.rows
        while drafted < gamma:
            confidence = [self.accept() for _ in range(self.rows)]
            alive = [a and self._holds(drafted, p) for a, p in zip(alive, confidence)]
            accepted = [n + a for n, a in zip(accepted, alive)]
            drafted += 1
            if drafted == gamma or (schedule.go_on is not None and not schedule.go_on(confidence)):
                break
        forwards = min(gamma, 1) if self.at_once else drafted
        iteration = iteration_of([drafted] * self.rows, accepted, self.verify(drafted + 1), forwards * self.draft)
        schedule.update(replace(iteration, draft_forwards=forwards))
        return drafted, sum(accepted) + self.rows, self.verify(drafted + 1) + forwards * self.draft

    def seconds(self, schedule: Optimal, tokens: int) -> float:
        """A call of this many tokens, in one row."""
        seconds = 0.0
        while tokens > 0:
            _, committed, time = self.iterate(schedule, room=tokens - 1)
            tokens, seconds = tokens - committed, seconds + time
        return seconds

    def rate(self, schedule: Optimal, iterations: int) -> float:
        """Tokens per second."""
        done = [self.iterate(schedule) for _ in range(iterations)]
        return sum(tokens for _, tokens, _ in done) / sum(seconds for *_, seconds in done)


def iteration_of(drafted: list[int], accepted: list[int], verify: float = 1.0, draft: float = 0.1) -> Iteration:
    steps = [RowStep(row, 10, [7] * n, k, [7] * k + [8]) for row, (n, k) in enumerate(zip(drafted, accepted))]
    return Iteration(steps, draft, verify, other_seconds=0.0, draft_forwards=max(drafted))


def best_rate(p: float, verify: Callable[[int], float], draft: float, gamma: int | None = None) -> float:
    """Tokens per second of one row with the best constant γ, or with the given one."""
    gammas = range(MAX_GAMMA + 1) if gamma is None else [gamma]
    return max(sum(p**i for i in range(g + 1)) / (verify(g + 1) + g * draft) for g in gammas)


def settled(pair: Pair, max_gamma: int = MAX_GAMMA, reads_confidence: bool = False, iterations: int = 400) -> Optimal:
    """A schedule that has seen a pair for a long time."""
    schedule = Optimal(max_gamma, Estimates(at_once=pair.at_once), reads_confidence)
    for _ in range(iterations):
        pair.iterate(schedule)
    return schedule


# ------------------------------------------------------------------------------------------------------ the best length


SETTINGS = [  # acceptance, first token's seconds, each further one's, the draft's
    (0.5, 1.0, 0.02, 0.05),
    (0.7, 1.0, 0.02, 0.05),
    (0.8, 1.0, 0.0, 0.1),
    (0.8, 1.0, 0.1, 0.2),
    (0.9, 1.0, 0.1, 0.1),
    (0.9, 1.0, 0.0, 0.4),
    (0.6, 1.0, 0.0, 0.0),
    (0.4, 0.02, 0.001, 0.001),
]


@pytest.mark.parametrize(("p", "first", "more", "draft"), SETTINGS)
def test_it_finds_the_draft_length_that_brute_force_finds(p: float, first: float, more: float, draft: float) -> None:
    """Or one that is almost as good: within 5% on average over 100 decisions."""
    verify = linear(first, more)
    pair = Pair(lambda: p, verify, draft, rng=None)
    schedule = settled(pair)
    best, chosen = best_rate(p, verify, draft), []
    for _ in range(100):
        pair.iterate(schedule)
        chosen.append(best_rate(p, verify, draft, schedule.plan(1)))
    assert np.mean(chosen) > 0.95 * best


@pytest.mark.parametrize(("p", "first", "more", "draft"), SETTINGS)
def test_chance_costs_a_few_percent(p: float, first: float, more: float, draft: float) -> None:
    """Over 3000 random iterations after the first 400, at most 5% below the best constant γ's rate."""
    verify = linear(first, more)
    pair = Pair(lambda: p, verify, draft)
    assert pair.rate(settled(pair), 3000) > 0.95 * best_rate(p, verify, draft)


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize(("p", "first", "more", "draft"), [(0.7, 1.0, 0.02, 0.3), (0.8, 1.0, 0.1, 0.4)])
def test_drafts_of_one_forward_cost_that_forward_however_many(
    p: float, first: float, more: float, draft: float, reads_confidence: bool
) -> None:
    """Brute force over V(γ + 1) + D finds no γ that is more than 5% faster. If D came γ times, γ would be too small."""
    verify = linear(first, more)
    pair = Pair(lambda: p, verify, draft, rng=None, at_once=True)
    schedule = settled(pair, reads_confidence=reads_confidence)
    rates = [sum(p**i for i in range(g + 1)) / (verify(g + 1) + draft * (g > 0)) for g in range(MAX_GAMMA + 1)]
    drafted = [pair.iterate(schedule)[0] for _ in range(100)]
    assert np.mean([rates[gamma] for gamma in drafted]) > 0.95 * max(rates)
    one_by_one = [best_rate(p, verify, draft, gamma) for gamma in range(MAX_GAMMA + 1)]
    assert rates[one_by_one.index(max(one_by_one))] < 0.93 * max(rates)


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize(("p", "more", "draft"), [(0.8, 1.5, 0.5), (0.9, 0.8, 0.3), (0.9, 1.0, 0.0)])
def test_good_drafts_that_cost_more_than_they_save_are_given_up(
    p: float, more: float, draft: float, reads_confidence: bool
) -> None:
    """If the target's time grows with every token, plain decoding is best, and must be measured to be found."""
    pair = Pair(lambda: p, linear(1.0, more), draft)
    assert best_rate(p, pair.verify, draft) == 1.0
    assert pair.rate(Optimal(MAX_GAMMA, Estimates(), reads_confidence), 1000) > 0.94


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize("max_gamma", [1, 2, 5, 16, 20, 40])
def test_drafts_are_as_long_as_allowed_and_no_longer(max_gamma: int, reads_confidence: bool) -> None:
    pair = Pair(lambda: 1.0, linear(1.0, 0.0), 0.001)
    schedule = Optimal(max_gamma, Estimates(), reads_confidence)
    drafted = [pair.iterate(schedule)[0] for _ in range(200)]
    assert max(drafted) == drafted[-1] == max_gamma


@pytest.mark.parametrize("reads_confidence", [False, True])
def test_a_clock_that_stands_still_is_no_error(reads_confidence: bool) -> None:
    pair = Pair(lambda: 0.7, linear(0.0, 0.0), 0.0)
    schedule = Optimal(MAX_GAMMA, Estimates(), reads_confidence)
    for _ in range(100):
        assert 0 <= pair.iterate(schedule)[0] <= MAX_GAMMA


# ----------------------------------------------------------------------------------------------- drafts that do not pay


HOPELESS = [  # acceptance, the target's seconds per further token (the first takes one), the draft's seconds
    (0.0, 0.0, 0.1),
    (0.0, 0.05, 0.3),
    (0.05, 0.02, 0.2),
    (0.05, 0.3, 0.3),
    (0.2, 0.05, 0.4),
]


def overhead(p: float, more: float, draft: float, reads_confidence: bool, tokens: int) -> float:
    """The extra time of a first call over plain decoding, as a share of the latter; mean over 20 calls."""
    times = [
        Pair(lambda: p, linear(1.0, more), draft, rng=random.Random(seed)).seconds(
            Optimal(MAX_GAMMA, Estimates(), reads_confidence), tokens
        )
        for seed in range(20)
    ]
    return float(np.mean(times)) / tokens - 1


def test_a_position_with_bad_luck_is_tried_again() -> None:
    """With confidences no draft comes there any more, if its worth is judged by the first outcome alone."""
    pair = Pair(lambda: 0.9, linear(1.0, 0.05), 0.25, rng=None)
    schedule = settled(pair, reads_confidence=True, iterations=100)
    longest = max(pair.iterate(schedule)[0] for _ in range(20))
    for _ in range(2):
        schedule._estimates.by_position[longest - 1] = Share()
        schedule._estimates.by_position[longest - 1].add(False)
        drafted = [pair.iterate(schedule)[0] for _ in range(60)]
        assert max(drafted[30:]) >= longest


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize(("p", "more", "draft"), HOPELESS)
def test_a_hopeless_draft_costs_a_few_percent_of_a_short_call(
    p: float, more: float, draft: float, reads_confidence: bool
) -> None:
    """At most 4% of the first 128 tokens (3% with confidences to be read), and 1.3% of the first 512."""
    assert overhead(p, more, draft, reads_confidence, 128) < (0.03 if reads_confidence else 0.04)
    assert overhead(p, more, draft, reads_confidence, 512) < 0.013


@pytest.mark.parametrize("reads_confidence", [False, True])
def test_a_hopeless_draft_that_is_almost_free_is_given_up_as_well(reads_confidence: bool) -> None:
    """The initial estimate is forgotten, however little it would take for drafts to pay."""
    pair = Pair(lambda: 0.0, linear(1.0, 0.0), 0.01)
    schedule = settled(pair, reads_confidence=reads_confidence, iterations=300)
    assert sum(pair.iterate(schedule)[2] for _ in range(200)) < 200 * 1.005


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize(("more", "draft"), [(0.1, 0.3), (0.5, 1.0), (0.01, 0.05)])
def test_probes_take_a_bounded_share_of_the_time(more: float, draft: float, reads_confidence: bool) -> None:
    """0.5% of it: the dearer they are, the rarer. They draft one token, or another that seems worth it."""
    pair = Pair(lambda: 0.0, linear(1.0, more), draft)
    schedule = Optimal(MAX_GAMMA, Estimates(), reads_confidence)
    done = [pair.iterate(schedule) for _ in range(3000)]
    assert sum(seconds for *_, seconds in done) < 3000 * 1.01
    settled = [drafted for drafted, *_ in done[200:]]
    assert 0 < sum(drafted > 0 for drafted in settled) <= 2800 * 0.005 / (more + draft) + 1
    assert max(settled) <= 2


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize("draft", [0.05, 0.3])
def test_speculation_resumes_when_the_draft_has_become_good(draft: float, reads_confidence: bool) -> None:
    """The next probe shows it, and a hit is followed by others."""
    verify = linear(1.0, 0.05)
    schedule = settled(Pair(lambda: 0.0, verify, draft), reads_confidence=reads_confidence, iterations=2000)
    good = Pair(lambda: 1.0, verify, draft)
    drafted = [good.iterate(schedule)[0] for _ in range(400)]
    assert min(drafted[300:]) >= 2
    bad = Pair(lambda: 0.0, verify, draft)
    assert sum(bad.iterate(schedule)[0] > 0 for _ in range(400)) < 150  # and stops again


def test_two_calls_do_not_pay_twice_for_the_same_lesson() -> None:
    pair, estimates = Pair(lambda: 0.0, linear(1.0, 0.05), 0.3), Estimates()
    first, second = (pair.seconds(Optimal(MAX_GAMMA, estimates), 128) for _ in range(2))
    assert second < 128 * 1.01 < first


def test_a_call_begins_as_the_last_one_ended() -> None:
    """Where drafts do not pay, a new call does not draft before a probe is due."""
    pair, estimates = Pair(lambda: 0.0, linear(1.0, 0.5), 1.0), Estimates()
    pair.seconds(Optimal(MAX_GAMMA, estimates, reads_confidence=True), 300)
    drafted = []
    for _ in range(10):
        schedule = Optimal(MAX_GAMMA, estimates, reads_confidence=True)
        drafted += [pair.iterate(schedule)[0] for _ in range(5)]
    assert sum(n > 0 for n in drafted) <= 1


@pytest.mark.parametrize("reads_confidence", [False, True])
@pytest.mark.parametrize("reading, drafts", [(0.001, True), (1.0, False)])
def test_a_prompt_is_not_read_for_drafts_that_bring_less_than_that_costs(
    reading: float, drafts: bool, reads_confidence: bool
) -> None:
    """With drafts, a call of 100 tokens saves 10 to 20 of the target's forwards; the draft has 100 tokens to read."""
    pair, estimates = Pair(lambda: 0.8, linear(1.0, 0.15), 0.35, rng=None), Estimates()
    began = []
    for _ in range(6):
        schedule, left, unread, saved = Optimal(MAX_GAMMA, estimates, reads_confidence), 100, 100, 0.0
        while left > 0:
            gamma = schedule.plan(1, left, unread)
            accepted = min(gamma, 1)
            extra = unread * reading if gamma else 0.0
            seconds = pair.verify(accepted + 1), accepted * pair.draft + extra
            schedule.update(iteration_of([accepted], [accepted], *seconds))
            unread = 0 if gamma else unread + 1
            left, saved = left - 1 - accepted, saved + 1 + accepted - sum(seconds)
        began.append(unread < 100)
    assert began[:2] == [True, True]  # the second time as a probe
    assert began[2:] == [drafts] * 4
    assert not drafts or saved > 0


def test_it_is_read_again_when_plain_tokens_have_paid_for_that() -> None:
    estimates = Estimates()
    add(estimates, *[(0, 1.0), (1, 1.2)] * 40, draft=0.1)
    estimates.acceptance(1)
    for _ in range(20):
        estimates.by_position[0].add(True)
    estimates.reading = 0.45  # 45 units for a prompt of 100 tokens
    schedule, debts = Optimal(MAX_GAMMA, estimates), []
    for _ in range(9000):
        debts.append(estimates.debt if schedule.plan(1, left=30, unread=100) else None)
        schedule.update(iteration_of([0], [0]))
    read = [i for i, debt in enumerate(debts) if debt is not None]
    assert len(read) > 2
    for before, after in itertools.pairwise(read):
        assert after - before >= debts[before] / optimal._PROBING - 1
        assert debts[before] > 5


# ------------------------------------------------------------------------------------------------------- token by token

SURE, UNSURE = 0.95, 0.15


def best_renewal_rate(share: float, verify: Callable[[int], float], draft: float) -> float:
    """Tokens per second of the best rule "stop once all drafts so far hold with a probability below a threshold".

    Each draft is SURE with probability `share`, else UNSURE. No rule that knows only the past does better: the value of
    the next draft depends on nothing else, except for the bound on the length.
    """
    mean = share * SURE + (1 - share) * UNSURE

    def outcome(alive: float, drafted: int, threshold: float) -> tuple[float, float]:
        """Expected tokens and seconds for the rest of an iteration."""
        if drafted == MAX_GAMMA or (drafted and alive * mean < threshold):
            return 1.0, verify(drafted + 1)
        tokens = seconds = 0.0
        for p, weight in ((SURE, share), (UNSURE, 1 - share)):
            more, time = outcome(alive * p, drafted + 1, threshold)
            tokens += weight * (alive * p + more)
            seconds += weight * (draft + time)
        return tokens, seconds

    rates = [operator.truediv(*outcome(1.0, 0, t)) for t in np.arange(0.1, 1, 0.05)]
    return max(rates)


@pytest.mark.parametrize(
    ("share", "more", "draft"), [(0.8, 0.02, 0.05), (0.8, 0.1, 0.1), (0.6, 0.02, 0.1), (0.9, 0.05, 0.2)]
)
def test_it_decodes_as_fast_as_the_best_rule_for_stopping(share: float, more: float, draft: float) -> None:
    """Within 4% over 3000 iterations, and faster than any constant γ."""
    verify, rng = linear(1.0, more), random.Random(1)
    pair = Pair(lambda: SURE if rng.random() < share else UNSURE, verify, draft)
    rate = pair.rate(settled(pair, reads_confidence=True), 3000)
    assert rate > 0.96 * best_renewal_rate(share, verify, draft)
    assert rate > 1.02 * best_rate(share * SURE + (1 - share) * UNSURE, verify, draft)


def experienced(rows: int) -> Optimal:
    """Has seen sure and unsure drafts in a batch; asked about the next iteration."""
    rng = random.Random(1)
    pair = Pair(lambda: SURE if rng.random() < 0.8 else UNSURE, linear(1.0, 0.1), 0.2, rows)
    schedule = settled(pair, reads_confidence=True)
    assert schedule.plan(rows) == MAX_GAMMA
    return schedule


def said(schedule: Optimal, *confidence: list[float]) -> list[bool]:
    assert schedule.go_on is not None
    schedule.plan(len(confidence[0]))
    return [schedule.go_on(c) for c in confidence]


def test_unsure_drafts_stop_and_confident_ones_go_on() -> None:
    schedule = experienced(1)
    assert said(schedule, [UNSURE]) == [False]
    assert said(schedule, [SURE]) == [True]
    assert said(schedule, [SURE], [UNSURE]) == [True, False]
    assert said(schedule, [SURE], [SURE]) == [True, True]
    assert not all(said(schedule, *[[SURE]] * (MAX_GAMMA - 1)))  # less and less certain of all drafts together


def test_the_rows_of_a_batch_are_summed() -> None:
    """If drafting pays for most rows, all rows draft; which rows they are does not matter."""
    schedule = experienced(8)
    verdicts = []
    for sure in range(9):
        confidence = [SURE] * sure + [UNSURE] * (8 - sure)
        verdicts.append(said(schedule, confidence)[0])
        assert said(schedule, confidence[::-1]) == verdicts[-1:]
    assert verdicts == sorted(verdicts)
    assert (verdicts[0], verdicts[8]) == (False, True)
    assert said(schedule, [SURE, UNSURE] * 4, [UNSURE, SURE] * 4)[1] is False  # no row is sure of both


def test_what_the_draft_says_of_itself_is_not_believed() -> None:
    """Confidences are only a scale, calibrated by the acceptance of such drafts."""
    claims = {0.9: 0.05, 0.3: 0.95}
    rng = random.Random(0)

    def iterate(schedule: Optimal) -> None:
        gamma, drafted, alive, n = schedule.plan(1), 0, True, 0
        while drafted < gamma:
            claim = rng.choice(list(claims))
            alive = alive and rng.random() < claims[claim]
            drafted, n = drafted + 1, n + alive
            if drafted == gamma or not schedule.go_on or not schedule.go_on([claim]):
                break
        schedule.update(iteration_of([drafted], [n], 1.0 + 0.02 * drafted, 0.05 * drafted))

    schedule = Optimal(MAX_GAMMA, Estimates(), reads_confidence=True)
    for _ in range(400):
        iterate(schedule)
    assert (said(schedule, [0.9]), said(schedule, [0.3])) == ([False], [True])


# ------------------------------------------------------------------------------------------------------ what is learned


def learned(estimates: Estimates, positions: int = 6) -> list[float]:
    estimates.acceptance(positions)  # makes room for them
    return [estimates.by_position[i].value(0.7) for i in range(positions)]


def changes(*rows: RowStep) -> list[int]:
    """For each draft position, whether an iteration raised (1) or lowered (-1) the estimate."""
    estimates = Estimates()
    before = learned(estimates)
    Optimal(MAX_GAMMA, estimates).update(Iteration(list(rows), 0.1, 1.0, 0.0, 5))
    return [int(np.sign(b - a)) for a, b in zip(before, learned(estimates))]


def test_positions_up_to_the_first_rejected_one_are_learned_from() -> None:
    drafts = [7, 7, 7, 7, 7]
    assert changes(RowStep(0, 10, drafts, 2, [7, 7, 8])) == [1, 1, -1, 0, 0, 0]
    assert changes(RowStep(0, 10, drafts, 0, [8])) == [-1, 0, 0, 0, 0, 0]
    assert changes(RowStep(0, 10, drafts, 5, [*drafts, 8])) == [1, 1, 1, 1, 1, 0]
    assert changes(RowStep(0, 10, [], 0, [8])) == [0] * 6
    assert changes(RowStep(0, 10, drafts, 1, [7, 8]), RowStep(1, 10, drafts, 3, [7, 7, 7, 8]))[2:] == [1, -1, 0, 0]


def test_drafts_behind_a_cut_are_not_rejected() -> None:
    """A row that ended at an accepted draft, or that lockstep held back, commits no token of the target."""
    assert changes(RowStep(0, 10, [7] * 5, 2, [7, 7], finished="eos")) == [1, 1, 0, 0, 0, 0]
    assert changes(RowStep(0, 10, [7] * 5, 0, [], finished="max_length")) == [0] * 6
    assert changes(RowStep(0, 10, [7] * 2, 2, [7, 7, 8], finished="max_length")) == [1, 1, 0, 0, 0, 0]


def costs(estimates: Estimates, rows: int = 1) -> Costs:
    return estimates.costs(rows).costs


def test_costs_are_kept_by_size_of_the_batch() -> None:
    """Drafts that are free for one row, but not for twenty."""
    estimates = Estimates()
    alone = Pair(lambda: 0.8, linear(1.0, 0.0), 0.01, rows=1, rng=None)
    crowd = Pair(lambda: 0.8, linear(1.0, 1.5), 0.5, rows=20, rng=None)
    for _ in range(300):
        for pair in (alone, crowd):
            pair.iterate(Optimal(MAX_GAMMA, estimates))
            pair.iterate(schedule := Optimal(MAX_GAMMA, estimates))
            pair.iterate(schedule)
    assert Optimal(MAX_GAMMA, estimates).plan(1) >= 6
    drafted = {Optimal(MAX_GAMMA, estimates).plan(rows) for rows in (16, 20, 31)}
    assert drafted == {0}
    assert [estimates.costs(rows).drafted_seen > 0 for rows in (1, 2, 15, 31)] == [True, False, False, True]


def test_rows_that_have_ended_do_not_make_the_others_look_fast() -> None:
    """The rate of a large batch is no measure for the one row that remains of it."""
    estimates = Estimates()
    many, one = (Pair(lambda: 0.95, linear(1.0, 0.02), 0.1, rows) for rows in (16, 1))
    for rows in (1, 16):
        schedule = Optimal(MAX_GAMMA, estimates, reads_confidence=True)
        for _ in range(100):
            (one if rows == 1 else many).iterate(schedule)
    fresh = Optimal(MAX_GAMMA, estimates, reads_confidence=True)
    assert said(schedule, *[[0.95]] * 3) == said(fresh, *[[0.95]] * 3) == [True] * 3
    bad = Pair(lambda: 0.0, linear(1.0, 0.5), 0.5)
    schedule = Optimal(MAX_GAMMA, Estimates(), reads_confidence=True)
    for _ in range(30):
        many.iterate(schedule)
    assert sum(bad.iterate(schedule)[0] > 0 for _ in range(30)) <= 12


def test_the_first_iteration_which_feeds_the_prompt_is_not_timed() -> None:
    estimates = Estimates()
    schedule = Optimal(MAX_GAMMA, estimates)
    schedule.plan(1)
    schedule.update(iteration_of([3], [1], verify=1000.0))
    assert estimates.costs(1).drafted_seen == 0
    schedule.plan(1)
    schedule.update(iteration_of([3], [1], verify=1.0))
    assert estimates.costs(1).drafted_seen == 1
    assert estimates.costs(1).unit < 10


def add(estimates: Estimates, *observed: tuple[int, float], rows: int = 1, draft: float = 0.1) -> None:
    """Iterations by draft length and the target's seconds."""
    for drafted, seconds in observed:
        estimates.add_costs(iteration_of([drafted] * rows, [0] * rows, seconds, draft * drafted))


def test_costs_of_all_widths_follow_from_those_measured() -> None:
    """With one hiccup in four; a one-token forward does not count among the others."""
    estimates = Estimates()
    for _ in range(50):
        add(estimates, (0, 1.0), (2, 2.0), (14, 4.5), (14, 450.0), (2, 2.0), (14, 4.5), draft=0.25)
    known = costs(estimates)
    assert estimates.costs(1).unit == pytest.approx(1.0, rel=0.05)
    assert known.draft == pytest.approx(0.25, rel=0.05)
    assert [known.verify(width) for width in (1, 3, 15)] == pytest.approx([1.0, 2.0, 4.5], rel=0.1)
    assert known.verify(7) == pytest.approx(3.0, rel=0.1)  # a power of the width
    assert known.iteration(6) == pytest.approx(3.0 + 6 * 0.25, rel=0.1)
    assert known.one_more == pytest.approx((known.iteration(8) - known.iteration(1)) / 7)


def test_a_machine_that_becomes_slower_does_not_change_what_things_cost() -> None:
    """Another process comes and goes: everything takes 3 times as long for a while."""
    estimates, rng = Estimates(), random.Random(0)
    found = []
    for i in range(600):
        slow = 3.0 if i // 40 % 2 else 1.0
        drafted = rng.choice([0, 2, 4])
        add(estimates, (drafted, slow * (1.3 if drafted else 1.0)), draft=0.2 * slow)
        found.append(costs(estimates))
    for known in found[100:]:
        assert known.verify(4) == pytest.approx(1.3, rel=0.15)
        assert known.draft == pytest.approx(0.2, rel=0.15)
    assert estimates.costs(1).unit == pytest.approx(1.0, rel=0.05)


def test_few_measurements_do_not_make_long_drafts_look_dear() -> None:
    estimates = Estimates()
    add(estimates, (1, 1.0), (2, 1.0), (1, 1.0), (2, 1.0), (3, 1.5))
    known = costs(estimates)
    assert known.verify(5) - known.verify(4) < 0.04


def test_in_a_batch_forwards_without_drafts_say_what_drafts_add() -> None:
    """Otherwise drafts of equal lengths would look free, and never change in length."""
    for rows, low, high in ((1, 0.0, 0.1), (2, 0.2, 0.4), (8, 0.2, 0.4)):
        estimates = Estimates()
        for _ in range(9):
            add(estimates, (0, 1.0), (10, 2.0), rows=rows)
        assert low <= costs(estimates, rows).growth <= high
        assert costs(estimates, rows).verify(11) == pytest.approx(2.0, rel=0.1)


def test_a_draft_that_had_to_catch_up_is_not_timed() -> None:
    estimates = Estimates()
    add(estimates, (2, 1.0), (2, 1.0), draft=0.25)
    before = costs(estimates).draft
    estimates.idle = 16
    add(estimates, (1, 1.0), draft=100.0)
    assert costs(estimates).draft == pytest.approx(before, rel=0.02)


def test_a_wider_forward_that_took_less_is_not_believed() -> None:
    estimates = Estimates()
    add(estimates, *[(1, 2.0), (2, 1.5), (8, 1.0)] * 5)
    known = costs(estimates)
    assert known.growth == 0.0
    assert known.verify(9) >= known.verify(2)


def test_a_drafter_without_a_model_costs_what_an_iteration_takes() -> None:
    estimates = Estimates()
    for _ in range(20):
        for drafted, seconds in ((0, 1.0), (4, 1.1)):
            steps = iteration_of([drafted], [0], seconds, draft=0.2 if drafted else 0.0)
            estimates.add_costs(replace(steps, draft_forwards=0))
    known = costs(estimates)
    assert known.draft == 0.0
    assert known.iteration(4) == pytest.approx(1.3, rel=0.05)


# ---------------------------------------------------------------------------------------------------- from call to call


@pytest.fixture
def target() -> PreTrainedModel:
    """A new one for each test, because the schedule remembers what it learns about it."""
    return make_model(LlamaConfig(**CONFIG | {"vocab_size": VOCAB, "max_position_embeddings": 4096}), seed=12)


@pytest.fixture
def draft(target: PreTrainedModel) -> PreTrainedModel:
    return perturbed(target, 0.05, seed=13)


@pytest.fixture
def by_default(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The users' defaults. Yields the schedules that were created."""
    monkeypatch.setitem(options.DEFAULTS, "num_assistant_tokens_schedule", None)
    made: list[Any] = []

    def make_schedule(*args: Any) -> Any:
        made.append(schedule.make_schedule(*args))
        return made[-1]

    monkeypatch.setattr(session, "make_schedule", make_schedule)
    return made


def call(target: PreTrainedModel, draft: Any, rows: int = 1, **kwargs: Any) -> torch.Tensor:
    kwargs = {"do_sample": False, "max_new_tokens": 30, "assistant_model": draft, "strategy": "spec"} | kwargs
    return target.generate(**make_prompts(rows, seed=rows), **kwargs)


def test_optimal_is_what_holds_when_nobody_says_anything(
    target: PreTrainedModel, draft: PreTrainedModel, by_default: list[Any]
) -> None:
    call(target, draft)
    call(target, None)
    assert [type(schedule) for schedule in by_default] == [Optimal, Optimal]
    model, look_up = by_default
    assert model.go_on is not None  # this draft's confidence is available
    assert look_up.go_on is None


def test_who_sets_a_draft_length_gets_that_length(
    target: PreTrainedModel, draft: PreTrainedModel, by_default: list[Any]
) -> None:
    call(target, draft, num_assistant_tokens=3)
    call(target, None, prompt_lookup_num_tokens=4)
    target.generation_config.num_assistant_tokens = 6
    call(target, draft)
    assert [(type(schedule), schedule.gamma) for schedule in by_default] == [
        (Constant, 3),
        (Constant, 4),
        (Constant, 6),
    ]


@pytest.mark.parametrize("gamma", [2, 20])
def test_with_the_schedule_by_name_it_is_the_longest_draft(
    gamma: int, target: PreTrainedModel, by_default: list[Any]
) -> None:
    stats = SpeculationStats()
    wanted: dict[str, Any] = {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "optimal",
        "max_new_tokens": 120,
    }
    call(target, Blind(target), speculation_stats=stats, **wanted)
    assert type(by_default[0]) is Optimal
    drafted = [max(iteration["drafted"]) for iteration in stats.iterations]
    assert max(drafted) <= gamma
    assert stats.acceptance_rate == 1


def test_what_was_learned_is_kept_by_target_and_draft(
    target: PreTrainedModel, draft: PreTrainedModel, by_default: list[Any]
) -> None:
    other_target, other_draft = copy.deepcopy(target), copy.deepcopy(draft)
    suffixes = SuffixDrafter()
    drafts = ((target, draft), (target, other_draft), (other_target, draft), (target, None), (target, suffixes))
    for t, d in drafts:
        call(t, d)
        known = by_default[-1]._estimates
        assert known.costs(1).plain_seen > 0
        call(t, d, rows=2)
        assert by_default[-1]._estimates is known
    assert len({id(schedule._estimates) for schedule in by_default}) == len(drafts)


def test_until_it_is_measured_a_draft_costs_what_its_size_says(target: PreTrainedModel) -> None:
    small = make_model(LlamaConfig(**CONFIG | {"vocab_size": VOCAB, "num_hidden_layers": 1}), seed=1)
    shares = [sum(p.numel() for p in model.parameters()) for model in (small, target)]
    assert costs(estimates_for(target, ModelDrafter(small))).draft == pytest.approx(shares[0] / shares[1])
    assert costs(estimates_for(target, ModelDrafter(copy.deepcopy(target)))).draft == 1.0
    deep = make_model(LlamaConfig(**CONFIG | {"vocab_size": VOCAB, "num_hidden_layers": 4}), seed=1)
    assert costs(estimates_for(deep, EarlyExitDrafter(deep, 1))).draft == pytest.approx(1 / 4)


class Unknown(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def test_kinds_of_calls_are_learned_apart(
    target: PreTrainedModel, draft: PreTrainedModel, by_default: list[Any]
) -> None:
    """A processor that is called step by step, or sampling, accepts other shares of the drafts."""
    kinds: list[dict[str, Any]] = [
        {},
        {"logits_processor": [Unknown()]},
        {"do_sample": True},
        {"do_sample": True, "speculation_acceptance": "coupled"},
    ]
    for kind in (*kinds, *kinds):
        call(target, draft, **kind)
    found = [id(schedule._estimates) for schedule in by_default]
    assert found[:4] == found[4:] and len(set(found)) == 4


def test_no_model_is_kept_alive(by_default: list[Any], target: PreTrainedModel) -> None:
    draft, other = perturbed(target, 0.05), copy.deepcopy(target)
    call(target, draft)
    call(other, draft)
    by_default.clear()
    gone = weakref.ref(draft), weakref.ref(other)
    del draft, other
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert len(optimal._estimates) == 1  # the target's
    assert not optimal._estimates[target]


def test_the_models_configs_are_as_they_were(
    target: PreTrainedModel, draft: PreTrainedModel, by_default: list[Any]
) -> None:
    def state() -> list[Any]:
        configs = [c for model in (target, draft) for c in (model.config, model.generation_config)]
        return [(id(c), copy.deepcopy(vars(c))) for c in configs]

    before = state()
    for _ in range(2):
        call(target, draft, rows=2)
    assert state() == before


# ------------------------------------------------------------------------------------------------------------ any clock


class Blind(ModelDrafter):
    """Drafts as on a device whose values are expensive to read: its confidence is never read."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.shows_confidence = False


def wild_clock(seed: int) -> Callable[[], float]:
    """Jumps by microseconds or by minutes, so that any draft length looks best at some time."""
    rng = random.Random(seed)
    times = itertools.accumulate(10 ** rng.uniform(-6, 2) for _ in itertools.count())
    return lambda: next(times)


@pytest.fixture
def wandering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Arguments of `generate()` for the schedule with a random clock of this seed. Afterwards γ must have varied."""
    stats: list[SpeculationStats] = []

    def start(seed: int) -> dict[str, Any]:
        monkeypatch.setattr(clock, "perf_counter", wild_clock(seed))
        stats.append(SpeculationStats())
        return {"num_assistant_tokens_schedule": "optimal", "speculation_stats": stats[-1]}

    yield start
    drafted = [max(iteration["drafted"]) for s in stats for iteration in s.iterations]
    assert max(drafted) > min(drafted)


GREEDY: dict[str, dict[str, Any]] = {
    "without EOS": {},
    "with EOS": {"eos_token_id": [5, 17, 40, 61]},
    "processors in order": {"logits_processor": LogitsProcessorList([Rotate()])},
}


@pytest.mark.parametrize("how", GREEDY)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("way", ["confident", "blind", "look-up"])
def test_greedy_calls_say_what_vanilla_says(
    way: str,
    rows: int,
    how: str,
    small_pair: tuple[PreTrainedModel, PreTrainedModel],
    wandering: Callable[[int], dict[str, Any]],
) -> None:
    target, draft = small_pair
    drafter = {"confident": draft, "blind": Blind(draft), "look-up": None}[way]
    kwargs = {"do_sample": False, "max_new_tokens": 60} | GREEDY[how]
    if way == "look-up":
        kwargs["max_matching_ngram_size"] = 1
    for seed in range(4):
        prompts = make_prompts(rows, width=20, seed=seed)
        expected = target.generate(**prompts, **{k: v for k, v in kwargs.items() if k != "max_matching_ngram_size"})
        out = target.generate(**prompts, **kwargs, assistant_model=drafter, strategy="spec", **wandering(seed))
        assert out.tolist() == expected.tolist(), f"seed {seed}"


@pytest.mark.parametrize("way", ["confident", "blind"])
def test_continuations_follow_the_targets_law(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_sampling: 20000 continuations of 4 tokens, with its odds of a false alarm."""
    target = make_model(LlamaConfig(**CONFIG))
    models = {"target": target, "model": perturbed(target, 0.3)}
    case = Case(
        "model" if way == "confident" else Blind(models["model"]),
        new_tokens=4,
        options={"num_assistant_tokens_schedule": "optimal", "temperature": 1.2},
    )
    monkeypatch.setattr(clock, "perf_counter", wild_clock(3))
    plan, lengths = Optimal.plan, itertools.cycle((3, 2, 1, 0))  # few iterations: 20000 rows decode at once
    monkeypatch.setattr(Optimal, "plan", lambda self, *args: (plan(self, *args), next(lengths))[1])
    counts, stats = samples(case, models)
    assert 0.05 < stats.acceptance_rate < 0.99
    drafted = {max(iteration["drafted"]) for iteration in stats.iterations}
    assert len(drafted) > 2
    law, _ = law_and_suspect(case, case.prompts[0], models)
    _, suspect = law_and_suspect(Case("model", case.options, new_tokens=4), case.prompts[0], models)
    assert p_value(counts[0], law, suspect) > ALARM


# Slow: several rows and the short continuations cover what these would show.
@pytest.mark.parametrize(
    ("way", "rows"),
    [*(pytest.param(way, 1, marks=pytest.mark.slow) for way in ("confident", "blind", "look-up")), ("confident", 4)],
)
def test_each_token_of_a_long_call_follows_the_targets_law(
    way: str, rows: int, chains: dict[str, PreTrainedModel], wandering: Callable[[int], dict[str, Any]]
) -> None:
    """As in test_sampling, over 6000 tokens; γ varies meanwhile."""
    case = CHAINS["look-up, top-p"] if way == "look-up" else Case()
    drafter = {"confident": chains["model"], "blind": Blind(chains["model"]), "look-up": None}[way]
    prompt = torch.tensor([[1, 2, 3], [0, 4, 1], [0, 0, 5], [2, 2, 2]])[:rows]
    law_of = {"top_k": 0} | case.options
    torch.manual_seed(1)
    tokens = chains["target"].generate(
        prompt,
        attention_mask=(prompt > 0).long(),
        strategy="spec",
        assistant_model=drafter,
        do_sample=True,
        max_new_tokens=6000 // rows,
        **law_of,
        **wandering(4),
    )
    process = processors(**law_of)
    law = transition_law(chains["target"], process)
    suspect = transition_law(chains["model"], process) if way != "look-up" else np.full_like(law, 1 / STATES)
    assert isinstance(chains["target"], MarkovModel)
    assert p_value_of_transitions(tokens.numpy(), prompt.shape[1], law, suspect) > ALARM


# ----------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("way", ["confident", "blind"])
@pytest.mark.parametrize("rows", [1, 4])
def test_caches_stay_right_while_the_draft_length_wanders(
    rows: int,
    way: str,
    small_pair: tuple[PreTrainedModel, PreTrainedModel],
    wandering: Callable[[int], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(invariants, "ENABLED", True)
    target, draft = small_pair
    for seed in range(3):
        drafter = draft if way == "confident" else Blind(draft)
        call(target, drafter, rows, do_sample=True, max_new_tokens=60, **wandering(seed))


class Script(Constant):
    """Proposes the drafts that it was given."""

    def __init__(self, gammas: list[int]):
        super().__init__(0)
        self.gammas = iter(gammas)

    def plan(self, rows: int, left: int = 0, unread: int = 0) -> int:
        return next(self.gammas)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_draft_that_was_idle_for_long_catches_up(
    rows: int, small_pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its drafts are those of a draft that was never idle, wherever they start, even in the prompt."""
    monkeypatch.setattr(invariants, "ENABLED", True)
    target, draft = small_pair
    prompts = make_prompts(rows, seed=rows)
    expected = target.generate(**prompts, do_sample=False, max_new_tokens=70)
    for gammas in ([0] * 30 + [1] + [0] * 20 + [3] * 30, [2, *[0] * 17, 1, *[0] * 33, *[5] * 20], [0, 0, 4, 0] * 25):
        monkeypatch.setattr(session, "make_schedule", lambda *args, g=gammas: Script(g))
        stats = SpeculationStats()
        out = call(target, draft, rows, max_new_tokens=70, speculation_stats=stats)
        assert out.tolist() == expected.tolist()
        assert stats.accepted_tokens > 0
        for iteration, gamma in zip(stats.iterations, gammas):
            assert max(iteration["drafted"]) <= gamma
        monkeypatch.undo()
        monkeypatch.setattr(invariants, "ENABLED", True)
