"""Speed of generation after a long text, by cache type: ours and stock llama-cpp-python, interleaved in one process.

    python benchmarks/decode_long.py [--model FILE.gguf] [--text FILE] [--kv f16,q8_0:f16,q8_0,q4_0] [--depth 16384]
                                     [--tokens 8] [--rounds 3] [--threads 2] [--plain]

Each cache is filled once by ours and passed to stock as a saved state. Both use flash attention; --plain adds stock f16
without it, which has to read the text itself. The best round counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import ropewalk
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import extend


def speed(llm: ropewalk.Llama, tokens: list[int], depth: int, count: int) -> float:
    """Tokens per second, one at a time, after `depth` tokens."""
    llm.rewind(depth)
    started = time.perf_counter()
    for token in tokens[depth : depth + count]:
        llm.eval([token])
    spent = time.perf_counter() - started
    llm.rewind(depth)
    return count / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="default: Python's documentation")
    parser.add_argument("--kv", default="f16,q8_0:f16,q8_0,q4_0")
    parser.add_argument("--depth", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    n_ctx = args.depth + args.tokens
    schedule = extend(native, max(n_ctx, 2 * native.context), contexts=[max(n_ctx, 2 * native.context)]).only(-1)
    options = {"schedule": schedule, "n_ctx": n_ctx, "n_threads": args.threads, "n_threads_batch": args.threads}
    options |= {"verbose": False}
    llms: dict[str, ropewalk.Llama] = {}
    for kv in args.kv.split(","):
        ours = llms[f"{kv} ours"] = ropewalk.Llama(model, kv=kv, flash_attn=True, **options)
        stock = llms[f"{kv} stock"] = ropewalk.Llama(model, kv=kv, flash_attn=True, fast_prefill=False, **options)
        tokens = ours.tokenize(text(args.text).encode())[:n_ctx]
        ours.eval(tokens[: args.depth])
        stock.load_state(ours.save_state())
    if args.plain:
        plain = llms["f16 stock, no flash attention"] = ropewalk.Llama(model, kv="f16", flash_attn=False, **options)
        plain.eval(tokens[: args.depth])
    print(f"{model.name}, after {args.depth:,} tokens, {args.threads} threads", flush=True)
    rounds = [[speed(llm, tokens, args.depth, args.tokens) for llm in llms.values()] for _ in range(args.rounds)]
    for name, speeds in zip(llms, zip(*rounds, strict=True), strict=True):
        print(f"{name:32}{max(speeds):8.1f} tokens/s")


if __name__ == "__main__":
    main()
