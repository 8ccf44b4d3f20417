"""Reading a long prompt that a signal can interrupt: llama.cpp works in a thread, and is told to abort."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llama_cpp


class Interruptible:
    """Runs llama.cpp's long calls for one context; keep it alive as long as the context.

    `failed` is asked between nodes: once it says yes, the call is given up.
    """

    def __init__(self, failed: Callable[[], bool]) -> None:
        self._failed, self._stop = failed, False
        self._must_stop = llama_cpp.ggml_abort_callback(lambda _: self._stop or self._failed())
        self._never = llama_cpp.ggml_abort_callback(0)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ropewalk-read")

    def run(self, context: Any, work: Callable[[], None]) -> None:
        """Call `work`, which decodes on `context`; an exception in the main thread (Ctrl-C) ends it at once."""
        self._stop = False
        llama_cpp.llama_set_abort_callback(context, self._must_stop, None)
        try:
            if threading.current_thread() is threading.main_thread():
                self._wait_for(self._reader.submit(work))
            else:
                work()
        finally:
            llama_cpp.llama_set_abort_callback(context, self._never, None)

    def _wait_for(self, work: Future[None]) -> None:
        try:
            work.result()
        except BaseException:
            self._stop = True
            while not work.done():
                try:
                    work.exception()
                except BaseException:  # a second Ctrl-C: the thread still uses the context, so wait for it
                    continue
            raise

    def close(self) -> None:
        self._reader.shutdown(wait=True)
