"""Sharded models, which several processes compute together: how to detect them, and which ones are unsupported.

The model and its parameters show it. There are two kinds:

- Tensor, expert and pipeline parallel models. All ranks decode the same prompts and must feed the same tokens in the
  same forwards. So no decision may depend on a local clock; then all ranks decide alike.
- Models whose weights FSDP or DeepSpeed ZeRO-3 shards. Each rank has different prompts, and each forward gathers
  weights from all ranks, so all must make equally many forwards. They accept different drafts, so they do not.
"""

from collections.abc import Iterator
from typing import Any

from torch import distributed, nn
from transformers import DynamicCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module


def sharded(target: nn.Module, assistant_model: object) -> str | None:
    """Which model is sharded over processes, and how, for messages; `None` where no model is.

    Args:
        assistant_model: as given: a model, a drafter with a `model`, or anything else.

    Raises:
        ValueError: where ranks would need equal numbers of forwards (FSDP, ZeRO-3).
    """
    if _world_size() == 1:
        return None
    models = list(_models(target, assistant_model))
    for name, model in models:
        _check_not_gathered(name, model)
    return next((f"{name} ({type(model).__name__}) {how}" for name, model in models if (how := _how(model))), None)


def check_synced_gpus(synced_gpus: bool | None) -> None:
    """Raise a ValueError if a call requires equal numbers of forwards on all ranks."""
    if synced_gpus:
        raise ValueError(
            "`synced_gpus` is not supported by strategy='spec': it requires that all ranks make equally many forwards, "
            "but a rank's number of forwards depends on the drafts that it accepts. Leave it out where each rank has "
            "all weights or all ranks decode the same prompts (tensor parallel), or drop strategy='spec'"
        )


def _world_size() -> int:
    is_running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_running else 1


def _models(target: nn.Module, assistant_model: object) -> Iterator[tuple[str, nn.Module]]:
    yield "the target", target
    draft = assistant_model if isinstance(assistant_model, nn.Module) else getattr(assistant_model, "model", None)
    if isinstance(draft, nn.Module):
        yield "`assistant_model`", draft


def _check_not_gathered(name: str, model: nn.Module) -> None:
    """Raise a ValueError where `generate()` would switch `synced_gpus` on, or where a part of a model is sharded."""
    if is_deepspeed_zero3_enabled():
        found = "DeepSpeed ZeRO-3 is enabled in this process, so weights are"
        way_out = "generate in a process without it"
    elif any(is_fsdp_managed_module(module) for module in model.modules()):
        found = "FSDP manages it, so its weights are"
        way_out = "pass a copy that FSDP does not manage"
    else:
        return
    raise ValueError(
        f"strategy='spec' cannot be used with {name} ({type(model).__name__}): {found} gathered from all ranks in each "
        "forward. All ranks must then make equally many forwards, but a rank's number of forwards depends on the "
        f"drafts that it accepts. To generate, {way_out}, or drop strategy='spec'"
    )


def _how(model: nn.Module) -> str | None:
    given: Any = model
    stage, tp_size = getattr(given, "_pp_stage", None), getattr(given, "_tp_size", None) or 1
    if stage is not None:
        return f"is one of {stage.pp_size} pipeline stages"
    if tp_size > 1:
        return f"is tensor parallel over {tp_size} processes"
    from torch.distributed.tensor import DTensor  # heavy, and only needed with several processes

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "has parameters sharded over processes"
    return None


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
