"""From `generate()` to the loop: the call that transformers has prepared becomes a `SpeculativeDecoding`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..cache.layers import cache_layers, check_layers
from ..cache.ragged import RaggedCache
from ..cache.states import has_states
from ..cache.user_cache import check_user_cache
from ..device import hidden_parameters, model_device
from ..drafters import Drafter, DraftRequest, Either, ModelDrafter
from ..loop.decoding import SpeculativeDecoding
from ..loop.outputs import Recorder
from ..loop.ranks import drafting, join
from ..loop.schedule import make_schedule
from ..loop.stopping import Stopping
from ..loop.streaming import StepStreamer
from ..models.abilities import Abilities, unexplained_windows
from ..models.cached import CachedModel
from ..models.checks import check_blocks, check_padded_blocks, check_states, check_target, check_windows
from ..models.compiled import BLOCKS, LONGEST, compilable
from ..models.encoder_side import EncoderSide, decoder_kwargs, read_encoder, with_later_inputs
from ..models.graphs import StaticForwards
from ..models.kept import borrow
from ..models.layout import Layout
from ..models.masks import takes_position_ids
from ..models.prompt import Prompt, read_prompt, whole_numbers
from ..models.rope import check_lengths
from ..models.self_fed import SelfFedModel
from ..models.sharding import Sharded
from ..options import STATIC_KINDS, Options
from ..records.stats import SpeculationStats
from ..records.trace import Trace
from ..sampling.context import Context
from ..sampling.processors import for_call, known, unknown_names
from ..sampling.rules import make_rule

logger = logging.get_logger(__name__)


class Feeding(Enum):
    """Who feeds the target, and where its rows' tokens are."""

    RAGGED = "rows hold no padding and have different lengths"
    ALIGNED = "rows include padding, as in vanilla, and always have equal lengths"
    SELF_FED = "the model's own code makes the forwards, with aligned rows"


@dataclass
class PreparedCall:
    """The arguments that `generate()` passes to a decoding method.

    Attributes:
        input_ids: `[batch, columns]` int64, the prompt; of an encoder-decoder model, the decoder's.
        processors, criteria, config: the call's logits processors, stopping criteria and generation config.
        kwargs: cache, mask, positions, and other model inputs, from which forwards are prepared.
        encoder_inputs: the inputs that `generate()` has passed to the encoder, if there is one.
        given: the model inputs that the user gave to `generate()`, by name.
    """

    model: PreTrainedModel
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    kwargs: dict[str, Any]
    encoder_inputs: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def cache(self) -> Any:
        """The cache that transformers has made or the user has given, under the model's name for it."""
        return self.kwargs.get("past_key_values", self.kwargs.get("cache_params"))

    @property
    def max_length(self) -> int:
        """How many columns the output may have: one token is generated even if the prompt reaches the limit."""
        limits = [c.max_length for c in self.criteria if type(c) is MaxLengthCriteria]
        return max(min(limits, default=self.config.max_length), self.input_ids.shape[1] + 1)

    @property
    def is_static(self) -> bool:
        """Whether forwards should have fixed shapes."""
        return self.config.cache_implementation in STATIC_KINDS


@dataclass
class Checked:
    """A call that has passed the checks, with their findings.

    Attributes:
        call: with int64 ids, and only the decoder's side of an encoder-decoder model.
        encoder: the encoder's side.
        cross: the cross-attention in the call's cache, for encoder-decoder models.
        self_fed: the model's own code makes its forwards.
        cache: transformers' cache for this model, with the cached columns; an empty one if it is self-fed.
        columns: of the longest row, including those cached before the context begins.
    """

    call: PreparedCall
    encoder: EncoderSide | None
    cross: Cache | None
    self_fed: bool
    cache: Cache
    prompt: Prompt
    columns: int


def prepare(
    call: PreparedCall,
    drafter: Drafter,
    options: Options,
    streamer: BaseStreamer | None,
    stats: SpeculationStats,
    trace: Trace | None,
    together: Sharded | None = None,
) -> SpeculativeDecoding:
    """Build the decoding of one prepared `generate()` call. No model has been fed the prompt yet.

    Raises:
        ValueError, TypeError: if speculation could not be lossless for this call.
    """
    checked = check_call(call)
    stopping = Stopping(call.criteria, call.max_length)
    prompt, pad = checked.prompt, call.config._pad_token_tensor
    first = [max(f - prompt.column_offset, 0) for f in prompt.first]
    context = Context(prompt.input_ids, first, call.max_length, 0 if pad is None else int(pad))
    vocab_size = vocab_size_of(call.model)
    processors = for_call(call.processors, context.host[:, : context.prompt_width], vocab_size)
    if sequential := unknown_names(processors):
        processors = call.processors
    samples = bool(call.config.do_sample)
    ranks = join(together, drafter, model_device(call.model), samples)
    rule = make_rule(samples, options.speculation_acceptance, options.speculation_seed, context.batch_size)
    if sequential and rule.judges_blocks:
        raise ValueError(
            f"`speculation_acceptance='block'` judges the drafts of a block together, but {', '.join(sequential)} may "
            "keep state, so it is called step by step: use 'token' or 'coupled', or declare the processor with "
            "`hf_specdec.pure` if it has no state"
        )
    lockstep = _needs_lockstep(checked, drafter, sequential)
    feeding = _feeding(checked, lockstep)
    if drafter.uses_target and feeding is Feeding.SELF_FED:
        raise ValueError(
            f"{drafter.use_of_target}, but {type(call.model).__name__} carries its own state from step to step: pass a "
            "draft model as `assistant_model`"
        )
    unbounded = _needs_unbounded_windows(checked, lockstep, stopping)
    draft_length = options.prompt_lookup_num_tokens or options.num_assistant_tokens
    kind = bool(sequential), type(rule)
    schedule = make_schedule(options.num_assistant_tokens_schedule, draft_length, call.model, drafter, kind, ranks)
    blocks = range(1, min((schedule.longest or LONGEST) + 1, LONGEST) + 1)
    compiles, fixed = options.compiles("target"), not drafter.taps_target
    make_target = functools.partial(_make_target, checked, feeding, unbounded, compiles and fixed, blocks, fixed)
    target = make_target()
    if target.static is not None:
        stats.compile_seconds += target.static.compile_seconds
    if target.encoded is not None and checked.cross is not None:
        target.encoded.load(checked.cross)
    request = DraftRequest(
        rule=rule,
        vocab_size=vocab_size,
        lockstep=lockstep,
        processors=known(processors),
        prefill_chunk_size=call.config.prefill_chunk_size,
        static=target.static is not None and call.is_static,
        inputs={} if prompt.first_forward is None or prompt.past else call.given,
        encoder=checked.encoder,
        prompt_is_embeds=prompt.input_ids.shape[1] == 0,
        target=target,
        go_on=schedule.go_on,
    )
    return SpeculativeDecoding(
        context=context,
        target=target,
        make_target=make_target,
        drafter=drafting(ranks, drafter),
        request=request,
        schedule=schedule,
        processors=processors,
        stopping=stopping,
        recorder=_make_recorder(checked, context, feeding),
        streamer=StepStreamer(streamer, context),
        sequential=bool(sequential),
        lockstep=lockstep,
        prefill_chunk_size=call.config.prefill_chunk_size,
        stats=stats,
        trace=trace,
        ranks=ranks,
    )


def check_call(call: PreparedCall) -> Checked:
    """Raise an error if the call cannot be served; the cheapest checks come first."""
    model, config, encoder, cross = call.model, call.config, None, None
    check_user_cache(call.kwargs.get("past_key_values"), model, config.max_length)
    call = replace(call, input_ids=whole_numbers(call.input_ids))
    if model.config.is_encoder_decoder:
        encoder = read_encoder(model, call.kwargs, call.encoder_inputs, len(call.input_ids))
        encoder = with_later_inputs(encoder, model, call.input_ids, call.kwargs)
        cross = getattr(call.kwargs.get("past_key_values"), "cross_attention_cache", None)
        call = replace(call, kwargs=decoder_kwargs(model, call.input_ids, call.kwargs))
    check_target(model, len(call.input_ids))
    able = Abilities.of(model)
    self_fed = not able.own_cache
    if not self_fed:
        check_cache(call.cache)
        check_states(model, call.cache, "the model")
        check_windows(model, config.max_length)
        prompt = _read_prompt(call, call.cache)
        self_fed = not able.keeps_cache  # after all checks that run no model
    if self_fed:
        check_given(model, call.cache, config)
        prompt = _read_prompt(call, None)
    columns = call.max_length + prompt.column_offset
    fed_at_once = 0 if config.prefill_chunk_size else prompt.mask.shape[1] - max(prompt.first) - 1
    check_lengths(model, fed_at_once, columns - min(prompt.first))
    if not self_fed:
        check_blocks(model, call.cache, columns)
    cache = DynamicCache() if self_fed else call.cache
    return Checked(call, encoder, cross, self_fed, cache, prompt, columns)


def _read_prompt(call: PreparedCall, cache: Cache | None) -> Prompt:
    return read_prompt(call.model, call.input_ids, call.config, cache, call.kwargs, vocab_size_of(call.model))


def vocab_size_of(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def _feeding(checked: Checked, lockstep: bool) -> Feeding:
    """Aligned for recurrent layers, which recognise padding only on the left, as in vanilla; and for models without
    position ids, which count columns, padding included.
    """
    if checked.self_fed:
        return Feeding.SELF_FED
    model, prompt, cache = checked.call.model, checked.prompt, checked.cache
    if lockstep and any(prompt.first) and checked.encoder is None and not model.training:
        check_padded_blocks(model, cache, checked.columns)
    counts_columns = any(prompt.first) and not takes_position_ids(model)
    aligned = prompt.holes or lockstep or has_states(cache) or counts_columns
    return Feeding.ALIGNED if aligned else Feeding.RAGGED


def _slots_begin(checked: Checked, feeding: Feeding) -> list[int]:
    """By row, the column of slot 0."""
    return checked.prompt.first if feeding is Feeding.RAGGED else [0] * len(checked.prompt.first)


def _make_recorder(checked: Checked, context: Context, feeding: Feeding) -> Recorder:
    prompt = checked.prompt
    return Recorder(
        checked.call.config,
        context,
        _slots_begin(checked, feeding),
        prompt.column_offset,
        prompt.past,
        [getattr(layer, "sliding_window", None) for layer in checked.cache.layers],
        checked.encoder is not None,
        type(checked.call.model).__name__,
    )


def check_given(model: PreTrainedModel, cache: Any, config: GenerationConfig) -> None:
    """Raise a ValueError for options that cannot work when the model's own code makes its forwards."""
    name = type(model).__name__
    if getattr(cache, "_is_user_defined", False):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__}) was given, but {name} carries a state from step to step that "
            "strategy='spec' does not know and cannot continue from: pass the whole text without it"
        )
    for option in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, option):
            raise ValueError(f"strategy='spec' does not record what `{option}` asks for with {name}: leave it out")


def check_cache(cache: Any) -> None:
    """Raise a ValueError for a cache that cannot be rolled back."""
    if not isinstance(cache, Cache):
        raise ValueError(
            "strategy='spec' needs a model that keeps a transformers `Cache` as `past_key_values`, "
            f"got {type(cache).__name__}: this model is not supported yet"
        )
    check_layers(cache, "the model")


def _needs_lockstep(checked: Checked, drafter: Drafter, unknown: list[str]) -> bool:
    """Whether the rows of a batch must advance together; logs the reason once.

    Args:
        unknown: names of processors that may keep state between calls.
    """
    if len(checked.prompt.first) == 1 or not (reason := lockstep_reason(checked, drafter, unknown)):
        return False
    logger.warning_once(f"The rows of this batch advance in lockstep, which accepts fewer drafts: {reason}.")
    return True


def lockstep_reason(checked: Checked, drafter: Drafter, unknown: list[str]) -> str | None:
    """Why rows of a batch like this one must advance together; `None` if they need not.

    Args:
        unknown: names of processors that may keep state between calls.
    """
    model, prompt = checked.call.model, checked.prompt
    windows = []
    if not checked.self_fed and checked.encoder is None:
        windows = unexplained_windows(model, checked.cache, checked.columns)
    if unknown:
        reason = f"{', '.join(unknown)} may keep state, so it is called step by step on the whole batch"
    elif prompt.holes:
        reason = "the attention mask has zeros after a row's first token"
    elif prompt.first_forward is not None and prompt.first_forward.places_tokens_itself:
        reason = f"{type(model).__name__} makes its own position ids"
    elif Abilities.of(model).needs_own_code:
        reason = f"{type(model).__name__} carries its own state from step to step"
        if hidden := hidden_parameters(model):
            reason = f"the forward of {type(model).__name__} does not name {hidden[0]}"
    elif windows:
        reason = f"{type(model).__name__} has a window of {windows[0]} tokens that its cache does not know"
    elif not (answer := Abilities.of(model).ragged):
        reason = f"{type(model).__name__} cannot decode rows of different lengths together ({answer.reason})"
    elif isinstance(drafter, (Either, ModelDrafter)) and not drafter.takes_ragged_rows:
        reason = f"{type(drafter.model).__name__} cannot decode rows of different lengths together"
    else:
        return None
    return reason


def _needs_unbounded_windows(checked: Checked, lockstep: bool, stopping: Stopping) -> bool:
    """Whether layers with a window must hold every slot, since more than a block may be rolled back or recorded.

    Attention weights are recorded over all slots. A returned cache holds the columns of the output, and some rows may
    have gone beyond these, or beyond where a criterion ends them; in lockstep, if rows ended early, all rows go back to
    where the first one ended.
    """
    config = checked.call.config
    hands_back = config.return_dict_in_generate or getattr(checked.cache, "_is_user_defined", False)
    ends_with_others = all(type(criterion) is MaxLengthCriteria for criterion in stopping.criteria)
    several = len(checked.prompt.first) > 1
    goes_beyond = lockstep or not stopping.pads_finished_rows or bool(stopping.unknown)
    uneven_ends = several and not ends_with_others and goes_beyond
    return bool(config.return_dict_in_generate and config.output_attentions) or bool(hands_back and uneven_ends)


def _make_target(
    checked: Checked, feeding: Feeding, unbounded: bool, compiles: bool, blocks: Sequence[int], fixed: bool
) -> CachedModel | SelfFedModel:
    """The target, with nothing fed to it yet.

    Args:
        blocks: the widths of the blocks that it will verify.
        fixed: its forwards may have fixed shapes, which show no hidden states.
    """
    call, prompt, columns = checked.call, checked.prompt, checked.columns
    model = call.model
    if feeding is Feeding.SELF_FED:
        return SelfFedModel(model, call.input_ids, call.config, call.kwargs)
    first = _slots_begin(checked, feeding)
    padded = feeding is Feeding.ALIGNED and not bool(prompt.mask.all())
    cache, static = _make_cache(checked, padded, unbounded, compiles, blocks, fixed)
    if prompt.past:
        cache.load(checked.cache, first)
    layout = Layout(
        first=first,
        column_offset=prompt.column_offset,
        padding_mask=prompt.mask if padded else None,
        position_offset=[offset + f for offset, f in zip(prompt.position_offset, first)],  # slot = column - first
        prompt_positions=prompt.positions,
        axes=prompt.axes,
        max_slot=[columns - 2 - f for f in first],
        own_masks=not prompt.holes and Abilities.of(model).own_masks(padded),
    )
    encoded = None if checked.encoder is None else checked.encoder.for_target(model)
    return CachedModel(model, cache, layout, prompt.embeds, prompt.first_forward, static, encoded)


def _make_cache(
    checked: Checked, padded: bool, unbounded: bool, compiles: bool, blocks: Sequence[int], fixed: bool
) -> tuple[RaggedCache, StaticForwards | None]:
    """The cache, and forwards of fixed shapes on it if they are wanted and possible."""
    model, prompt, columns, is_static = checked.call.model, checked.prompt, checked.columns, checked.call.is_static
    rows, device = len(prompt.first), model_device(model)
    layers = cache_layers(checked.cache, model.config, rows, columns, windowed=not unbounded)
    cache = RaggedCache(rows, device, prompt.mask.shape[1] + 256, max_capacity=columns, layers=layers)
    if not is_static and not compiles:
        return cache, None
    moving = prompt.positions is not None or prompt.axes is not None or prompt.first_forward is not None
    moving = moving or padded or checked.encoder is not None or bool(cache.states)
    moving = moving or not fixed or not Abilities.of(model).ragged
    if moving and is_static:
        reason = f"{type(model).__name__} and this prompt need" if fixed else "A head on hidden states needs"
        logger.warning_once(f"{reason} forwards of changing shapes.")
        layers = cache_layers(checked.cache, model.config, rows, columns, windowed=False)
        cache = RaggedCache(rows, device, capacity=columns, max_capacity=columns, layers=layers)
    widths = compilable(model, BLOCKS, not moving, "verifies") if compiles else ()
    if not moving and (is_static or widths):
        return borrow(model, rows, device, columns, widths, blocks)
    return cache, None
