"""What a model can do: what a target must be able to do for its drafts to be verified, and what rows may do together.

Nothing here knows a kind of model, adapter or kernel by name. What cannot be read off is asked of the model itself,
with a few tokens (`probes.py`), and remembered (`answers.py`).
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..cache.layers import cache_layers
from ..cache.states import has_states, rows_are_independent
from ..cache.window import Window, WindowLayer
from ..device import first_line, forward_parameters, hidden_parameters, model_device
from .answers import Answer, CannotBeAsked, Differs, ask, check_same, ordinary_tokens
from .masks import follows_masks, takes_masks
from .probes import LONGEST, Vanilla, compare_beside_longer_rows, compare_padded_blocks, rehearse

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
        answer = ask(model, "continues a cache", lambda seed: _continue_a_cache(model))
        if not answer:
            raise answer.refusal(
                f"With the attention implementation {implementation!r}, {type(model).__name__} gives several tokens on "
                "a filled cache other logits than one after the other (its causal mask must be aligned with the end of "
                f"the keys), so drafts cannot be verified ({answer.reason}): use `attn_implementation='sdpa'` or "
                "'eager'"
            )
    if _is_quantized(model) and model.dtype == torch.float32:
        answer = ask(model, "tokens are independent", lambda seed: _compare_beside_others(model))
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


def needs_own_code(model: PreTrainedModel) -> bool:
    """Whether our cache cannot stand for what a decoder-only model carries from one forward to the next."""
    return is_fed_by_itself(model) or not keeps_a_cache(model)


def keeps_a_cache(model: PreTrainedModel) -> bool:
    """Whether a model that is given a cache of transformers returns it; asked with two tokens."""
    return bool(model.config.is_encoder_decoder or ask(model, "keeps a cache", lambda seed: _keep_a_cache(model, seed)))


def is_fed_by_itself(model: PreTrainedModel) -> bool:
    """The same as far as signature and config tell it; nothing is run."""
    if model.config.is_encoder_decoder:
        return False
    if not {"past_key_values", "cache_params"} & forward_parameters(model).keys():
        return True
    if not model._supports_default_dynamic_cache():
        return True
    try:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    except AttributeError:  # a config without layers
        return True
    return any(hasattr(layer, "set_prefill_length") for layer in cache.layers)  # prompts are kept apart


def _keep_a_cache(model: PreTrainedModel, seed: int) -> None:
    """A model that is given a cache of transformers returns one, not a tuple of its own making."""
    vanilla = Vanilla(model)
    try:
        output = vanilla.output(vanilla.ids(ordinary_tokens(model, 2, seed)), vanilla.cache())
    except Exception as error:
        raise CannotBeAsked(f"{type(model).__name__} must be fed more than text") from error
    carried = [output.get(name) for name in ("past_key_values", "cache_params")]
    found = [type(value).__name__ for value in carried if value is not None and not isinstance(value, Cache)]
    if found:
        raise Differs(f"returns a {found[0]} in place of the cache that it was given")


def decodes_ragged_rows(model: PreTrainedModel, drafts: bool = False) -> bool:
    """Whether the model can decode rows of different lengths together; as a draft its tokens need not be vanilla's."""
    return bool(ragged_rows(model, drafts))


def ragged_rows(model: PreTrainedModel, drafts: bool = False) -> Answer:
    """The same with the reason, where it cannot.

    Args:
        drafts: its tokens need not be vanilla's.
    """
    if needs_own_code(model):
        return Answer("carries something of its own from step to step")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not has_states(cache):
        if not follows_masks(model, drafts):
            return Answer("cannot be told positions and masks by row")
        together = ask(model, ("rows", drafts), lambda seed: rehearse(model, rows=3, drafts=drafts, seed=seed))
        return together and ask(model, "longer rows", lambda seed: compare_beside_longer_rows(model, seed))
    if any(hasattr(layer, "keys") for layer in cache.layers) and not takes_masks(model):
        return Answer("cannot be told masks by row")
    if not rows_are_independent(cache):
        return Answer("has a cache in which no row goes back without the others")
    return ask(model, "rows", lambda seed: rehearse(model, rows=2, seed=seed))


def continues_states(model: PreTrainedModel, at_once: int | None = None) -> Answer:
    """Whether states go on and can go back.

    Args:
        at_once: over how many tokens a state must go on in one forward; `None` for as many as there are.
    """
    return ask(model, ("states", at_once), lambda seed: rehearse(model, at_once=at_once, seed=seed))


def check_states(model: PreTrainedModel, cache: Cache, owner: str) -> None:
    """Raise a ValueError if a model has states that cannot follow what is drafted.

    Args:
        cache: what transformers makes of the model's config.
        owner: who that is, for the message.
    """
    if not has_states(cache):
        return
    answer = continues_states(model)
    if answer:
        return
    if not answer.compared:
        reason = "cannot be led through rejected drafts"
    elif continues_states(model, at_once=1):
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
        answer = ask(model, ("blocks", past, longest), functools.partial(_rehearse, model, past, longest))
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


def _rehearse(model: PreTrainedModel, past: int, longest: int | None, seed: int) -> None:
    rehearse(model, past=past, longest=longest, seed=seed)


def _within_window(cache: Cache, max_length: int) -> int | None:
    """The window of a cache that a call stays within, where probes would not: what it does not come to is not asked."""
    held = min(filter(None, (getattr(layer, "sliding_window", None) for layer in cache.layers)), default=LONGEST)
    return held if max_length <= held < LONGEST else None


def check_padded_blocks(model: PreTrainedModel, cache: Cache, max_length: int) -> None:
    """Raise a ValueError if blocks of rows that are padded on the left get other logits than token by token.

    Asked of models whose rows advance together, padding included.
    """
    longest = _within_window(cache, max_length)
    answer = ask(model, ("padded blocks", longest), functools.partial(compare_padded_blocks, model, longest))
    if not answer:
        raise answer.refusal(
            f"{type(model).__name__} {answer.reason}, so that drafts of a padded batch cannot be verified in one "
            "forward: pass prompts of equal lengths, or one at a time, or drop strategy='spec'"
        )


def unexplained_windows(model: PreTrainedModel, cache: Cache, max_length: int) -> list[int]:
    """Windows that the config names and no layer of the cache knows of, which a text of `max_length` may leave.

    Only the model's own code knows what they mean, and for rows of different lengths it may go by the longest one.

    Args:
        cache: what transformers makes of the model's config.
    """
    config = model.config.get_text_config(decoder=True)
    layers = [*cache.layers, *DynamicCache(config=config).layers]  # static ones do not tell their windows
    explained = {getattr(layer, "sliding_window", None) for layer in layers}
    if getattr(config, "layer_types", None) is not None:
        explained.add(getattr(config, "sliding_window", None))  # the types say which layers have it
    named = [value for name, value in vars(config).items() if "window" in name and "layer" not in name]
    sizes = {size for value in named for size in (value if isinstance(value, (list, tuple)) else [value])}
    return sorted(size for size in sizes - explained if type(size) is int and 0 < size < max_length)


def check_windows(model: PreTrainedModel, columns: int) -> None:
    """Raise a ValueError if transformers drops entries that the model's masks would still show, within `columns`.

    Such a model attends to all of its prompt, but to a window from any later token.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    layers = cache_layers(cache, model.config, 1, columns)
    for window in {layer.window for layer in layers if isinstance(layer, WindowLayer)}:
        if window.size >= columns:
            continue
        answer = ask(model, ("window", window.size), functools.partial(_probe_window, model, layers, window))
        if not answer:
            raise answer.refusal(
                f"The cache of transformers keeps a window of {window.size} tokens for {type(model).__name__} (see its "
                "config), but the model's own masks know of no window: generate() then shows the prompt whole to "
                "itself and a part of it to later tokens, which strategy='spec' cannot do. Take the window out of the "
                f"config if it is not meant, or stay within {window.size} tokens"
            )


class _PastWindow(Cache):
    """Claims as many entries as a window has slots: all are zero but the values of the first one, in its layers."""

    def __init__(self, layers: list[Any], window: Window, mark: float):
        super().__init__(layers=layers)
        self._window = window
        self._mark = mark

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past = [s.new_zeros(*s.shape[:2], self._window.size, s.shape[3]) for s in (key_states, value_states)]
        if getattr(self.layers[layer_idx], "window", None) is self._window:
            past[1][:, :, 0] = self._mark
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window.size

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._window.size

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._window.size + query_length, 0


def _probe_window(model: PreTrainedModel, layers: list[Any], window: Window, _seed: int) -> None:
    """A token does not see the one that is a whole window before it, when the model makes the masks."""
    token = torch.tensor([[1]], device=model_device(model))
    kwargs = {"position_ids": token} if "position_ids" in forward_parameters(model) else {}
    try:
        blank, marked = (
            model(input_ids=token, past_key_values=_PastWindow(layers, window, mark), return_dict=True, **kwargs).logits
            for mark in (0.0, 100.0)
        )
    except Exception as error:  # not made for this, which says nothing about windows
        raise CannotBeAsked(f"{type(model).__name__} does not run on a pretended cache") from error
    if not torch.equal(blank, marked):
        raise Differs("lets a token see another that is a whole window before it")


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


def _continue_a_cache(model: PreTrainedModel) -> None:
    """The second of two tokens after a cached one gets the logits that it gets when all are fed at once."""
    vanilla = Vanilla(model)
    first, *more = ordinary_tokens(model, 3, seed=0)
    got = vanilla.continued([first], more)
    check_same(model, got[-1:], vanilla.continued([first, *more], [])[-1:], None, "masks blocks otherwise")


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether some weights are no plain tensors: of transformers' quantizers, packed layers, tensor subclasses."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or any(hasattr(module, "_packed_params") for module in model.modules())
        or any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters())
    )


def _compare_beside_others(model: PreTrainedModel) -> None:
    """A token alone gets the logits that it gets with others after it."""
    vanilla = Vanilla(model)
    text = ordinary_tokens(model, 8, seed=0)
    alone, beside = vanilla.continued(text[:1], [])[0], vanilla.continued(text, [])[0]
    if not (beside - alone).abs().max() <= 1e-3 * alone.std():
        raise Differs("gives a token other logits with seven tokens after it than alone")


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
