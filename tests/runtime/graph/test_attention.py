"""Attention nodes computed in torch: against float64 on random tensors, inside real models, and on a failure."""

from pathlib import Path

import numpy as np
import pytest
import ropewalk
import torch
from attention_nodes import Graph, causal, draw, reference, stored
from ropewalk.runtime.graph import attention, attention_jobs
from ropewalk.runtime.graph.attention import FastAttention
from ropewalk.runtime.graph.attention_jobs import visible_spans
from ropewalk.runtime.graph.hook import NodeError
from ropewalk.runtime.graph.takeover import torch_on_one_thread


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")


KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def check(q, k, v, mask, kind_k="f16", kind_v=None, sinks=None, n_threads=2, taken=1):
    kind_v = kind_v or kind_k
    graph, fast = Graph(q, k, v, mask, kind_k, kind_v, sinks), FastAttention()
    with torch_on_one_thread():
        found = graph.compute(fast.see, n_threads)
    fast.nodes.raise_kept()
    graph.close()
    assert fast.nodes.taken == taken
    expected = reference(q, stored(k, kind_k), stored(v, kind_v), mask, graph.scale, sinks)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_type_against_float64(rng, kind):
    check(*draw(rng, 70, 300), causal(70, 300), kind)


@pytest.mark.parametrize("kinds", [("q8_0", "f16"), ("f16", "q4_0"), ("q4_0", "bf16")])
def test_k_and_v_of_different_types(rng, kinds):
    check(*draw(rng, 40, 200), causal(40, 200), *kinds)


@pytest.mark.parametrize("shape", [(1, 1, 32), (8, 8, 128), (9, 3, 64), (16, 2, 96), (5, 1, 256), (4, 2, 80)])
def test_any_head_size_and_grouping(rng, shape):
    heads, kv_heads, size = shape
    check(*draw(rng, 33, 257, heads, kv_heads, size), causal(33, 257))


@pytest.mark.parametrize("sizes", [(96, 64), (64, 96)])
def test_keys_and_values_of_different_sizes(rng, sizes):
    q, k, v = draw(rng, 48, 200, size=sizes[0], v_size=sizes[1])
    check(q, k, v, causal(48, 200), "q8_0")


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8, 32])
def test_any_number_of_threads(rng, n_threads):
    check(*draw(rng, 100, 700), causal(100, 700), "q8_0", n_threads=n_threads)


def test_a_cache_longer_than_the_scratch_takes_several_rounds(rng, monkeypatch):
    monkeypatch.setattr(attention_jobs, "SCRATCH_BYTES", 4 * 2 * 128 * 128)  # 128 cells
    check(*draw(rng, 64, 1000), causal(64, 1000), "q8_0", n_threads=3)


@pytest.mark.parametrize("rows", [1, 2, 7, 31])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_few_rows_over_many_cells(rng, rows, kind, monkeypatch):
    monkeypatch.setattr(attention, "MIN_FLOATS", 0)
    for n_threads in (1, 2, 5):
        check(*draw(rng, rows, 1100), causal(rows, 1100), kind, n_threads=n_threads)
    check(*draw(rng, rows, 1100), causal(rows, 1100, 90), kind, sinks=rng.normal(size=6))
    check(*draw(rng, rows, 300, streams=2), np.concatenate([causal(rows, 300), causal(rows, 300, 60)]), kind)
    check(*draw(rng, rows, 300), np.full((1, 1, rows, 300), -np.inf), kind)
    check(*draw(rng, rows, 300), None, kind)


@pytest.mark.parametrize("window", [16, 100, 512])
def test_a_sliding_window(rng, window):
    check(*draw(rng, 96, 900), causal(96, 900, window), "q8_0")


def test_several_sequences_in_one_batch(rng):
    mask = np.full((1, 1, 90, 400), -np.inf)
    owner_of_cell, owner_of_row = rng.integers(0, 3, 400), np.repeat([0, 1, 2], 30)
    mask[0, 0][owner_of_row[:, None] == owner_of_cell[None]] = 0
    check(*draw(rng, 90, 400), mask, "q4_0")


def test_several_streams(rng):
    mask = np.concatenate([causal(50, 300), causal(50, 300, 60)])
    check(*draw(rng, 50, 300, streams=2), mask, "q8_0")


def test_rows_and_whole_blocks_that_see_nothing_are_zero(rng):
    mask = causal(80, 300)
    mask[..., 5, :] = mask[..., 40:, :] = -np.inf
    check(*draw(rng, 80, 300), mask, "f16")
    check(*draw(rng, 80, 300), np.full((1, 1, 80, 300), -np.inf), "f16")


def test_other_numbers_in_the_mask_are_added(rng):
    mask = causal(40, 200)
    mask[..., :60] += rng.normal(size=60).astype(np.float16)
    check(*draw(rng, 40, 200), mask, "f16")


def test_no_mask_at_all(rng):
    check(*draw(rng, 40, 130), None, "f16")


def test_attention_sinks(rng):
    check(*draw(rng, 64, 300), causal(64, 300), "q8_0", sinks=rng.normal(size=6) * 3)


@pytest.mark.parametrize("options", [{"rows": 31}, {"max_bias": 8.0}, {"softcap": 30.0}])
def test_what_is_not_covered_is_left_to_llama_cpp(rng, options):
    rows = options.pop("rows", 64)
    q, k, v = draw(rng, rows, 256, heads=4)
    fast = FastAttention()
    stock = Graph(q, k, v, causal(rows, 256), **options).compute()
    found = Graph(q, k, v, causal(rows, 256), **options).compute(fast.see)
    assert fast.nodes.taken == 0
    np.testing.assert_array_equal(found, stock)


def test_spans_of_a_mask():
    mask = torch.from_numpy(causal(64, 1024, 500)[0, 0].astype(np.float16))
    spans = visible_spans(mask)
    seen = [s for s in spans if not s.masked]
    assert seen and spans[0].masked and spans[-1].masked
    assert all((mask[:, s.start : s.stop] == 0).all() for s in seen)
    covered = torch.zeros(1024, dtype=torch.bool)
    for span in spans:
        covered[span.start : span.stop] = True
    assert (mask[:, ~covered] == -torch.inf).all()
    assert covered.sum() < 640  # the cells before the window are skipped


# --- inside models


def logits(llm, tokens):
    llm.eval(tokens)
    found = np.array(llm.scores[: len(tokens)])
    llm.close()
    return found


OPTIONS = {"n_ctx": 2048, "logits_all": True, "verbose": False, "n_threads": 2, "flash_attn": True}


@pytest.fixture(scope="module")
def exact(smollm2):
    """500 tokens of real text, and llama.cpp's logits for them with plain attention over an f32 cache."""
    text = (Path(torch.__file__).parent / "functional.py").read_text(encoding="utf-8")
    llm = ropewalk.Llama(smollm2, kv="f32", **(OPTIONS | {"flash_attn": False}))
    tokens = llm.tokenize(text.encode())[:500]
    return tokens, logits(llm, tokens)


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_a_real_model_is_no_less_exact(smollm2, exact, kv):
    tokens, expected = exact
    fast = ropewalk.Llama(smollm2, kv=kv, **OPTIONS)
    ours = logits(fast, tokens)
    assert fast._fast.attention.nodes.taken == 30
    stock = logits(ropewalk.Llama(smollm2, kv=kv, fast_prefill=False, **OPTIONS), tokens)
    assert np.abs(ours - stock).max() > 0
    assert np.abs(ours - expected).mean() < 1.1 * np.abs(stock - expected).mean()


def test_short_prompts_are_left_to_llama_cpp(smollm2):
    prompt = list(range(300, 320))
    results = []
    for fast in (True, False):
        llm = ropewalk.Llama(smollm2, kv="q8_0", fast_prefill=fast, **OPTIONS)
        results.append(logits(llm, prompt))
    np.testing.assert_array_equal(*results)


def test_a_tiny_model_with_windows_and_any_thread_count(tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m.gguf")
    tokens = [int(t) for t in np.random.default_rng(0).integers(10, 200, 200)]
    options = {"n_ctx": 256, "logits_all": True, "verbose": False, "flash_attn": True, "kv": "f16"}
    stock = logits(ropewalk.Llama(path, fast_prefill=False, **options), tokens)
    for n_threads in (1, 3, 5):
        found = logits(ropewalk.Llama(path, n_threads=n_threads, n_threads_batch=n_threads, **options), tokens)
        np.testing.assert_allclose(found, stock, atol=2e-2)


def test_the_switches(smollm2, monkeypatch):
    assert ropewalk.Llama(smollm2, kv="q8_0", fast_prefill=False, **OPTIONS)._fast is None
    monkeypatch.setenv("ROPEWALK_FAST_PREFILL", "0")
    assert ropewalk.Llama(smollm2, kv="q8_0", **OPTIONS)._fast is None


@pytest.mark.parametrize("where", ["_attend", "_plan"])
def test_a_failure_names_the_node_and_leaves_the_model_usable(smollm2, monkeypatch, where):
    llm = ropewalk.Llama(smollm2, kv="q8_0", **OPTIONS)
    tokens = list(range(300, 400))
    llm.eval(tokens)
    expected = np.array(llm.scores[:100])
    llm.reset()

    def broken(*_, **__):
        raise ArithmeticError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(attention_jobs.PromptJob, where, broken)
        with pytest.raises(NodeError, match=r"attention node .*0.*: ArithmeticError: broken on purpose"):
            llm.eval(tokens)
    assert llm.n_tokens == 0
    llm.eval(tokens)
    np.testing.assert_allclose(llm.scores[:100], expected, atol=1e-4)
    llm.close()


def test_torch_keeps_its_threads(smollm2):
    before = torch.get_num_threads()
    llm = ropewalk.Llama(smollm2, kv="q8_0", **OPTIONS)
    llm.eval(list(range(300, 400)))
    llm.close()
    assert torch.get_num_threads() == before
