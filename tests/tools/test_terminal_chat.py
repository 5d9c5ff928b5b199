"""hf-specdec chat: a piped session, the colours and the interrupts of a terminal, and its arguments."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from test_conversation import QUESTIONS, TEMPLATE, conversation
from test_conversation import embedded as embedded
from test_conversation import llama as llama
from transformers import PreTrainedModel

from hf_specdec import SpecPair
from hf_specdec.cli import main
from hf_specdec.pairs.heads import DEMO_HEAD
from hf_specdec.records.trace import STYLES, Trace, committed_roles
from hf_specdec.tools import smollm2, terminal_chat
from hf_specdec.tools.conversation import Conversation
from hf_specdec.tools.terminal_chat import COMMANDS, Chat, Screen, _Interrupts, _typed_lines

Run = Callable[..., tuple[int, list[str], str]]
GREEN = re.compile(r"\x1b\[32m(.*?)\x1b\[0m", re.DOTALL)
assert STYLES["accepted"] == "green"


@pytest.fixture
def run(embedded: SpecPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command with these lines from a pipe: its exit code, lines of stdout, and stderr."""
    monkeypatch.setattr(terminal_chat, "load_pair", lambda args: embedded)

    def command(lines: list[str], *arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return command


def test_a_piped_session(run):
    asked = ["def fib(n):", "", "/compare", "class Stack:", "/stats", "/help", "/reset", "import os", "/exit", "never"]
    code, lines, _ = run(asked, "--max-new-tokens", "16")
    turns = json.loads(lines[-1])["turns"]
    assert code == 0 and len(turns) == 3 and not any("\x1b" in line for line in lines)
    assert [line[2:] for line in lines if line.startswith("> ")] == [line for line in asked[:-1] if line]
    assert [turn["reused"] > 0 for turn in turns] == [False, True, False]
    assert turns[0]["identical"] and turns[0]["speedup"] > 0
    assert [turn["tokens"] for turn in turns] == [16] * 3 and 0 < turns[1]["acceptance_rate"] <= 1
    text = "\n".join(lines)
    assert "no chat template: your text is continued" in text and "embedded pair" in text
    assert text.count(turns[0]["text"]) == 2 and "the same 16 tokens" in text  # ours, and plain generate()
    assert text.count("the length limit was reached") == 3
    assert all(f"{name} " in text and str(command.__doc__) in text for name, command in COMMANDS.items())
    assert f"{sum(turn['tokens'] for turn in turns[:2])} tokens in " in text  # of /stats


def test_sampling_options_reach_generate(run):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        _, lines, _ = run(["def "], "--temperature", "1.5", "--top-p", "0.95", "--max-new-tokens", "12")
        texts.append(json.loads(lines[-1])["turns"][0]["text"])
    assert texts[0] == texts[1] != texts[2]
    _, lines, _ = run(["def ", "/compare"], "--temperature", "1.5", "--top-p", "1e-9", "--max-new-tokens", "12")
    assert json.loads(lines[-1])["turns"][0]["identical"]  # only the likeliest token is left


@pytest.mark.parametrize(("drafter", "chosen"), [("lookup", {}), ("head", {"assistant_model": str(DEMO_HEAD)})])
def test_other_drafters(run, monkeypatch, drafter, chosen):
    begun: list[Conversation] = []
    warm_up = Conversation.warm_up
    monkeypatch.setattr(Conversation, "warm_up", lambda self: (begun.append(self), warm_up(self)))
    _, lines, _ = run(["import os", "import os", "/compare"], "--drafter", drafter, "--max-new-tokens", "12")
    turns = json.loads(lines[-1])["turns"]
    assert turns[1]["identical"] and turns[1]["reused"] > 0
    assert begun[0].drafting == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0", "--top-p", "0.9"], "--top-p samples, and --temperature 0 is greedy"),
        (["--real", "some/pair"], "--real is a pair of its own: leave out PAIR"),
        (["--real", "--draft-gguf-file", "x"], "leave out --draft-gguf-file"),
        (["--system", "be kind"], "no chat template, so --system has no place"),
    ],
)
def test_arguments_that_contradict_each_other(run, arguments, message):
    code, lines, error = run(["hello"], *arguments)
    assert (code, lines) == (1, []) and message in error


@pytest.mark.parametrize("arguments", [["--temperature", "-1"], ["--temperature", "hot"], ["--top-p", "0"]])
def test_numbers_are_checked(run, capsys, arguments):
    with pytest.raises(SystemExit):
        run([], *arguments)
    assert re.search(f"argument {arguments[0]}: expected a number .*, got {arguments[1]}", capsys.readouterr().err)


@pytest.mark.parametrize(("line", "message"), [("/compare", "ask something first"), ("/quit", "got '/quit'")])
def test_errors_end_a_piped_session(run, line, message):
    code, _, error = run([line])
    assert code == 1 and message in error


def test_the_real_pair_is_loaded_when_it_is_asked_for(run, llama, tokenizer, monkeypatch):
    pair = conversation(llama, tokenizer).pair
    monkeypatch.setattr(smollm2, "smollm2_pair", lambda dtype, device: (pair.target, pair.draft, pair.tokenizer))
    code, lines, _ = run(["what is abc", "/compare"], "--real", "--max-new-tokens", "8")
    assert code == 0 and json.loads(lines[-1])["turns"][0]["identical"]
    assert not any("template" in line for line in lines)


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def chat(llama: PreTrainedModel, tokenizer: Any, shown: io.StringIO) -> Chat:
    console = Console(file=shown, force_terminal=True, color_system="standard", highlight=False, width=200)
    return Chat(conversation(llama, tokenizer, TEMPLATE), console, is_terminal=True)


def test_accepted_drafts_are_green(chat, shown):
    told = chat._conversation
    assert chat.take(QUESTIONS[0])
    (turn,) = told.turns
    trace, ids = Trace(), torch.tensor([turn.prompt])
    told.pair.target.generate(ids, **told.drafting, strategy="spec", speculation_trace=trace, max_new_tokens=24)
    roles = [token for iteration in trace.iterations for token in committed_roles(iteration.rows[0])]
    assert [token for token, _ in roles] == turn.answer
    accepted = [token for token, role in roles if role == "accepted"]
    answer = shown.getvalue().rpartition("\x1b[2m")[0]  # the status line is dim
    assert 0 < len(accepted) < len(roles)
    assert letters("".join(GREEN.findall(answer))) == letters(
        told.pair.tokenizer.decode(accepted, skip_special_tokens=True)
    )
    assert re.sub(r"\x1b\[\d+m", "", answer).strip("\n") == turn.text.strip("\n")


def letters(text: str) -> str:
    return re.sub(r"\W", "", text)


def test_errors_do_not_end_a_chat_in_a_terminal(chat, shown):
    assert chat.take("/compare") and "ask something first" in shown.getvalue()
    assert chat.take("hello " * 100) and "too long" in shown.getvalue()
    assert not chat.take("/exit")


def test_ctrl_c_ends_the_answer_only(chat, shown, monkeypatch):
    show, handler, presses = Screen.show, signal.getsignal(signal.SIGINT), [1, 1]

    def show_and_press(self: Screen, token: int, style: str) -> None:
        show(self, token, style)
        if presses and len(chat.report) == 1 + (style == "dim"):
            presses.pop()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Screen, "show", show_and_press)
    for question in (QUESTIONS[0], QUESTIONS[1], "/compare", QUESTIONS[2]):
        assert chat.take(question)
    whole, cut, after = chat.report
    assert cut["finished"] == "interrupted" and 0 < cut["tokens"] < whole["tokens"]
    assert "Interrupted, so nothing is compared" in shown.getvalue() and "speedup" not in cut
    assert after["finished"] != "interrupted" and after["reused"] > 0 and not presses
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_second_ctrl_c_is_immediate():
    with pytest.raises(KeyboardInterrupt), _Interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_text_of_the_model_cannot_control_the_terminal(chat, shown, monkeypatch):
    monkeypatch.setattr(chat._conversation.pair, "tokenizer", Odd())
    screen = Screen(chat._conversation, chat._console)
    for token in range(len(Odd.TEXT)):
        screen.show(token, "")
    assert shown.getvalue() == "a[2Jb\n\tc👍"


class Odd:
    """Tokens are the bytes of a text that would clear the screen."""

    TEXT = "a\x1b[2J\x07b\n\tc\x9b👍".encode()

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(self.TEXT[token] for token in tokens).decode(errors="replace")


def test_lines_that_are_typed():
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("one\r\r two\x1b\rlines\r/co\t\r\x03")
        assert list(_typed_lines()) == ["one", " two\nlines", "/compare"]


def test_a_terminal_without_prompt_toolkit_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_specdec\[chat\]'"):
        _typed_lines()


BEGINS = "\x1b[?2004h"  # the mode of a terminal in which prompt_toolkit waits for a line


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *command: str):
        variables = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._process, self._keys = pty.fork()
        if self._process == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows, columns
            os.execve(command[0], command, variables)
        self._read = ""

    def press(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until this has been shown, after what was waited for before."""
        while text not in self._read:
            assert select.select([self._keys], [], [], 120)[0], f"{text!r} did not come: {self._read!r}"
            self._read += os.read(self._keys, 1 << 16).decode(errors="replace")
        self._read = self._read.partition(text)[2]

    def end(self) -> int:
        """The exit code."""
        status = os.waitpid(self._process, 0)[1]
        os.close(self._keys)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow  # a process that begins anew
def test_a_session_in_a_terminal():
    terminal = Terminal(sys.executable, "-m", "hf_specdec", "chat", "--device", "cpu", "--max-new-tokens", "2000")
    terminal.wait_for(BEGINS)
    terminal.press("import os\r")
    terminal.wait_for("\x1b[32m")
    terminal.press("\x03")
    terminal.wait_for("· interrupted")
    terminal.wait_for(BEGINS)
    terminal.press("/stats\r")
    terminal.wait_for("acceptance rate")
    terminal.wait_for(BEGINS)
    terminal.press("\x04")
    assert terminal.end() == 0
