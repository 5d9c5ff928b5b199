"""The figures of a benchmark, drawn with matplotlib as SVG that uses the text colour of the surrounding page."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .measure import ASSISTED, OURS, VANILLA

INK = "#010203"  # replaced by the page's own text colour
COLOURS = {VANILLA: "#8b949e", ASSISTED: "#d9822b", OURS: "#2f81f7"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": INK, "grid.alpha": 0.15,
    "axes.axisbelow": True, "legend.frameon": False, "axes.titlelocation": "left",
}  # fmt: skip


def draw_all(result: dict[str, Any]) -> dict[str, str]:
    """SVG by title, for the figures that the measurement has data for."""
    base = result["settings"][0]
    drawings: dict[str, Callable[[Axes], bool]] = {
        "Speed-up by category": lambda axes: by_category(axes, base),
        "Speed-up over draft length": lambda axes: over_gamma(axes, base),
        "Acceptance by position in the draft": lambda axes: acceptance(axes, base),
        "Time per token over context length": lambda axes: over_context(axes, result["settings"]),
    }
    drawn = {title: _svg(title, draw) for title, draw in drawings.items()}
    return {title: svg for title, svg in drawn.items() if svg}


def by_category(axes: Axes, setting: dict[str, Any]) -> bool:
    """Bars: the best method of each family, by prompt category."""
    shown = {family: best(setting, family) for family in (ASSISTED, OURS)}
    names = list(setting["methods"][VANILLA]["categories"])
    drawn = [(family, name) for family, name in shown.items() if name]
    for number, (family, name) in enumerate(drawn):
        spreads = [setting["methods"][name]["categories"][category] for category in names]
        middle = [spread["median"] for spread in spreads]
        low = [spread["median"] - spread["q1"] for spread in spreads]
        high = [spread["q3"] - spread["median"] for spread in spreads]
        at = [i + (number - (len(drawn) - 1) / 2) * 0.36 for i in range(len(names))]
        bars = axes.bar(at, middle, 0.34, yerr=[low, high], color=COLOURS[family], label=name, ecolor=INK, capsize=3)
        axes.bar_label(bars, fmt="%.2f", padding=3, color=INK)
    axes.axhline(1, color=COLOURS[VANILLA], linestyle="--", linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 5 else 0)
    axes.set_ylabel("speed-up over vanilla")
    axes.set_xlim(-1, len(names))
    axes.margins(y=0.15)
    return bool(drawn)


def over_gamma(axes: Axes, setting: dict[str, Any]) -> bool:
    """Lines over γ: measured, and ideal for ours."""
    found = False
    for family in (ASSISTED, OURS):
        points = sorted(
            (f["gamma"], f) for f in setting["methods"].values() if f["family"] == family and f.get("gamma")
        )
        points = [(gamma, figures) for gamma, figures in points if "refused" not in figures]
        if len(points) < 2 and family == ASSISTED and not points:
            continue
        gammas = [gamma for gamma, _ in points]
        spreads = [figures["decode_speedup"] for _, figures in points]
        axes.plot(gammas, [s["median"] for s in spreads], "o-", color=COLOURS[family], label=family)
        axes.fill_between(
            gammas, [s["q1"] for s in spreads], [s["q3"] for s in spreads], color=COLOURS[family], alpha=0.2
        )
        found |= len(points) > 1
    ideal = sorted((f["gamma"], f["ideal"]) for f in setting["methods"].values() if f.get("gamma") and f.get("ideal"))
    if ideal:
        axes.plot(*zip(*ideal), ":", color=COLOURS[OURS], label="ideal")
    axes.axhline(1, color=COLOURS[VANILLA], linestyle="--", linewidth=1, label=VANILLA)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("γ, tokens drafted at a time")
    axes.set_ylabel("speed-up of decoding")
    return found


def acceptance(axes: Axes, setting: dict[str, Any]) -> bool:
    """Lines over the position in the draft: the share of drafts accepted there, for our longest fixed γ and look-up."""
    shown: dict[str, tuple[str, list[float]]] = {}
    for name, figures in setting["methods"].items():
        if figures.get("acceptance_by_position"):
            kind = "look-up" if "look-up" in name else "draft model"
            if len(figures["acceptance_by_position"]) >= len(shown.get(kind, ("", []))[1]):
                shown[kind] = (name, figures["acceptance_by_position"])
    for (name, shares), colour in zip(shown.values(), (COLOURS[OURS], "#3fb950")):
        axes.plot(range(1, len(shares) + 1), shares, "o-", color=colour, label=name)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted, of those drafted")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(shown)


def over_context(axes: Axes, settings: list[dict[str, Any]]) -> bool:
    """Lines over prompt length, for the first batch size: milliseconds per token while decoding."""
    settings = [s for s in settings if s["batch_size"] == settings[0]["batch_size"]]
    settings = sorted(settings, key=lambda s: s["prompt_tokens"][1])
    names = {family: best(settings[0], family) for family in (VANILLA, ASSISTED, OURS)}
    for family, name in names.items():
        points = [
            (s["prompt_tokens"][1], s["methods"][name]["decode_ms"])
            for s in settings
            if name and s["methods"][name].get("decode_ms")
        ]
        if points:
            axes.plot(*zip(*points), "o-", color=COLOURS[family], label=name)
    axes.set_ylim(bottom=0)
    axes.set_xscale("log", base=2)
    lengths = [s["prompt_tokens"][1] for s in settings]
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("ms per token, decoding")
    return len(settings) > 1


def best(setting: dict[str, Any], family: str) -> str:
    """The fastest method of a family in a setting; empty if there is none."""
    names = [n for n, f in setting["methods"].items() if f["family"] == family and "refused" not in f]
    return max(names, key=lambda name: setting["methods"][name]["speedup"]["median"], default="")


def _svg(title: str, draw: Callable[[Axes], bool]) -> str:
    """The figure as an SVG element; empty if `draw` has no data."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes):
            return ""
        # Above the axes, where it covers nothing.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handlelength=1.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
