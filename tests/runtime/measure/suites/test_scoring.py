"""Scores of known answers, intervals, and effective lengths."""

import numpy as np
import pytest
from ropewalk.runtime.measure.suites.scoring import (
    by_haystack,
    effective_length,
    likelihood,
    pooled,
    score,
    wilson,
)


def test_an_answer_has_all_or_any_of_the_references():
    assert score("It is 1234567.", ("1234567",)) == 1 and score("It is 123456.", ("1234567",)) == 0
    assert score("12, 34 and 56", ("12", "34", "78", "90")) == 0.5
    assert score("THE Cellar", ("cellar",)) == 1  # RULER's match does not mind capital letters
    assert score("b", ("a", "b"), any_of=True) == 1 and score("c", ("a", "b"), any_of=True) == 0
    assert score("", ("a",)) == 0


def test_wilson_as_in_the_books():
    """Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = wilson(right / n, n)
        assert (found.mean, found.low, found.high) == pytest.approx((right / n, low, high), abs=1e-4)
    assert wilson(1, 10).high == 1 and wilson(1, 10).low == pytest.approx(0.7225, abs=1e-4)


def test_whole_haystacks_are_drawn():
    """Ten questions about each of eight haystacks that differ: as sure as eight values are, not eighty."""
    rng = np.random.default_rng(1)
    means = rng.normal(size=8)
    values, haystacks = np.repeat(means, 10).tolist(), np.repeat(range(8), 10).tolist()
    drawn = by_haystack(values, haystacks)
    spread = 2 * 1.96 * means.std() / np.sqrt(8)
    assert drawn.low < drawn.mean < drawn.high and drawn.mean == pytest.approx(means.mean())
    assert drawn.high - drawn.low == pytest.approx(spread, rel=0.15)
    alone = by_haystack(values, list(range(80)))
    assert alone.high - alone.low == pytest.approx(spread / np.sqrt(10), rel=0.15)
    few = by_haystack([0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1])  # two haystacks of equal means are not certain
    assert few.high - few.low > 0.5


def test_cells_count_the_same():
    found = pooled([([1.0] * 10, list(range(10))), ([0.0] * 2, [0, 1])])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_effective_length():
    scores = {4096: 0.9, 8192: 0.8, 16384: 0.69, 32768: 0.5}
    assert effective_length(scores, 0.8, 8192) == 16384  # 0.68 and more
    assert effective_length(scores, 0.82, 8192) == 8192
    assert effective_length({**scores, 16384: 0.1, 32768: 0.9}, 0.8, 8192) == 8192  # a gap ends it
    assert effective_length({**scores, 4096: 0.1}, 0.8, 8192) == 16384  # not below the trained length
    assert effective_length(scores, 1.0, 8192) == 4096
    assert effective_length(scores, 1.1, 8192) is None and effective_length({}, 0.5, 8192) is None
    assert effective_length({4096: 0.0}, 0.0, 4096) is None
    assert likelihood(0) == 1 and likelihood(0.6931471805599453) == pytest.approx(0.5)
