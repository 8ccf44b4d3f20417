"""The types of tensors that ggml stores: names, and how many numbers a block of each holds in how many bytes.

gguf's table, and where llama.cpp (as of llama-cpp-python 0.3.36) is ahead of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf import GGML_QUANT_SIZES

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    **{int(kind): (kind.name, block, size) for kind, (block, size) in GGML_QUANT_SIZES.items()},
    9: ("Q8_1", 32, 2 + 2 + 32),  # gguf has the size of long ago
    42: ("Q2_0", 64, 2 + 16),
}
"""Name, numbers per block and bytes per block of each type, by ggml's number."""


def type_name(kind: int) -> str:
    """ggml's name for a type, such as Q4_K."""
    return TENSOR_TYPES[kind][0] if kind in TENSOR_TYPES else f"type {kind}"
