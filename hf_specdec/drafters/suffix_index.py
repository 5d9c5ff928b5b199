"""SuffixIndex: texts in which to find where the end of another text has occurred before, and what followed.

It answers what a suffix tree does, from a few flat arrays. A *place* is the position after a run of tokens. As in LZ77
compressors, places after equal runs are linked, from the latest to earlier ones, for runs of 1, 2, 4, 8 and 16 tokens:

    position    1    2    3    4    5    6    7    8
    token       the  cat  sat  --   the  cat  ran  --        -- separates texts
    runs of 1:  7 -> 3 (after "cat"), 6 -> 2 (after "the")
    runs of 2:  7 -> 3 (after "the cat")

A link leads to a run with the same hash, perhaps one that was overwritten since. So every place that it leads to is
compared with the tokens that are there.
"""

import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

NO_TOKEN = -1  # between texts, and for ids that are not tokens
_NEVER = -2  # equals nothing that is stored
_SIZES = (1, 2, 4, 8, 16)
_WORD = 2**64 - 1
_BASE, _MIX = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # odd
_POWERS = [pow(_BASE, j, 2**64) for j in range(_SIZES[-1])]
_ONE_BY_ONE = 24  # tokens, from which on numpy is faster than Python
VOTERS = 32  # places that are looked at, the latest ones


class Continuation(NamedTuple):
    """What probably comes next.

    Attributes:
        tokens: most probable first token, then the most probable one after it...
        confidence: of each, the probability that it is right if those before it are.
        score: how many of the tokens are expected to be right.
    """

    tokens: list[int]
    confidence: list[float]
    score: float


NOTHING = Continuation([], [], 0.0)


class Found(NamedTuple):
    """Earlier occurrences of the end of a text.

    Attributes:
        places: the positions after them, the latest first.
        sizes: how many tokens before each place are equal.
        after: the tokens that follow each place.
    """

    places: list[int]
    sizes: list[int]
    after: list[list[int]]

    def only(self, chosen: Iterable[bool]) -> "Found":
        """Those that are chosen."""
        kept = [each for each, is_chosen in zip(zip(*self), chosen) if is_chosen]
        return Found(*map(list, zip(*kept))) if kept else NOWHERE


NOWHERE = Found([], [], [])


class Query(NamedTuple):
    """The end of a text, prepared to be looked up in several indexes.

    Attributes:
        tail: `[depth + 1]` int32, its tokens from the last one back; no match goes beyond it.
        ids: the same as Python numbers.
        hashes: of its last 1, 2, 4... tokens.
    """

    tail: np.ndarray
    ids: list[int]
    hashes: list[int]


class SuffixIndex:
    """See the top of this file. Whoever writes texts into it must leave a separator after each.

    Args:
        room: positions for tokens, one of them for the separator after each text.
        depth: the longest run that is compared.

    Attributes:
        tokens: `[positions]` int32. Texts may be written from `first` to `first + room`.
    """

    def __init__(self, room: int, depth: int):
        self.depth = depth
        self.first = depth + 1
        self.tokens = np.full(self.first + room + 1, NO_TOKEN, np.int32)
        self._sizes = [size for size in _SIZES if size <= depth]
        bits = max(room.bit_length(), 4)
        self._shift = 64 - bits
        # By size: the latest place after each hash, and by place the one before; 0 stands for none.
        self._latest = [np.zeros(2**bits, np.int32) for _ in self._sizes]
        self._before = [np.zeros(len(self.tokens), np.int32) for _ in self._sizes]
        self._windows: dict[int, np.ndarray] = {}  # by how many tokens after a place: positions around it
        self._make_views()

    def _make_views(self) -> None:
        """Single values are read faster through these."""
        self._view = self.tokens.data
        self._links = [(latest.data, before.data) for latest, before in zip(self._latest, self._before)]

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("_view", "_links")
        }  # not to be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_views()

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(a.nbytes + b.nbytes for a, b in zip(self._latest, self._before))

    def link(self, begin: int, end: int, linked: np.ndarray | None = None) -> None:
        """Make the places `begin + 1` to `end` known, whose tokens have been written.

        Args:
            linked: `[end - begin]` bool, which of them; by default all.
        """
        if end - begin <= _ONE_BY_ONE and linked is None:
            longest = self._sizes[-1]
            tokens = self.tokens[begin + 1 - longest : end][::-1].tolist()
            for place in range(begin + 1, end + 1):
                tail = tokens[end - place : end - place + longest]
                for (latest, before), mixed in zip(self._links, _hashes(tail, self._sizes)):
                    slot = mixed >> self._shift
                    before[place] = latest[slot]
                    latest[slot] = place
            return
        # Of runs that end at `start`, `start + 1`, ...: the sum of tokens times powers of the base, doubled in length.
        start = begin - self._sizes[-1] + 1
        ids = self.tokens[start:end]
        known, sums, power = ids >= 0, ids.astype(np.uint64), _BASE
        for level, size in enumerate(self._sizes):
            if level:
                half = size // 2
                sums = sums[half:] + np.uint64(power) * sums[:-half]
                known = known[half:] & known[:-half]
                power, start = power * power & _WORD, start + half
            new = slice(begin - start, None)
            chosen = known[new] if linked is None else known[new] & linked
            places = np.arange(begin + 1, end + 1, dtype=np.int32)[chosen]
            slots = (sums[new][chosen] * np.uint64(_MIX)) >> np.uint64(self._shift)
            self._chain(level, places, slots.astype(np.int64))

    def _chain(self, level: int, places: np.ndarray, slots: np.ndarray) -> None:
        """Put ascending `places` before those that their `slots` hold."""
        if not len(places):
            return
        order = np.argsort(slots, kind="stable")
        places, slots = places[order], slots[order]
        before = self._latest[level][slots]
        again = slots[1:] == slots[:-1]
        before[1:][again] = places[:-1][again]
        self._before[level][places] = before
        self._latest[level][slots] = places  # the last one of equal slots stays

    def query(self, end: int) -> Query:
        """The text that ends before position `end`, to be looked up here or in another index of equal depth."""
        tail = self.tokens[end - self.depth - 1 : end][::-1]
        ids = tail.tolist()
        if min(ids) < 0:
            tail = np.where(tail < 0, _NEVER, tail)
        return Query(tail, ids, _hashes(ids[: self._sizes[-1]], self._sizes))

    def find(self, query: Query, count: int, but: int = 0) -> Found:
        """Earlier occurrences of the longest run at the end of a text that has any, and of runs about as long.

        Of the latest `VOTERS` places after equal runs of the largest linked size, those after which the text goes on.

        Args:
            count: how many tokens after each place are wanted.
            but: a place that does not count.
        """
        tokens = self._view
        for level in range(len(query.hashes) - 1, -1, -1):
            latest, before = self._links[level]
            place, size = latest[query.hashes[level] >> self._shift], self._sizes[level]
            last, first = query.ids[0], query.ids[size - 1]
            places: dict[int, None] = {}  # an ordered set
            for _ in range(VOTERS):
                if not place:
                    break
                # Most places with other hashes differ in one of these; the rest is compared below.
                if tokens[place - 1] == last and tokens[place - size] == first and tokens[place] >= 0 and place != but:
                    places[place] = None
                place = before[place]
            if places:
                found = self._around(list(places), query.tail, count)
                if min(found.sizes) >= size:
                    return found
                if max(found.sizes) >= size:
                    return found.only(n >= size for n in found.sizes)
        return NOWHERE

    def _around(self, places: list[int], tail: np.ndarray, count: int) -> Found:
        """What is before these places, compared with the end of a text, and what is after them."""
        depth = self.depth
        if len(places) == 1:  # without what numpy takes for a second axis
            tokens = self.tokens[places[0] - depth - 1 : places[0] + count]
            differs = tokens[depth::-1] != tail
            differs[-1] = True  # beyond the depth
            after = tokens[depth + 1 :].tolist()
            return Found(places, [int(differs.argmax())], [after + [NO_TOKEN] * (count - len(after))])
        if count not in self._windows:
            self._windows[count] = np.arange(-depth - 1, count)
        block = self.tokens.take(np.array(places)[:, None] + self._windows[count], mode="clip")  # it ends separated
        differs = block[:, depth::-1] != tail
        differs[:, -1] = True
        return Found(places, differs.argmax(axis=1).tolist(), block[:, depth + 1 :].tolist())

    def follow(self, found: Found, limits: "Limits", own: range = range(0)) -> Continuation:
        """What follows the longest of the found occurrences, token by token the most frequent.

        A token's probability is its share of the occurrences, to which a part of one is added that says something else:
        1/m after a run of m tokens, as a single occurrence of a short run says little.

        Args:
            own: the positions of the text that is continued. A copy that comes to its end goes on with what was copied.
                Empty where that text is not in this index.
        """
        if not found.places:
            return NOTHING
        size, end = max(found.sizes), own.stop
        count = min(limits.tokens, max(int(limits.factor * size), 1))
        texts = [text for text, n in zip(found.after, found.sizes) if n == size]
        if end:
            places = [place for place, n in zip(found.places, found.sizes) if n == size]
            texts = [
                _copied(text, end - place) if end - count < place < end else text for place, text in zip(places, texts)
            ]
        if texts.count(texts[0]) == len(texts):
            return _agreed(texts[0][:count], len(texts), size, limits)
        tokens: list[int] = []
        confidence: list[float] = []
        alive, score = 1.0, 0.0
        columns = list(zip(*texts))
        for i in range(count):
            said = columns[i]
            token = said[0]
            votes, total = said.count(token), len(said)
            if votes < total or not 0 <= token < limits.vocab_size:
                counts: dict[int, int] = {}
                for other in said:
                    if 0 <= other < limits.vocab_size:
                        counts[other] = counts.get(other, 0) + 1
                if not counts:
                    break
                token = max(counts, key=counts.__getitem__)  # of equals, the one that came last
                votes, total = counts[token], sum(counts.values())
            probability = _probability(votes, total, size + i)
            alive *= probability
            if alive < limits.probability:
                break
            if votes < len(said):
                texts = [text for text, other in zip(texts, said) if other == token]
                columns = list(zip(*texts))
            tokens.append(token)
            confidence.append(probability)
            score += alive
        return Continuation(tokens, confidence, score)


class Limits(NamedTuple):
    """What bounds a continuation.

    Attributes:
        tokens: how many it may have.
        factor: how many it may have for each token of the run that it follows.
        probability: it ends before it is less probable than this.
        vocab_size: it has only ids below this.
    """

    tokens: int
    factor: float
    probability: float
    vocab_size: int


def _probability(votes: int, total: int, size: int) -> float:
    """That of a token which so many of all occurrences of a run of `size` tokens say."""
    return votes / (total + 1 / size)


def _agreed(tokens: list[int], votes: int, size: int, limits: Limits) -> Continuation:
    """What `follow` returns where all occurrences of a run of `size` tokens go on with the same ones."""
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        tokens = tokens[: next(i for i, token in enumerate(tokens) if not 0 <= token < limits.vocab_size)]
    confidence, alive, scores = _unanimous(votes, size, limits.tokens)
    count = len(tokens)
    if alive[count] < limits.probability:
        count = next(i for i, share in enumerate(alive) if share < limits.probability) - 1
    return Continuation(tokens[:count], confidence[:count], scores[count])


@functools.lru_cache(maxsize=4096)
def _unanimous(votes: int, size: int, count: int) -> tuple[list[float], list[float], list[float]]:
    """Of a continuation with so many tokens that all say: each one's probability; then, for 0, 1, 2... tokens, the
    probability that all are right, and the score.
    """
    confidence = [_probability(votes, votes, size + i) for i in range(count)]
    alive = list(itertools.accumulate(confidence, operator.mul, initial=1.0))
    return confidence, alive, [0.0, *itertools.accumulate(alive[1:])]


def _copied(after: list[int], length: int) -> list[int]:
    """The tokens after a place, which are a copy that goes on with itself after so many."""
    copied = after[:length]
    while len(copied) < len(after):
        copied.append(copied[-length])
    return copied


def _hashes(tail: list[int], sizes: list[int]) -> list[int]:
    """Of the last tokens of a text, from the last one back: of so many each, as long as they are tokens."""
    found: list[int] = []
    total, begin = 0, 0
    for size in sizes:
        for token, power in zip(tail[begin:size], _POWERS[begin:size]):
            if token < 0:
                return found
            total += token * power
        found.append(total * _MIX & _WORD)
        begin = size
    return found
