"""Caches that users create and pass as `past_key_values`: which of them can be exchanged with ours.

Their entries are copied before decoding and returned after it (see `generate/session.py`). That is right for caches
that only store entries. Others would have changed vanilla's tokens, so they raise an error that names them.
"""

from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

# Methods that process entries or decide masks. `Cache` delegates them to the layers.
_PROTOCOL = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset")
_LAYER_PROTOCOL = ("update", "get_mask_sizes", "update_conv_state", "update_recurrent_state")


def check_user_cache(cache: Any, model: PreTrainedModel, max_length: int) -> None:
    """Raise a ValueError unless vanilla would only store entries in this cache and read them back.

    Args:
        cache: as given; objects that are not caches, and caches made by `generate()` itself, are checked elsewhere.
        model: the target.
        max_length: the most tokens per row that the call can reach.
    """
    if not getattr(cache, "_is_user_defined", False):
        return
    name = type(cache).__name__
    cache = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder model's other cache does not grow
    if not isinstance(cache, Cache):
        return
    if any(hasattr(layer, "_quantize") for layer in cache.layers):
        raise ValueError(
            f"`past_key_values` is a {name}, which strategy='spec' cannot roll back: how it rounds an entry depends on "
            "all entries written with it, including rejected drafts, so the tokens would differ from vanilla's. Pass a "
            "DynamicCache"
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            f"`past_key_values` is a {name} with `offloading`, but strategy='spec' keeps keys and values on the "
            "model's device: pass one without offloading if memory allows, or drop strategy='spec'"
        )
    replicated = getattr(cache, "layer_class_to_replicate", None)
    layer_types = {type(layer) for layer in cache.layers} | ({replicated} if replicated else set())
    own = [f"{name}.{method}" for method in _PROTOCOL if getattr(type(cache), method) is not getattr(Cache, method)]
    own += [
        f"{kind.__name__}.{method}" for kind in layer_types for method in _LAYER_PROTOCOL if _is_foreign(kind, method)
    ]
    if own:
        raise ValueError(
            f"`past_key_values` is a {name} with its own methods ({', '.join(sorted(own))}): strategy='spec' cannot "
            "know what it stores, so it cannot replace it while decoding. Pass a DynamicCache or a StaticCache"
        )
    _check_windows(cache, name, model, max_length)


def _is_foreign(layer_type: type, method: str) -> bool:
    function = getattr(layer_type, method, None)
    return function is not None and not function.__module__.startswith("transformers.")


def _check_windows(cache: Cache, name: str, model: PreTrainedModel, max_length: int) -> None:
    """Raise a ValueError if a layer keeps fewer tokens than the model's own cache would."""
    model_layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    for index, (layer, expected) in enumerate(zip(cache.layers, model_layers)):
        if not getattr(layer, "is_sliding", False):
            continue
        kept = getattr(layer, "sliding_window", None) or layer.max_cache_len
        needed = min(getattr(expected, "sliding_window", max_length), max_length)
        if kept < needed:
            raise ValueError(
                f"Layer {index} of `past_key_values` ({name}) keeps only the last {kept} tokens, but the model attends "
                f"to {needed}: create it from the model's config, for {max_length} tokens"
            )
