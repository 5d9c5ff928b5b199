"""Models and prompts in unusual modes: as in vanilla, or an error with the reason and a way out."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SIZES, VOCAB, assert_lossless, make_model, make_pair, make_prompts, perturbed
from transformers import (
    BloomConfig,
    Gemma3nTextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec import device, options
from hf_specdec.generate import session
from hf_specdec.models import checks

SMALL = {**SIZES, "num_hidden_layers": 1}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that the test may change."""
    target = make_model(LlamaConfig(**SMALL), seed=12)
    return target, perturbed(target, 0.08, seed=13)


def spec(draft: Any, **options: Any) -> dict[str, Any]:
    return {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 4, **options}


def generate(target: PreTrainedModel, batch: int = 1, **kwargs: Any) -> Any:
    return target.generate(**make_prompts(batch), **{**GREEDY, **kwargs})


def no_forward(model: PreTrainedModel) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a forward was made")

    model.register_forward_pre_hook(fail)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages that are logged once."""
    messages: list[str] = []

    def warning_once(message: str) -> None:
        if message not in messages:
            messages.append(message)

    for module in (checks, session):
        monkeypatch.setattr(module.logger, "warning_once", warning_once)
    return messages


# Gradient checkpointing


def switch_on(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable()
    model.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("batch", [1, 3])
def test_checkpointing_in_train_mode_is_refused_before_any_forward(pair, batch):
    target, draft = pair
    switch_on(draft)
    no_forward(draft)
    fix = r"`assistant_model.gradient_checkpointing_disable\(\)`, or `assistant_model.eval\(\)`"
    with pytest.raises(ValueError, match=rf"`layers.0` in the decoder of `assistant_model` \(LlamaFor.*{fix}"):
        generate(target, batch, **spec(draft))
    switch_on(target)
    no_forward(target)
    fix = r"`model.gradient_checkpointing_disable\(\)`, or `model.eval\(\)`"
    for way in ({"strategy": "spec"}, {"custom_generate": hf_specdec.speculative()}):
        with pytest.raises(ValueError, match=f"Gradient checkpointing is on .*{fix}"):
            generate(target, batch, **way)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_in_eval_mode_works(pair):
    for model in pair:
        switch_on(model)
        model.eval()
    assert_lossless(pair, {**make_prompts(3), **GREEDY}, gammas=(4,))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), BloomConfig(
    vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)], ids=["llama", "bloom"])  # fmt: skip
def test_checkpointing_counts_layer_by_layer(config):
    target = make_model(config)
    target.gradient_checkpointing_enable()
    layers = [m for m in target.modules() if type(m).__name__ in ("LlamaDecoderLayer", "BloomBlock")]
    layers[1].train()
    with pytest.raises(ValueError, match=r"`\w+.1` in the decoder of the model"):
        generate(target, strategy="spec")
    layers[1].gradient_checkpointing = False
    assert generate(target, strategy="spec").tolist() == generate(target).tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_encoder_may_be_checkpointed_in_train_mode():
    target = t5()
    target.gradient_checkpointing_enable()
    target.encoder.train()  # without a cache; without dropout it computes the same
    given = {"input_ids": make_prompts(1)["input_ids"], **GREEDY}
    assert target.generate(**given, strategy="spec").tolist() == target.generate(**given).tolist()
    target.decoder.train()
    with pytest.raises(ValueError, match=r"`block.0` in the decoder of the model \(T5For"):
        target.generate(**given, strategy="spec")


def t5(**changes: Any) -> PreTrainedModel:
    config = T5Config(**{**{
        "vocab_size": VOCAB, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0,
        "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1, "initializer_factor": 2.0,
    }, **changes})  # fmt: skip
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).eval()


# Prompts of other integer types


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def test_int32_ids_give_vanillas_tokens_in_int64(pair):
    for batch, more in ((1, {}), (3, {}), (2, {"num_return_sequences": 2, "do_sample": True, "top_k": 1})):
        given = {**make_prompts(batch), **GREEDY, **more}
        given["input_ids"] = given["input_ids"].int()
        expected = assert_lossless(pair, given, gammas=(4,))
        assert expected.dtype == torch.int64
        for way in (spec(pair[1]), {"strategy": "spec", "prompt_lookup_num_tokens": 3}):
            assert pair[0].generate(**given, **way).dtype == torch.int64


def test_int32_ids_with_a_cache_and_a_streamer(pair):
    target, draft = pair
    given = {"input_ids": make_prompts(1)["input_ids"].int(), **GREEDY}
    begun = target.generate(**given, return_dict_in_generate=True)
    longer = begun.sequences.int()
    expected = target.generate(longer, past_key_values=copy.deepcopy(begun.past_key_values), **GREEDY)
    ours = target.generate(longer, past_key_values=begun.past_key_values, **GREEDY, **spec(draft))
    assert ours.dtype == torch.int64 and ours.tolist() == expected.tolist()
    heard = []
    for way in ({}, spec(draft)):
        streamer = Heard()
        target.generate(**given, **way, streamer=streamer)
        heard.append(streamer.values)
    assert heard[0] == heard[1]


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_narrower_ids_are_read_as_ids(pair, dtype):
    """Vanilla's embedding does not accept them."""
    target, draft = pair
    given = make_prompts(3)
    expected = target.generate(**given, **GREEDY)
    given["input_ids"] = given["input_ids"].to(dtype)
    for way in (spec(draft), {"strategy": "spec", "prompt_lookup_num_tokens": 3}):
        ours = target.generate(**given, **GREEDY, **way)
        assert ours.dtype == torch.int64 and ours.tolist() == expected.tolist()


def test_int32_ids_of_encoder_and_decoder():
    target = t5()
    ids = make_prompts(2)["input_ids"].int()
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :3], **GREEDY}
    assert_lossless((target, perturbed(target, 0.1)), given, gammas=(4,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers_are_refused(pair, dtype):
    with pytest.raises(TypeError, match=f"`input_ids` must hold token ids, but their dtype is {dtype}"):
        pair[0].generate(make_prompts(1)["input_ids"].to(dtype), **GREEDY, **spec(pair[1]))


# Logits that are not a distribution, or are constant


class Renamed(LlamaForCausalLM):
    pass


@pytest.fixture
def default_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(options.DEFAULTS, "num_assistant_tokens_schedule", None)


@pytest.mark.usefixtures("default_schedule")
@pytest.mark.parametrize("gamma", [None, 3], ids=["default", "constant"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("spoil", [float("nan"), 1e38], ids=["nan", "overflow"])
def test_the_class_of_a_draft_without_a_distribution_is_named(pair, spoil, do_sample, gamma):
    target, draft = pair
    draft.__class__ = Renamed
    with torch.no_grad():
        draft.lm_head.weight[7:9] *= spoil
        draft.lm_head.weight[7:9] *= 1e6 if spoil == 1e38 else 1
    for batch in (1, 3):
        with pytest.raises(ValueError, match=r"The draft model \(Renamed\) gave no distribution"):
            generate(target, batch, **spec(draft, num_assistant_tokens=gamma, do_sample=do_sample))


@pytest.mark.usefixtures("default_schedule")
@pytest.mark.parametrize("gamma", [None, 3], ids=["default", "constant"])
def test_the_class_of_a_target_without_a_distribution_is_named(pair, gamma):
    target, draft = pair
    target.__class__ = Renamed
    with torch.no_grad():
        target.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"The target model \(Renamed\) gave no distribution"):
        generate(target, **spec(draft, num_assistant_tokens=gamma))


@pytest.mark.parametrize("batch", [1, 3])
def test_constant_logits_are_fine(pair, batch):
    target, draft = pair
    with torch.no_grad():
        target.lm_head.weight.zero_()
    expected = generate(target, batch).tolist()
    for way in (spec(draft), spec(target), {"strategy": "spec"}):
        assert generate(target, batch, **way).tolist() == expected


def test_constant_logits_of_an_encoder_decoder_are_fine():
    target = t5(tie_word_embeddings=False)
    with torch.no_grad():
        target.lm_head.weight.zero_()
    given = {"input_ids": make_prompts(2)["input_ids"], **GREEDY}
    assert target.generate(**given, strategy="spec").tolist() == target.generate(**given).tolist()


# Encoders with other inputs


def whisper(seed: int = 0, **changes: Any) -> PreTrainedModel:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_target_positions": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    inputs = {"max_source_positions": 50, "num_mel_bins": 16, **changes}
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=VOCAB, **sizes, **heads, **ids, **inputs, suppress_tokens=None, begin_suppress_tokens=None
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.no_timestamps_token_id = 90
    return model


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_mel_bins": 24}, r"num_mel_bins 24 \(target: 16\)"),
        ({"max_source_positions": 25}, r"max_source_positions 25 \(target: 50\)"),
        ({"num_mel_bins": 8, "max_source_positions": 60}, r"max_source_positions 60 .*, num_mel_bins 8 \(target: 16\)"),
    ],
)
def test_what_differs_between_the_inputs_of_encoders_is_said(changes, difference):
    features = torch.randn(1, 16, 100)
    match = r"The encoder of `assistant_model` \(Whisper.* cannot read .*`input_features` of shape \[1, 16, 100\] .*"
    with pytest.raises(ValueError, match=f"{match}config has {difference}. Use a draft") as error:
        whisper().generate(input_features=features, max_new_tokens=6, **spec(whisper(1, **changes)))
    assert error.value.__cause__ is not None
    whisper().generate(input_features=features, max_new_tokens=6, **spec(whisper(1)))


def test_ids_beyond_the_vocabulary_of_the_drafts_encoder():
    target, draft = t5(), t5()
    draft.encoder.embed_tokens = torch.nn.Embedding(20, 32)
    with pytest.raises(ValueError, match=r"The encoder of `assistant_model` \(T5.* `input_ids` of shape \[1, 14\]"):
        target.generate(make_prompts(1)["input_ids"], **GREEDY, **spec(draft))


# A `forward` with a hidden signature


def hidden(model: PreTrainedModel, *wraps: Callable[..., Any]) -> PreTrainedModel:
    forward = model.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = functools.wraps(forward)(wrapper) if wraps else wrapper
    return model


class NamesNothing(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class NamesNoPositions(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


def of_class(cls: type) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def change(model: PreTrainedModel) -> PreTrainedModel:
        model.__class__ = cls
        return model

    return change


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (hidden, "`past_key_values`, `position_ids`, `logits_to_keep`"),
        (of_class(NamesNothing), "`past_key_values`, `position_ids`, `logits_to_keep`"),
        (of_class(NamesNoPositions), "`position_ids`, `logits_to_keep`"),
    ],
    ids=["wrapper", "subclass", "in part"],
)
def test_a_forward_that_hides_its_inputs_is_said_to_be_slow(log, wrap, names):
    target, draft = make_pair("llama")
    for role, models in (
        ("the model", (wrap(copy.deepcopy(target)), draft)),
        ("`assistant_model`", (target, wrap(copy.deepcopy(draft)))),
    ):
        log.clear()
        for batch in (1, 3):
            assert_lossless(models, {**make_prompts(batch), **GREEDY}, gammas=(4,))
        said = [message for message in log if "functools.wraps" in message]
        assert len(said) == 1, log
        assert said[0].startswith(f"strategy='spec' is slow with {role} (") and f"does not name {names}." in said[0]
        assert not any("carries its own state" in message for message in log)


def test_a_forward_with_the_signature_of_what_it_wraps_is_as_fast(log, pair):
    target, draft = pair
    signed = hidden(copy.deepcopy(target))
    signed.forward.__signature__ = device.inspect.signature(type(target).forward.__get__(target))
    for models in ((hidden(target, functools.wraps), draft), (signed, draft), (target, hidden(draft, functools.wraps))):
        assert_lossless(models, {**make_prompts(3), **GREEDY}, gammas=(4,))
    assert log == []


# Configs


@pytest.mark.parametrize("where", ["generation config", "the call's", "loaded"])
def test_a_config_without_a_cache_is_overruled_by_the_call(pair, where, tmp_path):
    target, draft = pair
    given: dict[str, Any] = {}
    if where == "generation config":
        target.generation_config.use_cache = False
    elif where == "the call's":
        given["generation_config"] = GenerationConfig(use_cache=False, pad_token_id=0)
    else:
        target.config.use_cache = False
        target.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        target = type(target).from_pretrained(tmp_path).eval()
        target.generation_config.pad_token_id = 0
    for way in (spec(draft), {"custom_generate": hf_specdec.speculative(draft, num_assistant_tokens=4)}):
        with pytest.raises(ValueError, match="`use_cache` is False: a config says so; pass `use_cache=True`"):
            generate(target, **given, **way)
        with pytest.raises(ValueError, match="`use_cache` is False: drop that argument"):
            generate(target, use_cache=False, **way)
        assert generate(target, **given, **way, use_cache=True).tolist() == generate(target).tolist()


def test_configs_of_a_draft_may_ask_for_anything(pair):
    _, draft = pair
    draft.set_attn_implementation("eager")
    draft.config.use_cache = draft.generation_config.use_cache = False
    draft.config.output_hidden_states = draft.config.output_attentions = True
    draft.generation_config.return_dict_in_generate = True
    assert_lossless(pair, {**make_prompts(3), **GREEDY}, gammas=(4,))


def test_tuples_instead_of_outputs_are_refused_where_the_models_code_cannot_live_with_them(pair):
    target, draft = pair
    for model, variable, way in ((draft, "assistant_model", spec(draft)), (target, "model", {"strategy": "spec"})):
        model.config.return_dict = False
        with pytest.raises(ValueError, match=f"`{variable}.config.return_dict` is False, .*set it to True") as error:
            generate(target, **way)
        assert isinstance(error.value.__cause__, AttributeError)
        model.config.return_dict = True


def test_tuples_instead_of_outputs_work_where_vanilla_works():
    pair = make_pair("gpt_neox")
    for model in pair:
        model.config.return_dict = False
        forward = type(model.gpt_neox).forward.__get__(model.gpt_neox)
        model.gpt_neox.forward = functools.wraps(forward)(functools.partial(forward, return_dict=True))
    assert_lossless(pair, {**make_prompts(3), **GREEDY}, gammas=(4,))


# Wrapped models


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, "own"])
def test_a_wrapper_around_a_draft_is_refused_with_the_model_inside(pair, wrapper):
    class Engine(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def __getattr__(self, name: str) -> Any:  # as those of FSDP and DeepSpeed
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

    target, draft = pair
    wrapped = Engine(draft) if wrapper == "own" else wrapper(draft)
    match = (
        r"`assistant_model` is a \w+ around a LlamaForCausalLM: pass the model inside, `assistant_model=model.module`"
    )
    with pytest.raises(TypeError, match=match):
        generate(target, **spec(wrapped))
    assert generate(target, **spec(wrapped.module)).tolist() == generate(target).tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_models_are_taken_for_what_they_compile(pair, log):
    target, draft = pair
    with torch.compiler.set_stance("force_eager"):  # tests/cache/test_cache_kinds.py compiles
        assert_lossless((target, torch.compile(draft)), {**make_prompts(2), **GREEDY}, gammas=(3,))
        target.forward = torch.compile(target.forward)
        assert_lossless(pair, {**make_prompts(2), **GREEDY}, gammas=(3,))
    assert log == []
    draft.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"`layers.0` in the decoder of `assistant_model` \(OptimizedModule\)"):
        generate(target, **spec(torch.compile(draft.train())))


# Hidden states and attentions


def same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs):
            same(mine, other)
    elif theirs is not None:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


OUTPUTS: list[dict[str, Any]] = [
    {"output_hidden_states": [1]},
    {"output_hidden_states": [0, -1]},
    {"output_hidden_states": 2},
    {"output_attentions": True},  # of which sdpa gives none
]


@pytest.mark.parametrize("asked", OUTPUTS, ids=str)
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_layers_without_a_record_are_as_in_vanilla(asked, model):
    pair = make_pair("llama") if model == "llama" else (t5(num_layers=2), t5())
    given = {"input_ids": make_prompts(1)["input_ids"], **GREEDY, **asked, "return_dict_in_generate": True}
    theirs, ours = pair[0].generate(**given), pair[0].generate(**given, **spec(pair[1]))
    for kind in (
        ("hidden_states", "attentions") if model == "llama" else ("decoder_hidden_states", "decoder_attentions")
    ):
        same(getattr(ours, kind), getattr(theirs, kind))
    if model == "t5":
        same(ours.cross_attentions, theirs.cross_attentions)


@pytest.mark.parametrize("batch", [1, 3])
def test_configs_that_ask_for_outputs_are_answered_as_by_vanilla(batch):
    target, draft = make_pair("llama", attn_implementation="eager")
    target.config.output_hidden_states = target.config.output_attentions = True
    assert_lossless((target, draft), {**make_prompts(batch), **GREEDY}, gammas=(4,))
    theirs, ours = (generate(target, batch, return_dict_in_generate=True, **way) for way in ({}, spec(draft)))
    for kind in ("hidden_states", "attentions"):
        same(getattr(ours, kind), getattr(theirs, kind))
    target.generation_config.output_hidden_states = True
    theirs, ours = (generate(target, 1, return_dict_in_generate=True, **way) for way in ({}, spec(draft)))
    same(ours.hidden_states, theirs.hidden_states)


def test_hidden_states_of_several_streams_are_refused():
    config = Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 2}, head_dim=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4,
        hidden_size_per_layer_input=8, altup_num_inputs=3, num_kv_shared_layers=0, sliding_window=64,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    target = make_model(config)
    match = r"`output_hidden_states` .*record of Gemma3nForCausalLM: its hidden_states have the shape \[3, 1, \d+, 32\]"
    for batch in (1, 3):
        with pytest.raises(ValueError, match=match.replace("1, ", f"{batch}, ")):
            generate(target, batch, strategy="spec", output_hidden_states=True, return_dict_in_generate=True)
    assert generate(target, strategy="spec").tolist() == generate(target).tolist()
