"""What a model can do with rows of different lengths, states and windows, asked of the model itself, once.

Not every modeling file can continue a state over several tokens, and some keep state where no cache holds it. So the
model is led through what decoding does to it - a prompt, drafts that are rejected, pending tokens - and its logits must
then be those that it gives the same tokens at once.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import RaggedCache
from .context import Context
from .forward import CachedModel
from .host import forward_parameters, model_device
from .layers import cache_layers, carries_its_own
from .masks import takes_masks, takes_ragged_rows
from .states import has_states, rows_are_independent
from .window import Window

# model -> (attention implementation, rows, at_once) -> whether it does
_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int, int | None], bool]]"
_known = weakref.WeakKeyDictionary()


def decodes_ragged_rows(model: PreTrainedModel, drafts: bool = False) -> bool:
    """Whether the model can decode rows of different lengths together; as a draft its tokens need not be vanilla's."""
    if carries_its_own(model):
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not has_states(cache):
        return takes_ragged_rows(model, drafts)
    if any(hasattr(layer, "keys") for layer in cache.layers) and not takes_masks(model):
        return False
    return rows_are_independent(cache) and continues_states(model, rows=2)


def continues_states(model: PreTrainedModel, rows: int = 1, at_once: int | None = None) -> bool:
    """Whether states go on and can go back.

    Args:
        rows: with two of them, these have different lengths.
        at_once: over how many tokens a state must go on in one forward; `None` for as many as there are.
    """
    known = _known.setdefault(model, {})
    question = (model.config.get_text_config(decoder=True)._attn_implementation, rows, at_once)
    if question not in known:
        known[question] = _probe(model, rows, at_once)
    return known[question]


def check_states(model: PreTrainedModel, cache: Cache, owner: str) -> None:
    """Raise a ValueError if a model has states that cannot follow what is drafted.

    Args:
        cache: what transformers makes of the model's config.
        owner: who that is, for the message.
    """
    if not has_states(cache) or continues_states(model):
        return
    if continues_states(model, at_once=1):
        reason = (
            "does not continue a recurrent state over several tokens, so that drafts cannot be verified in one forward"
        )
    else:
        reason = (
            "keeps state where no cache of transformers holds it, so that rejected drafts cannot be taken out again"
        )
    raise ValueError(f"strategy='spec' cannot be used with {owner}: the code of {type(model).__name__} {reason}")


def check_windows(model: PreTrainedModel, columns: int) -> None:
    """Raise a ValueError if transformers drops entries that the model's masks would still show, within `columns`.

    Such a model attends to all of its prompt, but to a window from any later token.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    layers = cache_layers(cache, model.config, 1, columns)
    for window in {layer.window for layer in layers if getattr(layer, "window", None) is not None}:
        known = _follows_window.setdefault(model, {})
        if window.size >= columns:
            continue
        if window.size not in known:
            known[window.size] = _probe_window(model, layers, window)
        if not known[window.size]:
            raise ValueError(
                f"The cache of transformers keeps a window of {window.size} tokens for {type(model).__name__} (see its "
                "config), but the model's own masks know of no window: generate() then shows the prompt whole to "
                "itself and a part of it to later tokens, which strategy='spec' cannot do. Take the window out of the "
                f"config if it is not meant, or stay within {window.size} tokens"
            )


_follows_window: "weakref.WeakKeyDictionary[PreTrainedModel, dict[int, bool]]" = weakref.WeakKeyDictionary()


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
        if self.layers[layer_idx].window is self._window:
            past[1][:, :, 0] = self._mark
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window.size

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._window.size

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._window.size + query_length, 0


@torch.no_grad()
def _probe_window(model: PreTrainedModel, layers: list[Any], window: Window) -> bool:
    """Whether a token does not see the one that is a whole window before it, when the model makes the masks."""
    token = torch.tensor([[1]], device=model_device(model))
    kwargs = {"position_ids": token} if "position_ids" in forward_parameters(model) else {}
    try:
        blank, marked = (
            model(input_ids=token, past_key_values=_PastWindow(layers, window, mark), return_dict=True, **kwargs).logits
            for mark in (0.0, 100.0)
        )
    except Exception:  # not made for this, which says nothing about windows
        return True
    return torch.equal(blank, marked)


@torch.no_grad()
def _probe(model: PreTrainedModel, rows: int, at_once: int | None) -> bool:
    prompt = torch.tensor([[1, 2, 3, 4, 4, 1, 3, 2], [0, 3, 2, 1, 1, 4, 2, 3]][:rows], device=model_device(model))
    drafts = torch.tensor([[2, 1, 4], [4, 1, 2]][:rows], device=model_device(model))
    try:
        context = Context(prompt, [0, 1][:rows], max_length=20, pad_token_id=0)
        cached = make_cached_model(model, context)
        cached.at_once = at_once
        cached.prefill(context)
        context.write_drafts(drafts)
        cached.forward(context, at_once or 4)  # rejected: one row gets one token of its own, the other two
        context.clear_drafts()
        for own in ([[3], [3, 4]], [[2], [1]]):  # behind the second of these, one row stands for more tokens
            for row in range(rows):
                context.append(row, own[row])
            cached.commit(context)
            if at_once is not None:
                cached.prefill(context)
            missing = cached.missing(context)
            logits = cached.forward(context, max(missing)).logits
            for row, pending in enumerate(missing):
                if not is_close(logits[row, pending - 1], _at_once(model, context.row(row)[None])):
                    return False
    except Exception:  # whatever a model does that was not made for this: it cannot do it
        return False
    return True


def make_cached_model(model: PreTrainedModel, context: Context) -> CachedModel:
    """A model with an empty cache, for prompts that may be padded on the left."""
    like: Cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    layers = cache_layers(like, model.config, context.batch_size, context.max_length)
    cache = RaggedCache(context.batch_size, model_device(model), context.max_length, context.max_length, layers)
    columns = torch.arange(context.prompt_width, device=model_device(model))
    padding = columns >= torch.tensor(context.first, device=model_device(model))[:, None]
    padded = max(context.first) > 0
    return CachedModel(
        model,
        cache,
        first=[0] * context.batch_size,
        padding_mask=padding if padded else None,
        position_offset=[-first for first in context.first],
    )


def _at_once(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    kwargs = {"use_cache": False} if "use_cache" in forward_parameters(model) else {}
    return model(input_ids=tokens, return_dict=True, **kwargs).logits[0, -1]


def is_close(got: Tensor, expected: Tensor) -> bool:
    """Whether rounding explains the difference."""
    tolerance = 1e-4 if torch.finfo(got.dtype).eps < 1e-6 else 0.1  # of deep models in half precision
    return bool((got - expected).abs().max() <= tolerance * expected.std())
