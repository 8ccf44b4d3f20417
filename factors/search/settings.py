"""The settings of a search: every choice, as frozen data, with defaults that were found to work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import UserError

READING_SHARE = 0.12
"""Share of a time budget that one full reading may use; beyond it, passages are left out if that is allowed."""

FINALS_SHARE = 0.25
"""Share of the budget left when the search proper starts that the finals may use; one finalist is always read."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend; with both limits, the first that is reached counts.

    Attributes:
        evaluations: one is one band on all passages at full fidelity; a screening or gradient counts by its declared
            cost (`Settings.screen_cost`, `Settings.gradient_cost`), so what fits does not depend on the clock.
        seconds: wall-clock time, over all runs that wrote the journal.
    """

    evaluations: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.evaluations is None and self.seconds is None:
            raise UserError("budget: none, expected a number of evaluations or seconds")
        for name, value in (("evaluations", self.evaluations), ("seconds", self.seconds)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"budget: {value:g} {name}, expected a positive number")


@dataclass(frozen=True)
class Evolution:
    """LongRoPE's settings (arXiv 2402.13753, section 3.3 and appendix A)."""

    population: int = 64
    parents: int = 32
    mutations: int = 16
    crossovers: int = 16
    generations: int = 40
    probability: float = 0.3
    grid: float = 0.01
    tries: int = 100
    search_attention: bool = False


@dataclass(frozen=True)
class CmaSettings:
    """Settings of `cma`: first a curve through a few knots, then single pairs.

    Attributes:
        knots: points of the curve of ln λ, spread evenly over the free pairs.
        step: standard deviation of the first candidates from the start, in ln λ.
        attention_step: the same, in ln attention factor.
        population: candidates per generation; by default it depends on the budget and the number of knots.
        share: share of the budget for the curve; the rest is for the pairs.
        pair_step: the first step of a single pair, in ln λ.
        pairs_at_once: pairs that are tried at the same time, each alone; as many workers are kept busy.
        smallest_step: the search ends when its steps are smaller than this.
    """

    knots: int = 5
    step: float = 0.06
    attention_step: float = 0.02
    population: int | None = None
    share: float = 0.7
    pair_step: float = 0.04
    pairs_at_once: int = 4
    smallest_step: float = 0.002


@dataclass(frozen=True)
class GradientSettings:
    """Settings of `gradient`: Adam on ln λ and ln attention factor.

    Attributes:
        steps: the largest number of gradients.
        rate: Adam's learning rate, in ln λ.
        largest_step: the largest change of any ln λ in one step.
        patience: steps without a new best after which the rate is halved and the search resumes from the best.
    """

    steps: int = 30
    rate: float = 0.02
    largest_step: float = 0.04
    patience: int = 3


@dataclass(frozen=True)
class Racing:
    """When a candidate is dropped before it has been read on all passages.

    Attributes:
        on: whether candidates are dropped at all.
        z: standard errors by which it must be behind the last place that counts.
        clear: after one passage, which has no standard error: how many times further it must be behind that
            place than that place is behind the first.
    """

    on: bool = True
    z: float = 2.0
    clear: float = 3.0


@dataclass(frozen=True)
class Screening:
    """Whether the search may use the cheaper fidelity.

    Attributes:
        allowed: whether it may be used if it proves good enough.
        threshold: the rank correlation (Spearman) with full fidelity from which it is trusted.
        candidates: bands near YaRN on which the correlation is measured, besides YaRN and NTK-aware.
        share: share of the budget that the measurement may use. If that is too little to measure, all candidates are
            read in full; if the budget is too small for that as well, screening is used untested. The best are read in
            full in any case.
    """

    allowed: bool = False
    threshold: float = 0.8
    candidates: int = 6
    share: float = 0.2


@dataclass(frozen=True)
class Settings:
    """All settings of a search.

    Attributes:
        algorithm: a name in `ALGORITHMS`.
        seed: the same seed finds the same band.
        finalists: how many of the best are read again at full fidelity; fewer if they would use more than
            `FINALS_SHARE` of a budget.
        held_passages: how many the caller will read twice at full fidelity afterwards, within the same time.
        fewer_passages: whether to search (and have the caller judge) on fewer passages if time is short.
        screen_cost: what one screening of all passages costs, in evaluations.
        gradient_cost: what one gradient on all passages costs, in evaluations.
        objective: the definition of the loss, for the provenance.
        data_digest: the identity of the passages, for the provenance; by default the evaluator's key.
    """

    algorithm: str = "cma"
    seed: int = 0
    budget: Budget = field(default_factory=lambda: Budget(evaluations=100))
    racing: Racing = Racing()
    screening: Screening = Screening()
    evolution: Evolution = Evolution()
    covariance: CmaSettings = CmaSettings()
    descent: GradientSettings = GradientSettings()
    finalists: int = 3
    held_passages: int = 0
    fewer_passages: bool = False
    screen_cost: float = 0.25
    gradient_cost: float = 4.0
    objective: str | None = None
    data_digest: str | None = None

    def __post_init__(self) -> None:
        counts = {
            "finalists": self.finalists,
            "population": self.evolution.population,
            "parents": self.evolution.parents,
            "knots": self.covariance.knots,
            "steps": self.descent.steps,
        }
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name}: {value}, expected at least 1")
        evolution = self.evolution
        for name in ("mutations", "crossovers", "generations"):
            if (value := getattr(evolution, name)) < 0:
                raise UserError(f"{name}: {value}, expected at least 0")
        if not 0 < evolution.probability <= 1:
            raise UserError(f"probability: {evolution.probability:g}, expected more than 0 and at most 1")
        if self.covariance.population is not None and self.covariance.population < 3:
            raise UserError(f"population: {self.covariance.population}, expected at least 3")
        for name, cost in (("screen_cost", self.screen_cost), ("gradient_cost", self.gradient_cost)):
            if not (math.isfinite(cost) and cost > 0):
                raise UserError(f"{name}: {cost:g}, expected a positive number")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed}, expected a number from 0 to 2^63 - 1")

    def identity(self) -> dict[str, Any]:
        """Everything that the course of a search depends on, except the budget, so that a search can be prolonged."""
        data = asdict(self)
        for name in ("budget", "objective", "data_digest"):
            del data[name]
        return data
