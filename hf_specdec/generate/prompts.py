"""The prompts of `generate_many`: what users may pass, one after another, and the `generate()` call of each.

Owns how an iterable becomes prompts, and asks `generate()` to prepare a call for each; nothing is decoded here.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria

from ..device import forward_parameters
from ..drafters import Drafter
from ..models.sharding import gathered
from ..options import Options
from ..sampling.processors import fits_any_prompt
from ..sampling.pure import is_pure
from .method import HandOver, SpeculativeMethod
from .session import PreparedCall


@dataclass
class Entry:
    """One text to generate.

    Attributes:
        index: of the prompt in the iterable.
        number: of the text: with `num_return_sequences`, a prompt has several.
        sample: its number among those of the prompt.
        prompt: token ids; empty if there is an `error`.
        max_new_tokens: of this prompt; `None` if all have the same.
        error: why there is no such prompt.
    """

    index: int
    number: int
    sample: int
    prompt: list[int]
    max_new_tokens: int | None = None
    error: Exception | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"prompt {self.index}"


def read_entries(prompts: Iterable[Any], tokenizer: Any, max_new_tokens: Any, copies: int) -> Iterator[Entry]:
    """The texts to generate, in order; a prompt is taken from the iterable when its first text is asked for.

    Args:
        max_new_tokens: an iterable of one per prompt; anything else is none of ours.
        copies: how many texts each prompt gets.
    """
    limits = chain(max_new_tokens, repeat(_MISSING)) if per_prompt(max_new_tokens) else repeat(None)
    for index, (prompt, limit) in enumerate(zip(prompts, limits)):
        entry = Entry(index, index * copies, 0, [])
        try:
            entry.max_new_tokens = _checked_limit(limit)
            entry.prompt = token_ids(prompt, tokenizer)
        except Exception as error:  # a tokenizer may raise anything
            entry.error = error
        for copy in range(copies if entry.error is None else 1):
            yield replace(entry, number=index * copies + copy, sample=copy)


_MISSING = object()


def per_prompt(value: Any) -> bool:
    """Whether an option has a value for each prompt."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def is_whole(value: Any) -> bool:
    """Whether a value is an int, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked_limit(limit: Any) -> int | None:
    if limit is _MISSING:
        raise ValueError("`max_new_tokens` has a value for each prompt, but no more for this one")
    if limit is not None and (not is_whole(limit) or limit < 1):
        raise ValueError(f"`max_new_tokens` must be an int of at least 1 for each prompt, got {limit!r}")
    return None if limit is None else int(limit)


def token_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """A prompt as token ids.

    Raises:
        TypeError, ValueError: if it is none.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TypeError("A prompt is a string: pass the model's tokenizer as `tokenizer`, or token ids")
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(
                "A prompt must be a 1-D tensor of token ids, without padding, got "
                f"{str(prompt.dtype).removeprefix('torch.')} {list(prompt.shape)}"
            )
        return [int(token) for token in prompt.tolist()]
    if (isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))) or hasattr(prompt, "__array__"):
        found = list(prompt)
        wrong = next((token for token in found if not is_whole(token)), None)
        if wrong is None:
            return [int(token) for token in found]
        raise TypeError(f"A prompt must be a list of token ids, got one with {wrong!r} of type {type(wrong).__name__}")
    raise TypeError(f"A prompt must be a list of token ids, a 1-D tensor or a string, got {type(prompt).__name__}")


class Preparation:
    """Lets `generate()` prepare the call of each prompt, as for that prompt alone.

    Args:
        model: has a `generate()` of transformers; it may be a wrapper around such a model.
        assistant_model: as for `generate()`; asked for once.
        options: the call's other arguments.

    Attributes:
        call: that of a prompt of one token, which is never decoded.
        drafter, resolved: of all prompts.
        together: the models that several processes compute together.

    Raises:
        TypeError, ValueError: where no prompt could be decoded with these arguments.
    """

    def __init__(self, model: Any, assistant_model: Any, options: dict[str, Any]):
        self.model = model
        self.assistant_model = assistant_model
        self.options = options
        chosen = {} if assistant_model is None else {"assistant_model": assistant_model}
        self.call, method = self._prepare([0], options | chosen)
        if gathered(self.call.model, assistant_model, options.get("synced_gpus")):
            raise ValueError(
                "generate_many() cannot be used where all ranks gather weights in each forward (FSDP, ZeRO-3, "
                "`synced_gpus`): call `generate()` for batches, equally often on all ranks"
            )
        self.drafter: Drafter
        self.resolved: Options
        self.drafter, self.resolved, self.together = method.decide(self.call)

    @property
    def copies(self) -> int:
        """How many texts each prompt gets."""
        return int(self.call.config.num_return_sequences or 1)

    @functools.cached_property
    def _repeats(self) -> bool:
        """Whether all calls are like `call`, but for prompt and `max_new_tokens`: `generate()` takes milliseconds."""
        call = self.call
        lasting = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)
        return (
            not call.model.config.is_encoder_decoder
            and all(map(fits_any_prompt, call.processors))
            and all(type(criterion) in lasting or is_pure(criterion) for criterion in call.criteria)
        )

    def of(self, entry: Entry) -> PreparedCall:
        """The call of one text, of one row."""
        new_tokens = entry.max_new_tokens or self.call.config.max_new_tokens
        if self._repeats and new_tokens is not None and entry.prompt:
            ids = torch.tensor([entry.prompt], dtype=torch.int64).to(self.call.input_ids.device, non_blocking=True)
            end = MaxLengthCriteria(len(entry.prompt) + new_tokens, self._max_positions)
            criteria = [end if type(c) is MaxLengthCriteria else c for c in self.call.criteria]
            return replace(self.call, input_ids=ids, criteria=StoppingCriteriaList(criteria))
        own = {} if entry.max_new_tokens is None else {"max_new_tokens": entry.max_new_tokens}
        return self._prepare(entry.prompt, self.options | {"num_return_sequences": 1} | own)[0]

    @property
    def _max_positions(self) -> int | None:
        found = [c.max_position_embeddings for c in self.call.criteria if type(c) is MaxLengthCriteria]
        return found[0] if found else None

    def _prepare(self, prompt: list[int], options: dict[str, Any]) -> tuple[PreparedCall, SpeculativeMethod]:
        taken: list[tuple[PreparedCall, SpeculativeMethod]] = []
        ids = torch.tensor([prompt], dtype=torch.int64, device=next(self.model.parameters()).device)
        mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in forward_parameters(self.model) else {}
        take = HandOver(lambda call, method: taken.append((call, method)))
        self.model.generate(ids, **mask, **options, custom_generate=take)
        return taken[0]
