"""Reading a long prompt: ours and stock llama-cpp-python, interleaved in one process, same file, same threads.

    python benchmarks/prefill.py [--model FILE.gguf] [--text FILE] [--kv q8_0] [--context 16384] [--samples 6]
                                 [--rounds 2] [--threads 2]

The time of a whole prompt is estimated from samples: at depths spread evenly over the context, each contender in turn
reads the same 512 tokens with the same cache (filled by ours, passed on as a saved state), and its best round counts.
With `--samples` equal to the context's number of 512-token blocks, all of it is read. Stock is also timed with an f16
cache. The share at the end is that of the machine's speed in f32 matrix products, measured in the same run.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import ropewalk
import torch
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import extend

BLOCK = 512


def matrix_peak(n_threads: int) -> float:
    """FLOP per second of f32 matrix products, one per thread: the best of five."""
    best = 0.0
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(5):
        threads = [threading.Thread(target=lambda: [a @ b for _ in range(20)]) for _ in range(n_threads)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, n_threads * 20 * 2 * 1024**3 / (time.perf_counter() - started))
    torch.set_num_threads(before)
    return best


def flop_of_block(path: Path, depth: int) -> float:
    """The FLOP of reading BLOCK tokens after `depth`: the layers' weights, and attention over what each token sees."""
    header = read_header(path)
    weights = sum(t.shape[0] * t.shape[1] for t in header.tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    layers = header.get(f"{header.arch}.block_count")
    seen = BLOCK * depth + BLOCK * (BLOCK + 1) / 2
    return 2 * weights * BLOCK + 4 * seen * header.get(f"{header.arch}.embedding_length") * layers


def seconds(llm: ropewalk.Llama, tokens: list[int], depth: int) -> float:
    llm.rewind(depth)
    started = time.perf_counter()
    llm.eval(tokens[depth : depth + BLOCK])
    spent = time.perf_counter() - started
    llm.rewind(depth)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="default: Python's documentation")
    parser.add_argument("--kv", default="q8_0")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    schedule = extend(native, max(args.context, 2 * native.context))
    schedule = schedule.only(schedule.band_index(args.context))
    options = {"schedule": schedule, "n_ctx": args.context, "flash_attn": True, "verbose": False}
    options |= {"n_threads": args.threads, "n_threads_batch": args.threads}
    kinds = dict.fromkeys((args.kv, "f16"))
    ours = {kv: ropewalk.Llama(model, kv=kv, **options) for kv in kinds}
    stock = {kv: ropewalk.Llama(model, kv=kv, fast_prefill=False, **options) for kv in kinds}
    tokens = ours[args.kv].tokenize(text(args.text).encode())[: args.context]
    blocks = args.context // BLOCK
    count = min(args.samples, blocks)
    depths = [BLOCK * (i * blocks // count + blocks // count // 2) for i in range(count)]
    names = [f"ours {args.kv}", *(f"stock {kv}" for kv in kinds)]
    totals = dict.fromkeys(names, 0.0)
    flop = 0.0
    print(f"{model.name}, {args.context:,} tokens, {args.threads} threads; tokens per second at each depth")
    print(f"{'depth':>8}" + "".join(f"{name:>14}" for name in names))
    for depth in depths:
        for kv in kinds:
            ours[kv].eval(tokens[ours[kv].n_tokens : depth])
            stock[kv].load_state(ours[kv].save_state())
        llms = [ours[args.kv], *stock.values()]
        best = [
            min(pair)
            for pair in zip(*[[seconds(llm, tokens, depth) for llm in llms] for _ in range(args.rounds)], strict=True)
        ]
        print(f"{depth:8,}" + "".join(f"{BLOCK / spent:14.1f}" for spent in best), flush=True)
        for name, spent in zip(names, best, strict=True):
            totals[name] += spent * blocks / count
        flop += flop_of_block(model, depth) * blocks / count
    print(f"{'all':>8}" + "".join(f"{args.context / spent:14.1f}" for spent in totals.values()))
    own = totals[names[0]]
    print("ours is " + ", ".join(f"{totals[name] / own:.2f} x {name}" for name in names[1:]))
    peak = matrix_peak(args.threads)
    print(f"ours reaches {flop / own / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f} in f32 products: {flop / own / peak:.0%}")


if __name__ == "__main__":
    main()
