"""Padding anywhere in the prompt of a recurrent model: its states see padding in exactly vanilla's forwards.

Transformers treats a single token as real, whatever the mask says. So tokens that vanilla feeds together must not
be fed one by one, or vice versa.
"""

import copy
import functools
from typing import Any

import pytest
import torch
from conftest import assert_lossless, make_prompts
from test_recurrent import pair as recurrent_pair
from transformers import PreTrainedModel

MODELS = ["qwen3_next", "mamba2", "nemotron_h", "lfm2"]


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Visible padding: its embedding is not zero."""
    target, draft = copy.deepcopy(recurrent_pair(name))
    generator = torch.Generator().manual_seed(3)
    for model in (target, draft):
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[0] = weight.std() * torch.randn(weight.shape[1], generator=generator)
    return target, draft


def lossless(name: str, inputs: dict[str, Any], **kwargs: Any) -> None:
    assert_lossless(pair(name), inputs, lambda: {"max_new_tokens": 8, "do_sample": False, **kwargs}, gammas=(3,))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_column_is_padding(name: str, batch: int) -> None:
    inputs = make_prompts(batch, seed=3)
    inputs["attention_mask"][0, -1] = 0
    lossless(name, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_short_prompts_whose_first_column_is_padding(name: str) -> None:
    ids = torch.tensor([[0, 5], [7, 9]])
    lossless(name, {"input_ids": ids, "attention_mask": (ids != 0).long()})


@pytest.mark.parametrize("size", [1, 4, 13])
def test_chunks_are_those_of_vanilla(size: int) -> None:
    """Of 14 columns, the last chunk has one, two or one: a mask that ends in 0 is passed, or is not."""
    for ends_in_padding in (True, False):
        inputs = make_prompts(3, 14 if size > 1 else 5, seed=3)
        inputs["attention_mask"][0, -1 if ends_in_padding else -3] = 0
        lossless("qwen3_next", inputs, prefill_chunk_size=size)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_hidden_states_and_scores_are_those_of_vanilla(name: str) -> None:
    target, draft = pair(name)
    inputs = make_prompts(3, seed=3)
    inputs["attention_mask"][0, -1] = 0
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    kwargs = {"max_new_tokens": 8, "do_sample": False, **wanted}
    theirs = target.generate(**inputs, **kwargs)
    ours = target.generate(**inputs, **kwargs, assistant_model=draft, strategy="spec", num_assistant_tokens=3)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    real = inputs["attention_mask"].bool()
    for step, (mine, expected) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        which = slice(None) if step else real  # outputs at padding do not matter
        torch.testing.assert_close(mine[-1][which], expected[-1][which], rtol=1e-3, atol=1e-3)
    for mine, expected in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
