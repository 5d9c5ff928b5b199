"""Distillation: initial weights, training data, the loss, resuming, and rising acceptance."""

import functools
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, make_model, perturbed
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_specdec import SpeculationStats
from hf_specdec.tools import distillation
from hf_specdec.tools.distillation import Distillation
from hf_specdec.tools.recipe import Recipe


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """A target whose next token depends mostly on the last one, which a single layer can learn."""
    model = make_model(ARCHITECTURES["llama"](), seed=3)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "o_proj" in name:
                weights *= 0.1
    return model


@pytest.fixture(scope="module")
def pieces() -> list[list[int]]:
    """Two hundred pieces of random tokens, of uneven lengths up to 24."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 25, (200,), generator=generator).tolist()
    return [torch.randint(2, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


# ------------------------------------------------------------------------------------------------------------ loss


def plain_loss(draft_logits: Tensor, target_logits: Tensor, argmax_weight: float, mask: Tensor) -> Tensor:
    """The definition, one token and one word at a time."""
    terms = []
    for row, position in mask.nonzero().tolist():
        width = min(draft_logits.shape[-1], target_logits.shape[-1])
        q = draft_logits[row, position, :width].softmax(-1)
        p = target_logits[row, position, :width].softmax(-1)
        kl = sum(p[word] * (p[word].log() - q[word].log()) for word in range(width))
        terms.append(kl - argmax_weight * q[int(p.argmax())].log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
@pytest.mark.parametrize("widths", [(9, 9), (9, 7), (7, 9)])
def test_the_loss_and_its_gradient_equal_plain_loops(
    chunk: int, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any chunk size, with padding left out, and with embeddings padded on either side."""
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    torch.manual_seed(0)
    draft_logits = torch.randn(3, 5, widths[0], dtype=torch.float32, requires_grad=True)
    target_logits = 2 * torch.randn(3, 5, widths[1])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    losses = (
        distillation.distillation_loss(draft_logits, target_logits, 0.3, mask),
        plain_loss(draft_logits, target_logits, 0.3, mask),
    )
    gradients = [torch.autograd.grad(loss, draft_logits)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_without_a_mask_every_token_counts() -> None:
    draft_logits, target_logits = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    everything = torch.ones(2, 4)
    masked = distillation.distillation_loss(draft_logits, target_logits, 0.5, everything)
    torch.testing.assert_close(distillation.distillation_loss(draft_logits, target_logits, 0.5), masked)


def test_sampled_acceptance_is_at_least_what_the_loss_promises() -> None:
    """Pinsker: a rejection, of probability TV(p, q), is at most sqrt(KL / 2)."""
    torch.manual_seed(0)
    p_logits, q_logits = torch.randn(50, 1, 20), torch.randn(50, 1, 20)
    for p, q in zip(p_logits, q_logits):
        rejected = 1 - torch.minimum(p.softmax(-1), q.softmax(-1)).sum().item()
        assert rejected <= math.sqrt(distillation.distillation_loss(q[None], p[None]).item() / 2)


# ------------------------------------------------------------------------------------------------------ initial weights


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "mixtral", "gpt2", "gpt_neox", "opt", "falcon"])
def test_the_first_layers_of_any_architecture_make_a_draft(name: str, tmp_path: Path) -> None:
    """All its weights are the target's, it drafts, and it can be saved and loaded."""
    target = make_model(ARCHITECTURES[name]())
    draft = distillation.first_layers(target, 1)
    assert draft.num_parameters() < target.num_parameters()
    assert target.config.num_hidden_layers == 2
    assert len(getattr(draft.config, "layer_types", None) or [None]) == 1
    draft.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 1
    ids = torch.randint(2, SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    weights = target.state_dict()
    assert all(torch.equal(given, weights[name]) for name, given in draft.state_dict().items())
    stats = SpeculationStats()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    spec = target.generate(ids, assistant_model=draft, strategy="spec", speculation_stats=stats, **options)
    assert torch.equal(spec, target.generate(ids, **options))
    assert stats.drafted_tokens > 0


def test_random_layers_know_nothing_of_the_target(target: PreTrainedModel) -> None:
    torch.manual_seed(0)
    draft = distillation.random_layers(target, 1)
    assert not torch.equal(draft.get_input_embeddings().weight, target.get_input_embeddings().weight)
    assert draft.config.num_hidden_layers == 1


@pytest.mark.parametrize("layers", [0, 2, 5])
def test_a_draft_needs_fewer_layers_than_the_target(target: PreTrainedModel, layers: int) -> None:
    with pytest.raises(ValueError, match=f"takes 1 to 1 of its 2 layers, got {layers}"):
        distillation.first_layers(target, layers)


# ---------------------------------------------------------------------------------------------------- training data


def test_pieces_give_the_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["the quick brown foxes", "jumps over a lazy dog again and again"]
    cut = distillation.cut(texts, tokenizer, 5)
    assert max(map(len, cut)) == 5
    assert "".join(tokenizer.decode(piece) for piece in cut) == "".join(texts)
    assert distillation.cut(["a"], tokenizer, 5) == []  # a lone token


def test_held_out_pieces_and_their_doubles_are_not_trained_on() -> None:
    pieces = [[i, i] for i in range(10)] + [[0, 0], [5, 5]]
    training, held = distillation.hold_out(pieces, 3)
    assert held == [[0, 0], [4, 4], [8, 8]]
    assert training == [[i, i] for i in (1, 2, 3, 5, 6, 7, 9, 5)]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="has 2 pieces of at least two tokens, expected more than the 2 held out"):
        distillation.hold_out([[1, 2], [3, 4]], 2)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        distillation.hold_out([[1, 2]] * 5, 2)


def test_every_number_is_drawn_before_any_comes_again() -> None:
    drawn = distillation.draws(7, 18, seed=0)
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7))
    assert len(drawn) == 18
    assert drawn[:7] != drawn[7:14]


@pytest.mark.parametrize("drafted", [False, True])
def test_the_target_writes_what_it_would_write_alone(target: PreTrainedModel, drafted: bool) -> None:
    """Prompts of uneven lengths in batches; rows end with their end token."""
    draft = perturbed(target, 0.1) if drafted else None
    prompts = [[5, 6, 7], [8, 9], *([10 + i] * (2 + i % 5) for i in range(70))]
    alone = []
    for end in (None, 40):
        target.generation_config.eos_token_id = end
        written, stats = distillation.write(target, prompts, 6, None, draft)
        alone = [
            target.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6,
                do_sample=False)[0].tolist()
            for prompt in prompts
        ]  # fmt: skip
        assert written == alone
        assert (stats.drafted_tokens > 0) == drafted
        target.generation_config.eos_token_id = None
    assert any(len(row) < len(prompt) + 6 for row, prompt in zip(alone, prompts))  # the end token occurred


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_writing_goes_on_where_it_was_interrupted(
    target: PreTrainedModel, temperature: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "ROWS_WRITTEN", 4)
    prompts = [[10 + i] * (2 + i % 5) for i in range(10)]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    torch.manual_seed(1)
    written, _ = distillation.write(target, prompts, 6, temperature, kept=whole, seed=3)
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:4]) + lines[4][:7])  # killed inside a line
    torch.manual_seed(2)
    calls: list[int] = []
    with target.register_forward_pre_hook(lambda *_: calls.append(1)):
        again, _ = distillation.write(target, prompts, 6, temperature, kept=part, seed=3)
    assert again == written and part.read_bytes() == whole.read_bytes()
    assert len(calls) == 2 * 6  # of three groups, the first was not written again
    if temperature is None:
        assert written == distillation.write(target, prompts, 6)[0]


def test_examples_are_text_and_continuations_of_other_pieces(target: PreTrainedModel, pieces: list[list[int]]) -> None:
    data = distillation.examples(target, None, pieces, 6, 4, 5, 1.0, seed=0)
    assert data["kind"][:] == ["text"] * 6 + ["greedy"] * 6 + ["sampled"] * 6
    rows = data["input_ids"][:]
    assert all(row in pieces for row in rows[:6])
    beginnings = [tuple(row[:4]) for row in rows]
    assert len(set(beginnings)) == 18
    assert set(beginnings) <= {tuple(piece[:4]) for piece in pieces}
    for row in rows[6:12]:
        expected = target.generate(torch.tensor([row[:4]]), attention_mask=torch.ones(1, 4), max_new_tokens=5)
        assert row == expected[0].tolist()
    drafted = distillation.examples(target, perturbed(target, 0.1), pieces, 6, 4, 5, 1.0, seed=0)
    assert drafted["input_ids"][:12] == rows[:12]  # a draft only changes the speed


def test_speculation_pays_where_a_block_is_worth_more_than_its_drafts(target: PreTrainedModel) -> None:
    draft = distillation.random_layers(target, 1)
    break_even = 1 + distillation.GAMMA * draft.num_parameters() / target.num_parameters()
    for tau in (break_even - 0.01, break_even + 0.01):
        stats = SpeculationStats(row_iterations=1000, committed_tokens=round(1000 * tau))
        assert distillation.pays(stats, draft, target) == (tau > break_even)


# -------------------------------------------------------------------------------------------------------- training


def test_training_raises_the_acceptance_of_a_random_draft_on_held_out_prompts(
    target: PreTrainedModel, pieces: list[list[int]]
) -> None:
    training, held = distillation.hold_out(pieces, 16)
    torch.manual_seed(0)
    draft = distillation.random_layers(target, 1)
    before = distillation.acceptance(target, draft, held, 24, 1.0)
    data = distillation.examples(target, None, training, 48, 8, 16, 1.0, seed=0)
    run = Distillation(draft, target, data, Recipe(steps=40, rows=8, lr=1e-2))
    losses = list(run.train())
    assert run.step == len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = distillation.acceptance(target, run.draft(), held, 24, 1.0)
    assert after["greedy"].acceptance_rate > before["greedy"].acceptance_rate + 0.03
    assert after["sampled"].acceptance_rate > before["sampled"].acceptance_rate + 0.01


def noisy_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A draft with dropout, so that its training depends on the random state, and tied weights."""
    target = make_model(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, "attention_dropout": 0.3}))
    return target, perturbed(target, 0.5)


def weights_after(
    steps: int, folder: Path, pieces: list[list[int]], resume: bool = False, cut: int = 0, optimizer: str = "adamw"
) -> Distillation:
    """A run of 7 steps that is resumed from `folder`, or saved there after `cut` steps, and stopped after `steps`."""
    target, draft = noisy_pair()
    torch.manual_seed(5)
    data = Dataset.from_dict({"input_ids": pieces[:10]})  # which the order uses more than once
    run = Distillation(draft, target, data, Recipe(steps=7, rows=2, accumulate=2, lr=1e-2, optimizer=optimizer))
    if resume:
        torch.manual_seed(99)
        run.load(folder)
    for _ in run.train():
        if run.step == cut:
            run.save(folder)
        if run.step == steps:
            break
    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(
    optimizer: str, tmp_path: Path, pieces: list[list[int]]
) -> None:
    whole = weights_after(7, tmp_path / "whole", pieces, cut=5, optimizer=optimizer)
    weights_after(3, tmp_path / "parts", pieces, cut=3, optimizer=optimizer)
    resumed = weights_after(7, tmp_path / "parts", pieces, resume=True, optimizer=optimizer)
    assert resumed.step == 7
    expected, given = whole.draft().state_dict(), resumed.draft().state_dict()
    assert all(torch.equal(expected[name], given[name]) for name in expected)
    start = noisy_pair()[1].state_dict()
    assert not torch.equal(given["model.norm.weight"], start["model.norm.weight"])


def test_only_the_newest_whole_checkpoint_is_kept_and_used(tmp_path: Path, pieces: list[list[int]]) -> None:
    weights_after(2, tmp_path, pieces, cut=2)
    weights_after(4, tmp_path, pieces, resume=True, cut=4)
    (tmp_path / "unfinished").mkdir()  # as if the machine had crashed while saving
    (tmp_path / "unfinished" / "half").touch()
    assert [each.name for each in tmp_path.glob("checkpoint-*")] == ["checkpoint-000004"]
    assert weights_after(5, tmp_path, pieces, resume=True, cut=5).step == 5
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-000005"]
    assert not (tmp_path / "checkpoint-000005" / "half").exists()


def test_the_order_of_examples_follows_the_seed_alone(pieces: list[list[int]]) -> None:
    losses = []
    for seed in (0, 0, 1):
        target = make_model(LlamaConfig(**SIZES))
        data = Dataset.from_dict({"input_ids": pieces[:20]})
        run = Distillation(perturbed(target, 0.5), target, data, Recipe(steps=3, rows=2, seed=seed))
        losses.append(list(run.train()))
    assert losses[0] == losses[1] != losses[2]


def test_the_draft_is_trained_in_float32_and_handed_out_in_the_targets_dtype(pieces: list[list[int]]) -> None:
    """Small updates would be lost in bfloat16."""
    target = make_model(LlamaConfig(**SIZES)).to(torch.bfloat16)
    draft = perturbed(target, 0.1)
    data = Dataset.from_dict({"input_ids": pieces[:4]})
    run = Distillation(draft, target, data, Recipe(steps=2, rows=2, lr=1e-5))
    before = run.draft().state_dict()["model.embed_tokens.weight"].clone()
    assert before.dtype == torch.bfloat16
    list(run.train())
    assert draft.dtype == torch.float32
    assert not torch.equal(draft.get_input_embeddings().weight, before.float())
    assert run.draft().dtype == torch.bfloat16


def test_measuring_leaves_the_random_state_alone(target: PreTrainedModel, pieces: list[list[int]]) -> None:
    draft = perturbed(target, 0.1)
    state = torch.get_rng_state()
    figures = [distillation.acceptance(target, draft, pieces[:4], 8, 1.0) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    for way in ("greedy", "sampled"):
        assert figures[0][way].accepted_tokens == figures[1][way].accepted_tokens
        assert figures[0][way].committed_tokens == 4 * 8


def test_the_first_ctrl_c_is_collected_and_the_second_raises(request: pytest.FixtureRequest) -> None:
    # If the tests run in the background, the shell makes them ignore it.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), distillation.interruptible() as received:
        assert not received
        signal.raise_signal(signal.SIGINT)
        assert received
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
