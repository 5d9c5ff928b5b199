"""Masks for rows of different lengths, and which models follow them."""

import weakref
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .host import forward_parameters, model_device
from .sharding import OwnLayersCache

# Layer types whose attention mask is a function of query and key positions.
_MASKED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
# Layer types that do not attend. "hybrid" layers do both, and their two halves ask for masks by these names.
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
) -> Mask:
    """The 4-D mask for queries at `slots` `[rows, q]` over `used` slots, in the form the model's layers expect.

    Args:
        key_slots: by layer type, `[rows, k]`, the slots of the keys where they are not the first `used`.
        first: `[rows]`, the first slot of each row that is not padding; `None` if there is none.

    Returns: `[rows, 1, q, used or k]`, bool (True = attend) for sdpa and additive for eager; by layer type when the
    config has `layer_types`, as `create_masks_for_generate` of transformers does it.
    """
    config = model.config.get_text_config(decoder=True)
    queries = slots[:, None, :, None]
    every_slot = torch.arange(used, device=slots.device)

    def mask_for(layer_type: str) -> Tensor:
        held = None if key_slots is None else key_slots.get(layer_type)
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
            return torch.where(mask, torch.zeros((), dtype=model.dtype, device=mask.device), lowest)
        return mask

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
    """Whether the decoder can be told positions; without, it counts from the length of its cache."""
    return _positions_name(model) in forward_parameters(model)


def hands_positions_on(model: PreTrainedModel) -> bool:
    """Whether positions that a forward does not name get to the decoder all the same, so that a draft can be told them.

    Vanilla does not tell them to such a model, so that it would decode other tokens with them than without.
    """
    open_ended = any(p.kind is p.VAR_KEYWORD for p in forward_parameters(model).values())
    if takes_position_ids(model) or not open_ended:
        return False
    if model not in _hands_positions_on:
        _hands_positions_on[model] = _probe_positions(model, _positions_name(model))
    return _hands_positions_on[model]


def _positions_name(model: PreTrainedModel) -> str:
    return "decoder_position_ids" if model.config.is_encoder_decoder else "position_ids"


_hands_positions_on: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


def _probe_positions(model: PreTrainedModel, name: str) -> bool:
    ids, positions = (torch.tensor([pair], device=model_device(model)) for pair in ([1, 2], [0, 1]))
    ids_name = name.replace("position", "input")
    try:
        kwargs = {**probe_inputs(model), ids_name: ids}
        logits = [model(**kwargs, **{name: positions + start}).logits for start in (0, 1)]
    except Exception:
        return False
    return not torch.equal(*logits)


# model -> attention implementation -> whether it does
_honours_masks: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]]" = weakref.WeakKeyDictionary()


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention functions take 4-D masks. FlashAttention takes none; of others it is not known."""
    return model.config.get_text_config(decoder=True)._attn_implementation in _MASK_TAKING


def takes_ragged_rows(model: PreTrainedModel, drafts: bool = False) -> bool:
    """Whether the model can decode rows of different lengths together, that is, follows positions and 4-D masks.

    Asked of the model itself, once: the last two of three tokens are told by mask and position that they are alone;
    their logits must then be those that they have alone, however long the cache says that the longest row is. (Models
    with ALiBi, for example, read distances off a 2-D mask instead.)

    Args:
        drafts: its tokens need not be vanilla's.
    """
    config = model.config.get_text_config(decoder=True)
    if not takes_masks(model) or not set(getattr(config, "layer_types", None) or ()) <= _MASKED_LAYER_TYPES:
        return False
    known = _honours_masks.setdefault(model, {})
    implementation = config._attn_implementation + (" of a draft" if drafts else "")
    if implementation not in known:
        told = takes_position_ids(model) or (drafts and hands_positions_on(model))
        # Who is not told positions believes that all rows are as long as the cache says.
        padding = drafts and not takes_position_ids(model)  # such a draft is never padded as vanilla would
        honours = told and _probe(model) and (padding or _probe_padding(model))
        if model.training:  # dropout: not an answer to keep
            return honours
        known[implementation] = honours
    return known[implementation]


def probe_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """What a forward over a few tokens needs besides them: an encoder-decoder model has something to attend to."""
    kwargs: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if model.config.is_encoder_decoder:
        width = model.config.get_text_config(encoder=True).hidden_size
        states = torch.linspace(-1, 1, width, dtype=model.dtype, device=model_device(model)).view(1, 1, width)
        kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
    return kwargs


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a token may attend to those behind it where no mask forbids it, as in prompts of prefix models."""
    return any(getattr(module, "is_causal", True) is False for module in model.get_decoder().modules())


class _CacheOfOtherRows(DynamicCache):
    """An empty cache that tells the length of a longer row, which must mean nothing to the others."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return super().get_seq_length(*args, **kwargs) + 2**20


def _probe(model: PreTrainedModel) -> bool:
    device = model_device(model)
    row = torch.tensor([[1, 2, 3]], device=device)
    alone = row[:, 1:]
    # Three keys, of which the last two queries do not see the first: the causal mask of two slots, moved right by one.
    slots = torch.tensor([[0, 0, 1]], device=device)
    mask = ragged_mask(model, slots[:, 1:], 2)

    prefix_model = looks_ahead(model) and not model.config.is_encoder_decoder

    def move(m: Tensor | None) -> Tensor | None:
        if m is None:
            return None
        seen, unseen = m[:, :, :1, :1], m[:, :, :1, 1:]
        m = seen.expand_as(m) if prefix_model else m  # alone, it reads both as a prompt
        first = torch.cat([seen, unseen, unseen], dim=3)
        return torch.cat([first, torch.cat([unseen.expand(-1, -1, 2, -1), m], dim=3)], dim=2)

    masks = {key: move(m) for key, m in mask.items()} if isinstance(mask, dict) else move(mask)
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    try:
        kwargs = probe_inputs(model)
        told = {prefix + "input_ids": row, prefix + "attention_mask": masks, prefix + "position_ids": slots}
        if not (model.config.is_encoder_decoder or prefix_model):  # which knows a prompt by the length
            told["past_key_values"] = _CacheOfOtherRows(config=model.config.get_text_config(decoder=True))
        masked = model(**told, **kwargs).logits[:, -1]
        expected = model(**{prefix + "input_ids": alone}, **kwargs).logits[:, -1]
        plain = model(**{prefix + "input_ids": row}, **kwargs).logits[:, -1]
    except Exception:  # whatever a model does with a mask that it does not know: it cannot take it
        return False
    return _is_small(masked - expected, plain - expected)


def _probe_padding(model: PreTrainedModel) -> bool:
    """Whether left padding is to the model itself, told by a 2-D mask and step by step, as if the row were alone."""
    if model.config.is_encoder_decoder:
        return True  # its padding is the encoder's
    device = model_device(model)

    def next_logits(*steps: tuple[list[int], list[int], list[int] | None]) -> Tensor:
        cache = OwnLayersCache(config=model.config.get_text_config(decoder=True))
        for step in steps:
            ids, positions, mask = (None if row is None else torch.tensor([row], device=device) for row in step)
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            if "position_ids" in forward_parameters(model):  # else vanilla does not tell them
                inputs["position_ids"] = positions
            logits = model(**inputs, use_cache=True, return_dict=True).logits[:, -1]
        return logits

    try:
        alone = next_logits(([2], [0], None), ([3], [1], None))
        padded = next_logits(([1, 2], [0, 0], [0, 1]), ([3], [1], [0, 1, 1]))
        longer = next_logits(([1, 2], [0, 1], None), ([3], [2], None))
    except Exception:
        return False
    return _is_small(padded - alone, longer - alone)


def _is_small(difference: Tensor, other: Tensor) -> bool:
    """Whether a difference of logits is rounding, beside one that is not."""
    share = 0.01 if difference.dtype == torch.float32 else 0.05
    return bool(difference.abs().max() < share * other.abs().max())
