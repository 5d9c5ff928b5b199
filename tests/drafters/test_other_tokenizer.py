"""Drafts with another tokenizer than the target's: what tokens stand for, the text between the two, and no bias."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from test_sampling import ALARM, CONFIG, ROWS, Law, exact_law, p_value, processors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_of_all_kinds import CORPUS, EXACT, KINDS, PROMPTS, inputs_of, model_of, tokenizer_of
from torch import Tensor
from transformers import (
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.utils import logging

from hf_specdec import OtherTokenizerDrafter, SpeculationStats, Trace
from hf_specdec.drafters.bridge import Bridge, RowText, bridge_between
from hf_specdec.drafters.token_bytes import TokenBytes
from hf_specdec.loop import invariants
from hf_specdec.sampling.row_processors import RowProcessor

# Target and draft: all tokenizers on both sides, byte level and others in both directions.
PAIRS = [
    ("bytes", "other bytes"),
    ("bytes", "space first"),
    ("space first", "bytes"),
    ("bytes", "word pieces"),
    ("word pieces", "unigram"),
    ("unigram", "characters"),
    ("characters", "bytes"),
]
TEXTS = [*PROMPTS, "a  b\n\n\n   c\td ", "x = [1, 2]\r\n", "你好，世界", "🙂" * 3 + " ok", " two", "self.width"]


@pytest.fixture
def caches_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each iteration the draft's cache is compared with a fresh forward over the text in its tokens."""
    monkeypatch.setattr(invariants, "ENABLED", True)


def generate(target: str, draft: str, rows: int = 3, **options: Any) -> tuple[Any, SpeculationStats]:
    """Greedy unless asked otherwise; speculative with `by` "token", "text", or what is chosen."""
    stats = SpeculationStats()
    by, window = options.pop("by", None), options.pop("window", None)
    tokenizers = {"tokenizer": tokenizer_of(target), "assistant_tokenizer": tokenizer_of(draft)}
    model = model_of(draft, window)
    threshold = options.get("assistant_confidence_threshold", 0.0)
    given: Any = model if by is None else OtherTokenizerDrafter(model, *tokenizers.values(), threshold, by=by)
    options = {"max_new_tokens": 24, "do_sample": False, "num_assistant_tokens": 4, **options}
    out = model_of(target, window).generate(
        **inputs_of(target, rows), assistant_model=given, **tokenizers, strategy="spec", speculation_stats=stats,
        **options,
    )  # fmt: skip
    return out, stats


def vanilla(target: str, rows: int = 3, window: int | None = None, **options: Any) -> Any:
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    return model_of(target, window).generate(**inputs_of(target, rows), **options)


# ------------------------------------------------------------------------------------------------- bytes and tokens


@pytest.mark.parametrize("kind", EXACT)
def test_the_bytes_of_a_texts_tokens_are_the_text(kind: str) -> None:
    known = TokenBytes(tokenizer_of(kind), "tokenizer")
    for text in TEXTS:
        if kind == "characters" and set(text) - set(CORPUS) | set(text) & set("你好🙂"):
            continue
        ids = tokenizer_of(kind)(text, add_special_tokens=False)["input_ids"]
        data = b"".join(known.pieces[i] or b"<special>" for i in ids)
        assert data.decode() == (" " * known.adds_space + text if text[:1] != " " or kind != "unigram" else text)
        assert known.encode(data) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes_but_roles(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    known = TokenBytes(tokenizer, "tokenizer")
    assert all(known.pieces[i] is None for i in tokenizer.all_special_ids)
    assert known.prefix == tokenizer("a")["input_ids"][: len(known.prefix)]
    assert len(known.prefix) == (kind in ("space first", "unigram", "word pieces"))


def test_words_begin_with_a_space_where_pieces_do_not_say_otherwise() -> None:
    known = TokenBytes(tokenizer_of("word pieces"), "tokenizer")
    pieces = [known.pieces[i] for i in known.encode(b" Return the text, wrapped.")]
    assert b"".join(piece or b"?" for piece in pieces) == b" return the text, wrapped."


def test_newlines_and_characters_meet_across_kinds() -> None:
    """`<0x0A>` and `Ċ` are one token, and so are `▁the` and `Ġthe`."""
    bridge = Bridge(tokenizer_of("bytes"), tokenizer_of("space first"))
    shared = bridge.shared(10**4, 10**4)
    pairs = {bridge.target.pieces[t]: d for t, d in zip(shared.target.tolist(), shared.draft.tolist(), strict=True)}
    vocabulary = tokenizer_of("space first").get_vocab()
    assert pairs[b"\n"] == vocabulary["<0x0A>"]
    assert pairs[b" the"] == vocabulary["▁the"]
    assert pairs[b"a"] == vocabulary["a"]  # not <0x61>
    assert [(t.tolist(), d.tolist()) for t, d in shared.more if vocabulary["<0x61>"] in d.tolist()]
    assert bridge.to_draft[tokenizer_of("bytes").eos_token_id] == vocabulary["</s>"]


def test_halves_of_characters_become_bytes_where_there_are_such_tokens() -> None:
    smile = "🙂".encode()
    for kind in ("bytes", "space first", "unigram"):
        known = TokenBytes(tokenizer_of(kind), "tokenizer")
        ids = known.encode(b"a" + smile[:2])
        assert b"".join(known.pieces[i] or b"" for i in ids).endswith(b"a" + smile[:2])
        ids = known.encode(smile[2:] + b"b")
        assert b"".join(known.pieces[i] or b"" for i in ids) == smile[2:] + b"b"
    characters = TokenBytes(tokenizer_of("characters"), "tokenizer")
    assert characters.encode(b"a" + smile[:2]) == characters.encode(b"a")


def test_the_users_tokenizer_is_not_touched_nor_its_settings_felt() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("space first"))
    tokenizer("a b c d e", truncation=True, max_length=2, padding="max_length")
    before = tokenizer.backend_tokenizer.to_str()
    known = TokenBytes(tokenizer, "tokenizer")
    assert len(known.encode(b" one two three four five six")) > 5
    assert tokenizer.backend_tokenizer.to_str() == before


# ------------------------------------------------------------------------------------------------ a row's growing text


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_text_read_in_parts_is_the_text_read_at_once(target: str, draft: str) -> None:
    bridge = bridge_between(tokenizer_of(target), tokenizer_of(draft))
    rng = random.Random(0)
    written = CORPUS[4000:5200] + PROMPTS[2].replace("🙂", "" if target == "characters" else "🙂")
    ids = tokenizer_of(target)(written, add_special_tokens=False)["input_ids"]
    text, at, changed = RowText(bridge), 0, 0
    while at < len(ids):
        new, before = ids[at : at + rng.randint(1, 5)], list(text.ids)
        fed = [rng.randrange(5) for _ in range(rng.randint(0, 3))]
        kept = text.read(new, fed)
        assert [*before, *fed][:kept] == text.ids[:kept]
        assert kept == len(text.ids) or [*before, *fed][kept : kept + 1] != text.ids[kept : kept + 1]
        changed += kept < len(before)
        at += len(new)
    whole = RowText(bridge)
    whole.read(ids)
    assert text.ids == whole.ids
    assert changed or draft == "characters"
    if draft in EXACT[:-1] and target in EXACT:
        pieces = [bridge.draft.pieces[i] or b"" for i in text.ids]
        assert b"".join(pieces).decode().strip() == written.strip()


def test_special_tokens_go_over_by_text_or_role_or_not_at_all() -> None:
    target, draft = tokenizer_of("bytes"), copy.deepcopy(tokenizer_of("space first"))
    target = copy.deepcopy(target)
    for tokenizer, names in ((target, ["<turn>", "<tool>"]), (draft, ["<turn>"])):
        tokenizer.add_special_tokens({"additional_special_tokens": names})
    ids = [target.bos_token_id, *target("ab")["input_ids"], *target("<turn>")["input_ids"]]
    ids += [*target("<tool>")["input_ids"], *target("\n")["input_ids"], target.eos_token_id, 10**6]
    text = RowText(Bridge(target, draft))
    text.read(ids)
    names = draft.convert_ids_to_tokens(text.ids)
    assert names[0] == "<s>" and names[-3:] == ["<turn>", "<0x0A>", "</s>"]


def test_a_text_without_tokens_for_the_draft_still_has_one() -> None:
    text = RowText(Bridge(tokenizer_of("space first"), tokenizer_of("characters")))
    text.read([tokenizer_of("space first").bos_token_id])
    assert text.ids == [tokenizer_of("characters").eos_token_id]


def test_drafts_go_on_where_the_target_would_have_written_the_text_otherwise() -> None:
    """After ` sel` comes `f`, though ` self` is one token."""
    target, draft = tokenizer_of("bytes"), tokenizer_of("other bytes")
    bridge = bridge_between(target, draft)
    text = RowText(bridge)
    text.read([*bridge.target.encode(b"in"), *bridge.target.encode(b" sel")])
    assert bridge.target.encode(b" self")[:-1] != bridge.target.encode(b" sel")
    assert b"".join(bridge.target.pieces[i] or b"" for i in text.continued(bridge.draft.encode(b"f"))) == b"f"


def test_long_texts_without_spaces_do_not_stay_open() -> None:
    target, draft = tokenizer_of("bytes"), tokenizer_of("other bytes")
    text = RowText(bridge_between(target, draft))
    for _ in range(60):
        text.read(target("你好，世界。")["input_ids"])
    assert len(text._open) <= 300
    pieces = TokenBytes(draft, "assistant_tokenizer").pieces
    assert b"".join(pieces[i] or b"" for i in text.ids).decode() == "你好，世界。" * 60


# ------------------------------------------------------------------------------------------------------- greedy calls


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_greedy_calls_give_vanillas_tokens(target: str, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for by in ("token", "text"):
        counts = []
        for rows, gamma in ((1, 3), (3, 5), (8, 2)):
            monkeypatch.setattr(invariants, "ENABLED", rows == 3)
            out, stats = generate(target, draft, rows, by=by, num_assistant_tokens=gamma, max_new_tokens=16)
            assert out.tolist() == vanilla(target, rows, max_new_tokens=16).tolist(), (rows, gamma, by)
            counts.append((stats.accepted_tokens, stats.drafted_tokens))
        accepted, drafted = map(sum, zip(*counts, strict=True))
        assert 0 < accepted < drafted, by


@pytest.mark.usefixtures("caches_are_checked")
@pytest.mark.parametrize("by", ["token", "text"])
def test_windows_of_the_draft_give_vanillas_tokens(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"window": 8, "max_new_tokens": 40}
    made = []
    start = OtherTokenizerDrafter.start
    monkeypatch.setattr(OtherTokenizerDrafter, "start", lambda self, *args: made.append(self) or start(self, *args))
    out, stats = generate("bytes", "space first", by=by, **options)
    assert not made[0].cached.cache.windows  # a text may change further back than a window and a block
    assert out.tolist() == vanilla("bytes", **options).tolist()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_the_way_is_chosen_by_what_is_shared() -> None:
    def by_token(target: str, draft: str) -> bool:
        return bridge_between(tokenizer_of(target), tokenizer_of(draft)).by_token

    assert by_token("bytes", "other bytes") and by_token("other bytes", "bytes")
    assert not by_token("bytes", "characters") and not by_token("characters", "bytes")
    out, stats = generate("bytes", "other bytes")
    assert stats.iterations == generate("bytes", "other bytes", by="token")[1].iterations
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert out.tolist() == vanilla("bytes").tolist()


@pytest.mark.parametrize("by", ["token", "text"])
def test_a_draft_of_the_same_tokens_in_another_order_knows_everything(by: str) -> None:
    """The target itself with its ids reversed: every draft is accepted."""
    tokenizer, target = tokenizer_of("bytes"), model_of("bytes")
    size = len(tokenizer)
    form = copy.deepcopy(tokenizer).backend_tokenizer.to_str()
    import json

    parts = json.loads(form)
    parts["model"]["vocab"] = {token: size - 1 - i for token, i in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    backend = Tokenizer.from_str(json.dumps(parts))
    roles = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for weight in (draft.get_input_embeddings().weight, draft.get_output_embeddings().weight):
            weight.copy_(weight.flip(0).clone())
    stats = SpeculationStats()
    drafter = OtherTokenizerDrafter(draft, tokenizer, other, by=by)
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, **inputs_of("bytes", 3)}
    out = target.generate(
        **options, assistant_model=drafter, strategy="spec", num_assistant_tokens=4, speculation_stats=stats
    )
    assert out.tolist() == target.generate(**options).tolist()
    # As text, a draft may end inside of what the target would write as one token.
    assert stats.acceptance_rate == 1 if by == "token" else stats.acceptance_rate > 0.8


def test_the_drafts_cache_keeps_what_has_not_changed() -> None:
    """Each iteration feeds the draft a few tokens, not the text."""
    fed: list[int] = []
    draft = model_of("other bytes")
    hook = draft.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate("bytes", "other bytes", 1, max_new_tokens=60)  # its first call may ask the model questions
    fed.clear()
    generate("bytes", "other bytes", 1, max_new_tokens=60)
    hook.remove()
    assert max(fed[1:]) <= 12 and sum(fed[1:]) / len(fed[1:]) < 2.5


# ------------------------------------------------------------------------------------------------------ sampled calls

PROMPT = [3, 4, 5]
LETTERS = ["a", "b", "c", "d", "e", "ab", "bc", "cd", "ca", "da"]
OTHERS = ["d", "c", "b", "a", "e", "da", "bc", "ab", "abc", "aa", "<0x61>"]


def letters(tokens: list[str]) -> PreTrainedTokenizerFast:
    merges = [(token[:-1], token[-1]) for token in sorted(tokens, key=len) if 1 < len(token) < 4]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def small() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Ten and eleven tokens; eight of the target's have the same bytes as one of the draft's, one as two."""
    target = make_model(LlamaConfig(**CONFIG))
    draft = make_model(LlamaConfig(**CONFIG | {"vocab_size": len(OTHERS)}), seed=3)
    return target, draft, letters(LETTERS), letters(OTHERS)


SAMPLED: dict[str, dict[str, Any]] = {
    "token": {"by": "token", "num_assistant_tokens": 3},
    "token, block, cold": {"by": "token", "speculation_acceptance": "block", "temperature": 0.7, "top_k": 6},
    "text": {"by": "text", "num_assistant_tokens": 3},
}
SAMPLES = 8_000


def law_and_suspect(small: Any, options: dict[str, Any]) -> tuple[Law, Law]:
    """Of three tokens after a prompt: the target's law, and the same with the first token as the draft would choose."""
    target, draft, *tokenizers = small
    process = processors(**options)
    law = exact_law(target, PROMPT, 3, process)
    bridge = bridge_between(*tokenizers)
    text = RowText(bridge)
    text.read(PROMPT)
    with torch.no_grad():
        logits = bridge.shared(10, 11).target_scores(draft(torch.tensor([text.ids])).logits[:, -1:], 10)
    first = process(torch.tensor([PROMPT]), logits[:, 0]).softmax(-1)[0].double().numpy()
    own = law.sum(axis=(1, 2))
    return law, law * np.divide(first, own, out=np.zeros(10), where=own > 0)[:, None, None]


@pytest.mark.parametrize("name", SAMPLED)
def test_continuations_follow_the_targets_law(name: str, small: Any) -> None:
    """False alarms: as in tests/sampling/test_sampling.py. Power: the next test."""
    options = {"top_k": 0} | SAMPLED[name]
    drafter = OtherTokenizerDrafter(small[1], *small[2:], by=options.pop("by"))
    torch.manual_seed(0)
    stats = SpeculationStats()
    counts = np.zeros([10] * 3)
    for _ in range(SAMPLES // ROWS):
        output = small[0].generate(
            torch.tensor([PROMPT]), attention_mask=torch.ones(1, 3), assistant_model=drafter, strategy="spec",
            do_sample=True, max_new_tokens=3, num_return_sequences=ROWS, speculation_stats=stats, **options,
        )  # fmt: skip
        np.add.at(counts, tuple(output[:, 3:].numpy().T), 1)
    assert 0.02 < stats.acceptance_rate < 0.99
    assert p_value(counts, *law_and_suspect(small, SAMPLED[name])) > ALARM


@pytest.mark.parametrize("name", ["token", "token, block, cold"])
def test_a_bias_of_two_percent_would_be_seen(name: str, small: Any) -> None:
    """2% in total variation towards the draft is found in each of 20 such sets of samples; no bias, in none."""
    law, suspect = law_and_suspect(small, SAMPLED[name])
    biased = law + 0.02 / (np.abs(suspect - law).sum() / 2) * (suspect - law)
    rng = np.random.default_rng(0)
    for _ in range(20):
        unbiased, counts = (rng.multinomial(SAMPLES, x.ravel() / x.sum()).reshape(law.shape) for x in (law, biased))
        assert p_value(counts, law, suspect) < ALARM < p_value(unbiased, law, suspect)


def test_q_sums_tokens_with_the_same_bytes(small: Any) -> None:
    shared = bridge_between(*small[2:]).shared(10, 11)
    logits = torch.randn(2, 3, 11)
    q = shared.target_scores(logits, 10).softmax(-1)
    p = logits.softmax(-1)
    by_name = {name: p[..., i] for i, name in enumerate(OTHERS)}
    by_name["a"] = by_name["a"] + by_name["<0x61>"]
    both = [name for name in LETTERS if name in by_name]
    total = sum(by_name[name] for name in both)
    for i, name in enumerate(LETTERS):
        expected = by_name[name] / total if name in by_name else torch.zeros(2, 3)
        torch.testing.assert_close(q[..., i], expected)
    assert len(both) == 8


@pytest.mark.parametrize("by", ["token", "text"])
def test_coupled_calls_are_a_function_of_the_seed(by: str) -> None:
    options: dict[str, Any] = {
        "do_sample": True,
        "speculation_acceptance": "coupled",
        "speculation_seed": 3,
        "top_k": 20,
    }
    outs = [generate("bytes", "other bytes", by=by, num_assistant_tokens=gamma, **options) for gamma in (1, 3, 6)]
    assert outs[0][0].tolist() == outs[1][0].tolist() == outs[2][0].tolist()
    assert 0 < outs[1][1].accepted_tokens < outs[1][1].drafted_tokens
    alone = generate("bytes", "other bytes", 1, by=by, **options)[0]
    width = inputs_of("bytes", 1)["input_ids"].shape[1]
    assert alone[0, width:].tolist() == outs[0][0][0, -24:].tolist()


# ------------------------------------------------------------------------------------------- what else a call may ask


class OnlyEven(RowProcessor):
    """Even ids, and after a multiple of eight one token only."""

    def begin(self, prompts: Tensor) -> None:
        self.last = [int(row[-1]) for row in prompts]
        self.before: list[list[int]] = [[] for _ in prompts]

    def accept(self, row: int, token: int) -> None:
        self.before[row].append(self.last[row])
        self.last[row] = token

    def rollback(self, row: int, count: int) -> None:
        for _ in range(count):
            self.last[row] = self.before[row].pop()

    def mask(self, row: int) -> Tensor:
        ids = torch.arange(len(tokenizer_of("bytes")))
        return ids == 98 if self.last[row] % 8 == 0 else ids % 2 == 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(input_ids):
            self.last = {row: int(ids[-1])}  # type: ignore[assignment]
            scores = scores.clone()
            scores[row, ~self.mask(row)] = -torch.inf
        return scores


CALLS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "stop strings": {"stop_strings": ["self"], "max_new_tokens": 40},
    "an end": {"eos_token_id": 300, "max_new_tokens": 40},
    "threshold": {"assistant_confidence_threshold": 0.4},
    "optimal": {"num_assistant_tokens_schedule": "optimal"},
    "chunks": {"prefill_chunk_size": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("name", CALLS)
def test_other_arguments_keep_their_meaning(name: str) -> None:
    options = CALLS[name]
    plain = {k: v for k, v in options.items() if not k.startswith(("assistant", "num_assistant"))}
    tokenizer = {"tokenizer": tokenizer_of("bytes")} if "stop_strings" in options else {}
    expected = vanilla("bytes", **plain, **tokenizer)
    for by in ("token", "text"):
        out, stats = generate("bytes", "space first", by=by, **options)
        assert out.tolist() == expected.tolist(), by
        if name != "optimal":
            assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_constraints_hold_and_forced_tokens_need_no_forward() -> None:
    expected = vanilla("bytes", logits_processor=[OnlyEven()])
    for by in ("token", "text"):
        out, stats = generate("bytes", "other bytes", by=by, logits_processor=[OnlyEven()])
        assert out.tolist() == expected.tolist()
        assert stats.accepted_tokens > 0


def test_several_sequences_streams_and_traces() -> None:
    torch.manual_seed(0)
    out, stats = generate("bytes", "other bytes", 2, do_sample=True, num_return_sequences=3)
    assert len(out) == 6 and 0 < stats.accepted_tokens < stats.drafted_tokens
    streamer, trace = TextIteratorStreamer(tokenizer_of("bytes"), skip_prompt=True), Trace()
    out, _ = generate("bytes", "other bytes", 1, streamer=streamer, speculation_trace=trace)
    width = inputs_of("bytes", 1)["input_ids"].shape[1]
    assert "".join(streamer) == tokenizer_of("bytes").decode(out[0, width:])
    assert trace.to_text(tokenizer_of("bytes"))


def test_a_draft_can_propose_the_end() -> None:
    """Each ends after its own newline of an empty line, and the end is accepted as a draft."""
    for by in ("token", "text"):
        trace = Trace()
        kinds = "bytes", "other bytes"
        ends = [tokenizer_of(kind).eos_token_id for kind in kinds]
        boosted = [copy.deepcopy(model_of(kind)) for kind in kinds]
        with torch.no_grad():
            for model, end, kind in zip(boosted, ends, kinds, strict=True):
                after = tokenizer_of(kind)("\n")["input_ids"][-1]
                head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
                head[end] = embedding[after] * 40
        target, draft = boosted
        drafter = OtherTokenizerDrafter(draft, *map(tokenizer_of, kinds), by=by)
        options: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": ends[0]}
        inputs = inputs_of("bytes", 2)
        out = target.generate(
            **inputs, **options, assistant_model=drafter, strategy="spec", speculation_trace=trace,
            num_assistant_tokens=3,
        )  # fmt: skip
        assert out.tolist() == target.generate(**inputs, **options).tolist()
        steps = [row for iteration in trace.iterations for row in iteration.rows]
        assert any(ends[0] in step.drafted[: step.accepted] for step in steps), by


def test_nothing_of_the_drafts_model_is_exchanged() -> None:
    draft = model_of("other bytes")
    before = {name: id(parameter) for name, parameter in draft.named_parameters()}
    config = copy.deepcopy(draft.generation_config.to_dict())
    torch.manual_seed(0)
    generate("bytes", "other bytes", 1, do_sample=True)
    out, _ = generate("bytes", "other bytes", 1)
    assert out.tolist() == vanilla("bytes", 1).tolist()
    assert {name: id(parameter) for name, parameter in draft.named_parameters()} == before
    assert draft.generation_config.to_dict() == config


def test_the_bridge_is_made_once_and_again_after_new_tokens() -> None:
    target, draft = copy.deepcopy(tokenizer_of("bytes")), copy.deepcopy(tokenizer_of("other bytes"))
    bridge = bridge_between(target, draft)
    assert bridge_between(target, draft) is bridge
    draft.add_tokens(["<new>"])
    assert bridge_between(target, draft) is not bridge


def test_the_draft_stops_where_it_has_no_more_positions() -> None:
    draft = copy.deepcopy(model_of("other bytes"))
    draft.config.max_position_embeddings = 24
    tokenizers = tokenizer_of("bytes"), tokenizer_of("other bytes")
    stats = SpeculationStats()
    options: dict[str, Any] = {**inputs_of("bytes", 1), "max_new_tokens": 40, "do_sample": False}
    drafter = OtherTokenizerDrafter(draft, *tokenizers)
    out = model_of("bytes").generate(**options, assistant_model=drafter, strategy="spec", speculation_stats=stats)
    assert out.tolist() == model_of("bytes").generate(**options).tolist()
    assert 0 < stats.drafted_tokens < 25


# --------------------------------------------------------------------------------------------------------- bad input


def refused(match: str, error: type[Exception] = ValueError, target: Any = None, **call: Any) -> None:
    target = target or model_of("bytes")
    call = {"max_new_tokens": 4, "strategy": "spec", **inputs_of("bytes", 1), **call}
    with pytest.raises(error, match=match):
        target.generate(**{name: value for name, value in call.items() if value is not None})


def test_tokenizers_that_are_missing_or_swapped() -> None:
    target, draft = tokenizer_of("bytes"), tokenizer_of("other bytes")
    other = model_of("other bytes")
    refused("tokenizers are not known: pass both", assistant_model=other)
    refused("tokenizers are not known: pass both", assistant_model=other, tokenizer=target)
    refused("`assistant_tokenizer` has 420 tokens, but `assistant_model` .* knows only 390.*swapped",
            assistant_model=other, tokenizer=draft, assistant_tokenizer=target)  # fmt: skip
    with pytest.raises(ValueError, match="`by` must be 'token', 'text' or None, got 'word'"):
        OtherTokenizerDrafter(other, target, draft, by="word")  # type: ignore[arg-type]


def test_tokenizers_whose_tokens_say_nothing_about_bytes() -> None:
    backend = Tokenizer(models.WordLevel({f"piece{i}": i for i in range(50)} | {"?": 50}, unk_token="?"))
    backend.decoder = decoders.CTC()
    odd = PreTrainedTokenizerFast(tokenizer_object=backend)
    call: dict[str, Any] = {"assistant_model": model_of("other bytes"), "tokenizer": tokenizer_of("bytes")}
    refused(r"The tokens of `assistant_tokenizer` \(\w+\) cannot be mapped to bytes \(its decoder is a CTC\)",
            **call, assistant_tokenizer=odd)  # fmt: skip

    class Custom:
        def pre_tokenize(self, text: Any) -> None:
            """Nothing."""

    changed = copy.deepcopy(tokenizer_of("other bytes"))
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Custom())
    refused("cannot be mapped to bytes .it has parts that are written in Python", **call, assistant_tokenizer=changed)


def test_models_that_cannot_draft_across_tokenizers() -> None:
    call = {"tokenizer": tokenizer_of("bytes"), "assistant_tokenizer": tokenizer_of("other bytes")}
    sizes: dict[str, Any] = {"vocab_size": 390, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = make_model(MambaConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0))
    refused(r"MambaForCausalLM.*carries a state that cannot go back", assistant_model=mamba, **call)
    other = model_of("other bytes")
    refused("'draft'` does not compile drafts with another", assistant_model=other, speculation_compile="draft", **call)
    embeds = model_of("bytes").get_input_embeddings()(inputs_of("bytes", 1)["input_ids"]).detach()
    refused("`inputs_embeds` alone, which is no text", assistant_model=other, input_ids=None, inputs_embeds=embeds,
            **call)  # fmt: skip
    torch.manual_seed(0)
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    target = T5ForConditionalGeneration(T5Config(vocab_size=420, **t5)).eval()
    refused("does not support for encoder-decoder models", target=target, assistant_model=other, **call)


# ------------------------------------------------------------------------------------------------ transformers' own way


def test_transformers_own_sampling_across_tokenizers_is_biased(small: Any) -> None:
    """Seen in 5.23: its q belongs to other tokens than were drafted. If it is mended, this test is skipped."""
    target, draft, *tokenizers = small
    ids, mask = torch.tensor([PROMPT]), torch.ones(1, 3)
    torch.manual_seed(0)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    seen, draft = np.zeros(10), copy.deepcopy(draft)
    try:
        for _ in range(150):
            out = target.generate(
                ids, attention_mask=mask, assistant_model=draft, tokenizer=tokenizers[0],
                assistant_tokenizer=tokenizers[1], do_sample=True, max_new_tokens=2, top_k=0, num_assistant_tokens=1,
            )  # fmt: skip
            seen[int(out[0, 3])] += 1
    except Exception as error:
        pytest.skip(f"transformers cannot do this call: {error}")
    finally:
        logging.set_verbosity(verbosity)
    law = exact_law(small[0], PROMPT, 1, processors())
    if p_value(seen, law, np.full_like(law, 0.1)) > ALARM:
        pytest.skip("no bias was seen in this transformers")
