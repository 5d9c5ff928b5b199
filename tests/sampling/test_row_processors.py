"""Processors with a state per row that can go back: drafts are drawn under them, and blocks are verified with them."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCAB, make_pair, make_prompts
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from hf_specdec import MatcherProcessor, RowProcessor, SpeculationStats, pure
from hf_specdec.sampling import row_processors
from hf_specdec.sampling.context import Context
from hf_specdec.sampling.row_processors import Mask, RowStates

NEW, WIDTH, EOS = 30, 14, 5
WORDS = -(-VOCAB // 32)


class Automaton:
    """A toy grammar: what it allows depends on all tokens so far. Some states leave one token, some only the end."""

    def __init__(self, seed: int = 0) -> None:
        self.states = [seed]

    @property
    def ended(self) -> bool:
        return self.states[-1] is None

    def mask(self) -> Tensor:
        tokens, state = torch.arange(VOCAB), self.states[-1]
        if self.ended:
            return tokens == EOS
        if state % 7 == 3:
            return tokens == 10 + state % 31
        if state % 19 == 4:
            return tokens == EOS
        return ((tokens + state) % 3 != 0) & (tokens != EOS)

    def accept(self, token: int) -> None:
        assert self.ended or self.mask()[token], f"token {token} in state {self.states[-1]}"
        self.states.append(None if token == EOS or self.ended else (self.states[-1] * 5 + token + 1) % 1009)

    def rollback(self, count: int) -> None:
        assert 0 < count < len(self.states)
        del self.states[len(self.states) - count :]


class Grammar(RowProcessor):
    """The toy grammar, from another state in each row."""

    def __init__(self) -> None:
        self.calls = {"accept": 0, "rollback": 0, "mask": 0}

    def begin(self, prompts: Tensor) -> None:
        self.rows = [Automaton(row) for row in range(len(prompts))]

    def accept(self, row: int, token: int) -> None:
        self.calls["accept"] += 1
        self.rows[row].accept(token)

    def rollback(self, row: int, count: int) -> None:
        self.calls["rollback"] += 1
        self.rows[row].rollback(count)

    def mask(self, row: int) -> Tensor | None:
        self.calls["mask"] += 1
        return None if self.rows[row].ended else self.rows[row].mask()


class InVanilla(LogitsProcessor):
    """The same for vanilla alone, written anew: each row's tokens from the prompt's end on."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(input_ids[:, WIDTH:].tolist()):
            automaton = Automaton(row)
            for token in tokens:
                if not automaton.ended:
                    automaton.accept(token)
            if not automaton.ended:
                scores[row, ~automaton.mask()] = -torch.inf
        return scores


def stats_of(target: Any, inputs: Any, **kwargs: Any) -> tuple[list[list[int]], SpeculationStats]:
    stats = SpeculationStats()
    out = target.generate(**inputs, max_new_tokens=NEW, strategy="spec", speculation_stats=stats, **kwargs)
    return out.tolist(), stats


@pytest.fixture(scope="module", params=["llama", "gemma2", "bloom"])
def pair(request: pytest.FixtureRequest) -> Any:
    return make_pair(request.param)


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "1": lambda draft: {"assistant_model": draft, "num_assistant_tokens": 1},
    "5": lambda draft: {"assistant_model": draft, "num_assistant_tokens": 5},
    "threshold": lambda draft: {
        "assistant_model": draft, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.2,
    },
    "look-up": lambda draft: {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_vanillas(pair, way, batch, eos):
    (target, draft), inputs = pair, make_prompts(batch)
    kwargs = {"eos_token_id": eos}
    expected = target.generate(**inputs, max_new_tokens=NEW, logits_processor=[InVanilla()], **kwargs).tolist()
    assert target.generate(**inputs, max_new_tokens=NEW, logits_processor=[Grammar()], **kwargs).tolist() == expected
    given, _ = stats_of(target, inputs, logits_processor=[Grammar()], **kwargs, **WAYS[way](draft))
    assert given == expected
    if eos and batch == 4:
        assert any(EOS in row[WIDTH:-1] for row in expected)


def test_drafts_are_drawn_under_the_processor_and_rows_do_not_wait_for_each_other(llama_pair):
    """The target drafts for itself, so that every draft made under the same masks is accepted."""
    target, inputs = llama_pair[0], make_prompts(4)
    way = {"assistant_model": target, "num_assistant_tokens": 4}
    _, stats = stats_of(target, inputs, logits_processor=[Grammar()], **way)
    assert stats.acceptance_rate == 1
    way["assistant_model"] = llama_pair[1]
    _, stats = stats_of(target, inputs, logits_processor=[Grammar()], **way)
    tokens = [row.row_iterations for row in stats.per_row]
    assert len(set(tokens)) > 1
    assert stats.block_efficiency > 1.5


def test_a_token_that_is_the_only_one_needs_no_draft_forward(llama_pair):
    class Fixed(Grammar):
        def mask(self, row: int) -> Tensor:
            return torch.arange(VOCAB) == (self.rows[row].states[-1] * 3) % 50 if self.only else super().mask(row)

        def accept(self, row: int, token: int) -> None:
            self.rows[row].states.append((self.rows[row].states[-1] * 5 + token + 1) % 1009)

        only = True

    target, draft = llama_pair
    for batch in (1, 3):
        given, stats = stats_of(
            target, make_prompts(batch), logits_processor=[Fixed()], assistant_model=draft, num_assistant_tokens=4
        )
        assert stats.draft_forwards == 0
        assert stats.acceptance_rate == 1
        assert given == target.generate(**make_prompts(batch), max_new_tokens=NEW, logits_processor=[Fixed()]).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding"])
def test_after_forced_tokens_the_draft_has_read_them(name):
    """Forced tokens are fed together with the next one that is not: drafts are as if each had been fed by itself."""
    target, _ = make_pair(name)
    way = {"assistant_model": target, "num_assistant_tokens": 6}
    for batch in (1, 3):
        _, stats = stats_of(target, make_prompts(batch), logits_processor=[Grammar()], **way)
        assert stats.acceptance_rate == 1
        assert batch > 1 or stats.draft_forwards < stats.drafted_tokens


def test_each_token_is_accepted_once_and_masks_are_not_made_twice(llama_pair):
    (target, draft), grammar = llama_pair, Grammar()
    _, stats = stats_of(
        target, make_prompts(3), logits_processor=[grammar], assistant_model=draft, num_assistant_tokens=4
    )
    assert grammar.calls["accept"] <= stats.committed_tokens + stats.drafted_tokens
    assert grammar.calls["rollback"] <= stats.row_iterations
    assert grammar.calls["mask"] <= stats.committed_tokens + stats.drafted_tokens + 3


def test_what_is_kept_of_a_row_does_not_grow_with_its_text():
    context = Context(torch.randint(2, 9, (1, WIDTH)), [0], 500, 0)
    states = RowStates(Alike(), context.host[:, :WIDTH])
    for _ in range(100):
        assert len(states.masks(context, 0, [7, 7, 7], 0)) == 4
        context.append([[7, 8]])
    assert states.processor.accepted == 2 * 99 + 3
    assert max(len(states._masks[0]), len(states._after[0])) <= 4


class Alike(RowProcessor):
    """Allows everything, and counts."""

    accepted = 0

    def accept(self, row: int, token: int) -> None:
        self.accepted += 1

    def rollback(self, row: int, count: int) -> None:
        self.accepted -= count

    def mask(self, row: int) -> None:
        return None


def test_other_processors_before_and_after_keep_their_order(llama_pair):
    (target, draft), inputs = llama_pair, make_prompts(3)

    def processors(grammar: LogitsProcessor) -> LogitsProcessorList:
        return LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(1.8), grammar, RepetitionPenaltyLogitsProcessor(0.7)]
        )

    expected = target.generate(**inputs, max_new_tokens=NEW, logits_processor=processors(InVanilla())).tolist()
    way = {"assistant_model": draft, "num_assistant_tokens": 4}
    assert stats_of(target, inputs, logits_processor=processors(Grammar()), **way)[0] == expected


def test_beside_a_processor_that_must_be_called_step_by_step(llama_pair):
    class Counting(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            return scores + 2.0 * (torch.arange(VOCAB) % 5 == self.calls % 5)

    (target, draft), inputs = llama_pair, make_prompts(3)
    kwargs = {**inputs, "max_new_tokens": NEW}
    expected = target.generate(**kwargs, logits_processor=[InVanilla(), Counting()]).tolist()
    way = {"assistant_model": draft, "num_assistant_tokens": 4}
    assert stats_of(target, inputs, logits_processor=[Grammar(), Counting()], **way)[0] == expected


BAD_MASKS: dict[str, Any] = {
    "list": [True] * VOCAB,
    "int": torch.ones(VOCAB, dtype=torch.int64),
    "two axes": torch.ones(1, VOCAB, dtype=torch.bool),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_what_is_no_mask_raises_an_error_that_says_so(llama_pair, name):
    class Bad(Grammar):
        def mask(self, row: int) -> Any:
            return BAD_MASKS[name]

    with pytest.raises(TypeError, match=r"Bad\.mask must return a bool tensor"):
        stats_of(llama_pair[0], make_prompts(1), logits_processor=[Bad()], assistant_model=llama_pair[1])


def test_a_mask_may_be_shorter_or_longer_than_the_scores():
    short = Mask.of(torch.tensor([True, False]), object())
    assert short.of_width(4).tolist() == [True, False, False, False]
    assert (0 in short, 1 in short, 3 in short, short.only) == (True, False, False, 0)
    beyond = Mask.of(torch.tensor([True, False]), types.SimpleNamespace(allows_beyond=True))
    assert beyond.of_width(4).tolist() == [True, False, True, True]
    assert (3 in beyond, beyond.only) == (True, None)
    assert Mask.of(torch.tensor([True, False, True]), object()).of_width(2).tolist() == [True, False]
    scores = torch.randn(2, 4)
    assert row_processors.apply(scores, [None, Mask()]) is scores


# Matchers of three libraries, with their methods and the toy grammar


class LikeXGrammar:
    """`GrammarMatcher` of xgrammar."""

    def __init__(self, row: int) -> None:
        self.automaton = Automaton(row)

    def accept_token(self, token: int) -> bool:
        if not self.automaton.mask()[token]:
            return False
        self.automaton.accept(token)
        return True

    def rollback(self, count: int = 1) -> None:
        self.automaton.rollback(count)

    def is_terminated(self) -> bool:
        return self.automaton.ended

    def fill_next_token_bitmask(self, bitmask: Tensor, index: int = 0) -> None:
        bitmask[index] = packed(self.automaton.mask())


class LikeLLGuidance:
    """`LLMatcher` of llguidance."""

    def __init__(self, row: int) -> None:
        self.automaton = Automaton(row)

    def consume_token(self, token: int) -> bool:
        self.automaton.accept(token)
        return True

    def rollback(self, count: int) -> bool:
        self.automaton.rollback(count)
        return True

    def is_stopped(self) -> bool:
        return self.automaton.ended

    def compute_bitmask(self) -> bytes:
        return packed(self.automaton.mask()).numpy().tobytes()


class LikeGuide:
    """`Guide` of outlines_core."""

    def __init__(self, row: int) -> None:
        self.automaton = Automaton(row)

    def advance(self, token_id: int, return_tokens: bool = True) -> None:
        self.automaton.accept(token_id)

    def rollback_state(self, count: int) -> None:
        self.automaton.rollback(count)

    def is_finished(self) -> bool:
        return self.automaton.ended

    def accepts_tokens(self, tokens: list[int]) -> bool:
        return not self.automaton.ended and bool(self.automaton.mask()[tokens[0]])

    def write_mask_into(self, address: int, words: int, size: int) -> None:
        import ctypes

        data = packed(self.automaton.mask()).numpy().tobytes()
        assert size == 4 and words * size >= len(data)
        ctypes.memmove(address, data, len(data))


def packed(mask: Tensor) -> Tensor:
    bits = torch.nn.functional.pad(mask, (0, -len(mask) % 32)).view(-1, 32).long()
    words = (bits << torch.arange(32)).sum(dim=1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


MATCHERS: dict[str, type] = {"xgrammar": LikeXGrammar, "llguidance": LikeLLGuidance, "outlines_core": LikeGuide}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", MATCHERS)
def test_matchers_are_told_apart_by_their_methods(llama_pair, kind, batch):
    (target, draft), inputs = llama_pair, make_prompts(batch)
    kwargs: dict[str, Any] = {"eos_token_id": EOS}
    expected = target.generate(**inputs, max_new_tokens=NEW, logits_processor=[InVanilla()], **kwargs).tolist()

    def processor() -> MatcherProcessor:
        return MatcherProcessor(MATCHERS[kind], vocab_size=VOCAB)

    assert target.generate(**inputs, max_new_tokens=NEW, logits_processor=[processor()], **kwargs).tolist() == expected
    way = {"assistant_model": draft, "num_assistant_tokens": 4}
    given, stats = stats_of(target, inputs, logits_processor=[processor()], **kwargs, **way)
    assert given == expected
    assert 0 < stats.acceptance_rate < 1


def test_other_objects_are_no_matchers(llama_pair):
    processor = MatcherProcessor(lambda row: object(), vocab_size=VOCAB)
    with pytest.raises(TypeError, match=r"accept_token, rollback, .*Got object"):
        stats_of(llama_pair[0], make_prompts(1), logits_processor=[processor], assistant_model=llama_pair[1])


class LibraryProcessor(LogitsProcessor):
    """Like xgrammar's own: makes its matchers in its first call, which accepts nothing."""

    def __init__(self) -> None:
        self.matchers: list[LikeXGrammar] = []
        self.full_vocab_size = VOCAB
        self.bitmask = torch.full((1, WORDS), -1, dtype=torch.int32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.matchers:
            self.matchers = [LikeXGrammar(row) for row in range(len(input_ids))]
            self.bitmask = torch.full((len(input_ids), WORDS), -1, dtype=torch.int32)
        else:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist()):
                if not matcher.is_terminated():
                    assert matcher.accept_token(token)
        for i, matcher in enumerate(self.matchers):
            if not matcher.is_terminated():
                matcher.fill_next_token_bitmask(self.bitmask, i)
        bits = (self.bitmask[:, :, None] >> torch.arange(32)) & 1
        return scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)


class Changed(LibraryProcessor):
    """A user's subclass, which does more: it allows everything in the first three steps of every ten."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = super().__call__(input_ids, scores)
        return scores + 3.0 * (torch.arange(VOCAB) % 4 == input_ids.shape[1] % 4)


class Renamed(LibraryProcessor):
    """A subclass that does nothing else."""


@pytest.fixture
def of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LibraryProcessor.__call__, "__module__", "xgrammar.contrib.hf")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [LibraryProcessor, Renamed, Changed])
def test_processors_of_grammar_libraries_are_used_by_their_matchers(llama_pair, kind, batch, of_a_library):
    """Vanilla's tokens for all; not in lockstep, and with drafts under the grammar, where the code is the library's."""
    (target, draft), inputs, processor = llama_pair, make_prompts(batch), kind()
    kwargs = {"eos_token_id": EOS}
    expected = target.generate(**inputs, max_new_tokens=NEW, logits_processor=[kind()], **kwargs).tolist()
    way = {"assistant_model": draft, "num_assistant_tokens": 4}
    given, stats = stats_of(target, inputs, logits_processor=[processor], **kwargs, **way)
    assert given == expected
    assert (processor.matchers == []) == (kind is not Changed)
    way["assistant_model"] = target
    _, stats = stats_of(target, inputs, logits_processor=[kind()], **kwargs, **way)
    assert (stats.acceptance_rate > 0.9) == (kind is not Changed)


def test_a_processor_that_says_it_is_not_pure_is_called_step_by_step(llama_pair, of_a_library):
    processor = LibraryProcessor()
    processor.is_pure = False
    stats_of(llama_pair[0], make_prompts(2), logits_processor=[processor], assistant_model=llama_pair[1])
    assert len(processor.matchers) == 2


# Pure functions


def allowed(row: int, ids: Tensor) -> list[int]:
    return list(range((row + int(ids.sum())) % 3, VOCAB, 3))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_is_declared_pure_needs_no_lockstep(pair, way, batch, monkeypatch):
    monkeypatch.setenv("HF_SPECDEC_CHECK", "1")
    (target, draft), inputs = pair, make_prompts(batch)
    expected = target.generate(**inputs, max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed).tolist()
    declared = pure(lambda row, ids: allowed(row, ids))
    given, stats = stats_of(target, inputs, prefix_allowed_tokens_fn=declared, **WAYS[way](draft))
    assert given == expected
    if way == "5":
        _, stepwise = stats_of(target, inputs, prefix_allowed_tokens_fn=allowed, **WAYS[way](draft))
        assert stats.target_forwards <= stepwise.target_forwards


def test_an_attribute_a_method_or_an_enforcer_declares_it_too():
    class Enforcer:
        token_enforcer = types.SimpleNamespace(get_allowed_tokens=lambda tokens: tokens)

        def method(self, row: int, ids: Tensor) -> list[int]:
            return allowed(row, ids)

    from hf_specdec.sampling.pure import is_pure

    assert is_pure(Enforcer()) and not is_pure(allowed)
    method = pure(Enforcer().method)
    assert is_pure(method) and method(0, torch.tensor([1])) == allowed(0, torch.tensor([1]))
    with pytest.raises(TypeError, match="Expected a function or a logits processor, got int"):
        pure(3)


def test_where_nothing_is_left_vanillas_rule_holds(llama_pair):
    """The function allows one token, which another processor forbids: transformers gives it a score of 0."""
    (target, draft), inputs = llama_pair, make_prompts(2)

    def one(row: int, ids: Tensor) -> list[int]:
        return [20 + ids.shape[0] % 7]

    kwargs = {"bad_words_ids": [[22], [24]]}
    expected = target.generate(**inputs, max_new_tokens=12, prefix_allowed_tokens_fn=one, **kwargs)
    way = {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 4}
    given = target.generate(**inputs, max_new_tokens=12, prefix_allowed_tokens_fn=pure(one), **kwargs, **way)
    assert given.tolist() == expected.tolist()


class Pushing(LogitsProcessor):
    """A pure function of each row's own tokens; it writes into the scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores += 3.0 * (torch.arange(VOCAB) % 4 == (input_ids.sum(dim=1, keepdim=True) + input_ids.shape[1]) % 4)
        return scores


@pytest.mark.parametrize("batch", [1, 4])
def test_a_processor_may_be_declared_pure(llama_pair, batch, monkeypatch):
    monkeypatch.setenv("HF_SPECDEC_CHECK", "1")
    (target, draft), inputs = llama_pair, make_prompts(batch)
    outputs = {"return_dict_in_generate": True, "output_scores": True}
    expected = target.generate(**inputs, max_new_tokens=NEW, logits_processor=[Pushing()], **outputs)
    way = {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 4}
    given = target.generate(**inputs, max_new_tokens=NEW, logits_processor=[pure(Pushing())], **outputs, **way)
    assert given.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(given.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_false_promise_is_found_when_checks_are_on(llama_pair, monkeypatch):
    class Counting(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            return scores + self.calls

    turns = iter(range(10**6))
    monkeypatch.setenv("HF_SPECDEC_CHECK", "1")
    for kwargs in (
        {"logits_processor": [pure(Counting())]},
        {"prefix_allowed_tokens_fn": pure(lambda row, ids: [next(turns) % 40])},
    ):
        with pytest.raises(ValueError, match="was declared pure, but two calls with the same tokens differ"):
            stats_of(llama_pair[0], make_prompts(1), assistant_model=llama_pair[1], **kwargs)
