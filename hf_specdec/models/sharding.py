"""Models that several processes compute together: which model is one, and what follows from it.

Asked of the model itself and of its parameters. There are two kinds:

- Tensor, expert and pipeline parallel models. All ranks decode the same prompts and must feed the same tokens in the
  same forwards. So nothing may go by the clock of one of them; then each rank comes to the same decisions.
- Models whose weights FSDP or DeepSpeed ZeRO-3 shards. Each rank has prompts of its own, and each forward gathers
  weights from all ranks, so all must make equally many forwards. They accept different drafts, so they do not.
"""

from collections.abc import Iterator
from typing import Any

from torch import distributed, nn
from transformers import DynamicCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module


def sharded(target: nn.Module, assistant_model: object) -> str | None:
    """Who is computed by several processes together, and how, for messages; `None` where nobody is.

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
    """Raise a ValueError where a call asks for equal numbers of forwards on all ranks."""
    if synced_gpus:
        raise ValueError(
            "`synced_gpus` is not supported by strategy='spec': it asks that all ranks make equally many forwards, but "
            "how many a rank needs depends on the drafts that it accepts. Leave it out where each rank has all weights "
            "or all ranks decode the same prompts (tensor parallel), or drop strategy='spec'"
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
    """Where `generate()` would switch `synced_gpus` on by itself, and also where only a part of a model is sharded."""
    if is_deepspeed_zero3_enabled():
        found = "DeepSpeed ZeRO-3 is enabled in this process, so that weights are"
        way_out = "generate in a process without it"
    elif any(is_fsdp_managed_module(module) for module in model.modules()):
        found = "FSDP manages it, so that its weights are"
        way_out = "pass a copy that FSDP does not manage"
    else:
        return
    raise ValueError(
        f"strategy='spec' cannot be used with {name} ({type(model).__name__}): {found} gathered from all ranks in each "
        "forward. All ranks must then make equally many forwards, but how many a rank needs depends on the drafts "
        f"that it accepts. For generating, {way_out}, or drop strategy='spec'"
    )


def _how(model: nn.Module) -> str | None:
    given: Any = model
    stage, tp_size = getattr(given, "_pp_stage", None), getattr(given, "_tp_size", None) or 1
    if stage is not None:
        return f"is one of {stage.pp_size} pipeline stages"
    if tp_size > 1:
        return f"is tensor parallel over {tp_size} processes"
    from torch.distributed.tensor import DTensor  # heavy, and only of use in a process that has others

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "has parameters that are sharded over processes"
    return None


class OwnLayersCache(DynamicCache):
    """A cache of transformers for one pipeline stage: how long it is says a layer that the stage owns.

    Models ask the first layer of its kind, which is empty on stages that do not own it; their masks of several tokens
    are then wrong.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._owned(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_query_offset(self._owned(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._owned(layer_idx))

    def _owned(self, layer_idx: int) -> int:
        """The layer that is asked if it holds anything, else the first one of its kind that does."""
        asked = self.layers[layer_idx : layer_idx + 1]
        if any(layer.is_initialized for layer in asked):
            return layer_idx
        kind = {type(layer) for layer in asked}
        alike = (index for index, layer in enumerate(self.layers) if type(layer) in kind and layer.is_initialized)
        return next(alike, layer_idx)
