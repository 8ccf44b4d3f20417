"""The protocol between a search and its evaluators: bands go out, losses come back.

An evaluator has a model and passages. A search sees neither, only passage numbers, and a band's loss on each in nats
per token. An `Engine` (this process, several processes, a cluster) carries out the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..schedule import Band

Fidelity = Literal["screen", "full"]
"""full: every passage is read again in the band. screen: a cheaper approximation that ranks bands similarly."""


@dataclass(frozen=True)
class Task:
    """One band on one passage."""

    band: Band
    passage: int
    fidelity: Fidelity = "full"
    gradient: bool = False


@dataclass(frozen=True)
class Result:
    """The result of a task: mean loss (nats per token) and, if requested, its derivatives."""

    loss: float
    seconds: float
    by_log_factors: tuple[float, ...] = ()
    """d loss / d ln λ_i, shape ``(n_rot/2,)``."""
    by_log_attention: float = 0.0
    """d loss / d ln attention factor."""


class Evaluator(Protocol):
    """A model and passages, in one process."""

    @property
    def key(self) -> str:
        """A digest of everything that losses depend on besides the band: model, texts, objective, fidelity settings."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """How much each passage counts; one number per passage."""
        ...

    def evaluate(self, task: Task) -> Result:
        """Carry out one task.

        Raises:
            UserError: the task requests something this evaluator cannot do (gradients, for example).
        """
        ...


class Engine(Protocol):
    """Carries out tasks, here or elsewhere, in any order."""

    @property
    def key(self) -> str: ...

    @property
    def weights(self) -> Sequence[float]: ...

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task and its result as soon as it is known; a task whose worker was lost is carried out again."""
        ...
