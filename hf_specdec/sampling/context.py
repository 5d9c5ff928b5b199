"""Context: the committed tokens of every row, laid out as `generate()` returns them.

Owns the tokens and where each row begins and ends. Drafters read it, logits processors and stopping criteria see slices
of it, and only `loop/decoding.py` appends to it.

On an accelerator there is a second copy on the host, so that reading committed tokens does not wait for the device.
"""

import torch
from torch import Tensor

from ..device import CPU, row_index, to_device


class Context:
    """The batch so far. Columns are those of the sequences that `generate()` returns.

        column     0    1    2    3    4    5    6    7
        row 0     <p>  <p>  the  cat  sat  on   <p>  <p>     first 2, end 6
        row 1      a   dog  ran  off  and  <p>  <p>  <p>     first 0, end 5
        row 2     <p>  one  two  six  ten  <p>  <p>  <p>     first 1, end 5
                  prompt_width = 4: two, one and one new tokens

    Columns from a row's `end` on hold padding, or drafts of the current iteration.

    Attributes:
        tokens: `[batch, room + 1]` int64, growing up to `max_length`; the last column takes tokens past that.
        host: the same on the host, without drafts; `tokens` itself where that is on the host.
        prompt_width: number of columns of the prompt.
        first: by row of the batch, the first column that is not left padding.
        ends: by row of the batch, one past its last committed token.
        limits: by row of the batch, how many columns it may have; `max_length`, but for rows that begin anew.
        rows: the rows of the batch that are still being decoded, in the order of the caches.
    """

    def __init__(self, prompt: Tensor, first: list[int], max_length: int, pad_token_id: int):
        batch, self.prompt_width = prompt.shape
        self.pad_token_id = pad_token_id
        self.max_length = max(max_length, self.prompt_width + 1)
        self.tokens = prompt.new_full((batch, 1), pad_token_id)
        self.host = self.tokens.to(CPU)
        self.first = first
        self.ends = [self.prompt_width] * batch
        self.limits = [self.max_length] * batch
        self.rows = list(range(batch))
        self._draft_width = 0  # columns after the ends that may hold drafts
        self._make_room(self.prompt_width + 1)
        self.tokens[:, : self.prompt_width] = prompt
        if self.host is not self.tokens:
            self.host[:, : self.prompt_width] = prompt.to(CPU)

    @property
    def batch_size(self) -> int:
        """The number of rows, including finished ones."""
        return len(self.ends)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each active row, including the prompt but not padding."""
        return [self.ends[row] - self.first[row] for row in self.rows]

    @property
    def active_ends(self) -> list[int]:
        return [self.ends[row] for row in self.rows]

    @property
    def row_index(self) -> Tensor:
        """`[active rows]`: the active rows as an index into `tokens`."""
        return row_index(self.rows, self.tokens.device)

    @property
    def prompt_mask(self) -> Tensor:
        """`[batch, prompt_width]` bool: which columns of the prompt are not left padding."""
        return real_columns(self.prompt_width, self.first, self.tokens.device)

    def restart(self, row: int, tokens: list[int], limit: int) -> None:
        """Give the place of a row that has ended to another prompt, which begins in column 0. It is not active yet.

        Args:
            tokens: the prompt.
            limit: how many columns the row may have.
        """
        self.max_length = max(self.max_length, limit)
        self._make_room(len(tokens) + 1)
        prompt = torch.tensor(tokens, dtype=torch.int64)
        for mine in (self.tokens,) if self.host is self.tokens else (self.tokens, self.host):
            mine[row] = self.pad_token_id
            mine[row, : len(tokens)].copy_(prompt, non_blocking=True)
        self.first[row], self.ends[row], self.limits[row] = 0, len(tokens), limit

    def row(self, row: int) -> Tensor:
        """The committed tokens of one row of the batch, on the host and without padding: `[length]`."""
        return self.host[row, self.first[row] : self.ends[row]]

    def view(self, end: int) -> Tensor:
        """`[batch, end]`: the tokens of vanilla `generate()` when it chooses the token of column `end`."""
        return self.tokens[:, :end]

    def gather(self, starts: list[int], width: int) -> Tensor:
        """`[active rows, width]`: tokens of the active rows from column `starts[i]` on; may be a view."""
        if len(starts) == 1 and 0 <= starts[0] <= self.tokens.shape[1] - width:
            return self.tokens[self.rows[0], starts[0] : starts[0] + width][None]
        columns = to_device(starts, self.tokens.device)[:, None] + self._arange(width)
        return self.tokens[self.row_index[:, None], columns.clamp(0, self.tokens.shape[1] - 1)]

    def write_drafts(self, draft_tokens: Tensor, offset: int = 0) -> None:
        """Put drafts `[active rows, k]` at `offset` after the committed tokens, where processors see them.

        Drafts past the last column are dropped: they could never be committed.
        """
        if draft_tokens.shape[1] == 0:
            return
        self._draft_width = max(self._draft_width, offset + draft_tokens.shape[1])
        self._make_room(max(self.active_ends) + offset + draft_tokens.shape[1])
        self._put(draft_tokens, offset)

    def clear_drafts(self) -> None:
        """Restore the padding after the committed tokens of the active rows."""
        if self._draft_width:
            self._put(self.tokens.new_full((len(self.rows), self._draft_width), self.pad_token_id))
        self._draft_width = 0

    def _put(self, block: Tensor, offset: int = 0) -> None:
        """Write `[active rows, k]` on the device, at `offset` after each row's committed tokens."""
        if len(self.rows) == 1:
            columns = self.tokens[self.rows[0], self.ends[self.rows[0]] + offset :][: block.shape[1]]
            columns.copy_(block[0, : len(columns)], non_blocking=True)
            return
        columns = self.first_free[:, None] + offset + self._arange(block.shape[1])
        block = block.to(self.tokens.device, non_blocking=True)
        self.tokens[self.row_index[:, None], columns.clamp(max=self.tokens.shape[1] - 1)] = block

    @property
    def first_free(self) -> Tensor:
        """`[active rows]`: the column of each active row's next token."""
        return to_device(self.active_ends, self.tokens.device)

    def append(self, tokens: list[list[int]]) -> None:
        """Commit to each active row its `tokens`; drafts that were written after its end are gone."""
        width = max(self._draft_width, *map(len, tokens))
        self._make_room(max(self.active_ends) + width)
        block = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in tokens], dtype=torch.int64)
        self._put(block)
        self._draft_width = 0
        for row, new, padded in zip(self.rows, tokens, block):
            if self.host is not self.tokens:
                self._write_on_host(row, padded)
            self.ends[row] += len(new)

    def withdraw(self, row: int, count: int) -> None:
        """Take back a row's last `count` committed tokens: it has ended before them."""
        end = self.ends[row] - count
        for tokens in (self.tokens, self.host):
            tokens[row, end : self.ends[row]] = self.pad_token_id
        self.ends[row] = end

    def write_on_host(self, row: int, tokens: list[int], width: int = 0) -> None:
        """Put `tokens` after a row's end, where criteria see them, without committing them; padding up to `width`."""
        padded = tokens + [self.pad_token_id] * (width - len(tokens))
        self._make_room(self.ends[row] + len(padded))
        self._write_on_host(row, torch.tensor(padded, dtype=torch.int64))
        self._draft_width = max(self._draft_width, len(padded))

    def pad_on_host(self, row: int, begin: int, end: int) -> None:
        """Put padding there, where criteria see it: the row has ended before these columns."""
        self.host[row, begin:end] = self.pad_token_id

    def _write_on_host(self, row: int, tokens: Tensor) -> None:
        columns = self.host[row, self.ends[row] : self.max_length][: len(tokens)]
        columns.copy_(tokens[: len(columns)])

    def _make_room(self, width: int) -> None:
        """Ensure at least `width` columns, or `max_length` if that is less."""
        if min(width, self.max_length) < self.tokens.shape[1]:
            return
        room = min(max(2 * width, 1024), self.max_length)
        on_host = self.host is self.tokens
        self.tokens = self._wider(self.tokens, room)
        self.host = self.tokens if on_host else self._wider(self.host, room)

    def _wider(self, old: Tensor, room: int) -> Tensor:
        with torch.inference_mode(False):  # tokens are written both in and outside it
            new = old.new_full((len(old), room + 1), self.pad_token_id)
        new[:, : old.shape[1] - 1] = old[:, :-1]
        return new

    def _arange(self, width: int) -> Tensor:
        return torch.arange(width, device=self.tokens.device)


def real_columns(columns: int, first: list[int], device: torch.device) -> Tensor:
    """`[rows, columns]` bool: which columns are not left padding, given each row's first real column."""
    return torch.arange(columns, device=device) >= to_device(first, device)[:, None]
