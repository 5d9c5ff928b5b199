"""Probes: decode a few tokens as the loop does, and compare every logit with vanilla's.

Not every modeling file can continue a cache or a recurrent state over several tokens, follow 4-D masks, or take rows of
different lengths; some keep state outside any cache. No config shows that. So rows of different lengths go through
prompts, partly accepted drafts, rollback and pending tokens, on the caches that decoding uses, and every logit is
compared with that of the same row alone.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils import ModelOutput

from ..cache.layers import cache_layers
from ..cache.ragged import RaggedCache
from ..cache.states import has_states
from ..device import forward_parameters, model_device
from ..sampling.context import Context, real_columns
from .answers import CannotBeAsked, Differs, apart, check_same, is_rounding, measured_noise, ordinary_tokens, tolerance
from .cached import CachedModel
from .encoded import Encoded
from .layout import Layout
from .masks import hands_positions_on, looks_ahead, probe_inputs, ragged_mask, takes_position_ids
from .sharding import OwnLayersCache

# Prompt lengths by row. They differ by more than a block, and the first row is longer than most small windows.
_LENGTHS = (23, 6, 14)
_DRAFTS = 3
_BLOCKS = "returns different logits for a block on a filled cache than token by token"
_ROWS = "returns different logits for rows of different lengths together than alone"
_PADDING = "returns different logits for a left-padded row than for the row alone"
_SHAKEN = 1e-6  # relative change
# The most tokens that a row gets after its prompt.
_NEW = 13
LONGEST = max(_LENGTHS) + _NEW
# By round, how many drafts each row accepts.
_ACCEPTED = ((0, 3, 1), (2, 0, 1), (3, 1, 0), (0, 2, 3))


def rehearse(
    model: PreTrainedModel,
    rows: int = 1,
    at_once: int | None = None,
    drafts: bool = False,
    past: int = 0,
    longest: int | None = None,
    seed: int = 0,
) -> None:
    """Decode a few tokens as the loop does, and compare every logit.

    Args:
        rows: at most three, of different lengths.
        at_once: how many tokens one forward must continue a state over; `None` for as many as there are.
        drafts: the model only drafts: it must match each row alone, but not vanilla's padded batch.
        past: the least number of tokens in the first prompt.
        longest: the most tokens that a row may reach.
        seed: of the text.

    Raises:
        Differs: if a logit is not vanilla's.
        CannotBeAsked: if the model returns logits that are not finite for a text.
    """
    vanilla = Vanilla(model)
    lengths = [max(_LENGTHS[0], past), *_LENGTHS[1:]][:rows]
    longest = min((n for n in (longest, _positions(model)) if n is not None), default=None)
    if longest is not None:
        lengths = [max(min(length, longest - _NEW), 1) for length in lengths]
    tokens = ordinary_tokens(model, sum(lengths), seed)
    prompts = [[tokens.pop() for _ in range(length)] for length in lengths]
    first = [max(lengths) - length for length in lengths]
    ids = torch.tensor([[0] * gap + prompt for gap, prompt in zip(first, prompts)], device=model_device(model))
    vanilla.check_asked(prompts[0], closely=seed > 0)
    if rows > 1 and not drafts and not vanilla.looks_ahead:
        vanilla.check_padding(ids, first, prompts)

    context = Context(ids, first, max_length=max(lengths) + 24, pad_token_id=0)
    cached = make_cached_model(model, context, ragged=not _states(model), drafts=drafts)
    cached.at_once = at_once
    if vanilla.looks_ahead:  # vanilla's own forward reads prompts
        cached.cache.load(vanilla.read(ids, first), first)
        cached.commit(context)
    else:
        cached.prefill(context)
    for accepted in (*_ACCEPTED, None):
        draft_tokens, missing, width = _next_block(model, context, cached, seed)
        logits = cached.forward(context, width, keep=width).logits
        texts = [[*context.row(row).tolist(), *draft_tokens[row][: width - n]] for row, n in enumerate(missing)]
        truth = vanilla.of_rows(texts, prompts, ids, first)
        for row, pending in enumerate(missing):
            got = logits[row, pending - 1 :]
            expected = truth[row][-len(got) :]  # there are no logits from before the end of look-ahead prompts
            check_same(model, got[-len(expected) :], expected, vanilla.noise, _BLOCKS if rows == 1 else _ROWS)
        context.clear_drafts()
        if accepted is None:
            return
        kept = [draft_tokens[row][: min(count, width - missing[row])] for row, count in enumerate(accepted[:rows])]
        context.append([[*tokens, *ordinary_tokens(model, 1, seed + 7 + row)] for row, tokens in enumerate(kept)])
        cached.commit(context)


class _CacheOfOtherRows(DynamicCache):
    """An empty cache that reports the length of a longer row, which must not affect the other rows."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return super().get_seq_length(*args, **kwargs) + 2**20

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return super().get_query_offset(*args, **kwargs) + 2**20


def compare_beside_longer_rows(model: PreTrainedModel, seed: int) -> None:
    """Raise `Differs` if the length of the cache affects a row whose mask and positions do not depend on it.

    The mask hides the first of four tokens; mask and positions of the others are as if they were alone.
    """
    vanilla = Vanilla(model)
    if vanilla.looks_ahead or model.config.is_encoder_decoder or not takes_position_ids(model):
        return  # these recognise a prompt by its length, or take no positions
    text = ordinary_tokens(model, 4, seed)
    vanilla.check_asked(ordinary_tokens(model, 12, seed), closely=seed > 0)
    device = model_device(model)
    mask = ragged_mask(model, torch.arange(3, device=device)[None], 3)
    masks = {key: _moved(m) for key, m in mask.items()} if isinstance(mask, dict) else _moved(mask)
    cache = _CacheOfOtherRows(config=model.config.get_text_config(decoder=True))
    inputs = {"attention_mask": masks, "position_ids": torch.tensor([[0, 0, 1, 2]], device=device)}
    kwargs = {**probe_inputs(model), "past_key_values": cache, "use_cache": True}
    logits = model(input_ids=vanilla.ids(text), **inputs, **kwargs).logits[0, 1:]
    expected = vanilla.logits(text[1:], 1)
    check_same(model, logits, expected, vanilla.noise, "depends on the length of the longest row")


def _moved(mask: Tensor | None) -> Tensor | None:
    """A causal mask `[1, 1, 3, 3]` moved right and down by one; the first token attends only to itself."""
    if mask is None:
        return None
    seen, unseen = mask[:, :, :1, :1], mask[:, :, :1, 1:2]
    first = torch.cat([seen, *[unseen] * 3], dim=3)
    return torch.cat([first, torch.cat([unseen.expand(-1, -1, 3, -1), mask], dim=3)], dim=2)


def compare_padded_blocks(model: PreTrainedModel, longest: int | None, seed: int) -> None:
    """Raise `Differs` unless blocks after left-padded prompts get the same logits as token by token."""
    vanilla = Vanilla(model)
    lengths = _LENGTHS[:2] if longest is None else (longest - _DRAFTS, 2)
    tokens = ordinary_tokens(model, sum(lengths) + 2 * _DRAFTS, seed)
    first = [max(lengths) - length for length in lengths]
    prompts = [[tokens.pop() for _ in range(length)] for length in lengths]
    own = torch.tensor([[tokens.pop() for _ in range(_DRAFTS)] for _ in lengths], device=model_device(model))
    vanilla.check_asked(prompts[0], closely=seed > 0)
    ids = torch.tensor([[0] * gap + prompt for gap, prompt in zip(first, prompts)], device=model_device(model))
    steps, block = (vanilla.padded(ids, first, own, width) for width in (1, _DRAFTS))
    for row in range(len(lengths)):
        check_same(model, block[row], steps[row], vanilla.noise, f"{_BLOCKS}, in a left-padded batch")


def _next_block(
    model: PreTrainedModel, context: Context, cached: CachedModel, seed: int
) -> tuple[list[list[int]], list[int], int]:
    """Write drafts after the committed tokens. Returns: drafts by row, uncached tokens by row, the forward's width."""
    if cached.at_once is not None:
        cached.prefill(context)
    missing = cached.missing(context)
    reads_prompt = any(cached.prompt_left(context))
    count = 0 if cached.at_once is not None or reads_prompt else _DRAFTS
    width = max(missing) + count
    if cached.cache.states:  # all rows are fed equally many tokens
        width = max(max(missing), min(missing) + count)
    longest = width - min(missing)
    drafts = [ordinary_tokens(model, longest, seed + 100 * row + context.ends[row]) for row in context.rows]
    if longest:
        context.write_drafts(torch.tensor(drafts, device=context.tokens.device))
    return drafts, missing, width


class Vanilla:
    """A model's vanilla logits for single rows: a text in one forward, or its prompt and then token by token."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        # Cross-attention also looks ahead, and a decoder made for it takes no positions.
        self.looks_ahead = looks_ahead(model) and not model.config.is_encoder_decoder and takes_position_ids(model)
        self.noise: float | None = None

    def check_asked(self, text: list[int], closely: bool = False) -> None:
        """Raise `CannotBeAsked` if a text alone gets logits that are not finite; else measure the model's rounding.

        Args:
            closely: also look for rounding that few texts show.
        """
        try:
            whole = self._whole(text)
        except Differs:
            raise
        except Exception as error:
            raise CannotBeAsked(f"{type(self.model).__name__} needs more inputs than text") from error
        if not whole.isfinite().all():
            raise CannotBeAsked(f"{type(self.model).__name__} returns logits that are not finite")
        if not self.looks_ahead:
            self.noise = measured_noise(self.model, lambda: self._measure(text, whole))
        if self.noise is not None and closely and whole.dtype == self.model.dtype == torch.float32:
            self.noise = max(self.noise, self._measure_shaken(text))

    def _measure(self, text: list[int], whole: Tensor) -> float:
        """How far vanilla's logits token by token, and in a batch of equally long rows, are from those of one forward.

        Infinite where a token attends to later tokens: then even a small difference is more than rounding.
        """
        begin = max(len(text) - 6, 1)
        found = apart(self._steps(text, begin), whole[begin - 1 :])
        with contextlib.suppress(Exception):  # models that are fixed to one row
            ids = self.ids(text).repeat(2, 1)
            ids[1, -1] = ids[1, 0]
            batch = self._forward(ids, None)
            if apart(batch[1, :-1], batch[0, :-1]) > tolerance(self.model, 0.0):
                return math.inf
            found = max(found, apart(batch[0], whole))
        return found

    def _measure_shaken(self, text: list[int]) -> float:
        """How far logits move when embeddings move in their last digits.

        Products in TF32 round their inputs to ten bits. That removes most differences in the last digits, but a few of
        them move a number by a thousandth.
        """
        found = 0.0
        with contextlib.suppress(Exception):  # models that require ids
            embeds = self.model.get_input_embeddings()(self.ids(text))
            generator = torch.Generator().manual_seed(0)
            still = self.model(inputs_embeds=embeds, return_dict=True).logits[0]
            for _ in range(4):
                change = torch.randn(embeds.shape, generator=generator).to(embeds) * _SHAKEN
                moved = self.model(inputs_embeds=embeds * (1 + change), return_dict=True).logits[0]
                found = max(found, apart(moved, still))
        return found

    def logits(self, text: Sequence[int], prompt: int) -> Tensor:
        """`[tokens, vocab]`: logits from the last prompt token on."""
        if self.noise is not None and is_rounding(self.model, self.noise):
            return self._whole(text)[prompt - 1 :]
        return self._steps(text, prompt)

    def of_rows(self, texts: list[list[int]], prompts: list[list[int]], ids: Tensor, first: list[int]) -> list[Tensor]:
        """By row `[tokens, vocab]`: logits of its text from the last prompt token on.

        Models that look ahead in prompts read them padded, as in vanilla; then that token's logits are left out.
        """
        if not self.looks_ahead or len(texts) == 1:
            return [self.logits(text, len(prompt)) for text, prompt in zip(texts, prompts)]
        own = [text[len(prompt) :] for text, prompt in zip(texts, prompts)]
        most = max(map(len, own))
        filled = torch.tensor([row + [0] * (most - len(row)) for row in own], device=ids.device)
        together = self.padded(ids, first, filled, width=1)
        return [logits[: len(row)] for logits, row in zip(together, own)]

    def check_padding(self, ids: Tensor, first: list[int], prompts: list[list[int]]) -> None:
        """Raise `Differs` if vanilla's logits of a row change when it is left-padded beside others.

        Such rows cannot be decoded as if they were alone.
        """
        if self.model.config.is_encoder_decoder or _states(self.model):
            return  # only the encoder has padding, or the layout keeps it
        own = torch.tensor([[prompt[0], prompt[-1]] for prompt in prompts], device=ids.device)
        together = self.padded(ids, first, own, width=1)
        for row, prompt in enumerate(prompts):
            alone = self.logits([*prompt, *own[row].tolist()], len(prompt))[1:]
            check_same(self.model, together[row], alone, self.noise, _PADDING)

    def padded(self, ids: Tensor, first: list[int], own: Tensor, width: int) -> Tensor:
        """`[rows, tokens, vocab]`: logits of `own` `[rows, tokens]`, fed by `width` after left-padded prompts."""
        cache, logits = self.read(ids, first), []
        mask = real_columns(ids.shape[1], first, ids.device)
        for tokens in own.split(width, dim=1):
            mask = torch.cat([mask, mask.new_ones(tokens.shape)], dim=1)
            logits.append(self._forward(tokens.contiguous(), cache, mask.long()))
        return torch.cat(logits, dim=1)

    def read(self, ids: Tensor, first: list[int]) -> Cache:
        """A cache that holds left-padded prompts."""
        cache = self.cache()
        mask = real_columns(ids.shape[1], first, ids.device)
        self._forward(ids, cache, mask.long() if any(first) else None)
        return cache

    def continued(self, text: Sequence[int], more: Sequence[int]) -> Tensor:
        """`[tokens, vocab]`: logits of `more` tokens in one forward after a cached text; of the text if none."""
        if not more:
            return self._whole(text)
        cache = self.cache()
        self._forward(self.ids(text), cache)
        return self._forward(self.ids(more), cache, past=len(text))[0]

    def _whole(self, text: Sequence[int]) -> Tensor:
        logits = self._forward(self.ids(text), None)[0]
        if len(logits) != len(text):
            raise Differs(f"returns logits for {len(logits)} of {len(text)} tokens")
        return logits

    def _steps(self, text: Sequence[int], prompt: int) -> Tensor:
        cache = self.cache()
        logits = [self._forward(self.ids(text[:prompt]), cache)[0, -1:]]
        for end in range(prompt, len(text)):
            logits.append(self._forward(self.ids(text[end : end + 1]), cache, past=end)[0])
        return torch.cat(logits)

    def ids(self, text: Sequence[int]) -> Tensor:
        return torch.tensor([list(text)], device=model_device(self.model))

    def cache(self) -> Cache:
        kind = DynamicCache if getattr(self.model, "_pp_stage", None) is None else OwnLayersCache
        cache: Cache = kind(config=self.model.config.get_text_config(decoder=True))
        return EncoderDecoderCache(cache, DynamicCache()) if self.model.config.is_encoder_decoder else cache

    def _forward(self, ids: Tensor, cache: Cache | None, mask: Tensor | None = None, past: int = 0) -> Tensor:
        logits: Tensor = self.output(ids, cache, mask, past).logits
        return logits

    def output(self, ids: Tensor, cache: Cache | None, mask: Tensor | None = None, past: int = 0) -> ModelOutput:
        """The output of a forward over `[rows, tokens]` ids.

        Args:
            cache: holds the earlier tokens; `None` for a forward without one.
            mask: `[rows, columns]`, which are real; `None` for all.
            past: tokens that the cache holds, where there is no mask.
        """
        model, names = self.model, forward_parameters(self.model)
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        inputs: dict[str, Any] = {**probe_inputs(model, len(ids)), prefix + "input_ids": ids}
        if mask is not None:
            inputs[prefix + "attention_mask"] = mask
        if "position_ids" in names and not prefix:
            real = torch.ones(1, past + ids.shape[1], device=ids.device) if mask is None else mask
            positions = (real.long().cumsum(dim=1) - 1).masked_fill(real == 0, 0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
        if cache is not None:
            inputs["cache_params" if "cache_params" in names else "past_key_values"] = cache
        if cache is not None or "use_cache" in names:
            inputs["use_cache"] = cache is not None
        output: ModelOutput = model(**inputs)
        return output


def make_cached_model(model: PreTrainedModel, context: Context, ragged: bool, drafts: bool = False) -> CachedModel:
    """A model with an empty cache, for prompts that may be left-padded.

    Args:
        ragged: rows hold no padding; else slots are columns.
        drafts: position ids are passed although the forward has no such parameter.
    """
    rows, device = context.batch_size, model_device(model)
    like: Cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    layers = cache_layers(like, model.config, rows, context.max_length)
    cache = RaggedCache(rows, device, context.max_length, context.max_length, layers)
    padded = max(context.first) > 0 and not ragged
    encoded = None
    if model.config.is_encoder_decoder:
        encoded = Encoded({"encoder_outputs": probe_inputs(model, rows)["encoder_outputs"]}, rows)
    layout = Layout(
        first=context.first if ragged else [0] * rows,
        padding_mask=context.prompt_mask if padded else None,
        position_offset=None if ragged else [-first for first in context.first],
    )
    return CachedModel(model, cache, layout, encoded=encoded, unnamed_positions=drafts and hands_positions_on(model))


def _positions(model: PreTrainedModel) -> int | None:
    """The number of positions, or the length at which rotary embeddings change; `None` if the config does not say."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions", "n_positions", "original_max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    named = (found.get(name) for found in (vars(config), rope) for name in names)
    return min((n for n in named if isinstance(n, int) and n > 0), default=None)


def _states(model: PreTrainedModel) -> bool:
    return has_states(DynamicCache(config=model.config.get_text_config(decoder=True)))
