"""Errors for targets and drafts that cannot be used here, each with the reason that was seen."""

import functools
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..cache.states import has_states
from ..device import first_line, forward_parameters, hidden_parameters
from .abilities import Abilities, unexplained_windows
from .answers import ordinary_tokens
from .probes import LONGEST, Vanilla

logger = logging.get_logger(__name__)

# Whose masks come from transformers: with these, several tokens on a filled cache are seen to end where the cache ends.
_ALIGNED = {"sdpa", "eager", "flex_attention"}


def check_target(model: PreTrainedModel, rows: int) -> None:
    """Raise a ValueError, naming what is missing, unless blocks of drafts can be verified by `model`.

    Args:
        rows: of the prompt.
    """
    check_mode(model, "the model", "model")
    check_config(model, "the model")
    _check_prepared_inputs(model)
    _check_adapters(model, rows)
    if model.training:
        logger.warning_once(
            f"{type(model).__name__} is in training mode: with dropout its tokens are random, speculating or not. "
            "Call `eval()` on it."
        )
        return  # what is random cannot be probed
    implementation: str = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in _ALIGNED:
        answer = Abilities.of(model).cached_blocks()
        if not answer:
            raise answer.refusal(
                f"With the attention implementation {implementation!r}, {type(model).__name__} gives several tokens on "
                "a filled cache other logits than one after the other (its causal mask must be aligned with the end of "
                f"the keys), so drafts cannot be verified ({answer.reason}): use `attn_implementation='sdpa'` or "
                "'eager'"
            )
    if _is_quantized(model) and model.dtype == torch.float32:
        answer = Abilities.of(model).independent_tokens()
        if not answer:
            raise answer.refusal(
                f"{type(model).__name__} is quantized such that a token's logits depend on the tokens fed with it "
                f"(activations are scaled over the whole input; {answer.reason}), so that verified drafts would not be "
                "vanilla's tokens: quantize weights only, or activations token by token, or drop strategy='spec'. As a "
                "draft it can be used"
            )


def check_config(model: PreTrainedModel, owner: str) -> None:
    """Raise a ValueError if the config of an encoder-decoder model makes no cache for its decoder.

    Args:
        owner: who that is, for the message.
    """
    if not model.config.is_encoder_decoder:
        return
    try:
        DynamicCache(config=model.config.get_text_config(decoder=True))
    except AttributeError as error:
        raise ValueError(
            f"strategy='spec' cannot be used with {owner} ({type(model).__name__}): its config names no layers of a "
            f"decoder with a key-value cache ({first_line(error)}). Drop the strategy"
        ) from error


def check_states(model: PreTrainedModel, cache: Cache, owner: str) -> None:
    """Raise a ValueError if a model has states that cannot follow what is drafted.

    Args:
        cache: what transformers makes of the model's config.
        owner: who that is, for the message.
    """
    if not has_states(cache):
        return
    answer = Abilities.of(model).states()
    if answer:
        return
    if not answer.compared:
        reason = "cannot be led through rejected drafts"
    elif Abilities.of(model).states(at_once=1):
        reason = (
            "does not continue a recurrent state over several tokens, so that drafts cannot be verified in one forward"
        )
    else:
        reason = (
            "keeps state where no cache of transformers holds it, so that rejected drafts cannot be taken out again"
        )
    raise answer.refusal(
        f"strategy='spec' cannot be used with {owner}: the code of {type(model).__name__} {reason} ({answer.reason})"
    )


def check_blocks(model: PreTrainedModel, cache: Cache, max_length: int) -> None:
    """Raise a ValueError if the model's own code gives several tokens other logits than one after the other.

    Asked with a few tokens; and once more beyond a window that the config names, but that is none of the cache, when
    the text may get there.

    Args:
        cache: what transformers makes of the model's config.
        max_length: tokens that the text may have in the end.
    """
    if model.training or model.config.is_encoder_decoder or has_states(cache):
        return  # random, or asked elsewhere
    windows = unexplained_windows(model, cache, max_length)
    longest = _within_window(cache, max_length)
    longest = min((size for size in (longest, *windows) if size is not None), default=None)
    for window in (0, *windows):
        past, longest = (window + 2, None) if window else (0, longest)
        answer = Abilities.of(model).blocks(past, longest)
        if answer:
            continue
        if window:
            raise answer.refusal(
                f"strategy='spec' cannot be used beyond {window} tokens here: what {type(model).__name__} sees of a "
                f"longer text depends on how many tokens it is fed at once ({answer.reason}). Set a `max_length` of at "
                f"most {window}"
            )
        raise answer.refusal(
            f"{type(model).__name__} {answer.reason}, so that drafts cannot be verified in one forward: drop "
            "strategy='spec'"
        )


def _within_window(cache: Cache, max_length: int) -> int | None:
    """The window of a cache that a call stays within, where probes would not: what it does not come to is not asked."""
    held = min(filter(None, (getattr(layer, "sliding_window", None) for layer in cache.layers)), default=LONGEST)
    return held if max_length <= held < LONGEST else None


def check_padded_blocks(model: PreTrainedModel, cache: Cache, max_length: int) -> None:
    """Raise a ValueError if blocks of rows that are padded on the left get other logits than token by token.

    Asked of models whose rows advance together, padding included.
    """
    answer = Abilities.of(model).padded_blocks(_within_window(cache, max_length))
    if not answer:
        raise answer.refusal(
            f"{type(model).__name__} {answer.reason}, so that drafts of a padded batch cannot be verified in one "
            "forward: pass prompts of equal lengths, or one at a time, or drop strategy='spec'"
        )


def check_windows(model: PreTrainedModel, columns: int) -> None:
    """Raise a ValueError if transformers drops entries that the model's masks would still show, within `columns`.

    Such a model attends to all of its prompt, but to a window from any later token.
    """
    for size, answer in Abilities.of(model).windows(columns):
        if not answer:
            raise answer.refusal(
                f"The cache of transformers keeps a window of {size} tokens for {type(model).__name__} (see its "
                "config), but the model's own masks know of no window: generate() then shows the prompt whole to "
                "itself and a part of it to later tokens, which strategy='spec' cannot do. Take the window out of the "
                f"config if it is not meant, or stay within {size} tokens"
            )


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


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether some weights are no plain tensors: of transformers' quantizers, packed layers, tensor subclasses."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or any(hasattr(module, "_packed_params") for module in model.modules())
        or any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters())
    )


def check_mode(model: PreTrainedModel, role: str, variable: str) -> None:
    """Raise a ValueError if a model is set such that its forwards keep no cache, or fail; say what makes them slow.

    Args:
        role: what the model is in the call, for messages.
        variable: how a user would write it in code.
    """
    _check_checkpointing(model, role, variable)
    _check_return_dict(model, role, variable)
    hidden = hidden_parameters(model)
    if hidden:
        signature = ", ".join(map(str, forward_parameters(model).values()))
        logger.warning_once(
            f"strategy='spec' is slow with {role} ({type(model).__name__}), because its `forward({signature})` does "
            f"not name {', '.join(f'`{name}`' for name in hidden)}. If it is a wrapper that passes them on, decorate "
            "it with `functools.wraps` of the function that it wraps, or set its `__signature__`."
        )


def _check_checkpointing(model: PreTrainedModel, role: str, variable: str) -> None:
    """As `GradientCheckpointingLayer` of transformers decides it; in older code it is the module around the layers."""
    decoder = model.get_decoder()
    switches = [(name, module) for name, module in decoder.named_modules() if hasattr(module, "gradient_checkpointing")]
    layers = [(name, module) for name, module in switches if isinstance(module, GradientCheckpointingLayer)]
    for name, module in layers or switches:
        keeps_cache = getattr(module, "_can_checkpoint_with_cache", False)
        if module.gradient_checkpointing and module.training and not keeps_cache:
            where = f"`{name}` in the decoder of {role}" if name else f"the decoder of {role}"
            raise ValueError(
                f"Gradient checkpointing is on and {where} ({type(model).__name__}) is in train mode, in which "
                "transformers then keeps no key-value cache, but strategy='spec' needs it: call "
                f"`{variable}.gradient_checkpointing_disable()`, or `{variable}.eval()`, before `generate()`"
            )


def _check_return_dict(model: PreTrainedModel, role: str, variable: str) -> None:
    """Some modeling files read outputs of their own parts by name, which tuples do not have."""
    configs = {
        "config": model.config,
        "config.get_text_config(decoder=True)": model.config.get_text_config(decoder=True),
    }
    name = next((name for name, config in configs.items() if getattr(config, "return_dict", True) is False), None)
    if name is None:
        return
    try:
        Vanilla(model).continued(ordinary_tokens(model, 1, seed=0), [])
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"`{variable}.{name}.return_dict` is False, and {role} ({type(model).__name__}) fails with it "
            f"({type(error).__name__}: {error}): set it to True"
        ) from error


def unwrapped(draft: Any) -> Any:
    """The model that drafts: of an adapter's wrapper the model inside, whose layers hold the adapter.

    The wrapper's `forward` names fewer inputs than the model takes, positions not among them.

    Raises:
        TypeError: for the wrapper of a trainer, which prepares forwards for training and has no `generate()`.
    """
    inside = getattr(draft, "module", None)
    if not isinstance(draft, PreTrainedModel) and isinstance(inside, PreTrainedModel):
        raise TypeError(
            f"`assistant_model` is a {type(draft).__name__} around a {type(inside).__name__}: pass the model inside, "
            "`assistant_model=model.module`"
        )
    if not hasattr(draft, "get_base_model"):
        return draft
    if getattr(getattr(draft, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"`assistant_model` ({type(draft).__name__}) needs virtual tokens in front of the prompt (prompt or prefix "
            "tuning), which strategy='spec' does not feed: pass a draft whose adapter changes weights, such as LoRA"
        )
    return draft.get_base_model()
