#!/usr/bin/env python
"""hf_specdec beside llama.cpp and OpenVINO GenAI on this CPU: SmolLM2-135M-Instruct, one row, greedy.

    ./scripts/compare_engines                        # 12 held-out chat prompts, 3 rounds
    ./scripts/compare_engines --only hf_specdec llama.cpp --prompts 6

All have the same weights: the wheel's 4-bit file, with more bits; OpenVINO reads them in float16 and computes in the
type of the table. Each engine is in a process of its own, and they take turns, prompt by prompt. Prompts are given as
tokens, and every engine makes the same number of new ones, whatever they are. Look-up is what the other two have for
drafts without a second model. The last line of the output is JSON.
"""

import argparse
import json
import os
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hf_specdec.tools.arguments import positive, quiet
from hf_specdec.tools.chat_prompts import CATEGORIES, balanced, prompts
from hf_specdec.tools.engines import ENGINES, Engine, Team, Timed, versions
from hf_specdec.tools.smollm2 import smollm2_folder
from hf_specdec.tools.surroundings import instruction_set
from hf_specdec.tools.texts import prompt_ids


def measure(
    engines: tuple[Engine, ...], asked: list[list[int]], new_tokens: int, rounds: int, threads: int
) -> dict[Engine, list[Timed] | str]:
    """Every answer of each engine, round after round, or why it has none."""
    found: dict[Engine, list[Timed] | str] = {engine: [] for engine in engines}
    team = Team(engines, threads)
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("", total=rounds * len(asked) * len(engines))
            for turn in range(rounds * len(asked)):
                for number in range(len(engines)):
                    engine = engines[(number + turn) % len(engines)]  # each comes first now and then
                    progress.update(task, description=engine.name, advance=1)
                    so_far = found[engine]
                    if isinstance(so_far, str):
                        continue
                    answer = team.answer(engine, asked[turn % len(asked)], new_tokens)
                    if isinstance(answer, str):
                        found[engine] = answer
                    else:
                        so_far.append(answer)
    finally:
        team.end()
    return found


def summary(found: dict[Engine, list[Timed] | str]) -> list[dict[str, Any]]:
    """A row of the table for each engine; ratios are to the first one, prompt by prompt."""
    base = next(iter(found.values()))
    rows: list[dict[str, Any]] = []
    for engine, answers in found.items():
        if isinstance(answers, str) or isinstance(base, str):
            rows.append({"engine": engine.name, "failed": answers})
            continue
        seconds, first = [answer.seconds for answer in answers], [answer.first_seconds for answer in answers]
        rows.append(
            {
                "engine": engine.name,
                "tokens_per_second": sum(len(answer.tokens) for answer in answers) / sum(seconds),
                "ratio": median(one.seconds / other.seconds for one, other in zip(base, answers)),
                "first_seconds": median(first),
                "same_texts": sum(one.tokens == other.tokens for one, other in zip(base, answers)) / len(answers),
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    programs = list(dict.fromkeys(engine.program for engine in ENGINES))
    add("--only", nargs="+", choices=programs, default=programs, metavar="PROGRAM",
        help=f"beside transformers in float32: {', '.join(programs)} (default: all)")  # fmt: skip
    add("--prompts", type=positive, default=12, metavar="N", help="held-out chat prompts (default: 12)")
    add("--new-tokens", type=positive, default=96, metavar="N", help="tokens per prompt (default: 96)")
    add("--rounds", type=positive, default=3, metavar="N", help="timed rounds (default: 3)")
    add("--threads", type=positive, default=os.cpu_count(), metavar="N", help="of each engine (default: one per core)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    quiet()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    held_out = balanced(prompts(held_out=True), -(-args.prompts // len(CATEGORIES)))[: args.prompts]
    asked = [prompt_ids(row["prompt"], tokenizer, True, None) for row in held_out]
    engines = tuple(each for each in ENGINES if each == ENGINES[0] or each.program in args.only)
    rows = summary(measure(engines, asked, args.new_tokens, args.rounds, args.threads))

    table = Table("", "tokens/s", f"against {ENGINES[0].name}", "first token", "its texts", box=SIMPLE_HEAD)
    for row in rows:
        if "failed" in row:
            table.add_row(row["engine"], "-", "-", "-", str(row["failed"]))
            continue
        figures = f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}x", f"{row['first_seconds']:.2f} s"
        table.add_row(row["engine"], *figures, f"{row['same_texts']:.0%}")
    about = {"instruction_set": instruction_set(), "threads": args.threads, "versions": versions()}
    console = Console()
    console.print(table)
    console.print(
        f"{len(asked)} prompts, {args.new_tokens} new tokens; {about['instruction_set']}, {args.threads} threads"
    )
    print(json.dumps({"engines": rows, **about, "prompts": len(asked), "new_tokens": args.new_tokens}))


if __name__ == "__main__":
    main()
