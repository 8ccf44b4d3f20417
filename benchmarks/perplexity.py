"""Whether the fast path is correct: perplexity of a long text, ours and stock llama-cpp-python, by cache type.

    python benchmarks/perplexity.py [--model FILE.gguf] [--text FILE] [--kv f16,q8_0,q4_0] [--context 16384]
                                    [--threads 2] [--no-stock]

Each contender reads the same tokens in the smallest band that holds them. All are compared with ours over an f32 cache
and with floats alone: the difference is that of the mean losses, as a percentage of perplexity, with its standard error
from the differences of single tokens. Stock takes a quarter to half an hour to read 16,384 tokens with a q8_0 or q4_0
cache; `--no-stock` leaves it out.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import ropewalk
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Schedule, extend


def losses(model: Path, kv: str, schedule: Schedule, tokens: list[int], threads: int, **options: bool) -> np.ndarray:
    """The loss of each token but the first, in nats."""
    llm = ropewalk.Llama(
        model,
        schedule=schedule,
        kv=kv,
        n_ctx=len(tokens),
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        **options,
    )
    found = llm.token_losses(tokens)
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="default: Python's documentation")
    parser.add_argument("--kv", default="f16,q8_0,q4_0")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-stock", action="store_true")
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    schedule = native if args.context <= native.context else extend(native, args.context)
    schedule = schedule.only(schedule.band_index(args.context))
    llm = ropewalk.Llama(model, n_ctx=512, vocab_only=True, verbose=False)
    tokens = llm.tokenize(text(args.text).encode())[: args.context]
    if len(tokens) < args.context:
        raise SystemExit(f"the text has {len(tokens):,} tokens, {args.context - len(tokens):,} too few")
    print(f"{model.name}, {len(tokens):,} tokens")
    print(f"{'':34}{'perplexity':>12}{'compared with exact':>22}{'seconds':>10}")
    exact = report("f32 ours, exact", None, model, "f32", schedule, tokens, args.threads, exact=True)
    for kv in args.kv.split(","):
        if not args.no_stock:
            for flash in (False, True) if kv in ("f32", "f16", "bf16") else (True,):
                name = f"{kv} stock, {'flash' if flash else 'plain'} attention"
                stock = {"fast_prefill": False, "flash_attn": flash}
                report(name, exact, model, kv, schedule, tokens, args.threads, **stock)
        report(f"{kv} ours, exact", exact, model, kv, schedule, tokens, args.threads, exact=True)
        report(f"{kv} ours", exact, model, kv, schedule, tokens, args.threads)


def report(
    name: str,
    base: np.ndarray | None,
    model: Path,
    kv: str,
    schedule: Schedule,
    tokens: list[int],
    threads: int,
    **options: bool,
) -> np.ndarray:
    """Measure one contender, print its line, and return its losses."""
    started = time.perf_counter()
    found = losses(model, kv, schedule, tokens, threads, **options)
    seconds = time.perf_counter() - started
    per_token = found - (found if base is None else base)
    error = per_token.std() / math.sqrt(len(per_token))
    shown = f"{math.expm1(per_token.mean()):+.3%} ± {error:.3%}" if per_token.any() else ""
    print(f"{name:34}{np.exp(found.mean()):12.4f}{shown:>22}{seconds:10.0f}", flush=True)
    return found


if __name__ == "__main__":
    main()
