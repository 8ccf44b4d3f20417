"""An engine on Ray: its workers are actors, on this machine or across a cluster. Ray is optional: only imported here.

Every machine of the cluster needs Ropewalk, and the model at the same path.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from .pool import Facts, Failure, Lost, Message, Worker, WorkerPool, attempt, open_recipe
from .protocol import Evaluator, Task

TIMEOUT_S = 5.0
"""Seconds to wait for a connection to a cluster, and again for its answer; Ray itself would try for minutes."""

HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a gRPC client sends first (RFC 9113, section 3.4): a fixed preface and an empty SETTINGS frame."""


@dataclass(eq=False)
class _Actor(Worker):
    handle: Any
    answer: Any  # reference to the result it is working on; None while it is idle


class Ray(WorkerPool[_Actor]):
    """Actors on Ray; see `WorkerPool` for the other arguments, errors and usage.

    Args:
        address: of a cluster, as ``ray.init`` takes it; by default ``RAY_ADDRESS`` if that is set, otherwise a cluster
            is started on this machine and ended with the engine. An existing connection is used and kept.

    Raises:
        UserError: Ray is not installed, or nothing answers at the address.
    """

    def __init__(self, make_evaluator: Callable[[], Evaluator], n_workers: int, address: str | None = None) -> None:
        super().__init__(make_evaluator, n_workers)
        try:
            import ray
        except ImportError:
            raise UserError("ray: not installed; pip install 'ropewalk[ray]'") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, address or os.environ.get("RAY_ADDRESS") or "local")
        self._recipe = ray.cloudpickle.dumps(make_evaluator)
        self._actor = ray.remote(max_restarts=0, scheduling_strategy="SPREAD")(_Receiver)

    def close(self) -> None:
        """End all actors, and Ray if this engine started it; the engine cannot be used after that."""
        super().close()
        if self._ours:
            self._ours = False
            self._ray.shutdown()

    def _start(self) -> None:
        handle = self._actor.remote()
        self.workers.append(_Actor(handle, handle.open.remote(self._recipe)))

    def _send(self, worker: _Actor, task: Task) -> None:
        worker.answer = worker.handle.evaluate.remote(task)

    def _wait(self) -> list[tuple[_Actor, Message]]:
        pending = {worker.answer: worker for worker in self.workers if worker.answer is not None}
        done, _ = self._ray.wait(list(pending), num_returns=1)
        return [(pending[answer], self._receive(pending[answer])) for answer in done]

    def _receive(self, worker: _Actor) -> Message:
        answer, worker.answer = worker.answer, None
        try:
            message: Message = self._ray.get(answer)
            return message
        except self._ray.exceptions.RayError as error:
            return Lost(_first_line(error))

    def _end(self, worker: _Actor) -> None:
        if self._ray.is_initialized():
            self._ray.kill(worker.handle)


class _Receiver:
    """The actor. It never raises, so that exceptions arrive unmodified."""

    def open(self, recipe: bytes) -> Any:
        self._evaluator = attempt(open_recipe, recipe)
        return self._evaluator if isinstance(self._evaluator, Failure) else attempt(Facts.of, self._evaluator)

    def evaluate(self, task: Task) -> Any:
        return attempt(self._evaluator.evaluate, task)


def _connect(ray: Any, address: str) -> None:
    _check_answers(address)
    here = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **here)
    except Exception as error:
        raise UserError(f"ray address {address}: {_first_line(error)}") from None


def _check_answers(address: str) -> None:
    """Refuse an address with a port at which no gRPC server answers."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"ray address {address}: expected host:port, ray://host:port or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(HTTP2_GREETING)
            secured = os.environ.get("RAY_USE_TLS", "0") not in ("0", "")  # TLS answers differently
            greeted = secured or connection.recv(9)[3:4] == b"\4"  # the type of a SETTINGS frame
    except OSError as error:
        raise UserError(f"ray address {address}: does not answer ({error.strerror or error})") from None
    if not greeted:
        raise UserError(f"ray address {address}: the server that answers there is not Ray")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
