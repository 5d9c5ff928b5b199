"""Images and audio enter with the prompt; what is generated behind them is vanilla's."""

import functools
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from multimodal import FAMILIES, Inputs, Size, make_multimodal, make_multimodal_prompts
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec.masks import takes_ragged_rows

NEW_TOKENS = 16
ALONE: list[list[Size]] = [[(4, 4)]]
UNEVEN: list[list[Size]] = [[(4, 4)], [], [(4, 8), (4, 4)], [(8, 4)]]
TEXT_ONLY: list[list[Size]] = [[], [], []]
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

pair = functools.cache(make_multimodal)


@functools.cache
def prompts(name: str, rows: str) -> Inputs:
    return make_multimodal_prompts(name, {"alone": ALONE, "uneven": UNEVEN, "text": TEXT_ONLY}[rows])


@functools.cache
def vanilla(name: str, rows: str) -> torch.Tensor:
    return pair(name)[0].generate(**prompts(name, rows), max_new_tokens=NEW_TOKENS, do_sample=False)


def speculate(target: PreTrainedModel, inputs: Inputs, draft: Any, gamma: int = 3, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    return target.generate(**inputs, **kwargs, assistant_model=draft, strategy="spec", num_assistant_tokens=gamma)


@pytest.mark.parametrize("rows", ["alone", "uneven", "text"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_said(name: str, rows: str) -> None:
    target, draft = pair(name)
    for gamma in (1, 3, 6):
        assert torch.equal(speculate(target, prompts(name, rows), draft, gamma), vanilla(name, rows)), f"γ = {gamma}"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_matters_and_rows_go_at_their_own_pace(name: str) -> None:
    """Else the tests above would show little: without the image the same prompt goes on differently."""
    inputs = prompts(name, "alone")
    blind = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    target, _ = pair(name)
    assert not torch.equal(target.generate(**blind, max_new_tokens=NEW_TOKENS), vanilla(name, "alone"))
    assert takes_ragged_rows(target)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_drafts_of_these_tests_are_accepted_only_in_part(name: str) -> None:
    stats = hf_specdec.SpeculationStats()
    target, draft = pair(name)
    for rows in ("alone", "uneven", "text"):
        speculate(target, prompts(name, rows), draft, 1, speculation_stats=stats)
    assert 0.1 < stats.acceptance_rate < 0.95


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_only_draft_and_look_up(name: str) -> None:
    target, _ = pair(name)
    text = make_model(ARCHITECTURES["llama"]())
    for rows in ("alone", "uneven"):
        assert torch.equal(speculate(target, prompts(name, rows), text), vanilla(name, rows))
        looked_up = target.generate(
            **prompts(name, rows), max_new_tokens=NEW_TOKENS, strategy="spec", prompt_lookup_num_tokens=3
        )
        assert torch.equal(looked_up, vanilla(name, rows))
