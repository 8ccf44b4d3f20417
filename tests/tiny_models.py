"""Tiny models for tests: real GGUF files that stock llama.cpp loads, with weights from a fixed seed.

The fixture `tiny_llama` (in conftest.py) returns the function of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PIECES = ["▁", *"etaoinshrdlucmfwypvbgkjqxz", "▁t", "he", "▁the", "in", "er", "an", "▁a", ".", ","]
"""The tiny tokeniser's tokens besides single bytes."""


def tiny_llama(
    path: str | Path,
    *,
    arch: str = "llama",
    context_length: int = 256,
    freq_base: float | None = 10000.0,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 2,
    n_head_kv: int = 1,
    rope_freqs: Sequence[float] | None = None,
    long_factors: Sequence[float] | None = None,
    short_factors: Sequence[float] | None = None,
    scaling: dict[str, Any] | None = None,
    dtype: type[np.generic] = np.float32,
    seed: int = 0,
    extend: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write a tiny model to `path` and return it.

    With `arch` llama or qwen2 the file has all the tensors that the loader needs; with any other it has llama's, for
    tests that do not load it. `scaling` holds values for keys after `{arch}.rope.scaling.` (str, bool, int, or float),
    `extend` may add more keys and tensors. The rotary dimensions are a whole head: ``n_embd / n_head``.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(context_length)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(2 * n_embd)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    if freq_base is not None:
        writer.add_rope_freq_base(freq_base)
    for name, value in (scaling or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{arch}.rope.scaling.{name}", value)
    n_vocab = _add_tokenizer(writer)
    _add_weights(writer, arch, n_layer, n_embd, n_head, n_head_kv, n_vocab, dtype, seed)
    for name, factors in (
        ("rope_freqs", rope_freqs),
        ("rope_factors_long", long_factors),
        ("rope_factors_short", short_factors),
    ):
        if factors is not None:
            writer.add_tensor(f"{name}.weight", np.array(factors, dtype=np.float32))
    if extend is not None:
        extend(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _add_tokenizer(writer: gguf.GGUFWriter) -> int:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(PIECES)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(PIECES))])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_vocab_size(len(tokens))
    return len(tokens)


def _add_weights(
    writer: gguf.GGUFWriter,
    arch: str,
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_head_kv: int,
    n_vocab: int,
    dtype: type[np.generic],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)

    def add(name: str, n_out: int, n_in: int) -> None:
        # Queries and keys are larger than in a usual initialisation, so that attention, and hence position, matters.
        scale = (4.0 if "attn_q" in name or "attn_k" in name else 1.0) / n_in**0.5
        writer.add_tensor(name, (rng.standard_normal((n_out, n_in)) * scale).astype(dtype))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(n_embd, dtype=np.float32))

    n_kv = n_embd // n_head * n_head_kv
    add("token_embd.weight", n_vocab, n_embd)
    for i in range(n_layer):
        ones(f"blk.{i}.attn_norm.weight")
        for name, n_out in (("attn_q", n_embd), ("attn_k", n_kv), ("attn_v", n_kv)):
            add(f"blk.{i}.{name}.weight", n_out, n_embd)
            if arch == "qwen2":
                writer.add_tensor(f"blk.{i}.{name}.bias", rng.standard_normal(n_out).astype(np.float32) * 0.1)
        add(f"blk.{i}.attn_output.weight", n_embd, n_embd)
        ones(f"blk.{i}.ffn_norm.weight")
        add(f"blk.{i}.ffn_gate.weight", 2 * n_embd, n_embd)
        add(f"blk.{i}.ffn_up.weight", 2 * n_embd, n_embd)
        add(f"blk.{i}.ffn_down.weight", n_embd, 2 * n_embd)
    ones("output_norm.weight")
    add("output.weight", n_vocab, n_embd)
