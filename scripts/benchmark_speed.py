#!/usr/bin/env python
"""How fast: vanilla generate(), HF assisted generation, and hf_specdec, by draft length, batch size and context length.

    ./scripts/benchmark_speed                                      # the embedded pair, no network, about two minutes
    ./scripts/benchmark_speed --html report.html                   # a page with tables and figures
    ./scripts/benchmark_speed --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B --dtype bfloat16 \\
        --dataset question.jsonl --prompts 48 --chat-template      # Spec-Bench's questions, by its categories
    ./scripts/benchmark_speed --synthetic big --dtype bfloat16 --batch 8 --context 256 --ragged --rounds 5
    ./scripts/benchmark_speed --edits --drafter model lookup suffix either --spec 8    # by what drafts

All methods take turns in one process, batch by batch. Ratios are to vanilla, within a round; the table gives their
median over the rounds and, in parentheses, the quartiles. "first" is the time to the first token, mostly prefill;
"decode" starts with the next target forward, when both models have read the prompt. The ideal is the speed-up at the
measured τ if only the bare forwards of target and draft took time; "reached" is the share of it that decoding reaches.
The first values of --batch and --context are the base setting; the others are tried one at a time. Everything is
greedy, unless --samples asks for several sampled texts of each prompt. In float32 the exit code is 1 if any token
differs from vanilla; in bfloat16 and float16, where near-ties may fall differently, differing rows are only counted.
The last line of the output is JSON.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel

from hf_specdec.options import COMPILABLE
from hf_specdec.pairs import SpecPair
from hf_specdec.tools import arguments, measure, methods, report, summary, synthetic
from hf_specdec.tools.bare import BareForwards
from hf_specdec.tools.load import busy
from hf_specdec.tools.settings import OWN, Setting, check_positions, make_setting

POOL = 200  # prompts to build longer contexts from
SPEEDS = 4  # columns in the first table; the others are in the second
CATEGORIES = 3  # columns per table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_pair_arguments(parser)
    synthetic.add_arguments(parser)
    arguments.add_prompt_arguments(parser, prompts=4)
    add = parser.add_argument_group("methods").add_argument
    add("--spec", nargs="*", type=way, default=["3", "5", "8", "default"], metavar="WAY",
        help="ours: γ, a schedule's name, or `default`, the library's choice (default: 3 5 8 default)")  # fmt: skip
    add("--drafter", nargs="+", type=methods.drafter, default=["model"], metavar="NAME",
        help=f"what drafts in ours: {methods.DRAFTER_HELP} (default: model)")  # fmt: skip
    add("--hf", nargs="*", type=way, default=["5", "default"], metavar="WAY",
        help="HF assisted generation, likewise (default: 5 default)")  # fmt: skip
    add("--compile", nargs="?", const=True, default=False, choices=COMPILABLE,
        help="also ours with draft, target and attention compiled, or one of them (`speculation_compile`)")  # fmt: skip
    add("--unpacked", action="store_true", help="also ours without packed weights (`speculation_pack_weights=False`)")
    add("--lookup", nargs="*", type=arguments.positive, default=[8], metavar="γ",
        help="prompt look-up, ours and HF's (default: 8)")  # fmt: skip
    add = parser.add_argument_group("settings").add_argument
    add("--batch", nargs="+", type=arguments.positive, default=[1, 4], metavar="N", help="batch sizes (default: 1 4)")
    add("--context", nargs="+", type=context, default=[None, 512], metavar="N",
        help="prompt tokens, made by joining prompts, or `own` for their own lengths (default: own 512)")  # fmt: skip
    add("--ragged", action="store_true", help="spread row lengths in a batch from a quarter of --context to all of it")
    add("--new-tokens", type=arguments.positive, default=48, metavar="N", help="tokens per prompt (default: 48)")
    add("--samples", type=arguments.positive, metavar="N", help="sample N texts of each prompt (default: one, greedy)")
    add("--busy", type=arguments.count, default=0, metavar="N",
        help="keep the machine busy with so many other processes meanwhile (default: 0)")  # fmt: skip
    add("--rounds", type=arguments.positive, default=3, metavar="N", help="timed rounds, after a warm-up (default: 3)")
    add = parser.add_argument_group("output").add_argument
    add("--html", metavar="PATH", help="write a report with tables and figures")
    add("--json", metavar="PATH", help="also write the last line to a file")
    return parser.parse_args()


def way(value: str) -> str:
    if not methods.is_way(value):
        raise argparse.ArgumentTypeError(f"expected a γ of at least 1, `default` or a schedule's name, got {value!r}")
    return value


def context(value: str) -> int | None:
    return None if value == OWN else arguments.positive(value)


def make_methods(args: argparse.Namespace, pair: SpecPair) -> list[measure.Method]:
    chosen = [methods.vanilla()]
    different = pair.tokenizers if pair.has_two_tokenizers else {}
    if isinstance(pair.draft, PreTrainedModel):  # transformers has none of the other heads
        chosen += [methods.assisted(pair.draft, name, different) for name in args.hf]
    variants: dict[str, dict[str, Any]] = {"": {}}
    if args.compile:
        variants[" compiled"] = {"speculation_compile": args.compile}
    if args.unpacked:
        variants[" unpacked"] = {"speculation_pack_weights": False}
    for label, more in variants.items():
        chosen += [
            methods.ours(
                pair.draft, {**methods.way_options(way), **more, **different}, methods.way_label(way) + label, drafter
            )
            for drafter in args.drafter
            for way in args.spec
        ]
    for gamma in args.lookup:
        chosen += [methods.assisted_lookup(gamma), methods.ours_lookup(gamma)]
    return chosen


def make_settings(args: argparse.Namespace, pair: SpecPair) -> list[Setting]:
    pool = argparse.Namespace(**{**vars(args), "prompts": max(POOL, args.prompts, *args.batch)})
    prompts = arguments.load_prompts(pool, pair.tokenizer)
    shapes = [(args.batch[0], length) for length in args.context] + [(rows, args.context[0]) for rows in args.batch[1:]]
    settings = [
        make_setting(prompts, args.prompts, rows, length, args.ragged, pair.tokenizer, pair.target.device)
        for rows, length in shapes
    ]
    for setting in settings:
        for model in (pair.target, pair.draft):
            if isinstance(model, PreTrainedModel):  # heads go as far as their target
                check_positions(model, setting, args.new_tokens)
    return settings


def show(console: Console, result: dict[str, Any]) -> None:
    """One setting's tables, none wider than 80 columns."""
    rows = {name: report.cells(figures) for name, figures in result["methods"].items()}
    for at, until in ((0, SPEEDS), (SPEEDS, len(report.COLUMNS))):
        show_table(console, result["label"], report.COLUMNS[at:until], {k: row[at:until] for k, row in rows.items()})
    for line in filter(None, (report.bare_forwards(result["bare"]), report.without_ideal(result))):
        console.print(line, markup=False)
    for name, figures in result["methods"].items():
        if "refused" in figures:
            console.print(f"{name} refused: {figures['refused']}", markup=False)
    names, cells = report.categories(result)
    for at in range(0, len(names), CATEGORIES):
        chosen = {name: shown[at : at + CATEGORIES] for name, shown in cells.items()}
        show_table(console, f"speed-up by category: {result['label']}", names[at : at + CATEGORIES], chosen)


def show_table(console: Console, title: str, headings: Sequence[str], rows: dict[str, list[str]]) -> None:
    table = Table("method", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(report.fitted(table))


def main() -> int:
    args = parse()
    arguments.quiet()
    console = Console(highlight=False)
    pair = synthetic.load(args)
    chosen, settings = make_methods(args, pair), make_settings(args, pair)
    result = report.surroundings(pair, shlex.join(["./scripts/benchmark_speed", *sys.argv[1:]]))
    result |= {"new_tokens": args.new_tokens, "rounds": args.rounds, "busy": args.busy, "samples": args.samples}
    result["settings"] = []
    console.print(report.machine(result), markup=False)
    runs = sum(len(setting.batches) for setting in settings) * len(chosen) * (args.rounds + 1)
    with busy(args.busy), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=runs)
        for setting in settings:
            bare = BareForwards(pair.target, pair.draft, methods.heads(args.drafter, pair.target))

            def advance(name: str, label: str = setting.label) -> None:
                progress.update(task, advance=1, description=f"{label}: {name}")

            comparison = measure.Comparison(
                pair.target, chosen, setting.batches, args.new_tokens, bare, advance, samples=args.samples
            )  # fmt: skip
            comparison.warm_up()
            comparison.weigh()
            for _ in range(args.rounds):
                comparison.round()
            result["settings"].append(summary.summarise(setting, comparison.records, bare))
    for setting_result in result["settings"]:
        show(console, setting_result)
    result["growth"] = summary.growth(result["settings"])
    if result["growth"]:
        grown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in result["growth"].items())
        console.print(f"cost of a decoded token at the longest context, relative to the shortest: {grown}")
    differing = sum(f.get("differing_rows", 0) for s in result["settings"] for f in s["methods"].values())
    result["identical"] = differing == 0
    failed = differing > 0 and pair.target.dtype == torch.float32
    if args.html:
        report.write(result, Path(args.html))
        console.print(f"The report is in {args.html}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if failed:
        console.print(f"[bold red]{differing} rows differ from vanilla's[/]: in float32 that is a bug")
    print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
