"""From the loop back to `generate()`: a finished decoding becomes transformers' output classes and caches."""

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..loop.decoding import SpeculativeDecoding
from ..models.cached import CachedModel
from ..models.self_fed import SelfFedModel
from ..records.stats import SpeculationStats
from .session import PreparedCall


def finish(
    decoding: SpeculativeDecoding, width: int, call: PreparedCall, stats: SpeculationStats
) -> GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput | Tensor:
    """The result of `generate()` for a finished decoding, with the cache that vanilla would return.

    Args:
        stats: the statistics for the caller.
    """
    cache, target = call.cache, decoding.target
    wants_dict = bool(call.config.return_dict_in_generate)
    if isinstance(target, SelfFedModel):
        cache = target.hand_back(decoding.context, width) if wants_dict else None
    elif wants_dict or getattr(cache, "_is_user_defined", False):
        hand_back_cache(decoding, width, cache)
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
    output.speculation = stats
    return output


def hand_back_cache(decoding: SpeculativeDecoding, width: int, cache: Cache) -> None:
    """Fill transformers' cache as vanilla leaves it: every column but the last, for every row.

    Rows that ended early have padding columns, which vanilla feeds too; here they are fed in one forward.
    """
    context, target = decoding.context, decoding.target
    assert isinstance(target, CachedModel)
    target.tap = None  # nobody will draft any more
    context.rows = list(range(context.batch_size))
    context.ends = [width] * context.batch_size
    if target.has_states and context.batch_size > 1:  # finished rows have lost theirs: feed all again
        target = decoding.make_target()
        assert isinstance(target, CachedModel)
        if target.prompt_is_unread:
            target.read_prompt()
    shortest = min(target.cache.lengths)
    for row, offset in enumerate(target.layout.slot_offset):
        held = min(target.cache.lengths[row], width + offset - 1)
        target.cache.lengths[row] = min(shortest, held) if decoding.lockstep else held
    target.prefill(context, decoding.prefill_chunk_size)
    cache.reset()
    own = getattr(cache, "self_attention_cache", cache)
    for index, keys, values in target.cache.columns(list(target.layout.first), width + target.layout.column_offset - 1):
        own.update(keys, values, index)
    target.cache.copy_states_to(own)
    if target.encoded is not None:
        target.encoded.hand_back(cache)
