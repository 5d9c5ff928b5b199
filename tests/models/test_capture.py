"""Captures of forwards as CUDA graphs, on a simulated device: which, when, in which memory, and what if they fail."""

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pretend_cuda
import pytest
import torch
from pretend_cuda import address
from static_calls import Calls, make_target

import hf_specdec
from hf_specdec.loop import clock
from hf_specdec.loop.decoding import SpeculativeDecoding
from hf_specdec.models import capture, graphs, kept
from hf_specdec.models.capture import GraphPool
from hf_specdec.models.graphs import StaticForwards

Key = tuple[int, int]


def small_calls(seed: int = 31, **both: Any) -> Calls:
    return Calls(make_target(seed, num_hidden_layers=1), pretend_cuda.move, **both)


def forwards_of(model: Any) -> StaticForwards:
    """The ones that were used last."""
    forwards: StaticForwards = kept._kept[model][-1].forwards
    return forwards


def captured(model: Any) -> dict[Key, Any]:
    return {key: step.graph for key, step in forwards_of(model)._steps.items() if step.graph is not None}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Rows and widths of all captures, in their order."""
    seen: list[Key] = []
    original = GraphPool.capture

    def spy(self: GraphPool, run: Callable[[], Any], result: torch.Tensor) -> Any:
        seen.append((result.shape[0], result.shape[1]))
        return original(self, run, result)

    monkeypatch.setattr(GraphPool, "capture", spy)
    return seen


@pytest.fixture
def at_each_draft(cuda: pretend_cuda.Device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many captures there had been at the beginning of each iteration, and at the end of the last one."""
    counts: list[int] = []
    for name in ("draft", "roll_back"):
        original = getattr(SpeculativeDecoding, name)

        def spy(self: SpeculativeDecoding, original: Any = original) -> Any:
            counts.append(len(cuda.captures))
            return original(self)

        monkeypatch.setattr(SpeculativeDecoding, name, spy)
    return counts


# --------------------------------------------------------------------------------- which and when


@pytest.mark.parametrize("rows", [1, 3])
def test_all_graphs_of_a_call_are_captured_before_it_decodes_and_the_largest_first(rows, order, at_each_draft):
    call = small_calls()
    at_each_draft.clear()
    call(rows=rows)
    assert at_each_draft[0] == len(order) > 0 and set(at_each_draft) == {len(order)}
    buckets = {1: (1,), 3: (1, 2, 4)}[rows]
    target = [(count, width) for count in buckets for width in (1, 2, 3, 5)]  # γ + 1 = 4 is filled up to 5
    draft = [(count, width) for count in buckets for width in (1, 2)]
    assert sorted(order[: len(target)]) == sorted(target) and sorted(order[len(target) :]) == sorted(draft)
    for keys in (order[: len(target)], order[len(target) :]):
        sizes = [count * width for count, width in keys]
        assert sizes == sorted(sizes, reverse=True)
    assert set(captured(call.target)) == set(target) and set(captured(call.draft)) == set(draft)


@pytest.mark.parametrize(
    ("options", "widest"),
    [
        ({"num_assistant_tokens": 1}, 2),
        ({"num_assistant_tokens": 8}, 9),
        ({"num_assistant_tokens": 40}, 17),
        ({"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "heuristic"}, 17),
        ({"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "optimal"}, 3),
    ],
)
def test_the_widest_graph_is_that_of_the_longest_draft_that_the_schedule_can_choose(options, widest, cuda):
    call = small_calls()
    call(**options)
    assert max(width for _, width in captured(call.target)) == widest


def test_a_later_call_captures_only_what_is_new_to_it(cuda, order):
    call = small_calls()
    call(num_assistant_tokens=1)
    first = len(order)
    call(num_assistant_tokens=4, seed=1)
    assert sorted(order[first:]) == [(1, 3), (1, 5)]
    call(num_assistant_tokens=4, rows=2)  # has storage of its own
    assert {count for count, _ in order[first + 2 :]} == {1, 2}
    before = len(order)
    call(num_assistant_tokens=2, seed=2)
    call(num_assistant_tokens=2, seed=2, rows=2)
    assert len(order) == before


def test_a_width_that_is_needed_rarely_is_captured_the_second_time(order, cuda):
    """Short prompts are read by the first verification, in a block of up to 17 tokens."""
    call = small_calls()
    call(width=12)
    assert (1, 17) not in order
    call(width=13)
    assert order.count((1, 17)) == 2  # target and draft
    assert len({graph.pool for graph in captured(call.target).values()}) == 1
    call(width=14)
    assert order.count((1, 17)) == 2


def test_a_model_with_adapters_captures_what_it_needs_again_and_nothing_is_kept(cuda, order, at_each_draft):
    call = small_calls(max_new_tokens=30)
    call.target.peft_config = call.draft.peft_config = {}
    for _ in range(2):
        order.clear()
        at_each_draft.clear()
        before = len(cuda.captures)
        call()
        assert at_each_draft[0] == before and (1, 5) in order and (1, 17) not in order
        assert call.target not in kept._kept and call.draft not in kept._kept


# -------------------------------------------------------------------------------------- rows


def test_rows_that_end_one_by_one_use_graphs_of_8_4_2_and_1_rows(cuda, at_each_draft):
    call = small_calls(max_new_tokens=40)
    spoken = [row[20:] for row in call.vanilla(rows=8)]
    eos = max(range(96), key=lambda token: len({row.index(token) for row in spoken if token in row}))
    call.both["eos_token_id"] = eos
    call.target.generation_config.eos_token_id = eos
    call.both["return_dict_in_generate"] = True
    stats = hf_specdec.SpeculationStats()
    at_each_draft.clear()
    given = call.spec(rows=8, speculation_stats=stats)
    expected = call.target.generate(**call.prompts(8, 0), **call.both)
    assert given.sequences.tolist() == expected.sequences.tolist()
    counts = [len(iteration["rows"]) for iteration in stats.iterations]
    assert len(set(counts)) > 4  # fill is needed
    used = {len(result) for result in replayed_rows(cuda, call)}
    assert used == {graphs.bucket(count) for count in counts}
    assert set(at_each_draft) == {at_each_draft[0]}
    # What is handed back of rows that had ended is what they had.
    for mine, theirs in zip(given.past_key_values.layers, expected.past_key_values.layers):
        for own, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            for row, tokens in enumerate(expected.sequences.tolist()):
                first = 20 - int(call.prompts(8, 0)["attention_mask"][row].sum())
                end = 20 + tokens[20:].index(eos) if eos in tokens[20:] else len(tokens) - 1
                torch.testing.assert_close(own[row, :, first:end], other[row, :, first:end], atol=1e-4, rtol=1e-4)


def replayed_rows(cuda: pretend_cuda.Device, call: Calls) -> Iterator[torch.Tensor]:
    for step in forwards_of(call.target)._steps.values():
        if step.graph in cuda.replayed:
            assert step.result is not None
            yield step.result


@pytest.mark.parametrize("rows", [3, 5])
def test_storage_has_the_rows_of_the_bucket_and_the_next_batch_may_fill_it(rows, cuda):
    call = small_calls()
    call(rows=rows)
    storage = forwards_of(call.target).cache
    assert {len(layer.keys) for layer in storage.layers} == {graphs.bucket(rows)}
    captures = len(cuda.captures)
    call(rows=graphs.bucket(rows), seed=1)
    assert forwards_of(call.target).cache is storage and len(cuda.captures) == captures


def test_fill_leaves_all_slots_of_all_rows_as_they_were_but_the_last_ones(cuda):
    call = small_calls()
    cache, forwards = kept.borrow(call.target, 3, call.target.device, 100, widths=(1, 5))
    for layer in cache.layers:
        layer.keys.normal_()
    before = [layer.keys.clone() for layer in cache.layers]
    cache.activate([0])
    cache.lengths = [7, 9, 11]
    places = torch.tensor([[7], [0], [99]]).to(call.target.device)
    forwards(call.target, torch.tensor([[5]]).to(call.target.device), places)
    cache.activate([0, 1, 2])
    forwards._capture(call.target, [(4, 9)])  # in mid-call
    places = torch.tensor([[7, 9, 11], [0] * 3, [99] * 3]).to(call.target.device)
    forwards(call.target, torch.tensor([[5]] * 3).to(call.target.device), places)
    for layer, old in zip(cache.layers, before):
        changed = (layer.keys != old).any(dim=3).any(dim=1)  # [rows, slots]
        changed[[0, 1, 2], [7, 9, 11]] = False
        assert not changed[:, : cache.capacity - graphs.WIDTHS[-1]].any()
        assert changed[3, cache.capacity - graphs.WIDTHS[-1]]  # there was fill


# ------------------------------------------------------------------------------------ memory


def test_graphs_share_a_pool_by_model_and_results_are_outside_of_it(cuda):
    call = small_calls()
    call(rows=2)
    pools = []
    for model in (call.target, call.draft):
        graphs_of = captured(model).values()
        assert len(graphs_of) > 3 and len({id(graph.pool) for graph in graphs_of}) == 1
        pools.append(next(iter(graphs_of)).pool)
        inside = {address(tensor) for graph in graphs_of for tensor in graph.memory}
        steps = forwards_of(model)._steps.values()
        assert len({address(step.result) for step in steps if step.graph}) == 1
        outside = [t for step in steps if step.graph for t in (step.ids, step.places, step.result)]
        outside += [tensor for layer in forwards_of(model).cache.layers for tensor in (layer.keys, layer.values)]
        assert inside and not inside & {address(tensor) for tensor in outside}
    assert pools[0] is not pools[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_draft_logits_that_are_still_needed_survive_later_replays(do_sample, cuda):
    """Every replay overwrites the memory of all graphs of its pool; without processors, logits are the scores."""
    call, results = small_calls(max_new_tokens=20), []
    for implementation in ("static", None):
        torch.manual_seed(3)
        options = {"num_assistant_tokens": 5, "cache_implementation": implementation}
        results.append(call.spec(rows=2, do_sample=do_sample, top_k=0, **options).tolist())
    assert results[0] == results[1]


def test_a_new_pool_follows_one_whose_graphs_are_gone(cuda):
    call = small_calls()
    call()
    pool = next(iter(captured(call.target).values())).pool
    call.target.lm_head.weight.data = call.target.lm_head.weight.data.clone()
    call()
    assert next(iter(captured(call.target).values())).pool is not pool and not pool.graphs


def test_graphs_are_dropped_when_the_storage_moves(cuda):
    """As a block wider than any graph may let it grow."""
    call = small_calls()
    cache, forwards = kept.borrow(call.target, 1, call.target.device, 40, widths=(1,))
    inputs = [torch.tensor([[5]]).to(call.target.device), torch.tensor([[0], [0], [99]]).to(call.target.device)]
    expected = forwards(call.target, *inputs).clone()
    cache._grow(1000)
    for layer in cache.layers:
        layer.keys.zero_()
    for _ in range(2):
        assert forwards(call.target, *inputs).equal(expected)
        assert all(layer.keys[:, :, 0].abs().sum() > 0 for layer in cache.layers)
    assert captured_now(forwards) == {(1, 1)}


def captured_now(forwards: StaticForwards) -> set[Key]:
    return {key for key, step in forwards._steps.items() if step.graph is not None}


# ------------------------------------------------------------------------- how, and if it fails


def test_captures_are_on_a_side_stream_and_let_other_threads_be(cuda):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        small_calls()(rows=2)
        assert torch.is_autocast_cache_enabled()
    assert {options["mode"] for options in cuda.options} == {"thread_local"}
    assert {options["caches_casts"] for options in cuda.options} == {False}
    streams = {options["stream"] for options in cuda.options}
    assert len(streams) == 2 and None not in streams and cuda.default_stream not in streams  # one by model
    assert torch.cuda.current_stream() is cuda.default_stream
    assert streams <= set(cuda.default_stream.waited_for)
    assert all(cuda.default_stream in stream.waited_for for stream in streams)


def failing(at: int) -> Callable[[], None]:
    """Lets the captures from number `at` on fail."""
    seen: list[None] = []

    def fail() -> None:
        seen.append(None)
        if len(seen) > at:
            raise ValueError("cannot be captured today\nbecause")

    return fail


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_capture_that_fails_leaves_whole_graphs_only_and_the_next_call_tries_again(at, cuda, caplog):
    graphs.logger.warning_once.cache_clear()
    call = small_calls()
    cuda.fail = failing(at)
    _, stats = call(rows=2)
    assert 0 < stats.acceptance_rate < 1
    assert len(captured(call.target)) == at
    assert torch.cuda.current_stream() is cuda.default_stream and torch.is_autocast_cache_enabled()
    assert len([line for line in caplog.messages if "could not be captured" in line]) == 1
    reason = "RuntimeError: operation failed due to a previous error during capture"
    assert (
        f"LlamaForCausalLM could not be captured as a CUDA graph ({reason}): its forwards are launched" in caplog.text
    )
    cuda.fail = lambda: None
    replays = cuda.replays
    call(rows=2, seed=1)
    assert len(captured(call.target)) == 8 and cuda.replays > replays + 4


def test_a_model_whose_captures_always_fail_is_not_tried_in_every_call(cuda):
    call = small_calls()
    cuda.fail = failing(0)
    tried = []
    for seed in range(4):
        before = len(cuda.captures)
        call(seed=seed)
        tried.append(len(cuda.captures) - before)
    assert tried == [2, 2, 0, 0]  # target and draft


def test_a_failed_capture_in_mid_call_does_not_change_the_text(cuda):
    call = small_calls()
    call(width=12)
    cuda.fail = failing(0)
    call(width=12, seed=1)
    assert (1, 17) not in captured(call.target) and len(captured(call.target)) == 4


def test_a_model_in_train_mode_is_not_captured(cuda, caplog):
    kept.logger.warning_once.cache_clear()
    call = small_calls()
    call.draft.train()
    call()
    assert not captured(call.draft) and captured(call.target)
    assert "LlamaForCausalLM runs without CUDA graphs: it is in train mode" in caplog.text


@pytest.mark.parametrize("inference_first", [True, False])
def test_graphs_of_a_call_in_inference_mode_serve_calls_outside_of_it(inference_first, cuda):
    call, captures = small_calls(), 0
    for inference in (inference_first, not inference_first, inference_first):
        with torch.inference_mode(inference):
            call(rows=2, width=12)
    captures = len(cuda.captures)
    with torch.inference_mode(inference):
        call(rows=2, width=12, seed=1)
    assert len(cuda.captures) == captures
    assert not any(step.result.is_inference() for step in forwards_of(call.target)._steps.values() if step.graph)


# -------------------------------------------------------------------------------------- time


def test_time_of_captures_is_reported_apart(cuda, monkeypatch):
    now = [0.0]

    def takes_a_second() -> None:
        now[0] += 1.0

    for module in (clock, capture):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    cuda.fail, cuda.clock = takes_a_second, lambda: now[0]
    call = small_calls()
    for width in (20, 12, 12, 12):  # the third call captures while it decodes
        before = len(cuda.captures)
        _, stats = call(width=width)
        assert stats.capture_seconds == len(cuda.captures) - before
        assert stats.seconds == 0
        assert ("CUDA graphs captured in" in stats.summary()) == (stats.capture_seconds > 0)
        assert stats.to_dict()["capture_seconds"] == stats.capture_seconds
    assert now[0] == len(cuda.captures) and stats.capture_seconds == 0


# ----------------------------------------------------------------------------------- threads


class Threads:
    """Runs functions in threads that use the simulated device; an error in one is raised in `join`."""

    def __init__(self, cuda: pretend_cuda.Device):
        self.cuda = cuda
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def start(self, function: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                with self.cuda:
                    function()
            except BaseException as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("same_model", [True, False])
def test_calls_in_two_threads_at_once(same_model, cuda, monkeypatch):
    calls = [small_calls()] * 2 if same_model else [small_calls(), small_calls(seed=32)]
    both_inside = threading.Barrier(2, timeout=60)
    original = SpeculativeDecoding.draft

    def wait(self: SpeculativeDecoding) -> Any:
        if self.context.active_ends[0] == self.context.prompt_width:
            both_inside.wait()
        return original(self)

    expected = [call.vanilla(rows=2, seed=number) for number, call in enumerate(calls)]
    monkeypatch.setattr(SpeculativeDecoding, "draft", wait)
    captures = []
    for _ in range(2):
        threads, given = Threads(cuda), dict[int, Any]()

        def generate(number: int, given: dict[int, Any] = given) -> None:
            given[number] = calls[number].spec(rows=2, seed=number).tolist()

        for number in range(2):
            threads.start(functools.partial(generate, number))
        threads.join()
        assert [given[number] for number in range(2)] == expected
        captures.append(len(cuda.captures))
    assert cuda.overlaps == 0
    assert captures[1] == captures[0]  # each call left what it used
    for call in calls:
        assert len(kept._kept[call.target]) == (2 if same_model else 1)


def test_another_thread_generates_while_a_graph_is_captured(cuda):
    """It waits for the device in each iteration, which a capture allows to other threads."""
    running, capturing = small_calls(), small_calls(seed=32)
    expected, _ = running()
    given: list[Any] = []

    def generate_meanwhile() -> None:
        cuda.fail = lambda: None
        threads = Threads(cuda)
        threads.start(lambda: given.append(running.spec().tolist()))
        threads.join()

    cuda.fail = generate_meanwhile
    capturing()
    assert given == [expected]
    assert len(captured(capturing.target)) == 4
