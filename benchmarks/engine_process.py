"""One measurement of an engine that runs from Python, in this process alone; `contenders.py` calls it.

    python benchmarks/engine_process.py JOB

JOB is a JSON object with the fields of a `Task` and an `Engine` (contenders.py), and perhaps the path of a `state` to
load first, or to `save`. Printed: the seconds that its tokens took. The tokens are random, and always the same.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from typing import Any

import llama_cpp

WARM_UP = 64  # tokens that are read first: enough rows for what is computed only for many


def load(job: dict[str, Any], n_ctx: int) -> llama_cpp.Llama:
    """The model, with a context of `n_ctx`; Ropewalk runs in one band that is long enough for it."""
    options = {"n_ctx": n_ctx, "n_threads": job["threads"], "n_threads_batch": job["threads"], "verbose": False}
    options["flash_attn"] = job["flash_attn"]
    if job["package"] == "llama_cpp":
        type_k, type_v = (getattr(llama_cpp, f"GGML_TYPE_{job['kv'].split(':')[i].upper()}") for i in (0, -1))
        return llama_cpp.Llama(job["model"], type_k=type_k, type_v=type_v, **options)
    import ropewalk
    from ropewalk.container import native_schedule, read_header
    from ropewalk.factors import extend

    native = native_schedule(read_header(job["model"]))
    length = max(n_ctx, 2 * native.context)
    schedule = native if n_ctx <= native.context else extend(native, length, contexts=[length]).only(-1)
    return ropewalk.Llama(job["model"], kv=job["kv"], schedule=schedule, **options)


def load_state(llm: llama_cpp.Llama, path: str, tokens: list[int]) -> None:
    room = (llama_cpp.llama_token * len(tokens))()
    count = ctypes.c_size_t()
    llama_cpp.llama_state_seq_load_file(llm.ctx, path.encode(), 0, room, len(tokens), ctypes.byref(count))
    if list(room) != tokens:
        raise SystemExit(f"{path}: {count.value} tokens, expected the {len(tokens)} of this measurement")
    llm.input_ids[: len(tokens)] = tokens
    llm.n_tokens = len(tokens)


def save_state(llm: llama_cpp.Llama, path: str, tokens: list[int]) -> None:
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if not llama_cpp.llama_state_seq_save_file(llm.ctx, path.encode(), 0, array, len(tokens)):
        raise SystemExit(f"{path}: the state could not be saved")


def seconds(llm: llama_cpp.Llama, batches: list[list[int]]) -> float:
    started = time.perf_counter()
    for batch in batches:
        llm.eval(batch)
    return time.perf_counter() - started


def main() -> None:
    job = json.loads(sys.argv[1])
    warm_up = 4 if job["kind"] == "write" else 0
    llm = load(job, max(job["depth"] + warm_up + job["count"], WARM_UP))
    draw = random.Random(0)
    tokens = [draw.randrange(llm.n_vocab()) for _ in range(max(llm.n_ctx(), WARM_UP))]
    before, after = tokens[: job["depth"]], tokens[job["depth"] :]
    if job["kind"] == "read":
        llm.eval(tokens[:WARM_UP])
        llm.reset()
    if job.get("state"):
        load_state(llm, job["state"], before)
    if job["kind"] == "write":
        seconds(llm, [[token] for token in after[:warm_up]])
        print(seconds(llm, [[token] for token in after[warm_up : warm_up + job["count"]]]))
    else:
        print(seconds(llm, [after[: job["count"]]]))
    if job.get("save"):
        save_state(llm, job["save"], tokens[: job["depth"] + job["count"]])


if __name__ == "__main__":
    main()
