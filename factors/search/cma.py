"""`cma`: first the whole curve of λ, described by a few numbers, then single pairs.

The curve differs from the start (YaRN's, or the caller's if that is better) by a piecewise linear function of a few
knots, spread over the pairs that are searched. CMA-ES (Hansen, arXiv 1604.00772; the package `cma`) moves the knots and
the attention factor. Means of near windows and of n̂ make no sense: the window is that of the best seed, its neighbours
and n̂ are tried once the curve is found. Nor do means of how many pairs stand still beyond the window: these are chosen
before the curve, which depends on them, and tried again after it. What the curve is too stiff for is found afterwards
by changing single pairs.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from ..methods import Array
from .algorithm import (
    Algorithm,
    Request,
    Response,
    Score,
    Search,
    Start,
    best_of,
    search_near_tokens,
    search_start_tokens,
    search_still_pairs,
)
from .settings import CmaSettings, Settings
from .space import Candidate, Space

START_TOKENS_SHARE = 0.15
"""The share of the budget that choosing n̂ may use."""

NEAR_TOKENS_SHARE = 0.1
"""The share of the budget that trying other near windows may use."""

STILL_PAIRS_SHARE = 0.1
"""The share of the budget that choosing still pairs may use before the curve, and half of it after."""

Stage = Generator[Request, Response, tuple[Score, float]]
"""Returns the best score, and how many candidates are left."""


def search(start: Start) -> Search:
    """Still pairs, CMA-ES on the curve, then the near window, still pairs again and n̂, then single pairs."""
    settings, space, all_of_it = start.settings.covariance, start.space, start.left
    best, left = yield from search_still_pairs(space, start.best, STILL_PAIRS_SHARE * all_of_it, all_of_it, spread=True)
    best, left = yield from _curve(start, settings, best, left)
    best, left = yield from search_near_tokens(space, best, min(left, NEAR_TOKENS_SHARE * all_of_it), left)
    best, left = yield from search_still_pairs(space, best, min(left, STILL_PAIRS_SHARE / 2 * all_of_it), left)
    best, left = yield from search_start_tokens(space, best, min(left, START_TOKENS_SHARE * all_of_it), left)
    yield from _pairs(space, settings, best, left)


@dataclass(frozen=True)
class _Curve:
    """Differences from `start` as a few numbers: knots of ln λ, then ln attention factor, in units of their steps.

    The knots are spread over the pairs that are searched and do not stand still.
    """

    space: Space
    start: Candidate
    settings: CmaSettings

    @property
    def n_moving(self) -> int:
        return self.space.n_pairs - self.space.first_moving(self.start)

    @property
    def n_knots(self) -> int:
        return min(self.settings.knots, self.n_moving)

    def candidate(self, x: Array) -> Candidate:
        at, n = np.linspace(0, 1, self.n_moving), self.n_knots
        moved = np.zeros(self.space.n_pairs - self.space.n_fixed)
        moved[-self.n_moving :] = np.interp(at, np.linspace(0, 1, n), x[:n]) * self.settings.step
        return self.space.moved(self.start, moved, float(x[n]) * self.settings.attention_step)


def _curve(start: Start, settings: CmaSettings, best: Score, left: float) -> Stage:
    """Run CMA-ES from `best` until its share of the budget is spent or its steps are too small to matter."""
    import cma  # it imports matplotlib, which reading a schedule does not need

    floor = (1 - settings.share) * left
    curve, rng = _Curve(start.space, best.candidate, settings), start.random()
    options = {
        "seed": math.nan,  # leave numpy's global random generator alone
        "randn": lambda *shape: rng.standard_normal(shape),
        "popsize": _population(settings, curve.n_knots + 1, left),
        "tolx": settings.smallest_step / settings.step,
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy(np.zeros(curve.n_knots + 1), 1.0, options)
    while not strategy.stop() and left - floor >= strategy.popsize:
        points = strategy.ask()
        asked = tuple(curve.candidate(np.asarray(point)) for point in points)
        answer = yield Request(
            f"curve {strategy.countiter + 1}", asked, (best.candidate,), places=strategy.popsize // 2
        )
        # CMA-ES uses only the order, so a candidate that was dropped half-way needs no loss.
        order = sorted(range(len(points)), key=lambda i: answer.scores[i].rank)
        strategy.tell(points, np.argsort(order).astype(float).tolist())
        best, left = best_of(answer.scores, best), answer.left
    if strategy.countiter and left >= 1:
        answer = yield Request("curve's mean", (curve.candidate(np.asarray(strategy.mean)),), (best.candidate,))
        best, left = best_of(answer.scores, best), answer.left
    return best, left


def _population(settings: CmaSettings, n: int, left: float) -> int:
    """Candidates per generation: the usual 4 + 3 ln n, or fewer if the budget would not allow four generations."""
    usual = settings.population or 4 + int(3 * np.log(n))
    return max(4, min(usual, int(settings.share * left / 4)))


def _pairs(space: Space, settings: CmaSettings, best: Score, left: float) -> Stage:
    """Move single pairs up or down and keep what is better; halve the step when no pair gains any more."""
    step, n = settings.pair_step, space.n_pairs - space.n_fixed
    moves = np.eye(n)
    while step >= settings.smallest_step and left >= 1:
        before = best
        for first in range(0, n, settings.pairs_at_once):
            pairs = list(range(first, min(first + settings.pairs_at_once, n)))
            for _ in range(2):
                best, left, pairs = yield from _try_pairs(space, best, left, step, {i: step * moves[i] for i in pairs})
                moves[pairs] = -moves[pairs]  # those that have gained nothing: now the other way
        step = step if best.loss < before.loss else step / 2
    return best, left


def _try_pairs(
    space: Space, best: Score, left: float, step: float, moves: dict[int, Array]
) -> Generator[Request, Response, tuple[Score, float, list[int]]]:
    """Try each of the `moves` alone, in one request so that all workers are used; then those that gain, together.

    Returns the best score, how many candidates are left, and the pairs whose move gained nothing.
    """
    asked = {i: space.moved(best.candidate, move) for i, move in moves.items()}
    asked = {i: candidate for i, candidate in asked.items() if candidate != best.candidate}
    asked = dict(list(asked.items())[: int(left)])
    if not asked:
        return best, left, list(moves)
    what = f"{step:.1%}, pair " + ", ".join(str(space.n_fixed + i) for i in asked)
    answer = yield Request(what, tuple(asked.values()), (best.candidate,), places=0)
    gains = [i for i, score in zip(asked, answer.scores, strict=True) if best_of([score], best) is not best]
    found, left = best_of(answer.scores, best), answer.left
    if len(gains) > 1 and left >= 1:
        together = space.moved(best.candidate, np.sum([moves[i] for i in gains], axis=0))
        answer = yield Request(f"{what} together", (together,), (found.candidate,))
        found, left = best_of(answer.scores, found), answer.left
    return found, left, [i for i in moves if i not in gains]


def _first(settings: Settings, space: Space) -> float:
    return 4


CMA = Algorithm(search, _first)
