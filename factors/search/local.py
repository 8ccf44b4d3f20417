"""Engines on this machine: in this process, or several processes that each hold an evaluator.

Workers may be lost at any time (out of memory, say): what they had at hand is done again by others. They end with the
engine, with an error, with Ctrl-C, and with this process however it ends.
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
    """Carries tasks out one after another, in this process."""

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
        """Each task and its result, in order; what the evaluator raises is raised."""
        for task in tasks:
            yield task, self._evaluator.evaluate(task)

    def close(self) -> None:
        """Close the evaluator, if it can be."""
        close = getattr(self._evaluator, "close", None)
        if close is not None:
            close()


@dataclass(eq=False)
class _Process(Worker):
    process: BaseProcess
    line: Connection


class Processes(WorkerPool[_Process]):
    """Several processes on this machine; see `WorkerPool` for arguments, errors and how they are used.

    The processes are spawned: a script that makes one does so under ``if __name__ == "__main__":``.
    """

    def __init__(self, make_evaluator: Callable[[], Evaluator], n_workers: int) -> None:
        super().__init__(make_evaluator, n_workers)
        self._recipe = pickle.dumps(make_evaluator)  # sent as bytes, so that failing to read them can be reported

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._recipe), name="ropewalk-worker", daemon=True)
        with _interrupts_held_back():
            process.start()
            self.workers.append(_Process(process, ours))
        theirs.close()  # else its end would not be noticed

    def _send(self, worker: _Process, task: Task) -> None:
        with contextlib.suppress(OSError):  # it has just ended, which `_wait` finds
            worker.line.send(task)

    def _wait(self) -> list[tuple[_Process, Message]]:
        by_sign: dict[object, _Process] = {}
        for worker in self.workers:
            by_sign[worker.line] = by_sign[worker.process.sentinel] = worker
        signs = connection.wait([sign for worker in self.workers for sign in (worker.line, worker.process.sentinel)])
        return [(worker, _receive(worker)) for worker in dict.fromkeys(by_sign[sign] for sign in signs)]

    def _end(self, worker: _Process) -> None:
        worker.process.kill()  # it may be deep in a library, and has nothing to put away
        worker.process.join()
        worker.process.close()
        worker.line.close()


def _receive(worker: _Process) -> Message:
    """What a worker has sent last, or how it ended."""
    try:
        if worker.line.poll():
            message: Facts | Result | Failure = worker.line.recv()
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
        return Lost(f"killed by {signal.Signals(-code).name}" + ", as when memory runs out" * (code == -9))
    return Lost(f"killed by signal {-code}")


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until a new process is on the books; the process itself starts deaf to it, and stays so."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which the first process would start, and which lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(line: Connection, recipe: bytes) -> None:
    """A worker's life: make the evaluator, then a task at a time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C means is the parent's to decide
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with_parent(parent.join)
    evaluator = attempt(open_recipe, recipe)
    with contextlib.suppress(EOFError, OSError):  # the parent has hung up
        line.send(evaluator if isinstance(evaluator, Failure) else attempt(Facts.of, evaluator))
        while True:
            line.send(attempt(evaluator.evaluate, line.recv()))
