"""EncoderSide: the encoder's side of an encoder-decoder call, read from what `generate()` has prepared.

`generate()` has already run the target's encoder. This file chooses the encoder inputs of the target's and the draft's
decoder, runs the draft's own encoder where needed, and probes the decoders. `encoded.py` holds one decoder's inputs
during the loop.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..device import first_line, forward_parameters, model_device
from .answers import Differs, apart, ask, check_same, measured_noise, ordinary_tokens
from .encoded import PREFIX, Encoded, select
from .later import claimed_steps, difference, equal, only_limits_logits, prepares_inputs_itself

_OF_THE_DECODER = {
    "decoder_attention_mask",
    "decoder_position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}
_OF_THE_ENCODER = {"encoder_outputs", "attention_mask", "inputs_embeds"}
_PER_TOKEN = {"token_type_ids", "mm_token_type_ids", "position_ids"}


@dataclass(frozen=True)
class EncoderSide:
    """The target's encoder in one call, with enough to condition a draft on the same inputs.

    Attributes:
        outputs: of the target's encoder; tensors are `[batch, ...]`.
        mask: `[batch, columns]`, which of its inputs are real; `None` for all.
        more: other inputs that the user gave to encoder or model; `generate()` passes them on in every step.
        inputs: the encoder's main input, before rows were repeated for `num_return_sequences`; `None` if unknown.
        input_name: the name of that input.
        module: the encoder.
        batch_size: rows in all.
    """

    outputs: Any
    mask: Tensor | None
    more: dict[str, Any]
    inputs: Tensor | None
    input_name: str
    module: torch.nn.Module
    batch_size: int

    def for_target(self, target: PreTrainedModel) -> Encoded:
        """The encoder inputs of the target's forwards."""
        self._check_decoder(target, "the target", self.outputs)
        inputs = {**self.more, "encoder_outputs": self.outputs, "attention_mask": self.mask}
        encoded = Encoded(inputs, self.batch_size)
        encoded.uncounted = _uncounted_token(target, encoded.of_row(0))
        return encoded

    def for_draft(self, draft: PreTrainedModel) -> Encoded | None:
        """The encoder inputs of a draft model's forwards; `None` for a causal language model, which does not use them.

        A draft with an encoder runs it on the target's inputs, unless its encoder is the target's or a copy. A draft
        without one, whose forward takes encoder outputs, gets the target's (Distil-Whisper's decoder).
        """
        if draft.config.is_encoder_decoder:
            outputs = self.outputs if _is_copy(draft.get_encoder(), self.module) else self._encode(draft)
            self._check_decoder(draft, "`assistant_model`", outputs)
            return Encoded({"encoder_outputs": outputs, "attention_mask": self.mask}, self.batch_size)
        parameters = forward_parameters(draft)
        if "encoder_outputs" in parameters:
            inputs = {"encoder_outputs": self.outputs}
        elif "encoder_hidden_states" in parameters and getattr(draft.config, "add_cross_attention", False):
            inputs = {"encoder_hidden_states": self.outputs[0], "encoder_attention_mask": self.mask}
        else:
            return None
        given, width = self.outputs[0].shape[-1], cross_attention_width(draft)
        if given != width:
            raise ValueError(
                f"`assistant_model` ({type(draft).__name__}) attends to encoder outputs of width {width}, but the "
                f"target's encoder gives {given}: use a draft made for this encoder, or one with its own encoder"
            )
        return Encoded(inputs, self.batch_size, prefix="")

    def token_ids(self) -> Tensor | None:
        """`[batch, columns]` ids that the encoder read, -1 for padding; `None` where it did not read ids."""
        if self.inputs is None or self.inputs.is_floating_point() or self.inputs.ndim != 2:
            return None
        ids = self.inputs.repeat_interleave(self.batch_size // len(self.inputs), dim=0)
        return ids if self.mask is None else ids.masked_fill(self.mask.to(ids.device) == 0, -1)

    def _check_decoder(self, model: PreTrainedModel, role: str, outputs: Any) -> None:
        """Raise a ValueError unless a block on a filled cache gets the same logits as token by token."""
        if model.training:  # dropout makes all answers differ
            return
        given = {**self.more, "encoder_outputs": outputs, "attention_mask": self.mask}
        one_row = Encoded(given, self.batch_size).of_row(0)
        answer = ask(model, "decoder blocks", lambda seed: _try_blocks(model, one_row, seed))
        if not answer:
            raise answer.refusal(
                f"The decoder of {role} ({type(model).__name__}) {answer.reason}, so drafts cannot be verified in one "
                "forward: strategy='spec' does not support it"
            )

    def _encode(self, draft: PreTrainedModel) -> Any:
        """The outputs of the draft's own encoder for the target's inputs."""
        name, expected = type(draft).__name__, encoder_input_name(draft)
        if self.inputs is None:
            raise ValueError(
                f"`assistant_model` ({name}) has its own encoder, but `encoder_outputs` were given without the inputs "
                f"that they were made from: pass `{expected}` as well, or a draft that shares the target's encoder"
            )
        if self.input_name != expected:
            raise ValueError(
                f"`assistant_model` ({name}) encodes `{expected}`, but the target's encoder was given "
                f"`{self.input_name}`: use a draft with the same inputs"
            )
        encoder = draft.get_encoder()
        copies = self.batch_size // len(self.inputs)
        given = {**self.more, "attention_mask": self.mask}
        taken = {name: value for name, value in given.items() if name in inspect.signature(encoder.forward).parameters}
        originals = range(0, self.batch_size, copies)
        inputs = {name: select(value, originals, self.batch_size) for name, value in taken.items()}
        try:
            outputs = encoder(**inputs, **{self.input_name: self.inputs}, return_dict=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            shape, reason = list(self.inputs.shape), (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"The encoder of `assistant_model` ({name}) cannot read the target's `{expected}` of shape {shape} "
                f"({type(error).__name__}: {reason}). {_differing_inputs(encoder, self.module)}Use a draft that was "
                "made for the same inputs, or one that shares the target's encoder"
            ) from error
        rows = [row // copies for row in range(self.batch_size)]
        return outputs if copies == 1 else select(outputs, rows, len(self.inputs))


def _differing_inputs(draft: torch.nn.Module, target: torch.nn.Module) -> str:
    """A sentence that lists how two encoders' configs differ about inputs; empty if they do not."""
    mine, theirs = (vars(getattr(encoder, "config", None) or object) for encoder in (draft, target))
    names = [name for name in mine.keys() & theirs.keys() if any(part in name for part in _ABOUT_INPUTS)]
    found = [f"{name} {mine[name]} (target: {theirs[name]})" for name in sorted(names) if mine[name] != theirs[name]]
    return f"Its config has {', '.join(found)}. " if found else ""


_ABOUT_INPUTS = ("mel", "feat", "channels", "source", "image", "patch", "sampling", "vocab")  # parts of config names
_copies: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[weakref.ref[torch.nn.Module], bool]]"
_copies = weakref.WeakKeyDictionary()


def _is_copy(encoder: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two encoders have the same weights, as in Distil-Whisper and its target; compared once."""
    known = _copies.get(encoder)
    if known is None or known[0]() is not other:
        mine, theirs = encoder.state_dict(), other.state_dict()
        same = mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)
        _copies[encoder] = weakref.ref(other), same
    return _copies[encoder][1]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def _feeder(model: PreTrainedModel, encoded: Encoded) -> Callable[[list[int], Cache], Tensor]:
    """A function that feeds tokens to a decoder after the cached ones and returns their logits `[tokens, vocab]`."""

    def feed(tokens: list[int], cache: Cache) -> Tensor:
        ids = torch.tensor([tokens], device=model_device(model))
        inputs = encoded.of_row(0).join({"input_ids": ids, "past_key_values": cache, "use_cache": True}, [0])
        logits: Tensor = model(**inputs, return_dict=True).logits[0].float()
        return logits

    return feed


def _try_blocks(model: PreTrainedModel, encoded: Encoded, seed: int) -> None:
    """Raise `Differs` unless the model can verify blocks of tokens; probed with a few tokens."""
    a, b, c, d = ordinary_tokens(model, 4, seed)
    feed, begun = _feeder(model, encoded), DynamicCache()
    try:
        feed([a], begun)
        if begun.get_seq_length() != 1:
            raise Differs("does not keep the tokens it was fed in its cache")
        block, other = feed([b, c], copy.deepcopy(begun)), feed([b, d], copy.deepcopy(begun))
        steps = torch.cat([feed([b], begun), feed([c], begun)])
        whole = feed([a, b, c], DynamicCache())
    except Differs:
        raise
    except Exception as error:
        raise Differs(f"cannot be fed several tokens on a filled cache ({first_line(error)})") from error
    noise = measured_noise(model, lambda: apart(whole[1:], steps))
    check_same(model, other[:1], block[:1], 0.0, "lets a token attend to later tokens")
    check_same(model, block, steps, noise, "returns different logits for a block than token by token")


def _uncounted_token(model: PreTrainedModel, encoded: Encoded) -> int | None:
    """The padding token, if the model counts positions by the tokens of a forward that are not padding."""
    padding = model.config.get_text_config(decoder=True).pad_token_id
    if padding is None or model.training:
        return None
    answer = ask(model, "counts padding", lambda seed: _try_padding(model, encoded, int(padding), seed))
    return int(padding) if answer.compared else None


def _try_padding(model: PreTrainedModel, encoded: Encoded, padding: int, seed: int) -> None:
    """Raise `Differs` if a token has a different position when it is fed together with padding before it."""
    a, b = ordinary_tokens(model, 2, seed)
    feed, begun = _feeder(model, encoded), DynamicCache()
    feed([a], begun)
    block = feed([padding, b], copy.deepcopy(begun))
    feed([padding], begun)
    noise = measured_noise(model, lambda: 0.0)  # measured before
    check_same(model, block[1:], feed([b], begun), noise, "does not count padding")


def read_encoder(
    model: PreTrainedModel, model_kwargs: dict[str, Any], inputs: Tensor | None, batch_size: int
) -> EncoderSide:
    """The encoder's side of a prepared `generate()` call.

    Args:
        model: the target.
        model_kwargs: what `generate()` has prepared.
        inputs: the input that it gave to the encoder; ids of -100, made up, where the user gave encoder outputs.
        batch_size: rows in all.
    """
    more = {name: value for name, value in model_kwargs.items() if name not in _OF_THE_DECODER | _OF_THE_ENCODER}
    made_up = inputs is not None and not inputs.is_floating_point() and bool((inputs == -100).all())
    embeds = model_kwargs.get("inputs_embeds") is not None
    return EncoderSide(
        outputs=model_kwargs["encoder_outputs"],
        mask=model_kwargs.get("attention_mask"),
        more={name: value for name, value in more.items() if value is not None},
        inputs=None if made_up else inputs,
        input_name="inputs_embeds" if embeds else encoder_input_name(model),
        module=model.get_encoder(),
        batch_size=batch_size,
    )


def with_later_inputs(
    side: EncoderSide, model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]
) -> EncoderSide:
    """The same side, with the inputs that the decoder's own preparation adds to each forward.

    Args:
        input_ids: `[batch, columns]`, the decoder's prompt.
        model_kwargs: what `generate()` has prepared.

    Raises:
        ValueError: if they are not the same in each forward, or if it changes tokens, mask or positions.
    """
    if not prepares_inputs_itself(model):
        return side
    cache = model_kwargs["past_key_values"]
    columns = cache.get_seq_length() + input_ids.shape[1] if cache.get_seq_length() else input_ids.shape[1]
    name = type(model).__name__
    try:
        first = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        ids, steps = claimed_steps(model, input_ids, model_kwargs, columns)
    except Exception as error:
        raise ValueError(
            f"{name} could not prepare the inputs of its next steps ({first_line(error)}), so strategy='spec' does not "
            "know what to feed: drop the strategy"
        ) from error
    mask, positions = model_kwargs.get("decoder_attention_mask"), first.get("decoder_position_ids")
    for i, inputs in enumerate(steps):
        if found := difference(inputs, ids[:, : input_ids.shape[1] + 1 + i], mask, positions, i, PREFIX):
            raise ValueError(f"{name} {found}, which strategy='spec' does not support: drop the strategy")
    given = {"encoder_outputs": side.outputs, "attention_mask": side.mask, **side.more}
    usual = {*_OF_THE_DECODER, "decoder_input_ids", "inputs_embeds"}
    added = {
        key: value
        for inputs in (first, *steps)
        for key, value in inputs.items()
        if key not in usual and value is not None and not equal(value, given.get(key))
    }
    more = dict(side.more)
    for key, value in added.items():
        if not all(equal(value, inputs.get(key)) for inputs in (first, *steps)):
            raise ValueError(
                f"{name} prepares a different `{key}` at each step, which strategy='spec' does not support for "
                "encoder-decoder models: drop the strategy"
            )
        if not _only_limits_logits(model, side, key, value):
            more[key] = value
    return replace(side, more=more)


@torch.no_grad()
def _only_limits_logits(model: PreTrainedModel, side: EncoderSide, name: str, value: Any) -> bool:
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model_device(model))

    def logits(more: dict[str, Any]) -> Tensor:
        inputs = {**side.more, **more, "encoder_outputs": side.outputs, "attention_mask": side.mask}
        encoded = Encoded(inputs, side.batch_size).of_row(0)
        fed = encoded.join({"input_ids": ids, "past_key_values": DynamicCache(), "use_cache": True}, [0])
        found: Tensor = model(**fed, return_dict=True).logits
        return found

    return only_limits_logits(logits, name, value)


def decoder_kwargs(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kwargs that `generate()` has prepared for an encoder-decoder model's decoder, as for a decoder-only model."""
    for name, value in model_kwargs.items():
        own = name.startswith(PREFIX) or name in _PER_TOKEN
        if own and name not in _OF_THE_DECODER and value is not None:
            raise ValueError(
                f"The model input `{name}` is not supported by strategy='spec' yet: leave it out, or drop the strategy"
            )
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("decoder_attention_mask")
    kwargs = {name: model_kwargs[name] for name in _OF_THE_DECODER & model_kwargs.keys()}
    positions = kwargs.pop("decoder_position_ids", None)
    if positions is None and mask is not None and not bool(mask.all()):
        # Some models count real tokens, others count columns; the model decides.
        prepared = model.prepare_inputs_for_generation(
            input_ids, past_key_values=cache, decoder_attention_mask=mask, is_first_iteration=True
        )
        columns = torch.arange(mask.shape[1], device=mask.device)[None]
        positions = prepared.get("decoder_position_ids", columns)
    kwargs.pop("decoder_attention_mask", None)
    return kwargs | {
        "past_key_values": getattr(cache, "self_attention_cache", cache),
        "attention_mask": mask,
        "position_ids": positions,
    }


def encoder_input_name(model: PreTrainedModel) -> str:
    """The name under which `generate()` gives a model's encoder its main input."""
    name: str = getattr(getattr(model, "encoder", None), "main_input_name", model.main_input_name)
    return name


def cross_attention_width(model: PreTrainedModel) -> int:
    """The width of the encoder outputs that a model's decoder attends to."""
    config = model.config.get_text_config(decoder=True)
    width: int = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
    return width
