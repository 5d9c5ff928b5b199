"""A prompt of embeddings: the returned cache equals vanilla's in every state, and can be continued like it."""

import copy
from inspect import signature
from typing import Any

import pytest
import torch
import transformers
from conftest import make_pair, make_prompts
from test_recurrent import pair as recurrent_pair
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.cache_utils import Cache

import hf_specdec  # noqa: F401  registers
from hf_specdec.tools.tiny_models import build, entries, perturbed

WIDTH, NEW = 9, 8
MODELS = ["qwen3_next", "kimi_linear", "mamba2", "lfm2", "llama", "mistral-sliding"]


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair(name) if name in ("llama", "mistral-sliding") else recurrent_pair(name)


def embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Embeddings that belong to no tokens, and not to `ids`."""
    return 1.1 * model.get_input_embeddings()((ids * 5 + 9) % 90).detach()


def prompt(model: PreTrainedModel, batch: int) -> dict[str, Tensor]:
    inputs = make_prompts(batch, WIDTH, seed=2)
    return {"inputs_embeds": embeddings(model, inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}


def ends(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[int]:
    """Tokens that end the first and the last row, at different steps."""
    new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    return [int(new[0, 2]), int(new[-1, 5])]


def held(cache: Cache) -> dict[str, Tensor]:
    """Every tensor of a cache, by layer and name."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for name in ("conv_states", "recurrent_states", "keys", "values"):
            value = getattr(layer, name, None)
            for key, state in (value if isinstance(value, dict) else {0: value}).items():
                if state is not None and state.numel():
                    found[f"{index}.{name}.{key}"] = state
    return found


def assert_same_cache(ours: Cache, theirs: Cache, mask: Tensor) -> None:
    """`mask`, `[batch, columns]`, marks the real ones among the first columns; padding's entries do not matter."""
    mine, expected = held(ours), held(theirs)
    assert mine.keys() == expected.keys()
    for name, state in expected.items():
        assert mine[name].shape == state.shape, name
        real = torch.ones(())
        if name.split(".")[1] in ("keys", "values"):
            columns = int(theirs.get_seq_length())
            real = torch.nn.functional.pad(mask.bool(), (0, columns - mask.shape[1]), value=True)
            real = real[:, columns - state.shape[2] :, None].unsqueeze(1)
        atol = 1e-4 * float(state.abs().max())
        torch.testing.assert_close(mine[name] * real, state * real, rtol=1e-4, atol=atol, msg=lambda m, n=name: n + m)


def assert_same(
    target: PreTrainedModel, way: dict[str, Any], inputs: dict[str, Any], mask: Tensor, **kwargs: Any
) -> None:
    """The same tokens and the same cache as vanilla's, from which vanilla continues with the same tokens."""
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    fresh = copy.deepcopy
    theirs = target.generate(**fresh(inputs), **fresh(kwargs))
    ours = target.generate(**fresh(inputs), **fresh(kwargs), **way, strategy="spec")
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert_same_cache(ours.past_key_values, theirs.past_key_values, mask)
    mask = torch.nn.functional.pad(mask, (0, kwargs["max_new_tokens"] + 1), value=1)
    after = [go_on(target, theirs.sequences[:, -1:], output.past_key_values, mask) for output in (ours, theirs)]
    torch.testing.assert_close(*after, rtol=1e-3, atol=1e-3)


def go_on(model: PreTrainedModel, ids: Tensor, cache: Cache, mask: Tensor) -> Tensor:
    """Vanilla's continuation of a cache; for models that `generate()` cannot start from a cache, the next logits."""
    if "cache_params" in signature(model.forward).parameters:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, cache_params=cache).logits
        return logits
    mask = mask[:, : int(cache.get_seq_length()) + 1]
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)


def draft_way(draft: PreTrainedModel) -> dict[str, Any]:
    return {"assistant_model": draft, "num_assistant_tokens": 3}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_embeddings_where_rows_end_at_different_times(name: str, batch: int) -> None:
    target, draft = pair(name)
    inputs = prompt(target, batch)
    for eos in (None, ends(target, inputs)):
        assert_same(target, draft_way(draft), inputs, inputs["attention_mask"], eos_token_id=eos)


@pytest.mark.parametrize("columns", [4, WIDTH, 2 * WIDTH])
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "llama"])
def test_ids_beside_embeddings_are_the_text_but_are_not_fed(name: str, columns: int) -> None:
    """Any number of them. They are not the tokens of these embeddings."""
    target, draft = pair(name)
    for batch in (1, 3):
        inputs = prompt(target, batch)
        ids = torch.randint(2, 90, (batch, columns), generator=torch.Generator().manual_seed(7))
        assert_same(target, draft_way(draft), {**inputs, "input_ids": ids}, inputs["attention_mask"])


class Moody(LogitsProcessor):
    """Favours a different token at each call, so it must be called step by step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, 3 + self.calls % 7] += 0.5
        return scores


@pytest.mark.parametrize("name", ["qwen3_next", "mistral-sliding"])
def test_lockstep_look_up_and_several_sequences_of_a_prompt(name: str) -> None:
    target, draft = pair(name)
    inputs = prompt(target, 3)
    mask, eos = inputs["attention_mask"], ends(target, inputs)
    assert_same(target, draft_way(draft), inputs, mask, eos_token_id=eos, logits_processor=[Moody()])
    assert_same(target, {"prompt_lookup_num_tokens": 3}, inputs, mask, eos_token_id=eos)
    several = {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
    assert_same(target, draft_way(draft), inputs, mask.repeat_interleave(2, dim=0), **several)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "llama"])
def test_a_cache_of_the_user_continued_with_embeddings(name: str) -> None:
    target, draft = pair(name)
    for batch in (1, 3):
        inputs = prompt(target, batch)
        mask = inputs["attention_mask"]
        way = {"max_new_tokens": 5, "do_sample": False}
        cache = transformers.DynamicCache(config=target.config)
        first = target.generate(**inputs, past_key_values=cache, **way)
        new = torch.cat([first, first.flip(1)], dim=1)
        embeds = torch.cat([inputs["inputs_embeds"], target.get_input_embeddings()(new).detach()], dim=1)
        mask = torch.nn.functional.pad(mask, (0, new.shape[1]), value=1)
        more = {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": cache}
        assert_same(target, draft_way(draft), more, mask, eos_token_id=ends(target, copy.deepcopy(more)))


@pytest.mark.parametrize("batch", [1, 3])
def test_embeddings_that_vanillas_own_first_forward_reads(batch: int) -> None:
    """An image among them gives positions on several axes; the states are recomputed from the embeddings."""
    target = build(next(entry for entry in entries() if entry.name == "Qwen3_5ForConditionalGeneration"))
    inputs: dict[str, Tensor] = dict(make_prompts(batch, 14))
    inputs["input_ids"][:, 4:8], inputs["attention_mask"][:, 4:] = target.config.image_token_id, 1
    inputs["inputs_embeds"] = embeddings(target, make_prompts(batch, 14, seed=5)["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == target.config.image_token_id).long()
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
    assert_same(target, draft_way(perturbed(target, 0.08)), inputs, inputs["attention_mask"])
