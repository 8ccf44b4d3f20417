"""Graph nodes that are computed here: on ggml's own threads, in the place and order that llama.cpp gave them.

A node that is taken over becomes a CUSTOM one. Each of ggml's threads then calls back; the first creates the node's job
and all of them work on it. An exception on one of them is kept, the others are released, and the graph is aborted: no
wrong result is ever read from a node, and no thread waits for one that is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from . import ggml
from .hook import NodeError

TIMEOUT_S = 600.0
"""Seconds that a thread waits for the others before it gives up."""


class Job(Protocol):
    """The computation of one node: every thread calls `work`, which ends early if another calls `give_up`."""

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
        """Take over the node at this address, for as long as its graph lives."""
        ggml.take_over(node, self._function)

    def raise_kept(self) -> None:
        """Raise the exception kept on ggml's threads since the last call, if any.

        Raises:
            NodeError: names the node.
        """
        failure, self.failure = self.failure, None
        self._jobs.clear()  # those of a failed graph, which not every thread reached
        if failure is not None:
            raise failure

    def _compute(self, node: int, thread: int, n_threads: int, _: int | None) -> None:
        job = None
        try:
            job = self._join(node, n_threads)
            if job is not None:
                job.work(thread)
        except threading.BrokenBarrierError as error:  # another thread failed and reports why, unless it never arrived
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
            remaining = self._jobs[node][1]
            remaining[0] -= 1
            if remaining[0] == 0:
                del self._jobs[node]
                self.taken += self.failure is None

    def _fail(self, node: int, error: BaseException) -> None:
        name = ggml.tensor_at(node).name.decode(errors="replace")
        with self._lock:
            if self.failure is None:
                self.failure = NodeError(f"{self._kind} node {name}: {type(error).__name__}: {error}")
                self.failure.__cause__ = error


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """While the block runs, torch computes only on the thread that calls it, as ggml's threads share the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
