"""Past the window: tokens stay vanilla's, and layers that attend to a window store no more than the window.

Windows have 12 tokens, prompts three windows. `few_to_spare` makes storage so tight that entries are dropped every
few tokens.
"""

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SIZES, VOCAB, make_model, make_prompts, perturbed
from torch import Tensor
from transformers import (
    Cohere2Config,
    DynamicCache,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

import hf_specdec
from hf_specdec.cache import window
from hf_specdec.cache.ragged import RaggedCache
from hf_specdec.cache.storage import RaggedLayer
from hf_specdec.cache.window import Window, WindowLayer, window_layers
from hf_specdec.loop import invariants

WINDOW = 12
NEW_TOKENS = 100
BOTH = ["sliding_attention", "full_attention"]
CPU = torch.device("cpu")


def config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """With untied embeddings: with tied ones, these models and their drafts repeat the last token."""
    made = kind(**{**SIZES, "head_dim": 8, "sliding_window": WINDOW, "max_position_embeddings": 1024, **changes})
    made.tie_word_embeddings = False
    return made


# Every layer has a window, or every other one; some share keys and values, have sinks, soft-caps, chunks, experts.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral": lambda: config(MistralConfig),
    "phi3": lambda: config(Phi3Config),
    "gemma2": lambda: config(Gemma2Config),
    "gemma3": lambda: config(Gemma3TextConfig, layer_types=BOTH),
    "gemma3n": lambda: config(
        Gemma3nTextConfig, num_hidden_layers=4, layer_types=BOTH * 2, num_kv_shared_layers=2, laurel_rank=4,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "qwen2": lambda: config(Qwen2Config, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: config(Qwen3Config, use_sliding_window=True, max_window_layers=1),
    "cohere2": lambda: config(Cohere2Config, layer_types=BOTH),
    "llama4": lambda: config(
        Llama4TextConfig, attention_chunk_size=WINDOW, intermediate_size_mlp=64, num_local_experts=2,
        no_rope_layers=[1, 0],
    ),
    "gpt_oss": lambda: config(GptOssConfig, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
EAGER_ONLY = ("gemma2", "gpt_oss")  # as in transformers: for soft-caps and sinks


@functools.cache
def pair(name: str, attention: str = "sdpa") -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make_model(FAMILIES[name](), attn_implementation="eager" if name in EAGER_ONLY else attention)
    return target, perturbed(target, 0.06)


def prompts(batch: int, width: int = 3 * WINDOW) -> dict[str, Tensor]:
    return make_prompts(batch, width, seed=batch)


def generate(models: tuple[Any, Any], gamma: int | None, **kwargs: Any) -> Any:
    """Greedy, vanilla without a `gamma`."""
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **kwargs}
    if gamma is not None:
        kwargs.update(assistant_model=models[1], strategy="spec", num_assistant_tokens=gamma)
    return models[0].generate(**kwargs)


@functools.cache
def vanilla(name: str, attention: str, batch: int) -> Tensor:
    return generate(pair(name, attention), None, **prompts(batch))


@pytest.fixture
def few_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_SLACK", 8)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "ENABLED", True)


# Tokens


@pytest.mark.core
@pytest.mark.usefixtures("few_to_spare")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_past_the_window_what_it_said(name: str) -> None:
    models = pair(name)
    for batch, gamma in ((1, 3), (4, 1), (4, 7)):
        stats = hf_specdec.SpeculationStats()
        out = generate(models, gamma, **prompts(batch), speculation_stats=stats)
        assert torch.equal(out, vanilla(name, "sdpa", batch)), f"{batch} rows, γ = {gamma}"
        assert 0.05 < stats.acceptance_rate < 0.95


@pytest.mark.usefixtures("few_to_spare")
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_eager_attention_says_the_same(name: str) -> None:
    for batch, gamma in ((1, 3), (4, 7)):
        out = generate(pair(name, "eager"), gamma, **prompts(batch))
        assert torch.equal(out, vanilla(name, "eager", batch)), f"{batch} rows, γ = {gamma}"


@pytest.mark.usefixtures("few_to_spare", "checked")
@pytest.mark.parametrize("name", ["mistral", "gemma2", "llama4"])
def test_caches_stand_for_the_tokens_in_the_window_after_every_iteration(name: str) -> None:
    for gamma in (1, 3, 7, 20):
        generate(pair(name), gamma, **prompts(3), max_new_tokens=40)


@pytest.mark.usefixtures("few_to_spare")
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_drafts_longer_than_window_and_slack(name: str) -> None:
    for batch, gamma in ((1, 40), (4, 25)):
        assert torch.equal(generate(pair(name), gamma, **prompts(batch)), vanilla(name, "sdpa", batch))


@pytest.mark.usefixtures("few_to_spare", "checked")
@pytest.mark.parametrize("chunk", [1, 7, 30])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_prompts_fed_in_chunks(name: str, chunk: int) -> None:
    for batch in (1, 4):
        expected = vanilla(name, "sdpa", batch)[:, : 3 * WINDOW + 20]
        out = generate(pair(name), 3, **prompts(batch), max_new_tokens=20, prefill_chunk_size=chunk)
        assert torch.equal(out, expected), f"{batch} rows"


@pytest.mark.usefixtures("few_to_spare", "checked")
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_masked_tokens_in_the_prompt(name: str) -> None:
    """Rows then advance in lockstep, and transformers makes the masks from the cache's description of its layers."""
    inputs = prompts(3)
    inputs["attention_mask"][0, 4:6] = 0
    inputs["attention_mask"][1:, 33] = 0
    assert torch.equal(generate(pair(name), 4, **inputs), generate(pair(name), None, **inputs))


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_static_shapes_hold_every_slot(name: str) -> None:
    models, inputs = pair(name), prompts(4)
    expected = generate(models, None, **inputs, cache_implementation="static")
    out = generate(models, 4, **inputs, cache_implementation="static")
    assert torch.equal(out, expected)


def test_what_is_sampled_past_the_window_does_not_depend_on_what_was_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample() -> list[list[int]]:
        torch.manual_seed(0)
        return generate(pair("mistral"), 3, **prompts(4), do_sample=True, temperature=0.5).tolist()

    monkeypatch.setattr(window, "_SLACK", 8)
    bounded = sample()
    monkeypatch.setattr(window, "_SLACK", 10_000)
    assert bounded == sample()


# Memory


def stored(model: PreTrainedModel, sizes: dict[int, list[list[int]]]) -> Any:
    """Records each layer's storage slots at each forward, by context length."""

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cache = kwargs["past_key_values"]
        slots = [layer.keys.shape[2] for layer in cache.layers if layer.is_initialized]
        sizes.setdefault(max(cache.active_lengths), []).append(slots)

    return model.register_forward_hook(note, with_kwargs=True)


@pytest.mark.parametrize("batch", [1, 4])
def test_storage_stays_flat_while_the_context_grows_tenfold(batch: int) -> None:
    target = pair("gemma3")[0]
    draft = perturbed(target, 0.005)
    sizes: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    hooks = [stored(model, found) for model, found in zip((target, draft), sizes)]
    generate((target, draft), 7, **prompts(batch), max_new_tokens=11 * 36, use_cache=True)
    for hook in hooks:
        hook.remove()
    for found in sizes:
        assert min(found) < 40 and max(found) > 390
        sliding, full = zip(*(slots for at in found.values() for slots in at))
        assert max(sliding) <= WINDOW + 64
        assert max(full) > 390  # as for every token


def test_a_long_prompt_leaves_no_more_than_the_window() -> None:
    target, draft = pair("mistral")
    for chunk in (None, 50):
        sizes: dict[int, list[list[int]]] = {}
        hook = stored(target, sizes)
        generate((target, draft), 3, **prompts(4, width=500), max_new_tokens=5, prefill_chunk_size=chunk)
        hook.remove()
        assert max(max(slots) for at in sizes.values() for slots in at) <= WINDOW + 64


def test_short_contexts_allocate_no_whole_window() -> None:
    target = make_model(config(MistralConfig, sliding_window=100_000))
    sizes: dict[int, list[list[int]]] = {}
    hook = stored(target, sizes)
    generate((target, perturbed(target, 0.06)), 3, **prompts(1), max_new_tokens=20)
    hook.remove()
    assert max(max(slots) for at in sizes.values() for slots in at) <= 512


def test_a_forward_sees_no_more_keys_than_vanillas() -> None:
    """One row: the window before the first query, and the queries' own entries."""
    target, draft = pair("mistral")
    seen = set()
    update = WindowLayer.update

    def note(self: WindowLayer, key_states: Tensor, value_states: Tensor) -> Any:
        keys, values = update(self, key_states, value_states)
        seen.add((keys.shape[2], key_states.shape[2]))
        return keys, values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowLayer, "update", note)
        generate((target, draft), 3, **prompts(1))
    decoding = {(keys, queries) for keys, queries in seen if queries <= 4}
    assert decoding and all(keys == WINDOW - 1 + queries for keys, queries in decoding)


# Caches that go in and come out


def same_held(ours: Any, theirs: Any, inputs: dict[str, Tensor]) -> None:
    """Each layer holds the same as vanilla's, except for left padding."""
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    for mine, layer in zip(ours.layers, theirs.layers):
        assert type(mine) is type(layer)
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(layer, name)
            assert a.shape == b.shape
            gone = int(theirs.get_seq_length()) - b.shape[2]
            for row, first in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
                torch.testing.assert_close(a[row, :, max(first - gone, 0) :], b[row, :, max(first - gone, 0) :])


def early_ends(name: str, batch: int, count: int = 2) -> list[int]:
    """Tokens that end some rows early, but none at once."""
    said = vanilla(name, "sdpa", batch)[:, 3 * WINDOW :].tolist()
    return [row[20 + 17 * i] for i, row in enumerate(said[:count])]


@pytest.mark.usefixtures("few_to_spare")
@pytest.mark.parametrize("name", ["mistral", "gemma2", "llama4"])
def test_rows_that_finish_early(name: str) -> None:
    for gamma in (1, 7):
        kwargs = {**prompts(4), "eos_token_id": early_ends(name, 4), "return_dict_in_generate": True}
        theirs, ours = generate(pair(name), None, **kwargs), generate(pair(name), gamma, **kwargs)
        assert (theirs.sequences == 0).any(), "choose other tokens"
        assert torch.equal(ours.sequences, theirs.sequences)
        same_held(ours.past_key_values, theirs.past_key_values, kwargs)


@pytest.mark.usefixtures("few_to_spare")
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_vanilla_goes_on_with_the_returned_cache_and_we_with_vanillas(name: str, batch: int) -> None:
    inputs = prompts(batch)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 60), value=1)
    question = torch.randint(2, VOCAB, (batch, 10), generator=torch.Generator().manual_seed(1))
    results = []
    for first, second in ((None, None), (3, None), (None, 3), (3, 5)):
        said = generate(pair(name), first, **inputs, max_new_tokens=50, return_dict_in_generate=True)
        turn = {"input_ids": torch.cat([said.sequences, question], dim=1), "attention_mask": mask}
        cache = said.past_key_values
        out = generate(pair(name), second, **turn, past_key_values=cache, return_dict_in_generate=True)
        results.append(out)
        assert torch.equal(out.sequences, results[0].sequences), (first, second)
        same_held(out.past_key_values, results[0].past_key_values, inputs)


@pytest.mark.usefixtures("few_to_spare")
@pytest.mark.parametrize("kind", ["dynamic", "dynamic by config", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_caches_of_users_past_the_window(name: str, kind: str) -> None:
    models = pair(name)
    make: dict[str, Callable[[], Any]] = {
        "dynamic": DynamicCache,
        "dynamic by config": lambda: DynamicCache(config=models[0].config),
        "static": lambda: StaticCache(config=models[0].config, max_cache_len=200),
    }
    inputs = prompts(1)
    theirs, ours = make[kind](), make[kind]()
    expected = generate(models, None, **inputs, past_key_values=theirs)
    assert torch.equal(generate(models, 3, **inputs, past_key_values=ours), expected)
    same_held(ours, theirs, inputs)


@pytest.mark.usefixtures("few_to_spare")
def test_rows_that_end_early_in_lockstep_go_far_back_when_the_cache_is_returned() -> None:
    inputs = prompts(3)
    inputs["attention_mask"][0, 4:6] = 0
    said = generate(pair("mistral"), None, **inputs)[:, 3 * WINDOW :].tolist()
    kwargs = {**inputs, "eos_token_id": [said[0][60], said[1][30]], "return_dict_in_generate": True}
    theirs, ours = generate(pair("mistral"), None, **kwargs), generate(pair("mistral"), 4, **kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)
    same_held(ours.past_key_values, theirs.past_key_values, inputs)


@pytest.mark.usefixtures("few_to_spare")
def test_attention_weights_past_the_window_are_vanillas() -> None:
    kwargs = {**prompts(3), "return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 30}
    theirs, ours = generate(pair("gemma2"), None, **kwargs), generate(pair("gemma2"), 3, **kwargs)
    for step, other in zip(ours.attentions, theirs.attentions, strict=True):
        for weights, expected in zip(step, other, strict=True):
            torch.testing.assert_close(weights[0], expected[0])


# The cache alone


class Rows:
    """The expected content of a bounded layer: a list of entries per row; rolling back removes the last ones."""

    def __init__(self, batch: int, size: int, seed: int):
        self.random = random.Random(seed)
        self.window = Window(size, "sliding_attention", batch, 100_000)
        self.cache = RaggedCache(batch, CPU, 64, 100_000, [WindowLayer(self.window), RaggedLayer()])
        self.entries: list[list[float]] = [[] for _ in range(batch)]
        self.written = 0.0

    def feed(self, query_length: int, ends: list[int], prefill: bool = False) -> None:
        cache, size = self.cache, self.window.size
        states = torch.arange(float(query_length * len(cache.rows))).reshape(-1, 1, query_length, 1) + self.written + 1
        self.written += states.numel()
        cache.prepare(query_length, ends, prefill)
        keys, values = cache.update(states, -states, 0)
        cache.update(states, -states, 1)
        shown = self.window.slots(CPU)
        assert keys.shape[2] == shown.shape[1] == self.window.view.used
        for i, row in enumerate(cache.rows):
            length = cache.lengths[row]
            self.entries[row][length:] = states[i, 0, :, 0].tolist()
            if prefill and length > ends[i]:
                continue  # only fill
            needed = range(max(length - size + 1, 0), length + query_length)
            here = {slot: index for index, slot in enumerate(shown[i].tolist())}
            assert [keys[i, 0, here[slot], 0] for slot in needed] == [self.entries[row][slot] for slot in needed]
            assert [values[i, 0, here[slot], 0] for slot in needed] == [-self.entries[row][slot] for slot in needed]
        if cache.sees_one_span:
            assert cache.get_mask_sizes(query_length, 0) == (keys.shape[2], int(shown[0, 0]))

    def check(self) -> None:
        width = max(self.cache.lengths)
        bounded, full = ({index: keys for index, keys, _ in self.cache.columns([0] * 4, width)}[i] for i in (0, 1))
        for row, length in enumerate(self.cache.lengths):
            begin = max(length - self.window.size + 1, 0)
            assert bounded[row, 0, begin:length].equal(full[row, 0, begin:length])


@pytest.mark.parametrize("size", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("few_to_spare")
def test_forwards_rollbacks_and_changes_of_the_active_rows_show_each_row_its_window(size: int, seed: int) -> None:
    rows = Rows(4, size, seed)
    cache, choose = rows.cache, rows.random
    prompt = [choose.randint(1, 40) for _ in range(4)]
    for _ in range(0, 40, 10):  # chunks of one prefill: all rows advance, with fill after the shorter ones
        rows.feed(10, prompt, prefill=True)
        cache.lengths = [length + 10 for length in cache.lengths]
    cache.lengths = list(prompt)
    rows.check()
    for _ in range(60):
        cache.activate(choose.sample(range(4), choose.randint(1, 4)))
        ends = cache.active_lengths
        for _ in range(choose.randint(1, 3)):  # like a draft model: several forwards, then a rollback
            queries = choose.choice([1, 1, 2, 5, 9, 30])
            rows.feed(queries, ends)
            for row in cache.rows:
                cache.lengths[row] += queries
        for row, end in zip(cache.rows, ends):
            cache.lengths[row] = choose.randint(end, cache.lengths[row])
            del rows.entries[row][cache.lengths[row] :]
        rows.check()
    assert rows.window.capacity <= size + 3 * 30 + 2 * 8


def test_rolling_back_and_writing_behind_copies_nothing() -> None:
    rows = Rows(2, WINDOW, 0)
    rows.feed(50, [50, 50])
    rows.cache.lengths = [50, 47]
    layer = rows.cache.layers[0]
    places = layer.keys.data_ptr(), layer.values.data_ptr(), list(rows.window.base)
    for _ in range(10):
        rows.feed(4, rows.cache.active_lengths)
        rows.cache.lengths = [length + 1 for length in rows.cache.lengths]
    assert places == (layer.keys.data_ptr(), layer.values.data_ptr(), list(rows.window.base))


@pytest.mark.usefixtures("few_to_spare")
def test_rolling_back_too_far_is_noticed() -> None:
    rows = Rows(2, WINDOW, 0)
    rows.feed(50, [50, 50])
    rows.cache.lengths = [45, 50]
    with pytest.raises(AssertionError, match="rolled back further"):
        rows.feed(1, [45, 50])


def test_layers_are_bounded_where_transformers_bounds_them() -> None:
    def bounded(made: PreTrainedConfig) -> list[int | None]:
        layers = window_layers(DynamicCache(config=made).layers, made, 1, 1000)
        return [layer.window.size if isinstance(layer, WindowLayer) else None for layer in layers]

    assert bounded(FAMILIES["mistral"]()) == [WINDOW, WINDOW]
    assert bounded(FAMILIES["qwen2"]()) == [None, WINDOW]
    assert bounded(FAMILIES["llama4"]()) == [WINDOW, None]
    assert bounded(FAMILIES["gemma3n"]()) == [WINDOW, None, None, None]  # the last two share
    assert bounded(config(MistralConfig, sliding_window=None)) == []
    assert window_layers(DynamicCache().layers, FAMILIES["mistral"](), 1, 1000) == []  # a user's, with all entries


# Errors


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_whose_masks_know_of_no_window_is_refused_past_the_window_of_its_config(batch: int) -> None:
    target = make_model(config(LlamaConfig))
    models = target, perturbed(target, 0.06)
    with pytest.raises(ValueError, match="keeps a window of 12 tokens for LlamaForCausalLM"):
        generate(models, 3, **prompts(batch))
    kwargs = {**prompts(batch, width=5), "max_new_tokens": 7}
    assert torch.equal(generate(models, 3, **kwargs), generate(models, None, **kwargs))
