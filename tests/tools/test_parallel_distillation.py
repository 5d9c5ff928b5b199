"""Training a draft that predicts several tokens in one forward."""

from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_specdec.drafters.parallel import mask_token
from hf_specdec.tools import distillation
from hf_specdec.tools.distillation import _collate, distillation_loss
from hf_specdec.tools.parallel_distillation import (
    DRAFTS,
    ParallelDistillation,
    add_mask_token,
    block_mask,
    blocks,
)
from hf_specdec.tools.recipe import Recipe


def test_a_block_has_no_gaps_and_no_more_than_the_text_holds() -> None:
    """A mask token is there only with those before it; the target says what is right for each."""
    torch.manual_seed(0)
    seen, place = (chosen.tolist() for chosen in blocks(60, 7))
    found = set(zip(seen, place))
    assert len(found) == len(seen)
    assert all(position + n < 60 for position, n in found)
    assert all(n == 1 or (position, n - 1) in found for position, n in found)
    counts = [place.count(n) for n in range(1, 8)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 41 and counts[6] >= 8


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), ("mistral-sliding", "sdpa"), ("mistral-sliding", "eager"), ("gemma2", "eager")],
)
@torch.no_grad()
def test_each_mask_token_sees_what_it_sees_when_drafting(name: str, attention: str) -> None:
    """The text up to its block, and the mask tokens of its block before it; windows are by position."""
    torch.manual_seed(0)
    model = make_model(ARCHITECTURES[name](), attn_implementation=attention)
    text, mask = torch.randint(2, 90, (1, 20)), 95
    seen, place = blocks(20, 4)
    position = torch.cat([torch.arange(20), seen + place])
    fed = torch.cat([text, text.new_full((1, len(seen)), mask)], dim=1)
    allowed = block_mask(model, 20, seen, place)
    logits = model(fed, attention_mask=allowed, position_ids=position[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits[:20], model(text).logits[0], atol=1e-4, rtol=1e-4)
    for i, (end, n) in enumerate(zip(seen.tolist(), place.tolist()), 20):
        alone = model(torch.cat([text[:, : end + 1], text.new_full((1, n), mask)], dim=1)).logits[0, -1]
        torch.testing.assert_close(logits[i], alone, atol=1e-4, rtol=1e-4)


def test_the_mask_token_is_an_unused_id_or_a_row_more(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The tokenizer has 96 tokens. The config that is saved names the mask token."""
    for size in (96, 100):
        config = ARCHITECTURES["llama"]()
        config.vocab_size = size
        draft = make_model(config)
        assert add_mask_token(draft, tokenizer) == mask_token(draft) == 96
        assert draft.config.vocab_size == max(size, 97)
        embedding = draft.get_input_embeddings().weight
        torch.testing.assert_close(embedding[96], embedding[:96].mean(dim=0))
        draft.save_pretrained(tmp_path / str(size))
        assert mask_token(AutoModelForCausalLM.from_pretrained(tmp_path / str(size))) == 96
        draft.config.pard_token = 7
        assert add_mask_token(draft, tokenizer) == 7


def test_a_model_that_takes_no_such_masks_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="BloomForCausalLM cannot learn to draft in parallel here"):
        add_mask_token(make_model(ARCHITECTURES["bloom"]()), tokenizer)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """A target whose next token depends mostly on the last one, which a single layer can learn."""
    config = ARCHITECTURES["llama"]()
    config.vocab_size = 24
    model = make_model(config, seed=3)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "o_proj" in name:
                weights *= 0.1
    return model


@pytest.fixture
def draft(target: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    draft = distillation.random_layers(target, 1)
    draft.config.pard_token = 23
    return draft


PIECES = torch.randint(2, 23, (60, 20), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def test_the_loss_is_that_of_every_token_and_mask_token_alone(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Against the target's distribution at the same position, where it has seen the whole text. No padding counts."""
    rows = [PIECES[0], PIECES[1][:13]]
    data = Dataset.from_dict({"input_ids": rows})
    run = ParallelDistillation(draft, target, data, Recipe(steps=1, rows=2))
    torch.manual_seed(1)
    loss = run._loss(_collate([(row, [1] * len(row)) for row in rows]))
    torch.manual_seed(1)
    seen, place = blocks(20, DRAFTS - 1)
    drafted, wanted = [], []
    for row in rows:
        text = torch.tensor([row])
        drafted += [draft(text).logits[0]]
        wanted += [target(text).logits[0]]
        for end, n in zip(seen.tolist(), place.tolist()):
            if end + n < len(row):
                fed = torch.cat([text[:, : end + 1], text.new_full((1, n), 23)], dim=1)
                drafted.append(draft(fed).logits[0, -1:])
                wanted.append(target(text).logits[0, end + n : end + n + 1])
    expected = distillation_loss(torch.cat(drafted), torch.cat(wanted), 0.5)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_training_raises_the_acceptance(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    training, held = PIECES[:48], [piece[:8] for piece in PIECES[48:]]
    before = distillation.acceptance(target, draft, held, 24, 1.0)["greedy"]
    data = distillation.examples(target, None, training, 16, 8, 16, 1.0, seed=0)
    run = ParallelDistillation(draft, target, data, Recipe(steps=40, rows=8, lr=1e-2))
    mask = draft.get_input_embeddings().weight[23].clone()
    losses = list(run.train())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = distillation.acceptance(target, run.draft(), held, 24, 1.0)["greedy"]
    assert after.draft_forwards <= after.target_forwards  # it drafts in parallel
    assert after.acceptance_rate > before.acceptance_rate + 0.05
    assert not torch.equal(draft.get_input_embeddings().weight[23], mask)
    assert DRAFTS > distillation.GAMMA
