"""Whether the fast path is correct: perplexity of a long text, ours and stock llama-cpp-python, by cache type.

    python benchmarks/perplexity.py [--model FILE.gguf] [--text FILE] [--kv f16,q8_0,q4_0] [--context 16384]
                                    [--threads 2]

Each contender reads the same tokens in the smallest band that holds them. The difference is that of the mean losses, as
a percentage of perplexity, with its standard error from the differences of single tokens. Stock takes a quarter to half
an hour to read 16,384 tokens with a q8_0 or q4_0 cache.
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
    print(f"{'':34}{'perplexity':>12}{'compared with stock':>22}{'seconds':>10}")
    for kv in args.kv.split(","):
        kinds = {"stock, flash attention": {"fast_prefill": False, "flash_attn": True}}
        if kv in ("f32", "f16", "bf16"):
            kinds = {"stock, plain attention": {"fast_prefill": False, "flash_attn": False}, **kinds}
        base = None
        for name, options in {**kinds, "ours": {"flash_attn": True}}.items():
            started = time.perf_counter()
            found = losses(model, kv, schedule, tokens, args.threads, **options)
            seconds = time.perf_counter() - started
            base = found if base is None else base
            per_token = found - base
            difference = math.expm1(per_token.mean())
            error = per_token.std() / math.sqrt(len(per_token))
            shown = f"{difference:+.3%} ± {error:.3%}" if per_token.any() else ""
            print(f"{kv + ' ' + name:34}{np.exp(found.mean()):12.4f}{shown:>22}{seconds:10.0f}", flush=True)


if __name__ == "__main__":
    main()
