"""Calls into llama.cpp that a signal can interrupt.

Python runs signal handlers on the main thread, between any two bytecodes. Inside a callback from C, an exception that
the handler raises (Ctrl-C, SIGTERM) would be lost. So every call that calls back runs in a thread of its own, and the
main thread waits for it. It waits on a bare lock: a handler that raises inside the Python code of a `Condition`, which
futures and events wait on, leaves it half released, and a different exception comes out.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import llama_cpp

T = TypeVar("T")


class _Call:
    """Work for the thread; `done` is locked until it has run, and `results` then holds its result."""

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


class Interruptible:
    """Runs llama.cpp's calls for one context; keep it alive as long as the context.

    `failed` is polled between the nodes of a long call; once it returns True, the call is aborted.
    """

    def __init__(self, failed: Callable[[], bool]) -> None:
        self._failed, self._stop, self._closed = failed, False, False
        self._must_stop = llama_cpp.ggml_abort_callback(lambda _: self._stop or self._failed())
        self._never = llama_cpp.ggml_abort_callback(0)
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        worker = threading.Thread(target=_work, args=(self._calls,), name="ropewalk-llama", daemon=True)
        worker.start()
        self._end = weakref.finalize(self, _end, self._calls, worker)  # also runs when the interpreter exits

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of a short call; an exception in the main thread waits until it has ended."""
        if threading.current_thread() is not threading.main_thread():
            return work()
        call = _Call(work)
        try:
            self._hand_over(call)
        except BaseException:
            self._stop = True
            self._wait_for_all()
            raise
        if call.failure is not None:
            raise call.failure
        result: T = call.results[0]
        return result

    def run_long(self, work: Callable[[], T], context: Any) -> T:
        """Return the result of a call that decodes on `context`; an exception in the main thread aborts it."""
        self._stop = False
        llama_cpp.llama_set_abort_callback(context, self._must_stop, None)
        try:
            return self.run(work)
        finally:
            llama_cpp.llama_set_abort_callback(context, self._never, None)

    def _hand_over(self, call: _Call) -> None:
        self._calls.put(call)
        call.done.acquire()

    def _wait_for_all(self) -> None:
        """Wait for the calls handed to the thread, which still use the context; it runs them in order."""
        while not self._closed:
            try:
                self._hand_over(_Call(int))
            except BaseException:  # a second Ctrl-C
                continue
            return

    def close(self) -> None:
        self._closed = True
        self._end()


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # or what it holds would live until the next call


def _end(calls: SimpleQueue[_Call | None], worker: threading.Thread) -> None:
    calls.put(None)
    worker.join()
