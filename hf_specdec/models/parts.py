"""What the forwards of a model are made of: modules, their settings, and where their tensors lie.

Code that was compiled and graphs that were captured for a model may be used again as long as these stay the same. The
values of weights are no part of it: they are read anew in each forward.
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
# Other private attributes of modules are bookkeeping: `generate()` notes there how long its longest cache was.
_PRIVATE = frozenset({"_parameters", "_buffers", "_modules"})


class Parts(NamedTuple):
    """Compared with `==`.

    Attributes:
        kind: modules with their settings, dtypes, shapes and devices of tensors, and the modes that PyTorch is in.
        places: the addresses of parameters, buffers and other tensors, in the same order.
        hooked: whether somebody else's code runs in a forward.
    """

    kind: object = ()
    places: tuple[object, ...] = ()
    hooked: bool = False


def parts_of(model: PreTrainedModel) -> Parts:
    """The parts of a model as it is now, and under the modes of this thread."""
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
        if id(value) in configs:  # most modules have the same one
            return configs[id(value)]
        if isinstance(value, PreTrainedConfig):
            configs[id(value)] = len(configs)
            return kind(vars(value))
        if isinstance(value, _FUNCTIONS):  # weakly: what is bound to the model would keep it alive
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
    """The addresses of what a tensor consists of; of one that does not tell, something that equals nothing else."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)  # of a subclass that is made of other tensors
    if flatten is not None:
        inner = (getattr(tensor, name) for name in flatten()[0])  # a mesh of devices may be among them
        return [place for part in inner if isinstance(part, Tensor) for place in _places(part)]
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return [address if address or not tensor.numel() else object()]


def _modes(device_type: str) -> object:
    """What decides how PyTorch multiplies: autocast, and float32 products in lower precision."""
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type), precision
