"""A draft model: one tight loop of forwards over all rows, with its own RaggedCache."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..cache.layers import cache_layers
from ..cache.ragged import RaggedCache
from ..cache.states import has_states
from ..device import model_device, to_device
from ..models.abilities import Abilities
from ..models.cached import CachedModel
from ..models.compiled import STEPS, compilable
from ..models.kept import borrow
from ..models.layout import Layout
from ..models.multimodal_prompt import FirstForward, prepared_call, show, split_axes
from ..models.rope import positions_of
from ..models.self_fed import SelfFedModel
from ..sampling.by_row import OwnProcessors
from ..sampling.context import Context
from ..sampling.processors import BLIND, BlockProcessors, drafts_of
from ..sampling.row_processors import Constraint, forced_token
from .base import Draft, Drafter, DraftRequest

logger = logging.get_logger(__name__)


class ModelDrafter(Drafter):
    """Drafts with a smaller language model that has the target's vocabulary, and its encoder inputs if there are any.

    Tokens are drawn from its processed scores by the call's rule: the argmax in greedy calls.

    Args:
        model: the draft model (`assistant_model` in `generate()`).
        confidence_threshold: a row stops after a token to which the draft gave a probability below this
            (`assistant_confidence_threshold`); 0 never stops. That token itself is still proposed. On accelerators all
            γ tokens are drafted, because reading a probability waits, and those after it are not proposed.
        compiles: compile its steps with `torch.compile` (`speculation_compile`). Drafts need not be exact.
    """

    in_vocabulary = True
    reads_prompts = True
    cached: CachedModel | SelfFedModel
    _bounds_windows = True  # only drafts are rolled back, so layers with a window need no more than that
    _widths: Sequence[int] = STEPS  # of its usual forwards, in tokens per row

    def __init__(self, model: PreTrainedModel, confidence_threshold: float = 0.0, compiles: bool = False):
        self.model = model
        self.compiles = compiles
        self.confidence_threshold = confidence_threshold
        self.shows_confidence = model_device(model).type == "cpu"

    @property
    def draft_model(self) -> nn.Module | None:
        return self.model

    @property
    def forwards(self) -> int:
        return self.cached.forwards

    @property
    def prefill_forwards(self) -> int:
        return self.cached.prefill_forwards

    @property
    def takes_ragged_rows(self) -> bool:
        return bool(Abilities.of(self.model).ragged_drafts)

    def _serve(self, call: DraftRequest) -> None:
        self._call = call
        self._process = BlockProcessors(call.processors)
        blind = all(type(processor) in BLIND for processor in call.processors)
        self._is_blind = blind and not isinstance(call.processors, OwnProcessors)

    def start(self, call: DraftRequest, context: Context) -> None:
        self._serve(call)
        config = self.model.config.get_text_config(decoder=True)
        self._limit = positions_of(self.model)
        if Abilities.of(self.model).needs_own_code:
            self.cached = self._self_fed(context)
            return
        rows, device, static = context.batch_size, model_device(self.model), None
        empty = DynamicCache(config=self.model.config)
        layers = cache_layers(empty, config, rows, context.max_length, windowed=self._bounds_windows)
        cache = RaggedCache(rows, device, context.prompt_width + 256, context.max_length, layers)
        padded = (call.lockstep or bool(cache.states)) and max(context.first) > 0
        encoded = None if call.encoder is None else call.encoder.for_draft(self.model)
        seen = show(self.model, call.inputs, rows) if call.inputs else None
        changing = padded or bool(cache.states) or encoded is not None or seen is not None
        fixed = (call.static or self.compiles) and not changing and self.takes_ragged_rows
        widths = compilable(self.model, self._widths, fixed, "drafts") if self.compiles else ()
        if fixed and (call.static or widths):
            cache, static = borrow(self.model, rows, device, context.max_length, widths, self._widths)
            self.compile_seconds = static.compile_seconds
        layout = Layout(
            first=[0] * rows if padded else context.first,
            padding_mask=context.prompt_mask.to(device) if padded else None,
            position_offset=[-f for f in context.first] if padded else None,
            max_slot=[(self._limit or context.max_length) - 1] * rows,
            own_masks=Abilities.of(self.model).own_masks(padded, drafts=True),
        )
        unnamed = Abilities.of(self.model).positions
        self.cached = CachedModel(self.model, cache, layout, static=static, encoded=encoded, unnamed_positions=unnamed)
        if seen is not None:
            self._take_over(self.cached, *seen)
        if cache.states and not Abilities.of(self.model).states():
            self.cached.at_once = 1

    def _self_fed(self, context: Context) -> SelfFedModel:
        """For a draft that only its own code can feed; it reads the prompt in its first forward."""
        device = model_device(self.model)
        ids = context.view(context.prompt_width).to(device)
        ids = ids.clamp(0, self.model.config.get_text_config(decoder=True).vocab_size - 1)
        inputs = {"input_ids": ids, "attention_mask": context.prompt_mask.to(device).long()}
        return SelfFedModel(self.model, *prepared_call(self.model, inputs))

    def _take_over(self, cached: CachedModel, first_forward: FirstForward, output: ModelOutput) -> None:
        """Continue from a forward over the whole prompt, images included."""
        rows = len(cached.layout.first)
        cached.take_over(first_forward, output)
        cached.prefill_forwards += 1
        positions, axes = split_axes(first_forward.inputs.get("position_ids"), rows)
        if positions is not None:
            last = positions[:, -1].expand(rows).tolist()
            offset = [p - cached.cache.lengths[row] + 1 for row, p in enumerate(last)]
            cached.layout = replace(cached.layout, position_offset=offset, axes=axes).on(cached.device)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        with self.cached.no_bookkeeping():
            return self._propose(context, max_tokens)

    def _propose(self, context: Context, max_tokens: int) -> Draft:
        max_tokens = min(max_tokens, self._room(context))
        rows = len(context.rows)
        if max_tokens <= 0:
            return Draft(context.tokens.new_empty(rows, 0))
        self._catch_up(context, max_tokens)
        tokens: list[Tensor] = []  # each [rows, k] for the next k tokens, as are the others
        best: list[Tensor] = []  # the score of the likeliest token
        probs: list[Tensor] = []  # [rows, k, vocab]
        sure: list[Tensor] = []  # whether another one may follow
        lengths, step, done = [max_tokens] * rows, 0, False
        logits: Tensor | None = None  # [rows, n, vocab], known for the next n tokens
        drawn: Tensor | None = None
        while not done:
            scores = self._forced_scores(context, step)
            if scores is None:
                if logits is None:
                    logits = self._logits(context, step, max_tokens - step, drawn)
                scores = self._processed(logits if self._is_blind else logits[:, :1], context, step)
            width = scores.shape[1]
            logits = None if logits is None or logits.shape[1] == width else logits[:, width:]
            best.append(scores.amax(dim=-1))
            drawn, q = self._call.rule.draw(scores, context, step)
            tokens.append(drawn)
            if q is not None:
                probs.append(q)
            if self._call.processors:
                self._write(context, drawn, step)  # processors see them
            if self.confidence_threshold and not self.shows_confidence:  # reading it would wait for the device
                sure.append(self._confidence(scores, drawn) >= self.confidence_threshold)
            lengths, done = self._stop(step, lengths, scores, drawn)
            step += width
        valid = torch.cat(best, dim=1).isfinite().all(dim=1)
        draft = Draft(torch.cat(tokens, dim=1), torch.cat(probs, dim=1) if probs else None, lengths, valid)
        if not sure:
            return draft
        return draft.up_to(1 + torch.cat(sure, dim=1)[:, :-1].long().cumprod(dim=1).sum(dim=1))

    def _write(self, context: Context, drawn: Tensor, step: int) -> None:
        """Put the drafts of one step, `[rows, 1]`, where processors and forwards find them."""
        context.write_drafts(drawn, offset=step)

    def _stop(self, step: int, lengths: list[int], scores: Tensor, drawn: Tensor) -> tuple[list[int], bool]:
        """The draft length of each row as known after a step, and whether that was the last step.

        Args:
            step: how many tokens were drawn before it.
            drawn: `[rows, k]`, those drawn in it. Whether the next one is proposed depends on those before it only.
        """
        go_on, longest, after = self._call.go_on, max(lengths), step + drawn.shape[1]
        if not self.shows_confidence or (self.confidence_threshold == 0 and (go_on is None or step + 1 >= longest)):
            return lengths, after >= longest
        confidence: list[float]
        for count, confidence in enumerate(self._confidence(scores, drawn).T.tolist(), step + 1):
            unsure = [p < self.confidence_threshold for p in confidence]
            lengths = [min(n, count) if stop else n for n, stop in zip(lengths, unsure)]
            is_broken = any(map(math.isnan, confidence))  # no distribution: the loop raises an error
            if is_broken or count >= max(lengths) or (go_on is not None and not go_on(confidence)):
                return [min(n, count) for n in lengths], True
        return lengths, False

    def _confidence(self, scores: Tensor, drawn: Tensor) -> Tensor:
        """`[rows, k]`: the probabilities of the drawn tokens."""
        return (scores.gather(-1, drawn[..., None]).squeeze(-1) - scores.logsumexp(dim=-1)).exp()

    @property
    def refills(self) -> bool:
        has_shapes = self.compiles  # a cache of fixed size, made for the rows of one call
        return not has_shapes and self.takes_ragged_rows and not has_states(DynamicCache(config=self.model.config))

    def restart(self, context: Context, row: int) -> None:
        assert isinstance(self.cached, CachedModel)
        limit = context.limits[row]
        self.cached.restart(row, limit, (self._limit or limit) - 1)

    def read(self, context: Context, count: int) -> None:
        assert isinstance(self.cached, CachedModel)
        self.cached.read(context, count)

    def commit(self, context: Context) -> None:
        # The cache holds the previous context and all drafts but the last; the committed ones stay.
        self.cached.commit(context)

    def unread(self, context: Context) -> int:
        return sum(self.cached.missing(context)) - len(context.rows)

    def end(self) -> None:
        if hasattr(self, "cached"):  # `start` may have raised an error
            self.cached.release()

    def _room(self, context: Context) -> int:
        """How many tokens can be drafted before the draft model runs out of positions."""
        room = (self._limit or context.max_length) - max(context.lengths)
        if room <= 0:
            logger.warning_once(
                f"The draft model {type(self.model).__name__} has {self._limit} positions, and the context is "
                "longer: nothing is drafted from here on."
            )
        return max(room, 0)

    def _catch_up(self, context: Context, most: int) -> None:
        """Feed the tokens that are not cached yet, unless the next forward can feed them along with its own.

        Args:
            most: how many tokens may be drafted.
        """
        cached, chunk = self.cached, self._call.prefill_chunk_size
        missing = cached.missing(context)
        unequal = len(set(missing)) > 1 and max(missing) > (1 if cached.has_states else 2)
        alone = cached.at_once is not None and max(missing) > cached.at_once and cached.has_begun
        if max(missing) > (chunk or max(missing)) or unequal or alone:
            cached.prefill(context, chunk)

    def _forced_scores(self, context: Context, step: int) -> Tensor | None:
        """`[rows, 1, vocab]`, where constraints leave each row just one token: no forward is needed."""
        constraints = [p for p in self._call.processors if isinstance(p, Constraint)]
        if not constraints or self.cached.at_once is not None:
            return None
        drafts = drafts_of(context, step)
        forced = []
        for row, own in zip(context.rows, drafts):
            token = forced_token(constraints, context, row, own) if len(own) == step else 0  # past the last column
            if token is None:
                return None
            forced.append(token)
        scores = torch.full((len(forced), 1, self._call.vocab_size), -math.inf, device=context.tokens.device)
        return scores.scatter_(2, to_device(forced, scores.device)[:, None, None], 0.0)

    def _logits(self, context: Context, step: int, most: int, drawn: Tensor | None) -> Tensor:
        """`[rows, n, vocab]`, for the n tokens after the first `step` drafts; here n is 1.

        Args:
            most: n is at most this.
            drawn: `[rows, 1]`, the last of those drafts.
        """
        missing = [n + step for n in self.cached.missing(context)]
        equal = min(missing) == max(missing)
        logits = self.cached.forward(
            context, max(missing), 1 if equal else None, drawn if max(missing) == 1 else None
        ).logits
        if not equal:
            self.cached.forget(context.rows, [max(missing) - n for n in missing])  # fill after a row's own tokens
            last = to_device(missing, logits.device)[:, None, None] - 1
            logits = logits.gather(1, last.expand(-1, 1, logits.shape[2]))
        return logits

    def _processed(self, logits: Tensor, context: Context, step: int) -> Tensor:
        """`[rows, k, vocab]` float32 scores of the target's tokens, from the logits for the k tokens after `step`."""
        logits = self._in_vocabulary(logits.float().to(context.tokens.device))
        if not self._call.processors:
            return logits
        return self._usable(self._process(logits, context, offset=step), logits)

    def _usable(self, scores: Tensor, logits: Tensor) -> Tensor:
        """Processed scores; where processors leave no token, the logits before them, since q is what was drawn from."""
        return torch.where(scores.amax(dim=-1, keepdim=True).isfinite(), scores, logits)

    def _in_vocabulary(self, logits: Tensor) -> Tensor:
        """`[rows, k, vocab]`: the draft's logits for the target's tokens."""
        return _fit_vocabulary(logits, self._call.vocab_size)


def _fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Cut or pad `[rows, k, draft vocab]` to the target's ids: padding rows of an embedding are not tokens."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits[..., :vocab_size]
