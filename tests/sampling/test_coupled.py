"""`speculation_acceptance`: coupled text is a function of seed and target alone; "block" is exact and keeps more."""

from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, make_pair, make_prompts, perturbed
from torch import Tensor
from transformers import LlamaConfig, LogitsProcessor, PreTrainedModel

import hf_specdec
from hf_specdec import Either, SpeculationStats, SuffixDrafter
from hf_specdec.tools.lossless import coupled_choice

NEW = 24
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": NEW, "top_k": 40, "temperature": 0.8}
COUPLED: dict[str, Any] = {"strategy": "spec", "speculation_acceptance": "coupled", "speculation_seed": 7}


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair("llama", noise=0.08)


def vanilla(target: PreTrainedModel, inputs: dict[str, Tensor], seeds: list[int], **options: Any) -> Tensor:
    """Transformers' own sampling, with its choice of tokens left to the same noise."""
    with coupled_choice(seeds, inputs["attention_mask"]):
        return target.generate(**inputs, **SAMPLED | options)


WAYS: dict[str, dict[str, Any]] = {
    **{f"γ={gamma}": {"num_assistant_tokens": gamma} for gamma in range(1, 9)},
    "optimal": {"num_assistant_tokens_schedule": "optimal"},
    "heuristic": {"num_assistant_tokens_schedule": "heuristic_transient"},
    "unsure drafts": {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.4},
    "look-up": {"assistant_model": None, "prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_model": None, "assistant_early_exit": 1, "num_assistant_tokens": 3},
    "suffixes": {"assistant_model": SuffixDrafter(), "num_assistant_tokens": 3},
    "suffixes by the schedule": {"assistant_model": SuffixDrafter(), "num_assistant_tokens_schedule": "optimal"},
}


def test_text_is_a_function_of_seed_and_target(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The same for every γ, drafter and schedule, alone and in a batch: the text of vanilla with that noise."""
    target, draft = pair
    inputs = make_prompts(3)
    expected = vanilla(target, inputs, [7, 8, 9])
    accepted = {}
    either = {"assistant_model": Either(draft, SuffixDrafter()), "num_assistant_tokens": 3}
    for name, way in (WAYS | {"either": either}).items():
        stats = SpeculationStats()
        options = {"assistant_model": draft} | COUPLED | way | {"speculation_stats": stats}
        assert torch.equal(target.generate(**inputs, **SAMPLED, **options), expected), name
        accepted[name] = stats.acceptance_rate
    assert 0.2 < accepted["γ=3"] < 1
    assert accepted["look-up"] > 0 and accepted["early exit"] > 0
    for row in range(3):
        alone = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        options = {"assistant_model": draft} | COUPLED | {"speculation_seed": [7 + row]}
        got = target.generate(alone, **SAMPLED, **options)
        assert torch.equal(got[0, alone.shape[1] :], expected[row, -NEW:])
    assert len({tuple(row) for row in expected[:, -NEW:].tolist()}) == 3


class Shift(LogitsProcessor):
    """Unknown to the library, so it is called step by step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.linspace(0, 1.5, scores.shape[1]).roll(input_ids.shape[1] % 3)


@pytest.mark.parametrize(
    "extra", [{"repetition_penalty": 1.4}, {"logits_processor": [Shift()]}], ids=["pure", "unknown"]
)
def test_processors_come_before_the_noise(pair: tuple[PreTrainedModel, PreTrainedModel], extra: dict[str, Any]) -> None:
    target, draft = pair
    inputs = make_prompts(2, seed=3)
    expected = vanilla(target, inputs, [7, 8], **extra)
    stats = SpeculationStats()
    options = (
        SAMPLED | COUPLED | extra | {"assistant_model": draft, "speculation_stats": stats, "num_assistant_tokens": 4}
    )
    assert torch.equal(target.generate(**inputs, **options), expected)
    assert 0 < stats.acceptance_rate < 1


def test_several_samples_of_a_prompt_have_seeds_of_their_own(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = pair
    inputs = make_prompts(2)
    call = SAMPLED | COUPLED | {"assistant_model": draft, "num_return_sequences": 2}
    text = target.generate(**inputs, **call)
    assert torch.equal(text, target.generate(**inputs, **call | {"speculation_seed": [7, 8, 9, 10]}))
    assert torch.equal(text[2:], target.generate(**inputs, **call | {"speculation_seed": [0, 0, 9, 10]})[2:])
    assert len({tuple(row) for row in text.tolist()}) == 4


def test_torchs_generator_decides_without_a_seed(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = pair
    call = SAMPLED | COUPLED | {"assistant_model": draft, "speculation_seed": None} | make_prompts(2)

    def text(seed: int, gamma: int) -> list[list[int]]:
        torch.manual_seed(seed)
        tokens: list[list[int]] = target.generate(**call, num_assistant_tokens=gamma).tolist()
        return tokens

    assert text(0, 2) == text(0, 5) != text(1, 2)


def test_a_text_goes_on_as_if_it_had_not_been_interrupted(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = pair
    inputs = make_prompts(1)
    call = SAMPLED | COUPLED | {"assistant_model": draft}
    whole = target.generate(**inputs, **call)
    half = target.generate(**inputs, **call | {"max_new_tokens": NEW // 2})
    mask = torch.ones_like(half)  # the text may have the padding token in it
    assert torch.equal(target.generate(half, attention_mask=mask, **call | {"max_new_tokens": NEW // 2}), whole)


def test_greedy_calls_are_the_same_under_every_rule(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = pair
    inputs = make_prompts(2)
    expected = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    for rule in ("block", "coupled"):
        way = {"assistant_model": draft, "strategy": "spec", "speculation_acceptance": rule}
        assert torch.equal(target.generate(**inputs, max_new_tokens=12, do_sample=False, **way), expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"speculation_acceptance": "strict"}, ValueError, "`speculation_acceptance` must be one of 'token', 'block'"),
        ({"speculation_seed": 3}, ValueError, "`speculation_seed` is for .*that is 'token'.*torch.manual_seed"),
        (COUPLED | {"speculation_seed": 1.5}, TypeError, "`speculation_seed` must be an int, or a list .*got 1.5"),
        (COUPLED | {"speculation_seed": [1, None]}, TypeError, "`speculation_seed` must be an int"),
        (COUPLED | {"speculation_seed": []}, TypeError, "`speculation_seed` must be an int"),
        (COUPLED | {"speculation_seed": [1, 2, 3]}, ValueError, "has 3 seeds, but 2 rows are decoded"),
        (COUPLED | {"num_beams": 2}, ValueError, "`num_beams` is 2"),
        (
            {"speculation_acceptance": "block", "logits_processor": [Shift()]},
            ValueError,
            "'block'` judges the drafts of a block together, but Shift may keep state",
        ),
    ],
)
def test_bad_input(
    pair: tuple[PreTrainedModel, PreTrainedModel], options: dict[str, Any], error: type[Exception], match: str
) -> None:
    target, draft = pair
    with pytest.raises(error, match=match):
        target.generate(**make_prompts(2), **SAMPLED | {"strategy": "spec", "assistant_model": draft} | options)


def test_block_keeps_no_fewer_drafts(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target = make_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1, "initializer_range": 0.1}), seed=3)
    draft = perturbed(target, 0.5)
    kept = {}
    for rule in ("token", "block"):
        torch.manual_seed(0)
        stats = SpeculationStats()
        call = {"strategy": "spec", "assistant_model": draft, "speculation_acceptance": rule, "num_assistant_tokens": 5}
        target.generate(
            **make_prompts(1), do_sample=True, top_k=0, max_new_tokens=20, num_return_sequences=200,
            speculation_stats=stats, **call,
        )  # fmt: skip
        kept[rule] = stats.acceptance_rate
    assert 0.1 < kept["token"] < kept["block"] < 0.9


def test_the_rules_are_public() -> None:
    assert hf_specdec.options.ACCEPTANCE_RULES == ("token", "block", "coupled")
