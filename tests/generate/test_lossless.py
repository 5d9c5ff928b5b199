"""The main promise: greedy output equals vanilla `generate()`'s in float32, for any batch and draft."""

import functools

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_model, make_pair, make_prompts, perturbed
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec.models.abilities import Abilities

# Noise on a draft's weights so that it agrees only in part; the resulting acceptance is asserted below.
NOISE = {"bloom": 0.5, "gemma": 0.35, "gemma2": 0.35}
NEW_TOKENS = 24


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair(name, NOISE.get(name, 0.12))


@functools.cache
def vanilla(name: str, batch: int) -> torch.Tensor:
    return pair(name)[0].generate(**make_prompts(batch, seed=batch), max_new_tokens=NEW_TOKENS, do_sample=False)


# Slow: other batches are covered by a single row and five uneven ones.
BATCHES = [1, 5, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (2, 8))]


@pytest.mark.core
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_says_what_it_said(name: str, batch: int) -> None:
    target, draft = pair(name)
    for gamma in (1, 2, 4, 7):
        out = target.generate(
            **make_prompts(batch, seed=batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            assistant_model=draft,
            strategy="spec",
            num_assistant_tokens=gamma,
        )
        assert torch.equal(out, vanilla(name, batch)), f"γ = {gamma}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_drafts_of_these_tests_are_accepted_only_in_part(name: str) -> None:
    """0.1 to 0.95 of first drafts: otherwise the tests above would not see both acceptance and rejection."""
    target, draft = pair(name)
    stats = hf_specdec.SpeculationStats()
    for batch in (1, 5, 8):
        target.generate(
            **make_prompts(batch, seed=batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            assistant_model=draft,
            strategy="spec",
            num_assistant_tokens=1,
            speculation_stats=stats,
        )
    assert 0.1 < stats.acceptance_rate < 0.95


@pytest.mark.core
def test_many_prompts_and_drafts_of_every_quality() -> None:
    target = make_model(ARCHITECTURES["llama"]())
    for seed, noise in enumerate((0.0, 0.03, 0.06, 0.12, 0.2, 0.5)):
        draft = perturbed(target, noise, seed)
        for gamma in (1, 3, 6):
            prompts = make_prompts(6, width=20, seed=100 + seed)
            expected = target.generate(**prompts, max_new_tokens=40, do_sample=False)
            out = target.generate(
                **prompts,
                max_new_tokens=40,
                do_sample=False,
                assistant_model=draft,
                strategy="spec",
                num_assistant_tokens=gamma,
            )
            assert torch.equal(out, expected), f"noise {noise}, γ = {gamma}"


@pytest.mark.core
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_models_with_alibi_fall_back_to_lockstep(name: str) -> None:
    """They derive distances from a 2-D mask; every other model here decodes each row at its own pace."""
    assert bool(Abilities.of(pair(name)[0]).ragged) == (name not in ("bloom", "falcon-alibi"))


def test_attention_implementations(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    for name in ("llama", "mistral-sliding", "gemma2"):
        target, draft = make_pair(name, NOISE.get(name, 0.12), attn_implementation="eager")
        prompts = make_prompts(3, seed=5)
        expected = target.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        out = target.generate(
            **prompts, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft, strategy="spec"
        )
        assert torch.equal(out, expected), name


def test_a_row_does_not_depend_on_the_other_rows(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = llama_pair
    prompts = make_prompts(6, seed=3)
    batch = target.generate(**prompts, max_new_tokens=30, do_sample=False, assistant_model=draft, strategy="spec")
    for row in range(6):
        first = int(prompts["attention_mask"][row].argmax())
        alone = target.generate(
            prompts["input_ids"][row : row + 1, first:],
            attention_mask=torch.ones(1, prompts["input_ids"].shape[1] - first, dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            assistant_model=draft,
            strategy="spec",
        )
        assert torch.equal(batch[row, first:], alone[0])


def test_finished_rows_stop_costing_forwards() -> None:
    """A forward covers exactly the rows that are still being decoded."""
    target, draft = make_pair("llama")
    prompts = make_prompts(4, seed=9)
    free = target.generate(**prompts, max_new_tokens=30, do_sample=False)
    target.generation_config.eos_token_id = int(free[2, prompts["input_ids"].shape[1] + 3])  # ends row 2 early
    widths: list[int] = []
    hook = target.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    stats = hf_specdec.SpeculationStats()
    out = target.generate(
        **prompts, max_new_tokens=30, do_sample=False, assistant_model=draft, strategy="spec", speculation_stats=stats
    )
    hook.remove()
    assert torch.equal(out, target.generate(**prompts, max_new_tokens=30, do_sample=False))
    active = [len(iteration["rows"]) for iteration in stats.iterations]
    assert widths[-len(active) :] == active
    assert active[0] == 4 and active[-1] < 4


@pytest.mark.parametrize("prompt_tokens", [1, 2])
def test_the_shortest_prompts(prompt_tokens: int, llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = llama_pair
    ids = torch.randint(2, VOCAB, (3, prompt_tokens), generator=torch.Generator().manual_seed(0))
    for new_tokens in (1, 2, 3, 9):
        expected = target.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        out = target.generate(ids, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft, strategy="spec")
        assert torch.equal(out, expected)
    assert torch.equal(
        target.generate(max_new_tokens=8, do_sample=False, assistant_model=draft, strategy="spec"),
        target.generate(max_new_tokens=8, do_sample=False),
    )


def test_long_outputs_outgrow_what_was_allocated_at_first(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Context and caches grow as needed; a limit that is never reached costs no memory."""
    target, draft = llama_pair
    prompts = make_prompts(2, seed=4)
    config = {"do_sample": False, "eos_token_id": 5, "pad_token_id": 0}
    free = target.generate(**prompts, max_new_tokens=1500, do_sample=False)
    spec = {"assistant_model": draft, "strategy": "spec"}
    assert torch.equal(target.generate(**prompts, max_new_tokens=1500, do_sample=False, **spec), free)
    eos = int(free[0, 14 + 30])
    config["eos_token_id"] = eos
    if not bool((free[1, 14:200] == eos).any()):
        prompts = {name: rows[:1] for name, rows in prompts.items()}
    out = target.generate(**prompts, max_new_tokens=10**10, **config, **spec)
    assert torch.equal(out, target.generate(**prompts, max_new_tokens=1500, **config))
