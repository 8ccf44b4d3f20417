"""The cores that this process may use, and child processes that end with their parent."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def usable_cores() -> int:
    """The number of cores that this process may run on; taskset and containers can make it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(wait_for_its_end: Callable[[], object]) -> None:
    """End this process, even in the middle of a C call, as soon as its parent has ended.

    `wait_for_its_end` returns when the parent has ended; it is called in its own thread.
    """

    def watch() -> None:
        wait_for_its_end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
