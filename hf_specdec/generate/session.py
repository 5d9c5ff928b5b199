"""Between `generate()` and the loop: what transformers has prepared becomes a `SpeculativeDecoding`, and its outcome
becomes transformers' output classes and caches again.
"""

import functools
from collections.abc import Callable
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
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.utils import logging

from ..cache.layers import cache_layers, check_layers
from ..cache.ragged import RaggedCache
from ..cache.states import has_states
from ..cache.user_cache import check_user_cache
from ..device import hidden_parameters, model_device
from ..drafters import Drafter, DraftRequest, ModelDrafter
from ..loop.decoding import SpeculativeDecoding
from ..loop.outputs import Recorder
from ..loop.schedule import make_schedule
from ..loop.stopping import Stopping
from ..loop.streaming import StepStreamer
from ..models.abilities import (
    carries_its_own,
    check_blocks,
    check_padded_blocks,
    check_states,
    check_target,
    check_windows,
    decodes_ragged_rows,
    is_fed_by_itself,
    keeps_a_cache,
    ragged_rows,
    unexplained_windows,
)
from ..models.cached import CachedModel
from ..models.encoded import EncoderSide, decoder_kwargs, read_encoder, with_later_inputs
from ..models.masks import takes_position_ids
from ..models.prompt import Prompt, read_prompt, whole_numbers
from ..models.rope import check_lengths
from ..models.self_fed import PreparedModel
from ..models.static import BLOCKS, borrow, compilable
from ..options import STATIC_KINDS, Options
from ..records.stats import SpeculationStats
from ..records.trace import Trace
from ..sampling.context import Context
from ..sampling.processors import known, unknown_names

logger = logging.get_logger(__name__)


def prepare(
    model: PreTrainedModel,
    drafter: Drafter,
    options: Options,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    stats: SpeculationStats,
    trace: Trace | None,
    model_kwargs: dict[str, Any],
    encoder_inputs: Tensor | None,
    given: dict[str, Any],
) -> SpeculativeDecoding:
    """Build the decoding of one prepared `generate()` call. Nothing has been fed to any model yet.

    Args:
        encoder_inputs: what `generate()` has given to the encoder, if there is one.
        given: the model inputs that `generate()` was given, by name.
    """
    check_user_cache(model_kwargs.get("past_key_values"), model, generation_config.max_length)
    input_ids, encoder = whole_numbers(input_ids), None
    if model.config.is_encoder_decoder:
        encoder = read_encoder(model, model_kwargs, encoder_inputs, len(input_ids))
        encoder = with_later_inputs(encoder, model, input_ids, model_kwargs)
        user_cache, model_kwargs = model_kwargs["past_key_values"], decoder_kwargs(model, input_ids, model_kwargs)
    check_target(model, input_ids.shape[0])
    by_itself = is_fed_by_itself(model)
    cache = prepared_cache(model_kwargs)
    if by_itself:
        check_given(model, cache, generation_config)
        cache = DynamicCache()  # what there is of the prompt so far: nothing
    else:
        check_cache(cache)
        check_states(model, cache, "the model")
        check_windows(model, generation_config.max_length)
    vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
    held = None if by_itself else cache
    prompt = read_prompt(model, input_ids, generation_config, held, model_kwargs, vocab_size)
    if not by_itself and not keeps_a_cache(model):  # asked last of what is refused without running anything
        by_itself, cache = True, DynamicCache()
        check_given(model, prepared_cache(model_kwargs), generation_config)
        prompt = read_prompt(model, input_ids, generation_config, None, model_kwargs, vocab_size)
    max_length = min(
        [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria], default=generation_config.max_length
    )
    columns = max_length + prompt.column_offset
    fed_at_once = 0 if generation_config.prefill_chunk_size else prompt.mask.shape[1] - max(prompt.first) - 1
    check_lengths(model, fed_at_once, columns - min(prompt.first))
    if not by_itself:
        check_blocks(model, cache, columns)
    stopping = Stopping(stopping_criteria, max_length)

    batch = len(prompt.first)
    unknown = [*unknown_names(logits_processor), *stopping.unknown]
    windows = [] if by_itself or encoder is not None else unexplained_windows(model, cache, columns)
    lockstep = batch > 1 and _needs_lockstep(model, drafter, prompt, unknown, windows)
    if lockstep and any(prompt.first) and encoder is None and not by_itself and not model.training:
        check_padded_blocks(model, cache, columns)
    # Vanilla pads recurrent layers on the left, which tell what is padding only there; and who is not told positions
    # counts columns, padding included.
    whole = by_itself or has_states(cache)
    aligned = prompt.holes or lockstep or whole or (any(prompt.first) and not takes_position_ids(model))
    first = [0] * batch if aligned else prompt.first

    pad = generation_config._pad_token_tensor
    context_first = [max(f - prompt.column_offset, 0) for f in prompt.first]
    context = Context(prompt.input_ids, context_first, max_length, 0 if pad is None else int(pad))
    keeps_all = _may_go_far_back(generation_config, cache, batch, lockstep, stopping)
    compiles = options.compiles("target")
    make_target: Callable[[], CachedModel] = functools.partial(
        _cached_target, model, cache, prompt, context, first, aligned, keeps_all, generation_config, encoder, compiles
    )
    if by_itself:
        make_target = functools.partial(PreparedModel, model, input_ids, generation_config, model_kwargs)
    target = make_target()
    if target.static is not None:
        stats.compile_seconds += target.static.compile_seconds
    if target.encoded is not None:
        target.encoded.load(user_cache.cross_attention_cache)
    sizes = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    recorder = Recorder(
        generation_config,
        context,
        first,
        prompt.column_offset,
        prompt.past,
        sizes,
        encoder is not None,
        type(model).__name__,
    )
    schedule = make_schedule(
        options.num_assistant_tokens_schedule,
        options.prompt_lookup_num_tokens or options.num_assistant_tokens,
        model,
        drafter,
    )
    request = DraftRequest(
        do_sample=bool(generation_config.do_sample),
        vocab_size=vocab_size,
        device=context.tokens.device,
        first=context_first,
        lockstep=lockstep,
        processors=known(logits_processor),
        prefill_chunk_size=generation_config.prefill_chunk_size,
        static=target.static is not None and generation_config.cache_implementation in STATIC_KINDS,
        inputs={} if prompt.first_forward is None or prompt.past else given,
        encoder=encoder,
        go_on=schedule.go_on,
    )
    return SpeculativeDecoding(
        context=context,
        target=target,
        make_target=make_target,
        drafter=drafter,
        request=request,
        schedule=schedule,
        processors=logits_processor,
        stopping=stopping,
        recorder=recorder,
        streamer=StepStreamer(streamer, context),
        in_order=bool(unknown),
        lockstep=lockstep,
        prefill_chunk_size=generation_config.prefill_chunk_size,
        stats=stats,
        trace=trace,
    )


def finish(
    decoding: SpeculativeDecoding, width: int, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput | Tensor:
    """The result of `generate()` for a decoding that has run, and the cache that it leaves behind."""
    cache, target = prepared_cache(model_kwargs), decoding.target
    wants_dict = bool(generation_config.return_dict_in_generate)
    if isinstance(target, PreparedModel):
        cache = target.hand_back(decoding.context, width) if wants_dict else None
    elif wants_dict or getattr(cache, "_is_user_defined", False):
        hand_back_cache(decoding, width, cache)
    target.release()
    sequences = decoding.context.view(width).clone()
    if not wants_dict:
        return sequences
    steps, recorder = width - decoding.context.prompt_width, decoding.recorder
    common = {
        "sequences": sequences,
        "scores": recorder.scores(steps),
        "logits": recorder.logits(steps),
        "past_key_values": cache,
    }
    output: GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput
    if decoding.request.encoder is None:
        output = GenerateDecoderOnlyOutput(
            **common, attentions=recorder.attentions(steps), hidden_states=recorder.hidden_states(steps)
        )
    else:
        encoded = decoding.request.encoder.outputs
        output = GenerateEncoderDecoderOutput(
            **common,
            encoder_attentions=encoded.get("attentions") if recorder.wants_attentions else None,
            encoder_hidden_states=encoded.get("hidden_states") if recorder.wants_hidden_states else None,
            decoder_attentions=recorder.attentions(steps),
            cross_attentions=recorder.cross_attentions(steps),
            decoder_hidden_states=recorder.hidden_states(steps),
        )
    output.speculation = decoding.stats
    return output


def hand_back_cache(decoding: SpeculativeDecoding, width: int, cache: Cache) -> None:
    """Fill transformers' cache object as vanilla leaves it: every column but the last one, for every row.

    Rows that ended early have padding columns, which vanilla feeds too; they are fed here, in one forward.
    """
    context, target = decoding.context, decoding.target
    context.rows = list(range(context.batch_size))
    context.ends = [width] * context.batch_size
    if target.cache.states and context.batch_size > 1:  # those of rows that ended are gone: once more from the start
        target = decoding.make_target()
        if target.prompt_is_unread:
            target.read_prompt()
    shortest = min(target.cache.lengths)
    for row, offset in enumerate(target.slot_offset):
        held = min(target.cache.lengths[row], width + offset - 1)
        target.cache.lengths[row] = min(shortest, held) if decoding.lockstep else held
    target.prefill(context, decoding.prefill_chunk_size)
    cache.reset()
    first = [target.column_offset - offset for offset in target.slot_offset]
    own = getattr(cache, "self_attention_cache", cache)
    for index, keys, values in target.cache.columns(first, width + target.column_offset - 1):
        own.update(keys, values, index)
    target.cache.copy_states_to(own)
    if target.encoded is not None:
        target.encoded.hand_back(cache)


def prepared_cache(model_kwargs: dict[str, Any]) -> Any:
    """The cache that transformers has made, or the user has given, under the name that the model has for it."""
    return model_kwargs.get("past_key_values", model_kwargs.get("cache_params"))


def check_given(model: PreTrainedModel, cache: Any, config: GenerationConfig) -> None:
    """Refuse, for a model whose own code feeds it, what that leaves no place for."""
    name = type(model).__name__
    if getattr(cache, "_is_user_defined", False):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__}) was given, but what {name} carries from step to step is not "
            "known to strategy='spec', which cannot go on from it: pass the whole text without it"
        )
    for option in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, option):
            raise ValueError(f"strategy='spec' does not record what `{option}` asks for of {name}: leave it out")


def check_cache(cache: Any) -> None:
    """Refuse a cache whose contents this loop does not know how to carry from step to step."""
    if not isinstance(cache, Cache):
        raise ValueError(
            "strategy='spec' needs a model that keeps a transformers `Cache` as `past_key_values`, "
            f"got {type(cache).__name__}: this model is not supported yet"
        )
    check_layers(cache, "the model")


def _needs_lockstep(
    model: PreTrainedModel, drafter: Drafter, prompt: Prompt, unknown: list[str], windows: list[int]
) -> bool:
    """Whether the rows of a batch must advance together; says once why.

    Args:
        windows: that the text may leave, and of which only the model's own code knows.
    """
    if unknown:
        reason = f"{', '.join(unknown)} may keep state, so it is called step by step on the whole batch"
    elif prompt.holes:
        reason = "the attention mask has zeros after a row's first token"
    elif prompt.first_forward is not None and prompt.first_forward.places_tokens_itself:
        reason = f"{type(model).__name__} makes its own position ids"
    elif carries_its_own(model):
        reason = f"{type(model).__name__} carries a state of its own from step to step"
        if hidden := hidden_parameters(model):
            reason = f"the forward of {type(model).__name__} does not name {hidden[0]}"
    elif windows:
        reason = f"{type(model).__name__} has a window of {windows[0]} tokens that its cache knows nothing of"
    elif not (answer := ragged_rows(model)):
        reason = f"{type(model).__name__} cannot decode rows of different lengths together ({answer.reason})"
    elif isinstance(drafter, ModelDrafter) and not drafter.takes_ragged_rows:
        reason = f"{type(drafter.model).__name__} cannot decode rows of different lengths together"
    else:
        return False
    logger.warning_once(f"The rows of this batch advance in lockstep, which accepts fewer drafts: {reason}.")
    return True


def _may_go_far_back(config: GenerationConfig, cache: Cache, batch: int, lockstep: bool, stopping: Stopping) -> bool:
    """Whether more than a block may be asked of layers with a window, which therefore hold every slot.

    Attention weights are recorded over all slots. A cache that is handed back stands for the columns of the output,
    which some rows may have passed; and in lockstep, where rows ended early, all go back to where the first one ended.
    """
    hands_back = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    ends_with_others = all(type(criterion) is MaxLengthCriteria for criterion in stopping.criteria)
    uneven_ends = batch > 1 and not ends_with_others and (lockstep or not stopping.pads_finished_rows)
    return bool(config.return_dict_in_generate and config.output_attentions) or bool(hands_back and uneven_ends)


def _cached_target(
    model: PreTrainedModel,
    source: Cache,
    prompt: Prompt,
    context: Context,
    first: list[int],
    aligned: bool,
    keeps_all: bool,
    generation_config: GenerationConfig,
    encoder: EncoderSide | None,
    compiles: bool,
) -> CachedModel:
    columns = context.max_length + prompt.column_offset
    padded = aligned and not bool(prompt.mask.all())
    device = model_device(model)
    layers = cache_layers(source, model.config, len(first), columns, windowed=not keeps_all)
    cache = RaggedCache(len(first), device, prompt.mask.shape[1] + 256, max_capacity=columns, layers=layers)
    static, is_static = None, generation_config.cache_implementation in STATIC_KINDS
    if is_static or compiles:
        moving = prompt.positions is not None or prompt.axes is not None or prompt.first_forward is not None
        moving = moving or padded or encoder is not None or bool(cache.states) or not decodes_ragged_rows(model)
        if moving and is_static:
            logger.warning_once(f"{type(model).__name__} and this prompt need forwards of changing shapes.")
            layers = cache_layers(source, model.config, len(first), columns, windowed=False)
            cache = RaggedCache(len(first), device, capacity=columns, max_capacity=columns, layers=layers)
        widths = compilable(model, BLOCKS, not moving, "verifies") if compiles else ()
        if not moving and (is_static or widths):
            cache, static = borrow(model, len(first), device, columns, widths)
    if prompt.past:
        cache.load(source, first)
    # Position ids minus slots: slot = column - first.
    position_offset = [offset + f for offset, f in zip(prompt.position_offset, first)]
    return CachedModel(
        model,
        cache,
        first=first,
        column_offset=prompt.column_offset,
        padding_mask=prompt.mask if padded else None,
        position_offset=position_offset,
        prompt_positions=prompt.positions,
        axes=prompt.axes,
        prompt_embeds=prompt.embeds,
        first_forward=prompt.first_forward,
        max_slot=[columns - 2 - f for f in first],
        static=static,
        encoded=None if encoder is None else encoder.for_target(model),
    )
