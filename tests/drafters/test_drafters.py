"""Drafters: the contract of each one with the loop, its proposals, and that no draft changes a greedy call."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SIZES, VOCAB, make_model, make_prompts, perturbed
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from hf_specdec import (
    Draft,
    Drafter,
    DraftRequest,
    Either,
    ModelDrafter,
    ParallelDrafter,
    PromptLookupDrafter,
    SpeculationStats,
    SuffixDrafter,
)
from hf_specdec.loop import decoding
from hf_specdec.sampling.context import Context
from hf_specdec.sampling.rules import Greedy

EOS = 77  # ends two of the rows of these tests early
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), seed=12)


@pytest.fixture(scope="module")
def draft_model(target: PreTrainedModel) -> PreTrainedModel:
    """About half of its drafts are accepted."""
    return perturbed(target, 0.05, seed=13)


@pytest.fixture(scope="module")
def vanilla(target: PreTrainedModel) -> dict[int, Tensor]:
    """The greedy output of vanilla, by batch size."""
    outputs = {rows: generate(target, rows) for rows in (1, 4)}
    assert [int((row == 0).sum()) for row in outputs[4][:, -NEW_TOKENS:]] == [0, 15, 0, 14]
    return outputs


def generate(target: PreTrainedModel, rows: int, seed: int = 0, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": EOS} | options
    return target.generate(**make_prompts(rows, seed=seed), **options)


# ------------------------------------------------------------------------------------------------ drafters of all kinds


class RandomTokens(Drafter):
    """Proposes random tokens."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        return Draft(torch.randint(VOCAB, (len(context.rows), max_tokens), generator=self.rng))


class Silent(Drafter):
    """Proposes nothing."""

    def propose(self, context: Context, max_tokens: int) -> Draft:
        return Draft(context.tokens.new_empty(len(context.rows), 0))


class Oracle(Drafter):
    """Knows vanilla's output and proposes it, except at every `errs`-th column."""

    def __init__(self, sequences: Tensor, errs: int | None = None):
        self.sequences = torch.nn.functional.pad(sequences, (0, NEW_TOKENS + 30), value=7)
        self.errs = errs

    def propose(self, context: Context, max_tokens: int) -> Draft:
        columns = torch.tensor(context.active_ends)[:, None] + torch.arange(max_tokens)
        tokens = self.sequences[torch.tensor(context.rows)[:, None], columns]
        if self.errs:
            tokens = torch.where(columns % self.errs == 0, (tokens + 1) % VOCAB, tokens)
        return Draft(tokens)


class Uneven(Oracle):
    """The right tokens, a different number for each row and iteration, sometimes none; garbage after them."""

    def propose(self, context: Context, max_tokens: int) -> Draft:
        tokens = super().propose(context, max_tokens).tokens
        lengths = [(context.ends[row] + 2 * row) % (max_tokens + 1) for row in context.rows]
        behind = torch.arange(max_tokens) >= torch.tensor(lengths)[:, None]
        return Draft(tokens.masked_fill(behind, 3), lengths=lengths)


class HonestRandomTokens(RandomTokens):
    """Proposes random tokens, with their true probabilities."""

    def propose(self, context: Context, max_tokens: int) -> Draft:
        tokens = super().propose(context, max_tokens).tokens
        return Draft(tokens, torch.full((*tokens.shape, VOCAB), 1 / VOCAB))


def parallel(model: PreTrainedModel) -> PreTrainedModel:
    """The same with a mask token."""
    model = copy.deepcopy(model)
    model.config.pard_token = VOCAB - 1
    return model


Make = Callable[[PreTrainedModel, Tensor], Drafter]

OURS: dict[str, Make] = {
    "a model": lambda model, truth: ModelDrafter(model),
    "a model with a threshold": lambda model, truth: ModelDrafter(model, confidence_threshold=0.5),
    "a parallel model": lambda model, truth: ParallelDrafter(parallel(model)),
    "look-up of 1-grams": lambda model, truth: PromptLookupDrafter(1),
    "look-up of 3-grams": lambda model, truth: PromptLookupDrafter(3),
    "suffixes of this call": lambda model, truth: SuffixDrafter(max_requests=0),
}
DRAFTERS: dict[str, Make] = OURS | {
    "suffixes, half of the truth known": lambda model, truth: SuffixDrafter([row[:-12] for row in truth]),
    "suffixes or a model": lambda model, truth: Either(model, SuffixDrafter(truth)),
    "random tokens": lambda model, truth: RandomTokens(),
    "random tokens with their q": lambda model, truth: HonestRandomTokens(),
    "nothing": lambda model, truth: Silent(),
    "uneven lengths": lambda model, truth: Uneven(truth),
    "the truth": lambda model, truth: Oracle(truth),
    "the truth with errors": lambda model, truth: Oracle(truth, errs=3),
}


class Watched(Drafter):
    """Wraps any drafter and checks it against the protocol."""

    def __init__(self, drafter: Drafter, gamma: int):
        self.drafter, self.gamma = drafter, gamma
        self.in_vocabulary = drafter.in_vocabulary
        self.proposals = 0

    def start(self, request: DraftRequest, context: Context) -> None:
        self.request = request
        self.drafter.start(request, context)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        assert 1 <= max_tokens <= self.gamma
        assert max_tokens < context.max_length - min(context.active_ends)  # the target's own token must fit as well
        before, forwards = committed(context), self.drafter.forwards
        draft = self.drafter.propose(context, max_tokens)
        assert committed(context) == before
        assert self.drafter.forwards >= forwards

        rows, k = draft.tokens.shape
        assert rows == len(context.rows)
        assert k <= max_tokens
        assert draft.tokens.dtype == torch.int64
        assert draft.lengths is None or (len(draft.lengths) == rows and all(0 <= n <= k for n in draft.lengths))
        assert ((draft.tokens >= 0) & (draft.tokens < self.request.vocab_size)).all()
        if draft.probs is not None:
            assert draft.probs.shape == (rows, k, self.request.vocab_size)
            assert draft.probs.dtype == torch.float32
            torch.testing.assert_close(draft.probs.sum(-1), torch.ones(rows, k))
            assert (draft.probs.gather(-1, draft.tokens[..., None]) > 0).all()
        assert draft.valid is None or draft.valid.all()
        self.check(context, draft)
        self.proposals += 1
        return draft

    def check(self, context: Context, draft: Draft) -> None:
        """Extra checks that a test adds."""

    def commit(self, context: Context) -> None:
        before = committed(context)
        self.drafter.commit(context)
        assert committed(context) == before

    @property
    def forwards(self) -> int:
        return self.drafter.forwards


def committed(context: Context) -> tuple[Any, ...]:
    tokens = [context.tokens[row, :end].tolist() for row, end in enumerate(context.ends)]
    return tokens, list(context.ends), list(context.first), list(context.rows)


# -------------------------------------------------------------------------------------------------------- the protocol


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("make", DRAFTERS.values(), ids=DRAFTERS)
def test_every_drafter_keeps_to_the_protocol(make, rows, do_sample, target, draft_model, vanilla):
    torch.manual_seed(0)
    drafter = Watched(make(draft_model, vanilla[rows]), gamma=5)
    generate(target, rows, assistant_model=drafter, strategy="spec", num_assistant_tokens=5, do_sample=do_sample)
    assert drafter.proposals > 2


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
def test_a_drafter_serves_one_call_after_the_other(make, target, draft_model, vanilla):
    def call(drafter: Drafter, rows: int, seed: int) -> list[Any]:
        stats = SpeculationStats()
        out = generate(target, rows, seed, assistant_model=drafter, strategy="spec", speculation_stats=stats)
        return [out.tolist(), stats.iterations, stats.draft_forwards]

    drafter = make(draft_model, vanilla[4])
    calls = [(2, 0), (2, 1), (4, 2)]
    assert [call(drafter, *each) for each in calls] == [call(make(draft_model, vanilla[4]), *each) for each in calls]


# -------------------------------------------------------------------------------------- greedy calls with any drafter


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("make", DRAFTERS.values(), ids=DRAFTERS)
def test_a_greedy_call_does_not_depend_on_the_drafter(make, rows, target, draft_model, vanilla):
    for gamma in (1, 2, 5, 30):
        drafter = make(draft_model, vanilla[rows])
        out = generate(target, rows, assistant_model=drafter, strategy="spec", num_assistant_tokens=gamma)
        assert out.equal(vanilla[rows]), f"γ = {gamma}"


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 2.0])
def test_a_greedy_call_does_not_depend_on_the_quality_of_the_draft(noise, rows, target, vanilla):
    stats = SpeculationStats()
    draft = perturbed(target, noise)
    out = generate(target, rows, assistant_model=draft, strategy="spec", speculation_stats=stats)
    assert out.equal(vanilla[rows])
    if noise in (0.0, 2.0):  # from a draft that knows everything (except where rows end) to one that knows nothing
        assert round(stats.acceptance_rate) == (noise == 0.0)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
def test_a_greedy_call_does_not_depend_on_schedule_and_threshold(schedule, threshold, target, draft_model, vanilla):
    for rows in (1, 4):
        out = generate(
            target,
            rows,
            assistant_model=draft_model,
            strategy="spec",
            num_assistant_tokens=3,
            num_assistant_tokens_schedule=schedule,
            assistant_confidence_threshold=threshold,
        )
        assert out.equal(vanilla[rows])


def test_the_truth_is_always_accepted_and_nothing_costs_one_forward_per_token(target, vanilla):
    for drafter, efficiency in ((Oracle(vanilla[1]), 6), (Silent(), 1)):
        stats = SpeculationStats()
        generate(
            target,
            1,
            assistant_model=drafter,
            strategy="spec",
            num_assistant_tokens=5,
            speculation_stats=stats,
            eos_token_id=None,
        )
        assert stats.block_efficiency == efficiency
        assert stats.committed_tokens == NEW_TOKENS


class TruthBehindTheLengths(Oracle):
    """Every token is right, but only the first ones are proposed, and for some rows none."""

    def propose(self, context: Context, max_tokens: int) -> Draft:
        self.lengths = [row % (max_tokens + 1) for row in context.rows]
        return Draft(super().propose(context, max_tokens).tokens, lengths=self.lengths)


def test_tokens_behind_a_rows_length_are_no_drafts(target, vanilla):
    stats = SpeculationStats()
    drafter = TruthBehindTheLengths(vanilla[4])
    generate(target, 4, assistant_model=drafter, strategy="spec", num_assistant_tokens=5, speculation_stats=stats)
    assert stats.iterations[0] == {"rows": [0, 1, 2, 3], "drafted": [0, 1, 2, 3], "accepted": [0, 1, 2, 3]}


@pytest.mark.parametrize("make", DRAFTERS.values(), ids=DRAFTERS)
def test_a_draft_leaves_room_for_the_targets_own_token(make, target, draft_model, vanilla):
    stats = SpeculationStats()
    drafter = make(draft_model, vanilla[4])
    generate(target, 4, assistant_model=drafter, strategy="spec", speculation_stats=stats, eos_token_id=None)
    columns = [0] * 4
    for iteration in stats.iterations:
        for row, drafted, accepted in zip(*iteration.values(), strict=True):
            assert drafted < NEW_TOKENS - columns[row]
            columns[row] += accepted + 1
    assert columns == [NEW_TOKENS] * 4


# -------------------------------------------------------------------------------------------------------- draft models


class WatchedModel(Watched):
    """Checks that a `ModelDrafter` proposes its model's tokens for the committed text, whatever was drafted before."""

    drafter: ModelDrafter

    @torch.no_grad()
    def check(self, context: Context, draft: Draft) -> None:
        for slot, row in enumerate(context.rows):
            columns = context.tokens[row, : context.ends[row]][None]  # as in vanilla, including padding
            for i in range(draft.row_lengths[slot]):
                token = draft.tokens[slot, i]
                logits = self.drafter.model(columns[:, context.first[row] :]).logits[:, -1].float()
                batch = [x.repeat(context.batch_size, 1) for x in (columns, logits)]
                q = self.request.processors(*batch)[row].softmax(-1)
                if self.request.do_sample:
                    assert draft.probs is not None
                    torch.testing.assert_close(draft.probs[slot, i], q, atol=1e-5, rtol=1e-4)
                else:
                    assert token == q.argmax()
                last = i + 1 == draft.row_lengths[slot]
                if q[token] < self.drafter.confidence_threshold:
                    assert last, "drafts behind an unsure one"
                elif last:
                    assert i + 1 == self.asked, "stopped at a sure one"
                columns = torch.cat([columns, token.view(1, 1)], dim=1)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        self.asked = max_tokens
        return super().propose(context, max_tokens)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_draft_model_proposes_its_own_greedy_continuation_of_what_is_committed(rows, threshold, target, draft_model):
    drafter = WatchedModel(ModelDrafter(draft_model, threshold), gamma=5)
    generate(target, rows, assistant_model=drafter, strategy="spec", num_assistant_tokens=5)
    assert drafter.proposals > 3


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"temperature": 0.6, "top_k": 7, "repetition_penalty": 1.4}, {"temperature": 1.7, "top_p": 0.8}],
    ids=lambda options: ", ".join(options),
)
def test_q_is_what_the_draft_model_says_of_each_prefix_after_the_calls_processors(
    options, rows, threshold, target, draft_model
):
    torch.manual_seed(0)
    drafter = WatchedModel(ModelDrafter(draft_model, threshold), gamma=4)
    generate(target, rows, assistant_model=drafter, strategy="spec", num_assistant_tokens=4, do_sample=True, **options)
    assert drafter.proposals > 3


@pytest.mark.parametrize("rows", [1, 4])
def test_a_draft_model_runs_once_per_drafted_token_on_at_most_two_tokens(rows, target, draft_model):
    """Two tokens after all drafts were accepted: it has not seen the last draft or the target's own token."""
    stats = SpeculationStats()
    widths: list[int] = []
    hook = draft_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    drafter = ModelDrafter(draft_model)
    options = {"assistant_model": drafter, "strategy": "spec", "speculation_stats": stats, "eos_token_id": None}
    generate(target, rows, **options)  # the first of them may probe the model
    stats, widths[:] = SpeculationStats(), []
    generate(target, rows, **options | {"speculation_stats": stats})
    hook.remove()
    assert stats.draft_prefill_forwards == (rows > 1)  # a single prompt is fed along with the first draft
    assert (
        stats.draft_forwards
        == len(widths) - (rows > 1)
        == sum(max(iteration["drafted"]) for iteration in stats.iterations)
    )
    assert max(widths[1:]) == 2


# ------------------------------------------------------------------------------------------------------ prompt look-up

PAD = 0


def look_up(
    rows: list[list[int]], max_tokens: int = 4, ngram: int = 2, vocab: int = 100, ends: list[int] | None = None
) -> list[list[int]]:
    """Proposals for rows of uneven length, left-padded; with `ends`, only that many tokens are committed."""
    width = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    context = Context(prompt, [width - len(row) for row in rows], width + 20, PAD)
    if ends:
        context.ends = [context.first[row] + n for row, n in enumerate(ends)]
    return propose(PromptLookupDrafter(ngram), context, max_tokens, vocab)


def propose(drafter: Drafter, context: Context, max_tokens: int, vocab: int = 100) -> list[list[int]]:
    drafter.start(DraftRequest(Greedy(), vocab), context)
    draft = drafter.propose(context, max_tokens)
    assert ((draft.tokens >= 0) & (draft.tokens < vocab)).all()
    return [tokens[:n] for tokens, n in zip(draft.tokens.tolist(), draft.row_lengths, strict=True)]


def look_up_in_loops(row: list[int], max_tokens: int, ngram: int) -> list[int]:
    """The same for one row without padding, written from the description."""
    for size in range(min(ngram, len(row) - 1), 0, -1):
        tail = row[-size:]
        behind = [i + size for i in range(len(row) - size) if row[i : i + size] == tail]
        if behind:
            start = max(behind, key=lambda i: (min(len(row) - i, max_tokens), i))
            return row[start : start + max_tokens]
    return []


def test_look_up_proposes_what_followed_the_last_time():
    assert look_up([[5, 6, 7, 8, 9, 5, 6]]) == [[7, 8, 9, 5]]


def test_the_longest_n_gram_is_tried_first():
    row = [1, 2, 3, 40, 9, 2, 3, 50, 9, 3, 60, 9, 1, 2, 3]
    assert [look_up([row], max_tokens=1, ngram=n) for n in (1, 2, 3)] == [[[60]], [[50]], [[40]]]


def test_a_shorter_n_gram_is_tried_where_the_longer_one_is_new():
    assert look_up([[3, 60, 9, 1, 2, 3]], max_tokens=2, ngram=3) == [[60, 9]]


def test_without_a_match_nothing_is_proposed():
    assert look_up([[1, 2, 3, 4]]) == [[]]
    assert look_up([[1]]) == [[]]
    assert look_up([[], [1, 2]]) == [[], []]


def test_where_more_follows_beats_where_it_was_last():
    assert look_up([[1, 2, 3, 4, 1, 5, 1]], max_tokens=3, ngram=1) == [[2, 3, 4]]
    assert look_up([[1, 2, 3, 4, 1, 5, 1]], max_tokens=2, ngram=1) == [[5, 1]]


def test_nothing_past_the_end_is_proposed():
    assert look_up([[1, 2, 1]], max_tokens=5, ngram=1) == [[2, 1]]
    assert look_up([[8, 8]], max_tokens=5, ngram=1) == [[8]]
    # Drafts of an earlier iteration, or other rows' tokens, may follow a row's end.
    assert look_up([[1, 2, 1, 9, 9, 1, 7]], max_tokens=5, ngram=1, ends=[3]) == [[2, 1]]
    assert look_up([[1, 2, 3, 1, 2, 7]], max_tokens=5, ngram=1, ends=[3]) == [[]]


def test_left_padding_is_no_text():
    assert look_up([[1, 2, 3, 4, 5, 6], [9, PAD]]) == [[], []]  # a pad token in the text matches no padding
    assert look_up([[1, 2, 3, 4, 5, 6], [9]]) == [[], []]
    assert look_up([[1, 2, 3, 4, 5, 6], [7, 9, PAD, 7]], ngram=1) == [[], [9, PAD, 7]]
    assert look_up([[1, 2, 3, 4, 5, 6], [PAD, 7, PAD]], ngram=2) == [[], [7, PAD]]


def test_ids_that_are_no_tokens_of_the_target_are_not_proposed():
    image = 1000
    assert look_up([[1, 2, image, 3, 1]], ngram=1) == [[2]]
    assert look_up([[1, image, 2, 3, 1]], ngram=1) == [[]]
    assert look_up([[1, 2, -100, 3, 1], [1, 2, 5, 3, 1]], ngram=1) == [[2], [2, 5, 3, 1]]


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_look_up_is_what_its_description_says_for_each_row_alone(ngram):
    """Batches of random texts over few tokens, including the pad token, with garbage after their ends."""
    rng = random.Random(ngram)
    found = 0
    for _ in range(150):
        rows = [[rng.randrange(3) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 4))]
        ends = [rng.randint(1, len(row)) for row in rows]
        max_tokens = rng.randint(1, 5)
        expected = [look_up_in_loops(row[:end], max_tokens, ngram) for row, end in zip(rows, ends, strict=True)]
        assert look_up(rows, max_tokens, ngram, ends=ends) == expected
        found += sum(map(bool, expected))
    assert found > 100


def test_only_active_rows_are_looked_up_in_their_order():
    context = Context(torch.tensor([[1, 2, 1], [3, 4, 3], [5, 6, 5]]), [0, 0, 0], 20, PAD)
    context.rows = [2, 0]
    assert propose(PromptLookupDrafter(1), context, 1) == [[6], [2]]


def test_an_n_gram_has_at_least_one_token():
    with pytest.raises(ValueError, match="`max_matching_ngram_size` must be at least 1, got 0"):
        PromptLookupDrafter(0)


# -------------------------------------------------------------------------------------------------------- bad drafters


class Careless(Drafter):
    """Proposes the tokens that a test gives it."""

    def __init__(self, draft: Any):
        self.draft = draft

    def propose(self, context: Context, max_tokens: int) -> Draft:
        return self.draft


def ids(*shape: int, token: int = 5) -> Tensor:
    return torch.full(shape, token)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing at all": (None, TypeError, r"Careless.propose must return a Draft, got NoneType"),
    "a tensor": (ids(2, 3), TypeError, r"Careless.propose must return a Draft, got Tensor"),
    "a list of tokens": (
        Draft([[5], [5]]),
        TypeError,
        r"Careless proposed tokens of type .*list.*, expected",
    ),
    "int32": (Draft(ids(2, 3).int()), TypeError, r"Careless proposed tokens of type torch.int32, expected torch.int64"),
    "floats": (Draft(ids(2, 3).float()), TypeError, r"Careless proposed tokens of type torch.float32, expected"),
    "too many tokens": (Draft(ids(2, 5)), ValueError, r"Careless proposed 5 tokens per row, asked for at most 4"),
    "one row too few": (Draft(ids(1, 3)), ValueError, r"Careless proposed tokens of shape \(1, 3\), expected \[2, k\]"),
    "one row too many": (
        Draft(ids(3, 3)),
        ValueError,
        r"Careless proposed tokens of shape \(3, 3\), expected \[2, k\]",
    ),
    "no row axis": (Draft(ids(3)), ValueError, r"Careless proposed tokens of shape \(3,\), expected \[2, k\]"),
    "an axis too many": (Draft(ids(2, 3, 1)), ValueError, r"Careless proposed tokens of shape \(2, 3, 1\), expected"),
    "out of the vocabulary": (
        Draft(ids(2, 3, token=VOCAB)),
        ValueError,
        rf"Careless proposed token ids from {VOCAB} to {VOCAB}, but the target's vocabulary has ids 0 to {VOCAB - 1}",
    ),
    "a negative token": (Draft(ids(2, 3, token=-1)), ValueError, r"Careless proposed token ids from -1 to -1, but the"),
    "probs of another vocabulary": (
        Draft(ids(2, 3), torch.ones(2, 3, 7) / 7),
        ValueError,
        rf"Careless gave probs of shape \(2, 3, 7\), expected \[2, 3, {VOCAB}\]",
    ),
    "probs of too few positions": (
        Draft(ids(2, 3), torch.ones(2, 2, VOCAB) / VOCAB),
        ValueError,
        rf"Careless gave probs of shape \(2, 2, {VOCAB}\), expected \[2, 3, {VOCAB}\]",
    ),
    "probs of the drafts alone": (
        Draft(ids(2, 3), torch.ones(2, 3)),
        ValueError,
        rf"Careless gave probs of shape \(2, 3\), expected \[2, 3, {VOCAB}\]",
    ),
    "a length too few": (
        Draft(ids(2, 3), lengths=[3]),
        ValueError,
        r"Careless gave draft lengths \[3\] for 2 rows and 3",
    ),
    "a length too long": (Draft(ids(2, 3), lengths=[3, 4]), ValueError, r"Careless gave draft lengths \[3, 4\] for 2"),
    "a negative length": (Draft(ids(2, 3), lengths=[-1, 3]), ValueError, r"Careless gave draft lengths \[-1, 3\] for"),
    "lengths as a tensor": (
        Draft(ids(2, 3), lengths=torch.tensor([1, 2])),
        ValueError,
        r"Careless gave draft lengths tensor\(\[1, 2\]\) for 2 rows and 3",
    ),
    "lengths that are no counts": (
        Draft(ids(2, 3), lengths=[1.0, 2.0]),
        ValueError,
        r"Careless gave draft lengths \[1.0, 2.0\] for 2 rows",
    ),
}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("draft", "error", "message"), BAD.values(), ids=BAD)
def test_a_drafter_that_breaks_the_protocol_is_named(draft, error, message, do_sample, target):
    with pytest.raises(error, match=message):
        generate(
            target,
            2,
            assistant_model=Careless(draft),
            strategy="spec",
            num_assistant_tokens=4,
            do_sample=do_sample,
        )


@pytest.mark.parametrize("batch", [1, 4])
def test_first_tokens_do_not_wait_for_the_draft_to_read_long_prompts(
    batch: int, llama_pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = llama_pair
    prompts = make_prompts(batch)
    limits: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    expected = target.generate(**prompts, **limits)
    tokens = prompts["input_ids"].shape[1]
    for limit, drafts in ((tokens, True), (tokens - 1, False)):
        monkeypatch.setattr(decoding, "_LONG", limit)
        stats = SpeculationStats()
        given: dict[str, Any] = {**limits, "assistant_model": draft, "strategy": "spec", "num_assistant_tokens": 3}
        assert torch.equal(target.generate(**prompts, **given, speculation_stats=stats), expected)
        assert all(stats.iterations[0]["drafted"]) == any(stats.iterations[0]["drafted"]) == drafts
        assert all(stats.iterations[1]["drafted"])
