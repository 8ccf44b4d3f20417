"""Speed of generation next to other busy processes, by how the engine's threads wait for each other.

    python benchmarks/busy_machine.py [--model FILE.gguf] [--tokens 32] [--busy 0,1,2] [--rounds 3]

libgomp's default spinning (`default`) keeps a core busy that another thread of the same model needs; ours is short
(runtime/threads.py). Its cost differs from run to run, depending on where the system puts the threads. Each measurement
is a separate process, because libgomp reads its settings when it is loaded; the measurements are interleaved.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from models import bundled_model, text

BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(800, 800)\nwhile True: a @ a"
WAITS = {"default": {"GOMP_SPINCOUNT": "300000"}, "ours": {}, "asleep": {"OMP_WAIT_POLICY": "passive"}}


def print_speed(model: str, n_tokens: int) -> None:
    import ropewalk

    llm = ropewalk.Llama(model, n_ctx=512, verbose=False)
    llm.eval(llm.tokenize(text(None)[:1000].encode()))
    llm._sampler = llm._init_sampler(temp=0.0)
    for n in (4, n_tokens):
        started = time.perf_counter()
        for _ in range(n):
            llm.eval([llm.sample(temp=0)])
    print(n_tokens / (time.perf_counter() - started))


def speed(model: Path, n_tokens: int, wait: str) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, __file__, "--read", str(model), "--tokens", str(n_tokens)]
    return float(subprocess.check_output(command, env=environment | WAITS[wait], text=True))


def compare(model: Path, n_tokens: int, busy: list[int], n_rounds: int) -> None:
    print(f"{'busy processes':16}" + "".join(f"{wait:>12}" for wait in WAITS))
    for n_busy in busy:
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_busy)]
        try:
            rounds = [[speed(model, n_tokens, wait) for wait in WAITS] for _ in range(n_rounds)]
        finally:
            for other in others:
                other.kill()
        medians = map(statistics.median, zip(*rounds, strict=True))
        print(f"{n_busy:<16}" + "".join(f"{each:10.1f}/s" for each in medians), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--busy", default="0,1,2", help="numbers of other busy processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print_speed(args.read, args.tokens)
    else:
        compare(args.model or bundled_model(), args.tokens, [int(n) for n in args.busy.split(",")], args.rounds)


if __name__ == "__main__":
    main()
