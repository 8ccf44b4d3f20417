"""Graph nodes that are computed by us: on ggml's own threads, in the place and order that llama.cpp gave them.

A node that is taken over becomes a CUSTOM one. Each of ggml's threads then calls back; the first makes the node's job
and all of them work on it. An exception on one of them is kept, the others are let go, and the graph is given up:
nothing wrong is ever read from a node, and no thread waits for one that is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from . import ggml

PATIENCE_S = 600.0
"""Seconds that a thread waits for the others before it gives up."""


class NodeError(RuntimeError):
    """A node could not be computed; names the node. Nothing of its graph is used."""


class Job(Protocol):
    """One node in the making: every thread calls `work`, which ends early if another calls `give_up`."""

    def work(self, thread: int) -> None: ...

    def give_up(self) -> None: ...


class TakenNodes:
    """The nodes of one context that `make_job` computes; keep it alive as long as the context.

    `make_job` gets a node's address and the number of threads that will work on it.
    """

    def __init__(self, kind: str, make_job: Callable[[int, int], Job]) -> None:
        self.taken = 0
        """Nodes computed so far."""
        self.failure: NodeError | None = None
        self._kind, self._make_job = kind, make_job
        self._function = ggml.CustomFunction(self._compute)
        self._jobs: dict[int, tuple[Job, list[int]]] = {}
        self._lock = threading.Lock()

    def take(self, node: int) -> None:
        """From now on in its graph's life, the node at this address is ours."""
        ggml.take_over(node, self._function)

    def raise_kept(self) -> None:
        """Raise what went wrong on ggml's threads since the last time, if anything did.

        Raises:
            NodeError: names the node.
        """
        failure, self.failure = self.failure, None
        self._jobs.clear()  # those of a failed graph, which not every thread came to
        if failure is not None:
            raise failure

    def _compute(self, node: int, thread: int, n_threads: int, _: int | None) -> None:
        job = None
        try:
            job = self._join(node, n_threads)
            if job is not None:
                job.work(thread)
        except threading.BrokenBarrierError as error:  # another thread failed and says why, unless it never came
            self._fail(node, error)
        except BaseException as error:
            self._fail(node, error)
            if job is not None:
                job.give_up()
        finally:
            if job is not None:
                self._leave(node)

    def _join(self, node: int, n_threads: int) -> Job | None:
        with self._lock:
            if self.failure is not None:
                return None
            if node not in self._jobs:
                self._jobs[node] = (self._make_job(node, n_threads), [n_threads])
            return self._jobs[node][0]

    def _leave(self, node: int) -> None:
        with self._lock:
            left = self._jobs[node][1]
            left[0] -= 1
            if left[0] == 0:
                del self._jobs[node]
                self.taken += self.failure is None

    def _fail(self, node: int, error: BaseException) -> None:
        name = ggml.tensor_at(node).name.decode(errors="replace")
        with self._lock:
            if self.failure is None:
                self.failure = NodeError(f"{self._kind} node {name}: {type(error).__name__}: {error}")
                self.failure.__cause__ = error


@contextmanager
def workers_are_ggmls() -> Iterator[None]:
    """While the block runs, torch computes on the thread that calls it, as ggml's threads are the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
