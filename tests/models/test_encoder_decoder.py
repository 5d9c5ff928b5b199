"""Encoder-decoder models as targets: the encoder runs once, and the decoder is verified in blocks like any model."""

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import SIZES, VOCAB, assert_lossless, make_model, make_prompts, perturbed
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MBartConfig,
    PegasusConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    WhisperConfig,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateEncoderDecoderOutput

import hf_specdec
from hf_specdec.drafters import DraftRequest, PromptLookupDrafter
from hf_specdec.models.abilities import Abilities
from hf_specdec.models.encoder_side import EncoderSide
from hf_specdec.sampling.context import Context
from hf_specdec.sampling.rules import Greedy

NEW_TOKENS = 20
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
START = 2
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": START, "tie_word_embeddings": False,
}  # fmt: skip
TEXT: dict[str, Any] = {**BART, "max_position_embeddings": 128, "forced_eos_token_id": None}
AUDIO: dict[str, Any] = {
    **BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 96, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5": lambda: T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=2.0,
        pad_token_id=0, eos_token_id=None, decoder_start_token_id=START, tie_word_embeddings=False,
    ),
    "bart": lambda: BartConfig(**TEXT),
    "marian": lambda: MarianConfig(**TEXT),
    "mbart": lambda: MBartConfig(**TEXT),
    "pegasus": lambda: PegasusConfig(**{**TEXT, "init_std": 0.8}),
    "whisper": lambda: WhisperConfig(**{**AUDIO, "init_std": 0.4}),
}  # fmt: skip
# By family: a seed whose outputs vary, and the noise on a draft's weights so that it agrees in part.
MADE = {
    "t5": (5, 0.03), "bart": (5, 0.06), "marian": (1, 0.06), "mbart": (3, 0.12), "pegasus": (5, 0.05),
    "whisper": (0, 0.05),
}  # fmt: skip


def make(name: str, seed: int | None = None, **kwargs: Any) -> PreTrainedModel:
    torch.manual_seed(MADE[name][0] if seed is None else seed)
    loader = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    model = loader.from_config(FAMILIES[name](), dtype=torch.float32, **kwargs).eval()
    if name == "t5":  # otherwise its token embeddings drown out attention
        model.shared.weight.data *= 0.3
    model.generation_config.pad_token_id = 0
    model.generation_config.max_length = None
    return model


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make(name)
    return target, perturbed(target, MADE[name][1])


def inputs(name: str, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The encoder's input: features, or right-padded ids of uneven lengths."""
    generator = torch.Generator().manual_seed(100 * batch + seed)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, 12), generator=generator)
    lengths = [12, *torch.randint(2, 12, (batch - 1,), generator=generator).tolist()]
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def spec(draft: Any, gamma: int = 4, **kwargs: Any) -> dict[str, Any]:
    return {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": gamma, **kwargs}


# Tokens


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_said(name: str, batch: int) -> None:
    expected = assert_lossless(pair(name), inputs(name, batch), lambda: dict(GREEDY), (1, 2, 4, 7))
    assert len(set(expected.flatten().tolist())) > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_drafts_of_these_tests_are_accepted_only_in_part(name: str) -> None:
    target, draft = pair(name)
    stats = hf_specdec.SpeculationStats()
    for batch in (1, 4):
        target.generate(**inputs(name, batch), **GREEDY, **spec(draft, 1, speculation_stats=stats))
    assert 0.1 < stats.acceptance_rate < 0.95


@pytest.mark.parametrize("name", FAMILIES)
def test_only_decoders_that_are_told_positions_let_rows_run_apart(name: str) -> None:
    """The others count from the length of the cache, which is one number: their rows advance in lockstep."""
    assert bool(Abilities.of(pair(name)[0]).ragged) == (name == "whisper")
    if name == "whisper":
        assert Abilities.of(distilled()).ragged_drafts, "its forward does not name positions, but hands them on"


@pytest.mark.parametrize("place", ["attached", "config of the call", "config of the model"])
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_strategy_that_is_not_an_argument(name: str, place: str) -> None:
    """Whisper has a `generate()` of its own, which acts on a draft that it sees."""
    target, draft = copy.deepcopy(pair(name))
    stats = hf_specdec.SpeculationStats()
    expected = target.generate(**inputs(name, 2), **GREEDY)
    if place == "config of the model":
        target.generation_config.strategy = "spec"
    config = GenerationConfig(strategy="spec" if place == "config of the call" else None, speculation_stats=stats)
    if place == "config of the call":
        config.assistant_model = draft
        given: dict[str, Any] = {"generation_config": config}
    else:
        given = {"assistant_model": draft, "speculation_stats": stats}
    with hf_specdec.attached(target, draft) if place == "attached" else contextlib.nullcontext() as attachment:
        given = given if attachment is None else {"speculation_stats": stats}
        assert target.generate(**inputs(name, 2), **GREEDY, **given).equal(expected)
        plain = target.generate(**inputs(name, 2), **GREEDY, strategy="vanilla")
        assert plain.equal(expected)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    if attachment is not None:
        assert (attachment.calls, attachment.stats.committed_tokens) == (1, stats.committed_tokens)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    """Nor does the encoder's padding leak: a single row has none."""
    for name in ("bart", "t5"):
        target, draft = pair(name)
        given = inputs(name, 3)
        batch = target.generate(**given, **GREEDY, **spec(draft))
        for row in range(3):
            real = int(given["attention_mask"][row].sum())
            alone = target.generate(given["input_ids"][row : row + 1, :real], **GREEDY, **spec(draft))
            assert batch[row].equal(alone[0]), (name, row)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_rows_that_finish_leave_and_the_others_keep_their_encoder_outputs(name: str) -> None:
    target, draft = copy.deepcopy(pair(name))
    given = inputs(name, 6)
    free = target.generate(**given, **GREEDY)
    ends = [int(free[0, 4]), int(free[2, 9])]
    widths: list[tuple[int, int]] = []
    hook = target.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(
            (len(kwargs["decoder_input_ids"]), len(kwargs["encoder_outputs"].last_hidden_state))
        ),
        with_kwargs=True,
    )
    expected = target.generate(**given, **GREEDY, eos_token_id=ends)
    widths.clear()
    out = target.generate(**given, **GREEDY, eos_token_id=ends, **spec(draft))
    hook.remove()
    assert out.equal(expected)
    assert all(rows == encoded for rows, encoded in widths)
    assert (6, 6) in widths and any(1 < rows < 6 for rows, _ in widths)


# The decoder's first tokens


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["t5", "mbart", "whisper"])
def test_decoder_prompts(name: str, batch: int) -> None:
    prompt = torch.randint(3, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(7))
    prompt[:, 0] = START
    out = assert_lossless(pair(name), {**inputs(name, batch), "decoder_input_ids": prompt}, lambda: dict(GREEDY), (4,))
    assert out[:, :5].equal(prompt) or name == "whisper"  # which returns only new tokens


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_padded_decoder_prompts(name: str, batch: int) -> None:
    """Whisper counts real tokens, BART columns: both as in vanilla."""
    prompt = torch.randint(3, VOCAB, (batch, 6), generator=torch.Generator().manual_seed(8))
    mask = (torch.arange(6) >= torch.tensor([2, 0, 4, 1][:batch])[:, None]).long()
    given = {**inputs(name, batch), "decoder_input_ids": prompt * mask, "decoder_attention_mask": mask}
    # If prompts begin with a start token, transformers adds no other.
    out = assert_lossless(pair(name), given, lambda: {**GREEDY, "decoder_start_token_id": 0}, (1, 4))
    assert out.shape[1] == (NEW_TOKENS if name == "whisper" else 6 + NEW_TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {"forced_bos_token_id": 9},
        {"decoder_start_token_id": 11},
        {"encoder_repetition_penalty": 1.6},
        {"encoder_no_repeat_ngram_size": 1, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5, "min_new_tokens": 8, "forced_eos_token_id": 5},
        {"bad_words_ids": [[80], [30, 75], [39]], "suppress_tokens": [12, 13]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_generate(options: dict[str, Any]) -> None:
    for batch in (1, 4):
        out = assert_lossless(pair("mbart"), inputs("mbart", batch), lambda: {**GREEDY, **options}, (4,))
        plain = pair("mbart")[0].generate(**inputs("mbart", batch), **GREEDY)
        assert not out.equal(plain), "the option does nothing here"


# Stopping and streaming


class EndsAt(StoppingCriteria):
    """An unknown criterion: ends a row after a token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_stopping_is_exact(name: str) -> None:
    target, _ = pair(name)
    for batch in (1, 4):
        given = inputs(name, batch)
        token = int(target.generate(**given, **GREEDY)[0, 7])
        criteria = {"stopping_criteria": StoppingCriteriaList([EndsAt(token)])}
        for options in ({"eos_token_id": token}, criteria, {"eos_token_id": token, **criteria}):
            assert_lossless(pair(name), {**given, **options}, lambda: dict(GREEDY), (4,))


def test_streamers_hear_the_decoder() -> None:
    target, draft = pair("bart")
    heard = []
    for way in ({}, spec(draft)):
        streamer = Heard()
        target.generate(**inputs("bart", 1), **GREEDY, streamer=streamer, **way)
        assert streamer.ended
        heard.append(streamer.values)
    assert heard[0] == heard[1]
    assert heard[0][0] == [START]


# Outputs


OUTPUTS: dict[str, Any] = {
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True,
    "output_attentions": True,
}  # fmt: skip


def assert_same(ours: Any, theirs: Any, name: str) -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")
        return
    assert type(ours) is type(theirs) and (ours is None or len(ours) == len(theirs)), name
    for i, (mine, other) in enumerate(zip(ours or (), theirs or ())):
        assert_same(mine, other, f"{name}[{i}]")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_outputs_are_those_of_transformers(name: str, batch: int) -> None:
    target = make(name, attn_implementation="eager")
    draft = perturbed(target, MADE[name][1])
    given = {**inputs(name, batch), "decoder_input_ids": torch.tensor([[START, 5, 6]]).expand(batch, -1)}
    theirs = target.generate(**given, **GREEDY, **OUTPUTS)
    ours = target.generate(**given, **GREEDY, **OUTPUTS, **spec(draft))
    fields = ("sequences", "scores", "logits", "encoder_attentions", "encoder_hidden_states", "decoder_attentions")
    for field in (*fields, "cross_attentions", "decoder_hidden_states"):
        assert theirs[field] is not None, field
        assert_same(ours[field], theirs[field], field)
    if name == "whisper":  # it takes outputs and cache apart
        return
    assert type(ours) is GenerateEncoderDecoderOutput
    assert ours.speculation.acceptance_rate > 0
    for half in ("self_attention_cache", "cross_attention_cache"):
        layers = zip(getattr(ours.past_key_values, half).layers, getattr(theirs.past_key_values, half).layers)
        for mine, other in layers:
            assert_same(mine.keys, other.keys, half)
            assert_same(mine.values, other.values, half)
    assert ours.past_key_values.is_updated == theirs.past_key_values.is_updated


def test_returned_caches_of_rows_that_ended_early() -> None:
    target, draft = pair("bart")
    given = inputs("bart", 6)
    free = target.generate(**given, **GREEDY)
    options = {**GREEDY, "eos_token_id": [int(free[0, 4]), int(free[2, 9])], "return_dict_in_generate": True}
    theirs, ours = target.generate(**given, **options), target.generate(**given, **options, **spec(draft))
    assert ours.sequences.equal(theirs.sequences)
    for half in ("self_attention_cache", "cross_attention_cache"):
        for mine, other in zip(getattr(ours.past_key_values, half), getattr(theirs.past_key_values, half)):
            assert_same(mine[:2], other[:2], half)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_returned_cache_goes_on(name: str, batch: int) -> None:
    """The next call begins where the last one ended, with our caches or vanilla's."""
    target, draft = pair(name)
    given = inputs(name, batch)
    whole = target.generate(**given, max_new_tokens=16, do_sample=False)
    for first, second in (({}, spec(draft)), (spec(draft), {}), (spec(draft), spec(draft))):
        begun = target.generate(**given, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **first)
        mask = torch.ones_like(begun.sequences)
        out = target.generate(
            **given,
            decoder_input_ids=begun.sequences,
            decoder_attention_mask=mask,
            past_key_values=begun.past_key_values,
            max_new_tokens=8,
            do_sample=False,
            **second,
        )
        assert out.equal(whole)
        assert begun.past_key_values.get_seq_length() == 16


def test_cache_implementations() -> None:
    for name in ("bart", "whisper"):
        assert_lossless(pair(name), inputs(name, 3), lambda: {**GREEDY, "cache_implementation": "static"}, (4,))


# Drafts


class EncoderCalls:
    """Counts the forwards of a model's encoder."""

    def __init__(self, model: PreTrainedModel):
        self.count = 0
        self._hook = model.get_encoder().register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += 1
        self.mask = kwargs.get("attention_mask")

    def __enter__(self) -> "EncoderCalls":
        return self

    def __exit__(self, *args: Any) -> None:
        self._hook.remove()


def test_a_draft_runs_its_own_encoder_once() -> None:
    target, draft = pair("bart")
    with EncoderCalls(target) as ours, EncoderCalls(draft) as its:
        target.generate(**inputs("bart", 4), **GREEDY, **spec(draft))
    assert (ours.count, its.count) == (1, 1)
    assert its.mask is not None and its.mask.equal(inputs("bart", 4)["attention_mask"])


def test_a_draft_with_the_encoder_of_the_target_does_not_run_it_again() -> None:
    target, draft = copy.deepcopy(pair("bart"))
    draft.model.encoder = copy.deepcopy(target.model.encoder)
    with EncoderCalls(target) as calls, EncoderCalls(draft) as its:
        assert_lossless((target, draft), inputs("bart", 4), lambda: dict(GREEDY), (4,))
    assert (calls.count, its.count) == (3, 0)  # vanilla, a draft, look-up


def test_the_encoder_makes_the_draft_better() -> None:
    """An unperturbed copy as the draft is always right, which needs its encoder outputs, its mask and its cache."""
    for name in FAMILIES:
        target, _ = pair(name)
        stats = hf_specdec.SpeculationStats()
        target.generate(**inputs(name, 4), **GREEDY, **spec(copy.deepcopy(target), speculation_stats=stats))
        assert stats.acceptance_rate == 1.0, name


def distilled() -> PreTrainedModel:
    """The decoder of the tiny Whisper without its encoder, perturbed: a draft like Distil-Whisper."""
    target, _ = pair("whisper")
    draft = WhisperForCausalLM(copy.deepcopy(target.config)).eval()
    weights = {name: w for name, w in target.state_dict().items() if name in draft.state_dict()}
    draft.load_state_dict(weights)
    return perturbed(draft, MADE["whisper"][1])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_decoder_alone_shares_the_encoder_outputs_of_the_target(batch: int) -> None:
    target, draft = pair("whisper")[0], distilled()
    given = inputs("whisper", batch)
    assert_lossless((target, draft), given, lambda: dict(GREEDY), (1, 2, 4, 7))
    stats = hf_specdec.SpeculationStats()
    target.generate(**given, **GREEDY, **spec(draft, 1, speculation_stats=stats))
    assert 0.1 < stats.acceptance_rate < 0.95
    rate = stats.acceptance_rate
    stats = hf_specdec.SpeculationStats()
    target.generate(**given, **GREEDY, **spec(perturbed(draft, 0.0), 1, speculation_stats=stats))
    assert stats.acceptance_rate == rate
    assert hasattr(draft.generation_config, "force_unique_generate_call") is False


def test_a_decoder_alone_as_the_target_is_not_told_positions_that_vanilla_does_not_tell() -> None:
    target = distilled()
    for batch in (1, 4):
        assert_lossless((target, perturbed(target, 0.05)), make_prompts(batch), lambda: dict(GREEDY), (4,))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_a_causal_language_model_drafts_from_the_decoder_tokens_alone(name: str) -> None:
    draft = make_model(LlamaConfig(**SIZES))
    for batch in (1, 4):
        assert_lossless((pair(name)[0], draft), inputs(name, batch), lambda: dict(GREEDY), (1, 4))


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_drafts_by_name_keep_their_encoder(name: str, tmp_path: Path) -> None:
    target, draft = pair(name)
    draft.save_pretrained(tmp_path)
    stats = [hf_specdec.SpeculationStats(), hf_specdec.SpeculationStats()]
    for assistant, filled in zip((draft, str(tmp_path)), stats):
        target.generate(**inputs(name, 1), **GREEDY, **spec(assistant, speculation_stats=filled))
    assert stats[0].accepted_tokens == stats[1].accepted_tokens > 0


def test_encoder_outputs_of_the_user() -> None:
    target, draft = copy.deepcopy(pair("mbart"))
    given = inputs("mbart", 4)
    expected = target.generate(**given, **GREEDY)
    with torch.no_grad():
        outputs = target.get_encoder()(**given)

    def generate(**kwargs: Any) -> torch.Tensor:
        mask = given["attention_mask"]
        return target.generate(encoder_outputs=outputs, attention_mask=mask, **GREEDY, **kwargs)

    assert generate(input_ids=given["input_ids"], **spec(draft)).equal(expected)
    assert generate(strategy="spec", prompt_lookup_num_tokens=3).equal(expected)
    message = "has its own encoder, but `encoder_outputs` were given without .*pass `input_ids` as well"
    with pytest.raises(ValueError, match=message):
        generate(**spec(draft))
    draft.model.encoder = target.model.encoder
    assert generate(**spec(draft)).equal(expected)


def test_drafts_that_do_not_fit_are_refused_by_name() -> None:
    bart, whisper = pair("bart")[0], pair("whisper")[0]
    with pytest.raises(ValueError, match=r"\(BartFor.*\) encodes `input_ids`, but the target's .* `input_features`"):
        whisper.generate(**inputs("whisper", 1), **GREEDY, **spec(bart))
    narrow = WhisperForCausalLM(WhisperConfig(**{**AUDIO, "d_model": 16})).eval()
    with pytest.raises(ValueError, match="attends to encoder outputs of width 16, but the target's encoder gives 32"):
        whisper.generate(**inputs("whisper", 1), **GREEDY, **spec(narrow))
    llama = make_model(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"BartFor.* is an encoder-decoder model: the target \(Llama.*\) has no"):
        llama.generate(inputs("bart", 1)["input_ids"], **GREEDY, **spec(bart))
    embeds = bart.get_input_embeddings()(inputs("bart", 1)["input_ids"])
    with pytest.raises(ValueError, match="encodes `input_ids`, but the target's encoder was given `inputs_embeds`"):
        bart.generate(inputs_embeds=embeds, **GREEDY, **spec(pair("bart")[1]))
    expected = bart.generate(inputs_embeds=embeds, **GREEDY)
    assert bart.generate(inputs_embeds=embeds, **GREEDY, strategy="spec").equal(expected)


# Decoders that cannot be verified in blocks


def test_decoders_without_a_causal_mask_on_a_cache_are_refused() -> None:
    config = FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3,
        bos_token_id=1, pad_token_id=0, eos_token_id=None, decoder_start_token_id=START,
    )  # fmt: skip
    torch.manual_seed(0)
    target = FSMTForConditionalGeneration(config).eval()
    message = r"decoder of the target \(FSMT.*\) lets a token attend to later tokens .*so drafts cannot be verified"
    with pytest.raises(ValueError, match=message):
        target.generate(**inputs("bart", 1), **GREEDY, strategy="spec", num_beams=1)


class Oracle(hf_specdec.Drafter):
    """Proposes vanilla's tokens."""

    def __init__(self, truth: torch.Tensor):
        self.truth = torch.nn.functional.pad(truth, (0, 8), value=3)

    def propose(self, context: Context, max_tokens: int) -> hf_specdec.Draft:
        starts = [context.ends[row] for row in context.rows]
        return hf_specdec.Draft(torch.stack([self.truth[r, s : s + max_tokens] for r, s in zip(context.rows, starts)]))


@pytest.mark.parametrize(("batch", "seed"), [(1, 4), (4, 0), (4, 3)])
def test_decoders_that_do_not_count_padding_as_positions(batch: int, seed: int) -> None:
    """In M2M100 a padding token takes no position, but only among tokens fed with it: nothing may follow it."""
    torch.manual_seed(seed)
    target = M2M100ForConditionalGeneration(M2M100Config(**{**TEXT, "init_std": 0.5})).eval()
    target.generation_config.max_length = None
    options = {**GREEDY, "sequence_bias": {(0,): 4.0}, "pad_token_id": 0}
    expected = target.generate(**inputs("bart", batch), **options)
    assert (expected == 0).any()
    stats = hf_specdec.SpeculationStats()
    out = target.generate(**inputs("bart", batch), **options, **spec(Oracle(expected), speculation_stats=stats))
    assert out.equal(expected)
    assert stats.accepted_tokens > 0


def test_decoders_that_keep_no_cache_are_refused() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    halves = BertConfig(**sizes, intermediate_size=64), BertConfig(**sizes, intermediate_size=64)
    config = EncoderDecoderConfig(encoder=halves[0].to_dict(), decoder=halves[1].to_dict(), pad_token_id=0)
    target = EncoderDecoderModel(config).eval()  # whose decoder is not configured as one
    with pytest.raises(ValueError, match=r"\(EncoderDecoderModel\) .*, so drafts cannot be verified"):
        target.generate(**inputs("bart", 1), **GREEDY, strategy="spec", decoder_start_token_id=START)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_what_must_hold_after_each_iteration_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_specdec.loop.invariants, "ENABLED", True)
    target, draft = pair(name)
    target.generate(**inputs(name, 3), **GREEDY, **spec(draft))


# Sampling

SMALL = 7  # tokens in the vocabulary
SAMPLED = 3  # tokens
ALPHA = 1e-4  # probability of a false alarm in each of these tests, if its seed were not fixed


@functools.cache
def small_pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    sizes = {"vocab_size": SMALL, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.5}
    torch.manual_seed(3)
    if name == "whisper":
        target: PreTrainedModel = WhisperForConditionalGeneration(WhisperConfig(**{**AUDIO, **sizes})).eval()
    else:
        target = BartForConditionalGeneration(BartConfig(**{**TEXT, **sizes})).eval()
    target.generation_config.max_length = None
    return target, perturbed(target, 0.5)


def sampling_inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "whisper":
        return inputs(name, 1)
    return {"input_ids": torch.tensor([[3, 4, 5, 6], [6, 3, 0, 0]])[:1]}


@torch.no_grad()
def exact_law(model: PreTrainedModel, given: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """`[SMALL ** SAMPLED]` probabilities of all outputs."""
    law, ids = torch.ones(1, dtype=torch.float64), torch.tensor([[START]])
    for _ in range(SAMPLED):
        rows = {name: value.expand(len(ids), *value.shape[1:]) for name, value in given.items()}
        logits = model(**rows, decoder_input_ids=ids).logits[:, -1].double()
        law = (law[:, None] * (logits / temperature).softmax(-1)).flatten()
        tokens = torch.arange(SMALL).repeat(len(ids))[:, None]
        ids = torch.cat([ids.repeat_interleave(SMALL, dim=0), tokens], dim=1)
    return law


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Of a chi-squared test; outcomes expected fewer than five times are pooled."""
    expected = law * counts.sum()
    rare = expected < 5
    groups = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected)]
    statistic = ((groups[0] - groups[1]) ** 2 / groups[1].clamp(min=1e-9)).sum()
    return float(scipy.stats.chi2.sf(float(statistic), len(groups[0]) - 1))


def sampled(name: str, rows: int, calls: int, **way: Any) -> torch.Tensor:
    """How often each output was drawn."""
    target, _ = small_pair(name)
    counts = torch.zeros(SMALL**SAMPLED, dtype=torch.long)
    powers = SMALL ** torch.arange(SAMPLED - 1, -1, -1)
    for call in range(calls):
        torch.manual_seed(call)
        options = {"max_new_tokens": SAMPLED, "do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 1.0}
        # Whisper's own generate() would remove padding, which is an ordinary token here.
        out = GenerationMixin.generate(target, **sampling_inputs(name), **options, num_return_sequences=rows, **way)
        assert len(out) == rows
        counts += torch.bincount((out[:, -SAMPLED:] * powers).sum(1), minlength=len(counts))
    return counts


@pytest.mark.parametrize(("name", "rows", "calls"), [("whisper", 1500, 2), ("bart", 2, 350)])
def test_samples_are_drawn_from_the_law_of_the_target(name: str, rows: int, calls: int) -> None:
    """Rows at their own pace in large batches, and rows in lockstep, which accept together, in small ones."""
    target, draft = small_pair(name)
    law = exact_law(target, sampling_inputs(name), 1.3)
    stats = hf_specdec.SpeculationStats()
    counts = sampled(name, rows, calls, **spec(draft, 2, speculation_stats=stats))
    assert 0.1 < stats.acceptance_rate < 0.95
    assert p_value(counts, law) > ALPHA
    other = exact_law(draft, sampling_inputs(name), 1.3)
    assert p_value(counts, other) < 1e-9, "the test could not tell the draft's law from the target's"


def test_copies_of_a_row_share_its_encoder_outputs() -> None:
    target, draft = pair("bart")
    given = inputs("bart", 3)
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    expected = target.generate(**given, **options)
    with EncoderCalls(draft) as calls:
        assert target.generate(**given, **options, **spec(draft)).equal(expected)
    assert calls.count == 1


# Whisper's own generate()


@pytest.fixture
def whisper() -> tuple[PreTrainedModel, PreTrainedModel]:
    """With the generation config of a multilingual model: start tokens, suppressed tokens, timestamps from 60 on."""
    target, draft = copy.deepcopy(pair("whisper"))
    for model in (target, draft):
        config = model.generation_config
        for key, value in {
            "is_multilingual": True, "lang_to_id": {"<|en|>": 50, "<|de|>": 51}, "task_to_id": {"transcribe": 52},
            "no_timestamps_token_id": 59, "suppress_tokens": [7, 8], "begin_suppress_tokens": [9, 5],
            "eos_token_id": 5, "prev_sot_token_id": 58, "max_initial_timestamp_index": 30,
            "decoder_start_token_id": START, "return_timestamps": False,
        }.items():  # fmt: skip
            setattr(config, key, value)
    return target, draft


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"return_timestamps": True}, {"language": "de"}], ids=str)
def test_whisper_says_what_it_said_without_a_draft(
    whisper: tuple[PreTrainedModel, PreTrainedModel], batch: int, options: dict[str, Any]
) -> None:
    """With a draft given, transformers would allow a first token that it otherwise suppresses."""
    target, draft = whisper
    first = pair("whisper")[0].generate(**inputs("whisper", batch), max_new_tokens=1, do_sample=False)
    target.generation_config.begin_suppress_tokens = [5, *first[:, -1].tolist()]
    fresh = {"max_new_tokens": 16, "do_sample": False, "language": "en", "task": "transcribe"} | options
    before = draft.generation_config.to_dict()
    assert_lossless((target, draft), inputs("whisper", batch), lambda: dict(fresh), (4,))
    assert draft.generation_config.to_dict() == before


def test_whisper_with_temperature_fallback_and_silence_detection(
    whisper: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """Its processor for silence has state, so it is called as in vanilla."""
    target, draft = whisper
    options = {
        "max_new_tokens": 16, "language": "en", "task": "transcribe", "return_timestamps": True,
        "temperature": (0.0,), "compression_ratio_threshold": 1.0, "logprob_threshold": -1.0,
        "no_speech_threshold": 0.6,
    }  # fmt: skip
    for batch in (1, 2):
        assert_lossless((target, draft), inputs("whisper", batch), lambda: dict(options), (4,))


def test_whisper_long_form(whisper: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = whisper
    features = torch.randn(2, 8, 130, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, 90:] = 0
    options = {
        "max_new_tokens": 16, "do_sample": False, "language": "en", "task": "transcribe", "return_timestamps": True,
        "condition_on_prev_tokens": True, "temperature": 0.0,
    }  # fmt: skip
    assert_lossless((target, draft), {"input_features": features, "attention_mask": mask}, lambda: dict(options), (4,))


# Prompt look-up


def test_prompt_lookup_reads_what_the_encoder_was_given() -> None:
    """Summaries quote their source: in row 0, [5] comes before [9, 8]; row 1 has it only in its padding."""
    ids = torch.tensor([[3, 5, 9, 8, 0], [4, 6, 7, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    module = torch.nn.Identity()
    encoder = EncoderSide(None, mask, more={}, inputs=ids, input_name="input_ids", module=module, batch_size=2)
    drafter = PromptLookupDrafter(max_matching_ngram_size=2)
    context = Context(torch.tensor([[0, START, 5], [START, 11, 5]]), first=[1, 0], max_length=20, pad_token_id=0)
    drafter.start(DraftRequest(Greedy(), VOCAB, encoder=encoder), context)
    draft = drafter.propose(context, 4)
    assert draft.row_lengths == [2, 0]
    assert draft.tokens[0, :2].tolist() == [9, 8]
