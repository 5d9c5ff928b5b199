#!/usr/bin/env python
"""Try every class that transformers can generate with: vanilla generate(), HF assisted generation, and speculation.

    ./scripts/compat_matrix                                # all classes
    ./scripts/compat_matrix --only 'Llama|Qwen3'           # those whose name matches
    ./scripts/compat_matrix --write docs/COMPATIBILITY.md  # and write the table

Of each class a tiny random model is built in float32, from the default config with all its kinds of layers, and a
perturbed copy as the draft, which agrees with it in part. Prompts are longer than the sliding windows, and uneven in
batches. Greedy output must be that of vanilla generate(), token by token. Each class runs in a process that is
stopped when it takes too long. The last line of the output is JSON; the exit code is 1 when ours is wrong anywhere.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from hf_specdec.tools.arguments import positive, quiet
from hf_specdec.tools.compat import ERROR, OURS, WRONG
from hf_specdec.tools.compat_table import counts, markdown, summary
from hf_specdec.tools.isolated import Worker
from hf_specdec.tools.tiny_models import entries

SECONDS = 60.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="classes whose names contain a match")
    add("--batch", type=positive, nargs="+", default=[1, 4], metavar="N", help="prompts at a time (default: 1 4)")
    add("--seed", type=int, default=0, help="of weights and prompts (default: 0)")
    add("--seconds", type=float, default=SECONDS, help="time limit of a class (default: %(default)g)")
    add("--write", type=Path, metavar="FILE", help="write the table, in Markdown")
    add("--json", type=Path, metavar="FILE", help="write all results; classes that it holds already are not run again")
    return parser.parse_args(arguments)


def sweep(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    if args.json and args.json.exists():
        known = {result["name"]: result for result in json.loads(args.json.read_text())}
    chosen = [entry for entry in entries() if args.only.search(entry.name)]
    worker = Worker("hf_specdec.tools.compat_worker")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("classes", total=len(chosen))
        for entry in chosen:
            progress.update(task, advance=1, description=entry.name)
            if entry.name in known:
                continue
            question = {"name": entry.name, "batches": args.batch, "seed": args.seed}
            answer = worker.ask(question, args.seconds)
            if "crash" in answer:
                answer = {"name": entry.name, "model_type": entry.model_type, "mappings": list(entry.mappings),
                          "build": None, "cases": [], **answer}  # fmt: skip
            known[entry.name] = answer
            if args.json:
                args.json.write_text(json.dumps(list(known.values()), indent=1))
    worker.stop()
    return [known[entry.name] for entry in chosen]


def main(arguments: list[str] | None = None) -> int:
    args, console = parse(arguments), Console(highlight=False, width=200)
    quiet()
    start = time.perf_counter()
    results = sweep(args, console)
    console.print(summary(results), markup=False, soft_wrap=True)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        command = "./scripts/compat_matrix --write " + str(args.write)
        args.write.write_text(markdown(results, args.batch, command), encoding="utf-8")
    bad = [r["name"] for r in results if any(c.get(OURS, {}).get("outcome") in (WRONG, ERROR) for c in r["cases"])]
    totals = counts(results, args.batch)
    seconds = round(time.perf_counter() - start)
    print(json.dumps({"classes": len(results), "seconds": seconds, "counts": totals, "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
