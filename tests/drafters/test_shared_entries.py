"""Assistants on the target's own entries, as Gemma-4's: in batches, beside what transformers does with one row."""

from typing import Any

import pytest
import test_eagle3
import torch
from conftest import VOCAB, make_model, make_prompts
from eagle3_reference import make_parts, random_head
from test_eagle3 import asked, check, speculate  # noqa: F401 - a fixture
from test_sampling import VOCAB as FEW
from test_sampling import check_continuations
from torch import Tensor
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig, PreTrainedModel

from hf_specdec import SpeculationStats
from hf_specdec.drafters.heads import gemma4

WINDOW = 9
_TYPES = ["sliding_attention", "full_attention"]


def make_config(layers: int, shared: int, per_layer: int, vocab: int = VOCAB, **changes: Any) -> Gemma4TextConfig:
    sizes: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
        "layer_types": _TYPES * (layers // 2), "sliding_window": WINDOW, "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": per_layer, "vocab_size_per_layer_input": vocab if per_layer else 0,
        "initializer_range": 0.4, "tie_word_embeddings": False, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return Gemma4TextConfig(**sizes | changes)


def make_target(shared: int = 2, vocab: int = VOCAB, share: float = 0.2) -> PreTrainedModel:
    """Quiet; its last layers have no keys of their own."""
    return quiet(make_model(make_config(6, shared, 4, vocab)), share)


@torch.no_grad()
def make_assistant(target: PreTrainedModel, noise: float = 0.1, **changes: Any) -> Any:
    """One that says what the target would if it had no layers: a quiet one often does."""
    width, vocab = target.config.hidden_size, target.config.vocab_size
    text = make_config(2, 2, 0, vocab)
    config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=width, tie_word_embeddings=False, **changes)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:  # transformers 5.23.0 asks which of its layers makes the entries: none
        patch.setattr(Gemma4TextConfig, "kv_sharing_modes", ["reuse"] * text.num_hidden_layers)
        assistant: Any = quiet(Gemma4AssistantForCausalLM(config).eval(), noise)
    assistant.generation_config.num_assistant_tokens = 4  # as published ones say
    eye = torch.eye(width)
    random = torch.randn(width, width) / width**0.5
    assistant.pre_projection.weight.copy_(torch.cat([eye, noise * random], dim=1))
    assistant.post_projection.weight.copy_(eye + noise * random.T)
    assistant.lm_head.weight.copy_(target.get_output_embeddings().weight)
    return assistant


@torch.no_grad()
def quiet(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The same model, whose layers add less to the stream: they do so after a norm."""
    for name, weight in model.named_parameters():
        if ".layers." in name and ".post_" in name:
            weight *= share
    return model


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target()


@pytest.fixture(scope="module")
def assistant(target: PreTrainedModel) -> Any:
    return make_assistant(target)


@torch.no_grad()
def reference_logits(assistant: Any, target: PreTrainedModel, text: list[int], drafted: int) -> Tensor:
    """`[vocabulary]`, of the token after `text`, by the assistant's own forward on a plain one of the target.

    The last `drafted` tokens are drafts; entries and states are those of the tokens before the last committed one.
    """
    count = len(text) - drafted
    output = target(
        input_ids=torch.tensor([text[: count - 1]]), output_hidden_states=True, return_shared_kv_states=True
    )
    shared = {
        kind: tuple(states[:, :, -(WINDOW - 1) :] if kind == "sliding_attention" else states for states in pair)
        for kind, pair in output.shared_kv_states.items()
    }
    hidden = output.hidden_states[-1][:, -1:]
    for token in text[count - 1 :]:
        embedded = target.get_input_embeddings()(torch.tensor([[token]]))
        made = assistant(
            inputs_embeds=torch.cat([embedded, hidden], dim=-1), position_ids=torch.tensor([[count - 1]]),
            shared_kv_states=shared,
        )  # fmt: skip
        hidden = made.last_hidden_state
    logits: Tensor = made.logits[0, -1]
    return logits


def compare(asked: Any, assistant: Any, target: PreTrainedModel, inputs: dict[str, Tensor]) -> None:  # noqa: F811
    """The logits of drafts after the first verification: before it, the states of few rows are known."""
    prompts = set(inputs["attention_mask"].sum(dim=1).tolist())
    asked = [one for one in asked if len(one[0]) - one[1] not in prompts]
    assert len({drafted for _, drafted, _ in asked}) > 1
    assert max(len(text) for text, _, _ in asked) > WINDOW + 4
    chosen = {round(i * (len(asked) - 1) / 39) for i in range(40)}
    for text, drafted, logits in (asked[i] for i in chosen):
        expected = reference_logits(assistant, target, text, drafted)
        scale = max(float(expected.abs().max()), 1)
        assert float((logits - expected).abs().max()) <= 1e-5 * scale, (len(text), drafted)


@pytest.mark.parametrize("batch", [1, 4])
def test_beside_transformers(batch: int, target: PreTrainedModel, assistant: Any, asked: Any) -> None:  # noqa: F811
    """The same text as there for one row; more rows, which it refuses. Texts outgrow the window."""
    inputs, options = make_prompts(batch), {"do_sample": False, "max_new_tokens": 16}
    if batch == 1:
        theirs = target.generate(**inputs, **options, assistant_model=assistant)
    else:
        with pytest.raises(ValueError, match="batch_size"):
            target.generate(**inputs, **options, assistant_model=assistant)
    check(target, assistant, inputs, 4)
    if batch == 1:
        assert theirs.tolist() == target.generate(**inputs, **options).tolist()
        assert len(asked[0][0]) == 15  # drafts begin as soon as the target has read the prompt
    compare(asked, assistant, target, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"eos_token_id": [5, 77, 11, 40]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"max_new_tokens": 90},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_call(options: dict[str, Any], target: PreTrainedModel, assistant: Any, asked: Any) -> None:  # noqa: F811
    speculate(target, assistant, make_prompts(3), 3, **options)
    if "max_new_tokens" in options:
        compare(asked, assistant, target, make_prompts(3))


def test_prompts_of_one_token(target: PreTrainedModel, assistant: Any) -> None:
    ids = torch.tensor([[0, 0, 9], [3, 4, 5]])
    check(target, assistant, {"input_ids": ids, "attention_mask": (ids > 0).long()})
    holes = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    check(target, assistant, {"input_ids": torch.tensor([[7, 8, 9, 2], [3, 4, 5, 6]]), "attention_mask": holes})


def test_a_target_whose_layers_all_have_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers shows no entries of such a target; they are in its cache all the same."""
    kept: list[int] = []
    read = gemma4.SharedEntries.read

    def spy(self: Any, *args: Any) -> None:
        read(self, *args)
        kept.append(sum(one.states.untyped_storage().nbytes() for one in self._states))

    monkeypatch.setattr(gemma4.SharedEntries, "read", spy)
    target = make_target(shared=0)
    check(target, make_assistant(target), make_prompts(2, width=200))
    assert 0 < max(kept) <= 2 * 64 * 32 * 4  # rows, tokens, width, bytes


def test_other_heads_on_such_a_target(target: PreTrainedModel, asked: Any) -> None:  # noqa: F811
    """Its last layers run only over tokens whose logits are asked for; these heads need the states of all tokens."""
    head = random_head(make_parts(aux_ids=(0, 1, 3)))
    speculate(target, head, make_prompts(3), max_new_tokens=8)
    test_eagle3.compare(asked, head, target)


def test_tokens_in_clusters(target: PreTrainedModel, asked: Any) -> None:  # noqa: F811
    assistant = make_assistant(target, use_ordered_embeddings=True, num_centroids=6, centroid_intermediate_top_k=4)
    with torch.no_grad():
        order = torch.randperm(VOCAB // 6 * 6, generator=torch.Generator().manual_seed(1))
        assert VOCAB % 6 == 0
        assistant.masked_embedding.token_ordering.copy_(order)
        assistant.masked_embedding.centroids.weight.normal_()
    speculate(target, assistant, make_prompts(1), 3)
    compare(asked, assistant, target, make_prompts(3))
    speculate(target, assistant, make_prompts(3), 3)


# ------------------------------------------------------------------------------------------------------------- sampling


def test_samples_follow_the_targets_law() -> None:
    """Unlike in transformers, where drafts are not drawn from the q that they are tested with."""
    few = make_target(vocab=FEW, share=0.1)
    assistant = make_assistant(few, noise=0.4)
    check_continuations(few, 0.5, 4, assistant_model=assistant)


def test_coupled_text_is_the_same_for_any_draft_length(target: PreTrainedModel, assistant: Any) -> None:
    call = {"do_sample": True, "max_new_tokens": 16, "temperature": 0.7, "strategy": "spec"}
    call |= {"speculation_acceptance": "coupled", "speculation_seed": 7} | make_prompts(3)
    expected = target.generate(**call, prompt_lookup_num_tokens=2)
    for gamma in (2, 5):
        stats = SpeculationStats()
        got = target.generate(**call, assistant_model=assistant, num_assistant_tokens=gamma, speculation_stats=stats)
        assert torch.equal(got, expected)
        assert 0 < stats.acceptance_rate < 1


# --------------------------------------------------------------------------------------------------------------- errors


def test_assistants_that_do_not_fit(target: PreTrainedModel, assistant: Any) -> None:
    def refused(match: str, target: PreTrainedModel, assistant: Any) -> None:
        with pytest.raises(ValueError, match=match):
            target.generate(**make_prompts(1), strategy="spec", assistant_model=assistant, max_new_tokens=4)

    wide = quiet(make_model(make_config(4, 2, 4, hidden_size=64)), 0.1)
    refused("hidden states of width 32, but Gemma4ForCausalLM has width 64", wide, assistant)
    other = quiet(make_model(make_config(4, 2, 4, VOCAB + 1)), 0.1)
    refused(f"a vocabulary of {VOCAB} tokens", other, assistant)
    heads = quiet(make_model(make_config(4, 2, 4, num_key_value_heads=4)), 0.1)
    refused("attend to 2 key heads of width 8, but Gemma4ForCausalLM has 4 of width 8", heads, assistant)
    full = quiet(make_model(make_config(4, 2, 4, layer_types=["full_attention"] * 4)), 0.1)
    refused("of type 'sliding_attention', and Gemma4ForCausalLM has 'full_attention'", full, assistant)
