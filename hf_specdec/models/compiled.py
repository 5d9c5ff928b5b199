"""What of a model's forwards is compiled (`speculation_compile`), and how `torch.compile` is told to."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..device import is_hooked

logger = logging.get_logger(__name__)

# Widths that are compiled. The steps of a draft model: one token, or two after a block that was accepted whole.
STEPS = (1, 2)
# Tokens per row of the longest block.
LONGEST = 17
# Blocks that a target verifies, by one code for all of them; what is one token wide is filled up.
BLOCKS = range(2, LONGEST + 1)
HOOKED = "it has hooks (or accelerate moves its weights), which must see every forward"


def compilable(model: PreTrainedModel, widths: Sequence[int], is_fixed: bool, does: str) -> Sequence[int]:
    """The widths to compile for a model: none, which is said once, where its forwards are not always the same.

    Args:
        is_fixed: whether forwards keep their shapes.
        does: what the model does with them, for the message.
    """
    reason = "" if is_fixed else "its forwards change their shapes here"
    if is_hooked(model):
        reason = HOOKED
    elif has_adapters(model):
        reason = "it has adapters, which may be switched between calls"
    if not reason:
        return widths
    logger.warning_once(f"{type(model).__name__} {does} uncompiled: {reason}.")
    return ()


def has_adapters(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def compiled(function: Callable[..., Any], exact: bool) -> Callable[..., Any]:
    """A function `(model, ...)` compiled for fixed shapes.

    Args:
        exact: it rounds as uncompiled code, and is compiled again when the model has changed.

    Raises:
        RuntimeError: where this version of PyTorch cannot be told to.
    """
    return torch.compile(function, dynamic=False, **_compile_options(exact))


def _compile_options(exact: bool) -> dict[str, Any]:
    """What to tell `torch.compile`, as far as this version of it can be told."""
    if not hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # with all guards, version 2.6 fails to compile
        raise RuntimeError(f"PyTorch {torch.__version__} cannot leave out guards of compiled code, newer ones can")
    guards = _of_the_model if exact else torch.compiler.keep_tensor_guards_unsafe
    told: dict[str, Any] = {"options": {"guard_filter_fn": guards, "emulate_precision_casts": exact}}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        told["isolate_recompiles"] = True  # from other models, which would count against the same limit
    return told


def _of_the_model(guards: Sequence[Any]) -> list[bool]:
    """Which guards of compiled code stay: those on `model`, on tensors and on PyTorch's own modes, which have no name.

    Those on Python objects of ours would see new ones in each call, of which all that matters is a tensor.
    """
    return [
        guard.guard_type == "TENSOR_MATCH" or not guard.name or bool(re.search(r"\bmodel\b", guard.name))
        for guard in guards
    ]
