"""How many threads compute, and how they wait for each other. Imported before llama_cpp and torch.

llama.cpp's threads meet after each operation of its graph, some thousand times per token. libgomp, which both engines
are built with on Linux, lets a thread that waits there keep its core busy for milliseconds, even if the thread it waits
for needs that very core: on two cores, next to one process that multiplies matrices, SmolLM2-135M generated 4 tokens/s
instead of 25, and next to a search with two workers less than one (`benchmarks/busy.py`). With a short busy
wait, and sleep after it, it generates as fast as before on an idle machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ..processes import ROOT, allowed_cpus, quota_cores, usable_cores

# Iterations of its waiting loop: some microseconds, in which most threads arrive.
SPINS = "1000"

if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads both once, when it is loaded
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def default_threads(root: Path = ROOT, allowed: set[int] | None = None) -> int:
    """Return the physical cores that this process may use: fewer under taskset, in a container, or with a CPU quota.

    Of a hybrid processor only the performance cores count: all threads wait for the slowest one. `root` is where the
    file system begins, `allowed` the numbers of the logical CPUs that may be used (default: this process').
    """
    cpus = _fast_cpus(root, allowed_cpus() if allowed is None else allowed)
    return max(1, min(_physical_cores(root, cpus), quota_cores(root)))


class FreeCores:
    """How many threads are worth having while single tokens are computed: one for each core that nobody else uses.

    A thread that shares its core arrives late at each meeting, and all others wait for it: beside two busy processes on
    two cores, SmolLM2-135M writes 40 tokens/s with two threads and more than twice as many with one.
    """

    WINDOW_S = 0.25
    """Seconds over which the cores are watched."""

    SPARE = 0.3
    """A core is used if so much of it is taken already by others, at most."""

    def __init__(self, used: Callable[[], tuple[float, float]] | None = None, now: float | None = None) -> None:
        """Watch from `now` on, in seconds, the clock's by default.

        `used` returns the seconds that all processes, and this one, have computed on the cores it may use.
        """
        self._used = used or _used_seconds
        self._cores = usable_cores()
        self._threads = self._cores
        self._last = (time.monotonic() if now is None else now, *self._used())

    def threads(self, most: int, now: float | None = None) -> int:
        """Return how many of at most `most` threads to use, given what others have used since the last look."""
        now = time.monotonic() if now is None else now
        then, total_then, own_then = self._last
        if now - then >= self.WINDOW_S:
            total, own = self._used()
            others = max(0.0, (total - total_then) - (own - own_then)) / (now - then)
            self._threads = max(1, int(self._cores - others + self.SPARE))
            self._last = (now, total, own)
        return min(most, self._threads)


def _used_seconds() -> tuple[float, float]:
    times = psutil.cpu_times(percpu=True)
    cpus = [times[cpu] for cpu in allowed_cpus() if cpu < len(times)]
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests' time is part of the others
    total = sum(value for cpu in cpus for name, value in cpu._asdict().items() if name not in idle)
    return total, time.process_time()


def _fast_cpus(root: Path, cpus: set[int]) -> set[int]:
    """Those of `cpus` that are performance cores, where the kernel tells; all if it does not, or there are none."""
    devices = root / "sys/devices"
    fast = cpus & _numbers(devices / "cpu_core/cpus")  # Intel's
    if fast:
        return fast
    capacities = {cpu: max(_numbers(devices / f"system/cpu/cpu{cpu}/cpu_capacity"), default=0) for cpu in cpus}  # Arm's
    greatest = max(capacities.values(), default=0)
    return {cpu for cpu, capacity in capacities.items() if capacity >= greatest / 2}


def _physical_cores(root: Path, cpus: set[int]) -> int:
    """How many cores these logical CPUs belong to."""
    topology = [root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus]
    cores = {frozenset(_numbers(path)) for path in topology} - {frozenset()}
    return len(cores) or min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))


def _numbers(path: Path) -> set[int]:
    """The numbers in a file of the kernel's, such as `0-3,8`; empty where there is none."""
    try:
        ranges = [part.split("-") for part in path.read_text(encoding="ascii").strip().split(",")]
        return {number for first, *last in ranges for number in range(int(first), int(last[0] if last else first) + 1)}
    except (OSError, ValueError):
        return set()
