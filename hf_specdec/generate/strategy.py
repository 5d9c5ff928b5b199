"""Adds the argument `strategy` to `generate()`: the only file that patches transformers.

`model.generate(..., strategy="spec")` becomes a call of the original `generate()` with our decoding loop as
`custom_generate`, so transformers prepares inputs, processors, criteria and cache as for any other strategy.

The strategy of a call is, in this order: the argument, that of the call's generation config, "spec" if an attachment
counts for the model (`attached.py`), that of the model's generation config. All but the first give way to a
`custom_generate`.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from ..models.prompt import check_not_empty
from ..models.sharding import gathered
from ..options import OPTION_NAMES, check_cache_implementation
from .defaults import Defaults, completed, newest
from .method import HandOver, SpeculativeMethod, check_handed_over, speculative

logger = logging.get_logger(__name__)

_original: Callable[..., Any] | None = None
_overrides: dict[Any, Callable[..., Any]] = {}  # by class, the original of its own `generate()`


class _Thread(threading.local):
    """Attributes:
    is_settled: the strategy of the call in progress is; calls of `generate()` inside of it do not choose again.
    """

    is_settled = False


_thread = _Thread()


def _generate_speculatively(
    original: Callable[..., Any], model: PreTrainedModel, defaults: Defaults | None, *args: Any, **kwargs: Any
) -> Any:
    """`generate(strategy="spec")`: take our arguments out, let transformers prepare the call, decode with our method.

    Args:
        original: the `generate()` that was called, of transformers or of a class that overrides it.
        defaults: for arguments that the call does not give.
    """
    call = _bind(original, model, *args, **kwargs)
    if defaults is None:
        return _call(original, model, _method(model, call), call)
    with defaults.for_a_call() as missing:
        method = _method(model, call, missing).recorded_by(defaults.record)
        try:
            return _call(original, model, method, call)
        finally:
            if method.was_called:
                defaults.count()


def _hand_over(
    original: Callable[..., Any], model: PreTrainedModel, defaults: Defaults | None, *args: Any, **kwargs: Any
) -> Any:
    """Prepare a call as for strategy="spec", and hand it over instead of decoding it."""
    call = _bind(original, model, *args, **kwargs)
    take = call.pop("custom_generate").take
    missing = None if defaults is None else defaults.arguments
    return _call(original, model, _method(model, call, missing).handed_to(take), call)


def _method(model: PreTrainedModel, call: dict[str, Any], missing: dict[str, Any] | None = None) -> SpeculativeMethod:
    """The decoding method for a call; our arguments are taken out of `call`, and checked as far as they can be now.

    Args:
        missing: defaults for arguments that the call does not give; `None` if there are none.
    """
    own = _take_own(model, call, missing)
    gathered(model, own["assistant_model"], call.get("synced_gpus"))  # its errors come before an encoder runs
    prompt = call.get("inputs", call.get("input_ids"))
    if isinstance(prompt, Tensor) and call.get("inputs_embeds") is None:
        check_not_empty(prompt)
    # Before `generate()` builds that cache, which may need packages that are not installed.
    configs = (call.get("generation_config"), model.generation_config)
    kinds = (call.get("cache_implementation"), *(getattr(config, "cache_implementation", None) for config in configs))
    check_cache_implementation(next(filter(None, kinds), None))
    _find_stop_strings(own.pop("stop_strings"), own["tokenizer"], call)
    return speculative(**{name: value for name, value in own.items() if value is not None}).of_call(call)


def _generate_plainly(
    original: Callable[..., Any], model: PreTrainedModel, defaults: Defaults | None, *args: Any, **kwargs: Any
) -> Any:
    """`generate(strategy="vanilla")`: whatever a generation config or an attachment says, as without hf_specdec."""
    return original(model, *args, **kwargs)


def _call(original: Callable[..., Any], model: PreTrainedModel, method: SpeculativeMethod, call: dict[str, Any]) -> Any:
    """Call `generate()` with our decoding method, and check that it was called.

    Raises:
        ValueError: if a `generate()` of the model's own has no use for a decoding method.
    """
    own = f"strategy='spec' cannot be used with {type(model).__name__}: its own `generate()`"
    try:
        result = original(model, custom_generate=method, **call)
    except ValueError as error:
        if method.was_called or "custom_generate" not in str(error):
            raise
        raise ValueError(f"{own} does not accept a decoding method (`custom_generate`). Drop the strategy") from error
    if not method.was_called:
        raise ValueError(f"{own} does not decode token by token, so there is nothing to draft. Drop the strategy")
    return result


def _bind(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, without `self`."""
    signature = inspect.signature(original)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        signature = inspect.signature(_original or GenerationMixin.generate)  # such an override passes them on to it
    arguments = dict(list(signature.bind(*args, **kwargs).arguments.items())[1:])
    more = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return arguments | arguments.pop(more[0], {}) if more else arguments


# Taken out of a call and its config. Transformers copies configs with all that is in them, and lets none hold a draft.
_ARGUMENTS = ("assistant_model", "tokenizer", "assistant_tokenizer", "speculation_stats", "speculation_trace")
# Hidden from `generate()`: it would choose its own assisted mode, or ask for the tokenizer that we have taken out.
_HIDDEN = ("stop_strings", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class _QuietConfig(GenerationConfig):
    """A generation config that ignores what is taken out or hidden, if the model's generation config has it."""

    def update(self, defaults_only: bool = False, **kwargs: Any) -> dict[str, Any]:
        left = {name: value for name, value in kwargs.items() if name not in _ARGUMENTS and name not in _HIDDEN}
        return super().update(defaults_only=defaults_only, **left)


def _take_own(model: PreTrainedModel, call: dict[str, Any], missing: dict[str, Any] | None) -> dict[str, Any]:
    """Our arguments and options of this call by name, with `stop_strings`; they are removed from `call`.

    Args:
        missing: values for those that neither the call nor its config gives; the model's config then chooses no draft.
    """
    config = call.get("generation_config")
    own = {name: call.pop(name, None) for name in ("streamer", *_ARGUMENTS, *OPTION_NAMES, "stop_strings")}
    for name in own.keys() - {"streamer"}:  # transformers lets no config hold one
        if own[name] is None:
            own[name] = getattr(config, name, None)
    named = _draft_in_config(model)
    own = completed(own, {"assistant_model": named} if missing is None else missing)
    for name in _HIDDEN:
        if own[name] is None:
            own[name] = getattr(model.generation_config, name, None)
    configs = (config, model.generation_config)
    if any(getattr(c, name, None) is not None for c in configs for name in (*_ARGUMENTS, *_HIDDEN)):
        config = GenerationConfig() if config is None else copy.copy(config)
        for name in _ARGUMENTS:
            vars(config).pop(name, None)
        config = copy.deepcopy(config)
        config.__class__ = _QuietConfig
        for name in _HIDDEN:
            setattr(config, name, None)
        call["generation_config"] = config
    return own


def _draft_in_config(model: PreTrainedModel) -> str | Path | None:
    """The name of a draft in the model's own generation config.

    Raises:
        ValueError: if one of our arguments in there is an object.
    """
    for name in _ARGUMENTS:
        value = getattr(model.generation_config, name, None)
        if value is not None and not (name == "assistant_model" and isinstance(value, (str, Path))):
            raise ValueError(
                f"`{name}` in the model's own generation config is a {type(value).__name__}, which transformers would "
                "copy in every call: pass it to `generate()`, or in the generation config of the call, or use "
                "`hf_specdec.attached`. There, only an `assistant_model` that is a Hub id or path is possible"
            )
    return getattr(model.generation_config, "assistant_model", None)


def _find_stop_strings(stop_strings: Any, tokenizer: Any, call: dict[str, Any]) -> None:
    """Add the criterion for stop strings, which need the tokenizer that we have taken out."""
    if stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError("`stop_strings` needs the model's tokenizer: pass it to `generate()` as `tokenizer`")
    criteria = call.get("stopping_criteria") or StoppingCriteriaList()
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])
    call["stopping_criteria"] = criteria


# Called with the `generate()` that was called, the model, the defaults that count for it, and the arguments.
STRATEGIES: dict[str, Callable[..., Any]] = {"spec": _generate_speculatively, "vanilla": _generate_plainly}


def is_registered() -> bool:
    """Whether `generate()` knows strategies."""
    return _original is not None


def register() -> None:
    """Add the argument `strategy` to `generate()` of every model; a second call changes nothing."""
    global _original
    current = GenerationMixin.generate
    if _original is not None and getattr(current, "__wrapped__", None) is _original:
        return
    if current.__module__ != GenerationMixin.__module__:
        logger.info(f"hf_specdec wraps a `generate()` that {current.__module__} has replaced before")
    _original = current
    GenerationMixin.generate = _with_strategy(current)
    _wrap_overrides()


def _with_strategy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, strategy: str | None = None, **kwargs: Any) -> Any:
        call, defaults, place = _named(original, self, *args, **kwargs), newest(self), ""
        custom = call.get("custom_generate")
        if strategy is None and isinstance(custom, SpeculativeMethod):
            call = _bind(original, self, *args, **kwargs)
            check_handed_over(call)
            with _settled(original is not _original):
                return original(self, **{**call, "custom_generate": custom.of_call(call)})
        if isinstance(custom, HandOver):
            with _settled(original is not _original):
                return _hand_over(original, self, defaults, *args, **kwargs)
        if strategy is None and custom is not None:
            with _settled(True):
                return original(self, *args, **kwargs)
        if strategy is None and not _thread.is_settled:
            strategy, place = _chosen(self, call.get("generation_config"), defaults)
        if strategy is None:
            return original(self, *args, **kwargs)
        if strategy not in STRATEGIES:
            known = ", ".join(map(repr, STRATEGIES))
            raise ValueError(f"Unknown strategy {strategy!r}{place}; known strategies: {known}")
        if custom is not None:
            raise ValueError(
                f"`strategy={strategy!r}` and `custom_generate` both choose the decoding method: pass one of them"
            )
        # Within our loop, criteria and streamers may call `generate()` for purposes of their own.
        with _settled(strategy != "spec" or original is not _original):
            return STRATEGIES[strategy](original, self, defaults, *args, **kwargs)

    return generate


@contextmanager
def _settled(is_settled: bool) -> Iterator[None]:
    """Inside, calls of `generate()` in this thread that name no strategy are plain if `is_settled`.

    A class that overrides `generate()` calls the one that it overrides, perhaps for a model inside. The strategy was
    chosen before; if it is ours, our decoding method is among the arguments.
    """
    before, _thread.is_settled = _thread.is_settled, is_settled
    try:
        yield
    finally:
        _thread.is_settled = before


def _named(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name. If some do not fit, only the keyword arguments: `generate()` will complain."""
    try:
        return _bind(original, model, *args, **kwargs) if args else kwargs
    except TypeError:
        return kwargs


def _chosen(model: PreTrainedModel, config: Any, defaults: Defaults | None) -> tuple[str | None, str]:
    """The strategy of a call that does not name one, and where it was found, for messages.

    Args:
        config: the call's generation config, or None.
    """
    # A draft of transformers' own assisted decoding gets the config of the target.
    if getattr(config, "is_assistant", None):
        return None, ""
    if getattr(config, "strategy", None) is not None:
        return config.strategy, " in the generation config of the call"
    if defaults is not None:
        return "spec", ""
    return getattr(getattr(model, "generation_config", None), "strategy", None), " in the model's generation config"


def _wrap_overrides() -> None:
    """Add `strategy` to classes that have their own `generate()` too, including future ones.

    These must not see our arguments, since they may act on them: Whisper's suppresses other tokens if there is an
    `assistant_model`.
    """
    mixin: Any = GenerationMixin
    mixin.__init_subclass__ = classmethod(_wrap_new_override)
    waiting: list[Any] = [mixin]
    while waiting:
        new = waiting.pop().__subclasses__()
        for cls in new:
            _wrap_override(cls)
        waiting += new


def _wrap_override(cls: Any) -> None:
    if "generate" in vars(cls) and cls not in _overrides:
        _overrides[cls] = cls.generate
        cls.generate = _with_strategy(cls.generate)


def _wrap_new_override(cls: Any, /, **kwargs: Any) -> None:
    super(GenerationMixin, cls).__init_subclass__(**kwargs)
    _wrap_override(cls)


def _unwrap_overrides() -> None:
    mixin: Any = GenerationMixin
    if "__init_subclass__" in vars(mixin):
        del mixin.__init_subclass__
    for cls, generate in _overrides.items():
        if getattr(cls.generate, "__wrapped__", None) is generate:
            cls.generate = generate
    _overrides.clear()


def unregister() -> None:
    """Restore the original `generate()`; does nothing if that is done already."""
    global _original
    if _original is None:
        return
    if getattr(GenerationMixin.generate, "__wrapped__", None) is not _original:
        raise RuntimeError(
            f"`generate()` was replaced again by {GenerationMixin.generate.__module__} after hf_specdec was "
            "registered: undo that first"
        )
    GenerationMixin.generate = _original
    _original = None
    _unwrap_overrides()
