"""The tools report only what they measured: they fail, or draw no conclusion, if nothing was shown."""

import argparse
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model, perturbed
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_specdec import options
from hf_specdec.cli import main as command
from hf_specdec.pairs.card import card_text
from hf_specdec.pairs.compatibility import Compatibility, Finding
from hf_specdec.pairs.pair_file import ModelReference, PairConfig
from hf_specdec.tools import bootstrap, distillation, progress, quality, tuning
from hf_specdec.tools.lossless import Rounding
from hf_specdec.tools.measure import Method, Record, Run
from hf_specdec.tools.recipe import Recipe
from hf_specdec.tools.settings import Setting
from hf_specdec.tools.summary import Spread

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------- evaluate_quality


def drafting(*given: str, recommended: dict[str, Any] | None = None) -> dict[str, Any]:
    evaluate = script("evaluate_quality")
    pair = SimpleNamespace(config=PairConfig(recommended=recommended or {}))
    found: dict[str, Any] = evaluate.drafting(evaluate.parse(list(given)), pair)
    return found


def test_quality_is_compared_with_a_constant_draft_length_unless_told_otherwise() -> None:
    """Also though the library's own schedule depends on measured times."""
    schedule, gamma = "num_assistant_tokens_schedule", "num_assistant_tokens"
    assert drafting() == {schedule: "constant"}
    assert drafting(recommended={schedule: "optimal", gamma: 3}) == {schedule: "optimal", gamma: 3}
    told = drafting("--schedule", "heuristic", "--gamma", "7", recommended={schedule: "optimal", gamma: 3})
    assert told == {schedule: "heuristic", gamma: 7}


def test_the_schedule_reaches_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(options.DEFAULTS, "num_assistant_tokens_schedule", "optimal")
    evaluate, calls = script("evaluate_quality"), []
    monkeypatch.setattr(quality, "generate", lambda *args, **options: calls.append(options) or [])
    pair = SimpleNamespace(config=PairConfig(), target=None, draft="draft")
    evaluate.measure("greedy", evaluate.parse([]), pair, [], Console(file=io.StringIO()))
    assert [call.get("num_assistant_tokens_schedule") for call in calls] == [None, "constant"]


def failures(drafted: int, accepted: int, dtype: str = "bfloat16", identical: bool = True) -> list[str]:
    modes = {mode: {"acceptance": {"drafted_tokens": drafted, "accepted_tokens": accepted}} for mode in ("greedy",)}
    modes["sampled"] = {"acceptance": {"drafted_tokens": 9, "accepted_tokens": 1}}
    found: list[str] = script("evaluate_quality").find_failures({"dtype": dtype, "identical": identical, **modes})
    return found


def test_quality_fails_where_no_draft_was_accepted() -> None:
    assert failures(9, 1) == failures(9, 1, identical=False) == []
    assert failures(0, 0) == ["greedy: nothing was ever drafted, so nothing is shown: check that target and draft fit"]
    assert "none of 9 drafts was accepted" in failures(9, 0)[0]
    assert "is a bug" in failures(9, 1, "float32", identical=False)[0]


@pytest.mark.usefixtures("evaluate_cache")
def test_a_whole_run_without_drafts_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One new token leaves no room for a draft. With 2 prompts there is no interval in the JSON either."""
    monkeypatch.setenv("COLUMNS", "80")
    few = ["--prompts", "2", "--new-tokens", "1", "--seeds", "2", "--prompt-tokens", "8", "--metrics"]
    assert script("evaluate_quality").main(few) == 1
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert ["nothing was ever drafted" in why for why in result["failures"]] == [True, True]
    assert "interval" not in json.dumps(result["sampled"]) and "too few" in " ".join(lines[:-1])
    assert max(map(len, lines[:-1])) <= 80


@pytest.mark.parametrize(("prompts", "shown"), [(7, False), (8, True)])
def test_fewer_than_8_prompts_give_no_interval(prompts: int, shown: bool) -> None:
    values = np.arange(prompts, dtype=float)
    assert ("interval" in quality.Comparison("x", values, values + 1).to_dict(interval=True)) == shown


# ---------------------------------------------------------------------------------------------------------------- tune


def contender(costs: list[float], options: dict[str, Any] | None = None, rounds: int = 3) -> tuning.Contender:
    """A contender whose time per token, batch by batch, is `costs` times vanilla's; each batch has 10 tokens."""

    def record(each: list[float]) -> Record:
        runs = [Run(10 * cost, 0.0, 10, 1, 10 * cost, 10) for cost in each]
        return Record(Method("x", "hf_specdec"), [runs] * rounds)

    vanilla, ours = record([1.0] * len(costs)), record(costs)
    speedup = Spread.of([len(costs) / sum(costs)] * rounds)
    return tuning.Contender("x", options or {}, ours, speedup, tuning.interval(vanilla, ours))


def setting(batches: int, rows: int = 1) -> Setting:
    return Setting(rows, None, [{"attention_mask": torch.ones(rows, 3)}] * batches, ["all"] * batches)


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        ([0.5, 0.52] * 4, ""),  # pays
        ([1.5, 1.52] * 4, ""),  # does not, just as clearly
        ([0.5, 0.52, 0.5], "3 prompts cannot show how much speed-ups vary; 8 can"),
        ([0.5] * 7, "7 prompts cannot show"),
        ([0.5, 1.8] * 4, "it is unclear whether speculation pays"),
        ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.5], "too wide for a choice"),
    ],
)
def test_tune_concludes_from_enough_prompts_alone(costs: list[float], reason: str) -> None:
    doubt = tuning.doubt(contender(costs), setting(len(costs)))
    assert reason in doubt and bool(doubt) == bool(reason)


def test_rounds_are_no_prompts() -> None:
    """Repeating the same text says nothing about other text."""
    few, many = (contender([0.5, 0.9] * 5, rounds=rounds) for rounds in (3, 20))
    assert few.interval == many.interval
    doubt = tuning.doubt(contender([0.5] * 3, rounds=20), setting(3, rows=8))
    assert doubt.startswith("3 batches of 8 prompts cannot show")


def test_the_interval_of_a_mean_holds_about_as_often_as_is_said() -> None:
    """600 samples of 8: 89 % ± 4 % (three standard deviations); intervals from 4 would cover 79 %."""
    draw = np.random.default_rng(5)
    samples = draw.normal(size=(600, bootstrap.LEAST))
    inside = [low <= 0 <= high for low, high in (bootstrap.interval(8, lambda i, x=x: x[i].mean(1)) for x in samples)]
    assert 0.85 <= np.mean(inside) <= 0.93


def test_without_a_conclusion_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ["--prompts", "2", "--new-tokens", "4", "--minutes", "0", "--prompt-tokens", "8", "--device", "cpu"]
    few += ["--gamma", "2", "--schedule", "--confidence", "--write", str(tmp_path / "pair")]
    monkeypatch.setattr(sys, "argv", ["tune", *few])
    code = script("tune").main()
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert code == 1 and not (tmp_path / "pair").exists()
    assert result["speculate"] is None and not result["recommended"] and "2 prompts cannot show" in result["doubt"]
    assert "No conclusion, and nothing is written" in printed


# ------------------------------------------------------------------------------------------------------- distill_draft

TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}so {% endif %}"


def read(path: Path, tokenizer: PreTrainedTokenizerFast, **given: Any) -> tuple[list[list[int]], list[list[int]]]:
    args = {"dataset": str(path), "chat_template": True, "prompts": 2, "prompt_tokens": 5, "block_tokens": 7}
    args |= {"column": None, "reference_column": None, "category_column": "category", "split": "train"}
    args |= {"dataset_config": None}
    found: tuple[list[list[int]], list[list[int]]] = script("distill_draft").read_text(
        argparse.Namespace(**args | given), tokenizer
    )
    return found


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_shortened_chat_keeps_the_assistants_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    texts = [f"{word} one two three four five six" for word in ("abc", "def", "ghi", "jkl", "mno")]
    path = tmp_path / f"chats.{suffix}"
    path.write_text("\n".join(json.dumps({"text": text}) if suffix == "jsonl" else text for text in texts))
    training, held = read(path, tokenizer)
    assert len(training) == 3 and len(held) == 2
    for row in training + held:
        text = tokenizer.decode(row)
        assert text.startswith("<bos>") and text.endswith("\nso ")  # the template is whole
        asked = text.removeprefix("<bos>").removesuffix("\nso ")
        assert any(each.startswith(asked) for each in texts) and len(tokenizer(asked)["input_ids"]) == 5


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_model(ARCHITECTURES["llama"](), seed=3)


PIECES = [[2 + (7 * i + j) % 90 for j in range(4 + i % 3)] for i in range(30)]


def test_examples_say_which_tokens_are_a_prompts(target: PreTrainedModel) -> None:
    for prompt_tokens in (3, None):
        data = distillation.examples(target, None, PIECES, 4, prompt_tokens, 5, 1.0, seed=0)
        for kind, row, mask in zip(data["kind"], data["input_ids"], data["completion_mask"]):
            written = len(row) if kind == "text" else 5
            written = 0 if kind == "text" and prompt_tokens is None else written  # texts are then prompts, too
            assert mask == [0] * (len(row) - written) + [1] * written


def test_prompt_tokens_can_be_left_out_of_the_loss(target: PreTrainedModel) -> None:
    """The loss covers the positions that predict the target's tokens, computed by hand."""
    data = distillation.examples(target, None, PIECES, 3, None, 5, 1.0, seed=0)
    draft = perturbed(target, 0.5)
    losses = {}
    for only in (False, True):
        recipe = Recipe(steps=1, rows=6, argmax_weight=0.0, completion_only_loss=only)
        run = distillation.Distillation(perturbed(target, 0.5), target, data, recipe)
        rows = list(run._loader)
        losses[only] = float(run._loss(rows[0]))
        chosen, terms = rows[0]["input_ids"], []
        for ids, mask in zip(chosen, rows[0]["attention_mask"]):
            row = ids[mask.bool()]
            known = next(i for i, each in enumerate(data["input_ids"]) if each == row.tolist())
            first = data["completion_mask"][known].index(1) - 1 if only else 0
            p, q = (model(row[None]).logits[0, first:].log_softmax(-1) for model in (target, draft))
            terms += (p.exp() * (p - q)).sum(-1).tolist()
        assert losses[only] == pytest.approx(np.mean(terms), rel=1e-4)
        assert ("text" in {data["kind"][list(data["input_ids"]).index(r[: m.sum()].tolist())]
            for r, m in zip(chosen, rows[0]["attention_mask"])}) <= (not only)  # fmt: skip
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)
    with pytest.raises(ValueError, match="`completion_only_loss` leaves nothing to learn from"):
        distillation._with_masks(data.filter(lambda row: row["kind"] == "text"), True)


def test_a_log_file_gets_a_line_now_and_then_and_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    log = Console(file=io.StringIO(), force_terminal=False, width=80)
    with progress.progress(log, "training", 10) as advance:
        for step in range(1, 11):
            advance(step, f"loss {step / 10}")
    lines = log.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    assert lines[-1] == "training: 10 of 10, loss 1.0" and 3 <= len(lines) <= 5
    monkeypatch.undo()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress.progress(terminal, "training", 2) as advance:
        advance(2)
    assert "━" in terminal.file.getvalue() and "of" not in terminal.file.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ check_lossless


def test_the_noise_leaves_room_for_what_other_positions_show() -> None:
    """Measured at 48 positions or at 768, twice the noise is far above all differences at ten times as many.

    Each difference is the largest of 20 normal ones. Over 50 draws they reach at most 0.57 of twice the noise, and
    would reach 0.74 of twice the largest difference measured.
    """
    draw = np.random.default_rng(0)
    for count in (48, 768):
        margins = []
        for _ in range(50):
            measured, others = (np.abs(draw.normal(size=(n, 20))).max(1) for n in (count, 10 * count))
            noise = Rounding(measured.tolist()).noise
            assert noise >= measured.max()
            margins.append(others.max() / (2 * noise))
        assert max(margins) < 0.6 and np.mean(margins) < 0.5
    assert Rounding().noise == 0 and Rounding([0.5]).noise == 0.5


# ------------------------------------------------------------------------------------------------ check, cards, tables


def test_check_says_that_a_model_is_no_pair(
    small_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, gguf = tmp_path / "model", tmp_path / "gguf"
    small_pair[0].save_pretrained(folder)
    gguf.mkdir()
    (gguf / "a.gguf").touch()
    expected = {
        folder: f"{folder} is a model, not a pair: it has no specdec_pair.json. Name a draft for it: --target {folder} "
        "--draft DRAFT",
        gguf: f"--target {gguf} --gguf-file a.gguf --draft DRAFT",
        tmp_path: "holds neither a pair (specdec_pair.json) nor a model (config.json)",
    }
    for path, message in expected.items():
        assert command(["check", str(path)]) == 1
        assert message in capsys.readouterr().err


def test_cards_hold_no_absolute_paths() -> None:
    measured = [
        {
            "command": "./scripts/tune --target /home/me/models/big --write=/home/me/out 'a b'",
            "draft": "/home/me/small",
        },
        {"command": "tune --draft /home/me/it's", "n": 3},
    ]
    config = PairConfig(ModelReference("/home/me/models/big"), ModelReference("org/small"), measured=measured)
    text = card_text("/home/me/out/my-pair", config, {"target": None, "draft": None})
    assert "/home" not in text and "me/" not in text
    for piece in (
        'from_pretrained("my-pair")',
        "`big`",
        "--target big --write=out 'a b'",
        "| small |",
        "base_model: org/",
    ):
        assert piece in text.replace("base_model:\n- org/", "base_model: org/")


def printed(show: Any, *args: Any, width: int = 80, **kwargs: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(console, *args, **kwargs)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert max(map(len, text.splitlines())) <= width, text
    assert "…" not in text
    return text


LONG = "Qwen3VeryLongMultimodalMixtureForConditionalGeneration"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_report_fits_the_terminal(width: int) -> None:
    advice = "the draft has no tokenizer to compare: put the one that it was trained with into its folder " * 2
    findings = [Finding("architecture", LONG, LONG + "2"), Finding("tokens", "151,936", "unknown", "note", advice)]
    report = Compatibility(tuple(findings))
    text = printed(Console.print, report, width=width)
    assert " ".join(advice.split()[:4]) in " ".join(text.split()) and "architecture" in text
    assert max(map(len, str(report).splitlines())) <= 80
    assert "what to know or do" not in text
    short = Compatibility((Finding("tokens", "96", "unknown", "note", "no tokenizer"),))
    assert "note │ no tokenizer" in printed(Console.print, short, width=width)


def test_tables_fit_80_columns() -> None:
    spread = {"median": 11.256, "q1": 10.25, "q3": 13.375}
    method = {
        "family": "hf_specdec", "tokens_per_second": 12345.6, "speedup": spread, "decode_speedup": spread,
        "over_assisted": spread, "first_token_ms": 12345.0, "first_token_speedup": spread, "acceptance_rate": 0.5,
        "block_efficiency": 2.5, "ideal": 10.5, "efficiency": 0.5, "peak_bytes": 2**33, "rows": 16, "differing_rows": 3,
        "compared": True,
        "categories": {name: spread for name in ("writing", "roleplay", "reasoning", "mathematics", "coding")},
    }  # fmt: skip
    methods = {name: method for name in ("vanilla", "hf_specdec heuristic_transient unpacked")}
    methods["HF assisted γ=5"] = {"family": "HF assisted", "refused": f"{LONG} is of no use " * 5}
    result = {"label": "4 rows, 12–512 prompt tokens", "bare": {"missing": "a cache " * 20}, "methods": methods}
    text = printed(script("benchmark_speed").show, result)
    assert text.count("11.26x (10.25–13.38)") == 2 * (2 + 5) and text.count("13/16") == 0 and text.count("3/16") == 2

    row = {"vanilla": 1234.5, "speculative": 1234.6, "difference": 0.1, "equal": False}
    interval = {"interval": [-123.5, 123.5], "contains_0": True}
    figures = {"token agreement, reference": row | interval, "bleu": row}
    text = printed(script("evaluate_quality").show, "sampled", figures, {"rouge": ""}, sampled=True)
    assert "+0.100 [-123.500, +123.500]" in text and "too few" in text
