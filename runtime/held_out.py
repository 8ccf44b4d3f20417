"""What a search has found, judged on texts that it never saw: the difference in loss, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .losses import Losses
from .probes import Probe

BLOCK = 128
"""Targets that follow each other and are drawn together: neighbours' losses are not independent."""

DRAWS = 2000


@dataclass(frozen=True)
class Verdict:
    """Two bands on the same held-out probes; losses in nats a token, weighted as the probes are.

    Attributes:
        difference: the loss of the found band less that of the other: below 0, the found one is better.
        low, high: where the difference lies with 95 % confidence, by a bootstrap over blocks of neighbouring tokens.
    """

    loss: float
    against: float
    difference: float
    low: float
    high: float
    n_probes: int

    @property
    def is_better(self) -> bool:
        """Whether the whole interval is on the found band's side."""
        return self.high < 0


def verdict(losses: Sequence[tuple[Losses, Losses]], probes: Sequence[Probe], seed: int = 0) -> Verdict:
    """From the losses of each probe's targets, in the band found and in the other."""
    weights = [np.array(probe.weights) for probe in probes]
    ours, theirs = (
        float(np.mean([pair[k] @ weight for pair, weight in zip(losses, weights, strict=True)])) for k in (0, 1)
    )
    low, high = interval([pair[0] - pair[1] for pair in losses], weights, seed)
    return Verdict(ours, theirs, ours - theirs, low, high, len(probes))


def interval(
    differences: Sequence[Losses], weights: Sequence[Losses], seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Where the mean over probes of ``weights @ differences`` lies, by a bootstrap over blocks within each probe.

    Blocks of `BLOCK` neighbouring targets are drawn with replacement, as many as a probe has; weights are made to add
    up to 1 again, as a draw may hold more of what counts than another.
    """
    chance = np.random.default_rng(seed)
    means = np.zeros(DRAWS)
    for difference, weight in zip(differences, weights, strict=True):
        starts = np.arange(0, len(difference), BLOCK)
        sums = np.add.reduceat(difference * weight, starts)
        counts = np.add.reduceat(weight, starts)
        drawn = chance.integers(len(starts), size=(DRAWS, len(starts)))
        means += sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) / len(differences)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)
