"""FirstForward: a prompt that is more than tokens, read in one forward as in vanilla `generate()`.

Images, audio, token types and their masks enter each model in a different way. So the model itself prepares that
forward (`prepare_inputs_for_generation`), it runs on a transformers cache, and our cache loads the entries. Later
forwards are ours again. This file also determines their inputs besides tokens: the model's own preparation shows what
vanilla would feed at the next two steps (`later.py`), and probes show whether the model reads the inputs beyond tokens,
mask and positions.
"""

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, logging

from ..cache.layers import cached_length
from ..device import model_device, row_index
from .answers import remembered
from .later import difference, equal, extra_inputs, is_usual, later_steps, only_limits_logits, prepares_inputs_itself
from .masks import looks_ahead

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class OfRow:
    """An input `[batch, 1, ...]` for each row, however many of its tokens are fed."""

    value: Tensor

    def fed(self, rows: list[int], width: int) -> Tensor:
        return self.value[row_index(rows, self.value.device)]


@dataclass(frozen=True)
class OfToken:
    """An input `[batch, 1, ...]`, repeated for each token of a row."""

    value: Tensor

    def fed(self, rows: list[int], width: int) -> Tensor:
        return self.value[row_index(rows, self.value.device)].expand(-1, width, *self.value.shape[2:]).contiguous()


class DoesNotFit(ValueError):
    """The state after a first forward does not fit our cache, which holds one entry per token.

    Attributes:
        first_forward: the forward that has run.
        output: of the model.
    """

    def __init__(self, message: str, first_forward: "FirstForward", output: ModelOutput):
        super().__init__(message)
        self.first_forward = first_forward
        self.output = output


class FirstForward:
    """The forward over a whole prompt, prepared by the model.

    Args:
        model: the target.
        input_ids: `[batch, width]`, as `generate()` passes them.
        columns: how many columns are not cached yet.
        cache: holds the columns before those.
        generation_config, model_kwargs: prepared by `generate()`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        columns: int,
        cache: Cache,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.model = model
        self.ids = input_ids
        self.config = generation_config
        self._past = cached_length(cache)
        self._columns = columns + self._past
        self.given = cache
        self.kwargs = dict(model_kwargs)
        self.cache = cache
        self.forget()
        self.inputs: dict[str, Any] = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=columns, is_first_iteration=True, **self.kwargs
        )

    def forget(self) -> None:
        """Drop the entries that `run` has cached."""
        # A given cache without entries may be of another kind; it is filled at the end.
        config = self.model.config.get_text_config(decoder=True)
        self._use(self.given if self._past else DynamicCache(config=config))

    def _use(self, cache: Cache) -> None:
        self.cache = cache
        self.kwargs["cache_params" if "cache_params" in self.kwargs else "past_key_values"] = cache

    @property
    def places_tokens_itself(self) -> bool:
        """Whether vanilla passes no position ids; the model then counts columns or uses its own rule."""
        return self.inputs.get("position_ids") is None

    @property
    def is_needed(self) -> bool:
        """Whether feeding tokens with one position each is not enough."""
        positions = self.inputs.get("position_ids")
        axes_differ = positions is not None and positions.ndim > 2 and not bool((positions == positions[:1]).all())
        withheld = self.kwargs.get("position_ids") is not None and self.places_tokens_itself
        known = bool(extra_inputs(self.inputs)) or axes_differ or withheld or looks_ahead(self.model)
        return known or not is_usual(self.model, self.ids, self._columns, self.kwargs, positions)

    def run(self, **kwargs: Any) -> ModelOutput:
        """Vanilla's first forward; the entries of its tokens are in `cache` afterwards."""
        if self._past:
            self._use(copy.deepcopy(self.given))
        return self.model._prefill(self.ids, self.config, {**self.kwargs, **kwargs})

    def later_inputs(self, output: ModelOutput) -> dict[str, Any]:
        """The additional inputs of every forward after the prompt: tensors by row, or by row and token.

        Raises:
            DoesNotFit: if the cache does not hold one entry per token, or an input is not the same at each token.
        """
        layers = [layer for layer in self.cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        for length in {int(layer.get_seq_length()) for layer in layers} - {self._columns}:
            raise self._misfit(f"caches {length} entries for {self._columns} tokens", output)
        ids, steps = later_steps(self.model, self.ids, self.kwargs, output, self._columns)
        mask, positions = self.kwargs.get("attention_mask"), self.inputs.get("position_ids")
        for i, inputs in enumerate(steps):
            if found := difference(inputs, ids[:, : self.ids.shape[1] + 1 + i], mask, positions, i):
                raise self._misfit(found, output)
        every_step: dict[str, Any] = {}
        first, second = map(extra_inputs, steps)
        for name in sorted(first.keys() | second.keys()):
            value, others = first.get(name), {k: v for k, v in first.items() if k != name}
            if not equal(value, second.get(name)):
                if self._reads(name, others, value, second.get(name)):
                    raise self._misfit(f"prepares a different `{name}` at each step", output)
            elif isinstance(value, Tensor):
                if self._reads(name, others, value, _altered(value)) or self._reads(name, others, value, None):
                    if value.shape[:2] != (len(self.ids), 1):
                        raise self._misfit(f"reads `{name}` {list(value.shape)} at every token", output)
                    every_step[name] = OfToken(value) if self._is_of_token(name, value) else OfRow(value)
            elif not self._only_limits_logits(name, others, value):
                every_step[name] = value
        return every_step

    def _misfit(self, reason: str, output: ModelOutput) -> DoesNotFit:
        return DoesNotFit(f"{type(self.model).__name__} {reason}", self, output)

    def _is_of_token(self, name: str, value: Tensor) -> bool:
        """Whether the second axis of an input is the token axis: then the prompt's input had one value per token."""
        given = self.inputs.get(name)
        return value.ndim == 2 or (isinstance(given, Tensor) and given.shape[1:2] == (self._columns,))

    def _reads(self, name: str, others: dict[str, Any], one: Any, other: Any) -> bool:
        """Whether a forward after the prompt depends on which of two values an input has. Tensors are probed once."""
        kinds = [type(value).__name__ if isinstance(value, Tensor) else repr(value) for value in (one, other)]

        def differ() -> bool:
            given = [others if value is None else {**others, name: value} for value in (one, other)]
            try:
                return not torch.equal(*map(self._logits, given))
            except Exception:  # the other value caused an error, so it was read
                return True

        return remembered(self.model, ("reads", name, *kinds), differ)

    def _only_limits_logits(self, name: str, others: dict[str, Any], value: Any) -> bool:
        """Whether the only effect of an input is that a forward returns the last token's logits alone."""

        def logits(more: dict[str, Any]) -> Tensor:
            return self._logits({**others, **more}, 2)

        question = "limits logits", name, repr(value)
        return remembered(self.model, question, lambda: only_limits_logits(logits, name, value))

    def _logits(self, inputs: dict[str, Any], width: int = 1) -> Tensor:
        """`[batch, width or less, vocab]`: logits of tokens after the prompt. Cache and inputs stay unchanged."""
        inputs = {name: value if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in inputs.items()}
        ids = self.ids.new_zeros(len(self.ids), width).to(model_device(self.model))
        cache = {"cache_params" if "cache_params" in self.kwargs else "past_key_values": copy.deepcopy(self.cache)}
        if (positions := self.inputs.get("position_ids")) is not None:
            steps = torch.arange(1, width + 1, device=positions.device)
            inputs = {**inputs, "position_ids": positions[..., -1:] + steps}
        logits: Tensor = self.model(input_ids=ids, **cache, use_cache=True, **inputs, return_dict=True).logits
        return logits


def prepare_first_forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    columns: int,
    cache: Cache,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> FirstForward | None:
    """The first forward; `None` where the prompt is only tokens with one position each."""
    if model.config.is_encoder_decoder:
        return None  # the encoder has read all inputs that are not tokens
    positions = model_kwargs.get("position_ids")
    prepares = looks_ahead(model) or prepares_inputs_itself(model)
    if not prepares and not extra_inputs(model_kwargs) and (positions is None or positions.ndim <= 2):
        return None
    return FirstForward(model, input_ids, columns, cache, generation_config, model_kwargs)


def show(draft: PreTrainedModel, inputs: dict[str, Any], batch_size: int) -> tuple[FirstForward, ModelOutput] | None:
    """Let a draft model read a whole prompt with images or audio, if it takes the same inputs as the target.

    Args:
        draft: the draft model.
        inputs: the user's inputs of the target's `generate()`, including ids and mask.
        batch_size: rows in all, including those of `num_return_sequences`.

    Returns: the forward and its output; `None` if the draft reads only the text.
    """
    takes = {*signature(draft.forward).parameters, *signature(draft.prepare_inputs_for_generation).parameters}
    if not inputs.keys() <= takes:
        return None
    try:
        ids, config, kwargs = prepared_call(draft, inputs, batch_size)
        first = FirstForward(draft, ids, ids.shape[1], DynamicCache(), config, kwargs)
        output = first.run()
        first.later_inputs(output)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning_once(
            f"{type(draft).__name__} cannot read this prompt's images or audio ({reason}): it drafts from the text only"
        )
        return None
    return None if first.places_tokens_itself else (first, output)


def prepared_call(
    model: PreTrainedModel, inputs: dict[str, Any], batch_size: int | None = None
) -> tuple[Tensor, GenerationConfig, dict[str, Any]]:
    """Run `generate()`'s preparation of a model's `inputs`: ids `[batch_size, columns]`, config, and model kwargs."""
    prepared: list[tuple[Tensor, GenerationConfig, dict[str, Any]]] = []

    def decode(model: Any, input_ids: Tensor, generation_config: GenerationConfig, **kwargs: Any) -> Tensor:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("logits_processor", "stopping_criteria")}
        prepared.append((input_ids, generation_config, kwargs))
        return input_ids

    copies = (batch_size or len(inputs["input_ids"])) // len(inputs["input_ids"])
    sampling = {"num_return_sequences": copies, "do_sample": copies > 1, "num_beams": 1, "max_new_tokens": 1}
    model.generate(**inputs, **sampling, custom_generate=decode)
    return prepared[0]


def split_axes(position_ids: Tensor | None, batch_size: int) -> tuple[Tensor | None, Tensor | None]:
    """Position ids of the first axis, `[batch, columns]`, and the offsets of all axes, `[axes, batch, 1]`."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids, None
    return position_ids[0], (position_ids[..., -1:] - position_ids[:1, :, -1:]).expand(-1, batch_size, -1)


def _altered(value: Tensor) -> Tensor:
    """A tensor of the same shape and type in which every value differs."""
    if value.dtype == torch.bool:
        return ~value
    return torch.full_like(value, float("nan")) if value.is_floating_point() else value + 1
