"""Sharded models, which several processes compute together: how to detect them.

The model and its parameters show it. There are two kinds:

- Tensor, expert and pipeline parallel models. All ranks decode the same prompts and must feed the same tokens in the
  same forwards. So one of them decides (`loop/ranks.py`).
- Models whose weights FSDP or DeepSpeed ZeRO-3 shards. Each rank has different prompts, and each forward gathers
  weights from all ranks. So they make their forwards in turns (`turns.py`).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import distributed, nn
from transformers import DynamicCache
from transformers.integrations.fsdp import is_fsdp_managed_module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_ZERO_GROUP = "ds_process_group"  # DeepSpeed gives it to parameters that it divides


class Sharded(NamedTuple):
    """The models of a call that processes compute together.

    Attributes:
        group: of the ranks that do; `None` for all.
        draft: the draft model is one of them.
    """

    group: "distributed.ProcessGroup | None"
    draft: bool


def sharded(target: nn.Module, assistant_model: object) -> Sharded | None:
    """Whether a model is sharded over processes; `None` where none is.

    Args:
        assistant_model: as given: a model, a drafter with a `model`, or anything else.
    """
    if _world_size() == 1:
        return None
    meshes = [None if _is_gathered(model) else _mesh(model) for model in _models(target, assistant_model)]
    found = [mesh for mesh in meshes if mesh is not None]
    if not found:
        return None
    return Sharded(_group(max(found, key=lambda mesh: mesh.size())), draft=any(meshes[1:]))


class Gathered(NamedTuple):
    """The models of a call whose weights are gathered from all ranks in each forward.

    Attributes:
        group: of the ranks; `None` for all.
    """

    models: list[nn.Module]
    group: "distributed.ProcessGroup | None"


def gathered(target: nn.Module, assistant_model: object, synced_gpus: bool | None) -> Gathered | None:
    """Whether weights are gathered in each forward; `None` where none are.

    Args:
        assistant_model: as given: a model, a drafter with a `model`, or anything else.
        synced_gpus: the call's argument; True says so of the target.

    Raises:
        ValueError: for models of which each rank also has a part of the computation.
    """
    if _world_size() == 1:
        return None
    models = list(_models(target, assistant_model))
    found = [model for i, model in enumerate(models) if _is_gathered(model) or (synced_gpus and i == 0)]
    if not found:
        return None
    if any(_is_divided(model) for model in models):
        raise ValueError(
            "strategy='spec' cannot be used with FSDP or ZeRO-3 together with tensor parallel models or pipeline "
            "stages: use one of them, or drop strategy='spec'"
        )
    meshes = [mesh for model in found if (mesh := _mesh(model)) is not None]
    group = _group(max(meshes, key=lambda mesh: mesh.size())) if meshes else _zero_group(found)
    return Gathered(found, group)


def _world_size() -> int:
    is_running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_running else 1


def _models(target: nn.Module, assistant_model: object) -> Iterator[nn.Module]:
    yield target
    draft = assistant_model if isinstance(assistant_model, nn.Module) else getattr(assistant_model, "model", None)
    if isinstance(draft, nn.Module):
        yield draft


def _is_gathered(model: nn.Module) -> bool:
    is_fsdp = any(is_fsdp_managed_module(module) for module in model.modules())
    return is_fsdp or any(hasattr(parameter, _ZERO_GROUP) for parameter in model.parameters())


def _zero_group(models: Sequence[nn.Module]) -> "distributed.ProcessGroup | None":
    """The processes among which ZeRO-3 has divided weights; `None` for all there are."""
    groups = (getattr(parameter, _ZERO_GROUP, None) for model in models for parameter in model.parameters())
    group = next((group for group in groups if group is not None), None)
    return None if group is None or distributed.get_world_size(group) == _world_size() else group


def _is_divided(model: Any) -> bool:
    """Tensor parallel, or a pipeline stage, says transformers."""
    return getattr(model, "_pp_stage", None) is not None or (getattr(model, "_tp_size", None) or 1) > 1


def _mesh(model: nn.Module) -> "DeviceMesh | None":
    """The processes that compute a model together, if there are several."""
    from torch.distributed.tensor import DTensor  # heavy, and only needed with several processes

    given: Any = model
    if _is_divided(model):
        return given._device_mesh
    sharded_parameters = (p for p in model.parameters() if isinstance(p, DTensor))
    return next((p.device_mesh for p in sharded_parameters if p.device_mesh.size() > 1), None)


def _group(mesh: "DeviceMesh") -> "distributed.ProcessGroup | None":
    """All processes of a mesh; `None` for all there are."""
    if mesh.size() == _world_size():
        return None
    wide = [name for i, name in enumerate(mesh.mesh_dim_names or ()) if mesh.size(i) > 1]
    if len(wide) == 1:
        return mesh.get_group(wide[0])
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


class OwnLayersCache(DynamicCache):
    """A transformers cache for one pipeline stage, which takes its length from a layer that the stage owns.

    Models read the length of the first layer of a kind. On stages that do not own that layer it is empty, and masks for
    several tokens would be wrong.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._owned(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_query_offset(self._owned(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._owned(layer_idx))

    def _owned(self, layer_idx: int) -> int:
        """The requested layer if it holds anything, else the first layer of its kind that does."""
        asked = self.layers[layer_idx : layer_idx + 1]
        if any(layer.is_initialized for layer in asked):
            return layer_idx
        kind = {type(layer) for layer in asked}
        alike = (index for index, layer in enumerate(self.layers) if type(layer) in kind and layer.is_initialized)
        return next(alike, layer_idx)
