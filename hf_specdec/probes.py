"""What a model can do with rows of different lengths and with states, asked of the model itself, once.

Not every modeling file can continue a state over several tokens, and some keep state where no cache holds it. So the
model is led through what decoding does to it - a prompt, drafts that are rejected, pending tokens - and its logits must
then be those that it gives the same tokens at once.
"""

import weakref

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import RaggedCache
from .context import Context
from .forward import CachedModel
from .host import forward_parameters, model_device
from .layers import cache_layers
from .masks import takes_masks, takes_ragged_rows
from .states import has_states, rows_are_independent

# model -> (attention implementation, rows, at_once) -> whether it does
_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int, int | None], bool]]"
_known = weakref.WeakKeyDictionary()


def decodes_ragged_rows(model: PreTrainedModel, drafts: bool = False) -> bool:
    """Whether the model can decode rows of different lengths together; as a draft its tokens need not be vanilla's."""
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
    tolerance = 2 * torch.finfo(got.dtype).eps ** 0.5
    return bool((got - expected).abs().max() < tolerance * expected.std())
