"""What a near window costs: reading and writing with it against without, at a depth, and the band change into it.

    python benchmarks/near_window.py [--model FILE.gguf] [--kv q8_0,f16] [--depth 30720] [--windows 2048,4096]
                                     [--rounds 3] [--threads 2] [--json FILE]

The cache is filled once for each type. Then the bands take turns: one change into the band, 512 tokens read, 32 written
one by one. The best of the rounds counts, as other work on the machine only takes time away.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import ropewalk
from models import bundled_model
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Band, RopeFacts, Schedule

READ, WRITTEN = 512, 32


def bands(facts: RopeFacts, context: int, windows: list[int]) -> dict[str, Schedule]:
    """A plain band for `context` tokens, and one with each window, by name."""
    half = facts.n_rot // 2
    found = {"plain": Band(context=context, rescale_factors=(context / facts.original_context,) * half)}
    for window in windows:
        stretch = (context - window) / (facts.original_context - window)
        found[f"near {window:,}"] = Band(context=context, near_tokens=window, rescale_factors=(stretch,) * half)
    return {name: Schedule(facts=facts, bands=(band,)) for name, band in found.items()}


def rates(llm: ropewalk.Llama, schedule: Schedule, depth: int, tokens: list[int]) -> dict[str, float]:
    """Tokens per second of reading and writing after `depth` tokens, and seconds of the change to the band."""
    llm.rewind(depth)
    started = time.perf_counter()
    llm.set_schedule(schedule)
    changed = time.perf_counter()
    llm.eval(tokens[depth : depth + READ])
    read = time.perf_counter()
    for token in tokens[depth + READ :][:WRITTEN]:
        llm.eval([token])
    written = time.perf_counter()
    return {"read": READ / (read - changed), "write": WRITTEN / (written - read), "change": changed - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, metavar="FILE")
    parser.add_argument("--kv", default="q8_0,f16")
    parser.add_argument("--depth", type=int, default=30720)
    parser.add_argument("--windows", default="2048,4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    model = args.model or bundled_model()
    context = args.depth + READ + WRITTEN
    facts = native_schedule(read_header(model)).facts
    schedules = bands(facts, context, [int(window) for window in args.windows.split(",")])
    rows = []
    for kv in args.kv.split(","):
        options = {"n_threads": args.threads, "n_threads_batch": args.threads, "verbose": False}
        llm = ropewalk.Llama(model, schedule=schedules["plain"], n_ctx=context, kv=kv, **options)
        tokens = [(37 * i * i + 11 * i) % 1000 + 100 for i in range(context)]  # speed does not depend on what is read
        llm.eval(tokens[: args.depth])
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(args.rounds):
            for name, schedule in schedules.items():
                found[name].append(rates(llm, schedule, args.depth, tokens))
        llm.close()
        for name, rounds in found.items():
            best = {key: max(one[key] for one in rounds) for key in ("read", "write")}
            best["change"] = min(one["change"] for one in rounds)
            rows.append({"kv": kv, "band": name, "depth": args.depth, **best})
            plain = next(row for row in rows if row["kv"] == kv)
            print(
                f"{kv:6} {name:12} reads {best['read']:6.0f} tokens/s ({best['read'] / plain['read']:.2f} ×), writes"
                f" {best['write']:6.1f} ({best['write'] / plain['write']:.2f} ×), change {best['change']:.3f} s"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
