"""Writing beside other busy processes: tokens per second of ours and others, and what is left of the speed without.

    python benchmarks/busy.py [--model FILE.gguf] [--kv q8_0] [--after 100] [--count 16] [--busy 2] [--rounds 3]
                              [--threads 2] [--tree NAME=FOLDER] [--llama-bench NAME=COMMAND] [--only NAMES]
                              [--json FILE]

The others multiply matrices on one thread each. What they cost differs from run to run, depending on where the system
puts the threads: each measurement is a process of its own, with and without the others in turn, and medians count.
Stock and other programs run with the waiting that is libgomp's default; ours keeps cores busy for a shorter time
(runtime/threads.py), unless GOMP_SPINCOUNT or OMP_WAIT_POLICY is set, which then holds for all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from contenders import ENVIRONMENT, Contender, Task, add_options, contenders
from models import bundled_model
from rounds import measure, medians, print_rates, print_table, write_json

WORK = "import numpy; a = numpy.ones((800, 800), numpy.float32)\nwhile True: a @ a"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    one_thread = ENVIRONMENT | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    others = [subprocess.Popen([sys.executable, "-c", WORK], env=one_thread) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def write(contender: Contender, task: Task, states: Path, count: int) -> float:
    with busy_processes(count):
        return contender.measure(task, states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, kv="q8_0")
    parser.add_argument("--after", type=int, default=100, help="depth (default: %(default)s)")
    parser.add_argument("--count", type=int, default=16, help="tokens that are written (default: %(default)s)")
    parser.add_argument("--busy", type=int, default=2, help="other processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    model = args.model or bundled_model()
    task = Task("write", args.count, args.after, model, args.threads)
    everybody = contenders(args)
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder)
        for each in everybody:  # the caches are filled before anybody is busy
            each.measure(task, states)
        columns = {f"{n} busy": partial(write, task=task, states=states, count=n) for n in (0, args.busy)}
        readings = measure(everybody, columns, args.rounds)
    print(f"writing, tokens per second; {model.name}, {args.threads} threads, median of {args.rounds}")
    print_rates(everybody, readings)
    alone, beside = medians(readings).values()
    print()
    print_table({each.label: [beside[each.label] / alone[each.label]] for each in everybody}, ["share left"], 3)
    write_json(args.json, readings, model=model, threads=args.threads, busy=args.busy)


if __name__ == "__main__":
    main()
