"""A sequence that outgrows its band: rotating its cached keys compared with reading it again.

    python benchmarks/band_switch.py [--model FILE.gguf] [--text FILE] [--kv f16,q8_0,q4_0] [--next 1024] [--moves 6]

The model reads as many tokens of the text as it was trained for in its short band, the keys are rotated to the next
band's λ, and the perplexity of the tokens that follow is measured. This is compared with the same tokens read with the
long band's λ from the first token on. Printed for each cache type: the perplexities, and the seconds of a switch by the
native kernels and by llama.cpp's K-shift, each the median of some moves up and down, and of the second reading.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import ropewalk
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Schedule, extend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="a book, for example; default: Python's documentation")
    parser.add_argument("--kv", default="f16,q8_0,q4_0", help="cache types, each K:V or one for both")
    parser.add_argument("--next", type=int, default=1024, help="tokens after the switch")
    parser.add_argument("--moves", type=int, default=6, help="switches that are timed")
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    schedule = extend(native, 2 * native.context)
    print(f"{model.name}, {native.context:,} tokens, then {args.next:,} more")
    print(f"{'cache':12}{'keys':28}{'perplexity':>12}{'seconds':>10}")
    for kv in args.kv.split(","):
        measure(model, schedule, kv, args)


def measure(model: Path, schedule: Schedule, kv: str, args: argparse.Namespace) -> None:
    """Print a cache type's rows."""
    short = schedule.bands[0].context
    n_ctx = min(short + args.next + 256, schedule.context)
    llm = ropewalk.Llama(model, schedule=schedule, n_ctx=n_ctx, kv=kv, n_threads=2, verbose=False)
    tokens = llm.tokenize(text(args.text).encode())[: short + args.next]

    def row(keys: str, losses: np.ndarray, seconds: float) -> None:
        print(f"{kv:12}{keys:28}{np.exp(losses.mean()):12.2f}{seconds:10.3f}", flush=True)

    llm.eval(tokens[:short])
    state = llm.save_state()
    for natively, keys in ((True, "rotated by the kernels"), (False, "rotated by a K-shift")):
        llm.load_state(state)
        llm.rotates_natively = natively
        if llm.rotates_natively != natively:
            continue
        seconds = switches(llm, schedule, args.moves)
        llm.load_state(state)
        row(keys, llm.token_losses(tokens, start=short + 1), seconds)
    llm.rotates_natively = True
    llm.reset()
    llm.set_schedule(schedule.only(1))
    started = time.perf_counter()
    llm.eval(tokens[:short])
    reading = time.perf_counter() - started
    row("long band from the start", llm.token_losses(tokens, start=short + 1), reading)
    llm.close()


def switches(llm: ropewalk.Llama, schedule: Schedule, n_moves: int) -> float:
    """Return the median seconds of `n_moves` moves to the long band and back; NaN if the tokens are read again."""
    changes: list[ropewalk.runtime.BandChange] = []
    llm.on_band_change = changes.append
    for move in range(n_moves):
        llm.set_schedule(schedule.only(1) if move % 2 == 0 else schedule)
        if changes[-1].reread:
            break
    llm.on_band_change = None
    return math.nan if changes[-1].reread else statistics.median(change.seconds for change in changes)


if __name__ == "__main__":
    main()
