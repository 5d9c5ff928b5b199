"""Folded decode attention: equals SDPA over repeated heads, runs only in our own calls, and is removed afterwards."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pretend_cuda
import pytest
import torch
from conftest import ARCHITECTURES, make_pair, make_prompts
from torch import Tensor
from transformers import (
    AttentionInterface,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_specdec import Draft, Drafter, SpeculationStats
from hf_specdec.kernels import attention
from hf_specdec.kernels.attention import folded, folded_attention
from hf_specdec.models import abilities
from hf_specdec.models.masks import ragged_mask

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


def registered() -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Each test starts and ends with transformers' own function registered."""
    before = registered()
    yield
    left = registered()
    AttentionInterface.register("sdpa", before)
    assert left is before
    assert attention._exchanged._calls == attention._thread.calls == 0
    attention._thread.masks.clear()  # of bare calls of `folded`


# ---------------------------------------------------------------------------------------------------------- the numbers


def states(
    rows: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as models pass them: views of `[rows, q, heads, d]`, and of a cache with free slots."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, queries, heads, width, generator=generator).transpose(1, 2)
    key, value = (torch.randn(rows + 1, kv_heads, keys + 5, d, generator=generator) for d in (width, value_width))
    return query, key[:rows, :, :keys], value[:rows, :, :keys]


def ragged(rows: int, queries: int, keys: int, seed: int = 0) -> Tensor:
    """`[rows, 1, q, k]` bool: every query sees some keys, but not all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 1, queries, keys, generator=generator) < 0.6
    mask[..., 0] = True
    return mask


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None) -> Tensor:
    """The reference for `folded`."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2)


SHAPES = [  # rows, heads, kv_heads, q, k, d, width of values
    (1, 4, 2, 1, 9, 8, 8),
    (1, 8, 1, 5, 40, 8, 8),
    (3, 6, 2, 1, 17, 16, 16),
    (3, 6, 2, 4, 17, 16, 16),
    (2, 12, 4, 8, 33, 8, 12),
    (4, 8, 2, 3, 3, 4, 20),
    (2, 4, 4, 3, 10, 8, 8),
]


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folded_attention_is_attention_over_repeated_heads(shape: tuple[int, ...]) -> None:
    rows, _, _, queries, keys = shape[:5]
    tensors = states(*shape)
    mask = ragged(rows, queries, keys)
    masks = [None, mask, additive(mask), mask[:1], additive(mask[:1]), torch.ones_like(mask)]
    masks.append(-torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)))  # a bias, not only 0 and -inf
    for m, scaling in itertools.product(masks, (None, 0.31)):
        out, expected = folded(*tensors, m, scaling), repeated(*tensors, m, scaling)
        assert out.shape == expected.shape
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision_is_as_close_as_its_bits_allow(shape: tuple[int, ...]) -> None:
    exact = states(*shape)
    mask = ragged(shape[0], shape[3], shape[4])
    query, key, value = (x.bfloat16() for x in exact)
    for m in (None, mask, additive(mask, torch.bfloat16)):
        out = folded(query, key, value, m)
        assert out.dtype == torch.bfloat16
        expected = repeated(*exact, m if m is None or m.dtype == torch.bool else m.float())
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_a_query_that_sees_nothing_gets_numbers() -> None:
    """Padding sees nothing; NaN there would spread through the next layer's K and V."""
    tensors = states(2, 4, 2, 3, 7, 8, 8)
    mask = ragged(2, 3, 7)
    mask[1, :, 2] = False
    out = folded(*tensors, mask)
    assert out.isfinite().all()
    seeing = mask.any(-1)[:, 0]
    torch.testing.assert_close(out[seeing], repeated(*tensors, mask)[seeing], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 4])
def test_neither_keys_nor_values_are_copied(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tensors = states(2, 8, 2, queries, 11, 8, 8)
    folded(*tensors, ragged(2, queries, 11))
    (used,) = seen
    for given, mine in zip(tensors[1:], used[1:], strict=True):
        assert (mine.data_ptr(), mine.shape, mine.stride()) == (given.data_ptr(), given.shape, given.stride())


# ----------------------------------------------------------------------------------------------- which calls are folded


@pytest.fixture
def left(as_it_was: None) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of the calls that fall back to the previously registered function."""
    calls: list[dict[str, Any]] = []
    original = registered()

    def spy(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        plain = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
        return original(module, query, *args, **plain)

    AttentionInterface.register("sdpa", spy)
    yield calls
    assert registered() is spy
    AttentionInterface.register("sdpa", original)


class Attention(torch.nn.Module):
    """The attributes of a model's attention layer that the attention function reads."""

    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def attend(
    heads: int = 4, kv_heads: int = 2, queries: int = 3, mask: Tensor | str | None = "ragged", **kwargs: Any
) -> Tensor:
    """One call as a model makes it, checked against repeated heads."""
    tensors = states(2, heads, kv_heads, queries, 80, 8, 8)
    if isinstance(mask, str):
        mask = ragged(2, queries, 80)
    out, weights = registered()(Attention(heads // kv_heads), *tensors, mask, **{"dropout": 0.0, **kwargs})
    assert weights is None
    if not kwargs:
        plain = repeated(*tensors, mask) if mask is not None or queries == 1 else out
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    return out


FOLDED: dict[str, dict[str, Any]] = {
    "several queries under a mask": {},
    "one query under a mask": {"queries": 1},
    "a mask for all rows": {"mask": ragged(1, 3, 80)},
    "an additive mask": {"mask": additive(ragged(2, 3, 80))},
    "as many queries as allowed": {"queries": 128, "mask": ragged(2, 128, 80)},
    "one K/V head": {"kv_heads": 1},
    "arguments that are None": {"position_bias": None, "softcap": None, "scaling": 0.5},
    "arguments that do not matter": {"sliding_window": 12, "is_causal": True, "scaling": 0.5},
}
UNFOLDED: dict[str, dict[str, Any]] = {
    "a prefill without a mask": {"mask": None},
    "one query in float32 without a mask": {"queries": 1, "mask": None},
    "no groups": {"kv_heads": 4},
    "too many queries": {"queries": 129, "mask": ragged(2, 129, 80)},
    "dropout": {"dropout": 0.1},
    "a mask by head": {"mask": ragged(2, 3, 80).expand(2, 4, 3, 80)},
    "a position bias": {"position_bias": torch.zeros(1, 4, 3, 80)},
    "softcapping": {"softcap": 30.0},
    "sinks": {"s_aux": torch.zeros(4)},
}


@pytest.mark.parametrize("call", FOLDED.values(), ids=FOLDED)
def test_these_calls_are_folded(call: dict[str, Any], left: list[dict[str, Any]]) -> None:
    with folded_attention():
        attend(**call)
    assert not left


@pytest.mark.parametrize("call", UNFOLDED.values(), ids=UNFOLDED)
def test_these_calls_are_left_to_transformers_as_they_came(call: dict[str, Any], left: list[dict[str, Any]]) -> None:
    with folded_attention():
        attend(**call)
    (kwargs,) = left
    for name, value in call.items():
        if name not in ("heads", "kv_heads", "queries", "mask"):
            assert kwargs[name] is value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_single_query_in_half_precision_is_folded_without_a_mask(
    dtype: torch.dtype, left: list[dict[str, Any]]
) -> None:
    query, key, value = (tensor.to(dtype) for tensor in states(2, 4, 2, 1, 80, 8, 8))
    with folded_attention():
        out, _ = registered()(Attention(2), query, key, value, None, dropout=0.0)
    assert not left
    torch.testing.assert_close(out, repeated(query, key, value, None), rtol=2e-2, atol=1e-2)


def test_calls_outside_of_ours_are_left_alone(left: list[dict[str, Any]]) -> None:
    attend()
    with folded_attention():
        pass
    attend()
    assert len(left) == 2


def test_other_threads_are_left_alone_while_ours_decodes(left: list[dict[str, Any]]) -> None:
    with folded_attention():
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
        assert len(left) == 1
        attend()
    assert len(left) == 1


# ------------------------------------------------------------------------------------------------- one mask per forward


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The masks of all SDPA calls. (Kept alive here, so that no two have the same address.)"""
    seen: list[Tensor | None] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("attn_mask"))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def test_layers_share_a_folded_mask(masks: list[Tensor | None]) -> None:
    full, sliding = ragged(2, 3, 80), ragged(2, 3, 80, seed=1)
    with folded_attention():
        tensors = states(2, 4, 2, 3, 80, 8, 8)
        for _ in range(3):
            for mask in (full, sliding):
                registered()(Attention(2), *tensors, mask)
    assert len(masks) == 6
    assert len({id(mask) for mask in masks}) == 2


def test_each_folding_has_its_own(masks: list[Tensor | None]) -> None:
    """A draft may receive the target's mask, with other groups or another precision."""
    mask = ragged(2, 3, 80)
    with folded_attention():
        for kv_heads, dtype in itertools.product((1, 2), (torch.float32, torch.bfloat16)):
            query, key, value = (x.to(dtype) for x in states(2, 4, kv_heads, 3, 80, 8, 8))
            out, _ = registered()(Attention(4 // kv_heads), query, key, value, mask)
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(out, repeated(query, key, value, mask), rtol=tolerance, atol=tolerance)
    assert len({id(m) for m in masks if m is not None and m.dim() == 4 and m.shape[1] == 1 and m.shape[2] > 3}) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_was_changed_in_place_is_folded_again(mode: Any) -> None:
    tensors = states(2, 4, 2, 3, 80, 8, 8)
    with folded_attention(), mode():
        for make in (lambda m: m, additive):
            mask = make(ragged(2, 3, 80))
            for key in range(1, 5):
                out, _ = registered()(Attention(2), *tensors, mask)
                torch.testing.assert_close(out, repeated(*tensors, mask), rtol=1e-5, atol=1e-6)
                mask[..., key] = mask[..., key].roll(1, dims=2)
                mask[..., 70:] = mask[..., :10]


def test_a_mask_at_the_address_of_an_earlier_one_is_another() -> None:
    tensors = states(2, 4, 2, 3, 80, 8, 8)
    with folded_attention():
        for seed in range(50):  # freed and allocated again, most likely at the same place
            mask = ragged(2, 3, 80, seed)
            out, _ = registered()(Attention(2), *tensors, mask)
            torch.testing.assert_close(out, repeated(*tensors, mask), rtol=1e-5, atol=1e-6)
            del mask
        assert len(attention._thread.masks) <= 4


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("keys", [13, 16, 17])
def test_on_a_device_the_rows_of_masks_are_multiples_of_8(keys: int, cuda: pretend_cuda.Device) -> None:
    """PyTorch would copy other masks in each layer."""
    mask = ragged(2, 3, keys)
    expected, given = (attention._fold_mask(m, 2, torch.float32) for m in (mask, mask.to("cuda")))
    assert given.cpu().equal(expected) and given.shape == (2, 1, 6, keys)
    assert given.stride()[-2] % 8 == 0 and given.stride()[-1] == 1
    target = make_pair("llama")[0]
    slots = torch.arange(4, 7) + torch.tensor([[0], [2]])
    expected, given = (ragged_mask(target, places, keys) for places in (slots, slots.to("cuda")))
    assert isinstance(given, Tensor) and given.cpu().equal(expected)
    assert given.shape == (2, 1, 3, keys) and given.stride()[-2] % 8 == 0


@pytest.fixture
def foldings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries in each folded call."""
    calls: list[int] = []

    def count(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return folded(query, *args)

    monkeypatch.setattr(attention, "folded", count)
    return calls


# Grouped queries, so there is something to fold.
GROUPED = ("llama", "mistral", "mistral-sliding", "qwen2", "qwen3", "gemma", "gemma2", "phi", "stablelm", "mixtral")


def spec(target: PreTrainedModel, draft: Any, batch: int, **options: Any) -> Tensor:
    return target.generate(
        **make_prompts(batch, seed=batch), assistant_model=draft, strategy="spec", **{**GREEDY, **options}
    )


def vanilla(target: PreTrainedModel, batch: int) -> Tensor:
    return target.generate(**make_prompts(batch, seed=batch), **GREEDY)


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folded_decoding_says_what_vanilla_says(
    name: str, batch: int, foldings: list[int], request: pytest.FixtureRequest
) -> None:
    target, draft = make_pair(name)
    before = target.config._attn_implementation
    expected = vanilla(target, batch)
    assert not foldings
    for gamma in (1, 4):
        assert torch.equal(spec(target, draft, batch, num_assistant_tokens=gamma), expected), f"γ = {gamma}"
        capped = getattr(target.config, "attn_logit_softcapping", None) is not None  # left to the original
        elsewhere = request.config.getoption("--under") in ("optimal", "compiled")  # drafts others, folds itself
        if before == "sdpa" and name in GROUPED and not capped and not elsewhere:
            # Each layer of target and draft. The end cuts off the last drafts.
            assert foldings.count(gamma + 1) >= 2 * target.config.num_hidden_layers, f"γ = {gamma}"
    assert target.config._attn_implementation == before


def test_all_models_with_grouped_queries_were_among_these() -> None:
    configs = {name: ARCHITECTURES[name]() for name in ARCHITECTURES}
    heads = {n: (c.num_attention_heads, getattr(c, "num_key_value_heads", None)) for n, c in configs.items()}
    assert {n for n, (q, kv) in heads.items() if kv is not None and kv < q} == set(GROUPED)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_eager_models_are_not_touched(name: str, foldings: list[int]) -> None:
    target, draft = make_pair(name, attn_implementation="eager")
    for batch in (1, 4):
        assert torch.equal(spec(target, draft, batch), vanilla(target, batch))
    assert not foldings


@pytest.mark.parametrize("batch", [1, 4])
def test_inference_mode(batch: int, foldings: list[int], llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Its tensors keep no count of changes."""
    target, draft = llama_pair
    expected = vanilla(target, batch)
    with torch.inference_mode():
        assert torch.equal(spec(target, draft, batch), expected)
    assert foldings


def test_one_mask_per_forward(masks: list[Tensor | None], llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, _ = llama_pair
    spec(target, None, 4, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    decoding = [mask for mask in masks if mask is not None and mask.shape[1] == 1 and mask.is_floating_point()]
    layers = target.config.num_hidden_layers
    assert len(decoding) > 5 * layers
    assert len({id(mask) for mask in decoding}) * layers == len(decoding)


# ------------------------------------------------------------------------------------------------- nothing stays behind


class Inside(LogitsProcessor):
    """Runs an action once in the middle of a call."""

    def __init__(self, action: Any):
        self.action, self.steps = action, 0

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 4:
            self.action()
        return scores


class Asks(StoppingCriteria):
    """Runs another model at each step."""

    def __init__(self, ask: Any):
        self.ask = ask

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ask()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Generates(Drafter):
    """Drafts the tokens that its model generates, with or without speculation."""

    in_vocabulary = True

    def __init__(self, model: PreTrainedModel, **options: Any):
        self.model, self.options = model, options

    def propose(self, context: Any, max_tokens: int) -> Draft:
        (row,) = context.rows
        ids = context.tokens[row : row + 1, : context.ends[row]]
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, **self.options
        )
        return Draft(out[:, ids.shape[1] :])


def test_an_exception_inside_leaves_nothing_behind(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = llama_pair
    before = registered()

    def fail() -> None:
        assert registered() is not before
        raise ArithmeticError("in the middle")

    for batch in (1, 4):
        with pytest.raises(ArithmeticError, match="middle"):
            spec(target, draft, batch, logits_processor=LogitsProcessorList([Inside(fail)]))
        assert registered() is before
        assert attention._thread.calls == 0
        assert not attention._thread.masks
        assert torch.equal(spec(target, draft, batch), vanilla(target, batch))


@pytest.mark.parametrize("inner", ["vanilla", "spec"])
def test_calls_within_calls(
    inner: str, foldings: list[int], llama_pair: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    target, draft = llama_pair
    before = registered()
    options = {"strategy": "spec", "prompt_lookup_num_tokens": 2} if inner == "spec" else {}
    depth: list[int] = []

    def ask() -> None:
        depth.append(attention._thread.calls)
        prompt = make_prompts(2, seed=7)
        answer = draft.generate(**prompt, do_sample=False, max_new_tokens=3, **options)
        assert torch.equal(answer, draft.generate(**prompt, do_sample=False, max_new_tokens=3))
        assert attention._thread.calls == depth[-1] == 1
        assert registered() is not before

    expected = vanilla(target, 1)
    out = spec(target, Generates(draft, **options), 1, stopping_criteria=StoppingCriteriaList([Asks(ask)]))
    assert torch.equal(out, expected)
    assert len(depth) >= 10
    assert foldings
    assert registered() is before


def test_calls_in_several_threads_on_one_model(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = llama_pair
    before = registered()
    batches = (1, 4, 2)
    expected = {batch: vanilla(target, batch) for batch in batches}
    wrong: list[Any] = []
    begin = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            begin.wait(timeout=60)
            for i, batch in enumerate(batches):
                out = spec(target, draft, batch, num_assistant_tokens=1 + (number + i) % 4)
                if not torch.equal(out, expected[batch]):
                    wrong.append((number, batch))
                if attention._thread.calls or attention._thread.masks:
                    wrong.append((number, "left something behind"))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert registered() is before


def test_a_function_registered_in_the_meantime_stays(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = llama_pair
    original = registered()
    calls: list[int] = []

    def theirs(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return original(module, query, *args, **kwargs)

    expected = vanilla(target, 1)
    register = Inside(lambda: AttentionInterface.register("sdpa", theirs))
    try:
        assert torch.equal(spec(target, draft, 1, logits_processor=LogitsProcessorList([register])), expected)
        assert registered() is theirs
        assert calls  # it took over during the call
        calls.clear()
        assert torch.equal(spec(target, draft, 1), expected)  # on top of theirs, which gets unfolded calls
        assert calls
        assert registered() is theirs
    finally:
        AttentionInterface.register("sdpa", original)


def test_who_wrapped_ours_in_the_meantime_is_not_called_in_circles(
    llama_pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """Profilers wrap the registered function, which may be ours."""
    target, draft = llama_pair
    original = registered()

    def wrap() -> None:
        found = registered()

        def theirs(*args: Any, **kwargs: Any) -> Any:
            return found(*args, **kwargs)

        AttentionInterface.register("sdpa", theirs)

    expected = vanilla(target, 4)
    try:
        assert torch.equal(spec(target, draft, 4, logits_processor=LogitsProcessorList([Inside(wrap)])), expected)
        assert torch.equal(vanilla(target, 4), expected)
        assert torch.equal(spec(target, draft, 4), expected)
    finally:
        AttentionInterface.register("sdpa", original)


# ------------------------------------------------------------------------------------------------------- without a mask


@pytest.fixture
def flashes(cuda: pretend_cuda.Device, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """On a pretended device whose FlashAttention takes float32. Yields rows, queries and keys of its calls."""
    seen: list[tuple[int, ...]] = []
    flashed = attention.flashed

    def spy(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
        seen.append((query.shape[0], query.shape[2], key.shape[2]))
        return flashed(query, key, value, scaling)

    monkeypatch.setattr(abilities, "_HALF", (torch.float32,))
    monkeypatch.setattr(attention, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: True)
    monkeypatch.setattr(attention, "flashed", spy)
    return seen


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.filterwarnings("ignore:.*kernel not used")
def test_flashed_attention_is_causal_up_to_the_last_key(queries: int) -> None:
    query, key, value = states(2, 4, 2, queries, 9, 8, 8)
    mask = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)[None, None].expand(2, 1, -1, -1)
    torch.testing.assert_close(attention.flashed(query, key, value), folded(query, key, value, mask))


@pytest.mark.filterwarnings("ignore:.*kernel not used")
@pytest.mark.parametrize(
    ("name", "rows", "used"), [("llama", 1, True), ("llama", 3, True), ("mistral-sliding", 1, False)]
)
def test_uniform_rows_on_cuda_need_no_mask(
    name: str, rows: int, used: bool, flashes: list[tuple[int, ...]], cuda: pretend_cuda.Device
) -> None:
    target, draft = make_pair(name)
    prompts = make_prompts(1)
    prompts = {key: value.repeat(rows, 1) for key, value in prompts.items()}
    expected = target.generate(**prompts, **GREEDY)
    pretend_cuda.move(target), pretend_cuda.move(draft)
    given = target.generate(
        **{key: value.to("cuda") for key, value in prompts.items()}, **GREEDY,
        assistant_model=draft, strategy="spec", num_assistant_tokens=4,
    )  # fmt: skip
    assert given.cpu().equal(expected)
    assert bool(flashes) == used
    assert all(queries > 1 and number == rows for number, queries, _ in flashes)


@pytest.mark.filterwarnings("ignore:.*kernel not used")
def test_uneven_rows_keep_their_masks(flashes: list[tuple[int, ...]], cuda: pretend_cuda.Device) -> None:
    target, draft = make_pair("llama")
    prompts = make_prompts(3)
    expected = target.generate(**prompts, **GREEDY)
    pretend_cuda.move(target), pretend_cuda.move(draft)
    stats = SpeculationStats()
    given = target.generate(
        **{key: value.to("cuda") for key, value in prompts.items()}, **GREEDY,
        assistant_model=draft, strategy="spec", num_assistant_tokens=4, speculation_stats=stats,
    )  # fmt: skip
    assert given.cpu().equal(expected)
    verified = stats.target_forwards * target.config.num_hidden_layers
    assert len(flashes) < verified / 2  # their lengths may be equal by chance
