"""Models that carry their own object from forward to forward: a state under another name or in its own class,
nothing at all, or more entries than tokens. Their own code feeds them; tokens are vanilla's.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SIZES, VOCAB, assert_lossless, make_model, make_pair, make_prompts, perturbed
from transformers import (
    LlamaConfig,
    MiniMaxConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    ReformerConfig,
    RwkvConfig,
    XLNetConfig,
    xLSTMConfig,
)

import hf_specdec
from hf_specdec.models import answers
from hf_specdec.models.self_fed import SelfFedModel
from hf_specdec.tools import compat, tiny_models
from hf_specdec.tools.tiny_inputs import inputs_of

NEW_TOKENS = 40
SMALL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
KINDS: dict[str, Callable[[], PreTrainedConfig]] = {
    "nothing": lambda: OpenAIGPTConfig(
        **SMALL, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "a list of states": lambda: RwkvConfig(**SMALL, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "an object of states": lambda: xLSTMConfig(
        **SMALL, hidden_size=64, embedding_dim=64, num_hidden_layers=2, num_blocks=2, num_heads=2, chunk_size=16,
        qk_dim_factor=1.0, autocast_kernel_dtype="float32",
    ),
    "a cache class of its own": lambda: MiniMaxConfig(
        **{**SIZES, "head_dim": 8, "block_size": 4, "num_local_experts": 2},
        layer_types=["full_attention", "linear_attention"],
    ),
}  # fmt: skip
# transformers' code mixes the rows of a batch in single steps.
ALONE_ONLY = {"a list of states"}
TOGETHER = sorted(KINDS.keys() - ALONE_ONLY)
NOISE = {"a list of states": 0.05, "an object of states": 0.05}
ENTRIES = {entry.name: entry for entry in tiny_models.entries()}


@functools.cache
def pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make_model(KINDS[kind]())
    with torch.no_grad():
        for parameter in target.parameters():  # some classes ignore `initializer_range`
            if parameter.ndim >= 2 and parameter.std() < 0.1:
                parameter *= 0.2 / parameter.std().clamp(min=1e-3)
    return target, perturbed(target, NOISE.get(kind, 0.12))


def speculate(target: PreTrainedModel, inputs: Any, draft: Any, gamma: int = 3, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    return target.generate(**inputs, **kwargs, assistant_model=draft, strategy="spec", num_assistant_tokens=gamma)


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_say_what_they_said(kind: str) -> None:
    target, draft = pair(kind)
    stats = hf_specdec.SpeculationStats()
    texts = set()
    for seed in range(8):
        inputs = make_prompts(1, width=6 + seed, seed=seed)
        expected = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        for gamma in (1, 3, 7):
            given = speculate(target, inputs, draft, gamma, speculation_stats=stats)
            assert given.tolist() == expected.tolist(), f"γ = {gamma}"
        texts.add(tuple(expected[0, -NEW_TOKENS:].tolist()))
    assert len(texts) == 8 and sum(len(set(text)) > 4 for text in texts) > 4
    assert 0.1 < stats.acceptance_rate < 0.9


@pytest.mark.parametrize("kind", TOGETHER)
def test_uneven_rows_say_what_they_said(kind: str) -> None:
    target, _ = pair(kind)
    free = target.generate(**make_prompts(4), max_new_tokens=NEW_TOKENS, do_sample=False)
    ends = {"eos_token_id": [int(free[1, 25]), int(free[2, 31])], "pad_token_id": 0}
    for more in ({}, ends):
        assert_lossless(pair(kind), make_prompts(4), lambda more=more: {"max_new_tokens": NEW_TOKENS, **more})


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_draft_it_is_as_good_as_alone(kind: str) -> None:
    """A copy of the target as its draft is always right, unless rejected drafts stayed in its state."""
    target, _ = pair(kind)
    rows = 1 if kind in ALONE_ONLY else 3
    stats = hf_specdec.SpeculationStats()
    speculate(target, make_prompts(rows), perturbed(target, 0.0), speculation_stats=stats)
    assert stats.acceptance_rate == 1
    # With a target that rejects most of its drafts, it continues from the committed tokens.
    llama, _ = make_pair("llama")
    assert_lossless((llama, target), make_prompts(rows), lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(1, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_is_for_others(kind: str) -> None:
    """A draft of this kind reads its prompt at once, as vanilla does; the target's chunks do not concern it."""
    llama, _ = make_pair("llama")
    rows = 1 if kind in ALONE_ONLY else 3
    options = {"max_new_tokens": NEW_TOKENS, "prefill_chunk_size": 4}
    assert_lossless((llama, pair(kind)[0]), make_prompts(rows), lambda: dict(options), gammas=(4,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_of_another_kind(kind: str) -> None:
    target, _ = pair(kind)
    rows = 1 if kind in ALONE_ONLY else 3
    _, draft = make_pair("llama")
    assert_lossless((target, draft), make_prompts(rows), lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(3,))


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_are_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than 2γ + 1 tokens are fed at once, and never more forwards than vanilla makes."""
    target, draft = pair(kind)
    widths: list[int] = []
    step = SelfFedModel._step

    def counted(self: SelfFedModel, carried: Any, text: torch.Tensor, width: int, keep: int) -> Any:
        widths.append(width)
        return step(self, carried, text, width, keep)

    speculate(target, make_prompts(1), draft)  # the model is probed once
    monkeypatch.setattr(SelfFedModel, "_step", counted)
    stats = hf_specdec.SpeculationStats()
    target.generate(
        **make_prompts(1), max_new_tokens=NEW_TOKENS, strategy="spec", prompt_lookup_num_tokens=3,
        max_matching_ngram_size=1, speculation_stats=stats,
    )  # fmt: skip
    assert 0 < max(widths) <= 7
    assert stats.target_forwards <= NEW_TOKENS


@pytest.mark.parametrize("ends_early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_state_are_handed_back(kind: str, ends_early: bool) -> None:
    """Also if a row ends on an accepted draft, with more drafts after it."""
    target, draft = pair(kind)
    more: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    rows = 1 if kind in ALONE_ONLY else 3
    if ends_early:
        free = target.generate(**make_prompts(rows), max_new_tokens=NEW_TOKENS, do_sample=False)
        more |= {"eos_token_id": free[:, 30].tolist(), "pad_token_id": 0}
        draft = perturbed(target, 0.0)
    expected = target.generate(**make_prompts(rows), max_new_tokens=NEW_TOKENS, do_sample=False, **more)
    given = speculate(target, make_prompts(rows), draft, **more)
    assert given.sequences.tolist() == expected.sequences.tolist()
    for name in () if ends_early else ("scores", "logits"):  # rows that have ended have none
        torch.testing.assert_close(torch.stack(given[name]), torch.stack(expected[name]), atol=1e-3, rtol=1e-3)
    mine, theirs = (states_of(output.past_key_values) for output in (given, expected))
    assert [state.shape for state in mine] == [state.shape for state in theirs]
    assert bool(theirs) == (kind != "nothing")
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-3)


def states_of(carried: Any) -> list[torch.Tensor]:
    """All tensors in something."""
    if isinstance(carried, torch.Tensor):
        return [carried] if carried.numel() else []
    if isinstance(carried, dict):
        carried = list(carried.values())
    if isinstance(carried, (list, tuple)):
        return [state for item in carried for state in states_of(item)]
    return states_of(vars(carried)) if type(carried).__module__.startswith("transformers.") else []


@pytest.mark.parametrize("kind", TOGETHER)
def test_sampling_with_one_choice_left(kind: str) -> None:
    target, draft = pair(kind)
    expected = target.generate(**make_prompts(2), max_new_tokens=NEW_TOKENS, do_sample=False)
    sampled = speculate(target, make_prompts(2), draft, do_sample=True, top_k=1)
    assert sampled.tolist() == expected.tolist()
    several = speculate(target, make_prompts(1), draft, do_sample=True, num_return_sequences=3)
    assert several.shape == (3, 14 + NEW_TOKENS)


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("GitForCausalLM", (1, 4)),
        ("BlipForConditionalGeneration", (1, 4)),
        ("VoxtralRealtimeForConditionalGeneration", (1, 4)),
        ("UnlimitedOcrForConditionalGeneration", (1,)),
    ],
)
def test_images_and_audio_apart_from_the_text(name: str, batches: tuple[int, ...]) -> None:
    result = compat.examine(ENTRIES[name], batches=batches, assisted=False)
    assert result["cases"]
    for case in result["cases"]:
        assert case["vanilla"] is None
        assert case[compat.OURS]["outcome"] == compat.IDENTICAL, case


def test_a_window_that_misplaces_padding_is_refused() -> None:
    """The limits of such a model only show past its window, so it is probed there."""
    target = tiny_models.build(ENTRIES["UnlimitedOcrForConditionalGeneration"])
    inputs = inputs_of(target)["text"](target, 4, 0)
    with pytest.raises(ValueError, match="for a block than token by token beyond a window of 12"):
        speculate(target, inputs, None, prompt_lookup_num_tokens=3)
    even = {"input_ids": inputs["input_ids"].clamp(min=3), "attention_mask": torch.ones_like(inputs["attention_mask"])}
    expected = target.generate(**even, max_new_tokens=NEW_TOKENS, do_sample=False)
    given = target.generate(**even, max_new_tokens=NEW_TOKENS, strategy="spec", prompt_lookup_num_tokens=3)
    assert given.tolist() == expected.tolist()


REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], int, str]] = {
    "mixes rows": (KINDS["a list of states"], 2, "RwkvForCausalLM returns different logits for a block"),
    "one token at a time": (
        lambda: ReformerConfig(
            **SMALL, hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32,
            is_decoder=True, axial_pos_embds=False, max_position_embeddings=256, attn_layers=["local", "lsh"],
            num_buckets=4,
        ),
        1,
        "ReformerModelWithLMHead (returns different logits|cannot be fed|returns logits for 1 of 3 tokens)",
    ),
    "a query of its own": (
        lambda: XLNetConfig(**SMALL, d_model=32, n_layer=2, n_head=2, d_inner=32),
        1,
        r"XLNetLMHeadModel (returns different logits|cannot be fed several|returns logits for 1 of 3 tokens)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_is_refused_by_name(kind: str) -> None:
    config, rows, match = REFUSED[kind]
    target = make_model(config())
    with pytest.raises(ValueError, match=match):
        target.generate(**make_prompts(rows), max_new_tokens=8, strategy="spec", prompt_lookup_num_tokens=3)


def test_rows_alone_do_not_speak_for_rows_together() -> None:
    """A probe of a model with one row says nothing about several rows."""
    target, draft = pair("a list of states")
    alone = make_prompts(1)
    speculate(target, alone, draft)
    together = {name: value.expand(3, -1).contiguous() for name, value in alone.items()}
    with pytest.raises(ValueError, match="RwkvForCausalLM returns different logits for a block"):
        speculate(target, together, draft)


class Remembering(OpenAIGPTLMHeadModel):
    """Its output depends on its earlier inputs."""

    asked = 0

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, attention_mask, **kwargs)
        self.asked += 1
        output.logits = output.logits + 0.1 * self.asked * torch.arange(output.logits.shape[-1])
        return output


def test_state_on_modules_is_refused() -> None:
    sizes = {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 12}
    lookup = {"max_new_tokens": 8, "strategy": "spec", "prompt_lookup_num_tokens": 3}
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM"):
        make_model(RecurrentGemmaConfig(**sizes)).generate(**make_prompts(1), **lookup)
    with pytest.raises(ValueError, match="Remembering keeps state outside its outputs"):
        Remembering(KINDS["nothing"]()).eval().generate(**make_prompts(1), **lookup)


def test_input_that_comes_bit_by_bit_is_refused() -> None:
    target, _ = pair("nothing")
    with pytest.raises(ValueError, match=r"given its input in pieces.*pass all of it at once"):
        SelfFedModel(target, make_prompts(1)["input_ids"], target.generation_config, {"chunks": iter([1, 2])})


def test_options_that_leave_no_place_are_refused() -> None:
    target, draft = pair("a cache class of its own")
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"`{name}`.*leave it out"):
            speculate(target, make_prompts(1), draft, return_dict_in_generate=True, **{name: True})
    used = target.generate(**make_prompts(1), max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=r"`past_key_values` \(MiniMaxCache\).*pass the whole text without it"):
        speculate(target, make_prompts(1), draft, past_key_values=used)
    embeds = target.get_input_embeddings()(make_prompts(1)["input_ids"])
    with pytest.raises(ValueError, match="can only read tokens: pass `input_ids`"):
        speculate(target, {"inputs_embeds": embeds}, draft)


def test_images_apart_from_the_text_with_attentions_are_refused() -> None:
    target = tiny_models.build(ENTRIES["GitForCausalLM"])
    inputs = inputs_of(target)["image"](target, 1, 0)
    more = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 8}
    with pytest.raises(ValueError, match=r"entries for .* tokens, and then strategy='spec' does not record `output_a"):
        target.generate(**inputs, **more, strategy="spec", prompt_lookup_num_tokens=3)


def test_the_model_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair("an object of states")
    speculate(target, make_prompts(1), draft)

    def never(*_: Any) -> str:
        raise AssertionError("asked again")

    monkeypatch.setattr(SelfFedModel, "_rehearse", never)
    speculate(target, make_prompts(1, seed=1), draft)
    assert all(found for found in answers._memory[target].values() if isinstance(found, answers.Answer))


def test_llama_is_not_fed_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SelfFedModel, "_step")
    target, draft = make_pair("llama")
    assert isinstance(target.config, LlamaConfig)
    speculate(target, make_prompts(2), draft)
