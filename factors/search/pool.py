"""What engines with several workers have in common: tasks handed out one at a time, lost ones handed out again.

A worker makes its evaluator once, from a factory that can be sent to it. How workers are started, spoken to and ended
is the business of subclasses.
"""

from __future__ import annotations

import pickle
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from ...errors import UserError
from .protocol import Evaluator, Result, Task

MOST_LOST = 3
"""Workers that may be lost over one task, or one after another before they are ready."""


@dataclass(frozen=True)
class Facts:
    """What a worker says when it is ready."""

    key: str
    weights: tuple[float, ...]

    @classmethod
    def of(cls, evaluator: Evaluator) -> Facts:
        return cls(evaluator.key, tuple(float(weight) for weight in evaluator.weights))


@dataclass(frozen=True)
class Failure:
    """An exception in a worker, with its traceback in words."""

    error: Exception
    where: str


@dataclass(frozen=True)
class Lost:
    """A worker has ended by itself; how, in a few words."""

    how: str


Message = Facts | Result | Failure | Lost


class InWorker(Exception):
    """The traceback in the worker: the cause of what is raised here."""


def open_recipe(recipe: bytes) -> Any:
    """The evaluator that a pickled factory makes."""
    return pickle.loads(recipe)()


def attempt(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns, or the failure, fit to be sent."""
    try:
        return work(*args)
    except Exception as error:
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return Failure(RuntimeError(f"{type(error).__name__}: {error}"), where)
        return Failure(error, where)


@dataclass
class Assignment:
    """A task on its way, and how many workers were lost over it."""

    task: Task
    lost: int = 0


@dataclass(eq=False, kw_only=True)
class Worker:
    """One of a crew: ready for an assignment, on one, or still making its evaluator."""

    ready: bool = False
    assignment: Assignment | None = field(default=None)


W = TypeVar("W", bound=Worker)


class WorkerPool(ABC, Generic[W]):
    """Workers that are started when there is work for them, and replaced when they are lost. Close it, or use `with`.

    Args:
        make_evaluator: makes an evaluator in a worker; it can be pickled. Where it has the evaluator's key or weights
            itself, they are taken from it.
        n_workers: how many at most.

    Raises:
        UserError: fewer than one worker.
    """

    def __init__(self, make_evaluator: Callable[[], Evaluator], n_workers: int) -> None:
        if n_workers < 1:
            raise UserError(f"workers: {n_workers}, expected at least 1")
        self.n_workers = n_workers
        self.workers: list[W] = []
        self._failed_starts = 0
        self._facts: Facts | None = None
        self._make = None if isinstance(make_evaluator, type) else make_evaluator  # a class has what its evaluators do

    def __enter__(self) -> WorkerPool[W]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def key(self) -> str:
        """The evaluator's."""
        key = getattr(self._make, "key", None)
        return key if isinstance(key, str) else self._known().key

    @property
    def weights(self) -> Sequence[float]:
        """The evaluator's."""
        weights = getattr(self._make, "weights", None)
        return tuple(weights) if isinstance(weights, Sequence) else self._known().weights

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Each task's result as soon as it is there, in any order; one run at a time.

        Raises:
            UserError: a task over which three workers were lost, or three workers lost before they were ready; and
                what an evaluator raises. All workers have ended then.
        """
        waiting = deque(Assignment(task) for task in tasks)
        left = len(waiting)
        try:
            self._end_workers([worker for worker in self.workers if worker.assignment is not None])
            while left:
                self._start_workers(left)
                self._hand_out(waiting)
                results = []
                for worker, message in self._messages():
                    assignment, worker.assignment = worker.assignment, None
                    if assignment is None:
                        continue
                    if isinstance(message, Lost):
                        waiting.appendleft(_again(assignment, message.how))
                    elif isinstance(message, Result):
                        results.append((assignment.task, message))
                left -= len(results)
                self._hand_out(waiting)  # before the caller takes its time over the results
                yield from results
        except BaseException:
            self._end_workers(list(self.workers))
            raise

    def close(self) -> None:
        """End all workers; a later run starts new ones."""
        self._end_workers(list(self.workers))

    def _known(self) -> Facts:
        try:
            while self._facts is None:
                self._start_workers(1)
                self._messages()
        except BaseException:
            self._end_workers(list(self.workers))
            raise
        return self._facts

    def _start_workers(self, n_tasks: int) -> None:
        while len(self.workers) < min(self.n_workers, n_tasks):
            self._start()

    def _end_workers(self, workers: list[W]) -> None:
        for worker in workers:
            self.workers.remove(worker)
            self._end(worker)

    def _hand_out(self, waiting: deque[Assignment]) -> None:
        for worker in self.workers:
            if waiting and worker.ready and worker.assignment is None:
                worker.assignment = waiting.popleft()
                self._send(worker, worker.assignment.task)

    def _messages(self) -> list[tuple[W, Message]]:
        """What has come in, after the crew has taken note of it."""
        messages = self._wait()
        for worker, message in messages:
            if isinstance(message, Failure):
                raise message.error from InWorker(message.where)
            if isinstance(message, Facts):
                worker.ready, self._facts, self._failed_starts = True, message, 0
            elif isinstance(message, Lost):
                self._end_workers([worker])
                self._failed_starts += not worker.ready
                if self._failed_starts >= MOST_LOST:
                    raise UserError(
                        f"workers: {MOST_LOST} in a row ended before they had made their evaluator"
                        f" (the last: {message.how}); fewer workers take less memory"
                    )
        return messages

    @abstractmethod
    def _start(self) -> None:
        """Start one worker and append it to `workers`; its first message will be facts, or why there are none."""

    @abstractmethod
    def _send(self, worker: W, task: Task) -> None:
        """Give a task to a worker that is ready; its next message will be the answer."""

    @abstractmethod
    def _wait(self) -> list[tuple[W, Message]]:
        """Wait for messages: at least one, at most one a worker."""

    @abstractmethod
    def _end(self, worker: W) -> None:
        """End a worker at once, whatever it does."""


def _again(assignment: Assignment, how: str) -> Assignment:
    assignment.lost += 1
    task = assignment.task
    if assignment.lost >= MOST_LOST:
        raise UserError(
            f"passage {task.passage} ({task.fidelity}, context {task.band.context}): {MOST_LOST} workers ended while"
            f" they read it (the last: {how}); less memory may do with a shorter context or fewer workers"
        )
    return assignment
