"""The inputs that vanilla would feed at the steps after a prompt, compared with those of our own forwards.

A model may override how it prepares inputs (`prepare_inputs_for_generation`) and which values it carries from step to
step (`_update_model_kwargs_for_generation`). Both are called for two steps, and all results are compared: names,
scalars, tensors, positions. Two steps distinguish constants from values that change with each token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

# The inputs of our own forwards. All other inputs belong to the prompt or are specific to the model.
KNOWN_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_params",
    "inputs_embeds",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def prepares_inputs_itself(model: PreTrainedModel) -> bool:
    """Whether the model overrides the methods that prepare or carry on the inputs of a step."""
    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    return any(getattr(getattr(model, n), "__func__", None) is not getattr(GenerationMixin, n) for n in names)


def extra_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs beyond `KNOWN_INPUTS`; `None` and empty dicts, which some are without an image, are left out."""
    return {
        name: value
        for name, value in inputs.items()
        if name not in KNOWN_INPUTS and value is not None and not (isinstance(value, dict) and not value)
    }


@dataclass
class _Output(ModelOutput):
    """The output of a forward over the prompt, as far as later steps are prepared from it."""

    logits: Any = None
    past_key_values: Any = None
    cache_params: Any = None


class _Claimed(DynamicCache):
    """A stand-in for a filled cache: it is empty but reports `columns` as its length."""

    def __init__(self, config: Any, columns: int):
        super().__init__(config=config.get_text_config(decoder=True))
        self.columns = columns

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.columns

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return True


def later_steps(
    model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any], output: ModelOutput, columns: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The inputs that vanilla would feed at the next two steps. No forward is run.

    Args:
        ids: `[batch, width]`, the prompt as `generate()` passes it.
        kwargs: the model kwargs that `generate()` has prepared; not changed.
        output: the output of the forward over the prompt.
        columns: in the cache after that forward.

    Returns: `[batch, width + 2]` ids, and the inputs of each step.
    """
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    kwargs, steps = dict(kwargs), []
    for step in range(2):
        if step:
            output = _holding(model, output, columns + step)
        kwargs = model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=is_encoder_decoder)
        ids = torch.nn.functional.pad(ids, (0, 1), value=int(ids[0, -1]) if ids.numel() else 0)
        steps.append(model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs))
    return ids, steps


def _holding(model: PreTrainedModel, output: ModelOutput, columns: int) -> ModelOutput:
    """The output of a step whose forward was not run, with a cache that claims to hold `columns`."""
    changed = {}
    for name in ("past_key_values", "cache_params"):
        if isinstance(cache := output.get(name), Cache):
            claimed: Cache = _Claimed(model.config, columns)
            if isinstance(cache, EncoderDecoderCache):
                claimed = EncoderDecoderCache(claimed, cache.cross_attention_cache)
            changed[name] = claimed
    return type(output)(**{**output, **changed})


def claimed_steps(
    model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any], columns: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The same before any forward, with a stand-in for the prompt's cache."""
    name = "cache_params" if "cache_params" in kwargs else "past_key_values"
    given = kwargs.get(name)
    like = given if isinstance(given, Cache) else DynamicCache()
    output = _holding(model, _Output(**{name: like}), columns)
    return later_steps(model, ids, {**kwargs, name: output[name]}, output, columns)


def difference(
    inputs: dict[str, Any], ids: Tensor, mask: Tensor | None, positions: Tensor | None, step: int, prefix: str = ""
) -> str:
    """How a step's usual inputs differ from those of our forwards, as a verb phrase; empty if they do not.

    Args:
        inputs: of vanilla, for the last token of `ids`.
        mask: `[batch, columns]` of the prompt, `None` if all columns are real.
        positions: `[..., columns]` of the prompt, `None` if the model receives none.
        step: 0 for the first step after the prompt.
        prefix: of the names of ids, mask and positions.
    """
    fed = inputs.get(prefix + "input_ids")
    if fed is None or fed.shape != (len(ids), 1) or not torch.equal(fed.to(ids.device), ids[:, -1:]):
        return "makes its own inputs from each token"
    if not inputs.get("use_cache", True):
        return "runs without its cache"
    if all(inputs.get(name) is None for name in ("past_key_values", "cache_params")):
        return "drops its cache"
    given = inputs.get(prefix + "attention_mask")
    if not _is_continued(given, mask, len(ids), 1 + step):
        return "changes the attention mask at each step"
    given = inputs.get(prefix + "position_ids")
    if (given is None) != (positions is None):
        return "receives position ids at some steps only"
    if given is not None and positions is not None:
        expected = positions[..., -1:].to(given.device) + 1 + step
        if given.shape[-1] != 1 or given.ndim != expected.ndim or not bool((given == expected).all()):
            return "computes its own position ids at each step"
    return ""


def _is_continued(given: Any, mask: Tensor | None, rows: int, new: int) -> bool:
    """Whether a given mask is the prompt's with `new` real tokens after it; `None` means that all are real."""
    if given is None:
        return mask is None or bool(mask.all())
    if not isinstance(given, Tensor) or given.ndim != 2 or len(given) != rows:
        return False
    known = given.new_ones(rows, given.shape[1] - new) if mask is None else mask.to(given)
    return given.shape[1] == known.shape[1] + new and torch.equal(
        given, torch.nn.functional.pad(known, (0, new), value=1)
    )


def is_usual(
    model: PreTrainedModel, ids: Tensor, columns: int, kwargs: dict[str, Any], positions: Tensor | None
) -> bool:
    """Whether, at the two steps after a prompt, vanilla feeds only a token, its position and the mask.

    A model whose code needs more from a first forward than a cache is not usual.

    Args:
        ids: `[batch, width]`, as `generate()` passes them.
        columns: of the prompt, including the cached ones.
        kwargs: the model kwargs that `generate()` has prepared.
        positions: the prompt's position ids, as the model receives them.
    """
    if not prepares_inputs_itself(model):
        return True  # transformers' own code does just that
    try:
        more, steps = claimed_steps(model, ids, kwargs, columns)
    except Exception:  # it needs something that only a real forward leaves
        return False
    mask = kwargs.get("attention_mask")
    if "cache_params" in kwargs:  # recurrent layers only: masks are for prompts
        mask, steps = None, [{**step, "attention_mask": None} for step in steps]
    found = [difference(step, more[:, : ids.shape[1] + 1 + i], mask, positions, i) for i, step in enumerate(steps)]
    return not any(found) and not any(map(extra_inputs, steps))


def equal(a: Any, b: Any) -> bool:
    """Whether two inputs of any type are the same."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def only_limits_logits(logits: Callable[[dict[str, Any]], Tensor], name: str, value: Any) -> bool:
    """Whether the only effect of an input is that a forward returns the last token's logits alone.

    Args:
        logits: runs a forward over two tokens with these extra inputs and returns `[batch, 2 or 1, vocab]`.
    """
    try:
        limited = logits({name: value})
        every = limited if limited.shape[1] > 1 else logits({})
    except Exception:  # it cannot take two tokens, or requires the input
        return False
    return every is not limited and every.shape[1] == 2 and torch.equal(every[:, -1:], limited)
