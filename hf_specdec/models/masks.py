"""Masks for rows of different lengths, and which models follow them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..device import forward_parameters, mask_width, model_device
from ..kernels.attention import mark_causal
from .answers import Differs, ask

# Layer types whose attention mask is a function of query and key positions.
MASKED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
# Layer types that do not attend. "hybrid" layers do both, and their two halves look masks up by these names.
_UNMASKED_LAYER_TYPES = {"linear_attention", "conv", "mamba", "moe", "mlp", "dummy"}
_HYBRID_HALVES = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
# Attention implementations that take a 4-D mask.
_MASK_TAKING = {"sdpa", "eager"}


Mask: TypeAlias = Tensor | dict[str, Tensor | None]


def ragged_mask(
    model: PreTrainedModel,
    slots: Tensor,
    used: int,
    key_slots: Mapping[str, Tensor] | None = None,
    first: Tensor | None = None,
    uniform: bool = False,
) -> Mask:
    """The 4-D mask for queries at `slots` `[rows, q]` over `used` slots, in the form that the model's layers expect.

    Args:
        key_slots: by layer type, `[rows, k]`, the slots of the keys where they are not the first `used`.
        first: `[rows]`, the first slot of each row that is not padding; `None` if there is no padding.
        uniform: these are the last slots in use, in all rows.

    Returns: `[rows, 1, q, used or k]`, bool (True = attend) for sdpa and additive for eager; by layer type when the
    config has `layer_types`, as `create_masks_for_generate` of transformers does it.
    """
    config = model.config.get_text_config(decoder=True)
    queries = slots[:, None, :, None]
    every_slot = torch.arange(mask_width(used, slots.device), device=slots.device)

    def mask_for(layer_type: str) -> Tensor:
        held = None if key_slots is None else key_slots.get(layer_type)
        columns = used if held is None else held.shape[1]
        keys = every_slot if held is None else held[:, None, None, :]
        causal = keys <= queries
        if first is not None:
            causal = causal & (keys >= first[:, None, None, None])
        mask = causal
        if layer_type in ("sliding_attention", "hybrid_sliding"):
            mask = causal & (keys > queries - config.sliding_window)
        elif layer_type == "chunked_attention":
            mask = causal & (keys // config.attention_chunk_size == queries // config.attention_chunk_size)
        if config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.where(mask, torch.zeros((), dtype=model.dtype, device=mask.device), lowest)
        mask = mask[..., :columns]
        return mark_causal(mask) if uniform and layer_type == "full_attention" and first is None else mask

    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        names = set(layer_types)
        for hybrid in names & _HYBRID_HALVES.keys():
            names |= {_HYBRID_HALVES[hybrid], "linear_attention", "conv"}
        return {name: None if name in _UNMASKED_LAYER_TYPES else mask_for(name) for name in names}
    if getattr(config, "sliding_window", None) is not None:
        return mask_for("sliding_attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        return mask_for("chunked_attention")
    return mask_for("full_attention")


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether the decoder takes position ids; if not, it counts from the length of its cache."""
    return _positions_name(model) in forward_parameters(model)


def hands_positions_on(model: PreTrainedModel) -> bool:
    """Whether the forward passes position ids to the decoder through `**kwargs`, so that a draft can use them.

    Vanilla does not pass them to such a model, so a target would decode different tokens with them than without.
    """
    open_ended = any(p.kind is p.VAR_KEYWORD for p in forward_parameters(model).values())
    if takes_position_ids(model) or not open_ended:
        return False
    return bool(ask(model, "hands positions on", lambda seed: _probe_positions(model, _positions_name(model))))


def _positions_name(model: PreTrainedModel) -> str:
    return "decoder_position_ids" if model.config.is_encoder_decoder else "position_ids"


def _probe_positions(model: PreTrainedModel, name: str) -> None:
    ids, positions = (torch.tensor([pair], device=model_device(model)) for pair in ([1, 2], [0, 1]))
    ids_name = name.replace("position", "input")
    kwargs = {**probe_inputs(model), ids_name: ids}
    logits = [model(**kwargs, **{name: positions + start}).logits for start in (0, 1)]
    if torch.equal(*logits):
        raise Differs("does not read positions")


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention functions take 4-D masks. FlashAttention does not; others are unknown."""
    return model.config.get_text_config(decoder=True)._attn_implementation in _MASK_TAKING


def follows_masks(model: PreTrainedModel, drafts: bool = False) -> bool:
    """Whether we can make masks for all layers of a model, and it takes position ids.

    Args:
        drafts: position ids may be passed although the forward has no such parameter.
    """
    config = model.config.get_text_config(decoder=True)
    takes_ids = takes_position_ids(model) or (drafts and hands_positions_on(model))
    return takes_ids and takes_masks(model) and set(getattr(config, "layer_types", None) or ()) <= MASKED_LAYER_TYPES


def probe_inputs(model: PreTrainedModel, rows: int = 1) -> dict[str, Any]:
    """The inputs of a probe's forward besides tokens; an encoder-decoder model gets encoder outputs to attend to."""
    kwargs: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if model.config.is_encoder_decoder:
        width = model.config.get_text_config(encoder=True).hidden_size
        states = torch.linspace(-1, 1, width, dtype=model.dtype, device=model_device(model)).expand(rows, 1, width)
        kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
    return kwargs


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a token may attend to later tokens where no mask forbids it, as in prompts of prefix models."""
    return any(getattr(module, "is_causal", True) is False for module in model.get_decoder().modules())
