"""Abilities: what a model can do. Probes with a few tokens find out (`probes.py`), `answers.py` remembers the results.

Nothing here depends on the name of a model, adapter or kernel. The consequences of an answer are decided elsewhere:
errors are in `checks.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache.layers import cache_layers
from ..cache.states import has_states, rows_are_independent
from ..cache.window import Window, WindowLayer
from ..device import forward_parameters, model_device
from .answers import Answer, CannotBeAsked, Differs, ask, check_same, ordinary_tokens
from .masks import follows_masks, hands_positions_on, takes_masks
from .probes import Vanilla, compare_beside_longer_rows, compare_padded_blocks, rehearse

_HALF = (torch.float16, torch.bfloat16)  # what FlashAttention computes in


@dataclass(frozen=True)
class Abilities:
    """The abilities of one model: each is an `Answer` with the reason and the cause of a "no".

    Answers are remembered per model, attention implementation and precision, so a second instance costs nothing.
    """

    model: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Abilities":
        return cls(model)

    @property
    def own_cache(self) -> Answer:
        """Whether a transformers cache can hold its state, judged by signature and config; nothing is run."""
        if self.model.config.is_encoder_decoder:
            return Answer()
        if not {"past_key_values", "cache_params"} & forward_parameters(self.model).keys():
            return Answer("takes no cache")
        if not self.model._supports_default_dynamic_cache():
            return Answer("does not take transformers' dynamic cache")
        try:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        except AttributeError as error:
            return Answer("has a config without layers", error)
        if any(hasattr(layer, "set_prefill_length") for layer in cache.layers):
            return Answer("stores prompts separately")
        return Answer()

    @property
    def keeps_cache(self) -> Answer:
        """Whether it returns the transformers cache that it is given."""
        if self.model.config.is_encoder_decoder:
            return Answer()
        return ask(self.model, "keeps a cache", partial(_keep_a_cache, self.model))

    @property
    def needs_own_code(self) -> bool:
        """Whether our cache cannot hold the state that a decoder-only model carries from one forward to the next."""
        return not self.own_cache or not self.keeps_cache

    @property
    def ragged(self) -> Answer:
        """Whether rows of different lengths can be decoded together."""
        return self._ragged(drafts=False)

    @property
    def ragged_drafts(self) -> Answer:
        """The same for a draft, whose tokens need not be vanilla's."""
        return self._ragged(drafts=True)

    def own_masks(self, padded: bool, drafts: bool = False) -> bool:
        """Whether it gets our 4-D masks for rows of equal lengths too.

        That is on accelerators, for padded rows, where transformers waits for the device to make its own, and in half
        precision, where FlashAttention can do without a mask.
        """
        if model_device(self.model).type == "cpu" or not (padded or self.model.dtype in _HALF):
            return False
        return bool(self._ragged(drafts))

    @property
    def positions(self) -> bool:
        """Whether position ids reach the decoder although its model's forward has no such parameter."""
        return hands_positions_on(self.model)

    def _ragged(self, drafts: bool) -> Answer:
        model = self.model
        if self.needs_own_code:
            return Answer("carries custom state from step to step")
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if not has_states(cache):
            if not takes_masks(model):
                return self._without_masks()
            if not follows_masks(model, drafts):
                return Answer("does not accept positions and masks per row")
            together = ask(model, ("rows", drafts), lambda seed: rehearse(model, rows=3, drafts=drafts, seed=seed))
            return together and ask(model, "longer rows", partial(compare_beside_longer_rows, model))
        if any(hasattr(layer, "keys") for layer in cache.layers) and not takes_masks(model):
            return self._without_masks()
        if not rows_are_independent(cache):
            return Answer("has a cache that cannot roll back one row alone")
        return ask(model, "rows", lambda seed: rehearse(model, rows=2, seed=seed))

    def _without_masks(self) -> Answer:
        kind = self.model.config.get_text_config(decoder=True)._attn_implementation
        return Answer(
            f"its attention, {kind!r}, takes no masks by row: load it with attn_implementation='sdpa', if it has that"
        )

    def states(self, at_once: int | None = None) -> Answer:
        """Whether recurrent states can be continued and rolled back.

        Args:
            at_once: how many tokens one forward must continue a state over; `None` for as many as there are.
        """
        return ask(self.model, ("states", at_once), lambda seed: rehearse(self.model, at_once=at_once, seed=seed))

    def blocks(self, past: int = 0, longest: int | None = None) -> Answer:
        """Whether a block of tokens gets the same logits as token by token.

        Args:
            past: the least number of tokens before the block.
            longest: the most tokens that a row may reach.
        """
        probe = partial(_rehearse, self.model, past, longest)
        return ask(self.model, ("blocks", past, longest), probe)

    def padded_blocks(self, longest: int | None = None) -> Answer:
        """The same in left-padded rows."""
        return ask(self.model, ("padded blocks", longest), partial(compare_padded_blocks, self.model, longest))

    def cached_blocks(self) -> Answer:
        """The same for two tokens, where the attention implementation does not use masks made by transformers."""
        return ask(self.model, "continues a cache", lambda seed: _continue_a_cache(self.model))

    def independent_tokens(self) -> Answer:
        """Whether a token's logits do not depend on later tokens of the forward, as they may in quantized models."""
        return ask(self.model, "tokens are independent", lambda seed: _compare_beside_others(self.model))

    def windows(self, columns: int) -> list[tuple[int, Answer]]:
        """Each window of the model's cache below `columns`: its size, and whether the model's own masks apply it."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        layers = cache_layers(cache, self.model.config, 1, columns)
        found = {layer.window for layer in layers if isinstance(layer, WindowLayer)}
        return [
            (window.size, ask(self.model, ("window", window.size), partial(_probe_window, self.model, layers, window)))
            for window in found
            if window.size < columns
        ]


def unexplained_windows(model: PreTrainedModel, cache: Cache, max_length: int) -> list[int]:
    """Windows that the config names, no layer of the cache applies, and a text of `max_length` may exceed.

    Only the model's own code knows their meaning. For rows of different lengths it may use the length of the longest.

    Args:
        cache: the cache that transformers makes from the model's config.
    """
    config = model.config.get_text_config(decoder=True)
    layers = [*cache.layers, *DynamicCache(config=config).layers]  # static layers do not expose their windows
    explained = {getattr(layer, "sliding_window", None) for layer in layers}
    if getattr(config, "layer_types", None) is not None:
        explained.add(getattr(config, "sliding_window", None))  # the types say which layers have it
    named = [value for name, value in vars(config).items() if "window" in name and "layer" not in name]
    sizes = {size for value in named for size in (value if isinstance(value, (list, tuple)) else [value])}
    return sorted(size for size in sizes - explained if type(size) is int and 0 < size < max_length)


def _keep_a_cache(model: PreTrainedModel, seed: int) -> None:
    """A model that is given a transformers cache returns one, not a tuple."""
    vanilla = Vanilla(model)
    try:
        output = vanilla.output(vanilla.ids(ordinary_tokens(model, 2, seed)), vanilla.cache())
    except Exception as error:
        raise CannotBeAsked(f"{type(model).__name__} needs more inputs than text") from error
    carried = [output.get(name) for name in ("past_key_values", "cache_params")]
    found = [type(value).__name__ for value in carried if value is not None and not isinstance(value, Cache)]
    if found:
        raise Differs(f"returns a {found[0]} instead of the cache that it was given")


def _rehearse(model: PreTrainedModel, past: int, longest: int | None, seed: int) -> None:
    rehearse(model, past=past, longest=longest, seed=seed)


def _continue_a_cache(model: PreTrainedModel) -> None:
    """The second of two tokens after a cached token gets the same logits as when all three are fed at once."""
    vanilla = Vanilla(model)
    first, *more = ordinary_tokens(model, 3, seed=0)
    got = vanilla.continued([first], more)
    check_same(model, got[-1:], vanilla.continued([first, *more], [])[-1:], None, "masks blocks differently")


def _compare_beside_others(model: PreTrainedModel) -> None:
    """A token gets the same logits alone as with others after it."""
    vanilla = Vanilla(model)
    text = ordinary_tokens(model, 8, seed=0)
    alone, beside = vanilla.continued(text[:1], [])[0], vanilla.continued(text, [])[0]
    if not (beside - alone).abs().max() <= 1e-3 * alone.std():
        raise Differs("returns different logits for a token with seven tokens after it than alone")


class _PastWindow(Cache):
    """Claims a window full of entries: all zero, except the values of the first one in the window's layers."""

    def __init__(self, layers: list[Any], window: Window, mark: float):
        super().__init__(layers=layers)
        self._window = window
        self._mark = mark

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past = [s.new_zeros(*s.shape[:2], self._window.size, s.shape[3]) for s in (key_states, value_states)]
        if getattr(self.layers[layer_idx], "window", None) is self._window:
            past[1][:, :, 0] = self._mark
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window.size

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._window.size

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._window.size + query_length, 0


def _probe_window(model: PreTrainedModel, layers: list[Any], window: Window, _seed: int) -> None:
    """With the model's own masks, a token does not attend to the token a whole window before it."""
    token = torch.tensor([[1]], device=model_device(model))
    kwargs = {"position_ids": token} if "position_ids" in forward_parameters(model) else {}
    try:
        blank, marked = (
            model(input_ids=token, past_key_values=_PastWindow(layers, window, mark), return_dict=True, **kwargs).logits
            for mark in (0.0, 100.0)
        )
    except Exception as error:  # the model cannot run on such a cache, which says nothing about windows
        raise CannotBeAsked(f"{type(model).__name__} does not run on a fake cache") from error
    if not torch.equal(blank, marked):
        raise Differs("lets a token attend to the one a whole window before it")
