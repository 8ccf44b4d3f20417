"""Calls into llama.cpp that a signal can interrupt.

Python runs signal handlers on the main thread, between any two steps of Python code: were it inside a callback from C,
what the handler raises (Ctrl-C, SIGTERM) would be lost there. So every call that calls back runs in a thread of its
own, and the main thread waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import llama_cpp

T = TypeVar("T")


class Interruptible:
    """Runs llama.cpp's calls for one context; keep it alive as long as the context.

    `failed` is asked between the nodes of a long call: once it says yes, the call is given up.
    """

    def __init__(self, failed: Callable[[], bool]) -> None:
        self._failed, self._stop, self._closed = failed, False, False
        self._must_stop = llama_cpp.ggml_abort_callback(lambda _: self._stop or self._failed())
        self._never = llama_cpp.ggml_abort_callback(0)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ropewalk-llama")

    def run(self, work: Callable[[], T]) -> T:
        """The result of a short call; an exception in the main thread waits for its end."""
        if threading.current_thread() is not threading.main_thread():
            return work()
        try:
            return self._worker.submit(work).result()
        except BaseException:
            self._stop = True
            self._wait_for_all()
            raise

    def run_long(self, work: Callable[[], T], context: Any) -> T:
        """The result of a call that decodes on `context`, which an exception in the main thread aborts."""
        self._stop = False
        llama_cpp.llama_set_abort_callback(context, self._must_stop, None)
        try:
            return self.run(work)
        finally:
            llama_cpp.llama_set_abort_callback(context, self._never, None)

    def _wait_for_all(self) -> None:
        """What was handed to the thread still uses the context; it does one thing after the other."""
        while not self._closed:
            try:
                self._worker.submit(int).result()
            except BaseException:  # a second Ctrl-C
                continue
            return

    def close(self) -> None:
        self._closed = True
        self._worker.shutdown(wait=True)
