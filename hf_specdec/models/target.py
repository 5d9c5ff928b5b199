"""Target: the loop's interface to a target model, which `cached.py` or the model's own code (`self_fed.py`) feeds."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..device import to_device
from ..sampling.context import Context
from .encoded import Encoded


@dataclass
class Verified:
    """The outcome of one target forward over committed tokens and drafts.

    Attributes:
        output: of the model; `logits` `[rows, γ + 1, vocab]` are those of each row's last committed token and its
            drafts.
        pending: by active row, how many queries of the forward were committed tokens before the last one.
        of_prompt: by active row, how many of these belong to the prompt and are recorded as such.
    """

    output: ModelOutput
    pending: list[int]
    of_prompt: list[int]


class Target(Protocol):
    """A model that verifies drafts of a context's active rows. It holds all committed tokens except the last one.

    Attributes:
        model: the model that runs the forwards.
        encoded: its decoder's encoder inputs, where it has an encoder.
        forwards: number of forwards so far whose logits were needed.
        prefill_forwards: number of forwards so far that only filled a cache.
    """

    model: PreTrainedModel
    encoded: Encoded | None
    forwards: int
    prefill_forwards: int

    @property
    def has_states(self) -> bool:
        """Whether all rows are fed equally many tokens, and committed tokens may have to be fed again."""
        ...

    @property
    def prompt_is_unread(self) -> bool:
        """Whether `read_prompt` comes first."""
        ...

    def missing(self, context: Context) -> list[int]:
        """How many committed tokens of each active row are not held yet."""
        ...

    def prompt_left(self, context: Context) -> list[int]:
        """By active row, the columns not held yet of a prompt that needs separate forwards."""
        ...

    def prefill(
        self, context: Context, chunk_size: int | None = None, **kwargs: Any
    ) -> list[tuple[list[int], ModelOutput]]:
        """Feed all committed tokens except the last one.

        Returns: for each forward, how many of its tokens belong to each row, and the output.
        """
        ...

    def read_prompt(self, **kwargs: Any) -> ModelOutput:
        """Vanilla's first forward; `logits` `[batch, 1, vocab]` of the last column."""
        ...

    def room(self, context: Context, most: int) -> list[int]:
        """How many drafts, at most `most`, the next forward can take after each active row's pending tokens."""
        ...

    def verify(self, context: Context, draft_tokens: Tensor, lengths: list[int], **kwargs: Any) -> Verified:
        """One forward over each row's uncached tokens and its drafts, which follow them in the context.

        Args:
            draft_tokens: `[active rows, γ]`.
            lengths: how many of them each row proposes.
        """
        ...

    def forget(self, rows: list[int], counts: list[int]) -> None:
        """Roll back the last `counts` entries of these rows."""

    def commit(self, context: Context) -> None:
        """Roll back everything that was not committed."""
        ...

    def release(self) -> None:
        """The call is over."""
        ...


def room_after(pending: list[int], most: int) -> list[int]:
    """How many drafts fit after the pending tokens of each row, where all rows are fed equally many tokens.

    A row with more pending tokens gets fewer drafts, and at times none; after that nothing is pending. So a forward
    never covers more than 2γ + 1 tokens per row, and each row gets a token from each forward.

    Args:
        pending: by row, how many committed tokens the next forward feeds.
        most: γ.
    """
    width = max(min(most + min(pending), 2 * most + 1), max(pending))
    return [width - n for n in pending]


def aligned(logits: Tensor, pending: list[int], count: int) -> Tensor:
    """`[rows, count, vocab]`: the logits of each row's `count` queries from its last committed token on.

    Args:
        logits: `[rows, queries, vocab]`, of the queries from that token on in the row with the fewest pending tokens.
        pending: by row, the number of queries before that token.
    """
    first = min(pending)
    if first == max(pending) and logits.shape[1] == count:
        return logits
    at = to_device(pending, logits.device)[:, None] - first + torch.arange(count, device=logits.device)
    at = at.clamp(max=logits.shape[1] - 1)  # fill, in rows with fewer drafts than others
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[2]))


def check_logits(model: PreTrainedModel, output: ModelOutput, wanted: int) -> None:
    """Raise a ValueError if a model has returned logits for fewer tokens than requested."""
    if output.logits.shape[1] < wanted:
        raise ValueError(
            f"{type(model).__name__} returned logits for {output.logits.shape[1]} of the {wanted} requested tokens, so "
            "strategy='spec' cannot verify drafts with it: let its forward return the logits of every token, or of as "
            "many as `logits_to_keep` says"
        )
