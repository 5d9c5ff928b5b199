"""The invariants of the design hold after every iteration, and the check for them can fail."""

from typing import Any

import pytest
import torch
from conftest import make_pair, make_prompts, perturbed
from transformers import PreTrainedModel

from hf_specdec.cache.ragged import RaggedCache
from hf_specdec.loop import invariants
from hf_specdec.models.cached import CachedModel


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "ENABLED", True)


@pytest.fixture
def asked_pair(llama_pair: tuple[PreTrainedModel, PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The models are probed before something is broken, because the probes would find it first."""
    decode(*llama_pair, batch=2, gamma=3)
    return llama_pair


def decode(target: PreTrainedModel, draft: PreTrainedModel, batch: int, gamma: int, **kwargs: Any) -> torch.Tensor:
    return target.generate(
        **make_prompts(batch, seed=batch),
        max_new_tokens=20,
        assistant_model=draft,
        strategy="spec",
        num_assistant_tokens=gamma,
        **kwargs,
    )


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding", "bloom"])
def test_caches_stand_for_the_committed_tokens_after_every_iteration(name: str, batch: int, sample: bool) -> None:
    target, draft = make_pair(name)
    torch.manual_seed(0)
    for gamma in (1, 3, 7):
        decode(target, draft, batch, gamma, do_sample=sample)


def test_a_rollback_that_keeps_one_token_too_many_is_noticed(
    asked_pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = CachedModel.commit

    def too_long(self: CachedModel, context: Any) -> None:
        commit(self, context)
        prefill = context.ends[0] == context.prompt_width
        for row in context.rows:
            self.cache.lengths[row] += not prefill

    monkeypatch.setattr(CachedModel, "commit", too_long)
    with pytest.raises(invariants.InvariantError, match="holds"):
        decode(*asked_pair, batch=2, gamma=3, do_sample=False)


def test_entries_in_the_wrong_slot_are_noticed(
    asked_pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = RaggedCache.update

    def shifted(self: RaggedCache, key_states: torch.Tensor, *args: Any) -> Any:
        return update(self, key_states.roll(1, dims=2), *args)

    monkeypatch.setattr(RaggedCache, "update", shifted)
    with pytest.raises(invariants.InvariantError, match="off by"):
        decode(*asked_pair, batch=1, gamma=3, do_sample=False)


def test_rollback_moves_no_memory(
    asked_pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's storage is allocated once and stays in place, though most drafts are rejected."""
    target = asked_pair[0]
    draft = perturbed(target, 0.5)
    decode(target, draft, batch=3, gamma=4)
    places: set[int] = set()
    update = RaggedCache.update

    def remember(self: RaggedCache, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> Any:
        result = update(self, key_states, value_states, layer_idx)
        places.add(self.layers[layer_idx].keys.data_ptr())
        return result

    monkeypatch.setattr(RaggedCache, "update", remember)
    decode(target, draft, batch=3, gamma=4, do_sample=False)
    assert len(places) == 2 * target.config.num_hidden_layers  # the target's and the draft's
