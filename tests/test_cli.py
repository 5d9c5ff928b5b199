"""hf-specdec: each command's table or list, its last line of JSON, and its exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_specdec import cli
from hf_specdec.cli import main
from hf_specdec.pairs import DEMO_PAIR


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Unknown names are not looked up on the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, list[str], str]]:
    """Runs a command in this process: its exit code, lines of stdout, and stderr."""

    def command(*arguments: Any) -> tuple[int, list[str], str]:
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err

    return command


def test_suggest_names_a_draft(run):
    code, lines, _ = run("suggest", "Qwen/Qwen3-8B")
    assert code == 0 and "draft    Qwen/Qwen3-0.6B" in lines
    assert json.loads(lines[-1])["license"] == "apache-2.0"


def test_suggest_says_what_to_do_about_an_unknown_target(run):
    code, lines, error = run("suggest", "someone/Model")
    assert (code, lines) == (1, [])
    assert error.startswith("hf-specdec suggest: No draft is known for 'someone/Model'")


@pytest.mark.parametrize("arguments", [(), (DEMO_PAIR,), ("--pair", DEMO_PAIR)])
def test_check_shows_how_a_pair_fits(run, arguments):
    code, lines, _ = run("check", *arguments)
    findings = {finding["property"]: finding for finding in json.loads(lines[-1])}
    assert code == 0 and findings["tokens"]["verdict"] == "ok"
    assert "LlamaForCausalLM" in "\n".join(lines[:-1])


@pytest.mark.parametrize("arguments", [("nowhere/at-all",), ("--target", "nowhere/at-all", "--draft", "nowhere/else")])
def test_check_fails_where_there_is_no_model(run, arguments):
    code, lines, error = run("check", *arguments)
    assert (code, lines) == (1, []) and error.startswith("hf-specdec check: ") and "nowhere/at-all" in error


def test_a_pair_is_named_once(run):
    with pytest.raises(SystemExit, match="expected PAIR or --pair, got both: a and b"):
        run("check", "a", "--pair", "b")


def test_ctrl_c_ends_a_command_without_a_traceback(run, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "check", interrupted)
    assert run("check", "a") == (130, [], "")


def test_check_fails_where_two_models_do_not_fit(run, small_pair, tmp_path):
    small_pair[1].save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    code, lines, error = run("check", "--target", DEMO_PAIR / "target", "--draft", tmp_path)
    assert (code, lines) == (1, [])
    assert "hf-specdec check: " in error and "different tokenizers" in " ".join(error.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("{pair}", "--to", "vllm", "{out}"),
        ("--to", "vllm", "{pair}", "{out}"),
        ("{pair}", "{out}", "--to", "vllm"),
        ("--target", "{pair}/target", "--draft", "{pair}/draft", "--to", "vllm", "{out}"),
        ("{out}", "--to", "vllm", "--target", "{pair}/target", "--draft", "{pair}/draft"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_export_writes_files_wherever_its_options_stand(run, tmp_path, arguments):
    out = tmp_path / "out"
    code, lines, _ = run("export", *(argument.format(pair=DEMO_PAIR, out=out) for argument in arguments))
    files = [Path(file) for file in json.loads(lines[-1])["files"]]
    assert code == 0 and sorted(files) == sorted(out.iterdir())
    (note,) = json.loads(lines[-1])["notes"]
    assert lines[:-1] == [f"note: {note}", *(f"wrote {file}" for file in files)]
    assert json.loads((out / "speculative_config.json").read_text())["model"] == str(DEMO_PAIR / "draft")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{out}", "--to", "vllm"), "Expected a pair or a target, got neither"),
        (("{out}", "--to", "vllm", "--target", "org/target"), "No draft is known"),
        (("{pair}", "{out}", "--to", "vllm", "--draft", "org/draft"), "got both"),
        (("{pair}/target", "{out}", "--to", "vllm"), "Expected specdec_pair.json"),
    ],
)
def test_export_refuses_what_is_no_pair(run, tmp_path, arguments, message):
    out = tmp_path / "out"
    code, lines, error = run("export", *(argument.format(pair=DEMO_PAIR, out=out) for argument in arguments))
    assert (code, lines) == (1, []) and message in error and not out.exists()


@pytest.mark.parametrize("arguments", [(), ("export", "pair", "out"), ("export", "--to", "ollama", "p", "o"), ("run",)])
def test_unusable_arguments_show_the_usage(run, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2 and "usage: hf-specdec" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["suggest", "check", "export"])
def test_every_command_has_help(run, capsys, command):
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        text = capsys.readouterr().out
        assert caught.value.code == 0 and command in text


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "hf_specdec", "suggest", "facebook/opt-6.7b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["draft"] == "facebook/opt-125m"
