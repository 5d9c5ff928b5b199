#!/usr/bin/env python
"""Find the draft length and schedule that suit a pair on your prompts, and save them in its pair file.

    ./scripts/tune                                       # the embedded pair: a few minutes, writes nothing
    ./scripts/tune --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B --dtype bfloat16 --dataset mine.jsonl --write my-pair
    ./scripts/tune --pair my-pair --batch 8 --write my-pair

All candidates and vanilla generate() take turns; the slower half drops out after each round, until the time is over.
The winner is written into the pair file in the folder --write, so that
`SpecPair.from_pretrained(FOLDER).generate(...)` uses it. Speculation does not pay if the winner was slower than vanilla
in more than a quarter of the rounds. The pair file then records this, and its `generate` decodes without speculation.
A folder without a pair file gets one that refers to the models where they are.

If prompts or tokens are too few for a conclusion, nothing is written and the exit code is 1. This means fewer than 8
batches, or a 95 % interval of the speed-up (bootstrap over batches) that contains 1 or is wider than 20 % to either
side. Decoding is greedy; in float32, if any token differs from vanilla, the exit code is 1 and nothing is written. The
last line is JSON.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hf_specdec.loop.schedule import SCHEDULES
from hf_specdec.tools import arguments, methods, report, synthetic, tuning
from hf_specdec.tools.bare import BareForwards
from hf_specdec.tools.settings import check_positions, make_setting

# "heuristic_transient" is "heuristic", except that it forgets what it learned after each call.
TRIED = [name for name in SCHEDULES if name not in ("constant", "heuristic_transient")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_pair_arguments(parser)
    synthetic.add_arguments(parser)
    arguments.add_prompt_arguments(parser, prompts=8)
    add = parser.add_argument_group("search").add_argument
    gammas = [1, 2, 3, 4, 5, 6, 8, 12]
    add("--gamma", nargs="+", type=arguments.positive, default=gammas, metavar="γ",
        help=f"constant draft lengths to try (default: {' '.join(map(str, gammas))})")  # fmt: skip
    add("--schedule", nargs="*", choices=TRIED, default=TRIED, help=f"schedules to try (default: {' '.join(TRIED)})")
    add("--confidence", nargs="*", type=float, metavar="P",
        help="also the longest γ, cut short when the draft's confidence is below P (default: 0.3 0.5; none for "
        "drafters that copy)")  # fmt: skip
    add("--drafter", type=methods.drafter, default="model", metavar="NAME",
        help=f"what drafts: {methods.DRAFTER_HELP} (default: model)")  # fmt: skip
    add("--batch", type=arguments.positive, default=1, metavar="N", help="rows per batch (default: 1)")
    add("--new-tokens", type=arguments.positive, default=64, metavar="N", help="tokens per prompt (default: 64)")
    add("--minutes", type=float, default=2.0, help="approximate time to measure (default: 2)")
    add = parser.add_argument_group("output").add_argument
    add("--write", metavar="FOLDER", help="write the outcome into the pair file there; a missing one is made")
    args = parser.parse_args()
    if args.write and args.drafter != "model":
        parser.error(f"--write is for the pair's own draft, but --drafter is {args.drafter}: leave one of them out")
    takes_threshold = methods.takes_threshold(args.drafter)
    if args.confidence and not takes_threshold:
        parser.error(f"--confidence is for models and heads, but --drafter is {args.drafter}: leave one of them out")
    if args.confidence is None:
        args.confidence = [0.3, 0.5] if takes_threshold else []
    return args


def show(console: Console, contenders: list[tuning.Contender], setting: str) -> None:
    table = Table("options", title=setting, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("speed-up", "rounds", "α", "τ"):
        table.add_column(heading, justify="right")
    for contender in contenders:
        stats, rounds = contender.record.stats, len(contender.record.rounds)
        rates = f"{stats.acceptance_rate:.2f}", f"{stats.block_efficiency:.2f}"
        table.add_row(contender.name, report.spread(asdict(contender.speedup)), str(rounds), *rates)
    console.print(report.fitted(table))


def main() -> int:
    args = parse()
    arguments.quiet()
    console = Console(highlight=False)
    pair = synthetic.load(args)
    before = tuning.pair_file_for(pair, Path(args.write)) if args.write else pair.config
    pool = argparse.Namespace(**{**vars(args), "prompts": -(-args.prompts // args.batch) * args.batch})
    prompts = arguments.load_prompts(pool, pair.tokenizer)
    setting = make_setting(prompts, args.prompts, args.batch, None, False, pair.tokenizer, pair.target.device)
    for model in (pair.target, pair.draft):
        if isinstance(model, PreTrainedModel):  # heads go as far as their target
            check_positions(model, setting, args.new_tokens)

    tried = tuning.candidates(args.gamma, args.schedule, args.confidence)
    bare = BareForwards(pair.target, pair.draft, methods.heads([args.drafter], pair.target))
    with Console(stderr=True).status("measuring") as status:
        contenders = tuning.race(
            pair, tried, setting, args.new_tokens, args.minutes * 60, bare, status.update, args.drafter
        )
    show(console, contenders, setting.label)
    best = contenders[0]
    about = report.surroundings(pair, shlex.join(["./scripts/tune", *sys.argv[1:]]))
    after = tuning.outcome(before, best, tuning.measured_entry(best, bare, setting, about))
    doubt = tuning.doubt(best, setting)
    if doubt:
        console.print(f"[bold]No conclusion[/], and nothing is written: {doubt}.")
    elif after.speculate:
        console.print(f"Speculation pays: [bold]{best.name}[/], {report.spread(asdict(best.speedup))} vanilla's speed.")
    else:
        console.print(
            f"[bold]Speculation does not pay here[/]: even {best.name} has {report.spread(asdict(best.speedup))} "
            "vanilla's speed. Decode without it, or use a smaller or better draft."
        )
    differing = sum(len(contender.record.differing) for contender in contenders)
    failed = differing > 0 and pair.target.dtype == torch.float32
    if failed:
        console.print(f"[bold red]{differing} rows differ from vanilla's[/]: in float32 a bug; nothing is written")
    elif args.write and not doubt:
        console.print(f"Written to {after.save(args.write)}: SpecPair.from_pretrained({args.write!r}).generate(...)")
    elif not doubt:
        console.print("Nothing is written; --write FOLDER saves this in a pair file.")
    result = {"speculate": after.speculate, "recommended": after.recommended, "measured": after.measured[-1]}
    if doubt:
        result |= {"speculate": None, "recommended": {}}
    result["tried"] = {c.name: asdict(c.speedup) | {"rounds": len(c.record.rounds)} for c in contenders}
    print(json.dumps(result | {"differing_rows": differing, "doubt": doubt}))
    return 1 if failed or doubt else 0


if __name__ == "__main__":
    raise SystemExit(main())
