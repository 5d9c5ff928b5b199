"""Suffix decoding (Oliaro et al. 2025): propose what followed the end of the text where it occurred before, in the text
itself, in other rows, and in the texts of earlier calls. It needs no model, and reads the host's copy of the context.

It suits agents, editing, repeated prompts and several samples of one prompt.
"""

import json
import math
import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save as serialized
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..device import CPU
from ..sampling.context import Context
from .base import Draft, Drafter, DraftRequest, GoOn
from .suffix_index import Continuation, Limits
from .suffix_texts import CallTexts, Memory, Text, only_tokens

_FORMAT = "hf_specdec suffix drafter 1"
_MOST_IDS = 2**31  # ids are below this
_MOST_DEPTH = 1024


class SuffixDrafter(Drafter):
    """Looks up the longest end of a row's text that has occurred before, and proposes what followed most often.

    It searches the row, the other rows of the call, and the texts of earlier calls of this object, for any target. Of
    what it finds there, it takes what is expected to have most tokens accepted (the sum of their probabilities).

    Args:
        corpus: texts to begin with: lists of token ids, or strings, with a `tokenizer`.
        tokenizer: the target's.
        depth: the longest run of tokens that is compared.
        factor: a draft has at most so many tokens for each token of the run that it follows.
        min_probability: a draft ends before it is less probable than this.
        max_tokens: how many tokens of earlier texts are kept, and one more for each text. Each takes 45 to 65 bytes.
        max_requests: how many texts are kept. The oldest are forgotten first.

    Raises:
        TypeError, ValueError: for arguments that are not like this.
    """

    in_vocabulary = True
    shows_confidence = True

    def __init__(
        self,
        corpus: Iterable[str | Sequence[int]] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        depth: int = 24,
        factor: float = 4.0,
        min_probability: float = 0.1,
        max_tokens: int = 1_000_000,
        max_requests: int = 10_000,
    ):
        for name, value, least in (
            ("depth", depth, 1),
            ("max_tokens", max_tokens, 1),
            ("max_requests", max_requests, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if depth > _MOST_DEPTH:
            raise ValueError(f"`depth` must be at most {_MOST_DEPTH}, got {depth}: longer runs tell no more")
        for name, number in (("factor", factor), ("min_probability", min_probability)):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                raise TypeError(f"`{name}` must be a number, got {number!r} of type {type(number).__name__}")
        if not 0 < factor < math.inf:
            raise ValueError(f"`factor` must be above 0 and finite, got {factor!r}")
        if not 0 <= min_probability <= 1:
            raise ValueError(f"`min_probability` is a probability between 0 and 1, got {min_probability!r}")
        if corpus is None and tokenizer is not None:
            raise ValueError("`tokenizer` is for the texts of `corpus`, which was not given: pass both, or neither")
        self.depth, self.factor, self.min_probability = int(depth), float(factor), float(min_probability)
        self._memory = Memory(self.depth, int(max_tokens), int(max_requests))
        self._texts: CallTexts | None = None
        self._thread = 0
        for ids in _encoded(corpus, tokenizer):
            self._memory.add(Text(ids))

    @property
    def remembered_texts(self) -> int:
        """How many texts of earlier calls it knows, those of the corpus included."""
        return len(self._memory)

    @property
    def remembered_tokens(self) -> int:
        """How many tokens they have in all."""
        return self._memory.tokens

    def __repr__(self) -> str:
        return f"SuffixDrafter({self.remembered_texts} texts, {self.remembered_tokens} tokens)"

    def start(self, call: DraftRequest, context: Context) -> None:
        if self._texts is not None and self._thread != threading.get_ident():
            raise RuntimeError(
                "A SuffixDrafter serves one `generate()` call at a time, and another thread is in one: give each "
                "thread its own drafter"
            )
        self._thread = threading.get_ident()
        self._context, self._go_on, self._vocab_size = context, call.go_on, call.vocab_size
        encoded = None if call.encoder is None else call.encoder.token_ids()
        rows = [] if encoded is None else [only_tokens(ids, call.vocab_size) for ids in encoded.to(CPU)]
        self._texts = CallTexts(context, self.depth, call.vocab_size, rows)

    def restart(self, context: Context, row: int) -> None:
        """What the row said is remembered, as after a call."""
        assert self._texts is not None, "start() comes first"
        for text in self._texts.to_remember([row]):
            self._memory.add(text)
        self._texts.restart(context, row)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        self._update(context)
        limits = Limits(max_tokens, self.factor, self.min_probability, self._vocab_size)
        found = [self._best(row, limits) for row in context.rows]
        draft = Draft(
            _rectangle([each.tokens for each in found]).to(context.tokens.device, non_blocking=True),
            lengths=[len(each.tokens) for each in found],
            confidence=[each.confidence for each in found],
        )
        return draft if self._go_on is None else as_far_as_it_pays(draft, self._go_on)

    def _best(self, row: int, limits: Limits) -> Continuation:
        """The best of what the row itself, all rows of the call, and earlier calls say."""
        texts = self._texts
        assert texts is not None
        own = texts.own(row)
        query = texts.index.query(own.stop)
        found = texts.index.find(query, limits.tokens, but=own.stop)
        best = texts.index.follow(found, limits, own)
        if texts.several and found.places:
            region = texts.everything_of(row)
            mine = found.only(place in region for place in found.places)
            if 0 < len(mine.places) < len(found.places):
                best = _better(texts.index.follow(mine, limits, own), best)
        if len(self._memory):
            index = self._memory.index
            best = _better(best, index.follow(index.find(query, limits.tokens), limits))
        return best

    def commit(self, context: Context) -> None:
        self._update(context)

    def end(self) -> None:
        """Remember the texts of the call, as far as they were committed."""
        texts, self._texts = self._texts, None
        if texts is None:
            return
        texts.update(self._context)
        for text in texts.to_remember():
            self._memory.add(text)
        del self._context

    def _update(self, context: Context) -> None:
        assert self._texts is not None, "start() comes first"
        self._texts.update(context)

    def save(self, path: str | Path) -> None:
        """Write settings and remembered texts into a file, which `load` reads. An existing file is replaced."""
        texts = list(self._memory)
        settings = {
            "depth": self.depth,
            "factor": self.factor,
            "min_probability": self.min_probability,
            "max_tokens": self._memory.max_tokens,
            "max_requests": self._memory.max_requests,
        }
        arrays = {
            "tokens": np.concatenate([text.tokens for text in texts]) if texts else np.empty(0, np.int32),
            "lengths": np.array([len(text.tokens) for text in texts], np.int64),
            "known": np.array([text.known for text in texts], np.int64),
        }
        content = serialized(arrays, {"format": _FORMAT, "settings": json.dumps(settings)})
        Path(path).write_bytes(content)

    @classmethod
    def load(cls, path: str | Path) -> "SuffixDrafter":
        """Read a drafter that `save` has written.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is another kind of file, or damaged.
        """
        with open(path, "rb"):  # an error that names the file, if it cannot be read
            pass
        try:
            with safetensors.safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r} instead of {_FORMAT!r}")
                tokens, lengths, known = (file.get_tensor(name) for name in ("tokens", "lengths", "known"))
            if not (lengths.shape == known.shape and lengths.sum() == len(tokens) and (known <= lengths).all()):
                raise ValueError("its lengths do not fit its tokens")
            drafter = cls(**json.loads(metadata["settings"]))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file that SuffixDrafter.save() has written: {error}") from error
        ends = [0, *lengths.cumsum().tolist()]
        for (begin, end), first in zip(pairwise(ends), known.tolist()):
            drafter._memory.add(Text(tokens[begin:end].astype(np.int32), first))
        return drafter


def score(confidence: list[float]) -> float:
    """How many tokens of a draft are expected to be accepted, given each one's probability after those before it."""
    alive, total = 1.0, 0.0
    for probability in confidence:
        alive *= probability
        total += alive
    return total


def as_far_as_it_pays(draft: Draft, go_on: GoOn) -> Draft:
    """A draft with `confidence` that was made at once, cut where the schedule would have stopped drafting."""
    longest, confidence = max(draft.row_lengths), draft.confidence
    assert confidence is not None
    for n in range(1, longest):
        if not go_on([row[n - 1] if n <= len(row) else 0.0 for row in confidence]):
            return draft.cut([min(length, n) for length in draft.row_lengths])
    return draft


def _better(one: Continuation, other: Continuation) -> Continuation:
    return other if other.score > one.score else one


def _rectangle(rows: list[list[int]]) -> Tensor:
    """`[rows, longest]` int64, filled with 0."""
    rectangle = np.zeros((len(rows), max(map(len, rows))), np.int64)  # torch.tensor() takes several times as long
    for filled, row in zip(rectangle, rows):
        filled[: len(row)] = row
    return torch.from_numpy(rectangle)


def _encoded(corpus: Any, tokenizer: PreTrainedTokenizerBase | None) -> Iterable[np.ndarray]:
    """The texts of a corpus as ids; raises errors as `SuffixDrafter` says."""
    if corpus is None:
        return
    if isinstance(corpus, (str, bytes, dict)) or not isinstance(corpus, Iterable):
        raise TypeError(
            f"`corpus` must be an iterable of strings or of lists of token ids, got {type(corpus).__name__}: "
            "pass [text] for a single text"
        )
    for number, text in enumerate(corpus):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(
                    f"`corpus` has a string at index {number}, which takes a tokenizer to read: pass the target's as "
                    "`tokenizer`, or lists of token ids"
                )
            text = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield _ids(text, number)


def _ids(text: Any, number: int) -> np.ndarray:
    """One text of a corpus as `[tokens]` int32."""
    where = f"`corpus` must hold strings or lists of token ids, got at index {number}"
    if isinstance(text, Tensor):
        text = text.to(CPU).numpy()
    if not isinstance(text, (list, tuple, np.ndarray)):
        raise TypeError(f"{where} a {type(text).__name__}")
    if isinstance(text, np.ndarray) and text.ndim != 1:
        raise ValueError(f"{where} an array of shape {text.shape}: expected one axis")
    wrong = next((i for i in text if isinstance(i, bool) or not isinstance(i, Integral)), None)
    if wrong is not None:
        raise TypeError(f"{where} {wrong!r} of type {type(wrong).__name__} among the ids: expected ints")
    ids = np.array(text, np.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < _MOST_IDS:
        raise ValueError(f"{where} ids from {ids.min()} to {ids.max()}: expected ids from 0 to {_MOST_IDS - 1}")
    return ids.astype(np.int32)
