"""Speed-up of a search by a second worker: candidates per hour with one process and with several, interleaved.

    python benchmarks/search_workers.py [--model FILE.gguf] [--text FILE] [--context 4096] [--workers 2]
                                        [--candidates 4] [--rounds 2]

Each worker has one thread; for comparison, one worker has as many threads as there are workers. The best round counts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import ropewalk
from models import bundled_model, text
from ropewalk.container import native_schedule, read_header
from ropewalk.factors.search import Processes, Space, Task
from ropewalk.runtime.measure.evaluators import EvaluatorRecipe
from ropewalk.runtime.measure.evaluators.spec import EvaluatorSpec
from ropewalk.runtime.measure.passages import Text, make_passages


def seconds(engine: Processes, tasks: list[Task]) -> float:
    started = time.perf_counter()
    assert len(list(engine.run(tasks))) == len(tasks)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="default: Python's documentation")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    vocab = ropewalk.Llama(model, n_ctx=1, vocab_only=True, verbose=False)
    texts = [Text("text", text(args.text))]
    passages = make_passages(vocab, texts, args.context, 1, "all", native.context, 0)
    space = Space(native.facts, native.bands[-1], 2 * native.context)
    yarn = space.seed("yarn")
    bands = [space.band(replace(yarn, start_tokens=n)) for n in space.start_token_choices[: args.candidates]]
    spec = EvaluatorSpec(str(model), passages, bands[0])
    kinds = [(1, 1), (args.workers, 1), (1, args.workers)]
    engines = {kind: Processes(EvaluatorRecipe(replace(spec, threads=kind[1])), kind[0]) for kind in kinds}
    best = dict.fromkeys(engines, float("inf"))
    for engine in engines.values():  # load, and warm up
        seconds(engine, [Task(bands[0], 0)] * args.workers)
    for _ in range(args.rounds):
        for kind, engine in engines.items():
            best[kind] = min(best[kind], seconds(engine, [Task(band, 0) for band in bands]))
    print(f"{model.name}, {args.context:,} tokens per candidate")
    for (workers, threads), spent in best.items():
        rate, times = len(bands) / spent * 3600, best[1, 1] / spent
        print(f"{workers} workers, {threads} threads each: {rate:8,.1f} candidates per hour, {times:5.2f} x")
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
