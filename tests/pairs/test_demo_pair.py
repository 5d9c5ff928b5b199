"""The embedded pair: its files, its card's claims, and losslessness on real text."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_specdec

FOLDER = Path(hf_specdec.__file__).parent / "assets" / "demo_pair"
Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_specdec.demo_pair()


@pytest.fixture(scope="module")
def prompts(pair: Pair) -> torch.Tensor:
    """`[50, 100]`: the first 100 tokens of 50 texts from modules that the pair has never seen."""
    lines = (FOLDER / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [pair[2](json.loads(line)["text"])["input_ids"] for line in lines]
    long_enough = [row[:100] for row in ids if len(row) >= 100]
    return torch.tensor(long_enough[:50])


@pytest.mark.parametrize("alone", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_fifty_held_out_prompts_of_a_hundred_tokens(pair: Pair, prompts: torch.Tensor, alone: int) -> None:
    """In batches of 10, and this many one by one; the card's acceptance rate is reproduced."""
    target, draft, _ = pair
    assert prompts.shape == (50, 100)
    options = {"attention_mask": torch.ones(10, 100, dtype=torch.long), "max_new_tokens": 64, "do_sample": False}
    single, batched = hf_specdec.SpeculationStats(), hf_specdec.SpeculationStats()
    accepted = 0  # in batches, for the rows that are also decoded one by one
    for begin, group in zip(range(0, 50, 10), prompts.split(10)):
        before = [row.accepted_tokens for row in batched.per_row] or [0] * 10
        expected = target.generate(group, **options)
        spec = {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": 4}
        assert torch.equal(target.generate(group, **options, **spec, speculation_stats=batched), expected)
        for i, (row, tokens) in enumerate(zip(group[: max(alone - begin, 0)], expected)):
            accepted += batched.per_row[i].accepted_tokens - before[i]
            one = {**options, "attention_mask": options["attention_mask"][:1]}
            out = target.generate(row[None], **one, **spec, speculation_stats=single)[0]
            # A single row stops at its end; in the batch, padding follows.
            assert torch.equal(out, tokens[: len(out)])
    assert accepted == single.accepted_tokens > 0
    # The aim is 0.65, over 100 new tokens: see the card.
    assert (batched if alone < 50 else single).acceptance_rate > 0.6


def test_uneven_prompts_in_one_batch(pair: Pair) -> None:
    target, draft, tokenizer = pair
    texts = ["def ", "class Stack:\n    def push(self, item):\n", "import os\nimport sys\n\n\ndef main(argv):\n    for"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    expected = target.generate(**inputs, max_new_tokens=48, do_sample=False)
    out = target.generate(**inputs, max_new_tokens=48, do_sample=False, assistant_model=draft, strategy="spec")
    assert torch.equal(out, expected)
    looked_up = target.generate(**inputs, max_new_tokens=48, do_sample=False, strategy="spec")
    assert torch.equal(looked_up, expected)


def test_the_tokenizer_gives_any_text_back(pair: Pair) -> None:
    for text in ("def f(x):\n\treturn x  # γ ≤ 4\n", " lead", "emoji 🦊\r\n", "\x00\x7f"):
        assert pair[2].decode(pair[2](text)["input_ids"]) == text


def test_the_pair_is_small_and_typed_as_stated(pair: Pair) -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16_000_000
    target, draft, _ = pair
    assert target.dtype == draft.dtype == torch.float32
    assert 6e6 <= target.num_parameters() <= 10e6
    assert target.config.vocab_size == draft.config.vocab_size == 4096


def test_the_card_states_data_recipe_loss_and_acceptance() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8").lower()
    for word in ("license", "standard library", "steps", "held-out", "acceptance", "γ = 4"):
        assert word in card, word


def test_the_embedded_head_drafts_for_the_embedded_target(pair: Pair, prompts: torch.Tensor) -> None:
    """Within a megabyte; what it says of its own acceptance is in its card."""
    assert sum(file.stat().st_size for file in (FOLDER.parent / "demo_head").iterdir()) <= 1_000_000
    head, stats = hf_specdec.demo_head(), hf_specdec.SpeculationStats()
    assert head.dtype == torch.float32 and head.parts.draft_vocab_size is not None
    call = {"attention_mask": torch.ones(8, 100, dtype=torch.long), "max_new_tokens": 32, "do_sample": False}
    expected = pair[0].generate(prompts[:8], **call)
    way = {"strategy": "spec", "assistant_model": head, "num_assistant_tokens": 4, "speculation_stats": stats}
    assert torch.equal(pair[0].generate(prompts[:8], **call, **way), expected)
    assert stats.acceptance_rate > 0.3
