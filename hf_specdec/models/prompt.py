"""Prompt: where the tokens of a prompt are, read from the inputs that `generate()` has prepared.

These are ids, mask, positions, and a cache that may already hold the beginning. Inconsistent inputs raise errors here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache.layers import cached_length
from .multimodal_prompt import FirstForward, prepare_first_forward, split_axes


@dataclass
class Prompt:
    """Where the prompt's tokens are, in columns of the attention mask.

    The mask's columns begin where the cache begins; the context's begin with `input_ids`, `column_offset` columns on.

    Attributes:
        mask: `[batch, columns]` bool, which columns are real.
        first: by row, the first real column.
        holes: some row has masked columns after its first real one (right padding, masked-out tokens).
        past: columns in the user's cache.
        position_offset: by row, the position id of the last column, minus that column.
        positions: `[batch, columns]` position ids, where they are not that offset plus the column; else `None`.
        axes: `[axes, batch, 1]`, an offset for each axis, where a token has a position on several axes.
        first_forward: reads the prompt, where it is more than tokens.
    """

    input_ids: Tensor
    embeds: Tensor | None
    mask: Tensor
    first: list[int]
    holes: bool
    past: int
    column_offset: int
    position_offset: list[int]
    positions: Tensor | None
    axes: Tensor | None
    first_forward: FirstForward | None


def check_not_empty(input_ids: Tensor) -> None:
    """Raise a ValueError for a prompt without tokens."""
    if input_ids.numel() == 0:
        raise ValueError(
            f"The prompt is empty: `input_ids` has the shape {tuple(input_ids.shape)}. Pass at least one token per "
            "row, for instance the BOS token"
        )


def unknown_token(token: int, vocab_size: int) -> ValueError:
    """The error about an id that is none of the model's."""
    return ValueError(
        f"`input_ids` holds {token}, but the model's vocabulary has the ids 0 to {vocab_size - 1}: was it tokenized "
        "for another model?"
    )


def whole_numbers(input_ids: Tensor) -> Tensor:
    """Ids as int64, the type of all new tokens. Vanilla converts the prompt when it appends the first new token."""
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(
            f"`input_ids` must hold token ids, but their dtype is {input_ids.dtype}: pass integers, for instance "
            "`input_ids.long()`, or embeddings as `inputs_embeds`"
        )
    return input_ids.long()


def read_prompt(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    cache: Cache | None,
    model_kwargs: dict[str, Any],
    vocab_size: int,
) -> Prompt:
    """Check ids, embeddings, mask, positions and cached columns, and locate the prompt's tokens.

    Args:
        cache: `None` where the model's own code reads the prompt, of whatever kind.
    """
    embeds: Tensor | None = model_kwargs.get("inputs_embeds")
    mask: Tensor | None = model_kwargs.get("attention_mask")
    position_ids: Tensor | None = model_kwargs.get("position_ids")
    past = 0 if cache is None else cached_length(cache)
    batch, width = input_ids.shape

    if embeds is not None:
        columns = embeds.shape[1]
    else:
        check_not_empty(input_ids)
        # As in `GenerationMixin._prefill`: ids as wide as the mask are the whole text, else only the new tokens.
        unknown = -1 if model.config.is_encoder_decoder else width
        known_width = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", unknown)
        columns = width if known_width == width else past + width
    if mask is not None and mask.shape != (batch, columns):
        raise ValueError(
            f"`attention_mask` has the shape {tuple(mask.shape)}, but prompt and `past_key_values` together have "
            f"{batch} rows and {columns} columns"
        )
    initialised = (layer.keys for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None)
    if past and (rows := len(next(initialised))) != batch:
        raise ValueError(f"`past_key_values` has {rows} rows, but the prompt has {batch}: they must be the same")
    if columns - past < 1:
        raise ValueError(
            f"`past_key_values` holds {past} tokens already and the prompt has {columns}: there is nothing to decode "
            "from. Pass at least one token that is not cached"
        )
    first_forward = None
    if cache is not None:
        first_forward = prepare_first_forward(model, input_ids, columns - past, cache, generation_config, model_kwargs)
    if first_forward is not None:
        position_ids = first_forward.inputs.get("position_ids")
        first_forward = first_forward if first_forward.is_needed else None
    mask = torch.ones(batch, columns, dtype=torch.bool, device=input_ids.device) if mask is None else mask.bool()
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if embeds is None and first_forward is None:
        outside &= mask[:, columns - width :]
    else:  # the ids are not fed: they may be placeholders of images, or any number beside embeddings
        outside = torch.zeros_like(outside)
    first, real, wrong = torch.stack([mask.long().argmax(dim=1), mask.sum(dim=1), outside.sum(dim=1)]).tolist()
    if 0 in real:
        raise ValueError(f"The prompt of row {real.index(0)} is empty: its `attention_mask` is all zeros")
    if any(wrong):
        raise unknown_token(int(input_ids[outside][0]), vocab_size)
    position_ids, axes = split_axes(position_ids, batch)
    position_offset, positions = _read_positions(position_ids, mask, first)
    return Prompt(
        input_ids=input_ids,
        embeds=embeds if first_forward is None else None,
        mask=mask,
        first=first,
        holes=any(f + n != columns for f, n in zip(first, real)),
        past=past,
        column_offset=columns - width,
        position_offset=position_offset,
        positions=positions if first_forward is None else None,
        axes=axes,
        first_forward=first_forward,
    )


def _read_positions(position_ids: Tensor | None, mask: Tensor, first: list[int]) -> tuple[list[int], Tensor | None]:
    """Position ids as an offset per row, and in full where an offset is not enough."""
    if position_ids is None:
        return [-f for f in first], None
    columns = torch.arange(mask.shape[1], device=mask.device)
    given = position_ids.expand(len(mask), -1)[:, -mask.shape[1] :]
    positions = torch.nn.functional.pad(given, (mask.shape[1] - given.shape[1], 0))
    offset = positions[:, -1] - (mask.shape[1] - 1)
    linear = ((positions == offset[:, None] + columns) | ~mask)[:, -given.shape[1] :].all()
    return offset.tolist(), None if linear else positions
