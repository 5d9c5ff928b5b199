"""`cache_implementation="static"`: forwards of fixed shapes on storage that is kept from call to call.

On a CPU no graph is captured; buffers, masks over the whole capacity and rounded widths are the same.
"""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, make_pair, make_prompts
from transformers import PreTrainedModel

from hf_specdec import static

RAGGED = sorted(ARCHITECTURES.keys() - {"bloom", "falcon-alibi"})


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, ...]]]:
    """The shapes of what the static forwards gave their models."""
    seen: set[tuple[int, ...]] = set()
    run = static.StaticForwards._run

    def spy(self: Any, model: PreTrainedModel, step: Any) -> torch.Tensor:
        seen.add(tuple(step.ids.shape))
        return run(self, model, step)

    monkeypatch.setattr(static.StaticForwards, "_run", spy)
    yield seen


def generate(pair: tuple[PreTrainedModel, PreTrainedModel], prompts: dict[str, Any], **options: Any) -> torch.Tensor:
    target, draft = pair
    options = {"do_sample": False, "max_new_tokens": 24, "cache_implementation": "static"} | options
    return target.generate(**prompts, assistant_model=draft, strategy="spec", **options)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", RAGGED)
def test_tokens_are_vanillas_and_shapes_are_few(name, rows, shapes):
    pair, prompts = make_pair(name), make_prompts(rows)
    for gamma in (1, 4):
        for seed in (0, 1):  # the second call works on the storage of the first
            prompts = make_prompts(rows, seed=seed)
            expected = pair[0].generate(**prompts, do_sample=False, max_new_tokens=24)
            assert generate(pair, prompts, num_assistant_tokens=gamma).equal(expected)
    assert {width for _, width in shapes} <= set(static.WIDTHS)
    assert rows in {count for count, _ in shapes}


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_models_that_cannot_be_given_masks_are_fed_in_the_ordinary_way(name, shapes, caplog):
    pair, prompts = make_pair(name), make_prompts(2)
    static.logger.warning_once.cache_clear()
    expected = pair[0].generate(**prompts, do_sample=False, max_new_tokens=24)
    assert generate(pair, prompts, num_assistant_tokens=4).equal(expected)
    assert not shapes
    assert "need forwards of changing shapes" in caplog.text


def test_a_longer_call_gets_a_larger_storage_and_a_shorter_one_the_same(llama_pair):
    prompts = make_prompts(2)
    storages = []
    for new_tokens in (24, 20, 200, 24):
        expected = llama_pair[0].generate(**prompts, do_sample=False, max_new_tokens=new_tokens)
        assert generate(llama_pair, prompts, max_new_tokens=new_tokens).equal(expected)
        storages.append(static._kept[llama_pair[0]][0])
    assert storages[0] is storages[1] is not storages[2]
    assert storages[2] is storages[3]


def test_a_call_within_a_call_gets_storage_of_its_own(llama_pair):
    prompts = make_prompts(1)
    expected = llama_pair[0].generate(**prompts, do_sample=False, max_new_tokens=24)
    inner = []

    def criterion(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.shape[1] == 20:
            inner.append(generate(llama_pair, prompts))
        return torch.zeros(len(ids), dtype=torch.bool)

    assert generate(llama_pair, prompts, stopping_criteria=[criterion]).equal(expected)
    assert inner[0].equal(expected)


def test_sampling_on_used_storage_is_the_same_as_on_new(llama_pair):
    prompts = make_prompts(2)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(generate(llama_pair, prompts, do_sample=True, num_assistant_tokens=4))
    assert results[0].equal(results[1])


def test_what_is_kept_does_not_keep_a_model_alive():
    pair = make_pair("llama", seed=5)
    generate(pair, make_prompts(1))
    gone = weakref.ref(pair[0])
    assert pair[0] in static._kept
    del pair
    gc.collect()
    assert gone() is None
