"""Assistants that attend to the target's own keys and values, as Gemma-4's do: they have no cache and read no text.

    h_0 = the target's states at the last token that it has read, after its final norm
    o_i = layers(project_in(embed(x), h_(i-1)))      x: the last committed token, then the last draft
    h_i = project_out(o_i);  logits of the next token = head(o_i)

Layers have queries only. Those of each type see what the target's last layer of that type with keys of its own has
cached. The position is that of the last committed token for all drafts, so nothing is ever written. Rows of different
lengths need a mask only:

    row 0   the cat sat on  [a]        sees 4 entries
    row 1   two six [ten]              sees 2 entries, and is masked after them
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...device import forward_parameters, mask_width, no_bookkeeping, row_index, to_device
from ...models.cached import CachedModel
from ...models.masks import takes_masks
from ...models.tap import FINAL, Tap
from ...sampling.context import Context
from .drafter import HeadDrafter
from .entries import embed
from .fit import check_device, check_sizes

_KEPT = 64  # states per row that are kept from a forward: those of all tokens that may be the last accepted one


class SharedEntriesDrafter(HeadDrafter):
    """Drafts with an assistant that attends to the target's entries; see `HeadDrafter` for the arguments."""

    def _check_fit(self, head: Any, target: PreTrainedModel) -> None:
        _check_fit(head, target)

    def _make_entries(self, context: Context, target: CachedModel) -> "SharedEntries":
        return SharedEntries(self.model, target)

    def _make_tap(self, target: PreTrainedModel) -> Tap:
        return Tap(target, [FINAL], self.cached.read, whole=False)


@dataclass(frozen=True)
class _LastStates:
    """The last states of one of the target's forwards.

    Attributes:
        states: `[rows, width, hidden]`.
        begins: by row of the batch, where its states are, and the context's column of the first one.
    """

    states: Tensor
    begins: dict[int, tuple[int, int]]


class SharedEntries:
    """The same interface as `HeadEntries`, over entries that the target has made.

    Args:
        head: the assistant.
        target: the model whose entries and states it reads.
    """

    at_once: int | None = None
    waiting = 0  # forwards whose states are to be read, which costs nothing here
    prefill_forwards = 0

    def __init__(self, head: Any, target: CachedModel):
        self.head, self.device, self._target = head, head.device, target
        self.no_bookkeeping = no_bookkeeping(head, head.device)
        self.forwards = 0
        config = head.config.get_text_config(decoder=True)
        self._is_eager, self._window = config._attn_implementation == "eager", config.sliding_window
        makers = makers_of_entries(target.model.config.get_text_config(decoder=True))
        self._makers = {kind: makers[kind] for kind in set(config.layer_types)}
        self._embeddings: Any = target.model.get_input_embeddings()
        self._states: list[_LastStates] = []  # those of each row are in the latest that has it
        self._coming: set[int] = set()  # rows that have begun anew, and have not been active yet

    @property
    def can_draft(self) -> bool:
        return bool(self._states)

    def read(self, states: list[Tensor], rows: list[int], columns: list[int]) -> None:
        """Take the states of one of the target's forwards; see `models.tap.Reader`."""
        left_out = max(states[0].shape[1] - _KEPT, 0)
        kept = states[0][:, left_out:].clone() if left_out else states[0]
        if not self._coming.issuperset(rows):  # a forward over all rows that go on
            self._states.clear()
        begins = {row: (slot, column + left_out) for slot, (row, column) in enumerate(zip(rows, columns))}
        self._states = [one for one in self._states if not begins.keys() >= one.begins.keys()]
        self._states.append(_LastStates(kept, begins))

    def restart(self, row: int, slots: int) -> None:
        """Another text takes the place of a row that is not active; its states will be heard last."""
        self._coming.add(row)

    def read_ahead(self) -> None:
        """Nothing to do: the target's entries are all there is."""

    def missing(self, context: Context) -> list[int]:
        """2 for rows that can draft, since the state before the last committed token is known; 1 for others."""
        places, pending = self._places(context), self._target.missing(context)
        return [1 + (n == 1 and place is not None) for n, place in zip(pending, places)]

    def catch_up(self, context: Context) -> Tensor:
        """What the assistant makes of each row's last committed token, `[rows, 1, width of the assistant]`."""
        states = [one.states.flatten(0, 1) for one in self._states]
        flat = states[0] if len(states) == 1 else torch.cat(states)
        places = [place or 0 for place in self._places(context)]
        hidden = flat[to_device(places, flat.device)][:, None].to(self.device)
        self._look(context)
        return self._run(context.gather([end - 1 for end in context.active_ends], 1), hidden)

    def step(self, context: Context, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The same of one more token of each row, `[rows, 1]`, from what it made of the one before."""
        return self._run(tokens, self.head.post_projection(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        chosen = getattr(self.head, "masked_embedding", None)
        if chosen is not None:
            return _logits_of_clusters(chosen, hidden, self.head.lm_head.weight)
        logits: Tensor = self.head.lm_head(hidden)
        return logits

    def end_draft(self, context: Context) -> None:
        """Nothing to do: it writes no entries."""

    def commit(self, context: Context) -> None:
        self._coming.difference_update(context.rows)

    def release(self) -> None:
        self._states.clear()

    def _places(self, context: Context) -> list[int | None]:
        """Where the state before each active row's last token is, among all states in one line."""
        found: dict[int, int | None] = {}
        before = 0
        for one in self._states:
            rows, width = one.states.shape[:2]
            for row, (slot, begin) in one.begins.items():
                at = context.ends[row] - 2 - begin
                found[row] = before + slot * width + at if 0 <= at < width else None
            before += rows * width
        return [found.get(row) for row in context.rows]

    def _look(self, context: Context) -> None:
        """Find the entries that the drafts of this iteration attend to, their masks, and the position."""
        cache, layout, rows = self._target.cache, self._target.layout, context.rows
        cache.activate(rows)
        lengths = [cache.lengths[row] for row in rows]
        ends = to_device(lengths, self.device)[:, None]
        first = None if layout.first_real is None else layout.first_real[row_index(rows, self.device)][:, None]
        self._positions = layout.positions(rows, lengths, ends)
        self._entries: dict[str, tuple[Tensor, Tensor]] = {}
        self._masks: dict[str, Tensor | None] = {}
        for kind, index in self._makers.items():
            layer: Any = cache.layers[index]
            bases = [layer.base(row) for row in rows]
            used = max(max(length - base for length, base in zip(lengths, bases)), 1)
            shown = [states[: len(rows), :, :used] for states in (layer.keys, layer.values)]
            self._entries[kind] = shown[0], shown[1]
            window = self._window if kind == "sliding_attention" else None
            is_whole = min(lengths) == max(lengths) and not any(bases) and first is None and lengths[0] > 0
            if is_whole and (window is None or used < window):
                self._masks[kind] = None
                continue
            slots = to_device(bases, self.device)[:, None] + torch.arange(
                mask_width(used, self.device), device=self.device
            )
            begin = torch.zeros_like(ends) if first is None else first
            seen = (slots >= begin) & (slots < ends.maximum(begin + 1))  # a row without entries does not draft
            if window is not None:
                seen = seen & (slots > ends - window)
            self._masks[kind] = self._mask(seen[:, None, None, :])[..., :used]

    def _mask(self, seen: Tensor) -> Tensor:
        if not self._is_eager:
            return seen
        nothing = torch.zeros((), dtype=self.head.dtype, device=seen.device)
        return torch.where(seen, nothing, torch.finfo(self.head.dtype).min)

    def _run(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        self.forwards += 1
        embedded = embed(self._embeddings, tokens).to(self.device)
        joined = torch.cat([embedded, hidden], dim=-1).to(self.head.dtype)
        output = self.head.model(
            inputs_embeds=self.head.pre_projection(joined),
            attention_mask=self._masks,
            position_ids=self._positions,
            shared_kv_states=self._entries,
            use_cache=False,
        )
        made: Tensor = output.last_hidden_state
        return made


def shares_entries(model: object) -> bool:
    """Whether a model is such an assistant: it takes keys and values, and projects the target's states in and out."""
    parts = all(hasattr(model, name) for name in ("pre_projection", "post_projection", "lm_head", "model"))
    return parts and isinstance(model, PreTrainedModel) and "shared_kv_states" in forward_parameters(model)


def makers_of_entries(config: PreTrainedConfig) -> dict[str, int]:
    """By layer type, the last layer of a target that has keys and values of its own."""
    types: list[str] = getattr(config, "layer_types", None) or []
    own = len(types) - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {kind: index for index, kind in enumerate(types[:own])}


def _check_fit(head: Any, target: PreTrainedModel) -> None:
    """Raise a ValueError unless an assistant can draft for this target."""
    name, config = type(target).__name__, head.config.get_text_config(decoder=True)
    check_sizes(head.pre_projection.in_features // 2, config.vocab_size, target)
    check_device(head, target)
    if not takes_masks(head):
        raise ValueError(
            f"`assistant_model` ({type(head).__name__}) uses the attention implementation "
            f"{config._attn_implementation!r}, which takes no masks for rows of different lengths: load it with 'sdpa' "
            "or 'eager'"
        )
    makers = makers_of_entries(target.config.get_text_config(decoder=True))
    for kind, layer in zip(config.layer_types, head.model.layers):
        if kind not in makers:
            raise ValueError(
                f"`assistant_model` ({type(head).__name__}) attends to the entries of the target's layers of type "
                f"{kind!r}, and {name} has {', '.join(map(repr, sorted(makers))) or 'no layer types'}: use an "
                "assistant that was trained for this model"
            )
        theirs: Any = target.get_decoder()
        maker = theirs.layers[makers[kind]].self_attn
        (width, queries), (given, keys) = _sizes(layer.self_attn), _sizes(maker)
        if width != given or queries != keys * layer.self_attn.num_key_value_groups:
            wanted = queries // layer.self_attn.num_key_value_groups
            raise ValueError(
                f"`assistant_model` is a head for another target: its layers of type {kind!r} attend to {wanted} key "
                f"heads of width {width}, but {name} has {keys} of width {given}. Use a head that was trained for this "
                "model"
            )


def _sizes(attention: Any) -> tuple[int, int]:
    """The width of each head; and how many there are, of keys if it has any, else of queries."""
    project = getattr(attention, "k_proj", None) or attention.q_proj
    return attention.head_dim, project.out_features // attention.head_dim


def _logits_of_clusters(embedder: Any, hidden: Tensor, weight: Tensor) -> Tensor:
    """`[rows, 1, vocabulary]`: only tokens in the best clusters are scored, all others alike, below them.

    As the assistant's own code does it, but without waiting for the device, and row by row.
    """
    best = embedder.centroids(hidden).topk(embedder.centroid_intermediate_top_k, dim=-1).indices
    tokens = embedder.token_ordering.long().view(embedder.num_centroids, -1)[best].flatten(2)
    scores = (hidden[..., None, :] @ weight[tokens].transpose(-1, -2)).squeeze(-2)
    lowest = scores.amin(dim=-1, keepdim=True) - 1
    return lowest.expand(-1, -1, embedder.vocab_size).scatter(-1, tokens, scores)
