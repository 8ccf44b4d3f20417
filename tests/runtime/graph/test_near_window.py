"""Attention with a near window, with every instruction set that runs here and in torch, against its two formulas."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from attention_nodes import POINTER, Graph, Params, library
from ropewalk.factors import Band, RopeFacts
from ropewalk.runtime.graph import ggml
from ropewalk.runtime.graph.fast import NativeNodes, TorchNodes
from ropewalk.runtime.graph.hook import GraphHook, NodeError
from ropewalk.runtime.graph.kernels import Context, instruction_sets, why_missing
from ropewalk.runtime.graph.rope import RopeHook
from ropewalk.runtime.graph.rope_trace import hadamard

KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
TORCH = "torch"
SETS = [*(() if why_missing() else instruction_sets()), TORCH]
every_set = pytest.mark.parametrize("instructions", SETS, ids=lambda one: getattr(one, "name", one))
F32, I32, I64 = 0, 26, 27
BASE = 500.0  # small, so that slow pairs rotate as well within a few hundred tokens


@pytest.fixture
def rng():
    return np.random.default_rng(5)


class Sequences(Graph):
    """A cache of one layer, written to and attended to by graphs as llama.cpp builds them."""

    def __init__(self, nodes, rope, *, size, heads, kv_heads, n_cells, kind, mode=0, transform=False, streams=1):
        self.nodes, self.rope, self.size, self.heads, self.kv_heads = nodes, rope, size, heads, kv_heads
        self.n_cells, self.kind, self.mode, self.streams = n_cells, kind, mode, streams
        self.n_threads = 2
        self.open()
        self.hook = hook_of(nodes, rope)
        code = int(gguf.GGMLQuantizationType[kind.upper()])
        shape = (1, streams, n_cells, kv_heads * size)
        self.k, self.v = (self.base.ggml_new_tensor_4d(self.context, code, *shape[::-1]) for _ in range(2))
        for cache in (self.k, self.v):
            ctypes.memset(ggml.tensor_at(cache).data, 0, ggml.tensor_at(cache).nb[3])
        self.transform = None
        if transform:
            self.transform = self.tensor(hadamard(size).astype(np.float32), F32)

    def write(self, keys, values, positions, cells):
        """Cache raw keys and values, shape (tokens, kv heads, size), of tokens at `positions` in `cells`."""
        rotated = self.rotated(keys, positions)
        index = self.tensor(np.asarray(cells, dtype=np.int64), I64)
        rows = self.reshaped(rotated, len(keys), self.kv_heads * self.size)
        flat = self.tensor(values.astype(np.float32), F32, (1, 1, len(keys), self.kv_heads * self.size))
        nodes = [
            self.call("ggml_set_rows", self.whole(cache), x, index) for cache, x in ((self.k, rows), (self.v, flat))
        ]
        self.run(*nodes)

    def attend(self, queries, positions, mask, scale=0.15):
        """The result for raw queries, shape (streams, rows, heads, size); `mask` is (streams, rows, cells)."""
        n_rows = len(queries) // self.streams
        q = self.rotated(queries, positions)
        steps = np.cumprod([4 * self.size, self.heads, n_rows]).tolist()
        arguments = (self.size, self.heads, n_rows, self.streams, *steps, 0)
        types = [ctypes.c_int64] * 4 + [ctypes.c_size_t] * 4
        q = self.permuted(self.call("ggml_view_4d", q, *arguments, types=types))
        k, v = (self.cells_of(cache) for cache in (self.k, self.v))
        mask = self.tensor(mask.astype(np.float16)[:, None], 1)
        self.base.ggml_flash_attn_ext.argtypes = (*[POINTER] * 5, *[ctypes.c_float] * 3)
        self.node = self.base.ggml_flash_attn_ext(self.context, q, k, v, mask, scale, 0.0, 0.0)
        self.run(self.node)
        return ggml.values(ggml.tensor_at(self.node)).copy()

    def stored(self):
        """The values and the raw keys that the cache holds, float64, shape (streams * cells, kv heads, size)."""
        code = gguf.GGMLQuantizationType[self.kind.upper()]
        read = []
        for cache in (self.k, self.v):
            tensor = ggml.tensor_at(cache)
            raw = np.frombuffer(ctypes.string_at(tensor.data, tensor.nb[3]), dtype=np.uint8)
            raw = raw.reshape(self.streams * self.n_cells, -1)
            read.append(
                gguf.quants.dequantize(raw, code).reshape(len(raw), self.kv_heads, self.size).astype(np.float64)
            )
        keys, values = read
        return (keys @ hadamard(self.size) if self.transform else keys), values

    # --- ggml

    def open(self):
        self.base, self.cpu = library("ggml-base"), library("ggml-cpu")
        self.base.ggml_init.argtypes = (Params,)
        self.context = POINTER(self.base.ggml_init(Params(1 << 27, None, False)))
        self.base.ggml_new_tensor_4d.argtypes = (POINTER, ctypes.c_int, *[ctypes.c_int64] * 4)

    def call(self, name, *arguments, types=None):
        function = getattr(self.base, name)
        n_tensors = len(arguments) - len(types or ())
        function.restype, function.argtypes = POINTER, [POINTER] * (1 + n_tensors) + (types or [])
        return function(self.context, *arguments)

    def rotated(self, x, positions):
        types = [ctypes.c_int] * 3 + [ctypes.c_float] * 6
        arguments = (self.rope.facts.n_rot, self.mode, 0, BASE, 1.0, 0.0, 1.0, 0.0, 0.0)
        x = self.tensor(x.astype(np.float32), F32)
        x = self.call(
            "ggml_rope_ext", x, self.tensor(np.asarray(positions, np.int32), I32), None, *arguments, types=types
        )
        if self.transform is None:
            return x
        n_heads, n_tokens = (int(n) for n in ggml.tensor_at(x).ne[1:3])
        x = self.call("ggml_mul_mat", self.transform, self.reshaped(x, n_heads * n_tokens, self.size))
        types = [ctypes.c_int64] * 3
        return self.call("ggml_reshape_3d", x, self.size, n_heads, n_tokens, types=types)

    def reshaped(self, x, rows, columns):
        return self.call("ggml_reshape_2d", x, columns, rows, types=[ctypes.c_int64] * 2)

    def whole(self, cache):
        return self.reshaped(cache, self.streams * self.n_cells, self.kv_heads * self.size)

    def cells_of(self, cache):
        tensor = ggml.tensor_at(cache)
        row, head = tensor.nb[1], tensor.nb[1] // self.kv_heads
        arguments = (self.size, self.kv_heads, self.n_cells, self.streams, head, row, row * self.n_cells, 0)
        types = [ctypes.c_int64] * 4 + [ctypes.c_size_t] * 4
        return self.permuted(self.call("ggml_view_4d", cache, *arguments, types=types))

    def run(self, *nodes):
        self.base.ggml_new_graph.argtypes = (POINTER,)
        graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand.argtypes = (POINTER, POINTER)
        for node in nodes:
            self.base.ggml_build_forward_expand(graph, node)
        self.base.ggml_graph_n_nodes.argtypes = self.base.ggml_graph_node.argtypes = None
        self.base.ggml_graph_node.restype = POINTER
        for i in range(self.base.ggml_graph_n_nodes(POINTER(graph))):
            self.hook.callback(self.base.ggml_graph_node(POINTER(graph), i), True, self.hook.userdata)
        self.cpu.ggml_graph_compute_with_ctx.argtypes = (POINTER, POINTER, ctypes.c_int)
        self.cpu.ggml_graph_compute_with_ctx(self.context, graph, self.n_threads)
        self.hook.raise_kept()
        self.nodes.raise_kept()


def hook_of(nodes, rope):
    """The callback that shows nodes to `rope` and to those who compute attention."""
    if isinstance(nodes, NativeNodes):
        nodes._kernels.watch(rope.setting, nodes=True)
        return GraphHook({}, nodes._kernels)
    return GraphHook({**nodes.handlers, "ROPE": lambda node: (rope.set_rope(node), nodes.windows.see_rope(node))})


def turned(x, angles, mode):
    """`x` ``(…, size)`` rotated by `angles` ``(…, n_rot/2)``, in float64."""
    half = angles.shape[-1]
    first, second = (slice(0, half), slice(half, 2 * half)) if mode else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    a, b, out = x[..., first], x[..., second], np.array(x)
    out[..., first] = a * np.cos(angles) - b * np.sin(angles)
    out[..., second] = b * np.cos(angles) + a * np.sin(angles)
    return out


def expected(band, facts, q, rows, keys, values, cells, mask, mode, scale=0.15):
    """The formulas: each pair of a row and a cell by their distance. Shape (rows, heads, size)."""
    half = facts.n_rot // 2
    theta = BASE ** (-np.arange(half) / half)
    own, far = theta / np.array(facts.start_factors), theta / np.array(band.rescale_factors)
    distance = (np.asarray(rows)[:, None] - np.asarray(cells)[None])[..., None]
    near, window = distance < band.near_tokens, band.near_tokens
    angles = np.where(near, distance * own, window * own + (distance - window) * far)
    start = (np.asarray(cells) < band.start_tokens)[None, :, None] & ~near  # their own position counts in full
    angles = np.where(start, window * own + (np.asarray(rows)[:, None, None] - window) * far
                      - np.asarray(cells)[None, :, None] * own, angles)  # fmt: skip
    group = q.shape[1] // keys.shape[1]
    q = np.array(q)
    q[..., : facts.n_rot] *= band.attention_factor  # what does not rotate is not scaled; cached keys already are
    out = np.zeros((len(q), q.shape[1], values.shape[-1]))
    for head in range(q.shape[1]):
        k, v = keys[:, head // group], values[:, head // group]
        turned_q = turned(np.broadcast_to(q[:, None, head], (len(q), len(k), q.shape[-1])), angles, mode)
        scores = np.einsum("rcd,cd->rc", turned_q, k) * scale + mask
        out[:, head] = torch.softmax(torch.from_numpy(scores), -1).nan_to_num(0.0).numpy() @ v
    return out


def raw_keys(cached, positions, band, facts, mode):
    """Cached keys without their rotation."""
    half = facts.n_rot // 2
    theta = BASE ** (-np.arange(half) / half)
    factors = np.where((np.asarray(positions) < band.start_tokens)[:, None], facts.start_factors, band.rescale_factors)
    angles = np.asarray(positions)[:, None] * theta / factors
    return turned(cached, -angles[:, None], mode)


def make(instructions, exact, *, window, n_rot=64, own=(), mode=0, start=0, attention=1.0, **shape):
    facts = RopeFacts(n_rot=n_rot, freq_base=BASE, original_context=512, native_factors=own)
    far = tuple((np.linspace(1.5, 6, n_rot // 2) * np.array(facts.start_factors)).tolist())
    band = Band(context=4096, near_tokens=window, rescale_factors=far, start_tokens=start, attention_factor=attention)
    rope = RopeHook(facts)
    nodes = TorchNodes(rope.applies) if instructions == TORCH else NativeNodes(Context(instructions, exact))
    rope.halves, rope.set_window = bool(mode), nodes.use_window
    rope.use_band(band)
    return Sequences(nodes, rope, mode=mode, **shape), band, facts


def check(rng, instructions, *, rows, n_tokens=330, exact=True, atol=2e-4, in_order=False, **options):
    """Tokens 0 to `n_tokens` of one sequence, cached in cells of any order; the last ones are the rows."""
    shape = {"size": 64, "heads": 6, "kv_heads": 2, "n_cells": n_tokens + 20, "kind": "f32"} | options
    graph, band, facts = make(instructions, exact, **shape)
    size, heads, kv_heads, mode = graph.size, graph.heads, graph.kv_heads, graph.mode
    keys, values = rng.normal(size=(2, n_tokens, kv_heads, size))
    queries = rng.normal(size=(rows, heads, size))
    cells = np.arange(n_tokens) if in_order else rng.permutation(n_tokens + 20)[:n_tokens]
    positions, start = np.arange(n_tokens), band.start_tokens
    if start:
        graph.rope.use(facts.start_factors, band.attention_factor)
        graph.write(keys[:start], values[:start], positions[:start], cells[:start])
        graph.rope.use(band.rescale_factors, band.attention_factor)
    graph.write(keys[start:], values[start:], positions[start:], cells[start:])
    at = positions[-rows:]
    mask = np.full((1, rows, graph.n_cells), -np.inf)
    for row in range(rows):
        mask[0, row, cells[: at[row] + 1]] = 0.0
    found = graph.attend(queries, at, mask)
    stored_keys, stored_values = graph.stored()
    raw = raw_keys(stored_keys[cells], positions, band, facts, mode)
    wanted = expected(band, facts, queries, at, raw, stored_values[cells], positions, mask[0][:, cells], mode)
    graph.close()
    np.testing.assert_allclose(found[0], wanted, atol=atol)


@every_set
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_type(rng, instructions, kind, rows):
    check(rng, instructions, kind=kind, rows=rows, window=150, start=4)


@every_set
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_that_of_attention_without_a_window(rng, instructions, kind, rows):
    check(rng, instructions, kind=kind, rows=rows, window=150, exact=False, atol=2e-2)


@every_set
@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1"])
@pytest.mark.parametrize("rows", [1, 50])
def test_both_kinds_of_pairs_part_of_a_head_and_transforms(rng, instructions, kind, mode, rows):
    check(rng, instructions, kind=kind, rows=rows, window=100, mode=mode, transform=True, exact=False, atol=2e-2)
    check(rng, instructions, kind=kind, rows=rows, window=100, mode=mode, n_rot=32, attention=1.2)
    own = tuple(np.linspace(1, 3, 24).tolist())
    check(
        rng, instructions, kind=kind, rows=rows, window=100, mode=mode, size=96, n_rot=48, own=own, heads=3, kv_heads=3
    )


@every_set
@pytest.mark.parametrize("window", [1, 255, 256, 300, 512])
@pytest.mark.parametrize("rows", [1, 35])
def test_borders_at_any_distance(rng, instructions, window, rows):
    check(rng, instructions, rows=rows, window=window, in_order=True, n_tokens=540)


@every_set
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_several_sequences_and_streams(rng, instructions, kind, rows):
    """Two streams of two sequences each, whose cells alternate, at positions of their own."""
    n_cells, n_tokens = 400, 190
    shape = {"size": 64, "heads": 4, "kv_heads": 2, "n_cells": n_cells, "streams": 2}
    graph, band, facts = make(instructions, True, window=60, kind=kind, **shape)
    keys, values = rng.normal(size=(2, 2, 2, n_tokens, 2, 64))  # of each stream and sequence
    queries, rows_at, masks, wanted = [], [], [], []
    cells = rng.permuted(np.tile(np.arange(n_cells), (2, 1)), axis=1)[:, : 2 * n_tokens].reshape(2, 2, n_tokens)
    starts = np.array([[0, 700], [33, 250]])
    for stream in range(2):
        for sequence in range(2):
            positions = np.arange(n_tokens) + starts[stream, sequence]
            graph.write(
                keys[stream, sequence], values[stream, sequence], positions, cells[stream, sequence] + stream * n_cells
            )
    stored_keys, stored_values = graph.stored()
    for stream in range(2):
        mask = np.full((rows, n_cells), -np.inf)
        for row in range(rows):
            sequence = row % 2
            mine = cells[stream, sequence]
            positions = np.arange(n_tokens) + starts[stream, sequence]
            mask[row, mine] = 0.0
            query = rng.normal(size=(1, 4, 64))
            queries.append(query[0])
            rows_at.append(positions[-1])
            raw = raw_keys(stored_keys[mine + stream * n_cells], positions, band, facts, 0)
            held = stored_values[mine + stream * n_cells]
            wanted.append(expected(band, facts, query, [positions[-1]], raw, held, positions, np.zeros(n_tokens), 0)[0])
        masks.append(mask)
    found = graph.attend(np.array(queries), rows_at, np.array(masks))
    graph.close()
    np.testing.assert_allclose(found.reshape(2 * rows, 4, 64), np.array(wanted), atol=5e-4)


@pytest.mark.parametrize("instructions", SETS[:-1], ids=lambda one: one.name)
@pytest.mark.parametrize("rows", [1, 60])
def test_the_number_of_threads_changes_nothing(rng, instructions, rows):
    keys, values = rng.normal(size=(2, 900, 2, 64))
    queries, mask = rng.normal(size=(rows, 6, 64)), np.zeros((1, rows, 900))
    found = []
    for n_threads in (1, 2, 5):
        graph, _, _ = make(instructions, False, window=300, kind="q8_0", size=64, heads=6, kv_heads=2, n_cells=900)
        graph.n_threads = n_threads
        graph.write(keys, values, np.arange(900), np.arange(900))
        found.append(graph.attend(queries, np.arange(900 - rows, 900), mask))
        graph.close()
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("instructions", (SETS[0], TORCH))
def test_attention_that_cannot_have_a_window_fails(rng, instructions):
    """Queries that were changed after their rotation: without a word they would see all distances as far."""
    graph, _, _ = make(instructions, True, window=10, kind="f16", size=64, heads=2, kv_heads=2, n_cells=64)
    graph.rotated = lambda x, positions: graph.call(
        "ggml_rms_norm", Sequences.rotated(graph, x, positions), 1e-5, types=[ctypes.c_float]
    )
    with pytest.raises(NodeError, match="near window"):
        graph.attend(rng.normal(size=(2, 2, 64)), [20, 21], np.zeros((1, 2, 64)))
    graph.close()
