"""What the loop asks of a target, fed by our forwards (`cached.py`) or by the model's own code (`self_fed.py`)."""

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
        output: of the model; `logits` `[rows, γ + 1, vocab]` are those of each row's last committed token, and of its
            drafts.
        pending: by active row, how many queries of the forward were committed tokens before the last one.
        of_prompt: by active row, how many of these are the prompt's and are recorded as such.
    """

    output: ModelOutput
    pending: list[int]
    of_prompt: list[int]


class Target(Protocol):
    """A model that verifies drafts of the active rows of a context. It holds what was committed, but the last token.

    Attributes:
        model: whose forwards these are.
        encoded: what its decoder is given of an encoder, where it has one.
        forwards: made since it was made, in which logits were wanted.
        prefill_forwards: made since then that only filled a cache.
    """

    model: PreTrainedModel
    encoded: Encoded | None
    forwards: int
    prefill_forwards: int

    @property
    def has_states(self) -> bool:
        """Whether rows are fed equally many tokens, and committed ones may have to be fed again."""
        ...

    @property
    def prompt_is_unread(self) -> bool:
        """Whether `read_prompt` comes first."""
        ...

    def missing(self, context: Context) -> list[int]:
        """How many committed tokens of each active row are not held yet."""
        ...

    def prompt_left(self, context: Context) -> list[int]:
        """How many columns of a prompt that needs forwards of its own are not held yet, by active row."""
        ...

    def prefill(
        self, context: Context, chunk_size: int | None = None, **kwargs: Any
    ) -> list[tuple[list[int], ModelOutput]]:
        """Feed all committed tokens but the last one. Returns: by forward, how many were each row's, and the output."""
        ...

    def read_prompt(self, **kwargs: Any) -> ModelOutput:
        """Vanilla's first forward; `logits` `[batch, 1, vocab]` of the last column."""
        ...

    def room(self, context: Context, most: int) -> list[int]:
        """How many drafts, at most `most`, the next forward can take after what each active row has pending."""
        ...

    def verify(self, context: Context, draft_tokens: Tensor, lengths: list[int], **kwargs: Any) -> Verified:
        """One forward over each row's uncached tokens and its drafts, which stand after them in the context.

        Args:
            draft_tokens: `[active rows, γ]`.
            lengths: how many of them are each row's.
        """
        ...

    def commit(self, context: Context) -> None:
        """Forget what was not committed."""
        ...

    def release(self) -> None:
        """The call is over."""
        ...


def room_after(pending: list[int], most: int) -> list[int]:
    """How many drafts fit after the pending tokens of each row, where all rows are fed equally many tokens.

    A row with more of them gets fewer drafts, and at times none, after which nothing is pending any more. So a forward
    is never over more than 2γ + 1 tokens per row, and each row gets a token from each.

    Args:
        pending: by row, how many committed tokens the next forward feeds.
        most: γ.
    """
    width = max(min(most + min(pending), 2 * most + 1), max(pending))
    return [width - n for n in pending]


def aligned(logits: Tensor, pending: list[int], count: int) -> Tensor:
    """`[rows, count, vocab]`: of the `count` queries of each row from its last committed token on.

    Args:
        logits: `[rows, queries, vocab]`, of the queries from that token on in the row with the fewest pending tokens.
        pending: by row, the queries before that token.
    """
    first = min(pending)
    if first == max(pending) and logits.shape[1] == count:
        return logits
    at = to_device(pending, logits.device)[:, None] - first + torch.arange(count, device=logits.device)
    at = at.clamp(max=logits.shape[1] - 1)  # of fill: rows with fewer drafts than others
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[2]))


def check_logits(model: PreTrainedModel, output: ModelOutput, wanted: int) -> None:
    """Raise a ValueError if a model has returned the logits of fewer tokens than it was asked about."""
    if output.logits.shape[1] < wanted:
        raise ValueError(
            f"{type(model).__name__} returned the logits of {output.logits.shape[1]} of the {wanted} tokens that it "
            "was asked about, so strategy='spec' cannot verify drafts with it: let its forward return the logits of "
            "every token, or of as many as `logits_to_keep` says"
        )
