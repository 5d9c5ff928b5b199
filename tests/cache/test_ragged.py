"""RaggedCache keeps rows of uneven lengths; transformers' caches go in and come out as vanilla leaves them."""

import functools
import itertools
import random
import weakref
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, generate_with, make_model, make_pair, make_prompts, perturbed
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache, StoppingCriteria
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_specdec.cache import storage as storage_module
from hf_specdec.cache.ragged import RaggedCache

CPU = torch.device("cpu")
LAYERS = 2


# The cache alone


class Reference:
    """What a ragged cache must hold: a list of entries per row."""

    def __init__(self, batch: int, seed: int):
        self.rows: list[list[float]] = [[] for _ in range(batch)]
        self.random = random.Random(seed)
        self.entries = 0.0

    def write(self, cache: RaggedCache, queries: int) -> tuple[Tensor, Tensor]:
        """A forward of `queries` new tokens for each active row; returns the last layer's keys and values."""
        states = torch.zeros(len(cache.rows), 1, queries, 1)
        for i, row in enumerate(cache.rows):
            for query in range(queries):
                self.entries += 1
                states[i, 0, query, 0] = self.entries
                self.rows[row].append(self.entries)
        cache.prepare(queries)
        for layer in range(LAYERS):
            seen = cache.update(states + layer / 2, -states, layer)
        for row in cache.rows:
            cache.lengths[row] += queries
        return seen

    def roll_back(self, cache: RaggedCache, row: int, length: int) -> None:
        cache.lengths[row] = length
        del self.rows[row][length:]

    def check(self, cache: RaggedCache) -> None:
        width = max(len(row) for row in self.rows)
        for layer, keys, values in cache.columns([0] * len(self.rows), width):
            for row, entries in enumerate(self.rows):
                expected = torch.tensor(entries)
                assert cache.lengths[row] == len(entries)
                assert keys[row, 0, : len(entries), 0].equal(expected + layer / 2)
                assert values[row, 0, : len(entries), 0].equal(-expected)
                assert not keys[row, :, len(entries) :].any()


def filled(lengths: list[int], seed: int = 0, capacity: int = 64) -> tuple[RaggedCache, Reference]:
    """A cache with rows of these lengths, and its expected content."""
    cache, reference = RaggedCache(len(lengths), CPU, capacity, 10_000), Reference(len(lengths), seed)
    reference.write(cache, max(lengths))
    for row, length in enumerate(lengths):
        reference.roll_back(cache, row, length)
    return cache, reference


@pytest.mark.parametrize("seed", range(4))
def test_forwards_rollbacks_and_changes_of_the_active_rows_leave_each_row_its_own_entries(seed):
    cache, reference = filled([3, 9, 1, 5], seed)
    for _ in range(50):
        rows = reference.random.sample(range(4), reference.random.randint(1, 4))
        cache.activate(rows)
        assert cache.rows == rows
        reference.write(cache, reference.random.randint(1, 6))
        for row in rows:
            length = len(reference.rows[row])
            reference.roll_back(cache, row, reference.random.randint(max(length - 2, 0), length))
        reference.check(cache)
    assert cache.capacity > 64  # it has grown meanwhile


def test_a_forward_sees_each_row_up_to_its_own_new_entries():
    cache, reference = filled([4, 2, 3])
    keys, values = reference.write(cache, 2)
    assert keys.shape[2] == values.shape[2] == 6
    for row, length in enumerate([6, 4, 5]):
        assert values[row, 0, :length, 0].equal(-torch.tensor(reference.rows[row]))


def test_rows_of_one_length_are_written_without_index_tensors():
    cache, reference = filled([3, 3])
    assert cache.is_uniform
    keys, _ = reference.write(cache, 1)
    assert cache._write.slots is None
    assert keys.data_ptr() == cache.layers[-1].keys.data_ptr()  # a view, not a copy
    reference.check(cache)


def test_rolling_back_copies_nothing():
    cache, reference = filled([8, 6])
    pointers = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
    reference.roll_back(cache, 0, 2)
    reference.write(cache, 3)
    reference.roll_back(cache, 1, 0)
    assert [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)] == pointers
    reference.check(cache)


def test_growing_keeps_every_row_and_stops_at_what_will_ever_be_needed():
    cache, reference = RaggedCache(2, CPU, capacity=10, max_capacity=300), Reference(2, 0)
    capacities = [cache.capacity]
    for _ in range(30):
        reference.write(cache, 10)
        capacities.append(cache.capacity)
        reference.check(cache)
    assert sorted(set(capacities)) == [64, 128, 256, 320]


def test_growing_keeps_rows_that_are_not_active():
    cache, reference = filled([60, 50])
    cache.activate([1])
    reference.write(cache, 40)
    assert cache.capacity > 64
    reference.check(cache)


@pytest.mark.parametrize("first", [[0, 0, 0], [0, 3, 7], [2, 0, 9]])
def test_columns_are_the_inverse_of_load(first):
    source, width = DynamicCache(), 9
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        states = torch.rand(3, 2, width, 4, generator=generator) + 1
        for row, column in enumerate(first):
            states[row, :, :column] = 0
        source.update(states, -states, layer)
    cache = RaggedCache(3, CPU, 4, 100)
    cache.load(source, first)
    assert cache.lengths == [width - column for column in first]
    cache.activate([2, 0])  # must not matter
    for layer, keys, values in cache.columns(first, width):
        assert keys.equal(source.layers[layer].keys)
        assert values.equal(source.layers[layer].values)


def test_a_row_that_begins_behind_what_was_cached_is_empty():
    source = DynamicCache()
    source.update(torch.ones(2, 1, 4, 1), torch.ones(2, 1, 4, 1), 0)
    cache = RaggedCache(2, CPU, 4, 100)
    cache.load(source, [1, 6])
    assert cache.lengths == [3, 0]


def test_load_takes_from_a_sliding_layer_what_is_still_there():
    source, width = DynamicCache(), 10
    source.layer_class_to_replicate = functools.partial(DynamicSlidingWindowLayer, sliding_window=5)
    states = torch.arange(1.0, width + 1)[None, None, :, None].repeat(2, 1, 1, 1)
    source.update(states, -states, 0)
    cache = RaggedCache(2, CPU, 4, 100)
    cache.load(source, [0, 8])
    assert cache.lengths == [10, 2]
    keys = cache.layers[0].keys
    assert keys[0, 0, 6:10, 0].tolist() == [7, 8, 9, 10]
    assert keys[1, 0, :2, 0].tolist() == [9, 10]


# Caches of transformers


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """Models that agree in part, in any architecture."""
    config = ARCHITECTURES[name]()
    if name in ("gemma2", "bloom"):  # with tied embeddings, these models and their drafts repeat the last token
        config.tie_word_embeddings = False
    target = make_model(config)
    return target, perturbed(target, {"gpt2": 0.15, "gemma2": 0.08, "bloom": 0.05}.get(name, 0.04))


def prompts(batch: int, width: int = 14) -> dict[str, Tensor]:
    return make_prompts(batch, width, seed=3)


generate = functools.partial(generate_with, max_new_tokens=16)


def check_same_cache(ours: Any, theirs: Any, first: list[int]) -> None:
    """Both caches have the same content, layer by layer; columns of left padding may differ."""
    assert type(ours) is type(theirs)
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    assert len(ours.layers) == len(theirs.layers)
    width = int(theirs.get_seq_length())
    for mine, layer in zip(ours.layers, theirs.layers):
        assert type(mine) is type(layer)
        assert int(mine.get_seq_length()) == int(layer.get_seq_length())
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(layer, name)
            assert a.shape == b.shape
            dropped = width - min(width, b.shape[2])  # columns that a sliding layer has dropped
            for row, column in enumerate(first):
                begin = max(column - dropped, 0)
                torch.testing.assert_close(a[row, :, begin:], b[row, :, begin:], atol=1e-4, rtol=1e-4)


def first_columns(inputs: dict[str, Tensor]) -> list[int]:
    return inputs["attention_mask"].argmax(dim=1).tolist()


def eos_tokens(target: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Tokens that end each row at a different step, none very early."""
    rows = generate(target, **inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    for eos in itertools.combinations(sorted({token for row in rows for token in row}), len(rows)):
        ends = sorted(min((row.index(token) for token in eos if token in row), default=99) for row in rows)
        if all(late - early >= 3 for early, late in itertools.pairwise([0, *ends])) and 9 < ends[-1] < 99:
            return list(eos)
    raise AssertionError("choose another prompt")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding", "gemma2", "bloom"])
def test_the_returned_cache_is_vanillas(name, batch):
    target, draft = pair(name)
    inputs = prompts(batch)
    theirs = generate(target, **inputs, return_dict_in_generate=True)
    ours = generate(target, draft, **inputs, return_dict_in_generate=True)
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(inputs))


@pytest.mark.parametrize("gamma", [1, 3, 11])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_returned_cache_is_vanillas_where_rows_end_at_different_steps(batch, gamma):
    target, draft = pair("llama")
    inputs = prompts(batch)
    kwargs = {**inputs, "eos_token_id": eos_tokens(target, inputs), "return_dict_in_generate": True}
    theirs = generate(target, **kwargs)
    ours = generate(target, draft, **kwargs, num_assistant_tokens=gamma)
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(inputs))


@pytest.mark.parametrize("name", ["mistral-sliding", "bloom"])
def test_the_returned_cache_is_vanillas_where_rows_end_early_whatever_the_layout(name):
    target, draft = pair(name)
    inputs = prompts(3)
    kwargs = {**inputs, "eos_token_id": eos_tokens(target, inputs), "return_dict_in_generate": True}
    theirs = generate(target, **kwargs)
    ours = generate(target, draft, **kwargs)
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(inputs))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_returned_cache_is_vanillas_where_rows_met_their_criterion_at_different_steps(name):
    """Without an EOS token, rows continue until all have stopped, so some have gone too far."""

    class LastToken(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.isin(input_ids[:, -1], torch.tensor(ends))

    target, draft = pair(name)
    inputs = prompts(3)
    ends = eos_tokens(target, inputs)
    kwargs = {**inputs, "stopping_criteria": [LastToken()], "return_dict_in_generate": True, "max_new_tokens": 40}
    theirs = generate(target, **kwargs)
    ours = generate(target, draft, **kwargs)
    assert theirs.sequences.shape[1] < 14 + 40
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(inputs))


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_returned_cache_is_vanillas_where_tokens_of_the_prompt_are_masked(batch, name):
    target, draft = pair(name)
    inputs = prompts(batch)
    inputs["attention_mask"][0, 4:6] = 0
    inputs["attention_mask"][1:, 12] = 0
    theirs = generate(target, **inputs, return_dict_in_generate=True)
    ours = generate(target, draft, **inputs, return_dict_in_generate=True)
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(inputs))


# Conversations

SWAPS = {"vanilla, then ours": (False, True), "ours, then vanilla": (True, False), "ours, then ours": (True, True)}


def second_turn(inputs: dict[str, Tensor], said: Tensor, masked: Tensor) -> dict[str, Tensor]:
    """The conversation so far and five new tokens; `masked` marks its padding columns."""
    batch, width = inputs["input_ids"].shape
    question = torch.randint(2, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(8))
    mask = torch.cat([inputs["attention_mask"], (~masked).long()[:, width:], torch.ones_like(question)], dim=1)
    return {"input_ids": torch.cat([said, question], dim=1), "attention_mask": mask}


def converse(target: Any, drafts: tuple[Any, Any], batch: int, only_new: bool, **kwargs: Any) -> list[Any]:
    """Two turns that share a cache."""
    inputs = prompts(batch)
    first = generate(target, drafts[0], **inputs, **kwargs, return_dict_in_generate=True)
    cache, padding = first.past_key_values, first.sequences == target.generation_config.pad_token_id
    turn = second_turn(inputs, first.sequences, padding)
    if only_new:
        turn["input_ids"] = turn["input_ids"][:, int(cache.get_seq_length()) :]
    second = generate(
        target, drafts[1], **turn, **kwargs, past_key_values=cache, return_dict_in_generate=True, max_new_tokens=12
    )
    assert second.past_key_values is cache
    return [first, second]


@pytest.mark.parametrize("only_new", [False, True], ids=["all ids", "new ids"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_conversation_goes_on_with_the_returned_cache(swap, batch, only_new):
    target, draft = pair("llama")
    expected = converse(target, (None, None), batch, only_new)
    got = converse(target, tuple(draft if ours else None for ours in SWAPS[swap]), batch, only_new)
    assert [turn.sequences.tolist() for turn in got] == [turn.sequences.tolist() for turn in expected]
    check_same_cache(got[1].past_key_values, expected[1].past_key_values, first_columns(prompts(batch)))


@pytest.mark.parametrize("only_new", [False, True], ids=["all ids", "new ids"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_conversation_goes_on_after_rows_ended_at_different_steps(swap, only_new):
    target, draft = pair("llama")
    inputs = prompts(2)
    kwargs = {"eos_token_id": eos_tokens(target, inputs)}
    expected = converse(target, (None, None), 2, only_new, **kwargs)
    assert (expected[0].sequences[:, -1] == 0).any()  # so that a row of the next mask has a hole
    got = converse(target, tuple(draft if ours else None for ours in SWAPS[swap]), 2, only_new, **kwargs)
    assert [turn.sequences.tolist() for turn in got] == [turn.sequences.tolist() for turn in expected]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gpt2", "bloom"])
def test_a_conversation_goes_on_in_other_architectures(name, batch):
    target, draft = pair(name)
    expected = converse(target, (None, None), batch, only_new=False)
    got = converse(target, (draft, draft), batch, only_new=False)
    assert [turn.sequences.tolist() for turn in got] == [turn.sequences.tolist() for turn in expected]
    check_same_cache(got[1].past_key_values, expected[1].past_key_values, first_columns(prompts(batch)))


# Caches that users make

USER_CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic by config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


def user_cache(target: Any, kind: str, inputs: dict[str, Tensor], prefix: int) -> Any:
    """A cache made by a user: `model.forward` has fed the first `prefix` columns of the prompt."""
    cache = USER_CACHES[kind](target.config)
    if prefix:
        mask = inputs["attention_mask"][:, :prefix]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            target(inputs["input_ids"][:, :prefix], attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("kind", USER_CACHES)
def test_a_users_cache_is_continued_and_filled_in_place(kind, prefix, batch):
    target, draft = pair("llama")
    inputs = prompts(batch)
    theirs, ours = (user_cache(target, kind, inputs, prefix) for _ in range(2))
    expected = generate(target, **inputs, past_key_values=theirs)
    assert generate(target, draft, **inputs, past_key_values=ours).equal(expected)
    check_same_cache(ours, theirs, first_columns(inputs))


def test_a_users_cache_is_the_one_returned():
    target, draft = pair("llama")
    inputs = prompts(2)
    cache = user_cache(target, "dynamic", inputs, 4)
    out = generate(target, draft, **inputs, past_key_values=cache, return_dict_in_generate=True)
    assert out.past_key_values is cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", USER_CACHES)
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2"])
def test_a_users_cache_beyond_the_sliding_window_is_continued(name, kind, batch):
    target, draft = pair(name)
    inputs = prompts(batch, width=22)
    theirs, ours = (user_cache(target, kind, inputs, prefix=17) for _ in range(2))
    assert target.config.sliding_window < 17
    expected = generate(target, **inputs, past_key_values=theirs)
    assert generate(target, draft, **inputs, past_key_values=ours).equal(expected)
    check_same_cache(ours, theirs, first_columns(inputs))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2"])
def test_prompts_longer_than_the_sliding_window(name, batch):
    target, draft = pair(name)
    inputs = prompts(batch, width=30)
    theirs = generate(target, **inputs, return_dict_in_generate=True)
    ours = generate(target, draft, **inputs, return_dict_in_generate=True)
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(inputs))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementations(implementation, batch):
    target, draft = pair("llama")
    kwargs = {**prompts(batch), "cache_implementation": implementation, "return_dict_in_generate": True}
    theirs = generate(target, **kwargs)
    ours = generate(target, draft, **kwargs)
    assert ours.sequences.equal(theirs.sequences)
    check_same_cache(ours.past_key_values, theirs.past_key_values, first_columns(kwargs))


# Errors


def count_forwards(*models: Any) -> list[str]:
    """A list that records the class name of each model called from now on."""
    calls: list[str] = []
    for model in models:
        model.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    return calls


@pytest.mark.parametrize("implementation", ["quantized", "offloaded", "offloaded_static"])
def test_other_cache_implementations_are_refused_by_name(implementation):
    target, draft = make_pair("llama", 0.04)
    calls = count_forwards(target, draft)
    with pytest.raises(ValueError, match=f"`cache_implementation`.*'{implementation}'.*'dynamic' or 'static'"):
        generate(target, draft, **prompts(1), cache_implementation=implementation)
    assert not calls


def test_a_cache_of_another_batch_size_is_refused():
    target, draft = make_pair("llama", 0.04)
    cache = user_cache(target, "dynamic", prompts(1), 5)
    calls = count_forwards(target, draft)
    with pytest.raises(ValueError, match=r"`past_key_values` has 1 rows, but the prompt has 2"):
        generate(target, draft, **prompts(2), past_key_values=cache)
    assert not calls


@pytest.mark.parametrize("kind", USER_CACHES)
@pytest.mark.parametrize("columns", [10, 14], ids=["more than the prompt", "all of the prompt"])
def test_a_cache_that_leaves_nothing_to_feed_is_refused(kind, columns):
    target, draft = make_pair("llama", 0.04)
    inputs = prompts(1)
    cache = user_cache(target, kind, inputs, 14)
    calls = count_forwards(target, draft)
    with pytest.raises(ValueError, match=rf"holds 14 tokens already and the prompt has {columns}.*at least one token"):
        generate(target, draft, **{name: t[:, :columns] for name, t in inputs.items()}, past_key_values=cache)
    assert not calls
    assert int(cache.get_seq_length()) == 14


def test_a_quantized_cache_is_refused_by_name():
    target, draft = make_pair("llama", 0.04)
    calls = count_forwards(target, draft)
    cache = QuantizedCache("fp8", target.config)
    with pytest.raises(ValueError, match="cannot roll"):
        generate(target, draft, **prompts(1), past_key_values=cache)
    assert not calls


def test_a_cache_that_is_no_cache_is_refused():
    target, draft = make_pair("llama", 0.04)
    with pytest.raises(ValueError, match="`past_key_values`"):
        generate(target, draft, **prompts(1), past_key_values=((torch.zeros(1),) * 2,))


def test_a_static_cache_that_is_too_small_is_an_error_as_in_vanilla():
    target = make_model(ARCHITECTURES["llama"]())
    inputs = prompts(1)
    for draft in (None, pair("llama")[1]):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            generate(target, draft, **inputs, past_key_values=StaticCache(config=target.config, max_cache_len=20))


def test_layers_grow_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its peak, memory holds one copy of the cache and the old keys or values of one layer."""
    cache, _ = filled([40, 60])
    old = [weakref.ref(states) for layer in cache.layers for states in (layer.keys, layer.values)]
    alive: list[int] = []
    storage = storage_module._storage

    def counted(*args: Any) -> Tensor:
        alive.append(sum(states() is not None for states in old))
        return storage(*args)

    monkeypatch.setattr(storage_module, "_storage", counted)
    cache.prepare(100)
    assert alive == list(range(2 * LAYERS, 0, -1))
    assert not any(states() is not None for states in old)
