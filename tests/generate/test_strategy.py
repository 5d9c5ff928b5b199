"""`strategy="spec"` works through every entry to `generate()`, and changes nothing when it is not given."""

import copy
import functools
import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Barrier, Thread
from typing import Any

import datasets
import pytest
import torch
from conftest import VOCAB, make_pair, make_prompts
from conftest import generate_with as generate
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

import hf_specdec
from hf_specdec import SpeculationStats
from hf_specdec.generate.strategy import STRATEGIES

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@functools.cache
def pair() -> tuple[Any, Any]:
    return make_pair("llama", 0.04)


def prompts(batch: int) -> dict[str, torch.Tensor]:
    return make_prompts(batch, seed=3)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Each printable character is a token; padding is on the left."""
    tokens = ["<pad>", "<s>", *map(chr, range(33, 33 + VOCAB - 2))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", padding_side="left")


# Registration


@pytest.fixture
def registration() -> Iterator[None]:
    """Whatever a test does to `generate()`, the registration is restored afterwards."""
    ours, generate = hf_specdec.generate.strategy._original, GenerationMixin.generate
    yield
    GenerationMixin.generate, hf_specdec.generate.strategy._original = generate, ours
    hf_specdec.generate.strategy._wrap_overrides()


@pytest.mark.parametrize("strategy", [{}, {"strategy": None}], ids=["absent", "None"])
def test_without_a_strategy_generate_is_what_it_was(strategy, monkeypatch, registration):
    target, _ = pair()
    expected = target.generate(**prompts(2), **GREEDY)
    for name in ("prepare", "make_drafter", "resolve_options"):
        monkeypatch.setattr(hf_specdec.generate.method, name, None)
    assert target.generate(**prompts(2), **GREEDY, **strategy).equal(expected)
    hf_specdec.unregister()
    assert target.generate(**prompts(2), **GREEDY).equal(expected)


def test_without_a_strategy_a_draft_means_the_assisted_generation_of_transformers(monkeypatch):
    target, draft = pair()
    called = []
    original = GenerationMixin._assisted_decoding
    monkeypatch.setattr(
        GenerationMixin, "_assisted_decoding", lambda *args, **kwargs: called.append(1) or original(*args, **kwargs)
    )
    expected = target.generate(**prompts(1), **GREEDY)
    # A copy of the draft, since assisted generation changes its generation config.
    assert target.generate(**prompts(1), **GREEDY, assistant_model=copy.deepcopy(draft)).equal(expected)
    assert called == [1]
    assert generate(target, draft, **prompts(1)).equal(expected)
    assert called == [1]


def test_registering_twice_changes_nothing(registration):
    registered = GenerationMixin.generate
    hf_specdec.register()
    assert GenerationMixin.generate is registered
    hf_specdec.unregister()
    hf_specdec.unregister()
    assert GenerationMixin.generate is registered.__wrapped__


def test_unregistering_restores_the_very_function_and_registering_works_again(registration):
    target, draft = pair()
    expected = generate(target, draft, **prompts(2))
    original = GenerationMixin.generate.__wrapped__
    hf_specdec.unregister()
    assert GenerationMixin.generate is original
    assert original.__module__ == "transformers.generation.utils"
    with pytest.raises(ValueError, match="strategy"):
        generate(target, draft, **prompts(2))
    hf_specdec.register()
    assert GenerationMixin.generate is not original
    assert generate(target, draft, **prompts(2)).equal(expected)


def test_unregistering_does_not_throw_away_what_others_put_on_top(registration):
    ours = GenerationMixin.generate
    GenerationMixin.generate = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="replaced again"):
        hf_specdec.unregister()
    assert GenerationMixin.generate is theirs


def test_registering_wraps_what_others_have_put_there(registration):
    target, draft = pair()
    hf_specdec.unregister()
    original, seen = GenerationMixin.generate, []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sorted(kwargs))
        return original(self, *args, **kwargs)

    GenerationMixin.generate = functools.wraps(original)(counting)
    hf_specdec.register()
    assert generate(target, draft, **prompts(1)).equal(target.generate(**prompts(1), **GREEDY))
    assert len(seen) == 2
    hf_specdec.unregister()
    assert GenerationMixin.generate.__wrapped__ is original


def test_the_signature_and_documentation_of_generate_stay(registration):
    registered = GenerationMixin.generate
    hf_specdec.unregister()
    assert registered.__doc__ == GenerationMixin.generate.__doc__
    assert registered.__name__ == "generate"


@pytest.mark.parametrize("strategy", ["speculative", "", "SPEC", 3])
def test_an_unknown_strategy_is_an_error_that_lists_the_known_ones(strategy):
    target, draft = pair()
    with pytest.raises(ValueError, match=f"Unknown strategy {strategy!r}.*'spec'"):
        target.generate(**prompts(1), **GREEDY, assistant_model=draft, strategy=strategy)
    assert list(STRATEGIES) == ["spec", "vanilla"]


@pytest.mark.parametrize("strategy", ["spec", "vanilla"])
def test_a_strategy_and_a_custom_decoding_method_cannot_both_decide(strategy):
    target, draft = pair()
    method = hf_specdec.speculative(draft)
    message = f"`strategy='{strategy}'` and `custom_generate` both choose the decoding method"
    with pytest.raises(ValueError, match=message):
        target.generate(**prompts(1), **GREEDY, strategy=strategy, custom_generate=method)


# A strategy in a generation config


def config_with(**more: Any) -> GenerationConfig:
    return GenerationConfig(**GREEDY, pad_token_id=0, num_assistant_tokens=3, **more)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What drafts, in each decoding of ours; transformers' assisted decoding is out of reach."""
    seen: list[Any] = []
    prepare = hf_specdec.generate.method.prepare

    def counting(call: Any, drafter: Any, *args: Any) -> Any:
        seen.append(getattr(drafter, "model", drafter))
        return prepare(call, drafter, *args)

    monkeypatch.setattr(hf_specdec.generate.method, "prepare", counting)
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", lambda *args, **kwargs: 1 / 0)
    return seen


@pytest.fixture
def own() -> Iterator[tuple[Any, Any]]:
    """A pair whose generation configs the test may change."""
    target, draft = copy.deepcopy(pair())
    yield target, draft


@pytest.mark.core
@pytest.mark.parametrize("way", ["keyword", "positional", "model"])
def test_a_strategy_in_a_config_is_honoured(way, own, decodings):
    target, draft = own
    ids = prompts(1)["input_ids"]
    expected = target.generate(ids, **GREEDY)
    if way == "model":
        target.generation_config.strategy = "spec"
        out = target.generate(ids, **GREEDY, assistant_model=draft)
    elif way == "keyword":
        out = target.generate(inputs=ids, generation_config=config_with(strategy="spec"), assistant_model=draft)
    else:
        out = target.generate(ids, config_with(strategy="spec"), assistant_model=draft)
    assert out.equal(expected)
    assert decodings == [draft]


@pytest.mark.parametrize(
    ("argument", "call", "model", "speculates"),
    [
        (None, None, "spec", True),
        (None, "spec", "vanilla", True),
        (None, "vanilla", "spec", False),
        ("vanilla", "spec", "spec", False),
        ("spec", "vanilla", "vanilla", True),
        ("vanilla", None, "nonsense", False),
        (None, None, None, False),
    ],
)
def test_the_call_beats_its_config_which_beats_the_models(argument, call, model, speculates, own, decodings):
    target, _ = own
    expected = target.generate(**prompts(2), **GREEDY)
    target.generation_config.strategy = model
    out = target.generate(**prompts(2), generation_config=config_with(strategy=call), strategy=argument)
    assert out.equal(expected)
    assert len(decodings) == speculates


@pytest.mark.parametrize("place", ["call", "model"])
def test_an_unknown_strategy_in_a_config_is_an_error_that_lists_the_known_ones(place, own):
    target, _ = own
    config = GenerationConfig(strategy="nonsense")
    target.generation_config = config if place == "model" else target.generation_config
    where = {"model": "in the model's generation config", "call": "in the generation config of the call"}[place]
    with pytest.raises(ValueError, match=f"Unknown strategy 'nonsense' {where}; known strategies: 'spec', 'vanilla'"):
        target.generate(**prompts(1), **({"generation_config": config} if place == "call" else {}))


def test_a_strategy_is_saved_and_loaded_with_its_config(own, tmp_path, decodings):
    target, draft = own
    expected = target.generate(**prompts(1), **GREEDY)
    config = config_with(strategy="spec", max_matching_ngram_size=3)
    config.save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.strategy, loaded.num_assistant_tokens) == ("spec", 3)
    assert target.generate(**prompts(1), generation_config=loaded, assistant_model=draft).equal(expected)
    target.generation_config = config
    target.save_pretrained(tmp_path / "target")
    target = LlamaForCausalLM.from_pretrained(tmp_path / "target")
    assert target.generate(**prompts(1), assistant_model=draft).equal(expected)
    assert decodings == [draft] * 2


def test_with_a_strategy_in_a_config_no_draft_means_look_up(own, decodings):
    target, _ = own
    target.generate(**prompts(1), generation_config=config_with(strategy="spec"))
    assert [type(drafter) for drafter in decodings] == [hf_specdec.PromptLookupDrafter]


@pytest.mark.core
def test_vanilla_is_plain_also_in_transformers_assisted_generation(own, monkeypatch):
    """Its draft gets the target's config, strategy included."""
    target, draft = own
    expected = target.generate(**prompts(1), **GREEDY)
    monkeypatch.setattr(hf_specdec.generate.method, "prepare", lambda *args: 1 / 0)
    target.generation_config.strategy = "spec"
    assert target.generate(**prompts(1), **GREEDY, strategy="vanilla", assistant_model=draft).equal(expected)
    target.generation_config.strategy, draft.generation_config.strategy = None, "spec"
    with hf_specdec.attached(draft):
        assert target.generate(**prompts(1), **GREEDY, assistant_model=draft).equal(expected)


@pytest.mark.parametrize("positional", [False, True])
def test_a_decoding_method_of_the_call_beats_a_strategy_in_a_config(positional, own, decodings):
    target, draft = own
    expected = target.generate(**prompts(1), **GREEDY)
    target.generation_config.strategy = "spec"

    def theirs(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        return model.generate(input_ids, **GREEDY)  # itself plain

    ids, config = prompts(1)["input_ids"], config_with(strategy="spec")
    for method, speculations in ((theirs, 0), (hf_specdec.speculative(draft), 1)):
        if positional:
            out = target.generate(ids, config, *[None] * 8, method)
        else:
            out = target.generate(ids, generation_config=config, custom_generate=method)
        assert out.equal(expected)
        assert len(decodings) == speculations


class Shouting(LlamaForCausalLM):
    def generate(self, *args: Any, volume: int = 0, **kwargs: Any) -> Any:
        self.heard = volume
        return super().generate(*args, **kwargs)


class Forgetting(LlamaForCausalLM):
    def generate(self, input_ids: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        return super().generate(input_ids, generation_config)


@pytest.mark.parametrize("place", ["call", "model", "attached"])
def test_a_model_that_overrides_generate_speculates_once(place, decodings):
    target, draft = pair()
    loud = like(target, Shouting)
    config = config_with(strategy="spec" if place == "call" else None)
    loud.generation_config.strategy = "spec" if place == "model" else None
    expected = target.generate(**prompts(2), **GREEDY)
    with hf_specdec.attached(loud, draft) if place == "attached" else nullcontext():
        out = loud.generate(**prompts(2), generation_config=config, assistant_model=draft, volume=11)
        assert out.equal(expected)
        assert (decodings, loud.heard) == ([draft], 11)
        assert loud.generate(**prompts(2), generation_config=config, strategy="vanilla").equal(expected)
        assert len(decodings) == 1
    with pytest.raises(
        ValueError, match=r"cannot be used with Forgetting: its own `generate\(\)` does not decode token"
    ):
        forgetful = like(target, Forgetting)
        forgetful.generation_config.strategy = "spec"
        forgetful.generate(prompts(2)["input_ids"], config)
    assert len(decodings) == 1


def like(model: Any, kind: Any) -> Any:
    """The same model, of another class."""
    other = kind(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


# Other arguments of ours in a generation config


def test_a_draft_in_the_config_of_a_call_is_used_as_it_is(own, decodings):
    """A copy in each call would take memory, and lose what is kept of the draft."""
    target, draft = own
    expected = target.generate(**prompts(2), **GREEDY)
    config = config_with(strategy="spec", speculation_stats=SpeculationStats())
    config.assistant_model = draft
    for _ in range(2):
        assert target.generate(**prompts(2), generation_config=config).equal(expected)
    assert all(model is draft for model in decodings) and len(decodings) == 2
    assert config.assistant_model is draft
    assert 0 < config.speculation_stats.accepted_tokens < config.speculation_stats.drafted_tokens
    assert config.speculation_stats.committed_tokens == 2 * 2 * 14
    assert type(config) is GenerationConfig


@pytest.mark.core
def test_transformers_itself_makes_saves_and_loads_no_config_with_a_draft(tmp_path):
    """So there is none for us to honour; a draft is set later, or `hf_specdec.attached` does without configs."""
    for make in (GenerationConfig, lambda **given: GenerationConfig.from_dict(given)):
        with pytest.raises(ValueError, match="`assistant_model` is not a valid argument of `GenerationConfig`"):
            make(assistant_model="org/draft")
    config = GenerationConfig(strategy="spec")
    config.assistant_model = "org/draft"
    with pytest.raises(ValueError, match="`assistant_model` is not a valid argument of `GenerationConfig`"):
        config.save_pretrained(tmp_path)


def test_an_argument_beats_the_same_in_the_config_of_the_call(own, decodings):
    target, draft = own
    other, given, stats = copy.deepcopy(draft), SpeculationStats(), SpeculationStats()
    config = config_with(strategy="spec", speculation_stats=stats)
    config.assistant_model = draft
    target.generate(**prompts(1), generation_config=config, assistant_model=other, speculation_stats=given)
    assert decodings == [other]
    assert given.committed_tokens == 14
    assert stats.committed_tokens == 0


def test_records_and_tokenizers_in_the_config_of_a_call_are_used(own):
    target, draft = own
    tokenizer = make_tokenizer()
    trace = hf_specdec.Trace()
    free = target.generate(**prompts(1), **GREEDY)[0]
    stop = tokenizer.decode(free[16:18])
    config = config_with(strategy="spec", tokenizer=tokenizer, speculation_trace=trace, stop_strings=[stop])
    out = target.generate(**prompts(1), generation_config=config, assistant_model=draft)
    assert out.equal(target.generate(**prompts(1), **GREEDY, stop_strings=[stop], tokenizer=tokenizer))
    assert out.shape[1] < len(free)
    assert trace.iterations and trace.tokenizer is tokenizer


def test_the_model_config_may_name_a_draft_unless_the_call_chooses_another(own, tmp_path, decodings):
    target, draft = own
    draft.save_pretrained(tmp_path)
    target.generation_config.strategy, target.generation_config.assistant_model = "spec", str(tmp_path)
    target.generate(**prompts(1), **GREEDY)
    assert decodings[0].name_or_path == str(tmp_path)
    target.generate(**prompts(1), **GREEDY, assistant_model=draft)
    assert decodings[1] is draft
    target.generate(**prompts(1), **GREEDY, prompt_lookup_num_tokens=2)
    assert type(decodings[2]) is hf_specdec.PromptLookupDrafter


@pytest.mark.parametrize(
    "name", ["assistant_model", "tokenizer", "assistant_tokenizer", "speculation_stats", "speculation_trace"]
)
def test_objects_in_the_models_own_config_are_an_error_that_names_them(name, own):
    """Transformers copies that config in each call: records would stay empty, and drafts multiply."""
    target, draft = own
    objects = {
        "assistant_model": draft,
        "speculation_stats": SpeculationStats(),
        "speculation_trace": hf_specdec.Trace(),
    }
    setattr(target.generation_config, name, objects.get(name, make_tokenizer()))
    with pytest.raises(ValueError, match=f"`{name}` in the model's own generation config is a .*`hf_specdec.attached`"):
        target.generate(**prompts(1), **GREEDY, strategy="spec")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("speculation_stats", {}, "`speculation_stats` must be a SpeculationStats, got dict"),
        ("speculation_trace", "yes", "`speculation_trace` must be a Trace, got str"),
        ("tokenizer", "org/model", "`tokenizer` must be a tokenizer, got the name 'org/model': load it with"),
        ("assistant_model", 3, "`assistant_model` must be a transformers model, a Hub id or local path, or a"),
    ],
)
def test_values_in_a_config_that_are_not_what_they_should_be_are_an_error(name, value, message):
    config = config_with(strategy="spec")
    setattr(config, name, value)
    with pytest.raises(TypeError, match=message):
        pair()[0].generate(**prompts(1), generation_config=config)


# Entry points


def test_arguments_may_be_positional():
    target, draft = pair()
    ids = prompts(1)["input_ids"]
    config = GenerationConfig(max_new_tokens=14, do_sample=False, pad_token_id=0)
    out = target.generate(ids, config, assistant_model=draft, strategy="spec")
    assert out.equal(target.generate(ids, config))
    assert out.equal(generate(target, draft, inputs=ids))


def test_models_that_override_generate_and_call_super():
    target, draft = pair()
    loud = like(target, Shouting)
    assert generate(loud, draft, **prompts(2), volume=11).equal(target.generate(**prompts(2), **GREEDY))
    assert loud.heard == 11


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("texts", [1, 3])
def test_pipelines(texts, batch_size):
    target, draft = copy.deepcopy(pair())  # pipelines write to the generation config of their model
    tokenizer = make_tokenizer()
    rows = prompts(texts)["input_ids"].tolist()
    given = [tokenizer.decode([token for token in row if token]) for row in rows]
    given = given[0] if texts == 1 else given
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    expected = plain(given, batch_size=batch_size, **GREEDY)
    ours = pipeline(
        "text-generation", model=target, tokenizer=tokenizer, assistant_model=draft, strategy="spec"
    )  # by construction ...
    stats = SpeculationStats()
    assert ours(given, batch_size=batch_size, **GREEDY, speculation_stats=stats) == expected
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.committed_tokens == 14 * texts
    call = plain(given, batch_size=batch_size, **GREEDY, assistant_model=draft, strategy="spec")  # ... or by call
    assert call == expected


def test_a_decoding_method_needs_no_registration(registration):
    target, draft = pair()
    expected = target.generate(**prompts(2), **GREEDY)
    hf_specdec.unregister()
    stats = SpeculationStats()
    method = hf_specdec.speculative(draft, num_assistant_tokens=3, speculation_stats=stats)
    for _ in range(2):  # and serves many calls
        assert target.generate(**prompts(2), **GREEDY, custom_generate=method).equal(expected)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert len(stats.accepted_length_histogram) <= 1 + 3


def test_a_decoding_method_refuses_options_that_it_does_not_know():
    with pytest.raises(TypeError, match=r"unknown options \['gamma'\]; it knows num_assistant_tokens, "):
        hf_specdec.speculative(pair()[1], gamma=3)


@pytest.mark.parametrize("name", ["streamer", "assistant_model"])
def test_a_decoding_method_says_so_when_generate_keeps_an_argument_from_it(name):
    target, draft = pair()
    argument = {"streamer": TextIteratorStreamer(make_tokenizer()), "assistant_model": draft}[name]
    with pytest.raises(ValueError, match=rf"give it as speculative\({name}=\.\.\.\)"):
        target.generate(**prompts(1), **GREEDY, custom_generate=hf_specdec.speculative(draft), **{name: argument})


def test_a_decoding_method_takes_a_streamer_of_its_own():
    target, draft = pair()
    tokenizer = make_tokenizer()
    streamer = TextIteratorStreamer(tokenizer)
    ids = target.generate(**prompts(1), **GREEDY, custom_generate=hf_specdec.speculative(draft, streamer=streamer))
    assert "".join(streamer) == tokenizer.decode(ids[0])


def test_importing_registers(registration):
    hf_specdec.unregister()
    original = GenerationMixin.generate
    importlib.reload(hf_specdec)
    assert GenerationMixin.generate.__wrapped__ is original


def test_threads_do_not_disturb_each_other():
    target, draft = pair()
    calls = [
        {
            **make_prompts(2, seed=seed),
            "num_assistant_tokens": 2 + seed,
            "max_new_tokens": 24,
            "stop_strings": "~~~",
        }
        for seed in range(3)
    ]
    tokenizer = make_tokenizer()
    alone = [generate(target, draft, **call, tokenizer=tokenizer) for call in calls]
    together: dict[int, Any] = {}
    start = Barrier(len(calls))

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            stats = SpeculationStats()
            out = target.generate(
                **GREEDY | calls[i],
                tokenizer=tokenizer,
                assistant_model=draft,
                strategy="spec",
                speculation_stats=stats,
            )
            together.setdefault(i, []).append((out.tolist(), stats.committed_tokens))

    threads = [Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {i: [(out.tolist(), 2 * 24)] * 2 for i, out in enumerate(alone)}


def test_processes_of_a_dataset():
    target, draft = pair()
    prompts = make_prompts(4)
    expected = generate(target, None, **prompts).tolist()
    rows = datasets.Dataset.from_dict({name: value.tolist() for name, value in prompts.items()})

    def answer(row: dict[str, list[int]]) -> dict[str, list[int]]:
        torch.set_num_threads(1)
        inputs = {name: torch.tensor([value]) for name, value in row.items()}
        return {"text": generate(target, draft, **inputs)[0].tolist()}

    assert rows.map(answer, num_proc=2, load_from_cache_file=False)["text"] == expected


# Precedence of options


def test_a_value_of_the_call_beats_the_targets_config_which_beats_the_drafts():
    target, draft = copy.deepcopy(pair())
    draft.generation_config.num_assistant_tokens = 6
    assert longest_draft(target, draft) == 6
    target.generation_config.num_assistant_tokens = 20  # though transformers would fill in exactly that
    assert longest_draft(target, draft) == 14 - 1
    target.generation_config.num_assistant_tokens = 4
    assert longest_draft(target, draft) == 4
    config = GenerationConfig(**GREEDY, num_assistant_tokens=3, pad_token_id=0)
    assert longest_draft(target, draft, generation_config=config) == 3
    assert longest_draft(target, draft, generation_config=config, num_assistant_tokens=2) == 2


def longest_draft(target: Any, draft: Any, **kwargs: Any) -> int:
    stats = SpeculationStats()
    target.generate(**prompts(1), **GREEDY, assistant_model=draft, strategy="spec", speculation_stats=stats, **kwargs)
    return len(stats.drafted_by_position)


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
def test_models_and_their_configs_are_left_as_they_were(schedule):
    """Assisted generation writes the number that it learned into the draft's generation config."""
    target, draft = copy.deepcopy(pair())
    draft.generation_config.num_assistant_tokens = 11  # "heuristic" would arrive at other numbers
    draft.generation_config.num_assistant_tokens_schedule = schedule
    draft.generation_config.stop_strings = target.generation_config.stop_strings = "~~~"
    objects = [target.generation_config, draft.generation_config, target.config, draft.config]
    before = copy.deepcopy([thing.to_dict() for thing in objects]), [set(vars(thing)) for thing in objects]
    given = GenerationConfig(**GREEDY, num_assistant_tokens=4, pad_token_id=0)
    given_before = copy.deepcopy(given.to_dict())
    generate(target, draft, **prompts(2), generation_config=given, tokenizer=make_tokenizer())
    assert ([thing.to_dict() for thing in objects], [set(vars(thing)) for thing in objects]) == before
    assert given.to_dict() == given_before
    assert type(given) is GenerationConfig
    assert target.generation_config is objects[0]
    assert draft.generation_config is objects[1]
