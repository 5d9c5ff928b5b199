"""Models with positions on several axes, and masked columns anywhere: new tokens have vanilla's positions."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import assert_lossless, make_prompts
from multimodal import make_multimodal, make_multimodal_prompts
from torch import Tensor
from transformers import PreTrainedModel

from hf_specdec.tools.tiny_models import build, entries, perturbed

TINY = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "glm4v": "Glm4vForConditionalGeneration",
}


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    if name not in TINY:
        return make_multimodal(name)
    target = build(next(entry for entry in entries() if entry.name == TINY[name]))
    return target, perturbed(target, 0.08)


def masks(mask: Tensor) -> Iterator[Tensor]:
    """`mask`, `[batch, columns]`, with zeros at the end of one row or of all, and with holes."""
    for place in ((0, -1), (slice(None), slice(-2, None)), (slice(None), -4)):
        changed = mask.clone()
        changed[place] = 0
        yield changed
        changed = changed.clone()
        changed[0, 1] = 0
        yield changed


def lossless(name: str, inputs: dict[str, Any]) -> Tensor:
    return assert_lossless(pair(name), inputs, lambda: {"max_new_tokens": 8, "do_sample": False}, gammas=(3,))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", *TINY])
def test_text_and_embeddings(name: str) -> None:
    """Embeddings come alone, or with ids that are not theirs."""
    for batch in (1, 3):
        inputs = make_prompts(batch, 10)
        ids = inputs.pop("input_ids")
        embeds = pair(name)[0].get_input_embeddings()((ids * 7 + 3) % 80).detach()
        kinds = ({"input_ids": ids}, {"inputs_embeds": embeds}, {"input_ids": ids, "inputs_embeds": embeds})
        for index, mask in enumerate(masks(inputs["attention_mask"])):
            if index % 2 == batch // 2:
                lossless(name, {**kinds[(index // 2 + 1) % 3], "attention_mask": mask})


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_a_mask_that_is_read_off_the_ids(name: str) -> None:
    """Without a mask, padding inside the ids is masked, even if embeddings are fed."""
    ids = make_prompts(3, 10)["input_ids"].clamp(min=2)
    ids[0, -1], ids[1, 4], ids[2, :3] = 0, 0, 0
    embeds = pair(name)[0].get_input_embeddings()((ids * 7 + 3) % 80).detach()
    given = lossless(name, {"input_ids": ids, "inputs_embeds": embeds})
    unmasked = torch.ones_like(ids)
    assert not torch.equal(
        given, lossless(name, {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": unmasked})
    )


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images(name: str) -> None:
    for images in ([[(4, 4)]], [[(4, 4)], [], [(4, 8)]]):
        inputs = make_multimodal_prompts(name, images)
        for mask in masks(inputs["attention_mask"]):
            lossless(name, {**inputs, "attention_mask": mask})


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_a_second_turn(name: str) -> None:
    """The first turn's masked columns, and one of the second turn's own."""
    target, draft = pair(name)
    inputs = make_prompts(3, 10) if name in TINY else make_multimodal_prompts(name, [[(4, 4)], [], [(4, 8)]])
    for mask in masks(inputs["attention_mask"]):
        results = []
        for way in ({}, {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": 3}):
            kwargs = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, **way}
            first = target.generate(**{**inputs, "attention_mask": mask}, **kwargs)
            ids = torch.cat([first.sequences, first.sequences[:, -3:].flip(1)], dim=1)
            longer = torch.nn.functional.pad(mask, (0, 7), value=1)
            longer[1, -1] = 0
            second = target.generate(ids, attention_mask=longer, past_key_values=first.past_key_values, **kwargs)
            results.append((first.sequences.tolist(), second.sequences.tolist()))
        assert results[1] == results[0]
