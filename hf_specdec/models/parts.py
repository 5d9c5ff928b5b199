"""Parts: a model's modules, their settings, and the addresses of their tensors.

Compiled code and captured graphs of a model may be reused as long as these stay the same. The values of weights do not
matter, because each forward reads them again.
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
        kind: modules with their settings; dtypes, shapes and devices of tensors; and PyTorch's current modes.
        places: the addresses of parameters, buffers and other tensors, in the same order.
        hooked: whether hooks run other code in a forward.
    """

    kind: object = ()
    places: tuple[object, ...] = ()
    hooked: bool = False


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
    return Parts((modules, _modes(model_device(model).type)), tuple(places), is_hooked(model))


def _places(tensor: Tensor) -> list[object]:
    """The addresses of a tensor's storage; where there is no address, an object that equals nothing else."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)  # subclasses that consist of other tensors
    if flatten is not None:
        inner = (getattr(tensor, name) for name in flatten()[0])  # a mesh of devices may be among them
        return [place for part in inner if isinstance(part, Tensor) for place in _places(part)]
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return [address if address or not tensor.numel() else object()]


def _modes(device_type: str) -> object:
    """The modes that change matrix products: autocast, and lower precision for float32."""
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type), precision
