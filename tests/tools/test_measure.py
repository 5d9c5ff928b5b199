"""What the measuring tools count, compare and divide; no test here depends on how long anything takes."""

import argparse
import copy
import math
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, make_pair, make_prompts, perturbed
from transformers import LlamaConfig, MambaConfig, PreTrainedModel, PreTrainedTokenizerFast

import hf_specdec
from hf_specdec.loop.schedule import SCHEDULES
from hf_specdec.pairs.heads import DEMO_HEAD
from hf_specdec.tools import methods
from hf_specdec.tools.arguments import Prompt
from hf_specdec.tools.bare import BareForward, BareForwards
from hf_specdec.tools.measure import Comparison, Method, Record, Run, around, checked, new_rows, peak_memory, timed
from hf_specdec.tools.settings import Setting, check_positions, make_setting, token_ids
from hf_specdec.tools.summary import Spread, decode_cost, growth, ratio, summarise, total_cost

Pair = tuple[PreTrainedModel, PreTrainedModel]


def spec(draft: PreTrainedModel, gamma: int = 3) -> Method:
    return methods.ours(draft, methods.way_options(str(gamma)), f"γ={gamma}")


def batches_of(*rows: int) -> list[dict[str, torch.Tensor]]:
    return [make_prompts(batch, seed=seed) for seed, batch in enumerate(rows)]


@pytest.fixture(scope="module")
def comparison(llama_pair: Pair) -> Comparison:
    target, draft = llama_pair
    chosen = [methods.vanilla(), methods.assisted(draft, "3"), spec(draft), methods.ours_lookup(2)]
    comparison = Comparison(target, chosen, batches_of(1, 1), 12, BareForwards(target, draft))
    comparison.warm_up()
    comparison.round()
    comparison.round()
    return comparison


@pytest.mark.parametrize("rows", [1, 3])
def test_a_run_counts_tokens_and_forwards(llama_pair: Pair, rows: int) -> None:
    target, draft = llama_pair
    batch = make_prompts(rows)
    run, sequences = timed(target, batch, 9, {})
    assert (run.tokens, run.first_tokens, run.forwards) == (9 * rows, rows, 9)
    assert 0 < run.first_seconds < run.seconds
    assert sequences.shape == (rows, 14 + 9)

    target.generate(**batch, **spec(draft).options(), max_new_tokens=2)  # the first batch probes the models
    stats = hf_specdec.SpeculationStats()
    run, sequences = timed(target, batch, 9, spec(draft).options() | {"speculation_stats": stats})
    assert run.tokens == stats.committed_tokens == 9 * rows
    assert run.forwards == stats.target_forwards + stats.target_prefill_forwards
    first = [min(n + 1, 9) for n in stats.iterations[0]["accepted"]]
    assert run.first_tokens == rows * min(first)  # a step arrives when every row has it


def test_the_first_block_of_assisted_generation_is_told_from_the_rest(llama_pair: Pair) -> None:
    target, _ = llama_pair
    options = methods.assisted(copy.deepcopy(target), "5").options()  # so that everything is accepted
    options["assistant_model"].generation_config.assistant_confidence_threshold = 0.0
    run, _ = timed(target, make_prompts(1), 9, options)
    assert (run.forwards, run.tokens, run.first_tokens) == (2, 9, 6)


def test_tokens_behind_a_rows_end_are_not_counted(llama_pair: Pair) -> None:
    target = copy.deepcopy(llama_pair[0])
    batch = make_prompts(2)
    free = target.generate(**batch, max_new_tokens=12, do_sample=False)[:, 14:].tolist()
    target.generation_config.eos_token_id = free[0][4]
    end = free[0].index(free[0][4]) + 1
    run, sequences = timed(target, batch, 12, {})
    rows = new_rows(target, sequences, 14)
    assert rows[0] == free[0][:end]
    assert run.tokens == len(rows[0]) + len(rows[1])


def test_all_methods_run_in_every_round_and_agree(comparison: Comparison) -> None:
    for record in comparison.records.values():
        assert [len(runs) for runs in record.rounds] == [2, 2]
        assert not record.refusal and not record.differing
        assert [len(row) for row in record.rows] == [12, 12]
    stats = comparison.records["hf_specdec γ=3"].stats
    assert stats.committed_tokens == 2 * 24  # only of the timed rounds
    assert comparison.records["vanilla"].stats.committed_tokens == 0


def test_a_method_that_changes_tokens_is_found_out(llama_pair: Pair) -> None:
    target, draft = llama_pair
    wrong = Method("wrong", "hf_specdec", lambda: {**spec(draft).options(), "suppress_tokens": [banned]})
    batches = batches_of(2, 1)
    banned = int(target.generate(**batches[1], max_new_tokens=3, do_sample=False)[0, 15])
    comparison = Comparison(target, [methods.vanilla(), wrong], batches, 6)
    comparison.warm_up()
    assert 2 in comparison.records["wrong"].differing  # the row of the second batch
    assert not comparison.records["vanilla"].differing


def test_what_transformers_refuses_is_shown_and_what_we_refuse_is_an_error(llama_pair: Pair) -> None:
    target, draft = llama_pair
    chosen = [methods.vanilla(), methods.assisted(draft, "3"), methods.assisted_lookup(3), spec(draft)]
    comparison = Comparison(target, chosen, batches_of(2), 4, BareForwards(target, draft))
    comparison.warm_up()
    comparison.round()
    for name in ("HF assisted γ=3", "HF look-up γ=3"):
        assert "batch_size = 1" in comparison.records[name].refusal
    refused = Method("ours", "hf_specdec", lambda: {"strategy": "spec", "assistant_model": draft, "num_beams": 2})
    with pytest.raises(ValueError, match="num_beams"):
        Comparison(target, [methods.vanilla(), refused], batches_of(1), 4).warm_up()


def test_a_round_can_be_of_some_methods_and_always_of_vanilla(llama_pair: Pair) -> None:
    target, draft = llama_pair
    names: list[str] = []
    chosen = [methods.vanilla(), spec(draft, 2), spec(draft, 4)]
    comparison = Comparison(target, chosen, batches_of(1), 4, advance=names.append)
    comparison.warm_up()
    names.clear()
    comparison.round(["hf_specdec γ=4"])
    assert names == ["vanilla", "hf_specdec γ=4"]
    assert [len(record.rounds) for record in comparison.records.values()] == [1, 0, 1]


@pytest.mark.parametrize("way", ["4", "heuristic", "default"])
def test_assisted_generation_leaves_the_draft_as_it_is(llama_pair: Pair, way: str) -> None:
    target, draft = llama_pair
    before = draft.generation_config.to_dict()
    seen = []
    for _ in range(2):
        own = methods.assisted(draft, way).options()["assistant_model"]
        seen.append(own.generation_config.to_dict())
        target.generate(**make_prompts(1), assistant_model=own, max_new_tokens=12, do_sample=False)
        assert own.get_input_embeddings() is draft.get_input_embeddings()
    assert seen[0] == seen[1]
    assert draft.generation_config.to_dict() == before
    assert seen[0].get("num_assistant_tokens") == (4 if way == "4" else before.get("num_assistant_tokens"))


def test_ways_are_numbers_schedules_and_default() -> None:
    assert all(map(methods.is_way, ["1", "12", "default", *SCHEDULES]))
    assert not any(map(methods.is_way, ["0", "-1", "1.5", "fast", ""]))
    assert methods.ours(None, methods.way_options("4"), "").gamma == 4  # type: ignore[arg-type]
    assert methods.ours(None, methods.way_options("heuristic"), "").gamma is None  # type: ignore[arg-type]


def runs(seconds: float, first: float = 0.0, tokens: int = 10, first_tokens: int = 1) -> Run:
    return Run(seconds, first, tokens, first_tokens, seconds - first, 1)


def test_costs_per_token_with_and_without_the_first_block() -> None:
    two = [runs(3.0, 1.0, 10, 2), runs(5.0, 1.0, 10, 4)]
    assert total_cost(two) == pytest.approx(8 / 20)
    assert decode_cost(two) == pytest.approx(6 / 14)
    assert math.isnan(decode_cost([runs(1.0, 1.0, 3, 3)]))


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is ten times slower in one round changes nothing."""
    slow, fast = Record(methods.vanilla()), Record(Method("x", "hf_specdec"))
    for pace, gain in ((1, 2.0), (10, 2.5), (1, 3.0)):
        slow.rounds.append([runs(6.0 * pace), runs(9.0 * pace)])
        fast.rounds.append([runs(6.0 * pace / gain), runs(9.0 * pace / gain / 2)])
    assert ratio(slow, fast, batches=[0]) == Spread(2.5, 2.25, 2.75)
    assert ratio(slow, fast, batches=[1]) == Spread(5.0, 4.5, 5.5)
    assert ratio(slow, fast).median == pytest.approx(2.5 * 15 / (6 + 4.5), abs=1e-4)
    fast.rounds.pop()
    assert ratio(slow, fast, batches=[0]) == Spread(2.25, 2.125, 2.375)  # the rounds of both


def test_a_single_round_has_no_spread() -> None:
    assert Spread.of([1.5]) == Spread(1.5, 1.5, 1.5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding"])
def test_bare_forwards_put_the_cache_back(name: str) -> None:
    model = make_pair(name)[0]
    batch = make_prompts(2, width=30)
    bare = BareForward(model, batch["input_ids"], batch["attention_mask"])
    if not bare.croppable:
        pytest.skip("its cache cannot be rolled back here")
    lengths = []
    for tokens in (1, 4, 1):
        assert bare.seconds(tokens) > 0
        lengths.append(bare.cache.get_seq_length())
    assert lengths == [30, 30, 30]


def test_a_cache_that_cannot_be_rolled_back_is_said() -> None:
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = make_model(config)
    bare = BareForwards(model, model)
    bare.prepare(make_prompts(1), [[5, 6, 7, 8]], [4])
    bare.measure()
    assert "rolled back" in bare.to_dict()["missing"]
    assert bare.ideal(3.0, 4, 3) is None


def test_the_ideal_is_what_the_forwards_allow() -> None:
    bare = BareForwards(*[None] * 2)  # type: ignore[list-item]
    bare.target_seconds, bare.draft_seconds = {1: [0.1, 0.9, 0.1], 5: [0.12]}, [0.01, 0.01, 0.5]
    assert bare.ideal(3.2, tokens=5, draft_forwards=4) == pytest.approx(3.2 * 0.1 / (0.12 + 4 * 0.01))
    assert bare.ideal(3.2, tokens=3.5, draft_forwards=2.5) == pytest.approx(3.2 * 0.1 / (0.1125 + 2.5 * 0.01))
    assert bare.ideal(3.2, tokens=6, draft_forwards=4) is None
    assert bare.to_dict() == {"target_ms": {1: 100.0, 5: 120.0}, "draft_ms": 10.0, "cost_ratio": 0.1}


def test_bare_forwards_are_measured_for_each_draft_length(comparison: Comparison) -> None:
    assert comparison.bare is not None
    lookup = checked(comparison.records["hf_specdec look-up γ=2"])
    assert set(comparison.bare.target_seconds) == {1, 4, *around(lookup)}  # γ + 1 of ours and of HF's
    assert around(4.0) == [4] and around(4.3) == [3, 6] and around(1.2) == [1, 3]
    assert len(comparison.bare.draft_seconds) > 0
    assert checked(comparison.records["vanilla"]) == 1


def test_what_a_schedule_does_while_it_learns_is_not_counted(llama_pair: Pair) -> None:
    target, draft = llama_pair
    gammas = iter([1, 4, 4])
    chosen = [
        methods.vanilla(),
        Method("ours", "hf_specdec", lambda: spec(draft, next(gammas)).options()),
    ]
    comparison = Comparison(target, chosen, batches_of(1), 12)
    comparison.warm_up()
    comparison.round()
    comparison.round()
    stats = comparison.records["ours"].stats
    runs = [run for runs in comparison.records["ours"].rounds for run in runs]
    assert stats.committed_tokens == sum(run.tokens for run in runs) == 24
    assert stats.target_forwards == sum(run.forwards for run in runs)


def test_the_growth_of_costs_with_the_context() -> None:
    def setting(rows: int, tokens: int, **costs: float) -> dict[str, Any]:
        figures = {name: {"decode_ms": ms} for name, ms in costs.items()}
        return {"batch_size": rows, "prompt_tokens": [1, tokens], "methods": figures | {"HF": {"refused": "batches"}}}

    settings = [setting(1, 512, a=3.0, b=4.0), setting(1, 64, a=2.0, b=2.0), setting(4, 2048, a=9.0, b=9.0)]
    assert growth(settings) == {"a": 1.5, "b": 2.0}
    assert growth(settings[1:]) == {}


def test_the_summary_of_a_setting(comparison: Comparison) -> None:
    assert comparison.bare is not None
    setting = Setting(1, None, list(comparison.batches), ["a", "b"])
    result = summarise(setting, comparison.records, comparison.bare)
    assert result["label"] == "1 row, 14 prompt tokens"
    figures = result["methods"]["hf_specdec γ=3"]
    stats = comparison.records["hf_specdec γ=3"].stats
    assert figures["acceptance_rate"] == round(stats.acceptance_rate, 4)
    assert figures["block_efficiency"] == round(stats.block_efficiency, 3)
    assert figures["ideal"] == pytest.approx(comparison.bare.ideal(stats.block_efficiency, 4, 3), abs=1e-3)
    assert figures["efficiency"] == pytest.approx(
        figures["decode_speedup"]["median"] / figures["ideal"], rel=5e-3, abs=2e-3
    )
    assert figures["best_assisted"] == "HF assisted γ=3"
    assert set(figures["categories"]) == {"a", "b"}
    vanilla = result["methods"]["vanilla"]
    assert vanilla["speedup"] == {"median": 1, "q1": 1, "q3": 1}
    assert (vanilla["tokens"], vanilla["target_forwards"], vanilla["block_efficiency"]) == (24, 24, 1)


def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20 // 4).sum()
    if "bytes" not in peak:
        pytest.skip("this system does not tell")
    assert 50 * 2**20 < peak["bytes"] < 200 * 2**20
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(10)
    assert peak["bytes"] < 50 * 2**20


TEXTS = ["ab cd ef", "gh ij", "kl mn op qr st", "uv"]


def prompts() -> list[Prompt]:
    return [Prompt(text, category) for text, category in zip(TEXTS, "aabb")]


def setting_of(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Setting:
    given = {"count": 4, "batch_size": 1, "context": None, "ragged": False} | changes
    return make_setting(prompts(), tokenizer=tokenizer, device=torch.device("cpu"), **given)


def test_prompts_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    setting = setting_of(tokenizer, batch_size=2)
    assert [tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) for batch in setting.batches] == [
        TEXTS[:2],
        TEXTS[2:],
    ]
    assert setting.categories == ["a", "b"]
    assert setting_of(tokenizer, batch_size=4).categories == ["mixed"]


@pytest.mark.parametrize("length", [2, 9, 40])
def test_contexts_have_their_length_and_end_as_the_prompt_does(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    for index, text in enumerate(TEXTS):
        ids = token_ids(prompts(), index, length, tokenizer)
        assert len(ids) == length
        made, own = tokenizer.decode(ids), tokenizer.decode(tokenizer(text)["input_ids"])
        assert made.endswith(own) or own.endswith(made)


def test_ragged_rows_go_from_a_quarter_of_the_context_to_all_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = setting_of(tokenizer, batch_size=4, context=40, ragged=True).batches
    assert batch["attention_mask"].sum(dim=1).tolist() == [10, 20, 30, 40]
    assert batch["attention_mask"][:, -1].all()  # padding is on the left
    assert setting_of(tokenizer, context=40, ragged=True).lengths == (40, 40)


def test_batches_are_full(tokenizer: PreTrainedTokenizerFast) -> None:
    setting = setting_of(tokenizer, count=3, batch_size=2)
    assert [len(batch["input_ids"]) for batch in setting.batches] == [2, 2]
    with pytest.raises(SystemExit, match="at least 6 prompts for batches of 3, found 4"):
        setting_of(tokenizer, count=4, batch_size=3)


def test_prompts_beyond_the_models_positions_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(LlamaConfig(**{**SIZES, "max_position_embeddings": 48}))
    setting = setting_of(tokenizer, context=40)
    check_positions(model, setting, 8)
    with pytest.raises(SystemExit, match="has 48 positions, but prompts of 40 tokens and 9 new tokens take 49"):
        check_positions(model, setting, 9)


def test_a_draft_that_agrees_less_has_a_lower_ideal(llama_pair: Pair) -> None:
    target, _ = llama_pair
    taus = []
    for noise in (0.02, 2.0):
        comparison = Comparison(target, [methods.vanilla(), spec(perturbed(target, noise))], batches_of(1), 24)
        comparison.warm_up()
        comparison.round()
        taus.append(comparison.records["hf_specdec γ=3"].stats.block_efficiency)
    assert taus[0] > taus[1] + 0.5


def test_names_of_drafters() -> None:
    chosen = {name: methods.drafting(methods.drafter(name), None) for name in ("head", "head:org/one", "exit:3")}  # type: ignore[arg-type]
    assert chosen["head"]["assistant_model"] == str(DEMO_HEAD) and chosen["exit:3"] == {"assistant_early_exit": 3}
    assert chosen["head:org/one"] == {"assistant_model": "org/one"}
    for wrong in ("heads", "head:", "exit:0", "exit:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected "):
            methods.drafter(wrong)
