"""The options of speculative decoding: where each value comes from, and which values raise an error.

The names are those of transformers' generation config. A value given to `generate()` beats the target's generation
config, which beats the draft model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

# Values of options that are set nowhere.
DEFAULTS: dict[str, Any] = {
    "num_assistant_tokens": None,  # the schedule's own choice
    "num_assistant_tokens_schedule": None,  # "constant" if γ is given, else "optimal"
    "assistant_confidence_threshold": 0.0,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": None,
    "use_mtp": False,
    "speculation_acceptance": "token",
    "speculation_seed": None,  # drawn from torch's generator
    "speculation_compile": False,
    "speculation_pack_weights": None,  # if it pays
}
OPTION_NAMES = tuple(DEFAULTS)
_ABOUT_THE_TARGET = ("assistant_early_exit", "use_mtp")
ACCEPTANCE_RULES = ("token", "block", "coupled")  # values of `speculation_acceptance`
COMPILABLE = ("draft", "target", "attention")  # names that `speculation_compile` accepts
# `cache_implementation` for a cache of fixed size; all but the first are deprecated names in transformers.
STATIC_KINDS = ("static", "sliding_window", "hybrid", "hybrid_chunked")


@dataclass(frozen=True)
class Options:
    """The resolved options; attributes have the names of the generation config."""

    num_assistant_tokens: int | None
    num_assistant_tokens_schedule: str
    assistant_confidence_threshold: float
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    assistant_early_exit: int | None
    use_mtp: bool
    speculation_acceptance: str
    speculation_seed: int | Sequence[int] | None
    speculation_compile: bool | str
    speculation_pack_weights: bool | None

    def __post_init__(self) -> None:
        for name in ("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"):
            value = getattr(self, name)
            if value is None and name != "max_matching_ngram_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        threshold = self.assistant_confidence_threshold
        if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
            kind = type(threshold).__name__
            raise TypeError(f"`assistant_confidence_threshold` must be a number, got {threshold!r} of type {kind}")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"`assistant_confidence_threshold` is a probability between 0 and 1, got {threshold!r}")
        self._check_acceptance()
        packs: Any = self.speculation_pack_weights
        compiles: Any = self.speculation_compile
        if not isinstance(self.use_mtp, bool):
            raise TypeError(f"`use_mtp` must be a bool, got {self.use_mtp!r} of type {type(self.use_mtp).__name__}")
        if packs is not None and not isinstance(packs, bool):
            raise TypeError(f"`speculation_pack_weights` must be a bool, got {packs!r} of type {type(packs).__name__}")
        if not isinstance(compiles, (bool, str)):
            kind = type(compiles).__name__
            raise TypeError(f"`speculation_compile` must be a bool or a string, got {compiles!r} of type {kind}")
        if isinstance(compiles, str) and compiles not in COMPILABLE:
            names = ", ".join(map(repr, COMPILABLE))
            raise ValueError(f"`speculation_compile` must be one of {names}, or True for all of them, got {compiles!r}")

    def _check_acceptance(self) -> None:
        acceptance: Any = self.speculation_acceptance
        seed: Any = self.speculation_seed
        if acceptance not in ACCEPTANCE_RULES:
            names = ", ".join(map(repr, ACCEPTANCE_RULES))
            raise ValueError(f"`speculation_acceptance` must be one of {names}, got {acceptance!r}")
        if seed is None:
            return
        seeds = seed.tolist() if isinstance(seed, Tensor) and seed.ndim == 1 else seed
        seeds = seeds if isinstance(seeds, (list, tuple)) else [seeds]
        if not seeds or not all(isinstance(s, Integral) and not isinstance(s, bool) for s in seeds):
            raise TypeError(f"`speculation_seed` must be an int, or a list of one per row, got {seed!r}")
        if acceptance != "coupled":
            raise ValueError(
                f"`speculation_seed` is for `speculation_acceptance='coupled'`, but that is {acceptance!r}: set it to "
                "'coupled', or seed torch's generator with `torch.manual_seed` instead"
            )

    def compiles(self, part: str) -> bool:
        """Whether to compile `part`, one of COMPILABLE."""
        return self.speculation_compile is True or self.speculation_compile == part


def resolve_options(
    explicit: dict[str, Any],
    prepared: GenerationConfig,
    target: PreTrainedModel,
    draft: object | None,
) -> Options:
    """Decide every option.

    Args:
        explicit: the options that the user gave to this call.
        prepared: the call's generation config, in which transformers has already filled in its own defaults.
        target: its generation config comes second.
        draft: its generation config, if any, comes third.

    Raises:
        TypeError, ValueError: if the value of an option is invalid, or invalid in this context.
    """
    host_defaults = GenerationConfig._get_default_generation_params()
    draft_config = getattr(draft, "generation_config", None)

    def resolve(name: str) -> Any:
        value = getattr(prepared, name, None)
        candidates = [
            explicit.get(name),
            None if value == host_defaults.get(name) else value,
            getattr(target.generation_config, name, None),
            getattr(draft_config, name, None) if name not in _ABOUT_THE_TARGET else None,
        ]
        return next((value for value in candidates if value is not None), DEFAULTS[name])

    options = {name: resolve(name) for name in OPTION_NAMES}
    # If γ is set without a schedule, use that γ throughout.
    if options["num_assistant_tokens_schedule"] is None:
        gamma = options["num_assistant_tokens"] or options["prompt_lookup_num_tokens"]
        options["num_assistant_tokens_schedule"] = "optimal" if gamma is None else "constant"
    return Options(**options)


def check_generation_config(config: GenerationConfig, given: dict[str, Any]) -> None:
    """Raise an error that names the option if speculative decoding does not support a setting.

    Args:
        config: the call's prepared generation config.
        given: the keyword arguments of the call.
    """
    if config.num_beams is not None and config.num_beams > 1:
        raise ValueError(
            f"strategy='spec' decodes greedily or by sampling, but `num_beams` is {config.num_beams}: "
            "set `num_beams=1`, or drop strategy='spec' for beam search"
        )
    if config.use_cache is False:
        fix = "drop that argument" if given.get("use_cache") is False else "a config says so; pass `use_cache=True`"
        raise ValueError(f"strategy='spec' needs the key-value cache, but `use_cache` is False: {fix}")
    mode = config.get_generation_mode()
    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
    if mode not in modes:
        raise ValueError(f"strategy='spec' decodes greedily or by sampling, not by {mode.value}")
    for name in ("speculation_type", "assistant_ensemble_weight", "token_healing"):
        if getattr(config, name, None):
            raise ValueError(f"`{name}` ({getattr(config, name)!r}) cannot be combined with strategy='spec': unset it")
    check_cache_implementation(config.cache_implementation)


def check_cache_implementation(name: str | None) -> None:
    """Raise a ValueError for kinds of cache that cannot be exchanged with ours, or would be pointless with it."""
    if name in (None, "dynamic", *STATIC_KINDS):
        return
    if name == "quantized":
        reason = (
            "such a cache cannot roll back exactly, because how it rounds an entry depends on all entries written with "
            "it, including rejected drafts"
        )
    elif name.startswith("offloaded"):
        # Users who offload lack device memory: a cache kept there anyway would fail late, out of memory.
        reason = "strategy='spec' keeps keys and values on the model's device"
    elif name == "paged":
        reason = "it means continuous batching, which has its own decoding loop"
    else:
        reason = "it is not known here"
    raise ValueError(
        f"`cache_implementation` {name!r} is not supported by strategy='spec' ({reason}): use 'dynamic' or 'static', "
        "or drop strategy='spec'"
    )
