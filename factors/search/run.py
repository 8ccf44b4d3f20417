"""A whole search: baselines, a test of screening, the algorithm, and the best candidates read again in full.

All requests of an algorithm go through here: what is in the journal is not evaluated again, candidates race over the
passages, the budget is kept. Decisions depend only on losses, declared costs and the journal's own times, so a search
that is killed and resumed takes the course it would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..methods import Array
from ..schedule import Band, Provenance
from .algorithm import Algorithm, Request, Response, Score, Start
from .cma import CMA
from .evolution import EVOLUTION
from .gradient import GRADIENT
from .journal import Journal, TaskKey, digest_of, key_of_task
from .protocol import Engine, Fidelity, Result, Task
from .race import Indices, race
from .settings import FINALS_SHARE, READING_SHARE, Settings
from .space import Candidate, Space

ALGORITHMS: dict[str, Algorithm] = {"cma": CMA, "evolution": EVOLUTION, "gradient": GRADIENT}

BASELINES = ("yarn", "ntk", "pi")

DISTANCE = 0.08
"""The distance from YaRN or `near`, in ln λ, of the bands on which screening is compared with full fidelity."""


@dataclass(frozen=True)
class Progress:
    """The progress of a search. Losses are at the search's fidelity, in nats per token.

    Attributes:
        step: what has just been done, in a few words.
        evaluations, of: those spent, and the budget (None if that is a time).
        seconds, of_seconds: likewise.
        best: the lowest loss so far, by a candidate read on all passages.
        baselines: losses by method, as far as known; `near` among them if near windows are searched.
        dropped: how many candidates racing has dropped.
    """

    step: str
    evaluations: float
    of: float | None
    seconds: float
    of_seconds: float | None
    best: float
    baselines: dict[str, float]
    dropped: int


@dataclass(frozen=True)
class Note:
    """A human-readable message."""

    text: str


Event = Progress | Note


@dataclass(frozen=True)
class Outcome:
    """The result of a search.

    Attributes:
        band: the best at full fidelity on the search's passages; YaRN's if nothing is better. With a near window, its
            `plain` is the best of the bands without one that were read at full fidelity: YaRN's, the `plain` given to
            `search`, and finalists.
        loss, yarn: losses of that band and of YaRN's at full fidelity.
        plain: the loss of the band without its near window.
        baselines: losses by method at the search's fidelity.
        correlation: of screening with full fidelity (Spearman); None if it was not measured.
        passages: how many the search used.
        history: (evaluations, lowest loss), each time the lowest loss fell.
    """

    band: Band
    loss: float
    yarn: float
    plain: float
    baselines: dict[str, float]
    fidelity: Fidelity
    correlation: float | None
    passages: int
    evaluations: float
    seconds: float
    dropped: int
    history: tuple[tuple[float, float], ...]

    @property
    def beats_yarn(self) -> bool:
        return self.loss < self.yarn


def search(
    engine: Engine,
    space: Space,
    settings: Settings,
    journal: Path | None = None,
    seeds: Sequence[Candidate] = (),
    on_event: Callable[[Event], None] = lambda event: None,
    correlation: float | None = None,
    plain: Band | None = None,
) -> Outcome:
    """Search `space` for the band with the lowest loss, starting from YaRN's, `near` and `seeds`.

    Args:
        journal: the file in which every evaluation is kept; if it exists, its search is resumed.
        correlation: of screening with full fidelity, as measured for another band of this model; it is then not
            measured again.
        plain: a band without near window for this context, known before. It is a seed, too, and read in full: if the
            result has a near window, this is its plain form unless a better one was found.

    Raises:
        UserError: an unknown algorithm, a budget too small to start with, another search's journal. The engine's
            exceptions are passed on.
    """
    algorithm = ALGORITHMS.get(settings.algorithm)
    if algorithm is None:
        raise UserError(f"algorithm: {settings.algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
    # Without the seeds: evaluations are valid wherever the search started, and a longer band's seeds vary by budget.
    identity = {"engine": engine.key, "space": repr(space), **settings.identity()}
    with Journal(journal, digest_of(identity)) as kept:
        run = _Run(engine, space, settings, kept, on_event, correlation, plain)
        return run.search(algorithm, [space.project(seed) for seed in seeds])


def carried(previous: Space, band: Band, space: Space) -> Candidate:
    """A band found in one space as a seed in that of another context: ln λ grow in proportion to ln of the stretch."""
    candidate = previous.candidate(band)
    before, after = (math.log(one.stretch(candidate.near_tokens)) for one in (previous, space))
    ratio = after / before if before > 0 else 1.0
    factors = tuple(ratio * value for value in candidate.log_factors)
    attention = math.exp(ratio * math.log(candidate.attention_factor))
    return space.project(replace(candidate, log_factors=factors, attention_factor=attention))


class _Run:
    """One search in progress."""

    def __init__(
        self,
        engine: Engine,
        space: Space,
        settings: Settings,
        journal: Journal,
        tell: Callable[[Event], None],
        correlation: float | None,
        plain: Band | None,
    ) -> None:
        self.engine, self.space, self.settings, self.journal, self.tell = engine, space, settings, journal, tell
        self.weights = np.array(engine.weights, dtype=float)
        self.weights /= self.weights.sum()
        self.fidelity: Fidelity = "full"
        self.counted: set[TaskKey] = set()
        self.spent = self.seconds = 0.0
        self.finalists = 0
        self.whole_losses: dict[Candidate, float] = {}
        self.losses: dict[Candidate, Array] = {}
        self.baselines: dict[str, float] = {}
        self.history: list[tuple[float, float]] = []
        self.correlation = correlation
        self.plain = plain
        self.near = [space.closed_form("near", window) for window in space.windows]
        self.still = self._still_seeds()
        self.dropped = 0
        self.step = "yarn in full"

    def _still_seeds(self) -> list[Candidate]:
        """`near` with the usual window, beyond which the pairs that turn within it stand still; none without one."""
        window = self.space.usual_window
        still = self.space.usual_still_pairs(window) if window else 0
        return [self.space.with_still_pairs(self.space.seed("near", window), still)] if still else []

    # --- the stages

    def search(self, algorithm: Algorithm, seeds: list[Candidate]) -> Outcome:
        self._check_budget(algorithm)
        yarn = self.space.seed("yarn")
        self._fit_passages(yarn)
        full = {yarn: self._full(yarn)}
        if self.near:
            self.step = "near in full"  # so that screening has what it keeps of a full reading
            full[self.space.reference] = self._full(self.space.reference)
        if self.plain is not None:
            self.step = "plain band in full"
            seeds.append(self.space.candidate(self.plain))
            full[seeds[-1]] = self._full(seeds[-1])
        self._choose_fidelity(yarn, algorithm)
        if self.fidelity == "screen":
            self.finalists = max(1, min(self.settings.finalists, int(FINALS_SHARE * min(self._left(), 1e9))))
        self._baselines(yarn)
        self._check_time(algorithm)
        starts = dict.fromkeys([yarn, *self.near, *self.still, *seeds])
        scores = [self._score(candidate, self._losses_of(candidate)) for candidate in starts]
        self._report("start")
        self._drive(algorithm, tuple(scores))
        return self._outcome(yarn, full)

    def _full(self, candidate: Candidate) -> float:
        return self._mean(self._measure([candidate], self._all(), "full")[0])

    def _check_budget(self, algorithm: Algorithm) -> None:
        """Refuse a budget that is too small for the baselines and a first generation."""
        limit, settings = self.settings.budget.evaluations, self.settings
        cost = settings.screen_cost if settings.screening.allowed else 1.0
        in_full = 1 + bool(self.near) + (self.plain is not None)
        starts = len(BASELINES) + len(self.near) + len(self.still)
        needed = in_full + (starts + algorithm.first(settings, self.space)) * cost
        if limit is not None and limit < needed:
            raise UserError(
                f"budget: {limit:g} evaluations, expected at least {math.ceil(needed)} for the baselines and the first"
                f" generation of {settings.algorithm}"
            )

    def _check_time(self, algorithm: Algorithm) -> None:
        """Refuse a time budget that is too small, once it is known how long an evaluation takes on this machine."""
        seconds, cost = self.settings.budget.seconds, self._cost(self.fidelity)
        first = algorithm.first(self.settings, self.space) * cost
        if seconds is not None and self._left() < first:
            needed = self.seconds * (self.spent + self._reserve() + first) / self.spent
            raise UserError(
                f"budget: {seconds / 60:.3g} minutes for {self.space.context:,} tokens, expected at least"
                f" {math.ceil(needed / 60)} on this machine, or fewer or shorter passages; evaluations so far are kept"
            )

    def _fit_passages(self, yarn: Candidate) -> None:
        """Leave out passages if time is short, judging by how long the first one takes."""
        seconds, n = self.settings.budget.seconds, len(self.weights)
        if seconds is None or n == 1 or not self.settings.fewer_passages:
            return
        self._measure([yarn], np.array([0]), "full")
        fitting = int(READING_SHARE * seconds / max(self.seconds, 1e-9))
        if fitting < n:
            self.weights = self.weights[: max(fitting, 1)] / self.weights[: max(fitting, 1)].sum()
            self.spent, self.counted = 0.0, set()  # an evaluation now reads fewer passages
            self.tell(
                Note(f"reading a passage takes {self.seconds:.0f} s: {len(self.weights)} of {n} passages are used")
            )

    def _choose_fidelity(self, yarn: Candidate, algorithm: Algorithm) -> None:
        """Compare screening with full fidelity on the first passage; use screening if they rank bands alike."""
        screening = self.settings.screening
        if not screening.allowed:
            return
        if self.correlation is not None:
            self.fidelity = "screen" if self.correlation >= screening.threshold else "full"
            return
        n = min(screening.candidates, int(screening.share * self._left() * len(self.weights)))
        if n < 3:
            in_full = self._left() - len(BASELINES) >= algorithm.first(self.settings, self.space)
            self.fidelity = "full" if in_full else "screen"
            then = "all are read in full" if in_full else "screening is used untested; the best are read in full"
            self.tell(Note(f"too small a budget to compare screening with full readings: {then}"))
            return
        rng = np.random.default_rng([self.settings.seed, 2])
        centres = [yarn, *([self.space.reference, self.near[0]] if self.near else [])]
        around = [*centres, *self.still]
        moved = [
            self.space.moved(around[i % len(around)], _smooth(rng, self.space), rng.normal() * DISTANCE / 4)
            for i in range(n)
        ]
        self.step = "screening test"
        compared, first = list(dict.fromkeys([*centres, self.space.seed("ntk"), *moved])), np.array([0])
        full = self._measure(compared, first, "full")[:, 0]
        screened = self._measure(compared, first, "screen")[:, 0]
        self.correlation = spearman(full, screened)
        trusted = self.correlation >= screening.threshold
        self.fidelity = "screen" if trusted else "full"
        self.tell(
            Note(
                f"screening ranks {len(compared)} bands like full readings with a correlation of"
                f" {self.correlation:.2f}: {'it is used' if trusted else 'too low, all are read in full'}"
            )
        )

    def _baselines(self, yarn: Candidate) -> None:
        for method in BASELINES:
            self.step = method
            candidate = yarn if method == "yarn" else self.space.closed_form(method)
            self.baselines[method] = self._mean(self._measure([candidate], self._all(), self.fidelity)[0])
        if self.near:
            self.baselines["near"] = self._mean(self._measure([self.space.reference], self._all(), self.fidelity)[0])

    def _drive(self, algorithm: Algorithm, seeds: tuple[Score, ...]) -> None:
        generator = algorithm.search(Start(self.space, self.settings, seeds, self._reach()))
        answer: Response | None = None
        while True:
            try:
                request = next(generator) if answer is None else generator.send(answer)
            except StopIteration:
                return
            self.step = request.step
            scores = self._gradients(request) if request.gradient else self._race(request)
            answer = Response(tuple(scores), self._reach())
            self._report(request.step)
            if self._left() < self._cost(self.fidelity, request.gradient):
                return

    def _outcome(self, yarn: Candidate, full: dict[Candidate, float]) -> Outcome:
        """Read the best candidates at full fidelity, and choose among them and those of which `full` has the losses."""
        ranked = sorted(self.whole_losses, key=lambda candidate: (self.whole_losses[candidate], candidate.start_tokens))
        finalists = ranked[: self.finalists or self.settings.finalists]
        self.step = "finals"
        for candidate in finalists:
            full[candidate] = self._full(candidate)
            self._report("finals")
        best = min(full, key=lambda candidate: full[candidate])
        best = yarn if full[best] >= full[yarn] else best
        plain = min((one for one in full if not one.near_tokens), key=lambda one: full[one])
        found = [self._found(one, yarn, (full[one], full[yarn])) for one in (best, plain)]
        return Outcome(
            band=self.space.band(best, found[0], self.space.band(plain, found[1]) if best.near_tokens else None),
            loss=full[best],
            yarn=full[yarn],
            plain=full[plain],
            baselines=dict(self.baselines),
            fidelity=self.fidelity,
            correlation=self.correlation,
            passages=len(self.weights),
            evaluations=self.spent,
            seconds=self.seconds,
            dropped=self.dropped,
            history=tuple(self.history),
        )

    def _found(self, candidate: Candidate, yarn: Candidate, losses: tuple[float, float]) -> Provenance:
        """The provenance of the band of `candidate`, with its own and YaRN's loss."""
        settings, method = self.settings, self.settings.algorithm
        if candidate == yarn or candidate in self.near:
            method = "yarn" if candidate == yarn else "near"
        elif self.plain is not None and candidate == self.space.candidate(self.plain):
            method = self.plain.found.method
        return Provenance(
            method=method,
            onto=self.space.onto_method,
            objective=settings.objective,
            data_digest=settings.data_digest or self.engine.key,
            seed=settings.seed,
            losses=losses,
        )

    # --- the algorithm's requests

    def _race(self, request: Request) -> list[Score]:
        """Scores of the candidates; those that the budget does not reach have no passages."""
        reach = len(request.candidates) if math.isinf(self._reach()) else int(self._reach() + 1e-9)
        within = list(request.candidates[:reach])
        known = [self.losses[candidate] for candidate in request.rivals if candidate in self.losses]
        rivals = np.array(known).reshape(len(known), len(self.weights))
        losses = race(
            lambda candidates, passages: self._measure([within[i] for i in candidates], passages, self.fidelity),
            len(within),
            rivals,
            self.weights,
            self._all(),
            request.places,
            self.settings.racing,
        )
        scores = [self._score(candidate, row) for candidate, row in zip(within, losses, strict=True)]
        self.dropped += sum(not score.whole for score in scores)
        return scores + [Score(candidate, math.inf, 0, False) for candidate in request.candidates[reach:]]

    def _gradients(self, request: Request) -> list[Score]:
        if self._left() < self._cost(self.fidelity, True) * len(request.candidates):
            return [Score(candidate, math.inf, 0, False) for candidate in request.candidates]
        scores = []
        for candidate in request.candidates:
            results = self._results([candidate], self._all(), self.fidelity, gradient=True)[0]
            score = self._score(candidate, np.array([result.loss for result in results]))
            by_factors = self.weights @ np.array([result.by_log_factors for result in results])
            by_attention = float(self.weights @ np.array([result.by_log_attention for result in results]))
            scores.append(replace(score, by_log_factors=tuple(by_factors.tolist()), by_log_attention=by_attention))
        return scores

    def _score(self, candidate: Candidate, losses: Array) -> Score:
        seen = ~np.isnan(losses)
        if not seen.any():
            return Score(candidate, math.inf, 0, False)
        loss = float(losses[seen] @ self.weights[seen] / self.weights[seen].sum())
        loss = loss if math.isfinite(loss) else math.inf
        if seen.all():
            if loss < min(self.whole_losses.values(), default=math.inf):
                self.history.append((self.spent, loss))
            self.whole_losses[candidate], self.losses[candidate] = loss, losses
        return Score(candidate, loss, int(seen.sum()), bool(seen.all()))

    # --- evaluations

    def _all(self) -> Indices:
        return np.arange(len(self.weights), dtype=np.intp)

    def _mean(self, losses: Array) -> float:
        return float(losses @ self.weights)

    def _losses_of(self, candidate: Candidate) -> Array:
        return np.asarray(self._measure([candidate], self._all(), self.fidelity)[0])

    def _measure(self, candidates: Sequence[Candidate], passages: Indices, fidelity: Fidelity) -> Array:
        """Losses, shape ``(candidates, passages)``; a loss that is not a number counts as infinite."""
        found = self._results(candidates, passages, fidelity)
        losses = np.array([[result.loss for result in row] for row in found]).reshape(len(candidates), len(passages))
        return np.asarray(np.where(np.isnan(losses), np.inf, losses))

    def _results(
        self, candidates: Sequence[Candidate], passages: Indices, fidelity: Fidelity, gradient: bool = False
    ) -> list[list[Result]]:
        bands = [self.space.band(candidate) for candidate in candidates]
        tasks = [[Task(band, int(passage), fidelity, gradient) for passage in passages] for band in bands]
        keys = [[key_of_task(task) for task in row] for row in tasks]
        new = {
            key: task
            for task_row, key_row in zip(tasks, keys, strict=True)
            for task, key in zip(task_row, key_row, strict=True)
            if key not in self.journal.lines
        }
        if new:
            each = self._cost(fidelity, gradient) / len(self.weights)
            for n_read, (task, result) in enumerate(self.engine.run(list(new.values())), 1):
                self.journal.add(task, result)
                self.seconds = max(self.seconds, self.journal.lines[key_of_task(task)].at)
                self._report(f"{self.step}: {n_read} of {len(new)}", n_read * each)
        for key in (key for row in keys for key in row):
            if key not in self.counted:
                self.counted.add(key)
                self.spent += self._cost(fidelity, gradient) / len(self.weights)
                self.seconds = max(self.seconds, self.journal.lines[key].at)
        return [[self.journal.lines[key].result for key in row] for row in keys]

    def _cost(self, fidelity: Fidelity, gradient: bool = False) -> float:
        """The cost of reading all passages, in evaluations."""
        cost = self.settings.screen_cost if fidelity == "screen" else 1.0
        return cost * (self.settings.gradient_cost if gradient else 1.0)

    def _left(self) -> float:
        """Evaluations that may still be spent, without those reserved for the finals and the caller's judging."""
        budget = self.settings.budget
        left = math.inf if budget.evaluations is None else budget.evaluations - self.spent - self.finalists
        if budget.seconds is not None and self.spent:
            in_time = (budget.seconds - self.seconds) * self.spent / max(self.seconds, 1e-9)
            left = min(left, in_time - self._reserve())
        return max(left, 0.0)

    def _reserve(self) -> float:
        """Evaluations that will follow the search proper, within the same time."""
        held, n = self.settings.held_passages, len(self.weights)
        held = min(held, n) if n < len(self.engine.weights) else held
        return self.finalists + 2 * held / n

    def _reach(self) -> float:
        """How many candidates may still be evaluated, at the search's fidelity."""
        return self._left() / self._cost(self.fidelity)

    def _report(self, step: str, under_way: float = 0.0) -> None:
        """Report the progress; `under_way` has been spent as well, but is not counted yet."""
        budget = self.settings.budget
        best = min(self.whole_losses.values(), default=math.inf)
        self.tell(
            Progress(
                step,
                round(self.spent + under_way, 6),
                budget.evaluations,
                self.seconds,
                budget.seconds,
                best,
                dict(self.baselines),
                self.dropped,
            )
        )


def spearman(a: Array, b: Array) -> float:
    """The rank correlation of two sequences, from -1 to 1; 0 if one of them is constant."""
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(float) for x in (a, b)]
    if any(len(np.unique(x)) < 2 for x in (a, b)):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _smooth(rng: np.random.Generator, space: Space) -> Array:
    """A random smooth change of the searched pairs' ln λ."""
    n = space.n_pairs - space.n_fixed
    return np.asarray(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 4), rng.normal(size=4) * DISTANCE))
