"""The probes of models, and that no model passes one by accident."""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, assert_lossless, make_model, make_prompts, perturbed
from transformers import GPT2LMHeadModel, GPTNeoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_specdec.models import answers
from hf_specdec.models.abilities import Abilities, unexplained_windows
from hf_specdec.models.answers import apart, ordinary_tokens, tolerance

NEW_TOKENS = 20


class Banded(LlamaForCausalLM):
    """A token sees the last `band` columns: of the longest row, if rows have their own lengths."""

    band = 9

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        columns = torch.arange(past + input_ids.shape[1])
        queries = columns[past:, None]
        mask = ((columns <= queries) & (columns > queries - self.band))[None, None]
        if attention_mask is not None:
            mask = mask & (attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None].bool())
        mask = mask | (columns == queries)  # padding sees itself
        return super().forward(input_ids, mask, position_ids, past_key_values, use_cache=use_cache, **kwargs)


class Flattened(LlamaForCausalLM):
    """Reduces a 4-D mask to one row: what the first query sees."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask[:, 0, 0].long()
            attention_mask[:, -input_ids.shape[1] :] = 1
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, **kwargs)


class LastRowLeads(LlamaForCausalLM):
    """Positions of all rows are those of the first row."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if position_ids is not None and len(position_ids) > 1 and attention_mask is not None:
            position_ids = position_ids[:1].expand_as(position_ids) if attention_mask.ndim == 4 else position_ids
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


class CountsColumns(GPT2LMHeadModel):
    """With padding given as in vanilla, positions are columns; with a mask per row, they follow the mask."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        if attention_mask is not None and attention_mask.ndim == 2:
            columns = torch.arange(attention_mask.shape[1])[None, -input_ids.shape[1] :]
            position_ids = columns.expand(len(input_ids), -1)
        cached = {"past_key_values": past_key_values, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **cached, **kwargs)


def test_models_to_which_padding_means_something_decode_in_lockstep() -> None:
    torch.manual_seed(0)
    target = CountsColumns(ARCHITECTURES["gpt2"]()).eval()
    target.generation_config.pad_token_id = 0
    assert "left-padded" in Abilities.of(target).ragged.reason
    for seed in (1, 2):
        assert_lossless(
            (target, perturbed(target, 0.1)),
            make_prompts(4, seed=seed),
            lambda: {"max_new_tokens": NEW_TOKENS},
            gammas=(4,),
        )


def build(cls: type[PreTrainedModel], **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(LlamaConfig(**{**SIZES, **config})).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("cls", [Banded, Flattened, LastRowLeads])
def test_models_that_follow_no_mask_by_row_decode_in_lockstep(cls: type[PreTrainedModel]) -> None:
    target = build(cls)
    assert not Abilities.of(target).ragged
    assert "rows of different lengths" in Abilities.of(target).ragged.reason
    for batch, seed in ((1, 0), (4, 1), (4, 2)):
        assert_lossless(
            (target, perturbed(target, 0.1)),
            make_prompts(batch, seed=seed),
            lambda: {"max_new_tokens": NEW_TOKENS},
            gammas=(4,),
        )


class Scaled(LlamaForCausalLM):
    """After 64 tokens, more than any probe has, logits grow with the length that the cache reports for all rows."""

    length = "get_seq_length"

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        past = 0 if past_key_values is None else getattr(past_key_values, self.length)()
        output = super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        output.logits = output.logits * max(past / 64, 1.0)
        return output


@pytest.mark.parametrize("length", ["get_seq_length", "get_query_offset"])
def test_lengths_are_found_out_to_matter_before_a_text_is_so_long(monkeypatch: pytest.MonkeyPatch, length: str) -> None:
    monkeypatch.setattr(Scaled, "length", length)
    assert "depends on the length of the longest row" in Abilities.of(build(Scaled)).ragged.reason


def test_windows_that_no_cache_knows_of_keep_rows_in_lockstep(caplog: pytest.LogCaptureFixture) -> None:
    """However long they are: nothing is probed beyond them."""
    config = GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        window_size=30, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    target = make_model(config)
    pair = target, perturbed(target, 0.08)
    assert_lossless(pair, make_prompts(4, seed=3), lambda: {"max_new_tokens": 40}, gammas=(4,))
    assert "a window of 30 tokens that its cache does not know" in caplog.text


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"attention_window": 12}, [12]),
        ({"attention_window": [6, 12]}, [6, 12]),
        ({"window_size": 12}, [12]),
        ({"window_size": 400}, []),  # longer than the text
        ({"max_window_layers": 12}, []),  # no window
        ({"sliding_window": 12}, []),  # known to the cache
    ],
)
def test_which_windows_are_unexplained(given: dict[str, Any], found: list[int]) -> None:
    from transformers import DynamicCache, MistralConfig

    config = MistralConfig(**{**SIZES, "sliding_window": None, **given})
    model = make_model(config)
    assert unexplained_windows(model, DynamicCache(config=model.config), max_length=100) == found


class Fails(LlamaForCausalLM):
    """Cannot process several tokens after others."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length() and input_ids.shape[1] > 1:
            raise NotImplementedError("one token at a time, please\nsecond line")
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def test_the_reason_that_is_given_is_the_one_that_was_seen() -> None:
    target = build(Fails)
    with pytest.raises(
        ValueError, match=r"Fails fails when it is tried \(NotImplementedError: one token at a time, please\)"
    ) as error:
        target.generate(**make_prompts(1), strategy="spec", prompt_lookup_num_tokens=3, max_new_tokens=8)
    assert isinstance(error.value.__cause__, NotImplementedError)


def test_answers_keep_no_model_alive() -> None:
    """Even though exceptions hold frames, and these hold models."""
    target = build(Fails)
    with pytest.raises(ValueError, match="Fails"):
        target.generate(**make_prompts(1), strategy="spec", prompt_lookup_num_tokens=3, max_new_tokens=8)
    assert target in answers._memory
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


def test_texts_of_probes_are_ordinary_and_without_a_period() -> None:
    model = make_model(ARCHITECTURES["llama"]())
    model.config.image_token_id, model.generation_config.eos_token_id = 5, [6, 7]
    tokens = ordinary_tokens(model, 400, seed=0)
    assert not {0, 1, 5, 6, 7} & set(tokens)
    assert tokens == ordinary_tokens(model, 400, seed=0) != ordinary_tokens(model, 400, seed=1)
    for period in range(1, 100):
        assert tokens[period:] != tokens[:-period]


def test_what_rounding_may_explain() -> None:
    model = make_model(ARCHITECTURES["llama"]())
    assert tolerance(model, 1e-7) == pytest.approx(1e-5)
    assert tolerance(model, 1e-3) == pytest.approx(6e-3)
    assert tolerance(model, 0.5) == pytest.approx(1e-5), "two ways so far apart are no rounding"
    half = tolerance(model.to(torch.bfloat16), 0.0)
    assert 0.03 < half < 0.06, "half of what a model shows that does not continue its state"
    assert tolerance(model, 0.05) == pytest.approx(0.3)


def test_how_far_apart_logits_are() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 1000)
    assert apart(logits, logits) == 0
    assert apart(logits + 0.1, logits) == pytest.approx(0.1, rel=0.05)
    one = logits.clone()
    one[3] += 0.1
    assert apart(one, logits) == pytest.approx(0.1, rel=0.05), "the worst position counts"
    assert apart(torch.ones(2, 9), torch.ones(2, 9)) == 0, "constant logits are the same"
    masked = logits.clone()
    masked[:, 7] = float("-inf")
    assert apart(masked, masked) == 0
