"""Avoids PyTorch's overheads around a model: waiting for the device, and bookkeeping for gradients.

Also answers which inputs a model takes, and on which device.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CPU = torch.device("cpu")


def to_device(values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
    """A 1-D tensor of `values`; `torch.tensor(values, device=device)` would wait for work queued on the device."""
    return torch.tensor(values).to(device, non_blocking=True)


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """`rows` as an index; made once for as long as rows stay the same. It must not be modified."""
    return _row_index(tuple(rows), device, current_stream(device))


@functools.lru_cache(maxsize=64)
def _row_index(rows: tuple[int, ...], device: torch.device, stream: object) -> Tensor:
    """`stream` makes the index: work on another one would not wait for it."""
    with torch.inference_mode(False):  # it is used both in and outside inference mode
        return to_device(rows, device)


def mask_width(keys: int, device: torch.device) -> int:
    """How many columns to allocate for an attention mask over so many keys.

    On accelerators a multiple of 8: PyTorch's memory-efficient attention copies other masks, in each layer.
    """
    return keys if device.type == "cpu" else -(-keys // 8) * 8


def has_events(device: torch.device) -> bool:
    """Whether the host can wait for events on this device, and read their times."""
    return device.type == "cuda" and torch.cuda.is_available()


def current_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """The stream that work on this device is queued on, by this thread; `None` where there are none."""
    return torch.cuda.current_stream(device) if has_events(device) else None


def to_host(tensor: Tensor) -> Tensor:
    """The values on the host, where they can be read without waiting: on CUDA, the host waits here, on an event.

    `torch.cuda.set_sync_debug_mode("error")` allows this wait, unlike `.cpu()` and all those that happen by accident.
    """
    stream = current_stream(tensor.device)
    if stream is None:
        return tensor.to(CPU)
    copied = tensor.to(CPU, non_blocking=True)
    done = torch.cuda.Event()
    done.record(stream)
    done.synchronize()
    return copied


def no_bookkeeping(model: torch.nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """The context for a forward: inference mode on CPUs, where it saves a tenth to a quarter of a small model's time.

    Not for models with forward hooks, which may keep tensors for their own backward pass.
    """
    return nullcontext if is_hooked(model, inside=True) or device.type != "cpu" else torch.inference_mode


def is_hooked(model: torch.nn.Module, inside: bool = False) -> bool:
    """Whether foreign code (accelerate's, for example) runs in a forward, and must run in every forward.

    Args:
        inside: ignore hooks that only see the inputs of the whole model.
    """
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(
        module._forward_hooks
        or "_hf_hook" in vars(module)
        or (module._forward_pre_hooks and not (inside and module is model))
        for module in model.modules()
    )


def model_device(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs; if accelerate has offloaded its weights, the device that it computes on.

    Exported repositories import it too (`assets/export/generate.py.txt`).
    """
    if model.device.type == "meta":
        for module in model.modules():
            hook: Any = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", (hook,)):
                device = getattr(part, "execution_device", None)
                if device is not None:
                    return torch.device(device)
    return model.device


def forward_parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """The inputs that a model's `forward` names; for `torch.compile` wrappers, those of the model inside."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def first_line(error: BaseException) -> str:
    """The error in one line: its type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Inputs without which feeding a model is slower.
_TELLING = ("past_key_values", "cache_params", "position_ids", "logits_to_keep")


def hidden_parameters(model: PreTrainedModel) -> list[str]:
    """Inputs that a wrapper around `forward` takes as `*args` or `**kwargs`, though the wrapped one may name them."""
    visible = forward_parameters(model)
    if not any(p.kind is p.VAR_KEYWORD for p in visible.values()):
        return []
    classes = type(getattr(model, "_orig_mod", model)).__mro__
    named = {
        name for cls in classes if "forward" in vars(cls) for name in inspect.signature(vars(cls)["forward"]).parameters
    }
    names_nothing = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in visible.values())
    taken = {"past_key_values", "position_ids"} if names_nothing and not named & {*_TELLING} else named
    hidden = [name for name in _TELLING if name in taken and name not in visible]
    caches = {"past_key_values", "cache_params"}
    return [name for name in hidden if name not in caches] if caches & visible.keys() else hidden
