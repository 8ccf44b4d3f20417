"""Attention nodes over tensors of our own, as llama.cpp lays them out, and what they should give, in float64."""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from ropewalk.runtime.graph import ggml

LIB = Path(llama_cpp.__file__).parent / "lib"
POINTER = ctypes.c_void_p


class Params(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


def library(name):
    lib = ctypes.CDLL(str(LIB / f"lib{name}.so"))
    for function in ("ggml_init", "ggml_new_tensor_4d", "ggml_flash_attn_ext", "ggml_new_graph", "ggml_get_data"):
        if name == "ggml-base":
            getattr(lib, function).restype = POINTER
    return lib


class Graph:
    """One FLASH_ATTN_EXT node over tensors of our own, as llama.cpp lays them out, computed by ggml."""

    def __init__(self, q, k, v, mask=None, kind_k="f16", kind_v="f16", sinks=None, max_bias=0.0, softcap=0.0):
        self.base, self.cpu = library("ggml-base"), library("ggml-cpu")
        self.base.ggml_init.argtypes = (Params,)
        self.context = POINTER(self.base.ggml_init(Params(1 << 27, None, False)))
        self.scale = q.shape[-1] ** -0.5
        sources = [self.rows(q), self.cells(k, kind_k), self.cells(v, kind_v)]
        sources.append(None if mask is None else self.tensor(mask.astype(np.float16), 1))
        self.base.ggml_flash_attn_ext.argtypes = (*[POINTER] * 5, *[ctypes.c_float] * 3)
        self.node = self.base.ggml_flash_attn_ext(self.context, *sources, self.scale, max_bias, softcap)
        if sinks is not None:
            self.base.ggml_flash_attn_ext_add_sinks.argtypes = (POINTER, POINTER)
            self.base.ggml_flash_attn_ext_add_sinks(self.node, self.tensor(sinks.astype(np.float32), 0))

    def tensor(self, values, kind, shape=None):
        shape = (*[1] * (4 - values.ndim), *values.shape) if shape is None else shape
        self.base.ggml_new_tensor_4d.argtypes = (POINTER, ctypes.c_int, *[ctypes.c_int64] * 4)
        tensor = self.base.ggml_new_tensor_4d(self.context, kind, *shape[::-1])
        values = np.ascontiguousarray(values)
        ctypes.memmove(ggml.tensor_at(tensor).data, values.ctypes.data, values.nbytes)
        return tensor

    def rows(self, q):
        """(streams, heads, rows, size): in memory rows before heads, as llama.cpp's permuted view."""
        return self.permuted(self.tensor(q.transpose(0, 2, 1, 3).astype(np.float32), 0))

    def cells(self, x, kind):
        packed = quantised(x.transpose(0, 2, 1, 3), kind)
        shape = tuple(x.transpose(0, 2, 1, 3).shape)
        return self.permuted(self.tensor(packed, int(gguf.GGMLQuantizationType[kind.upper()]), shape))

    def permuted(self, tensor):
        self.base.ggml_permute.restype = POINTER
        self.base.ggml_permute.argtypes = (POINTER, POINTER, *[ctypes.c_int] * 4)
        return self.base.ggml_permute(self.context, tensor, 0, 2, 1, 3)

    def compute(self, see=None, n_threads=2):
        """The node's result, shape (streams, rows, heads, size), after `see` has had a chance to take it over."""
        self.base.ggml_new_graph.argtypes = (POINTER,)
        graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand.argtypes = (POINTER, POINTER)
        self.base.ggml_build_forward_expand(graph, self.node)
        if see is not None:
            see(self.node)
        self.cpu.ggml_graph_compute_with_ctx.argtypes = (POINTER, POINTER, ctypes.c_int)
        self.cpu.ggml_graph_compute_with_ctx(self.context, graph, n_threads)
        return ggml.values(ggml.tensor_at(self.node)).copy()

    def close(self):
        self.base.ggml_free.argtypes = (POINTER,)
        self.base.ggml_free(self.context)


def quantised(x, kind):
    """The bytes of `x` in a cache, of any shape whose last dimension is whole blocks."""
    x, code = np.ascontiguousarray(x, dtype=np.float32), gguf.GGMLQuantizationType[kind.upper()]
    if kind != "iq4_nl":
        return gguf.quants.quantize(x, code)
    block, size = gguf.GGML_QUANT_SIZES[code]  # the gguf package only reads this type
    packed = np.empty((*x.shape[:-1], x.shape[-1] // block * size), dtype=np.uint8)
    chunk = library("ggml-base").ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, (ctypes.c_int, POINTER, POINTER, *[ctypes.c_int64] * 3, POINTER)
    chunk(int(code), x.ctypes.data, packed.ctypes.data, 0, x.size // x.shape[-1], x.shape[-1], None)
    return packed


def stored(x, kind):
    """`x` as the cache stores it."""
    code = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.quants.dequantize(quantised(x, kind), code).reshape(x.shape).astype(np.float64)


def reference(q, k, v, mask, scale, sinks=None, max_bias=0.0, softcap=0.0):
    """Attention in float64, shape (streams, rows, heads, size)."""
    q, k, v = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + torch.from_numpy(mask.astype(np.float64)) * alibi_slopes(q.shape[1], max_bias)
    if sinks is not None:
        extra = torch.from_numpy(sinks.astype(np.float64)).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return (weights.nan_to_num(0.0) @ v).transpose(1, 2).numpy()


def alibi_slopes(heads, max_bias):
    """What each head multiplies the mask by (Press et al., arXiv 2108.12409), shape (heads, 1, 1)."""
    power = 2 ** int(np.log2(heads))
    even = [2 ** (-max_bias * (i + 1) / power) for i in range(power)]
    odd = [2 ** (-max_bias / 2 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(even + odd, dtype=torch.float64).view(-1, 1, 1)


def causal(rows, cells, window=None):
    """The mask of `rows` tokens at the end of `cells`, shape (1, 1, rows, cells)."""
    position = np.arange(cells - rows, cells)[:, None] - np.arange(cells)[None]
    seen = (position >= 0) & (position < (window or cells))
    return np.where(seen, 0.0, -np.inf)[None, None]


def draw(rng, rows, cells, heads=6, kv_heads=2, size=64, v_size=None, streams=1):
    q = rng.normal(size=(streams, heads, rows, size))
    k = rng.normal(size=(streams, kv_heads, cells, size))
    v = rng.normal(size=(streams, kv_heads, cells, v_size or size))
    return q, k, v
