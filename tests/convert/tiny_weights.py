"""Random weights of tiny checkpoints: the same bytes on every machine and with every version of every library.

Names and shapes are those of transformers' classes. Numbers come from PCG64's raw stream, which numpy promises not to
change, through operations that are exact in float64; `safetensors` files are written by hand.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Iterator[tuple[str, tuple[int, ...]]]
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def weight_shapes(config: dict[str, Any], fused_experts: bool = False) -> Shapes:
    """Every parameter of the model that `config` describes; `fused_experts` stores experts as transformers 5 does."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        parts = (_attention(config), _norms(config), _feed_forward(config, fused_experts))
        for name, shape in (pair for part in parts for pair in part):
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", True):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _attention(config: dict[str, Any]) -> Shapes:
    arch, hidden, heads = config["architectures"][0], config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    n_q, n_kv = heads * size, config.get("num_key_value_heads", heads) * size
    if arch.startswith("Phi3"):
        yield "self_attn.qkv_proj.weight", (n_q + 2 * n_kv, hidden)
    else:
        for letter, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            yield f"self_attn.{letter}_proj.weight", (n, hidden)
            if config.get("attention_bias") or arch.startswith("Qwen2"):
                yield f"self_attn.{letter}_proj.bias", (n,)
    yield "self_attn.o_proj.weight", (hidden, n_q)
    if config.get("attention_bias"):
        yield "self_attn.o_proj.bias", (hidden,)
    if arch.startswith(("Qwen3", "Gemma3")):
        yield "self_attn.q_norm.weight", (size,)
        yield "self_attn.k_norm.weight", (size,)


def _norms(config: dict[str, Any]) -> Shapes:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config["architectures"][0].startswith("Gemma"):
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        yield f"{name}.weight", (config["hidden_size"],)


def _feed_forward(config: dict[str, Any], fused_experts: bool) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if "num_local_experts" in config:
        experts = config["num_local_experts"]
        yield "block_sparse_moe.gate.weight", (experts, hidden)
        for j in range(experts):
            yield f"block_sparse_moe.experts.{j}.w1.weight", (inner, hidden)
            yield f"block_sparse_moe.experts.{j}.w2.weight", (hidden, inner)
            yield f"block_sparse_moe.experts.{j}.w3.weight", (inner, hidden)
    elif "num_experts" in config:
        experts, inner = config["num_experts"], config["moe_intermediate_size"]
        yield "mlp.gate.weight", (experts, hidden)
        if fused_experts:
            yield "mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
            yield "mlp.experts.down_proj", (experts, hidden, inner)
        for j in range(0 if fused_experts else experts):
            yield f"mlp.experts.{j}.gate_proj.weight", (inner, hidden)
            yield f"mlp.experts.{j}.up_proj.weight", (inner, hidden)
            yield f"mlp.experts.{j}.down_proj.weight", (hidden, inner)
    elif config["architectures"][0].startswith("Phi3"):
        yield "mlp.gate_up_proj.weight", (2 * inner, hidden)
        yield "mlp.down_proj.weight", (hidden, inner)
    else:
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"mlp.{name}_proj.weight", shape
            if config.get("mlp_bias"):
                yield f"mlp.{name}_proj.bias", shape[:1]


def random_weight(name: str, shape: tuple[int, ...], dtype: str, seed: str, norm: float = 1.0) -> np.ndarray:
    """The numbers of a weight in `dtype`, as safetensors calls it (BF16 as 16-bit integers); norms are around `norm`.

    They are scaled so that activations and logits are of order 1, and that attention, and so position, matters.
    """
    lanes = np.random.PCG64(zlib.crc32(f"{seed} {name}".encode())).random_raw(int(np.prod(shape))).astype("<u8")
    bell = (
        lanes.view("<u2").reshape(-1, 4).astype(np.int64).sum(axis=1) - 2 * 65535
    )  # a standard deviation of about 1.15 · 2¹⁵
    values = bell.reshape(shape).astype(np.float64) * 2.0 ** -(15 + _fineness(name, shape))
    if "norm" in name:
        values += norm
    elif "_proj" in name and len(shape) > 1:
        # A row of zeros, and one of numbers that are subnormal in float16, to test the quantisers.
        values[..., 0, :] = 0
        values[..., 1, :] *= 2.0**-14
    single = values.astype("<f4")
    return (single.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else single.astype(NUMPY[dtype])


def _fineness(name: str, shape: tuple[int, ...]) -> int:
    """The power of two by which numbers are scaled down."""
    if len(shape) == 1:
        return 3
    if "embed" in name or "lm_head" in name:
        return 2
    half = shape[-1].bit_length() // 2
    return half - 1 if "q_proj" in name or "k_proj" in name or "qkv" in name else half


def write_safetensors(path: Path, weights: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write {name: (dtype, numbers)}."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, values) in weights.items():
        head[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    data = b"".join(values.tobytes() for _, values in weights.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_bin(path: Path, weights: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write the same with torch; with another version of torch the contents are equal, but not the bytes."""
    import torch

    def tensor(dtype: str, values: np.ndarray) -> torch.Tensor:
        plain = torch.from_numpy(values.view("<i2") if dtype == "BF16" else values)
        return plain.view(torch.bfloat16) if dtype == "BF16" else plain

    torch.save({name: tensor(*weight) for name, weight in weights.items()}, path)
