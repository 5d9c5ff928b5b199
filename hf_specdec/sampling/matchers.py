"""Grammar matchers as row processors, told apart by their methods: those of xgrammar, llguidance and outlines_core.

No such library is imported here. `row_processor` finds the matchers in their own logits processors; `MatcherProcessor`
takes matchers of one's own.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .row_processors import METHODS, RowProcessor

# Where the code of a logits processor may come from that does nothing but show each row what its matcher allows.
_PACKAGES = ("xgrammar", "outlines")


class MatcherProcessor(RowProcessor):
    """A logits processor over one grammar matcher per row, for `generate()` with or without us.

        compiled = xgrammar.GrammarCompiler(info).compile_json_schema(schema)
        MatcherProcessor(lambda row: xgrammar.GrammarMatcher(compiled), vocab_size=info.vocab_size)
        MatcherProcessor(lambda row: llguidance.LLMatcher(tokenizer, grammar), vocab_size=tokenizer.vocab_size)

    Args:
        make_matcher: makes the matcher of a row of the batch, at its beginning: an object with the methods of
            xgrammar's `GrammarMatcher`, llguidance's `LLMatcher`, or outlines_core's `Guide`.
        vocab_size: token ids that the matchers know.

    Raises:
        TypeError: when a call begins, if a matcher has other methods.
    """

    def __init__(self, make_matcher: Callable[[int], Any], vocab_size: int):
        self._make_matcher = make_matcher
        self._vocab_size = vocab_size
        self._rows: list[_Matcher] = []

    @property
    def allows_beyond(self) -> bool:  # type: ignore[override]
        return any(row.allows_beyond for row in self._rows)

    def __deepcopy__(self, memo: Any) -> "MatcherProcessor":
        """What makes the matchers is shared; they themselves, if there are any, are not part of the copy."""
        made = copy.copy(self)
        made._rows, made._seen = [], None
        return made

    def begin(self, prompts: Tensor) -> None:
        self._rows = [_wrap(self._make_matcher(row), self._vocab_size) for row in range(len(prompts))]

    def accept(self, row: int, token: int) -> None:
        self._rows[row].accept(token)

    def rollback(self, row: int, count: int) -> None:
        self._rows[row].rollback(count)

    def mask(self, row: int) -> Tensor | None:
        return self._rows[row].mask()


class _Matcher(ABC):
    """A matcher of some library, used as that library's own logits processors use it."""

    needs: tuple[str, ...]  # its methods
    allows_beyond = False

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher = matcher
        self.bits = torch.full((1, -(-vocab_size // 32)), -1, dtype=torch.int32)
        self.accepted: list[bool] = []  # by token, whether the matcher was given it

    def accept(self, token: int) -> None:
        takes = self.takes(token)
        if takes and not self.advance(token):
            raise ValueError(f"{type(self.matcher).__name__} does not accept token {token}, which was committed")
        self.accepted.append(takes)

    def rollback(self, count: int) -> None:
        taken = sum(self.accepted[len(self.accepted) - count :])
        if taken:
            self.go_back(taken)
        del self.accepted[len(self.accepted) - count :]

    def mask(self) -> Tensor:
        self.fill()
        return _unpacked(self.bits[0])

    @abstractmethod
    def takes(self, token: int) -> bool:
        """Whether the matcher is given a token, or has ended before."""

    @abstractmethod
    def advance(self, token: int) -> bool: ...

    @abstractmethod
    def go_back(self, count: int) -> None: ...

    @abstractmethod
    def fill(self) -> None:
        """Put what is allowed now into `bits`."""


class _XGrammar(_Matcher):
    """After the grammar's end, the last mask stays."""

    needs = ("accept_token", "rollback", "fill_next_token_bitmask", "is_terminated")
    allows_beyond = True

    def __init__(self, matcher: Any, vocab_size: int):
        super().__init__(matcher, vocab_size)
        self._before: dict[int, Tensor] = {}  # by number of tokens that the matcher has been given

    def takes(self, token: int) -> bool:
        return not self.matcher.is_terminated()

    def advance(self, token: int) -> bool:
        return bool(self.matcher.accept_token(token))

    def go_back(self, count: int) -> None:
        self.matcher.rollback(count)

    def fill(self) -> None:
        given = sum(self.accepted)
        if not self.matcher.is_terminated():
            self.matcher.fill_next_token_bitmask(self.bits, 0)
            self._before = {number: bits for number, bits in self._before.items() if number >= given - 64}
            self._before[given] = self.bits.clone()
        elif given - 1 in self._before:
            self.bits = self._before[given - 1].clone()


class _LLGuidance(_Matcher):
    needs = ("consume_token", "rollback", "compute_bitmask", "is_stopped")

    def takes(self, token: int) -> bool:
        return True

    def advance(self, token: int) -> bool:
        return bool(self.matcher.consume_token(token))

    def go_back(self, count: int) -> None:
        self.matcher.rollback(count)

    def fill(self) -> None:
        self.bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.int32)[None]


class _Guide(_Matcher):
    needs = ("advance", "rollback_state", "write_mask_into", "is_finished", "accepts_tokens")

    def takes(self, token: int) -> bool:
        return not self.matcher.is_finished() or bool(self.matcher.accepts_tokens([token]))

    def advance(self, token: int) -> bool:
        self.matcher.advance(token_id=token, return_tokens=False)
        return True

    def go_back(self, count: int) -> None:
        self.matcher.rollback_state(count)

    def fill(self) -> None:
        self.matcher.write_mask_into(self.bits.data_ptr(), self.bits.numel(), self.bits.element_size())


_KINDS: tuple[type[_Matcher], ...] = (_XGrammar, _LLGuidance, _Guide)


def _kind(matcher: Any) -> type[_Matcher] | None:
    return next((kind for kind in _KINDS if all(callable(getattr(matcher, n, None)) for n in kind.needs)), None)


def _wrap(matcher: Any, vocab_size: int) -> _Matcher:
    kind = _kind(matcher)
    if kind is None:
        sets = "; ".join(", ".join(kind.needs) for kind in _KINDS)
        raise TypeError(f"Expected a matcher with one of these sets of methods: {sets}. Got {type(matcher).__name__}")
    return kind(matcher, vocab_size)


def _unpacked(words: Tensor) -> Tensor:
    """`[32 n]` bool from `[n]` int32, lowest bit first."""
    return ((words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()


def could_be_by_row(processor: Any) -> bool:
    """Whether `row_processor` may find something; asks nothing of the processor."""
    if getattr(processor, "is_pure", None) is False:
        return False
    if all(callable(getattr(processor, name, None)) for name in METHODS):
        return True
    code = [getattr(type(processor), name, None) for name in ("__call__", "process_logits")]
    return not any(function is not None and function.__module__.split(".")[0] not in _PACKAGES for function in code)


def row_processor(processor: Any, prompts: Tensor, vocab_size: int) -> Any | None:
    """An object with the methods of `RowProcessor` that does what a logits processor does; `None` if none is known.

    Args:
        processor: has these methods itself, or keeps one matcher per row, and its code is that of a grammar library.
            It is not changed.
        prompts: `[batch, columns]` on the CPU.
        vocab_size: of the scores.
    """
    if not could_be_by_row(processor):
        return None
    if all(callable(getattr(processor, name, None)) for name in METHODS):
        return processor
    begun = copy.copy(processor)
    if callable(set_up := getattr(begun, "_setup", None)):
        sizes = {"batch_size": len(prompts), "vocab_size": vocab_size}
        set_up(**{name: sizes[name] for name in inspect.signature(set_up).parameters if name in sizes})
    else:
        begun(prompts, torch.zeros(len(prompts), vocab_size))
    for name, found in vars(begun).items():
        is_new = found is not getattr(processor, name, None)
        if is_new and isinstance(found, list) and len(found) == len(prompts) and all(map(_kind, found)):
            known = getattr(processor, "full_vocab_size", vocab_size)
            return MatcherProcessor(found.__getitem__, known)
    return None
