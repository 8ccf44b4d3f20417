"""The interval of a difference: it holds the truth as often as it says, and is wider where neighbours agree."""

import numpy as np
import pytest
from ropewalk.runtime.held_out import interval


def test_it_covers_the_truth_nineteen_times_in_twenty():
    chance = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        differences = [chance.normal(-0.01, 0.3, 4096) for _ in range(2)]
        low, high = interval(differences, [np.full(4096, 1 / 4096)] * 2, seed=3)
        covered += low <= -0.01 <= high
    assert 180 <= covered <= 198


def test_neighbours_that_agree_make_it_wider():
    chance = np.random.default_rng(2)
    weights = [np.full(8192, 1 / 8192)]
    apart = chance.normal(0, 1, 8192)
    together = np.repeat(chance.normal(0, 1, 128), 64)
    widths = [np.ptp(interval([x], weights)) for x in (apart, together)]
    assert widths[1] > 4 * widths[0]


def test_weights_count_and_the_seed_decides():
    differences = np.r_[np.zeros(1000), np.full(24, -1.0)]
    weights = np.r_[np.full(1000, 0.5 / 1000), np.full(24, 0.5 / 24)]
    low, high = interval([differences], [weights], seed=5)
    assert -1 <= low < -0.5 and high <= 0
    assert interval([differences], [weights], seed=5) == (low, high)
    assert interval([np.full(300, -0.2)], [np.full(300, 1 / 300)]) == pytest.approx((-0.2, -0.2))
