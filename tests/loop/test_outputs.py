"""All outputs of `generate()` besides tokens equal vanilla's in class, shape and value; inputs besides ids work."""

import functools
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_prompts, perturbed
from conftest import generate_with as generate
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_specdec import SpeculationStats

WIDTH = 14
EVERYTHING: dict[str, Any] = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


@functools.cache
def pair(name: str = "llama", attention: str = "sdpa") -> tuple[Any, Any]:
    config = ARCHITECTURES[name]()
    if name in (
        "gpt2",
        "gemma2",
        "bloom",
    ):  # with tied embeddings, these models and their drafts repeat the last token
        config.tie_word_embeddings = False
    target = make_model(config, attn_implementation="eager" if name == "bloom" else attention)
    return target, perturbed(target, {"gpt2": 0.15, "gemma2": 0.08, "bloom": 0.05}.get(name, 0.04))


def prompts(batch: int) -> dict[str, Tensor]:
    return make_prompts(batch, WIDTH, seed=3)


def ends(sequences: Tensor, eos: int | None) -> list[int]:
    """For each row, the number of new tokens before the padding after an end."""
    new = sequences[:, WIDTH:].tolist()
    return [row.index(eos) + 1 if eos in row else len(row) for row in new]


def early_end(target: Any, inputs: dict[str, Tensor]) -> int:
    """An EOS token that ends some rows early, but not all."""
    rows = generate(target, **inputs)[:, WIDTH:].tolist()
    for token in sorted({token for row in rows for token in row}):
        at = [row.index(token) for row in rows if token in row]
        if 0 < len(at) < len(rows) and min(at) >= 4:
            return token
    raise AssertionError("choose another prompt")


def compare_outputs(ours: Any, theirs: Any, inputs: dict[str, Tensor], eos: int | None = None, past: int = 0) -> None:
    """Everything has vanilla's shape; values agree while a row is running, on columns that are not padding."""
    assert ours.sequences.equal(theirs.sequences)
    assert list(ours.keys()) == list(theirs.keys())
    firsts, lasts = inputs["attention_mask"].argmax(dim=1).tolist(), ends(theirs.sequences, eos)
    close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    for name in ("scores", "logits"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert [t.shape for t in mine] == [t.shape for t in other]
        for step, (a, b) in enumerate(zip(mine, other, strict=True)):
            for row, last in enumerate(lasts):
                if step < last:
                    close(a[row], b[row])
    for name in ("hidden_states", "attentions"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert [[t.shape for t in step] for step in mine] == [[t.shape for t in step] for step in other]
        for step, layers in enumerate(zip(mine, other, strict=True)):
            for a, b in zip(*layers, strict=True):
                for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
                    if step < last:
                        query = max(first - past, 0) if step == 0 else 0
                        if name == "hidden_states":
                            close(a[row, query:], b[row, query:])
                        else:
                            dropped = WIDTH + step - b.shape[-1]  # columns that a sliding layer has dropped
                            column = max(first - dropped, 0)
                            close(a[row, :, query:, column:], b[row, :, query:, column:])


# Records


@pytest.mark.parametrize("past", [0, 6], ids=["no cache", "a user's cache"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_record_is_vanillas(batch, past):
    target, draft = pair(attention="eager")
    inputs = prompts(batch)

    def cache() -> dict[str, Any]:
        if not past:
            return {}
        mask = inputs["attention_mask"][:, :past]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        filled = DynamicCache(config=target.config)
        with torch.no_grad():
            target(inputs["input_ids"][:, :past], attention_mask=mask, position_ids=positions, past_key_values=filled)
        return {"past_key_values": filled}

    kwargs = {**inputs, **EVERYTHING, "repetition_penalty": 1.3}
    theirs = generate(target, **kwargs, **cache())
    ours = generate(target, draft, **kwargs, **cache())
    assert theirs.hidden_states[0][0].shape[1] == WIDTH - past
    compare_outputs(ours, theirs, inputs, past=past)


@pytest.mark.parametrize("gamma", [1, 4, 9])
def test_every_record_is_vanillas_where_rows_end_early(gamma):
    target, draft = pair(attention="eager")
    inputs = prompts(3)
    eos = early_end(target, inputs)
    kwargs = {**inputs, **EVERYTHING, "eos_token_id": eos}
    theirs = generate(target, **kwargs)
    assert len(set(ends(theirs.sequences, eos))) > 1
    compare_outputs(generate(target, draft, **kwargs, num_assistant_tokens=gamma), theirs, inputs, eos)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "mistral-sliding", "gemma2"])
def test_every_record_is_vanillas_in_other_architectures(name, batch):
    target, draft = pair(name, "eager")
    inputs = prompts(batch)
    kwargs = {**inputs, **EVERYTHING, "max_new_tokens": 10}
    theirs = generate(target, **kwargs)
    compare_outputs(generate(target, draft, **kwargs), theirs, inputs)


def test_scores_are_processed_and_logits_are_raw():
    target, draft = pair()
    out = generate(target, draft, **prompts(2), **EVERYTHING | {"output_attentions": False}, suppress_tokens=[5])
    assert len(out.scores) == len(out.logits) == 14
    assert all((scores[:, 5] == -torch.inf).all() for scores in out.scores)
    assert all(logits.isfinite().all() for logits in out.logits)


def test_nothing_is_recorded_that_was_not_asked_for():
    target, draft = pair()
    out = generate(target, draft, **prompts(1), return_dict_in_generate=True)
    assert out.scores is out.logits is out.hidden_states is out.attentions is None
    asked = set()
    hook = target.register_forward_pre_hook(lambda model, args, kwargs: asked.update(kwargs), with_kwargs=True)
    ids = generate(target, draft, **prompts(1), output_scores=True, output_hidden_states=True)
    hook.remove()
    assert ids.equal(out.sequences)  # without return_dict_in_generate, only tokens
    assert "input_ids" in asked
    assert "output_hidden_states" not in asked


def test_the_output_is_of_vanillas_class_and_says_how_speculation_went():
    target, draft = pair()
    stats = SpeculationStats()
    kwargs = {**prompts(2), "do_sample": False, "max_new_tokens": 14, "return_dict_in_generate": True}
    out = target.generate(**kwargs, assistant_model=draft, strategy="spec", speculation_stats=stats)
    assert type(out) is GenerateDecoderOnlyOutput
    assert out.speculation is stats
    assert stats.committed_tokens == 2 * 14
    assert list(out.keys()) == list(target.generate(**kwargs).keys())
    out = target.generate(**kwargs, assistant_model=draft, strategy="spec")
    assert type(out.speculation) is SpeculationStats
    assert out.speculation.committed_tokens == 2 * 14


def test_tokens_alone_are_a_tensor_of_the_callers_own():
    target, draft = pair()
    inputs = prompts(2)
    before = inputs["input_ids"].clone()
    ids = generate(target, draft, **inputs)
    assert ids.dtype == torch.int64
    assert ids.is_contiguous()
    ids[:] = 0
    assert inputs["input_ids"].equal(before)


# Other inputs


@pytest.mark.parametrize("batch", [1, 2])
def test_num_return_sequences_gives_each_prompt_its_samples(batch):
    target, draft = pair()
    inputs = prompts(batch)
    kwargs = {**inputs, "do_sample": True, "num_return_sequences": 3}
    greedy = generate(target, **inputs).repeat_interleave(3, dim=0)
    assert generate(target, draft, **kwargs, top_k=1).equal(greedy)
    stats = SpeculationStats()
    sure = target.generate(
        **kwargs, top_k=1, max_new_tokens=14, assistant_model=target, strategy="spec", speculation_stats=stats
    )
    assert sure.equal(greedy)
    assert stats.acceptance_rate == 1

    torch.manual_seed(0)
    sampled = generate(target, draft, **kwargs, temperature=2.0)
    assert sampled.shape == (3 * batch, WIDTH + 14)
    assert sampled[:, :WIDTH].equal(inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in sampled.tolist()}) == 3 * batch  # rows are drawn independently


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["embeddings alone", "with ids"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_of_embeddings(batch, with_ids, name):
    target, draft = pair(name)
    inputs = prompts(batch)
    ids = inputs.pop("input_ids")
    noise = torch.randn(batch, WIDTH, 32, generator=torch.Generator().manual_seed(1))
    inputs["inputs_embeds"] = target.get_input_embeddings()(ids).detach() + 0.1 * noise
    if with_ids:
        inputs["input_ids"] = ids
    kwargs = {"do_sample": False, "max_new_tokens": 14, "return_dict_in_generate": True}
    theirs = target.generate(**inputs, **kwargs)
    ours = target.generate(**inputs, **kwargs, assistant_model=draft, strategy="spec")
    assert theirs.sequences.shape[1] == 14 + WIDTH * with_ids
    assert ours.sequences.equal(theirs.sequences)
    assert ours.speculation.drafted_tokens > ours.speculation.accepted_tokens
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    for mine, layer in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for row, first in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
            torch.testing.assert_close(mine.keys[row, :, first:], layer.keys[row, :, first:], atol=1e-4, rtol=1e-4)


def test_a_prompt_of_one_embedding():
    target, draft = pair()
    embeds = target.get_input_embeddings()(torch.tensor([[17]])).detach()
    expected = target.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=14)
    assert target.generate(
        inputs_embeds=embeds, do_sample=False, max_new_tokens=14, assistant_model=draft, strategy="spec"
    ).equal(expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "positions",
    [torch.arange(WIDTH) + 7, torch.arange(WIDTH) * 2, torch.arange(WIDTH).flip(0)],
    ids=["shifted", "with gaps", "backwards"],
)
def test_position_ids_of_the_users(positions, batch):
    target, draft = pair("gpt2")
    inputs = {**prompts(batch), "position_ids": positions.repeat(batch, 1), "do_sample": False, "max_new_tokens": 14}
    expected = target.generate(**inputs)
    assert not expected.equal(generate(target, **prompts(batch)))
    assert target.generate(**inputs, assistant_model=draft, strategy="spec").equal(expected)


def test_no_prompt_at_all_begins_with_bos():
    target, draft = pair()
    expected = target.generate(do_sample=False, max_new_tokens=14)
    assert expected[0, 0] == target.generation_config.bos_token_id
    assert target.generate(do_sample=False, max_new_tokens=14, assistant_model=draft, strategy="spec").equal(expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("chunk", "forwards"), [(1, 13), (5, 3), (13, 1), (100, 1)])
def test_the_prefill_may_come_in_chunks(chunk, forwards, batch):
    target, draft = pair()
    inputs = prompts(batch)
    kwargs = {**inputs, "prefill_chunk_size": chunk, "return_dict_in_generate": True}
    theirs, ours = generate(target, **kwargs), generate(target, draft, **kwargs)
    assert ours.sequences.equal(theirs.sequences)
    assert ours.speculation.target_prefill_forwards == forwards  # the 14th token is fed with the first drafts


def test_a_vocabulary_that_only_the_text_config_knows():
    """Composite models have no `config.vocab_size`."""
    text = ARCHITECTURES["llama"]()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    target = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=90))
    target.eval().generation_config.pad_token_id = 0
    draft = perturbed(target, 0.04)
    inputs = prompts(2)
    assert not hasattr(target.config, "vocab_size")
    assert generate(target, draft, **inputs).equal(generate(target, **inputs))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_of_embeddings_may_be_cached_in_part(batch):
    target, draft = pair()
    inputs = prompts(batch)
    mask = inputs["attention_mask"][:, :6]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    results = []
    for speculation in ({}, {"assistant_model": draft, "strategy": "spec"}):
        cache = DynamicCache()
        with torch.no_grad():
            target(inputs["input_ids"][:, :6], attention_mask=mask, position_ids=positions, past_key_values=cache)
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "past_key_values": cache}
        results.append(target.generate(**given, do_sample=False, max_new_tokens=14, **speculation))
    assert results[1].equal(results[0])
    assert results[0].equal(generate(target, **inputs)[:, WIDTH:])
