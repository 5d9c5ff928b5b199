"""Trace: a readable record of each iteration, as plain text, in colour on a terminal, or as one HTML page.

`Trace._walk` describes the iterations; `to_text` and `print` render its pieces. `to_html` lays them out as token chips
and also shows the generated text, coloured by who proposed each token (template: trace_template.html).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from . import fragment
from .pieces import Pieces
from .stats import Iteration, RowStep, SpeculationStats

if TYPE_CHECKING:
    from rich.console import Console

LEGEND = {  # token roles, and terms of the summary
    "accepted": "a draft that the target agreed with: kept",
    "rejected": "the first draft that the target disagreed with",
    "discarded": "a draft after a rejected one, or after the end of the run: never used",
    "correction": "the target's own token in place of the rejected draft",
    "bonus": "the target's own token after all drafts were accepted: one more for free",
    "target": "the target's own token when nothing was drafted",
    "committed": "what an iteration appends to the context: the accepted drafts, then the target's own token",
    "context": "all tokens so far, including the prompt; it holds only what the target agreed to",
    "acceptance rate α": "accepted / drafted tokens",
    "block efficiency τ": "tokens committed per target forward, for each row; ordinary decoding has 1",
}
FINISHED = {
    "eos": "the end-of-sequence token was committed",
    "max_length": "the length limit was reached",
    "stop_string": "a stop string was completed",
    "max_time": "the time limit was reached",
    "stopping_criteria": "a stopping criterion fired",
}
STYLES = {  # how rich shows a role
    "title": "bold",
    "label": "dim",
    "accepted": "green",
    "rejected": "red strike",
    "discarded": "dim",
    "correction": "bold yellow",
    "bonus": "bold cyan",
    "target": "bold blue",
}
LINES = 24  # the most lines of a notebook's table, each one iteration of one row
TAIL = 60  # characters of the text so far that the HTML page repeats before each iteration's tokens


class Tokenizer(Protocol):
    def decode(self, token_ids: Any, /) -> Any: ...


class Span(NamedTuple):
    """A piece of text and its style: a key of `STYLES`; anything else is plain."""

    text: str
    style: str = ""


@dataclass
class Trace:
    """The iterations of one `generate(strategy="spec", speculation_trace=trace)`, in order.

    Attributes:
        iterations: one record each.
        tokenizer: decodes the tokens, unless a method gets another. `generate()` sets it to its own `tokenizer` if the
            trace has none; without one, tokens are shown as ids.
    """

    iterations: list[Iteration] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer | None = None  # not a field, so `asdict` gives plain JSON types

    def add(self, iteration: Iteration) -> None:
        """Append one iteration."""
        self.iterations.append(iteration)

    def stats(self) -> SpeculationStats:
        """The counters of the traced iterations (without the prefill)."""
        stats = SpeculationStats()
        for iteration in self.iterations:
            stats.add(iteration)
        return stats

    def to_text(self, tokenizer: Tokenizer | None = None) -> str:
        """Describe each iteration in plain text; `tokenizer` replaces the trace's own."""
        return "".join(span.text for span in self._walk(tokenizer)) + "\n"

    def print(
        self, tokenizer: Tokenizer | None = None, console: "Console | None" = None, limit: int | None = None
    ) -> None:
        """Print `to_text` in colour; with `limit`, only the first `limit` iterations and the summary."""
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble(*((span.text, STYLES.get(span.style, "")) for span in self._walk(tokenizer, limit)))
        (console or Console()).print(text, soft_wrap=True)

    def to_html(self, path: str | Path, tokenizer: Tokenizer | None = None) -> Path:
        """Write one self-contained HTML page to `path` and return it."""
        path = Path(path)
        path.write_text(_html_page(self, self.tokenizer if tokenizer is None else tokenizer), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return _html_fragment(self, self.tokenizer)

    def _walk(self, tokenizer: Tokenizer | None, limit: int | None = None) -> Iterator[Span]:
        """Describe the iterations, or the first `limit`, in pieces that `to_text` and `print` render."""
        label, stats = _labels(self.tokenizer if tokenizer is None else tokenizer), self.stats()
        shown = self.iterations[:limit]
        for number, iteration in enumerate(shown, start=1):
            for step in iteration.rows:
                row = f", row {step.row}" if len(stats.per_row) > 1 else ""
                yield Span(f"Iteration {number}{row}", "title")
                yield Span(f" · context of {step.context_length} tokens\n")
                yield from _told(step, label)
                yield Span("\n")
            for index, count in iteration.withdrawn.items():
                yield Span(f"Iteration {number}, row {index}", "title")
                yield Span(f" · {_taken_back(count)}\n\n")
        if len(shown) < len(self.iterations):
            yield Span(f"… and {len(self.iterations) - len(shown)} more iterations\n\n", "label")
        yield Span("Summary", "title")
        yield Span(f" · {len(self.iterations)} iterations: {stats.summary()}\n\n")
        yield Span("What the words mean", "title")
        for term, meaning in LEGEND.items():
            yield from (Span("\n  "), Span(term, term), Span(" " * (20 - len(term)) + meaning))


def drafted_roles(step: RowStep) -> list[tuple[int, str]]:
    """The drafts, each "accepted", "rejected" or "discarded"."""
    first_lost = "rejected" if step.kind == "correction" else "discarded"
    left = len(step.drafted) - step.accepted
    roles = ["accepted"] * step.accepted + [first_lost] * (left > 0) + ["discarded"] * (left - 1)
    return list(zip(step.drafted, roles, strict=True))


def committed_roles(step: RowStep) -> list[tuple[int, str]]:
    """The committed set, each token "accepted", "correction", "bonus" or "target"."""
    return list(zip(step.committed, ["accepted"] * step.accepted + ([step.kind] if step.kind else []), strict=True))


def visible(text: str, line_break: str = "⏎") -> str:
    """`text` with line breaks and unprintable characters made visible."""
    special = {"\n": line_break, "\t": "⇥"}
    return "".join(special.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _labels(tokenizer: Tokenizer | None, quote: str = '"') -> Callable[[int], str]:
    """Labels of tokens: the text, plus the id if the text says too little; without a tokenizer, only the id."""

    @cache
    def label(token: int) -> str:
        if tokenizer is None:
            return str(token)
        text = tokenizer.decode([token])
        return quote + visible(text) + quote + (f"#{token}" if not text or "\ufffd" in text else "")

    return label


def _told(step: RowStep, label: Callable[[int], str]) -> Iterator[Span]:
    """One iteration of one row, in words: a line for each stage of the cycle."""
    yield from _line("drafted", drafted_roles(step), label)
    if step.drafted:
        yield from _line("verified", [], label, _verdict(step, label))
    if step.kind:
        yield from _line("target", committed_roles(step)[-1:], label, f" {step.kind}: {LEGEND[step.kind]}")
    yield from _line("committed", committed_roles(step), label)
    yield from _line("context", [], label, f"{step.context_length} + {len(step.committed)} = {step.next_length} tokens")
    if step.finished:
        yield from _line("finished", [], label, _ending(step))


def _line(name: str, tokens: list[tuple[int, str]], label: Callable[[int], str], words: str = "") -> Iterator[Span]:
    yield Span(f"  {name:<10}", "label")
    for token, role in tokens:
        yield from (Span(" "), Span(label(token), role))
    yield Span(f" {words or 'nothing' * (not tokens)}".rstrip() + "\n")


def _verdict(step: RowStep, label: Callable[[int], str]) -> str:
    """How many drafts were accepted, and what happened to the others."""
    left = len(step.drafted) - step.accepted
    if not step.drafted:
        return "nothing drafted"
    count = f"all {step.accepted} accepted" if not left else f"{step.accepted} of {len(step.drafted)} accepted"
    if step.kind is None:
        why = "and the run ended there" if step.finished is not None else "and cut where the other rows stop"
        return f"{count}, {why}" + f": {left} not needed" * bool(left)
    if not left:
        return count
    rejected = f"{count}, first rejected: {label(step.drafted[step.accepted])}"
    return rejected + f", {left - 1} after it discarded" * (left > 1)


def _pieces(tokens: list[int], tokenizer: Tokenizer | None) -> Iterator[str]:
    """The text that each token adds."""
    pieces = Pieces(tokenizer.decode if tokenizer is not None else lambda ids: "".join(f"{id} " for id in ids))
    for count, token in enumerate(tokens, start=1):
        yield pieces.add(token, is_last=count == len(tokens))


def _html_page(trace: Trace, tokenizer: Tokenizer | None) -> str:
    stats, label = trace.stats(), _labels(tokenizer)
    rows = range(len(stats.per_row))
    committed: list[list[int]] = [[] for _ in rows]
    for step in (step for iteration in trace.iterations for step in iteration.rows):
        committed[step.row] += step.committed
    pieces = [_pieces(tokens, tokenizer) for tokens in committed]
    text: list[list[str]] = [[] for _ in rows]
    tail, sections = [""] * len(rows), ""
    for number, iteration in enumerate(trace.iterations, start=1):
        times = f"draft {iteration.draft_seconds * 1e3:.1f} ms <br>verify {iteration.verify_seconds * 1e3:.1f} ms"
        sections += f"<section><h3>Iteration {number}<small>{times}</small></h3><div>\n"
        for step in iteration.rows:
            row, anchor = step.row, f"i{number}r{step.row}"
            new = list(islice(pieces[row], len(step.committed)))
            marked = [
                f'<a href="#{anchor}" class="{role}" title="{escape(label(token))} · id {token} · {role}, '
                f'iteration {number}">{escape(visible(piece, line_break=chr(10)))}</a>'
                for piece, (token, role) in zip(new, committed_roles(step), strict=True)
            ]
            sections += f'<div class="step" id="{anchor}">{_html_step(step, tokenizer, len(rows) > 1)}'
            sections += f'<div class="more">{escape(visible(tail[row]))}{"".join(marked)}</div></div>\n'
            text[row] += marked
            tail[row] = (tail[row] + "".join(new))[-TAIL:]
        for row, count in iteration.withdrawn.items():
            del text[row][-count:]
            sections += f'<div class="step"><small><b>row {row}</b></small><div>■ {_taken_back(count)}</div></div>\n'
        sections += "</div></section>\n"
    legend = ((_chip(term, term) if term in STYLES else term, meaning) for term, meaning in LEGEND.items())
    return Template(Path(__file__).with_name("trace_template.html").read_text(encoding="utf-8")).substitute(
        stats.to_dict(),
        acceptance_rate=f"{stats.acceptance_rate:.0%}",
        block_efficiency=f"{stats.block_efficiency:.2f}",
        iterations=len(trace.iterations),
        text="\n".join(
            f"{f'<small>row {i}</small>' * (len(rows) > 1)}<div class='text'>{''.join(text[i])}</div>" for i in rows
        ),
        legend="\n".join(f"<div><dt>{term}</dt><dd>{meaning}</dd></div>" for term, meaning in legend),
        sections=sections,
    )


def _html_fragment(trace: Trace, tokenizer: Tokenizer | None) -> str:
    """The first iterations as one table for a notebook: like the page, but without the text."""
    stats = trace.stats()
    steps = [(number, step) for number, iteration in enumerate(trace.iterations, start=1) for step in iteration.rows]
    name, label = _labels(tokenizer), _labels(tokenizer, quote="")

    def chip(text: str, role: str, title: str) -> str:
        return fragment.chip(text.replace(" ", "·"), STYLES[role], title)

    rows = [
        (
            f"{number}, row {step.row}" if len(stats.per_row) > 1 else str(number),
            f"{step.context_length} → {step.next_length}",
            fragment.Html("".join(chip(label(token), role, role) for token, role in _drafts_and_own(step))),
            "; ".join(filter(None, (_verdict(step, name), _ending(step)))),
        )
        for number, step in steps[:LINES]
    ]
    more = ""
    if len(steps) > LINES:
        what = "lines, one for each row of an iteration" if len(stats.per_row) > 1 else "iterations"
        more = f"… and {len(steps) - LINES} more {what}; to_html(path) writes all of them"
    legend = "".join(chip(role, role, meaning) for role, meaning in LEGEND.items() if role in STYLES)
    headers = ("iteration", "context", "drafts, then the target's own token", "verified")
    above = f"{len(trace.iterations)} iterations: {stats.summary()}"
    return fragment.table(headers, rows, fragment.Html(f"{escape(above)}<br>{legend}"), more)


def _html_step(step: RowStep, tokenizer: Tokenizer | None, many: bool) -> str:
    name, label = _labels(tokenizer), _labels(tokenizer, quote="")
    chips = "".join(_chip(label(token), role) for token, role in _drafts_and_own(step))
    end = f"<div>■ {escape(_ending(step))}</div>" if step.finished else ""
    return (
        f"<small>{f'<b>row {step.row}</b>' * many}{step.context_length} → {step.next_length} tokens</small>"
        f'<div>{chips}<div class="verdict">{escape(_verdict(step, name))}</div>{end}</div>'
    )


def _drafts_and_own(step: RowStep) -> list[tuple[int, str]]:
    return drafted_roles(step) + committed_roles(step)[step.accepted :]


def _ending(step: RowStep) -> str:
    """Why the row ended here; empty if it continues."""
    return FINISHED.get(step.finished, step.finished) if step.finished else ""


def _taken_back(count: int) -> str:
    """What happened to a row's tokens that come after its end."""
    return f"{count} tokens taken back: a criterion that is called when all rows have come there ends the row before"


def _chip(text: str, role: str) -> str:
    return f'<span class="chip {role}" title="{role}">{escape(text).replace(" ", "<i>·</i>")}</span>'
