"""Drafts that predict several tokens in one forward, with mask tokens (`pard_token`)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import test_sampling
import torch
from conftest import SIZES, make_model, perturbed
from test_drafters import Watched
from test_recurrent import ARCHITECTURES as RECURRENT
from test_sampling import ALARM, Case, law_and_suspect, p_value, samples
from torch import Tensor
from transformers import (
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_specdec
from hf_specdec import Draft, ParallelDrafter, SpeculationStats
from hf_specdec.drafters.parallel import mask_token
from hf_specdec.loop import invariants
from hf_specdec.models.abilities import Abilities
from hf_specdec.models.answers import Answer
from hf_specdec.sampling.context import Context

VOCAB = 12  # so few that drafts after the first one are right at times
MASK = 11
SMALL: dict[str, Any] = SIZES | {"vocab_size": VOCAB, "num_hidden_layers": 1, "initializer_range": 0.4}
TARGETS: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": lambda: make_model(LlamaConfig(**SMALL), seed=2),
    "sliding": lambda: make_model(MistralConfig(**SMALL, sliding_window=6), seed=2),
}


def parallel(model: PreTrainedModel, noise: float = 0.1, token: int = MASK) -> PreTrainedModel:
    """A copy that agrees in part, and drafts in parallel."""
    draft = perturbed(model, noise, seed=2)
    draft.config.pard_token = token
    return draft


def prompts(rows: int, width: int = 9) -> dict[str, Tensor]:
    """Left-padded, of uneven lengths."""
    ids = torch.randint(1, VOCAB, (rows, width), generator=torch.Generator().manual_seed(rows))
    mask = (torch.arange(width) >= torch.arange(rows)[:, None] * 5 % width).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(target: PreTrainedModel, rows: int, draft: Any = None, **options: Any) -> tuple[Tensor, SpeculationStats]:
    stats = SpeculationStats()
    if draft is not None:
        options |= {"assistant_model": draft, "strategy": "spec", "speculation_stats": stats}
    options = {"do_sample": False, "max_new_tokens": 24, **options}
    return target.generate(**prompts(rows), **options), stats


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return TARGETS[request.param]()


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return TARGETS["dense"]()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches hold committed tokens only, after each iteration."""
    monkeypatch.setattr(invariants, "ENABLED", True)


# ------------------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_greedy_call_says_what_vanilla_says(rows: int, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(invariants, "ENABLED", rows == 3)
    expected, _ = generate(target, rows)
    seconds = 0
    for gamma in (1, 2, 5) if rows < 8 else (9,):
        given, stats = generate(target, rows, parallel(target), num_assistant_tokens=gamma)
        assert given.equal(expected), f"γ = {gamma}"
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        seconds += sum(stats.accepted_by_position[1:2])
    assert seconds > 0  # else no entry of a mask token could be taken for a token's


class Unknown(LogitsProcessor):
    """Called step by step, on all rows together."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.linspace(0, 2, VOCAB).roll(input_ids.shape[1])


CALLS: dict[str, dict[str, Any]] = {
    "rows end": {"eos_token_id": 4, "pad_token_id": 0},
    "processors that see drafts": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    "lockstep": {"logits_processor": [Unknown()]},
    "a threshold": {"assistant_confidence_threshold": 0.4},
    "a schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "chunks": {"prefill_chunk_size": 4},
    "a static cache": {"cache_implementation": "static"},
    "optimal": {"num_assistant_tokens_schedule": "optimal"},
}


@pytest.mark.parametrize("name", CALLS)
def test_so_does_a_call_with_options(name: str, dense: PreTrainedModel, checked: None) -> None:
    options = CALLS[name]
    expected, _ = generate(dense, 3, **{k: v for k, v in options.items() if k != "cache_implementation"})
    given, stats = generate(dense, 3, parallel(dense), **{"num_assistant_tokens": 4} | options)
    assert given.equal(expected)
    assert name == "optimal" or 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_a_recurrent_draft_goes_back_to_the_text(name: str, checked: None) -> None:
    """Its state is never one that has seen mask tokens."""
    config = RECURRENT[name]()
    config.vocab_size, config.initializer_range = VOCAB, 0.4
    target = make_model(config, seed=3)
    for rows in (1, 3):
        expected, _ = generate(target, rows)
        given, stats = generate(target, rows, parallel(target, 0.05), num_assistant_tokens=4)
        assert given.equal(expected)
        assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_an_encoder_decoder_draft_drafts_in_parallel(checked: None) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "initializer_factor": 2.0}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 2}
    torch.manual_seed(5)
    target = T5ForConditionalGeneration(T5Config(**sizes, **ids, tie_word_embeddings=False)).eval()
    expected, _ = generate(target, 3)
    given, stats = generate(target, 3, parallel(target, 0.03), num_assistant_tokens=4)
    assert given.equal(expected)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


# ----------------------------------------------------------------------------------------------------------- the drafts


class WatchedParallel(Watched):
    """Checks each distribution against a forward over the text and mask tokens, without a cache and for one row."""

    drafter: ParallelDrafter

    @torch.no_grad()
    def check(self, context: Context, draft: Draft) -> None:
        for slot, row in enumerate(context.rows):
            text = context.tokens[row, context.first[row] : context.ends[row]]
            columns = context.tokens[row, : context.ends[row]]
            for i in range(min(draft.row_lengths[slot], context.max_length - len(columns))):
                fed = torch.cat([text, text.new_full((i,), MASK)])
                logits = self.drafter.model(fed[None]).logits[:, -1].float()
                logits[:, MASK] = -torch.inf
                batch = [x.repeat(context.batch_size, 1) for x in (columns[None], logits)]
                q = self.request.processors(*batch)[row].softmax(-1)
                token = draft.tokens[slot, i]
                if self.request.do_sample:
                    assert draft.probs is not None
                    torch.testing.assert_close(draft.probs[slot, i], q, atol=1e-5, rtol=1e-4)
                else:
                    assert token == q.argmax()
                columns = torch.cat([columns, token[None]])


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.5}],
    ids=["greedy", "sampled", "processors that see drafts"],
)
def test_drafts_are_those_of_plain_forwards_over_text_and_masks(options: dict[str, Any], target: PreTrainedModel):
    """Processors see the drafts, the model does not."""
    torch.manual_seed(0)
    drafter = WatchedParallel(ParallelDrafter(parallel(target)), gamma=5)
    generate(target, 4, drafter, num_assistant_tokens=5, **options)
    assert drafter.proposals > 5


def test_an_iteration_takes_one_forward(dense: PreTrainedModel) -> None:
    draft = parallel(dense)
    generate(dense, 3, draft)  # the first call may probe the model
    forwards: list[int] = []
    hook = draft.register_forward_pre_hook(lambda *_: forwards.append(1))
    for rows in (1, 3):
        forwards.clear()
        _, stats = generate(dense, rows, draft, num_assistant_tokens=5)
        drafted = sum(any(iteration["drafted"]) for iteration in stats.iterations)
        assert stats.draft_forwards == drafted < stats.drafted_tokens
        assert stats.draft_prefill_forwards == 0  # short prompts are fed along with the first draft
        assert len(forwards) == drafted
    hook.remove()


def test_the_mask_token_is_never_proposed(dense: PreTrainedModel) -> None:
    """Not even where nothing is likelier."""
    draft = parallel(dense)
    with torch.no_grad():
        draft.lm_head.weight[MASK] = 0
    draft.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([MASK]), 1e3))
    trace = hf_specdec.Trace()
    for do_sample in (False, True):
        generate(dense, 2, draft, speculation_trace=trace, do_sample=do_sample)
    drafted = [token for iteration in trace.iterations for step in iteration.rows for token in step.drafted]
    assert drafted and MASK not in drafted


def test_unsure_drafts_are_cut_after_the_forward(dense: PreTrainedModel) -> None:
    """A draft that is not proposed comes after an unsure one, and is no cheaper."""
    _, stats = generate(dense, 1, parallel(dense), num_assistant_tokens=6, assistant_confidence_threshold=0.5)
    lengths = [iteration["drafted"][0] for iteration in stats.iterations]
    assert min(lengths[:-2]) < max(lengths)
    assert stats.draft_forwards == sum(length > 0 for length in lengths)


# ------------------------------------------------------------------------------------------------------------- sampling

SAMPLED = {
    "γ=3": Case(new_tokens=4, options={"num_assistant_tokens": 3}),
    "four uneven prompts": Case(
        options={"num_assistant_tokens": 3, "repetition_penalty": 1.3, "assistant_confidence_threshold": 0.2},
        prompts=[[3, 4, 5, 6, 7], [8, 9], [2], [7, 3, 3]],
    ),
    "blocks": Case(new_tokens=4, options={"num_assistant_tokens": 3, "speculation_acceptance": "block"}),
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    target = make_model(LlamaConfig(**test_sampling.CONFIG))
    return {"target": target, "model": parallel(target, 0.2, token=test_sampling.VOCAB - 1)}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "four uneven prompts")) for n in SAMPLED]
)
def test_continuations_follow_the_targets_law(name: str, models: dict[str, PreTrainedModel]) -> None:
    """As in tests/sampling/test_sampling.py, with its odds."""
    case = SAMPLED[name]
    counts, stats = samples(case, models)
    assert 0.05 < stats.acceptance_rate < 0.95
    assert stats.acceptance_by_position[1] > 0
    rows = zip(counts, case.prompts, strict=True)
    p_values = [p_value(seen, *law_and_suspect(case, prompt, models)) for seen, prompt in rows]
    assert min(p_values) > ALARM / len(p_values)


def test_coupled_text_depends_on_the_seed_alone(dense: PreTrainedModel) -> None:
    options = {"do_sample": True, "speculation_acceptance": "coupled", "speculation_seed": 5}
    expected, _ = generate(dense, 3, dense, num_assistant_tokens=2, **options)
    other, _ = generate(dense, 3, dense, **options | {"speculation_seed": 9})
    assert not other.equal(expected)
    for gamma in (1, 3, 7):
        given, stats = generate(dense, 3, parallel(dense), num_assistant_tokens=gamma, **options)
        assert given.equal(expected)
        assert 0 < stats.accepted_tokens < stats.drafted_tokens


# ------------------------------------------------------------------------------------------------ which models draft so


def test_the_config_decides(dense: PreTrainedModel) -> None:
    assert mask_token(dense) is None
    assert mask_token(parallel(dense)) == MASK
    with pytest.raises(ValueError, match=r"names no mask token \(`pard_token`\)"):
        ParallelDrafter(dense)


@pytest.mark.parametrize("token", [VOCAB, -1, "11", True])
def test_a_mask_token_outside_the_embedding_is_an_error(token: Any, dense: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"`pard_token` .* must be a token id from 0 to 11, .* got"):
        generate(dense, 1, parallel(dense, token=token))


def test_one_more_row_for_the_mask_token_is_no_other_vocabulary(dense: PreTrainedModel, checked: None) -> None:
    draft = parallel(dense, token=VOCAB)
    draft.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    expected, _ = generate(dense, 3)
    given, stats = generate(dense, 3, draft)
    assert given.equal(expected)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    draft.config.pard_token = 3
    with pytest.raises(ValueError, match="differ in size"):
        generate(dense, 3, draft)


def test_a_draft_whose_state_goes_on_token_by_token_is_refused(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RECURRENT["mamba2"]()
    config.vocab_size = VOCAB
    draft = parallel(make_model(config, seed=3))
    states = Abilities.states

    def one_by_one(self: Abilities, at_once: int | None = None) -> Answer:
        return Answer("cannot") if at_once is None else states(self)

    monkeypatch.setattr(Abilities, "states", one_by_one)
    with pytest.raises(ValueError, match="cannot draft in parallel: its state goes on over one token at a time"):
        generate(dense, 1, draft)


def test_the_positions_of_a_draft_are_not_exceeded(dense: PreTrainedModel) -> None:
    draft = copy.deepcopy(parallel(dense))
    draft.config.max_position_embeddings = 20
    expected, _ = generate(dense, 2)
    given, stats = generate(dense, 2, draft, num_assistant_tokens=6)
    assert given.equal(expected)
    assert 0 < stats.draft_forwards < len(stats.iterations)
