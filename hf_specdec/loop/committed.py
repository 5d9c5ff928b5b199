"""What one iteration appends to the context, before it is appended."""

from dataclasses import dataclass, field

from ..records.stats import Iteration, RowStep
from ..sampling.context import Context


@dataclass
class Committed:
    """What one iteration appends, by active row.

    Attributes:
        tokens: the committed set.
        accepted: how many of them are accepted drafts; these come first.
        finished: why the row ends there; `None` if it goes on.
        drafted: the drafts that were proposed.
        withdrawn: by row of the batch, how many tokens of earlier iterations come after the row's end. A criterion has
            set that end now that all rows have come there.
    """

    tokens: list[list[int]]
    accepted: list[int]
    finished: list[str | None]
    drafted: list[list[int]]
    withdrawn: dict[int, int] = field(default_factory=dict)

    def iteration(
        self, context: Context, draft_seconds: float, verify_seconds: float, draft_forwards: int
    ) -> Iteration:
        """The record of the iteration; `other_seconds` is 0."""
        steps = [
            RowStep(
                row=row,
                context_length=context.ends[row] - context.first[row],
                drafted=self.drafted[slot],
                accepted=self.accepted[slot],
                committed=self.tokens[slot],
                finished=self.finished[slot],
            )
            for slot, row in enumerate(context.rows)
        ]
        return Iteration(
            steps,
            draft_seconds,
            verify_seconds,
            other_seconds=0.0,
            draft_forwards=draft_forwards,
            withdrawn=self.withdrawn,
        )
