"""The ways to generate that scripts compare: vanilla, HF assisted, and ours, by drafter, draft length and schedule.

A *way* is a name on the command line: a number is a constant γ, a word is a schedule, "default" sets nothing.
"""

import argparse
import copy
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel

from ..device import model_device
from ..drafters import Either, SuffixDrafter
from ..loop.schedule import SCHEDULES
from ..pairs.choice import load_draft
from ..pairs.heads import DEMO_HEAD
from ..pairs.mtp import mtp_named
from . import arguments
from .measure import ASSISTED, OURS, VANILLA, Method

DEFAULT = "default"

# What drafts, by name on the command line: arguments of `generate()`, given the draft model. None remembers earlier
# calls, because rounds repeat their prompts. Besides these there are "exit:K", the target's first K layers, and
# "head:NAME", a head by folder or Hub id.
_EXIT, _HEAD = "exit:", "head:"
DRAFTERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model": lambda draft: {"assistant_model": draft},
    "lookup": lambda draft: {},
    "suffix": lambda draft: {"assistant_model": SuffixDrafter(max_requests=0)},
    "either": lambda draft: {"assistant_model": Either(draft, SuffixDrafter(max_requests=0))},
    "head": lambda draft: {"assistant_model": str(DEMO_HEAD)},
}
DRAFTER_HELP = (
    "model, lookup, suffix, either, head (the embedded target's), head:NAME (a folder or Hub id), or exit:K (the "
    "target's first K layers)"
)


def drafter(name: str) -> str:
    """A drafter's name on the command line, for argparse."""
    if name in DRAFTERS or (name.startswith(_HEAD) and name != _HEAD):
        return name
    if name.startswith(_EXIT) and arguments.positive(name.removeprefix(_EXIT)):
        return name
    raise argparse.ArgumentTypeError(f"expected {DRAFTER_HELP}, got {name!r}")


def drafting(name: str, draft: Any) -> dict[str, Any]:
    """The arguments of `generate()` for a drafter's name."""
    if name.startswith(_EXIT):
        return {"assistant_early_exit": int(name.removeprefix(_EXIT))}
    if name.startswith(_HEAD):
        return {"assistant_model": name.removeprefix(_HEAD)}
    return DRAFTERS[name](draft)


def takes_threshold(name: str) -> bool:
    """Whether a drafter, by its name, takes the option `assistant_confidence_threshold`."""
    return name == "model" or name.partition(":")[0] in (_HEAD[:-1], _EXIT[:-1])


def heads(names: Iterable[str], target: PreTrainedModel) -> dict[str, Any]:
    """The heads among drafters, loaded, by name."""
    places = {name: drafting(name, None)["assistant_model"] for name in names if name.partition(":")[0] == _HEAD[:-1]}
    return {
        name: mtp_named(place, target) or load_draft(place, target.dtype, model_device(target))
        for name, place in places.items()
    }


def vanilla() -> Method:
    return Method(VANILLA, VANILLA)


def assisted(draft: PreTrainedModel, way: str, tokenizers: dict[str, Any] | None = None) -> Method:
    """HF assisted generation; with `tokenizers` if the draft has another one.

    transformers reads γ and the schedule from the draft's generation config and updates it as it runs, so each run
    gets its own copy of the draft, which shares the weights. A number means exactly that many draft tokens:
    transformers' confidence threshold, which would cut drafts short, is then 0.
    """
    fixed = {"assistant_confidence_threshold": 0.0} if way.isdecimal() else {}

    def options() -> dict[str, Any]:
        own = copy.copy(draft)
        own.generation_config = copy.deepcopy(draft.generation_config)
        own.generation_config.update(**way_options(way), **fixed)
        return {"assistant_model": own, **(tokenizers or {})}

    return Method(f"{ASSISTED} {way_label(way)}", ASSISTED, options, int(way) if way.isdecimal() else None)


def assisted_lookup(gamma: int) -> Method:
    """HF's prompt look-up."""
    return Method(f"HF look-up γ={gamma}", ASSISTED, lambda: {"prompt_lookup_num_tokens": gamma})


def ours(draft: Any, options: dict[str, Any], label: str, drafter: str = "model") -> Method:
    """`strategy="spec"` with a drafter, by its name, and any options of `generate()`."""
    fixed = options.get("num_assistant_tokens_schedule") == "constant" and drafter == "model"
    fixed &= not options.get("assistant_confidence_threshold")
    chosen = drafting(drafter, draft)
    return Method(
        f"{OURS} {label}" if drafter == "model" else f"{OURS} {drafter} {label}",
        OURS,
        lambda: {"strategy": "spec", **chosen, **options},
        options.get("num_assistant_tokens") if fixed else None,
        drafter,
    )


def ours_lookup(gamma: int) -> Method:
    options = {"strategy": "spec", "prompt_lookup_num_tokens": gamma}
    return Method(f"{OURS} look-up γ={gamma}", OURS, options.copy, drafter="lookup")


def way_options(way: str) -> dict[str, Any]:
    if way == DEFAULT:
        return {}
    if way.isdecimal():
        return {"num_assistant_tokens": int(way), "num_assistant_tokens_schedule": "constant"}
    return {"num_assistant_tokens_schedule": way}


def way_label(way: str) -> str:
    return f"γ={way}" if way.isdecimal() else way


def is_way(way: str) -> bool:
    return (way.isdecimal() and int(way) > 0) or way in (*SCHEDULES, DEFAULT)
