"""`generate_many`: each result is the one of its prompt alone, whatever shares the batch with it, before and after."""

import functools
import gc
import itertools
import random
import resource
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, make_model, make_pair, perturbed
from test_recurrent import ARCHITECTURES as RECURRENT
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_specdec
from hf_specdec import Draft, Drafter, Generated, PromptLookupDrafter, RowProcessor, SpeculationStats
from hf_specdec.cache.ragged import RaggedCache
from hf_specdec.generate import many as many_module
from hf_specdec.generate.static_batches import StaticBatches
from hf_specdec.loop import invariants
from hf_specdec.loop.refill import RefilledDecoding
from hf_specdec.models.cached import CachedModel
from hf_specdec.sampling.context import Context

ENDS = [3, 17, 40]  # tokens that end texts, so that these have all lengths


@functools.cache
def pair(name: str = "llama") -> tuple[Any, Any]:
    if name in RECURRENT:
        target = make_model(RECURRENT[name]())
        return target, perturbed(target, 0.05)
    return make_pair(name, 0.08)


@functools.cache
def prompts(count: int = 40, longest: int = 50, seed: int = 0) -> list[list[int]]:
    """Short and long ones, in no order."""
    rng = random.Random(seed)
    lengths = [
        max(1, int(longest ** rng.random())) if rng.random() < 0.6 else rng.randint(1, longest) for _ in range(count)
    ]
    return [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


@functools.cache
def limits(count: int = 40) -> list[int]:
    rng = random.Random(1)
    return [rng.choice([1, 2, 5, 10, 20]) for _ in range(count)]


def alone(target: Any, prompt: list[int], **options: Any) -> list[int]:
    """`generate()` for one prompt; vanilla's if no strategy is given."""
    ids = torch.tensor([prompt])
    out: Tensor = target.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False} | options)
    return out[0].tolist()


def many(target: Any, prompts: Any, **options: Any) -> dict[int, Generated]:
    """By index."""
    results = list(hf_specdec.generate_many(target, prompts, **{"do_sample": False} | options))
    assert len({result.index for result in results}) == len(results)
    for result in results:
        assert result.error is None
        assert result.sequence.dtype == torch.int64 and result.sequence.ndim == 1
        assert result.sequence[len(result.sequence) - len(result.new_tokens) :].tolist() == result.new_tokens.tolist()
    return {result.index: result for result in results}


@functools.cache
def expected(name: str) -> list[list[int]]:
    target = pair(name)[0]
    return [
        alone(target, prompt, max_new_tokens=limit, eos_token_id=ENDS) for prompt, limit in zip(prompts(), limits())
    ]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "ENABLED", True)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [("llama", 2), ("llama", 5), ("mistral-sliding", 2), ("mistral-sliding", 5), ("mamba2", 5)],
)
def test_each_result_is_vanillas_for_the_prompt_alone(name: str, batch_size: int) -> None:
    target, draft = pair(name)
    stats = SpeculationStats()
    results = many(
        target,
        iter(prompts()),
        assistant_model=draft,
        batch_size=batch_size,
        max_new_tokens=limits(),
        eos_token_id=ENDS,
        num_assistant_tokens=4,
        speculation_stats=stats,
    )
    assert 0.1 < stats.acceptance_rate < 0.95
    assert {index: result.sequence.tolist() for index, result in results.items()} == dict(enumerate(expected(name)))
    assert {result.finished for result in results.values()} == {"eos", "max_length"}
    assert list(results) != sorted(results)  # as they end


@pytest.mark.parametrize("way", ["look-up", "early exit", "optimal", "a user's drafter"])
def test_however_drafts_are_made(way: str) -> None:
    target, draft = pair("llama")
    ways: dict[str, dict[str, Any]] = {
        "look-up": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "early exit": {"assistant_early_exit": 1},
        "optimal": {"assistant_model": draft, "num_assistant_tokens_schedule": "optimal", "num_assistant_tokens": 6},
        "a user's drafter": {"assistant_model": PromptLookupDrafter()},
    }
    results = many(target, prompts(), batch_size=5, max_new_tokens=limits(), eos_token_id=ENDS, **ways[way])
    assert [results[i].sequence.tolist() for i in range(40)] == expected("llama")


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_caches_stand_for_the_committed_tokens_after_every_iteration(name: str, checked: None) -> None:
    target, draft = pair(name)
    some = prompts()[:12]
    results = many(target, some, assistant_model=draft, batch_size=3, max_new_tokens=limits()[:12], eos_token_id=ENDS)
    assert [results[i].sequence.tolist() for i in range(12)] == expected(name)[:12]


def test_coupled_sampling_gives_each_prompt_its_text_alone() -> None:
    target, draft = pair()
    options = {"do_sample": True, "temperature": 0.8, "speculation_acceptance": "coupled", "max_new_tokens": 12}
    results = many(target, prompts()[:9], assistant_model=draft, batch_size=3, speculation_seed=7, **options)
    others = many(target, prompts()[:9], batch_size=5, speculation_seed=list(range(7, 16)), **options)
    for index, prompt in enumerate(prompts()[:9]):
        text = alone(target, prompt, strategy="spec", assistant_model=draft, speculation_seed=7 + index, **options)
        assert results[index].sequence.tolist() == others[index].sequence.tolist() == text


def test_sampling_draws_from_the_target() -> None:
    """600 first and second tokens after one prompt: a χ² test that is wrong once in 10,000 runs."""
    scipy = pytest.importorskip("scipy.stats")
    target, draft = pair()
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 4, "max_new_tokens": 2}
    found = many(target, [[5, 6, 7]] * 600, assistant_model=draft, batch_size=50, **options)
    torch.manual_seed(1)
    drawn = target.generate(torch.tensor([[5, 6, 7]] * 600), **options)[:, 3:]
    mine = torch.stack([result.new_tokens for result in found.values()])
    both = torch.cat([mine, drawn])
    kinds, which = torch.unique(both[:, 0] * VOCAB + both[:, 1], return_inverse=True)
    table = torch.stack([which[:600].bincount(minlength=len(kinds)), which[600:].bincount(minlength=len(kinds))])
    table = table[:, table.sum(dim=0) >= 10]
    assert scipy.chi2_contingency(table.numpy()).pvalue > 1e-4


# Processors and criteria


class Alternates(RowProcessor):
    """Even and odd tokens in turn, by a state per row."""

    def begin(self, prompts: Tensor) -> None:
        if prompts.shape[1] == 1 and int(prompts[0, 0]) == 4:
            raise ValueError("no text begins with 4")
        self.counts = [[len(prompt)] for prompt in prompts]

    def accept(self, row: int, token: int) -> None:
        assert token % 2 == self.counts[row][-1] % 2
        self.counts[row].append(self.counts[row][-1] + 1 + token % 3)

    def rollback(self, row: int, count: int) -> None:
        del self.counts[row][-count:]

    def mask(self, row: int) -> Tensor:
        return torch.arange(VOCAB) % 2 == self.counts[row][-1] % 2


@hf_specdec.pure
def by_last(row: int, ids: Tensor) -> list[int]:
    assert row == 0
    return [token for token in range(2, VOCAB) if (token + int(ids[-1])) % 3]


class Shifted(LogitsProcessor):
    is_pure = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = input_ids.sum(dim=1, keepdim=True) + 3 * input_ids.shape[1]
        return scores - 0.2 * ((torch.arange(VOCAB) + seen) % 7)


class LongEnough(StoppingCriteria):
    """Ends a text after a token of 90 or more."""

    is_pure = True

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] >= 90


PROCESSED: dict[str, dict[str, Any]] = {
    "by number, the last, and the set of tokens": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": ENDS,
        "forced_eos_token_id": 17,
    },
    "the prompt's tokens": {"encoder_repetition_penalty": 4.0, "encoder_no_repeat_ngram_size": 2},
    "a row processor": {"logits_processor": LogitsProcessorList([Alternates()]), "repetition_penalty": 1.2},
    "a pure function": {"prefix_allowed_tokens_fn": by_last},
    "a pure processor": {"logits_processor": LogitsProcessorList([Shifted()])},
    "a pure criterion": {"stopping_criteria": [LongEnough()]},
    "max_length": {"max_length": 40, "max_new_tokens": None},
    "max_time": {"max_time": 1000.0, "eos_token_id": ENDS},
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSED)
def test_processors_and_criteria_see_each_text_alone(case: str) -> None:
    target, draft = pair()
    some = [prompt for prompt in prompts() if len(prompt) < 40][:9]
    options = {"max_new_tokens": 14, **PROCESSED[case]}
    results = many(target, some, assistant_model=draft, batch_size=4, **options)
    for index, prompt in enumerate(some):
        assert results[index].sequence.tolist() == alone(target, prompt, **options), index


def test_stop_strings_end_texts(tokenizer: Any) -> None:
    target, draft = pair()
    options = {"stop_strings": ["ab", "q", "m\n"], "max_new_tokens": 30, "tokenizer": tokenizer}
    results = many(target, prompts()[:9], assistant_model=draft, batch_size=4, **options)
    for index, prompt in enumerate(prompts()[:9]):
        assert results[index].sequence.tolist() == alone(target, prompt, **options)
    assert "stop_string" in {result.finished for result in results.values()}


class Counts(LogitsProcessor):
    """May keep state."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Together(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_processor": LogitsProcessorList([Counts()])}, "Counts may keep state"),
        ({"stopping_criteria": [Together()]}, "Together may keep state"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "PrefixConstrainedLogitsProcessor may keep state"),
        ({"streamer": object()}, "`streamer`"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate`"),
        ({"output_scores": True}, "`output_scores`"),
        ({"attention_mask": torch.ones(1, 3)}, "`attention_mask`"),
        ({"speculation_trace": hf_specdec.Trace()}, "`speculation_trace`"),
        ({"strategy": "vanilla"}, "`strategy`"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"on_error": "ignore"}, "`on_error`"),
        ({"num_beams": 2}, "num_beams"),
        ({"temprature": 0.5}, "temprature"),
        ({"max_new_tokens": [1, 2]}, "2 values for 1 prompts"),
        ({"speculation_seed": 3}, "speculation_acceptance"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_what_cannot_work_is_refused_before_a_prompt_is_taken(options: dict[str, Any], message: str) -> None:
    class Untouched(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("a prompt was taken")

    with pytest.raises(ValueError, match=message):
        hf_specdec.generate_many(pair()[0], Untouched([[5]]), **{"do_sample": False, "max_new_tokens": 4} | options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, "`model` must be"),
        ({"prompts": "text"}, "put one in a list"),
        ({"prompts": 7}, "iterable"),
        ({"batch_size": 2.0}, "`batch_size` must be an int"),
        ({"speculation_stats": {}}, "`speculation_stats`"),
    ],
)
def test_arguments_of_wrong_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hf_specdec.generate_many(**{"model": pair()[0], "prompts": [[5]], "max_new_tokens": 4} | arguments)


# Single prompts that cannot be decoded

BAD: dict[str, tuple[Any, str]] = {
    "empty": ([], "empty"),
    "outside the vocabulary": ([5, VOCAB + 3], "vocabulary"),
    "too long": ([5] * 50, "max_length"),
    "a string": ("text", "tokenizer"),
    "numbers": ([0.5, 1.0], "0.5"),
    "two rows": (torch.ones(2, 3, dtype=torch.int64), "1-D"),
    "nothing": (None, "NoneType"),
    "its processor raises": ([4], "no text begins with 4"),
}


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_a_bad_prompt_is_its_own_result(name: str) -> None:
    target, draft = pair(name)
    good = prompts()[1:3]
    mixed = [good[0], *(prompt for prompt, _ in BAD.values()), good[1]]
    options = {"max_length": 45, "logits_processor": LogitsProcessorList([Alternates()])}
    found = list(
        hf_specdec.generate_many(target, mixed, draft, batch_size=3, on_error="result", do_sample=False, **options)
    )
    errors = {result.index: result.error for result in found if result.error is not None}
    for index, (_, message) in enumerate(BAD.values(), start=1):
        assert message in str(errors.pop(index))
    assert not errors and len(found) == len(mixed)
    results = {result.index: result for result in found}
    for index, prompt in ((0, good[0]), (len(mixed) - 1, good[1])):
        assert results[index].sequence.tolist() == alone(target, prompt, **options)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_prompt_raises_an_error_that_names_it(kind: str) -> None:
    prompt, message = BAD[kind]
    options = {"max_length": 45, "logits_processor": LogitsProcessorList([Alternates()])}
    results = hf_specdec.generate_many(pair()[0], [[5], [6], prompt], batch_size=1, do_sample=False, **options)
    assert [next(results).index, next(results).index] == [0, 1]
    with pytest.raises((ValueError, TypeError), match=f"Prompt 2 .*{message}"):
        next(results)
    assert list(results) == []


def test_scores_without_a_distribution_name_the_prompt() -> None:
    broken = perturbed(pair()[0], 0.0)

    def spoiled(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, float("nan")) if args[0].shape[0] == 1 else output

    broken.lm_head.register_forward_hook(spoiled)
    with pytest.raises(ValueError, match=r"no distribution .* for prompt 1 after"):
        list(hf_specdec.generate_many(broken, [[5], [6]], batch_size=2, do_sample=False, max_new_tokens=[2, 9]))


class Trips(LogitsProcessor):
    """Raises an error some tokens after the beginning of texts that begin with 7."""

    is_pure = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 5 and (input_ids[:, 0] == 7).any():
            raise RuntimeError("sevens")
        return scores


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_an_error_while_texts_are_decoded_is_the_result_of_the_one_to_blame(name: str) -> None:
    target, draft = pair(name)
    texts = [[5, 6], [7, 8], [9, 10, 11], [7], *([20 + index, 3] for index in range(5))]
    options = {"max_new_tokens": 12, "logits_processor": LogitsProcessorList([Trips()])}
    stats = SpeculationStats()
    found = list(
        hf_specdec.generate_many(
            target, texts, draft, batch_size=3, on_error="result", do_sample=False, speculation_stats=stats, **options
        )
    )
    results = {result.index: result for result in found}
    assert len(found) == len(results) == len(texts)
    for index, prompt in enumerate(texts):
        if prompt[0] == 7:
            assert "sevens" in str(results[index].error) and results[index].sequence.tolist() == prompt
        else:
            assert results[index].error is None
            assert results[index].sequence.tolist() == alone(target, prompt, max_new_tokens=12)
    with pytest.raises(RuntimeError, match="sevens"):
        list(hf_specdec.generate_many(target, texts, draft, batch_size=3, do_sample=False, **options))


def test_scores_without_a_distribution_are_one_result() -> None:
    """A text of which the model has no scores leaves nothing in its place."""
    broken = perturbed(pair()[0], 0.0)

    def spoiled(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.masked_fill((args[0] == 95)[..., None], float("nan"))

    broken.model.embed_tokens.register_forward_hook(spoiled)
    texts = [[95, 6] if index in (1, 4) else [5 + index, 6] for index in range(7)]
    found = hf_specdec.generate_many(broken, texts, batch_size=2, on_error="result", do_sample=False, max_new_tokens=5)
    for result in found:
        if texts[result.index][0] == 95:
            assert f"no distribution over the vocabulary for prompt {result.index}" in str(result.error)
        else:
            assert result.sequence.tolist() == alone(pair()[0], texts[result.index], max_new_tokens=5)


# Taking, reading, freeing


def test_an_endless_iterable_is_taken_as_there_are_places() -> None:
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield [2 + number % 90, 3]

    results = hf_specdec.generate_many(pair()[0], endless(), batch_size=3, do_sample=False, max_new_tokens=6)
    assert taken == 0
    for given, _ in enumerate(itertools.islice(results, 20), start=1):
        assert taken <= given + 3
    results.close()  # type: ignore[attr-defined]


def test_static_batches_take_a_block_at_a_time() -> None:
    taken = itertools.count()
    target, _ = pair("mamba2")
    endless = ([2 + number % 90, 3] for number in taken)
    results = hf_specdec.generate_many(target, endless, batch_size=2, do_sample=False, max_new_tokens=3)
    assert len(list(itertools.islice(results, 10))) == 10
    assert next(taken) <= 10 + 2 * many_module._BLOCK


def test_nothing_comes_of_nothing() -> None:
    assert list(hf_specdec.generate_many(pair()[0], [], max_new_tokens=4)) == []


def test_closing_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    for cls in (Context, RaggedCache):
        init = cls.__init__

        def noted(self: Any, *args: Any, init: Any = init, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(cls, "__init__", noted)
    target, draft = pair()
    results = hf_specdec.generate_many(target, itertools.repeat([5, 6]), draft, do_sample=False, max_new_tokens=6)
    next(results)
    gc.collect()
    assert len([ref for ref in made if ref() is not None]) == 3  # the context, and a cache for each model
    results.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not [ref for ref in made if ref() is not None]


def test_between_results_nothing_is_switched() -> None:
    """The user's code runs between them."""
    target, draft = pair()
    forward = nn.Linear.forward
    plain = alone(target, [5, 6, 7], max_new_tokens=5)
    for result in hf_specdec.generate_many(
        target, prompts()[:6], draft, batch_size=2, do_sample=False, max_new_tokens=4
    ):
        assert torch.is_grad_enabled() and nn.Linear.forward is forward
        assert result.sequence.requires_grad is False
        assert alone(target, [5, 6, 7], max_new_tokens=5, strategy="spec", assistant_model=draft) == plain


def test_long_prompts_are_read_in_pieces_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece has no more tokens than an iteration of a full batch feeds, here as no clock allows more."""
    events: list[tuple[str, int]] = []
    read, iterate = CachedModel.read, RefilledDecoding.iterate

    def noted_read(self: CachedModel, context: Any, count: int) -> None:
        if self.model is target:
            events.append(("read", len(context.rows) * count))
        read(self, context, count)

    def noted_iterate(self: RefilledDecoding) -> None:
        events.append(("iterate", len(self.context.rows)))
        iterate(self)

    monkeypatch.setattr(CachedModel, "read", noted_read)
    monkeypatch.setattr(RefilledDecoding, "iterate", noted_iterate)
    monkeypatch.setattr(RefilledDecoding, "_adapt", lambda *args: None)
    target, draft = pair()
    texts = [[5, 6], [7, 8], list(range(2, 92)), [9]]
    options = {"max_new_tokens": [40, 3, 4, 4], "num_assistant_tokens": 2}
    results = many(target, texts, assistant_model=draft, batch_size=2, **options)
    pieces = [tokens for kind, tokens in events[1:] if kind == "read"]
    assert len(pieces) > 4 and max(pieces) <= 16
    assert all(kind == "iterate" for kind, _ in events[2::2][: len(pieces)])  # between any two of them
    for index, prompt in enumerate(texts):
        assert results[index].sequence.tolist() == alone(
            target, prompt, max_new_tokens=options["max_new_tokens"][index]
        )


def test_pieces_follow_the_clock() -> None:
    """They come to take a share of the iteration's time, be it that each takes a while by itself."""
    decoding = RefilledDecoding.__new__(RefilledDecoding)
    decoding._piece, decoding._unread = 64, [0]
    for iteration, piece in ((1.0, 300), (0.5, 100), (10.0, 3900), (0.2, 16), (1000.0, 8192)):
        for _ in range(12):
            decoding._last_piece = decoding._piece
            decoding._adapt(0.2 + 0.002 * decoding._piece, iteration)
        assert decoding._piece == pytest.approx(piece, rel=0.02)


_ADAPT = RefilledDecoding._adapt


def test_short_prompts_do_not_make_the_pieces_of_long_ones_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast they were read; and a slow piece makes the next one shorter than it was itself."""
    sizes: list[int] = []
    read = CachedModel.read

    def noted(self: CachedModel, context: Any, count: int) -> None:
        if self.model is target and count < 512:  # else no row is active
            sizes.append(len(context.rows) * count)
        read(self, context, count)

    def as_if(seconds: float) -> Any:
        adapt = _ADAPT
        return lambda self, reading, iteration: adapt(self, seconds, 1.0)

    monkeypatch.setattr(CachedModel, "read", noted)
    target, draft = pair()
    texts = [[5, 6 + number, 7] for number in range(30)] + [list(range(2, 92))]
    options = {"max_new_tokens": [3, 7, 12] * 10 + [4], "assistant_model": draft, "batch_size": 4}
    for seconds, largest in ((0.01, 64), (0.9, 32)):
        sizes.clear()
        monkeypatch.setattr(RefilledDecoding, "_adapt", as_if(seconds))
        many(target, texts, **options)
        assert len(sizes) > 10 and max(sizes) <= largest
    decoding = RefilledDecoding.__new__(RefilledDecoding)
    decoding._piece, decoding._last_piece, decoding._unread = 4096, 200, []
    _ADAPT(decoding, 0.1, 1.0)
    assert decoding._piece == 4096
    _ADAPT(decoding, 2.0, 1.0)
    assert decoding._piece == 100


# What is counted


def test_counts_of_texts_add_up() -> None:
    target, draft = pair()
    stats = SpeculationStats()
    options = {"batch_size": 4, "max_new_tokens": limits(), "eos_token_id": ENDS, "speculation_stats": stats}
    results = many(target, prompts(), assistant_model=draft, **options)
    each = [result.speculation for result in results.values()]
    for name in ("committed_tokens", "drafted_tokens", "accepted_tokens", "row_iterations"):
        assert sum(getattr(own, name) for own in each) == getattr(stats, name) > 0
    for result in results.values():
        assert (
            result.speculation.committed_tokens
            == len(result.new_tokens)
            == result.speculation.per_row[0].committed_tokens
        )
        assert result.speculation.target_forwards == result.speculation.row_iterations
    for name in ("draft_seconds", "verify_seconds", "other_seconds", "prefill_seconds"):
        assert sum(getattr(own, name) for own in each) == pytest.approx(getattr(stats, name))
    assert stats.target_forwards < sum(own.target_forwards for own in each)
    assert len(stats.per_row) == 4 and stats.iterations == []
    assert stats.draft_forwards > 0 and stats.target_prefill_forwards > 0 and stats.draft_prefill_forwards > 0


def test_fewer_target_forwards_than_static_batches() -> None:
    """Where few texts are long."""
    target, draft = pair()
    lengths = [30 if index % 8 == 3 else 3 for index in range(32)]
    texts = [[5 + index, 6] for index in range(32)]
    options = {"assistant_model": draft, "num_assistant_tokens": 3, "do_sample": False}
    static = 0
    for begin in range(0, 32, 8):
        stats = SpeculationStats()
        batch = torch.tensor(texts[begin : begin + 8])
        target.generate(
            batch, attention_mask=torch.ones_like(batch), strategy="spec", speculation_stats=stats,
            **options, max_new_tokens=max(lengths[begin : begin + 8]),
        )  # fmt: skip
        static += stats.target_forwards + stats.target_prefill_forwards
    refilled = SpeculationStats()
    many(target, texts, batch_size=8, max_new_tokens=lengths, speculation_stats=refilled, **options)
    assert refilled.target_forwards + refilled.target_prefill_forwards < 0.8 * static


def test_several_texts_of_a_prompt() -> None:
    target, draft = pair()
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "speculation_acceptance": "coupled"}
    found = list(hf_specdec.generate_many(target, prompts()[:4], draft, batch_size=5, speculation_seed=11, **options))
    for index, prompt in enumerate(prompts()[:4]):
        ids = torch.tensor([prompt])
        texts = target.generate(
            ids, attention_mask=torch.ones_like(ids), strategy="spec", speculation_seed=11 + 3 * index, **options
        )
        mine = {result.sample: result.sequence.tolist() for result in found if result.index == index}
        assert [mine[sample] for sample in range(3)] == texts.tolist()


def test_strings_with_a_tokenizer(tokenizer: Any) -> None:
    target, draft = pair()
    texts = ["abc de", "f", "hello world"]
    results = many(target, texts, assistant_model=draft, tokenizer=tokenizer, max_new_tokens=8)
    for index, text in enumerate(texts):
        ids = alone(target, tokenizer(text)["input_ids"], max_new_tokens=8)
        assert results[index].sequence.tolist() == ids
        assert results[index].text == tokenizer.decode(results[index].new_tokens, skip_special_tokens=True)
    assert many(target, [torch.tensor([5, 6])], max_new_tokens=2)[0].text is None


# Static batches


class Repeats(Drafter):
    """A user's drafter that knows nothing of `restart`."""

    def start(self, call: Any, context: Context) -> None:
        self.first = [int(context.row(row)[-1]) for row in context.rows]

    def propose(self, context: Context, max_tokens: int) -> Draft:
        last = [int(context.row(row)[-1]) for row in context.rows]
        return Draft(torch.tensor(last)[:, None].expand(-1, max_tokens))


def test_a_drafter_without_restart_gets_static_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(many_module.logger, "warning_once", warned.append)
    target, _ = pair()
    results = many(
        target, prompts(), assistant_model=Repeats(), batch_size=5, max_new_tokens=limits(), eos_token_id=ENDS
    )
    assert [results[i].sequence.tolist() for i in range(40)] == expected("llama")
    assert len(warned) == 1 and "Repeats cannot begin a row anew" in warned[0]


def test_static_batches_are_sorted_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[list[int]] = []
    decode = StaticBatches._decode

    def noted(self: StaticBatches, batch: list[Any]) -> Any:
        lengths.append([len(entry.prompt) for entry, _, _ in batch])
        return decode(self, batch)

    monkeypatch.setattr(StaticBatches, "_decode", noted)
    many(pair()[0], prompts()[:8], assistant_model=Repeats(), batch_size=2, max_new_tokens=2)
    expected = sorted(map(len, prompts()[:8]))
    assert lengths == [expected[begin : begin + 2] for begin in range(0, 8, 2)]


@pytest.mark.parametrize("case", ["by number, the last, and the set of tokens", "a pure processor", "a pure criterion"])
def test_static_batches_show_processors_each_text_alone(case: str) -> None:
    target, draft = pair("mamba2")
    some = [prompt for prompt in prompts() if len(prompt) < 40][:8]
    options = {"max_new_tokens": 14, **PROCESSED[case]}
    results = many(target, some, assistant_model=draft, batch_size=4, **options)
    for index, prompt in enumerate(some):
        assert results[index].sequence.tolist() == alone(target, prompt, **options), index


def test_models_with_an_encoder_get_static_batches() -> None:
    names = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    target = T5ForConditionalGeneration(T5Config(**names, decoder_start_token_id=0, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    results = many(target, prompts()[:9], batch_size=4, max_new_tokens=9, eos_token_id=ENDS)
    for index, prompt in enumerate(prompts()[:9]):
        assert results[index].sequence.tolist() == alone(target, prompt, max_new_tokens=9, eos_token_id=ENDS)


# Long runs


@functools.cache
def unlike_texts(name: str) -> list[tuple[list[int], int, list[int]]]:
    """300 prompts whose lengths differ by a factor of 150, how much is added, which differs by 60, and the results."""
    target, rng = pair(name)[0], random.Random(2)
    sizes = [min(max(round(rng.lognormvariate(2, 1.2)), 1), 60) for _ in range(300)]
    return [
        (prompt, size, alone(target, prompt, max_new_tokens=size, eos_token_id=ENDS))
        for prompt, size in zip(prompts(300, longest=150, seed=3), sizes)
    ]


def differ_by_rounding(target: Any, one: list[int], other: list[int]) -> bool:
    """Two texts differ first where rounding decides between the target's two best tokens: in one place of 100,000."""
    end = next(index for index, tokens in enumerate(zip(one, other)) if tokens[0] != tokens[1])
    best = target(torch.tensor([one[:end]])).logits[0, -1].topk(2)
    gap = float(best.values[0] - best.values[1])
    return gap < 1e-5 and {one[end], other[end]} == {*best.indices.tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2", "gpt2", "mamba2", "qwen3_next"])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_300_prompts_of_very_different_lengths(name: str, batch_size: int) -> None:
    target, draft = pair(name)
    texts, sizes, whole = zip(*unlike_texts(name))
    assert min(map(len, texts)) == 1 and max(map(len, texts)) > 140 and {*sizes} >= {1, 60}
    stats = SpeculationStats()
    options = {"max_new_tokens": sizes, "eos_token_id": ENDS, "speculation_stats": stats}
    results = many(target, texts, assistant_model=draft, batch_size=batch_size, **options)
    assert 0 < stats.acceptance_rate < 1
    found = [results[index].sequence.tolist() for index in range(300)]
    differing = [pair for pair in zip(found, whole) if pair[0] != pair[1]]
    assert len(differing) <= 1 and all(differ_by_rounding(target, *pair) for pair in differing)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["draft", "look-up", "either"])
def test_memory_is_flat_over_3000_prompts(way: str) -> None:
    """From the 500th result to the last one, Python holds at most 40 bytes more per text, the process 4 KB."""
    target, draft = pair()
    rng = random.Random(0)
    either = hf_specdec.Either(draft, hf_specdec.SuffixDrafter(max_requests=50))
    drafter = {"draft": draft, "look-up": None, "either": either}[way]
    options = {"batch_size": 8, "do_sample": False, "max_new_tokens": (rng.randint(1, 20) for _ in itertools.count())}
    texts = ([rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(3000))
    held, resident = {}, {}
    tracemalloc.start()
    try:
        for count, _ in enumerate(hf_specdec.generate_many(target, texts, drafter, **options), start=1):
            if count in (500, 3000):
                gc.collect()
                held[count], resident[count] = tracemalloc.get_traced_memory()[0], _resident()
    finally:
        tracemalloc.stop()
    assert count == 3000
    assert held[3000] - held[500] < 40 * 2500
    assert resident[3000] - resident[500] < 4096 * 2500


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
