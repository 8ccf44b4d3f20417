"""Writing after a short or a long text: tokens per second of ours and others, by cache type and depth.

    python benchmarks/writing.py [--model FILE.gguf] [--kv q8_0,q4_0,f16] [--after 100,2048] [--count 32]
                                 [--rounds 3] [--threads 2] [--states FOLDER] [--tree NAME=FOLDER]
                                 [--llama-bench NAME=COMMAND] [--only NAMES] [--json FILE]

Each writes `--count` tokens one by one in a process of its own, interleaved in rounds; medians count. The cache before
them is filled once by ours and loaded by all that run from Python; `--states` keeps it for the next time. Stock is
measured with flash attention over each cache type and over f16, and without over f16. The share of the memory limit is
the bytes that a token reads, of weights and cache, times the speed, over what this machine can read (peaks.py).
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from contenders import Contender, Task, add_options, contenders
from models import bundled_model
from peaks import measured
from rounds import Readings, measure, medians, print_rates, print_table, write_json
from work import bytes_of_writing


def write(contender: Contender, task: Task, states: Path) -> float:
    return contender.measure(task, states)


def print_memory(everybody: list[Contender], readings: Readings, depths: list[int], model: Path, peak: float) -> None:
    """Print by contender and depth what share of the memory's speed it reaches."""
    found = medians(readings)
    rows = {
        each.label: [
            100 * row[each.label] * bytes_of_writing(model, depth, each.kv) / peak
            for depth, row in zip(depths, found.values(), strict=True)
        ]
        for each in everybody
    }
    print(f"\nper cent of the memory limit, {peak / 1e9:.1f} GB/s")
    print_table(rows, list(readings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, kv="q8_0,q4_0,f16")
    parser.add_argument("--after", default="100,2048", help="depths, separated by commas (default: %(default)s)")
    parser.add_argument("--count", type=int, default=32, help="tokens that are written (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--states", type=Path, default=None, metavar="FOLDER", help="keep the filled caches here")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    model = args.model or bundled_model()
    depths = [int(n) for n in args.after.split(",")]
    everybody = contenders(args)
    with tempfile.TemporaryDirectory() as folder:
        states = args.states or Path(folder)
        states.mkdir(parents=True, exist_ok=True)
        columns = {
            f"after {n:,}": partial(write, task=Task("write", args.count, n, model, args.threads), states=states)
            for n in depths
        }
        readings = measure(everybody, columns, args.rounds)
    print(f"writing, tokens per second; {model.name}, {args.threads} threads, median of {args.rounds}")
    print_rates(everybody, readings)
    peaks = measured(args.threads)
    print_memory(everybody, readings, depths, model, peaks["memory"])
    write_json(args.json, readings, model=model, threads=args.threads, peaks=peaks)


if __name__ == "__main__":
    main()
