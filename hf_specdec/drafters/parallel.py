"""A draft model that predicts several tokens in one forward (PARD, An et al. 2025, arXiv:2504.18583).

It is an ordinary language model, trained to see *mask tokens* where it does not know the text yet:

    fed       ... the  cat  [mask] [mask] [mask]
    predicts            sat   on     a      mat       four drafts

Each draft's distribution depends on the committed tokens alone, not on the drafts before it, so it is exactly the one
that the draft is drawn from. The entries of mask tokens leave the cache as soon as the forward is over.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..device import to_device
from ..models.compiled import BLOCKS, LONGEST
from ..models.target import aligned
from ..sampling.context import Context
from .base import DraftRequest
from .model import ModelDrafter


def drafter_of(model: PreTrainedModel, confidence_threshold: float = 0.0, compiles: bool = False) -> ModelDrafter:
    """The drafter for a draft model, as its config says; arguments as for `ModelDrafter`."""
    kind = ModelDrafter if mask_token(model) is None else ParallelDrafter
    return kind(model, confidence_threshold, compiles)


def mask_token(model: PreTrainedModel) -> int | None:
    """The id of a draft's mask token, `pard_token` in its config; `None` if it predicts one token per forward.

    Raises:
        ValueError: if that is no id of the model.
    """
    text = model.config.get_text_config(decoder=True)
    token = getattr(text, "pard_token", getattr(model.config, "pard_token", None))
    if token is None:
        return None
    if type(token) is not int or not 0 <= token < text.vocab_size:
        raise ValueError(
            f"`pard_token` in the config of {type(model).__name__} must be a token id from 0 to {text.vocab_size - 1}, "
            f"the last row of its embedding, got {token!r}: give the id that the draft was trained with"
        )
    return token


class ParallelDrafter(ModelDrafter):
    """Drafts with a language model that predicts all tokens of a draft in one forward, with mask tokens.

    Its config names the mask token (`pard_token`), which is never proposed itself. Otherwise it is a `ModelDrafter`.

    Args:
        model: the draft model (`assistant_model` in `generate()`).
        confidence_threshold: as for `ModelDrafter`; it shortens drafts, but saves no forward.
        compiles: as for `ModelDrafter`.

    Raises:
        ValueError: if the config names no mask token, or one outside the embedding; from `start`, if the model's state
            cannot go on over several tokens.
    """

    drafts_at_once = True
    _widths = BLOCKS

    def __init__(self, model: PreTrainedModel, confidence_threshold: float = 0.0, compiles: bool = False):
        super().__init__(model, confidence_threshold, compiles)
        token = mask_token(model)
        if token is None:
            raise ValueError(
                f"The config of {type(model).__name__} names no mask token (`pard_token`), so it cannot draft in "
                "parallel: use `ModelDrafter`"
            )
        self._mask_token = token

    def start(self, call: DraftRequest, context: Context) -> None:
        super().start(call, context)
        if self.cached.at_once is not None:
            raise ValueError(
                f"`assistant_model` ({type(self.model).__name__}) cannot draft in parallel: its state goes on over one "
                "token at a time. Use another draft, or remove `pard_token` from its config"
            )

    def unread(self, context: Context) -> int:
        """Nothing, if the next forward reads it along: then its time is that of any forward."""
        unread = super().unread(context)
        return unread if unread > LONGEST * len(context.rows) else 0

    def _room(self, context: Context) -> int:
        if self.cached.prompt_is_unread:  # a forward of its own, which predicts one token
            return min(super()._room(context), 1)
        return super()._room(context)

    def _catch_up(self, context: Context, most: int) -> None:
        """Feed tokens in a forward of their own where the next one would be too long, mostly fill, or end in a state.

        A state that has seen mask tokens cannot be kept, so committed tokens are fed without them.
        """
        cached, chunk = self.cached, self._call.prefill_chunk_size
        missing = cached.missing(context)
        too_long = chunk is not None and max(missing) + most - 1 > chunk
        uneven = max(missing) - min(missing) > LONGEST
        if max(missing) > 1 and (too_long or uneven or cached.has_states):
            cached.prefill(context, chunk)

    def _logits(self, context: Context, step: int, most: int, drawn: Tensor | None) -> Tensor:
        """`[rows, most, vocab]`, for the tokens after the first `step` drafts, which were fed as they are."""
        cached, rows, device = self.cached, context.rows, context.tokens.device
        missing = cached.missing(context)
        own = [n + step for n in missing]  # by row, the tokens before its mask tokens
        width = max(own) + most - 1
        ids = context.gather([end - n for end, n in zip(context.active_ends, missing)], width)
        is_mask = torch.arange(width, device=device) >= to_device(own, device)[:, None]
        ids = ids.masked_fill(is_mask, self._mask_token)
        logits = cached.forward(context, width, width - min(own) + 1, ids).logits
        if width > min(own) and cached.has_states:
            cached.commit(context)
        elif width > min(own):
            cached.forget(rows, [width - n for n in own])
        logits = aligned(logits, [n - 1 for n in own], most)
        return logits.index_fill(-1, to_device([self._mask_token], logits.device), -torch.inf)
