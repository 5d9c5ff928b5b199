"""The results of `compat.py` for people: counts, a Markdown table, and a summary by outcome and message."""

import re
from collections import Counter, defaultdict
from datetime import date
from typing import Any

import transformers

from .compat import ASSISTED, ERROR, IDENTICAL, OURS, REFUSED, WRONG

NOT_BUILT, VANILLA_CANNOT, CRASH = "not built", "vanilla cannot", "crash"


def outcome(result: dict[str, Any], method: str, batch: int) -> tuple[str, str]:
    """A class's outcome for a method and batch size, over all kinds of inputs, and the message that goes with it."""
    if "crash" in result:
        return CRASH, result["crash"]
    if result["build"] is not None:
        return NOT_BUILT, result["build"]
    cases = [case for case in result["cases"] if case["batch"] == batch]
    ran = [case for case in cases if case["vanilla"] is None]
    if not ran:
        return VANILLA_CANNOT, cases[0]["vanilla"] if cases else ""
    for kind in (WRONG, ERROR, REFUSED):
        for case in ran:
            if case[method]["outcome"] == kind:
                return kind, case[method]["message"]
    return IDENTICAL, ""


def counts(results: list[dict[str, Any]], batches: list[int]) -> dict[str, dict[str, dict[str, int]]]:
    """How many classes have each outcome: by batch size, then method."""
    return {
        str(batch): {m: dict(Counter(outcome(r, m, batch)[0] for r in results)) for m in (OURS, ASSISTED)}
        for batch in batches
    }


def summary(results: list[dict[str, Any]]) -> str:
    """Counts, then the classes grouped by what went wrong with ours."""
    batches = sorted({case["batch"] for result in results for case in result["cases"]}) or [1]
    lines = [f"{len(results)} classes"]
    for batch, methods in counts(results, batches).items():
        lines += [f"B={batch} {method}: {tally}" for method, tally in methods.items()]
    for batch in batches:
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for result in results:
            kind, message = outcome(result, OURS, batch)
            if kind != IDENTICAL:
                name = result["name"] + (f" [{result['model_type']}]" if kind in (WRONG, ERROR) else "")
                groups[kind, _pattern(message, result["name"])].append(name)
        lines.append(f"\n## ours, B={batch}, not identical")
        for (kind, message), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
            lines.append(f"- {kind} ({len(names)}): {message}\n    {', '.join(names)}")
    return "\n".join(lines)


def _pattern(message: str, name: str) -> str:
    """The message without what is particular to one class, so that equal reasons group together."""
    return re.sub(r"row \d+ differs.*", "tokens differ", message.replace(name, "CLASS"))


def markdown(results: list[dict[str, Any]], batches: list[int], seed: int) -> str:
    """The page with the table."""
    shown = [r for r in results if outcome(r, OURS, batches[0])[0] not in (NOT_BUILT, VANILLA_CANNOT)]
    lines = ["# Compatibility", ""]
    lines.append(f"transformers {transformers.__version__}, {date.today()}, `./scripts/compat_matrix --seed {seed}`.")
    lines += ["", f"| class | layers | {' | '.join(f'B={b} | HF, B={b}' for b in batches)} |"]
    lines.append("|---" * (2 + 2 * len(batches)) + "|")
    for result in shown:
        cells = [" ".join(outcome(result, m, b)[:1]) for b in batches for m in (OURS, ASSISTED)]
        lines.append(f"| {result['name']} | {', '.join(result.get('layer_types', []))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
