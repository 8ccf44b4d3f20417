"""The graph callback in native code: which attention nodes it takes over, when Python sees nodes, whole models."""

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import ropewalk
from attention_nodes import Graph, causal, draw, reference, stored
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Band, Schedule
from ropewalk.runtime.graph import ggml
from ropewalk.runtime.graph.hook import GraphHook, NodeError
from ropewalk.runtime.graph.kernels import Context, why_missing

pytestmark = pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def watching(exact=True):
    """A context that takes over all nodes it covers, and its callback."""
    kernels = Context(exact=exact)
    kernels.watch(None, nodes=True)
    return kernels, GraphHook({}, kernels)


def take(graph_hook):
    return lambda node: graph_hook.callback(node, True, graph_hook.userdata)


# --- single nodes


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_bias": 8.0},
        {"softcap": 20.0},
        {"max_bias": 4.0, "softcap": 30.0},
        {"sinks": np.array([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])},
    ],
    ids=str,
)
@pytest.mark.parametrize("kinds", [("f16", "f16"), ("q8_0", "q4_0"), ("q5_0", "bf16"), ("f32", "q5_1")], ids=str)
def test_attention_of_every_kind_is_taken_over(rng, rows, options, kinds):
    q, k, v = draw(rng, rows, 300)
    kernels, hook = watching()
    graph = Graph(q, k, v, causal(rows, 300), *kinds, **options)
    found = graph.compute(take(hook))
    assert kernels.taken == 1 and kernels.failure == ""
    expected = reference(q, stored(k, kinds[0]), stored(v, kinds[1]), causal(rows, 300), graph.scale, **options)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    again = graph.compute(take(hook))  # the graph is reused, its node is a CUSTOM one by now
    np.testing.assert_array_equal(again, found)
    assert kernels.taken == 2
    graph.close()


def spoil_query_type(node, sources):
    sources["q"].type = 1


def spoil_query_step(node, sources):
    sources["q"].nb[0] = 8


def spoil_mask_type(node, sources):
    sources["mask"].type = 0


def spoil_mask_heads(node, sources):
    sources["mask"].ne[2] = 6


def spoil_mask_width(node, sources):
    sources["mask"].ne[0] = 255


def spoil_mask_rows(node, sources):
    sources["mask"].ne[1] = 3


def spoil_key_step(node, sources):
    sources["k"].nb[0] = 4


def spoil_key_type(node, sources):
    sources["k"].type = 26  # GGML_TYPE_I32


def spoil_key_blocks(node, sources):
    sources["k"].type, sources["k"].nb[0] = 12, 144  # GGML_TYPE_Q4_K, of 256 values a block


def spoil_value_cells(node, sources):
    sources["v"].ne[1] = 255


def spoil_heads(node, sources):
    sources["k"].ne[2] = sources["v"].ne[2] = 4


def spoil_result(node, sources):
    node.nb[1] += 4


def spoil_sinks(node, sources):
    sources["sinks"].type = 1


SPOILED = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__[6:])
def test_what_cannot_be_computed_is_left_alone(rng, spoil):
    graph = Graph(*draw(rng, 5, 256), causal(5, 256), sinks=np.zeros(6))
    node = ggml.tensor_at(graph.node)
    names = ("q", "k", "v", "mask", "sinks")
    spoil(node, {name: ggml.tensor_at(source) for name, source in zip(names, node.src[:5], strict=True)})
    before = bytes(node)
    _, hook = watching()
    assert take(hook)(graph.node) is False
    assert bytes(node) == before
    graph.close()


def test_nodes_of_other_operations_are_left_alone(rng):
    graph = Graph(*draw(rng, 5, 256), causal(5, 256))
    before = bytes(ggml.tensor_at(graph.node))
    kernels = Context()
    kernels.watch(None, nodes=False)
    hook = GraphHook({}, kernels)
    assert take(hook)(graph.node) is False
    assert bytes(ggml.tensor_at(graph.node)) == before
    graph.close()


# --- when Python sees nodes


def test_python_sees_the_nodes_of_a_pass_over_the_cache(rng):
    kernels, hook = watching()
    graph = Graph(*draw(rng, 5, 256), causal(5, 256))
    seen = []
    with hook.stopping_tokens({"FLASH_ATTN_EXT": seen.append}):
        assert take(hook)(graph.node) is False
    assert seen == [graph.node] and kernels.taken == 0
    assert ggml.tensor_at(graph.node).op == ggml.op_code("FLASH_ATTN_EXT")
    take(hook)(graph.node)  # afterwards it does not
    assert seen == [graph.node] and ggml.tensor_at(graph.node).op == ggml.op_code("CUSTOM")
    graph.close()


def test_an_exception_is_kept_and_stops_the_graph(rng):
    _, hook = watching()
    graph = Graph(*draw(rng, 5, 256), causal(5, 256))

    def broken(_):
        raise ArithmeticError("broken on purpose")

    with hook.stopping_tokens({"FLASH_ATTN_EXT": broken}):
        assert take(hook)(graph.node) is True
        assert hook.callback(graph.node, False, hook.userdata) is False
    assert take(hook)(graph.node) is True  # until it is raised
    with pytest.raises(ArithmeticError, match="on purpose"):
        hook.raise_kept()
    assert take(hook)(graph.node) is False
    assert ggml.tensor_at(graph.node).op == ggml.op_code("CUSTOM")
    graph.close()


def test_what_stops_a_graph():
    kernels, _ = watching()
    must_stop = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(kernels.must_stop)
    assert not must_stop(kernels.address)
    kernels.stop(True)
    assert must_stop(kernels.address)
    kernels.stop(False)
    assert not must_stop(kernels.address)


# --- failures

OUT_OF_MEMORY = """
import ctypes, resource
import numpy as np
from attention_nodes import Graph, causal, draw
from ropewalk.runtime.graph import ggml
from ropewalk.runtime.graph.fast import NativeNodes
from ropewalk.runtime.graph.hook import NodeError
from ropewalk.runtime.graph.hook import GraphHook
from ropewalk.runtime.graph.kernels import Context

kernels = Context()
kernels.watch(None, nodes=True)
hook, nodes = GraphHook({}, kernels), NativeNodes(kernels)
see = lambda node: hook.callback(node, True, hook.userdata)
rng = np.random.default_rng(0)
Graph(*draw(rng, 100, 256), causal(100, 256)).compute(see)  # now there are two threads, and each has a little memory
graph = Graph(*draw(rng, 100, 2000, 8, 1, 512), causal(100, 2000))
ggml.tensor_at(graph.node).name = b"attention-7"
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
held = []
try:
    while True:
        held.append(bytearray(1 << 16))
except MemoryError:
    pass
try:
    graph.compute(see)
except MemoryError:  # for the result's copy
    pass
del held
resource.setrlimit(resource.RLIMIT_AS, limits)
must_stop = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(kernels.must_stop)
assert nodes.failed and nodes.taken == 1 and must_stop(kernels.address)
try:
    nodes.raise_kept()
except NodeError as error:
    print(error)
graph.compute(see)
assert nodes.taken == 2 and not nodes.failed and not must_stop(kernels.address)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space cannot be limited there")
def test_a_thread_without_memory_names_the_node():
    assert in_child(OUT_OF_MEMORY) == "node attention-7: out of memory\n"


def in_child(code, *arguments):
    """What a program prints that can import what tests do."""
    start = f"import sys; sys.path[:] = {[str(Path(__file__).parents[2]), *sys.path]!r}\n{code}"
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # threads have no memory of their own in reserve
    words = [sys.executable, "-c", start, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- models

QUIET = {"verbose": False, "n_threads": 2, "n_threads_batch": 2, "n_ctx": 250}
TOKENS = [(37 * i) % 250 + 5 for i in range(250)]


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    return tiny_llama(tmp_path / "tiny.gguf", n_embd=128)


def two_bands(path):
    facts = native_schedule(read_header(path)).facts
    factors = tuple(np.linspace(1, 5, facts.n_rot // 2).tolist())
    bands = (
        Band(context=100, rescale_factors=facts.start_factors),
        Band(context=250, rescale_factors=factors, start_tokens=4, attention_factor=1.2),
    )
    return Schedule(facts=facts, bands=bands)


def last_logits(llm):
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


def conversation(llm):
    """Logits along a text that moves to the longer band, and back after a rollback."""
    found = []
    for tokens in (TOKENS[:40], TOKENS[40:41], TOKENS[41:42], TOKENS[42:140], TOKENS[140:141]):
        llm.eval(tokens)
        found.append(last_logits(llm))
    llm.rewind(60)
    llm.eval(TOKENS[60:70])
    return [*found, last_logits(llm)]


def test_the_native_callback_gives_what_pythons_does(tiny, monkeypatch):
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("ROPEWALK_KERNELS", switch)
        llm = ropewalk.Llama(tiny, schedule=two_bands(tiny), kv="f32", fast_prefill=False, **QUIET)
        assert (llm._kernels is None) == (switch == "0")
        llm.rotates_natively = False  # keys would differ in their last bits
        found.append(conversation(llm))
        assert llm._rope.touched > 0
        llm.close()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kv", ["f32", "q8_0"])
def test_nodes_that_are_taken_over_are_no_less_exact(tiny, kv, exact):
    def read(**options):
        llm = ropewalk.Llama(tiny, schedule=two_bands(tiny), **options, **QUIET)
        found = np.array(conversation(llm))
        taken = llm.nodes_taken
        llm.close()
        return found, taken

    right, _ = read(kv="f32", flash_attn=False)
    stock, none = read(kv=kv, flash_attn=True, fast_prefill=False)
    ours, taken = read(kv=kv, flash_attn=True, exact=exact)
    assert none == 0 and taken >= 12  # two layers, six decodes
    assert np.abs(ours - right).mean() < 1.3 * np.abs(stock - right).mean()  # each has its own rounding


def test_a_model_says_what_computes_it(tiny, monkeypatch):
    monkeypatch.setenv("ROPEWALK_INSTRUCTIONS", "plain C")
    options = {"kv": "q8_0", **QUIET}

    def computed_by(**more):
        llm = ropewalk.Llama(tiny, **options, **more)
        llm.close()
        return llm.computed_by

    assert computed_by() == "plain C" and computed_by(exact=True) == "plain C exact"
    monkeypatch.setenv("ROPEWALK_EXACT", "1")
    assert computed_by() == "plain C exact" and computed_by(exact=False) == "plain C"
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")
    assert computed_by() == "torch" and computed_by(fast_prefill=False) == "llama.cpp"


def test_a_model_pickles_whether_it_is_exact(tiny):
    llm = ropewalk.Llama(tiny, kv="q8_0", exact=True, **QUIET)
    assert llm._kernels.exact and llm.__getstate__()["exact"] is True
    llm.close()


def test_several_models_in_one_process(tiny, tiny_llama, tmp_path):
    other = tiny_llama(tmp_path / "other.gguf", n_embd=64, seed=5)
    paths, options = (tiny, other, tiny), {"kv": "q8_0", **QUIET}
    alone = []
    for path in paths:
        llm = ropewalk.Llama(path, **options)
        llm.eval(TOKENS[:60])
        llm.eval(TOKENS[60:61])
        alone.append(last_logits(llm))
        llm.close()
    llms = [ropewalk.Llama(path, **options) for path in paths]
    for llm in llms:
        llm.eval(TOKENS[:60])
    llms.pop().close()
    for llm, expected in zip(llms, alone, strict=False):
        llm.eval(TOKENS[60:61])
        np.testing.assert_array_equal(last_logits(llm), expected)
        llm.close()


def test_what_the_kernels_keep_is_freed_after_the_context(tiny):
    llm = ropewalk.Llama(tiny, kv="q8_0", **QUIET)
    llm.eval(TOKENS[:40])
    kernels = weakref.ref(llm._kernels)
    llm.close()
    assert llm.nodes_taken > 0  # it is still there
    del llm
    gc.collect()
    assert kernels() is None


def test_a_failure_names_the_node_and_leaves_the_model_usable(tiny, monkeypatch):
    llm = ropewalk.Llama(tiny, kv="q8_0", **QUIET)
    llm.eval(TOKENS[:100])
    expected = last_logits(llm)
    llm.reset()
    with monkeypatch.context() as patch:
        patch.setattr(Context, "failure", "__fattn__-1: out of memory")
        with pytest.raises(NodeError, match=r"node __fattn__-1: out of memory"):
            llm.eval(TOKENS[:100])
    assert llm.n_tokens == 0
    llm.eval(TOKENS[:100])
    np.testing.assert_array_equal(last_logits(llm), expected)
    llm.close()
