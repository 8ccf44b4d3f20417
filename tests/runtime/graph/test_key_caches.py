"""Where the cached keys are found to lie in whole models, and what their native rotation makes of them."""

import numpy as np
import pytest
import ropewalk
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Band, Schedule
from ropewalk.runtime.graph import kernels
from ropewalk.runtime.graph.key_caches import KeySurvey
from runtime.key_layouts import Layout, _write_model

pytestmark = pytest.mark.skipif(bool(kernels.why_missing()), reason="the kernels were not compiled")

QUIET = {"n_threads": 2, "n_threads_batch": 2, "verbose": False}
TOKENS = [(37 * i) % 250 + 5 for i in range(200)]


def two_bands(path):
    facts = native_schedule(read_header(path)).facts
    factors = tuple(np.linspace(1, 5, facts.n_rot // 2).tolist())
    bands = (
        Band(context=100, rescale_factors=facts.start_factors),
        Band(context=200, rescale_factors=factors, start_tokens=4, attention_factor=1.2),
    )
    return Schedule(facts=facts, bands=bands)


def load(path, schedule=None, **options):
    return ropewalk.Llama(path, schedule=schedule or two_bands(path), n_ctx=200, **options, **QUIET)


def last(llm, tokens):
    llm.eval(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


@pytest.fixture
def one_layer(tmp_path):
    def write(head, n_rot):
        path = tmp_path / f"{head}-{n_rot}.gguf"
        _write_model(path, Layout(head, n_rot, "f32"))
        return path

    return write


def test_a_real_models_keys_are_found(smollm2):
    llm = load(smollm2, kv="f16")
    found = llm._keys.caches
    assert (len(found.layers), found.halves) == (30, False)
    assert {(keys.n_heads, keys.head_size, keys.type, keys.hadamard) for keys in found.layers} == {(3, 64, 1, 0)}
    assert len({keys.data for keys in found.layers}) == 30
    assert llm.n_tokens == 0 and not llm.nodes_taken
    llm.close()


@pytest.mark.parametrize(
    ("head", "n_rot", "kv", "disable", "expected"),
    [
        (64, 64, "f32", "0", (False, 0)),
        (64, 64, "q8_0", "0", (False, 64)),
        (128, 128, "q4_0", "0", (False, 128)),
        (192, 192, "q8_0", "0", (False, 64)),
        (128, 128, "q4_0", "1", (False, 0)),
        (96, 96, "q8_0", "0", (False, 0)),
        (80, 20, "f16", "0", (True, 0)),  # a stablelm
        (64, 32, "q8_0", "0", (True, 64)),
    ],
)
def test_how_keys_are_cached(one_layer, monkeypatch, head, n_rot, kv, disable, expected):
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", disable)
    for flash_attn in (True, False):
        llm = load(one_layer(head, n_rot), kv=kv if flash_attn else f"{kv}:f16", flash_attn=flash_attn)
        (keys,) = llm._keys.caches.layers
        assert (llm._keys.caches.halves, keys.hadamard) == expected
        assert (keys.n_heads, keys.head_size) == (1, head)
        llm.close()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("head", "n_rot"), [(64, 64), (128, 32)])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0", "q5_1", "q4_0"])
def test_native_rotation_is_no_less_exact_than_a_k_shift(one_layer, kv, head, n_rot, exact):
    """Of one layer, keys depend on the tokens alone: rotated ones must be those that the band itself gives."""
    path = one_layer(head, n_rot)
    schedule = two_bands(path)
    stayed = load(path, schedule.only(1), kv=kv, exact=exact)
    stayed.eval(TOKENS[:140])
    direct = last(stayed, TOKENS[140:150])
    distances = {}
    for native in (True, False):
        llm = load(path, kv=kv, exact=exact)
        llm.rotates_natively = native
        changes = []
        llm.on_band_change = changes.append
        llm.eval(TOKENS[:90])
        llm.eval(TOKENS[90:140])
        distances[native] = float(np.abs(last(llm, TOKENS[140:150]) - direct).max())
        shifts = kv in ("f32", "f16") or n_rot == head
        assert [change.reread for change in changes] == [not (native or shifts)]
        if kv == "f32" and native:
            assert distances[native] < 1e-4
        llm.close()
    if shifts:
        assert distances[True] < 1.5 * distances[False] + 1e-5


def test_keys_that_are_not_made_as_expected_are_left_to_the_k_shift(one_layer, monkeypatch):
    see = KeySurvey._see_rope
    monkeypatch.setattr(KeySurvey, "_see_rope", lambda self, node: (see(self, node), see(self, node)))
    path = one_layer(64, 64)
    llm = load(path, kv="f32")
    changes = []
    llm.on_band_change = changes.append
    assert not llm.rotates_natively
    llm.eval(TOKENS[:90])
    llm.eval(TOKENS[90:150])
    assert [change.reread for change in changes] == [False]


def test_nothing_is_found_where_nothing_is_seen():
    assert KeySurvey(lambda node: True, lambda keys: True, lambda node: None).caches() is None
