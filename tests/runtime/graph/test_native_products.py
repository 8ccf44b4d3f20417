"""Products in native code: against float64 and llama.cpp's own on the same node, for every type and instruction set."""

import ctypes
import re
import threading
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from ropewalk.runtime.graph import ggml, kernels

LIB = Path(llama_cpp.__file__).parent / "lib"
POINTER = ctypes.c_void_p
SETS = kernels.instruction_sets()
NAMES = {ggml._library().ggml_type_name(code).decode().upper(): code for code in (*ggml.block_types(), 0, 1, 30)}
WEIGHTS = sorted(NAMES.keys() - {"Q8_1", "Q8_K"})  # those are for activations
PLAIN = ("F32", "F16", "BF16")
FEW_SETS = [one for one in SETS if one.name in ("AVX-512 BF16", "AVX-512 VNNI")]  # those that multiply bytes
FEW_KINDS = [kind for kind in WEIGHTS if re.fullmatch(r"Q[458]_[01]|Q._K|IQ4_..|MXFP4", kind)]

pytestmark = pytest.mark.skipif(not SETS, reason=kernels.why_missing() or "no instruction set")
each_set = pytest.mark.parametrize("instructions", SETS, ids=[one.name for one in SETS])


class Product:
    """One MUL_MAT node over a weight of our own; `expected` is its result in float64."""

    def __init__(self, kind, n_in, n_out, n_rows, seed=3):
        rng = np.random.default_rng(seed)
        self.lib, self.cpu = ggml._library(), ctypes.CDLL(str(LIB / "libggml-cpu.so"))
        self.base = ctypes.CDLL(str(LIB / "libggml-base.so"))
        self.base.ggml_quantize_chunk.argtypes = (ctypes.c_int, POINTER, POINTER, *[ctypes.c_int64] * 3, POINTER)
        self.base.ggml_mul_mat.restype = self.base.ggml_new_graph.restype = POINTER
        self.base.ggml_mul_mat.argtypes = (POINTER, POINTER, POINTER)
        self.base.ggml_new_graph.argtypes = (POINTER,)
        self.base.ggml_build_forward_expand.argtypes = (POINTER, POINTER)
        self.cpu.ggml_graph_compute_with_ctx.argtypes = (POINTER, POINTER, ctypes.c_int)
        self.context = self.lib.ggml_init(ggml._InitParams(1 << 26, None, False))
        code = NAMES[kind]
        self.weight = self.lib.ggml_new_tensor_3d(self.context, code, n_in, n_out, 1)
        drawn = rng.normal(size=(n_out, n_in)).astype(np.float32)
        importance = np.ones(n_in, np.float32)
        address = ggml.tensor_at(self.weight).data
        if kind == "F32":
            ctypes.memmove(address, drawn.ctypes.data, drawn.nbytes)
        else:
            self.base.ggml_quantize_chunk(code, drawn.ctypes.data, address, 0, n_out, n_in, importance.ctypes.data)
        self.rows = rng.normal(size=(n_rows, n_in)).astype(np.float32)
        self.x = self.lib.ggml_new_tensor_3d(self.context, 0, n_in, n_rows, 1)
        ctypes.memmove(ggml.tensor_at(self.x).data, self.rows.ctypes.data, self.rows.nbytes)
        self.node = self.base.ggml_mul_mat(self.context, self.weight, self.x)
        self.stored = self._stored(kind, n_out, n_in).astype(np.float64)
        self.expected = self.rows.astype(np.float64) @ self.stored.T

    def _stored(self, kind, n_out, n_in):
        tensor = ggml.tensor_at(self.weight)
        if kind in PLAIN:
            values = ggml.values(tensor)[0, 0]
            return (values.astype(np.int32) << 16).view(np.float32) if kind == "BF16" else values
        stored = np.empty((n_out, n_in), np.float32)
        ggml.dequantise(tensor, 0, n_out, stored.ctypes.data)
        return stored

    def stock(self):
        """What llama.cpp computes."""
        graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand(graph, self.node)
        self.cpu.ggml_graph_compute_with_ctx(self.context, graph, 1)
        return self._result()

    def ours(self, context, n_threads=1):
        """What the library computes on as many threads of ours."""
        ggml.values(ggml.tensor_at(self.node))[:] = np.nan
        function = ggml.CustomFunction(context.product)
        arguments = [(self.node, thread, n_threads, context.address) for thread in range(n_threads)]
        threads = [threading.Thread(target=function, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert context.failure == ""
        return self._result()

    def error(self, found):
        """The root of the mean squared error, as a share of the values'."""
        return np.sqrt(((found - self.expected) ** 2).mean() / (self.expected**2).mean())

    def _result(self):
        return ggml.values(ggml.tensor_at(self.node))[0, 0].copy()

    def __del__(self):
        self.lib.ggml_free(self.context)


def test_which_weights_are_taken_from_how_many_rows_on():
    context = kernels.Context(SETS[0])
    few, any_taken = SETS[0] in FEW_SETS, SETS[0].name != "plain C"
    for kind, n_rows, taken in (
        ("Q4_1", 1, few),
        ("Q4_1", 32, True),
        ("F32", 31, False),
        ("F32", 32, True),
        ("F16", 63, False),
        ("IQ3_S", 512, False),
    ):
        product = Product(kind, 256, 8, n_rows)
        assert context.covers_product(product.node) == (taken and any_taken), (kind, n_rows)


@each_set
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_type_is_at_least_as_close_to_float64_as_llama_cpp_is(kind, instructions):
    product = Product(kind, 768, 70, 65)
    assert product.error(product.ours(kernels.Context(instructions, exact=True))) < 2e-6
    bound = max(product.error(product.stock()) * 1.05, 2e-6)
    assert product.error(product.ours(kernels.Context(instructions, exact=False))) < bound


@each_set
@pytest.mark.parametrize("n_rows", [32, 33, 64, 513])
@pytest.mark.parametrize(
    ("kind", "n_in", "n_out"),
    [
        *(("Q8_0", 32, 1), ("Q5_1", 96, 31), ("Q4_1", 576, 32), ("Q8_0", 800, 33), ("Q4_0", 1600, 130)),
        *(("Q6_K", 1792, 70), ("F32", 77, 33), ("BF16", 301, 40), ("F16", 5, 3)),
    ],
)
def test_any_shape(kind, n_in, n_out, n_rows, instructions):
    product = Product(kind, n_in, n_out, n_rows)
    assert product.error(product.ours(kernels.Context(instructions, exact=True))) < 2e-6
    bound = max(product.error(product.stock()) * 1.05, 2e-6)
    assert product.error(product.ours(kernels.Context(instructions, exact=False))) < bound


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("instructions", FEW_SETS, ids=[one.name for one in FEW_SETS])
@pytest.mark.parametrize(("n_in", "n_out"), [(256, 1), (1024, 33), (96, 5), (576, 70), (32, 3), (992, 17)])
def test_few_rows(n_in, n_out, instructions, kind):
    if n_in % ggml._library().ggml_blck_size(NAMES[kind]):
        pytest.skip("not whole blocks")
    context = kernels.Context(instructions, exact=False)
    for n_rows in (1, 2, 3, 4, 5, 7, 31):
        product = Product(kind, n_in, n_out, n_rows)
        size = np.sqrt((product.rows**2).mean(1, keepdims=True)) * np.linalg.norm(product.stored, axis=1)
        error = (product.ours(context, 3) - product.expected) / size  # of what a result is on the average
        assert np.abs(error).max() < 0.04
        assert n_out < 17 or np.sqrt((error**2).mean()) < 0.007  # llama.cpp's own with K-quants


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_set
@pytest.mark.parametrize("n_rows", [4, 64])
def test_what_is_not_finite_is_seen_in_its_row_alone(n_rows, value, instructions):
    product, context = Product("Q4_K", 512, 40, n_rows), kernels.Context(instructions, exact=False)
    ggml.values(ggml.tensor_at(product.x))[0, 0, 2, 300] = value
    finite = np.isfinite(product.ours(context)).all(1)
    assert list(np.flatnonzero(~finite)) == [2]


@each_set
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-37, 1e30])
def test_very_small_and_very_large_rows(scale, instructions):
    product, context = Product("Q5_0", 256, 40, 32), kernels.Context(instructions, exact=False)
    ggml.values(ggml.tensor_at(product.x))[:] *= np.float32(scale)
    found = product.ours(context).astype(np.float64)
    np.testing.assert_allclose(found, product.expected * scale, atol=0.5 * scale + 1e-35)


@each_set
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("n_rows", [1, 513])
def test_the_number_of_threads_changes_nothing(n_rows, exact, instructions):
    product, context = Product("Q4_1", 1600, 130, n_rows), kernels.Context(instructions, exact=exact)
    alone = product.ours(context)
    for n_threads in (2, 3, 64):
        np.testing.assert_array_equal(product.ours(context, n_threads), alone)
    assert context.taken == 4


def test_rows_that_lie_apart():
    product, context = Product("Q4_0", 256, 40, 64), kernels.Context()
    ggml.tensor_at(product.x).nb[1] *= 2
    ggml.tensor_at(product.x).ne[1] = ggml.tensor_at(product.node).ne[1] = 32
    np.testing.assert_allclose(product.ours(context)[:32], product.expected[::2], atol=0.5)


@pytest.mark.skipif(len(SETS) == 1, reason="all are left to llama.cpp")
def test_what_is_left_to_llama_cpp():
    context, product = kernels.Context(), Product("Q8_0", 256, 32, 64)
    node, weight, x = ggml.tensor_at(product.node), ggml.tensor_at(product.weight), ggml.tensor_at(product.x)
    assert context.covers_product(product.node)
    for tensor, field, value in (
        (weight, "extra", product.x),  # repacked
        (weight, "view_src", product.x),
        (weight, "op", 1),  # computed
        (weight, "type", 24),  # I8
        (x, "type", 1),
        (weight.ne, 2, 2),
        (node.ne, 2, 2),
        (node.ne, 3, 2),
        (weight.nb, 1, 9999),
        (x.nb, 0, 8),
    ):
        by_name = isinstance(field, str)
        before = getattr(tensor, field) if by_name else tensor[field]
        setattr(tensor, field, value) if by_name else tensor.__setitem__(field, value)
        assert not context.covers_product(product.node), field
        setattr(tensor, field, before) if by_name else tensor.__setitem__(field, before)
    assert context.covers_product(product.node)
