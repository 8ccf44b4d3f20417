"""The memory that a model needs, before it is loaded: weights, KV cache and compute buffers, against what is free.

`plan_memory` computes; `choose_kv` takes the most exact cache type that fits and refuses, with the numbers, what does
not fit at all. The sizes follow llama.cpp's allocations on a CPU; compute buffers are estimated from above.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..container import TENSOR_TYPES, TYPE_NUMBERS, GGUFError, Header, model_parts
from ..errors import UserError, mib
from .free_memory import available_memory
from .graph.kernels import why_missing
from .threads import default_threads

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")
"""Cache types; `K:V` names one each for K and V, a single name is for both."""

AUTO_ORDER = ("f16", "q8_0:f16", "q8_0", "q4_0")
"""The cache types that `auto` tries, most exact first."""

TORCH_BYTES = 40 << 20
"""Memory for nodes that are computed in torch: dequantised cells and weights, and its own buffers."""

KERNELS_BYTES, THREAD_BYTES = 16 << 20, 3 << 20
"""The same for the native kernels: results of cells that are to be joined, and what each thread works in."""

CELL_PADDING = 256  # llama.cpp rounds the cache's cells up to this


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model takes with `n_ctx` tokens of context and a cache of `kv_type`."""

    n_ctx: int
    kv_type: str
    flash_attn: bool
    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.compute_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes

    @property
    def type_k(self) -> str:
        return self.kv_type.split(":")[0]

    @property
    def type_v(self) -> str:
        return self.kv_type.split(":")[-1]


def ggml_type(name: str) -> int:
    """Return ggml's number for the cache type `name`."""
    return TYPE_NUMBERS[name.upper()]


def type_name(option: str, number: Any) -> str:
    """Return the cache type, of `KV_TYPES`, that is ggml's `number`; None is f16, as in llama_cpp.

    Raises:
        UserError: there is none; names the `option`.
    """
    numbers = {ggml_type(name): name for name in KV_TYPES}
    try:
        return numbers[1 if number is None else operator.index(number)]
    except (TypeError, KeyError):
        expected = ", ".join(f"{number} ({name})" for number, name in sorted(numbers.items()))
        raise UserError(f"{option}: {number!r}, expected ggml's number of a cache type: {expected}") from None


def is_quantised(name: str) -> bool:
    return name not in ("f32", "f16", "bf16")


def _row_bytes(name: str, n: int) -> int:
    _, block, size = TENSOR_TYPES[ggml_type(name)]
    return int(-(-n // block) * size)


def check_kv_type(kv: str) -> str:
    """Return `kv` if it names a cache type, shortened where K and V have the same.

    Raises:
        UserError: it does not.
    """
    parts = kv.split(":") if isinstance(kv, str) else []
    if kv != "auto" and (not 1 <= len(parts) <= 2 or any(part not in KV_TYPES for part in parts)):
        raise UserError(f"kv: {kv!r}, expected auto, one of {', '.join(KV_TYPES)}, or two of them as K:V")
    return kv if len(set(parts)) != 1 else parts[0]


@dataclass(frozen=True)
class _Sizes:
    """The sizes that memory depends on; `k_heads` has one number per layer, as layers may differ."""

    n_head: int
    k_heads: tuple[int, ...]
    key_length: int
    value_length: int
    n_embd: int
    n_ff: int
    n_vocab: int
    weights_bytes: int


MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_COUNT = 1 << 24  # of heads, of dimensions: far more than any model has


def counts(
    header: Header, key: str, default: Sequence[int], least: int, most: int = MAX_COUNT, *, per_layer: bool = False
) -> tuple[int, ...]:
    """Return the whole numbers under a key of the architecture: one, or with `per_layer` perhaps one for each layer.

    Raises:
        GGUFError: it is anything else, or outside `least` to `most`; names the key and what was found.
    """
    name = f"{header.arch}.{key}"
    entry = header.entries.get(name)
    if entry is None:
        return tuple(default)
    if entry.item_type is None:
        numbers = [header.get(name)]
    else:
        n_layer = counts(header, "block_count", (0,), 0, MAX_LAYERS)[0] if per_layer else 0
        if not n_layer or entry.count != n_layer:
            expected = f"one number, or one for each of {n_layer} layers" if per_layer else "one number"
            raise GGUFError(f"{header.path}: {name}: a list of {entry.count:,}, expected {expected}")
        numbers = header.array(name)
    for number in numbers:
        if type(number) is not int or not least <= number <= most:
            raise GGUFError(f"{header.path}: {name}: {number!r:.80}, expected a whole number from {least} to {most}")
    return tuple(numbers)


def _shape(header: Header) -> _Sizes:
    (n_layer,) = counts(header, "block_count", (0,), 0, MAX_LAYERS)
    heads = counts(header, "attention.head_count", (1,), 0, per_layer=True)
    kv_heads = counts(header, "attention.head_count_kv", heads, 0, per_layer=True)
    if len(kv_heads) == 1:
        kv_heads *= n_layer
    (n_embd,) = counts(header, "embedding_length", (0,), 0)
    usual = n_embd // max(*heads, 1, 1)
    (key_length,) = counts(header, "attention.key_length", (usual,), 0)
    tokens = header.entries.get("tokenizer.ggml.tokens")
    tensors = [tensor for part in model_parts(header) for tensor in part.tensors]
    embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
    return _Sizes(
        n_head=max(heads),
        k_heads=kv_heads,
        key_length=key_length,
        value_length=counts(header, "attention.value_length", (usual,), 0)[0],
        n_embd=n_embd,
        n_ff=max(counts(header, "feed_forward_length", (4 * n_embd,), 0, 1 << 26, per_layer=True)),
        n_vocab=tokens.count if tokens else (embedding.shape[-1] if embedding and embedding.shape else 0),
        weights_bytes=sum(tensor.n_bytes for tensor in tensors),
    )


def head_size(header: Header) -> int:
    """Return the dimensions of one attention head's key."""
    return _shape(header).key_length


def value_size(header: Header) -> int:
    """Return the dimensions of one attention head's value."""
    return _shape(header).value_length


def plan_memory(
    header: Header,
    n_ctx: int,
    kv: str,
    *,
    flash_attn: bool | None = None,
    fast_prefill: bool = False,
    n_batch: int = 512,
    n_ubatch: int = 512,
    logits_all: bool = False,
    bands: int = 1,
    near_windows: bool = False,
    n_threads: int | None = None,
    available: int | None = None,
) -> MemoryPlan:
    """Return the plan for `n_ctx` tokens with cache type `kv` (not "auto").

    `flash_attn` None means: on where V is quantised, which llama.cpp requires, and with `fast_prefill`, which computes
    flash-attention nodes alone: with the kernels for all types but f32, in torch where K is quantised. More than one of
    `bands` adds the buffer in which quantised keys are rotated, `near_windows` what their positions take. `n_threads`
    None means the default. `available` replaces the machine's own figure.
    """
    kv = check_kv_type(kv)
    type_k, type_v = kv.split(":")[0], kv.split(":")[-1]
    shape = _shape(header)
    cells = -(-n_ctx // CELL_PADDING) * CELL_PADDING
    n_ubatch = min(n_ubatch, n_batch, n_ctx)
    cache = sum(
        cells * (_row_bytes(type_k, heads * shape.key_length) + _row_bytes(type_v, heads * shape.value_length))
        for heads in shape.k_heads
    )
    if flash_attn is None:
        kernels = not why_missing() and "f32" not in (type_k, type_v)  # these are cast to f16 for flash attention
        flash_attn = is_quantised(type_v) or (fast_prefill and (is_quantised(type_k) or kernels))
    rows = 4 * n_ubatch  # bytes of one float per row of a micro-batch
    scores = rows * cells * (1.5 if flash_attn else shape.n_head + 1)
    states = rows * (3 * shape.n_ff + 4 * shape.n_embd + 3 * shape.n_head * max(shape.key_length, shape.value_length))
    outputs = rows * (shape.n_vocab + 8 * shape.n_embd)
    rotated = 12 * cells * max(shape.k_heads, default=0) * shape.key_length if bands > 1 and is_quantised(type_k) else 0
    logits = 4 * shape.n_vocab * (n_ctx + n_batch if logits_all else 1)
    fast = _fast_bytes(shape, rows, n_threads) if flash_attn and fast_prefill else 0
    fast += 4 * cells * (shape.key_length + 1) if near_windows else 0
    return MemoryPlan(
        n_ctx=n_ctx,
        kv_type=kv,
        flash_attn=flash_attn,
        weights_bytes=shape.weights_bytes,
        cache_bytes=cache,
        compute_bytes=int(1.05 * max(scores + states, outputs, rotated)) + logits + fast,
        available_bytes=available_memory() if available is None else available,
    )


def _fast_bytes(shape: _Sizes, rows: int, n_threads: int | None) -> int:
    """Bytes for nodes that are computed here; `rows` is the bytes of one float per row of a micro-batch."""
    if why_missing():
        return TORCH_BYTES
    converted = rows * max(shape.n_ff, shape.n_embd, shape.n_head * shape.value_length)
    return KERNELS_BYTES + THREAD_BYTES * (n_threads or default_threads()) + converted


def choose_kv(header: Header, n_ctx: int, kv: str, **options: Any) -> MemoryPlan:
    """Return the plan for cache type `kv`; for "auto", for the most exact type that fits. Options as for `plan_memory`.

    Raises:
        UserError: it does not fit (the message has the numbers), or the heads do not divide into the type's blocks.
    """
    kv = check_kv_type(kv)
    shape = _shape(header)
    names = AUTO_ORDER if kv == "auto" else (kv,)
    plans = []
    for name in names:
        mismatch = _block_mismatch(shape, name)
        if mismatch is None:
            plans.append(plan_memory(header, n_ctx, name, **options))
            if plans[-1].fits:
                return plans[-1]
        elif kv != "auto":
            raise UserError(f"kv: {kv!r} does not suit {header.path}: {mismatch}")
    smallest = min(plans, key=lambda plan: plan.total_bytes)
    raise UserError(
        f"not enough memory for {n_ctx} tokens with a {smallest.kv_type} cache:"
        f" {mib(smallest.weights_bytes)} of weights + {mib(smallest.cache_bytes)} of cache"
        f" + {mib(smallest.compute_bytes)} of compute = {mib(smallest.total_bytes)},"
        f" and {mib(smallest.available_bytes)} are free;"
        " ask for a shorter context" + ("" if kv in ("auto", "q4_0") else " or a smaller cache type")
    )


def _block_mismatch(shape: _Sizes, kv: str) -> str | None:
    for name, length in ((kv.split(":")[0], shape.key_length), (kv.split(":")[-1], shape.value_length)):
        _, block, _ = TENSOR_TYPES[ggml_type(name)]
        if length % block:
            return f"its head size {length} is not a multiple of {name}'s block, {block}"
    return None


def check_room(n_bytes: int, count: int, free: int) -> None:
    """Check that a search can keep what `count` passages hold before their windows, `n_bytes` each, in `free` bytes.

    Raises:
        UserError: it cannot; the message has the numbers.
    """
    if n_bytes * count > free:
        raise UserError(
            f"not enough memory to screen {count} passages: {mib(n_bytes)} each, and {mib(free)} are free;"
            " use fewer passages, fewer workers or a shorter context"
        )
