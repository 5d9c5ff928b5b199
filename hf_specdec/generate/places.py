"""The batch of `generate_many` whose rows are replaced as they end: from prepared calls to a `RefilledDecoding`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..cache.layers import cache_layers
from ..cache.ragged import RaggedCache
from ..cache.states import has_states
from ..device import model_device
from ..drafters import DraftRequest
from ..kernels.attention import compile_attention, folded_attention
from ..kernels.packing import PackedLinears
from ..loop.outputs import Recorder
from ..loop.ranks import drafting, join
from ..loop.refill import RefilledDecoding, Text
from ..loop.schedule import make_schedule
from ..loop.stopping import OwnStopping, Stopping
from ..loop.streaming import StepStreamer
from ..models.abilities import Abilities
from ..models.cached import CachedModel
from ..models.checks import check_blocks, check_windows
from ..models.layout import Layout
from ..models.prompt import unknown_token
from ..models.rope import check_lengths
from ..records.stats import SpeculationStats
from ..sampling.by_row import OwnProcessors
from ..sampling.context import Context
from ..sampling.processors import could_be_known, for_call, unknown_names
from ..sampling.row_processors import METHODS
from ..sampling.rules import make_rule
from .prompts import Entry, Preparation
from .session import Checked, PreparedCall, lockstep_reason, vocab_size_of


class Done(NamedTuple):
    """A text that has ended.

    Attributes:
        tokens: `[length]` on the CPU, the prompt included.
        prompt_length: of these, how many are the prompt.
        reason: why it ended; see `RowStep.finished`.
    """

    entry: Entry
    tokens: Tensor
    prompt_length: int
    reason: str
    stats: SpeculationStats


def check_by_row(call: PreparedCall) -> None:
    """Raise a ValueError for processors and criteria that see more than one text, or may keep state."""
    processors = [p for p in call.processors if not could_be_known(p)]
    criteria = Stopping(call.criteria, call.max_length).unknown
    for kind, found in (("logits processor", processors), ("stopping criterion", criteria)):
        if found:
            other = ", or make it a `hf_specdec.RowProcessor`" if kind == "logits processor" else ""
            raise ValueError(
                f"{type(found[0]).__name__} may keep state or read other rows, so generate_many() cannot use this "
                f"{kind} for texts that begin and end at different times: declare it with `hf_specdec.pure` if it is a "
                f"function of one text{other}"
            )


def _check_prompt(call: PreparedCall, prompt: list[int], longest: int) -> None:
    """The checks of `check_call` that depend on the prompt, for one row of plain tokens.

    Args:
        longest: texts of at most so many tokens have been decoded already.

    Raises:
        ValueError: if it holds ids that are no tokens, or the text may get too long for the model's code.
    """
    size = vocab_size_of(call.model)
    if outside := [token for token in prompt if not 0 <= token < size]:
        raise unknown_token(outside[0], size)
    fed_at_once = 0 if call.config.prefill_chunk_size else len(prompt) - 1
    check_lengths(call.model, fed_at_once, call.max_length)
    if call.max_length > longest:
        check_windows(call.model, call.max_length)
        check_blocks(call.model, call.cache, call.max_length)


def own_processors(call: PreparedCall, prompt: list[int]) -> LogitsProcessorList:
    """The processors of one text, with state of their own where they have any."""
    processors = [
        _copied(p) if all(callable(getattr(p, name, None)) for name in METHODS) else p for p in call.processors
    ]
    found = for_call(LogitsProcessorList(processors), torch.tensor([prompt]), vocab_size_of(call.model))
    if unknown := unknown_names(found):
        raise ValueError(f"{unknown[0]} may keep state, so generate_many() cannot use it")
    return found


def _copied(processor: Any) -> Any:
    try:
        return copy.deepcopy(processor)
    except Exception as error:
        name = type(processor).__name__
        raise TypeError(
            f"{name} could not be copied, but each text of generate_many() needs a state of its own ({error}): give it "
            "a `__deepcopy__`"
        ) from error


def reason_for_static(checked: Checked, preparation: Preparation) -> str | None:
    """Why rows cannot be replaced while others go on; `None` if they can."""
    call, prompt, drafter = checked.call, checked.prompt, preparation.drafter
    name = type(call.model).__name__
    if checked.encoder is not None:
        return f"{name} has an encoder"
    if call.is_static or (preparation.resolved.compiles("target") and not drafter.taps_target):
        return "forwards of fixed shapes need a cache that is made for one call"
    if checked.self_fed or has_states(checked.cache):
        return f"{name} carries a state from token to token"
    if (
        prompt.first_forward is not None
        or prompt.positions is not None
        or (prompt.axes is not None and prompt.axes.any())
    ):
        return f"{name} does not read its prompts as plain tokens"
    if reason := lockstep_reason(checked, drafter, []):
        return reason
    if not drafter.refills:
        owner = drafter.draft_model or drafter
        return f"{type(owner).__name__} cannot begin a row anew while others go on"
    return None


class Places:
    """Up to `size` texts that are decoded together, each as if it were alone.

    Args:
        checked: the call of a prompt of one token.
    """

    def __init__(self, preparation: Preparation, checked: Checked, size: int):
        self._preparation = preparation
        self._entries: dict[int, Entry] = {}  # by row
        self._longest = 0  # of the texts so far, the most tokens that one may have
        self._is_closed = False
        stats = SpeculationStats()
        self._decoding = _decoding(preparation, checked, size, stats)
        options, model = preparation.resolved, checked.call.model
        draft = preparation.drafter.draft_model
        models = [model] if draft is None else [model, draft]
        self._compiles = options.compiles("attention") and model_device(model).type == "cpu"
        if self._compiles:
            stats.compile_seconds += compile_attention(models)
        new_tokens = size * (checked.call.max_length - 1)
        by_clock = preparation.together is None
        self._packed = PackedLinears(models, options.speculation_pack_weights, new_tokens, by_clock)
        stats.packing_seconds += self._packed.seconds
        with self.running():
            self._decoding.begin()

    @property
    def free(self) -> list[int]:
        return self._decoding.free

    @property
    def entries(self) -> list[Entry]:
        """The texts that have not ended."""
        return list(self._entries.values())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, rows are decoded; outside, the user's code runs."""
        with torch.no_grad(), folded_attention(self._compiles), self._packed.in_use():
            yield

    def admit(self, entry: Entry, call: PreparedCall, seed: int) -> None:
        """Give a free place to a text.

        Raises:
            TypeError, ValueError, or whatever its processors raise: if it cannot be decoded; nothing has changed then.
        """
        _check_prompt(call, entry.prompt, self._longest)
        check_by_row(call)
        text = Text(
            entry.name,
            entry.prompt,
            call.max_length,
            own_processors(call, entry.prompt),
            Stopping(call.criteria, call.max_length),
            seed,
        )
        row = self.free[0]
        self._longest = max(self._longest, text.limit)
        self._decoding.admit(row, text)
        self._entries[row] = entry

    def step(self) -> list[Done]:
        """One iteration of all rows. Returns: the texts that have ended in it."""
        done = []
        for row, tokens, reason, stats in self._decoding.step():
            entry = self._entries.pop(row)
            done.append(Done(entry, tokens, len(entry.prompt), reason, stats))
        return done

    def take_stats(self) -> SpeculationStats:
        """What was counted since the last time."""
        stats, self._decoding.stats = self._decoding.stats, SpeculationStats()
        return stats

    def close(self) -> None:
        """Nothing goes on; what the models used is free."""
        if self._is_closed:
            return
        self._is_closed = True
        self._decoding.stats.draft_prefill_forwards += self._decoding.drafter.prefill_forwards
        self._decoding.release()


def _decoding(preparation: Preparation, checked: Checked, size: int, stats: SpeculationStats) -> RefilledDecoding:
    call, options, drafter, prompt = checked.call, preparation.resolved, preparation.drafter, checked.prompt
    model, config = call.model, call.config
    pad = config._pad_token_tensor
    config.return_dict_in_generate = False  # of this call only, where the model's config says so
    context = Context(call.input_ids.new_empty(size, 0), [0] * size, 0, 0 if pad is None else int(pad))
    layers = cache_layers(checked.cache, model.config, size, checked.columns)
    cache = RaggedCache(size, model_device(model), checked.columns, max_capacity=checked.columns, layers=layers)
    layout = Layout(
        first=[0] * size,
        position_offset=prompt.position_offset * size,
        axes=None if prompt.axes is None else prompt.axes.expand(-1, size, -1),
        max_slot=[0] * size,
        own_masks=Abilities.of(model).own_masks(padded=False),
    )
    target = CachedModel(model, cache, layout)
    draft_length = options.prompt_lookup_num_tokens or options.num_assistant_tokens
    ranks = join(preparation.together, drafter, model_device(model), bool(config.do_sample))
    rule = make_rule(bool(config.do_sample), options.speculation_acceptance, [0] * size, size)
    kind = False, type(rule)
    schedule = make_schedule(options.num_assistant_tokens_schedule, draft_length, model, drafter, kind, ranks)
    processors = OwnProcessors(size)
    request = DraftRequest(
        rule=rule,
        vocab_size=vocab_size_of(model),
        processors=processors,
        prefill_chunk_size=config.prefill_chunk_size,
        target=target,
        go_on=schedule.go_on,
    )
    return RefilledDecoding(
        context=context,
        target=target,
        make_target=lambda: target,
        drafter=drafting(ranks, drafter),
        request=request,
        schedule=schedule,
        processors=processors,
        stopping=OwnStopping(size),
        recorder=Recorder(config, context, [0] * size, 0, 0, []),
        streamer=StepStreamer(None, context),
        sequential=False,
        lockstep=False,
        prefill_chunk_size=config.prefill_chunk_size,
        stats=stats,
        by_clock=preparation.together is None,
        ranks=ranks,
    )
