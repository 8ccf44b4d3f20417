"""A sequence that outgrows its band: rotating its cached keys compared with reading it again.

    python benchmarks/band_switch.py [--model FILE.gguf] [--text FILE] [--kv q8_0:f16] [--next 1024]

The model reads as many tokens of the text as it was trained for in its short band, the keys are rotated to the next
band's λ, and the perplexity of the tokens that follow is measured. This is compared with the same tokens read with the
long band's λ from the first token on. Printed: both perplexities, the seconds of the switch and of the second reading,
and their ratio.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import ropewalk
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import extend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="a book, for example; default: Python's documentation")
    parser.add_argument("--kv", default="q8_0:f16")
    parser.add_argument("--next", type=int, default=1024, help="tokens after the switch")
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    short, schedule = native.context, extend(native, 2 * native.context)
    n_ctx = min(short + args.next + 256, schedule.context)
    llm = ropewalk.Llama(model, schedule=schedule, n_ctx=n_ctx, kv=args.kv, n_threads=2, verbose=False)
    tokens = llm.tokenize(text(args.text).encode())[: short + args.next]
    changes: list[ropewalk.runtime.BandChange] = []
    llm.on_band_change = changes.append

    llm.eval(tokens[:short])
    switched = llm.token_losses(tokens, start=short + 1)
    (change,) = changes

    llm.reset()
    llm.set_schedule(schedule.only(1))
    started = time.perf_counter()
    llm.eval(tokens[:short])
    reading = time.perf_counter() - started
    from_start = llm.token_losses(tokens, start=short + 1)

    print(f"{model.name}, {args.kv} cache, {short:,} tokens, then {len(switched):,} more")
    print(f"{'':28}{'perplexity':>12}{'seconds':>10}")
    print(f"{'short band, keys rotated':28}{np.exp(switched.mean()):12.2f}{change.seconds:10.2f}")
    print(f"{'long band from the start':28}{np.exp(from_start.mean()):12.2f}{reading:10.2f}")
    print(f"the switch takes {change.seconds / reading:.2%} of the time of reading again; read again: {change.reread}")


if __name__ == "__main__":
    main()
