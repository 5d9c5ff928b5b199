"""docs/clients.md against the real packages of other projects, which `./scripts/test -m clients` installs.

Each section runs twice, with speculation and without it, and must give the same tokens and the same text. The run ends
with a table of the clients.
"""

import importlib.metadata
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import recording
import torch
from test_docs import FENCE, ROOT

import hf_specdec

pytestmark = pytest.mark.clients

PAGE = ROOT / "docs" / "clients.md"
# By section: the package, and what must be installed to run it.
CLIENTS = {
    "transformers pipeline": ("transformers",),
    "transformers serve": ("transformers", "fastapi", "uvicorn", "openai"),
    "lm-eval": ("lm_eval",),
    "Ray Data": ("ray",),
    "xgrammar": ("xgrammar",),
    "outlines": ("outlines",),
    "llguidance": ("llguidance",),
    "lm-format-enforcer": ("lm-format-enforcer",),
    "TRL": ("trl",),
    "langchain-huggingface": ("langchain-huggingface",),
    "llama-index": ("llama-index-llms-huggingface",),
    "smolagents": ("smolagents",),
    "Jupyter": ("ipykernel", "nbclient"),
}
WITH_TESTS_OF_THEIR_OWN = ("transformers serve", "lm-eval", "Ray Data", "TRL", "Jupyter")
# What a line contains that a user writes for the sake of speculation.
OURS = re.compile(r"hf.spec|\bdraft\b|strategy=|\"strategy\"|assistant_model|trust.remote.code")
PROMPTS = ["def fib(n):\n", "import os\nimport sys\n", "class Stack:\n    def push(self", "for i in range("]
TEMPLATE = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"


# The page


class Block(NamedTuple):
    language: str
    code: str


def sections() -> dict[str, list[Block]]:
    """The blocks of the page by heading, those before the first one by ""."""
    heading, *rest = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = {"": heading} | dict(zip(rest[::2], rest[1::2], strict=True))
    return {
        name: [Block(found["language"], found["code"]) for found in FENCE.finditer(text)]
        for name, text in texts.items()
    }


def our_lines(blocks: list[Block]) -> str:
    lines = [line for block in blocks for line in block.code.replace("\\\n", " ").splitlines() if line.strip()]
    return f"{len([line for line in lines if OURS.search(line)])} of {len(lines)}"


def test_every_section_of_the_page_is_run():
    assert list(sections()) == ["", *CLIENTS]
    assert all(sections().values())


# The table


@dataclass
class Table:
    """A plugin of pytest that ends the run with the clients that it has seen."""

    rows: list[tuple[str, ...]] = field(default_factory=list)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        lines = [("client", "version", "lines a user writes", "tokens equal", "acceptance"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        terminalreporter.section("clients")
        for line in lines:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    made = Table()
    request.config.pluginmanager.register(made)
    return made


@pytest.fixture
def add_row(table: Table) -> Callable[..., None]:
    """Adds a client to the table, then fails unless speculation ran and changed nothing."""

    def add(client: str, blocks: list[Block], equal: bool, calls: list[recording.Call], how: str = "") -> None:
        drafted, accepted = (sum(getattr(call, name) for call in calls) for name in ("drafted", "accepted"))
        rate = f"{accepted / drafted:.2f}" if drafted else "none"
        version = importlib.metadata.version(CLIENTS[client][0])
        table.rows.append((client + how, version, our_lines(blocks), "yes" if equal else "NO", rate))
        assert equal
        assert 0 < accepted <= drafted

    return add


# Running a section


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pair, in place of the one on the Hub that the page names; with a chat template."""
    folder = tmp_path_factory.mktemp("stand-in")
    pair = hf_specdec.SpecPair(*hf_specdec.demo_pair())
    pair.tokenizer.chat_template = TEMPLATE
    pair.save_pretrained(folder, weights=True)
    return folder


@pytest.fixture
def run(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, list[recording.Call]]]:
    """Runs a client's blocks in a new folder, with speculation or without: its `text`, and the calls."""

    def blocks_of(client: str, speculates: bool) -> tuple[Any, list[recording.Call]]:
        folder = tmp_path / f"speculates-{speculates}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        namespace: dict[str, Any] = {"__name__": "page"}
        with recording.recorded(speculates) as calls:
            for block in [*sections()[""], *sections()[client]]:
                exec(compile(local(block.code, stand_in), str(PAGE), "exec"), namespace)
        return namespace.get("text"), calls

    return blocks_of


def local(code: str, stand_in: Path) -> str:
    """A block with the pair in `stand_in` instead of one on the Hub."""
    for hub_id, name in (("Qwen/Qwen3-8B", "target"), ("Qwen/Qwen3-0.6B", "draft")):
        code = code.replace(hub_id, str(stand_in / name))
    return code.replace('dtype="auto"', 'dtype="float32"')  # which many CPUs are faster in


def needs(client: str) -> None:
    for package in CLIENTS[client]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"needs {package}: ./scripts/test -m clients installs it")


def tokens(calls: list[recording.Call]) -> list[list[list[int]]]:
    return [call.tokens for call in calls]


@pytest.mark.parametrize("client", [name for name in CLIENTS if name not in WITH_TESTS_OF_THEIR_OWN])
def test_client_says_what_it_says_without_speculation(client, run, add_row):
    needs(client)
    text, calls = run(client, speculates=True)
    plain_text, plain_calls = run(client, speculates=False)
    assert text
    equal = (text, tokens(calls)) == (plain_text, tokens(plain_calls))
    add_row(client, sections()[client], equal, calls)


# Processes


def command(line: str) -> list[str]:
    """A line of a bash block as the command that it is where the tests run, wherever that has been installed."""
    name, *arguments = shlex.split(line)
    if name == "python":
        return [sys.executable, *arguments]
    entry = next(iter(importlib.metadata.entry_points(group="console_scripts", name=name)))
    code = f"import sys; from {entry.module} import {entry.attr}; sys.argv[0] = {name!r}; sys.exit({entry.attr}())"
    return [sys.executable, "-c", code, *arguments]


def lines_of(block: Block) -> list[str]:
    return [line for line in block.code.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes run: `my-pair` is there."""
    made = tmp_path_factory.mktemp("processes")
    hf_specdec.SpecPair.from_pretrained(stand_in, dtype=torch.float32).save_pretrained(made / "my-pair")
    return made


def finish(line: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command(line), cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


TASK = """
task: my_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: my-tasks/documents.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n\\n", "return"]
  max_gen_toks: 32
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def harness(folder: Path) -> Path:
    """A folder with `my-pair` and a task for lm-eval: 7 prompts, so batches of 4 end with one that is not full."""
    needs("lm-eval")
    tasks = folder / "my-tasks"
    tasks.mkdir()
    (tasks / "my_task.yaml").write_text(TASK, encoding="utf-8")
    prompts = [*PROMPTS, "try:\n    value", "print(", "def read(path):\n"]
    documents = [json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts]
    (tasks / "documents.jsonl").write_text("".join(documents), encoding="utf-8")
    return folder


def evaluate(line: str, folder: Path, environment: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
    """Run a command of lm-eval: what the model answered to each document, and the results' `config`."""
    finish(line, folder, environment)
    (samples,) = (folder / "results").rglob("samples_my_task_*.jsonl")
    (results,) = (folder / "results").rglob("results_*.json")
    answers = [json.loads(entry) for entry in samples.read_text(encoding="utf-8").splitlines()]
    config = json.loads(results.read_text(encoding="utf-8"))["config"]
    samples.unlink(), results.unlink()
    return [entry["resps"][0][0] for entry in sorted(answers, key=lambda entry: entry["doc_id"])], config


def lm_eval_ways() -> dict[str, list[Block]]:
    """The page's ways to use lm-eval, each with its block; commands that export come before those that evaluate."""
    names = ("model type hf-spec", "gen_kwargs", "folder")
    blocks = sections()["lm-eval"]
    assert len(blocks) == len(names) and all(block.language == "bash" for block in blocks)
    return {name: [block] for name, block in zip(names, blocks)}


HF = """lm_eval --model hf --model_args pretrained=my-pair/target --tasks my_task --include_path my-tasks
    --batch_size 4 --output_path results --log_samples"""


@pytest.fixture(scope="module")
def known(harness: Path) -> tuple[list[str], list[recording.Call]]:
    """What lm-eval's `hf` answers, which is shown not to speculate, and its calls."""
    answers, _ = evaluate(HF, harness, recording.environment(harness / "none", True))
    assert not (harness / "none").exists()
    line = lines_of(lm_eval_ways()["model type hf-spec"][0])[0]
    again, config = evaluate(line, harness, recording.environment(harness / "plain", False))
    assert again == answers and not config["speculation"]["drafted_tokens"]
    assert len(answers) == 7 and len(set(answers)) > 4
    return answers, recording.read(harness / "plain")


@pytest.mark.parametrize("way", ["model type hf-spec", "gen_kwargs", "folder"])
def test_lm_eval_answers_what_it_answers_without_speculation(way, harness, known, add_row):
    blocks = lm_eval_ways()[way]
    *before, line = lines_of(blocks[0])
    for other in before:
        finish(other, harness, recording.environment(harness / "exported", True))
    answers, config = evaluate(line, harness, recording.environment(harness / way, True))
    calls = recording.read(harness / way)
    add_row("lm-eval", blocks, (answers, tokens(calls)) == (known[0], tokens(known[1])), calls, f", {way}")
    if way == "model type hf-spec":
        assert config["speculation"]["accepted_tokens"] == sum(call.accepted for call in calls)
        assert len(config["speculation"]["drafted_by_position"]) == 4  # num_assistant_tokens of the command


@contextmanager
def serving(line: str, folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run a server's command on a free port of this machine, which it yields once the server answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"server-{port}.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command(line), "--port", str(port)], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        else:
            pytest.fail(f"The server does not answer: {log.read_text()}")
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_serve_answers_what_it_answers_without_speculation(folder, add_row):
    needs("transformers serve")
    blocks = sections()["transformers serve"]
    server, client = blocks
    *before, line = lines_of(server)
    for other in before:
        finish(other, folder, recording.environment(folder / "exported", True))
    answers, calls = {}, {}
    for speculates in (True, False):
        file = folder / f"calls-{speculates}"
        with serving(line, folder, recording.environment(file, speculates)) as port:
            namespace: dict[str, Any] = {}
            exec(compile(client.code.replace("8000", str(port)), str(PAGE), "exec"), namespace)
            streamed = namespace["client"].completions.create(
                model="my-pair/target", prompt=PROMPTS[1], max_tokens=24, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].text for chunk in streamed if chunk.choices]
        answers[speculates], calls[speculates] = (namespace["text"], "".join(pieces)), recording.read(file)
    assert all(answers[True]) and len(calls[True]) == 2
    equal = (answers[True], tokens(calls[True])) == (answers[False], tokens(calls[False]))
    add_row("transformers serve", blocks, equal, calls[True])


# Others


def test_ray_data_gives_vanillas_texts(stand_in, add_row, monkeypatch):
    needs("Ray Data")
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they starve where others compute too
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        namespace: dict[str, Any] = {}
        blocks = sections()["Ray Data"]
        exec(compile(local(blocks[0].code, stand_in), str(PAGE), "exec"), namespace)
    finally:
        ray.shutdown()
    found = namespace["found"]
    counted = [(int(row["drafted_tokens"]), int(row["accepted_tokens"])) for row in found]
    calls = [recording.Call([list(row["generated_tokens"])], *counts) for row, counts in zip(found, counted)]
    pair = hf_specdec.SpecPair.from_pretrained(stand_in / "target", stand_in / "draft", dtype=torch.float32)
    expected = []
    for row in found:
        inputs = pair.tokenizer(row["prompt"], return_tensors="pt")
        new = pair.target.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :].tolist()
        expected.append([new])
    assert sorted(row["prompt"] for row in found) == ["def fib(n):", "import os"]
    add_row("Ray Data", blocks, [call.tokens for call in calls] == expected, calls)


@pytest.mark.usefixtures("weights_packed_from_the_first_token_on")
def test_trl_trains_a_target_that_says_what_it_says_without_speculation(run, add_row, monkeypatch):
    """Rollouts are sampled, so they cannot be compared: after each step, greedy calls are, with the step's weights."""
    needs("TRL")
    from transformers.trainer_callback import CallbackHandler

    texts, equal = [], []
    step_end = CallbackHandler.on_step_end

    def compare(handler: CallbackHandler, *args: Any, **kwargs: Any) -> Any:
        model = handler.model
        inputs = handler.processing_class(PROMPTS, padding=True, return_tensors="pt")
        greedy = {"do_sample": False, "max_new_tokens": 24}
        model.eval()  # the trainer's gradient checkpointing keeps no cache in train mode
        given = model.generate(**inputs, **greedy)
        expected = model.generate(**inputs, **greedy, strategy="vanilla")
        model.train()
        equal.append(given.tolist() == expected.tolist())
        texts.append(expected.tolist())
        return step_end(handler, *args, **kwargs)

    monkeypatch.setattr(CallbackHandler, "on_step_end", compare)
    _, calls = run("TRL", speculates=True)
    assert len(equal) == 2 and texts[0] != texts[1]  # the weights change, and with them the text
    add_row("TRL", sections()["TRL"], all(equal), calls)


def test_a_notebook_shows_what_a_call_did(stand_in, folder, add_row):
    needs("Jupyter")
    import nbclient
    import nbformat

    blocks = sections()["Jupyter"]
    cells = [local(block.code, stand_in) for block in [*sections()[""], *blocks]]
    calls, shown = {}, ""
    for speculates in (True, False):
        file = folder / f"calls-{speculates}"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in recording.environment(file, speculates).items():
                patch.setenv(name, value)
            made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
            here = {"metadata": {"path": str(folder)}}
            nbclient.NotebookClient(made, timeout=300, kernel_name="python3", resources=here).execute()
        calls[speculates] = recording.read(file)
        if speculates:
            shown = made.cells[-1].outputs[-1]["data"]["text/html"]
    assert "acceptance rate" in shown
    add_row("Jupyter", blocks, tokens(calls[True]) == tokens(calls[False]), calls[True])
