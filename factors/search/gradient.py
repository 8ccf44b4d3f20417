"""`gradient`: down the exact gradient of the loss, ln λ of every searched pair and ln attention factor at once.

Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), its steps held small and projected onto the space: the loss is
smooth for a few per cent of λ, not further. The best point is kept; when nothing better comes for a while, the search
goes on from there at half the rate, and when what comes is hardly better any more, it ends. n̂ has no gradient: it is
chosen by trying, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..methods import Array
from .algorithm import Algorithm, Request, Score, Search, Start, search_start_tokens
from .settings import GradientSettings, Settings
from .space import Candidate, Space

START_TOKENS_SHARE = 0.2
"""Of the budget, kept to choose n̂."""

WORTH_GOING_ON = 0.02
"""The share of the whole gain that `GradientSettings.patience` improving steps must bring together, or it ends."""

BETA_MEAN, BETA_SQUARE = 0.8, 0.95  # a few dozen steps: shorter memories than the usual 0.9 and 0.999
TINY = 1e-4  # nats a unit of ln λ: a gradient of this size is noise


def search(start: Start) -> Search:
    """Adam from the best seed, then n̂."""
    space, settings = start.space, start.settings.descent
    best, left, cost = start.best, start.left, start.settings.gradient_cost
    kept = min(START_TOKENS_SHARE * left, 7)
    adam = _Adam(space.n_pairs - space.n_fixed + 1, settings.rate)
    candidate, since, begin, bests = best.candidate, 0, best.loss, [best.loss]
    for step in range(settings.steps):
        if left - kept < cost:
            break
        answer = yield Request(f"step {step + 1}", (candidate,), (best.candidate,), gradient=True)
        score, left = answer.scores[0], answer.left
        if not score.whole:
            break
        better = score.loss < best.loss
        best, since = (score, 0) if better else (best, since + 1)
        bests.append(best.loss)
        if better and _hardly_better(bests[-1 - settings.patience :], settings.patience, begin):
            break
        if since > settings.patience:
            adam, candidate, since, bests = _Adam(adam.n, adam.rate / 2), best.candidate, 0, [best.loss]
            if adam.rate < settings.rate / 8:
                break
            continue
        candidate = _moved(space, score, adam, settings)
    yield from search_start_tokens(space, best, left, left)


def _hardly_better(bests: list[float], steps: int, begin: float) -> bool:
    """Whether the last `steps` steps brought next to nothing of what was gained since the loss was `begin`."""
    return len(bests) > steps and bests[0] - bests[-1] < WORTH_GOING_ON * (begin - bests[-1])


@dataclass
class _Adam:
    """The running means of a descent over `n` numbers."""

    n: int
    rate: float
    count: int = 0
    mean: Array = field(init=False)
    square: Array = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.square = np.zeros(self.n), np.zeros(self.n)

    def step(self, gradient: Array) -> Array:
        """What to add, before any limit."""
        self.count += 1
        self.mean = BETA_MEAN * self.mean + (1 - BETA_MEAN) * gradient
        self.square = BETA_SQUARE * self.square + (1 - BETA_SQUARE) * gradient**2
        mean = self.mean / (1 - BETA_MEAN**self.count)
        square = self.square / (1 - BETA_SQUARE**self.count)
        return np.asarray(-self.rate * mean / (np.sqrt(square) + TINY))


def _moved(space: Space, score: Score, adam: _Adam, settings: GradientSettings) -> Candidate:
    gradient = np.array([*score.by_log_factors[space.n_fixed :], score.by_log_attention])
    step = np.clip(adam.step(gradient), -settings.largest_step, settings.largest_step)
    # One number scales every pair's logits at once: it moves a third as far.
    return space.moved(score.candidate, step[:-1], float(step[-1]) / 3)


def _first(settings: Settings, space: Space) -> float:
    return 2 * settings.gradient_cost


GRADIENT = Algorithm(search, _first)
