"""How many threads compute, and how they wait for each other. Imported before llama_cpp and torch.

llama.cpp's threads meet after each operation of its graph, some thousand times per token. libgomp, which both engines
are built with on Linux, lets a thread that waits there keep its core busy for milliseconds, even if the thread it waits
for needs that very core: on two cores, next to one process that multiplies matrices, SmolLM2-135M generated 4 tokens/s
instead of 25, and next to a search with two workers less than one (`benchmarks/busy.py`). With a short busy
wait, and sleep after it, it generates as fast as before on an idle machine.
"""

from __future__ import annotations

import os

import psutil

from ..processes import usable_cores

# Iterations of its waiting loop: some microseconds, in which most threads arrive. It is libgomp's own default where
# threads outnumber cores.
SPINS = "1000"

if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads both once, when it is loaded
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def default_threads() -> int:
    """Return the machine's physical cores, or those that this process may use if fewer (taskset, containers)."""
    return min(psutil.cpu_count(logical=False) or os.cpu_count() or 1, usable_cores())
