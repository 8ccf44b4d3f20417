"""Calls into llama.cpp that a signal can interrupt.

Python runs signal handlers on the main thread, between any two steps of Python code: were it inside a callback from C,
what the handler raises (Ctrl-C, SIGTERM) would be lost there. So every call that calls back runs in a thread of its
own, and the main thread waits for it. It waits at a bare lock: a handler that raises inside the Python code of a
`Condition`, which futures and events wait at, leaves it half released, and another exception comes out.
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
    """Something to do in the thread; `done` is locked until it has been, and `found` holds what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.done = work, threading.Lock()
        self.found: list[Any] = []
        self.failure: BaseException | None = None
        self.done.acquire()

    def make(self) -> None:
        try:
            self.found.append(self.work())
        except BaseException as failure:
            self.failure = failure
        finally:
            self.done.release()


class Interruptible:
    """Runs llama.cpp's calls for one context; keep it alive as long as the context.

    `failed` is asked between the nodes of a long call: once it says yes, the call is given up.
    """

    def __init__(self, failed: Callable[[], bool]) -> None:
        self._failed, self._stop, self._closed = failed, False, False
        self._must_stop = llama_cpp.ggml_abort_callback(lambda _: self._stop or self._failed())
        self._never = llama_cpp.ggml_abort_callback(0)
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        worker = threading.Thread(target=_work, args=(self._calls,), name="ropewalk-llama", daemon=True)
        worker.start()
        self._end = weakref.finalize(self, _end, self._calls, worker)  # at the interpreter's end, too

    def run(self, work: Callable[[], T]) -> T:
        """The result of a short call; an exception in the main thread waits for its end."""
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
        result: T = call.found[0]
        return result

    def run_long(self, work: Callable[[], T], context: Any) -> T:
        """The result of a call that decodes on `context`, which an exception in the main thread aborts."""
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
        """What was handed to the thread still uses the context; it does one thing after the other."""
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
        call.make()
        del call  # what it holds is not kept until the next


def _end(calls: SimpleQueue[_Call | None], worker: threading.Thread) -> None:
    calls.put(None)
    worker.join()
