"""HTML fragments for notebooks: tables and chips with inline styles, which affect nothing else on the page.

Text keeps the page's own colour and backgrounds are translucent tints, so fragments are readable on light and dark
pages.
Owns how text becomes HTML; classes with a `_repr_html_` decide what to show.
"""

from collections.abc import Iterable, Sequence
from html import escape

CSS = {  # keys are words of rich's styles, so terminals and notebooks share style tables
    "bold": "font-weight: 600",
    "dim": "opacity: .7",
    "strike": "text-decoration: line-through",
    "green": "background: rgba(40, 160, 80, .25)",
    "red": "background: rgba(220, 60, 50, .25)",
    "yellow": "background: rgba(225, 150, 0, .3)",
    "cyan": "background: rgba(0, 150, 215, .25)",
    "blue": "background: rgba(140, 85, 220, .25)",  # bluish violet: tints of cyan and blue look too similar
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
    """`text` on a background tint.

    Args:
        style: words of rich's styles, as in "bold red"; words that `CSS` lacks are ignored.
        title: tooltip.
    """
    css = "; ".join([CHIP, *(CSS[word] for word in style.split() if word in CSS)])
    told = f' title="{escape(title)}"' if title else ""
    return Html(f'<span style="{css}"{told}>{html(text)}</span>')


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], above: str = "", below: str = "") -> Html:
    """A table, with an optional line of text above and below it.

    Args:
        headers: the names of the columns.
        rows: the cells of each row, one per column.
    """
    lines = [_line("th", headers), *(_line("td", row) for row in rows)]
    texts = [f'<div style="margin: .3em 0">{html(text)}</div>' if text else "" for text in (above, below)]
    return Html(
        f'<div style="overflow-x: auto">{texts[0]}<table style="border-collapse: collapse; margin: 0 0 .5em">'
        f"{''.join(lines)}</table>{texts[1]}</div>"
    )


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{CELL}">{html(cell)}</{tag}>' for cell in cells) + "</tr>"
