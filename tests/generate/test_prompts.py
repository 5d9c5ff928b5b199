"""Prompts that `generate()` accepts: padded on either side, with holes, with any kind of mask or none."""

import logging
from typing import Any

import pytest
import torch
from conftest import VOCAB, assert_lossless, make_pair, make_prompts
from transformers.utils import logging as host_logging

import hf_specdec  # noqa: F401  registers

WIDTH, NEW = 14, 14
ARCHITECTURES = ["llama", "gpt2", "falcon-alibi", "mistral-sliding"]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Any]:
    return {name: make_pair(name, noise=0.05, seed=1) for name in ARCHITECTURES}


def holes(mask: torch.Tensor) -> torch.Tensor:
    """Masks two columns of the first row, and one of each other row, after its first token."""
    mask = mask.clone()
    mask[0, 4:6] = 0
    mask[1:, -2] = 0
    return mask


def last_column(mask: torch.Tensor) -> torch.Tensor:
    """Masks the first row's last column: only that row is padded on both sides."""
    return mask.masked_fill((torch.arange(len(mask)) == 0)[:, None] & (torch.arange(WIDTH) == WIDTH - 1), 0)


MASKS = {
    "right-padded": lambda mask: mask.flip(1),
    "holes": holes,
    "both sides": last_column,
    "holes and right-padded": lambda mask: holes(mask).flip(1),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_columns_may_be_anywhere(pairs, name, layout, batch):
    """Vanilla gives such prompts a meaning, if a poor one; ours must match."""
    left = make_prompts(batch)["attention_mask"]
    left[0, 0] = 0
    mask = MASKS[layout](left)
    ids = make_prompts(batch, seed=3)["input_ids"].clamp(min=2).masked_fill(mask == 0, 0)
    expected = assert_lossless(
        pairs[name], {"input_ids": ids, "attention_mask": mask}, lambda: {"max_new_tokens": NEW}, gammas=(4,)
    )
    unmasked = pairs[name][0].generate(ids, attention_mask=torch.ones_like(mask), max_new_tokens=NEW)
    assert expected.tolist() != unmasked.tolist()  # otherwise the mask has no effect


def test_what_stands_in_masked_columns_does_not_matter(pairs):
    target, draft = pairs["llama"]
    mask = holes(make_prompts(3)["attention_mask"])
    ids = make_prompts(3)["input_ids"]
    noise = torch.where(mask == 0, (ids + 31) % VOCAB, ids)
    way = {"strategy": "spec", "assistant_model": draft, "attention_mask": mask, "max_new_tokens": NEW}
    given = [target.generate(prompt, **way)[:, WIDTH:].tolist() for prompt in (ids, noise)]
    assert given[0] == given[1]


@pytest.mark.parametrize("layout", ["right-padded", "holes"])
def test_rows_with_masked_columns_end_where_they_end_in_vanilla(pairs, layout):
    target = pairs["llama"][0]
    mask = MASKS[layout](make_prompts(3)["attention_mask"])
    inputs = {"input_ids": make_prompts(3, seed=3)["input_ids"].masked_fill(mask == 0, 0), "attention_mask": mask}
    new = target.generate(**inputs, max_new_tokens=NEW)[:, WIDTH:].tolist()
    arguments = {"eos_token_id": [new[0][4], new[1][8]], "max_new_tokens": NEW, "repetition_penalty": 1.3}
    expected = assert_lossless(pairs["llama"], inputs, lambda: dict(arguments))
    assert len({(row != 0).sum() for row in expected[:, WIDTH:]}) > 1


@pytest.mark.parametrize("name", ["llama", "falcon-alibi"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_comes_back_whatever_the_layout_where_rows_end_early(pairs, name, padded):
    """Models that cannot attend to rows of different lengths keep rows in lockstep, with or without padding."""
    target, draft = pairs[name]
    inputs = make_prompts(3)
    if not padded:
        inputs = {"input_ids": inputs["input_ids"].clamp(min=2)}
    new = target.generate(**inputs, max_new_tokens=NEW)[:, WIDTH:].tolist()
    kwargs = {**inputs, "max_new_tokens": NEW, "eos_token_id": [new[0][2], new[1][5]], "return_dict_in_generate": True}
    expected = target.generate(**kwargs)
    given = target.generate(**kwargs, assistant_model=draft, strategy="spec")
    assert given.sequences.tolist() == expected.sequences.tolist()
    real = inputs.get("attention_mask", torch.ones(3, WIDTH)).bool()
    for ours, theirs in zip(given.past_key_values.layers, expected.past_key_values.layers):
        real = torch.nn.functional.pad(real, (0, theirs.keys.shape[2] - real.shape[1]), value=True)
        for states in ("keys", "values"):
            mine, vanillas = (getattr(layer, states).transpose(1, 2)[real] for layer in (ours, theirs))
            torch.testing.assert_close(mine, vanillas, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", [None, "spec"])
def test_right_padding_brings_the_warning_of_transformers(pairs, strategy, caplog):
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    host_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            pairs["llama"][0].generate(**inputs, max_new_tokens=2, strategy=strategy)
    finally:
        host_logging.disable_propagation()
    assert "right-padding was detected" in caplog.text


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", ["ones", "none", "bool", "float"])
def test_masks_of_any_kind(pairs, mask, batch):
    """Without a mask, transformers infers one if it can: here from the padding tokens in the prompts."""
    inputs = make_prompts(batch)
    if mask == "ones":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    elif mask == "none":
        inputs = {"input_ids": inputs["input_ids"]}
    else:
        inputs["attention_mask"] = inputs["attention_mask"].to({"bool": torch.bool, "float": torch.float32}[mask])
    assert_lossless(pairs["llama"], inputs, lambda: {"max_new_tokens": NEW})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_without_a_mask_every_token_counts_where_padding_cannot_be_told(pairs, batch, padded):
    """If the padding token is the EOS token, transformers treats padding as text."""
    ids = make_prompts(batch)["input_ids"]
    arguments = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 0}
    expected = assert_lossless(
        pairs["llama"], {"input_ids": ids if padded else ids.clamp(min=2)}, lambda: dict(arguments)
    )
    assert expected.shape[1] > WIDTH


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["left-padded", "holes", "right-padded"])
@pytest.mark.parametrize("positions", ["shifted", "gaps", "same in all rows"])
def test_position_ids_of_the_user_hold_whatever_the_mask(pairs, positions, layout, batch):
    inputs = make_prompts(batch)
    inputs["attention_mask"] = {"left-padded": lambda mask: mask, **MASKS}[layout](inputs["attention_mask"])
    columns = torch.arange(WIDTH)
    inputs["position_ids"] = {
        "shifted": (inputs["attention_mask"].cumsum(1) + 6),
        "gaps": (columns + 4 * (columns > 8)).expand(batch, -1),
        "same in all rows": columns[None] * 2,
    }[positions]
    assert_lossless(pairs["gpt2"], inputs, lambda: {"max_new_tokens": 10}, gammas=(4,))
