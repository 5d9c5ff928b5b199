"""Which forwards of a model are compiled (`speculation_compile`), and with which options of `torch.compile`."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..device import is_hooked

logger = logging.get_logger(__name__)

# Compiled widths. The steps of a draft model: one token, or two after a fully accepted block.
STEPS = (1, 2)
# Tokens per row of the longest block.
LONGEST = 17
# Blocks that a target verifies, compiled once for all widths; a single token is filled up.
BLOCKS = range(2, LONGEST + 1)
HOOKED = "it has hooks (or accelerate moves its weights), which must see every forward"


def compilable(model: PreTrainedModel, widths: Sequence[int], is_fixed: bool, does: str) -> Sequence[int]:
    """The widths to compile for a model: none, with one warning, where its forwards are not always the same.

    Args:
        is_fixed: whether forwards keep their shapes.
        does: what the model does with the forwards, as a verb for the message.
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
        exact: it rounds as uncompiled code does, and is compiled again when the model has changed.

    Raises:
        RuntimeError: where this version of PyTorch lacks the options for it.
    """
    return torch.compile(function, dynamic=False, **_compile_options(exact))


def _compile_options(exact: bool) -> dict[str, Any]:
    """Options of `torch.compile`, as far as this version has them."""
    if not hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # with all guards, version 2.6 fails to compile
        raise RuntimeError(f"PyTorch {torch.__version__} cannot drop guards of compiled code, newer versions can")
    guards = _model_guards if exact else torch.compiler.keep_tensor_guards_unsafe
    options: dict[str, Any] = {"options": {"guard_filter_fn": guards, "emulate_precision_casts": exact}}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True  # recompiles of other models would count against the same limit
    return options


def _model_guards(guards: Sequence[Any]) -> list[bool]:
    """Which guards of compiled code stay: those on `model`, on tensors and on PyTorch's modes, which have no name.

    Guards on our Python objects would fail in each call, because the objects are new; only their tensors matter.
    """
    return [
        guard.guard_type == "TENSOR_MATCH" or not guard.name or bool(re.search(r"\bmodel\b", guard.name))
        for guard in guards
    ]
