#!/usr/bin/env python
"""Try every class that transformers can generate with: vanilla generate(), HF assisted generation, and speculation.

    ./scripts/compat_matrix                                # all classes
    ./scripts/compat_matrix --only 'Llama|Qwen3'           # classes whose name matches
    ./scripts/compat_matrix --write docs/COMPATIBILITY.md  # also write the table
    ./scripts/compat_matrix --dtype float32                # one dtype (default: float32 and bfloat16)

For each class, a tiny random model is built from the default config with all its kinds of layers. The draft is a
perturbed copy that agrees with it in part. Prompts are longer than the sliding windows and have uneven lengths in a
batch. Greedy output must equal vanilla generate()'s, token by token; if a row differs, the rule of check_lossless
decides whether rounding explains it. Each class runs in a process that is stopped if it takes too long. The last line
of the output is JSON; the exit code is 1 if ours is wrong or crashes anywhere.
"""

import argparse
import json
import os
import queue
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from hf_specdec.tools.arguments import positive, quiet
from hf_specdec.tools.compat import ERROR, OURS, WRONG
from hf_specdec.tools.compat_table import by_dtype, counts, markdown, summary
from hf_specdec.tools.isolated import Worker
from hf_specdec.tools.tiny_models import Entry, every_entry

SECONDS = 60.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="classes whose names contain a match")
    add("--batch", type=positive, nargs="+", default=[1, 4], metavar="N", help="prompts per batch (default: 1 4)")
    add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"],
        help="dtypes of the models (default: float32 bfloat16)")  # fmt: skip
    add("--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    add("--seed", type=int, default=0, help="seed of weights and prompts (default: 0)")
    add("--seconds", type=float, default=SECONDS, help="time limit per class (default: %(default)g)")
    add("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    add("--json", type=Path, metavar="FILE", help="write all results; classes already in the file are not run again")
    return parser.parse_args(arguments)


def sweep(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    known: dict[tuple[str, str], dict[str, Any]] = {}
    if args.json and args.json.exists():
        known = {(result["name"], result["dtype"]): result for result in json.loads(args.json.read_text())}
    listed = every_entry()
    chosen = [(entry, dtype) for dtype in args.dtype for entry in listed if args.only.search(entry.name)]
    workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for _ in range(args.jobs):
        workers.put(Worker("hf_specdec.tools.compat_worker"))

    def ask(entry: Entry, dtype: str) -> dict[str, Any]:
        question = {"entry": asdict(entry), "batches": args.batch, "seed": args.seed, "dtype": dtype}
        worker = workers.get()
        try:
            answer = worker.ask(question, args.seconds)
        finally:
            workers.put(worker)
        if "crash" in answer:
            about = {"name": entry.name, "model_type": entry.model_type, "mappings": list(entry.mappings)}
            answer = {**about, "dtype": dtype, "build": None, "cases": [], **answer}
        return answer

    with Progress(console=Console(stderr=True), transient=True) as progress, ThreadPoolExecutor(args.jobs) as pool:
        task = progress.add_task("classes", total=len(chosen))
        missing = [(entry, dtype) for entry, dtype in chosen if (entry.name, dtype) not in known]
        progress.update(task, advance=len(chosen) - len(missing))
        for answer in pool.map(lambda question: ask(*question), missing):
            progress.update(task, advance=1, description=answer["name"])
            known[answer["name"], answer["dtype"]] = answer
            if args.json:
                args.json.write_text(json.dumps(list(known.values()), indent=1))
    while not workers.empty():
        workers.get().stop()
    return [known[entry.name, dtype] for entry, dtype in chosen]


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
    bad = {
        dtype: [r["name"] for r in own if any(c.get(OURS, {}).get("outcome") in (WRONG, ERROR) for c in r["cases"])]
        for dtype, own in by_dtype(results).items()
    }
    totals = {dtype: counts(own, args.batch) for dtype, own in by_dtype(results).items()}
    seconds = round(time.perf_counter() - start)
    classes = len({result["name"] for result in results})
    print(json.dumps({"classes": classes, "seconds": seconds, "counts": totals, "bad": bad}))
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
