"""`gradient`: descent along the exact gradient of the loss, by ln λ of all searched pairs and ln attention factor.

Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), with its steps kept small and projected onto the space, because the
loss is smooth for a few per cent of λ, not further. When nothing better comes for a while, the search resumes from the
best point at half the rate; when the gains become too small, it ends. The near window, the pairs that stand still
beyond it and n̂ have no gradient. The window is that of the best seed, and its neighbours are tried at the end; then n̂
is chosen by trying. Pairs that stand still are chosen first, as the best λ of the others depend on them, and tried
again at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..methods import Array
from .algorithm import (
    Algorithm,
    Request,
    Score,
    Search,
    Start,
    search_near_tokens,
    search_start_tokens,
    search_still_pairs,
)
from .settings import GradientSettings, Settings
from .space import Candidate, Space

START_TOKENS_SHARE = 0.2
"""The share of the budget that is reserved for choosing n̂, and trying other near windows and still pairs."""

STILL_PAIRS_SHARE = 0.1
"""The share of the budget that choosing still pairs may use before the descent."""

MIN_GAIN_SHARE = 0.02
"""The share of the whole gain that the last `GradientSettings.patience` steps must bring, or else the descent ends."""

BETA_MEAN, BETA_SQUARE = 0.8, 0.95  # a few dozen steps: shorter memories than the usual 0.9 and 0.999
TINY = 1e-4  # nats per unit of ln λ: a gradient of this size is noise


def search(start: Start) -> Search:
    """Still pairs, Adam from the best seed, then the near window, still pairs again and n̂."""
    space, settings = start.space, start.settings.descent
    cost, most = start.settings.gradient_cost, STILL_PAIRS_SHARE * start.left
    best, left = yield from search_still_pairs(space, start.best, most, start.left, spread=True)
    reserved = min(START_TOKENS_SHARE * left, 11 if space.windows else 7)
    adam = _Adam(space.n_pairs - space.n_fixed + 1, settings.rate)
    candidate, since_best, initial, bests = best.candidate, 0, best.loss, [best.loss]
    for step in range(settings.steps):
        if left - reserved < cost:
            break
        answer = yield Request(f"step {step + 1}", (candidate,), (best.candidate,), gradient=True)
        score, left = answer.scores[0], answer.left
        if not score.whole:
            break
        better = score.loss < best.loss
        best, since_best = (score, 0) if better else (best, since_best + 1)
        bests.append(best.loss)
        if better and _hardly_better(bests[-1 - settings.patience :], settings.patience, initial):
            break
        if since_best > settings.patience:
            adam, candidate, since_best, bests = _Adam(adam.n, adam.rate / 2), best.candidate, 0, [best.loss]
            if adam.rate < settings.rate / 8:
                break
            continue
        candidate = _moved(space, score, adam, settings)
    best, left = yield from search_near_tokens(space, best, left, left)
    best, left = yield from search_still_pairs(space, best, left, left)
    yield from search_start_tokens(space, best, left, left)


def _hardly_better(bests: list[float], steps: int, initial: float) -> bool:
    """Whether the last `steps` steps gained next to nothing, compared with all that was gained since `initial`."""
    return len(bests) > steps and bests[0] - bests[-1] < MIN_GAIN_SHARE * (initial - bests[-1])


@dataclass
class _Adam:
    """Adam's running means for `n` numbers."""

    n: int
    rate: float
    count: int = 0
    mean: Array = field(init=False)
    square: Array = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.square = np.zeros(self.n), np.zeros(self.n)

    def step(self, gradient: Array) -> Array:
        """The step to add, before it is limited."""
        self.count += 1
        self.mean = BETA_MEAN * self.mean + (1 - BETA_MEAN) * gradient
        self.square = BETA_SQUARE * self.square + (1 - BETA_SQUARE) * gradient**2
        mean = self.mean / (1 - BETA_MEAN**self.count)
        square = self.square / (1 - BETA_SQUARE**self.count)
        return np.asarray(-self.rate * mean / (np.sqrt(square) + TINY))


def _moved(space: Space, score: Score, adam: _Adam, settings: GradientSettings) -> Candidate:
    gradient = np.array([*score.by_log_factors[space.n_fixed :], score.by_log_attention])
    step = np.clip(adam.step(gradient), -settings.largest_step, settings.largest_step)
    # The attention factor scales the logits of all pairs at once, so it moves only a third as far.
    return space.moved(score.candidate, step[:-1], float(step[-1]) / 3)


def _first(settings: Settings, space: Space) -> float:
    return 2 * settings.gradient_cost


GRADIENT = Algorithm(search, _first)
