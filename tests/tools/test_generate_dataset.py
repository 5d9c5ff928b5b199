"""hf-specdec generate: each row's text is vanilla's, whatever was killed, however many processes."""

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, perturbed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_specdec
from hf_specdec.cli import main
from hf_specdec.tools.generate_dataset import parse_options

pytest.importorskip("datasets")

ROWS = 24
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}q{% endif %}"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A pair, whose target ends texts at various lengths; prompts as texts and as messages."""
    made = tmp_path_factory.mktemp("generate")
    target = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.3}), seed=12)
    target.generation_config.eos_token_id = [3, 17, 40]
    for name, model in (("target", target), ("draft", perturbed(target, 0.1, seed=13))):
        model.save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    chat = AutoTokenizer.from_pretrained(made / "target")
    chat.chat_template = TEMPLATE
    target.save_pretrained(made / "chat")
    chat.save_pretrained(made / "chat")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh xyz", k=rng.randint(2, 30))) for _ in range(ROWS)]
    write_lines(made / "texts.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    return made


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Without statistics: how many drafts there are may depend on what else is decoded."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "statistics"} for row in rows]


def arguments(
    folder: Path, output: Path, *more: str, target: str = "target", dataset: str = "texts.jsonl"
) -> list[str]:
    models = ["--target", str(folder / target), "--draft", str(folder / "draft"), "--device", "cpu"]
    sizes = ["--new-tokens", "16", "--batch-size", "4", "--gamma", "3"]
    return ["generate", "--dataset", str(folder / dataset), "--output", str(output), *models, *sizes, *more]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command here: its exit code, stdout and stderr."""

    def command(output: Path, *more: str, **other: str) -> tuple[int, str, str]:
        code = main(arguments(folder, output, *more, **other))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict[str, Any]]:
    """The rows by vanilla, one prompt at a time."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    rows = []
    for index, given in enumerate(map(json.loads, (folder / "texts.jsonl").read_text().splitlines())):
        ids = tokenizer(given["text"], return_tensors="pt")["input_ids"]
        new = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)[0, ids.shape[1] :].tolist()
        ends = new[-1] in (3, 17, 40)
        row = {"index": index, "prompt": given["text"], "text": tokenizer.decode(new, skip_special_tokens=True)}
        rows.append(row | {"tokens": new, "finish_reason": "eos" if ends else "max_length", "error": None})
    assert {row["finish_reason"] for row in rows} == {"eos", "max_length"}
    return rows


def test_rows_are_vanillas_in_order(run: Run, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    output = tmp_path / "out.jsonl"
    code, out, _ = run(output)
    assert code == 0 and rows_of(output) == expected
    report = json.loads(out.splitlines()[-1])
    assert report["rows"] == ROWS and report["errors"] == 0 and report["output"] == str(output)
    assert report["new_tokens"] == sum(len(row["tokens"]) for row in expected)
    assert 0.1 < report["acceptance_rate"] < 0.95 and report["tokens_per_second"] > 0
    assert "24 of 24" in out and "tokens/s, acceptance" in out
    statistics = json.loads(output.read_text().splitlines()[0])["statistics"]
    assert statistics["committed_tokens"] == len(expected[0]["tokens"]) and statistics["seconds"] > 0

    before = output.stat().st_mtime_ns
    code, out, _ = run(output)
    assert code == 0 and json.loads(out.splitlines()[-1])["rows"] == 0 and output.stat().st_mtime_ns == before


# Processes that are killed


def start(given: Sequence[str], errors: Path | None = None, most: int | None = None, **environment: str) -> int:
    """Run the command in a fork of this process: its number.

    Args:
        errors: where stderr goes.
        most: how many bytes a file may have.
    """
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.environ.update(environment)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(errors or os.devnull, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (pytest has put something else there)
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            code = main(list(given))
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def wait(pid: int, seconds: float = 60) -> int:
    """The exit status of a process, negative if it was killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("a process did not end")


def kill_after(pid: int, journal: Path, bytes_more: int, seconds: float) -> bool:
    """Kill a process some time after its journal has grown. Returns: whether it was still running."""
    begin = journal.stat().st_size if journal.exists() else 0
    end = time.monotonic() + 60
    while time.monotonic() < end and not (journal.exists() and journal.stat().st_size >= begin + bytes_more):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def test_a_killed_run_goes_on(folder: Path, run: Run, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    output, rng = tmp_path / "out.jsonl", random.Random(3)
    journal = tmp_path / "out.jsonl.run" / "rank0.jsonl"
    given, killed = arguments(folder, output), 0
    for torn in (b"", b'{"index": 23, "prompt": "x', b"", b"{"):
        killed += kill_after(start(given), journal, rng.randrange(1, 900), 0.01 * rng.random())
        with journal.open("ab") as file:
            file.write(torn)
    assert killed >= 2 and not output.exists()
    _, out, _ = run(output)
    assert 0 < json.loads(out.splitlines()[-1])["kept"] < ROWS
    assert rows_of(output) == expected


@pytest.mark.slow
def test_twenty_runs_killed_at_random_moments(
    folder: Path, run: Run, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    began = time.monotonic()
    assert wait(start(arguments(folder, tmp_path / "whole.jsonl"))) == 0
    seconds, rng = time.monotonic() - began, random.Random(0)
    output, left = tmp_path / "out.jsonl", 20
    while left:
        pid = start(arguments(folder, output))
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        left -= wait(pid) == -signal.SIGKILL
        if output.exists():  # it came to its end: begin anew
            assert rows_of(output) == expected
            output.unlink()
    assert run(output)[0] == 0 and rows_of(output) == expected


def ranks(count: int) -> list[dict[str, str]]:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def test_two_processes_share_the_work_and_others_finish_it(
    folder: Path, run: Run, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    output = tmp_path / "out.jsonl"
    given = arguments(folder, output)
    first, second = (start(given, **environment) for environment in ranks(2))
    kill_after(first, output.with_name("out.jsonl.run") / "rank0.jsonl", 1, 0)
    assert wait(second) == 0 and not output.exists()
    journal = output.with_name("out.jsonl.run") / "rank1.jsonl"
    assert sorted(row["index"] for row in rows_of(journal)) == list(range(1, ROWS, 2))
    pids = [start(given, **environment) for environment in ranks(3)]
    assert [wait(pid) for pid in pids] == [0, 0, 0]
    assert rows_of(output) == expected
    pids = [start([*given, "--overwrite"], **environment) for environment in ranks(2)]
    assert [wait(pid) for pid in pids] == [0, 0]
    assert rows_of(output) == expected
    pids = [start([*given, "--limit", "3"], **environment) for environment in ranks(2)]
    assert [wait(pid) for pid in pids] == [1, 1]  # what the first one found is everybody's error


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(launcher: str, folder: Path, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    output = tmp_path / "out.parquet"
    launch = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", ranks(2)[0]["MASTER_PORT"]],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"],
    }[launcher]
    command = [sys.executable, "-m", *launch, "-m", "hf_specdec", *arguments(folder, output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(hf_specdec.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [row["tokens"] for row in parquet_rows(output)] == [row["tokens"] for row in expected]


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}])
def test_half_of_an_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Any) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, error = run(tmp_path / "out.jsonl")
    assert code == 1 and "start several processes with `torchrun` or `accelerate launch`" in error


# Messages, samples, parquet


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def test_messages_and_texts_as_messages(folder: Path, run: Run, tmp_path: Path, tokenizer: Any) -> None:
    talks = [
        [{"role": "user", "content": "ab c"}],
        [{"role": "system", "content": "abc"}, {"role": "user", "content": "x y"}],
        [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "hij"}],
    ]
    write_lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    write_lines(tmp_path / "texts.jsonl", [{"prompt": "ab c"}])
    options = {"target": "chat", "dataset": str(tmp_path / "talks.jsonl")}
    assert run(tmp_path / "out.parquet", **options)[0] == 0
    rows = parquet_rows(tmp_path / "out.parquet")
    assert [row["messages"] for row in rows] == talks and list(rows[0])[:2] == ["index", "messages"]
    target = AutoModelForCausalLM.from_pretrained(folder / "chat", dtype=torch.float32)
    for row, prompt in zip(rows, ["ab c q", "abc x y q", "ab hij"]):  # the assistant's message is continued
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)[0, ids.shape[1] :]
        assert row["tokens"] == new.tolist()
    options["dataset"] = str(tmp_path / "texts.jsonl")
    assert run(tmp_path / "one.jsonl", "--chat-template", **options)[0] == 0
    assert rows_of(tmp_path / "one.jsonl")[0]["tokens"] == rows[0]["tokens"]
    assert rows_of(tmp_path / "one.jsonl")[0]["prompt"] == "ab c"


def test_samples_depend_on_seed_and_row_alone(folder: Path, run: Run, tmp_path: Path) -> None:
    sampling = ("do_sample=true", "temperature=1.5", "num_return_sequences=2")
    options = ("--seed", "7", "--limit", "6", "--options", *sampling)
    assert run(tmp_path / "whole.jsonl", *options)[0] == 0
    pids = [start(arguments(folder, tmp_path / "parts.jsonl", *options), **environment) for environment in ranks(2)]
    assert [wait(pid) for pid in pids] == [0, 0]
    rows = rows_of(tmp_path / "whole.jsonl")
    assert rows == rows_of(tmp_path / "parts.jsonl")
    assert [(row["index"], row["sample"]) for row in rows] == [(i, k) for i in range(6) for k in range(2)]
    assert len({tuple(row["tokens"]) for row in rows}) > 8


def test_processes_without_a_seed_draw_other_numbers(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "same.jsonl", [{"text": "abc"}] * 8)
    given = arguments(folder, tmp_path / "out.jsonl", "--options", "do_sample=true", "temperature=2.0",
                      dataset=str(tmp_path / "same.jsonl"))  # fmt: skip
    assert [wait(pid) for pid in [start(given, **environment) for environment in ranks(2)]] == [0, 0]
    rows = [row["tokens"] for row in rows_of(tmp_path / "out.jsonl")]
    assert rows[0::2] != rows[1::2]


# What cannot be decoded, and what cannot be asked for


def test_rows_that_are_no_prompts_have_errors(run: Run, tmp_path: Path) -> None:
    texts = ["ab", "", None, "abcd " * 200, "x"]
    write_lines(tmp_path / "some.jsonl", [{"text": text} for text in texts])
    options = {"dataset": str(tmp_path / "some.jsonl")}
    code, out, _ = run(tmp_path / "out.parquet", **options)
    rows = parquet_rows(tmp_path / "out.parquet")
    assert code == 0 and json.loads(out.splitlines()[-1])["errors"] == 3
    assert [row["prompt"] for row in rows] == texts
    messages = [row["error"] for row in rows]
    assert messages[0] is None and messages[4] is None and "empty" in messages[1] and "got None" in messages[2]
    assert "tokens, and the model 256 positions" in messages[3]
    assert rows[1]["text"] is None and rows[1]["tokens"] == []

    code, _, error = run(tmp_path / "other.jsonl", "--on-error", "raise", "--batch-size", "1", **options)
    assert code == 1 and "row 1 of the dataset cannot be decoded: the prompt is empty" in error
    assert [row["index"] for row in rows_of(tmp_path / "other.jsonl.run" / "rank0.jsonl")] == [0]
    assert run(tmp_path / "other.jsonl", **options)[0] == 0  # these two are no reason to begin anew
    assert [row["error"] for row in rows_of(tmp_path / "other.jsonl")] == messages


def test_a_full_disk_stops_it_until_there_is_room(
    folder: Path, run: Run, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """A process whose files may have 3,000 bytes."""
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors"
    assert run(tmp_path / "other.jsonl", "--limit", "1")[0] == 0  # the dataset is in the cache of `datasets` now
    assert wait(start(arguments(folder, output), errors=errors, most=3000)) == 1
    assert "File too large: rows that were written before are kept. Make room" in errors.read_text()
    journal = rows_of(tmp_path / "out.jsonl.run" / "rank0.jsonl")
    assert 3 < len(journal) < ROWS and not output.exists()
    assert run(output)[0] == 0 and rows_of(output) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--column", "answer"], "--column answer is not in --dataset .*, which has id, text"),
        (["--column", "id"], "--column id holds int64"),
        (["--chat-template"], "the target's tokenizer has no chat template"),
        (["--options", "temprature=2"], "temprature"),
        (["--options", "temperature"], "--options must be NAME=VALUE, got 'temperature'"),
        (["--options", "max_new_tokens=3"], "--options max_new_tokens: use --new-tokens"),
        (["--options", "num_return_sequences=0"], "must be an int of at least 1, got 0"),
        (["--options", "num_beams=2"], "num_beams"),
        (["--options", "output_scores=true"], "takes no `output_scores`: results hold tokens only"),
        (["--options", "batch_size=3"], "--options batch_size: use --batch-size"),
        (
            ["--options", "max_matching_ngram_size=two"],
            "--options max_matching_ngram_size=two cannot be used: .* must be an int, got 'two'",
        ),
        (["--options", "eos_token_id=end"], "--options eos_token_id=end cannot be used"),
        (["--options", "prompts=3"], "--options prompts=3 cannot be used: .*prompts"),
        (["--dataset", "no/such.jsonl"], "--dataset no/such.jsonl could not be loaded"),
        (["--output", "out.txt"], "--output must end in .jsonl or .parquet, got out.txt"),
        (["--output", "/dev/null/out.jsonl"], "Not a directory: '/dev/null/out.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done(run: Run, tmp_path: Path, monkeypatch: Any, more: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = run(tmp_path / "out.jsonl", *more)
    assert code == 1 and not (tmp_path / "out.jsonl").exists()
    assert re.search(message, error), error


@pytest.mark.parametrize(("content", "message"), [("", "the file is empty"), ('{"text"', "could not be loaded")])
def test_datasets_without_rows(run: Run, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    code, _, error = run(tmp_path / "out.jsonl", dataset=str(tmp_path / "bad.jsonl"))
    assert code == 1 and message in error


@pytest.mark.parametrize(("kind", "message"), [("saved", "seems to have no rows"), ("csv", "corresponds to no data")])
def test_datasets_with_columns_only(run: Run, tmp_path: Path, kind: str, message: str) -> None:
    from datasets import Dataset

    place = tmp_path / f"columns.{kind}"
    if kind == "saved":
        Dataset.from_dict({"text": ["a"]}).select([]).save_to_disk(place)
    else:
        place.write_text("text,other\n")
    code, _, error = run(tmp_path / "out.jsonl", dataset=str(place))
    assert code == 1 and message in error, error


def test_an_output_goes_on_only_with_what_it_was_begun_with(folder: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    data = tmp_path / "data.jsonl"
    write_lines(data, [{"text": "abc", "other": "xyz"}] * 3)
    assert run(output, dataset=str(data))[0] == 0
    for more, message in (
        (["--column", "other"], "column = 'text', and now that is 'other'"),
        (["--new-tokens", "3"], "new_tokens = 16, and now that is 3"),
        (["--options", "repetition_penalty=1.5"], "options = "),
        (["--target", str(folder / "chat")], "files of target = "),
    ):
        code, _, error = run(output, *more, dataset=str(data))
        assert code == 1 and message in error and "--overwrite" in error
    write_lines(data, [{"text": "abc", "other": "xyz"}] * 2 + [{"text": "abd", "other": "xyz"}])
    code, _, error = run(output, dataset=str(data))
    assert code == 1 and "begun with rows = " in error
    code, _, error = run(tmp_path / "data.jsonl", dataset=str(data))
    assert code == 1 and "is not ours" in error
    assert run(output, "--overwrite", "--batch-size", "2", dataset=str(data))[0] == 0
    assert [row["prompt"] for row in rows_of(output)] == ["abc", "abc", "abd"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", "folder", "saved"])
def test_kinds_of_datasets(suffix: str, folder: Path, run: Run, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"text": row["prompt"]} for row in expected[:4]])
    place = tmp_path / f"data{suffix}"
    if suffix == ".csv":
        rows.to_csv(place)
    elif suffix == ".parquet":
        rows.to_parquet(place)
    elif suffix == "folder":
        place.mkdir()
        rows.to_json(place / "test.jsonl")
    else:
        DatasetDict(test=rows).save_to_disk(place)
    split = ["--split", "test"] if suffix in ("folder", "saved") else []
    assert run(tmp_path / "out.jsonl", *split, dataset=str(place))[0] == 0
    assert rows_of(tmp_path / "out.jsonl") == expected[:4]


# vLLM


class Engine:
    """Stands in for the module `vllm`: it takes the arguments that are documented for vLLM 0.32, and no others."""

    def __init__(self) -> None:
        engine = self

        class SamplingParams:
            def __init__(
                self, *, n: int = 1, repetition_penalty: float = 1.0, temperature: float = 1.0, top_p: float = 1.0,
                top_k: int = 0, min_p: float = 0.0, seed: int | None = None, stop: Any = None,
                include_stop_str_in_output: bool = False, max_tokens: int | None = 16, min_tokens: int = 0,
            ):  # fmt: skip
                engine.sampling = {name: value for name, value in locals().items() if name not in ("self", "engine")}
                self.n = n

        class LLM:
            def __init__(
                self, model: str, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False,
                speculative_config: dict[str, Any] | None = None,
            ):  # fmt: skip
                engine.model, engine.dtype, engine.speculative_config = model, dtype, speculative_config

            def generate(self, prompts: Any, sampling_params: SamplingParams) -> Any:
                assert all(isinstance(prompt, str) for prompt in prompts)
                return self._outputs(prompts, sampling_params)

            def chat(
                self, messages: Any, sampling_params: SamplingParams, *, add_generation_prompt: bool = True,
                continue_final_message: bool = False,
            ) -> Any:  # fmt: skip
                engine.continues = continue_final_message and not add_generation_prompt
                return self._outputs(messages, sampling_params)

            def _outputs(self, prompts: list[Any], sampling_params: SamplingParams) -> Any:
                engine.prompts = prompts
                for number, _ in enumerate(prompts):
                    outputs = [SimpleNamespace(text=f"{number}.{copy}é", token_ids=(number, copy), finish_reason="stop")
                               for copy in range(sampling_params.n)]  # fmt: skip
                    yield SimpleNamespace(outputs=outputs)

        self.module = ModuleType("vllm")
        self.module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)

    def run(self, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "vllm", self.module)
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})


def test_a_script_for_vllm(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[dict[str, Any]]
) -> None:
    sampling = ("do_sample=true", "top_p=0.9", 'stop_strings=["q"]', "num_return_sequences=2", "min_new_tokens=2")
    more = ["--limit", "5", "--seed", "3", "--options", *sampling]
    code, script, _ = run(tmp_path / "out.jsonl", "--engine", "vllm", *more)
    assert code == 0 and not list(tmp_path.iterdir())
    engine = Engine()
    engine.run(script, monkeypatch)
    assert engine.model == str(folder / "target") and engine.dtype == "float32"
    draft = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 3}
    assert engine.speculative_config == draft
    assert engine.sampling == {
        "n": 2, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "seed": 3,
        "stop": ["q"], "include_stop_str_in_output": True, "max_tokens": 16, "min_tokens": 2,
    }  # fmt: skip
    assert engine.prompts == [row["prompt"] for row in expected[:5]]
    assert rows_of(tmp_path / "out.jsonl") == [
        {"index": index, "sample": copy, "prompt": expected[index]["prompt"], "text": f"{index}.{copy}é",
         "tokens": [index, copy], "finish_reason": "stop"} for index in range(5) for copy in range(2)
    ]  # fmt: skip


def test_a_script_for_vllm_with_messages(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    engine = Engine()
    code, script, _ = run(tmp_path / "out.parquet", "--engine", "vllm", "--chat-template", "--limit", "2")
    assert code == 0
    engine.run(script, monkeypatch)
    assert [[message["role"] for message in prompt] for prompt in engine.prompts] == [["user"]] * 2
    assert engine.sampling["temperature"] == 0.0 and engine.sampling["n"] == 1 and not engine.continues
    assert list(parquet_rows(tmp_path / "out.parquet")[0]) == ["index", "prompt", "text", "tokens", "finish_reason"]
    asked, named = [{"role": "user", "content": "ab"}], [{"role": "user", "content": "a", "name": "Ann"}]
    goes_on = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for name, talks, continues in (("asked", [asked, named], False), ("going on", [goes_on, goes_on], True)):
        table = pyarrow.Table.from_pylist([{"messages": talk} for talk in talks])  # all messages have all keys in it
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        _, script, _ = run(tmp_path / f"{name}.jsonl", "--engine", "vllm", dataset=str(tmp_path / f"{name}.parquet"))
        engine.run(script, monkeypatch)
        assert engine.prompts == talks and engine.continues == continues
    write_lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in (asked, goes_on)])
    code, _, error = run(tmp_path / "out.jsonl", "--engine", "vllm", dataset=str(tmp_path / "talks.jsonl"))
    assert code == 1 and "row 1 of --dataset ends with a message of the assistant, row 0 does not" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--options", "no_repeat_ngram_size=3"], "no_repeat_ngram_size is not translated for vLLM"),
        (["--options", "num_return_sequences=2"], "do not support `num_return_sequences`"),
        (["--gguf-file", "x.gguf"], "--gguf-file is not translated for vLLM"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_a_script_for_vllm_cannot_do(run: Run, tmp_path: Path, more: list[str], message: str) -> None:
    code, out, error = run(tmp_path / "out.jsonl", "--engine", "vllm", *more)
    assert code == 1 and message in error and not out


def test_options_are_json_or_text() -> None:
    given = ["temperature=0.5", "do_sample=true", 'stop_strings=["a", "b=c"]', "cache_implementation=dynamic"]
    assert parse_options(given) == {
        "temperature": 0.5, "do_sample": True, "stop_strings": ["a", "b=c"], "cache_implementation": "dynamic",
    }  # fmt: skip
