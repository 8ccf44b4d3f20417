"""How much memory this process may still take: on the machine, under control groups, and under `ulimit -v`."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that this process may still take: the least that the machine, a control group or `ulimit -v` leaves."""
    free = [int(psutil.virtual_memory().available), *group_room(), *_address_room()]
    return max(min(free), 0)


def group_room(groups: Path = GROUPS, own: Path = OWN_GROUPS) -> Iterator[int]:
    """Yield what each control group that this process is in, up to the root, leaves of its limit, in bytes.

    Cached files that are not in use do not count as taken: the system drops them first. In a container the paths in
    `own` may be the host's; the root is the container's own group then.
    """
    yield from _room(groups, own, "", "memory.max", "memory.current", "inactive_file")
    limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    yield from _room(groups / "memory", own, "memory", limit, used, "total_inactive_file")


def _room(root: Path, own: Path, controller: str, limit: str, used: str, idle: str) -> Iterator[int]:
    place = PurePosixPath(_own_path(own, controller).lstrip("/"))
    for path in (place, *place.parents):
        with suppress(OSError, ValueError):  # no such group, or "max"
            most, taken = (int((root / path / name).read_text()) for name in (limit, used))
            yield most - taken + _counted(root / path / "memory.stat", idle)


def _own_path(own: Path, controller: str) -> str:
    """This process's path under a controller: lines are like `4:memory:/user.slice`, and `0::/` with one hierarchy."""
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                return path
    return ""


def _counted(stat: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        return int(dict(line.split() for line in stat.read_text().splitlines())[name])
    return 0


def _address_room() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(psutil.Process().memory_info().vms)
