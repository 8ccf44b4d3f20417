"""Attention in native code, with every instruction set that runs here: against float64, and against llama.cpp's own."""

import numpy as np
import pytest
from attention_nodes import Graph, causal, draw, reference, stored
from ropewalk.runtime.graph.hook import GraphHook
from ropewalk.runtime.graph.kernels import Context, instruction_sets, why_missing

pytestmark = pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")

SETS = instruction_sets()
KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
every_set = pytest.mark.parametrize("instructions", SETS, ids=lambda one: one.name)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def compute(graph, instructions=None, exact=True, n_threads=2):
    """The graph's result, computed by the kernels."""
    kernels = Context(instructions, exact)
    kernels.watch(None, nodes=True)
    hook = GraphHook({}, kernels)
    found = graph.compute(lambda node: hook.callback(node, True, hook.userdata), n_threads)
    assert kernels.taken == 1 and kernels.failure == ""
    return found


def check(instructions, q, k, v, mask, kind_k, kind_v=None, **options):
    kind_v = kind_v or kind_k
    graph = Graph(q, k, v, mask, kind_k, kind_v, **options)
    found = compute(graph, instructions)
    graph.close()
    expected = reference(q, stored(k, kind_k), stored(v, kind_v), mask, graph.scale, **options)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@every_set
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_every_cache_type(rng, instructions, kind, rows):
    check(instructions, *draw(rng, rows, 300), causal(rows, 300), kind)


@every_set
@pytest.mark.parametrize("size", [32, 40, 64, 80, 96, 128, 160, 256, 576])
@pytest.mark.parametrize("rows", [1, 33])
def test_any_head_size(rng, instructions, size, rows):
    check(instructions, *draw(rng, rows, 70, heads=4, size=size), causal(rows, 70), "f16")
    if size % 32 == 0:
        check(instructions, *draw(rng, rows, 70, heads=4, size=size), causal(rows, 70), "q8_0", "q4_0")


@every_set
@pytest.mark.parametrize("sizes", [(576, 512), (192, 128), (64, 96)], ids=str)
@pytest.mark.parametrize("rows", [1, 33])
def test_keys_and_values_of_different_sizes(rng, instructions, sizes, rows):
    q, k, v = draw(rng, rows, 70, heads=4, kv_heads=1, size=sizes[0], v_size=sizes[1])
    check(instructions, q, k, v, causal(rows, 70), "q8_0")
    check(instructions, q, k, v, causal(rows, 70), "f16", "q5_0")


@every_set
@pytest.mark.parametrize("heads", [(1, 1), (7, 7), (7, 1), (12, 4), (16, 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_any_grouping_of_heads(rng, instructions, heads, rows):
    check(instructions, *draw(rng, rows, 130, *heads, size=64), causal(rows, 130), "q8_0")
    check(instructions, *draw(rng, rows, 130, *heads, size=64), causal(rows, 130), "f16")


@every_set
@pytest.mark.parametrize("cells", [1, 15, 16, 31, 255, 257, 600])
@pytest.mark.parametrize("rows", [1, 45])
def test_any_number_of_cells(rng, instructions, cells, rows):
    rows = min(rows, cells)
    check(instructions, *draw(rng, rows, cells), causal(rows, cells), "q8_0")
    check(instructions, *draw(rng, rows, cells), causal(rows, cells), "f16")


@every_set
@pytest.mark.parametrize("rows", [1, 40])
def test_windows_holes_and_rows_that_see_nothing(rng, instructions, rows):
    q, k, v = draw(rng, rows, 900)
    check(instructions, q, k, v, causal(rows, 900, window=100), "q8_0")
    holes = np.where(rng.random((1, 1, rows, 900)) < 0.5, 0.0, -np.inf)
    check(instructions, q, k, v, holes, "q8_0")
    blind = causal(rows, 900)
    blind[..., -1, :] = -np.inf
    for kind in ("q8_0", "f16"):
        graph = Graph(q, k, v, blind, kind, kind)
        assert not compute(graph, instructions)[:, -1].any()
        graph.close()


@every_set
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1"])
def test_several_streams_with_biases_and_sinks(rng, instructions, rows, kind):
    q, k, v = draw(rng, rows, 500, streams=3)
    mask = np.concatenate([causal(rows, 500, window) for window in (None, 50, 400)])
    mask += np.where(mask == 0, rng.normal(size=mask.shape).astype(np.float16), 0)
    check(instructions, q, k, v, mask, kind, sinks=rng.normal(size=6), max_bias=8.0, softcap=15.0)


@every_set
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("rows", "cells"), [(1, 5000), (4, 900), (60, 900)])
def test_the_number_of_threads_changes_nothing(rng, instructions, exact, rows, cells):
    graph = Graph(*draw(rng, rows, cells), causal(rows, cells), "q8_0", "q8_0")
    alone = compute(graph, instructions, exact, 1)
    graph.close()
    for n_threads in (2, 3, 16):
        graph = Graph(*draw(np.random.default_rng(11), rows, cells), causal(rows, cells), "q8_0", "q8_0")
        np.testing.assert_array_equal(compute(graph, instructions, exact, n_threads), alone)
        graph.close()


@every_set
@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_0"])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_rounding_costs_no_more_than_llama_cpps(rng, instructions, kind, rows):
    """Keys with a few large numbers in the same places, as models have them."""
    q, k, v = draw(rng, rows, 700)
    q[..., :3] *= 8
    k[..., :3] *= 4
    exact = reference(q, stored(k, kind), stored(v, kind), causal(rows, 700), 0.125)

    def error(found):
        return np.sqrt(np.mean((found - exact) ** 2))

    graph = Graph(q, k, v, causal(rows, 700), kind, kind)
    theirs = error(graph.compute())
    ours = error(compute(graph, instructions, exact=False))
    graph.close()
    assert ours <= theirs


@every_set
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_what_is_not_a_number_is_seen_in_the_result(rng, instructions, rows, spoilt):
    q, k, v = draw(rng, rows, 300)
    q[0, 0, -1, 5] = spoilt
    for kind in ("f16", "q8_0"):
        graph = Graph(q, k, v, causal(rows, 300), kind, kind)
        assert not np.isfinite(compute(graph, instructions, exact=False)[0, -1, 0]).all()
        graph.close()
