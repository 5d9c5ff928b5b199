"""Heads in training: the loss is that of the drafts which the head will make, and acceptance rises."""

import copy
import inspect

import psutil
import pytest
import torch
from conftest import VOCAB
from datasets import Dataset
from eagle3_reference import make_parts, random_head, reference_logits, some_tokens
from test_eagle3 import make_target, true_states
from torch import Tensor
from transformers import PreTrainedModel

from hf_specdec import Eagle3Head
from hf_specdec.tools import head_training
from hf_specdec.tools.distillation import acceptance, distillation_loss
from hf_specdec.tools.head_training import DECAY, DRAFTED, HeadDistillation, frequent_tokens, new_head, training_loss
from hf_specdec.tools.recipe import Recipe


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target()


def plain_loss(
    head: Eagle3Head, target: PreTrainedModel, rows: list[list[int]], begins: list[int], drafted: int
) -> Tensor:
    """Position by position, draft by draft, with the reference's logits from scratch."""
    parts = [[] for _ in range(drafted)]
    known = slice(None) if head.target_ids is None else head.target_ids
    for tokens, begin in zip(rows, begins):
        states = true_states(target, head.parts.states_of(3), tokens)
        with torch.no_grad():
            target_logits = target(torch.tensor([tokens])).logits[0][:, known]
        for t in range(len(tokens) - 1):
            for step in range(min(drafted, len(tokens) - 1 - t)):
                if t + 1 + step < begin:
                    continue
                logits = reference_logits(head, target, [s[: t + 1] for s in states], tokens[: t + 2 + step])
                parts[step].append(distillation_loss(logits[None], target_logits[t + 1 + step][None], 0.5))
    weights = [DECAY**step for step in range(drafted)]
    return sum(w * torch.stack(p).mean() for w, p in zip(weights, parts)) / sum(weights)


@pytest.mark.parametrize("begins", [[0, 0], [3, 1], [6, 4]])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_loss_is_that_of_drafts_from_every_position(
    reduced: bool, begins: list[int], target: PreTrainedModel
) -> None:
    """With rows of uneven lengths, whose fill counts for nothing. Tokens before `begins` are not learned."""
    head = random_head(make_parts(draft_vocab_size=40), some_tokens(40)) if reduced else random_head(make_parts())
    torch.manual_seed(0)
    rows = [torch.randint(2, VOCAB, (n,)).tolist() for n in (7, 5)]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    states = [
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
        for each in zip(*(true_states(target, (0, 1, 2), row) for row in rows))
    ]
    filled = torch.arange(7) < torch.tensor([[7], [5]])
    counted = filled & (torch.arange(7) >= torch.tensor(begins)[:, None])
    with torch.no_grad():
        logits = target(tokens, attention_mask=filled.long()).logits
    embeddings = target.get_input_embeddings().weight
    logits = logits if head.target_ids is None else logits[..., head.target_ids]
    found = training_loss(head, states, tokens, logits, counted, embeddings, 0.5, drafted=3)
    torch.testing.assert_close(found, plain_loss(head, target, rows, begins, 3), atol=1e-5, rtol=1e-4)


def test_frequent_tokens_come_first() -> None:
    assert frequent_tokens([[5, 5, 7], [7, 5, 9, 200]], 2, 100).tolist() == [5, 7]
    assert frequent_tokens([[5, 5, 7]], 4, 100).tolist() == [0, 1, 5, 7]


@pytest.mark.parametrize(
    ("shares_output", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_training_raises_the_acceptance_and_leaves_the_target_alone(
    target: PreTrainedModel, shares_output: bool, dtype: torch.dtype
) -> None:
    target = copy.deepcopy(target).to(dtype)
    before = copy.deepcopy(target.state_dict())
    torch.manual_seed(0)
    head = new_head(target, some_tokens(80), shares_output=shares_output)
    assert ("lm_head.weight" in head.state_dict()) != shares_output
    prompts = torch.randint(2, VOCAB, (32, 4))
    texts = target.generate(prompts, do_sample=True, max_new_tokens=24, top_k=0).tolist()
    examples = Dataset.from_dict({"input_ids": texts, "completion_mask": [[1] * len(t) for t in texts]})
    training = HeadDistillation(head, target, examples, Recipe(steps=25, rows=8, lr=0.02))
    held = torch.randint(2, VOCAB, (8, 4)).tolist()
    first = acceptance(target, training.draft(), held, 16, 1.0)
    reads, hook = [], target.register_forward_pre_hook(lambda *_: reads.append(1))
    losses = list(training.train())
    hook.remove()
    assert len(reads) == 4  # 32 texts, 8 at a time: each is read once, and learned from 6 times
    last = acceptance(target, training.draft(), held, 16, 1.0)
    assert losses[-1] < losses[0]
    for way in ("greedy", "sampled"):
        assert last[way].acceptance_rate > first[way].acceptance_rate + 0.05
    assert all(torch.equal(weights, before[name]) for name, weights in target.state_dict().items())


def test_the_first_draft_is_learned_alone_before_the_others(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = torch.randint(2, VOCAB, (8, 9)).tolist()
    examples = Dataset.from_dict({"input_ids": texts, "completion_mask": [[1] * 9] * 8})
    given = []

    def loss(*args: object, **options: object) -> Tensor:
        given.append(inspect.signature(training_loss).bind(*args, **options).arguments["drafted"])
        return training_loss(*args, **options)

    monkeypatch.setattr(head_training, "training_loss", loss)
    training = HeadDistillation(new_head(target, some_tokens(80)), target, examples, Recipe(steps=5, rows=4))
    list(training.train())
    assert given == [1, 1, 1, DRAFTED, DRAFTED]


def test_what_is_kept_of_the_target_changes_nothing(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, a part, or nothing; with one text twice, of which different tokens are learned."""
    texts = torch.randint(2, VOCAB, (12, 9)).tolist()
    texts[5] = texts[4] = texts[4][:6]
    masks = [[0] * 3 + [1] * (len(text) - 3) for text in texts]
    masks[5] = [0] * 5 + [1]
    examples = Dataset.from_dict({"input_ids": texts, "completion_mask": masks})
    found, reads = [], []
    for room in (2**30, 20_000, 0):
        monkeypatch.setattr(head_training, "KEPT", room / psutil.virtual_memory().available)
        torch.manual_seed(0)
        recipe = Recipe(steps=9, rows=4, lr=0.02, completion_only_loss=True)
        training = HeadDistillation(new_head(target, some_tokens(80)), target, examples, recipe)
        count: list[int] = []
        with target.register_forward_pre_hook(lambda *_, count=count: count.append(1)):
            found.append(list(training.train()))
        reads.append(len(count))
        assert training._room >= 0
    assert reads[0] == 3 < reads[1] <= reads[2] == 9
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-4)


def test_targets_without_enough_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="an EAGLE-3 head reads three layers, and LlamaForCausalLM has 2"):
        new_head(make_target(layers=2))
