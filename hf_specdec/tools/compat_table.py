"""The results of `compat.py` for people to read: counts, a Markdown page, and a summary by outcome and message."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
import transformers

from .compat import ASSISTED, ERROR, IDENTICAL, OURS, REFUSED, TIE, WRONG

NOT_BUILT, VANILLA_CANNOT, CRASH = "not built", "vanilla cannot", "crash"
ORDER = (IDENTICAL, TIE, REFUSED, ERROR, WRONG, CRASH)
COLUMNS = {OURS: "hf_specdec", ASSISTED: "HF assisted"}
_HEADINGS = {TIE: "identical but for ties"}
_CELLS = {IDENTICAL: "✓", TIE: "✓ tie", REFUSED: REFUSED}


def outcome(result: dict[str, Any], method: str, batch: int) -> tuple[str, str]:
    """A class's outcome for a method and batch size, over all kinds of inputs, and its message."""
    if "crash" in result:
        return CRASH, result["crash"]
    if result["build"] is not None:
        return NOT_BUILT, result["build"]
    cases = [case for case in result["cases"] if case["batch"] == batch]
    ran = [case for case in cases if case["vanilla"] is None]
    if not ran:
        return VANILLA_CANNOT, cases[0]["vanilla"] if cases else ""
    for kind in (WRONG, ERROR, REFUSED, TIE):
        for case in ran:
            if case[method]["outcome"] == kind:
                return kind, case[method]["message"]
    return IDENTICAL, ""


def counts(results: list[dict[str, Any]], batches: Sequence[int]) -> dict[str, dict[str, dict[str, int]]]:
    """How many classes have each outcome, by batch size, then method; all results must have one dtype."""
    return {
        str(batch): {m: dict(Counter(outcome(r, m, batch)[0] for r in results)) for m in COLUMNS} for batch in batches
    }


def by_dtype(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results of each dtype, in their original order."""
    dtypes: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        dtypes.setdefault(result["dtype"], []).append(result)
    return dtypes


def summary(results: list[dict[str, Any]]) -> str:
    """Counts, then the classes where ours is not identical, grouped by outcome and message."""
    lines = []
    for dtype, own in by_dtype(results).items():
        batches = _batches(own)
        lines.append(f"{len(own)} classes in {dtype}")
        for rows, methods in counts(own, batches).items():
            lines += [f"B={rows} {COLUMNS[method]}: {tally}" for method, tally in methods.items()]
        for batch in batches:
            lines.append(f"\n## ours, {dtype}, B={batch}: not identical")
            for (kind, message), names in _groups(own, OURS, batch):
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
    """The message without the details of one class, so that equal reasons form one group."""
    message = re.sub(r"row \d+ (differs|has).*", r"tokens or logits differ", message.replace(name, "CLASS"))
    message = re.sub(r"^\d+ rows$", "rounding decides", message)
    message = re.sub(r" \[\d+(, \d+)*\]", "", message)  # shapes
    return " ".join(message.split())


def markdown(results: list[dict[str, Any]], batches: Sequence[int], command: str) -> str:
    """The page: how it was made, counts for each dtype, one row per class, and the reasons."""
    dtypes = by_dtype(results)
    ran = {dtype: [r for r in own if _ran(r, batches)] for dtype, own in dtypes.items()}
    names = list(dict.fromkeys(r["name"] for own in ran.values() for r in own))
    where = f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, {date.today()}"
    lines = [
        "# Compatibility",
        "",
        "Every class of transformers that inherits `generate()` from `GenerationMixin`, whatever it generates, tried",
        "with a tiny random model and a draft that agrees in part. Greedy tokens are compared with vanilla's.",
        "",
        "- **identical**: all tokens equal vanilla's, for text and, if such a prompt could be made, images and sound.",
        "- **identical but for ties**: a row differs from vanilla where its two best logits are closer than the",
        "  target's own rounding, measured without our code. This is the rule of `scripts/check_lossless`.",
        "- **refused**: an exception raised on purpose, which names what is missing.",
        "- **error**: another exception. **wrong**: other tokens, or logits further off than rounding explains.",
        "",
        "Configs are each class's defaults, shrunk, with all their kinds of layers. Windows are shorter than the",
        "prompts; the rows of a batch have uneven lengths, and some reach the window only during decoding. The weights",
        "are random and large. If the target alone, fed in blocks of four, is as far from vanilla, new weights are",
        "drawn, up to four times. The draft is a copy with noise, or look-up if a draft cannot be fed text alone.",
        "",
        f"{where}. Made by",
        f"`{command}`. Classes that vanilla cannot generate with, or that cannot be",
        "built here, are at the end.",
        "",
        f"## {len(names)} classes that can be built and that vanilla can generate with",
    ]
    for dtype, own in ran.items():
        lines += ["", f"### {dtype}: {len(own)} classes", "", *_tallies(own, batches)]
    columns = [(dtype, method, batch) for method in COLUMNS for dtype in ran for batch in batches]
    headings = [f"{COLUMNS[method]}, {dtype}, {batch}" for dtype, method, batch in columns]
    lines += ["", f"| class | layers | prompts | {' | '.join(headings)} |", "|---" * (3 + len(columns)) + "|"]
    found = {(r["name"], dtype): r for dtype, own in dtypes.items() for r in own}
    for name in names:
        own = [found[name, dtype] for dtype in dtypes if (name, dtype) in found]
        kinds = dict.fromkeys(c["inputs"] for r in own for c in r["cases"] if c["vanilla"] is None)
        layers: list[str] = next((r["layer_types"] for r in own if r.get("layer_types")), [])
        cells = [_cell(found.get((name, dtype)), method, batch) for dtype, method, batch in columns]
        layer_names = ", ".join(layer.replace("_attention", "") for layer in layers)
        lines.append(f"| {name} | {layer_names} | {', '.join(kinds)} | {' | '.join(cells)} |")
    lines += ["", "## Reasons that hf_specdec gives", ""]
    reasons: dict[str, list[str]] = defaultdict(list)
    for own in ran.values():
        for batch in batches:
            for (kind, message), refused in _groups(own, OURS, batch):
                if kind != TIE:
                    reasons[f"{kind}: {message}"] += refused
    lines += [f"- {reason}: {', '.join(dict.fromkeys(classes))}" for reason, classes in reasons.items()]
    for title, kind in (("Vanilla cannot", VANILLA_CANNOT), ("Not built here", NOT_BUILT)):
        lines += ["", f"## {title}", ""]
        left: dict[tuple[str, str], list[str]] = defaultdict(list)
        for dtype, own in dtypes.items():
            for result in own:
                what, why = outcome(result, OURS, batches[0])
                if what == kind:
                    left[result["name"], _short(why)].append(dtype)
        for (name, why), where_not in left.items():
            only = "" if len(where_not) == len(dtypes) else f" (in {', '.join(where_not)})"
            lines.append(f"- {name}{only}: {why}")
    return "\n".join(lines) + "\n"


def _ran(result: dict[str, Any], batches: Sequence[int]) -> bool:
    return outcome(result, OURS, batches[0])[0] in ORDER


def _tallies(results: list[dict[str, Any]], batches: Sequence[int]) -> list[str]:
    tallies = counts(results, batches)
    lines = [
        "| | " + " | ".join(f"{COLUMNS[m]}, {b} row{'s' * (b > 1)}" for b in batches for m in COLUMNS) + " |",
        "|---" * (1 + 2 * len(batches)) + "|",
    ]
    for kind in ORDER:
        tally = [tallies[str(b)][m].get(kind, 0) for b in batches for m in COLUMNS]
        if any(tally):
            shares = " | ".join(f"{n} ({n / max(len(results), 1):.0%})" for n in tally)
            lines.append(f"| {_HEADINGS.get(kind, kind)} | {shares} |")
    return lines


def _cell(result: dict[str, Any] | None, method: str, batch: int) -> str:
    if result is None:
        return ""
    kind = outcome(result, method, batch)[0]
    return _CELLS.get(kind, "" if kind in (NOT_BUILT, VANILLA_CANNOT) else f"**{kind}**")


def _short(message: str) -> str:
    text = " ".join(message.split()).replace("|", "\\|")
    return text if len(text) < 200 else text[:197] + "..."
