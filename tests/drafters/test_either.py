"""Either: by row the draft of a model or a copy, whatever the cache, γ and batch; and what it costs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SIZES, VOCAB, make_model, make_pair, make_prompts, perturbed, repeating_prompts
from transformers import LlamaConfig, PreTrainedModel, Qwen3NextConfig

from hf_specdec import Draft, Drafter, DraftRequest, Either, ModelDrafter, SpeculationStats, SuffixDrafter
from hf_specdec.drafters import EarlyExitDrafter
from hf_specdec.loop import invariants
from hf_specdec.loop.optimal import estimates_for
from hf_specdec.sampling.context import Context
from hf_specdec.sampling.rules import Greedy

NEW_TOKENS = 40


class Watched(Either):
    """Counts which rows took what.

    Args:
        at_least: what a copy must score, in place of the learned length.
    """

    def __init__(self, model_draft: Any, suffix: Drafter, at_least: float | None = None):
        super().__init__(model_draft, suffix)
        self.at_least = at_least
        self.kinds: list[tuple[int, int]] = []  # by iteration, how many rows copied and how many did not

    def expected(self, max_tokens: int) -> float:
        return super().expected(max_tokens) if self.at_least is None else self.at_least

    def propose(self, context: Context, max_tokens: int) -> Draft:
        draft = super().propose(context, max_tokens)
        self.kinds.append((len(context.rows) - len(self._asked), len(self._asked)))
        return draft

    @property
    def mixed(self) -> int:
        """Iterations with both kinds of rows."""
        return sum(bool(copies and others) for copies, others in self.kinds)


def hybrid() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Recurrent states and attention, in target and draft."""
    config = Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], num_experts=0, max_position_embeddings=512,
    )  # fmt: skip
    target = make_model(config)
    return target, perturbed(target, 0.08)


PAIRS: dict[str, Callable[[], tuple[PreTrainedModel, PreTrainedModel]]] = {
    "dense": functools.partial(make_pair, "llama", noise=0.08),
    "sliding": functools.partial(make_pair, "mistral-sliding", noise=0.08),
    "hybrid": hybrid,
}


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return PAIRS[name]()


def corpus(expected: torch.Tensor) -> list[list[int]]:
    """Parts of the right text, with errors, so that copies are right in part."""
    wrong = torch.arange(expected.shape[1]) % 9 == 0
    return torch.where(wrong, (expected + 1) % VOCAB, expected)[::2, 16:40].tolist()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", PAIRS)
def test_greedy_calls_give_what_the_target_says(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's draft cache holds its committed tokens, whatever was drafted beside a copy."""
    target, draft = pair(name)
    prompts = repeating_prompts(rows)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    monkeypatch.setattr(invariants, "ENABLED", True)
    for gamma in (2, 6):
        stats, drafter = SpeculationStats(), Watched(draft, SuffixDrafter(corpus(expected)))
        out = target.generate(
            **prompts,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            strategy="spec",
            assistant_model=drafter,
            num_assistant_tokens=gamma,
            speculation_stats=stats,
        )
        assert out.equal(expected), f"γ = {gamma}"
        assert 0.1 < stats.acceptance_rate < 0.95
        copies, others = map(sum, zip(*drafter.kinds, strict=True))
        assert copies > 0 and others > 0
        assert (drafter.mixed > 0) == (rows > 1)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"num_assistant_tokens_schedule": "heuristic"}])
def test_sampled_drafts_of_mixed_batches_say_what_they_were_drawn_from(options: dict[str, Any]) -> None:
    """A copy's q is one-hot, also past what it proposes; the model's is its own."""
    target, draft = pair("dense")
    checked = 0

    class Checked(Watched):
        def propose(self, context: Context, max_tokens: int) -> Draft:
            nonlocal checked
            given = super().propose(context, max_tokens)
            if self.kinds[-1][1] == 0:
                assert given.probs is None
                return given
            assert given.probs is not None and given.probs.shape == (*given.tokens.shape, VOCAB)
            torch.testing.assert_close(given.probs.sum(dim=-1), torch.ones(given.tokens.shape))
            q = given.probs.gather(-1, given.tokens[..., None]).squeeze(-1)
            for slot, row in enumerate(context.rows):
                of_model = q[slot, : given.row_lengths[slot]]
                if row in self._asked:
                    assert len(of_model) and ((of_model > 0) & (of_model < 1)).all()
                else:
                    assert (q[slot] == 1).all()
                    checked += 1
            return given

    torch.manual_seed(0)
    drafter = Checked(draft, SuffixDrafter(), at_least=0.2)
    target.generate(
        **repeating_prompts(8),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        strategy="spec",
        assistant_model=drafter,
        **options,
    )
    assert drafter.mixed > 3 and checked > 5


def test_the_model_does_not_run_where_all_rows_copy() -> None:
    """And catches up later: drafts are then those of a model that has read everything."""
    target, draft = pair("dense")
    prompts = repeating_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    halves = expected[:, :-20].tolist()  # copies are right until then

    class Following(Watched):
        def propose(self, context: Context, max_tokens: int) -> Draft:
            before = self.first.forwards + self.first.prefill_forwards
            given = super().propose(context, max_tokens)
            if not self._asked:
                assert self.first.forwards + self.first.prefill_forwards == before
            for slot, row in enumerate(context.rows):
                if row in self._asked and given.row_lengths[slot]:
                    text = context.tokens[row, context.first[row] : context.ends[row]][None]
                    assert draft(text).logits[0, -1].argmax() == given.tokens[slot, 0]
            return given

    drafter, stats = Following(draft, SuffixDrafter(halves)), SpeculationStats()
    out = target.generate(
        **prompts,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        strategy="spec",
        assistant_model=drafter,
        num_assistant_tokens=5,
        speculation_stats=stats,
    )
    assert out.equal(expected)
    alone = [others == 0 for _, others in drafter.kinds]
    assert alone[0] and not alone[-1] and 2 < sum(alone) < len(alone)
    assert stats.draft_forwards == drafter.first.forwards > 0


def test_what_the_model_is_expected_to_bring_is_learned_from_what_it_brought() -> None:
    target, _ = pair("dense")
    prompts = make_prompts(2, seed=5)
    learned = {}
    for name, model in (("right", target), ("wrong", make_model(LlamaConfig(**SIZES), seed=99))):
        drafter = Watched(model, SuffixDrafter(), at_least=math.inf)
        for _ in range(4):
            target.generate(
                **prompts,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                strategy="spec",
                assistant_model=drafter,
                num_assistant_tokens=4,
            )
        drafter.at_least = None
        learned[name] = drafter.expected(100), drafter.expected(1)
    assert 3 < learned["right"][0] <= 4 and learned["right"][1] == 1
    assert learned["wrong"][0] < 0.5


def test_the_schedule_hears_how_sure_copies_are() -> None:
    """Of the rows that copy it is told the copies' confidence; where it stops, copies stop too."""
    _, draft = pair("dense")
    context = Context(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 1, 2], [11, 12, 13, 14, 15, 16, 17, 18, 19]]), [0, 0], 50, 0)
    told: list[list[float]] = []

    def go_on(confidence: list[float]) -> bool:
        told.append(confidence)
        return len(told) % 3 > 0

    from hf_specdec.sampling.rules import Greedy

    drafter = Watched(draft, SuffixDrafter(), at_least=0.5)
    drafter.start(DraftRequest(Greedy(), VOCAB, go_on=go_on), context)
    given = drafter.propose(context, 8)
    assert drafter.kinds == [(1, 1)]
    assert given.row_lengths == [3, 3] and given.tokens[0].tolist() == [3, 4, 5]
    assert [row[0] for row in told] == pytest.approx([2 / 3, 3 / 4, 4 / 5])
    probabilities = [row[1] for row in told]
    logits = draft(context.tokens[1:, :9]).logits[0, -1].softmax(-1)
    assert probabilities[0] == pytest.approx(float(logits.max()), rel=1e-3)
    # Alone, copies ask the schedule themselves.
    context.append([[8], [20]])
    context.rows.pop()
    drafter.commit(context)
    context.append([[1, 2, 3]])
    drafter.commit(context)
    told.clear()
    assert drafter.propose(context, 8).row_lengths == [3]
    assert len(told) == 3 and all(len(row) == 1 for row in told)
    drafter.end()


def test_the_optimal_schedule_runs_with_it_and_keeps_its_own_estimates() -> None:
    target, draft = pair("dense")
    prompts = repeating_prompts(3)
    expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter, suffix = Either(draft, SuffixDrafter()), SuffixDrafter()
    for each in (drafter, suffix, drafter, suffix):
        out = target.generate(
            **prompts,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            strategy="spec",
            assistant_model=each,
            num_assistant_tokens_schedule="optimal",
        )
        assert out.equal(expected)
    kind = False, Greedy
    known = [estimates_for(target, each, kind) for each in (drafter, suffix, ModelDrafter(draft))]
    assert len({id(estimates) for estimates in known}) == 3
    assert [estimates.costs(3).plain_seen > 0 for estimates in known] == [True, True, False]


def test_any_two_drafters_will_do() -> None:
    class Silent(Drafter):
        def propose(self, context: Context, max_tokens: int) -> Draft:
            return Draft(context.tokens.new_empty(len(context.rows), 0))

    target, _ = pair("dense")
    prompts = repeating_prompts(3)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = target.generate(**prompts, **options)
    drafter = Watched(Silent(), SuffixDrafter(), at_least=0.5)
    assert target.generate(**prompts, **options, strategy="spec", assistant_model=drafter).equal(expected)
    assert drafter.mixed > 0
    with pytest.raises(ValueError, match=r"Silent does not say how sure it is of its drafts \(`Draft.confidence`\)"):
        target.generate(**prompts, **options, strategy="spec", assistant_model=Either(SuffixDrafter(), Silent()))


def test_bad_arguments_are_named() -> None:
    target, draft = pair("dense")
    suffix = SuffixDrafter()
    with pytest.raises(TypeError, match=r"`model_draft` must be a transformers model or a hf_specdec.Drafter, got str"):
        Either("a-model", suffix)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`suffix` must be a hf_specdec.Drafter, got Llama"):
        Either(draft, draft)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model_draft` and `suffix` are the same drafter"):
        Either(suffix, suffix)
    with pytest.raises(ValueError, match="cannot use drafters that work on the target's own cache"):
        Either(EarlyExitDrafter(target, 1), suffix)
    other = make_model(LlamaConfig(**SIZES | {"vocab_size": 5000}))
    with pytest.raises(ValueError, match="vocab"):
        target.generate(**make_prompts(1), strategy="spec", assistant_model=Either(other, suffix), max_new_tokens=3)


def test_ended_calls_release_and_remember_even_if_one_of_both_fails() -> None:
    class Failing(ModelDrafter):
        def end(self) -> None:
            raise RuntimeError("no")

    target, draft = pair("dense")
    drafter = Either(Failing(draft), suffix := SuffixDrafter())
    with pytest.raises(RuntimeError, match="no"):
        target.generate(**make_prompts(1), strategy="spec", assistant_model=drafter, max_new_tokens=3)
    assert suffix.remembered_texts == 1
