"""What this machine can do at most: memory read per second, and matrix products in several types.

    python benchmarks/peaks.py [--threads 2] [--json]

Each thread reads memory of its own that no cache holds, and multiplies matrices of its own in torch, which calls
oneDNN or MKL for them. The best of several runs counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

SIDE = 1024  # of the matrices


def per_second(work: Callable[[int], object], amount: float, n_threads: int, n_rounds: int = 5) -> float:
    """The best rate of `n_threads` that each do `work(thread)`, which is `amount` of something."""
    best = 0.0
    for _ in range(n_rounds):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, n_threads * amount / (time.perf_counter() - started))
    return best


def memory_read(n_threads: int) -> float:
    """Bytes per second, by the C library's search for a byte that is not there."""
    search = ctypes.CDLL(None).memchr
    search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    vectors = [np.ones(256 << 20, np.uint8) for _ in range(n_threads)]

    def read(thread: int) -> None:
        search(vectors[thread].ctypes.data, 2, vectors[thread].nbytes)

    return per_second(read, vectors[0].nbytes, n_threads, n_rounds=15)


def products(n_threads: int) -> dict[str, float]:
    """FLOP (of integers: operations) per second of matrix products, by type; those that torch has here."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    a8, b8 = (a * 30).to(torch.int8), (b * 30).to(torch.int8)
    a16, b16 = a.bfloat16(), b.bfloat16()
    kinds: dict[str, Callable[[], object]] = {
        "f32": lambda: a @ b,
        "bf16": lambda: a16 @ b16,
        "int8": lambda: torch._int_mm(a8, b8),
    }
    found = {}
    for name, multiply in kinds.items():
        multiply()
        found[name] = per_second(lambda _, f=multiply: [f() for _ in range(10)], 20.0 * SIDE**3, n_threads)
    return found


def measured(n_threads: int) -> dict[str, float]:
    """All peaks, measured in a process of its own: bytes per second of `memory`, FLOP per second of each type."""
    command = [sys.executable, __file__, "--json", "--threads", str(n_threads)]
    return dict(json.loads(subprocess.check_output(command, text=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {"memory": memory_read(args.threads)} | products(args.threads)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.threads} threads")
    for name, rate in found.items():
        print(f"{name:10}{rate / 1e9:10,.1f} {'GB/s' if name == 'memory' else 'GFLOP/s'}")


if __name__ == "__main__":
    main()
