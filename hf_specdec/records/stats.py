"""Statistics of speculation: the record of one iteration, and counters that sum such records.

Only counters are stored; every rate is a property. Nothing here knows about models or tensors.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import fragment

ROWS = 24  # the most rows of a batch that a notebook lists


@dataclass(frozen=True)
class RowStep:
    """What one iteration did for one row.

    Attributes:
        row: index of the row in the returned batch.
        context_length: committed tokens before the iteration, including the prompt but not padding.
        drafted: the token ids that the drafter proposed; may be empty.
        accepted: how many leading tokens of `drafted` were accepted and committed.
        committed: the tokens appended to the context: the accepted drafts, then the target's own token, which is absent
            if the run stopped at one of the accepted drafts.
        finished: why the row ended here: "eos", "max_length", "stop_string", "max_time" or "stopping_criteria"; `None`
            if it continues.
    """

    row: int
    context_length: int
    drafted: list[int]
    accepted: int
    committed: list[int]
    finished: str | None = None

    def __post_init__(self) -> None:
        kept = self.drafted[: self.accepted]
        own = len(self.committed) - len(kept)
        if len(kept) != self.accepted or self.committed[: len(kept)] != kept or own not in (0, 1):
            raise ValueError(
                "A row commits its accepted drafts and at most one token from the target, but row "
                f"{self.row} accepts {self.accepted} of the drafts {self.drafted} and commits {self.committed}."
            )

    @property
    def next_length(self) -> int:
        """Committed tokens after the iteration."""
        return self.context_length + len(self.committed)

    @property
    def own_token(self) -> int | None:
        """The token that the target added; `None` if the run stopped before it."""
        return self.committed[self.accepted] if self.accepted < len(self.committed) else None

    @property
    def kind(self) -> str | None:
        """The kind of the target's own token.

        "correction" (it replaces the first rejected draft), "bonus" (all drafts were accepted), "target" (nothing was
        drafted), or `None` (there is no such token).
        """
        if self.own_token is None:
            return None
        if not self.drafted:
            return "target"
        return "correction" if self.accepted < len(self.drafted) else "bonus"


@dataclass(frozen=True)
class Iteration:
    """One cycle of draft, verify, accept, commit and roll back.

    Attributes:
        rows: one record per row that took part; finished rows are absent.
        draft_seconds: wall time of drafting; on CUDA that of the device, measured by events.
        verify_seconds: wall time of the target's verification and of acceptance, including processors and criteria, and
            of waiting for the device.
        other_seconds: wall time of the rest of the iteration: commit, rollback and the streamer.
        draft_forwards: forwards of the draft model or head, each for all rows together; 0 for drafters without one.
        target_forwards: forwards of the target, each for all rows together.
        withdrawn: by row, how many tokens of earlier iterations were taken back. A stopping criterion of the user's is
            called for a step when all rows have come there, and may then end a row that was ahead.
    """

    rows: list[RowStep]
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    draft_forwards: int
    target_forwards: int = 1
    withdrawn: dict[int, int] = field(default_factory=dict)


@dataclass
class RowStats:
    """Counters of one row, and rates derived from them.

    Attributes:
        row_iterations: iterations that the row took part in.
        committed_tokens: tokens appended to the context, not counting the prompt, nor tokens taken back because the row
            had ended before them.
        drafted_tokens: tokens that the drafter proposed.
        accepted_tokens: drafts that were accepted and committed.
        accepted_length_histogram: entry k counts the iterations in which k drafts were accepted.
        drafted_by_position: entry i counts the iterations that drafted an (i + 1)-th token.
        accepted_by_position: entry i counts the iterations that accepted it.
    """

    row_iterations: int = 0
    committed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_length_histogram: list[int] = field(default_factory=list)
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)

    def count(self, step: RowStep) -> None:
        """Add one iteration of one row."""
        drafted = len(step.drafted)
        self.row_iterations += 1
        self.committed_tokens += len(step.committed)
        self.drafted_tokens += drafted
        self.accepted_tokens += step.accepted
        _grow(self.accepted_length_histogram, step.accepted + 1)
        self.accepted_length_histogram[step.accepted] += 1
        _grow(self.drafted_by_position, drafted)
        _grow(self.accepted_by_position, drafted)
        for i in range(drafted):
            self.drafted_by_position[i] += 1
            self.accepted_by_position[i] += i < step.accepted

    @property
    def acceptance_rate(self) -> float:
        """α: accepted / drafted tokens, 0 to 1; 0.0 if nothing was drafted."""
        return _ratio(self.accepted_tokens, self.drafted_tokens)

    @property
    def block_efficiency(self) -> float:
        """τ: tokens committed per target forward, per row; vanilla decoding has 1. 0.0 before the first iteration."""
        return _ratio(self.committed_tokens, self.row_iterations)

    @property
    def mean_accepted_length(self) -> float:
        """Drafts accepted per iteration and row (about τ − 1: the target adds one token of its own)."""
        return _ratio(self.accepted_tokens, self.row_iterations)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Entry i: the share of (i + 1)-th drafts that were accepted (together with all drafts before them)."""
        counts = zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        return [_ratio(accepted, drafted) for accepted, drafted in counts]

    def to_dict(self) -> dict[str, Any]:
        """Return counters and rates as plain JSON types."""
        rates = ("acceptance_rate", "block_efficiency", "mean_accepted_length", "acceptance_by_position")
        return asdict(self) | {name: getattr(self, name) for name in rates}


@dataclass
class SpeculationStats(RowStats):
    """Statistics of `generate(strategy="spec")`: `RowStats` counters summed over all rows, forwards and seconds.

    Pass an empty one as `speculation_stats=` to have it filled in place; pass it again to continue counting.

    Attributes:
        target_forwards: verification forwards of the target, each for all rows together.
        draft_forwards: forwards of the draft model or head while drafting; 0 for drafters without one.
        target_prefill_forwards: forwards of the target over the prompt that verified nothing; 0 if the first
            verification includes the whole prompt.
        draft_prefill_forwards: forwards of the draft model or head over prompts, or tokens it had missed, that drafted
            nothing.
        prefill_seconds: wall time before the first iteration, except compiling and capturing.
        compile_seconds: wall time of compiling (`speculation_compile`), not counted elsewhere.
        capture_seconds: wall time of capturing CUDA graphs (`cache_implementation="static"`), not counted elsewhere.
        packing_seconds: wall time of packing weights (`speculation_pack_weights`), or of finding them already packed,
            not counted elsewhere.
        draft_seconds: wall time of drafting; on CUDA that of the device, measured by events.
        verify_seconds: wall time of the target's verification and of acceptance, including processors and criteria, and
            of waiting for the device.
        other_seconds: wall time of the rest of the iterations: commit, rollback and the streamer.
        per_row: the same counters for each row of the returned batch.
        iterations: for each iteration, the rows that took part ("rows") and how many tokens each of them "drafted" and
            "accepted", three lists of equal length.
    """

    target_forwards: int = 0
    draft_forwards: int = 0
    target_prefill_forwards: int = 0
    draft_prefill_forwards: int = 0
    prefill_seconds: float = 0.0
    compile_seconds: float = 0.0
    capture_seconds: float = 0.0
    packing_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0
    per_row: list[RowStats] = field(default_factory=list, repr=False)
    iterations: list[dict[str, list[int]]] = field(default_factory=list, repr=False)

    def add(self, iteration: Iteration) -> None:
        """Count one iteration."""
        self.target_forwards += iteration.target_forwards
        self.draft_forwards += iteration.draft_forwards
        self.draft_seconds += iteration.draft_seconds
        self.verify_seconds += iteration.verify_seconds
        self.other_seconds += iteration.other_seconds
        for step in iteration.rows:
            self.per_row.extend(RowStats() for _ in range(step.row + 1 - len(self.per_row)))
            self.per_row[step.row].count(step)
            self.count(step)
        for row, count in iteration.withdrawn.items():
            self.per_row[row].committed_tokens -= count
            self.committed_tokens -= count
        self.iterations.append(
            {
                "rows": [step.row for step in iteration.rows],
                "drafted": [len(step.drafted) for step in iteration.rows],
                "accepted": [step.accepted for step in iteration.rows],
            }
        )

    def merge(self, other: "SpeculationStats") -> None:
        """Add what `other` has counted, as if it had been counted here."""
        own = [counter.name for counter in fields(self) if counter.name not in ("per_row", "iterations")]
        _merge(self, other, own)
        self.per_row.extend(RowStats() for _ in range(len(other.per_row) - len(self.per_row)))
        for mine, theirs in zip(self.per_row, other.per_row):
            _merge(mine, theirs, [counter.name for counter in fields(theirs)])
        self.iterations += other.iterations

    def add_prefill(self, seconds: float, target_forwards: int, compile_seconds: float = 0.0) -> None:
        """Count the work before the first iteration; `compile_seconds` of it were compiling."""
        self.prefill_seconds += seconds - compile_seconds
        self.compile_seconds += compile_seconds
        self.target_prefill_forwards += target_forwards

    @property
    def seconds(self) -> float:
        """Total wall time: prefill, draft, verify and other."""
        return self.prefill_seconds + self.draft_seconds + self.verify_seconds + self.other_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return counters and rates as plain JSON types, with total seconds and each row's."""
        return super().to_dict() | {"seconds": self.seconds, "per_row": [row.to_dict() for row in self.per_row]}

    def summary(self) -> str:
        """A one-line summary."""
        per = "target forward and row" if len(self.per_row) > 1 else "target forward"
        parts = [
            f"{self.committed_tokens} tokens in {self.target_forwards} target forwards",
            f"block efficiency τ = {self.block_efficiency:.2f} tokens per {per}",
            f"acceptance rate α = {self.acceptance_rate:.0%} ({self.accepted_tokens} of {self.drafted_tokens} drafts)",
        ]
        if self.seconds:
            shares = {name: getattr(self, f"{name}_seconds") for name in ("prefill", "draft", "verify", "other")}
            shown = ", ".join(f"{name} {s / self.seconds:.0%}" for name, s in shares.items() if s)
            parts.append(f"{self.seconds:.2f} s ({shown})")
        if self.compile_seconds:
            parts.append(f"compiled in {self.compile_seconds:.1f} s")
        if self.capture_seconds:
            parts.append(f"CUDA graphs captured in {self.capture_seconds:.1f} s")
        return ", ".join(parts)

    __str__ = summary

    def _repr_html_(self) -> str:
        def counts(name: str, row: RowStats) -> tuple[str, ...]:
            numbers = (row.committed_tokens, row.row_iterations, row.drafted_tokens, row.accepted_tokens)
            return name, *map(str, numbers), f"{row.acceptance_rate:.0%}", f"{row.block_efficiency:.2f}"

        headers = ("", "committed", "iterations", "drafted", "accepted", "acceptance rate α", "block efficiency τ")
        rows = [counts("all rows", self)]
        if len(self.per_row) > 1:
            rows += [counts(f"row {i}", row) for i, row in enumerate(self.per_row[:ROWS])]
        more = f"… and {len(self.per_row) - ROWS} more rows" if len(self.per_row) > ROWS else ""
        whole = fragment.table(headers, rows, above=self.summary(), below=more)
        histogram = self.accepted_length_histogram[:]
        _grow(histogram, len(self.accepted_by_position) + 1)
        by_length = (
            ("iterations that accepted k drafts", *map(str, histogram)),
            ("k-th drafts that were accepted", "", *(f"{rate:.0%}" for rate in self.acceptance_by_position)),
        )
        return whole + fragment.table(("k", *map(str, range(len(histogram)))), by_length)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _merge(mine: RowStats, theirs: RowStats, names: list[str]) -> None:
    """Add the counters of these names, which are numbers or lists of numbers."""
    for name in names:
        counts, more = getattr(mine, name), getattr(theirs, name)
        if isinstance(counts, list):
            _grow(counts, len(more))
            counts[: len(more)] = [a + b for a, b in zip(counts, more)]
        else:
            setattr(mine, name, counts + more)


def _grow(counts: list[int], size: int) -> None:
    counts.extend([0] * (size - len(counts)))
