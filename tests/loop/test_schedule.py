"""Draft lengths: transformers' rule, remembered only per draft model; and the precedence of options."""

import copy
import gc
import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, make_prompts, perturbed
from transformers import GenerationConfig, LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from hf_specdec import Draft, Drafter, PromptLookupDrafter, SpeculationStats
from hf_specdec.generate import method
from hf_specdec.loop.schedule import make_schedule
from hf_specdec.options import Options
from hf_specdec.pairs import choice
from hf_specdec.records.stats import Iteration, RowStep


@pytest.fixture
def target() -> PreTrainedModel:
    """A new one for each test, because some change its generation config."""
    return make_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), seed=12)


@pytest.fixture
def draft(target: PreTrainedModel) -> PreTrainedModel:
    """A new one for each test, because schedules remember it. About half of its drafts are accepted."""
    return perturbed(target, 0.05, seed=13)


def gammas(target: PreTrainedModel, draft: Any, rows: int = 1, new_tokens: int = 30, **options: Any) -> list[int]:
    """The longest draft of each iteration of a greedy call; the end may cut off the last ones."""
    stats = run(target, draft, rows, new_tokens, **options)
    return [max(iteration["drafted"]) for iteration in stats.iterations]


def run(target: PreTrainedModel, draft: Any, rows: int = 1, new_tokens: int = 30, **options: Any) -> SpeculationStats:
    stats = SpeculationStats()
    options = {"do_sample": False, "max_new_tokens": new_tokens} | options
    target.generate(**make_prompts(rows), assistant_model=draft, strategy="spec", speculation_stats=stats, **options)
    return stats


def iteration_of(drafted: list[int], accepted: list[int]) -> Iteration:
    """One iteration by row, as far as schedules look at it."""
    steps = [
        RowStep(row, 10, [7] * n, k, [7] * k + [8]) for row, (n, k) in enumerate(zip(drafted, accepted, strict=True))
    ]
    return Iteration(steps, draft_seconds=0.1, verify_seconds=0.2, other_seconds=0.0, draft_forwards=max(drafted))


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize("name", ["heuristic", "heuristic_transient"])
def test_the_heuristic_is_the_rule_of_transformers(name):
    rng = random.Random(0)
    theirs: Any = object.__new__(AssistedCandidateGenerator)
    theirs.num_assistant_tokens = 4
    theirs.assistant_generation_config = SimpleNamespace(
        num_assistant_tokens_schedule=name, assistant_confidence_threshold=0
    )
    ours = make_schedule(name, 4, None, PromptLookupDrafter())
    seen = set()
    for _ in range(200):
        drafted = ours.gamma
        accepted = drafted if rng.random() < 0.3 else rng.randrange(drafted)
        theirs.update_candidate_strategy(None, torch.zeros(1, drafted + 1, 1), accepted)
        ours.update(iteration_of([drafted], [accepted]))
        assert ours.gamma == theirs.num_assistant_tokens
        seen.add(ours.gamma)
    assert min(seen) == 1
    assert len(seen) > 5


def test_the_constant_schedule_stays():
    schedule = make_schedule("constant", 4, None, PromptLookupDrafter())
    for accepted in (4, 0, 2):
        schedule.update(iteration_of([4], [accepted]))
        assert schedule.gamma == 4


def test_a_batch_drafts_longer_only_when_all_rows_accepted_everything():
    schedule = make_schedule("heuristic", 4, None, PromptLookupDrafter())
    schedule.update(iteration_of([4, 4, 2], [4, 4, 2]))
    assert schedule.gamma == 6
    schedule.update(iteration_of([6, 6, 6], [6, 5, 6]))
    assert schedule.gamma == 5


def test_an_iteration_without_drafts_teaches_nothing():
    schedule = make_schedule("heuristic", 4, None, PromptLookupDrafter())
    schedule.update(iteration_of([0, 0], [0, 0]))
    assert schedule.gamma == 4


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["constant", "heuristic", "heuristic_transient"])
def test_each_iteration_drafts_what_the_schedule_says(name, rows, target, draft):
    stats = run(target, draft, rows, num_assistant_tokens=3, num_assistant_tokens_schedule=name)
    schedule = make_schedule(name, 3, None, PromptLookupDrafter())
    said = []
    for iteration in stats.iterations:
        said.append(schedule.gamma)
        schedule.update(iteration_of(iteration["drafted"], iteration["accepted"]))
    drafted = [max(iteration["drafted"]) for iteration in stats.iterations]
    fits = [i for i, n in enumerate(drafted) if n == said[i]]
    assert fits[-1] + 1 == len(fits) >= len(drafted) - 4  # the last drafts are cut to the remaining length
    assert all(n <= m for n, m in zip(drafted, said, strict=True))
    assert name == "constant" or len(set(drafted)) > 2


# ---------------------------------------------------------------------------------------------------------- the memory


HEURISTIC: dict[str, Any] = {"num_assistant_tokens": 9, "num_assistant_tokens_schedule": "heuristic"}


def left_off(stats: SpeculationStats, start: int) -> int:
    """The heuristic's γ after a call that started with γ = `start`."""
    schedule = make_schedule("heuristic", start, None, PromptLookupDrafter())
    for iteration in stats.iterations:
        schedule.update(iteration_of(iteration["drafted"], iteration["accepted"]))
    return schedule.gamma


def test_heuristic_goes_on_where_the_last_call_with_the_same_draft_left_off(target, draft):
    learned = left_off(run(target, draft, **HEURISTIC), 9)
    assert learned != 9
    stats = run(target, draft, **HEURISTIC)
    assert stats.iterations[0]["drafted"] == [learned]
    assert gammas(target, draft, **HEURISTIC)[0] == left_off(stats, learned)
    assert gammas(target, perturbed(target, 0.05, seed=13), **HEURISTIC)[0] == 9  # an equal draft, but another


def test_a_call_that_asks_for_another_start_gets_it(target, draft):
    other = left_off(run(target, draft, **HEURISTIC), 9) + 1
    assert gammas(target, draft, **HEURISTIC | {"num_assistant_tokens": other})[0] == other != 9


@pytest.mark.parametrize("name", ["constant", "heuristic_transient"])
def test_other_schedules_neither_remember_nor_teach(name, target, draft):
    options = HEURISTIC | {"num_assistant_tokens_schedule": name}
    for _ in range(2):
        assert gammas(target, draft, **options)[0] == 9
    stats = run(target, draft, **HEURISTIC)
    assert stats.iterations[0]["drafted"] == [9]
    assert gammas(target, draft, **options)[0] == 9
    assert gammas(target, draft, **HEURISTIC)[0] == left_off(stats, 9) != 9


def test_the_memory_does_not_keep_a_draft_alive(target):
    draft = perturbed(target, 0.05)
    run(target, draft, num_assistant_tokens_schedule="heuristic")
    gone = weakref.ref(draft)
    del draft
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------ precedence of options

VALUES: dict[str, list[Any]] = {  # by option: of the draft's config, of the target's, of the call's config, of the call
    "num_assistant_tokens": [2, 3, 4, 6],
    "num_assistant_tokens_schedule": ["heuristic", "heuristic_transient", "heuristic", "constant"],
    "assistant_confidence_threshold": [0.1, 0.2, 0.3, 0.5],
    "max_matching_ngram_size": [3, 4, 5, 1],
}
DEFAULT = {
    "num_assistant_tokens": None,  # the schedule decides
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
    "max_matching_ngram_size": 2,
}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of each call."""
    seen: list[Options] = []

    def make_drafter(assistant_model: Any, model: Any, options: Options, *args: Any) -> Drafter:
        seen.append(options)
        return choice.make_drafter(assistant_model, model, options, *args)

    monkeypatch.setattr(method, "make_drafter", make_drafter)
    return seen


@pytest.mark.parametrize("name", VALUES)
def test_the_call_beats_its_config_which_beats_the_targets_which_beats_the_drafts(name, target, draft, resolved):
    run(target, draft, new_tokens=2)
    setattr(draft.generation_config, name, VALUES[name][0])
    run(target, draft, new_tokens=2)
    setattr(target.generation_config, name, VALUES[name][1])
    run(target, draft, new_tokens=2)
    config = GenerationConfig(pad_token_id=0, **{name: VALUES[name][2]})
    run(target, draft, new_tokens=2, generation_config=config)
    run(target, draft, new_tokens=2, generation_config=config, **{name: VALUES[name][3]})
    assert [getattr(options, name) for options in resolved] == [DEFAULT[name], *VALUES[name]]


def test_a_value_that_is_transformers_own_default_is_a_value(target, draft, resolved):
    """transformers fills its defaults into what it passes on, so they must be told apart from given options."""
    given = {"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "max_matching_ngram_size": 2}
    for name, value in given.items():
        setattr(draft.generation_config, name, VALUES[name][0])
        setattr(target.generation_config, name, value)
    run(target, draft, new_tokens=2)
    for name in given:
        setattr(target.generation_config, name, VALUES[name][1])
    run(target, draft, new_tokens=2, generation_config=GenerationConfig(pad_token_id=0, **given))
    run(target, draft, new_tokens=2, **given)
    assert [{name: getattr(options, name) for name in given} for options in resolved] == [given] * 3


def test_a_threshold_of_zero_is_a_value(target, draft, resolved):
    draft.generation_config.assistant_confidence_threshold = 0.4
    run(target, draft, new_tokens=2, assistant_confidence_threshold=0.0)
    assert resolved[0].assistant_confidence_threshold == 0.0


def test_look_up_follows_its_own_options(target):
    prompt = torch.tensor([[7, 8, 9, 10, 11, 12, 7, 8]])
    for n in (1, 3):
        stats = SpeculationStats()
        target.generate(prompt, prompt_lookup_num_tokens=n, strategy="spec", speculation_stats=stats, max_new_tokens=8)
        assert stats.iterations[0]["drafted"] == [n]


# ------------------------------------------------------------------------------------------ what belongs to the user


class Fails(Drafter):
    def propose(self, context: Any, max_tokens: int) -> Draft:
        raise ArithmeticError("out of ideas")


class Same(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


def state(model: PreTrainedModel) -> list[Any]:
    configs = [model.config, model.generation_config]
    return [[id(c), type(c), copy.deepcopy(vars(c))] for c in configs] + [model.training]


LOOK_UP = GenerationConfig(max_new_tokens=12, prompt_lookup_num_tokens=3, pad_token_id=0)
CALLS: dict[str, tuple[dict[str, Any], type[Exception] | None]] = {
    "greedy": ({}, None),
    "sampled": ({"do_sample": True}, None),
    "an option that does not exist": ({"num_assistant_tokns": 3}, ValueError),
    "look-up, by config": ({"assistant_model": None, "generation_config": LOOK_UP}, None),
    "beams": ({"num_beams": 2}, ValueError),
    "an unknown schedule": ({"num_assistant_tokens_schedule": "linear"}, ValueError),
    "a drafter that fails": ({"assistant_model": Fails()}, ArithmeticError),
}


@pytest.mark.parametrize(("options", "error"), CALLS.values(), ids=CALLS)
def test_what_the_user_passes_is_as_it_was_afterwards(options, error, target, draft):
    for model in (target, draft):
        model.generation_config.num_assistant_tokens_schedule = "heuristic"
        model.generation_config.num_assistant_tokens = 6
    inputs = make_prompts(2)
    processors = LogitsProcessorList([Same()])
    config = options.get("generation_config") or GenerationConfig(max_new_tokens=12, pad_token_id=0)
    kwargs: dict[str, Any] = {
        "assistant_model": draft,
        "strategy": "spec",
        "generation_config": config,
        "logits_processor": processors,
        **inputs,
        **options,
    }
    given = dict(kwargs)
    before = state(target), state(draft), copy.deepcopy(vars(config)), copy.deepcopy(inputs)

    def call() -> Any:
        return target.generate(**kwargs)

    if error is None:
        call()
    else:
        with pytest.raises(error):
            call()

    assert (state(target), state(draft), vars(config)) == before[:3]
    assert type(config) is GenerationConfig
    assert all(inputs[name].equal(before[3][name]) for name in inputs)
    assert len(processors) == 1
    assert kwargs == given


def test_a_failing_call_does_not_spoil_the_next(target, draft):
    expected = run(target, draft, rows=2, new_tokens=12)
    with pytest.raises(ArithmeticError):
        run(target, Fails(), rows=2, new_tokens=12)
    assert run(target, draft, rows=2, new_tokens=12).iterations == expected.iterations
