"""What a target must be able to do for its drafts to be verified in blocks: asked of the model itself, or refused.

Nothing here knows a kind of model, adapter or kernel by name; what cannot be read off is tried once, with a few tokens.
"""

import functools
import weakref
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from .host import model_device
from .masks import probe_inputs, takes_position_ids
from .probes import is_close
from .sharding import OwnLayersCache
from .states import has_states

logger = logging.get_logger(__name__)

# Whose masks come from transformers: with these, several tokens on a filled cache are seen to end where the cache ends.
_ALIGNED = {"sdpa", "eager", "flex_attention"}
# model -> the attention implementations with which its probes were passed
_passed: "weakref.WeakKeyDictionary[PreTrainedModel, set[str]]" = weakref.WeakKeyDictionary()

# model -> (attention implementation, tokens of a window, or 0) -> whether it takes several tokens at once
_blocks: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int], bool]]" = weakref.WeakKeyDictionary()


def check_target(model: PreTrainedModel, rows: int) -> None:
    """Raise a ValueError, naming what is missing, unless blocks of drafts can be verified by `model`.

    Args:
        rows: of the prompt.
    """
    _check_prepared_inputs(model)
    _check_adapters(model, rows)
    if model.training:
        logger.warning_once(
            f"{type(model).__name__} is in training mode: with dropout its tokens are random, speculating or not. "
            "Call `eval()` on it."
        )
        return  # what is random cannot be probed
    implementation: str = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation in _passed.setdefault(model, set()):
        return
    if implementation not in _ALIGNED and not _continues_a_cache(model):
        raise ValueError(
            f"With the attention implementation {implementation!r}, {type(model).__name__} gives several tokens on a "
            "filled cache other logits than one after the other (its causal mask must be aligned with the end of the "
            "keys), so drafts cannot be verified: use `attn_implementation='sdpa'` or 'eager'"
        )
    if _is_quantized(model) and model.dtype == torch.float32 and not _tokens_are_independent(model):
        raise ValueError(
            f"{type(model).__name__} is quantized such that a token's logits depend on the tokens fed with it "
            "(activations are scaled over the whole input), so that verified drafts would not be vanilla's tokens: "
            "quantize weights only, or activations token by token, or drop strategy='spec'. As a draft it can be used"
        )
    _passed[model].add(implementation)


def check_blocks(model: PreTrainedModel, cache: Cache, max_length: int) -> None:
    """Raise a ValueError if the model's own code gives several tokens other logits than one after the other.

    Asked with a few tokens and a cache of transformers; and once more beyond a window that the config names, but that
    is none of the cache, when the text may get there.

    Args:
        cache: what transformers makes of the model's config.
        max_length: tokens that the text may have in the end.
    """
    if model.training or model.config.is_encoder_decoder or has_states(cache):
        return  # random, or asked elsewhere
    known = _blocks.setdefault(model, {})
    for window in (0, *_unexplained_windows(model, cache, max_length)):
        question = (model.config.get_text_config(decoder=True)._attn_implementation, window)
        if question not in known:
            known[question] = _takes_blocks(model, window + 2)
        if not known[question] and window:
            raise ValueError(
                f"strategy='spec' cannot be used beyond {window} tokens here: what {type(model).__name__} sees of a "
                f"longer text depends on how many tokens it is fed at once. Set a `max_length` of at most {window}"
            )
        if not known[question]:
            raise ValueError(
                f"{type(model).__name__} gives several tokens on a filled cache other logits than one after the other, "
                "so that drafts cannot be verified in one forward: drop strategy='spec'"
            )


def _unexplained_windows(model: PreTrainedModel, cache: Cache, max_length: int) -> list[int]:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None) is not None:
        return []
    values = {value for name, value in vars(config).items() if "window" in name and type(value) is int}
    values -= {getattr(layer, "sliding_window", None) for layer in cache.layers}
    return sorted(value for value in values if 0 < value < max_length)


def _takes_blocks(model: PreTrainedModel, before: int) -> bool:
    """Whether three tokens behind `before` cached ones get at once the logits that they get one after the other."""
    ids = torch.tensor([[1, 2, 3, 4, 4, 1, 3]], device=model_device(model)).repeat(1, before // 7 + 1)[:, : before + 3]
    positions = torch.arange(before + 3, device=ids.device)[None] if takes_position_ids(model) else None

    def last_logits(*ends: int) -> tuple[torch.Tensor, int]:
        cache, start, logits = OwnLayersCache(config=model.config.get_text_config(decoder=True)), 0, []
        for end in ends:
            places = None if positions is None else positions[:, start:end]
            logits.append(_logits(model, ids[:, start:end], cache, places))
            start = end
        return torch.cat(logits[1:], dim=1), cache.get_seq_length()

    try:
        _logits(model, ids)
    except Exception:
        return True  # it must be fed more than text: it cannot be asked
    try:
        expected, _ = last_logits(before, before + 1, before + 2, before + 3)
        at_once, entries = last_logits(before, before + 3)
    except Exception:  # whatever a model does that was not made for this: it cannot do it
        return False
    if not expected.isfinite().all():
        return True  # whose weights they are is told where its tokens are chosen
    if entries != before + 3:
        return False  # only one entry per token can be rolled back
    # Generously: reduced precision (TF32, say) must not refuse a model that can.
    share = 0.02 if expected.dtype == torch.float32 else 0.2
    return bool((at_once - expected).abs().max() < share * expected.std())


def _check_prepared_inputs(model: PreTrainedModel) -> None:
    # Prompt and prefix tuning put virtual tokens in front of the prompt in there; this loop does not call it.
    own = vars(model).get("prepare_inputs_for_generation")
    if own is not None and getattr(own, "__self__", model) is not model:
        raise ValueError(
            f"The inputs of {type(model).__name__} are prepared by {type(own.__self__).__name__} (as for prompt and "
            "prefix tuning), which strategy='spec' does not support: use an adapter that changes weights, such as "
            "LoRA, or drop strategy='spec'"
        )


def _check_adapters(model: PreTrainedModel, rows: int) -> None:
    """Refuse adapters that go by the place of a row in the batch, or of a token in the forward: ours are others."""
    if not hasattr(model, "peft_config"):
        return
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            given = hook.keywords if isinstance(hook, functools.partial) else {}
            if given.get("alora_offsets") is not None or (given.get("adapter_names") is not None and rows > 1):
                name = "alora_offsets" if given.get("alora_offsets") is not None else "adapter_names"
                raise ValueError(
                    f"`{name}` tells adapters apart by where rows and tokens stand in a forward, which strategy='spec' "
                    "changes: generate with one adapter at a time (`set_adapter`), or drop the strategy"
                )


def _logits(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None, positions: torch.Tensor | None = None
) -> torch.Tensor:
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    given = {**probe_inputs(model), name: ids}
    if cache is not None:
        given |= {"past_key_values": cache, "use_cache": True}
    if positions is not None:
        given["position_ids"] = positions
    with torch.no_grad():
        return model(**given).logits


def _continues_a_cache(model: PreTrainedModel) -> bool:
    """Whether the second of two tokens behind a cached one gets the logits that it gets when all are fed at once."""
    ids = torch.tensor([[1, 2, 3]], device=model_device(model))
    config = model.config.get_text_config(decoder=True)
    cache: Cache = OwnLayersCache(config=config)
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    _logits(model, ids[:, :1], cache)
    return is_close(_logits(model, ids[:, 1:], cache)[:, -1], _logits(model, ids)[:, -1])


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether some weights are no plain tensors: of transformers' quantizers, packed layers, tensor subclasses."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or any(hasattr(module, "_packed_params") for module in model.modules())
        or any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters())
    )


def _tokens_are_independent(model: PreTrainedModel) -> bool:
    ids = torch.arange(1, 9, device=model_device(model))[None]
    alone, beside = _logits(model, ids[:, :1])[:, 0], _logits(model, ids)[:, 0]
    return bool((beside - alone).abs().max() < 1e-3 * alone.std())


def unwrapped(draft: Any) -> Any:
    """The model that drafts: of an adapter's wrapper the model inside, whose layers hold the adapter.

    The wrapper's `forward` names fewer inputs than the model takes, positions not among them.
    """
    if not hasattr(draft, "get_base_model"):
        return draft
    if getattr(getattr(draft, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"`assistant_model` ({type(draft).__name__}) needs virtual tokens in front of the prompt (prompt or prefix "
            "tuning), which strategy='spec' does not feed: pass a draft whose adapter changes weights, such as LoRA"
        )
    return draft.get_base_model()
