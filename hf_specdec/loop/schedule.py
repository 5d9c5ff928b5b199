"""How long the next draft should be: the `num_assistant_tokens_schedule` of transformers."""

import weakref
from collections.abc import Hashable
from typing import Protocol

from ..drafters.base import Drafter, GoOn
from ..records.stats import Iteration
from .optimal import MAX_GAMMA, Optimal, estimates_for
from .ranks import Ranks

DEFAULT_GAMMA = 5

# By draft model, where "heuristic" started and where it ended; transformers keeps this in the user's generation
# config.
_learned: "weakref.WeakKeyDictionary[object, tuple[int, int]]" = weakref.WeakKeyDictionary()


class Schedule(Protocol):
    """Chooses γ.

    Attributes:
        go_on: decides token by token whether to draft another one (see `DraftRequest`); `None` to follow the plan.
        longest: the largest γ that it can choose; `None` if there is no limit.
    """

    go_on: GoOn | None
    longest: int | None

    def plan(self, rows: int, left: int, unread: int) -> int:
        """The longest draft of the next iteration over this many active rows.

        Args:
            left: how many tokens a row may still get.
            unread: how many tokens, of all rows, the draft model has to read before it can draft.
        """

    def update(self, iteration: Iteration) -> None:
        """Learn from one iteration."""


class Constant:
    """Always the same γ."""

    go_on: GoOn | None = None

    def __init__(self, gamma: int):
        self.gamma = gamma
        self.longest: int | None = gamma

    def plan(self, rows: int, left: int = 0, unread: int = 0) -> int:
        return self.gamma

    def update(self, iteration: Iteration) -> None:
        pass


class Heuristic:
    """+2 when every draft was accepted, else -1, never below 1: the rule of transformers' `AssistedCandidateGenerator`.

    In a batch, one γ serves all rows; it grows when all rows accepted everything.

    Args:
        gamma: where to start.
        owner: γ is remembered for this object from call to call, until a call asks for another start; `None` to
            forget it ("heuristic_transient").
    """

    go_on: GoOn | None = None
    longest: int | None = None

    def __init__(self, gamma: int, owner: object | None):
        self._owner = owner
        self._start = gamma
        start, learned = (gamma, gamma) if owner is None else _learned.get(owner, (gamma, gamma))
        self.gamma = learned if start == gamma else gamma

    def plan(self, rows: int, left: int = 0, unread: int = 0) -> int:
        return self.gamma

    def update(self, iteration: Iteration) -> None:
        if not any(step.drafted for step in iteration.rows):
            return
        everything = all(step.accepted == len(step.drafted) for step in iteration.rows)
        self.gamma = self.gamma + 2 if everything else max(1, self.gamma - 1)
        if self._owner is not None:
            _learned[self._owner] = self._start, self.gamma


class InStep:
    """A schedule of ranks that draft in step: the first rank's choice counts, and it is made before drafting."""

    go_on: GoOn | None = None

    def __init__(self, schedule: Schedule, ranks: Ranks):
        self._schedule = schedule
        self._ranks = ranks
        self.longest = schedule.longest

    def plan(self, rows: int, left: int, unread: int) -> int:
        return self._ranks.agree(self._schedule.plan(rows, left, unread) if self._ranks.leads else 0)

    def update(self, iteration: Iteration) -> None:
        if self._ranks.leads:
            self._schedule.update(iteration)


class Unused:
    """Stands in for a schedule on ranks that do not draft."""

    go_on: GoOn | None = None

    def __init__(self, longest: int | None):
        self.longest = longest

    def plan(self, rows: int, left: int, unread: int) -> int:
        raise AssertionError("only the first rank plans")

    def update(self, iteration: Iteration) -> None:
        pass


SCHEDULES = ("optimal", "constant", "heuristic", "heuristic_transient")


def make_schedule(
    name: str,
    gamma: int | None,
    target: object,
    drafter: Drafter,
    kind: Hashable = (),
    ranks: Ranks | None = None,
) -> Schedule:
    """A schedule by its name in the generation config.

    Args:
        name: one of `SCHEDULES`.
        gamma: the first draft length, and for "optimal" the longest; `None` for the schedule's own choice.
        target: the target model; costs depend on it.
        drafter: estimates are remembered for its `owner`.
        kind: of the call; estimates for calls of different kinds are kept apart.
        ranks: the processes that decode the call together, if there are several.
    """
    if name not in SCHEDULES:
        raise ValueError(f"`num_assistant_tokens_schedule` must be one of {', '.join(SCHEDULES)}, got {name!r}")
    in_step = ranks is not None and ranks.in_step
    schedule: Schedule
    if name == "optimal":
        estimates = estimates_for(target, drafter, kind)
        schedule = Optimal(gamma or MAX_GAMMA, estimates, drafter.shows_confidence and not in_step)
    elif name == "constant":
        schedule = Constant(gamma or DEFAULT_GAMMA)
    else:
        schedule = Heuristic(gamma or DEFAULT_GAMMA, getattr(drafter, "model", None) if name == "heuristic" else None)
    if ranks is None:
        return schedule
    return InStep(schedule, ranks) if in_step else schedule if ranks.leads else Unused(schedule.longest)
