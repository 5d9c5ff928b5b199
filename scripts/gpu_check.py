#!/usr/bin/env python
"""Prove hf_specdec on a GPU, and measure it there: one command, at most 8 minutes, without a network.

    ./scripts/gpu_check                             # everything, on CUDA
    ./scripts/gpu_check --tiny                      # the same in small on the CPU, to try the check itself
    ./scripts/gpu_check --parts tokens static       # groups of parts, or single ones such as tokens/alibi
    ./scripts/gpu_check --list                      # the names of the parts, in their order, and their limits
    OUT=/tmp/results ./scripts/gpu_check            # where to write; by default ./gpu_check

It needs the repository, torch and transformers; PYTHON names another interpreter than python3. First come checks of
correctness: greedy tokens of many families of models against vanilla generate() in float32, calls after weights have
changed, bfloat16, samples, and operations that wait for the GPU. Then comes the speed of random Llamas with the shapes
of public ones.

Parts run in a process of their own, each within a time limit. gpu_check.json and gpu_check.md are written after every
part, so a run that is killed leaves what it had. The exit code is 1 if anything is WRONG, raised an error or timed out,
or if the limit of --minutes left out a check of correctness; settings of speed may be left out. The last line of the
output is JSON.
"""

import argparse
import json
import os
import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path

import torch

from hf_specdec.tools import gpu_check_worker
from hf_specdec.tools.gpu_check import Part, Scale
from hf_specdec.tools.gpu_check_report import Report, line
from hf_specdec.tools.gpu_check_supervisor import Supervisor
from hf_specdec.tools.isolated import Worker
from hf_specdec.tools.surroundings import commit

NO_CUDA = (
    "gpu_check: expected a CUDA device, found none. Run it on a machine with an NVIDIA GPU and a PyTorch built for "
    "CUDA (PYTHON names its interpreter), or run it in small on this CPU with --tiny."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", metavar="NAME", help="parts to run, by name or by group, the word before the slash")
    add("--minutes", type=float, default=8.0, metavar="N", help="time limit for everything (default: %(default)g)")
    add("--device", help="default: cuda; with --tiny: cpu")
    add("--tiny", action="store_true", help="tiny models and few tokens, on the CPU")
    add("--list", action="store_true", help="list the parts and run none")
    return parser.parse_args(arguments)


def chosen(parts: list[Part], names: list[str] | None) -> list[Part]:
    """The parts that `--parts` names, in their own order."""
    if names is None:
        return parts
    known = {part.name for part in parts} | {part.name.partition("/")[0] for part in parts}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"gpu_check: expected names of parts, got {', '.join(unknown)}; --list shows them")
    return [part for part in parts if part.name in names or part.name.partition("/")[0] in names]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    scale = Scale(args.device or ("cpu" if args.tiny else "cuda"), args.tiny)
    parts = chosen(gpu_check_worker.parts(scale), args.parts)
    if args.list:
        for part in parts:
            print(f"{part.name:<28} {part.seconds:g} s")
        return 0
    if scale.is_cuda and not torch.cuda.is_available():
        raise SystemExit(NO_CUDA)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is stopped too
    folder = Path(os.environ.get("OUT") or "gpu_check").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["./scripts/gpu_check", *given])
    report = Report(folder, {"command": command, "date": f"{datetime.now():%Y-%m-%d %H:%M}", "commit": commit()})
    log = folder / "gpu_check.log"
    log.unlink(missing_ok=True)
    worker = Worker(gpu_check_worker.__name__, log)
    supervisor = Supervisor(worker, scale, 60 * args.minutes, folder / "gpu_check.notes")
    for result in supervisor.run(parts):
        report.about |= supervisor.about
        report.add(result)
        for case in result["cases"]:
            print(line(result, case), flush=True)
    summary = report.summary()
    print("green" if summary["green"] else f"NOT GREEN: {len(summary['not_green'])} cases, see {report.markdown}")
    print(json.dumps(summary, ensure_ascii=False), flush=True)
    return 0 if summary["green"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
