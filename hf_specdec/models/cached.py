"""CachedModel: a model and its RaggedCache, fed from a Context.

Owns what a forward needs besides tokens: which slots they go to, their positions, and the mask. Target and draft are
both driven through it. It never chooses a token.

Slots and columns. The cache knows slots, the context columns. In the *ragged* layout slot 0 is a row's first real
token, so rows hold no padding and have lengths of their own; in the *aligned* layout slot and column coincide, padding
included, all rows always have equal lengths, and a 2-D mask says what is padding, as in vanilla `generate()`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..cache.ragged import RaggedCache
from ..device import forward_parameters, no_bookkeeping, to_device
from ..sampling.context import Context
from .encoded import Encoded
from .masks import Mask, ragged_mask, takes_position_ids
from .multimodal_prompt import FirstForward, OfRow, OfToken
from .static import StaticForwards, give_back


class CachedModel:
    """Feeds tokens of a context to a model, keeping keys and values of each row.

    Args:
        model: a decoder-only model, or an encoder-decoder model, of which this feeds the decoder.
        cache: an empty cache, or one that holds the beginning of the context.
        first: by row of the batch, which column is slot 0 of the ragged layout.
        column_offset: added to a context's columns; not 0 when the cache began before the context did.
        padding_mask: `[batch, columns]` bool for the aligned layout, `None` for the ragged one.
        position_offset: by row of the batch, position id minus slot.
        prompt_positions: `[batch, columns]` position ids of the first columns, where that offset does not give them.
        axes: `[axes, batch, 1]`, what to add for each axis where a token has a position on several.
        prompt_embeds: `[batch, columns, width]`, what the first columns are fed as, where the prompt is embeddings.
        first_forward: reads the prompt, where that is more than tokens; see `read_prompt`.
        max_slot: by row of the batch, the last slot that will ever be committed; positions are not asked for beyond it.
        static: runs short forwards with fixed shapes; for the ragged layout, and a cache whose capacity never grows.
        encoded: what every forward is given of an encoder.
        unnamed_positions: tell positions though the forward does not name them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RaggedCache,
        first: list[int],
        column_offset: int = 0,
        padding_mask: Tensor | None = None,
        position_offset: list[int] | None = None,
        prompt_positions: Tensor | None = None,
        axes: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        first_forward: FirstForward | None = None,
        max_slot: list[int] | None = None,
        static: StaticForwards | None = None,
        encoded: Encoded | None = None,
        unnamed_positions: bool = False,
    ):
        self.model = model
        self.cache = cache
        self.device = cache.device
        self.padding_mask = None if padding_mask is None else padding_mask.to(self.device)
        self._first_real = None if self.padding_mask is None else self.padding_mask.long().argmax(dim=1)  # slots
        self.column_offset = column_offset
        self.slot_offset = [column_offset - (0 if padding_mask is not None else f) for f in first]
        self.position_offset = position_offset or [0] * len(first)
        self.prompt_positions = None if prompt_positions is None else prompt_positions.to(self.device)
        self.axes = None if axes is None else axes.to(self.device)
        self.prompt_embeds = prompt_embeds
        # Recurrent layers are told padding in forwards over several tokens only: a single one is never padding to them.
        self._reads_as_vanilla = padding_mask is not None and bool(cache.states)
        special = prompt_embeds if prompt_embeds is not None else padding_mask if self._reads_as_vanilla else None
        self._prompt_columns = 0 if special is None else special.shape[1]
        self.first_forward = first_forward
        self.prompt_is_tokens = first_forward is None
        self.later_inputs: dict[str, Any] = {}  # what each forward is given besides
        self.max_slot = max_slot
        self.static = static
        self.encoded = encoded
        self.no_bookkeeping = no_bookkeeping(model, self.device)
        self.at_once: int | None = None  # over so many tokens a state goes on in one forward; None for all
        self.forwards = 0  # whose logits were wanted
        self.prefill_forwards = 0
        parameters = forward_parameters(model)
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self.cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._takes_position_ids = takes_position_ids(model) or unnamed_positions
        if first_forward is not None and first_forward.places_tokens_itself:
            self._takes_position_ids = False
        self._takes_logits_to_keep = "logits_to_keep" in parameters

    @property
    def prompt_is_unread(self) -> bool:
        """Whether `read_prompt` comes first."""
        return self.first_forward is not None

    def missing(self, context: Context) -> list[int]:
        """How many committed tokens of each active row the cache does not hold yet."""
        return [context.ends[row] + self.slot_offset[row] - self.cache.lengths[row] for row in context.rows]

    def prompt_left(self, context: Context) -> list[int]:
        """How many columns of a prompt that needs forwards of its own the cache of each active row does not hold yet.

        Such a prompt is embeddings, or has padding that recurrent layers must be told as in vanilla.
        """
        end = self._prompt_columns - self.column_offset
        return [max(end + self.slot_offset[row] - self.cache.lengths[row], 0) for row in context.rows]

    def prefill(
        self, context: Context, chunk_size: int | None = None, **kwargs: Any
    ) -> list[tuple[list[int], ModelOutput]]:
        """Feed all committed tokens but the last one, which the next `forward` will feed. No logits are wanted.

        If a prompt must be read as vanilla reads it, the next `forward` will feed its last chunk.

        Returns: for each chunk, how many of its tokens were each row's own, and the output.
        """
        outputs = []
        while any(own := self._next_own(context, chunk_size)):
            # With states no row may be fed what is not its own.
            todo = min(n for n in own if n) if self.cache.states else max(own)
            width = min(chunk_size or todo, todo)
            if self.at_once is not None:
                width = self.at_once if self.cache.get_seq_length() else todo
            counts = [min(n, width) for n in own]
            with self.no_bookkeeping():
                outputs.append((counts, self._feed(context, width, keep=1, prefill=True, **kwargs)))
            self.prefill_forwards += 1
            if self.cache.states:
                most = [self.cache.lengths[row] - width + n for row, n in zip(context.rows, counts)]
                self.cache.roll_back(context.rows, most)
        self.commit(context)
        return outputs

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
            DoesNotFit: if the cache cannot hold what comes of it.
        """
        assert self.first_forward is not None
        first_forward, self.first_forward = self.first_forward, None
        self.forwards += 1
        output = first_forward.run(**kwargs)
        self.take_over(first_forward, output)
        output.logits = output.logits[:, -1:]
        return output

    def take_over(self, first_forward: FirstForward, output: ModelOutput) -> None:
        """Hold what a forward over the whole prompt has left in a cache of transformers."""
        self.later_inputs = first_forward.later_inputs(output)
        self.cache.load(first_forward.cache, [self.column_offset - offset for offset in self.slot_offset])
        first_forward.forget()
        self.prompt_is_tokens = False

    def forward(
        self, context: Context, width: int, keep: int | None = None, ids: Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        """Feed each active row its uncached tokens and what stands behind them, `width` in all.

        Args:
            keep: of how many of them the logits are wanted; by default of all.
            ids: `[active rows, width]`, what to feed where that is known already.

        Returns: the model's output, `logits` `[active rows, keep, vocab]` of the last `keep` tokens.
            The cache now holds all of it, until `commit`.

        Raises:
            ValueError: if the model returns fewer logits than that.
        """
        keep = keep or width
        self.forwards += 1
        is_plain = not any(self.prompt_left(context)) and all(value is None for value in kwargs.values())
        static = self.static
        with self.no_bookkeeping():
            if static is not None and is_plain and static.takes(len(context.rows), width):
                return CausalLMOutputWithPast(logits=self._feed_static(static, context, width, ids)[:, -keep:])
            output = self._feed(context, width, keep, ids, **kwargs)
        if output.logits.shape[1] < keep:
            raise ValueError(
                f"{type(self.model).__name__} returned the logits of {output.logits.shape[1]} of the {keep} tokens "
                "that it was asked about, so strategy='spec' cannot verify drafts with it: let its forward return the "
                "logits of every token, or of as many as `logits_to_keep` says"
            )
        output.logits = output.logits[:, -keep:]
        return output

    def commit(self, context: Context) -> None:
        """Keep the entries of committed tokens but the last one, forget those of rejected drafts."""
        self.cache.roll_back(
            context.rows, [max(context.ends[row] + self.slot_offset[row] - 1, 0) for row in context.rows]
        )

    def release(self) -> None:
        """The call is over: what is kept for the next one may be used by it."""
        if self.static is not None:
            give_back(self.model, self.cache, self.static)

    def _feed_static(self, static: StaticForwards, context: Context, width: int, ids: Tensor | None) -> Tensor:
        rows = context.rows
        self.cache.activate(rows)
        starts = [self.cache.lengths[row] for row in rows]
        last = [self.cache.capacity] * len(rows) if self.max_slot is None else [self.max_slot[row] for row in rows]
        places = torch.tensor([starts, [self.position_offset[row] for row in rows], last])
        ids = self._tokens(context, starts, width, ids)
        self._advance(rows, width)
        return static(self.model, ids, places.to(self.device, non_blocking=True))

    def _tokens(self, context: Context, starts: list[int], width: int, ids: Tensor | None) -> Tensor:
        """`[active rows, width]` ids for the slots from `starts` on: those given, or the context's."""
        if ids is None:
            ids = context.gather([start - self.slot_offset[row] for row, start in zip(context.rows, starts)], width)
        return ids.to(self.device).clamp(0, self._vocab_size - 1)

    def _feed(
        self,
        context: Context,
        width: int,
        keep: int,
        ids: Tensor | None = None,
        prefill: bool = False,
        **kwargs: Any,
    ) -> ModelOutput:
        cache, rows = self.cache, context.rows
        starts = [cache.lengths[row] for row in rows]
        cache.activate(rows)
        cache.prepare(width, [context.ends[row] + self.slot_offset[row] - 1 for row in rows], prefill)

        slots = to_device(starts, self.device)[:, None] + torch.arange(width, device=self.device)
        inputs: dict[str, Any] = {self.cache_name: cache, "use_cache": True, "attention_mask": self._mask(slots)}
        embeds = self.prompt_embeds
        if embeds is not None and any(self.prompt_left(context)):
            first = to_device([self.column_offset - self.slot_offset[row] for row in rows], self.device)
            columns = (slots + first[:, None]).clamp(max=embeds.shape[1] - 1)
            inputs["inputs_embeds"] = (
                embeds[rows].to(self.device).gather(1, columns[..., None].expand(-1, -1, embeds.shape[2]))
            )
        else:
            inputs["input_ids"] = self._tokens(context, starts, width, ids)
        if self._takes_position_ids:
            inputs["position_ids"] = self._positions(rows, starts, slots)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        for name, value in self.later_inputs.items():
            inputs[name] = value.fed(rows, width) if isinstance(value, (OfRow, OfToken)) else value
        if self.encoded is not None:
            inputs = self.encoded.join(inputs, rows)
        output = self.model(**inputs, **kwargs, return_dict=True)
        self._advance(rows, width)
        return output

    def _advance(self, rows: list[int], width: int) -> None:
        for row in rows:
            self.cache.lengths[row] += width

    def _positions(self, rows: list[int], starts: list[int], slots: Tensor) -> Tensor:
        def by_row(values: list[int]) -> Tensor:
            return to_device([values[row] for row in rows], self.device)[:, None]

        positions, width = slots, slots.shape[1]
        last = self.max_slot
        if last is not None and any(start + width - 1 > last[row] for row, start in zip(rows, starts)):
            positions = positions.clamp(max=by_row(last))  # fill must not ask for positions that do not exist
        if any(self.position_offset[row] for row in rows):
            positions = (positions + by_row(self.position_offset)).clamp(min=0)
        if self.axes is not None:
            positions = positions + self.axes[:, rows]
        if self.prompt_positions is None:
            return positions
        columns = slots - by_row(self.slot_offset) + self.column_offset
        known = self.prompt_positions[rows]
        given = known.gather(1, columns.clamp(max=known.shape[1] - 1))
        return torch.where(columns < known.shape[1], given, positions)

    def _mask(self, slots: Tensor) -> Mask | None:
        rows, past = self.cache.rows, self.cache.get_seq_length()
        used = past + slots.shape[1]
        if not self.cache.has_entries:  # recurrent layers alone: which of these tokens are real
            told = self._told_padding(rows, used)
            return None if told is None or past >= self._prompt_columns else told[:, past:]
        if not self.cache.sees_one_span:
            first = None if self._first_real is None else self._first_real[rows]
            held = {window.layer_type: window.slots(self.device) for window in self.cache.windows}
            return ragged_mask(self.model, slots, used, held, first)
        return self._told_padding(rows, used)  # for plain causal attention transformers builds the rest

    def _told_padding(self, rows: list[int], used: int) -> Tensor | None:
        """`[rows, used]`, which of the first `used` columns are real, as vanilla tells it; `None` where all are."""
        if self.padding_mask is None:
            return None
        prompt = self.padding_mask[rows, :used]
        return torch.cat([prompt, prompt.new_ones(len(prompt), used - prompt.shape[1])], dim=1).long()
