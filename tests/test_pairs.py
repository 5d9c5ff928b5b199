"""Drafts by name, and targets and drafts that share a tokenizer but not the size of their embeddings."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, make_pair, make_prompts, perturbed
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_specdec import SpeculationStats, Trace, pairs

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@functools.cache
def pair() -> tuple[Any, Any]:
    return make_pair("llama", 0.04)


def prompts(batch: int) -> dict[str, torch.Tensor]:
    return make_prompts(batch, seed=3)


def generate(target: Any, draft: Any, **kwargs: Any) -> Any:
    """By strategy='spec', which must have worked at it."""
    stats = SpeculationStats()
    out = target.generate(**GREEDY | kwargs, assistant_model=draft, strategy="spec", speculation_stats=stats)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return out


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    pairs.load_draft.cache_clear()
    yield
    pairs.load_draft.cache_clear()


# Drafts by name


@pytest.fixture
def saved_draft(tmp_path: Path) -> str:
    pair()[1].save_pretrained(tmp_path / "draft")
    return str(tmp_path / "draft")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_draft_may_be_a_path_and_is_loaded_once(saved_draft, kind, monkeypatch):
    target, _ = pair()
    loads = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        pairs.AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: loads.append(args) or original(*args, **kw)
    )
    expected = target.generate(**prompts(2), **GREEDY)
    for _ in range(3):
        assert generate(target, kind(saved_draft), **prompts(2)).equal(expected)
    assert loads == [(saved_draft,)]


def test_a_draft_by_path_takes_the_targets_dtype(saved_draft):
    target = copy.deepcopy(pair()[0]).to(torch.bfloat16)
    out = target.generate(**prompts(2), **GREEDY, assistant_model=saved_draft, strategy="spec")
    assert out.shape == (2, 28)
    assert pairs.load_draft(saved_draft, torch.bfloat16, target.device).dtype == torch.bfloat16
    assert pairs.load_draft.cache_info().misses == 1


def test_a_draft_by_path_is_as_good_as_the_model_itself(saved_draft):
    target, draft = pair()
    counts = []
    for assistant in (draft, saved_draft):
        stats = SpeculationStats()
        target.generate(**prompts(2), **GREEDY, assistant_model=assistant, strategy="spec", speculation_stats=stats)
        counts.append(stats.iterations)
    assert counts[0] == counts[1]


# Vocabularies


def make_tokenizer(words: int, swapped: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, words)}}
    if swapped:
        vocabulary["w5"], vocabulary["w6"] = 6, 5
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="<pad>")


def padded(target: Any, size: int) -> Any:
    """A draft with `size` embeddings; it likes to choose those that the target does not have."""
    draft = perturbed(target, 0.02)
    draft.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        extra = draft.lm_head.weight[VOCAB:]
        extra.copy_(3 * draft.lm_head.weight[: len(extra)])
    return draft


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [90, 104], ids=["draft smaller", "draft larger"])
def test_one_tokenizer_over_embeddings_of_different_sizes(size, batch):
    target = pair()[0]
    draft = padded(target, size)
    inputs = prompts(batch)
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(88)}
    expected = target.generate(**inputs, **GREEDY)
    assert (expected >= 90).any()  # the target may say what the smaller draft has never heard of
    assert generate(target, draft, **inputs, **tokenizers).equal(expected)
    assert generate(target, draft, **inputs, **tokenizers, do_sample=True, top_k=1).equal(expected)


def test_tokens_that_only_the_draft_has_are_never_proposed():
    target = pair()[0]
    stats, trace = SpeculationStats(), Trace()
    speculation = {"assistant_model": padded(target, 104), "speculation_stats": stats, "speculation_trace": trace}
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(88)}
    target.generate(**prompts(2), **GREEDY, **tokenizers, strategy="spec", **speculation)
    drafted = [token for iteration in trace.iterations for row in iteration.rows for token in row.drafted]
    assert len(drafted) == stats.drafted_tokens > 0
    assert max(drafted) < VOCAB


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., tuple[Any, Any, Path]]:
    """Saves and loads a target and a draft of another size, each with its tokenizer."""

    def make(**of_the_draft: Any) -> tuple[Any, Any, Path]:
        target = pair()[0]
        for name, model in {"target": target, "draft": padded(target, 104)}.items():
            model.save_pretrained(tmp_path / name)
            make_tokenizer(88, **of_the_draft if name == "draft" else {}).save_pretrained(tmp_path / name)
        target, draft = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("target", "draft"))
        return target, draft, tmp_path

    return make


def test_tokenizers_are_found_where_the_models_came_from(folders):
    target, draft, path = folders()
    expected = target.generate(**prompts(2), **GREEDY)
    assert generate(target, draft, **prompts(2)).equal(expected)
    assert generate(target, str(path / "draft"), **prompts(2)).equal(expected)


def test_different_tokenizers_where_the_models_came_from_are_refused(folders):
    target, draft, path = folders(swapped=True)
    for assistant in (draft, str(path / "draft")):
        with pytest.raises(ValueError, match=r"different tokenizers \(vocabulary sizes 96 and 104\).*same family"):
            generate(target, assistant, **prompts(2))


def test_tokenizers_that_are_given_beat_those_that_are_found(folders):
    target, draft, _ = folders(swapped=True)
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(88)}
    assert generate(target, draft, **prompts(2), **tokenizers).equal(target.generate(**prompts(2), **GREEDY))
