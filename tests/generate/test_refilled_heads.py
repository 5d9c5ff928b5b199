"""Heads in `generate_many`: entries are made anew for the next prompt, and the states of other rows wait meanwhile."""

import functools
from pathlib import Path
from typing import Any

import dflash_reference
import pytest
import test_dflash
import test_eagle3
import test_mtp
import test_shared_entries
import torch
from conftest import VOCAB
from eagle3_reference import kindred_head, make_parts, random_head, some_tokens
from mtp_reference import make_deepseek, make_module, make_tensors, module_logits, write_tensors
from test_eagle3 import asked, kept, make_target  # noqa: F401 - fixtures
from test_many import alone, many

import hf_specdec
from hf_specdec import SpeculationStats
from hf_specdec.drafters.heads import HeadDrafter, entries
from hf_specdec.generate import many as many_module
from hf_specdec.generate.places import reason_for_static
from hf_specdec.generate.prompts import Preparation
from hf_specdec.generate.session import check_call
from hf_specdec.loop import invariants
from hf_specdec.loop.refill import RefilledDecoding
from hf_specdec.loop.schedule import Constant

# Of pieces of 24 tokens, those of 26 and 50 leave one token to read besides the last: for three MTP layers, some states
# must wait for it.
LENGTHS = [4, 19, 2, 1, 26, 7, 3, 50, 2, 9, 5]
ENDS = [3, 17]  # tokens that end texts
LIMITS = [9, 14, 3, 6, 12, 20, 1, 8, 14, 5, 10]


@functools.cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, VOCAB - 1, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture
def refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static batches are an error; caches are compared with the text; pieces of prompts do not go by the clock."""
    monkeypatch.setattr(invariants, "ENABLED", True)
    monkeypatch.setattr(RefilledDecoding, "_adapt", lambda *args: None)

    def refuse(*args: Any) -> None:
        raise AssertionError("static batches")

    monkeypatch.setattr(many_module._Many, "_static", refuse)


@functools.cache
def made(kind: str) -> tuple[Any, Any]:
    """A target, and a head that it agrees with in part."""
    if kind == "mtp":
        target: Any = make_deepseek(3)
        return target, make_module(target)
    if kind == "assistant":
        target = test_shared_entries.make_target()
        return target, test_shared_entries.make_assistant(target)
    target = make_target("mistral-sliding" if kind == "eagle3, window" else "llama")
    if kind == "dflash":
        return target, dflash_reference.kindred_head(target, dspark=True, noise=0.4)
    if kind == "p-eagle":
        return target, test_dflash.parallel_head(target)
    return target, kindred_head(target, some_tokens(80) if kind == "eagle3" else None)


@functools.cache
def expected(kind: str) -> list[list[int]]:
    target = made(kind)[0]
    texts = zip(prompts(), LIMITS)
    return [alone(target, prompt, max_new_tokens=limit, eos_token_id=ENDS) for prompt, limit in texts]


def check(kind: str, batch_size: int = 3, gamma: int = 3, **options: Any) -> SpeculationStats:
    """Vanilla's tokens for each prompt alone, with drafts accepted in part."""
    target, head = made(kind)
    stats = SpeculationStats()
    options = {"max_new_tokens": LIMITS, "eos_token_id": ENDS, "num_assistant_tokens": gamma} | options
    found = many(target, prompts(), assistant_model=head, batch_size=batch_size, speculation_stats=stats, **options)
    assert [found[index].sequence.tolist() for index in range(len(prompts()))] == expected(kind)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return stats


def check_logits(kind: str, asked: Any) -> None:  # noqa: F811
    """They are those of the reference from scratch, for rows of all ages; all rows draft as soon as they are read."""
    target, head = made(kind)
    asked = [one for one in asked if len(one[0]) - one[1] > 1]  # of a single token, no states are known
    begun = {tuple(text) for text, drafted, _ in asked if not drafted}
    assert begun >= {tuple(prompt) for prompt, limit in zip(prompts(), LIMITS) if len(prompt) > 1 < limit}
    if kind == "mtp":
        test_mtp.compare(asked, target, lambda states, text: module_logits(head, states, text))
    else:
        test_eagle3.compare(asked, head, target)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Before each draft: the most tokens of a row without an entry, and what the schedule is told of them."""
    found: list[tuple[int, int]] = []
    propose = HeadDrafter._propose

    def spy(self: HeadDrafter, context: Any, max_tokens: int) -> Any:
        found.append((max(self.cached.missing(context)), self.unread(context)))
        return propose(self, context, max_tokens)

    monkeypatch.setattr(HeadDrafter, "_propose", spy)
    return found


@pytest.mark.parametrize("kind", ["eagle3", "eagle3, window", "mtp"])
def test_each_result_is_vanillas(kind: str, refilled: None, asked: Any, waits: Any) -> None:  # noqa: F811
    """Prompts become entries as they are read, so no draft waits for them."""
    check(kind)
    check_logits(kind, asked)
    assert max(missing for missing, _ in waits) <= 3 + 1 + 3  # drafts, own token, layers
    assert not any(unread for _, unread in waits)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_pauses_and_small_pieces_leave_nothing_out(
    kind: str, refilled: None, asked: Any, kept: list[int], waits: Any, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Rows begin while others have waited for many iterations; what waits stays short."""
    plan = iter([3, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 4] + [2, 0, 1] * 60)
    monkeypatch.setattr(Constant, "plan", lambda self, *_: next(plan))
    monkeypatch.setattr(entries, "_CHUNK", 5)
    monkeypatch.setattr(entries, "_MOST_WAITING", 5)
    check(kind)
    assert kind == "mtp" or any(unread for _, unread in waits)  # MTP layers have read ahead
    target, head = made(kind)
    texts = [one for one in asked if len(one[0]) - one[1] > 1]
    if kind == "mtp":
        test_mtp.compare(texts, target, lambda states, text: module_logits(head, states, text))
    else:
        test_eagle3.compare(texts, head, target)
    layers = 1 if kind == "mtp" else 3
    assert max(kept) <= 3 * 30 * layers * 32 * 4  # rows, tokens, layers, width, bytes: the longest prompt has 50


@pytest.mark.parametrize("kind", ["dflash", "p-eagle"])
def test_heads_that_draft_at_once(kind: str, refilled: None, asked_of_blocks: Any) -> None:
    check(kind)
    target, head = made(kind)
    asked = [one for one in asked_of_blocks if len(one[0]) > 1]  # noqa: F811
    assert {tuple(text) for text, *_ in asked} >= {tuple(p) for p, n in zip(prompts(), LIMITS) if len(p) > 1 < n}
    if kind == "dflash":
        test_dflash.compare(
            asked, head.parts.aux_ids, target, lambda *given: dflash_reference.reference_logits(head, target, *given)
        )


asked_of_blocks = test_dflash.asked


def test_assistants_on_the_targets_entries(refilled: None, asked: Any) -> None:  # noqa: F811
    """Rows that go on draft also in iterations before which others have read."""
    stats = check("assistant")
    target, assistant = made("assistant")
    lengths = torch.tensor([[1] * n + [0] * (50 - n) for n in LENGTHS])
    test_shared_entries.compare(asked, assistant, target, {"attention_mask": lengths})
    drafts = sum(own.row_iterations for own in stats.per_row)
    assert len([1 for text, drafted, _ in asked if not drafted]) >= drafts - 2 * len(LENGTHS)


def test_sampled_texts_are_the_same_for_any_head(refilled: None) -> None:
    target, head = made("eagle3")
    options = {"do_sample": True, "speculation_acceptance": "coupled", "speculation_seed": 5, "max_new_tokens": 10}
    found = many(target, prompts(), assistant_model=head, batch_size=3, **options)
    for index, prompt in enumerate(prompts()):
        own = options | {"speculation_seed": 5 + index, "strategy": "spec"}
        assert found[index].sequence.tolist() == alone(target, prompt, **own)


def test_a_random_head_and_the_default_schedule(refilled: None) -> None:
    """All of its drafts are rejected."""
    target = made("eagle3")[0]
    options = {"max_new_tokens": LIMITS, "eos_token_id": ENDS, "num_assistant_tokens_schedule": "optimal"}
    options |= {"assistant_model": random_head(make_parts()), "batch_size": 3}
    found = many(target, prompts(), **options)
    assert [found[index].sequence.tolist() for index in range(len(prompts()))] == expected("eagle3")


def test_compiled_attention_is_no_reason_for_static_batches() -> None:
    """Of all that `speculation_compile=True` compiles, heads leave attention, which has no fixed shapes."""
    target, head = made("eagle3")
    preparation = Preparation(target, head, {"max_new_tokens": 4, "speculation_compile": True})
    assert reason_for_static(check_call(preparation.call), preparation) is None


def test_targets_with_a_state_take_static_batches(tmp_path: Path) -> None:
    target = test_mtp.uneven(make_target("qwen3_5"))
    folder = write_tensors(tmp_path, make_tensors(target))
    texts, stats = prompts()[:6], SpeculationStats()
    options = {"max_new_tokens": 6, "num_assistant_tokens": 2}
    found = many(target, texts, assistant_model=str(folder), batch_size=3, speculation_stats=stats, **options)
    assert [found[index].sequence.tolist() for index in range(6)] == [alone(target, p, max_new_tokens=6) for p in texts]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_after_an_error_the_target_is_as_it_was(refilled: None) -> None:
    target, head = make_target(), made("eagle3")[1]
    results = hf_specdec.generate_many(target, prompts(), head, do_sample=False, max_new_tokens=6, batch_size=2)
    next(results)
    assert any(module._forward_hooks or module._forward_pre_hooks for module in target.modules())
    results.close()  # type: ignore[attr-defined]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target.modules())
