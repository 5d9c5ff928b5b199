"""A conversation with a target: what was said, and the target's cache, which is used from turn to turn.

Owns the messages and which part of the cache a prompt can use. Knows nothing about terminals.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ..cache.states import has_states
from ..device import model_device
from ..models.abilities import Abilities
from ..models.rope import positions_of
from ..pairs.pair import SpecPair
from ..records.stats import Iteration, RowStep, SpeculationStats
from ..records.trace import Trace
from .texts import prompt_ids

INTERRUPTED = "interrupted"
Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        prompt: token ids of the conversation up to the answer.
        limit: the most tokens that the answer could have had.
        reused: how many tokens of the prompt the target's cache already held.
        answer: token ids of the answer.
        text: the answer, without special tokens.
        seconds: wall time, without compiling, capturing and packing, which happen once.
        finished: why the answer ended, as in `RowStep`, or "interrupted".
        stats: what speculation did.
    """

    prompt: list[int]
    limit: int
    reused: int
    answer: list[int]
    text: str
    seconds: float
    finished: str | None
    stats: SpeculationStats

    @property
    def tokens_per_second(self) -> float:
        return len(self.answer) / self.seconds


@dataclass(frozen=True)
class Comparison:
    """The last answer beside that of plain `generate()`.

    Attributes:
        answer: token ids of plain `generate()`.
        seconds: its wall time.
        speedup: tokens per second of the turn, over those of plain `generate()`.
        same: how many tokens the two have in common, from the first one on.
    """

    answer: list[int]
    seconds: float
    speedup: float
    same: int


@dataclass
class Conversation:
    """Turns with one target.

    Args:
        pair: target, draft and tokenizer. Without a chat template, the target continues what was typed.
        drafting: arguments of `generate()` that choose the drafter.
        options: other options of `generate()`.
        max_new_tokens: limit of an answer.
        system: the system message.

    Attributes:
        messages: what was said, with the roles of chat templates.
        turns: since the last `reset`.
        stats: of all turns.

    Raises:
        ValueError: if the target has an encoder, or there is no place for a system message.
    """

    pair: SpecPair
    drafting: dict[str, Any]
    options: dict[str, Any]
    max_new_tokens: int
    system: str | None = None
    messages: list[Message] = field(init=False)
    turns: list[Turn] = field(init=False)
    stats: SpeculationStats = field(init=False, default_factory=SpeculationStats)
    _cache: Cache | None = field(init=False)
    _cached: list[int] = field(init=False)  # the token ids that it holds

    def __post_init__(self) -> None:
        target, tokenizer = self.pair.target, self.pair.tokenizer
        if target.config.is_encoder_decoder:
            raise ValueError(f"{type(target).__name__} has an encoder: a chat needs a decoder-only target")
        if self.system is not None and not self.has_template:
            raise ValueError("the target's tokenizer has no chat template, so --system has no place: leave it out")
        if target.generation_config.eos_token_id is None and tokenizer.eos_token_id is not None:
            self.options = {"eos_token_id": tokenizer.eos_token_id} | self.options
        self.reset()

    @property
    def has_template(self) -> bool:
        return self.pair.tokenizer.chat_template is not None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return bool(self.options.get("do_sample", self.pair.target.generation_config.do_sample))

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.turns = []
        self._forget()

    def warm_up(self) -> None:
        """Decode a little, so that what happens once in a process does not slow down the first answer.

        Raises:
            ValueError: if the template does not take the system message, or the models cannot be used.
        """
        prompt, limit = self._prompt([*self.messages, {"role": "user", "content": "hello"}])
        self._speculate(prompt, min(limit, 4), None, {})

    def ask(self, question: str, tell: Callable[[RowStep], None]) -> Turn:
        """Answer a question, and add both to the conversation.

        A KeyboardInterrupt ends the answer where it is; it stays in the conversation, unless it has no token yet.

        Args:
            tell: called with each step of the decoding. It may raise the KeyboardInterrupt.

        Raises:
            ValueError: if the conversation would be too long, or cannot be decoded; it is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt, limit = self._prompt(messages)
        cache, cached = self._cache_for(prompt), self._cached
        self._forget()  # the call may leave it half filled
        stats, told = SpeculationStats(), _Told(tell)
        records = {"speculation_stats": stats, "speculation_trace": told}
        finished: str | None = INTERRUPTED
        began = time.perf_counter()
        try:
            output = self._speculate(prompt, limit, cache, records)
        except KeyboardInterrupt:
            answer = told.tokens
            # The call replaces the cache's entries at its end, beginning with the first layer.
            if cache is not None and cache.get_seq_length() == len(cached):
                self._cache, self._cached = cache, cached
        else:
            text = output.sequences[0].tolist()
            answer, finished = text[len(prompt) :], told.finished
            self._keep(output.past_key_values, text[:-1])
        once = stats.compile_seconds + stats.capture_seconds + stats.packing_seconds
        seconds = time.perf_counter() - began - once
        said = self.pair.tokenizer.decode(answer, skip_special_tokens=True)
        turn = Turn(prompt, limit, len(cached), answer, said, seconds, finished, stats)
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": said}]
            self.turns.append(turn)
            self.stats.merge(stats)
        return turn

    def compare(self, tell: Callable[[int], None]) -> Comparison:
        """Answer the last question again with plain `generate()`, from a cache that holds as much as it did then.

        Args:
            tell: called with each token. What it raises ends the comparison; the conversation is as before.
        """
        turn = self.turns[-1]
        cache = None
        if turn.reused:
            greedy = {"strategy": "vanilla", "do_sample": False}
            cache = self._generate(turn.prompt[: turn.reused], 1, None, greedy).past_key_values
        limit = len(turn.answer) if turn.finished == INTERRUPTED else turn.limit
        began = time.perf_counter()
        output = self._generate(turn.prompt, limit, cache, {"strategy": "vanilla", "streamer": _Streamed(tell)})
        seconds = time.perf_counter() - began
        answer = output.sequences[0, len(turn.prompt) :].tolist()
        speedup = turn.tokens_per_second * seconds / len(answer)
        return Comparison(answer, seconds, speedup, _common(answer, turn.answer))

    def _prompt(self, messages: list[Message]) -> tuple[list[int], int]:
        """The token ids of the messages, and how many may follow."""
        longest = positions_of(self.pair.target)
        value = messages if self.has_template else _as_text(messages)
        try:
            prompt = prompt_ids(value, self.pair.tokenizer, False, longest)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"{error}; /reset begins anew" if self.turns else str(error)) from error
        return prompt, min(self.max_new_tokens, (longest or len(prompt) + self.max_new_tokens) - len(prompt))

    def _speculate(self, prompt: list[int], limit: int, cache: Cache | None, records: dict[str, Any]) -> Any:
        return self._generate(prompt, limit, cache, {"strategy": "spec"} | self.drafting | records)

    def _generate(self, prompt: list[int], limit: int, cache: Cache | None, more: dict[str, Any]) -> Any:
        ids = torch.tensor([prompt], device=model_device(self.pair.target))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "tokenizer": self.pair.tokenizer}
        if cache is not None:
            inputs["past_key_values"] = cache
        options = self.options | {"max_new_tokens": limit, "return_dict_in_generate": True} | more
        return self.pair.target.generate(**inputs | options)

    def _cache_for(self, prompt: list[int]) -> Cache | None:
        """The cache, cut to what it has in common with the prompt; `None` if nothing of it can be used.

        The template may write earlier turns otherwise than they were generated; at least one token must be fed.
        """
        same = _common(self._cached, prompt[:-1])
        if self._cache is not None and same < len(self._cached):
            try:
                self._cache.crop(same - len(self._cached))
            except RuntimeError:  # a layer with a window has forgotten what it would need
                same = 0
            self._cached = self._cached[:same]
        if same == 0:
            self._forget()
        return self._cache

    def _keep(self, cache: Any, tokens: list[int]) -> None:
        """Keep a cache for the next turn if it can be passed to it, and be cut; recurrent states cannot."""
        target = self.pair.target
        passes = target.generation_config.cache_implementation is None and not Abilities.of(target).needs_own_code
        if passes and isinstance(cache, Cache) and cache.is_croppable and not has_states(cache):
            self._cache, self._cached = cache, tokens

    def _forget(self) -> None:
        self._cache, self._cached = None, []


class _Told(Trace):
    """Hands steps on as they are made, instead of keeping them."""

    def __init__(self, tell: Callable[[RowStep], None]):
        super().__init__()
        self._tell = tell
        self.tokens: list[int] = []
        self.finished: str | None = None

    def add(self, iteration: Iteration) -> None:
        for step in iteration.rows:
            self.tokens += step.committed
            self.finished = step.finished
            self._tell(step)


class _Streamed(BaseStreamer):
    """Hands tokens on as `generate()` chooses them."""

    def __init__(self, tell: Callable[[int], None]):
        self._tell = tell
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self._tell(int(value))
        self._has_prompt = True

    def end(self) -> None:
        pass


def _as_text(messages: list[Message]) -> str:
    """What was typed and how it was continued, in one text; what is typed begins a line."""
    text = ""
    for message in messages:
        if message["role"] == "user" and text and not text.endswith("\n"):
            text += "\n"
        text += message["content"]
    return text


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common, from the first one on."""
    return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
