"""The results of `compat.py` for people: counts, a Markdown page, and a summary by outcome and message."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
import transformers

from .compat import ASSISTED, ERROR, IDENTICAL, OURS, REFUSED, WRONG

NOT_BUILT, VANILLA_CANNOT, CRASH = "not built", "vanilla cannot", "crash"
ORDER = (IDENTICAL, REFUSED, ERROR, WRONG, CRASH)
COLUMNS = {OURS: "hf_specdec", ASSISTED: "HF assisted"}


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


def counts(results: list[dict[str, Any]], batches: Sequence[int]) -> dict[str, dict[str, dict[str, int]]]:
    """How many classes have each outcome: by batch size, then method."""
    return {
        str(batch): {m: dict(Counter(outcome(r, m, batch)[0] for r in results)) for m in COLUMNS} for batch in batches
    }


def summary(results: list[dict[str, Any]]) -> str:
    """Counts, then the classes grouped by what ours does where it is not identical."""
    batches = _batches(results)
    lines = [f"{len(results)} classes"]
    for rows, methods in counts(results, batches).items():
        lines += [f"B={rows} {COLUMNS[method]}: {tally}" for method, tally in methods.items()]
    for batch in batches:
        lines.append(f"\n## ours, B={batch}, not identical")
        for (kind, message), names in _groups(results, OURS, batch):
            lines.append(f"- {kind} ({len(names)}): {message}\n    {', '.join(names)}")
    return "\n".join(lines)


def _batches(results: list[dict[str, Any]]) -> list[int]:
    return sorted({case["batch"] for result in results for case in result["cases"]}) or [1]


def _groups(results: list[dict[str, Any]], method: str, batch: int) -> list[tuple[tuple[str, str], list[str]]]:
    """Classes that are not identical, by outcome and message; the largest groups first."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        kind, message = outcome(result, method, batch)
        if kind != IDENTICAL:
            groups[kind, _pattern(message, result["name"])].append(result["name"])
    return sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))


def _pattern(message: str, name: str) -> str:
    """The message without what is particular to one class, so that equal reasons group together."""
    message = re.sub(r"row \d+ differs.*", "tokens differ", message.replace(name, "CLASS"))
    message = re.sub(r" \[\d+(, \d+)*\]", "", message)  # shapes
    return " ".join(message.split())


def markdown(results: list[dict[str, Any]], batches: Sequence[int], command: str) -> str:
    """The page: how it was made, counts, one row per class, and the reasons."""
    ran = [r for r in results if outcome(r, OURS, batches[0])[0] in ORDER]
    tallies = counts(ran, batches)
    where = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU, {date.today()}"
    lines = [
        "# Compatibility",
        "",
        "Every class of transformers' mappings for causal, sequence-to-sequence, speech and multimodal generation,",
        "tried with a tiny random model and a draft that agrees in part: greedy tokens beside those of `generate()`.",
        "",
        "- **identical**: vanilla's tokens, every one, for text and, where such a prompt could be made, images, sound.",
        "- **refused**: an exception raised on purpose, which names what is missing.",
        "- **error**: another exception. **wrong**: other tokens, without a word.",
        "",
        "Configs are the defaults of each class, shrunk, with all their kinds of layers; windows are shorter than the",
        "prompts, the rows of a batch are uneven. The weights are random and large. Where rounding decides (two logits",
        "closer than 1e-4, or the target alone, fed in blocks of four, disagrees with itself), other weights are",
        "drawn, up to four times. The draft is a copy with noise, or look-up where the class cannot be fed text alone.",
        "",
        f"{where}. Made by",
        f"`{command}`. Classes with which vanilla itself cannot generate, or that cannot be",
        "built here, are at the end.",
        "",
        f"## {len(ran)} classes that can be built and that vanilla can generate with",
        "",
        "| | " + " | ".join(f"{COLUMNS[m]}, {b} row{'s' * (b > 1)}" for b in batches for m in COLUMNS) + " |",
        "|---" * (1 + 2 * len(batches)) + "|",
    ]
    for kind in ORDER:
        tally = [tallies[str(b)][m].get(kind, 0) for b in batches for m in COLUMNS]
        if any(tally):
            lines.append(f"| {kind} | " + " | ".join(f"{n} ({n / max(len(ran), 1):.0%})" for n in tally) + " |")
    lines += ["", "| class | layers | prompts | " + " | ".join(
        f"{COLUMNS[m]}, {b}" for b in batches for m in COLUMNS) + " |",
        "|---" * (3 + 2 * len(batches)) + "|"]  # fmt: skip
    for result in ran:
        kinds = dict.fromkeys(case["inputs"] for case in result["cases"] if case["vanilla"] is None)
        cells = [_cell(outcome(result, m, b)[0]) for b in batches for m in COLUMNS]
        layers = ", ".join(layer.replace("_attention", "") for layer in result.get("layer_types", []))
        lines.append(f"| {result['name']} | {layers} | {', '.join(kinds)} | {' | '.join(cells)} |")
    lines += ["", "## What hf_specdec says where it refuses", ""]
    reasons: dict[str, list[str]] = defaultdict(list)
    for batch in batches:
        for (kind, message), names in _groups(ran, OURS, batch):
            reasons[f"{kind}: {message}"] += [name for name in names if name not in reasons[f"{kind}: {message}"]]
    lines += [f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    for title, kind in (("Vanilla cannot", VANILLA_CANNOT), ("Not built here", NOT_BUILT)):
        lines += ["", f"## {title}", ""]
        left = [(r["name"], outcome(r, OURS, batches[0])) for r in results]
        lines += [f"- {name}: {_short(why)}" for name, (found, why) in left if found == kind]
    return "\n".join(lines) + "\n"


def _cell(kind: str) -> str:
    return {IDENTICAL: "✓"}.get(kind, kind if kind == REFUSED else f"**{kind}**")


def _short(message: str) -> str:
    text = " ".join(message.split()).replace("|", "\\|")
    return text if len(text) < 200 else text[:197] + "..."
