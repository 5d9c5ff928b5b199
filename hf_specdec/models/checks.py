"""Errors for targets and drafts that cannot be used, each with the observed reason."""

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

# Implementations whose masks come from transformers, aligned with the end of the keys for a block on a filled cache.
_ALIGNED = {"sdpa", "eager", "flex_attention"}


def check_target(model: PreTrainedModel, rows: int) -> None:
    """Raise a ValueError that names what is missing, unless `model` can verify blocks of drafts.

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
        return  # random logits cannot be probed
    implementation: str = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in _ALIGNED:
        answer = Abilities.of(model).cached_blocks()
        if not answer:
            raise answer.refusal(
                f"With the attention implementation {implementation!r}, {type(model).__name__} returns different "
                "logits for a block on a filled cache than token by token (its causal mask must be aligned with the "
                f"end of the keys), so drafts cannot be verified ({answer.reason}): use "
                "`attn_implementation='sdpa'` or 'eager'"
            )
    if _is_quantized(model) and model.dtype == torch.float32:
        answer = Abilities.of(model).independent_tokens()
        if not answer:
            raise answer.refusal(
                f"The quantization of {type(model).__name__} makes a token's logits depend on the tokens fed with it "
                f"(activations are scaled over the whole input; {answer.reason}), so verified drafts would not be "
                "vanilla's tokens: quantize weights only, or activations token by token, or drop strategy='spec'. The "
                "model can still be a draft"
            )


def check_config(model: PreTrainedModel, owner: str) -> None:
    """Raise a ValueError if no cache can be made from the config of an encoder-decoder model.

    Args:
        owner: the model's role, for the message.
    """
    if not model.config.is_encoder_decoder:
        return
    try:
        DynamicCache(config=model.config.get_text_config(decoder=True))
    except AttributeError as error:
        raise ValueError(
            f"strategy='spec' cannot be used with {owner} ({type(model).__name__}): its config names no decoder layers "
            f"with a key-value cache ({first_line(error)}). Drop the strategy"
        ) from error


def check_states(model: PreTrainedModel, cache: Cache, owner: str) -> None:
    """Raise a ValueError if a model has recurrent states that cannot follow drafts.

    Args:
        cache: the cache that transformers makes from the model's config.
        owner: the model's role, for the message.
    """
    if not has_states(cache):
        return
    answer = Abilities.of(model).states()
    if answer:
        return
    if not answer.compared:
        reason = "fails on rejected drafts"
    elif Abilities.of(model).states(at_once=1):
        reason = "does not continue a recurrent state over several tokens, so drafts cannot be verified in one forward"
    else:
        reason = "keeps state outside the transformers cache, so rejected drafts cannot be rolled back"
    raise answer.refusal(
        f"strategy='spec' cannot be used with {owner}: the code of {type(model).__name__} {reason} ({answer.reason})"
    )


def check_blocks(model: PreTrainedModel, cache: Cache, max_length: int) -> None:
    """Raise a ValueError if the model's code returns different logits for a block than token by token.

    Probed with a few tokens, and again beyond each window that the config names but the cache does not have, if the
    text may get there.

    Args:
        cache: the cache that transformers makes from the model's config.
        max_length: the most tokens that the text may reach.
    """
    if model.training or model.config.is_encoder_decoder or has_states(cache):
        return  # random, or probed elsewhere
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
                f"strategy='spec' cannot be used beyond {window} tokens here: which part of a longer text "
                f"{type(model).__name__} attends to depends on how many tokens it is fed at once ({answer.reason}). "
                f"Set a `max_length` of at most {window}"
            )
        raise answer.refusal(
            f"{type(model).__name__} {answer.reason}, so drafts cannot be verified in one forward: drop strategy='spec'"
        )


def _within_window(cache: Cache, max_length: int) -> int | None:
    """The cache's window, if the call stays within it but probes would exceed it; else `None`.

    Lengths that the call cannot reach are not probed.
    """
    held = min(filter(None, (getattr(layer, "sliding_window", None) for layer in cache.layers)), default=LONGEST)
    return held if max_length <= held < LONGEST else None


def check_padded_blocks(model: PreTrainedModel, cache: Cache, max_length: int) -> None:
    """Raise a ValueError if left-padded rows get different logits for a block than token by token.

    For models whose rows advance in lockstep, padding included.
    """
    answer = Abilities.of(model).padded_blocks(_within_window(cache, max_length))
    if not answer:
        raise answer.refusal(
            f"{type(model).__name__} {answer.reason}, so drafts of a padded batch cannot be verified in one forward: "
            "pass prompts of equal lengths, or one at a time, or drop strategy='spec'"
        )


def check_windows(model: PreTrainedModel, columns: int) -> None:
    """Raise a ValueError if, within `columns`, transformers drops entries that the model's masks would still show.

    Such a model attends to its whole prompt in the first forward, but only to a window from later tokens.
    """
    for size, answer in Abilities.of(model).windows(columns):
        if not answer:
            raise answer.refusal(
                f"The cache of transformers keeps a window of {size} tokens for {type(model).__name__} (see its "
                "config), but the model's own masks have no window: in generate(), the prompt then attends to all of "
                "itself and later tokens to a part of it, which strategy='spec' cannot do. Remove the window from the "
                f"config if it is not intended, or stay within {size} tokens"
            )


def _check_prepared_inputs(model: PreTrainedModel) -> None:
    # Prompt and prefix tuning add virtual tokens before the prompt in this method, which our loop does not call.
    own = vars(model).get("prepare_inputs_for_generation")
    if own is not None and getattr(own, "__self__", model) is not model:
        raise ValueError(
            f"The inputs of {type(model).__name__} are prepared by {type(own.__self__).__name__} (as for prompt and "
            "prefix tuning), which strategy='spec' does not support: use an adapter that changes weights, such as "
            "LoRA, or drop strategy='spec'"
        )


def _check_adapters(model: PreTrainedModel, rows: int) -> None:
    """Raise a ValueError for adapters that depend on the index of a row or token in a forward: our forwards differ."""
    if not hasattr(model, "peft_config"):
        return
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            given = hook.keywords if isinstance(hook, functools.partial) else {}
            if given.get("alora_offsets") is not None or (given.get("adapter_names") is not None and rows > 1):
                name = "alora_offsets" if given.get("alora_offsets") is not None else "adapter_names"
                raise ValueError(
                    f"`{name}` chooses adapters by the index of rows or tokens in a forward, which strategy='spec' "
                    "changes: generate with one adapter at a time (`set_adapter`), or drop the strategy"
                )


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether some weights are not plain tensors: transformers' quantizers, packed layers, tensor subclasses."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or any(hasattr(module, "_packed_params") for module in model.modules())
        or any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters())
    )


def check_mode(model: PreTrainedModel, role: str, variable: str) -> None:
    """Raise a ValueError if a model's settings make its forwards fail or keep no cache; warn if they make them slow.

    Args:
        role: the model's role in the call, for messages.
        variable: the variable that stands for it in example code.
    """
    _check_checkpointing(model, role, variable)
    _check_return_dict(model, role, variable)
    hidden = hidden_parameters(model)
    if hidden:
        signature = ", ".join(map(str, forward_parameters(model).values()))
        logger.warning_once(
            f"strategy='spec' is slow with {role} ({type(model).__name__}), because its `forward({signature})` does "
            f"not name {', '.join(f'`{name}`' for name in hidden)}. If it is a wrapper that passes them on, decorate "
            "it with `functools.wraps(wrapped_function)`, or set its `__signature__`."
        )


def _check_checkpointing(model: PreTrainedModel, role: str, variable: str) -> None:
    """As transformers' `GradientCheckpointingLayer` decides; in older code, the module around the layers decides."""
    decoder = model.get_decoder()
    switches = [(name, module) for name, module in decoder.named_modules() if hasattr(module, "gradient_checkpointing")]
    layers = [(name, module) for name, module in switches if isinstance(module, GradientCheckpointingLayer)]
    for name, module in layers or switches:
        keeps_cache = getattr(module, "_can_checkpoint_with_cache", False)
        if module.gradient_checkpointing and module.training and not keeps_cache:
            where = f"`{name}` in the decoder of {role}" if name else f"the decoder of {role}"
            raise ValueError(
                f"Gradient checkpointing is on and {where} ({type(model).__name__}) is in train mode. Then "
                "transformers keeps no key-value cache, but strategy='spec' needs one: call "
                f"`{variable}.gradient_checkpointing_disable()`, or `{variable}.eval()`, before `generate()`"
            )


def _check_return_dict(model: PreTrainedModel, role: str, variable: str) -> None:
    """Some modeling files read their submodules' outputs by attribute name, which fails on tuples."""
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
    """The draft model itself; for an adapter's wrapper, the model inside, whose layers hold the adapter.

    The wrapper's `forward` names fewer inputs than the model takes, and no position ids.

    Raises:
        TypeError: for a training wrapper, which prepares forwards for training and has no `generate()`.
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
            f"`assistant_model` ({type(draft).__name__}) needs virtual tokens before the prompt (prompt or prefix "
            "tuning), which strategy='spec' does not feed: pass a draft whose adapter changes weights, such as LoRA"
        )
    return draft.get_base_model()
