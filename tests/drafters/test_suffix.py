"""SuffixDrafter: what it remembers and proposes, its file, and what calls with it give (tests of its data:
test_suffix_texts.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZES, VOCAB, make_model, make_pair, make_prompts, repeating_prompts
from transformers import BartConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_specdec import DraftRequest, SpeculationStats, SuffixDrafter
from hf_specdec.drafters.base import GoOn
from hf_specdec.sampling.context import Context
from hf_specdec.sampling.rules import Greedy

PAD = 0


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1, "initializer_range": 0.3}), seed=12)


def make_context(rows: list[list[int]]) -> Context:
    width = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return Context(prompt, [width - len(row) for row in rows], width + 50, PAD)


def propose(
    drafter: SuffixDrafter, rows: list[list[int]], max_tokens: int = 4, vocab: int = 100, go_on: GoOn | None = None
) -> list[list[int]]:
    """Proposals for the given texts; the call ends, so they are remembered."""
    context = make_context(rows)
    drafter.start(DraftRequest(Greedy(), vocab, go_on=go_on), context)
    draft = drafter.propose(context, max_tokens)
    drafter.end()
    assert draft.confidence is not None and draft.probs is None
    assert [len(sure) for sure in draft.confidence] >= draft.row_lengths
    return [tokens[:n] for tokens, n in zip(draft.tokens.tolist(), draft.row_lengths, strict=True)]


# ------------------------------------------------------------------------------------------------------- proposals


def test_it_proposes_what_followed_in_the_row_in_other_rows_and_in_earlier_calls() -> None:
    drafter = SuffixDrafter()
    assert propose(drafter, [[1, 2, 3, 4, 9, 1, 2]]) == [[3, 4, 9, 1]]
    assert propose(drafter, [[5, 6, 7, 8], [40, 5, 6]]) == [[], [7, 8]]
    assert propose(drafter, [[30, 3, 4]]) == [[9, 1, 2]]  # of the first call
    assert propose(drafter, [[31, 40, 5]]) == [[6]]  # of the second
    assert propose(SuffixDrafter(), [[30, 3, 4]]) == [[]]


def test_a_longer_run_elsewhere_beats_a_shorter_one_in_the_row() -> None:
    drafter = SuffixDrafter([[1, 2, 3, 4, 50, 51]])
    row = [4, 60, 61, 7, 1, 2, 3, 4]
    assert propose(SuffixDrafter(), [row], 2) == [[60, 61]]
    assert propose(drafter, [row], 2) == [[50, 51]]
    assert propose(SuffixDrafter(), [row, [1, 2, 3, 4, 70, 71]], 2)[0] == [70, 71]


def test_the_rows_own_text_counts_more_than_other_rows() -> None:
    """After runs of equal length, in which the own text agrees with itself and the others do not."""
    own = [1, 2, 3, 8, 1, 2]
    others = [[20 + i, 1, 2, 30 + i] for i in range(4)]
    assert propose(SuffixDrafter(), [own, *others], 1)[0] == [3]


def test_nothing_is_proposed_that_is_not_in_the_vocabulary() -> None:
    """Ids of an earlier call with another target, of a corpus, and placeholders in a prompt."""
    drafter = SuffixDrafter([[1, 2, 3, 150], [1, 4, 7000, 5]])
    assert propose(drafter, [[9, 1, 2]], vocab=200) == [[3, 150]]
    assert propose(drafter, [[8, 1, 2]], vocab=100) == [[3]]
    assert propose(drafter, [[7, 1, 4]], vocab=100) == [[]]
    assert propose(drafter, [[150, 11, 12, 150, 11]], vocab=100) == [[12]]
    assert propose(drafter, [[150, 11]], vocab=200) == [[12]]  # 150 was not a token when it was remembered
    assert propose(drafter, [[-200, 21, 22, -200, 21]], vocab=100) == [[22]]


def test_only_active_rows_are_asked_in_their_order() -> None:
    context = make_context([[1, 2, 1], [3, 4, 3], [5, 6, 5]])
    drafter = SuffixDrafter()
    drafter.start(DraftRequest(Greedy(), 100), context)
    context.rows = [2, 0]
    draft = drafter.propose(context, 1)
    assert draft.tokens.tolist() == [[6], [2]]


def test_the_schedule_decides_how_far_drafts_go() -> None:
    """It is told how sure the tokens of each row are, and 0 where a row has no more."""
    told: list[list[float]] = []

    def go_on(confidence: list[float]) -> bool:
        told.append(confidence)
        return len(told) < 3

    rows = [[1, 2, 3, 4, 5, 6, 7, 9, 1, 2], [1, 30, 40]]
    assert propose(SuffixDrafter([[40, 41]]), rows, 8, go_on=go_on) == [[3, 4, 5], [41]]
    assert told == [[2 / 3, 1 / 2], [3 / 4, 0.0], [4 / 5, 0.0]]


def test_texts_of_a_call_are_remembered_once_each_and_only_as_far_as_committed(target: PreTrainedModel) -> None:
    drafter = SuffixDrafter()
    prompts = make_prompts(2)
    options: dict[str, Any] = {"strategy": "spec", "assistant_model": drafter, "max_new_tokens": 20, "do_sample": True}
    torch.manual_seed(0)
    out = target.generate(**prompts, **options, num_return_sequences=3)
    texts = [text.tokens.tolist() for text in drafter._memory]
    rows = [row[row.ne(PAD).nonzero()[0, 0] :].tolist() for row in out]
    assert texts == rows  # prompts that are shared are there to be compared with
    fresh = [len(text.tokens) - text.known for text in drafter._memory]
    assert fresh == [len(rows[0]), 21, 21, len(rows[3]), 21, 21]
    assert drafter.remembered_texts == 6 and drafter.remembered_tokens == sum(map(len, rows))


def test_a_call_that_raises_an_error_is_remembered_too(target: PreTrainedModel) -> None:
    """As far as it came; the next call finds the drafter as it should be."""

    class Interrupted(Exception):
        pass

    class Streamer:
        pieces = 0

        def put(self, value: torch.Tensor) -> None:
            self.pieces += 1
            if self.pieces == 6:
                raise Interrupted

        def end(self) -> None:
            pass

    drafter = SuffixDrafter()
    prompts = make_prompts(1)
    options: dict[str, Any] = {"strategy": "spec", "assistant_model": drafter, "max_new_tokens": 20, "do_sample": False}
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False)[0]
    with pytest.raises(Interrupted):
        target.generate(**prompts, **options, streamer=Streamer())
    (kept,) = (text.tokens.tolist() for text in drafter._memory)
    assert 14 + 5 <= len(kept) < 34 and kept == expected[: len(kept)].tolist()
    stats = SpeculationStats()
    assert target.generate(**prompts, **options, speculation_stats=stats)[0].equal(expected)
    first = stats.iterations[0]
    assert first["accepted"] == first["drafted"] and first["drafted"][0] > 1
    # Before the loop begins nothing is remembered, and nothing is left over.
    with pytest.raises(ValueError, match="num_beams"):
        target.generate(**prompts, **options, num_beams=2)
    assert drafter.remembered_texts == 2 and drafter._texts is None


# ------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_greedy_calls_give_what_the_target_says(name: str) -> None:
    target, _ = make_pair(name)
    drafter = SuffixDrafter()
    stats = SpeculationStats()
    for rows in (1, 3, 8):
        prompts = repeating_prompts(rows)
        expected = target.generate(**prompts, max_new_tokens=40, do_sample=False)
        drafter._memory.add(_changed(expected[0], every=7))
        for gamma in (1, 4, 9):
            out = target.generate(
                **prompts,
                max_new_tokens=40,
                do_sample=False,
                strategy="spec",
                assistant_model=drafter,
                num_assistant_tokens=gamma,
                speculation_stats=stats,
            )
            assert out.equal(expected), f"{rows} rows, γ = {gamma}"
            drafter._memory = SuffixDrafter()._memory  # else the next call would copy this one
            drafter._memory.add(_changed(expected[-1], every=7))
    assert 0.05 < stats.acceptance_rate < 0.95


def _changed(tokens: torch.Tensor, every: int) -> Any:
    """A text to remember: with errors."""
    from hf_specdec.drafters.suffix_texts import Text

    ids = tokens.numpy().astype(np.int32)
    return Text(np.where(np.arange(len(ids)) % every == 0, (ids + 1) % VOCAB, ids).astype(np.int32))


def test_a_second_call_copies_the_first() -> None:
    target, _ = make_pair("llama")
    prompts = make_prompts(3)
    drafter = SuffixDrafter()
    options: dict[str, Any] = {"strategy": "spec", "assistant_model": drafter, "max_new_tokens": 30, "do_sample": False}
    forwards = []
    for _ in range(2):
        stats = SpeculationStats()
        out = target.generate(**prompts, **options, num_assistant_tokens=9, speculation_stats=stats)
        assert out.equal(target.generate(**prompts, max_new_tokens=30, do_sample=False))
        forwards.append(stats.target_forwards)
    assert forwards[1] <= 5 < forwards[0]


def test_targets_of_different_vocabularies_share_a_drafter() -> None:
    drafter = SuffixDrafter()
    small, large = (
        make_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1, "vocab_size": n, "initializer_range": 0.4}), seed=n)
        for n in (40, 96)
    )
    prompts = {name: values % 40 for name, values in make_prompts(2).items()}
    for model in (large, small, large, small):
        options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
        expected = model.generate(**prompts, **options)
        assert model.generate(**prompts, **options, strategy="spec", assistant_model=drafter).equal(expected)
    assert drafter.remembered_texts == 8


def test_encoder_decoder_targets_copy_what_the_encoder_read() -> None:
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.4, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    from transformers import BartForConditionalGeneration

    target = BartForConditionalGeneration(config).eval()
    prompts = make_prompts(3)
    expected = target.generate(**prompts, max_new_tokens=24, do_sample=False)
    # What the encoder reads holds the output, so copies from there are right in part.
    ids = torch.cat([prompts["input_ids"], expected[:, 1:13]], dim=1)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 12), value=1)
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    stats = SpeculationStats()
    out = target.generate(
        **options, strategy="spec", assistant_model=SuffixDrafter(max_requests=0), speculation_stats=stats
    )
    assert out.equal(target.generate(**options))
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


# -------------------------------------------------------------------------------------------------- corpus and files


def test_a_corpus_may_be_texts_or_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    forms: list[Any] = [["the cat sat"], [ids], [tuple(ids)], [torch.tensor(ids)], [np.array(ids)], iter([ids])]
    for corpus in forms:
        drafter = SuffixDrafter(corpus, tokenizer if corpus is forms[0] else None)
        assert [text.tokens.tolist() for text in drafter._memory] == [ids]
        assert propose(drafter, [[95, *ids[:3]]], 2) == [ids[3:5]]
    assert SuffixDrafter([], None).remembered_texts == SuffixDrafter([[]]).remembered_texts == 0
    assert repr(SuffixDrafter([[1, 2, 3]])) == "SuffixDrafter(1 texts, 3 tokens)"


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    drafter = SuffixDrafter(
        [[1, 2, 3], [4, 5]], depth=32, factor=2.5, min_probability=0.2, max_tokens=99, max_requests=7
    )
    propose(drafter, [[8, 9, 8], [8, 9, 8]])
    propose(drafter, [[1, 200, 3]])
    path = tmp_path / "memory"
    drafter.save(path)
    loaded = SuffixDrafter.load(path)
    kept = [[(text.tokens.tolist(), text.known) for text in each._memory] for each in (drafter, loaded)]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    for name in ("depth", "factor", "min_probability"):
        assert getattr(loaded, name) == getattr(drafter, name)
    assert (loaded._memory.max_tokens, loaded._memory.max_requests) == (99, 7)
    rows = [[7, 4], [6, 1, 2], [8, 9]]
    assert propose(loaded, rows) == propose(drafter, rows) == [[5], [3], [8]]
    SuffixDrafter().save(path)  # replaces the file
    assert SuffixDrafter.load(str(path)).remembered_texts == 0


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        SuffixDrafter.load(tmp_path / "missing")
    with pytest.raises(OSError, match="nowhere"):
        SuffixDrafter([[1]]).save(tmp_path / "nowhere" / "file")
    text = tmp_path / "text"
    text.write_text("not a drafter", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text is not a file that SuffixDrafter.save\(\) has written: "):
        SuffixDrafter.load(text)
    from safetensors.numpy import save_file

    save_file({"tokens": np.zeros(3, np.int32)}, str(tmp_path / "weights"))
    with pytest.raises(ValueError, match=r"weights is not a file that .* its format is None instead of"):
        SuffixDrafter.load(tmp_path / "weights")
    SuffixDrafter([[1, 2, 3]]).save(tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-2])
    with pytest.raises(ValueError, match="cut is not a file"):
        SuffixDrafter.load(tmp_path / "cut")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"corpus": "a text"}, TypeError, r"`corpus` must be an iterable of strings or .*, got str: pass \[text\]"),
    ({"corpus": {"text": "a"}}, TypeError, "`corpus` must be an iterable of strings or .*, got dict"),
    ({"corpus": 5}, TypeError, "`corpus` must be an iterable of strings or .*, got int"),
    ({"corpus": [[1], "a text"]}, ValueError, "`corpus` has a string at index 1, which takes a tokenizer to read"),
    ({"corpus": [[1], 7]}, TypeError, "`corpus` must hold strings or lists of token ids, got at index 1 a int"),
    ({"corpus": [[1, "b"]]}, TypeError, "got at index 0 'b' of type str among the ids"),
    ({"corpus": [[1, 2.5]]}, TypeError, "got at index 0 2.5 of type float among the ids"),
    ({"corpus": [torch.ones(2)]}, TypeError, "got at index 0 .*1.0.* among the ids"),
    ({"corpus": [torch.ones(2, 2).long()]}, ValueError, r"got at index 0 an array of shape \(2, 2\)"),
    ({"corpus": [[1, -5]]}, ValueError, "got at index 0 ids from -5 to 1: expected ids from 0 to 2147483647"),
    ({"corpus": [[1, 2**31]]}, ValueError, "got at index 0 ids from 1 to 2147483648"),
    ({"tokenizer": object()}, ValueError, "`tokenizer` is for the texts of `corpus`, which was not given"),
    ({"depth": 0}, ValueError, "`depth` must be at least 1, got 0"),
    ({"depth": 2000}, ValueError, "`depth` must be at most 1024, got 2000"),
    ({"depth": 2.0}, TypeError, "`depth` must be an int, got 2.0 of type float"),
    ({"max_tokens": 0}, ValueError, "`max_tokens` must be at least 1, got 0"),
    ({"max_requests": -1}, ValueError, "`max_requests` must be at least 0, got -1"),
    ({"max_requests": True}, TypeError, "`max_requests` must be an int, got True of type bool"),
    ({"factor": 0}, ValueError, "`factor` must be above 0 and finite, got 0"),
    ({"factor": float("nan")}, ValueError, "`factor` must be above 0 and finite, got nan"),
    ({"factor": "2"}, TypeError, "`factor` must be a number, got '2' of type str"),
    ({"min_probability": 1.5}, ValueError, "`min_probability` is a probability between 0 and 1, got 1.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SuffixDrafter(**arguments)
