"""Attention implementations: with 4-D masks, without masks, and those that users register."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, VOCAB, make_model, make_pair, make_prompts, perturbed
from flash import flash_attention
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_specdec
from hf_specdec.models import abilities
from hf_specdec.models.abilities import Abilities

NOISE = {"gemma2": 0.35, "bloom": 0.5}
NEW_TOKENS = 20
BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}


@functools.cache
def pair(name: str, implementation: str | None = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair(name, NOISE.get(name, 0.08), attn_implementation=implementation)


def generate(target: Any, draft: Any = None, batch: int = 4, **kwargs: Any) -> Any:
    """Greedy, from uneven prompts, some longer than the windows of these models."""
    if draft is not None:
        kwargs = {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": 4} | kwargs
    prompts = make_prompts(batch, width=18, seed=batch)
    return target.generate(**{**prompts, "max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs)


def check_identical(target: Any, draft: Any, gammas: tuple[int, ...] = (1, 4), **kwargs: Any) -> None:
    """Vanilla's tokens under the same settings for one and for four rows, with partly accepted drafts."""
    stats = hf_specdec.SpeculationStats()
    for batch in (1, 4):
        expected = generate(target, None, batch, **kwargs)
        for gamma in gammas:
            ours = generate(target, draft, batch, num_assistant_tokens=gamma, speculation_stats=stats, **kwargs)
            assert ours.tolist() == expected.tolist(), f"batch {batch}, γ = {gamma}"
    assert 0.02 < stats.acceptance_rate < 0.98


def attend_to(model: PreTrainedModel, implementation: str) -> None:
    model.config._attn_implementation = implementation


# Masks of four dimensions


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2", "gpt2", "bloom"])
def test_eager(name):
    """`bloom` has no other implementation."""
    check_identical(*pair(name, "eager"))


@pytest.mark.parametrize("implementations", [("eager", "sdpa"), ("sdpa", "eager")])
def test_target_and_draft_may_differ(implementations):
    target, draft = (pair("llama", implementation)[i] for i, implementation in enumerate(implementations))
    check_identical(target, draft)


def test_another_implementation_is_another_question():
    """The probe's answer about masks is stored per implementation; after a switch the model is probed again."""
    target, draft = make_pair("llama", 0.08)
    assert Abilities.of(target).ragged
    with flash_attention(target):
        assert not Abilities.of(target).ragged
        check_identical(target, draft)
    target.set_attn_implementation("eager")
    assert Abilities.of(target).ragged
    check_identical(target, draft)


def test_each_implementation_is_probed_by_itself(monkeypatch):
    target, _ = make_pair("llama", 0.08)
    probed: list[str] = []
    monkeypatch.setattr(abilities, "rehearse", lambda model, **_: probed.append(model.config._attn_implementation))
    for implementation in ("sdpa", "eager", "sdpa", "eager"):
        target.set_attn_implementation(implementation)
        assert Abilities.of(target).ragged
    assert probed == ["sdpa", "eager"]


# Lengths instead of masks: FlashAttention, through transformers' own integration, with substitute functions


@pytest.mark.parametrize("who", ["target", "draft", "both"])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_flash_attention(name, who):
    target, draft = pair(name)
    plain = [generate(target, None, batch) for batch in (1, 4)]
    with flash_attention(*{"target": (target,), "draft": (draft,), "both": (target, draft)}[who]) as shapes:
        assert [generate(target, None, batch).tolist() for batch in (1, 4)] == [ids.tolist() for ids in plain]
        shapes.clear()
        check_identical(target, draft)
    assert shapes


def test_flash_attention_where_rows_end_early():
    """The last rows continue alone, and the returned cache is continued in one forward."""
    target, draft = pair("llama")
    ends = generate(target)[:, 18 + 3].tolist()
    with flash_attention(target, draft):
        check_identical(target, draft, eos_token_id=ends)
        ours, theirs = (
            generate(target, model, eos_token_id=ends, return_dict_in_generate=True) for model in (draft, None)
        )
    for mine, layer in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        real = make_prompts(4, width=18, seed=4)["attention_mask"].bool()[:, None, :, None]
        assert torch.allclose(mine.keys[:, :, :18] * real, layer.keys[:, :, :18] * real, atol=1e-4)
        assert mine.keys.shape == layer.keys.shape


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_flash_attention_in_chunks_and_past_holes(name):
    target, draft = pair(name)
    with flash_attention(target, draft):
        check_identical(target, draft, prefill_chunk_size=5)
        inputs = make_prompts(4, width=18, seed=3)
        inputs["attention_mask"][0, 4:6] = 0
        options = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        expected = target.generate(**options)
        assert target.generate(**options, assistant_model=draft, strategy="spec").equal(expected)


def test_kernels_that_align_queries_with_the_first_keys_are_refused():
    """Like flash-attn before 2.1: right for prompts and single tokens, hence for vanilla, but for nothing else."""
    target, draft = make_pair("llama", 0.08)
    with flash_attention(target, aligned_to="start"):
        assert generate(target).shape == (4, 18 + NEW_TOKENS)
        for batch in (1, 4):
            with pytest.raises(
                ValueError,
                match=r"'flash_attention_2', LlamaForCausalLM returns different .*use `attn_implementation='sdpa'`",
            ):
                generate(target, draft, batch)
    check_identical(target, draft)  # only that implementation raises the error


def test_flash_attention_in_a_decoder_with_an_encoder():
    sizes: dict[str, Any] = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART_SIDE.items()}
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, init_std=0.3, eos_token_id=None, forced_eos_token_id=None, **sizes
    )
    torch.manual_seed(0)
    target = BartForConditionalGeneration(config).eval()
    draft = perturbed(target, 0.05)
    with flash_attention(target, draft):
        check_identical(target, draft)
    with (
        flash_attention(draft, aligned_to="start"),
        pytest.raises(ValueError, match="BartForConditionalGeneration returns different"),
    ):
        generate(draft, target)


def test_a_static_cache_asked_for_with_flash_attention():
    target, draft = pair("llama")
    with flash_attention(target, draft):
        check_identical(target, draft, cache_implementation="static")


# Masks of another kind


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_flex_attention(name):
    """Not compiled: that takes half a minute here, and inductor cannot compile all of these shapes on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        check_identical(*pair(name, "flex_attention"), gammas=(4,), max_new_tokens=10)


# Implementations that users register


def causal(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, aligned_to: str, **kwargs: Any) -> Any:
    """Without its own mask function, it gets no masks at all, and attends to padding as in vanilla."""
    assert mask is None
    rows = torch.arange(query.shape[2])[:, None] + (key.shape[2] - query.shape[2] if aligned_to == "end" else 0)
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    seen = torch.arange(key.shape[2]) <= (rows if query.shape[2] > 1 else key.shape[2])
    scores = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    names: list[str] = []

    def add(name: str, function: Callable[..., Any], mask_function: Callable[..., Any] | None = None) -> None:
        names.append(name)
        AttentionInterface.register(name, function)
        if mask_function is not None:
            AttentionMaskInterface.register(name, mask_function)

    yield add
    for name in names:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def test_a_function_that_gets_no_masks(register):
    register("mine", functools.partial(causal, aligned_to="end"))
    target, draft = pair("llama", "mine")
    check_identical(target, draft)
    check_identical(target, pair("llama")[1])


def test_a_function_of_the_naive_kind_is_refused(register):
    """`is_causal=True` of PyTorch's SDPA aligns with the first keys: right for an empty cache, else wrong."""
    register("naive", functools.partial(causal, aligned_to="start"))
    target, draft = pair("llama", "naive")
    with pytest.raises(
        ValueError, match=r"'naive', LlamaForCausalLM returns different logits for a block on a filled cache"
    ):
        generate(target, draft)
    check_identical(pair("llama")[0], pair("llama")[1])


def test_a_function_around_sdpa_with_its_masks(register):
    seen: list[Any] = []

    def logged(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    register("logged", logged, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    check_identical(*pair("mistral-sliding", "logged"))
    assert seen


def test_paged_attention_says_what_to_use_instead():
    target, draft = make_pair("llama", 0.08)
    attend_to(target, "paged|eager")
    for arguments in ({}, {"assistant_model": draft, "strategy": "spec"}):
        with pytest.raises(ValueError, match="without a paged attention cache"):
            target.generate(**make_prompts(1), max_new_tokens=3, **arguments)


# Several configs in one


def test_a_text_model_inside_a_config_of_several():
    """Only the text part's implementation counts."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=95)
    for implementations in ({"text_config": "eager", "vision_config": "sdpa"}, {"text_config": "sdpa"}):
        torch.manual_seed(0)
        target = LlavaForConditionalGeneration._from_config(config, attn_implementation=implementations).eval()
        assert target.config.get_text_config()._attn_implementation == implementations["text_config"]
        check_identical(target, perturbed(target, 0.08))


def test_models_that_know_no_sdpa_fall_back_as_in_vanilla():
    assert ARCHITECTURES["bloom"]().model_type == "bloom"
    target, draft = pair("bloom")
    assert target.config._attn_implementation == "eager"
    check_identical(target, draft)


def test_flash_attention_beside_recurrent_layers():
    """Their rows go at their own pace if attention takes masks, otherwise in lockstep."""
    from transformers import Qwen3NextConfig

    sizes = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = Qwen3NextConfig(
        **{**SIZES, **sizes, "head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1]},
        layer_types=["linear_attention", "full_attention"],
    )
    target = make_model(config)
    draft = perturbed(target, 0.05)
    check_identical(target, draft)
    with flash_attention(target, draft):
        check_identical(target, draft)
        assert not Abilities.of(target).ragged
    assert Abilities.of(target).ragged
