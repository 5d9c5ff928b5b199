"""The acceptance rules: equal to the loop reference, and committed tokens follow exactly the target's distribution.

Where randomness is fixed, distributions are multiples of 1/6 or 1/4 and u is a midpoint of 60 or 12 equal cells of
[0, 1). Then u q = p never happens, both versions decide alike despite rounding, and the share of cells in which a
draft is accepted is exactly min(1, p / q). So enumerating the cells enumerates the randomness.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from hf_specdec.sampling import acceptance, reference
from hf_specdec.sampling.acceptance import Verdict, accept_block, accept_greedy, accept_sampled, residual

Tokens = tuple[int, ...]
Law = dict[Tokens, Fraction]
Table = dict[Tokens, list[Fraction]]  # next-token distribution by prefix

NAN, INF = float("nan"), float("inf")


# ---------------------------------------------------------------------------------------------------- distributions


def random_distribution(rng: random.Random, vocab: int, parts: int) -> list[Fraction]:
    """Multiples of 1/parts that sum to 1; zeros are common, one-hot occurs."""
    counts = [0] * vocab
    for _ in range(parts):
        counts[rng.choice([rng.randrange(vocab), 0])] += 1
    rng.shuffle(counts)
    return [Fraction(count, parts) for count in counts]


def pair_of_distributions(rng: random.Random, vocab: int, kind: str) -> tuple[list[Fraction], list[Fraction]]:
    """p and q: unrelated, equal, or without a common token."""
    p = random_distribution(rng, vocab, 6)
    if kind == "equal":
        return p, p
    if kind == "disjoint":
        p = [*random_distribution(rng, vocab - 1, 6), Fraction(0)]
        free = [x for x in range(vocab) if p[x] == 0]
        q = [Fraction(0)] * vocab
        for x, share in zip(free, random_distribution(rng, len(free), 6), strict=True):
            q[x] = share
        return p, q
    return p, random_distribution(rng, vocab, 6)


def random_table(rng: random.Random, vocab: int, depth: int) -> Table:
    """A small language: a next-token distribution, in quarters, for each prefix of fewer than `depth` tokens."""
    prefixes = (prefix for n in range(depth) for prefix in itertools.product(range(vocab), repeat=n))
    return {prefix: random_distribution(rng, vocab, 4) for prefix in prefixes}


def draw(rng: random.Random, distribution: Sequence[Fraction]) -> int:
    return rng.choices(range(len(distribution)), weights=[float(x) for x in distribution])[0]


def inverse_cdf(distribution: Sequence[float], v: float) -> int:
    """The token that `v` in [0, 1) draws."""
    total, token = 0.0, 0
    for token, share in enumerate(distribution):
        total += float(share)
        if v < total:
            return token
    return token


def scores_of(p: object) -> Tensor:
    """Scores whose softmax is p, up to one number per position."""
    logs = torch.tensor(p, dtype=torch.float32).log()
    return logs + torch.linspace(-3, 3, logs.shape[-2])[:, None]


# ------------------------------------------------------------------------------------------------ fixed randomness


class FixedRandomness:
    """Replaces `torch.rand_like` and `draw`; records what `draw` had to draw from."""

    def __init__(self, u: Tensor, v: Tensor):
        self.u, self.v = u, v
        self.weights = torch.empty(0)

    def rand_like(self, like: Tensor) -> Tensor:
        assert like.shape == self.u.shape
        return self.u

    def draw(self, weights: Tensor) -> Tensor:
        self.weights = weights
        return (weights.cumsum(dim=-1) <= self.v[:, None]).sum(dim=-1, keepdim=True).clamp(max=weights.shape[1] - 1)


FixRandomness = Callable[[Tensor, Tensor], FixedRandomness]


@pytest.fixture
def fix_randomness(monkeypatch: pytest.MonkeyPatch) -> FixRandomness:
    def fix(u: Tensor, v: Tensor) -> FixedRandomness:
        fixed = FixedRandomness(u, v)
        monkeypatch.setattr(torch, "rand_like", fixed.rand_like)
        monkeypatch.setattr(acceptance, "draw", fixed.draw)
        return fixed

    return fix


def committed(verdict: Verdict) -> list[list[int]]:
    return [row[: n + 1] for row, n in zip(verdict.tokens.tolist(), verdict.accepted.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_greedy_commits_what_the_reference_commits(gamma):
    rng = random.Random(gamma)
    rows, vocab = 200, 3
    scores = torch.randn(rows, gamma + 1, vocab, generator=torch.Generator().manual_seed(gamma))
    choices = scores.argmax(-1).tolist()
    drafts = [[c if rng.random() < 0.7 else rng.randrange(vocab) for c in row[:gamma]] for row in choices]
    lengths = [rng.randint(0, gamma) for _ in range(rows)]

    drafted = torch.tensor(drafts, dtype=torch.int64).view(rows, gamma)
    verdict = accept_greedy(drafted, torch.tensor(lengths), scores)

    expected = [reference.accept_greedy(d[:n], c[: n + 1]) for d, c, n in zip(drafts, choices, lengths, strict=True)]
    assert committed(verdict) == expected
    assert verdict.valid.all()
    if gamma:
        assert len({len(tokens) for tokens in expected}) == gamma + 1  # every number of accepted drafts occurred


@pytest.mark.parametrize("proposals", ["drawn", "one-hot"])
@pytest.mark.parametrize("kind", ["unrelated", "equal", "disjoint"])
@pytest.mark.parametrize("gamma", [0, 1, 3])
def test_sampled_commits_what_the_reference_commits(gamma, kind, proposals, fix_randomness):
    rng = random.Random(f"{gamma} {kind}")
    rows, vocab = 300, 4
    pairs = [[pair_of_distributions(rng, vocab, kind) for _ in range(gamma + 1)] for _ in range(rows)]
    p = [[[float(x) for x in position[0]] for position in row] for row in pairs]
    q = [[[float(x) for x in position[1]] for position in row[:gamma]] for row in pairs]
    drafts = [[draw(rng, position[1]) for position in row[:gamma]] for row in pairs]
    lengths = [rng.randint(0, gamma) if rng.random() < 0.4 else gamma for _ in range(rows)]
    u = [[(rng.randrange(60) + 0.5) / 60 for _ in range(gamma)] for _ in range(rows)]
    v = [(rng.randrange(9973) + 0.5) / 9973 for _ in range(rows)]
    fixed = fix_randomness(torch.tensor(u).view(rows, gamma), torch.tensor(v))

    verdict = accept_sampled(
        torch.tensor(drafts, dtype=torch.int64).view(rows, gamma),
        torch.tensor(lengths),
        torch.tensor(q).view(rows, gamma, vocab) if proposals == "drawn" else None,
        scores_of(p),
    )

    for r in range(rows):
        asked: list[Sequence[float]] = []

        def choose(distribution: Sequence[float], asked: list[Sequence[float]] = asked, v: float = v[r]) -> int:
            asked.append(distribution)
            return inverse_cdf(distribution, v)

        n = lengths[r]
        q_row = q[r][:n] if proposals == "drawn" else None
        expected = reference.accept_sampled(drafts[r][:n], q_row, p[r][: n + 1], u[r][:n], choose)
        assert committed(verdict)[r] == expected, f"row {r}"
        torch.testing.assert_close(fixed.weights[r], torch.tensor([float(x) for x in asked[0]]), atol=1e-6, rtol=0)
    assert verdict.valid.all()


# ----------------------------------------------------------------------------------------- the law, by enumeration

CELLS = 12  # cells of u per position
VOCAB = 3


def law_of_drafts(q: Table, gamma: int) -> Law:
    """All γ-token drafts that q may draw, with their probabilities."""
    law: Law = {}
    for drafts in itertools.product(range(VOCAB), repeat=gamma):
        weight = Fraction(1)
        for i, x in enumerate(drafts):
            weight *= q[drafts[:i]][x]
        if weight:
            law[drafts] = weight
    return law


def everything(drafts: Tokens, q: Table) -> int:
    return len(drafts)


def up_to_the_first_unsure_one(drafts: Tokens, q: Table) -> int:
    """As with `assistant_confidence_threshold=0.4`: an unsure draft is still proposed, but nothing after it."""
    return next((i + 1 for i, x in enumerate(drafts) if q[drafts[:i]][x] < Fraction(2, 5)), len(drafts))


def only_the_sure_ones(drafts: Tokens, q: Table) -> int:
    """A tempting mistake: a draft is withdrawn after its token was seen."""
    return next((i for i, x in enumerate(drafts) if q[drafts[:i]][x] < Fraction(2, 5)), len(drafts))


HowMany = Callable[[Tokens, Table], int]


def law_by_reference(p: Table, q: Table, gamma: int, one_hot: bool, how_many: HowMany) -> Law:
    """The distribution of the next γ + 1 tokens, over all drafts, all u and all tokens of the target, as fractions."""
    law: Law = defaultdict(Fraction)
    asked: list[Any] = []

    def choose(distribution: Any) -> int:
        asked.append(distribution)
        return -1

    def add(tokens: Tokens, weight: Fraction) -> None:
        """Count a committed prefix, and let the target continue it."""
        if len(tokens) == gamma + 1:
            law[tokens] += weight
            return
        for x, share in enumerate(p[tokens]):
            if share:
                add((*tokens, x), weight * share)

    for drafts, weight in law_of_drafts(q, gamma).items():
        n = how_many(drafts, q)
        q_seen = None if one_hot else [q[drafts[:i]] for i in range(n)]
        p_seen = [p[drafts[:i]] for i in range(n + 1)]
        for cells in itertools.product(range(CELLS), repeat=n):
            u = [Fraction(2 * cell + 1, 2 * CELLS) for cell in cells]
            tokens = reference.accept_sampled(drafts[:n], q_seen, p_seen, u, choose)
            for x, share in enumerate(asked.pop()):
                if share:
                    add((*tokens[:-1], x), weight * share / CELLS**n)
    return dict(law)


def dense(table: Table, depth: int) -> list[Tensor]:
    """`[VOCAB^i, VOCAB]` for each i < depth: the distributions after each prefix of i tokens."""
    rows = [[[float(x) for x in table[t]] for t in itertools.product(range(VOCAB), repeat=i)] for i in range(depth)]
    return [torch.tensor(row) for row in rows]


def behind(table: list[Tensor], tokens: Tensor) -> Tensor:
    """`[rows, depth, VOCAB]`: the distributions after each prefix of `tokens` `[rows, depth - 1 or more]`."""
    index = torch.zeros(len(tokens), dtype=torch.int64)
    found = []
    for i, distributions in enumerate(table):
        found.append(distributions[index])
        if i < tokens.shape[1]:
            index = index * VOCAB + tokens[:, i]
    return torch.stack(found, dim=1)


def law_by_tensors(
    p: Table, q: Table, gamma: int, one_hot: bool, how_many: HowMany, fix_randomness: FixRandomness
) -> tuple[Tensor, Tensor]:
    """The same from `accept_sampled`: one huge batch, in which each row is one draft with one cell of u per position.

    Returns: probabilities `[VOCAB^(γ+1)]` by the tensor version, and the target's own.
    """
    drawn = law_of_drafts(q, gamma)
    grid = (torch.tensor(list(itertools.product(range(CELLS), repeat=gamma))) + 0.5) / CELLS
    drafts = torch.tensor(list(drawn)).repeat_interleave(len(grid), dim=0)
    weight = torch.tensor([float(w) for w in drawn.values()]).double().repeat_interleave(len(grid)) / len(grid)
    lengths = torch.tensor([how_many(tokens, q) for tokens in drawn]).repeat_interleave(len(grid))
    u = grid.repeat(len(drawn), 1)
    fixed = fix_randomness(u, torch.zeros(len(u)))

    q_drafts = None if one_hot else behind(dense(q, gamma), drafts)
    verdict = accept_sampled(drafts, lengths, q_drafts, behind(dense(p, gamma + 1), drafts).log())

    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=gamma + 1)))
    p_sequences = behind(dense(p, gamma + 1), sequences).gather(-1, sequences[..., None]).squeeze(-1).double()
    law = torch.zeros(len(sequences)).double()
    for n in range(gamma + 1):
        here = verdict.accepted == n
        starts_so = (drafts[here, None, :n] == sequences[None, :, :n]).all(-1)
        own = fixed.weights[here][:, sequences[:, n]].double()
        law += (weight[here, None] * starts_so * own).sum(0) * p_sequences[:, n + 1 :].prod(-1)
    return law, p_sequences.prod(-1)


RULES = [everything, up_to_the_first_unsure_one]


@pytest.mark.parametrize("one_hot", [False, True], ids=["drawn", "one-hot"])
@pytest.mark.parametrize("how_many", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_the_reference_commits_exactly_what_the_target_samples(gamma, how_many, one_hot):
    for seed in range(20 if gamma < 3 else 1):
        rng = random.Random(seed)
        p, q = random_table(rng, VOCAB, gamma + 1), random_table(rng, VOCAB, gamma)
        assert law_by_reference(p, q, gamma, one_hot, how_many) == law_of_drafts(p, gamma + 1)


@pytest.mark.parametrize("one_hot", [False, True], ids=["drawn", "one-hot"])
@pytest.mark.parametrize("how_many", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_the_tensor_version_commits_exactly_what_the_target_samples(gamma, how_many, one_hot, fix_randomness):
    for seed in range(20 if gamma < 3 else 4):
        rng = random.Random(seed)
        p, q = random_table(rng, VOCAB, gamma + 1), random_table(rng, VOCAB, gamma)
        law, target = law_by_tensors(p, q, gamma, one_hot, how_many, fix_randomness)
        torch.testing.assert_close(law, target, atol=2e-6, rtol=0)


def test_taking_back_an_unsure_draft_would_change_the_law():
    rng = random.Random(0)
    p, q = random_table(rng, VOCAB, 3), random_table(rng, VOCAB, 2)
    assert law_by_reference(p, q, 2, False, only_the_sure_ones) != law_of_drafts(p, 3)


# --------------------------------------------------------------------------------------- the law, with real randomness


ACCEPT = {"token": accept_sampled, "block": accept_block}


@pytest.mark.parametrize(("rule", "proposals"), [("token", "drawn"), ("token", "one-hot"), ("block", "drawn")])
@pytest.mark.parametrize("draft", ["close", "far"])
def test_half_a_million_samples_follow_the_target(draft, rule, proposals):
    """Chi-squared on the next four tokens at once, γ = 3. False alarm: 1e-4 for a new seed, none for a fixed one.

    The close draft's p / q is 0.9 to 1.2 everywhere: always accepting it is a bias of 2% per token.
    """
    torch.manual_seed(0)
    rows, gamma = 500_000, 3
    p = [torch.randn(VOCAB**i, VOCAB).mul(0.7).softmax(-1) for i in range(gamma + 1)]
    noise = 0.1 if draft == "close" else 1.0
    q = [(p_i.log() + noise * torch.randn_like(p_i).clamp(-1, 1)).softmax(-1) for p_i in p[:gamma]]

    def sampled(table: list[Tensor], tokens: Tensor) -> Tensor:
        """`tokens`, and one more from `table`."""
        distribution = behind(table[: tokens.shape[1] + 1], tokens)[:, -1]
        return torch.cat([tokens, torch.multinomial(distribution, 1)], dim=1)

    drafts = torch.empty(rows, 0, dtype=torch.int64)
    for _ in range(gamma):
        drafts = sampled(q, drafts)
    q_drafts = behind(q, drafts) if proposals == "drawn" else None
    verdict = ACCEPT[rule](drafts, torch.full((rows,), gamma), q_drafts, behind(p, drafts).log())

    counts = torch.zeros(VOCAB ** (gamma + 1))
    for n in range(gamma + 1):
        tokens = verdict.tokens[verdict.accepted == n, : n + 1]
        while tokens.shape[1] <= gamma:
            tokens = sampled(p, tokens)
        index = (tokens * VOCAB ** torch.arange(gamma, -1, -1)).sum(1)
        counts += torch.bincount(index, minlength=len(counts))
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=gamma + 1)))
    expected = rows * behind(p, sequences).double().gather(-1, sequences[..., None]).squeeze(-1).prod(-1)
    assert expected.min() > 5
    assert scipy.stats.chisquare(counts.numpy(), (expected / expected.sum() * rows).numpy()).pvalue > 1e-4


# ------------------------------------------------------------------------------------------------- block verification


class Coin:
    """A u whose comparisons come out as decided before; `weight` is the probability that they do."""

    def __init__(self, below: bool):
        self.below = below
        self.weight = Fraction(1)

    def __lt__(self, h: Any) -> bool:
        self.weight = Fraction(h) if self.below else 1 - Fraction(h)
        return self.below


def law_of_blocks(p: Table, q: Table, gamma: int, how_many: HowMany) -> tuple[Law, Fraction]:
    """The law of the next γ + 1 tokens by `reference.accept_block`, and how many drafts are kept on average."""
    law: Law = defaultdict(Fraction)
    kept = Fraction(0)
    for drafts, weight in law_of_drafts(q, gamma).items():
        n = how_many(drafts, q)
        q_seen, p_seen = [q[drafts[:i]] for i in range(n)], [p[drafts[:i]] for i in range(n + 1)]
        for outcomes in itertools.product([False, True], repeat=n):
            coins: Any = [Coin(outcome) for outcome in outcomes]
            asked: list[Any] = []

            def choose(distribution: Any, asked: list[Any] = asked) -> int:
                asked.append(distribution)
                return -1

            tokens = reference.accept_block(drafts[:n], q_seen, p_seen, coins, choose)
            chance = weight
            for coin in coins:
                chance *= coin.weight
            kept += chance * (len(tokens) - 1)
            for x, share in enumerate(asked[0] if chance else []):
                for rest in itertools.product(range(VOCAB), repeat=gamma + 1 - len(tokens)):
                    text = (*tokens[:-1], x, *rest)
                    further = Fraction(share)
                    for i in range(len(tokens), gamma + 1):
                        further *= p[text[:i]][text[i]]
                    if further:
                        law[text] += chance * further
    return dict(law), kept


@pytest.mark.parametrize("how_many", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("gamma", [1, 2, 3, 4])
def test_blocks_commit_exactly_what_the_target_samples(gamma, how_many):
    """As fractions, without rounding."""
    for seed in range(10 if gamma < 4 else 1):
        rng = random.Random(seed)
        p, q = random_table(rng, VOCAB, gamma + 1), random_table(rng, VOCAB, gamma)
        assert law_of_blocks(p, q, gamma, how_many)[0] == law_of_drafts(p, gamma + 1)


def test_blocks_keep_as_many_drafts_as_published():
    """Sun et al. 2025, section 2: two tokens, two drafts, 11/9 of them kept, where token by token keeps 10/9."""
    p = {
        t: [Fraction(1, 3), Fraction(2, 3), Fraction(0)]
        for n in range(3)
        for t in itertools.product(range(3), repeat=n)
    }
    q = {t: [Fraction(2, 3), Fraction(1, 3), Fraction(0)] for t in p}
    assert law_of_blocks(p, q, 2, everything)[1] == Fraction(11, 9)


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_blocks_commit_what_the_reference_commits(gamma, fix_randomness):
    rng, rows, vocab = random.Random(gamma), 400, 4
    generator = torch.Generator().manual_seed(gamma)
    p = torch.randn(rows, gamma + 1, vocab, generator=generator).mul(1.5).softmax(-1)
    q = (p[:, :gamma].log() + torch.randn(rows, gamma, vocab, generator=generator)).softmax(-1)
    q[::7] = p[::7, :gamma]  # equal in some rows
    q[3::7] = torch.nn.functional.one_hot(q[3::7].argmax(-1), vocab).float()  # deterministic in some
    drafts = torch.stack([torch.multinomial(q[:, i], 1, generator=generator)[:, 0] for i in range(gamma)], dim=1)
    lengths = [rng.randint(0, gamma) if rng.random() < 0.4 else gamma for _ in range(rows)]
    u, v = torch.rand(rows, gamma, generator=generator), torch.rand(rows, generator=generator)
    fix_randomness(u, v)
    verdict = accept_block(drafts, torch.tensor(lengths), q, p.log())
    expected = [
        reference.accept_block(
            drafts[r, :n].tolist(), q[r].tolist(), p[r].tolist(), u[r].tolist(),
            lambda distribution, r=r: inverse_cdf(distribution, float(v[r])),
        )
        for r, n in enumerate(lengths)
    ]  # fmt: skip
    same = sum(mine == theirs for mine, theirs in zip(committed(verdict), expected, strict=True))
    assert same >= rows - 2  # p and v may be equal but for rounding
    assert len({len(tokens) for tokens in expected}) == gamma + 1
    assert verdict.valid.all()


def test_blocks_keep_more_drafts_than_tokens_do():
    torch.manual_seed(0)
    p = torch.tensor([1 / 3, 2 / 3]).expand(200_000, 4, 2)
    q = torch.tensor([2 / 3, 1 / 3]).expand(200_000, 3, 2)
    drafts, lengths = (torch.rand(200_000, 3) > 2 / 3).long(), torch.full((200_000,), 3)
    kept = {rule: float(accept(drafts, lengths, q, p.log()).accepted.float().mean()) for rule, accept in ACCEPT.items()}
    assert kept["token"] == pytest.approx(2 / 3 + 4 / 9 + 8 / 27, abs=0.01)
    assert kept["block"] > kept["token"] + 0.1


# ------------------------------------------------------------------------------------------------------- edge cases


def test_a_token_that_the_target_rules_out_is_never_accepted_whatever_u(fix_randomness):
    fixed = fix_randomness(torch.zeros(1, 1), torch.zeros(1))
    p = [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    for q in (torch.tensor([[[0.9, 0.1, 0.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]]), None):  # q may even be 0 there
        verdict = accept_sampled(torch.tensor([[0]]), torch.tensor([1]), q, torch.tensor([p]).log())
        assert verdict.accepted.tolist() == [0]
        assert fixed.weights[0, 0] == 0


def test_drafts_from_the_targets_own_distribution_are_all_accepted(fix_randomness):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(100, 5, 7, generator=generator)
    drafts = torch.randint(0, 7, (100, 4), generator=generator)
    fix_randomness(torch.full((100, 4), 0.9999), torch.zeros(100))
    verdict = accept_sampled(drafts, torch.full((100,), 4), scores.softmax(-1)[:, :4], scores)
    assert verdict.accepted.tolist() == [4] * 100


def test_a_draft_that_the_target_likes_better_than_the_drafter_is_always_accepted(fix_randomness):
    fix_randomness(torch.tensor([[0.9999]]), torch.zeros(1))
    scores = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    verdict = accept_sampled(torch.tensor([[0]]), torch.tensor([1]), torch.tensor([[[0.4, 0.6]]]), scores)
    assert verdict.accepted.tolist() == [1]


def test_without_drafts_the_own_token_is_drawn_from_the_target(fix_randomness):
    scores = torch.randn(6, 1, 5, generator=torch.Generator().manual_seed(0))
    for q in (None, torch.empty(6, 0, 5)):
        fixed = fix_randomness(torch.empty(6, 0), torch.full((6,), 0.5))
        verdict = accept_sampled(torch.empty(6, 0, dtype=torch.int64), torch.zeros(6, dtype=torch.int64), q, scores)
        assert verdict.tokens.shape == (6, 1)
        torch.testing.assert_close(fixed.weights, scores[:, 0].softmax(-1))


def test_a_draft_behind_a_rows_length_is_neither_accepted_nor_subtracted(fix_randomness):
    fixed = fix_randomness(torch.zeros(2, 2), torch.zeros(2))
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]).expand(2, 3, 2)
    q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).expand(2, 2, 2)
    verdict = accept_sampled(torch.tensor([[1, 0], [1, 0]]), torch.tensor([0, 1]), q, p.log())
    assert verdict.accepted.tolist() == [0, 1]
    torch.testing.assert_close(fixed.weights, torch.stack([p[0, 0], p[1, 1]]))


def test_the_residual_is_a_distribution_over_what_the_draft_underrates():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(500, 6, generator=generator).mul(2).softmax(-1) for _ in range(2))
    r = residual(p, q)
    torch.testing.assert_close(r.sum(-1), torch.ones(500))
    assert ((r > 0) == (p > q)).all()
    kept = torch.minimum(p, q)  # drawn from q and accepted
    torch.testing.assert_close(kept + (1 - kept.sum(-1, keepdim=True)) * r, p)


def test_the_residual_of_equal_distributions_is_the_target():
    p = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    assert residual(p, p).equal(p)


BROKEN = {
    "NaN": [0.0, NAN, 1.0, 0.0],
    "+inf": [0.0, INF, 1.0, 0.0],
    "all -inf": [-INF] * 4,
}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_scores_that_are_no_distribution_are_reported_where_the_outcome_depends_on_them(broken, do_sample):
    likes_1 = [-INF, 0.0, -INF, -INF]  # draft 1 is accepted here, draft 2 is not
    scores = torch.tensor(
        [
            [broken, likes_1, likes_1],  # at the first draft
            [likes_1, likes_1, broken],  # at the bonus token
            [likes_1, broken, likes_1],  # at the correction
            [likes_1, likes_1, broken],  # after a rejected draft: ignored
            [likes_1, broken, broken],  # the same
            [likes_1, likes_1, likes_1],
        ]
    )
    drafts = torch.tensor([[1, 1], [1, 1], [1, 3], [1, 2], [2, 1], [1, 1]])
    lengths = torch.full((6,), 2)
    q = torch.full((6, 2, 4), 0.25)
    verdict = accept_sampled(drafts, lengths, q, scores) if do_sample else accept_greedy(drafts, lengths, scores)
    assert verdict.valid.tolist() == [False, False, False, True, True, True]
    assert verdict.accepted.tolist()[3:] == [1, 0, 2]


def test_a_draw_follows_the_distribution() -> None:
    """False alarm: 1e-4 for each of two rows."""
    torch.manual_seed(0)
    p = torch.tensor([[0.0, 0.1, 0.0, 0.6, 0.25, 0.05, 0.0], [0.0, 2.0, 1.0, 0.0, 0.5, 0.5, 0.0]])  # as weights
    drawn = torch.cat([acceptance.draw(p) for _ in range(20_000)], dim=1)
    for row, weights in zip(drawn, p.double()):
        counts = torch.bincount(row, minlength=p.shape[1])
        assert counts[weights == 0].sum() == 0
        expected = weights[weights > 0] / weights.sum() * len(row)
        assert scipy.stats.chisquare(counts[weights > 0], expected).pvalue > 1e-4


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_draw_is_never_a_token_of_probability_zero(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: torch.full(shape, u, dtype=dtype))
    torch.manual_seed(0)
    p = torch.randn(500, 1000).mul(3).softmax(-1)
    p[:, :5] = p[:, -5:] = 0
    p *= torch.rand_like(p[:, :1])
    assert (p.gather(1, acceptance.draw(p)) > 0).all()
