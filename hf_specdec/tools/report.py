"""Measurements for people to read: table cells, where and how they were made, and a page with figures."""

import html
import platform
import re
import string
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from ..pairs.pair import SpecPair
from .measure import OURS, VANILLA
from .surroundings import commit, cpu_name, instruction_set

COLUMNS = ("tokens/s", "speed-up", "decode", "vs HF", "first", "α", "τ", "ideal", "reached", "memory", "rows")


def cells(figures: dict[str, Any]) -> list[str]:
    """One method's table row, with the columns `COLUMNS`."""
    if "refused" in figures:
        return ["refused", *[""] * (len(COLUMNS) - 1)]
    same, rows = figures["rows"] - figures["differing_rows"], figures["rows"]
    return [
        f"{figures['tokens_per_second']:.1f}",
        spread(figures["speedup"]),
        spread(figures["decode_speedup"]),
        number((figures.get("over_assisted") or {}).get("median"), "x"),
        f"{figures['first_token_ms']:.0f} ms {number((figures['first_token_speedup'] or {}).get('median'), 'x')}",
        number(figures.get("acceptance_rate")),
        number(figures["block_efficiency"]),
        "-" if is_unknown(figures) else number(figures.get("ideal"), "x"),
        "" if figures.get("efficiency") is None else f"{figures['efficiency']:.0%}",
        "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:.0f} MB",
        "not compared" if not figures["compared"] else "same" if same == rows else f"{rows - same}/{rows} differ",
    ]


def is_unknown(figures: dict[str, Any]) -> bool:
    """Whether a method has no ideal because the bare time of its drafts was not measured."""
    return bool(figures.get("draft_forwards")) and figures.get("ideal") is None


def without_ideal(setting: dict[str, Any]) -> str:
    """One line about the methods that have none; empty if all have one."""
    names = [name for name, figures in setting["methods"].items() if is_unknown(figures)]
    if not names or "missing" in setting["bare"]:
        return ""
    return f"no ideal, because forwards of these drafts were not measured alone: {', '.join(names)}"


def fitted(table: Table) -> Table:
    """Make the table fit narrow terminals: words wrap, nothing is cut off, numbers stay whole."""
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.justify == "right"
    return table


def bare_forwards(bare: dict[str, Any]) -> str:
    """One line about the forwards from which the ideal is computed."""
    if "missing" in bare:
        return f"no bare forwards: {bare['missing']}"
    target = ", ".join(f"{ms:.1f} ({tokens})" for tokens, ms in bare["target_ms"].items())
    heads = "".join(f", {name} {ms:.1f}" for name, ms in bare.get("heads_ms", {}).items())
    draft = f"draft {bare['draft_ms']:.1f}{heads}; c = {bare['cost_ratio']:.3f}"
    return f"ms per bare forward: target {target} by tokens, {draft}"


def categories(setting: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The prompt categories, and each method's speed-ups in them; nothing if there is only one."""
    names = list(setting["methods"][VANILLA]["categories"])
    shown = {name: figures for name, figures in setting["methods"].items() if "refused" not in figures}
    cells = {name: [spread(figures["categories"][c]) for c in names] for name, figures in shown.items()}
    return (names, cells) if len(names) > 1 else ([], {})


def spread(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.2f}x ({value['q1']:.2f}–{value['q3']:.2f})"


def number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def surroundings(pair: SpecPair, command: str) -> dict[str, Any]:
    """Where and how the figures were measured: they mean little without it."""
    target, draft = pair.target, pair.draft
    return {
        "command": command,
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else cpu_name(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "target": pair.config.target.name_or_path,
        "draft": pair.config.draft.name_or_path,
        "target_parameters": target.num_parameters(),
        "draft_parameters": draft.num_parameters(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine(about: dict[str, Any]) -> str:
    """One line about where figures come from."""
    load = f", beside {about['busy']} busy processes" if about["busy"] else ""
    return f"{about['device']} ({about['instruction_set']}), {about['threads']} threads, {about['dtype']}{load}"


GLOSSARY = {
    "speed-up": "vanilla's seconds per new token divided by the method's, within a round; median over the rounds, and "
    "quartiles",
    "decode": "the same without the time to the first token and the tokens that came with it",
    "vs HF": "the speed-up over the fastest of transformers' own methods in the same table",
    "first": "time to the first token of every row, and how many times faster than vanilla that is",
    "α": "acceptance rate: the share of drafted tokens that the target accepted",
    "τ": "block efficiency: tokens per target forward and row; 1 for vanilla",
    "ideal": "the speed-up at this τ if only the bare forwards took time: "
    "τ · t_target(1) / (t_target(γ + 1) + γ · t_draft(1))",
    "reached": "the decoding speed-up as a share of the ideal",
    "memory": "peak memory of one call, without the models",
    "rows": "whether the tokens equal vanilla's, row by row",
}


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page: one self-contained file."""
    from .figures import best, draw_all  # matplotlib is only needed here

    base = result["settings"][0]
    name = best(base, OURS) or best(base, VANILLA)
    figures = base["methods"][name]
    tiles = {
        "the speed of HF's best method": number((figures.get("over_assisted") or {}).get("median"), "x"),
        "of the drafts accepted (α)": percent(figures.get("acceptance_rate")),
        "tokens per target forward (τ)": number(figures["block_efficiency"]),
        "of the ideal reached": percent(figures.get("efficiency")),
        "tokens per second": f"{figures['tokens_per_second']:.1f}",
    }
    rows = sum(method.get("rows", 0) for setting in result["settings"] for method in setting["methods"].values())
    differing = sum(m.get("differing_rows", 0) for s in result["settings"] for m in s["methods"].values())
    verdict = f"<span class=good>Identical:</span> all {rows} rows equal vanilla's."
    if result.get("samples"):
        verdict = "<span class=faint>Sampled texts are not compared.</span>"
    elif differing:
        kind = "bad" if result["dtype"] == "float32" else "faint"
        verdict = f"<span class={kind}>{differing} of {rows} rows differ from vanilla's</span> ({result['dtype']})."
    about = {k.replace("_", " "): v for k, v in result.items() if k not in ("settings", "identical") and v is not None}
    template = string.Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        key=number(figures["speedup"]["median"], "x"),
        headline=f"{html.escape(name)} against vanilla generate()",
        verdict=verdict,
        setting=f"{html.escape(base['label'])} · {html.escape(result['dtype'])} · {html.escape(result['device'])}",
        tiles="".join(f"<div><b>{value}</b><small>{text}</small></div>" for text, value in tiles.items() if value),
        figures="".join(
            f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in draw_all(result).items()
        ),
        tables="".join(_table(setting, best(setting, OURS)) for setting in result["settings"]),
        glossary=_definitions(GLOSSARY),
        surroundings=_definitions({k: f"{v:,}" if isinstance(v, int) else v for k, v in about.items()}),
    )
    path.write_text(page, encoding="utf-8")


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _table(setting: dict[str, Any], best: str) -> str:
    rows = {}
    for name, figures in setting["methods"].items():
        rows[name] = [
            f"<td class=refused colspan={len(COLUMNS)}>refused: {html.escape(figures.get('refused', ''))}</td>"
        ]
        if "refused" not in figures:
            rows[name] = [_cell(cell) for cell in cells(figures)]
    page = _rows(setting["label"], COLUMNS, rows, setting, best)
    page += f"<p class=faint>{html.escape(bare_forwards(setting['bare']))}</p>"
    names, by_category = categories(setting)
    if names:
        rows = {name: [_cell(cell) for cell in shown] for name, shown in by_category.items()}
        page += _rows(f"Speed-up by category: {setting['label']}", names, rows, setting, best)
    return page


def _rows(title: str, headings: Sequence[str], rows: dict[str, list[str]], setting: dict[str, Any], best: str) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in ("method", *headings))
    body = ""
    for name, shown in rows.items():
        kinds = ["ours"] * (setting["methods"][name]["family"] == OURS) + ["best"] * (name == best)
        body += f'<tr class="{" ".join(kinds)}"><td>{html.escape(name)}</td>{"".join(shown)}</tr>'
    return (
        f"<h2>{html.escape(title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """Show the quartiles, in parentheses, smaller."""
    return "<td>" + re.sub(r" (\(.*\))", r" <small>\1</small>", html.escape(text)) + "</td>"


def _definitions(entries: dict[str, Any]) -> str:
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in entries.items())
