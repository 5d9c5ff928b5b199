"""Gumbel noise: the published generator, the right law, and a function of seed, position and token alone."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from hf_specdec.sampling.context import Context
from hf_specdec.sampling.noise import GumbelNoise, gumbel, state

CPU = torch.device("cpu")


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, in plain Python."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_generator_gives_the_numbers_of_java() -> None:
    """`new SplittableRandom(1234567)` in Java, as many pages quote them; our plain version, not the one under test."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("start", [0, 1234567, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("size", [1, 8, 9])
def test_noise_is_made_of_the_generators_numbers(start: int, size: int) -> None:
    halves = [half % 2**31 for z in splitmix64(start, 5) for half in (z, z >> 32)][:size]
    expected = [-math.log(-math.log1p(-(half + 0.5) / 2**31)) for half in halves]
    torch.testing.assert_close(gumbel([start], size, CPU)[0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_noise_follows_gumbels_law_and_no_two_positions_are_alike() -> None:
    """A Kolmogorov-Smirnov test of a million numbers; correlations between seeds, positions and tokens."""
    noise = (
        gumbel([state(seed, position) for seed in range(10) for position in range(10)], 10_000, CPU).double().numpy()
    )
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    correlations = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlations).max() < 5 / math.sqrt(10_000)
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 5 / math.sqrt(noise.size)


def make_context(first: list[int], width: int) -> Context:
    return Context(torch.ones(len(first), width, dtype=torch.int64), first, max_length=width + 20, pad_token_id=0)


def test_noise_depends_neither_on_other_rows_nor_on_padding_nor_on_what_was_asked_before() -> None:
    context = make_context([0, 2], 6)
    noise = GumbelNoise([7, 8])
    block = noise.at(context, 0, 5, 11)
    assert block.shape == (2, 5, 11)
    assert torch.equal(noise.at(context, 2, 2, 11), block[:, 2:4])  # remembered
    assert torch.equal(GumbelNoise([7, 8]).at(context, 3, 1, 11), block[:, 3:4])  # not remembered

    alone = make_context([0], 4)  # the second row's prompt without its padding
    assert torch.equal(GumbelNoise([8]).at(alone, 0, 5, 11), block[1:])

    context.append([[3, 4], [5]])
    context.rows = [1]
    assert torch.equal(noise.at(context, 0, 4, 11), block[1:, 1:])
    assert not torch.equal(block[0, 0], block[1, 0])
