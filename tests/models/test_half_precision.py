"""bfloat16 and float16: every model family runs, and its tokens are vanilla's except for ties."""

from typing import Any

import pytest
import test_recurrent
import test_window
import torch
from conftest import ARCHITECTURES, SIZES, assert_same_but_for_ties, make_model, make_prompts, perturbed
from transformers import LlamaConfig, NemotronHConfig, PreTrainedModel

import hf_specdec
from hf_specdec.models.abilities import Abilities
from hf_specdec.models.probes import rehearse

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
DENSE = {"llama", "gemma2", "gpt2", "falcon-alibi", "mixtral"}


def in_half(model: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A copy in another precision, and a draft for it."""
    target = perturbed(model, 0.0).to(dtype)
    return target, perturbed(model, 0.1).to(dtype)


def check(model: PreTrainedModel, dtype: torch.dtype) -> None:
    target, draft = in_half(model, dtype)
    for batch in (1, 4):
        prompts = make_prompts(batch, seed=batch)
        assert_same_but_for_ties(target, prompts, assistant_model=draft, num_assistant_tokens=3)
    assert_same_but_for_ties(target, prompts, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)


@HALF
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DENSE else pytest.mark.slow) for n in sorted(ARCHITECTURES)]
)
def test_dense_models(name: str, dtype: torch.dtype) -> None:
    check(make_model(ARCHITECTURES[name]()), dtype)


@HALF
@pytest.mark.parametrize("name", test_recurrent.CONTINUING)
def test_recurrent_models(name: str, dtype: torch.dtype) -> None:
    model = test_recurrent.pair(name)[0]
    check(model, dtype)
    assert Abilities.of(in_half(model, dtype)[0]).ragged


@HALF
@pytest.mark.parametrize("name", test_recurrent.ONE_BY_ONE)
def test_states_that_do_not_go_on_over_several_tokens_are_still_found(name: str, dtype: torch.dtype) -> None:
    """Measured noise is far smaller than the errors of such a model."""
    target, draft = in_half(test_recurrent.pair(name)[0], dtype)
    with pytest.raises(ValueError, match="does not continue a recurrent state over several tokens"):
        target.generate(**make_prompts(1), strategy="spec", assistant_model=draft, max_new_tokens=8)
    assert_same_but_for_ties(
        make_model(ARCHITECTURES["llama"]()).to(dtype), make_prompts(2), assistant_model=draft, num_assistant_tokens=3
    )


@HALF
@pytest.mark.parametrize("name", sorted(test_window.FAMILIES))
def test_windowed_models(name: str, dtype: torch.dtype) -> None:
    """Past the window, alone and in a batch."""
    target, draft = in_half(test_window.pair(name)[0], dtype)
    for batch in (1, 4):
        prompts = make_prompts(batch, width=3 * test_window.WINDOW, seed=batch)
        assert_same_but_for_ties(target, prompts, assistant_model=draft, num_assistant_tokens=3)


# Measured noise and its use


class InTF32(torch.utils._python_dispatch.TorchDispatchMode):
    """Products as on GPUs with TF32: inputs rounded to ten bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}.get(func._schema.name)
        if first is not None:
            args = tuple(_ten_bits(value) if i >= first else value for i, value in enumerate(args))
        return func(*args, **(kwargs or {}))


def _ten_bits(value: torch.Tensor) -> torch.Tensor:
    if value.dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h", "zamba2", "qwen3_next"])
def test_recurrent_models_in_tf32(name: str) -> None:
    target = perturbed(test_recurrent.pair(name)[0], 0.0)
    with InTF32():
        assert Abilities.of(target).states(), Abilities.of(target).states().reason
        assert Abilities.of(target).ragged


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
def test_dense_models_in_tf32(name: str) -> None:
    """Rounding to ten bits hides most differences, and enlarges the others."""
    target = make_model(ARCHITECTURES[name]())
    with InTF32():
        assert Abilities.of(target).ragged, Abilities.of(target).ragged.reason
        target.generate(**make_prompts(1), strategy="spec", prompt_lookup_num_tokens=3, max_new_tokens=4)


def test_one_by_one_states_are_found_in_tf32() -> None:
    with InTF32():
        assert not Abilities.of(perturbed(test_recurrent.pair("mamba")[0], 0.0)).states()


@pytest.mark.parametrize("batch", [1, 3])
def test_deep_models_with_large_weights_round_more(batch: int) -> None:
    """Four layers whose two vanilla ways differ by up to 4e-4 of a standard deviation, in float32."""
    config = NemotronHConfig(
        **{**test_recurrent._COMMON, **test_recurrent._ATTENTION, "num_hidden_layers": 4},
        hybrid_override_pattern="M*M-", mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8,
        chunk_size=8,
    )  # fmt: skip
    target = make_model(config)
    prompts = make_prompts(batch)
    expected = target.generate(**prompts, max_new_tokens=24, do_sample=False)
    options = {"strategy": "spec", "assistant_model": perturbed(target, 0.05), "max_new_tokens": 24}
    assert torch.equal(target.generate(**prompts, **options, num_assistant_tokens=3), expected)


@HALF
def test_real_models_decode_rows_of_different_lengths(dtype: torch.dtype) -> None:
    """Of the embedded pair, little rounding is measured token by token, and more is seen with masks."""
    for model in hf_specdec.demo_pair()[:2]:
        model.to(dtype)
        for seed in range(3):
            with torch.no_grad():
                rehearse(model, rows=3, seed=seed)
        assert Abilities.of(model).ragged


def test_answers_are_remembered_by_precision() -> None:
    model = make_model(LlamaConfig(**SIZES))
    asked = []
    model.register_forward_pre_hook(lambda *_: asked.append(model.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert Abilities.of(model).ragged
        assert Abilities.of(model).ragged
    times = [asked.count(dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert times[0] == times[1] > 0
