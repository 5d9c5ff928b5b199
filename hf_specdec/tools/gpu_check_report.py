"""What a GPU check leaves: a JSON file and a Markdown page, written anew after each part, and a short summary."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .gpu_check import FAILURES, NOT_REACHED, OK

FIGURES = ("speed", "compiled")  # groups of parts that only measure
COLUMNS = (
    "setting",
    "method",
    "tokens/s",
    "over vanilla",
    "whole call",
    "first token, ms",
    "ms per iteration: draft + verify + rest",
    "α",
    "τ",
    "of the floor",
    "one-time, s (captures)",
    "rows that differ",
)
EXPLANATION = """\
- tokens/s: decoding alone, all rows together; "over vanilla" is its ratio to vanilla with a dynamic cache, within the
  rounds, the median; "whole call" is the same with the prompt.
- ms per iteration: the host's times, without the first two iterations. Work that drafting has queued may be waited for
  in verification.
- of the floor: the share of what the memory bandwidth allows token-by-token decoding: bytes of the weights and of the
  cache at half of the new tokens, divided by the bandwidth of a copy on this device. Speculation may exceed 100%.
- one-time: how much longer the first calls took than later ones: compilation, capture of graphs, checks of the model;
  in parentheses, the capture of graphs alone, as far as the library counts it.
- imprecise: decoding is the difference between two calls, and took less than 5% of some call.
- rows that differ from vanilla's: in bfloat16, near-ties may fall differently.
"""


class Report:
    """The results so far, and their two files in `folder`."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self.parts: list[dict[str, Any]] = []
        self.json, self.markdown = folder / "gpu_check.json", folder / "gpu_check.md"

    def add(self, part: dict[str, Any]) -> None:
        """Add a part's result, and write both files."""
        self.parts.append(part)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {**self.about, **self.summary(), "parts": self.parts}
        _replace(self.json, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        _replace(self.markdown, self.page())

    def cases(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each part with each of its cases."""
        for part in self.parts:
            for case in part["cases"]:
                yield part, case

    @property
    def not_green(self) -> list[str]:
        """What failed or is missing, in words."""
        return [
            f"{part['part']}: {case['name']}: {case['outcome']}"
            for part, case in self.cases()
            if case["outcome"] in FAILURES or (case["outcome"] == NOT_REACHED and not part["may_be_cut"])
        ]

    def summary(self) -> dict[str, Any]:
        """The last line of the script's output."""
        counts = Counter(case["outcome"] for _, case in self.cases())
        cut = [part["part"] for part, case in self.cases() if case["outcome"] == NOT_REACHED and part["may_be_cut"]]
        return {
            "green": not self.not_green,
            "counts": dict(counts),
            "not_green": self.not_green,
            "speed_settings_cut": cut,
            "seconds": round(sum(part["seconds"] for part in self.parts), 1),
            "json": str(self.json),
            "markdown": str(self.markdown),
        }

    def page(self) -> str:
        """The Markdown page."""
        summary = self.summary()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in summary["counts"].items())
        lines = [
            "# GPU check",
            "",
            f"**{'Green' if summary['green'] else 'Not green'}**: {counts or 'nothing ran'}.",
            "",
        ]
        lines += [f"- {name}: {value}" for name, value in self.about.items() if value is not None]
        if self.not_green:
            lines += ["", "## Not green", "", *(f"- {text}" for text in self.not_green)]
        lines += ["", "## Correctness", "", *_table(("part", "case", "outcome", "details"), self._checks())]
        lines += ["", "## Speed", "", *_table(COLUMNS, self._speeds()), "", EXPLANATION]
        notes = [f"- {part['part']}: {c['details']}" for part, c in self.cases() if _is_note(part, c)]
        return "\n".join([*lines, *notes]) + "\n"

    def _checks(self) -> Iterator[tuple[str, ...]]:
        for part, case in self.cases():
            if _group(part) not in FIGURES:
                yield part["part"], case["name"], case["outcome"], case["details"]

    def _speeds(self) -> Iterator[tuple[str, ...]]:
        for part, case in self.cases():
            if _group(part) in FIGURES and not _is_note(part, case):
                yield part["part"].partition("/")[2], *_speed(case)


def line(part: dict[str, Any], case: dict[str, Any]) -> str:
    """A case as a line of text."""
    return f"{case['outcome']:<12} {part['part']}: {case['name']}" + (f": {case['details']}" if case["details"] else "")


def _group(part: dict[str, Any]) -> str:
    return str(part["part"]).partition("/")[0]


def _is_note(part: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether a case of a speed part is about its models, not about a method."""
    return _group(part) in FIGURES and case["outcome"] == OK and not case["figures"]


def _speed(case: dict[str, Any]) -> tuple[str, ...]:
    figures = case["figures"]
    if case["outcome"] != OK:
        return case["name"], f"{case['outcome']}: {case['details']}", *[""] * (len(COLUMNS) - 3)
    captures = figures.get("capture_seconds")
    split = [f"{figures[name]:.2f}" for name in ("draft_ms", "verify_ms", "rest_ms") if name in figures]
    return (
        case["name"],
        f"{figures['tokens_per_second']:.1f}" + " (imprecise)" * figures["imprecise"],
        f"{figures['over_vanilla']:.2f}x",
        f"{figures['whole_call_over_vanilla']:.2f}x",
        f"{figures['first_token_ms']:.1f}",
        " + ".join(split),
        f"{figures['acceptance_rate']:.2f}" if "acceptance_rate" in figures else "",
        f"{figures['block_efficiency']:.2f}" if "block_efficiency" in figures else "",
        f"{figures['floor_share']:.0%}",
        f"{figures['one_time_seconds']:.1f}" + (f" ({captures:.1f})" if captures else ""),
        str(figures["differing_rows"]),
    )


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole: a run that is killed leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
