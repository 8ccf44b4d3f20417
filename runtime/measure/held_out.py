"""The result of a search, judged on held-out texts: the difference in loss, and its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..losses import Losses
from .passages import Passage

BLOCK = 128
"""Neighbouring tokens that are drawn together, as their losses are not independent."""

DRAWS = 2000
"""Bootstrap draws."""


@dataclass(frozen=True)
class Verdict:
    """Two bands compared on the same held-out passages; losses in nats per token, weighted as the passages are.

    Attributes:
        kind: what is scored: the objective, or one part of it.
        difference: the loss of the found band minus that of the other; below 0, the found one is better.
        low, high: 95 % confidence interval of the difference, by a bootstrap over blocks of neighbouring tokens, or
            over whole keys for `needle`.
        parts: the same for each part, where the objective is a mix.
    """

    kind: str
    loss: float
    against: float
    difference: float
    low: float
    high: float
    n_passages: int
    parts: tuple[Verdict, ...] = ()

    @property
    def is_better(self) -> bool:
        """Whether the whole interval is on the found band's side."""
        return self.high < 0


def verdict(
    losses: Sequence[tuple[Losses, Losses]], passages: Sequence[Passage], objective: str, seed: int = 0
) -> Verdict:
    """Judge by the losses of each passage's targets, in the found band and in the other.

    All passages must have the same parts.
    """
    differences = [ours - theirs for ours, theirs in losses]
    parts, mixed = [], np.zeros(DRAWS)
    for i, part in enumerate(passages[0].parts):
        weights = [np.array(passage.parts[i].weights) for passage in passages]
        ours, theirs = (
            float(np.mean([pair[k] @ weight for pair, weight in zip(losses, weights, strict=True)])) for k in (0, 1)
        )
        # The same seed for each part: parts of the same text are drawn together.
        means = (draw_keys if part.kind == "needle" else draw_blocks)(differences, weights, seed)
        mixed += part.share * means
        parts.append(Verdict(part.kind, ours, theirs, ours - theirs, *interval(means), len(passages)))
    if len(parts) == 1:
        return parts[0]
    shares = np.array([part.share for part in passages[0].parts])
    ours, theirs = (float(shares @ [getattr(part, name) for part in parts]) for name in ("loss", "against"))
    return Verdict(objective, ours, theirs, ours - theirs, *interval(mixed), len(passages), tuple(parts))


def draw_blocks(differences: Sequence[Losses], weights: Sequence[Losses], seed: int = 0, block: int = BLOCK) -> Losses:
    """Return the mean over passages of ``weights @ differences``, for each of `DRAWS` bootstrap draws of blocks.

    Within each passage, blocks of `block` neighbouring targets are drawn with replacement, as many as it has. Weights
    are normalised to add up to 1 again, as draws differ in how much weight they hold.
    """
    rng, means = np.random.default_rng(seed), np.zeros(DRAWS)
    for difference, weight in zip(differences, weights, strict=True):
        starts = np.arange(0, len(difference), block)
        sums = np.add.reduceat(difference * weight, starts)
        counts = np.add.reduceat(weight, starts)
        drawn = rng.integers(len(starts), size=(DRAWS, len(starts)))
        means += sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) / len(differences)
    return means


def draw_keys(differences: Sequence[Losses], weights: Sequence[Losses], seed: int = 0) -> Losses:
    """Return the same means where only one key counts in each passage: whole passages are drawn."""
    means = np.array([weight @ difference for difference, weight in zip(differences, weights, strict=True)])
    drawn = np.random.default_rng(seed).integers(len(means), size=(DRAWS, len(means)))
    return np.asarray(means[drawn].mean(axis=1))


def interval(means: Losses, confidence: float = 0.95) -> tuple[float, float]:
    """The bounds of the central `confidence` share of the draws."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)
