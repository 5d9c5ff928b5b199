"""Pairs for speculative decoding on the command line.

    hf-specdec suggest Qwen/Qwen3-8B          # which draft suits this target?
    hf-specdec check PAIR                     # do target and draft fit? one table
    hf-specdec check --target T --draft D     # the same for two models
    hf-specdec export PAIR --to vllm DIR      # or sglang, custom-generate: use a pair elsewhere
    hf-specdec generate --pair PAIR --dataset prompts.jsonl --output texts.jsonl
    hf-specdec chat PAIR                      # talk with the target in the terminal

PAIR is a folder or Hub repository with specdec_pair.json; use --target T --draft D to name two models instead. The last
line of the output is JSON, except in a terminal chat.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.console import Console

from .pairs.catalogue import suggest_draft, suggest_heads
from .pairs.export import EXPORTERS, export_pair, pair_to_export
from .tools import generate_dataset, terminal_chat
from .tools.arguments import add_pair_arguments, load_pair, quiet


def suggest(arguments: Sequence[str]) -> int:
    """Name the draft model and the heads that the catalogue pairs with a target."""
    parser = _parser(suggest)
    parser.add_argument("target", metavar="TARGET", help="Hub id or local folder of the target")
    target = parser.parse_args(arguments).target
    heads, found = suggest_heads(target), {}
    try:
        found = asdict(suggest_draft(target))
    except ValueError:
        if not heads:
            raise
    for name, value in found.items():
        if value:
            print(f"{name:8} {value}")
    for head in heads:
        print(f"head     {head.draft} (license: {head.license}). {head.note}")
    print(json.dumps(found | {"heads": [asdict(head) for head in heads]}))
    return 0


def check(arguments: Sequence[str]) -> int:
    """Load a pair and show in one table whether its models fit; exit code 1 if they do not."""
    parser = _parser(check)
    parser.add_argument("name", metavar="PAIR", nargs="?", help="same as --pair")
    add_pair_arguments(parser)
    parser.set_defaults(dtype="auto")
    args = parser.parse_args(arguments)
    quiet()
    pair = load_pair(args)
    Console().print(pair.compatibility)
    print(json.dumps([asdict(finding) for finding in pair.compatibility.findings]))
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write a pair as the options of an inference server, or as a custom_generate repository."""
    parser = _parser(export)
    add = parser.add_argument
    add("pair", metavar="PAIR", nargs="?", help="Hub id or local folder of a pair")
    add("folder", metavar="DIR", help="output folder")
    add("--to", required=True, choices=EXPORTERS, help="what to export for")
    add("--target", help="Hub id or local folder of a target, instead of PAIR")
    add("--draft", help="Hub id or local folder of its draft (default: the catalogue's)")
    add("--revision", help="revision of PAIR, or of the target, on the Hub")
    args = parser.parse_intermixed_args(arguments)  # DIR may follow --to
    pair = pair_to_export(args.pair, args.target, args.draft, args.revision)
    exported = export_pair(pair, args.to, args.folder)
    for note in exported.notes:
        print(f"note: {note}")
    for file in exported.files:
        print(f"wrote {file}")
    print(json.dumps({"files": list(map(str, exported.files)), "notes": exported.notes}))
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Generate a text for each row of a dataset; the same command goes on where it was interrupted."""
    parser = _parser(generate)
    generate_dataset.add_arguments(parser)
    generate_dataset.run(parser.parse_args(arguments))
    return 0


def chat(arguments: Sequence[str]) -> int:
    """Talk with a pair in the terminal, accepted drafts in colour; or answer questions from a pipe, one per line."""
    parser = _parser(chat)
    terminal_chat.add_arguments(parser)
    terminal_chat.run(parser.parse_args(arguments))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "suggest": suggest,
    "check": check,
    "export": export,
    "generate": generate,
    "chat": chat,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can fix are printed, with exit code 1."""
    parser = argparse.ArgumentParser(
        prog="hf-specdec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    try:
        return COMMANDS[chosen.command](rest)
    except (OSError, ValueError) as error:
        print(f"hf-specdec {chosen.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(command: Callable[[Sequence[str]], int]) -> argparse.ArgumentParser:
    """Each command parses for itself: argparse cannot mix options and positionals in subparsers."""
    return argparse.ArgumentParser(prog=f"hf-specdec {command.__name__}", description=command.__doc__)
