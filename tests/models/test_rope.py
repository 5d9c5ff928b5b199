"""Rotary embeddings that change with the length of the text."""

import pytest
from conftest import SIZES, assert_lossless, make_model, make_prompts, perturbed
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel

import hf_specdec  # noqa: F401  registers

LIMIT = 24
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": LIMIT,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "phi3": Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=dict(LONG)),
    "longrope": LlamaConfig(**SIZES, rope_parameters={**LONG, "factor": 8.0}),
    "dynamic": LlamaConfig(
        **{**SIZES, "max_position_embeddings": LIMIT},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
}


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make_model(CONFIGS[name])
    return target, perturbed(target, 0.1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("name", "width", "new"), [("phi3", 14, 11), ("longrope", 14, 11), ("dynamic", 14, 11), ("phi3", 40, 9)]
)
def test_on_either_side_of_the_change_all_is_as_usual(name: str, width: int, new: int, batch: int) -> None:
    prompts = make_prompts(batch, width=width)
    if width > LIMIT:
        prompts["attention_mask"][:, LIMIT // 2 :] = 1
    assert_lossless(pair(name), prompts, lambda: {"max_new_tokens": new}, gammas=(1, 4))


@pytest.mark.parametrize(("name", "width"), [("phi3", 14), ("longrope", 14), ("dynamic", 14), ("dynamic", 40)])
def test_texts_that_cross_it_are_refused(name: str, width: int) -> None:
    target, draft = pair(name)
    with pytest.raises(ValueError, match=rf"change after {LIMIT} tokens.* may reach {width + 12}.*max_new_tokens"):
        target.generate(**make_prompts(1, width=width), max_new_tokens=12, assistant_model=draft, strategy="spec")


def test_a_row_that_has_not_crossed_it_counts() -> None:
    """Alone it would continue with the short embeddings, whereas vanilla uses those of the longest row."""
    target, draft = pair("phi3")
    with pytest.raises(ValueError, match=f"change after {LIMIT} tokens"):
        target.generate(**make_prompts(4, width=40), max_new_tokens=4, assistant_model=draft, strategy="spec")
