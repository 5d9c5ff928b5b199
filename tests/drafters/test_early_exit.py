"""`assistant_early_exit`: the target's first layers draft on its own cache, and verification goes on after them."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import test_encoder_decoder
import test_recurrent
import torch
from conftest import ARCHITECTURES, SIZES, make_model, make_prompts
from test_sampling import ALARM, CONFIG, ROWS, Sums, exact_law, p_value, processors
from test_sampling import VOCAB as FEW
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from hf_specdec import SpeculationStats, Trace
from hf_specdec.models import early_exit
from hf_specdec.models.early_exit import EarlyExit, layers_path, resumes

NEW = 20
# What the matrices are called through which a layer adds to the residual stream.
INTO_THE_STREAM = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "out_proj", "wo", "o")


def with_quiet_end(model: PreTrainedModel, layers: int, share: float = 0.4) -> PreTrainedModel:
    """The same model, whose layers after the first ones matter less, so that these often say what all say."""
    with torch.no_grad():
        for layer in list(model.get_submodule(layers_path(model)))[layers:]:
            for name, module in layer.named_modules():
                if name.split(".")[-1] in INTO_THE_STREAM and isinstance(getattr(module, "weight", None), nn.Parameter):
                    module.weight *= share
    return model


def make_target(name: str, **changes: Any) -> PreTrainedModel:
    config = ARCHITECTURES[name]()
    config.update({"num_hidden_layers": 3} | changes)
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, config.layer_types[0]][:3]
    return with_quiet_end(make_model(config), 1)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_target("llama")


def check(target: PreTrainedModel, inputs: dict[str, Any], gamma: int = 3, **options: Any) -> SpeculationStats:
    """Vanilla's tokens, with drafts that are accepted in part."""
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    expected = target.generate(**inputs, **options)
    stats = SpeculationStats()
    way = {"strategy": "spec", "assistant_early_exit": 1, "num_assistant_tokens": gamma, "speculation_stats": stats}
    got = target.generate(**inputs, **options | way)
    if not isinstance(got, torch.Tensor):
        got, expected = got.sequences, expected.sequences
    assert got.tolist() == expected.tolist()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.draft_prefill_forwards == 0
    return stats


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-sliding", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"])
def test_families_give_vanillas_tokens(name: str) -> None:
    check(make_target(name), make_prompts(3))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("gamma", [1, 5])
def test_batches_give_vanillas_tokens(llama: PreTrainedModel, batch: int, gamma: int) -> None:
    check(llama, make_prompts(batch), gamma, eos_token_id=[5, 77])


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_states_go_back(name: str, batch: int) -> None:
    """Between the drafts and their verification, which runs whole."""
    target = with_quiet_end(make_model(test_recurrent.ARCHITECTURES[name]()), 1, 0.3)
    check(target, make_prompts(batch))


def test_rows_with_states_that_are_unevenly_far_go_on_drafting() -> None:
    target = with_quiet_end(make_model(test_recurrent.ARCHITECTURES["qwen3_next"]()), 1, 0.3)
    trace = Trace()
    way = {"assistant_early_exit": 1, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    options = {"do_sample": False, "max_new_tokens": NEW, "speculation_trace": trace}
    target.generate(**make_prompts(3), strategy="spec", **way, **options)
    rows = [iteration.rows for iteration in trace.iterations[1:-1]]
    assert any(len({row.accepted for row in of_one}) > 1 for of_one in rows)  # so they are
    assert all(any(row.drafted for row in of_one) for of_one in rows)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_decoders_of_encoders_draft_too(name: str) -> None:
    target = with_quiet_end(test_encoder_decoder.make(name), 1, 0.3)
    check(target, test_encoder_decoder.inputs(name, 2))


def test_long_texts_grow_the_cache_and_leave_the_window() -> None:
    check(make_target("mistral-sliding"), make_prompts(2), 3, max_new_tokens=150)


def test_no_second_cache_no_draft_prefill_and_no_layer_twice(llama: PreTrainedModel) -> None:
    """By calls of each layer: the first one drafts and reads the prompt, verification runs the others only."""
    calls: Counter[int] = Counter()
    layers = list(llama.get_submodule(layers_path(llama)))
    resumes(llama, 1)  # asked before counting
    hooks = [layer.register_forward_hook(lambda *_, i=i: calls.update([i])) for i, layer in enumerate(layers)]
    try:
        stats = SpeculationStats()
        llama.generate(
            **make_prompts(1), max_new_tokens=NEW, strategy="spec", assistant_early_exit=1, num_assistant_tokens=3,
            speculation_stats=stats, do_sample=False,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    forwards = stats.target_forwards
    assert calls[1] == calls[2] == forwards
    # Besides drafts, the first layer only reads the prompt, and the last token, before which nothing can be drafted.
    assert calls[0] - stats.draft_forwards in (1, 2)
    # The last draft is fed too, although it drafts nothing.
    assert stats.draft_forwards <= (forwards - 1) * 4


def test_verification_runs_whole_where_states_are_asked_for(llama: PreTrainedModel) -> None:
    inputs = make_prompts(2)
    options = {"max_new_tokens": 8, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    expected = llama.generate(**inputs, **options)
    got = llama.generate(**inputs, **options, strategy="spec", assistant_early_exit=1, num_assistant_tokens=3)
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine[-1], theirs[-1], atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_a_model_that_does_not_go_on_is_verified_whole(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_specdec.drafters.early_exit.resumes", lambda model, layers: False)
    monkeypatch.setattr(early_exit.EarlyExit, "resumed", None)
    check(llama, make_prompts(3))


def test_going_on_is_compared_with_a_whole_forward() -> None:
    """A layer that looks at what the first layers were given would be wrong."""

    class LooksBack(nn.Module):
        """A list of layers is what the models share; here the last layer also reads what the first one read."""

        def __init__(self, layers: list[nn.Module]):
            super().__init__()
            self.last, self.seen = layers[-1], [torch.zeros(())]
            layers[0].register_forward_pre_hook(lambda module, args: self.seen.__setitem__(0, args[0]))

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("last"), name)

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            given = self.seen[0]
            same = given.shape == hidden_states.shape
            return self.last(hidden_states + (given if same else 0), *args, **kwargs)

    target = make_target("llama", num_hidden_layers=3)
    layers = target.get_submodule(layers_path(target))
    assert resumes(target, 1)
    other = make_target("llama", num_hidden_layers=3)
    layers = other.get_submodule(layers_path(other))
    layers[2] = LooksBack(list(layers))
    assert not resumes(other, 1)


def test_a_block_longer_than_the_kept_states_is_verified_whole(llama: PreTrainedModel) -> None:
    early = EarlyExit(llama, 2)
    assert early.resumed(1) is None
    early.draft(torch.tensor([[5, 6, 7]]), use_cache=False)
    assert early.resumed(3) is early.rest
    assert early.resumed(4) is None
    early.forget()
    assert early.resumed(1) is None


def test_the_target_is_left_as_it_was(llama: PreTrainedModel) -> None:
    before = {name: id(module) for name, module in llama.named_modules()}, llama.config.to_dict()
    check(llama, make_prompts(2))
    assert ({name: id(module) for name, module in llama.named_modules()}, llama.config.to_dict()) == before


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"assistant_confidence_threshold": 0.5},
        {"num_assistant_tokens_schedule": "heuristic_transient"},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    check(llama, make_prompts(3), **options)


def test_embeddings_as_the_prompt(llama: PreTrainedModel) -> None:
    inputs = make_prompts(2)
    embeds = llama.get_input_embeddings()(inputs["input_ids"])
    check(llama, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})


@pytest.mark.parametrize("extra", [{}, {"logits_processor": [Sums()]}], ids=["plain", "a grammar"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_samples_follow_the_targets_law(rule: str, extra: dict[str, Any]) -> None:
    """As in `test_sampling.py`; the wrong law that would be seen is that of the first layers."""
    target = with_quiet_end(make_model(LlamaConfig(**CONFIG | {"num_hidden_layers": 2})), 1, 0.7)
    law = exact_law(target, [3, 4, 5], 3, processors(**extra))
    suspect = exact_law(early_exit.EarlyExit(target, 1).draft, [3, 4, 5], 3, processors(**extra))
    torch.manual_seed(0)
    stats, counts = SpeculationStats(), np.zeros(law.shape)
    for _ in range(20):
        tokens = target.generate(
            torch.tensor([[3, 4, 5]]), strategy="spec", assistant_early_exit=1, num_assistant_tokens=3, do_sample=True,
            top_k=0, max_new_tokens=3, num_return_sequences=ROWS, speculation_stats=stats,
            speculation_acceptance=rule, **extra,
        )  # fmt: skip
        np.add.at(counts, tuple(tokens[:, 3:].numpy().T), 1)
    assert 0.05 < stats.acceptance_rate < 0.99
    assert p_value(counts, law, suspect) > ALARM
    assert law.shape == (FEW,) * 3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"assistant_early_exit": 0}, ValueError, "must be from 1 to 2, because LlamaForCausalLM has 3 layers, got 0"),
        ({"assistant_early_exit": 3}, ValueError, "must be from 1 to 2, because LlamaForCausalLM has 3 layers, got 3"),
        ({"assistant_early_exit": "2"}, TypeError, "`assistant_early_exit` must be an int, got '2'"),
        ({"assistant_early_exit": True}, TypeError, "`assistant_early_exit` must be an int, got True"),
        (
            {"assistant_early_exit": 1, "prompt_lookup_num_tokens": 3},
            ValueError,
            "`assistant_early_exit` and `prompt_lookup_num_tokens` each choose a drafter",
        ),
        (
            {"assistant_early_exit": 1, "speculation_compile": "draft"},
            ValueError,
            "'draft'` compiles a draft model, and this call has none",
        ),
    ],
)
def test_bad_input(llama: PreTrainedModel, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        llama.generate(**make_prompts(1), max_new_tokens=4, strategy="spec", **options)


def test_a_draft_model_beside_it_is_refused(llama: PreTrainedModel) -> None:
    draft = make_model(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="`assistant_early_exit` and `assistant_model` each choose a drafter"):
        llama.generate(
            **make_prompts(1), max_new_tokens=4, strategy="spec", assistant_early_exit=1, assistant_model=draft
        )
