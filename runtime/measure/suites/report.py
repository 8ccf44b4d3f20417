"""What a run of the suite has found: by task, length and method, by depth, and how long a context is effective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .asking import Answered
from .caches import CacheLoss
from .scoring import Estimate, by_haystack, effective_length, likelihood, pooled, wilson
from .tasks import TASKS

DEPTH_BINS = 5


@dataclass(frozen=True)
class Cell:
    """One task at one length by one method."""

    task: str
    length: int
    method: str
    questions: int
    haystacks: int
    accuracy: Estimate
    loss: Estimate


@dataclass(frozen=True)
class Row:
    """All tasks at one length by one method; each task counts the same.

    Attributes:
        loss: mean over tasks of the right answers' loss (nats per token).
        against_yarn: that minus YaRN's, on the same questions; None where YaRN was not asked, or for YaRN itself.
    """

    length: int
    method: str
    accuracy: Estimate
    loss: Estimate
    against_yarn: Estimate | None


@dataclass(frozen=True)
class AtDepth:
    """All answers whose depth is from `low` to `high`, over the tasks that have depths."""

    length: int
    method: str
    low: float
    high: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Effective:
    """The longest lengths at which a method keeps what counts, of accuracy and of the right answers' likelihood."""

    method: str
    by_accuracy: int | None
    by_likelihood: int | None


@dataclass(frozen=True)
class ShortText:
    """What a method's band for the longest length costs on a short text: its loss minus the native band's."""

    method: str
    context: int
    difference: Estimate


@dataclass(frozen=True)
class Report:
    """All answers, and what follows from them.

    Attributes:
        original: the length that the model was trained for.
    """

    answers: tuple[Answered, ...]
    original: int
    short: tuple[ShortText, ...] = ()
    caches: tuple[CacheLoss, ...] = ()

    @cached_property
    def by_cell(self) -> dict[tuple[int, str, str], list[Answered]]:
        """Answers by length, method and task, in the order in which they were given."""
        found: dict[tuple[int, str, str], list[Answered]] = {}
        for answer in self.answers:
            found.setdefault((answer.length, answer.method, answer.task), []).append(answer)
        return found

    @property
    def lengths(self) -> list[int]:
        return sorted({answer.length for answer in self.answers})

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(answer.method for answer in self.answers))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(answer.task for answer in self.answers))

    def cells(self) -> list[Cell]:
        return [
            Cell(
                task,
                length,
                method,
                len(answers),
                len(set(_haystacks(answers))),
                wilson(_mean([answer.score for answer in answers]), len(answers)),
                by_haystack([answer.loss for answer in answers], _haystacks(answers)),
            )
            for (length, method, task), answers in self.by_cell.items()
        ]

    @cached_property
    def rows(self) -> list[Row]:
        return [self._row(length, method) for length in self.lengths for method in self.methods]

    def _row(self, length: int, method: str) -> Row:
        cells = [self.by_cell[length, method, task] for task in self.tasks]
        accuracy = _mean([_mean([answer.score for answer in answers]) for answers in cells])
        against = None
        if method != "yarn" and "yarn" in self.methods:
            theirs = [self.by_cell[length, "yarn", task] for task in self.tasks]
            against = pooled([_differences(*pair) for pair in zip(cells, theirs, strict=True)])
        return Row(
            length,
            method,
            wilson(accuracy, sum(map(len, cells))),
            pooled([([answer.loss for answer in answers], _haystacks(answers)) for answers in cells]),
            against,
        )

    def depths(self, method: str) -> list[AtDepth]:
        """Means by length and depth, in `DEPTH_BINS` parts of the haystack; none where nothing was asked."""
        found = []
        for length in self.lengths:
            for part in range(DEPTH_BINS):
                low, high = part / DEPTH_BINS, (part + 1) / DEPTH_BINS
                there = [answer for answer in self._with_depth(length, method) if low <= (answer.depth or 0) < high]
                if there:
                    accuracy, loss = _mean([a.score for a in there]), _mean([a.loss for a in there])
                    found.append(AtDepth(length, method, low, high, accuracy, loss))
        return found

    def _with_depth(self, length: int, method: str) -> list[Answered]:
        cells = [self.by_cell[length, method, task] for task in self.tasks if TASKS[task].has_depth]
        return [answer for answers in cells for answer in answers if answer.depth is not None]

    @property
    def own_length(self) -> int | None:
        """The length at which the model's own score is taken: the longest that was measured up to its trained one."""
        return max((length for length in self.lengths if length <= self.original), default=None)

    def effective(self) -> list[Effective]:
        """The effective length of each method, against the model without any; none where that was not asked."""
        rows = {(row.length, row.method): row for row in self.rows}
        trained = self.own_length
        own = rows.get((trained, "none")) if trained is not None else None
        if own is None or trained is None:
            return []
        found = []
        for method in self.methods:
            accuracy = {n: rows[n, method].accuracy.mean for n in self.lengths}
            likely = {n: likelihood(rows[n, method].loss.mean) for n in self.lengths}
            found.append(
                Effective(
                    method,
                    effective_length(accuracy, own.accuracy.mean, trained),
                    effective_length(likely, likelihood(own.loss.mean), trained),
                )
            )
        return found


def _haystacks(answers: Sequence[Answered]) -> list[int]:
    return [answer.haystack for answer in answers]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _differences(ours: Sequence[Answered], theirs: Sequence[Answered]) -> tuple[list[float], list[int]]:
    return [a.loss - b.loss for a, b in zip(ours, theirs, strict=True)], _haystacks(ours)
