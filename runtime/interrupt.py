"""Calls into llama.cpp that a signal can interrupt.

Python runs signal handlers on the main thread, between any two bytecodes. Inside a callback from C, an exception that
the handler raises (Ctrl-C, SIGTERM) would be lost. So every call that calls back runs in a worker thread, and its
caller waits for it. It waits on a bare lock: a handler that raises inside the Python code of a `Condition`, which
futures and events wait on, leaves it half released, and a different exception comes out.

All models and callers share one worker as long as it is free. libgomp, which llama.cpp's threads belong to on Linux,
keeps a pool of threads for every thread that has ever computed, and once there are more of them than cores, its threads
sleep at every meeting instead of waiting for a moment: SmolLM2-135M then writes 100 tokens/s instead of 150.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar, cast

import llama_cpp

from ..errors import UserError
from .graph.kernels import Context

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


class Closed:
    """The class that objects around llama.cpp's pointers get once these are freed: any use of them raises."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise UserError("the model is closed: load it again")


def holds_context(method: Method) -> Method:
    """Keep `Interruptible.close`, called in another thread, from freeing what the model's method uses.

    The model's `Interruptible` is its attribute `_calls`; the method raises as `Interruptible.check` does.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with self._calls.holding():
            self._calls.check()
            return method(self, *args, **options)

    return cast(Method, call)


class _Call:
    """Work for a worker; `done` is locked until it has run, and `results` then holds its result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.done = work, threading.Lock()
        self.results: list[Any] = []
        self.failure: BaseException | None = None
        self.done.acquire()

    def run(self) -> None:
        try:
            self.results.append(self.work())
        except BaseException as failure:
            self.failure = failure
        finally:
            self.done.release()


class _Worker:
    """A thread that runs calls one after the other. It is a daemon: it never computes without somebody who waits."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self._calls,), name="ropewalk-llama", daemon=True)
        self.thread.start()

    def run(self, call: _Call) -> None:
        """Run `call` and wait for it."""
        self._calls.put(call)
        call.done.acquire()

    def end(self) -> None:
        self._calls.put(None)
        if self.thread is not threading.current_thread():  # the last reference to a model may be dropped anywhere
            self.thread.join()


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # or what it holds would live until the next call


_free: list[_Worker] = []  # at most one; its thread does not exist in a forked process
_users: set[int] = set()  # the `Interruptible`s that may still borrow it
os.register_at_fork(after_in_child=_free.clear)


def _borrow_worker() -> _Worker:
    try:
        return _free.pop()
    except IndexError:
        return _Worker()


def _give_back(worker: _Worker) -> None:
    if _free:  # there were two calls at once
        worker.end()
    else:
        _free.append(worker)


def _end_use(user: int) -> None:
    """Note that one user less is left; the worker ends with the last one."""
    _users.discard(user)
    while _free and not _users:
        _free.pop().end()


def _end_own_pool() -> None:
    """End the threads that libgomp keeps for the calling thread, if it has computed through llama_cpp directly."""
    pause = getattr(llama_cpp.llama_cpp._lib, "omp_pause_resource_all", None)
    if pause is not None:
        pause(1)  # omp_pause_soft: they are started again when they are needed


class Interruptible:
    """Runs llama.cpp's calls for one context; keep it alive as long as the context.

    A long call is aborted between two nodes once one has failed: `kernels` know of that themselves, without them
    `failed` is asked.

    Whatever uses the context does so under `holding`, so that `close` frees nothing under it.
    """

    def __init__(self, failed: Callable[[], bool], kernels: Context | None = None) -> None:
        self._lock = threading.RLock()
        self._kernels = kernels
        self._failed, self._stop, self._closed, self._process = failed, False, False, os.getpid()
        if kernels is None:
            self._must_stop = llama_cpp.ggml_abort_callback(lambda _: self._stop or self._closed or self._failed())
        else:  # it is called for every node: Python would make all of ggml's threads wait for its lock there
            self._must_stop = llama_cpp.ggml_abort_callback(kernels.must_stop)
        self._never = llama_cpp.ggml_abort_callback(0)
        self._working: threading.Thread | None = None
        """The thread that computes for this context at the moment."""
        _end_own_pool()
        _users.add(id(self))
        weakref.finalize(self, _end_use, id(self))  # also runs when the interpreter exits

    def check(self) -> None:
        """Check that the context can be used.

        Raises:
            UserError: it has been closed, or belongs to the process that this one was forked from: llama.cpp's threads
                do not exist here, and would be waited for without end.
        """
        if self._closed:
            raise UserError("the model is closed: load it again")
        if os.getpid() != self._process:
            raise UserError("the model was loaded before this process was forked: load it in the new process")

    def holding(self) -> AbstractContextManager[Any]:
        """Return the lock to use the context under; nothing where the caller computes for a thread that has it.

        Raises:
            UserError: as for `check`.
        """
        self.check()  # before the lock is waited for, which a fork may have left locked
        return nullcontext() if threading.current_thread() is self._working else self._lock

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of a short call; an exception in the main thread waits until it has ended.

        Raises:
            UserError: as for `check`.
        """
        with self.holding():
            self.check()
            return self._run(work)

    def _run(self, work: Callable[[], T]) -> T:
        if threading.current_thread() is self._working:
            return work()
        call, worker = _Call(work), _borrow_worker()
        self._working = worker.thread
        try:
            worker.run(call)
        except BaseException:
            self._set_stop(True)
            _wait_for_all(worker)
            raise
        finally:
            self._working = None
            _give_back(worker)
        if call.failure is not None:
            raise call.failure
        result: T = call.results[0]
        return result

    def run_long(self, work: Callable[[], T], context: Any) -> T:
        """Return the result of a call that decodes on `context`; an exception in the main thread aborts it.

        Raises:
            UserError: as for `check`; also if the model is closed while it runs.
        """
        with self.holding():
            self._set_stop(False)
            self.check()  # in this order, or a `close` in between would be overruled
            data = None if self._kernels is None else self._kernels.address
            llama_cpp.llama_set_abort_callback(context, self._must_stop, data)
            try:
                return self._run(work)
            except Exception:
                self.check()
                raise
            finally:
                llama_cpp.llama_set_abort_callback(context, self._never, None)

    def _set_stop(self, stop: bool) -> None:
        self._stop = stop
        if self._kernels is not None:
            self._kernels.stop(stop or self._closed)

    def close(self, free: Callable[[], None]) -> None:
        """Abort the call that is under way, if any, and call `free` once nothing uses the context.

        In a forked process nothing is freed: the threads that would have to end are not there.
        """
        self._closed = True
        self._set_stop(True)
        if os.getpid() != self._process:
            return
        with self._lock:
            free()


def _wait_for_all(worker: _Worker) -> None:
    """Wait for the calls handed to a worker, which still use the context; it runs them in order."""
    while True:
        try:
            worker.run(_Call(int))
        except BaseException:  # a second Ctrl-C
            continue
        return
