"""How fast our kernels and llama.cpp's for repacked weights are with one type of weights: run in its own process.

A random model of two layers, as wide as one of a milliard parameters, is loaded both ways. Both read a prompt and write
a few tokens in turn, and the best of each counts. What is measured is processor time, of all threads together: next to
busy neighbours, the clock on the wall says nothing. `repacking` runs this and remembers what it prints.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from ..container import TENSOR_TYPES, TYPE_NUMBERS
from .graph import ggml
from .graph.admission import check_engine, trust
from .llama import Llama
from .self_test import N_VOCAB, write_vocabulary

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, HEAD, N_FF = 2, 2048, 32, 8, 64, 5632
POOL_ROWS = 16  # rows of each weight that differ: quantising more would take long, and changes no speed

READ = 256  # tokens
ENOUGH_S = 0.6  # for reading, and for writing


def main(folder: str, kind: str, n_threads: int, n_threads_batch: int) -> None:
    """Measure with weights of a type ("Q4_K"); the last line printed is JSON: `Comparison`'s figures."""
    path = Path(folder) / "random.gguf"
    _write_model(path, TYPE_NUMBERS[kind])
    engine = check_engine()
    models = []
    for repacked in (True, False):
        trust(replace(engine, extra_buffers=repacked))
        models.append(_load(path, n_threads, n_threads_batch))
    path.unlink()  # the models keep it; nothing is left behind if this process is killed
    tokens = [int(token) for token in np.random.default_rng(1).integers(3, N_VOCAB, READ)]
    before = [llm.nodes_taken for llm in models]
    for llm in models:
        llm.eval(tokens[:32])  # weights and buffers are in memory from now on
    theirs, ours = (llm.nodes_taken - n for llm, n in zip(models, before, strict=True))
    if ours <= theirs:  # our kernels multiplied the same weights in both
        print(json.dumps({"repacked": False}))
        return
    print(json.dumps({"reading": _reading(models, tokens), "writing": _writing(models, tokens[0])}))


def _load(path: Path, n_threads: int, n_threads_batch: int) -> Llama:
    return Llama(
        path,
        n_ctx=512,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        flash_attn=True,
        exact=False,
        verbose=False,
    )


def _reading(models: Sequence[Llama], tokens: list[int]) -> float:
    """How many times as long the first model takes for the prompt as the second."""

    def read(llm: Llama) -> None:
        llm.reset()
        llm.eval(tokens)

    return _ratio(models, read, rounds=(2, 5))


def _writing(models: Sequence[Llama], token: int) -> float:
    """How many times as long the first model takes for a token; each throws the other's weights out of the cache."""
    return _ratio(models, lambda llm: llm.eval([token]), rounds=(12, 48))


def _ratio(models: Sequence[Llama], work: Callable[[Llama], None], rounds: tuple[int, int]) -> float:
    """The first model's least seconds for `work` over the second's, of as many rounds as there is time for."""
    best, (least, most), start = [math.inf] * len(models), rounds, time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > ENOUGH_S:
            break
        for i, llm in enumerate(models):
            before = time.process_time()
            work(llm)
            best[i] = min(best[i], time.process_time() - before)
    return best[0] / best[1]


def _write_model(path: Path, kind: int) -> None:
    """Write a GGUF file whose layers' weights are of ggml's type number `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    write_vocabulary(writer)
    rng = np.random.default_rng(0)
    for name, rows in (("token_embd", N_VOCAB), ("output", N_VOCAB)):
        writer.add_tensor(f"{name}.weight", rng.standard_normal((rows, N_EMBD), np.float32))
    norms = ["output_norm", *(f"blk.{i}.{part}_norm" for i in range(N_LAYER) for part in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))
    shapes = {"attn_q": (N_HEAD * HEAD, N_EMBD), "attn_output": (N_EMBD, N_HEAD * HEAD)}
    shapes |= {"attn_k": (N_HEAD_KV * HEAD, N_EMBD), "attn_v": (N_HEAD_KV * HEAD, N_EMBD)}
    shapes |= {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
    for part, (n_out, n_in) in shapes.items():
        blocks = _random_blocks(rng, kind, n_out, n_in)
        for i in range(N_LAYER):
            writer.add_tensor(f"blk.{i}.{part}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(rng: np.random.Generator, kind: int, n_out: int, n_in: int) -> npt.NDArray[np.uint8]:
    """A weight of `n_out` rows, as bytes of shape ``(n_out, bytes of a row)``."""
    pool = ggml.quantise(kind, rng.standard_normal((POOL_ROWS, n_in), np.float32) / np.float32(np.sqrt(n_in)))
    _, block, block_bytes = TENSOR_TYPES[kind]
    return np.resize(pool, (n_out, n_in // block * block_bytes))
