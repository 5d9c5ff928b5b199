"""The settings of a measurement: batches of prompts with given numbers of rows and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import Prompt

OWN = "own"  # prompts of their own length


@dataclass(frozen=True)
class Setting:
    """The input that all methods get.

    Attributes:
        batch_size: rows per batch.
        context: tokens per prompt; `None`: as in the dataset.
        batches: `input_ids` and `attention_mask`, `[batch_size, columns]`, left-padded.
        categories: one per batch; "mixed" if its rows differ.
    """

    batch_size: int
    context: int | None
    batches: list[dict[str, Tensor]]
    categories: list[str]

    @property
    def lengths(self) -> tuple[int, int]:
        """The lengths of the shortest and the longest prompt."""
        counts = torch.cat([batch["attention_mask"].sum(dim=1) for batch in self.batches])
        return int(counts.min()), int(counts.max())

    @property
    def label(self) -> str:
        low, high = self.lengths
        rows = "1 row" if self.batch_size == 1 else f"{self.batch_size} rows"
        return f"{rows}, {low if low == high else f'{low}–{high}'} prompt tokens"


def make_setting(
    prompts: Sequence[Prompt],
    count: int,
    batch_size: int,
    context: int | None,
    ragged: bool,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Setting:
    """Make batches of `count` evenly spaced prompts, or a few more to fill the last batch.

    Args:
        prompts: the prompts to choose from; for a longer context, other prompts are put before one.
        context: tokens per prompt; `None` leaves them as they are.
        ragged: the lengths in a batch range from a quarter of `context` to all of it.

    Raises:
        SystemExit: if there are too few prompts.
    """
    count = -(-count // batch_size) * batch_size
    if count > len(prompts):
        raise SystemExit(f"expected at least {count} prompts for batches of {batch_size}, found {len(prompts)}")
    chosen = [i * len(prompts) // count for i in range(count)]
    batches, categories = [], []
    for at in range(0, count, batch_size):
        group = chosen[at : at + batch_size]
        lengths = [context] * batch_size
        if ragged and context is not None and batch_size > 1:
            lengths = [context // 4 + (context - context // 4) * i // (batch_size - 1) for i in range(batch_size)]
        rows = [token_ids(prompts, index, length, tokenizer) for index, length in zip(group, lengths)]
        batches.append(_pad(rows, tokenizer.pad_token_id or 0, device))
        names = {prompts[index].category for index in group}
        categories.append(names.pop() if len(names) == 1 else "mixed")
    return Setting(batch_size, context, batches, categories)


def token_ids(
    prompts: Sequence[Prompt], index: int, length: int | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The ids of one prompt. If `length` is given, exactly that many: its end, after other prompts as needed."""
    ids: list[int] = tokenizer(prompts[index].text)["input_ids"]
    if length is None:
        return ids
    start = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    body, before = ids[len(start) :], index
    while len(start) + len(body) < length:
        before = (before - 1) % len(prompts)
        body = tokenizer(prompts[before].text + "\n\n", add_special_tokens=False)["input_ids"] + body
    return start + body[len(start) + len(body) - length :]


def check_positions(model: PreTrainedModel, setting: Setting, new_tokens: int) -> None:
    """Raise SystemExit if the model has too few positions for the longest prompt and its continuation."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = setting.lengths[1] + new_tokens
    if limit is not None and needed > limit:
        raise SystemExit(
            f"{type(model).__name__} has {limit} positions, but prompts of {setting.lengths[1]} tokens and "
            f"{new_tokens} new tokens take {needed}: choose a smaller --context or --new-tokens"
        )


def _pad(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
