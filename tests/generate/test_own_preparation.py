"""Models that prepare each step's inputs in their own code: after the prompt, we feed what vanilla feeds.

Each model here is a Llama or a BART whose `prepare_inputs_for_generation` or `_update_model_kwargs_for_generation` adds
or changes something that its forward reads.
"""

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, VOCAB, assert_lossless, make_prompts, perturbed
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_specdec

NEW_TOKENS = 16


class Reads(LlamaForCausalLM):
    """Its forward takes a `gain` for every second logit, a `tint` by row or token, and limits on its logits."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
        gain=None, tint=None, last_logit=False, keep=0, **kwargs,
    ):  # fmt: skip
        cached = {"past_key_values": past_key_values, "use_cache": use_cache}
        output = super().forward(input_ids, attention_mask, position_ids, **cached)
        if gain is not None:
            output.logits = torch.cat([output.logits[..., :40] * gain, output.logits[..., 40:]], dim=-1)
        if tint is not None:
            output.logits = output.logits + tint.view(len(output.logits), -1, 1) * torch.linspace(-9, 9, VOCAB)
        if last_logit or keep:
            output.logits = output.logits[:, -max(int(last_logit), keep) :]
        return output


class Constant(Reads):
    added: dict[str, Any] = {}  # noqa: RUF012

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), **self.added}


class TintedAfterThePrompt(Reads):
    """A tensor by row, only in later steps."""

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return inputs if is_first_iteration else {**inputs, "tint": torch.full((len(input_ids), 1), 0.6)}


class GainByStep(Reads):
    """A number that changes at each step: a block of tokens would need several."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "gain": 1.0 + input_ids.shape[1] % 3}


class GainFromTheSecondStepOn(Reads):
    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        updated["steps"] = model_kwargs.get("steps", 0) + 1
        return updated

    def prepare_inputs_for_generation(self, input_ids, steps=0, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs if steps < 2 else {**inputs, "gain": 3.0}


class CarriedOn(Reads):
    """The update carries over an input that stays the same."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs) | {"gain": 2.0}


class EverySecondPosition(Reads):
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, "position_ids": 2 * inputs["position_ids"]}


class PositionsThatStandStill(Reads):
    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        updated["position_ids"] = updated["position_ids"].clamp(max=13)
        return updated


class ForgetsTheFirstToken(Reads):
    """After the prompt, its first token is masked."""

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            past = inputs["past_key_values"].get_seq_length()
            mask = torch.ones(len(input_ids), past + inputs["input_ids"].shape[1], dtype=torch.long)
            inputs["attention_mask"] = mask.index_fill(1, torch.tensor([0]), 0)
        return inputs


class OnlyTheLastLogit(Reads):
    """For any number of tokens."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        output = super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        output.logits = output.logits[:, -1:]
        return output


def build(cls: type[PreTrainedModel], **added: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(ARCHITECTURES["llama"]()).eval()
    model.generation_config.pad_token_id = 0
    model.added = added
    return model


def draft() -> PreTrainedModel:
    return perturbed(build(Reads), 0.1)


def check(target: PreTrainedModel, batch: int = 3, **options: Any) -> torch.Tensor:
    return assert_lossless(
        (target, draft()), make_prompts(batch), lambda: {"max_new_tokens": NEW_TOKENS, **options}, gammas=(4,)
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "added",
    [{"last_logit": True}, {"keep": 1}, {"gain": 1.7}, {"gain": 0.5, "keep": 1}],
    ids=["last logit", "number of logits", "gain", "gain and number of logits"],
)
def test_numbers_that_are_the_same_at_each_step(added: dict[str, Any], batch: int) -> None:
    tokens = check(build(Constant, **added), batch)
    assert torch.equal(tokens, check(build(Reads), batch)) == ("gain" not in added), "the model reads what it is given"


@pytest.mark.parametrize(
    "cls", [TintedAfterThePrompt, CarriedOn, EverySecondPosition, PositionsThatStandStill, ForgetsTheFirstToken]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_model_adds_or_changes_at_each_step(cls: type[PreTrainedModel], batch: int) -> None:
    assert not torch.equal(check(build(cls), batch), build(Reads).generate(**make_prompts(batch), max_new_tokens=16))


@pytest.mark.parametrize("cls", [GainByStep, GainFromTheSecondStepOn])
@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_that_differ_within_a_block_are_refused(cls: type[PreTrainedModel], batch: int) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__} returns different logits for a block than token by token"):
        build(cls).generate(**make_prompts(batch), strategy="spec", assistant_model=draft(), max_new_tokens=8)


def test_preparation_that_was_set_on_one_object() -> None:
    target = build(Reads)
    inherited = target.prepare_inputs_for_generation
    target.prepare_inputs_for_generation = lambda *args, **kwargs: {**inherited(*args, **kwargs), "gain": 1.7}
    assert torch.equal(check(target), check(build(Constant, gain=1.7)))


def test_a_forward_that_returns_too_few_logits_is_an_error() -> None:
    with pytest.raises(ValueError, match="OnlyTheLastLogit returns logits for 1 of 23 tokens"):
        build(OnlyTheLastLogit).generate(**make_prompts(1), strategy="spec", assistant_model=draft(), max_new_tokens=8)
    check(build(Reads))
    drafter = {"strategy": "spec", "assistant_model": build(OnlyTheLastLogit), "num_assistant_tokens": 3}
    target = build(Reads)
    expected = target.generate(**make_prompts(1), max_new_tokens=NEW_TOKENS)
    assert torch.equal(target.generate(**make_prompts(1), max_new_tokens=NEW_TOKENS, **drafter), expected)


def test_a_forward_that_comes_to_return_too_few_logits_is_an_error() -> None:
    """Probes' answers are remembered, but the number of logits is still checked."""
    target = build(Limited)
    check(target)
    target.limit = 1
    with pytest.raises(ValueError, match=r"Limited returned logits for 1 of the \d+ requested tokens"):
        target.generate(**make_prompts(1), strategy="spec", assistant_model=draft(), max_new_tokens=8)


class Limited(Reads):
    limit: int | None = None

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        output = super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        if self.limit:
            output.logits = output.logits[:, -self.limit :]
        return output


def test_the_usual_model_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_specdec.models.later, "later_steps", lambda *_: pytest.fail("was compared"))
    check(build(Reads))


# Caches of other types


class InTuples(PreTrainedModel, GenerationMixin):
    """One attention layer that keeps keys and values like older code: as a tuple, or list, of tuples."""

    config_class = LlamaConfig
    container: Any = tuple

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, 32)
        self.qkv = torch.nn.Linear(32, 96)
        self.head = torch.nn.Linear(32, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, (torch.nn.Embedding, torch.nn.Linear)):
            module.weight.data.normal_(0, 0.5)

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None, **kwargs
    ):
        hidden = self.embed(input_ids)
        queries, keys, values = self.qkv(hidden).chunk(3, dim=-1)
        if isinstance(past_key_values, self.container):
            keys, values = (torch.cat(both, dim=1) for both in zip(past_key_values[0], (keys, values)))
        scores = queries @ keys.transpose(1, 2) / 32**0.5
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        if attention_mask is not None:
            causal = causal & attention_mask[:, None, : scores.shape[2]].bool()
        weights = scores.masked_fill(~causal, -1e9).softmax(dim=-1)
        return CausalLMOutputWithPast(
            logits=self.head(hidden + weights @ values), past_key_values=self.container([(keys, values)])
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        if isinstance(past_key_values, self.container):
            input_ids = input_ids[:, past_key_values[0][0].shape[1] :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask}


class InLists(InTuples):
    container = list


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cls", [InTuples, InLists])
def test_caches_that_are_tuples_or_lists(cls: type[PreTrainedModel], batch: int) -> None:
    torch.manual_seed(0)
    target = cls(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    target.generation_config.pad_token_id = 0
    pair = target, perturbed(target, 0.2)
    assert_lossless(pair, make_prompts(batch), lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(4,))
    usual = build(Reads)
    stats = hf_specdec.SpeculationStats()
    drafted = {"strategy": "spec", "assistant_model": pair[1], "speculation_stats": stats, "num_assistant_tokens": 3}
    expected = usual.generate(**make_prompts(batch), max_new_tokens=NEW_TOKENS)
    assert torch.equal(usual.generate(**make_prompts(batch), max_new_tokens=NEW_TOKENS, **drafted), expected)
    assert stats.drafted_tokens > 0, "they can draft"


# Encoder-decoder models


class Bart(BartForConditionalGeneration):
    added: dict[str, Any] = {}  # noqa: RUF012

    def forward(self, input_ids=None, attention_mask=None, gain=None, last_only=False, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        if gain is not None:
            output.logits = torch.cat([output.logits[..., :40] * gain, output.logits[..., 40:]], dim=-1)
        if last_only:
            output.logits = output.logits[:, -1:]
        return output

    def prepare_inputs_for_generation(self, decoder_input_ids, **kwargs):
        return {**super().prepare_inputs_for_generation(decoder_input_ids, **kwargs), **self.added}


class BartByStep(Bart):
    def prepare_inputs_for_generation(self, decoder_input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(decoder_input_ids, **kwargs)
        return {**inputs, "gain": 1.0 + decoder_input_ids.shape[1] % 3}


class BartAfterThePrompt(Bart):
    def prepare_inputs_for_generation(self, decoder_input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            decoder_input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        return inputs if is_first_iteration else {**inputs, "gain": 2.0}


def bart(cls: type[Bart] = Bart, **added: Any) -> PreTrainedModel:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART_SIDE.items()}
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, init_std=0.3, eos_token_id=None, forced_eos_token_id=None, **sides
    )
    model = cls(config).eval()
    model.added = added
    return model


BART_SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("added", [{"gain": 1.7}, {"last_only": True}], ids=["gain", "last logit"])
def test_decoders_with_an_encoder(added: dict[str, Any], batch: int) -> None:
    pair = bart(**added), perturbed(bart(), 0.1)
    tokens = assert_lossless(pair, make_prompts(batch), lambda: {"max_new_tokens": NEW_TOKENS}, gammas=(4,))
    plain = bart().generate(**make_prompts(batch), max_new_tokens=NEW_TOKENS)
    assert torch.equal(tokens, plain) == ("gain" not in added), "the model reads what it is given"


@pytest.mark.parametrize("cls", [BartByStep, BartAfterThePrompt])
def test_decoders_with_an_encoder_whose_inputs_change_are_refused(cls: type[Bart]) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__} prepares a different `gain` at each step"):
        bart(cls).generate(**make_prompts(2), strategy="spec", assistant_model=bart(), max_new_tokens=8)
