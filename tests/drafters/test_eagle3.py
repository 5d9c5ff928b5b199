"""EAGLE-3 heads: drafts from the target's own hidden states, and files in every format."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_recurrent
import torch
from conftest import ARCHITECTURES, VOCAB, make_model, make_prompts
from eagle3_reference import kindred_head, make_parts, random_head, reference_logits, some_tokens
from multimodal import make_multimodal, make_multimodal_prompts
from safetensors.torch import load_file
from test_early_exit import INTO_THE_STREAM
from test_sampling import CONFIG, RowProcessor, check_continuations
from test_sampling import VOCAB as FEW
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

import hf_specdec
from hf_specdec import Eagle3Head, SpeculationStats
from hf_specdec.drafters.heads import HeadDrafter, entries
from hf_specdec.drafters.heads.loading import load_folder
from hf_specdec.loop.schedule import Constant
from hf_specdec.models.early_exit import layers_path
from hf_specdec.models.tap import FINAL

NEW = 16


@torch.no_grad()
def quiet(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The same model, whose layers add less to the stream."""
    for layer in model.get_submodule(layers_path(model)):
        for name, weight in layer.named_parameters():
            if not set(INTO_THE_STREAM).isdisjoint(name.split(".")):
                weight *= share
    return model


def make_target(name: str = "llama", layers: int = 3, share: float = 0.01) -> PreTrainedModel:
    recurrent = name in test_recurrent.ARCHITECTURES and name not in ARCHITECTURES
    config = (test_recurrent.ARCHITECTURES if recurrent else ARCHITECTURES)[name]()
    config.update({"initializer_range": 0.4})
    if not recurrent:
        config.update({"num_hidden_layers": layers})
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types, config.layer_types[0]][:layers]
    return quiet(make_model(config), share)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target()


@pytest.fixture(scope="module")
def kindred(target: PreTrainedModel) -> Eagle3Head:
    return kindred_head(target)


def speculate(
    target: PreTrainedModel, head: Any, inputs: dict[str, Any], gamma: int = 3, **options: Any
) -> SpeculationStats:
    """Vanilla's tokens, in batches and alone."""
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    expected = target.generate(**inputs, **options)
    stats = SpeculationStats()
    way = {"strategy": "spec", "assistant_model": head, "num_assistant_tokens": gamma, "speculation_stats": stats}
    got = target.generate(**inputs, **options | way)
    if not isinstance(got, Tensor):
        got, expected = got.sequences, expected.sequences
    assert got.tolist() == expected.tolist()
    return stats


def check(target: PreTrainedModel, head: Any, inputs: dict[str, Any], gamma: int = 3, **options: Any) -> None:
    """The same, with drafts that are accepted in part."""
    stats = speculate(target, head, inputs, gamma, **options)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


# ------------------------------------------------------------------------------------------- what the head is asked for


@torch.no_grad()
def true_states(target: PreTrainedModel, ids: tuple[int, ...], tokens: list[int], **more: Any) -> list[Tensor]:
    """The states of a text that a head reads, `[tokens, hidden]` each, as transformers or the last layer gives them."""
    layers, seen = list(target.get_submodule(layers_path(target))), []
    hook = layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    try:
        output = target(input_ids=torch.tensor([tokens]), output_hidden_states=True, **more)
    finally:
        hook.remove()
    return [(seen[0] if i == len(layers) else output.hidden_states[i])[0] for i in ids]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int, Tensor]]:
    """Of each draft token: the text and drafts before it, how many of these are drafts, and the head's logits."""
    found: list[tuple[list[int], int, Tensor]] = []
    logits_of = HeadDrafter._logits
    drafts: list[Tensor] = []

    def spy(self: HeadDrafter, context: Any, step: int, most: int, drawn: Tensor | None) -> Tensor:
        if step == 0:
            drafts.clear()
        elif drawn is not None:
            drafts.append(drawn.clone())
        logits = logits_of(self, context, step, most, drawn)
        assert len(drafts) == step
        for slot, row in enumerate(context.rows):
            own = [int(tokens[slot, 0]) for tokens in drafts]
            found.append((context.row(row).tolist() + own, step, logits[slot, 0].clone()))
        return logits

    monkeypatch.setattr(HeadDrafter, "_logits", spy)
    return found


def compare(asked: list[tuple[list[int], int, Tensor]], head: Eagle3Head, target: PreTrainedModel, **more: Any) -> None:
    """The head's logits are those of the reference, from scratch, on true hidden states.

    Args:
        more: of the target's forwards, besides the text.
    """
    assert len({drafted for _, drafted, _ in asked}) > 1
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    ids = head.parts.states_of(layers)
    known: dict[tuple[int, ...], list[Tensor]] = {}  # states by text
    chosen = {round(i * (len(asked) - 1) / 59) for i in range(60)}
    for text, drafted, logits in sorted((asked[i] for i in chosen), key=lambda one: one[1] - len(one[0])):
        count = len(text) - drafted  # of which the target has read all but one
        longer = next((one for one in known if list(one[:count]) == text[:count]), None)
        if longer is None:
            longer = tuple(text[:count])
            known[longer] = true_states(target, ids, text[:count], **more)
        expected = reference_logits(head, target, [s[: count - 1] for s in known[longer]], text)
        scale = float(expected.abs().max())
        assert float((logits - expected).abs().max()) <= 1e-5 * max(scale, 1), (count, drafted)


VARIANTS: dict[str, Callable[[], Eagle3Head]] = {
    "plain": lambda: random_head(make_parts()),
    "norm_before_residual": lambda: random_head(make_parts(norm_before_residual=True)),
    "norm_before_fc": lambda: random_head(make_parts(norm_before_fc=True)),
    "fc_norm": lambda: random_head(make_parts(fc_norm=True)),
    "norm_output": lambda: random_head(make_parts(norm_output=True)),
    "a reduced vocabulary": lambda: random_head(make_parts(draft_vocab_size=40), some_tokens(40)),
    "embeddings of its own": lambda: random_head(make_parts(has_embeddings=True)),
    "no output weights": lambda: random_head(make_parts(has_lm_head=False)),
    "rows of the target's output weights": lambda: random_head(
        make_parts(has_lm_head=False, draft_vocab_size=40), some_tokens(40)
    ),
    "another width": lambda: random_head(
        make_parts({"hidden_size": 24}, target_hidden_size=32, has_embeddings=True, fc_norm=True)
    ),
    "the last state only": lambda: random_head(make_parts(uses_aux=False, aux_ids=None, aux_count=1, has_fc=False)),
    "five states": lambda: random_head(make_parts(aux_ids=(0, 1, 2, 3, 1), aux_count=5)),
    "qk_norm": lambda: random_head(make_parts(qk_norm=True)),
    "three layers": lambda: random_head(make_parts(layers=3, norm_before_residual=True)),
    "biases": lambda: random_head(make_parts(biases=("q_proj", "k_proj", "v_proj", "down_proj"))),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_a_plain_head_from_scratch(
    name: str, target: PreTrainedModel, asked: list[tuple[list[int], int, Tensor]]
) -> None:
    """In a batch of uneven rows; in spite of entries of drafts in every iteration."""
    head = VARIANTS[name]()
    speculate(target, head, make_prompts(3), max_new_tokens=8)
    compare(asked, head, target)


# Of each target, where entries come from: the prompt in the first verification, in chunks, ...
CALLS: dict[str, dict[str, Any]] = {
    "one row": {"inputs": make_prompts(1)},
    "uneven rows": {"inputs": make_prompts(3)},
    "rows of equal length": {"inputs": {"input_ids": make_prompts(1)["input_ids"].repeat(2, 1) % 7 + 2}},
    "chunks": {"inputs": make_prompts(2), "prefill_chunk_size": 4},
    "uneven ends": {"inputs": make_prompts(4), "eos_token_id": [5, 77, 11, 40]},
}


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gpt2", "mixtral", "qwen3_next", "falcon_h1"])
def test_every_kind_of_target(name: str, asked: list[tuple[list[int], int, Tensor]]) -> None:
    """Texts outgrow windows, recurrent rows are padded and fed twice: the states are those of one plain forward."""
    target = make_target(name)
    head = kindred_head(target)
    if target.config.tie_word_embeddings:  # then a quiet target repeats the last token
        head = random_head(make_parts())
        speculate(target, head, make_prompts(3))
    else:
        check(target, head, make_prompts(3))
    compare(asked, head, target)
    asked.clear()
    speculate(target, head, make_prompts(1))
    compare(asked, head, target)


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("gamma", [1, 4])
def test_every_kind_of_call(
    call: str, gamma: int, target: PreTrainedModel, kindred: Eagle3Head, asked: list[tuple[list[int], int, Tensor]]
) -> None:
    check(target, kindred, gamma=gamma, **CALLS[call])
    if gamma > 1:
        compare(asked, kindred, target)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_CHUNK", 5)
    monkeypatch.setattr(entries, "_MOST_WAITING", 4)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of states that are kept, after each forward of the target."""
    kept: list[int] = []
    read = entries.HeadEntries.read

    def spy(self: Any, states: Any, rows: Any, columns: Any) -> None:
        read(self, states, rows, columns)
        kept.append(sum(part.untyped_storage().nbytes() for piece in self._pieces for part in piece.states))

    monkeypatch.setattr(entries.HeadEntries, "read", spy)
    return kept


@pytest.mark.parametrize("call", ["one row", "uneven rows", "chunks"])
def test_prompts_are_read_piece_by_piece_and_not_kept(
    call: str, target: PreTrainedModel, kindred: Eagle3Head, small_pieces: None,
    asked: list[tuple[list[int], int, Tensor]], kept: list[int],
) -> None:  # fmt: skip
    check(target, kindred, **CALLS[call])
    compare(asked, kindred, target)
    rows = len(CALLS[call]["inputs"]["input_ids"])
    assert max(kept) <= rows * 6 * 3 * 32 * 4  # tokens, layers, width, bytes


def test_iterations_without_drafts_leave_nothing_out(
    target: PreTrainedModel, kindred: Eagle3Head, small_pieces: None, asked: list[tuple[list[int], int, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan: Iterator[int] = iter([3, 0, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0, 4] + [2] * 50)
    monkeypatch.setattr(Constant, "plan", lambda self, *_: next(plan))
    check(target, kindred, make_prompts(3))
    compare(asked, kindred, target)


@pytest.mark.parametrize("name", ["qwen3_next", "llama"])
def test_pending_tokens_are_not_entered_twice(name: str, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    """Rejected drafts make recurrent targets read committed tokens again; a random head is always rejected."""
    target = make_target(name)
    head = random_head(make_parts())
    speculate(target, head, make_prompts(2), gamma=4)
    compare(asked, head, target)
    assert FINAL not in head.parts.states_of(3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_prompts_with_images(name: str, asked: list[tuple[list[int], int, Tensor]]) -> None:
    """The target reads them in a forward of its own, which the tap hears as well."""
    target, _ = make_multimodal(name)
    head = random_head(make_parts())
    alone = make_multimodal_prompts(name, [[(4, 4)]])
    speculate(target, head, alone)
    if name == "llava":
        compare(asked, head, target, pixel_values=alone["pixel_values"])
    speculate(target, head, make_multimodal_prompts(name, [[(4, 4)], [], [(4, 8), (4, 4)]]))


def test_two_calls_at_once_hear_their_own_states(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    def run(seed: int) -> list[int]:
        stats = SpeculationStats()
        inputs = make_prompts(2, seed=seed)
        target.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, strategy="spec", assistant_model=kindred,
            num_assistant_tokens=3, speculation_stats=stats,
        )  # fmt: skip
        return [stats.accepted_tokens, stats.drafted_tokens]

    expected = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == expected


# ------------------------------------------------------------------------------------------------------- other options


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"assistant_confidence_threshold": 0.3},
        {"num_assistant_tokens_schedule": "heuristic_transient"},
        {"num_assistant_tokens_schedule": "optimal", "max_new_tokens": 40},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"max_new_tokens": 90},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(target: PreTrainedModel, kindred: Eagle3Head, options: dict[str, Any]) -> None:
    speculate(target, kindred, make_prompts(3), **options)


def test_returned_states_and_cache_are_vanillas(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    expected = target.generate(**make_prompts(2), **options)
    got = target.generate(**make_prompts(2), **options, strategy="spec", assistant_model=kindred)
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine[-1], theirs[-1], atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_the_target_is_left_as_it_was(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    def hooks(model: PreTrainedModel) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    fresh = make_target()
    check(fresh, kindred, make_prompts(2))
    assert hooks(fresh) == 0
    with pytest.raises(RuntimeError, match="stop"):
        fresh.generate(**make_prompts(1), strategy="spec", assistant_model=kindred, max_new_tokens=9, streamer=Stops())
    assert hooks(fresh) == 0


class Stops:
    """A streamer that breaks a call off."""

    def put(self, value: Tensor) -> None:
        if value.ndim == 1:
            raise RuntimeError("stop")

    def end(self) -> None: ...


def test_embeddings_as_the_prompt(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    inputs = make_prompts(2)
    embeds = target.get_input_embeddings()(inputs["input_ids"])
    check(target, kindred, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})


def test_a_text_goes_on_from_a_cache(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    inputs = make_prompts(1)
    first = target.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    expected = target.generate(first.sequences, max_new_tokens=NEW, do_sample=False)
    got = target.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW, do_sample=False, strategy="spec",
        assistant_model=kindred,
    )  # fmt: skip
    assert got.tolist() == expected.tolist()


def test_prompts_of_one_token(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    check(target, kindred, {"input_ids": torch.tensor([[9]])})
    ids = torch.tensor([[0, 0, 9], [3, 4, 5]])
    check(target, kindred, {"input_ids": ids, "attention_mask": (ids > 0).long()})


# ------------------------------------------------------------------------------------------------- reduced vocabularies


class Lists(RowProcessor):
    """A grammar: at every third token only two tokens, else any."""

    def __init__(self, allowed: list[int]):
        self.allowed = allowed

    def begin(self, prompts: Tensor) -> None:
        self.new = [0] * len(prompts)

    def accept(self, row: int, token: int) -> None:
        self.new[row] += 1

    def rollback(self, row: int, count: int) -> None:
        self.new[row] -= count

    def mask(self, row: int) -> Tensor:
        mask = torch.ones(VOCAB, dtype=torch.bool)
        if self.new[row] % 3 == 2:
            mask[:] = False
            mask[self.allowed] = True
        return mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if (input_ids.shape[1] - 14) % 3 == 2:
            mask = torch.ones(VOCAB, dtype=torch.bool)
            mask[self.allowed] = False
            return scores.masked_fill(mask, -torch.inf)
        return scores


def test_a_vocabulary_without_eos(target: PreTrainedModel) -> None:
    """Rows end where vanilla's do, though the head can never propose that."""
    plain = target.generate(**make_prompts(3), max_new_tokens=NEW, do_sample=False)
    eos = int(plain[0, -6])
    head = kindred_head(target, some_tokens(70, without=(eos,)))
    check(target, head, make_prompts(3), eos_token_id=eos)
    # The penalty multiplies what is not known by what grows: nothing that is no number may come of it.
    stats = speculate(target, head, make_prompts(3), eos_token_id=eos, exponential_decay_length_penalty=(0, 1.02))
    assert stats.drafted_tokens > 2 * stats.row_iterations


def test_a_grammar_that_leaves_the_head_nothing_to_say(target: PreTrainedModel) -> None:
    """The row stops drafting there, and no draft is ever one that the head does not know."""
    unknown = [3, 4]
    head = kindred_head(target, some_tokens(80, without=tuple(unknown)))
    trace = hf_specdec.Trace()
    options = {"logits_processor": [Lists(unknown)], "speculation_trace": trace}
    inputs = make_prompts(2)
    expected = target.generate(**inputs, max_new_tokens=NEW, do_sample=False, logits_processor=[Lists(unknown)])
    got = target.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, strategy="spec", assistant_model=head, num_assistant_tokens=5,
        **options,
    )  # fmt: skip
    assert got.tolist() == expected.tolist()
    drafted = [step.drafted for iteration in trace.iterations for step in iteration.rows]
    assert {token for tokens in drafted for token in tokens} <= set(head.target_ids.tolist())
    assert max(map(len, drafted)) == 2 and min(map(len, drafted)) == 0


def test_a_forced_token_is_drafted_and_drafts_go_on_after_it(target: PreTrainedModel) -> None:
    """Though the head does not know it: no forward is needed to say what must come."""
    head, trace = kindred_head(target, some_tokens(80, without=(3,))), hf_specdec.Trace()
    options = {"max_new_tokens": NEW, "do_sample": False, "strategy": "spec", "assistant_model": head}
    options |= {"num_assistant_tokens": 5, "logits_processor": [Lists([3])], "speculation_trace": trace}
    got = target.generate(**make_prompts(1), **options)
    vanilla = {"max_new_tokens": NEW, "do_sample": False, "logits_processor": [Lists([3])]}
    assert got.tolist() == target.generate(**make_prompts(1), **vanilla).tolist()
    drafted = [step.drafted for iteration in trace.iterations for step in iteration.rows]
    assert max(map(len, drafted)) == 5 and any(3 in tokens for tokens in drafted)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def few() -> PreTrainedModel:
    config = LlamaConfig(**CONFIG | {"num_hidden_layers": 3, "hidden_size": 32, "head_dim": 16})
    return quiet(make_model(config), 0.1)


@pytest.mark.parametrize(
    ("rule", "known"), [("token", 7), ("block", 7), pytest.param("token", FEW, marks=pytest.mark.slow)]
)
def test_samples_follow_the_targets_law(rule: str, known: int, few: PreTrainedModel) -> None:
    """As in `test_sampling.py`; a wrong law that would be seen is one without what the head does not know."""
    head = kindred_head(few, None if known == FEW else torch.tensor([0, 1, 3, 4, 6, 8, 9]))
    share = 0.0 if known != FEW else 0.5
    check_continuations(few, share, 10, assistant_model=head, speculation_acceptance=rule)


def test_coupled_text_is_the_same_for_any_draft_length(target: PreTrainedModel, kindred: Eagle3Head) -> None:
    reduced = kindred_head(target, some_tokens(60))
    call = {"do_sample": True, "max_new_tokens": NEW, "temperature": 0.7, "strategy": "spec"}
    call |= {"speculation_acceptance": "coupled", "speculation_seed": 7} | make_prompts(3)
    expected = target.generate(**call, prompt_lookup_num_tokens=2)
    for gamma in range(1, 6):
        head, stats = (kindred, reduced)[gamma % 2], SpeculationStats()
        got = target.generate(**call, assistant_model=head, num_assistant_tokens=gamma, speculation_stats=stats)
        assert torch.equal(got, expected)
        assert 0 < stats.acceptance_rate < 1


# ----------------------------------------------------------------------------------------- the reference of speculators


@pytest.mark.parametrize("name", ["reduced", "norm_before_fc", "qwen3"])
def test_logits_are_those_of_speculators(name: str) -> None:
    """Written by `heads/make_speculators.py`: after each position of a text, and up to three drafts more."""
    folder = Path(__file__).parent / "heads" / name
    head, expected = load_folder(folder), load_file(folder / "expected.tensors")
    states = list(expected["states"].chunk(3, dim=-1))
    embedded = head.embed_tokens(expected["tokens"][1:])
    for end in range(1, len(embedded) + 1):
        cache = DynamicCache()
        given = head.mix([part[None, :end] for part in states])
        hidden = head(given, embedded[None, :end], torch.arange(end)[None], cache)[:, -1:]
        for step, logits in enumerate(expected["logits"]):
            if end + step > len(embedded):
                break
            if step:
                at = torch.tensor([[end - 1 + step]])
                hidden = head(hidden, embedded[None, end - 1 + step, None], at, cache)
            torch.testing.assert_close(head.logits(hidden)[0, 0], logits[end - 1], atol=1e-5, rtol=1e-5)
