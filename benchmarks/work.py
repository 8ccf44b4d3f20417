"""What a model has to do for a token: the arithmetic of reading, the memory that writing reads."""

from __future__ import annotations

from pathlib import Path

from ropewalk.container import Header, read_header


def flop_of_reading(path: Path, n_tokens: int) -> float:
    """The FLOP of reading `n_tokens` from the start: the layers' weights, and attention over what each token sees."""
    header = read_header(path)
    weights = sum(t.shape[0] * t.shape[1] for t in header.tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    heads = header.get(f"{header.arch}.attention.head_count")
    size = header.get(f"{header.arch}.attention.key_length", header.get(f"{header.arch}.embedding_length") // heads)
    seen = n_tokens * (n_tokens + 1) / 2
    return 2 * weights * n_tokens + 4 * seen * heads * size * header.get(f"{header.arch}.block_count")


def bytes_of_writing(path: Path, depth: int, kv: str) -> int:
    """The bytes that writing one token after `depth` others reads: all weights, and the cells of the cache."""
    from ropewalk.runtime import plan_memory

    header = read_header(path)
    return _weights_read(header) + plan_memory(header, max(depth, 1), kv).cache_bytes


def _weights_read(header: Header) -> int:
    """The bytes of all tensors; of the embedding only where the output has no matrix of its own and reads that."""
    untied = any(tensor.name == "output.weight" for tensor in header.tensors)
    return sum(t.n_bytes for t in header.tensors if not (untied and t.name == "token_embd.weight"))
