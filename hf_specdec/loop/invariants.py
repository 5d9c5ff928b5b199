"""Invariants that hold after every iteration, checked when `HF_SPECDEC_CHECK=1`: slow, for debugging and for tests.

Each row's target cache holds exactly its committed tokens but the last, at the right positions. Recurrent states, and
the draft's cache, hold at most those. In the context, only padding comes after the committed tokens.
"""

import os
from collections.abc import Container

from torch import Tensor
from transformers import DynamicCache

from ..cache.states import is_recurrent, states_of
from ..cache.storage import RaggedLayer
from ..cache.window import WindowLayer
from ..models.cached import CachedModel
from ..models.target import Target
from ..sampling.context import Context

ENABLED = os.environ.get("HF_SPECDEC_CHECK", "") not in ("", "0")
TOLERANCE = 1e-3  # of the largest key or value; forwards of other shapes round differently, in float32


class InvariantError(AssertionError):
    """A bug in hf_specdec: please report it with the call that showed it."""


def check_iteration(
    context: Context,
    target: Target,
    draft: Target | None = None,
    withdrawn: Container[int] = (),
    drafts_own: Context | None = None,
) -> None:
    """Raise an InvariantError unless caches and context agree for the active rows.

    Args:
        drafts_own: the text in the draft's tokens, if they are not the target's.
        withdrawn: rows that are leaving and have gone back further than windows reach.
    """
    for row, missing in zip(context.rows, target.missing(context)):
        if missing < 1 or (missing > 1 and not target.has_states):
            raise InvariantError(f"row {row}: the target's cache holds all but {missing} tokens instead of all but 1")
        after = context.tokens[row, context.ends[row] : context.max_length]
        if not bool((after == context.pad_token_id).all()):
            raise InvariantError(f"row {row}: there are tokens after the committed ones")
    for row, missing in zip(context.rows, draft.missing(drafts_own or context) if draft is not None else ()):
        if missing < 1:
            raise InvariantError(f"row {row}: the draft's cache holds all but {missing} committed tokens")
    for text, model in ((context, target), (drafts_own or context, draft)):
        if isinstance(model, CachedModel):
            _check_entries(text, model, withdrawn)


def _check_entries(context: Context, cached: CachedModel, withdrawn: Container[int]) -> None:
    """Compare keys, values and states with those of one fresh forward over each row's committed tokens."""
    given = cached.layout.column_offset or cached.layout.prompt_positions is not None or not cached.prompt_is_tokens
    if given or not cached.cache.layers:
        return  # the context does not begin with the tokens that are cached
    for index, row in enumerate(cached.cache.rows):
        first = context.first[row]
        begin, end = first + cached.layout.slot_offset[row], cached.cache.lengths[row]
        if end <= begin or row not in context.rows or row in withdrawn:
            continue
        fresh = DynamicCache(config=cached.model.config) if cached.cache.states else DynamicCache()
        tokens = context.tokens[row : row + 1, first : first + end - begin].to(cached.device)
        inputs = {"input_ids": tokens, cached.cache_name: fresh, "use_cache": True}
        cached.model(**(inputs if cached.encoded is None else cached.encoded.of_row(row).join(inputs, [0])))
        for layer, (mine, theirs) in enumerate(zip(cached.cache.layers, fresh.layers)):
            if is_recurrent(mine):
                for states, expected in zip(states_of(mine), states_of(theirs)):
                    _compare(states[index], expected[0], f"row {row}, layer {layer}: the state")
            if not isinstance(mine, RaggedLayer) or not mine.is_initialized or theirs.keys is None:
                continue  # `None`: a draft that runs only the first layers
            base = mine.base(row)
            if isinstance(mine, WindowLayer) and base > max(end - mine.window.size + 1, begin):
                raise InvariantError(
                    f"row {row}, layer {layer}: slots before {base} are gone, but the window needs them"
                )
            held = max(begin, base)
            for states, expected in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                own, new = states[index, :, held - base : end - base], expected[0, :, held - begin :]
                _compare(own, new, f"row {row}, layer {layer}: a cached entry")


def _compare(own: Tensor, fresh: Tensor, name: str) -> None:
    error = (own - fresh).abs().max()
    if error > TOLERANCE * fresh.abs().max():
        raise InvariantError(f"{name} is off by {float(error):.2g}")
