"""The base of engines with several workers: tasks are assigned one at a time, and again if their worker is lost.

A worker creates its evaluator once, from a factory that is sent to it. Subclasses start workers, exchange messages with
them, and end them.
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

MAX_LOST = 3
"""A run fails when this many workers were lost over one task, or in a row before they were ready."""


@dataclass(frozen=True)
class Facts:
    """What a worker reports when it is ready."""

    key: str
    weights: tuple[float, ...]

    @classmethod
    def of(cls, evaluator: Evaluator) -> Facts:
        return cls(evaluator.key, tuple(float(weight) for weight in evaluator.weights))


@dataclass(frozen=True)
class Failure:
    """An exception in a worker, with its traceback as text."""

    error: Exception
    where: str


@dataclass(frozen=True)
class Lost:
    """A worker has ended unexpectedly; `how` says in what way, in a few words."""

    how: str


Message = Facts | Result | Failure | Lost


class InWorker(Exception):
    """The traceback in the worker, as the cause of the exception that is raised here."""


def open_recipe(recipe: bytes) -> Any:
    """Create the evaluator of a pickled factory."""
    return pickle.loads(recipe)()


def attempt(work: Callable[..., Any], *args: Any) -> Any:
    """Return the result of `work`, or its failure, in a form that can be pickled."""
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
    """A task to be done or in progress, and how many workers were lost over it."""

    task: Task
    lost: int = 0


@dataclass(eq=False, kw_only=True)
class Worker:
    """A worker of a pool: still creating its evaluator, ready for an assignment, or working on one."""

    ready: bool = False
    assignment: Assignment | None = field(default=None)


W = TypeVar("W", bound=Worker)


class WorkerPool(ABC, Generic[W]):
    """Workers that are started when there are tasks for them, and replaced when they are lost. Close it, or use `with`.

    Args:
        make_evaluator: creates an evaluator in a worker; must be picklable. If it has the evaluator's key or weights
            as attributes, those are used, without starting a worker.
        n_workers: how many workers at most.

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
        # The attributes of a class are its evaluators', not those of a factory.
        self._make = None if isinstance(make_evaluator, type) else make_evaluator

    def __enter__(self) -> WorkerPool[W]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def key(self) -> str:
        """The evaluator's key."""
        key = getattr(self._make, "key", None)
        return key if isinstance(key, str) else self._wait_for_facts().key

    @property
    def weights(self) -> Sequence[float]:
        """The evaluator's weights."""
        weights = getattr(self._make, "weights", None)
        return tuple(weights) if isinstance(weights, Sequence) else self._wait_for_facts().weights

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task and its result as soon as it is known, in any order; only one run at a time.

        Raises:
            UserError: three workers were lost over one task, or three in a row before they were ready. An evaluator's
                exceptions are passed on. In either case all workers have been ended.
        """
        waiting = deque(Assignment(task) for task in tasks)
        left = len(waiting)
        try:
            self._end_workers([worker for worker in self.workers if worker.assignment is not None])
            while left:
                self._start_workers(left)
                self._assign(waiting)
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
                self._assign(waiting)  # before the caller spends time on the results
                yield from results
        except BaseException:
            self._end_workers(list(self.workers))
            raise

    def close(self) -> None:
        """End all workers; a later run starts new ones."""
        self._end_workers(list(self.workers))

    def _wait_for_facts(self) -> Facts:
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

    def _assign(self, waiting: deque[Assignment]) -> None:
        for worker in self.workers:
            if waiting and worker.ready and worker.assignment is None:
                worker.assignment = waiting.popleft()
                self._send(worker, worker.assignment.task)

    def _messages(self) -> list[tuple[W, Message]]:
        """Wait for messages, and update the workers accordingly."""
        messages = self._wait()
        for worker, message in messages:
            if isinstance(message, Failure):
                raise message.error from InWorker(message.where)
            if isinstance(message, Facts):
                worker.ready, self._facts, self._failed_starts = True, message, 0
            elif isinstance(message, Lost):
                self._end_workers([worker])
                self._failed_starts += not worker.ready
                if self._failed_starts >= MAX_LOST:
                    raise UserError(
                        f"workers: {MAX_LOST} in a row ended before they had created their evaluator"
                        f" (the last: {message.how}); fewer workers need less memory"
                    )
        return messages

    @abstractmethod
    def _start(self) -> None:
        """Start one worker and append it to `workers`; its first message will be its facts or a failure."""

    @abstractmethod
    def _send(self, worker: W, task: Task) -> None:
        """Send a task to a worker that is ready; its next message will be the result or a failure."""

    @abstractmethod
    def _wait(self) -> list[tuple[W, Message]]:
        """Wait for messages: at least one, at most one per worker."""

    @abstractmethod
    def _end(self, worker: W) -> None:
        """End a worker at once, even in the middle of a task."""


def _again(assignment: Assignment, how: str) -> Assignment:
    assignment.lost += 1
    task = assignment.task
    if assignment.lost >= MAX_LOST:
        raise UserError(
            f"passage {task.passage} ({task.fidelity}, context {task.band.context}): {MAX_LOST} workers ended while"
            f" reading it (the last: {how}); a shorter context or fewer workers need less memory"
        )
    return assignment
