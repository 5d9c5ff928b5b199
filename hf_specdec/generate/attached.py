"""Attachments: all calls of a model's `generate()` speculate, even if their caller leaves no room for our arguments."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from transformers import GenerationMixin

from ..drafters import Drafter
from ..options import DEFAULTS, OPTION_NAMES, Options
from ..pairs.choice import draft_model
from ..records.stats import SpeculationStats
from . import defaults
from .method import Assistant, check_arguments
from .strategy import is_registered


def attached(target: nn.Module, draft: Assistant | None = None, **options: Any) -> "Attachment":
    """Speculation for code that calls `target.generate()` itself, such as trainers, servers and agents.

        with hf_specdec.attached(target, draft, num_assistant_tokens=4) as attachment:
            trainer.train()  # wherever it calls target.generate(), that speculates
        print(attachment)

    Nothing is changed about the target, and nothing stays when the block ends, however it ends. Calls in all threads
    speculate, also several at once. Arguments of a call, and its generation config, take precedence over `options`;
    `strategy="vanilla"` or a `custom_generate` of its own switch speculation off for one call. Attachments to one model
    nest: the newest counts.

    Args:
        target: a model, or a wrapper around one such as a PeftModel.
        draft: a model, a Hub id or local path, or a `Drafter`. Without one, prompt look-up.
        options: those of `speculative()`. A `speculation_trace` suits one call at a time.

    Returns: an object for `with`, or for its methods `attach()` and `detach()`. Its `stats` are a `SpeculationStats` of
    all calls (without `iterations`, which would grow for as long as a server runs), its `calls` count them, and its
    `repr` says what it did.

    Raises:
        TypeError: if `target` has no `generate()` of transformers, or if an option or `draft` is not one.
        ValueError: for the value of an option.
        RuntimeError: from `attach()`, if hf_specdec is not registered or the target is gone.
    """
    return Attachment(target, draft, options)


def attach(target: nn.Module, draft: Assistant | None = None, **options: Any) -> "Attachment":
    """The same as `attached`, from now on and until `detach()` of what it returns is called."""
    return attached(target, draft, **options).attach()


class Attachment:
    """A draft and options that count for all calls of a model, while it is attached; see `attached`.

    Attributes:
        stats: statistics of all its calls, without `iterations`.
        calls: how many calls of `generate()` it has decoded, or begun to decode.
    """

    def __init__(self, target: nn.Module, draft: Assistant | None, options: dict[str, Any]):
        check_arguments("attached", options)
        given = {name: value for name, value in options.items() if value is not None}
        Options(**DEFAULTS | {name: value for name, value in given.items() if name in OPTION_NAMES})
        if draft is not None and not isinstance(draft, (str, Path, Drafter)):
            draft_model(draft)
        model = generating(target)
        self.stats = SpeculationStats()
        self.calls = 0
        self._lock = threading.Lock()
        self._target = weakref.ref(model)
        self._names = type(model).__name__, _name(draft)
        self._defaults = defaults.Defaults({"assistant_model": draft, **given}, self._count, self._record)

    def attach(self) -> "Attachment":
        """From now on, calls of the target speculate with it; does nothing if they do already."""
        if not is_registered():
            raise RuntimeError(
                "hf_specdec is not registered, so `generate()` asks for no attachment: call hf_specdec.register()"
            )
        model = self._target()
        if model is None:
            raise RuntimeError(
                f"The target ({self._names[0]}) is gone, so nothing can be attached to it: attach to another"
            )
        defaults.add(model, self._defaults)
        return self

    def detach(self) -> None:
        """From now on they do not; does nothing if they did not. Calls in progress go on as they began."""
        model = self._target()
        if model is not None:
            defaults.remove(model, self._defaults)

    def __enter__(self) -> "Attachment":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        model = self._target()
        state = "attached" if model is not None and defaults.is_listed(model, self._defaults) else "detached"
        with self._lock:
            calls, stats = self.calls, self.stats
            return (
                f"Attachment(target={self._names[0]}, draft={self._names[1]}, {state}: {calls} calls, "
                f"{stats.committed_tokens} committed tokens, {stats.target_forwards} target forwards, "
                f"acceptance rate α = {stats.acceptance_rate:.0%})"
            )

    def _count(self) -> None:
        with self._lock:
            self.calls += 1

    def _record(self, stats: SpeculationStats, own: SpeculationStats | None) -> None:
        """Add the statistics of one decoding to all, and to those that its caller asked for."""
        with self._lock:
            self.stats.merge(stats)
            self.stats.iterations.clear()
            if own is not None:
                own.merge(stats)


def generating(target: Any) -> nn.Module:
    """The model whose `generate()` of transformers runs: the target itself, or the one inside a wrapper.

    Raises:
        TypeError: if there is none, or more than one.
    """
    if not isinstance(target, GenerationMixin) and hasattr(target, "get_base_model"):
        target = target.get_base_model()
    found = list(dict.fromkeys(_outermost(target))) if isinstance(target, nn.Module) else []
    if len(found) == 1:
        return found[0]
    name = type(target).__name__
    if not found:
        raise TypeError(
            f"`target` must be a model with transformers' `generate()`, or a wrapper around one, got {name}"
        )
    inside = ", ".join(type(model).__name__ for model in found)
    raise TypeError(
        f"`target` ({name}) holds several models with transformers' `generate()` ({inside}): pass one of them"
    )


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The models in a module that generate, except those inside others of them."""
    if isinstance(module, GenerationMixin):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _name(draft: Assistant | None) -> str:
    if draft is None:
        return "prompt look-up"
    return repr(str(draft)) if isinstance(draft, (str, Path)) else type(draft).__name__
