"""Speed of generation with and without the rope callback: one process, interleaved, with the ratio of each pair.

    python benchmarks/decode.py [--model FILE.gguf] [--prompt 512] [--tokens 32] [--rounds 15]

Both have the same file and settings, in the short band, where the callback leaves the numbers unchanged.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import llama_cpp
import ropewalk
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import extend


def seconds_to_generate(llm: llama_cpp.Llama, n_tokens: int) -> float:
    started = time.perf_counter()
    for _ in range(n_tokens):
        llm.eval([llm.sample(temp=0)])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    n_ctx = args.prompt + args.tokens * (args.rounds + 1)
    options = {"n_ctx": n_ctx, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
    with_callback = ropewalk.Llama(model, schedule=extend(native, 2 * native.context), **options)
    without = llama_cpp.Llama(str(model), **options)
    prompt = with_callback.tokenize(text(None)[: 8 * args.prompt].encode())[: args.prompt]
    for llm in (with_callback, without):
        llm.eval(prompt)
        llm._sampler = llm._init_sampler(temp=0.0)
        seconds_to_generate(llm, args.tokens)
    ratios, speeds = [], []
    for i in range(args.rounds):
        pair = (with_callback, without) if i % 2 else (without, with_callback)
        spent = {llm: seconds_to_generate(llm, args.tokens) for llm in pair}
        ratios.append(spent[without] / spent[with_callback])
        speeds.append((args.tokens / spent[with_callback], args.tokens / spent[without]))
    print(f"{'':12}{'with':>10}{'without':>10}{'ratio':>8}")
    for name, pick in (("min", min), ("median", statistics.median), ("max", max)):
        ours, theirs = (pick(column) for column in zip(*speeds, strict=True))
        print(f"{name:12}{ours:8.1f}/s{theirs:8.1f}/s{pick(ratios):8.3f}")


if __name__ == "__main__":
    main()
