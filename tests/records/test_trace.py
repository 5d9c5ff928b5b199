"""The trace reports each iteration correctly: as text, in colour and as a page."""

import io
import json
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from conftest import Fragment

from hf_specdec.records.stats import Iteration, RowStep
from hf_specdec.records.trace import LEGEND, LINES, STYLES, Trace, committed_roles, drafted_roles, visible

ROLES = [term for term in LEGEND if term in STYLES]


class WordTokenizer:
    """Tokens are words and decode with spaces between them; an unknown word gets the next id."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.words += sorted(set(text.split()) - set(self.words))
        return [self.words.index(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


class ByteTokenizer:
    """Tokens are single bytes of UTF-8."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer()


def traced(*iterations: list[RowStep]) -> Trace:
    trace = Trace()
    for rows in iterations:
        trace.add(Iteration(rows, draft_seconds=0.001, verify_seconds=0.002, other_seconds=0.0, draft_forwards=1))
    return trace


def said(
    words: WordTokenizer, context: int, drafts: str, accepted: int, own: str, row: int = 0, finished: str | None = None
) -> RowStep:
    drafted = words(drafts)
    return RowStep(row, context, drafted, accepted, drafted[:accepted] + words(own), finished)


def lines(trace: Trace, tokenizer: WordTokenizer | ByteTokenizer | None = None) -> list[str]:
    return [line.strip() for line in trace.to_text(tokenizer).splitlines()]


def test_a_correction_replaces_the_first_rejected_draft(words):
    trace = traced([said(words, 10, "the quick brown fox jumps", 3, "sly")])
    assert lines(trace, words)[:6] == [
        "Iteration 1 · context of 10 tokens",
        'drafted    "the" "quick" "brown" "fox" "jumps"',
        'verified   3 of 5 accepted, first rejected: "fox", 1 after it discarded',
        'target     "sly"  correction: the target\'s own token in place of the rejected draft',
        'committed  "the" "quick" "brown" "sly"',
        "context    10 + 4 = 14 tokens",
    ]


def test_three_committed_tokens_are_two_accepted_drafts_and_one_of_the_target(words):
    trace = traced([said(words, 14, "and the bear", 2, "lion")])
    assert 'committed  "and" "the" "lion"' in lines(trace, words)
    assert 'verified   2 of 3 accepted, first rejected: "bear"' in lines(trace, words)


def test_two_accepted_drafts_move_the_context_from_i_to_i_plus_3(words):
    i = 6
    trace = traced([said(words, i, "ŷ7 ŷ8 ŷ9 ŷ10", 2, "ȳ9")], [said(words, i + 3, "ŷ10", 0, "ȳ10")])
    told = lines(trace, words)
    assert 'committed  "ŷ7" "ŷ8" "ȳ9"' in told
    assert "context    6 + 3 = 9 tokens" in told
    assert "Iteration 2 · context of 9 tokens" in told


def test_a_bonus_follows_drafts_that_were_all_accepted(words):
    told = lines(traced([said(words, 10, "a b c", 3, "d")]), words)
    assert "verified   all 3 accepted" in told
    assert 'target     "d"  bonus: ' + LEGEND["bonus"] in told


def test_without_drafts_the_target_says_its_own_token(words):
    told = lines(traced([said(words, 10, "", 0, "hello")]), words)
    assert told[1:3] == ["drafted    nothing", 'target     "hello"  target: ' + LEGEND["target"]]


def test_a_run_that_ends_inside_the_accepted_drafts_has_no_own_token(words):
    step = said(words, 20, "the end </s> of it", 3, "", finished="eos")
    assert lines(traced([step]), words)[1:6] == [
        'drafted    "the" "end" "</s>" "of" "it"',
        "verified   3 of 5 accepted, and the run ended there: 2 not needed",
        'committed  "the" "end" "</s>"',
        "context    20 + 3 = 23 tokens",
        "finished   the end-of-sequence token was committed",
    ]
    assert [role for _, role in drafted_roles(step)] == ["accepted"] * 3 + ["discarded"] * 2


@pytest.mark.parametrize(
    ("drafts", "accepted", "own", "drafted", "committed"),
    [
        ("a b c d", 1, "x", "accepted rejected discarded discarded", "accepted correction"),
        ("a b", 0, "x", "rejected discarded", "correction"),
        ("a b", 2, "x", "accepted accepted", "accepted accepted bonus"),
        ("", 0, "x", "", "target"),
        ("a b", 1, "", "accepted discarded", "accepted"),
    ],
)
def test_every_token_has_the_role_it_played(words, drafts, accepted, own, drafted, committed):
    step = said(words, 1, drafts, accepted, own)
    assert drafted_roles(step) == list(zip(words(drafts), drafted.split(), strict=True))
    assert committed_roles(step) == list(zip(step.committed, committed.split(), strict=True))


def test_an_unknown_reason_to_finish_is_told_as_it_is(words):
    assert "finished   <boredom>" in lines(traced([said(words, 1, "a", 1, "", finished="<boredom>")]), words)


def test_rows_are_named_when_there_is_more_than_one(words):
    one, two = said(words, 5, "a", 1, "b"), said(words, 8, "c", 0, "d", row=1)
    assert "row" not in lines(traced([one]), words)[0]
    told = lines(traced([one, two]), words)
    assert "Iteration 1, row 0 · context of 5 tokens" in told
    assert "Iteration 1, row 1 · context of 8 tokens" in told


def test_without_a_tokenizer_tokens_are_ids():
    told = lines(traced([RowStep(0, 5, [11, 12], 1, [11, 42])]))
    assert told[1:3] == ["drafted    11 12", "verified   1 of 2 accepted, first rejected: 12"]
    assert "committed  11 42" in told


def test_the_text_ends_with_a_summary_and_a_legend(words):
    told = lines(traced([said(words, 5, "a b", 1, "c")], [said(words, 7, "a b", 2, "c")]), words)
    summary = next(line for line in told if line.startswith("Summary"))
    assert "2 iterations" in summary and "τ = 2.50" in summary and "α = 75%" in summary
    assert [line.split("  ")[0] for line in told[-len(LEGEND) :]] == list(LEGEND)


def test_characters_that_cannot_be_seen_are_made_visible():
    assert visible("a b\n\tc\x1b\u202e\\n") == "a b⏎⇥c\\x1b\\u202e\\n"


def test_part_of_a_character_is_told_apart_by_its_id():
    first, second = "é".encode()
    assert f'committed  "\ufffd"#{first} "\ufffd"#{second}' in lines(
        traced([RowStep(0, 5, [first], 1, [first, second])]), ByteTokenizer()
    )


def test_the_tokenizer_of_a_trace_counts_unless_another_is_given(words, tmp_path):
    trace = traced([said(words, 5, "yes no", 1, "own")])
    as_ids, other = lines(trace), WordTokenizer()
    other("un deux trois")
    trace.tokenizer = words
    assert lines(trace) == lines(trace, words) != as_ids
    assert 'drafted    "' + '" "'.join(other.words[i] for i in words("yes no")) + '"' in lines(trace, other)
    assert 'committed  "yes" "own"' in printed(trace, None)
    assert ("own", "correction") in page(trace, tmp_path).chips
    assert ("own", "correction") not in page(trace, tmp_path, other).chips
    assert json.loads(json.dumps(asdict(trace))).keys() == {"iterations"}


def test_a_row_that_is_cut_where_others_stop_is_not_said_to_have_ended():
    """In lockstep a row may commit fewer tokens than it accepted."""
    step = RowStep(0, 5, [1, 2, 3], 2, [1, 2])
    assert "verified   2 of 3 accepted, and cut where the other rows stop: 1 not needed" in lines(traced([step]))
    ended = RowStep(0, 5, [1, 2, 3], 2, [1, 2], finished="eos")
    assert "verified   2 of 3 accepted, and the run ended there: 1 not needed" in lines(traced([ended]))


# --- in colour ---


def printed(trace: Trace, tokenizer: WordTokenizer | None, limit: int | None = None, colour: bool = False) -> str:
    console = pytest.importorskip("rich.console").Console(
        file=io.StringIO(), width=60, force_terminal=colour, color_system="standard" if colour else None
    )
    trace.print(tokenizer, console, limit)
    return console.file.getvalue()


def test_print_says_what_to_text_says_and_takes_no_token_for_markup(words):
    trace = traced([said(words, 5, "[bold]a[/bold] [/] :smile:", 2, "[red]")], [said(words, 8, "a b", 2, "c")])
    assert printed(trace, words) == trace.to_text(words)


def test_print_colours_each_token_by_its_role(words):
    out = printed(traced([said(words, 5, "yes no", 1, "own")]), words, colour=True)
    assert '\x1b[32m"yes"\x1b[0m \x1b[9;31m"no"\x1b[0m' in out  # green; red, struck through
    assert '\x1b[1;33m"own"\x1b[0m' in out


def test_print_can_stop_after_the_first_iterations(words):
    trace = traced(*([said(words, 5 + 2 * i, "a", 1, "b")] for i in range(4)))
    out = printed(trace, words, limit=1)
    assert "Iteration 1" in out and "Iteration 2" not in out
    assert "… and 3 more iterations" in out and "8 tokens in 4 target forwards" in out


# --- as a page ---


class Page(HTMLParser):
    """Parses a page: whether its tags are balanced, and its chips and coloured texts as lists of (text, role)."""

    VOID = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.chips: list[tuple[str, str]] = []
        self.texts: list[list[tuple[str, str]]] = []
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append((tag, found.get("class", "")))
        if found.get("class", "").startswith("chip"):
            self.chips.append(("", found["title"]))
        if found.get("class") == "text":
            self.texts.append([])
        if tag == "a":
            self.links.add(found["href"].removeprefix("#"))
        if "id" in found:
            self.ids.add(found["id"])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        classes = [name for _, name in self.open]
        if classes and any(name.startswith("chip") for name in classes):
            self.chips[-1] = (self.chips[-1][0] + data, self.chips[-1][1])
        elif "text" in classes and data.strip("\n"):
            self.texts[-1].append((data, classes[-1]))


def page(trace: Trace, tmp_path, tokenizer: WordTokenizer | ByteTokenizer | None = None) -> Page:
    path = trace.to_html(tmp_path / "trace.html", tokenizer)
    assert path == tmp_path / "trace.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_shows_drafts_and_own_token_as_chips_by_role(words, tmp_path):
    shown = page(traced([said(words, 10, "the quick brown fox jumps", 3, "sly")]), tmp_path, words)
    chips = "the:accepted quick:accepted brown:accepted fox:rejected jumps:discarded sly:correction"
    assert shown.chips == [(role, role) for role in ROLES] + [tuple(chip.split(":")) for chip in chips.split()]


def test_the_page_builds_up_each_rows_text_with_each_token_coloured(words, tmp_path):
    shown = page(
        traced(
            [said(words, 9, "", 0, "Once"), said(words, 5, "", 0, "Hello", row=1)],
            [said(words, 10, "upon a time", 2, "hill"), said(words, 6, "world", 1, "!", row=1)],
        ),
        tmp_path,
        words,
    )
    assert shown.texts == [
        [("Once", "target"), (" upon", "accepted"), (" a", "accepted"), (" hill", "correction")],
        [("Hello", "target"), (" world", "accepted"), (" !", "bonus")],
    ]
    assert shown.links == shown.ids == {"i1r0", "i1r1", "i2r0", "i2r1"}


def test_the_page_joins_characters_that_are_spread_over_tokens_and_iterations(tmp_path):
    text = list("a🦊é\nb".encode())
    steps = [RowStep(0, 5 + i, [], 0, [byte]) for i, byte in enumerate(text)]
    shown = page(traced(*([step] for step in steps)), tmp_path, ByteTokenizer())
    assert "".join(piece for piece, _ in shown.texts[0]) == "a🦊éb"  # the line break is no coloured text of its own
    assert "🦊</a>" in shown.html and "\n</a>" in shown.html


def test_a_text_that_ends_inside_a_character_says_so(tmp_path):
    first, _ = "é".encode()
    assert page(traced([RowStep(0, 5, [], 0, [first])]), tmp_path, ByteTokenizer()).texts == [[("\ufffd", "target")]]


def test_no_token_can_write_html(words, tmp_path):
    evil = ["<script>alert(1)</script>", "\"'><img", "&amp;", "$text"]
    accepted = said(words, 5, " ".join(evil), 4, evil[0])
    rejected = said(words, 10, " ".join(evil), 0, evil[1], finished="<img>")
    shown = page(traced([accepted], [rejected]), tmp_path, words)
    assert "<script" not in shown.html and "<img" not in shown.html
    assert [text for text, _ in shown.chips[len(ROLES) :]] == [*evil, evil[0], *evil, evil[1]]
    assert "".join(text for text, _ in shown.texts[0]) == " ".join([*evil, evil[0], evil[1]])


def test_the_page_needs_nothing_from_outside(words, tmp_path):
    shown = page(traced([said(words, 5, "a b", 1, "c")]), tmp_path, words)
    assert not shown.tags & {"script", "link", "img", "iframe"}
    assert not any(word in shown.html for word in ("http:", "https:", "@import", "url(", "src="))


def test_the_page_states_the_rates(words, tmp_path):
    html = page(traced([said(words, 5, "a b", 1, "c")], [said(words, 7, "a b", 2, "c")]), tmp_path, words).html
    assert "<b>75%</b>" in html and "<b>2.50</b>" in html and "iterations for 5 tokens" in html


def test_an_empty_trace_can_be_shown(tmp_path):
    assert "0 iterations" in Trace().to_text()
    assert page(Trace(), tmp_path).texts == []


# --- in a notebook ---


def told_in_a_notebook(trace: Trace) -> tuple[Fragment, list[tuple[str, str]]]:
    """The fragment, and its tokens with their roles, recognised by the style of the legend's chips."""
    shown = Fragment(trace)
    legend, tokens = shown.chips[: len(ROLES)], shown.chips[len(ROLES) :]
    assert [text for text, _ in legend] == ROLES
    roles = {style: role for role, style in legend}
    assert len(roles) == len(ROLES)
    return shown, [(text, roles[style]) for text, style in tokens]


def test_a_notebook_shows_what_the_page_shows(words, tmp_path):
    trace = traced(
        [said(words, 10, "the quick brown fox jumps", 3, "sly")], [said(words, 14, "a b", 2, "", finished="eos")]
    )
    trace.tokenizer = words
    shown, tokens = told_in_a_notebook(trace)
    assert tokens == page(trace, tmp_path).chips[len(ROLES) :]
    assert shown.tables == [
        [
            ["iteration", "context", "drafts, then the target's own token", "verified"],
            [
                "1",
                "10 → 14",
                "thequickbrownfoxjumpssly",
                '3 of 5 accepted, first rejected: "fox", 1 after it discarded',
            ],
            ["2", "14 → 16", "ab", "all 2 accepted, and the run ended there; the end-of-sequence token was committed"],
        ]
    ]
    assert shown.text == f"2 iterations: {trace.stats().summary()}" + "".join(ROLES)


def test_a_notebook_shows_ids_without_a_tokenizer_and_names_rows(words):
    steps = [RowStep(row, 5, [11, 12], 1, [11, 42]) for row in range(2)]
    shown, tokens = told_in_a_notebook(traced(steps))
    assert tokens == [("11", "accepted"), ("12", "rejected"), ("42", "correction")] * 2
    assert [line[0] for line in shown.tables[0][1:]] == ["1, row 0", "1, row 1"]


@pytest.mark.parametrize(("rows", "more"), [(1, "3 more iterations"), (2, "6 more lines, one for each row of an it")])
def test_a_notebook_shows_the_first_iterations_and_says_how_many_more_there_are(words, rows, more):
    def trace(lines: int) -> Trace:
        steps = [said(words, 5, "a", 1, "b", row=row) for row in range(rows)]
        return traced(*([steps] * (lines // rows)))

    whole, cut = Fragment(trace(LINES)), Fragment(trace(LINES + 3 * rows))
    assert len(whole.tables[0]) == len(cut.tables[0]) == 1 + LINES
    assert "more" not in whole.text and f"… and {more}" in cut.text


def test_no_token_can_write_html_into_a_notebook(words):
    evil = ["<script>alert(1)</script>", "\"'><img", "&amp;"]
    trace = traced([said(words, 5, " ".join(evil), 0, evil[1], finished="<img>")])
    trace.tokenizer = words
    shown, tokens = told_in_a_notebook(trace)
    assert [text for text, _ in tokens] == [*evil, evil[1]]
    assert shown.tables[0][1][3].endswith('first rejected: "<script>alert(1)</script>", 2 after it discarded; <img>')


def test_an_empty_trace_can_be_shown_in_a_notebook():
    assert len(Fragment(Trace()).tables[0]) == 1
