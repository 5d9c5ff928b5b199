"""benchmark_speed.py: its output, its exit code, its report."""

import html.parser
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hf_specdec.tools import figures, load, report
from hf_specdec.tools.measure import Comparison

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import benchmark_speed

FEW = ["--new-tokens", "6", "--rounds", "1", "--prompt-tokens", "16", "--device", "cpu"]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str
) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", ["benchmark_speed", *FEW, *given])
    code = benchmark_speed.main()
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file like Spec-Bench's: question_id, category, turns."""
    rows = [
        {"question_id": number, "category": category, "turns": [f"def {category}_{number}(self, name):\n", "And then?"]}
        for number, category in enumerate(["writing", "writing", "math", "math", "rag", "rag"])
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], questions: Path, tmp_path: Path
) -> None:
    """Three settings, all kinds of methods, tables, JSON and page."""
    page, file = tmp_path / "report.html", tmp_path / "figures.json"
    code, result, out = run(
        monkeypatch, capsys, "--dataset", str(questions), "--prompts", "3", "--batch", "1", "2",
        "--context", "own", "40", "--hf", "3", "--spec", "2", "4", "--lookup", "3", "--html", str(page),
        "--json", str(file),
    )  # fmt: skip
    assert code == 0 and result["identical"]
    assert json.loads(file.read_text(encoding="utf-8")) == result
    shapes = [(s["batch_size"], s["context"]) for s in result["settings"]]
    assert shapes == [(1, None), (1, 40), (2, None)]
    assert f"({result['instruction_set']}), {result['threads']} threads, float32\n" in out
    base, long, pairs = result["settings"]
    assert list(base["methods"]) == [
        "vanilla", "HF assisted γ=3", "hf_specdec γ=2", "hf_specdec γ=4", "HF look-up γ=3", "hf_specdec look-up γ=3",
    ]  # fmt: skip
    assert long["prompt_tokens"] == [40, 40]
    assert "batch_size = 1" in pairs["methods"]["HF assisted γ=3"]["refused"]
    assert "refused" in out and "batch_size = 1" in out
    assert set(base["methods"]["hf_specdec γ=4"]["categories"]) == {"writing", "math", "rag"}
    for name in ("writing", "math", "rag"):
        assert name in out
    for measured in base["methods"].values():
        assert measured["tokens_per_second"] > 0 and measured["differing_rows"] == 0
    ours = base["methods"]["hf_specdec γ=4"]
    assert ours["ideal"] > 0 and ours["efficiency"] > 0 and 0 <= ours["acceptance_rate"] <= 1
    assert {"over_assisted", "decode_over_assisted", "first_token_over_assisted"} <= ours.keys()

    text = page.read_text(encoding="utf-8")
    assert_well_formed(text)
    assert text.count("<svg") == 4 and "http://www.w3.org" in text
    assert "src=" not in text and "@import" not in text  # one file
    assert result["command"].split("--html")[0].split()[-1] in text
    for piece in ("Identical:", result["torch"], "refused: ", "Speed-up by category", "prefers-color-scheme"):
        assert piece in text


def test_tokens_that_differ_in_float32_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    warm_up = Comparison.warm_up

    def spoilt(self: Comparison) -> None:
        warm_up(self)
        self.records["hf_specdec γ=2"].differing.add(0)

    monkeypatch.setattr(Comparison, "warm_up", spoilt)
    given = ["--prompts", "1", "--batch", "1", "--context", "own", "--hf", "--lookup", "--spec", "2"]
    page = tmp_path / "report.html"
    code, result, out = run(monkeypatch, capsys, *given, "--html", str(page))
    assert code == 1 and not result["identical"] and "1/1 differ" in out
    assert "1 of 2 rows differ" in page.read_text(encoding="utf-8")
    code, result, out = run(monkeypatch, capsys, *given, "--dtype", "bfloat16")
    assert code == 0 and not result["identical"] and "1/1 differ" in out


def test_vanilla_alone_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--prompts", "1", "--batch", "1", "--context", "own", "--hf", "--lookup", "--spec"]
    code, result, _ = run(monkeypatch, capsys, *given, "--html", str(tmp_path / "report.html"))
    assert code == 0 and list(result["settings"][0]["methods"]) == ["vanilla"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--spec", "fast"], "expected a γ of at least 1, `default` or a schedule's name, got 'fast'"),
        (["--hf", "0"], "expected a γ of at least 1"),
        (["--batch", "0"], "expected at least 1, got 0"),
    ],
)
def test_arguments_that_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_speed", *given])
    with pytest.raises(SystemExit):
        benchmark_speed.main()
    assert message in capsys.readouterr().err


def test_a_context_beyond_the_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_speed", *FEW, "--context", "2045", "--prompts", "1", "--batch", "1"])
    with pytest.raises(SystemExit, match="has 2048 positions"):
        benchmark_speed.main()


def test_figures_take_the_colour_of_the_page() -> None:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "q1": value - 0.1, "q3": value + 0.1}

    def method(family: str, gamma: int | None, value: float, **more: Any) -> dict[str, Any]:
        given = {"speedup": spread(value), "decode_speedup": spread(value), "decode_ms": 9 / value}
        return {"family": family, "gamma": gamma, **given, "categories": {"a": spread(value)}, **more}

    methods = {
        "vanilla": method("vanilla", None, 1.0),
        "ours γ=2": method("hf_specdec", 2, 1.5, ideal=1.7, acceptance_by_position=[0.9, 0.8]),
    }
    setting = {"batch_size": 1, "prompt_tokens": [9, 9], "methods": methods}
    drawn = figures.draw_all({"settings": [setting]})
    assert set(drawn) == {"Speed-up by category", "Acceptance by position in the draft"}  # one γ, one context: no lines
    methods["ours γ=4"] = method("hf_specdec", 4, 1.8, ideal=2.0, acceptance_by_position=[0.9, 0.8, 0.7, 0.6])
    drawn = figures.draw_all({"settings": [setting, {**setting, "prompt_tokens": [90, 90]}]})
    assert len(drawn) == 4
    for svg in drawn.values():
        assert svg.startswith("<svg") and "currentColor" in svg and figures.INK not in svg
    assert figures.best(setting, "hf_specdec") == "ours γ=4"
    assert figures.best(setting, "HF assisted") == ""


def test_spreads_and_numbers_in_words() -> None:
    assert report.spread({"median": 1.256, "q1": 1.2, "q3": 1.3}) == "1.26x (1.20–1.30)"
    assert report.spread(None) == report.number(None) == report.percent(None) == ""
    assert report.bare_forwards({"missing": "a cache"}) == "no bare forwards: a cache"


def assert_well_formed(text: str) -> None:
    """Every element that is opened is closed, in order."""
    open_tags: list[str] = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert not open_tags


def test_beside_busy_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Any] = []
    begin = load.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        started.append(begin(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(load, "Popen", popen)
    few = ("--prompts", "1", "--batch", "1", "--context", "own", "--hf", "--spec", "2", "--lookup")
    code, result, out = run(monkeypatch, capsys, *few, "--busy", "2")
    assert (code, result["busy"], len(started)) == (0, 2, 2)
    assert "beside 2 busy processes" in out
    assert all(process.poll() is not None for process in started)  # none is left


def test_busy_processes_compute_and_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = (
        "import os, time; from hf_specdec.tools import load\n"
        "with load.busy(1): print(1, flush=True); time.sleep(1); os._exit(0)"
    )
    began = time.process_time(), os.times().children_user
    with load.busy(1):
        time.sleep(1.0)
    assert os.times().children_user - began[1] > 0.3
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
    time.sleep(2)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "numpy.ones((256, 256)" not in left
