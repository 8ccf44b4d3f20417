"""The interval of a difference: it covers the truth as often as it should, and is wider if neighbours agree."""

import numpy as np
import pytest
from ropewalk.runtime.measure.held_out import draw_blocks, interval, verdict
from ropewalk.runtime.measure.passages import ObjectivePart, Passage


def block_interval(differences, weights, seed=0):
    return interval(draw_blocks(differences, weights, seed))


def test_it_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        differences = [rng.normal(-0.01, 0.3, 4096) for _ in range(2)]
        low, high = block_interval(differences, [np.full(4096, 1 / 4096)] * 2, seed=3)
        covered += low <= -0.01 <= high
    assert 180 <= covered <= 198


def test_neighbours_that_agree_make_it_wider():
    rng = np.random.default_rng(2)
    weights = [np.full(8192, 1 / 8192)]
    apart = rng.normal(0, 1, 8192)
    together = np.repeat(rng.normal(0, 1, 128), 64)
    widths = [np.ptp(block_interval([x], weights)) for x in (apart, together)]
    assert widths[1] > 4 * widths[0]


def test_weights_count_and_the_seed_decides():
    differences = np.r_[np.zeros(1000), np.full(24, -1.0)]
    weights = np.r_[np.full(1000, 0.5 / 1000), np.full(24, 0.5 / 24)]
    low, high = block_interval([differences], [weights], seed=5)
    assert -1 <= low < -0.5 and high <= 0
    assert block_interval([differences], [weights], seed=5) == (low, high)
    assert block_interval([np.full(300, -0.2)], [np.full(300, 1 / 300)]) == pytest.approx((-0.2, -0.2))


def test_each_part_of_a_mix_is_judged_on_its_own():
    """Two passages of 1,000 text tokens and a key of 4 digits: text a little but surely better, one key lost."""
    rng, n = np.random.default_rng(3), 1000
    text, digits = np.r_[np.full(n, 1 / n), np.zeros(4)], np.r_[np.zeros(n), np.full(4, 0.25)]
    parts = (ObjectivePart("tail", 0.8, tuple(text)), ObjectivePart("needle", 0.2, tuple(digits)))
    weights = tuple(0.8 * text + 0.2 * digits)
    passages = [Passage(name, (0,) * (n + 5), tuple(range(1, n + 5)), weights, parts) for name in "ab"]
    theirs = [rng.normal(3, 1, n + 4) for _ in passages]
    ours = [x - np.r_[rng.normal(0.1, 0.2, n), np.full(4, key)] for x, key in zip(theirs, (2.0, -1.0), strict=True)]
    found = verdict(list(zip(ours, theirs, strict=True)), passages, "tail+0.25*needle")
    tail, needle = found.parts
    assert found.kind == "tail+0.25*needle" and (tail.kind, needle.kind) == ("tail", "needle")
    assert found.loss == pytest.approx(np.mean([weights @ x for x in ours]))
    assert found.difference == pytest.approx(0.8 * tail.difference + 0.2 * needle.difference)
    assert tail.is_better and tail.difference == pytest.approx(-0.1, abs=0.02) and tail.low < tail.difference
    assert needle.difference == pytest.approx(-0.5) and (needle.low, needle.high) == pytest.approx((-2, 1))
    assert not needle.is_better and not found.is_better

    alone = [Passage(p.name, p.tokens, p.targets, p.parts[0].weights, p.parts[:1]) for p in passages]
    judged = verdict(list(zip(ours, theirs, strict=True)), alone, "tail")
    assert (judged.kind, judged.parts) == ("tail", ()) and judged.difference == pytest.approx(tail.difference)
