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


def residual(p: Distribution, q: Distribution) -> Distribution:
    """norm(max(p - q, 0)); p itself when p = q."""
    difference = [max(p_x - q_x, 0) for p_x, q_x in zip(p, q)]
    total = sum(difference)
    return [d / total for d in difference] if total > 0 else p


def one_hot(x: int, size: int) -> Distribution:
    return [1 if y == x else 0 for y in range(size)]
