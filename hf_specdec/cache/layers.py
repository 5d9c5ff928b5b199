"""Chooses our cache layer for each layer of a transformers cache."""

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .ragged import entries
from .states import has_states, is_known, is_recurrent
from .storage import RaggedLayer
from .window import window_layers


class HybridLayer(RaggedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with a recurrent state in addition to keys and values."""

    is_croppable = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def select_rows(self, index: Tensor) -> None:
        """Keep only the states of these rows; `RaggedCache.activate` moves keys and values."""
        LinearAttentionLayer.reorder_cache(self, index)


def cache_layers(source: Cache, config: Any, rows: int, max_capacity: int, windowed: bool = True) -> list[Any]:
    """Create an empty layer for each layer of the model's transformers cache.

    Args:
        source: the cache that transformers makes from the model's config, or the user's.
        config: the model's config.
        rows: batch size.
        max_capacity: the most slots that the call can need.
        windowed: bound layers that have a window by that window.

    Returns: an empty list if every layer holds all keys and values and nothing else.
    """
    if has_states(source):
        return [_with_states(layer) for layer in source.layers]
    return list(window_layers(source.layers, config, rows, max_capacity)) if windowed else []


def _with_states(layer: Any) -> Any:
    if not is_known(layer) or (is_recurrent(layer) and not hasattr(layer, "keys")):
        return copy.deepcopy(layer)
    return HybridLayer(layer.number_of_states) if is_recurrent(layer) else RaggedLayer()


def cached_length(cache: Cache) -> int:
    """How many tokens a transformers cache covers."""
    if all(is_recurrent(layer) and not hasattr(layer, "keys") for layer in cache.layers) and cache.layers:
        if any(cache.has_previous_state(index) for index in range(len(cache.layers))):
            raise ValueError(
                "The cache passed to generate() has only recurrent layers, which do not record how many tokens they "
                "cover, so strategy='spec' cannot continue it. Pass the whole text without a cache"
            )
        return 0
    return entries(cache)


def check_layers(cache: Cache, owner: str) -> None:
    """Raise a ValueError if this kind of cache cannot roll back rejected drafts.

    Args:
        cache: the cache that transformers makes from the model's config; it may be unused.
        owner: the model that the cache belongs to, for the message.
    """
    quantized = {type(layer).__name__ for layer in cache.layers if hasattr(layer, "_quantize")}
    if quantized:
        raise ValueError(
            f"The cache of {owner} has layers of type {', '.join(sorted(quantized))}, which strategy='spec' cannot "
            "roll back: entries quantized together with rejected drafts differ from those of generate() alone"
        )
