"""`evolution`: LongRoPE's search as published (Ding et al., arXiv 2402.13753, algorithm 1 and section 3.3).

The first population holds PI, NTK-aware, YaRN, `near` with each window that is searched, and mutations of them. Each
generation keeps the best (the parents) and adds mutations and crossovers of them. λ are on a grid, n̂, near windows and
the numbers of pairs that stand still beyond them in sets, and λ of the others never decrease with the dimension. The
paper redraws a λ until it satisfies this; here it is drawn from
between its neighbours, which is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .algorithm import Algorithm, Request, Score, Search, Start
from .settings import Evolution, Settings
from .space import Candidate, Space

Draw = Callable[[], Candidate]


def search(start: Start) -> Search:
    """LongRoPE's algorithm 1."""
    settings, space = start.settings.evolution, start.space
    breeder = _Breeder(space, settings, start.random())
    plain = [space.seed(method) for method in ("pi", "ntk", "yarn")] if 0 in space.near_token_choices else []
    seeds = plain + [score.candidate for score in start.seeds[1:] if score.candidate.near_tokens in space.near_tokens]
    population = [breeder.admit(breeder.on_grid(seed)) for seed in seeds][: settings.population]
    founders = list(population)
    while len(population) < settings.population:
        chosen = founders[int(breeder.rng.integers(len(founders)))]
        population.append(breeder.new(lambda chosen=chosen: breeder.mutated(chosen)))  # type: ignore[misc]
    parents: list[Score] = []
    for generation in range(settings.generations + 1):
        asked = tuple(dict.fromkeys(population))
        rivals = tuple(score.candidate for score in parents)
        answer = yield Request(f"generation {generation}", asked, rivals, settings.parents)
        parents = sorted((*parents, *answer.scores), key=lambda score: score.rank)[: settings.parents]
        population = [breeder.child_by_mutation(parents) for _ in range(settings.mutations)]
        population += [breeder.child_by_crossover(parents) for _ in range(settings.crossovers)]


class _Breeder:
    """Creates candidates that are within the space and have not been created before."""

    def __init__(self, space: Space, settings: Evolution, rng: np.random.Generator) -> None:
        self.space, self.settings, self.rng = space, settings, rng
        self.known: set[Candidate] = set()

    def bounds(self, candidate: Candidate) -> tuple[int, int]:
        """The first and last point of the grid for free λ."""
        grid, low = self.settings.grid, math.exp(self.space.smallest_log_factor)
        high = math.exp(self.space.largest_log_factor(candidate.near_tokens))
        return math.ceil(low / grid - 1e-9), math.floor(high / grid + 1e-9)

    def on_grid(self, candidate: Candidate) -> Candidate:
        """`candidate` with its free λ rounded to the grid; rounding keeps their order."""
        low, high = self.bounds(candidate)
        points = np.round(np.exp(candidate.log_factors[self.space.n_fixed :]) / self.settings.grid)
        return self.space.with_free(candidate, np.log(np.clip(points, low, max(low, high)) * self.settings.grid))

    def admit(self, candidate: Candidate) -> Candidate:
        self.known.add(candidate)
        return candidate

    def new(self, draw: Draw) -> Candidate:
        """The first draw that is new, or the last of `Evolution.tries` draws if none is."""
        for _ in range(self.settings.tries):
            candidate = draw()
            if candidate not in self.known:
                break
        return self.admit(candidate)

    def mutated(self, candidate: Candidate) -> Candidate:
        """Redraw each λ from between its neighbours, n̂, attention factor, still pairs and near window, by the mutation
        probability.

        With another window, λ are brought to its stretch.
        """
        n, grid, p = self.space.n_fixed, self.settings.grid, self.settings.probability
        points = np.round(np.exp(candidate.log_factors[n:]) / grid).astype(int)
        least, most = self.bounds(candidate)
        first = self.space.first_moving(candidate) - n
        for i in np.flatnonzero(self.rng.random(len(points)) < p):
            low = points[i - 1] if i > first else least
            high = points[i + 1] if i + 1 < len(points) else max(most, low)
            points[i] = self.rng.integers(low, high, endpoint=True)
        start_tokens, attention = candidate.start_tokens, candidate.attention_factor
        if self.rng.random() < p:
            start_tokens = int(self.rng.choice(self.space.start_tokens_within(candidate.near_tokens)))
        if self.settings.search_attention and self.rng.random() < p:
            attention = float(self.rng.uniform(*self.space.attention_bounds))
        child = replace(candidate, start_tokens=start_tokens, attention_factor=attention)
        child = self.space.with_free(child, np.log(points * grid))
        if child.near_tokens and self.rng.random() < p:
            still = int(self.rng.choice(self.space.still_choices(child.near_tokens)))
            child = self.space.with_still_pairs(child, still)
        choices = self.space.near_token_choices
        if len(choices) > 1 and self.rng.random() < p:
            child = self.in_window(child, int(self.rng.choice(choices)))
        return child

    def in_window(self, candidate: Candidate, near_tokens: int) -> Candidate:
        """`candidate` with a near window, on the grid."""
        same = candidate.near_tokens == near_tokens
        return candidate if same else self.on_grid(self.space.with_window(candidate, near_tokens))

    def crossed(self, first: Candidate, second: Candidate) -> Candidate:
        """The first parent with some values of the second, where λ of moving pairs stay non-decreasing.

        λ are compared in the first parent's near window.
        """
        n, p = self.space.n_fixed, self.settings.probability
        factors = list(first.log_factors)
        other = self.in_window(second, first.near_tokens)
        for i in np.flatnonzero(self.rng.random(len(factors)) < p):
            low = factors[i - 1] if i > first.still_pairs else -math.inf
            high = factors[i + 1] if i + 1 < len(factors) else math.inf
            if low <= other.log_factors[i] <= high:
                factors[i] = other.log_factors[i]
        start_tokens = second.start_tokens if self.rng.random() < p else first.start_tokens
        attention = second.attention_factor if self.rng.random() < p else first.attention_factor
        if start_tokens not in self.space.start_tokens_within(first.near_tokens):
            start_tokens = first.start_tokens
        child = replace(first, start_tokens=start_tokens, attention_factor=attention)
        child = self.space.with_free(child, np.array(factors[n:]))
        if other.still_pairs != child.still_pairs and self.rng.random() < p:
            child = self.space.with_still_pairs(child, other.still_pairs)
        if second.near_tokens != first.near_tokens and self.rng.random() < p:
            child = self.in_window(child, second.near_tokens)
        return child

    def child_by_mutation(self, parents: list[Score]) -> Candidate:
        return self.new(lambda: self.mutated(parents[int(self.rng.integers(len(parents)))].candidate))

    def child_by_crossover(self, parents: list[Score]) -> Candidate:
        """A crossover of two parents, or a mutation of the better one if no crossover is new."""
        if len(parents) == 1:
            return self.child_by_mutation(parents)
        for _ in range(self.settings.tries):
            first, second = sorted(self.rng.choice(len(parents), 2, replace=False))
            child = self.crossed(parents[first].candidate, parents[second].candidate)
            if child not in self.known:
                return self.admit(child)
        return self.new(lambda: self.mutated(parents[first].candidate))


def _first(settings: Settings, space: Space) -> float:
    return settings.evolution.population


EVOLUTION = Algorithm(search, _first)
