"""CachedModel: a model and its RaggedCache, fed from a Context.

Owns the inputs of a forward besides tokens; `layout.py` computes the slots, positions and mask of the tokens.
Both target and draft run through it. It never chooses a token.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..cache.ragged import RaggedCache
from ..device import forward_parameters, no_bookkeeping, row_index
from ..sampling.context import Context
from .encoded import Encoded
from .graphs import StaticForwards
from .kept import give_back
from .layout import Layout
from .masks import takes_position_ids
from .multimodal_prompt import FirstForward, OfRow, OfToken
from .target import Verified, aligned, check_logits, room_after


class Resumable(Protocol):
    """Has run a model's first layers over drafts (see `early_exit.py`)."""

    def resumed(self, width: int) -> PreTrainedModel | None:
        """What runs the layers after these over the first `width` tokens; `None` if the whole model must run."""


class Listener(Protocol):
    """Reads the hidden states of a model's forwards (see `tap.py`)."""

    def listening(self) -> AbstractContextManager[None]:
        """Inside, the model runs."""

    needs_all: bool  # whether the model must be asked for the logits of all tokens, so that it runs over all

    @property
    def width(self) -> int:
        """Of how many tokens per row it has heard states in the last forward: the last ones."""

    def hand_over(self, rows: list[int], columns: list[int]) -> None:
        """That forward is over; `columns` are those of each row's first token."""


class CachedModel:
    """Feeds tokens of a context to a model, and keeps the keys and values of each row.

    Args:
        model: a decoder-only model, or an encoder-decoder model, whose decoder this feeds.
        cache: an empty cache, or one that holds the beginning of the context.
        layout: where the context's tokens are in it.
        prompt_embeds: `[batch, columns, width]`, embeddings of the first columns, where the prompt is embeddings.
        first_forward: reads the prompt, where that is more than tokens; see `read_prompt`.
        static: runs short forwards with fixed shapes; for the ragged layout, and a cache whose capacity never grows.
        encoded: the encoder inputs of every forward.
        unnamed_positions: pass position ids although the forward has no such parameter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RaggedCache,
        layout: Layout,
        prompt_embeds: Tensor | None = None,
        first_forward: FirstForward | None = None,
        static: StaticForwards | None = None,
        encoded: Encoded | None = None,
        unnamed_positions: bool = False,
    ):
        self.model = model
        self.cache = cache
        self.device = cache.device
        self.layout = layout.on(self.device)
        self.prompt_embeds = prompt_embeds
        # Recurrent layers apply padding masks only in forwards over several tokens; a single token is never padding.
        self._reads_as_vanilla = layout.padding_mask is not None and self.has_states
        special = layout.padding_mask if prompt_embeds is None and self._reads_as_vanilla else prompt_embeds
        self._prompt_columns = 0 if special is None else special.shape[1]
        self.first_forward = first_forward
        self.prompt_is_tokens = first_forward is None
        self.later_inputs: dict[str, Any] = {}  # more inputs of each forward
        self.static = static
        self.encoded = encoded
        self.no_bookkeeping = no_bookkeeping(model, self.device)
        self.early: Resumable | None = None  # what the next forward goes on from, if drafts have run its first layers
        self.tap: Listener | None = None
        self.at_once: int | None = None  # how many tokens one forward continues a state over; None for no limit
        self.forwards = 0  # those whose logits were needed
        self.prefill_forwards = 0
        parameters = forward_parameters(model)
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self.cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._takes_position_ids = takes_position_ids(model) or unnamed_positions
        if first_forward is not None and first_forward.places_tokens_itself:
            self._takes_position_ids = False
        self._takes_logits_to_keep = "logits_to_keep" in parameters

    @property
    def has_states(self) -> bool:
        """Whether all rows are fed equally many tokens, and committed tokens may have to be fed again."""
        return bool(self.cache.states)

    @property
    def prompt_is_unread(self) -> bool:
        """Whether `read_prompt` comes first."""
        return self.first_forward is not None

    @property
    def has_begun(self) -> bool:
        """Whether anything is cached."""
        return self.cache.get_seq_length() > 0

    def forget(self, rows: list[int], counts: list[int]) -> None:
        """Roll back the last `counts` entries of these rows."""
        for row, count in zip(rows, counts):
            self.cache.lengths[row] -= count

    def missing(self, context: Context) -> list[int]:
        """How many committed tokens of each active row the cache does not hold yet."""
        return [context.ends[row] + self.layout.slot_offset[row] - self.cache.lengths[row] for row in context.rows]

    def prompt_left(self, context: Context) -> list[int]:
        """By active row, the uncached columns of a prompt that needs separate forwards.

        Such a prompt is embeddings, or has padding that recurrent layers must be masked for as in vanilla.
        """
        end = self._prompt_columns - self.layout.column_offset
        return [max(end + self.layout.slot_offset[row] - self.cache.lengths[row], 0) for row in context.rows]

    def prefill(
        self, context: Context, chunk_size: int | None = None, **kwargs: Any
    ) -> list[tuple[list[int], ModelOutput]]:
        """Feed all committed tokens except the last one, which the next `forward` will feed. No logits are needed.

        If a prompt must be read as vanilla reads it, the next `forward` will feed its last chunk.

        Returns: for each chunk, how many of its tokens belong to each row, and the output.
        """
        outputs = []
        while any(own := self._next_own(context, chunk_size)):
            # With states, no row may be fed tokens that do not belong to it.
            todo = min(n for n in own if n) if self.has_states else max(own)
            width = min(chunk_size or todo, todo)
            if self.at_once is not None:
                width = self.at_once if self.cache.get_seq_length() else todo
            counts = [min(n, width) for n in own]
            with self.no_bookkeeping():
                outputs.append((counts, self._feed(context, width, keep=1, prefill=True, **kwargs)))
            self.prefill_forwards += 1
            if self.has_states:
                most = [self.cache.lengths[row] - width + n for row, n in zip(context.rows, counts)]
                self.cache.roll_back(context.rows, most)
        self.commit(context)
        return outputs

    def restart(self, row: int, slots: int, last: int) -> None:
        """Forget a row, which is not active: another one takes its place.

        For the ragged layout, a cache without states, and rows that begin in column 0.

        Args:
            slots: the most that the row can need.
            last: see `Layout.max_slot`.
        """
        self.cache.allow(slots)
        self.cache.restart(row)
        if self.layout.max_slot is not None:
            self.layout.max_slot[row] = last

    def read(self, context: Context, count: int) -> None:
        """Feed at most `count` uncached tokens of each active row, in one forward; never the last committed one."""
        width = min(max(self._next_own(context, None)), count)
        if width == 0:
            return
        with self.no_bookkeeping():
            self._feed(context, width, keep=1, prefill=True)
        self.prefill_forwards += 1
        self.commit(context)

    def _next_own(self, context: Context, chunk_size: int | None) -> list[int]:
        """How many tokens of each active row `prefill` has to feed before anything else."""
        missing, left = self.missing(context), self.prompt_left(context)
        last = (chunk_size or max(left)) if self._reads_as_vanilla and missing == left else 1
        own = [max((n - 1) // last * last, 0) for n in missing]
        return [min(pair) for pair in zip(own, left)] if any(left) else own

    def read_prompt(self, **kwargs: Any) -> ModelOutput:
        """Vanilla's first forward, over all rows and the whole prompt. Later forwards are as usual.

        Returns: the model's output, `logits` `[batch, 1, vocab]` of the last column.

        Raises:
            DoesNotFit: if our cache cannot hold the result.
        """
        assert self.first_forward is not None
        first_forward, self.first_forward = self.first_forward, None
        self.forwards += 1
        with self._listening():
            output = first_forward.run(**kwargs)
        self.take_over(first_forward, output)
        if self.tap is not None:
            rows, columns = first_forward.ids.shape
            self.tap.hand_over(list(range(rows)), [columns - self.tap.width] * rows)
        output.logits = output.logits[:, -1:]
        return output

    def take_over(self, first_forward: FirstForward, output: ModelOutput) -> None:
        """Load the entries that a forward over the whole prompt has left in a transformers cache."""
        self.later_inputs = first_forward.later_inputs(output)
        self.cache.load(first_forward.cache, list(self.layout.first))
        first_forward.forget()
        self.prompt_is_tokens = False

    def room(self, context: Context, most: int) -> list[int]:
        """How many drafts, at most `most`, the next forward can take after each active row's pending tokens."""
        return room_after(self.missing(context), most) if self.has_states else [most] * len(context.rows)

    def verify(self, context: Context, draft_tokens: Tensor, lengths: list[int], **kwargs: Any) -> Verified:
        """One forward over each row's uncached tokens and its drafts, which follow them in the context.

        Args:
            draft_tokens: `[active rows, γ]`.
            lengths: how many of them each row proposes.
        """
        if self.has_states and not draft_tokens.shape[1] and len(set(self.missing(context))) > 1:
            self.prefill(context)  # without drafts as fill, some rows would never catch up
        missing = self.missing(context)
        pending = [n - 1 for n in missing]
        of_prompt = pending if any(self.prompt_left(context)) else []
        width = max(n + proposed for n, proposed in zip(missing, lengths))
        output = self.forward(context, width, keep=width - min(pending), **kwargs)
        output.logits = aligned(output.logits, pending, draft_tokens.shape[1] + 1)
        return Verified(output, pending, of_prompt)

    def forward(
        self, context: Context, width: int, keep: int | None = None, ids: Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        """Feed each active row its uncached tokens and the tokens after them, `width` in all.

        Args:
            keep: return the logits of so many last tokens; by default of all.
            ids: `[active rows, width]`, the tokens to feed, where they are known already.

        Returns: the model's output, `logits` `[active rows, keep, vocab]` of the last `keep` tokens.
            The cache now holds all fed tokens, until `commit`.

        Raises:
            ValueError: if the model returns fewer logits than that.
        """
        keep = keep or width
        self.forwards += 1
        is_plain = not any(self.prompt_left(context)) and all(value is None for value in kwargs.values())
        static = self.static
        with self.no_bookkeeping():
            if static is not None and is_plain and self.tap is None and static.takes(len(context.rows), width):
                return CausalLMOutputWithPast(logits=self._feed_static(static, context, width, ids)[:, -keep:])
            early, self.early = self.early, None
            model = early.resumed(width) if early is not None and is_plain else None
            output = self._feed(context, width, keep, ids, model=model, **kwargs)
        check_logits(self.model, output, keep)
        output.logits = output.logits[:, -keep:]
        return output

    def commit(self, context: Context) -> None:
        """Keep the entries of committed tokens except the last one; roll back rejected drafts."""
        self.cache.roll_back(
            context.rows, [max(context.ends[row] + self.layout.slot_offset[row] - 1, 0) for row in context.rows]
        )

    def release(self) -> None:
        """The call is over: the next one may use the kept cache and forwards. Nothing may be fed any more."""
        static, self.static = self.static, None
        if static is not None:
            give_back(self.model, static)

    def _feed_static(self, static: StaticForwards, context: Context, width: int, ids: Tensor | None) -> Tensor:
        rows = context.rows
        self.cache.activate(rows)
        starts = [self.cache.lengths[row] for row in rows]
        offset, last = self.layout.position_offset, self.layout.max_slot
        offsets = [0] * len(rows) if offset is None else [offset[row] for row in rows]
        limits = [self.cache.capacity] * len(rows) if last is None else [last[row] for row in rows]
        places = torch.tensor([starts, offsets, limits])
        ids = self._tokens(context, starts, width, ids)
        self._advance(rows, width)
        return static(self.model, ids, places.to(self.device, non_blocking=True))

    def _tokens(self, context: Context, starts: list[int], width: int, ids: Tensor | None) -> Tensor:
        """`[active rows, width]` ids for the slots from `starts` on: the given ones, or the context's."""
        if ids is None:
            offset = self.layout.slot_offset
            ids = context.gather([start - offset[row] for row, start in zip(context.rows, starts)], width)
        return ids.to(self.device).clamp(0, self._vocab_size - 1)

    def _feed(
        self,
        context: Context,
        width: int,
        keep: int,
        ids: Tensor | None = None,
        prefill: bool = False,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        cache, rows = self.cache, context.rows
        starts = [cache.lengths[row] for row in rows]
        cache.activate(rows)
        cache.prepare(width, [context.ends[row] + self.layout.slot_offset[row] - 1 for row in rows], prefill)

        slots = self.layout.slots(starts, width, self.device)
        mask = self.layout.mask(self.model, cache, slots)
        inputs: dict[str, Any] = {self.cache_name: cache, "use_cache": True, "attention_mask": mask}
        embeds = self.prompt_embeds
        if embeds is not None and any(self.prompt_left(context)):
            columns = self.layout.columns(slots, rows).clamp(max=embeds.shape[1] - 1)
            embeds = embeds[row_index(rows, embeds.device)].to(self.device)
            inputs["inputs_embeds"] = embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[2]))
        else:
            inputs["input_ids"] = self._tokens(context, starts, width, ids)
        if self._takes_position_ids:
            inputs["position_ids"] = self.layout.positions(rows, starts, slots)
        if self._takes_logits_to_keep and (self.tap is None or not self.tap.needs_all):
            inputs["logits_to_keep"] = keep
        for name, value in self.later_inputs.items():
            inputs[name] = value.fed(rows, width) if isinstance(value, (OfRow, OfToken)) else value
        if self.encoded is not None:
            inputs = self.encoded.join(inputs, rows)
        with self._listening():
            output = (model or self.model)(**inputs, **kwargs, return_dict=True)
        self._advance(rows, width)
        if self.tap is not None:
            unseen = width - self.tap.width  # some models leave out tokens whose logits nobody reads
            begins = [start + unseen - self.layout.slot_offset[row] for row, start in zip(rows, starts)]
            self.tap.hand_over(rows, begins)
        return output

    def _listening(self) -> AbstractContextManager[None]:
        return nullcontext() if self.tap is None else self.tap.listening()

    def _advance(self, rows: list[int], width: int) -> None:
        for row in rows:
            self.cache.lengths[row] += width
