"""How an algorithm and the run talk: candidates are asked about, scores come back.

An algorithm is a generator. It knows candidates and losses only; who evaluates, and what is cached, raced or over
budget, is the run's business. Given the same scores it asks the same questions, and it may be ended at any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace

import numpy as np

from .settings import Settings
from .space import Candidate, Space


@dataclass(frozen=True)
class Score:
    """What is known of a candidate.

    Attributes:
        loss: weighted mean over the passages read, nats a token; infinite if none was, or if it is no number.
        passages: how many it was read on.
        whole: whether these are all of them; if not, it was dropped.
        by_log_factors: derivatives of the loss, shape ``(n_rot/2,)``, where they were asked for.
    """

    candidate: Candidate
    loss: float
    passages: int
    whole: bool
    by_log_factors: tuple[float, ...] = ()
    by_log_attention: float = 0.0

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What to sort by: all that are whole first, then those that lasted longer."""
        return (not self.whole, -self.passages, self.loss)


@dataclass(frozen=True)
class Request:
    """A question to the run.

    Attributes:
        step: what it is for, in a few words, for the table.
        candidates: whom to score.
        rivals: those scored before that they are up against.
        places: how many of candidates and rivals matter to the algorithm; a candidate may be dropped once it is
            unlikely to be one. 0: each is up against the rivals alone, whatever the other candidates are.
        gradient: whether derivatives are wanted; then nobody is dropped.
    """

    step: str
    candidates: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...] = ()
    places: int = 1
    gradient: bool = False


@dataclass(frozen=True)
class Response:
    """Scores in the order of the candidates, and how many more may be evaluated, at the fidelity searched by.

    Those that the budget did not reach have no passages.
    """

    scores: tuple[Score, ...]
    left: float


Search = Generator[Request, Response, None]


@dataclass(frozen=True)
class Start:
    """What an algorithm starts from.

    Attributes:
        seeds: scored whole: YaRN first, then what the caller brought.
        left: candidates that may be evaluated; a gradient counts as `Settings.gradient_cost` of them.
    """

    space: Space
    settings: Settings
    seeds: tuple[Score, ...]
    left: float

    @property
    def best(self) -> Score:
        return min(self.seeds, key=lambda score: score.rank)

    def random(self) -> np.random.Generator:
        """The algorithm's own source of rng."""
        return np.random.default_rng([self.settings.seed, 1])


@dataclass(frozen=True)
class Algorithm:
    """One way to search.

    Attributes:
        search: makes the generator.
        first: evaluations that it needs before it has done anything of use.
    """

    search: Callable[[Start], Search]
    first: Callable[[Settings, Space], float]


def best_of(scores: Iterable[Score], otherwise: Score) -> Score:
    """The best whole one of `scores`, or `otherwise` if none is better."""
    return min((otherwise, *(score for score in scores if score.whole)), key=lambda score: score.loss)


def search_start_tokens(
    space: Space, best: Score, most: float, left: float
) -> Generator[Request, Response, tuple[Score, float]]:
    """Choose n̂ with all else as it is: a few spread over the set first, then the neighbours of the best of these.

    Asks for at most `most` of the `left` candidates; returns the best score, and what is left.
    """
    choices = space.start_token_choices
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
