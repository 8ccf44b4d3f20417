"""What this process may use of the machine, and child processes that end with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def usable_cores() -> int:
    """The cores that this process may run on, which taskset and containers can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(wait_for_its_end: Callable[[], object]) -> None:
    """End this process, even in the middle of a call into C, as soon as its parent has ended.

    `wait_for_its_end` returns when that is so; it is called in a thread of its own.
    """

    def watch() -> None:
        wait_for_its_end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
