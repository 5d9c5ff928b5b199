"""DFlash and DSpark heads, and P-EAGLE's parallel slots: all drafts of an iteration from one forward of the head."""

from collections.abc import Callable
from typing import Any

import eagle3_reference
import pytest
import torch
from conftest import make_model, make_prompts
from dflash_reference import MASK, kindred_head, make_parts, random_head, reference_logits
from eagle3_reference import some_tokens
from test_eagle3 import Lists, check, make_target, quiet, speculate, true_states
from test_sampling import CONFIG, check_continuations
from torch import Tensor
from transformers import LlamaConfig, MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel, PreTrainedModel
from transformers.cache_utils import DFlashCache

import hf_specdec
from hf_specdec import DFlashHead, Eagle3Head, SpeculationStats
from hf_specdec.drafters.heads import BlockDrafter, entries
from hf_specdec.drafters.heads.blocks import ContextEntries
from hf_specdec.drafters.heads.loading import head_of_module
from hf_specdec.models.tap import FINAL

WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "use_sliding_window": True}
WINDOW |= {"num_hidden_layers": 2}

Asked = list[tuple[list[int], list[int], int, Tensor]]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target()


@pytest.fixture(scope="module")
def heads(target: PreTrainedModel) -> dict[str, Any]:
    """Heads whose drafts are accepted in part."""
    width = target.config.hidden_size
    return {
        "dflash": kindred_head(target),
        "from the anchor": kindred_head(target, from_anchor=True),
        "dspark": kindred_head(target, dspark=True, noise=0.4),
        "dspark with confidence": kindred_head(target, dspark=True, confidence_width=2 * width),
        "p-eagle": parallel_head(target),
    }


def parallel_head(target: PreTrainedModel, target_ids: Tensor | None = None) -> Eagle3Head:
    """A P-EAGLE head: what it says of its own entries is right, the rest is not."""
    return eagle3_reference.kindred_head(target, target_ids, mask_token=target.config.vocab_size - 1)


def make_muse(layers: int = 2, ids: tuple[int, ...] = (0, 2), **changes: Any) -> MuseGlimmerAssistantModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "num_hidden_layers": layers, "block_size": 4, "mask_token_id": MASK}
    sizes |= {"layer_types": WINDOW["layer_types"][:layers], "sliding_window": 6, "target_layer_ids": list(ids)}
    muse = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**sizes | changes, initializer_range=0.3)).eval()
    for name, weight in muse.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    return muse


# ------------------------------------------------------------------------------------------- what the head is asked for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Of each draft token: the text, drafts that were drawn before it, how many come before it, the head's logits."""
    found: Asked = []
    logits_of, drafts = BlockDrafter._logits, []

    def spy(self: BlockDrafter, context: Any, step: int, most: int, drawn: Tensor | None) -> Tensor:
        if step == 0:
            drafts.clear()
        elif drawn is not None:
            drafts.append(drawn.clone())
        logits = logits_of(self, context, step, most, drawn)
        for slot, row in enumerate(context.rows):
            own = [int(tokens[slot, 0]) for tokens in drafts]
            found.extend(
                (context.row(row).tolist(), own, step + i, logits[slot, i].clone()) for i in range(logits.shape[1])
            )
        return logits

    monkeypatch.setattr(BlockDrafter, "_logits", spy)
    return found


def compare(asked: Asked, ids: tuple[int, ...], target: PreTrainedModel, reference: Callable[..., Tensor]) -> None:
    """The head's logits are those of a reference, from scratch, on true hidden states.

    Args:
        reference: is given the states of the text but its last token, and the text with the drafts so far.
    """
    assert len({before for _, _, before, _ in asked}) > 1 and len({len(text) for text, _, _, _ in asked}) > 3
    for i in sorted({round(i * (len(asked) - 1) / 29) for i in range(30)}):
        text, drawn, before, logits = asked[i]
        states = [part[: len(text) - 1] for part in true_states(target, ids, text)]
        expected = reference(states, text + (drawn + [0] * before)[:before])
        assert float((logits - expected).abs().max()) <= 1e-5 * max(float(expected.abs().max()), 1), (len(text), before)


def test_logits_are_those_of_transformers_own_module(target: PreTrainedModel, asked: Asked) -> None:
    """Alone and in uneven rows that outgrow the window; one of the states is the one after the final norm."""
    muse = make_muse()
    for rows in (1, 3):
        speculate(target, muse, make_prompts(rows), max_new_tokens=8)

    @torch.no_grad()
    def reference(states: list[Tensor], tokens: list[int]) -> Tensor:
        given, cache = torch.cat(states, dim=-1), DFlashCache(config=muse.config)
        cache.set_previous_accepted_tokens(len(given))
        noise = target.get_input_embeddings()(torch.tensor([[tokens[len(given)], *[MASK] * 3]]))
        positions = torch.arange(len(given) + 4)[None]
        out = muse(noise, given[None], position_ids=positions, past_key_values=cache).last_hidden_state
        logits: Tensor = target.lm_head(out[0, len(tokens) - len(given)])
        return logits

    head: Any = head_of_module(muse)
    assert head.parts.states_of(3) == (1, FINAL)
    compare(asked, (1, FINAL), target, reference)


VARIANTS: dict[str, Callable[[], DFlashHead]] = {
    "windows, first draft from a mask token": lambda: random_head(make_parts(WINDOW, layers=2)),
    "causal windows, reduced vocabulary": lambda: random_head(
        make_parts(WINDOW, layers=2, causal_windows=True, from_anchor=True, has_lm_head=True, draft_vocab_size=40,
                   has_embeddings=True), some_tokens(40),
    ),
    "Markov": lambda: random_head(make_parts(from_anchor=True, markov_rank=5, confidence_width=32, layers=3)),
    "Markov, reduced vocabulary": lambda: random_head(
        make_parts(markov_rank=5, draft_vocab_size=40, has_lm_head=True, target_hidden_size=32), some_tokens(40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_a_plain_head_from_scratch(name: str, target: PreTrainedModel, asked: Asked) -> None:
    head = VARIANTS[name]()
    for rows in (1, 3):
        speculate(target, head, make_prompts(rows), max_new_tokens=8)
    compare(asked, head.parts.aux_ids, target, lambda *given: reference_logits(head, target, *given))


@pytest.mark.parametrize(
    "variant", [{"layers": 2, "norm_before_residual": True}, {"layers": 4, "fc_norm": True, "norm_output": True}],
    ids=["two layers", "four layers"],
)  # fmt: skip
def test_parallel_slots_are_those_of_a_plain_head_from_scratch(
    variant: dict[str, Any], target: PreTrainedModel, asked: Asked
) -> None:
    head = eagle3_reference.random_head(eagle3_reference.make_parts(mask_token=MASK, **variant))
    speculate(target, head, make_prompts(3), max_new_tokens=8)
    compare(asked, (0, 1, 2), target, lambda *given: eagle3_reference.reference_logits(head, target, *given))


def test_prompts_are_read_piece_by_piece(
    target: PreTrainedModel, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_CHUNK", 5)
    monkeypatch.setattr(entries, "_MOST_WAITING", 4)
    head = random_head(make_parts(WINDOW, layers=2))
    speculate(target, head, make_prompts(3), max_new_tokens=8)
    compare(asked, head.parts.aux_ids, target, lambda *given: reference_logits(head, target, *given))


# ----------------------------------------------------------------------------------------------------- vanilla's tokens

NAMES = ["dflash", "from the anchor", "dspark", "dspark with confidence", "p-eagle"]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_vanillas(name: str, target: PreTrainedModel, heads: dict[str, Any]) -> None:
    """Alone and in uneven rows, with drafts accepted in part; prompts of one token have no states yet."""
    for rows in (1, 3):
        check(target, heads[name], make_prompts(rows), gamma=5, eos_token_id=[5, 77])
    ids = torch.tensor([[0, 0, 9], [3, 4, 5]])
    speculate(target, heads[name], {"input_ids": ids, "attention_mask": (ids > 0).long()})


@pytest.mark.parametrize("name", NAMES)
def test_processors_that_look_at_the_drafts_before(name: str, target: PreTrainedModel, heads: dict[str, Any]) -> None:
    check(target, heads[name], make_prompts(2), repetition_penalty=1.3, no_repeat_ngram_size=3)
    head, trace = heads[name], hf_specdec.Trace()
    call = {"max_new_tokens": 12, "do_sample": False} | make_prompts(2)
    expected = target.generate(**call, logits_processor=[Lists([3])])
    way = {"strategy": "spec", "assistant_model": head, "num_assistant_tokens": 3, "speculation_trace": trace}
    assert target.generate(**call, logits_processor=[Lists([3])], **way).tolist() == expected.tolist()
    drafted = [step.drafted for iteration in trace.iterations for step in iteration.rows]
    assert any(3 in tokens[:-1] for tokens in drafted)  # a forced token, and drafts after it


def test_one_forward_drafts_all(target: PreTrainedModel, heads: dict[str, Any]) -> None:
    """At most as many as the block has; P-EAGLE has no such limit."""
    for name, longest in (("dflash", 3), ("from the anchor", 4), ("dspark", 4), ("p-eagle", 7)):
        trace, stats = hf_specdec.Trace(), SpeculationStats()
        target.generate(
            **make_prompts(2), strategy="spec", assistant_model=heads[name], num_assistant_tokens=7, do_sample=False,
            max_new_tokens=24, speculation_stats=stats, speculation_trace=trace,
        )  # fmt: skip
        lengths = [len(step.drafted) for iteration in trace.iterations for step in iteration.rows]
        assert max(lengths) == longest
        assert stats.draft_forwards <= stats.target_forwards


def test_beside_transformers(target: PreTrainedModel) -> None:
    """The same tokens and drafts for one row; transformers refuses four."""
    muse = make_muse(1, (0, 1), num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    muse.load_state_dict({names.get(name, name): weight for name, weight in kindred_head(target).state_dict().items()})
    call = {"max_new_tokens": 16, "do_sample": False}
    theirs = target.generate(**make_prompts(1), **call, assistant_model=muse, speculation_type="dflash")
    way = {"strategy": "spec", "assistant_model": muse, "num_assistant_tokens": 3}
    assert target.generate(**make_prompts(1), **call, **way).tolist() == theirs.tolist()
    with pytest.raises(ValueError, match="batch"):
        target.generate(**make_prompts(4), **call, assistant_model=muse, speculation_type="dflash")
    check(target, muse, make_prompts(4))


def test_a_vocabulary_without_eos(target: PreTrainedModel) -> None:
    plain = target.generate(**make_prompts(3), max_new_tokens=16, do_sample=False)
    eos = int(plain[0, -6])
    known = some_tokens(70, without=(eos,))
    for head in (kindred_head(target, known, dspark=True), parallel_head(target, known)):
        check(target, head, make_prompts(3), eos_token_id=eos)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def few() -> PreTrainedModel:
    config = LlamaConfig(**CONFIG | {"num_hidden_layers": 3, "hidden_size": 32, "head_dim": 16})
    return quiet(make_model(config), 0.1)


@pytest.mark.parametrize("name", ["dflash", "dspark with confidence", "p-eagle"])
def test_samples_follow_the_targets_law(name: str, few: PreTrainedModel) -> None:
    """As in `test_sampling.py`; a wrong law that would be seen is one without what the head does not know."""
    known = torch.tensor([0, 1, 3, 4, 6, 8, 9])
    width = few.config.hidden_size
    head: Any = {
        "dflash": lambda: kindred_head(few, known, from_anchor=True),
        "dspark with confidence": lambda: kindred_head(few, known, dspark=True, confidence_width=2 * width),
        "p-eagle": lambda: parallel_head(few, known),
    }[name]()
    threshold = 0.5 if "confidence" in name else 0.0
    check_continuations(few, 0.0, 10, assistant_model=head, assistant_confidence_threshold=threshold)


def test_coupled_text_is_the_same_for_any_head(target: PreTrainedModel, heads: dict[str, Any]) -> None:
    call = {"do_sample": True, "max_new_tokens": 16, "temperature": 0.7, "strategy": "spec"}
    call |= {"speculation_acceptance": "coupled", "speculation_seed": 7} | make_prompts(3)
    expected = target.generate(**call, prompt_lookup_num_tokens=2)
    for gamma, head in enumerate(heads.values(), 1):
        stats = SpeculationStats()
        got = target.generate(**call, assistant_model=head, num_assistant_tokens=gamma, speculation_stats=stats)
        assert torch.equal(got, expected)
        assert 0 < stats.acceptance_rate < 1


# ----------------------------------------------------------------------------------------------------------- confidence


def test_whether_a_draft_is_proposed_depends_on_those_before_it_only(
    target: PreTrainedModel, heads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's draft ends before the first token whose predicted acceptance is below the threshold."""
    head, trace = heads["dspark with confidence"], hf_specdec.Trace()
    seen: list[Tensor] = []
    catch_up = ContextEntries.catch_up

    def spy(self: Any, *given: Any) -> Tensor:
        seen.append(catch_up(self, *given))
        return seen[-1]

    monkeypatch.setattr(ContextEntries, "catch_up", spy)
    torch.manual_seed(0)
    target.generate(
        **make_prompts(3), strategy="spec", assistant_model=head, num_assistant_tokens=4, do_sample=True,
        max_new_tokens=30, assistant_confidence_threshold=0.5, speculation_trace=trace,
    )  # fmt: skip
    lengths = set()
    iterations = [each for each in trace.iterations if any(step.drafted for step in each.rows)]
    for i, (iteration, hidden) in enumerate(zip(iterations, seen, strict=True)):
        for slot, step in enumerate(iteration.rows):
            if not step.drafted:  # its end has no room for any
                continue
            lengths.add(len(step.drafted))
            before = torch.tensor([step.drafted])
            said = head.confidence(hidden[slot : slot + 1, 1 : 1 + before.shape[1]], before[:, : hidden.shape[1] - 1])
            enough = (said[0] >= 0.5).tolist()
            assert all(enough[: len(step.drafted) - 1])
            if len(step.drafted) < hidden.shape[1] and i < len(iterations) - 3:  # the end cuts drafts too
                assert not enough[len(step.drafted) - 1]
    assert len(lengths) > 2
