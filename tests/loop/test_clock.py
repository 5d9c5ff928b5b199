"""Times: every part of an iteration is counted in one of them, and the schedule learns only from what drafts change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_prompts
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_specdec import SpeculationStats, Trace
from hf_specdec.drafters.model import ModelDrafter
from hf_specdec.loop import clock as clocks
from hf_specdec.loop.clock import Clock
from hf_specdec.loop.decoding import SpeculativeDecoding
from hf_specdec.loop.optimal import Estimates
from hf_specdec.models.cached import CachedModel

Pair = tuple[PreTrainedModel, PreTrainedModel]


class FakeTime:
    """Advances only where something takes a number of seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return slowed


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(clocks, "perf_counter", fake)
    return fake


class Streamer(BaseStreamer):
    """Records its columns; takes `seconds` for each, and raises at column `fail_at`."""

    def __init__(self, time: FakeTime, seconds: float = 0.0, fail_at: int | None = None):
        self.time, self.seconds, self.fail_at = time, seconds, fail_at
        self.columns: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        if value.ndim == 2:
            return  # the prompts
        self.time.now += self.seconds
        if len(self.columns) == self.fail_at:
            raise ArithmeticError("no more room on the screen")
        self.columns.append(value.tolist())

    def end(self) -> None:
        pass


def spec(pair: Pair, rows: int = 2, **kwargs: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 30, "strategy": "spec", "num_assistant_tokens": 4} | kwargs
    return pair[0].generate(**make_prompts(rows, seed=5), assistant_model=pair[1], **options)


def test_laps_follow_one_another(time: FakeTime) -> None:
    clock = Clock(torch.device("cpu"))
    time.now = 3.0
    assert clock.seconds == 3.0
    clock.lap()
    time.now = 8.0
    assert clock.seconds == 8.0
    assert clock.read() == [3.0, 5.0]
    time.now = 9.0
    assert clock.seconds == 1.0
    clock.begin()
    time.now = 10.0
    assert clock.read() == [1.0]


@pytest.mark.parametrize("rows", [1, 3])
def test_the_seconds_of_all_parts_add_up_to_those_of_the_call(
    rows: int, small_pair: Pair, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelDrafter, "start", time.slow(1.0, ModelDrafter.start))
    for number, name in enumerate(("draft", "verify", "accept", "commit", "roll_back"), start=1):
        monkeypatch.setattr(SpeculativeDecoding, name, time.slow(2.0**number, getattr(SpeculativeDecoding, name)))
    stats, trace, streamer = SpeculationStats(), Trace(), Streamer(time, seconds=64.0)
    spec(small_pair, rows, streamer=streamer, speculation_stats=stats, speculation_trace=trace)
    n = stats.target_forwards
    assert stats.seconds == time.now
    assert (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds) == (1.0, 2.0 * n, 12.0 * n)
    assert stats.other_seconds == 48.0 * n + 64.0 * 30
    assert trace.stats().other_seconds == stats.other_seconds


def test_nearly_all_of_a_real_call_is_told(small_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[float] = []
    run = SpeculativeDecoding.run

    def timed(self: SpeculativeDecoding) -> int:
        clock = Clock(self.context.tokens.device)
        width = run(self)
        took.append(clock.seconds)
        return width

    monkeypatch.setattr(SpeculativeDecoding, "run", timed)
    told = []
    for _ in range(3):  # a busy machine may take time in between
        stats = SpeculationStats()
        spec(small_pair, rows=4, max_new_tokens=60, speculation_stats=stats)
        told.append(stats.seconds / took[-1])
    assert 0.97 < max(told) <= 1.0


@pytest.mark.parametrize("fail_at", [0, 7, 29])
def test_what_was_committed_is_recorded_though_a_streamer_raises(
    fail_at: int, small_pair: Pair, time: FakeTime
) -> None:
    whole = Trace()
    spec(small_pair, rows=1, speculation_trace=whole)
    stats, trace, streamer = SpeculationStats(), Trace(), Streamer(time, seconds=1.0, fail_at=fail_at)
    with pytest.raises(ArithmeticError, match="no more room"):
        spec(small_pair, rows=1, streamer=streamer, speculation_stats=stats, speculation_trace=trace)
    assert [i.rows for i in trace.iterations] == [i.rows for i in whole.iterations][: len(trace.iterations)]
    committed = [token for iteration in trace.iterations for token in iteration.rows[0].committed]
    assert [row for column in streamer.columns for row in column] == committed[:fail_at]
    assert fail_at < len(committed) == stats.committed_tokens  # the iteration in which it raised is recorded last
    assert len(committed) - len(trace.iterations[-1].rows[0].committed) <= fail_at
    assert stats.target_forwards == len(trace.iterations)
    assert stats.other_seconds == fail_at + 1.0


class RaisesAt(StoppingCriteria, LogitsProcessor):
    """A criterion and a processor that raise after a number of columns."""

    def __init__(self, columns: int):
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.columns:
            raise ArithmeticError("asked too much")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_an_iteration_in_which_a_criterion_raises_is_not_recorded(small_pair: Pair) -> None:
    """None of it was committed; earlier tokens are reported."""
    whole, trace, stats = Trace(), Trace(), SpeculationStats()
    spec(small_pair, rows=1, speculation_trace=whole)
    with pytest.raises(ArithmeticError, match="asked too much"):
        spec(
            small_pair,
            rows=1,
            stopping_criteria=StoppingCriteriaList([RaisesAt(14 + 12)]),
            speculation_trace=trace,
            speculation_stats=stats,
        )
    assert 0 < len(trace.iterations) == stats.target_forwards
    assert [i.rows for i in trace.iterations] == [i.rows for i in whole.iterations][: len(trace.iterations)]
    before = stats.committed_tokens
    assert before < 12 <= before + len(whole.iterations[len(trace.iterations)].rows[0].committed)


def _by_model(time: FakeTime, pair: Pair) -> list[Any]:
    """Forwards with realistic times: a draft takes a quarter of a target's, each further token a little."""

    def hook(seconds: float) -> Callable[..., None]:
        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            time.now += seconds * (1.0 + output.logits.shape[1] / 64)  # exact in binary

        return after

    return [m.register_forward_hook(hook(s), with_kwargs=True) for m, s in zip(pair, (1.0, 0.25))]


def _learned(pair: Pair, time: FakeTime, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> tuple[Any, float, Any]:
    """The draft lengths of two calls, and the estimated unit and costs afterwards; all estimates start anew."""
    estimates = Estimates()
    monkeypatch.setattr("hf_specdec.loop.schedule.estimates_for", lambda *args: estimates)
    stats = SpeculationStats()
    for _ in range(2):
        spec(
            pair,
            rows=1,
            max_new_tokens=50,
            num_assistant_tokens=None,
            num_assistant_tokens_schedule="optimal",
            speculation_stats=stats,
            **kwargs,
        )
    return stats.iterations, estimates.costs(1).unit, estimates.costs(1).costs


def test_a_slow_streamer_changes_no_draft_length(
    small_pair: Pair, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the same time for each token, so the best draft length is the same."""
    hooks = _by_model(time, small_pair)
    try:
        quiet = _learned(small_pair, time, monkeypatch)
        shown = _learned(small_pair, time, monkeypatch, streamer=Streamer(time, seconds=40.0))
    finally:
        for hook in hooks:
            hook.remove()
    assert shown == quiet
    assert len({iteration["drafted"][0] for iteration in quiet[0]}) > 2


def test_the_schedule_learns_what_committing_and_rolling_back_take(
    small_pair: Pair, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = _by_model(time, small_pair)
    try:
        _, cheap, _ = _learned(small_pair, time, monkeypatch)
        monkeypatch.setattr(CachedModel, "commit", time.slow(5.0, CachedModel.commit))  # the target's and the draft's
        _, dear, _ = _learned(small_pair, time, monkeypatch)
    finally:
        for hook in hooks:
            hook.remove()
    assert dear == pytest.approx(cheap + 10.0, rel=0.05)


def test_processors_are_part_of_the_verification(small_pair: Pair, time: FakeTime) -> None:
    class Slow(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            time.now += 1.0
            return scores

    stats = SpeculationStats()
    spec(small_pair, rows=1, logits_processor=LogitsProcessorList([Slow()]), speculation_stats=stats)
    assert stats.seconds == time.now == stats.verify_seconds > 0
