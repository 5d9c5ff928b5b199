"""`generate_many`: results for many prompts as they end, in a batch whose free places the next prompts take."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from ..device import forward_parameters
from ..models.kept import release
from ..records.stats import SpeculationStats
from .places import Done, Places, check_by_row, reason_for_static
from .prompts import Entry, Preparation, is_whole, per_prompt, read_entries
from .session import Checked, PreparedCall, check_call
from .static_batches import Item, StaticBatches

logger = logging.get_logger(__name__)

# Texts in a block of static batches, per row of a batch.
_BLOCK = 4
# Options that are about one rectangular batch, or about how one call returns.
_REFUSED = {
    "streamer": "texts end at different times: read the results",
    "speculation_trace": "it records the rows of one batch: trace single prompts with `generate()`",
    "custom_generate": "it is a decoding method of its own",
    "return_dict_in_generate": "results are not rows of one batch: read `sequence` and `speculation`",
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "results hold tokens only: use `generate()`",
    ),
    **dict.fromkeys(
        ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"),
        "the prompts are the only inputs, without padding",
    ),
}


@dataclass
class Generated:
    """One result of `generate_many`.

    Attributes:
        index: of the prompt in the iterable. With `num_return_sequences`, several results have the same.
        sample: its number among the results of the prompt.
        sequence: `[length]` int64 on the CPU, prompt and new tokens without padding; for models with an encoder, the
            decoder's. The prompt alone if there is an `error`.
        new_tokens: the new tokens alone.
        speculation: statistics of this text. Forwards are those that it took part in, together with others; seconds are
            its share of theirs.
        finished: why it ended: "eos", "max_length", "stop_string", "max_time" or "stopping_criteria".
        error: with `on_error="result"`, why the prompt could not be decoded; else `None`.
    """

    index: int
    sequence: Tensor
    new_tokens: Tensor
    speculation: SpeculationStats
    finished: str | None = None
    error: Exception | None = None
    sample: int = 0
    _tokenizer: Any = field(default=None, repr=False)

    @property
    def text(self) -> str | None:
        """The new tokens as text, without special tokens; `None` if no tokenizer was given."""
        if self._tokenizer is None:
            return None
        text: str = self._tokenizer.decode(self.new_tokens, skip_special_tokens=True)
        return text


def generate_many(
    model: Any,
    prompts: Iterable[Any],
    assistant_model: Any = None,
    *,
    batch_size: int = 16,
    tokenizer: Any = None,
    on_error: str = "raise",
    **generate_options: Any,
) -> Iterator[Generated]:
    """Generate for many prompts, `batch_size` at a time; a prompt takes the place of one that has ended at once.

    Each result is what `model.generate(prompt, strategy="spec", ...)` gives for that prompt alone.

    Args:
        model: the target.
        prompts: lists of token ids, 1-D tensors, or strings if there is a `tokenizer`; any iterable, even an endless
            one. A prompt is taken when there is a place for it.
        assistant_model: as in `generate()`; without one, prompt look-up.
        batch_size: how many texts are decoded together.
        tokenizer: of the target; for prompts that are strings, for `Generated.text`, and for `stop_strings`.
        on_error: what to do if a prompt cannot be decoded: "raise" an error that names it, or give a "result" whose
            `error` says why, and go on.
        generate_options: those of `generate()`. `max_new_tokens` may be an iterable with one value per prompt.
            `speculation_seed=s` stands for s + index, or is a list with a seed per text. `speculation_stats` is filled
            with what all texts took together; its `per_row` is by place, and its `iterations` stay empty.

    Returns: an iterator over results, as texts end. Closing it stops all work and frees what it used.

    Raises:
        TypeError, ValueError: for arguments with which no prompt could be decoded, at once.
    """
    options = _checked_options(model, batch_size, on_error, generate_options)
    stats = options.pop("speculation_stats", None)
    if stats is not None and not isinstance(stats, SpeculationStats):
        raise TypeError(f"`speculation_stats` must be a SpeculationStats, got {type(stats).__name__}")
    if not isinstance(prompts, Iterable) or isinstance(prompts, (str, bytes)):
        raise TypeError(f"`prompts` must be an iterable of prompts, got {type(prompts).__name__}: put one in a list")
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    seed = options.get("speculation_seed")
    limits = options.get("max_new_tokens")
    if per_prompt(limits):
        options["max_new_tokens"] = _first_of(limits, prompts)
    preparation = Preparation(model, assistant_model, options)
    preparation.options = {name: value for name, value in options.items() if name != "speculation_seed"}
    check_by_row(preparation.call)
    checked = check_call(preparation.call)
    entries = read_entries(prompts, tokenizer, limits, preparation.copies)
    many = _Many(preparation, checked, _Seeds(seed), _Results(tokenizer, on_error == "raise"), stats)
    return many.results(entries, batch_size)


def _checked_options(model: Any, batch_size: Any, on_error: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options for `generate()`, without those that say what holds anyway."""
    if not is_whole(batch_size):
        raise TypeError(f"`batch_size` must be an int, got {batch_size!r} of type {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    if on_error not in ("raise", "result"):
        raise ValueError(f"`on_error` must be 'raise' or 'result', got {on_error!r}")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generate"):
        raise TypeError(f"`model` must be a transformers model with `generate()`, got {type(model).__name__}")
    options = dict(options)
    if (strategy := options.pop("strategy", "spec")) != "spec":
        raise ValueError(f"generate_many() always speculates, but `strategy` is {strategy!r}: leave it out")
    config = options.get("generation_config")
    for name, why in _REFUSED.items():
        values = options.get(name), getattr(config, name, None)
        if any(value is not None and value is not False for value in values):
            raise ValueError(f"generate_many() takes no `{name}`: {why}")
    inputs = {*forward_parameters(model)} - {*vars(GenerationConfig())}
    if given := sorted(name for name in options if name in inputs and options[name] is not None):
        raise ValueError(f"generate_many() takes no `{given[0]}`: the prompts are the only inputs, without padding")
    return options


def _first_of(limits: Any, prompts: Any) -> int | None:
    """What `max_new_tokens` stands for where it has a value per prompt, before there is a prompt.

    Raises:
        ValueError: if it has another length than the prompts.
    """
    if not hasattr(limits, "__len__"):
        return None
    if hasattr(prompts, "__len__") and len(limits) != len(prompts):
        raise ValueError(f"`max_new_tokens` has {len(limits)} values for {len(prompts)} prompts: pass one for each")
    valid = [limit for limit in limits if is_whole(limit) and limit > 0]
    return int(max(valid)) if valid else None


class _Seeds:
    """Seeds of texts, for coupled sampling.

    Args:
        given: `speculation_seed`.
    """

    def __init__(self, given: Any):
        self._first = int(torch.randint(2**62, (1,))) if given is None else given
        self._list = [int(seed) for seed in given] if isinstance(given, Iterable) else None

    def of(self, entry: Entry) -> int:
        if self._list is None:
            return int(self._first) + entry.number
        if entry.number >= len(self._list):
            raise ValueError(
                f"`speculation_seed` has {len(self._list)} seeds, and there are more texts: pass one for each"
            )
        return self._list[entry.number]


@dataclass(frozen=True)
class _Results:
    """Makes results.

    Args:
        raises: a prompt that cannot be decoded raises an error.
    """

    tokenizer: Any
    raises: bool

    def of(self, done: Done) -> Generated:
        return self._made(done.entry, done.tokens, done.prompt_length, done.stats, finished=done.reason)

    def failed(self, entry: Entry, error: Exception) -> Generated:
        if self.raises:
            kind = type(error) if type(error) in (TypeError, ValueError) else RuntimeError
            raise kind(f"Prompt {entry.index} cannot be decoded: {error}") from error
        prompt = torch.tensor(entry.prompt, dtype=torch.int64)
        return self._made(entry, prompt, len(prompt), SpeculationStats(), error=error)

    def _made(
        self,
        entry: Entry,
        tokens: Tensor,
        prompt_length: int,
        stats: SpeculationStats,
        finished: str | None = None,
        error: Exception | None = None,
    ) -> Generated:
        new = tokens[prompt_length:]
        return Generated(entry.index, tokens, new, stats, finished, error, entry.sample, self.tokenizer)


class _Many:
    """One call of `generate_many`.

    Args:
        checked: the call of a prompt of one token.
        stats: the caller's, if there are any.
    """

    def __init__(
        self,
        preparation: Preparation,
        checked: Checked,
        seeds: _Seeds,
        results: _Results,
        stats: SpeculationStats | None,
    ):
        self._preparation = preparation
        self._checked = checked
        self._seeds = seeds
        self._make = results
        self._stats = stats

    def results(self, entries: Iterator[Entry], size: int) -> Iterator[Generated]:
        reason = reason_for_static(self._checked, self._preparation)
        if reason is not None:
            logger.warning_once(f"generate_many() decodes static batches, sorted by length: {reason}.")
        try:
            yield from self._refilled(entries, size) if reason is None else self._static(entries, size)
        except torch.OutOfMemoryError:
            release()  # smaller batches may follow
            raise

    def _refilled(self, entries: Iterator[Entry], size: int) -> Iterator[Generated]:
        places = Places(self._preparation, self._checked, size)
        try:
            while True:
                failed = self._fill(places, entries)
                if failed is not None:
                    yield failed
                    continue
                if len(places.free) == size:
                    return
                done: list[Done] = []
                try:
                    with places.running():
                        while not done:
                            done = places.step()
                except Exception as error:
                    if self._make.raises or isinstance(error, torch.OutOfMemoryError):
                        raise
                    unfinished = places.entries
                    places.close()
                    self._count(places.take_stats())
                    for entry in unfinished:  # one of them may be to blame, and the others lose only time
                        yield self._alone(entry)
                    places = Places(self._preparation, self._checked, size)
                    continue
                self._count(places.take_stats())
                yield from map(self._make.of, done)
        finally:
            places.close()
            self._count(places.take_stats())

    def _alone(self, entry: Entry) -> Generated:
        """A text from its beginning, with no other beside it."""
        places = Places(self._preparation, self._checked, 1)
        try:
            if (failed := self._fill(places, iter([entry]))) is not None:
                return failed
            done: list[Done] = []
            with places.running():
                while not done:
                    done = places.step()
            return self._make.of(done[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return self._make.failed(entry, error)
        finally:
            places.close()
            self._count(places.take_stats())

    def _fill(self, places: Places, entries: Iterator[Entry]) -> Generated | None:
        """Give the free places to the next prompts. Returns: the first of them that cannot be decoded."""
        for _ in places.free:
            entry = next(entries, None)
            if entry is None:
                return None
            try:
                call = self._prepared(entry)
                with torch.no_grad():
                    places.admit(entry, call, self._seeds.of(entry))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return self._make.failed(entry, error)
        return None

    def _static(self, entries: Iterator[Entry], size: int) -> Iterator[Generated]:
        batches = StaticBatches(self._preparation, self._checked, size)
        while first := next(entries, None):
            block: list[Item] = []
            for entry in chain([first], islice(entries, _BLOCK * size - 1)):
                try:
                    call = self._prepared(entry)
                    check_by_row(call)
                    with torch.no_grad():
                        check_call(call)
                    block.append((entry, replace(call, kwargs={}), self._seeds.of(entry)))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    yield self._make.failed(entry, error)
            for found in batches.decode(block):
                if isinstance(found, list):
                    yield from map(self._make.of, found)
                else:
                    yield self._make.failed(found[0][0], found[1])
                self._count(batches.take_stats())

    def _prepared(self, entry: Entry) -> PreparedCall:
        if entry.error is not None:
            raise entry.error
        return self._preparation.of(entry)

    def _count(self, stats: SpeculationStats) -> None:
        if self._stats is not None:
            stats.iterations.clear()
            self._stats.merge(stats)
