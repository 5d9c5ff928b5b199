"""Invalid input raises an error that names it, before any forward, and leaves everything unchanged.

Input that assisted generation of transformers 5.23 gets wrong or rejects, and the file that tests it: batches, all
files; `num_return_sequences` and `inputs_embeds`, loop/test_outputs.py; static caches, models/test_graphs.py; recurrent
targets and drafts, beams, here; padded vocabularies, pairs/test_pair.py; stop strings and users' criteria,
loop/test_stopping.py; guidance and stateful processors, sampling/test_processors.py; argmax drafts under sampling,
sampling/test_acceptance.py, test_sampling.py; the "heuristic" schedule's changes to configs, test_strategy.py.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, VOCAB, make_model, make_pair, make_prompts, perturbed
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    LogitsProcessor,
    MambaConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from hf_specdec import SpeculationStats

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@functools.cache
def llamas() -> tuple[Any, Any]:
    return make_pair("llama", 0.04)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """Models of the test's own, because it may break them."""
    return copy.deepcopy(llamas())


def prompts(batch: int, width: int = 14) -> dict[str, Tensor]:
    return make_prompts(batch, width, seed=3)


def generate(target: Any, draft: Any, **kwargs: Any) -> Any:
    """With strategy='spec', which must really have run."""
    stats = SpeculationStats()
    kwargs = {**GREEDY, "speculation_stats": stats, **kwargs}
    out = target.generate(assistant_model=draft, strategy="spec", **kwargs)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return out


def state(*things: Any) -> list[Any]:
    """State that a failed call must not change: configs, generation configs, and train mode."""
    parts = []
    for thing in things:
        if isinstance(thing, torch.nn.Module) and hasattr(thing, "config"):
            configs = [thing.config, getattr(thing, "generation_config", None)]
            parts += [type(c) for c in configs] + [c and copy.deepcopy(c.to_dict()) for c in configs]
            parts += [c and set(vars(c)) for c in configs] + [
                thing.training,
                sum(p.numel() for p in thing.parameters()),
            ]
        if isinstance(thing, GenerationConfig):
            parts += [type(thing), copy.deepcopy(thing.to_dict())]
    return parts


def refused(target: Any, draft: Any, error: type[Exception], match: str, runs: bool = False, **kwargs: Any) -> str:
    """Check that this call raises an error, before any forward unless it `runs`, and leaves no traces.

    Returns: the whole message.
    """
    calls: list[str] = []
    seen = [thing for thing in (target, draft) if isinstance(thing, torch.nn.Module)]
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append(type(m).__name__)) for m in seen]
    kwargs = {**GREEDY, **prompts(1), "assistant_model": draft, "strategy": "spec", **kwargs}
    things = [target, draft, *kwargs.values()]
    before, prompt = state(*things), copy.deepcopy(kwargs["input_ids"])
    with pytest.raises(error, match=match) as raised:
        target.generate(**kwargs)
    assert runs or not calls, "a model has run before the refusal"
    for hook in hooks:
        hook.remove()
    assert state(*things) == before
    assert kwargs["input_ids"].equal(prompt)
    return str(raised.value)


def works(target: Any, draft: Any, **kwargs: Any) -> None:
    """An ordinary call gives vanilla's tokens."""
    kwargs = kwargs or prompts(2)
    vanilla = {name: value for name, value in kwargs.items() if name != "num_assistant_tokens"}
    assert generate(target, draft, **kwargs).equal(target.generate(**GREEDY | vanilla))


# Options

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_assistant_tokens": 0}, ValueError, "`num_assistant_tokens` must be at least 1, got 0"),
    ({"num_assistant_tokens": -1}, ValueError, "`num_assistant_tokens` must be at least 1, got -1"),
    ({"num_assistant_tokens": 2.5}, TypeError, "`num_assistant_tokens` must be an int, got 2.5 of type float"),
    ({"num_assistant_tokens": True}, TypeError, "`num_assistant_tokens` must be an int, got True of type bool"),
    ({"max_matching_ngram_size": 0}, ValueError, "`max_matching_ngram_size` must be at least 1, got 0"),
    (
        {"num_assistant_tokens_schedule": "linear"},
        ValueError,
        "`num_assistant_tokens_schedule` must be one of optimal, constant, heuristic, .*got 'linear'",
    ),
    (
        {"assistant_confidence_threshold": 1.5},
        ValueError,
        "`assistant_confidence_threshold` .*between 0 and 1, got 1.5",
    ),
    ({"assistant_confidence_threshold": -0.1}, ValueError, "`assistant_confidence_threshold` .*, got -0.1"),
    ({"assistant_confidence_threshold": float("nan")}, ValueError, "`assistant_confidence_threshold` .*, got nan"),
    (
        {"assistant_confidence_threshold": "0.5"},
        TypeError,
        "`assistant_confidence_threshold` must be a number, got '0.5'",
    ),
    ({"prompt_lookup_num_tokens": 3}, ValueError, "`assistant_model` and `prompt_lookup_num_tokens` .*one of them"),
    ({"assistant_early_exit": 1}, ValueError, "`assistant_early_exit` and `assistant_model` .*one of them"),
    ({"use_cache": False}, ValueError, "`use_cache` is False: drop that argument"),
    ({"num_beams": 2}, ValueError, "`num_beams` is 2: set `num_beams=1`"),
    ({"num_beams": 2, "do_sample": True}, ValueError, "`num_beams` is 2: set `num_beams=1`"),
    ({"penalty_alpha": 0.5, "top_k": 4}, ValueError, "greedily or by sampling, not by contrastive_search"),
    ({"dola_layers": "low"}, ValueError, "greedily or by sampling, not by dola"),
    ({"use_mtp": True}, ValueError, "`use_mtp` and `assistant_model` each choose a drafter: pass one of them"),
    ({"speculation_type": "dflash"}, ValueError, "`speculation_type` .*cannot be combined"),
    ({"assistant_ensemble_weight": 0.5}, ValueError, "`assistant_ensemble_weight` .*cannot be combined"),
    ({"speculation_stats": {}}, TypeError, "`speculation_stats` must be a SpeculationStats, got dict"),
    ({"speculation_trace": "x"}, TypeError, "`speculation_trace` must be a Trace, got str"),
]


def named(case: Any) -> str | None:
    return ", ".join(f"{name}={value}" for name, value in case.items()) if isinstance(case, dict) else None


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS, ids=named)
def test_options_that_cannot_be_honoured(options, error, match):
    refused(*llamas(), error, match, **options)
    works(*llamas())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 3}, "`num_beams` is 3"),
        ({"use_cache": False}, "`use_cache` is False"),
        ({"num_assistant_tokens": 0}, "`num_assistant_tokens` must be at least 1"),
        ({"assistant_early_exit": 1}, "`assistant_early_exit`"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens`"),
        ({"cache_implementation": "offloaded"}, "`cache_implementation` 'offloaded'"),
    ],
    ids=named,
)
@pytest.mark.parametrize("where", ["the target's", "the call's"])
def test_options_in_generation_configs_are_refused_as_those_of_the_call(pair, where, options, match):
    target, draft = pair
    kwargs: dict[str, Any] = {}
    if where == "the target's":
        target.generation_config.update(**options)
    else:
        kwargs = {"generation_config": GenerationConfig(**options, pad_token_id=0)}
    refused(target, draft, ValueError, match, **kwargs)
    target.generation_config = llamas()[0].generation_config
    works(target, draft)


def test_prompt_look_up_of_no_tokens_is_refused():
    refused(
        llamas()[0],
        None,
        ValueError,
        "`prompt_lookup_num_tokens` must be at least 1, got 0",
        prompt_lookup_num_tokens=0,
    )


@pytest.mark.parametrize("typo", [{"num_asistant_tokens": 3}, {"max_tokens": 3, "temprature": 1.0}], ids=named)
def test_unknown_arguments_are_refused_as_in_vanilla(typo):
    target, draft = llamas()
    message = refused(target, draft, ValueError, "not used by the model", **typo)
    with pytest.raises(ValueError) as vanilla:
        target.generate(**prompts(1), **GREEDY, **typo)
    assert message == str(vanilla.value)
    works(target, draft)


# Prompts


@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 4)], ids=str)
def test_a_prompt_without_tokens(shape):
    empty = torch.zeros(shape, dtype=torch.long)
    for mask in (None, empty):
        match = rf"prompt is empty: `input_ids` has the shape \({shape[0]}, {shape[1]}\).*at least one token"
        refused(*llamas(), ValueError, match, input_ids=empty, attention_mask=mask)
    works(*llamas())


def test_a_row_without_tokens_is_named():
    inputs = prompts(3)
    inputs["attention_mask"][1] = 0
    refused(*llamas(), ValueError, "prompt of row 1 is empty: its `attention_mask` is all zeros", **inputs)
    works(*llamas())


@pytest.mark.parametrize("shape", [(2, 14), (1, 12), (1, 15)], ids=str)
def test_a_mask_of_another_shape_than_the_prompt(shape):
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, 0] = 0
    match = rf"`attention_mask` has the shape \({shape[0]}, {shape[1]}\).*1 rows and 14 columns"
    refused(*llamas(), ValueError, match, attention_mask=mask)
    works(*llamas())


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_ids_that_are_no_tokens_of_the_model(token):
    inputs = prompts(2)
    inputs["input_ids"][1, -1] = token
    refused(*llamas(), ValueError, f"`input_ids` holds {token}, but .* ids 0 to {VOCAB - 1}", **inputs)
    inputs["input_ids"][1, -1] = 3
    inputs["input_ids"][inputs["attention_mask"] == 0] = -100  # nothing attends to padding
    target, draft = llamas()
    clean = inputs["input_ids"].clamp(min=0)
    expected = target.generate(clean, attention_mask=inputs["attention_mask"], **GREEDY)
    assert generate(target, draft, **inputs)[:, 14:].equal(expected[:, 14:])


# Drafts

NO_DRAFTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a number": (lambda target: 42, TypeError, "must be .*, got int"),
    "a list of models": (lambda target: [target], TypeError, "must be .*hf_specdec.Drafter, got list"),
    "any module": (lambda target: torch.nn.Linear(2, 2), TypeError, "must be .*, got Linear"),
    "no head": (lambda target: LlamaModel(target.config), TypeError, "must be a causal language model, but LlamaModel"),
    "another head": (
        lambda target: LlamaForSequenceClassification(target.config),
        TypeError,
        "must be a causal language model, but LlamaForSequenceClassification",
    ),
    "no such folder": (lambda target: "./no/folder", ValueError, "'./no/folder' could not be loaded: .* nor a Hub id"),
    "no such absolute folder": (lambda target: "/no/folder", ValueError, "'/no/folder' could not be loaded"),
    "on another device": (
        lambda target: AutoModelForCausalLM.from_config(target.config).to("meta"),
        ValueError,
        r"is on meta, the target on cpu: .*`assistant_model.to\('cpu'\)`",
    ),
    "an encoder-decoder": (lambda target: t5(), ValueError, "a decoder-only model, but T5.* an encoder-decoder"),
    "state of its own": (
        lambda target: recurrent_gemma(),
        ValueError,
        r"\(RecurrentGemma.*keeps state outside the transformers cache",
    ),
    "of another vocabulary": (
        lambda target: make_model(LlamaConfig(**{**target.config.to_dict(), "vocab_size": 80})),
        ValueError,
        r"differ in size \(96 and 80\).*pass both, `tokenizer` .* and `assistant_tokenizer`",
    ),
}


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)).eval()


def mamba() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return make_model(MambaConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0))


def recurrent_gemma() -> Any:
    sizes = {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 12}
    return make_model(RecurrentGemmaConfig(**sizes))


@pytest.mark.parametrize("kind", NO_DRAFTS)
def test_drafts_that_cannot_draft_for_the_target(kind):
    target, draft = llamas()
    make, error, match = NO_DRAFTS[kind]
    asked = kind == "state of its own"  # the model itself is probed
    assert "`assistant_model`" in refused(target, make(target), error, match, runs=asked)
    works(target, draft)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    refused(llamas()[0], str(tmp_path), ValueError, f"`assistant_model` '{tmp_path}' could not be loaded")
    works(*llamas())


# Targets


@pytest.mark.parametrize("drafter", ["a draft", "look-up"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (mamba, "MambaForCausalLM does not continue a recurrent state over several tokens"),
    ],
    ids=["recurrent"],
)
def test_targets_that_cannot_be_verified_in_blocks(make, match, drafter):
    target, draft = make(), llamas()[1]
    expected = target.generate(**prompts(1), **GREEDY)
    if drafter == "a draft":
        refused(target, draft, ValueError, match, runs=True)
    else:
        refused(target, None, ValueError, match, runs=True, prompt_lookup_num_tokens=3)
    assert target.generate(**prompts(1), **GREEDY).equal(expected)
    works(*llamas())


# Vocabularies


def make_tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, words)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="<pad>")


@functools.cache
def larger_draft() -> Any:
    draft = copy.deepcopy(llamas()[1])
    draft.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    return draft


@pytest.mark.parametrize("swapped", [False, True])
def test_tokenizers_with_more_tokens_than_their_model_are_refused(swapped):
    target, draft = llamas()
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(97)}
    match = r"`assistant_tokenizer` has 97 tokens, but `assistant_model` \(LlamaForCausalLM\) knows only 96.*swapped"
    if swapped:
        tokenizers = dict(zip(tokenizers, reversed(tokenizers.values())))
        match = r"`tokenizer` has 97 tokens, but the target \(LlamaForCausalLM\) knows only 96.*swapped"
    refused(target, draft, ValueError, match, **tokenizers)
    works(target, draft)


def test_one_tokenizer_alone_does_not_make_up_for_the_other():
    target, draft = llamas()
    tokenizer = make_tokenizer(88)
    refused(target, larger_draft(), ValueError, "their tokenizers are not known: pass", tokenizer=tokenizer)
    refused(target, larger_draft(), ValueError, "their tokenizers are not known: pass", assistant_tokenizer=tokenizer)
    works(target, draft)


# Models that break


def broken(model: Any, value: float, slot: int = 0, rows: int | None = None) -> Any:
    """From the moment `rows` rows are left, the model's logits in one batch slot become `value`."""

    def spoil(head: Any, args: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        if rows is None or len(logits) == rows:
            logits[slot] = value
        return logits

    return model.lm_head.register_forward_hook(spoil)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")], ids=str)
@pytest.mark.parametrize("who", ["target", "draft"])
def test_a_model_without_a_distribution_is_named(pair, who, value, do_sample):
    target, draft = pair
    handle = broken(target if who == "target" else draft, value)
    match = f"The {who} model .*gave no distribution .*row 0.*NaN.*Check its weights"
    refused(target, draft, ValueError, match, runs=True, do_sample=do_sample)
    handle.remove()
    works(target, draft)


def test_nan_weights_are_found(pair):
    target, draft = pair
    with torch.no_grad():
        target.lm_head.weight[7] = float("nan")
    refused(target, draft, ValueError, "The target model .*NaN", runs=True)


@pytest.mark.parametrize("who", ["target", "draft"])
def test_the_row_whose_model_breaks_on_the_way_is_named(pair, who):
    target, draft = pair
    rows = target.generate(**prompts(3), **GREEDY)[:, 14:].tolist()
    eos = next(token for token in rows[0][3:10] if token not in rows[1] + rows[2])
    # The first row ends first, and the last one moves into its slot.
    handle = broken(target if who == "target" else draft, float("nan"), slot=0, rows=2)
    kwargs = {**prompts(3), "eos_token_id": eos}
    refused(target, draft, ValueError, f"The {who} model .*for row 2 after column", runs=True, **kwargs)
    handle.remove()
    works(target, draft)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_processors_that_leave_nothing_to_say_are_an_error(do_sample):
    class Mute(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, float("-inf"))

    kwargs = {"logits_processor": [Mute()], "do_sample": do_sample}
    refused(*llamas(), ValueError, "The target model .*all -inf.*logits processors", runs=True, **kwargs)


# Positions


@functools.cache
def short_pair(architecture: str, positions: int) -> tuple[Any, Any]:
    """A pair whose target has few positions."""
    config = ARCHITECTURES[architecture]()
    config.update({"n_positions" if isinstance(config, GPT2Config) else "max_position_embeddings": positions})
    config.tie_word_embeddings = False
    target = make_model(config)
    return target, perturbed(target, 0.15 if architecture == "gpt2" else 0.04)


def with_positions(target: Any, positions: int) -> Any:
    """A draft for `target`: its weights, changed a little, and its own number of positions."""
    config = copy.deepcopy(target.config)
    config.update({"n_positions" if isinstance(config, GPT2Config) else "max_position_embeddings": positions})
    draft = make_model(config)
    weights = target.state_dict()
    for name, weight in draft.state_dict().items():
        kept = min(len(weight), len(weights[name]))
        weight[:kept] = weights[name][:kept]
    return perturbed(draft, 0.05)


@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_models_go_beyond_their_positions_with_vanillas_warning(batch, caplog):
    target, draft = short_pair("llama", 24)
    expected, warnings = [], []
    for strategy in ({}, {"strategy": "spec", "assistant_model": target}):
        caplog.clear()
        logging.warning_once.cache_clear()
        expected.append(target.generate(**prompts(batch), **GREEDY | {"max_new_tokens": 20}, **strategy))
        warnings.append([r.message for r in caplog.records if "predefined maximum length (24)" in r.message])
    assert expected[0].equal(expected[1])
    assert len(warnings[0]) == 1
    assert warnings[0] == warnings[1]
    assert generate(target, draft, **prompts(batch), max_new_tokens=20).equal(expected[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_models_that_cannot_go_beyond_their_positions_fail_as_in_vanilla(batch):
    target, draft = short_pair("gpt2", 24)
    with pytest.raises(IndexError) as vanilla:
        target.generate(**prompts(batch), **GREEDY | {"max_new_tokens": 20})
    refused(target, draft, type(vanilla.value), "index out of range", runs=True, **prompts(batch), max_new_tokens=20)
    works(target, draft, **prompts(batch), max_new_tokens=24 - 14)


@pytest.mark.parametrize("gamma", [2, 9])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_last_position_may_be_used_and_none_behind_it_is_asked_for(batch, gamma):
    target = short_pair("gpt2", 24)[0]
    draft = with_positions(target, 64)  # so that the target runs out of positions
    ids = torch.randint(
        2, VOCAB, (batch, 14), generator=torch.Generator().manual_seed(0)
    )  # no row has padding to spare
    kwargs = {"input_ids": ids, "max_new_tokens": 24 - 14 + 1}  # the last token needs no position
    works(target, draft, **kwargs, num_assistant_tokens=gamma)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("positions", [8, 14, 15, 22])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_draft_with_fewer_positions_than_the_target_drafts_while_it_can(architecture, positions, batch, caplog):
    target = short_pair(architecture, 64)[0]
    draft = with_positions(target, positions)
    logging.warning_once.cache_clear()
    stats = SpeculationStats()
    kwargs = {**prompts(batch), **GREEDY, "max_new_tokens": 24}
    out = target.generate(**kwargs, assistant_model=draft, strategy="spec", speculation_stats=stats)
    assert out.equal(target.generate(**kwargs))
    assert (stats.drafted_tokens > 0) == (stats.draft_forwards > 0) == (positions > 14)
    assert sum(f"has {positions} positions" in record.message for record in caplog.records) == 1
