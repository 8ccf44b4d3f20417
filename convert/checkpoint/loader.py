"""The tensors that llama.cpp's loader takes for each architecture (its src/models/*.cpp, `load_arch_tensors`).

The loader refuses a file with a tensor missing, left over, or of another shape, so all of that is checked before a file
is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gguf import MODEL_ARCH, get_tensor_name_map

from .architectures import Architecture, head_dim, heads_kv
from .config import Config

HIDDEN_WIDE_QUERIES = (MODEL_ARCH.QWEN2, MODEL_ARCH.PHI3)
"""Architectures whose queries are as wide as the model, whatever the config's head_dim says."""

WITH_ALL_BIASES = (MODEL_ARCH.LLAMA, MODEL_ARCH.MINICPM)
"""Architectures with optional biases in attention's output and the feed-forward part; all take those of q, k and v."""

WITH_HEAD_NORMS = (MODEL_ARCH.QWEN3, MODEL_ARCH.QWEN3MOE, MODEL_ARCH.GEMMA3)
WITH_POST_NORMS = (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3)


@dataclass(frozen=True)
class Slot:
    """A place for a tensor.

    Attributes:
        usual: its name in transformers, where ``*`` stands for the number of a layer.
        shape: its shape, in torch's order.
        required: whether a model without it would not load, or not be what its config says.
    """

    usual: str
    shape: tuple[int, ...]
    required: bool = True


def loader_slots(entry: Architecture, config: Config, n_tokens: int) -> dict[str, Slot]:
    """Return the places for tensors by their names in GGUF, where ``blk.*`` stands for every layer.

    Args:
        n_tokens: the number of tokens in the vocabulary, which is the number of rows of the embedding.

    Raises:
        UserError: a size is missing in the config, or not a positive whole number.
    """
    arch, hidden = entry.arch, config.count("hidden_size")
    slots = [
        Slot("model.embed_tokens.weight", (n_tokens, hidden)),
        Slot("model.norm.weight", (hidden,)),
    ]
    if arch != MODEL_ARCH.GEMMA2:  # whose output is the embedding
        tied = config.get("tie_word_embeddings") is not False
        slots.append(Slot("lm_head.weight", (n_tokens, hidden), required=not tied))
    if arch == MODEL_ARCH.QWEN2:
        slots.append(Slot("lm_head.bias", (n_tokens,), required=False))
    slots += [*_attention(arch, config, hidden), *_feed_forward(entry, config, hidden)]
    names = get_tensor_name_map(arch, 1)
    found = {}
    for slot in slots:
        name = names.get_name(slot.usual.replace(".*.", ".0."), try_suffixes=(".weight", ".bias"))
        assert name is not None, slot.usual
        found[name.replace("blk.0.", "blk.*.")] = slot
    return found


def _attention(arch: MODEL_ARCH, config: Config, hidden: int) -> Iterator[Slot]:
    heads = config.count("num_attention_heads")
    size = hidden // heads if arch == MODEL_ARCH.PHI3 else head_dim(config)
    n_q = hidden if arch in HIDDEN_WIDE_QUERIES else heads * size
    n_kv = heads_kv(config) * size
    biased = arch != MODEL_ARCH.PHI3 and config.get("attention_bias") is True
    at = "model.layers.*."
    yield Slot(f"{at}input_layernorm.weight", (hidden,))
    widths = {"qkv": n_q + 2 * n_kv} if arch == MODEL_ARCH.PHI3 else {"q": n_q, "k": n_kv, "v": n_kv}
    for letter, width in widths.items():
        yield Slot(f"{at}self_attn.{letter}_proj.weight", (width, hidden))
        yield Slot(f"{at}self_attn.{letter}_proj.bias", (width,), required=biased or arch == MODEL_ARCH.QWEN2)
    yield Slot(f"{at}self_attn.o_proj.weight", (hidden, n_q))
    if arch in WITH_ALL_BIASES:
        yield Slot(f"{at}self_attn.o_proj.bias", (hidden,), required=biased)
    if arch in WITH_HEAD_NORMS:
        yield Slot(f"{at}self_attn.q_norm.weight", (size,))
        yield Slot(f"{at}self_attn.k_norm.weight", (size,))


def _feed_forward(entry: Architecture, config: Config, hidden: int) -> Iterator[Slot]:
    arch, inner, at = entry.arch, config.count("intermediate_size"), "model.layers.*."
    yield Slot(f"{at}post_attention_layernorm.weight", (hidden,))
    if arch in WITH_POST_NORMS:
        yield Slot(f"{at}pre_feedforward_layernorm.weight", (hidden,))
        yield Slot(f"{at}post_feedforward_layernorm.weight", (hidden,))
    if entry.experts is not None:
        n = config.count(entry.experts)
        inner = config.count("moe_intermediate_size") if arch == MODEL_ARCH.QWEN3MOE else inner
        router = "mlp.gate" if arch == MODEL_ARCH.QWEN3MOE else "block_sparse_moe.gate"
        yield Slot(f"{at}{router}.weight", (n, hidden))
        yield Slot(f"{at}mlp.experts.gate_proj.weight", (n, inner, hidden))
        yield Slot(f"{at}mlp.experts.up_proj.weight", (n, inner, hidden))
        yield Slot(f"{at}mlp.experts.down_proj.weight", (n, hidden, inner))
        return
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if arch == MODEL_ARCH.PHI3:
        shapes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    for name, shape in shapes.items():
        yield Slot(f"{at}mlp.{name}_proj.weight", shape)
        if arch in WITH_ALL_BIASES:
            yield Slot(f"{at}mlp.{name}_proj.bias", shape[:1], required=config.get("mlp_bias") is True)
