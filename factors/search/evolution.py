"""`evolution`: LongRoPE's search as published (Ding et al., arXiv 2402.13753, algorithm 1 and section 3.3).

The first population holds PI, NTK-aware, YaRN and mutations of them. Each generation keeps the best (the parents) and
adds mutations and crossovers of them. λ are on a grid, n̂ in a set, and λ never decrease with the dimension. The paper
redraws a λ until it satisfies this; here it is drawn from between its neighbours, which is the same.
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
    seeds = [space.seed(method) for method in ("pi", "ntk", "yarn")] + [score.candidate for score in start.seeds[1:]]
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
        self.top = math.floor(math.exp(space.largest_log_factor) / settings.grid + 1e-9)

    def on_grid(self, candidate: Candidate) -> Candidate:
        """`candidate` with its free λ rounded to the grid; rounding keeps their order."""
        n, grid = self.space.n_fixed, self.settings.grid
        points = np.round(np.exp(candidate.log_factors[n:]) / grid)
        free = np.log(np.clip(points, math.ceil(1 / grid - 1e-9), self.top) * grid)
        return replace(candidate, log_factors=(*candidate.log_factors[:n], *free.tolist()))

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
        """Redraw each λ from between its neighbours, n̂ and attention factor, each with the mutation probability."""
        n, grid, p = self.space.n_fixed, self.settings.grid, self.settings.probability
        points = np.round(np.exp(candidate.log_factors[n:]) / grid).astype(int)
        floor = math.ceil(math.exp(candidate.log_factors[n - 1] if n else 0.0) / grid - 1e-9)
        for i in np.flatnonzero(self.rng.random(len(points)) < p):
            low = points[i - 1] if i else floor
            high = points[i + 1] if i + 1 < len(points) else max(self.top, low)
            points[i] = self.rng.integers(low, high, endpoint=True)
        start_tokens, attention = candidate.start_tokens, candidate.attention_factor
        if self.rng.random() < p:
            start_tokens = int(self.rng.choice(self.space.start_token_choices))
        if self.settings.search_attention and self.rng.random() < p:
            attention = float(self.rng.uniform(*self.space.attention_bounds))
        free = np.log(points * grid).tolist()
        return Candidate((*candidate.log_factors[:n], *free), start_tokens, attention)

    def crossed(self, first: Candidate, second: Candidate) -> Candidate:
        """The first parent with some values of the second, where λ stay non-decreasing."""
        p = self.settings.probability
        factors = list(first.log_factors)
        for i in np.flatnonzero(self.rng.random(len(factors)) < p):
            low = factors[i - 1] if i else -math.inf
            high = factors[i + 1] if i + 1 < len(factors) else math.inf
            if low <= second.log_factors[i] <= high:
                factors[i] = second.log_factors[i]
        start_tokens = second.start_tokens if self.rng.random() < p else first.start_tokens
        attention = second.attention_factor if self.rng.random() < p else first.attention_factor
        return Candidate(tuple(factors), start_tokens, attention)

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
