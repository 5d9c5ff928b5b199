"""Counters add up, and every rate matches its definition."""

import json
import random
from dataclasses import asdict

import pytest
from conftest import Fragment

from hf_specdec.records.stats import ROWS, Iteration, RowStats, RowStep, SpeculationStats


def row_step(drafted: int, accepted: int, own: bool = True, row: int = 0) -> RowStep:
    """A step that drafts the tokens 0, 1, 2, ... and, with `own`, ends in the target's token 99."""
    drafts = list(range(drafted))
    return RowStep(row, 7, drafts, accepted, drafts[:accepted] + [99] * own)


def iteration(*rows: RowStep) -> Iteration:
    return Iteration(list(rows), draft_seconds=0.25, verify_seconds=0.5, other_seconds=0.125, draft_forwards=5)


def random_iterations(seed: int, rows: int = 3, count: int = 40) -> list[Iteration]:
    rng = random.Random(seed)

    def step(row: int) -> RowStep:
        drafted = rng.randint(0, 6)
        return row_step(drafted, rng.randint(0, drafted), own=rng.random() < 0.9, row=row)

    return [iteration(*(step(row) for row in range(rows) if rng.random() < 0.8)) for _ in range(count)]


def filled(iterations: list[Iteration]) -> SpeculationStats:
    stats = SpeculationStats()
    for one in iterations:
        stats.add(one)
    return stats


def test_merging_counts_as_if_it_had_been_counted_in_one():
    # Batches of different sizes, and drafts of different lengths, in both orders.
    calls = [random_iterations(1, rows=2), [], random_iterations(2, rows=4), [iteration(row_step(9, 9))]]
    for order in (calls, calls[::-1]):
        merged = SpeculationStats()
        for number, call in enumerate(order):
            one = filled(call)
            one.add_prefill(0.5, number, compile_seconds=0.25)
            one.draft_prefill_forwards, one.packing_seconds, one.capture_seconds = 3 * number, 0.75, 2.0
            before = asdict(one)
            merged.merge(one)
            assert asdict(one) == before
        expected = filled([step for call in order for step in call])
        expected.add_prefill(4 * 0.5, 0 + 1 + 2 + 3, compile_seconds=4 * 0.25)
        expected.draft_prefill_forwards, expected.packing_seconds, expected.capture_seconds = 3 * 6, 4 * 0.75, 4 * 2.0
        assert merged == expected
        one.per_row[0].committed_tokens += 1  # nothing is shared
        one.accepted_length_histogram.append(7)
        assert merged == expected


@pytest.mark.parametrize(
    ("step", "own_token", "kind"),
    [
        (row_step(5, 3), 99, "correction"),
        (row_step(5, 0), 99, "correction"),
        (row_step(2, 2), 99, "bonus"),
        (row_step(0, 0), 99, "target"),
        (row_step(5, 3, own=False), None, None),
        (row_step(2, 2, own=False), None, None),
    ],
)
def test_the_own_token_is_a_correction_a_bonus_or_simply_the_targets(step, own_token, kind):
    assert (step.own_token, step.kind) == (own_token, kind)


def test_next_length_counts_the_committed_set():
    assert row_step(5, 2).next_length == 7 + 3


@pytest.mark.parametrize(
    ("accepted", "committed"),
    [(3, [4, 5, 6]), (2, [4, 6]), (1, [4, 8, 9]), (2, [4])],
    ids=["more accepted than drafted", "not the drafts", "two own tokens", "an accepted draft missing"],
)
def test_a_record_that_contradicts_itself_is_refused(accepted, committed):
    with pytest.raises(ValueError, match=r"row 1 accepts \d of the drafts \[4, 5\] and commits \["):
        RowStep(1, 7, [4, 5], accepted, committed)


def test_counters_and_rates_follow_their_definitions():
    stats = filled([iteration(row_step(5, 3)), iteration(row_step(3, 3)), iteration(row_step(4, 1, own=False))])
    assert (stats.target_forwards, stats.draft_forwards, stats.row_iterations) == (3, 15, 3)
    assert (stats.drafted_tokens, stats.accepted_tokens, stats.committed_tokens) == (12, 7, 4 + 4 + 1)
    assert stats.accepted_length_histogram == [0, 1, 0, 2]
    assert stats.drafted_by_position == [3, 3, 3, 2, 1]
    assert stats.accepted_by_position == [3, 2, 2, 0, 0]
    assert stats.acceptance_rate == 7 / 12
    assert stats.block_efficiency == 9 / 3
    assert stats.mean_accepted_length == 7 / 3
    assert stats.acceptance_by_position == [1, 2 / 3, 2 / 3, 0, 0]
    assert (stats.draft_seconds, stats.verify_seconds, stats.other_seconds) == (0.75, 1.5, 0.375)


@pytest.mark.parametrize("seed", range(5))
def test_the_histogram_implies_the_other_counters(seed):
    stats = filled(random_iterations(seed))
    histogram = stats.accepted_length_histogram
    assert sum(histogram) == stats.row_iterations
    assert sum(k * count for k, count in enumerate(histogram)) == stats.accepted_tokens
    assert sum(stats.drafted_by_position) == stats.drafted_tokens
    assert sum(stats.accepted_by_position) == stats.accepted_tokens
    assert all(a == sum(histogram[i + 1 :]) for i, a in enumerate(stats.accepted_by_position))


@pytest.mark.parametrize("seed", range(5))
def test_rows_add_up_to_the_whole(seed):
    stats = filled(random_iterations(seed))
    for name in ("row_iterations", "committed_tokens", "drafted_tokens", "accepted_tokens"):
        assert sum(getattr(row, name) for row in stats.per_row) == getattr(stats, name)


def test_each_row_is_counted_under_its_own_index():
    stats = filled([iteration(row_step(4, 4, row=0), row_step(4, 1, row=2)), iteration(row_step(4, 2, row=2))])
    assert [row.accepted_tokens for row in stats.per_row] == [4, 0, 3]
    assert stats.per_row[1] == RowStats()
    assert stats.iterations == [
        {"rows": [0, 2], "drafted": [4, 4], "accepted": [4, 1]},
        {"rows": [2], "drafted": [4], "accepted": [2]},
    ]


def test_block_efficiency_is_per_row_whatever_the_batch_size():
    one = filled([iteration(row_step(5, 3))])
    many = filled([iteration(*(row_step(5, 3, row=row) for row in range(8)))])
    assert many.block_efficiency == one.block_efficiency == 4
    assert many.target_forwards == one.target_forwards == 1


def test_used_stats_go_on_counting():
    iterations = random_iterations(seed=0)
    once, twice = filled(iterations), filled(iterations + iterations)
    assert twice.committed_tokens == 2 * once.committed_tokens
    assert twice.iterations == 2 * once.iterations
    assert twice.acceptance_rate == once.acceptance_rate


def test_the_prefill_is_counted_apart():
    stats = filled([iteration(row_step(5, 3))])
    rates = stats.acceptance_rate, stats.block_efficiency, stats.target_forwards, stats.draft_forwards
    stats.add_prefill(seconds=2.0, target_forwards=3)
    assert (stats.target_prefill_forwards, stats.prefill_seconds) == (3, 2.0)
    assert (stats.acceptance_rate, stats.block_efficiency, stats.target_forwards, stats.draft_forwards) == rates
    assert stats.seconds == 2.0 + 0.25 + 0.5 + 0.125


def test_every_target_forward_of_an_iteration_counts():
    stats = SpeculationStats()
    stats.add(Iteration([row_step(2, 1)], 0.0, 0.0, 0.0, draft_forwards=0, target_forwards=2))
    assert stats.target_forwards == 2


def test_empty_stats_have_rates_of_zero_and_share_nothing():
    empty = SpeculationStats()
    assert (empty.acceptance_rate, empty.block_efficiency, empty.mean_accepted_length) == (0.0, 0.0, 0.0)
    assert empty.acceptance_by_position == []
    filled(random_iterations(seed=0))
    assert empty == SpeculationStats()
    assert str(empty)


def test_to_dict_is_plain_json_with_the_rates_of_the_whole_and_of_each_row():
    stats = filled(random_iterations(seed=1))
    said = stats.to_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["block_efficiency"] == stats.block_efficiency
    assert said["seconds"] == stats.seconds
    assert [row["acceptance_rate"] for row in said["per_row"]] == [row.acceptance_rate for row in stats.per_row]
    assert asdict(stats).keys() < said.keys()


def test_the_summary_is_one_line_with_the_numbers_people_ask_for():
    stats = filled([iteration(row_step(5, 3)), iteration(row_step(3, 3))])
    assert (
        str(stats)
        == stats.summary()
        == (
            "8 tokens in 2 target forwards, block efficiency τ = 4.00 tokens per target forward, "
            "acceptance rate α = 75% (6 of 8 drafts), 1.75 s (draft 29%, verify 57%, other 14%)"
        )
    )


def test_a_notebook_shows_counters_and_rates():
    stats = filled([iteration(row_step(3, 2)), iteration(row_step(3, 3)), iteration(row_step(1, 0))])
    shown = Fragment(stats)
    assert shown.text == stats.summary()
    assert shown.tables == [
        [
            ["", "committed", "iterations", "drafted", "accepted", "acceptance rate α", "block efficiency τ"],
            ["all rows", "8", "3", "7", "5", "71%", "2.67"],
        ],
        [
            ["k", "0", "1", "2", "3"],
            ["iterations that accepted k drafts", "1", "0", "1", "1"],
            ["k-th drafts that were accepted", "", "67%", "100%", "50%"],
        ],
    ]


def test_a_notebook_shows_the_rows_of_a_batch_up_to_a_number():
    few, many = (filled([iteration(*(row_step(4, row % 4, row=row) for row in range(n)))]) for n in (2, ROWS + 3))
    assert [line[0] for line in Fragment(few).tables[0]] == ["", "all rows", "row 0", "row 1"]
    assert Fragment(few).tables[0][-1] == ["row 1", "2", "1", "4", "1", "25%", "2.00"]
    assert len(Fragment(many).tables[0]) == 2 + ROWS
    assert Fragment(many).text == many.summary() + "… and 3 more rows"


def test_a_notebook_shows_empty_stats_and_changes_nothing():
    stats = SpeculationStats()
    assert Fragment(stats).tables[1] == [
        ["k", "0"], ["iterations that accepted k drafts", "0"], ["k-th drafts that were accepted", ""]
    ]  # fmt: skip
    assert stats == SpeculationStats()
