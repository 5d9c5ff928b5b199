"""README.md and docs/: their code runs, their commands exist, their links lead somewhere.

A page's Python blocks run in order, in one namespace, with the embedded pair in place of the pair on the Hub that they
name. A block after `<!-- not run: REASON -->` is left out.
"""

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

import hf_specdec
from hf_specdec import cli
from hf_specdec.options import OPTION_NAMES

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_specdec.__file__).parent
DEMO_PAIR = PACKAGE / "assets" / "demo_pair"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CLIENTS = ROOT / "docs" / "clients.md"  # tests/integrations runs it, where the packages that it needs are installed
ON_THE_HUB = {"Qwen/Qwen3-8B": DEMO_PAIR / "target", "Qwen/Qwen3-0.6B": DEMO_PAIR / "draft"}
FENCE = re.compile(r"(?P<before>[^\n]*)\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
OTHER_PROGRAMS = ("accelerate", "hf", "lm_eval", "pip", "python", "torchrun", "transformers")


class Block(NamedTuple):
    page: Path
    line: int
    code: str
    is_run: bool


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start("code")].count("\n") + 1, found["code"], not NOT_RUN.match(found["before"]))
        for found in FENCE.finditer(text)
        if found["language"] == language
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on the Hub are replaced by the embedded pair; all other arguments are used as given."""

    def redirected(load: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(*names: Any, **options: Any) -> Any:
            if options.get("dtype") == "auto":
                options["dtype"] = "float32"  # the files are in bfloat16, which many CPUs are slow in
            return load(*(str(ON_THE_HUB.get(name, name)) for name in names), **options)

        return from_pretrained

    for loads in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, hf_specdec.SpecPair):
        monkeypatch.setattr(loads, "from_pretrained", redirected(loads.from_pretrained))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != CLIENTS], ids=name)
def test_code_of_a_page_runs(
    page: Path, no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "import evaluate" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("evaluate_cache")
    (tmp_path / "hf_specdec").symlink_to(PACKAGE)  # metrics are named by their path in a clone
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        if block.is_run:
            lines = "\n" * (block.line - 1)  # so that errors name the page's line
            exec(compile(lines + block.code, str(page), "exec"), namespace)


def test_code_that_does_not_run_can_be_compiled_and_is_rare() -> None:
    left_out = [block for page in PAGES for block in blocks(page, "python") if not block.is_run]
    for block in left_out:
        compile(block.code, f"{block.page}:{block.line}", "exec")
    assert len(left_out) <= 2


def test_first_example_runs_in_a_new_process(tmp_path: Path) -> None:
    code = blocks(README, "python")[0].code
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("def fib(n):")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the Bash blocks, with its place."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield f"{name(page)}: {line}", words


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


def test_commands_are_ones_that_exist(
    scripts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their options: scripts parse them as they are; for others of ours, the names are looked up in the help."""
    for where, (command, *given) in commands():
        options = {word.split("=")[0] for word in given if word.startswith("--")}
        if command in OTHER_PROGRAMS:
            continue
        if command == "hf-specdec":
            assert given[0] in cli.COMMANDS, where
            with pytest.raises(SystemExit):
                cli.main([given[0], "--help"])
            text = capsys.readouterr().out
        else:
            script = ROOT / command
            assert command.startswith("./scripts/") and os.access(script, os.X_OK), where
            if script.with_suffix(".py").exists():
                monkeypatch.setattr(sys, "argv", [script.name, *given])
                parse = importlib.import_module(script.name).parse
                try:
                    parse(*[None] * len(inspect.signature(parse).parameters))
                except SystemExit:  # even if a folder is missing that an earlier command would have made
                    error = capsys.readouterr().err
                    assert not re.search("error: (argument|unrecognized|the following)", error), f"{where}\n{error}"
                continue
            text = script.read_text(encoding="utf-8")
        assert all(option in text for option in options), where


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_that_the_text_names_exist(page: Path) -> None:
    for script in re.findall(r"\bscripts/(\w+(?:\.\w+)?)", page.read_text(encoding="utf-8")):
        assert (ROOT / "scripts" / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        to = (page.parent / path) if path else page
        assert to.exists(), link
        if anchor and to.name != "api.md":  # its anchors are made when the site is built
            assert anchor in anchors(to), link


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_options_page_has_every_option() -> None:
    assert set(OPTION_NAMES) <= anchors(ROOT / "docs" / "options.md")


def test_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: hf_specdec\.(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(hf_specdec.__all__)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    """Values that vary between calls are `…` in both."""
    messages = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    ]
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = [
        (two or one).strip(" …")
        for heading in re.findall(r"^### (.+)$", text, re.MULTILINE)
        for two, one in re.findall(r"``(.+?)``(?!`)|`([^`]+)`", heading)
    ]
    assert len(quotes) > 40
    missing = [quote for quote in quotes if not any(quote in message for message in messages)]
    assert not missing
