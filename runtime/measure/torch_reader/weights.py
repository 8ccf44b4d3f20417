"""A Llama-family GGUF file's weights as torch tensors, dequantised by ggml itself, one tensor at a time.

The file's tensors are checked against what its architecture needs before any data is read: a model that is not fully
covered is refused, since a missing part would only show in wrong numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import torch
from gguf import GGMLQuantizationType

from ....container import GGUFError, Header, trained_schedule, type_name
from ....container import Tensor as TensorInfo
from ....errors import UserError, mib
from ....factors import RopeFacts
from ...free_memory import available_memory
from ...graph import ggml

ADJACENT_PAIRS = {"llama": True, "mistral3": True, "qwen2": False, "qwen3": False}
"""The architectures, and whether rotation pairs up adjacent dimensions, or else a head's first half with its second."""

HEAD_NORMS = frozenset({"qwen3"})
"""Architectures that normalise each head's queries and keys before rotation."""

UNCOVERED = ("attn_logit_softcapping", "final_logit_softcapping", "attention.temperature_scale", "expert_count")
"""Keys (after the architecture's name) of features that are not covered, unless the value is 0."""

ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

_PLAIN: dict[int, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
}
_CHUNK_VALUES = 1 << 18  # values dequantised at a time


@dataclass(frozen=True)
class Shape:
    """The dimensions and constants of a decoder."""

    facts: RopeFacts
    adjacent_pairs: bool
    head_norms: bool
    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    head_size: int
    eps: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights, each ``(out, in)``; queries, keys and values are one matrix, gate and up another.

    Rotary dimensions are reordered to first half and second half, for either pairing: a head's scores are the same.
    """

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class Weights:
    """All of a model's weights; `output` is the same tensor as `embedding` if the file has no other."""

    shape: Shape
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    output_norm: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor | None


def load_weights(header: Header, device: torch.device, dtype: torch.dtype, max_bytes: int | None) -> Weights:
    """Read the weights into `dtype` on `device`.

    Raises:
        UserError: an architecture or a part of the model that is not covered, an inconsistent file, or more than
            `max_bytes` (default: the free memory). Nothing has been read then.
    """
    shape = read_shape(header)
    planned = _Builder(header, shape, torch.device("meta"), dtype)
    planned.weights()
    for name in sorted({tensor.name for tensor in header.tensors} - planned.taken - ROPE_TENSORS):
        raise UserError(f"{header.path}: tensor {name!r} is not covered, expected only those of {_supported()}")
    needed = sum(math.prod(t.shape) for t in header.tensors) * dtype.itemsize + 8 * _CHUNK_VALUES
    free = free_memory(device)
    allowed = free if max_bytes is None else min(free, max_bytes)
    if needed > allowed:
        raise UserError(
            f"{header.path}: its weights take {mib(needed)} as {str(dtype).removeprefix('torch.')},"
            f" expected at most {mib(allowed)}"
        )
    try:
        with header.path.open("rb") as file, torch.no_grad():
            return _Builder(header, shape, device, dtype, file).weights()
    except OSError as error:
        raise UserError(f"{header.path}: cannot read the model: {error.strerror or error}") from None


def free_memory(device: torch.device) -> int:
    """Bytes available for new tensors on a device."""
    if device.type != "cuda":
        return available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved by torch
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def _supported() -> str:
    return ", ".join(ADJACENT_PAIRS)


def read_shape(header: Header) -> Shape:
    """Read the decoder's dimensions and constants.

    Raises:
        UserError: it is not covered, or its keys make no sense.
    """
    arch = header.arch
    if arch not in ADJACENT_PAIRS:
        raise UserError(f"{header.path}: architecture {arch!r} cannot be read into torch, expected {_supported()}")
    for key in UNCOVERED:
        if header.get(f"{arch}.{key}"):
            raise UserError(f"{header.path}: {arch}.{key}: {header.get(f'{arch}.{key}')}, expected none or 0")
    if header.get(f"{arch}.attention.causal") is False:
        raise UserError(f"{header.path}: {arch}.attention.causal: False, expected a causal model")
    facts = trained_schedule(header).facts
    n_embd, n_head = (_size(header, key) for key in ("embedding_length", "attention.head_count"))
    head_size = _size(header, "attention.key_length", n_embd // n_head)
    n_head_kv = _size(header, "attention.head_count_kv", n_head)
    embedding = header.tensor("token_embd.weight")
    for key, value, right, expected in (
        ("attention.value_length", _size(header, "attention.value_length", head_size), head_size, "the key length"),
        ("attention.head_count_kv", n_head % n_head_kv, 0, f"a divisor of {n_head} heads"),
        ("rope.dimension_count", facts.n_rot, min(facts.n_rot, head_size), f"at most the head size, {head_size}"),
    ):
        if value != right:
            raise GGUFError(f"{header.path}: {arch}.{key}: {header.get(f'{arch}.{key}')}, expected {expected}")
    return Shape(
        facts=facts,
        adjacent_pairs=ADJACENT_PAIRS[arch],
        head_norms=arch in HEAD_NORMS,
        n_layer=_size(header, "block_count"),
        n_embd=n_embd,
        n_ff=_size(header, "feed_forward_length"),
        n_vocab=embedding.shape[-1] if embedding is not None else 0,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_size=head_size,
        eps=header.number(f"{arch}.attention.layer_norm_rms_epsilon"),
    )


def _size(header: Header, key: str, default: int | None = None) -> int:
    """Read an integer of at least 1; if there is one for each layer, they must be equal."""
    key = f"{header.arch}.{key}"
    entry = header.entries.get(key)
    if entry is not None and entry.item_type is not None:
        found = set(header.array(key))
        if len(found) != 1:
            raise UserError(f"{header.path}: {key}: {len(found)} different numbers, expected the same for every layer")
        value = found.pop()
    else:
        value = header.number(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or not 0 < value < 2**31:
        raise GGUFError(f"{header.path}: {key}: {value!r}, expected a whole number from 1")
    return int(value)


class _Builder:
    """Assembles the weights from the file's tensors. On the meta device, it only checks names and shapes."""

    def __init__(
        self, header: Header, shape: Shape, device: torch.device, dtype: torch.dtype, file: BinaryIO | None = None
    ) -> None:
        self.header, self.shape, self.device, self.dtype, self.file = header, shape, device, dtype, file
        self.tensors = {tensor.name: tensor for tensor in header.tensors}
        self.taken: set[str] = set()
        half, rest = shape.facts.n_rot // 2, range(shape.facts.n_rot, shape.head_size)
        pairs = [*range(0, 2 * half, 2), *range(1, 2 * half, 2)] if shape.adjacent_pairs else [*range(2 * half)]
        self.order = torch.tensor([*pairs, *rest], device=device)

    def weights(self) -> Weights:
        n_embd, n_vocab = self.shape.n_embd, self.shape.n_vocab
        embedding = self.matrix([("token_embd", n_vocab)], n_embd)
        layers = tuple(self.layer(i) for i in range(self.shape.n_layer))
        norm = self.vector("output_norm.weight", n_embd)
        own = "output.weight" in self.tensors
        output = self.matrix([("output", n_vocab)], n_embd) if own else embedding
        return Weights(self.shape, embedding, layers, norm, output, self.biases([("output", n_vocab)]))

    def layer(self, i: int) -> Layer:
        s, at = self.shape, f"blk.{i}."
        n_q, n_kv = s.n_head * s.head_size, s.n_head_kv * s.head_size
        parts = [(at + "attn_q", n_q), (at + "attn_k", n_kv), (at + "attn_v", n_kv)]
        joint = [(at + "ffn_gate", s.n_ff), (at + "ffn_up", s.n_ff)]
        qkv, bias = self.matrix(parts, s.n_embd), self.biases(parts)
        for x in (qkv, bias):
            if x is not None:
                rotated = x[: n_q + n_kv].view(s.n_head + s.n_head_kv, s.head_size, -1)
                rotated.copy_(rotated[:, self.order])
        norms = [
            self.vector(f"{at}attn_{x}_norm.weight", s.head_size)[self.order] if s.head_norms else None for x in "qk"
        ]
        return Layer(
            attn_norm=self.vector(at + "attn_norm.weight", s.n_embd),
            qkv=qkv,
            qkv_bias=bias,
            q_norm=norms[0],
            k_norm=norms[1],
            out=self.matrix([(at + "attn_output", s.n_embd)], n_q),
            out_bias=self.biases([(at + "attn_output", s.n_embd)]),
            ffn_norm=self.vector(at + "ffn_norm.weight", s.n_embd),
            gate_up=self.matrix(joint, s.n_embd),
            gate_up_bias=self.biases(joint),
            down=self.matrix([(at + "ffn_down", s.n_embd)], s.n_ff),
            down_bias=self.biases([(at + "ffn_down", s.n_embd)]),
        )

    def matrix(self, parts: list[tuple[str, int]], n_in: int) -> torch.Tensor:
        """The named weights stacked, shape ``(sum of rows, n_in)``."""
        joined = torch.empty(sum(rows for _, rows in parts), n_in, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            self.fill(name + ".weight", (n_in, rows), joined[start : start + rows])
            start += rows
        return joined

    def biases(self, parts: list[tuple[str, int]]) -> torch.Tensor | None:
        """The named biases concatenated, zeros for missing ones; None if all are missing."""
        if not any(name + ".bias" in self.tensors for name, _ in parts):
            return None
        joined = torch.zeros(sum(rows for _, rows in parts), dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            if name + ".bias" in self.tensors:
                self.fill(name + ".bias", (rows,), joined[start : start + rows])
            start += rows
        return joined

    def vector(self, name: str, n: int) -> torch.Tensor:
        out = torch.empty(n, dtype=self.dtype, device=self.device)
        self.fill(name, (n,), out)
        return out

    def fill(self, name: str, shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Check a tensor, with `shape` in ggml's order, and read it into `out`."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self.header.path}: tensor {name!r}: missing, expected one of shape {list(shape)}")
        if tensor.shape != shape:
            raise GGUFError(f"{self.header.path}: tensor {name!r}: shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.type not in _PLAIN and not ggml.is_blocks(tensor.type):
            raise GGUFError(
                f"{self.header.path}: tensor {name!r}: type {type_name(tensor.type)}, expected a type of weights"
            )
        self.taken.add(name)
        if self.file is not None:
            self._read(self.file, tensor, out.view(-1, shape[0]))

    def _read(self, file: BinaryIO, tensor: TensorInfo, out: torch.Tensor) -> None:
        n_rows, n_in = out.shape
        row_bytes, step = tensor.n_bytes // n_rows, max(1, _CHUNK_VALUES // n_in)
        file.seek(self.header.data_start + tensor.offset)
        for start in range(0, n_rows, step):
            rows = min(step, n_rows - start)
            raw = bytearray(rows * row_bytes)
            if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
                raise GGUFError(
                    f"{self.header.path}: tensor {tensor.name!r}: the file became shorter while it was being read"
                )
            _dequantise(raw, tensor.type, out[start : start + rows])


def _dequantise(raw: bytearray, kind: int, out: torch.Tensor) -> None:
    """Dequantise the bytes of some rows into `out`."""
    plain = _PLAIN.get(kind)
    if plain is not None:
        out.copy_(torch.frombuffer(raw, dtype=plain).view(out.shape))
        return
    block = ggml.block_type(kind)
    assert block is not None
    direct = out.device.type == "cpu" and out.dtype == torch.float32
    floats = out if direct else torch.empty(out.shape)
    block.dequantise(torch.frombuffer(raw, dtype=torch.uint8).data_ptr(), floats.data_ptr(), out.numel())
    if not direct:
        out.copy_(floats)
