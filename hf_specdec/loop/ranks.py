"""Ranks: the processes that compute the model of one call together. The first one decides, the others follow.

All ranks feed the same tokens in the same forwards. But clocks, random numbers, a drafter's memory and rounding may
differ between them. So the first rank alone runs the drafter and its schedule, and its choice of tokens counts. It
sends one message per iteration: what it has chosen, and the drafts of the next iteration.

    first rank    verify  choose  commit  draft  send       verify ...
    others        verify  wait ............      receive    commit  verify ...

If the drafter's own forwards are computed together too (a sharded draft model, or layers of the target), all ranks run
it *in step*. Then the first rank sends what it has chosen at once, and before each draft, how long that shall be; and
all draw drafts from its random state.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from ..device import to_device, to_host
from ..drafters.base import Draft, Drafter
from ..models.sharding import Sharded
from ..sampling.context import Context

_ROOM = 512  # numbers in a message; more of them take a second one
_STOPPED = -1
_HAS_STOPPED = "The first of the processes that decode this call together has stopped: see its error"


class Chosen(NamedTuple):
    """What the first rank read from the device in an iteration, or in one step of it.

    Attributes:
        values: by active row, as `SpeculativeDecoding` packs them.
        are_up: by active row, whether its time is up (`Stopping.ask_time`).
    """

    values: list[list[int]]
    are_up: list[bool]


class Ranks:
    """This process, as one of several.

    Args:
        group: of the ranks that compute the models of this call; `None` for all.
        device: where messages are sent from, that of the target.
        in_step: all ranks run the drafter.
    """

    def __init__(self, group: "distributed.ProcessGroup | None", device: torch.device, in_step: bool):
        self._group = group
        self._device = device
        self._first = 0 if group is None else distributed.get_global_rank(group, 0)
        self.in_step = in_step
        self.leads = distributed.get_rank() == self._first
        self._chosen: list[Chosen] = []  # the first rank has yet to send it, the others have yet to use it
        self._draft: tuple[list[int], list[list[int]]] | None = None  # received: lengths, tokens
        self._is_awaited = False  # the others wait for a message, or soon will

    @property
    def drafts(self) -> bool:
        """Whether this rank runs the drafter."""
        return self.leads or self.in_step

    def start(self, start_drafter: Callable[[], None]) -> None:
        """Call it on the ranks that draft; if it raises an error on the first rank, the others raise one too."""
        if self.in_step:
            start_drafter()
            return
        has_started = False
        try:
            if self.leads:
                start_drafter()
                has_started = True
        finally:
            has_started = bool(self.agree(has_started))
        if not has_started:
            raise RuntimeError(_HAS_STOPPED)

    def choose(self, packed: Tensor, are_up: list[bool]) -> Chosen:
        """What the first rank has chosen. The host waits here for the device, or for the first rank.

        Args:
            packed: `[active rows, n]`, what this rank would choose.
        """
        if self.leads:
            chosen = Chosen(to_host(packed).tolist(), are_up)
            self._chosen.append(chosen)
            self._is_awaited = True
            if self.in_step:
                self.flush()
            return chosen
        if not self._chosen:
            self._receive()
        return self._chosen.pop(0)

    def draft(self, make: Callable[[], Draft], context: Context) -> Draft:
        """The draft that `make` makes on the first rank, or on all if they are in step."""
        if self.in_step:
            return make()
        if self.leads:
            self._is_awaited = True
            draft = make()
            self._send(draft)
            return draft
        if self._draft is None:
            self._receive()
        assert self._draft is not None
        (lengths, tokens), self._draft = self._draft, None
        width = len(tokens[0])
        flat = to_device([token for row in tokens for token in row], context.tokens.device)
        return Draft(flat.long().view(len(tokens), width), lengths=lengths)

    def flush(self) -> None:
        """Send what was chosen without waiting for the next draft, before work that all ranks do together."""
        if self.leads and self._chosen:
            self._send(None)

    def end(self) -> None:
        """The call is over. If the others wait for the first rank, which has raised an error, they raise one too."""
        if self.leads and self._is_awaited and not self.in_step:
            self._broadcast(to_device([_STOPPED], self._device))
            self._is_awaited = False

    def agree(self, number: int) -> int:
        """The number of the first rank."""
        sent = to_device([number], self._device)
        distributed.broadcast(sent, self._first, self._group)
        return number if self.leads else int(to_host(sent))

    def share_random_state(self) -> None:
        """All ranks draw the same random numbers from now on, from torch's generators."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        for i, state in enumerate(states):
            sent = state.to(self._device)
            distributed.broadcast(sent, self._first, self._group)
            if not self.leads:
                set_state = torch.cuda.set_rng_state if i else torch.set_rng_state
                set_state(sent.cpu())

    def _send(self, draft: Draft | None) -> None:
        numbers = [len(self._chosen)]
        for values, are_up in self._chosen:
            numbers += [len(values), len(values[0]), *map(int, are_up), *(n for row in values for n in row)]
        parts = []
        if draft is not None:
            parts = [draft.lengths_on(self._device), draft.tokens.flatten()]
        numbers += [0, 0] if draft is None else [len(draft.tokens), draft.tokens.shape[1]]
        self._broadcast(torch.cat([to_device(numbers, self._device), *parts]))
        self._chosen.clear()
        self._is_awaited = False

    def _receive(self) -> None:
        numbers = iter(self._broadcast(None))
        count = next(numbers)
        if count == _STOPPED:
            raise RuntimeError(_HAS_STOPPED)
        for _ in range(count):
            rows, width = next(numbers), next(numbers)
            are_up = [bool(next(numbers)) for _ in range(rows)]
            self._chosen.append(Chosen([[next(numbers) for _ in range(width)] for _ in range(rows)], are_up))
        rows, width = next(numbers), next(numbers)
        if rows:
            lengths = [next(numbers) for _ in range(rows)]
            self._draft = lengths, [[next(numbers) for _ in range(width)] for _ in range(rows)]

    def _broadcast(self, numbers: Tensor | None) -> list[int]:
        """Send `numbers` from the first rank, which needs no wait; the others return them."""
        size = 0 if numbers is None else len(numbers)
        message = torch.zeros(_ROOM, dtype=torch.int64, device=self._device)
        if numbers is not None:
            message[:1] = size
            message[1 : 1 + size] = numbers[: _ROOM - 1]
        distributed.broadcast(message, self._first, self._group)
        if numbers is None:
            received = to_host(message).tolist()
            size, found = received[0], received[1:]
        if size > _ROOM - 1:
            rest = message.new_empty(size - (_ROOM - 1)) if numbers is None else numbers[_ROOM - 1 :].contiguous()
            distributed.broadcast(rest, self._first, self._group)
            if numbers is None:
                found += to_host(rest).tolist()
        return [] if numbers is not None else found[:size]


def join(together: Sharded | None, drafter: Drafter, device: torch.device, samples: bool) -> Ranks | None:
    """The ranks of a call whose models several processes compute `together`; `None` if none do.

    Args:
        device: of the target.
        samples: the call draws random numbers.
    """
    if together is None:
        return None
    ranks = Ranks(together.group, device, in_step=together.draft or drafter.uses_target)
    if samples:
        ranks.share_random_state()
    return ranks


def drafting(ranks: Ranks | None, drafter: Drafter) -> Drafter:
    """What this rank drafts with."""
    return drafter if ranks is None or ranks.drafts else Follower()


class Follower(Drafter):
    """Stands in for the drafter on ranks that do not run it."""

    in_vocabulary = True

    def propose(self, context: Context, max_tokens: int) -> Draft:
        raise AssertionError("only the first rank drafts")

    def restart(self, context: Context, row: int) -> None:
        pass
