"""Images and audio enter with the prompt; the tokens generated after them are vanilla's."""

import functools
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, assert_lossless, make_model, make_pair, make_prompts, perturbed
from multimodal import CLIP, FAMILIES, Inputs, Size, make_multimodal, make_multimodal_prompts
from transformers import DynamicCache, GitConfig, GitForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

import hf_specdec
from hf_specdec.loop import invariants
from hf_specdec.models.abilities import Abilities
from hf_specdec.tools.tiny_models import build, entries

NEW_TOKENS = 12
ALONE: list[list[Size]] = [[(4, 4)]]
UNEVEN: list[list[Size]] = [[(4, 4)], [], [(4, 8), (4, 4)], [(8, 4)]]
TEXT_ONLY: list[list[Size]] = [[], [], []]

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
    for gamma in (3,) if rows == "text" else (1, 5):
        assert torch.equal(speculate(target, prompts(name, rows), draft, gamma), vanilla(name, rows)), f"γ = {gamma}"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_matters_and_rows_go_at_their_own_pace(name: str) -> None:
    """Otherwise the tests above would show little: without the image, the same prompt must continue differently."""
    inputs = prompts(name, "alone")
    blind = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    target, _ = pair(name)
    assert not torch.equal(target.generate(**blind, max_new_tokens=NEW_TOKENS), vanilla(name, "alone"))
    assert Abilities.of(target).ragged


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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_of_the_same_kind_sees_the_image_too(name: str) -> None:
    """A copy of the target as its draft is always right, unless it is blind or looks at the wrong place."""
    target, _ = pair(name)
    stats = hf_specdec.SpeculationStats()
    copies = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    for rows, kwargs in (("alone", {}), ("uneven", {}), ("alone", copies)):
        speculate(target, prompts(name, rows), perturbed(target, 0.0), speculation_stats=stats, **kwargs)
    assert stats.acceptance_rate == 1


def test_a_draft_that_cannot_see_this_image_is_left_with_the_text(caplog: pytest.LogCaptureFixture) -> None:
    target, _ = pair("llava")
    config = FAMILIES["llava"].config()
    config.vision_config.num_channels = 1
    torch.manual_seed(1)
    draft = type(target)(config).eval()
    logging.enable_propagation()
    try:
        assert torch.equal(speculate(target, prompts("llava", "uneven"), draft), vanilla("llava", "uneven"))
    finally:
        logging.disable_propagation()
    assert "cannot read this prompt's images or audio" in caplog.text


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "gemma3"])
def test_the_outputs_are_those_of_vanilla(name: str) -> None:
    target, draft = make_multimodal(name, attn_implementation="eager")
    kinds = ("logits", "hidden_states", "attentions")
    wanted = {"return_dict_in_generate": True, **{f"output_{kind}": True for kind in kinds}}
    inputs = prompts(name, "uneven")
    theirs = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **wanted)
    ours = speculate(target, inputs, draft, **wanted)
    assert torch.equal(ours.sequences, theirs.sequences)
    real = inputs["attention_mask"].bool()
    for kind in kinds[1:]:
        for step, (mine, expected) in enumerate(zip(ours[kind], theirs[kind], strict=True)):
            for a, b in zip(mine, expected, strict=True):
                mask = torch.ones(()) if step else real[:, None, :, None] if kind == "attentions" else real[..., None]
                torch.testing.assert_close(a * mask, b * mask, atol=1e-4, rtol=1e-4)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_next", "smolvlm"])
def test_several_sequences_per_prompt_see_their_own_images(name: str) -> None:
    target, draft = pair(name)
    wanted = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    expected = target.generate(**prompts(name, "uneven"), max_new_tokens=NEW_TOKENS, **wanted)
    assert torch.equal(speculate(target, prompts(name, "uneven"), draft, **wanted), expected)


@pytest.mark.parametrize("name", ["qwen3_vl", "paligemma"])
def test_sampling_goes_on_behind_an_image(name: str) -> None:
    target, draft = pair(name)
    torch.manual_seed(0)
    stats = hf_specdec.SpeculationStats()
    out = speculate(target, prompts(name, "uneven"), draft, do_sample=True, speculation_stats=stats)
    assert out.shape == vanilla(name, "uneven").shape
    assert 0 < stats.acceptance_rate < 1


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_a_prompt_of_embeddings(name: str) -> None:
    target, draft = pair(name)
    inputs = prompts(name, "uneven")
    ids = inputs["input_ids"]
    embeds = {
        "inputs_embeds": target.get_input_embeddings()(ids).detach(), "attention_mask": inputs["attention_mask"]
    }  # fmt: skip
    expected = target.generate(**embeds, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(speculate(target, embeds, draft), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "paligemma", "llava_onevision"])
def test_a_second_turn_goes_on_from_the_cache(name: str) -> None:
    """The positions after the image are those at which the first turn ended."""
    target, draft = pair(name)
    inputs = prompts(name, "uneven")
    results = []
    for way in ({}, {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": 3}):
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        kwargs = {"do_sample": False, "max_new_tokens": 6, **way}
        first = target.generate(**inputs, past_key_values=cache, **kwargs)
        ids = torch.cat([first, first[:, -3:].flip(1)], dim=1)
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(ids), 9)], dim=1)
        kwargs["max_new_tokens"] = NEW_TOKENS
        results.append(target.generate(ids, attention_mask=mask, past_key_values=cache, **kwargs))
    assert torch.equal(results[1], results[0])


@pytest.mark.parametrize("rows", ["alone", "text"])
def test_chunks_of_a_prompt_are_those_of_vanilla(rows: str) -> None:
    """If tokens of a prompt see later ones, its chunks matter."""
    target, draft = pair("paligemma")
    inputs = dict(prompts("paligemma", rows))
    inputs.pop("pixel_values", None)
    expected = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(speculate(target, inputs, draft, prefill_chunk_size=4), expected)


def test_a_prefix_sees_ahead_without_being_told() -> None:
    """PaliGemma attends in both directions within a prompt without a restricting mask."""
    target, draft = pair("paligemma")
    for batch in (1, 3):
        assert_lossless((target, draft), make_prompts(batch), lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(3,))


def test_caches_hold_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "ENABLED", True)
    for name in ("qwen2_vl", "llava"):
        target, draft = pair(name)
        for rows in ("uneven", "text"):
            assert torch.equal(speculate(target, prompts(name, rows), draft), vanilla(name, rows))


@pytest.mark.parametrize("batch", [1, 4])
def test_token_types_go_on_as_in_vanilla(batch: int) -> None:
    """Some models receive a type with every token: the type of the prompt's last token is repeated."""
    pair = make_pair("gpt2")
    inputs = make_prompts(batch)
    inputs["token_type_ids"] = inputs["input_ids"] % 7
    told = assert_lossless(pair, inputs, lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(3,))
    assert not torch.equal(told, pair[0].generate(**make_prompts(batch), max_new_tokens=NEW_TOKENS))


def git() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GitConfig(
        vision_config=CLIP, vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.2, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return GitForCausalLM(config).eval()


@pytest.mark.parametrize("rows", [1, 3])
def test_images_that_are_no_part_of_the_text(rows: int) -> None:
    """They have cache entries but no tokens. A draft of the same kind only gets the text."""
    target = git()
    target.generation_config.pad_token_id = 0
    inputs = {**make_prompts(rows), "pixel_values": torch.randn(rows, 3, 8, 8)}
    seen = assert_lossless((target, perturbed(target, 0.08)), inputs, lambda: {"max_new_tokens": NEW_TOKENS})
    assert not torch.equal(seen, target.generate(**make_prompts(rows), max_new_tokens=NEW_TOKENS))
    cache = DynamicCache()
    with pytest.raises(ValueError, match="pass the whole prompt without it"):
        speculate(target, inputs, None, past_key_values=cache, prompt_lookup_num_tokens=3)


class WithoutPositions(LlamaForCausalLM):
    """Takes no position ids: it uses a token's column as its position."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **ignored):
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache)


@pytest.mark.parametrize("target", [git(), WithoutPositions(ARCHITECTURES["llama"]()).eval()], ids=["git", "columns"])
def test_models_that_see_padding_their_own_way_advance_in_lockstep(target: PreTrainedModel) -> None:
    target.generation_config.pad_token_id = 0
    assert not Abilities.of(target).ragged
    draft = perturbed(target, 0.08)
    assert_lossless((target, draft), make_prompts(4), lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(3,))


class Tinted(LlamaForCausalLM):
    """Passes positions on without naming them, so vanilla gives none; an image changes the prompt's tokens."""

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embeds = embeds + pixel_values[..., None]
        return super().forward(inputs_embeds=embeds, **kwargs)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_prompt_read_without_positions_goes_on_without_them(batch: int) -> None:
    torch.manual_seed(0)
    target = Tinted(ARCHITECTURES["llama"]()).eval()
    target.generation_config.pad_token_id = 0
    inputs = make_prompts(batch)
    inputs["pixel_values"] = torch.randn(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    pair = target, perturbed(target, 0.08)
    told = assert_lossless(pair, inputs, lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(3,))
    assert not torch.equal(told, target.generate(**make_prompts(batch), max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_hybrid_model_hands_its_cache_back_with_the_image(batch: int) -> None:
    """States of rows that ended are recomputed from the whole prompt, not from its text."""
    entry = next(entry for entry in entries() if entry.name == "Qwen3_5ForConditionalGeneration")
    target = build(entry)
    inputs = make_prompts(batch)
    inputs["input_ids"][:, 4:8] = target.config.image_token_id
    inputs["attention_mask"][:, 4:] = 1
    width = target.config.get_text_config(decoder=True).hidden_size
    features = torch.randn(batch, 4, width, generator=torch.Generator().manual_seed(0))
    results = []
    for way in ({}, {"assistant_model": perturbed(target, 0.08), "strategy": "spec", "num_assistant_tokens": 3}):
        kwargs = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, **way}
        images = {"image": BaseModelOutputWithPooling(pooler_output=tuple(features))}
        first = target.generate(**inputs, mm_encoder_outputs=images, **kwargs)
        ids = torch.cat([first.sequences, first.sequences[:, -3:].flip(1)], dim=1)
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(batch, 11)], dim=1)
        second = target.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **kwargs)
        results.append((first.sequences, second.sequences))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, theirs)
