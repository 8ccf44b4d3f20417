"""The cores that this process may use, and child processes that end with their parent."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def allowed_cpus() -> set[int]:
    """Return the numbers of the logical CPUs that this process may run on: taskset and containers leave some out."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_cores(root: Path = ROOT) -> int:
    """Return how many cores this process can keep busy: those that it may run on, or its control group's quota."""
    return max(1, min(len(allowed_cpus()), quota_cores(root)))


def quota_cores(root: Path = ROOT) -> int:
    """Return the whole cores of `cpu_quota`, to the nearest one; a large number where there is no quota."""
    quota = cpu_quota(root)
    return 1 << 16 if quota == math.inf else max(1, int(quota + 0.5))


def cpu_quota(root: Path = ROOT) -> float:
    """Return how many cores' time the control groups of this process allow (`docker run --cpus`); infinity: all.

    Both versions of Linux' control groups are looked at, and all groups above this process' own; `root` is where the
    file system begins.
    """
    groups = root / "sys/fs/cgroup"
    quota = math.inf
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        if not controllers:
            mounts = [groups, groups / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [groups / controllers, groups / "cpu"]
        else:
            continue
        for mount in mounts:  # in a container, what is mounted is often the process' own group
            for depth in range(len(inside) + 1):
                quota = min(quota, _quota_of(mount.joinpath(*inside[:depth])))
    return quota


def _quota_of(group: Path) -> float:
    """The quota in cores of one control group; infinity where none is set, or the group is not there."""
    words = _text(group / "cpu.max").split()
    words = words or _text(group / "cpu.cfs_quota_us").split() + _text(group / "cpu.cfs_period_us").split()
    try:
        allowed, period = map(int, words)
    except ValueError:  # "max", or nothing
        return math.inf
    return allowed / period if allowed > 0 and period > 0 else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def end_with_parent(wait_for_its_end: Callable[[], object]) -> None:
    """End this process, even in the middle of a C call, as soon as its parent has ended.

    `wait_for_its_end` returns when the parent has ended; it is called in its own thread.
    """

    def watch() -> None:
        wait_for_its_end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
