"""Adds the argument `strategy` to `generate()`: the only file that patches transformers.

`model.generate(..., strategy="spec")` becomes a call of the original `generate()` with our decoding loop as
`custom_generate`, so transformers prepares inputs, processors, criteria and cache as for any other strategy.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from ..models.prompt import check_not_empty
from ..models.sharding import check_synced_gpus, sharded
from ..options import OPTION_NAMES, check_cache_implementation
from .method import SpeculativeMethod, check_handed_over, speculative

logger = logging.get_logger(__name__)

_original: Callable[..., Any] | None = None
_overrides: dict[Any, Callable[..., Any]] = {}  # by class, the original of its own `generate()`


def _generate_speculatively(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate(strategy="spec")`: take our arguments out, let transformers prepare the call, decode with our method.

    Args:
        original: the `generate()` that was called, of transformers or of a class that overrides it.
    """
    call = _bind(original, model, *args, **kwargs)
    if call.get("custom_generate") is not None:
        raise ValueError("`strategy='spec'` and `custom_generate` both choose the decoding method: pass one of them")
    check_synced_gpus(call.pop("synced_gpus", None))
    sharded(model, call.get("assistant_model"))  # before an encoder runs
    prompt = call.get("inputs", call.get("input_ids"))
    if isinstance(prompt, Tensor) and call.get("inputs_embeds") is None:
        check_not_empty(prompt)
    # Before `generate()` builds that cache, which may need packages that are not installed.
    configs = (call.get("generation_config"), model.generation_config)
    named = (call.get("cache_implementation"), *(getattr(config, "cache_implementation", None) for config in configs))
    check_cache_implementation(next(filter(None, named), None))

    own = ("assistant_model", "streamer", "tokenizer", "assistant_tokenizer", "speculation_stats", "speculation_trace")
    arguments = {name: call.pop(name, None) for name in own}
    options = _take_options(model, call)
    stop_strings = options.pop("stop_strings")
    if stop_strings is not None:
        if arguments["tokenizer"] is None:
            raise ValueError("`stop_strings` needs the model's tokenizer: pass it to `generate()` as `tokenizer`")
        criteria = call.get("stopping_criteria") or StoppingCriteriaList()
        if not any(type(criterion) is StopStringCriteria for criterion in criteria):
            criteria = StoppingCriteriaList([*criteria, StopStringCriteria(arguments["tokenizer"], stop_strings)])
        call["stopping_criteria"] = criteria
    method = speculative(**arguments, **{name: value for name, value in options.items() if value is not None})
    return _call(original, model, method.of_call(call), call)


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


# Hidden from `generate()`: it would choose its own assisted mode, or ask for the tokenizer that we have taken out.
_HIDDEN = ("stop_strings", "prompt_lookup_num_tokens", "assistant_early_exit")


class _QuietConfig(GenerationConfig):
    """A generation config that ignores the hidden options of the model's generation config."""

    def update(self, defaults_only: bool = False, **kwargs: Any) -> dict[str, Any]:
        return super().update(defaults_only=defaults_only, **{k: v for k, v in kwargs.items() if k not in _HIDDEN})


def _take_options(model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
    """The options of this call by name, with `stop_strings`; the hidden ones are removed from `call`."""
    config = call.get("generation_config")
    options = {name: call.pop(name, None) for name in (*OPTION_NAMES, "stop_strings")}
    for name, value in options.items():
        options[name] = getattr(config, name, None) if value is None else value
    hidden_in_config = False
    for name in _HIDDEN:
        if options[name] is None:
            options[name] = getattr(model.generation_config, name, None)
        hidden_in_config |= any(getattr(c, name, None) is not None for c in (config, model.generation_config))
    if hidden_in_config:
        config = GenerationConfig() if config is None else copy.deepcopy(config)
        config.__class__ = _QuietConfig
        for name in _HIDDEN:
            setattr(config, name, None)
        call["generation_config"] = config
    return options


STRATEGIES: dict[str, Callable[..., Any]] = {"spec": _generate_speculatively}


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
        if strategy is None and isinstance(kwargs.get("custom_generate"), SpeculativeMethod):
            call = _bind(original, self, *args, **kwargs)
            check_handed_over(call)
            return original(self, **{**call, "custom_generate": kwargs["custom_generate"].of_call(call)})
        if strategy is None:
            return original(self, *args, **kwargs)
        if strategy not in STRATEGIES:
            raise ValueError(f"Unknown strategy {strategy!r}; known strategies: {', '.join(map(repr, STRATEGIES))}")
        return STRATEGIES[strategy](original, self, *args, **kwargs)

    return generate


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
