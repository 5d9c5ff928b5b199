"""Parts: a model's modules, their settings, the addresses of their tensors, and the modes of PyTorch.

Compiled code and captured graphs of a model may be reused as long as these stay the same. What a graph contains, and
where a change of it shows:

- addresses of weights (`.data =`, `.to`, `load_state_dict(assign=True)`, untied or exchanged weights), buffers and
  plain tensors: `places`. Their values do not matter, because each forward reads them again;
- what Python decided: train mode, settings, configs, attention implementation, exchanged modules and forwards, masks
  by layer type: `kind`;
- what PyTorch decided by its modes, such as autocast, precision of products, deterministic algorithms: `modes`;
- hooks, which a replay would skip: `hooked`. Adapters are not all seen here; `kept.py` does not keep such models.

Grad and inference mode do not change results. Random numbers come from the device's default generator, which replays
advance. Not seen: code that is replaced in a class or a module of Python, and generators of a model's own.
"""

import enum
import functools
import types
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..device import is_hooked, model_device

_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size})
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# Other private attributes of modules are bookkeeping; `generate()` records the length of its longest cache in one.
_PRIVATE = frozenset({"_parameters", "_buffers", "_modules"})


class Parts(NamedTuple):
    """Compared with `==`.

    Attributes:
        kind: modules with their settings; dtypes, shapes and devices of tensors.
        places: the addresses of parameters, buffers and other tensors, in the same order.
        hooked: whether hooks run other code in a forward.
        modes: PyTorch's current modes.
    """

    kind: object = ()
    places: tuple[object, ...] = ()
    hooked: bool = False
    modes: object = ()


def parts_of(model: PreTrainedModel) -> Parts:
    """The current parts of a model, under the modes of this thread."""
    numbers = {module: number for number, module in enumerate(model.modules())}
    configs: dict[int, int] = {}
    places: list[object] = []

    def kind(value: Any) -> object:
        if type(value) in _PLAIN or isinstance(value, enum.Enum):
            return value
        if isinstance(value, dict):
            return tuple([(name, kind(item)) for name, item in value.items()])
        if isinstance(value, Tensor):
            places.extend(_places(value))
            return value.dtype, value.device, value.shape, value.stride() if value.layout is torch.strided else None
        if isinstance(value, nn.Module):
            return numbers.get(value, type(value))
        if isinstance(value, (list, tuple)):
            return tuple([kind(item) for item in value])
        if id(value) in configs:  # most modules share one config
            return configs[id(value)]
        if isinstance(value, PreTrainedConfig):
            configs[id(value)] = len(configs)
            return kind(vars(value))
        if isinstance(value, _FUNCTIONS):  # weakly: methods bound to the model would keep it alive
            return weakref.ref(value)
        return type(value)

    modules = [
        (
            type(module),
            [(name, kind(value)) for name, value in vars(module).items() if name[0] != "_" or name in _PRIVATE],
        )
        for module in numbers
    ]
    for module in numbers:
        private = (value for name, value in vars(module).items() if name[0] == "_" and isinstance(value, Tensor))
        places.extend(place for tensor in private for place in _places(tensor))
    return Parts(modules, tuple(places), is_hooked(model), _modes(model_device(model).type))


def _places(tensor: Tensor) -> list[object]:
    """The addresses of a tensor's storage; where there is no address, an object that equals nothing else."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)  # subclasses that consist of other tensors
    if flatten is not None:
        inner = (getattr(tensor, name) for name in flatten()[0])  # a mesh of devices may be among them
        return [place for part in inner if isinstance(part, Tensor) for place in _places(part)]
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return [address if address or not tensor.numel() else object()]


def _modes(device_type: str) -> object:
    """The modes that decide how operations are computed: of this thread (autocast), or of the process."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    matmul = cuda.matmul
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.get_default_dtype(),
        matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.deterministic, cudnn.benchmark),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )
