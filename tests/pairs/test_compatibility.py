"""The report on a pair: each property's verdict, and the table."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, VOCAB, Fragment, make_model, perturbed
from rich.console import Console
from test_pair import make_tokenizer
from transformers import (
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
)

from hf_specdec.pairs.compatibility import Compatibility, Finding, compare, vocabulary_check


def llama(**changes: Any) -> PreTrainedModel:
    return make_model(LlamaConfig(**{**SIZES, **changes}))


def small(**changes: Any) -> PreTrainedModel:
    """A draft, much smaller than `llama()` in all weights that are read."""
    return llama(**{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, **changes})


def report(draft: PreTrainedModel, target: PreTrainedModel | None = None, **tokenizers: Any) -> dict[str, Finding]:
    given = {"tokenizer": make_tokenizer(VOCAB), "draft_tokenizer": make_tokenizer(VOCAB), **tokenizers}
    return {finding.property: finding for finding in compare(target or llama(), draft, **given).findings}


def changed(change: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    model = small()
    change(model)
    return model


def with_added_token() -> Any:
    tokenizer = make_tokenizer(VOCAB)
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    return tokenizer


def test_a_draft_that_fits_gives_no_cause_for_notes():
    findings = report(small())
    assert list(findings) == [
        "architecture", "embeddings", "tokens", "bos / eos / pad", "positions", "dtype", "device", "parameters",
        "cost ratio",
    ]  # fmt: skip
    assert {finding.verdict for finding in findings.values()} == {"ok"}


CASES: dict[str, tuple[Callable[[], dict[str, Finding]], str, str, str]] = {
    "another tokenizer": (
        lambda: report(small(), draft_tokenizer=make_tokenizer(VOCAB, swapped=True)),
        "tokens", "note", "different tokenizers (2 ids, the first is 5, 'w5' in one of them): drafts are translated by",
    ),
    "fewer tokens": (
        lambda: report(small(), draft_tokenizer=make_tokenizer(VOCAB - 1)), "tokens", "note", "the first is 95, 'w95'",
    ),
    "more tokens than the draft knows": (
        lambda: report(small(), draft_tokenizer=make_tokenizer(VOCAB + 4)), "tokens", "error", "knows only 96",
    ),
    "an added token": (
        lambda: report(small(), draft_tokenizer=with_added_token()), "tokens", "note", "added tokens differ (1 ids",
    ),
    "no tokenizer": (
        lambda: report(small(), draft_tokenizer=None), "tokens", "note", "the draft has no tokenizer to compare",
    ),
    "no tokenizer, another size": (
        lambda: report(small(vocab_size=104), draft_tokenizer=None), "tokens", "error", "no tokenizer to compare",
    ),
    "padded embeddings": (lambda: report(small(vocab_size=104)), "embeddings", "note", "fine if the tokenizer is"),
    "another end": (
        lambda: report(changed(lambda model: setattr(model.generation_config, "eos_token_id", 7))),
        "bos / eos / pad", "note", "the target's are used",
    ),
    "fewer positions": (
        lambda: report(small(max_position_embeddings=128)), "positions", "note", "nothing is drafted beyond 128 tokens",
    ),
    "no positions of its own": (lambda: report(make_model(ARCHITECTURES["bloom"]())), "positions", "ok", ""),
    "another dtype": (lambda: report(small().to(torch.bfloat16)), "dtype", "note", "works; one dtype"),
    "another device": (lambda: report(small().to("meta")), "device", "error", "`assistant_model.to('cpu')`"),
    "too large": (lambda: report(llama(num_hidden_layers=3)), "parameters", "note", "use a smaller one"),
    "as dear as the target": (lambda: report(llama()), "cost ratio", "note", "rarely pays"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_property_has_its_verdict(case):
    make, name, verdict, advice = CASES[case]
    findings = make()
    assert findings[name].verdict == verdict
    assert advice in findings[name].advice
    errors = [finding.property for finding in findings.values() if finding.verdict == "error"]
    assert errors == ([name] if verdict == "error" else [])


def test_models_whose_states_cannot_follow_drafts_are_an_error():
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2)
    ).eval()
    own_state = make_model(
        RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 12})
    )
    finding = report(small(), mamba)["architecture"]
    assert finding.verdict == "error"
    assert "the target: the code of MambaForCausalLM does not continue a recurrent state" in finding.advice
    finding = report(own_state)["architecture"]
    assert finding.verdict == "error"
    assert "`assistant_model` (RecurrentGemmaForCausalLM) keeps state" in finding.advice
    assert report(mamba)["architecture"].verdict == "ok"  # drafts are made one token at a time


def test_what_generates_no_text_is_no_draft():
    draft = small()
    draft.can_generate = lambda: False  # type: ignore[method-assign]
    finding = report(draft)["architecture"]
    assert finding.verdict == "error"
    assert "LlamaForCausalLM cannot generate text" in finding.advice


def bytes_shown(model: PreTrainedModel) -> str:
    return report(model)["cost ratio"].draft


def test_the_price_of_a_token_is_the_weights_that_it_reads():
    layer = 2 * 8 + 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 8  # norms, q and o, k and v, mlp
    head = 96 * 8
    untied, tied = small(head_dim=2), small(head_dim=2, tie_word_embeddings=True)
    expected = 4 * (layer + 8 + head)
    assert bytes_shown(untied) == bytes_shown(tied) == f"{expected / 1e3:.3g} kB a token"
    assert untied.num_parameters() == tied.num_parameters() + head
    assert bytes_shown(untied.to(torch.bfloat16)) == f"{expected / 2e3:.3g} kB a token"


def test_of_experts_the_active_ones_are_read():
    sizes = {**SIZES, "hidden_size": 8, "intermediate_size": 64, "num_experts_per_tok": 2}
    few, many = (make_model(MixtralConfig(**sizes, num_local_experts=n)) for n in (2, 8))
    routers = 4 * 2 * 8 * (8 - 2)  # bytes, layers, hidden size, experts
    shown = [float(bytes_shown(model).split()[0]) for model in (few, many)]
    assert shown[1] - shown[0] == pytest.approx(routers / 1e3, abs=0.11)
    assert many.num_parameters() > 2 * few.num_parameters()


def test_the_estimate_says_that_it_is_one():
    finding = report(small())["cost ratio"]
    sizes = [float(shown.split()[0]) for shown in (finding.draft, finding.target)]
    assert f"c ≈ {sizes[0] / sizes[1]:.2f}, estimated from the weights" in finding.advice


def test_the_report_is_one_table():
    findings = Compatibility(
        (Finding("dtype", "float32", "bfloat16", "note", "works"), Finding("device", "cpu", "cpu"))
    )
    text = findings.to_text()
    assert str(findings) == text
    for line in ("│ dtype  │ float32 │ bfloat16 │ note │ works", "│ device │ cpu     │ cpu      │ ok   │"):
        assert line in text
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(findings)
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        line.rstrip() for line in text.splitlines()
    ]


def test_the_text_of_a_report_does_not_depend_on_where_it_is_made(monkeypatch):
    """In a notebook, rich displays its output itself; and a simple terminal has 80 columns."""
    findings = Compatibility((Finding("device", "cpu", "meta", "error", "move it, " * 12),))
    narrow, wide = str(findings), findings.to_text(width=200)
    assert "move it" in narrow and "meta" in wide
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert (str(findings), findings.to_text(width=200)) == (narrow, wide)
    with pytest.raises(ValueError, match=r"(?s)does not fit the target:.*meta.*move it"):
        findings.raise_errors()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert (str(findings), findings.to_text(width=200)) == (narrow, wide)


def test_a_notebook_shows_the_report_as_one_table():
    rows = [("dtype", "float32", "bfloat16", "note", "works"), ("tokens", "9", "8", "error", "<b>'[/INST]' & co</b>")]
    shown = Fragment(Compatibility(tuple(Finding(*row) for row in rows)))
    assert shown.tables == [[["", "target", "draft", "", "what to know or do"], *map(list, rows)]]
    assert shown.text == "Target and draft"
    (note, yellow), (error, red) = shown.chips
    assert (note, error) == ("note", "error") and yellow != red


def test_tokens_are_shown_as_they_are():
    tokenizer = make_tokenizer(VOCAB)
    tokenizer.add_tokens(["[/INST]"], special_tokens=True)
    assert "'[/INST]'" in str(compare(llama(), small(), make_tokenizer(VOCAB), tokenizer))


def test_errors_are_raised_with_their_rows_and_no_others():
    good, bad = Finding("dtype", "a", "b", "note"), Finding("device", "cpu", "meta", "error", "move it")
    Compatibility((good,)).raise_errors()
    with pytest.raises(ValueError, match=r"(?s)does not fit the target:.*device.*meta.*move it") as error:
        Compatibility((good, bad)).raise_errors()
    assert "dtype" not in str(error.value)


def test_a_vocabulary_is_known_by_its_tokens_and_their_ids():
    checks = [vocabulary_check(make_tokenizer(n, swapped)) for n, swapped in ((96, False), (96, True), (95, False))]
    assert [check["vocab_size"] for check in checks] == [96, 96, 95]
    assert len({check["sha256"] for check in checks}) == 3
    assert checks[0] == vocabulary_check(copy.deepcopy(make_tokenizer(96)))


def test_a_report_changes_nothing():
    draft = perturbed(small(), 0.1)
    before = copy.deepcopy(draft.state_dict())
    report(draft)
    assert all(weight.equal(before[name]) for name, weight in draft.state_dict().items())
