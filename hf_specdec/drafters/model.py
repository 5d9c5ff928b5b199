"""A draft model: one tight loop of forwards over all rows, with its own RaggedCache."""

import math
from dataclasses import replace

import torch
from torch import Tensor
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
from ..models.self_fed import SelfFedModel
from ..sampling.context import Context
from ..sampling.processors import BlockProcessors, drafts_of
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

    def __init__(self, model: PreTrainedModel, confidence_threshold: float = 0.0, compiles: bool = False):
        self.model = model
        self.compiles = compiles
        self.confidence_threshold = confidence_threshold
        self.shows_confidence = model_device(model).type == "cpu"

    @property
    def forwards(self) -> int:
        return self.cached.forwards

    @property
    def prefill_forwards(self) -> int:
        return self.cached.prefill_forwards

    @property
    def takes_ragged_rows(self) -> bool:
        return bool(Abilities.of(self.model).ragged_drafts)

    def start(self, call: DraftRequest, context: Context) -> None:
        self._call = call
        self._process = BlockProcessors(call.processors)
        config = self.model.config.get_text_config(decoder=True)
        limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
        self._limit: int | None = next(filter(None, limits), None)
        if Abilities.of(self.model).needs_own_code:
            self.cached = self._self_fed(context)
            return
        rows, device, static = context.batch_size, model_device(self.model), None
        layers = cache_layers(DynamicCache(config=self.model.config), config, rows, context.max_length)
        cache = RaggedCache(rows, device, context.prompt_width + 256, context.max_length, layers)
        padded = (call.lockstep or bool(cache.states)) and max(context.first) > 0
        encoded = None if call.encoder is None else call.encoder.for_draft(self.model)
        seen = show(self.model, call.inputs, rows) if call.inputs else None
        changing = padded or bool(cache.states) or encoded is not None or seen is not None
        fixed = (call.static or self.compiles) and not changing and self.takes_ragged_rows
        widths = compilable(self.model, STEPS, fixed, "drafts") if self.compiles else ()
        if fixed and (call.static or widths):
            cache, static = borrow(self.model, rows, device, context.max_length, widths, STEPS)
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
        if max_tokens > 0:
            self._catch_up(context)
        tokens: list[Tensor] = []  # each [rows, 1]
        best: list[Tensor] = []  # each [rows, 1], the score of the likeliest token
        probs: list[Tensor] = []  # each [rows, 1, vocab]
        sure: list[Tensor] = []  # each [rows, 1], whether another one may follow
        lengths = [max_tokens] * len(context.rows)
        drawn: Tensor | None = None
        for step in range(max_tokens):
            scores = self._forced_scores(context, step)
            if scores is None:
                scores = self._next_scores(context, step, drawn)
            best.append(scores.amax(dim=-1))
            drawn, q = self._call.rule.draw(scores, context, step)
            tokens.append(drawn)
            if q is not None:
                probs.append(q)
            if self._call.processors:
                context.write_drafts(drawn, offset=step)  # processors see them
            if self.confidence_threshold and not self.shows_confidence:  # reading it would wait for the device
                sure.append(self._confidence(scores, drawn) >= self.confidence_threshold)
            lengths, done = self._stop(step, lengths, scores, drawn)
            if done:
                break
        if not tokens:
            return Draft(context.tokens.new_empty(len(context.rows), 0))
        lengths = [min(n, len(tokens)) for n in lengths]
        valid = torch.cat(best, dim=1).isfinite().all(dim=1)
        draft = Draft(torch.cat(tokens, dim=1), torch.cat(probs, dim=1) if probs else None, lengths, valid)
        if not sure:
            return draft
        return draft.up_to(1 + torch.cat(sure, dim=1)[:, :-1].long().cumprod(dim=1).sum(dim=1))

    def _stop(self, step: int, lengths: list[int], scores: Tensor, drawn: Tensor) -> tuple[list[int], bool]:
        """The draft length of each row as known after a step, and whether that was the last step."""
        go_on, last = self._call.go_on, step + 1 >= max(lengths)
        if not self.shows_confidence or (self.confidence_threshold == 0 and (go_on is None or last)):
            return lengths, last
        confidence: list[float] = self._confidence(scores, drawn).squeeze(-1).tolist()
        if any(map(math.isnan, confidence)):
            return lengths, True  # no distribution: the loop raises an error
        unsure = [p < self.confidence_threshold for p in confidence]
        lengths = [min(n, step + 1) if stop else n for n, stop in zip(lengths, unsure)]
        last = step + 1 >= max(lengths)
        return lengths, last or (go_on is not None and not go_on(confidence))

    def _confidence(self, scores: Tensor, drawn: Tensor) -> Tensor:
        """`[rows, 1]`: the probabilities of the drawn tokens."""
        return (scores[:, 0].gather(-1, drawn) - scores[:, 0].logsumexp(dim=-1, keepdim=True)).exp()

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

    def _catch_up(self, context: Context) -> None:
        """Feed the tokens that are not cached yet, unless the next forward can feed them along with its own."""
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

    def _next_scores(self, context: Context, step: int, drawn: Tensor | None) -> Tensor:
        """`[rows, 1, vocab]` float32, processed, for the token after the first `step` drafts, `drawn` the last one."""
        missing = [n + step for n in self.cached.missing(context)]
        equal = min(missing) == max(missing)
        logits = self.cached.forward(
            context, max(missing), 1 if equal else None, drawn if max(missing) == 1 else None
        ).logits
        if not equal:
            self.cached.forget(context.rows, [max(missing) - n for n in missing])  # fill after a row's own tokens
            last = to_device(missing, logits.device)[:, None, None] - 1
            logits = logits.gather(1, last.expand(-1, 1, logits.shape[2]))
        logits = _fit_vocabulary(logits.float().to(context.tokens.device), self._call.vocab_size)
        if not self._call.processors:
            return logits
        scores = self._process(logits, context, offset=step)
        # If processors leave no token, draw from the unprocessed distribution: q is still what was drawn from.
        return torch.where(scores.amax(dim=-1, keepdim=True).isfinite(), scores, logits)


def _fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Cut or pad `[rows, 1, draft vocab]` to the target's ids: padding rows of an embedding are not tokens."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits[..., :vocab_size]
