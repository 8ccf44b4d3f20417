"""Products of weights computed in torch: against float64 on random tensors of every type, and inside a real model."""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import ropewalk
from ropewalk.runtime.graph import ggml, products
from ropewalk.runtime.graph.hook import NodeError
from ropewalk.runtime.graph.products import FastProducts
from ropewalk.runtime.graph.takeover import torch_on_one_thread

LIB = Path(llama_cpp.__file__).parent / "lib"
POINTER = ctypes.c_void_p


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")


class Product:
    """One MUL_MAT node over a weight of our own, computed by ggml."""

    def __init__(self, kind, n_in, n_out, n_rows, seed=3):
        rng = np.random.default_rng(seed)
        self.lib, self.cpu = ggml._library(), ctypes.CDLL(str(LIB / "libggml-cpu.so"))
        base = ctypes.CDLL(str(LIB / "libggml-base.so"))
        self.context = self.lib.ggml_init(ggml._InitParams(1 << 26, None, False))
        base.ggml_quantize_chunk.argtypes = (ctypes.c_int, POINTER, POINTER, *[ctypes.c_int64] * 3, POINTER)
        base.ggml_mul_mat.restype = base.ggml_new_graph.restype = POINTER
        base.ggml_mul_mat.argtypes = (POINTER, POINTER, POINTER)
        base.ggml_new_graph.argtypes = (POINTER,)
        base.ggml_build_forward_expand.argtypes = (POINTER, POINTER)
        self.base = base
        code = int(gguf.GGMLQuantizationType[kind])
        weight = self.lib.ggml_new_tensor_3d(self.context, code, n_in, n_out, 1)
        drawn = rng.normal(size=(n_out, n_in)).astype(np.float32)
        base.ggml_quantize_chunk(code, drawn.ctypes.data, ggml.tensor_at(weight).data, 0, n_out, n_in, None)
        self.rows = rng.normal(size=(n_rows, n_in)).astype(np.float32)
        rows = self.lib.ggml_new_tensor_3d(self.context, 0, n_in, n_rows, 1)
        ctypes.memmove(ggml.tensor_at(rows).data, self.rows.ctypes.data, self.rows.nbytes)
        self.node = base.ggml_mul_mat(self.context, weight, rows)
        stored = np.empty_like(drawn)
        if ggml.is_blocks(code):
            ggml.dequantise(ggml.tensor_at(weight), 0, n_out, stored.ctypes.data)
            self.expected = self.rows.astype(np.float64) @ stored.astype(np.float64).T

    def compute(self, fast, n_threads=2):
        graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand(graph, self.node)
        fast.see(self.node)
        self.cpu.ggml_graph_compute_with_ctx.argtypes = (POINTER, POINTER, ctypes.c_int)
        with torch_on_one_thread():
            self.cpu.ggml_graph_compute_with_ctx(self.context, graph, n_threads)
        return ggml.values(ggml.tensor_at(self.node))[0, 0].copy()


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
)
def test_every_kind_of_weight_against_float64(kind):
    product, fast = Product(kind, 512, 300, 70), FastProducts()
    found = product.compute(fast)
    fast.nodes.raise_kept()
    assert fast.nodes.taken == 1
    np.testing.assert_allclose(found, product.expected, atol=1e-3)


@pytest.mark.parametrize("n_threads", [1, 3, 16])
@pytest.mark.parametrize("n_out", [1, 31, 1000])
def test_any_number_of_threads(n_threads, n_out, monkeypatch):
    monkeypatch.setattr(products, "SCRATCH_FLOATS", 1 << 13)
    product, fast = Product("Q8_0", 256, n_out, 64), FastProducts()
    np.testing.assert_allclose(product.compute(fast, n_threads), product.expected, atol=1e-3)
    assert fast.nodes.taken == 1


@pytest.mark.parametrize(("kind", "n_rows"), [("Q8_0", 63), ("F16", 80), ("F32", 80)])
def test_few_rows_and_plain_numbers_are_left_to_llama_cpp(kind, n_rows):
    fast = FastProducts()
    Product(kind, 256, 32, n_rows).compute(fast)
    assert fast.nodes.taken == 0


def test_a_failure_names_the_node(smollm2, monkeypatch):
    llm = ropewalk.Llama(smollm2, kv="q8_0", n_ctx=256, n_threads=2, verbose=False)

    def broken(*_):
        raise MemoryError("no room for a weight")

    with monkeypatch.context() as patch:
        patch.setattr(ggml, "dequantise", broken)
        with pytest.raises(NodeError, match=r"product node .*: MemoryError: no room for a weight"):
            llm.eval(list(range(300, 400)))
    assert llm.n_tokens == 0
    llm.eval(list(range(300, 400)))
    assert llm._fast.products.nodes.taken > 100
    llm.close()
