"""What speculative `generate()` calls of a client returned; or, for comparison, the same calls without speculation.

In this process by `recorded`; in processes that a test starts by the environment of `environment`, from the moment that
they import hf_specdec, which they do by themselves. Not a test itself.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE, PLAIN = "RECORD_CALLS_IN", "RECORD_PLAIN_CALLS"
HOOK = Path(__file__).parent / "at_start"


@dataclass
class Call:
    """One call: its tokens, prompts included, and how many of them were drafted and accepted."""

    tokens: list[list[int]]
    drafted: int = 0
    accepted: int = 0


@contextmanager
def recorded(speculates: bool) -> Iterator[list[Call]]:
    """Record the calls in this process, which are plain ones unless it `speculates`."""
    from hf_specdec.generate import strategy

    calls: list[Call] = []
    speculate = strategy.STRATEGIES["spec"]
    strategy.STRATEGIES["spec"] = recording(speculate, speculates, calls.append)
    try:
        yield calls
    finally:
        strategy.STRATEGIES["spec"] = speculate


def environment(file: Path, speculates: bool) -> dict[str, str]:
    """Variables for processes that record their calls in a file."""
    path = os.pathsep.join([str(HOOK), str(HOOK.parent), str(HOOK.parents[2])])
    return os.environ | {"PYTHONPATH": path, FILE: str(file)} | ({} if speculates else {PLAIN: "1"})


def read(file: Path) -> list[Call]:
    """The calls that processes with that environment have recorded."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Call(**json.loads(line)) for line in lines]


def record_this_process() -> None:
    """Record calls from now on; for processes with the variables of `environment`."""
    from hf_specdec.generate import strategy

    def write(call: Call) -> None:
        with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(call)) + "\n")

    strategy.STRATEGIES["spec"] = recording(strategy.STRATEGIES["spec"], PLAIN not in os.environ, write)


def recording(speculate: Callable[..., Any], speculates: bool, record: Callable[[Call], None]) -> Callable[..., Any]:
    """`speculate`, one of `strategy.STRATEGIES`, which records each call, or makes it without its arguments."""
    from hf_specdec import SpeculationStats
    from hf_specdec.generate.strategy import STRATEGIES
    from hf_specdec.pairs.pair import SPECULATION_ARGUMENTS

    def run(*args: Any, **kwargs: Any) -> Any:
        if speculates:
            given = kwargs.get("speculation_stats")
            stats = SpeculationStats() if given is None else given
            before = stats.drafted_tokens, stats.accepted_tokens
            result = speculate(*args, **kwargs | {"speculation_stats": stats})
            counts = stats.drafted_tokens - before[0], stats.accepted_tokens - before[1]
        else:
            plain = {k: v for k, v in kwargs.items() if k not in SPECULATION_ARGUMENTS | {"assistant_model"}}
            result, counts = STRATEGIES["vanilla"](*args, **plain), (0, 0)
        record(Call(getattr(result, "sequences", result).tolist(), *counts))
        return result

    return run
