"""Models with recurrent state, alone or combined with attention: their states roll back to the committed tokens."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCAB, make_model, make_pair, make_prompts, perturbed
from transformers import PreTrainedConfig, PreTrainedModel

import hf_specdec
from hf_specdec.cache.states import States
from hf_specdec.loop import invariants
from hf_specdec.models.abilities import Abilities

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
_GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
_SSD: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}


def _config(name: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, name)(**{**_COMMON, **changes})


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": _config("MambaConfig", state_size=8),
    "mamba2": _config("Mamba2Config", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "falcon_mamba": _config("FalconMambaConfig", state_size=8),
    "jamba": _config(
        "JambaConfig",
        **_ATTENTION,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "bamba": _config("BambaConfig", **_ATTENTION, **_SSD, attn_layer_indices=[1], mamba_chunk_size=8),
    "zamba2": _config(
        "Zamba2Config",
        **{**_ATTENTION, "num_key_value_heads": 4},
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=4,
        mamba_d_state=8,
        mamba_ngroups=1,
        chunk_size=8,
        use_mem_rope=True,
        num_mem_blocks=1,
    ),
    "falcon_h1": _config("FalconH1Config", **_ATTENTION, **_SSD, mamba_d_ssm=64, mamba_chunk_size=8),
    "nemotron_h": _config(
        "NemotronHConfig",
        **_ATTENTION,
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mamba", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=8,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "granitemoehybrid": _config(
        "GraniteMoeHybridConfig",
        **_ATTENTION,
        **_SSD,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        mamba_chunk_size=8,
    ),
    "qwen3_next": _config(
        "Qwen3NextConfig", **_ATTENTION, **_GATED_DELTA, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "qwen3_5": _config("Qwen3_5TextConfig", **_ATTENTION, **_GATED_DELTA),
    "qwen3_5_moe": _config(
        "Qwen3_5MoeTextConfig", **_ATTENTION, **_GATED_DELTA, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "lfm2": _config("Lfm2Config", **_ATTENTION, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "olmo_hybrid": _config(
        "OlmoHybridConfig", **_ATTENTION, **{k: v for k, v in _GATED_DELTA.items() if k != "head_dim"},
    ),
    "kimi_linear": _config(
        "KimiLinearConfig", **{**_ATTENTION, "num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=16,
        layer_types=["linear_attention", "full_attention"], qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, linear_num_heads=4, linear_head_dim=8,
    ),
}  # fmt: skip
# Noise on a draft's weights: the resulting acceptance is asserted below.
NOISE = {"mamba2": 0.12, "zamba2": 0.02, "olmo_hybrid": 0.07}
# Their code starts every segment of several tokens from an empty state (transformers 5.23).
ONE_BY_ONE = ("mamba", "falcon_mamba", "jamba")
CONTINUING = [name for name in ARCHITECTURES if name not in ONE_BY_ONE]


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make_model(ARCHITECTURES[name]())
    return target, perturbed(target, NOISE.get(name, 0.08), 1)


def both(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: dict[str, torch.Tensor], gamma: int = 4, **kwargs: Any
) -> tuple[Any, Any, hf_specdec.SpeculationStats]:
    """Vanilla's output, speculation's output, and its statistics."""
    kwargs = {"max_new_tokens": 24, "do_sample": False, **kwargs}
    stats = hf_specdec.SpeculationStats()
    spec: dict[str, Any] = {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": gamma}
    out = target.generate(**prompts, **kwargs, **spec, speculation_stats=stats)
    return target.generate(**prompts, **kwargs), out, stats


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", CONTINUING)
def test_recurrent_models_say_what_they_said(name: str, batch: int) -> None:
    """200 tokens with drafts that are mostly rejected, then with other draft lengths."""
    expected, out, stats = both(*pair(name), make_prompts(batch, seed=batch), 3, max_new_tokens=200)
    assert torch.equal(out, expected)
    assert 0.1 < stats.acceptance_rate < 0.7, stats.acceptance_rate
    for gamma in (1, 7):
        expected, out, _ = both(*pair(name), make_prompts(batch, seed=10 + batch), gamma)
        assert torch.equal(out, expected), f"γ = {gamma}"


@pytest.mark.parametrize("name", CONTINUING)
def test_rows_go_each_at_its_own_pace(name: str) -> None:
    """Otherwise an error with single rows would be hidden: models that fail this probe decode in lockstep."""
    assert Abilities.of(pair(name)[0]).ragged


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_states_that_do_not_go_on_over_several_tokens_are_refused_by_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not continue a recurrent\s+state over several tokens"):
        both(*pair(name), make_prompts(1))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["falcon_mamba", "jamba", "mamba2", "qwen3_next"])
def test_any_recurrent_model_can_draft(name: str, batch: int) -> None:
    """Drafts are made one token at a time, which all of them can do; rows roll back independently."""
    for target in (make_pair("llama")[0], pair("bamba")[0]):
        draft = pair(name)[1]
        with torch.no_grad():  # something to accept: the target's own tokens, often enough
            draft.get_output_embeddings().weight.copy_(target.get_output_embeddings().weight)
            draft.get_input_embeddings().weight.copy_(target.get_input_embeddings().weight)
        for gamma in (1, 3, 6):
            expected, out, stats = both(target, draft, make_prompts(batch, seed=batch), gamma)
            assert torch.equal(out, expected), f"γ = {gamma}"
            assert stats.draft_forwards > 0


def test_a_recurrent_draft_is_worth_what_it_would_be_without_a_cache() -> None:
    """Greedy drafts do not depend on how the draft's state was computed: a copy of the target is always right."""
    for name in ("mamba2", "qwen3_next", "lfm2"):
        target = pair(name)[0]
        for batch in (1, 4):
            expected, out, stats = both(target, target, make_prompts(batch, seed=2), 3)
            assert torch.equal(out, expected)
            assert stats.acceptance_rate > 0.98


@pytest.mark.parametrize("name", ["bamba", "qwen3_5", "lfm2"])
def test_rows_that_end_early_leave_the_others_as_they_were(name: str) -> None:
    target, draft = pair(name)
    prompts = make_prompts(5, seed=5)
    free = target.generate(**prompts, max_new_tokens=40, do_sample=False)
    for row in range(5):
        expected, out, _ = both(target, draft, prompts, 3, max_new_tokens=40, eos_token_id=int(free[row, 14 + 5]))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "qwen3_next"])
def test_schedules_that_change_the_draft_length(name: str) -> None:
    """γ goes up and down, drafts stop when the draft is unsure, look-up finds nothing: rows stay in lockstep."""
    target, draft = pair(name)
    for batch in (1, 4):
        prompts = make_prompts(batch, seed=20 + batch)
        expected = target.generate(**prompts, max_new_tokens=30, do_sample=False)
        for options in (
            {"assistant_model": draft, "num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 2},
            {"assistant_model": draft, "assistant_confidence_threshold": 0.3, "num_assistant_tokens": 6},
            {"assistant_model": draft, "num_assistant_tokens_schedule": "optimal"},
            {"prompt_lookup_num_tokens": 4},
        ):
            out = target.generate(**prompts, max_new_tokens=30, do_sample=False, strategy="spec", **options)
            assert torch.equal(out, expected), options


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_pending_tokens_are_bounded(gamma: int) -> None:
    """Never more than 2γ + 1 tokens per row and forward, and never more forwards than vanilla needs."""
    target = pair("bamba")[0]
    draft = perturbed(target, 2.0, 3)  # almost never right
    options = {"max_new_tokens": 40, "do_sample": False}
    widths: list[int] = []
    for batch in (1, 4):
        prompts = make_prompts(batch, seed=batch)
        spec: dict[str, Any] = {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": gamma}
        expected = target.generate(**prompts, **options)
        target.generate(**prompts, **options, **spec)  # probes the model, once
        hook = target.register_forward_pre_hook(
            lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assert torch.equal(target.generate(**prompts, **options, **spec), expected)
        hook.remove()
        assert widths.pop(0) == 13 + (batch > 1)  # the prompt, with its last token where rows are padded
        assert max(widths) == 2 * gamma + 1
        assert len(widths) <= 40
        widths.clear()


@pytest.mark.parametrize("name", ["bamba", "qwen3_next", "lfm2"])
def test_what_vanilla_returns_besides_tokens(name: str) -> None:
    target, draft = pair(name)
    for batch in (1, 3):
        expected, out, _ = both(
            target, draft, make_prompts(batch, seed=7), 3, return_dict_in_generate=True, output_scores=True,
            output_hidden_states=True,
        )  # fmt: skip
        assert torch.equal(out.sequences, expected.sequences)
        for mine, theirs in zip(out.scores, expected.scores):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
        for mine, theirs in zip(out.hidden_states[1:], expected.hidden_states[1:]):
            torch.testing.assert_close(mine[-1], theirs[-1], atol=1e-3, rtol=1e-3)
        # The cache continues where vanilla's does.
        more = {"max_new_tokens": 6, "do_sample": False}
        mask = torch.cat([make_prompts(batch, seed=7)["attention_mask"], torch.ones(batch, 24, dtype=torch.long)], 1)
        again = target.generate(out.sequences, attention_mask=mask, past_key_values=out.past_key_values, **more)
        assert torch.equal(
            again,
            target.generate(expected.sequences, attention_mask=mask, past_key_values=expected.past_key_values, **more),
        )


@pytest.mark.parametrize("name", ["bamba", "qwen3_next", "lfm2", "falcon_h1"])
def test_a_cache_of_the_user_is_continued(name: str) -> None:
    target, draft = pair(name)
    ids = make_prompts(1, seed=3)["input_ids"]

    def two_turns(**kwargs: Any) -> torch.Tensor:
        cache = transformers.DynamicCache(config=target.config)
        first = target.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False, **kwargs)
        more = torch.cat([first, ids[:, :5]], dim=1)
        return target.generate(more, past_key_values=cache, max_new_tokens=9, do_sample=False, **kwargs)

    assert torch.equal(two_turns(assistant_model=draft, strategy="spec", num_assistant_tokens=4), two_turns())


def test_sampled_rows_and_processors_that_keep_state() -> None:
    """In order and in lockstep; several sequences per prompt; a prompt with a hole."""
    target, draft = pair("qwen3_next")
    prompts = make_prompts(3, seed=9)
    expected, out, _ = both(target, draft, prompts, 3, guidance_scale=1.3)
    assert torch.equal(out, expected)
    prompts["attention_mask"][0, 5] = 0
    expected, out, _ = both(target, draft, prompts, 3)
    assert torch.equal(out, expected)
    torch.manual_seed(0)
    out = target.generate(
        **make_prompts(2), do_sample=True, num_return_sequences=3, max_new_tokens=12, assistant_model=draft,
        strategy="spec",
    )  # fmt: skip
    assert out.shape == (6, 26)


def test_long_prompts_in_chunks_and_prompts_of_one_token() -> None:
    for name in ("mamba2", "bamba", "kimi_linear"):
        target, draft = pair(name)
        if name != "mamba2":  # vanilla has no chunks there
            expected, out, _ = both(target, draft, make_prompts(3, 40, seed=1), 3, prefill_chunk_size=16)
            assert torch.equal(out, expected)
        one = {"input_ids": torch.tensor([[5], [9]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
        expected, out, _ = both(target, draft, one, 3)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["bamba", "qwen3_next", "lfm2"])
def test_after_every_iteration_states_are_those_of_the_committed_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = pair(name)
    monkeypatch.setattr(invariants, "ENABLED", True)
    for batch in (1, 3):
        expected, out, _ = both(target, draft, make_prompts(batch, seed=4), 3)
        assert torch.equal(out, expected)
    monkeypatch.setattr(States, "_restore", lambda *args, **kwargs: None)
    with pytest.raises(invariants.InvariantError, match="the state is off by"):
        both(target, draft, make_prompts(1, seed=4), 3)
