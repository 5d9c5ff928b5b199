"""The loop of `generate_many`: places of rows that have ended go to other texts, while the other rows go on.

A place is *free*; then its prompt is *read*, in pieces between the iterations of the others, by target and drafter;
then its row is *active* until it ends. Pieces come to take a part of an iteration's time, so that active rows
take less than twice the time per token.
"""

import copy
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from torch import Tensor
from transformers import LogitsProcessorList

from ..models.cached import CachedModel
from ..records.stats import Iteration, RowStats, SpeculationStats
from ..sampling.by_row import OwnProcessors
from ..sampling.rules import CoupledRule
from .clock import Clock
from .decoding import SpeculativeDecoding
from .stopping import OwnStopping, Stopping

# The most tokens per row in a piece of the prompts.
_LONGEST = 512
# Tokens of all rows in a piece while some rows are active: at first per place, and the bounds.
_FIRST, _LEAST, _MOST = 8, 16, 8192
_SHARE = 0.8  # of an iteration's time, what a piece may take


class Text(NamedTuple):
    """A text to decode.

    Attributes:
        name: for messages.
        prompt: token ids.
        limit: how many tokens it may have, the prompt included.
        processors, stopping: its own, of a batch of one row.
        seed: for coupled sampling.
    """

    name: str
    prompt: list[int]
    limit: int
    processors: LogitsProcessorList
    stopping: Stopping
    seed: int


class Ended(NamedTuple):
    """A text that has ended.

    Attributes:
        row: its place.
        tokens: `[length]` on the CPU, the prompt included.
        reason: see `RowStep.finished`.
        stats: those of this text.
    """

    row: int
    tokens: Tensor
    reason: str
    stats: SpeculationStats


@dataclass
class RefilledDecoding(SpeculativeDecoding):
    """A batch without padding, each row of which is decoded as if it were alone.

    The context's rows are the active ones. Target and drafter must be able to `restart` rows.

    Attributes:
        by_clock: measured times decide how long pieces are; processes that compute a model together must not measure.
    """

    by_clock: bool = True
    _texts: dict[int, Text] = field(default_factory=dict)  # by row that is read or active
    _own: dict[int, SpeculationStats] = field(default_factory=dict)  # by row that is read or active
    _unread: list[int] = field(default_factory=list)  # rows whose prompts are not read yet
    _readers: list[int] = field(default_factory=list)  # rows that have read a piece before this iteration
    _ended: list[Ended] = field(default_factory=list)
    _piece: int = 0  # tokens of all rows, at most
    _last_piece: int = 0  # tokens of all rows in the last piece
    _prefill_seconds: float = 0.0  # before this step

    def begin(self) -> None:
        """All places are free."""
        self._clock = Clock(self.context.tokens.device)
        self.context.rows = []
        self._piece = max(_FIRST * self.context.batch_size, _LEAST)
        self.start_drafter()

    @property
    def free(self) -> list[int]:
        """The free places."""
        return [row for row in range(self.context.batch_size) if row not in self._texts]

    def admit(self, row: int, text: Text) -> None:
        """Give a free place to a text."""
        assert isinstance(self.target, CachedModel)
        assert isinstance(self.stopping, OwnStopping) and isinstance(self.processors, OwnProcessors)
        self.context.restart(row, text.prompt, text.limit)
        self.target.restart(row, text.limit, text.limit - 2)  # the last token is not fed
        self.drafter.restart(self.context, row)
        self.processors.restart(row, text.processors)
        self.stopping.restart(row, text.stopping)
        if isinstance(self.request.rule, CoupledRule):
            self.request.rule.noise.restart(row, text.seed)
        self._texts[row], self._own[row] = text, SpeculationStats()
        self._unread.append(row)

    def step(self) -> list[Ended]:
        """Read a piece of the prompts, if any are unread, and do one iteration. Returns: the texts that ended in it."""
        self._readers, self._prefill_seconds = list(self._unread), self.stats.prefill_seconds
        is_piece = bool(self._unread and self.context.rows)
        if self._unread:
            self._clock.begin()
            before = self.target.prefill_forwards
            self._read(is_piece)
            self._clock.lap()
            self._prefilled = self.target.prefill_forwards - before
        seconds = self.stats.seconds
        self.iterate()
        if self.ranks is not None:
            self.ranks.flush()  # reading prompts is work that all ranks do together
        if is_piece and self.by_clock:
            reading = self.stats.prefill_seconds - self._prefill_seconds
            self._adapt(reading, self.stats.seconds - seconds - reading)
        ended, self._ended = self._ended, []
        return ended

    def _read(self, is_piece: bool) -> None:
        """Read a piece of the prompts, or all. Rows whose prompts are read become active."""
        context, active = self.context, self.context.rows
        assert isinstance(self.target, CachedModel)
        at_once = self.prefill_chunk_size or _LONGEST
        while self._unread:
            context.rows = self._unread
            count = min(max(self._piece // len(self._unread), 1), at_once) if is_piece else at_once
            before = self.target.prefill_forwards, self.drafter.prefill_forwards
            held = self.target.missing(context)
            self.target.read(context, count)
            self.drafter.read(context, count)
            left = self.target.missing(context)
            self._last_piece = len(held) * max(a - b for a, b in zip(held, left))
            for row in self._unread:
                self._own[row].target_prefill_forwards += self.target.prefill_forwards - before[0]
                self._own[row].draft_prefill_forwards += self.drafter.prefill_forwards - before[1]
            missing = dict(zip(self._unread, left))
            self._unread = [row for row in missing if missing[row] > 1]
            active += [row for row in missing if missing[row] == 1]
            if is_piece:
                break
        context.rows = active

    def _adapt(self, reading: float, iteration: float) -> None:
        """Make pieces longer or shorter, so that they take their share.

        One that held all of its prompts is no reason for longer ones: it may have been a short one.
        """
        wanted = _SHARE * iteration
        if self._last_piece and reading and (self._unread or reading > wanted):
            tokens = self._last_piece * min(max(wanted, reading / 2), 2 * reading) / reading
            self._piece = min(max(round(tokens), _LEAST), _MOST)

    def record(self, iteration: Iteration) -> None:
        """Count for the whole and for each text; a text's seconds are its share of those of all rows."""
        super().record(iteration)
        self.stats.iterations.clear()  # there may be no end of them
        reading = (self.stats.prefill_seconds - self._prefill_seconds) / max(len(self._readers), 1)
        for row in self._readers:
            self._own[row].prefill_seconds += reading
        share = 1 / len(iteration.rows)
        for step in iteration.rows:
            own = self._own[step.row]
            own.count(step)
            own.target_forwards += iteration.target_forwards
            own.draft_forwards += iteration.draft_forwards
            own.draft_seconds += share * iteration.draft_seconds
            own.verify_seconds += share * iteration.verify_seconds
            own.other_seconds += share * iteration.other_seconds
            if step.finished is not None:
                self._end(step.row, step.finished)

    def _end(self, row: int, reason: str) -> None:
        own = self._own.pop(row)
        del self._texts[row]
        own.per_row = [
            RowStats(**{counter.name: copy.copy(getattr(own, counter.name)) for counter in fields(RowStats)})
        ]
        self._ended.append(Ended(row, self.context.row(row).clone(), reason, own))

    def _name(self, row: int) -> str:
        return self._texts[row].name
