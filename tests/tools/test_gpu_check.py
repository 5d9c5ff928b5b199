"""scripts/gpu_check: in small on the CPU, what it says of wrong results, its supervisor, and its choice of Python."""

import argparse
import importlib
import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_specdec.records.stats import Iteration, RowStep
from hf_specdec.sampling import rules
from hf_specdec.sampling.acceptance import Verdict, accept_greedy
from hf_specdec.tools import gpu_check_speed as speed
from hf_specdec.tools import gpu_check_static as static
from hf_specdec.tools import gpu_check_tokens as tokens
from hf_specdec.tools import gpu_check_waits as waits
from hf_specdec.tools import gpu_check_worker, isolated, measure
from hf_specdec.tools.gpu_check import (
    ERROR,
    NOT_MEASURED,
    NOT_REACHED,
    OK,
    REFUSED,
    SKIPPED,
    TIMED_OUT,
    WRONG,
    Case,
    Part,
    Scale,
    attempt,
    run_part,
)
from hf_specdec.tools.gpu_check_pair import judged_sampled
from hf_specdec.tools.gpu_check_report import Report
from hf_specdec.tools.gpu_check_supervisor import Supervisor
from hf_specdec.tools.lossless import Way
from hf_specdec.tools.synthetic import big_pair
from hf_specdec.tools.two_sample import SampledResult, View

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
gpu_check = importlib.import_module("gpu_check")
TINY = Scale("cpu", tiny=True)


# -------------------------------------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[str], Path]:
    """Exit code, lines of output and folder of one run of everything, as a user would start it."""
    out = tmp_path_factory.mktemp("gpu_check")
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts" / "gpu_check"), "--tiny"]
    ran = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert ran.stdout, ran.stderr
    return ran.returncode, ran.stdout.splitlines(), out


def test_in_small_everything_is_green(whole_run: tuple[int, list[str], Path]) -> None:
    code, lines, out = whole_run
    summary = json.loads(lines[-1])
    assert code == 0 and summary["green"] and summary["not_green"] == [] and lines[-2] == "green"
    assert set(summary["counts"]) <= {OK, REFUSED, SKIPPED, NOT_MEASURED} and summary["counts"][OK] > 100
    assert Path(summary["json"]).parent == out


def test_both_files_say_where_and_how(whole_run: tuple[int, list[str], Path]) -> None:
    _, _, out = whole_run
    result = json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))
    page = (out / "gpu_check.md").read_text(encoding="utf-8")
    assert result["command"] == "./scripts/gpu_check --tiny"
    for name in ("command", "date", "device", "torch", "transformers"):
        assert str(result[name]) in page
    assert result["cuda"] == torch.version.cuda and "commit" in result
    assert [part["part"] for part in result["parts"]] == [part.name for part in gpu_check_worker.parts(TINY)]
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.log", "gpu_check.md"]


def test_the_speed_table_has_every_method(whole_run: tuple[int, list[str], Path]) -> None:
    _, _, out = whole_run
    parts = {p["part"]: p for p in json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))["parts"]}
    one_row = {case["name"]: case for case in parts["speed/tiny-a/1x16"]["cases"]}
    assert {"vanilla", "HF assisted default", "hf_specdec default", "hf_specdec static", "pair"} == set(one_row)
    ours = one_row["hf_specdec default"]["figures"]
    assert ours["tokens_per_second"] > 0 and ours["over_vanilla"] > 0 and ours["floor_share"] > 0
    assert {"target_forwards", "acceptance_rate", "one_time_seconds"} <= ours.keys()
    rows = {case["name"]: case for case in parts["speed/tiny-a/2x16"]["cases"]}
    assert rows["HF assisted default"]["outcome"] == REFUSED
    page = (out / "gpu_check.md").read_text(encoding="utf-8")
    assert "| tiny-a/2x16 | HF assisted default | refused: assisted generate is only supported for batch" in page
    assert "| tiny-a/1x8 | vanilla static |" in page


def test_what_needs_a_gpu_says_so(whole_run: tuple[int, list[str], Path]) -> None:
    _, lines, _ = whole_run
    assert any(line.startswith("skipped") and "CUDA graphs: needs a GPU" in line for line in lines)
    (waiting,) = (line for line in lines if "waits/iterations" in line)
    assert waiting.startswith(SKIPPED)


# ------------------------------------------------------------------------------------------------- what it says of bugs


def accept_everything(draft_tokens: Any, lengths: Any, scores: Any) -> Verdict:
    """A bug: all drafts are accepted, whatever the target says."""
    verdict = accept_greedy(draft_tokens, lengths, scores)
    taken = torch.cat([draft_tokens, verdict.tokens[:, -1:]], dim=1)
    return verdict._replace(accepted=lengths.clone(), tokens=taken)


def test_wrong_tokens_are_reported_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "accept_greedy", accept_everything)
    target, draft = tokens.pair_of("dense", TINY)
    inputs = tokens.prompts_of("dense", 3, TINY)
    case = attempt("broken", lambda: tokens.compare_calls(target, inputs, 10, {"assistant_model": draft}, gamma=3))
    assert case.outcome == WRONG
    assert "of 3 differs first, in column" in case.details and "gaps between the two tokens" in case.details


def test_graphs_that_read_old_weights_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the weights of the first call were kept: each call with new ones is WRONG, those before are ok."""
    greedy, first = tokens.greedy, []

    def stale(target: Any, inputs: Any, new_tokens: int, **options: Any) -> Any:
        given = greedy(target, inputs, new_tokens, **options)
        if "strategy" in options:
            first.append(given)
        return first[0] if "strategy" in options else given

    monkeypatch.setattr(tokens, "greedy", stale)
    cases = itertools.islice(static.changing_weights(TINY), 3)
    assert [case.outcome for case in cases] == [OK, WRONG, WRONG]


def test_graphs_are_counted_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def capture_end(self) -> None: ...

        def replay(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    before = dict(vars(Graph))
    with static.counted_graphs() as graphs:
        graph = torch.cuda.CUDAGraph()
        graph.capture_end()
        graph.replay()
        graph.replay()
    assert (graphs.captures, graphs.replays) == (1, 2) and dict(vars(Graph)) == before
    assert static.of_graphs(graphs, Scale("cuda")).outcome == OK
    assert static.of_graphs(static.Graphs(captures=1), Scale("cuda")).outcome == ERROR


def test_a_part_without_drafts_checks_nothing() -> None:
    target, draft = tokens.pair_of("dense", TINY)
    inputs = tokens.prompts_of("dense", 1, TINY)
    case = attempt("short", lambda: tokens.compare_calls(target, inputs, 1, {"assistant_model": draft}, gamma=3))
    assert case.outcome == ERROR and case.details.startswith("nothing was drafted")


def test_refusals_and_errors_are_told_apart() -> None:
    target, draft = tokens.pair_of("dense", TINY)
    inputs = tokens.prompts_of("dense", 1, TINY)
    beams = {"assistant_model": draft, "num_beams": 2}
    case = attempt("beams", lambda: tokens.compare_calls(target, inputs, 4, beams, gamma=3))
    assert case.outcome == REFUSED and "beam" in case.details
    case = attempt("bug", lambda: (OK, str(1 // 0)))
    assert case.outcome == ERROR and "ZeroDivisionError" in case.details and "test_gpu_check.py" in case.details


def test_samples_of_another_distribution_are_wrong() -> None:
    def result(p_value: float) -> SampledResult:
        stats = SimpleNamespace(accepted_tokens=1, drafted_tokens=2)
        return SampledResult(Way("model", 4), 100, 1, [View(0, 1, 9.0, 3, 0.0, p_value, 0.2)], stats)  # type: ignore[arg-type]

    assert judged_sampled(result(0.5))[0] == OK
    outcome, details = judged_sampled(result(1e-6))
    assert outcome == WRONG and "p = 1e-06" in details and "20.0%" in details


def test_an_exception_of_ours_costs_only_its_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        return {"strategy": "spec", "num_assistant_tokens": -1}

    monkeypatch.setattr(speed, "fast_methods", lambda draft: [measure.Method("ours", measure.OURS, broken)])
    cases = list(speed.measured(speed.Setting("tiny-a", 1, 8, 4, 1), False, TINY))
    assert [(case.name, case.outcome) for case in cases] == [("vanilla", OK), ("ours", ERROR), ("pair", OK)]
    assert "num_assistant_tokens" in cases[1].details


# ---------------------------------------------------------------------------------------------------------------- waits


def test_every_way_through_the_loop_can_be_called() -> None:
    pair = big_pair(torch.float32, layers=2, hidden_size=64, intermediate_size=64, draft_layers=1)
    ids = torch.randint(2, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    names = set()
    for rows, name, options in waits.calls(pair):
        given = {"do_sample": False, **options}
        prompt = {"input_ids": ids[:rows], "attention_mask": torch.ones_like(ids[:rows])}
        out = pair.target.generate(**prompt, strategy="spec", max_new_tokens=6, **given)
        assert out.shape[0] == rows
        names.add(name)
    assert {"greedy", "sampled", "look-up", "stop strings", "max_time", "streamer"} <= names


class Loop:
    """A loop whose third iteration waits."""

    def run(self) -> None:
        for number in range(4):
            self.iterate(number)

    def iterate(self, number: int) -> None:
        if number >= 2 and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


modes: list[Any] = [0]


def test_waits_are_found_from_the_second_iteration_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "SpeculativeDecoding", Loop)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    original = Loop.iterate
    with waits.watched_iterations() as watched, pytest.raises(RuntimeError, match="synchronizing"):
        Loop().run()
    assert watched.iterations == 2 and "test_gpu_check.py" in watched.found
    assert modes[-1] == 0 and Loop.iterate is original


# ---------------------------------------------------------------------------------------------------- one part, and all


def three_cases(scale: Scale) -> Iterator[Case]:
    yield Case("first", OK)
    yield Case("second", ERROR, "CUDA error: an illegal memory access")
    yield Case("third", OK)


def test_an_error_that_spoils_the_device_ends_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[run_part.__module__]
    noted: list[str] = []
    part = Part("group/part", 9, three_cases)
    assert [c["name"] for c in run_part(part, TINY)["cases"]] == ["first", "second", "third"]
    monkeypatch.setattr(module, "is_healthy", lambda scale: False)
    result = run_part(part, TINY, lambda case: noted.append(case.name))
    assert result["restart"] and noted == ["first", "second", "the rest"]


def test_an_exception_outside_of_cases_is_an_error_of_the_part() -> None:
    def fails(scale: Scale) -> Iterator[Case]:
        yield Case("first", OK)
        raise OSError("no such model")

    result = run_part(Part("group/part", 9, fails), TINY)
    assert [(c["name"], c["outcome"]) for c in result["cases"]] == [("first", OK), ("the part itself", ERROR)]
    assert not result["restart"] and "no such model" in result["cases"][1]["details"]


# A worker without torch, so that it starts at once. Parts do what their names say.
FAKE = f"""
import importlib.util, json, os, sys, time
found = importlib.util.spec_from_file_location("isolated", {isolated.__file__!r})
isolated = importlib.util.module_from_spec(found)
found.loader.exec_module(isolated)

def case(name, outcome, details=""):
    return {{"name": name, "outcome": outcome, "details": details, "figures": {{}}}}

def answer(question):
    name = question["part"]
    if name is None:
        return {{"device": "pretended"}}
    with open(question["notes"], "w") as notes:
        notes.write(json.dumps(case("begun", "ok")) + "\\n")
    if "hangs" in name:
        time.sleep(60)
    if "dies" in name:
        print("Segmentation fault", file=sys.stderr, flush=True)
        os._exit(3)
    outcome = "WRONG" if "wrong" in name else "ok"
    cases = [case("begun", "ok"), case("whole", outcome, str(os.getpid()))]
    return {{"part": name, "seconds": 0.1, "may_be_cut": False, "cases": cases, "restart": "spoils" in name}}

isolated.serve(answer)
"""


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that answers like gpu_check_worker."""
    (tmp_path / "fake_gpu_worker.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_gpu_worker"


def never(scale: Scale) -> Iterator[Case]:
    raise AssertionError("parts run in the worker")


def supervise(worker: str, folder: Path, *names: str, limit: float = 2.0, minutes: float = 1.0) -> dict[str, Any]:
    """The cases of each part, by its name."""
    parts = [Part(name, limit, never, may_be_cut="speed" in name) for name in names]
    log = folder / "worker.log"
    supervisor = Supervisor(isolated.Worker(worker, log), TINY, 60 * minutes, folder / "notes")
    report = Report(folder, {})
    for result in supervisor.run(parts):
        report.about |= supervisor.about
        report.add(result)
    assert not (folder / "notes").exists()
    return {p["part"]: p["cases"] for p in report.parts} | {"report": report}


def test_a_part_that_hangs_is_stopped_and_the_others_run(fake_worker: str, tmp_path: Path) -> None:
    found = supervise(fake_worker, tmp_path, "a/good", "a/hangs", "a/dies", "b/good")
    assert [c["outcome"] for c in found["a/good"]] == [OK, OK] == [c["outcome"] for c in found["b/good"]]
    begun, rest = found["a/hangs"]
    assert begun["outcome"] == OK and rest["outcome"] == TIMED_OUT and rest["details"] == "no answer within 2 s"
    begun, rest = found["a/dies"]
    assert begun["outcome"] == OK and rest["outcome"] == ERROR
    assert "ended with code 3" in rest["details"] and "Segmentation fault" in rest["details"]
    assert found["report"].not_green == ["a/hangs: the rest: timed out", "a/dies: the rest: error"]
    assert found["report"].about == {"device": "pretended"}


def test_after_an_error_that_spoils_the_device_the_process_is_a_new_one(fake_worker: str, tmp_path: Path) -> None:
    found = supervise(fake_worker, tmp_path, "a/first", "a/spoils", "a/after")
    process = {name: found[name][1]["details"] for name in ("a/first", "a/spoils", "a/after")}
    assert process["a/first"] == process["a/spoils"] != process["a/after"]


def test_the_limit_of_the_whole_check_leaves_out_the_rest(fake_worker: str, tmp_path: Path) -> None:
    """What is only measured may be left out; a check that is left out is not green."""
    names = ("a/good", "speed/hangs", "speed/good", "a/late")
    found = supervise(fake_worker, tmp_path, *names, limit=50, minutes=7 / 60)
    assert [c["outcome"] for c in found["a/good"]] == [OK, OK]
    assert [c["outcome"] for c in found["speed/hangs"]] == [OK, NOT_REACHED]
    assert [c["outcome"] for c in found["speed/good"]] == [NOT_REACHED] == [c["outcome"] for c in found["a/late"]]
    summary = found["report"].summary()
    assert summary["not_green"] == ["a/late: all: not reached"]
    assert summary["speed_settings_cut"] == ["speed/hangs", "speed/good"]


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    found = supervise("no_such_module_anywhere", tmp_path, "a/good")
    (case,) = found["a/good"]
    assert case["outcome"] == ERROR and "while it started" in case["details"]
    assert "No module named no_such_module_anywhere" in case["details"]


def test_files_are_written_after_every_part(tmp_path: Path) -> None:
    report = Report(tmp_path / "new", {"device": "some GPU"})
    for number in (1, 2):
        part = {"part": f"a/{number}", "seconds": 1.0, "may_be_cut": False}
        report.add(part | {"cases": [{"name": "x|y", "outcome": OK, "details": "", "figures": {}}]})
        assert len(json.loads(report.json.read_text(encoding="utf-8"))["parts"]) == number
        assert f"| a/{number} | x\\|y | ok |  |" in report.markdown.read_text(encoding="utf-8")
    assert sorted(path.name for path in report.folder.iterdir()) == ["gpu_check.json", "gpu_check.md"]


# ----------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def faked(fake_worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script with the fake worker. Returns the folder of the results."""
    parts = [Part(name, 9, never) for name in ("good/one", "good/two", "bad/wrong")]
    monkeypatch.setattr(gpu_check, "gpu_check_worker", SimpleNamespace(__name__=fake_worker, parts=lambda scale: parts))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *given: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def test_a_wrong_result_fails_the_whole_check(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--tiny"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("WRONG        bad/wrong: whole") for line in lines)
    assert lines[-2].startswith("NOT GREEN: 1 cases, see ")
    summary = json.loads(lines[-1])
    assert not summary["green"] and summary["not_green"] == ["bad/wrong: whole: WRONG"]
    assert "**Not green**" in (faked / "gpu_check.md").read_text(encoding="utf-8")


def test_parts_are_chosen_by_name_or_group(faked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--tiny", "--parts", "good"]) == 0
    assert gpu_check.main(["--tiny", "--parts", "good/two"]) == 0
    result = json.loads((faked / "gpu_check.json").read_text(encoding="utf-8"))
    assert [part["part"] for part in result["parts"]] == ["good/two"]
    assert result["command"] == "./scripts/gpu_check --tiny --parts good/two"
    with pytest.raises(SystemExit, match="expected names of parts, got fast; --list shows them"):
        gpu_check.main(["--tiny", "--parts", "fast"])
    capsys.readouterr()
    assert gpu_check.main(["--tiny", "--list"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["good/one", "9", "s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_cuda_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"expected a CUDA device, found none.*--tiny"):
        gpu_check.main([])
    assert not (tmp_path / "out").exists()


def test_the_most_important_settings_come_first() -> None:
    names = [part.name for part in speed.parts(Scale("cuda"))]
    assert names[:4] == ["speed/1B-150M/1x64", "speed/1B-150M/1x1024", "compiled/1B-150M/1x64", "speed/1B-150M/8x64"]
    assert len(names) == len(set(names)) == 24
    for pair in ("1B-150M", "8B-1B"):
        for kind in ("speed", "compiled"):
            assert {f"{kind}/{pair}/{rows}x{context}" for rows in (1, 8) for context in (64, 1024, 8192)} <= set(names)
    longest = max(s.config().max_position_embeddings for s in speed.SHAPES.values())
    assert longest >= 8192 + 96


def test_the_shapes_have_about_the_sizes_that_they_are_named_after() -> None:
    """Parameters that take part in a step: without the table of input embeddings."""
    for name, (target, draft) in {"1B-150M": (1.04e9, 0.19e9), "8B-1B": (7.5e9, 1.18e9)}.items():
        config = speed.SHAPES[name].config()
        head, width = config.head_dim, config.hidden_size
        attention = width * head * 2 * (config.num_attention_heads + config.num_key_value_heads)
        layer = attention + 3 * width * config.intermediate_size
        for layers, wanted in ((config.num_hidden_layers, target), (speed.SHAPES[name].draft_layers, draft)):
            assert layers * layer + config.vocab_size * width == pytest.approx(wanted, rel=0.02)


# -------------------------------------------------------------------------------------------------------------- figures


def test_the_first_two_iterations_of_a_call_are_not_in_the_split() -> None:
    laps = speed.Laps()
    for _ in range(2):
        laps.add_prefill(1.0, 1)
        for draft in (9.0, 9.0, 0.002):
            laps.add(Iteration([RowStep(0, 5, [], 0, [7])], draft, 0.003, 0.001, 0))
    assert laps.split() == {"draft_ms": 2.0, "verify_ms": 3.0, "rest_ms": 1.0}
    assert laps.target_forwards == 6 and speed.Laps().split() == {}


def test_the_floor_counts_weights_and_cache_once() -> None:
    target, draft, agreement = speed.loaded_pair("tiny-a", TINY)
    floor = speed.Floor.of(target, speed.Setting("tiny-a", 2, 10, 4, 1), bytes_per_second=1e6)
    table = 256 * 64
    assert floor.weight_bytes == 2 * (sum(p.numel() for p in target.parameters()) - table)
    assert floor.cache_bytes == 2 * (10 + 2) * (4 * 2 * 2 * 16 * 2)
    assert floor.seconds == pytest.approx((floor.weight_bytes + floor.cache_bytes) / 1e6)
    assert floor.share(2, 2 / floor.seconds) == pytest.approx(1.0)
    assert abs(agreement - speed.AGREEMENT) < 0.1
    shared = draft.model.layers[0].mlp.up_proj.weight
    assert shared.data_ptr() == target.model.layers[0].mlp.up_proj.weight.data_ptr()


# ------------------------------------------------------------------------------------------------- the choice of Python


def stub(path: Path, imports: bool) -> Path:
    """A program in place of an interpreter, which can import torch or not, and says what it is run with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/usr/bin/env bash\n"
        f'[ "$1" = -c ] && {{ [[ "$2" != *torch* ]] || exit {0 if imports else 1}; exit 0; }}\n'
        '[ "$1" = -V ] && { echo Python 3.12.0; exit 0; }\n'
        '[ "$1" = -m ] && exit 0\n'
        'echo "$0 PYTHONPATH=$PYTHONPATH $*"\n',
        encoding="utf-8",
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    "named, found, chosen",
    [("good", "bad", "named"), (None, "good", "found"), (None, "bad", ".venv"), ("bad", "good", ".venv")],
)
def test_the_wrapper_uses_a_python_that_has_torch_or_makes_an_environment(
    tmp_path: Path, named: str | None, found: str, chosen: str
) -> None:
    """Of PYTHON, or else of python3; in a checkout of its own, whose .venv is a program too."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("gpu_check", "_env.sh"):
        (root / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_text("", encoding="utf-8")
    pythons = {".venv": stub(root / ".venv" / "bin" / "python", True)}
    pythons["found"] = stub(tmp_path / "bin" / "python3", found == "good")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    if named is not None:
        pythons["named"] = stub(tmp_path / "named" / "python", named == "good")
        environment["PYTHON"] = str(pythons["named"])
    command = ["bash", str(root / "scripts" / "gpu_check"), "--tiny"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    script = root / "scripts" / "gpu_check.py"
    assert ran.stdout.strip() == f"{pythons[chosen]} PYTHONPATH={root} {script} --tiny"


def test_parse_needs_no_arguments() -> None:
    assert gpu_check.parse([]) == argparse.Namespace(parts=None, minutes=8.0, device=None, tiny=False, list=False)
