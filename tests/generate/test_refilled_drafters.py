"""Drafters with state of their own in `generate_many`: they forget a row that has ended, and others go on."""

import functools
from typing import Any

import pytest
from conftest import make_pair
from test_many import ENDS, alone, expected, limits, many, pair, prompts
from tokenizers_of_all_kinds import CORPUS, model_of, tokenizer_of

from hf_specdec import Drafter, Either, OtherTokenizerDrafter, SpeculationStats, SuffixDrafter
from hf_specdec.generate import many as many_module
from hf_specdec.loop import invariants

COUNT = 18  # prompts


@pytest.fixture(autouse=True)
def refilled_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static batches are an error, and after each iteration caches are compared with the text."""
    monkeypatch.setattr(invariants, "ENABLED", True)

    def refuse(*args: Any) -> None:
        raise AssertionError("static batches")

    monkeypatch.setattr(many_module._Many, "_static", refuse)


class Half(Either):
    """Copies where a copy says anything, so that rows of both kinds are in a batch."""

    def expected(self, max_tokens: int) -> float:
        return 0.4


@pytest.mark.parametrize("kind", ["suffixes", "suffixes of the batch", "either", "either, mostly copies"])
def test_each_result_is_vanillas(kind: str) -> None:
    target, draft = pair()
    made: dict[str, Any] = {
        "suffixes": SuffixDrafter,
        "suffixes of the batch": lambda: SuffixDrafter(max_requests=0),
        "either": lambda: Either(draft, SuffixDrafter()),
        "either, mostly copies": lambda: Half(draft, SuffixDrafter([expected("llama")[3]])),
    }
    stats, drafter = SpeculationStats(), made[kind]()
    options = {"max_new_tokens": limits()[:COUNT], "eos_token_id": ENDS, "num_assistant_tokens": 4}
    results = many(target, prompts()[:COUNT], assistant_model=drafter, batch_size=4, speculation_stats=stats, **options)
    found = [results[index].sequence.tolist() for index in range(COUNT)]
    assert found == expected("llama")[:COUNT]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    if kind == "suffixes":
        assert sorted(text.tokens.tolist() for text in drafter._memory) == sorted(found)


def test_longer_prompts_are_remembered_after_shorter_texts() -> None:
    target, _ = pair()
    growing, drafter = sorted(prompts(), key=len)[::5], SuffixDrafter()
    results = many(target, growing, assistant_model=drafter, batch_size=1, max_new_tokens=2)
    assert [text.tokens.tolist() for text in drafter._memory] == [
        results[index].sequence.tolist() for index in range(len(growing))
    ]


def test_what_ended_is_found_in_what_follows() -> None:
    """The same prompt again and again: each time the last text is copied, seven tokens with each forward."""
    target, _ = pair()
    options = {"batch_size": 1, "max_new_tokens": 20, "num_assistant_tokens": 6}
    results = many(target, [[20, 3, 50]] * 4, assistant_model=SuffixDrafter(), **options)
    forwards = [results[index].speculation.target_forwards for index in range(4)]
    assert forwards[0] > 10 and forwards[1:] == [3, 3, 3]


@functools.cache
def other_pair(by: str) -> tuple[Any, OtherTokenizerDrafter]:
    tokenizers = tokenizer_of("bytes"), tokenizer_of("other bytes")
    return model_of("bytes"), OtherTokenizerDrafter(model_of("other bytes"), *tokenizers, by=by)


@pytest.mark.parametrize("by", ["token", "text"])
def test_drafts_with_another_tokenizer(by: str) -> None:
    target, drafter = other_pair(by)
    texts = [CORPUS[20 * i : 20 * i + 4 + 7 * (i % 5)] for i in range(9)]
    ids = [tokenizer_of("bytes")(text)["input_ids"] for text in texts]
    sizes = [4 + 9 * (i % 3) for i in range(9)]
    stats = SpeculationStats()
    results = many(
        target, ids, assistant_model=drafter, batch_size=4, max_new_tokens=sizes, num_assistant_tokens=4,
        speculation_stats=stats,
    )  # fmt: skip
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    for index, prompt in enumerate(ids):
        assert results[index].sequence.tolist() == alone(target, prompt, max_new_tokens=sizes[index]), texts[index]


def test_either_refills_if_both_of_its_drafters_do() -> None:
    class Plain(Drafter):
        def propose(self, context: Any, max_tokens: int) -> Any: ...

    draft = make_pair("llama")[1]
    assert Either(draft, SuffixDrafter()).refills
    assert not Either(Plain(), SuffixDrafter()).refills and not Either(draft, Plain()).refills


def test_coupled_texts_do_not_depend_on_what_was_remembered() -> None:
    target, _ = pair()
    options = {"do_sample": True, "speculation_acceptance": "coupled", "speculation_seed": 5, "max_new_tokens": 10}
    found = many(target, prompts()[:9], assistant_model=SuffixDrafter(), batch_size=3, **options)
    for index, prompt in enumerate(prompts()[:9]):
        own = options | {"speculation_seed": 5 + index, "strategy": "spec"}
        assert found[index].sequence.tolist() == alone(target, prompt, **own)
