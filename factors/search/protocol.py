"""What a search asks, and what answers it: bands go out, losses come back. No model here.

An evaluator holds a model and passages. A search never sees either: it sees passage numbers, and the loss in nats a
token of a band on each. Who answers (this process, several, a cluster) is an `Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..schedule import Band

Fidelity = Literal["screen", "full"]
"""full: every passage is read anew in the band. screen: a cheaper stand-in that ranks bands much alike."""


@dataclass(frozen=True)
class Task:
    """One band on one passage."""

    band: Band
    passage: int
    fidelity: Fidelity = "full"
    gradient: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a task: mean loss (nats a token), and where it was asked for, its derivatives."""

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
        """A digest of all that losses depend on beside the band: model, texts, objective, fidelity settings."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """How much each passage counts; one number a passage."""
        ...

    def evaluate(self, task: Task) -> Result:
        """Carry out one task.

        Raises:
            UserError: the task asks for what this evaluator cannot do (gradients, say).
        """
        ...


class Engine(Protocol):
    """Carries tasks out, here or elsewhere, in any order."""

    @property
    def key(self) -> str: ...

    @property
    def weights(self) -> Sequence[float]: ...

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Each task's result as soon as it is there; a task whose worker was lost is carried out again."""
        ...
