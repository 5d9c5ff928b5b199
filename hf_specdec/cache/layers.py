"""Which layer of ours stands for which layer of transformers' caches."""

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .ragged import entries
from .states import has_states, is_known, is_recurrent
from .storage import RaggedLayer
from .window import window_layers


class HybridLayer(RaggedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer that keeps a recurrent state besides its keys and values."""

    is_croppable = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def select_rows(self, index: Tensor) -> None:
        """Keep the states of these rows; keys and values are moved by `RaggedCache.activate`."""
        LinearAttentionLayer.reorder_cache(self, index)


def cache_layers(source: Cache, config: Any, rows: int, max_capacity: int, windowed: bool = True) -> list[Any]:
    """A layer for each of those that transformers makes for the model, empty.

    Args:
        source: what transformers makes of the model's config, or the user has given.
        config: the model's.
        rows: of the batch.
        max_capacity: slots that will ever be needed.
        windowed: bound layers with a window to it.

    Returns: nothing where every layer holds all keys and values and nothing else.
    """
    if has_states(source):
        return [_with_states(layer) for layer in source.layers]
    return list(window_layers(source.layers, config, rows, max_capacity)) if windowed else []


def _with_states(layer: Any) -> Any:
    if not is_known(layer) or (is_recurrent(layer) and not hasattr(layer, "keys")):
        return copy.deepcopy(layer)
    return HybridLayer(layer.number_of_states) if is_recurrent(layer) else RaggedLayer()


def cached_length(cache: Cache) -> int:
    """How many tokens a cache of transformers stands for."""
    if all(is_recurrent(layer) and not hasattr(layer, "keys") for layer in cache.layers) and cache.layers:
        if any(cache.has_previous_state(index) for index in range(len(cache.layers))):
            raise ValueError(
                "The cache passed to generate() has recurrent layers only, which do not tell how many tokens they "
                "stand for: strategy='spec' cannot continue it. Pass the whole text without a cache"
            )
        return 0
    return entries(cache)


def check_layers(cache: Cache, owner: str) -> None:
    """Raise a ValueError if rejected drafts cannot be taken out of a cache like this.

    Args:
        cache: what transformers makes of the model's config; need not have been used.
        owner: whose cache it is, for the message.
    """
    quantized = {type(layer).__name__ for layer in cache.layers if hasattr(layer, "_quantize")}
    if quantized:
        raise ValueError(
            f"The cache of {owner} has layers of type {', '.join(sorted(quantized))}, which strategy='spec' cannot "
            "roll back: what was quantized together with rejected drafts differs from what generate() alone would have"
        )
