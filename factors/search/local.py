"""Engines on this machine: in this process, or in several processes that each have an evaluator.

Workers may be lost at any time (when memory runs out, for example): other workers repeat their tasks. Workers end with
the engine, with an error, with Ctrl-C, and with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from ...processes import end_with_parent
from .pool import Facts, Failure, Lost, Message, Worker, WorkerPool, attempt, open_recipe
from .protocol import Evaluator, Result, Task


class InProcess:
    """Carries out tasks one after another, in this process."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def key(self) -> str:
        return self._evaluator.key

    @property
    def weights(self) -> Sequence[float]:
        return self._evaluator.weights

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task and its result, in order; the evaluator's exceptions are passed on."""
        for task in tasks:
            yield task, self._evaluator.evaluate(task)

    def close(self) -> None:
        """Close the evaluator, if it can be closed."""
        close = getattr(self._evaluator, "close", None)
        if close is not None:
            close()


@dataclass(eq=False)
class _Process(Worker):
    process: BaseProcess
    pipe: Connection


class Processes(WorkerPool[_Process]):
    """Several processes on this machine; see `WorkerPool` for arguments, errors and usage.

    The processes are spawned, so a script must create it under ``if __name__ == "__main__":``.
    """

    def __init__(self, make_evaluator: Callable[[], Evaluator], n_workers: int) -> None:
        super().__init__(make_evaluator, n_workers)
        self._recipe = pickle.dumps(make_evaluator)  # as bytes, so that the worker can report if unpickling fails

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._recipe), name="ropewalk-worker", daemon=True)
        with _interrupts_blocked():
            process.start()
            self.workers.append(_Process(process, ours))
        theirs.close()  # otherwise the end of the process would not be noticed

    def _send(self, worker: _Process, task: Task) -> None:
        with contextlib.suppress(OSError):  # it has just ended, which `_wait` notices
            worker.pipe.send(task)

    def _wait(self) -> list[tuple[_Process, Message]]:
        by_handle: dict[object, _Process] = {}
        for worker in self.workers:
            by_handle[worker.pipe] = by_handle[worker.process.sentinel] = worker
        ready = connection.wait(
            [handle for worker in self.workers for handle in (worker.pipe, worker.process.sentinel)]
        )
        return [(worker, _receive(worker)) for worker in dict.fromkeys(by_handle[handle] for handle in ready)]

    def _end(self, worker: _Process) -> None:
        worker.process.kill()  # it may be deep inside a library, and has nothing to clean up
        worker.process.join()
        worker.process.close()
        worker.pipe.close()


def _receive(worker: _Process) -> Message:
    """The next message of a worker, or how it ended."""
    try:
        if worker.pipe.poll():
            message: Facts | Result | Failure = worker.pipe.recv()
            return message
    except (EOFError, OSError):
        pass
    worker.process.join(5)
    code = worker.process.exitcode
    if code is None:
        return Lost("it no longer answers")
    if code >= 0:
        return Lost(f"exit code {code}")
    with contextlib.suppress(ValueError):
        return Lost(f"killed by {signal.Signals(-code).name}" + ", possibly out of memory" * (code == -9))
    return Lost(f"killed by signal {-code}")


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C until a new process is in `workers`; the process starts with Ctrl-C blocked, then ignores it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # else the first process starts it, which unblocks interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, recipe: bytes) -> None:
    """Run a worker: create the evaluator, then carry out one task at a time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with_parent(parent.join)
    evaluator = attempt(open_recipe, recipe)
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe
        pipe.send(evaluator if isinstance(evaluator, Failure) else attempt(Facts.of, evaluator))
        while True:
            pipe.send(attempt(evaluator.evaluate, pipe.recv()))
