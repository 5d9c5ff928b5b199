"""Fragments of HTML for notebooks: tables and chips that style themselves, inline, and nothing else on the page.

Text keeps the page's own colour, and backgrounds are tints that let the page through, so that both light pages and dark
ones show it well.
Owns how text becomes HTML; what is shown is up to the classes that have a `_repr_html_`.
"""

from collections.abc import Iterable, Sequence
from html import escape

CSS = {  # the words of rich's styles, so that a terminal and a notebook share their tables of styles
    "bold": "font-weight: 600",
    "dim": "opacity: .7",
    "strike": "text-decoration: line-through",
    "green": "background: rgba(40, 160, 80, .25)",
    "red": "background: rgba(220, 60, 50, .25)",
    "yellow": "background: rgba(225, 150, 0, .3)",
    "cyan": "background: rgba(0, 150, 215, .25)",
    "blue": "background: rgba(140, 85, 220, .25)",  # bluish violet: cyan and blue are tinted too much alike
}
LINE = "1px solid rgba(128, 128, 128, .4)"
CHIP = "display: inline-block; margin: 0 .2em .1em 0; padding: 0 .35em; border-radius: .3em"
CELL = f"padding: .2em .6em; border: {LINE}; text-align: left; vertical-align: top; white-space: normal"


class Html(str):
    """Text that is HTML already; any other string is escaped."""


def html(text: str) -> Html:
    """`text` as HTML, escaped unless it is `Html`."""
    return text if isinstance(text, Html) else Html(escape(text))


def chip(text: str, style: str, title: str = "") -> Html:
    """`text` on a tint of its own.

    Args:
        style: words of rich's styles that `CSS` knows, as in "bold red"; others are left out.
        title: what shows when the pointer rests on it.
    """
    css = "; ".join([CHIP, *(CSS[word] for word in style.split() if word in CSS)])
    told = f' title="{escape(title)}"' if title else ""
    return Html(f'<span style="{css}"{told}>{html(text)}</span>')


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], above: str = "", below: str = "") -> Html:
    """A table with a line of text above it and one below, where they are given.

    Args:
        headers: the names of the columns.
        rows: for each line of the table its cells, as many as there are columns.
    """
    lines = [_line("th", headers), *(_line("td", row) for row in rows)]
    texts = [f'<div style="margin: .3em 0">{html(text)}</div>' if text else "" for text in (above, below)]
    return Html(
        f'<div style="overflow-x: auto">{texts[0]}<table style="border-collapse: collapse; margin: 0 0 .5em">'
        f"{''.join(lines)}</table>{texts[1]}</div>"
    )


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{CELL}">{html(cell)}</{tag}>' for cell in cells) + "</tr>"
