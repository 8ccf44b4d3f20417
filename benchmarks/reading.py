"""Reading a long prompt: tokens per second of ours and others, by cache type and length.

    python benchmarks/reading.py [--model FILE.gguf] [--kv q8_0] [--tokens 4096] [--rounds 3] [--threads 2]
                                 [--tree NAME=FOLDER] [--llama-bench NAME=COMMAND] [--only NAMES] [--json FILE]

Each reads each length from the start, in a process of its own, interleaved in rounds; medians count. Stock is measured
with flash attention over each cache type and over f16, and without over f16. The arithmetic of ours is compared with
what matrix products reach here (peaks.py). Stock takes half an hour for 32,768 tokens of a q8_0 cache: `--only`
leaves it out.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from contenders import Contender, Task, add_options, contenders
from models import bundled_model
from peaks import measured
from rounds import Readings, measure, medians, print_rates, print_table, write_json
from work import flop_of_reading


def read(contender: Contender, task: Task) -> float:
    return contender.measure(task, Path())


def print_arithmetic(readings: Readings, lengths: list[int], model: Path, threads: int) -> dict[str, float]:
    """Print GFLOP/s by contender and length, and the machine's peaks; return these."""
    peaks = measured(threads)
    found = medians(readings)
    labels = next(iter(found.values()))
    work = [flop_of_reading(model, n) / n / 1e9 for n in lengths]
    rows = {label: [row[label] * flop for row, flop in zip(found.values(), work, strict=True)] for label in labels}
    print("\nGFLOP/s; products reach " + ", ".join(f"{k} {v / 1e9:,.0f}" for k, v in peaks.items() if k != "memory"))
    print_table(rows, list(readings), 0)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, kv="q8_0")
    parser.add_argument("--tokens", default="4096", help="lengths, separated by commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    model = args.model or bundled_model()
    lengths = [int(n) for n in args.tokens.split(",")]
    everybody = contenders(args)
    columns = {f"{n:,}": partial(read, task=Task("read", n, 0, model, args.threads)) for n in lengths}
    readings = measure(everybody, columns, args.rounds)
    print(f"reading, tokens per second; {model.name}, {args.threads} threads, median of {args.rounds}")
    print_rates(everybody, readings)
    peaks = print_arithmetic(readings, lengths, model, args.threads)
    write_json(args.json, readings, model=model, threads=args.threads, peaks=peaks)


if __name__ == "__main__":
    main()
