"""tune.py: the race, its conclusion, and the pair file that generate() then uses."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_prompts
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec.pairs import DEMO_PAIR, SpecPair
from hf_specdec.pairs.pair_file import FILE_NAME, ModelReference, PairConfig
from hf_specdec.tools import tuning
from hf_specdec.tools.bare import BareForwards
from hf_specdec.tools.measure import Comparison, Method, Record
from hf_specdec.tools.settings import Setting
from hf_specdec.tools.summary import Spread
from hf_specdec.tools.tuning import Contender, candidates, outcome, pair_file_for, race

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import tune

CONSTANT = {"num_assistant_tokens_schedule": "constant"}


def contender(*speedup: float, **options: Any) -> Contender:
    return Contender("x", options, Record(Method("x", "hf_specdec")), Spread(*speedup))


def raced(pair: tuple[PreTrainedModel, PreTrainedModel], names: str, seconds: float) -> list[Contender]:
    spec_pair = SpecPair(*pair, None)  # type: ignore[arg-type]
    tried = {name: {"num_assistant_tokens": int(name), **CONSTANT} for name in names}
    setting = Setting(1, None, [make_prompts(1)], ["all"])
    return race(spec_pair, tried, setting, 4, seconds, BareForwards(*pair))


def test_candidates_are_options_of_generate() -> None:
    tried = candidates([5, 2, 8], ["heuristic"], [0.4])
    assert list(tried.values()) == [
        {"num_assistant_tokens": 2, **CONSTANT},
        {"num_assistant_tokens": 5, **CONSTANT},
        {"num_assistant_tokens": 8, **CONSTANT},
        {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic"},
        {"num_assistant_tokens": 8, **CONSTANT, "assistant_confidence_threshold": 0.4},
    ]


def test_the_slower_half_drops_out(small_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up speeds: γ = 3 is best, and others are slower the further they are from it."""
    speeds = {"1": 1.1, "2": 1.4, "3": 1.5, "4": 1.3, "5": 1.2, "6": 0.9, "7": 0.8, "8": 0.7}

    def made_up(slow: Record, fast: Record) -> Spread:
        return Spread(*[speeds[fast.method.name[-1]]] * 3)

    monkeypatch.setattr(tuning, "ratio", made_up)
    contenders = raced(small_pair, "12345678", seconds=1000)
    assert [c.name for c in contenders] == list("32451678")
    assert [len(c.record.rounds) for c in contenders] == [tuning.MOST_ROUNDS] * 2 + [2] * 2 + [1] * 4
    short = raced(small_pair, "12345678", seconds=0)
    assert [c.name for c in short[:2]] == ["3", "2"]
    assert [len(c.record.rounds) for c in short] == [tuning.LEAST_ROUNDS] * 2 + [1] * 6


def test_a_single_candidate_is_measured_too(small_pair: Any) -> None:
    (only,) = raced(small_pair, "2", seconds=0)
    assert len(only.record.rounds) == tuning.LEAST_ROUNDS
    assert only.speedup.q1 <= only.speedup.median <= only.speedup.q3


def test_what_pays_is_recommended_and_what_does_not_is_said() -> None:
    config = PairConfig(recommended={"num_assistant_tokens": 9}, measured=[{"date": "before"}])
    entry = {"date": "now"}
    pays = outcome(config, contender(1.3, 1.0, 1.4, num_assistant_tokens=4), entry)
    assert pays.speculate and pays.recommended == {"num_assistant_tokens": 4}
    assert pays.measured == [{"date": "before"}, entry]
    does_not = outcome(config, contender(1.2, 0.99, 1.4, num_assistant_tokens=4), entry)
    assert not does_not.speculate and does_not.recommended == {}


@pytest.fixture(scope="module")
def embedded() -> SpecPair:
    return SpecPair.from_pretrained(DEMO_PAIR, dtype=torch.float32)


def test_a_new_pair_file_refers_to_local_models_where_they_are(embedded: SpecPair, tmp_path: Path) -> None:
    pair_file_for(embedded, tmp_path / "new").save(tmp_path / "new")
    again = SpecPair.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert [Path(s.name_or_path) for s in again.sources or ()] == [DEMO_PAIR / "target", DEMO_PAIR / "draft"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == [FILE_NAME]


def test_a_new_pair_file_refers_to_the_hub_by_id_and_commit(embedded: SpecPair, tmp_path: Path) -> None:
    sources = ModelReference("org/target", "abc"), ModelReference("org/draft", "def")
    config = pair_file_for(replace(embedded, sources=sources), tmp_path)
    assert (config.target, config.draft) == sources


def test_a_pair_file_of_the_same_pair_is_continued_and_another_is_left_alone(
    embedded: SpecPair, tmp_path: Path
) -> None:
    first = replace(pair_file_for(embedded, tmp_path), measured=[{"date": "before"}])
    first.save(tmp_path)
    assert pair_file_for(embedded, tmp_path) == first
    other = replace(embedded, sources=(ModelReference("org/target"), ModelReference("org/draft")))
    with pytest.raises(SystemExit, match=r"is about .*not org/target and org/draft"):
        pair_file_for(other, tmp_path)
    with pytest.raises(SystemExit, match="got a synthetic one"):
        pair_file_for(replace(embedded, sources=None), tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, dict[str, Any]]:
    few = ["--prompts", "1", "--new-tokens", "8", "--minutes", "0", "--prompt-tokens", "16", "--device", "cpu"]
    monkeypatch.setattr(tuning, "doubt", lambda best, setting: "")  # about so few prompts: see test_honest_tools.py
    monkeypatch.setattr(sys, "argv", ["tune", *few, *given])
    code = tune.main()
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_generate_uses_what_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        tuning, "ratio", lambda slow, fast: Spread(2.0, 1.5, 2.5) if "γ=7" in fast.method.name else Spread(1, 1, 1)
    )
    packaged = (DEMO_PAIR / FILE_NAME).read_bytes()
    given = "--gamma", "2", "7", "--schedule", "--confidence", "--write", str(tmp_path)
    code, result = run(monkeypatch, capsys, *given)
    assert code == 0 and result["speculate"] and result["differing_rows"] == 0
    assert result["recommended"] == {"num_assistant_tokens": 7, **CONSTANT}
    pair = SpecPair.from_pretrained(tmp_path, dtype=torch.float32)
    assert pair.config.recommended == result["recommended"]
    (entry,) = pair.config.measured
    assert entry == result["measured"] and entry["speedup"] == 2.0 and entry["batch_size"] == 1
    wanted = {"date", "command", "device", "dtype", "torch", "transformers", "acceptance_rate", "block_efficiency"}
    assert wanted <= entry.keys() and entry["cost_ratio"] > 0
    stats = hf_specdec.SpeculationStats()
    inputs = pair.tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)
    pair.generate(**inputs, max_new_tokens=20, do_sample=False, speculation_stats=stats)
    assert max(max(iteration["drafted"]) for iteration in stats.iterations) == 7

    assert (DEMO_PAIR / FILE_NAME).read_bytes() == packaged
    run(monkeypatch, capsys, *given)
    assert len(PairConfig.load(tmp_path).measured) == 2


def test_what_does_not_pay_decodes_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "ratio", lambda slow, fast: Spread(1.1, 0.9, 1.2))
    given = "--gamma", "2", "--schedule", "--confidence", "--write", str(tmp_path)
    code, result = run(monkeypatch, capsys, *given)
    assert code == 0 and not result["speculate"] and result["recommended"] == {}
    assert not PairConfig.load(tmp_path).speculate


def test_without_a_folder_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = (DEMO_PAIR / FILE_NAME).read_bytes()
    code, result = run(monkeypatch, capsys, "--gamma", "2", "--schedule", "heuristic", "--confidence")
    assert code == 0 and set(result["tried"]) == {"γ=2", "heuristic"}
    assert (DEMO_PAIR / FILE_NAME).read_bytes() == packaged and not list(tmp_path.iterdir())


def test_tokens_that_differ_fail_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    warm_up = Comparison.warm_up

    def spoilt(self: Comparison) -> None:
        warm_up(self)
        list(self.records.values())[-1].differing.add(0)

    monkeypatch.setattr(Comparison, "warm_up", spoilt)
    code, result = run(
        monkeypatch, capsys, "--gamma", "2", "--schedule", "--confidence", "--write", str(tmp_path / "x")
    )
    assert code == 1 and result["differing_rows"] == 1
    assert not (tmp_path / "x").exists()
