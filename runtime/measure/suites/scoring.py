"""What an answer is worth, and how sure a mean is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..held_out import DRAWS, interval

Z = 1.959963984540054
"""The standard normal distribution's 97.5th percentile."""

FEWEST = 5
"""With fewer haystacks than this, single questions are drawn: a draw of two or three haystacks says nothing."""

KEPT = 0.85
"""The share of its score at the trained length that a model must keep at a length that counts as effective."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def score(said: str, references: Sequence[str], any_of: bool = False) -> float:
    """The share of the references that are in what was said, capital letters or not; with `any_of`, 1 if one is.

    These are RULER's string matches.
    """
    hits = [reference.lower() in said.lower() for reference in references]
    return float(any(hits)) if any_of else sum(hits) / len(hits)


def wilson(p: float, n: int) -> Estimate:
    """The mean of `n` scores from 0 to 1, with Wilson's interval, as if all were 0 or 1 and none shared a haystack."""
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, min(middle - half, p)), min(1.0, max(middle + half, p)))


def by_haystack(values: Sequence[float], haystacks: Sequence[int], seed: int = 0) -> Estimate:
    """The mean of values, with an interval by a bootstrap over whole haystacks."""
    return pooled([(values, haystacks)], seed)


def pooled(cells: Sequence[tuple[Sequence[float], Sequence[int]]], seed: int = 0) -> Estimate:
    """The mean of cells' means, each of which counts the same; haystacks are drawn within each cell.

    Args:
        cells: for each, values and the haystack that each is about.
    """
    rng, draws, means = np.random.default_rng(seed), np.zeros(DRAWS), []
    for values, haystacks in cells:
        groups = _groups(values, haystacks)
        sums, counts = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
        drawn = rng.integers(len(groups), size=(DRAWS, len(groups)))
        draws += sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) / len(cells)
        means.append(math.fsum(values) / len(values))
    return Estimate(math.fsum(means) / len(means), *interval(draws))


def _groups(values: Sequence[float], haystacks: Sequence[int]) -> list[list[float]]:
    """The values that are drawn together."""
    if len(set(haystacks)) < FEWEST:
        return [[value] for value in values]
    groups: dict[int, list[float]] = {}
    for value, haystack in zip(values, haystacks, strict=True):
        groups.setdefault(haystack, []).append(value)
    return list(groups.values())


def effective_length(scores: Mapping[int, float], own: float, trained: int) -> int | None:
    """The longest length at which a score is at least `KEPT` of the model's own, as long as none before it is less.

    Lengths below the trained one do not count as before it: their scores differ as their questions do.

    Args:
        scores: the scores by length.
        own: the score of the model as it was trained, at the length `trained`.
    """
    best = None
    for length in sorted(scores):
        if own > 0 and scores[length] >= KEPT * own:
            best = length
        elif length >= trained:
            break
    return best


def likelihood(loss: float) -> float:
    """The probability of a right answer's token, as a geometric mean, from the loss in nats per token."""
    return math.exp(-loss)
