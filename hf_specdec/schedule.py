"""How long the next draft should be: the `num_assistant_tokens_schedule` of transformers."""

import weakref
from typing import Protocol

# By draft model, where "heuristic" started and where it left off; transformers keeps this in the user's generation
# config instead.
_learned: "weakref.WeakKeyDictionary[object, tuple[int, int]]" = weakref.WeakKeyDictionary()


class Schedule(Protocol):
    """Knows γ."""

    gamma: int

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        """Learn from one iteration: how many drafts each active row had, and how many of them were accepted."""


class Constant:
    """Always the same γ."""

    def __init__(self, gamma: int):
        self.gamma = gamma

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        pass


class Heuristic:
    """+2 when every draft was accepted, else -1, never below 1: the rule of transformers' `AssistedCandidateGenerator`.

    In a batch, one γ serves all rows; it grows when all rows accepted everything.

    Args:
        gamma: where to start.
        owner: the object whose γ is remembered from call to call, until a call asks for another start; `None` forgets
            ("heuristic_transient").
    """

    def __init__(self, gamma: int, owner: object | None):
        self._owner = owner
        self._start = gamma
        start, learned = (gamma, gamma) if owner is None else _learned.get(owner, (gamma, gamma))
        self.gamma = learned if start == gamma else gamma

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        if not any(drafted):
            return
        self.gamma = self.gamma + 2 if drafted == accepted else max(1, self.gamma - 1)
        if self._owner is not None:
            _learned[self._owner] = self._start, self.gamma


SCHEDULES = ("constant", "heuristic", "heuristic_transient")


def make_schedule(name: str, gamma: int, owner: object | None) -> Schedule:
    """A schedule by its name in the generation config; `owner` is the draft model, if any."""
    if name not in SCHEDULES:
        raise ValueError(f"`num_assistant_tokens_schedule` must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if name == "constant":
        return Constant(gamma)
    return Heuristic(gamma, owner if name == "heuristic" else None)
