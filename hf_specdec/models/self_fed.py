"""SelfFedModel: a model that its own code feeds, as in vanilla `generate()`, where our cache cannot hold its state.

Most models keep keys and values for each token, or recurrent states in a transformers cache: `cached.py` runs these.
Some carry custom state from one forward to the next, under another name and in another class (RWKV's `state`), or
nothing at all (each forward reads the whole text), or more entries than tokens (an image that is not part of the text).
They only need to take several of vanilla's steps at once, from a copy of the carried state. So the model's own code
prepares each forward (`prepare_inputs_for_generation`), the forward runs on a copy, and rollback to the committed
tokens drops the copy. That costs O(context) per forward where entries are carried, and rows advance in lockstep; it
saves forwards.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from ..device import first_line, model_device, no_bookkeeping, row_index
from ..sampling.context import Context
from .answers import (
    CannotBeAsked,
    Differs,
    apart,
    ask,
    check_same,
    measured_noise,
    ordinary_tokens,
)
from .encoded import Encoded
from .graphs import StaticForwards
from .multimodal_prompt import FirstForward, prepared_call
from .target import Verified, check_logits, room_after

_BY_TOKEN = {"loss", "logits", "hidden_states", "attentions"}  # output values that are not carried on


@dataclass(frozen=True)
class _Carried:
    """The state of a model after `columns` columns. It never changes: forwards run on copies of it.

    Attributes:
        output: the last forward's output, without values by token.
        kwargs: the model kwargs that the forward was prepared from.
    """

    columns: int
    output: ModelOutput
    kwargs: dict[str, Any]

    @property
    def is_stateless(self) -> bool:
        return all(self.output.get(name) is None for name in ALL_CACHE_NAMES)


class SelfFedModel:
    """Feeds tokens of a context to a model as vanilla does, all rows together, finished ones included.

    Args:
        model: a decoder-only model.
        input_ids: `[batch, columns]`, the prompt as `generate()` passes it.
        generation_config, model_kwargs: prepared by `generate()`.
    """

    encoded: Encoded | None = None
    static: StaticForwards | None = None
    at_once: int | None = None
    has_states = True  # committed tokens may have to be fed again

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"The prompt of {type(model).__name__} is `inputs_embeds` (passed, or made by its own `generate()`), "
                "but the model carries custom state from step to step, so strategy='spec' can only read tokens: pass "
                "`input_ids`, or drop the strategy"
            )
        if any(isinstance(value, Iterator) for value in model_kwargs.values()):
            raise ValueError(
                f"{type(model).__name__} is given its input in pieces, which strategy='spec' does not support: pass "
                "all of it at once"
            )
        self.model = model
        self.device = model_device(model)
        self.no_bookkeeping = no_bookkeeping(model, self.device)
        self.held = 0  # columns, the same for all rows
        self.forwards = 0  # those whose logits were needed
        self.prefill_forwards = 0
        self._history: list[_Carried] = []  # the last one covers all held columns, unless nothing is carried
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self._text = input_ids.to(self.device)  # `[batch, columns]`, the held text
        self._prompt = input_ids
        self._config = generation_config
        self._kwargs = model_kwargs

    @classmethod
    def going_on(cls, first_forward: FirstForward, output: ModelOutput) -> "SelfFedModel":
        """Start after a first forward whose state our cache cannot hold."""
        if getattr(first_forward.given, "_is_user_defined", False):
            raise ValueError(
                "strategy='spec' cannot continue the given `past_key_values` with images or audio that are not part of "
                f"the text of {type(first_forward.model).__name__}: pass the whole prompt without it"
            )
        prepared = cls(first_forward.model, first_forward.ids, first_forward.config, first_forward.kwargs)
        prepared._begin(output)
        prepared.forwards = 1
        return prepared

    @property
    def prompt_is_unread(self) -> bool:
        return not self._history

    @property
    def has_begun(self) -> bool:
        """Whether anything is held."""
        return self.held > 0

    def forget(self, rows: list[int], counts: list[int]) -> None:
        """Never needed: all rows are fed equally many tokens."""
        raise RuntimeError("rows that advance in lockstep have different lengths: a bug in hf_specdec")

    def missing(self, context: Context) -> list[int]:
        """How many committed tokens of each active row are not held yet."""
        return [context.ends[row] - self.held for row in context.rows]

    def prompt_left(self, context: Context) -> list[int]:
        """Nothing: `read_prompt` reads the whole prompt."""
        return [0] * len(context.rows)

    def room(self, context: Context, most: int) -> list[int]:
        return room_after(self.missing(context), most)

    def read_prompt(self, **kwargs: Any) -> ModelOutput:
        """Vanilla's first forward. Returns its output, `logits` `[batch, 1, vocab]` of the last column."""
        output = self.model._prefill(self._prompt, self._config, {**self._kwargs, **kwargs})
        self._begin(output)
        self.forwards += 1
        output.logits = output.logits[:, -1:]
        return output

    def prefill(
        self, context: Context, chunk_size: int | None = None, **kwargs: Any
    ) -> list[tuple[list[int], ModelOutput]]:
        """Feed all committed tokens except the last one. An unread prompt waits for the first `forward`."""
        outputs: list[tuple[list[int], ModelOutput]] = []
        while not self.prompt_is_unread and (left := max(self.missing(context)) - 1) > 0:
            width = min(chunk_size or left, left)
            with self.no_bookkeeping():
                outputs.append(([width] * len(context.rows), self._feed(context, width, keep=1)))
            self.prefill_forwards += 1
        self.commit(context)
        return outputs

    def verify(self, context: Context, draft_tokens: Tensor, lengths: list[int], **kwargs: Any) -> Verified:
        """One forward over the uncached tokens of all rows, equally many in each, and their drafts."""
        missing = self.missing(context)
        width = max(missing) + max(lengths)
        output = self.forward(context, width, keep=width - min(missing) + 1)
        return Verified(output, [n - 1 for n in missing], [])

    def forward(self, context: Context, width: int, keep: int | None = None, ids: Tensor | None = None) -> ModelOutput:
        """Feed each active row its uncached tokens and the tokens after them, `width` in all; see `CachedModel`."""
        keep = keep or width
        self.forwards += 1
        with self.no_bookkeeping():
            output = self._feed(context, width, keep, ids)
        check_logits(self.model, output, keep)
        output.logits = output.logits[:, -keep:]
        return output

    def commit(self, context: Context) -> None:
        """Roll back to the last state that is not beyond the committed tokens, the last one excluded."""
        if self.prompt_is_unread:
            return
        held = min(self.held, *(max(context.ends[row] - 1, 0) for row in context.rows), self.held)
        if not self._history[-1].is_stateless:
            while self._history[-1].columns > held:
                self._history.pop()
            del self._history[:-1]
            held = self._history[0].columns
        self.held = held
        at = self._history[-1]
        if at.is_stateless and held > at.columns:  # else `_next` would repeat all columns in each forward
            self._history = [_Carried(held, at.output, self._next(at, held - at.columns))]

    def release(self) -> None:
        """Nothing to do: nothing is kept for the next call."""

    def hand_back(self, context: Context, width: int) -> Any:
        """The cache or state that vanilla would return: it covers all columns except the last."""
        context.rows = list(range(context.batch_size))
        context.ends = [width] * context.batch_size
        self.prefill(context)
        kwargs = self._next(self._history[-1], 1)
        return next((kwargs[name] for name in ALL_CACHE_NAMES if name in kwargs), None)

    def _feed(self, context: Context, width: int, keep: int, ids: Tensor | None = None) -> ModelOutput:
        rows, begin = context.rows, self.held
        if self.prompt_is_unread:
            output = self.read_prompt()
            self.forwards -= 1
            begin, width = self.held, width - self.held
        if width:
            new = context.tokens[:, begin : begin + width].to(self.device, copy=True)
            if ids is not None:
                new[row_index(rows, self.device)] = ids.to(self.device)
            new = new.clamp(0, self._vocab_size - 1)
            self._text = torch.cat([self._text[:, :begin], new], dim=1)
            before = self._history[-1]
            output, after = self._step(before, self._text, width, keep)
            if not before.is_stateless:
                self._history.append(after)
            self.held = begin + width
        if rows != list(range(len(self._text))):
            output.logits = output.logits[row_index(rows, output.logits.device)]
        return output

    def _begin(self, output: ModelOutput) -> None:
        columns = self._prompt.shape[1]
        self._history = [_Carried(columns, _carried(output), self._kwargs)]
        self.held = columns
        self._check()

    def _next(self, carried: _Carried, width: int) -> dict[str, Any]:
        """The model kwargs from which vanilla prepares a forward over `width` more tokens, with a copy of the state."""
        kwargs, output = dict(carried.kwargs), _rebuilt(carried.output, copy.deepcopy)
        for _ in range(width):
            kwargs = self.model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=False)
        return kwargs

    def _step(self, carried: _Carried, text: Tensor, width: int, keep: int) -> tuple[ModelOutput, _Carried]:
        """Vanilla's next forward, over the last `width` columns of `text`. `carried` stays as it is."""
        kwargs = self._next(carried, text.shape[1] - carried.columns)
        inputs = self.model.prepare_inputs_for_generation(text, next_sequence_length=width, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = keep
        output = self.model(**inputs, return_dict=True)
        return output, _Carried(text.shape[1], _carried(output), kwargs)

    def _check(self) -> None:
        """Raise a ValueError unless a block of tokens, fed from a copy, gets the same logits as token by token."""
        if self.model.training:
            return  # dropout makes all answers differ
        mask, start = self._kwargs.get("attention_mask"), self._history[-1]
        windows = [w for w in _windows(start.output) if start.columns + w < self._config.max_length]
        padded = mask is not None and not bool(mask.all())
        given = frozenset(name for name, value in self._kwargs.items() if value is not None)
        window = max(windows, default=0)
        with self.no_bookkeeping():
            question = ("feeds itself", given, len(self._prompt) > 1, padded, window)
            answer = ask(self.model, question, lambda seed: self._rehearse(start, window, seed))
        if not answer:
            name = type(self.model).__name__
            raise answer.refusal(f"{name} {answer.reason}, so strategy='spec' cannot be used with it here")

    def _rehearse(self, start: _Carried, window: int, seed: int) -> None:
        """Raise `Differs` if the model cannot verify blocks of tokens; probed with a few tokens.

        Args:
            window: probed again after so many tokens, unless 0.
        """
        try:
            self._compare(start, self._text, seed)
            if window:
                text = self._text.repeat(1, window // self._text.shape[1] + 2)[:, : start.columns + window]
                self._compare(self._step(start, text, window, 1)[1], text, seed, f" beyond a window of {window}")
        except Differs:
            raise
        except Exception as error:  # a model may fail in any way where it was not made for this: the answer is no
            raise Differs(f"cannot be fed several tokens after a text ({first_line(error)})") from error

    def _compare(self, start: _Carried, text: Tensor, seed: int, where: str = "") -> None:
        """The same for three tokens after `text`, whose state is `start`."""
        columns = [(seed + i) % text.shape[1] for i in (-1, 0, -1)]
        text = torch.cat([text, text[:, columns]], dim=1)
        ends = [start.columns + 1 + i for i in range(3)]
        steps, at = [], start
        for end in ends:
            output, after = self._step(at, text[:, :end], 1, 1)
            at = at if start.is_stateless else after
            steps.append(output.logits[:, -1:])
        expected = torch.cat(steps, dim=1)
        if not expected.isfinite().all():
            raise CannotBeAsked("its logits are not finite")  # the choice of tokens raises an error about it
        noise = self._noise()
        again = self._step(start, text[:, : ends[0]], 1, 1)[0].logits[:, -1:]
        hidden = "keeps state outside its outputs, so rejected drafts cannot be rolled back"
        check_same(self.model, again, steps[0], noise, hidden + where)
        block = self._step(start, text, 3, 3)[0].logits[:, -3:]
        if block.shape != expected.shape:
            raise Differs(f"returns logits for {block.shape[1]} of 3 tokens{where}")
        differing = "returns different logits for a block than token by token"
        check_same(self.model, block, expected, noise, differing + where)

    def _noise(self) -> float | None:
        """The model's rounding: texts in one forward, compared with the same texts step by step; `None` if unknown."""
        with contextlib.suppress(Exception):  # models that read more than text
            return measured_noise(self.model, self._measure)
        return None

    def _measure(self) -> float:
        tokens = torch.tensor([ordinary_tokens(self.model, 12, 0)], device=self.device)
        at_once, steps, at = [], [], None
        for end in range(8, 13):
            ids, config, kwargs = prepared_call(self.model, {"input_ids": tokens[:, :end]})
            output = self.model._prefill(ids, config, kwargs)
            if at is None:
                at = _Carried(end, _carried(output), kwargs)
                continue
            at_once.append(output.logits[:, -1:])
            output, after = self._step(at, tokens[:, :end], 1, 1)
            at = at if at.is_stateless else after
            steps.append(output.logits[:, -1:])
        return apart(torch.cat(steps, dim=1), torch.cat(at_once, dim=1))


def _windows(output: ModelOutput) -> set[int]:
    """The sliding windows of the cache layers in an output."""
    layers = [layer for value in output.values() for layer in getattr(value, "layers", ())]
    return {layer.sliding_window for layer in layers if getattr(layer, "sliding_window", None)}


def _carried(output: ModelOutput) -> ModelOutput:
    return _rebuilt(output, lambda value: value, without=_BY_TOKEN)


def _rebuilt(output: ModelOutput, change: Callable[[Any], Any], without: Set[str] = frozenset()) -> ModelOutput:
    """An output of the same class, without some values and with the others changed."""
    return type(output)(**{name: change(value) for name, value in output.items() if name not in without})
