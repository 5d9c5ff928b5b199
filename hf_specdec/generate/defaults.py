"""Defaults for the calls of a model: what an attachment gives to calls that do not say otherwise.

`attached.py` makes and lists them; `strategy.py` asks for those of a model in each call. A model is not touched: it is
listed here by a weak reference.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers.utils import logging

from ..drafters import Drafter
from ..records.stats import SpeculationStats

logger = logging.get_logger(__name__)

# Arguments and options that choose the drafter.
CHOOSERS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class Defaults:
    """Arguments of speculation for the calls of a model.

    Args:
        arguments: by name, those of `speculative()`, as far as they are given.
        count: called once after each `generate()` call that speculated with them.
        record: called after each decoding, with its statistics and those that the caller wants filled too, if any.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        count: Callable[[], None],
        record: Callable[[SpeculationStats, SpeculationStats | None], None],
    ):
        self.arguments = arguments
        self.count = count
        self.record = record
        self._drafting = threading.Lock()

    @contextmanager
    def for_a_call(self) -> Iterator[dict[str, Any]]:
        """The arguments for one call, which may run beside others of the same model.

        A `Drafter` serves one call at a time. Waiting for it could wait for ever, so calls beside that one look up.
        """
        drafter = self.arguments.get("assistant_model")
        if not isinstance(drafter, Drafter):
            yield self.arguments
        elif self._drafting.acquire(blocking=False):
            try:
                yield self.arguments
            finally:
                self._drafting.release()
        else:
            logger.warning_once(
                f"{type(drafter).__name__} serves one call at a time: calls that run beside it draft by prompt look-up."
            )
            yield {name: value for name, value in self.arguments.items() if name != "assistant_model"}


def completed(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with defaults for those that are None.

    A call that chooses a drafter in one way does not also get one that was chosen in another.
    """
    has_chosen = any(given.get(name) is not None and given[name] is not False for name in CHOOSERS)
    missing = {
        name: value
        for name, value in defaults.items()
        if given.get(name) is None and not (has_chosen and name in CHOOSERS)
    }
    return given | missing


_by_model: "WeakKeyDictionary[nn.Module, tuple[Defaults, ...]]" = WeakKeyDictionary()
_lock = threading.Lock()


def newest(model: nn.Module) -> Defaults | None:
    """The defaults that count for a model: those that were added last."""
    with _lock:
        listed = _by_model.get(model)
    return listed[-1] if listed else None


def add(model: nn.Module, defaults: Defaults) -> None:
    """From now on these count for the model; does nothing if they are listed already."""
    with _lock:
        others = _by_model.get(model, ())
        if defaults not in others:
            _by_model[model] = (*others, defaults)


def remove(model: nn.Module, defaults: Defaults) -> None:
    """Calls that begin later do not get these; does nothing if they are not listed."""
    with _lock:
        left = tuple(other for other in _by_model.get(model, ()) if other is not defaults)
        if left:
            _by_model[model] = left
        else:
            _by_model.pop(model, None)


def is_listed(model: nn.Module, defaults: Defaults) -> bool:
    """Whether calls of the model may get these, if no newer ones count."""
    with _lock:
        return defaults in _by_model.get(model, ())
