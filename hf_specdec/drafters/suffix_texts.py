"""The texts that a `SuffixDrafter` searches: the rows of the call in progress, and those of earlier calls."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..sampling.context import Context
from .suffix_index import NO_TOKEN, SuffixIndex

_FIRST_ROOM = 4096  # positions


def only_tokens(ids: Tensor, vocab_size: int) -> np.ndarray:
    """`[tokens]` int32: ids on the host, with `NO_TOKEN` in place of those that are not tokens of the target."""
    array = ids.numpy()
    return np.where((array >= 0) & (array < vocab_size), array, NO_TOKEN).astype(np.int32)


@dataclass(frozen=True)
class Text:
    """A text to remember.

    Attributes:
        tokens: `[tokens]` int32.
        known: how many of the first tokens are in another text too, and here only to be compared with.
    """

    tokens: np.ndarray
    known: int = 0


class CallTexts:
    """The rows of one call, as far as they are committed, in one index.

    Of rows with the same prompt, only the first one's is searched.

    Args:
        context: with the prompts.
        encoded: by row of the batch, what the encoder has read, which comes before the row's own text; else empty.
    """

    def __init__(self, context: Context, depth: int, vocab_size: int, encoded: list[np.ndarray]):
        self._vocab_size = vocab_size
        self._depth = depth
        self._before = [np.append(ids, np.int32(NO_TOKEN)) for ids in encoded] or [
            np.empty(0, np.int32)
        ] * context.batch_size
        self._prompts = [context.prompt_width - first for first in context.first]
        self._known = [0] * context.batch_size  # by row, how many tokens of its prompt are an earlier row's too
        self._seen: dict[int, tuple[bytes, bytes]] = {}  # by row, its prompt
        for row in range(context.batch_size):
            self._begin(context, row)
        self._build(context)

    def _begin(self, context: Context, row: int) -> None:
        prompt = self._before[row].tobytes(), context.row(row)[: self._prompts[row]].numpy().tobytes()
        self._known[row] = self._prompts[row] if prompt in self._seen.values() else 0
        self._seen[row] = prompt

    def restart(self, context: Context, row: int) -> None:
        """Another text, as long as its prompt, has taken a row's place. The index holds the old one until `update`."""
        self._prompts[row] = context.ends[row] - context.first[row]
        self._seen.pop(row)
        self._begin(context, row)
        self._is_stale = True

    @property
    def several(self) -> bool:
        """Whether there are several rows."""
        return len(self._prompts) > 1

    def own(self, row: int) -> range:
        """The positions of a row's own text."""
        return range(self._starts[row], self._starts[row] + self._written[row])

    def everything_of(self, row: int) -> range:
        """The same, with what the encoder has read."""
        return range(self._starts[row] - len(self._before[row]), self.own(row).stop)

    def update(self, context: Context) -> None:
        """Write what was committed since, and forget what was taken back."""
        if self._is_stale:
            self._build(context)
            return
        for row, written in enumerate(self._written):
            length = context.ends[row] - context.first[row]
            if length < written or self._starts[row] + length >= self._limits[row]:
                self._build(context)
                return
            if length > written:
                self._append(row, context.row(row)[written:])

    def _build(self, context: Context) -> None:
        """Make the index anew, with room for twice as much text."""
        self._is_stale = False
        lengths = [context.ends[row] - context.first[row] for row in range(context.batch_size)]
        rooms = [len(before) + max(2 * length, 64) + 1 for before, length in zip(self._before, lengths)]
        self.index = SuffixIndex(sum(rooms), self._depth)
        self._starts: list[int] = []  # by row, the position of its first token
        self._limits: list[int] = []  # by row, one past its last position
        self._written = [0] * context.batch_size  # by row, how many tokens are in the index
        begin = self.index.first
        for row, (before, room) in enumerate(zip(self._before, rooms)):
            self._starts.append(begin + len(before))
            self._limits.append(begin + room)
            if self._known[row] == 0 and len(before):
                self.index.tokens[begin : self._starts[row]] = before
                self.index.link(begin, begin + len(before))
            begin += room
        for row in range(context.batch_size):
            self._append(row, context.row(row))

    def _append(self, row: int, ids: Tensor) -> None:
        begin = self._starts[row] + self._written[row]
        end = begin + len(ids)
        self.index.tokens[begin:end] = only_tokens(ids, self._vocab_size)
        self._written[row] += len(ids)
        # The place after a prompt is searched in each row: what follows it is the row's own.
        self.index.link(max(begin, self._starts[row] + self._known[row] - 1), end)

    def to_remember(self, rows: Iterable[int] | None = None) -> Iterator[Text]:
        """The texts of some rows, by default of all, each prompt once."""
        for row in range(len(self._known)) if rows is None else rows:
            known = self._known[row]
            everything, own = self.everything_of(row), self.own(row)
            if known == 0:
                yield Text(self.index.tokens[everything.start : everything.stop])
            elif len(own) > known:
                begin = max(own.start + known - self._depth, own.start)
                yield Text(self.index.tokens[begin : own.stop], own.start + known - 1 - begin)


class Memory:
    """Texts of earlier calls, in one index. The oldest are forgotten when there is no room for a new one.

    The index grows up to its limit. From then on, texts are written around in it.

        first                                next                    end
        | newest but one -- | newest -- |    free    | oldest -- | ...    |

    Args:
        max_tokens: how many positions texts may take in all, with the separator after each. Of a longer text, the end
            is kept.
        max_requests: how many texts.
    """

    def __init__(self, depth: int, max_tokens: int, max_requests: int):
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self._texts: deque[tuple[int, int, int]] = deque()  # begin, known until, end; the oldest first
        self._held = 0
        self.index = SuffixIndex(min(_FIRST_ROOM, max_tokens), depth)
        self._next = self.index.first

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Text]:
        """The remembered texts, the oldest first."""
        for begin, known, end in self._texts:
            yield Text(self.index.tokens[begin:end], known - begin)

    @property
    def tokens(self) -> int:
        """How many tokens they have in all."""
        return self._held - len(self._texts)

    @property
    def _room(self) -> int:
        return len(self.index.tokens) - self.index.first - 1

    def add(self, text: Text) -> None:
        """Remember a text."""
        kept = text.tokens[-(self.max_tokens - 1) :] if self.max_tokens > 1 else text.tokens[:0]
        known = max(text.known - (len(text.tokens) - len(kept)), 0)
        if len(kept) <= known or self.max_requests == 0:
            return
        self._make_room(len(kept) + 1)
        begin, end = self._next, self._next + len(kept)
        self.index.tokens[begin:end] = kept
        self.index.link(begin + known, end)
        self._texts.append((begin, begin + known, end))
        self._held += len(kept) + 1
        self._next = end + 1

    def _make_room(self, size: int) -> None:
        """So that `size` positions after `_next` are free."""
        while len(self._texts) >= self.max_requests:
            self._forget_oldest()
        last = self.index.first + self._room
        if self._next + size > last and self._room < self.max_tokens:
            needed = 2 * (self._held + size)
            self._rebuild(min(max(needed, self._room), self.max_tokens))
            last = self.index.first + self._room
        if self._next + size > last:
            while self._texts and self._texts[0][0] >= self._next:
                self._forget_oldest()
            self._next = self.index.first
        while self._texts and self._next <= self._texts[0][0] < self._next + size:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        begin, _, end = self._texts.popleft()
        self.index.tokens[begin:end] = NO_TOKEN
        self._held -= end - begin + 1

    def _rebuild(self, room: int) -> None:
        """Write all texts one after the other into a new index."""
        texts, self.index = list(self), SuffixIndex(room, self.index.depth)
        self._texts.clear()
        begin = self.index.first
        linked = np.ones(self._held, bool)  # by position, whether the place after it is
        for text in texts:
            end = begin + len(text.tokens)
            self.index.tokens[begin:end] = text.tokens
            linked[begin - self.index.first :][: text.known] = False
            self._texts.append((begin, begin + text.known, end))
            begin = end + 1
        self.index.link(self.index.first, begin, linked[: begin - self.index.first])
        self._next = begin
