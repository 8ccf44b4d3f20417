"""How many threads compute, and how they wait for each other. Imported before llama_cpp and torch are.

llama.cpp's threads meet after each operation of its graph, some thousand times a token. libgomp, which both engines are
built with on Linux, lets a thread that waits there keep its core busy for milliseconds, even where the one it waits for
needs that very core: on two cores, beside one process that multiplies matrices, SmolLM2-135M wrote 4 tokens/s instead
of 25, and beside a search by two workers not one (`benchmarks/busy_machine.py`). With a short wait of that kind, and
sleep after it, it writes as fast as ever on a quiet machine.
"""

from __future__ import annotations

import os

import psutil

from ..processes import usable_cores

# Turns of its waiting loop: some microseconds, in which most threads have come. It is libgomp's own number where it
# knows that threads outnumber cores.
SPINS = "1000"

if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads both once, when it is loaded
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def default_threads() -> int:
    """The machine's physical cores, and no more than this process may run on (taskset, containers)."""
    return min(psutil.cpu_count(logical=False) or os.cpu_count() or 1, usable_cores())
