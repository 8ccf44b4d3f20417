"""The protocol between an algorithm and the run: candidates are requested, scores come back.

An algorithm is a generator of requests. It knows only candidates and losses; evaluating, caching, racing and the budget
are the run's business. Given the same scores it makes the same requests, and it may be stopped at any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace

import numpy as np

from .settings import Settings
from .space import Candidate, Space


@dataclass(frozen=True)
class Score:
    """What is known about a candidate.

    Attributes:
        loss: weighted mean over the passages read, nats per token; infinite if none was read, or if it is not a number.
        passages: how many were read.
        whole: whether all passages were read; if not, it was dropped.
        by_log_factors: derivatives of the loss, shape ``(n_rot/2,)``, if they were requested.
    """

    candidate: Candidate
    loss: float
    passages: int
    whole: bool
    by_log_factors: tuple[float, ...] = ()
    by_log_attention: float = 0.0

    @property
    def rank(self) -> tuple[bool, int, float]:
        """The key to sort by: whole candidates first, then those that were dropped later."""
        return (not self.whole, -self.passages, self.loss)


@dataclass(frozen=True)
class Request:
    """A request to the run.

    Attributes:
        step: what it is for, in a few words, for the table.
        candidates: the candidates to score.
        rivals: candidates scored before, which these compete with.
        places: how many of candidates and rivals matter to the algorithm; a candidate may be dropped once it is
            unlikely to be among them. 0: each candidate competes with the rivals only, not with the others.
        gradient: whether derivatives are requested; if so, no candidate is dropped.
    """

    step: str
    candidates: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...] = ()
    places: int = 1
    gradient: bool = False


@dataclass(frozen=True)
class Response:
    """Scores in the order of the candidates, and how many more may be evaluated, at the search's fidelity.

    Candidates that the budget did not reach have no passages.
    """

    scores: tuple[Score, ...]
    left: float


Search = Generator[Request, Response, None]


@dataclass(frozen=True)
class Start:
    """What an algorithm starts from.

    Attributes:
        seeds: scored on all passages: YaRN first, then `near` with each window that is searched and, for the usual one,
            with pairs that stand still, then the caller's.
        left: how many candidates may be evaluated; a gradient counts as `Settings.gradient_cost` of them.
    """

    space: Space
    settings: Settings
    seeds: tuple[Score, ...]
    left: float

    @property
    def best(self) -> Score:
        """The best seed whose near window is one to choose from."""
        within = [score for score in self.seeds if score.candidate.near_tokens in self.space.near_token_choices]
        return min(within, key=lambda score: score.rank)

    def random(self) -> np.random.Generator:
        """The algorithm's own random generator."""
        return np.random.default_rng([self.settings.seed, 1])


@dataclass(frozen=True)
class Algorithm:
    """One search algorithm.

    Attributes:
        search: creates the generator.
        first: evaluations that it needs before it has done anything useful.
    """

    search: Callable[[Start], Search]
    first: Callable[[Settings, Space], float]


def best_of(scores: Iterable[Score], otherwise: Score) -> Score:
    """The best of the `scores` on all passages, or `otherwise` if none is better."""
    return min((otherwise, *(score for score in scores if score.whole)), key=lambda score: score.loss)


def search_start_tokens(
    space: Space, best: Score, most: float, left: float
) -> Generator[Request, Response, tuple[Score, float]]:
    """Choose n̂ with all else unchanged: first among a few spread over the set, then among the neighbours of the best.

    Requests at most `most` of the `left` candidates; returns the best score, and how many candidates are left.
    """
    choices = space.start_tokens_within(best.candidate.near_tokens)
    tried = {best.candidate.start_tokens}
    for spread in (True, False):
        at = choices.index(best.candidate.start_tokens)
        wanted = choices[::4] + choices[-1:] if spread else choices[max(at - 1, 0) : at + 2]
        new = [n for n in dict.fromkeys(wanted) if n not in tried][: max(int(most), 0)]
        tried.update(new)
        most -= len(new)
        if not new:
            continue
        asked = tuple(replace(best.candidate, start_tokens=n) for n in new)
        answer = yield Request("start tokens", asked, (best.candidate,))
        best, left = best_of(answer.scores, best), answer.left
    return best, left


def search_near_tokens(
    space: Space, best: Score, most: float, left: float
) -> Generator[Request, Response, tuple[Score, float]]:
    """Try the neighbouring near windows, as long as one is better; λ grow or shrink with them.

    Requests at most `most` of the `left` candidates; returns the best score, and how many candidates are left.
    """
    windows, tried = space.windows, {best.candidate.near_tokens}
    while best.candidate.near_tokens in windows:
        at = windows.index(best.candidate.near_tokens)
        new = [window for window in windows[max(at - 1, 0) : at + 2] if window not in tried][: max(int(most), 0)]
        if not new:
            break
        tried.update(new)
        most -= len(new)
        asked = tuple(space.with_window(best.candidate, window) for window in new)
        answer = yield Request("near window", asked, (best.candidate,))
        best, left = best_of(answer.scores, best), answer.left
    return best, left


def search_still_pairs(
    space: Space, best: Score, most: float, left: float, spread: bool = False
) -> Generator[Request, Response, tuple[Score, float]]:
    """Try the neighbouring numbers of pairs that stand still beyond the near window, as long as one is better.

    With `spread`, first a few over the whole range, those nearest to the usual number first: one pair more or less may
    make no difference where many do. Requests at most `most` of the `left` candidates; returns the best score, and how
    many candidates are left.
    """
    usual, tried = space.usual_still_pairs(best.candidate.near_tokens), {best.candidate.still_pairs}
    while best.candidate.near_tokens:
        choices = sorted({*space.still_choices(best.candidate.near_tokens), best.candidate.still_pairs})
        at = choices.index(best.candidate.still_pairs)
        wanted = sorted(choices[::2], key=lambda n: abs(n - usual)) if spread else choices[max(at - 1, 0) : at + 2]
        new = [n for n in wanted if n not in tried][: max(int(most), 0)]
        if new:
            tried.update(new)
            most -= len(new)
            asked = tuple(space.with_still_pairs(best.candidate, n) for n in new)
            answer = yield Request("still pairs", asked, (best.candidate,))
            best, left = best_of(answer.scores, best), answer.left
        elif not spread:
            break
        spread = False
    return best, left
