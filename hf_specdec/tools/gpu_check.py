"""A check of the library on one GPU: its parts, the cases that each of them yields, and how one part is run.

`scripts/gpu_check` runs the parts of `gpu_check_worker.py` in a worker process, under `gpu_check_supervisor.py`. A part
is a generator: what it has found so far stays if the rest of it hangs or crashes.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch

from ..device import first_line
from . import compat

OK, WRONG, REFUSED, ERROR, TIMED_OUT = "ok", "WRONG", "refused", "error", "timed out"
SKIPPED, NOT_MEASURED, NOT_REACHED = "skipped", "not measured", "not reached"
FAILURES = (WRONG, ERROR, TIMED_OUT)
CPU_ONLY = "needs a GPU"
STATIC = {"cache_implementation": "static"}  # ours with fixed shapes, on CUDA with graphs


@dataclass(frozen=True)
class Scale:
    """On which device, and how much: `tiny` is the same check in small, for a CPU."""

    device: str
    tiny: bool = False

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True)
class Case:
    """One line of the report.

    Attributes:
        name: what was tried.
        outcome: one of the words above.
        details: for people.
        figures: what tables are made of; plain JSON types.
    """

    name: str
    outcome: str
    details: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: its group, "/", and a name of its own.
        seconds: its time limit.
        run: yields its cases.
        may_be_cut: whether the check is still whole if the time limit leaves it out.
    """

    name: str
    seconds: float
    run: Callable[[Scale], Iterator[Case]]
    may_be_cut: bool = False


def attempt(name: str, check: Callable[[], tuple[str, str]]) -> Case:
    """The case of a check that returns its outcome and details; an exception is a refusal or an error."""
    found = compat.outcome(check, lambda given: {"outcome": given[0], "message": given[1]}, "/hf_specdec/")
    where = f" at {found['where']}" if found["outcome"] == ERROR and "where" in found else ""
    return Case(name, found["outcome"], found["message"] + where)


def run_part(part: Part, scale: Scale, note: Callable[[Case], None] = lambda case: None) -> dict[str, Any]:
    """Run a part to its end, or until an error has spoiled the device for this process.

    Args:
        note: called with each case at once.

    Returns:
        The part's result: its name, its seconds, its cases, and whether the process must be replaced.
    """
    began, cases, healthy = perf_counter(), [], True

    def add(case: Case) -> None:
        cases.append(case)
        note(case)

    try:
        for case in part.run(scale):
            add(case)
            healthy = case.outcome != ERROR or is_healthy(scale)
            if not healthy:
                break
    except Exception as error:
        healthy = is_healthy(scale)
        add(Case("the part itself", ERROR, first_line(error)))
    if not healthy:
        add(Case("the rest", ERROR, "not run: the error before has spoiled the device for this process"))
    return result_of(part, cases, perf_counter() - began) | {"restart": not healthy}


def result_of(part: Part, cases: list[Case], seconds: float) -> dict[str, Any]:
    """A part's result as plain JSON types."""
    about = {"part": part.name, "seconds": round(seconds, 2), "may_be_cut": part.may_be_cut}
    return about | {"cases": [asdict(case) for case in cases]}


def is_healthy(scale: Scale) -> bool:
    """Whether the device still computes: some errors spoil it for the whole process."""
    if not scale.is_cuda:
        return True
    try:
        torch.cuda.synchronize()
        return int(torch.ones(3, device=scale.device).sum()) == 3
    except Exception:
        return False
