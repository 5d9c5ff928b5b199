"""`cache_implementation="static"`: forwards of fixed shapes on storage that is kept between calls.

On a CPU no graph is captured; buffers, masks over the whole capacity and rounded widths are the same.
"""

import gc
import shutil
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, make_model, make_pair, make_prompts, perturbed
from transformers import LlamaConfig, PreTrainedModel

import hf_specdec
from hf_specdec.cache.ragged import RaggedCache
from hf_specdec.generate import session
from hf_specdec.kernels import attention, compiled_attention, packing
from hf_specdec.models import graphs, kept
from hf_specdec.models.compiled import BLOCKS

RAGGED = sorted(ARCHITECTURES.keys() - {"bloom", "falcon-alibi"})


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, ...]]]:
    """The shapes of what the static forwards gave their models."""
    seen: set[tuple[int, ...]] = set()
    run = graphs.StaticForwards._run

    def spy(self: Any, model: PreTrainedModel, step: Any) -> torch.Tensor:
        seen.add(tuple(step.ids.shape))
        return run(self, model, step)

    monkeypatch.setattr(graphs.StaticForwards, "_run", spy)
    yield seen


def generate(pair: tuple[PreTrainedModel, PreTrainedModel], prompts: dict[str, Any], **options: Any) -> torch.Tensor:
    target, draft = pair
    options = {"do_sample": False, "max_new_tokens": 24, "cache_implementation": "static"} | options
    return target.generate(**prompts, assistant_model=draft, strategy="spec", **options)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", RAGGED)
def test_tokens_are_vanillas_and_shapes_are_few(name, rows, shapes):
    pair, prompts = make_pair(name), make_prompts(rows)
    for gamma in (1, 4):
        for seed in (0, 1):  # the second call uses the storage of the first
            prompts = make_prompts(rows, seed=seed)
            expected = pair[0].generate(**prompts, do_sample=False, max_new_tokens=24)
            assert generate(pair, prompts, num_assistant_tokens=gamma).equal(expected)
    assert {width for _, width in shapes} <= set(graphs.WIDTHS)
    assert rows in {count for count, _ in shapes}


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_models_that_cannot_be_given_masks_are_fed_in_the_ordinary_way(name, shapes, caplog):
    pair, prompts = make_pair(name), make_prompts(2)
    graphs.logger.warning_once.cache_clear()
    expected = pair[0].generate(**prompts, do_sample=False, max_new_tokens=24)
    assert generate(pair, prompts, num_assistant_tokens=4).equal(expected)
    assert not shapes
    assert "need forwards of changing shapes" in caplog.text


def test_a_longer_call_gets_a_larger_storage_and_a_shorter_one_the_same(llama_pair):
    prompts = make_prompts(2)
    storages = []
    for new_tokens in (24, 20, 200, 24):
        expected = llama_pair[0].generate(**prompts, do_sample=False, max_new_tokens=new_tokens)
        assert generate(llama_pair, prompts, max_new_tokens=new_tokens).equal(expected)
        storages.append(kept._kept[llama_pair[0]][-1].forwards.cache)
    assert storages[0] is storages[1] is not storages[2]
    assert storages[2] is storages[3]


def test_a_call_within_a_call_gets_storage_of_its_own(llama_pair):
    prompts = make_prompts(1)
    expected = llama_pair[0].generate(**prompts, do_sample=False, max_new_tokens=24)
    inner = []

    def criterion(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.shape[1] == 20:
            inner.append(generate(llama_pair, prompts))
        return torch.zeros(len(ids), dtype=torch.bool)

    assert generate(llama_pair, prompts, stopping_criteria=[criterion]).equal(expected)
    assert inner[0].equal(expected)


def test_sampling_on_used_storage_is_the_same_as_on_new(llama_pair):
    prompts = make_prompts(2)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(generate(llama_pair, prompts, do_sample=True, num_assistant_tokens=4))
    assert results[0].equal(results[1])


def test_what_is_kept_does_not_keep_a_model_alive():
    pair = make_pair("llama", seed=5)
    generate(pair, make_prompts(1))
    gone = weakref.ref(pair[0])
    assert pair[0] in kept._kept
    del pair
    gc.collect()
    assert gone() is None


# ----------------------------------------------------------------------------------------- compiled drafts, targets


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and widths of steps that ran compiled."""
    seen: list[tuple[int, int]] = []
    forward = graphs.StaticForwards._forward

    def spy(self: Any, step: Any) -> Any:
        chosen = forward(self, step)
        if chosen is self._compiled:
            seen.append(tuple(step.ids.shape))
        return chosen

    monkeypatch.setattr(graphs.StaticForwards, "_forward", spy)
    return seen


def compiled(pair: tuple[PreTrainedModel, PreTrainedModel], prompts: dict[str, Any], **options: Any) -> Any:
    """The output of a call with a compiled draft, and its statistics."""
    stats = hf_specdec.SpeculationStats()
    options = {"cache_implementation": None, "speculation_compile": "draft", "num_assistant_tokens": 4} | options
    return generate(pair, prompts, speculation_stats=stats, **options), stats


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("name", "rows"), [("llama", 1), ("gpt2", 3)])
def test_a_compiled_draft_says_the_same_and_is_compiled_once(name, rows, widths):
    target, _ = pair = make_pair(name)
    copy = perturbed(target, 0.0)
    for draft, calls in ((pair[1], 2), (copy, 1)):
        generate((target, draft), make_prompts(rows))  # keeps storage for calls of its own kind
        for seed in range(calls):
            prompts = make_prompts(rows, seed=seed)
            given, stats = compiled((target, draft), prompts, max_new_tokens=120 + 50 * seed)
            assert given.equal(target.generate(**prompts, do_sample=False, max_new_tokens=120 + 50 * seed))
            assert (stats.compile_seconds > 0) == (seed == 0)
            assert "compiled in" in stats.summary() or seed > 0
            assert stats.compile_seconds == 0 or stats.prefill_seconds < stats.compile_seconds
    assert stats.acceptance_rate == 1  # a copy is always right: entries of rejected drafts stay invisible
    assert set(widths) == {(rows, 1), (rows, 2)}


@pytest.mark.skipif(compiled_attention.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not packing._packs(torch.float32), reason="this machine's PyTorch packs no weights")
@pytest.mark.usefixtures("weights_packed_from_the_first_token_on")
def test_compiled_steps_multiply_and_attend_as_their_call_wants_it(monkeypatch):
    """Packed weights and compiled attention are not part of the compiled code: it works with and without them."""
    target = make_model(LlamaConfig(**{**SIZES, "head_dim": 32}), seed=21)
    draft, prompts = perturbed(target, 0.3, seed=22), make_prompts(1)
    expected = target.generate(**prompts, do_sample=False, max_new_tokens=40)
    compiled_runs, used = [], set()
    forward = graphs.StaticForwards._forward

    def step(self: Any, step: Any) -> Any:
        chosen = forward(self, step)

        def run(*args: Any) -> torch.Tensor:
            before, _ = set(used), used.clear()
            logits = chosen(*args)
            if chosen is self._compiled:
                compiled_runs.append(frozenset(used))
            used.update(before)
            return logits

        return run

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (used.add(name), original(*args))[1])

    monkeypatch.setattr(graphs.StaticForwards, "_forward", step)
    spy(compiled_attention, "attend")
    spy(attention, "folded")
    spy(packing, "_multiply")
    generate((target, draft), prompts, cache_implementation=None, speculation_compile="target")
    for compiles, packs, wanted in (
        ("draft", False, {"folded"}),
        (True, True, {"attend", "_multiply"}),
        ("draft", True, {"folded", "_multiply"}),
    ):
        compiled_runs.clear()
        options = {"speculation_compile": compiles, "speculation_pack_weights": packs, "max_new_tokens": 40}
        given, stats = compiled((target, draft), prompts, **options)
        assert given.equal(expected) and 0 < stats.acceptance_rate < 1
        assert set(compiled_runs) == {frozenset(wanted)}
    assert stats.compile_seconds == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("name", "rows"), [("llama", 1), ("gpt2", 3), ("mistral-sliding", 2)])
def test_a_compiled_target_says_the_same_and_is_compiled_once(name, rows, widths):
    target, _ = pair = make_pair(name)
    generate(pair, make_prompts(rows))  # keeps storage for calls of its own kind
    for seed, gamma in enumerate((4, 1, 6)):
        prompts = make_prompts(rows, seed=seed)
        given, stats = compiled(pair, prompts, speculation_compile="target", num_assistant_tokens=gamma)
        assert given.equal(target.generate(**prompts, do_sample=False, max_new_tokens=24))
        assert (stats.compile_seconds > 0) == (seed == 0)
    assert {(rows, 2), (rows, 5), (rows, 7)} <= set(widths)
    assert not {width for _, width in widths} & {1, 9, 17}  # of blocks of 7, and none is filled up to 9
    expected = target.generate(**prompts, do_sample=False, max_new_tokens=24)
    eos = int(expected[0, prompts["input_ids"].shape[1] + 5])  # the first row ends; others go on uncompiled
    expected = target.generate(**prompts, do_sample=False, max_new_tokens=24, eos_token_id=eos)
    assert compiled(pair, prompts, speculation_compile="target", eos_token_id=eos)[0].equal(expected)
    assert {count for count, _ in widths} == {rows}


def test_compiled_blocks_that_are_captured_have_few_widths(monkeypatch):
    """Each graph has one width; no block is narrower than the compiled ones."""
    forwards = graphs.StaticForwards(RaggedCache(2, torch.device("cpu"), 64, 64), BLOCKS)
    assert [forwards._filled_up(2, width) for width in (1, 6)] == [1, 9]
    monkeypatch.setattr(forwards, "_compiled", forwards._run)
    assert [forwards._filled_up(2, width) for width in (1, 6)] == [2, 6]
    monkeypatch.setattr(forwards, "_captures", True)
    assert [forwards._filled_up(2, width) for width in (1, 6)] == [2, 9]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_are_rounded_as_uncompiled_ones(widths):
    target = make_model(LlamaConfig(**SIZES), seed=3).to(torch.bfloat16)
    pair, prompts = (target, perturbed(target, 0.1, seed=4)), make_prompts(1)
    options = {"return_dict_in_generate": True, "output_logits": True, "num_assistant_tokens": 4}
    expected = generate(pair, prompts, **options)
    given, _ = compiled(pair, prompts, speculation_compile="target", **options)
    assert widths and given.sequences.equal(expected.sequences)
    differ = [(a != b).float().mean() for a, b in zip(given.logits, expected.logits)]
    assert max(differ) < 0.05


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_target_that_has_changed_is_compiled_again(widths):
    target, draft = make_pair("llama")
    target = perturbed(target, 0.0)
    prompts = make_prompts(1)

    def check() -> torch.Tensor:
        given, _ = compiled((target, draft), prompts, speculation_compile="target")
        expected = target.generate(**prompts, do_sample=False, max_new_tokens=24)
        assert given.equal(expected)
        return expected

    said = [check()]
    with torch.no_grad():  # known without compiling
        target.model.layers[0].mlp.down_proj.weight *= -2
    said.append(check())
    target.model.layers[1].self_attn.scaling *= 5
    said.append(check())
    target.model.layers[0].input_layernorm.variance_epsilon = 10.0
    said.append(check())
    assert len({tuple(tokens[0].tolist()) for tokens in said}) == 4
    seen, forwards = len(widths), []
    hook = target.lm_head.register_forward_hook(lambda module, args, logits: -logits)
    check()
    hook.remove()
    hook = target.register_forward_pre_hook(lambda module, args: forwards.append(module))
    check()
    hook.remove()
    assert len(widths) == seen and len(forwards) > 24  # whose hooks must see every forward is not compiled


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_target_goes_on_from_a_cache(widths):
    target, draft = make_pair("llama")
    prompts = make_prompts(1)
    whole = target.generate(**prompts, do_sample=False, max_new_tokens=30)
    before = target.generate(**prompts, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    given, _ = compiled(
        (target, draft),
        {"input_ids": before.sequences},
        past_key_values=before.past_key_values,
        speculation_compile="target",
        max_new_tokens=20,
    )
    assert given.equal(whole) and widths


def test_a_target_whose_forwards_change_their_shapes_is_not_compiled(monkeypatch, caplog):
    monkeypatch.delattr(torch, "compile")
    session.logger.warning_once.cache_clear()
    pair, prompts = make_pair("bloom"), make_prompts(2)
    given, stats = compiled(pair, prompts, speculation_compile="target")
    assert given.equal(pair[0].generate(**prompts, do_sample=False, max_new_tokens=24))
    assert stats.compile_seconds == 0
    assert "BloomForCausalLM verifies uncompiled: its forwards change their shapes here" in caplog.text


def test_without_a_compiler_the_draft_drafts_uncompiled(monkeypatch, caplog):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    graphs.logger.warning_once.cache_clear()
    pair, prompts = make_pair("llama"), make_prompts(2)
    given, _ = compiled(pair, prompts)
    assert given.equal(pair[0].generate(**prompts, do_sample=False, max_new_tokens=24))
    assert "LlamaForCausalLM could not be compiled (no compiler here): it runs uncompiled" in caplog.text


def test_a_draft_whose_forwards_change_their_shapes_is_not_compiled(monkeypatch, caplog):
    monkeypatch.delattr(torch, "compile")
    graphs.logger.warning_once.cache_clear()
    pair, prompts = make_pair("bloom"), make_prompts(2)
    given, stats = compiled(pair, prompts)
    assert given.equal(pair[0].generate(**prompts, do_sample=False, max_new_tokens=24))
    assert stats.compile_seconds == 0
    assert "BloomForCausalLM drafts uncompiled: its forwards change their shapes here." in caplog.text


def test_without_a_draft_model_there_is_nothing_to_compile(llama_pair):
    target, _ = llama_pair
    with pytest.raises(
        ValueError, match=r"`speculation_compile=.draft.` compiles a draft.*pass one as `assistant_model`"
    ):
        target.generate(**make_prompts(1), strategy="spec", prompt_lookup_num_tokens=3, speculation_compile="draft")
    with pytest.raises(
        ValueError, match="must be one of 'draft', 'target', 'attention', or True for all of them, got 'yes'"
    ):
        compiled(llama_pair, make_prompts(1), speculation_compile="yes")
