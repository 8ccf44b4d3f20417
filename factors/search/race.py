"""Racing over passages: a candidate is evaluated on more passages only while it may still win.

All candidates of a race are evaluated on the same passages in the same order, and candidates are dropped only when all
losses of a rung are known, so the outcome does not depend on the order in which workers answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ..methods import Array
from .settings import Racing

Indices = npt.NDArray[np.intp]
Measure = Callable[[Indices, Indices], Array]
"""(candidates, passages) → losses, shape ``(candidates, passages)``."""


def race(
    measure: Measure,
    n_candidates: int,
    rivals: Array,
    weights: Array,
    order: Indices,
    places: int,
    racing: Racing,
) -> Array:
    """The losses of the candidates, shape ``(n_candidates, passages)``; nan where a candidate was dropped before.

    Args:
        rivals: losses of earlier candidates that compete for the places, shape ``(rivals, passages)``.
        weights: how much each passage counts.
        order: the passages in the order to read them; the rungs end after 1, 2, 4, 8, … of them.
        places: how many of candidates and rivals count in the end: those clearly behind the last of these are dropped.
            0: those clearly behind the best rival are dropped, whatever the other candidates are.
    """
    losses = np.full((n_candidates, len(order)), np.nan)
    live: Indices = np.arange(n_candidates, dtype=np.intp)
    for start, end in _rungs(len(order)) if racing.on else [(0, len(order))]:
        losses[np.ix_(live, order[start:end])] = measure(live, order[start:end])
        seen = order[:end]
        if end < len(order):
            live = live[~_behind(losses[np.ix_(live, seen)], rivals[:, seen], weights[seen], places, racing)]
        if not len(live):
            break
    return losses


def _rungs(n_passages: int) -> Iterator[tuple[int, int]]:
    start, end = 0, 1
    while start < n_passages:
        yield start, min(end, n_passages)
        start, end = end, end * 2


def _behind(losses: Array, rivals: Array, weights: Array, places: int, racing: Racing) -> npt.NDArray[np.bool_]:
    """Which candidates are unlikely to be among the first `places`, judging by the passages seen so far."""
    pool = np.concatenate([losses, rivals]) if places else rivals
    if len(pool) <= places:
        return np.zeros(len(losses), dtype=bool)
    weights = weights / weights.sum()
    means = pool @ weights
    ranking = np.argsort(means, kind="stable")
    holder = ranking[max(places, 1) - 1]
    best, last = means[ranking[0]], means[holder]
    if not np.isfinite(last):
        return np.zeros(len(losses), dtype=bool)
    n_seen = len(weights)
    with np.errstate(invalid="ignore"):
        differences = losses - pool[holder]
        mean = differences @ weights
    if n_seen == 1:
        late = mean > racing.clear * (last - best)
        return np.asarray(late & (mean > 0) & (last > best) | ~np.isfinite(mean))
    # A few passages say little about the variance of a candidate's differences, so the median variance of all
    # candidates is averaged in, with the weight of two passages.
    with np.errstate(invalid="ignore"):
        own = np.nan_to_num(np.var(differences, axis=1, ddof=1), nan=0.0, posinf=0.0)
    variance = (own * (n_seen - 1) + 2 * np.median(own)) / (n_seen + 1)
    error = np.sqrt(variance * np.sum(weights**2))
    return np.asarray((mean > racing.z * error) & (mean > 0) | ~np.isfinite(mean))
