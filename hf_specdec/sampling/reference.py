"""The acceptance rules in plain Python, one row at a time: the specification that tests compare `acceptance.py` with.

Probabilities are lists that sum to 1; `u` and `choose` supply the randomness, which a test can fix or enumerate.
"""

from collections.abc import Callable, Sequence

Distribution = Sequence[float]


def accept_greedy(drafts: Sequence[int], target_choices: Sequence[int]) -> list[int]:
    """The committed set: drafts as long as they equal the target's choices, then the target's choice."""
    committed = []
    for draft, choice in zip(drafts, target_choices):
        if draft != choice:
            break
        committed.append(draft)
    return [*committed, target_choices[len(committed)]]


def accept_sampled(
    drafts: Sequence[int],
    q: Sequence[Distribution] | None,
    p: Sequence[Distribution],
    u: Sequence[float],
    choose: Callable[[Distribution], int],
) -> list[int]:
    """The committed set of speculative sampling (Leviathan et al. 2023, Algorithm 1).

    Args:
        drafts: γ tokens.
        q: the γ distributions that they were drawn from, or `None` if they are deterministic.
        p: the target's γ + 1 distributions.
        u: γ numbers in [0, 1).
        choose: draws a token from a distribution.
    """
    committed: list[int] = []
    for i, x in enumerate(drafts):
        q_i = one_hot(x, len(p[i])) if q is None else q[i]
        if not u[i] * q_i[x] < p[i][x]:
            return [*committed, choose(residual(p[i], q_i))]
        committed.append(x)
    return [*committed, choose(p[len(drafts)])]


def accept_block(
    drafts: Sequence[int],
    q: Sequence[Distribution],
    p: Sequence[Distribution],
    u: Sequence[float],
    choose: Callable[[Distribution], int],
) -> list[int]:
    """The committed set of block verification (Sun et al. 2025, Algorithm 2). Arguments as for `accept_sampled`."""
    accepted = 0
    kept: float = 1
    kept_there = kept
    for i, x in enumerate(drafts):
        kept = min(kept * p[i][x] / q[i][x], 1)
        if i + 1 < len(drafts):
            over = sum(max(kept * p_x - q_x, 0) for p_x, q_x in zip(p[i + 1], q[i + 1]))
            h = over / (over + 1 - kept) if over > 0 else kept >= 1
        else:
            h = kept
        if u[i] < h:  # a later draft may be kept where an earlier one is not
            accepted, kept_there = i + 1, kept
    if accepted == len(drafts):
        return [*drafts, choose(p[accepted])]
    return [*drafts[:accepted], choose(residual([kept_there * p_x for p_x in p[accepted]], q[accepted]))]


def accept_coupled(
    drafts: Sequence[int], scores: Sequence[Sequence[float]], noise: Sequence[Sequence[float]]
) -> list[int]:
    """The committed set of coupled sampling: greedy, on scores with the noise of each position.

    Args:
        scores: the target's γ + 1 logarithms of p, up to a constant each.
        noise: Gumbel noise of the γ + 1 positions.
    """
    sums = [[s + g for s, g in zip(*position)] for position in zip(scores, noise)]
    return accept_greedy(drafts, [max(range(len(row)), key=row.__getitem__) for row in sums])


def residual(p: Distribution, q: Distribution) -> Distribution:
    """norm(max(p - q, 0)); p itself when p = q."""
    difference = [max(p_x - q_x, 0) for p_x, q_x in zip(p, q)]
    total = sum(difference)
    return [d / total for d in difference] if total > 0 else p


def one_hot(x: int, size: int) -> Distribution:
    return [1 if y == x else 0 for y in range(size)]
