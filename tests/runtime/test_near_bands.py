"""Bands with a near window in the run time: as the torch reader computes them, through moves, states and rollbacks."""

import logging
import pickle
import pydoc_data.topics

import llama_cpp
import numpy as np
import pytest
import ropewalk
import torch
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import STILL_FACTOR, Band, Schedule, extend, native_band, plain_band, without_windows
from ropewalk.runtime.graph.kernels import why_missing
from ropewalk.runtime.measure.torch_reader.model import load_torch_model

QUIET = {"verbose": False, "n_threads": 2, "n_threads_batch": 2}
TOKENS = [(37 * i * i + 11 * i) % 250 + 5 for i in range(250)]
TEXT = "\n\n".join(pydoc_data.topics.topics.values())


def head_norms(writer):
    rng = np.random.default_rng(5)
    for i in range(2):
        for name in ("q", "k"):
            writer.add_tensor(f"blk.{i}.attn_{name}_norm.weight", (1 + rng.random(64) / 2).astype(np.float32))


def gemma(writer):
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_sliding_window(48)
    for i in range(6):
        for name, n in (("attn_q_norm", 64), ("attn_k_norm", 64), ("post_attention_norm", 128), ("post_ffw_norm", 128)):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.full(n, 1.5, dtype=np.float32))


MODELS = {
    "llama": {"n_embd": 128},
    "qwen3": {"n_embd": 128, "arch": "qwen3", "extend": head_norms},
    "factors of its own": {"n_embd": 128, "rope_freqs": np.linspace(1, 2, 32).tolist()},
}


@pytest.fixture(params=["kernels", "torch"])
def where(request, monkeypatch):
    """What computes attention."""
    if request.param == "torch":
        monkeypatch.setenv("ROPEWALK_KERNELS", "0")
    elif why_missing():
        pytest.skip("the kernels were not compiled")
    return request.param


@pytest.fixture
def load():
    opened = []

    def make(path, **options):
        llm = ropewalk.Llama(path, **{**QUIET, "n_ctx": 250, "kv": "f32", "flash_attn": True, "exact": True, **options})
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


def near_bands(path, start_tokens=0):
    """The model's own band to 100 tokens, and near windows of 40 and 64 tokens to 180 and 250.

    Beyond the second window, the fastest pairs stand still.
    """
    facts = native_schedule(read_header(path)).facts
    bands = [native_band(facts).model_copy(update={"context": 100})]
    for context, near, high in ((180, 40, 4.0), (250, 64, 8.0)):
        far = np.linspace(1.5, high, facts.n_rot // 2) * np.array(facts.start_factors)
        far[: 5 if near == 64 else 0] = STILL_FACTOR
        bands.append(
            Band(context=context, near_tokens=near, rescale_factors=tuple(far.tolist()), start_tokens=start_tokens)
        )
    return Schedule(facts=facts, bands=tuple(bands))


def last(llm, tokens):
    llm.eval(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start_tokens", [0, 8])
def test_losses_are_those_of_the_torch_reader(tiny_llama, tmp_path, where, load, name, start_tokens):
    path = tiny_llama(tmp_path / "tiny.gguf", **MODELS[name])
    schedule = near_bands(path, start_tokens)
    reader = load_torch_model(path, dtype=torch.float64, threads=2)
    for index, n_tokens in ((1, 170), (2, 245)):
        for n_batch in (512, 33):
            llm = load(path, schedule=schedule.only(index), n_batch=n_batch, n_ctx=schedule.bands[index].context)
            found = llm.token_losses(TOKENS[:n_tokens])
            expected = reader.token_losses(TOKENS[:n_tokens], schedule.bands[index], range(1, n_tokens))
            assert np.abs(found - expected).mean() < 5e-3  # llama.cpp casts the cache to f16
            plain = schedule.bands[index].model_copy(update={"near_tokens": 0})
            other = reader.token_losses(TOKENS[:n_tokens], plain, range(1, n_tokens))
            assert np.abs(found - other).mean() > 0.1  # the window makes a difference that is seen


def test_written_tokens_see_what_read_ones_do(tiny_llama, tmp_path, where, load):
    path = tiny_llama(tmp_path / "tiny.gguf", **MODELS["llama"])
    schedule = near_bands(path)
    read, written = (load(path, schedule=schedule.only(2)) for _ in range(2))
    expected = last(read, TOKENS[:240])
    written.eval(TOKENS[:150])
    for token in TOKENS[150:239]:
        written.eval([token])
    np.testing.assert_allclose(last(written, [TOKENS[239]]), expected, atol=2e-3)


def test_a_window_over_the_whole_text_is_the_models_own_band(tiny_llama, tmp_path, where, load):
    path = tiny_llama(tmp_path / "tiny.gguf", **MODELS["llama"])
    facts = native_schedule(read_header(path)).facts
    wide = Band(context=260, near_tokens=250, rescale_factors=(5.0,) * (facts.n_rot // 2))
    losses = [
        load(path, schedule=Schedule(facts=facts, bands=(band,))).token_losses(TOKENS)
        for band in (wide, native_band(facts))
    ]
    assert np.abs(losses[0] - losses[1]).mean() < 3e-3  # the cache's rounding, of keys in another rotation


# What rounding keys that were rotated moves a tiny model's logits by, for each type of cache.
PRECISION = {"f32": 2e-2, "f16": 2e-2, "q8_0": 0.25, "q4_0": 3.5}  # after two moves


@pytest.mark.parametrize("kv", PRECISION)
@pytest.mark.parametrize("start_tokens", [0, 8])
def test_moving_into_a_near_window_is_being_in_it_from_the_start(tiny_llama, tmp_path, where, load, kv, start_tokens):
    # With one layer the keys depend on the tokens alone: a rotated cache must be the one that the band itself writes.
    path = tiny_llama(tmp_path / "one.gguf", n_embd=128, n_layer=1)
    schedule = near_bands(path, start_tokens)
    moved = load(path, schedule=schedule, kv=kv)
    changes = []
    moved.on_band_change = changes.append
    for start, stop in ((0, 90), (90, 170), (170, 230)):
        moved.eval(TOKENS[start:stop])
    direct = load(path, schedule=schedule.only(2), kv=kv)
    direct.eval(TOKENS[:230])
    a, b = last(moved, TOKENS[230:240]), last(direct, TOKENS[230:240])
    assert [(change.new_index, change.reread) for change in changes] == [(1, False), (2, False)]
    assert np.abs(a - b).max() < PRECISION[kv]
    moved.n_tokens = 50  # and back
    direct = load(path, schedule=schedule.only(0), kv=kv, n_ctx=100)
    direct.eval(TOKENS[:50])
    assert np.abs(last(moved, TOKENS[50:60]) - last(direct, TOKENS[50:60])).max() < PRECISION[kv]
    assert moved.band_index == 0


def test_saved_states_and_other_schedules(tiny_llama, tmp_path, where, load):
    path = tiny_llama(tmp_path / "tiny.gguf", **MODELS["llama"])
    schedule = near_bands(path, 4)
    first = load(path, schedule=schedule)
    first.eval(TOKENS[:200])
    state = pickle.loads(pickle.dumps(first.save_state()))
    raw, tokens = first.sequence_state(), first.tokens
    expected = last(first, TOKENS[200:220])
    other = load(path, schedule=schedule)
    other.eval(TOKENS[7:70])  # what its cells held before must not matter
    other.load_state(state)
    assert other.band == schedule.bands[2]
    np.testing.assert_allclose(last(other, TOKENS[200:220]), expected, atol=1e-4)
    other.restore(tokens, raw, schedule.bands[2])
    np.testing.assert_allclose(last(other, TOKENS[200:220]), expected, atol=1e-4)
    other.n_tokens = 200
    other.set_schedule(without_windows(schedule))
    assert not other.band.near_tokens
    assert np.abs(last(other, TOKENS[200:220]) - expected).max() > 1e-2
    other.n_tokens = 200
    other.set_schedule(schedule)
    np.testing.assert_allclose(last(other, TOKENS[200:220]), expected, atol=5e-2)  # later keys saw the other band


def test_sliding_window_layers_with_another_base_have_no_near_window(tiny_llama, tmp_path, where, load):
    path = tiny_llama(tmp_path / "g.gguf", arch="gemma3", n_layer=6, n_embd=128, freq_base=1e6, extend=gemma)
    schedule = near_bands(path)
    windowed = load(path, schedule=schedule.only(2))
    assert windowed.serves_near_windows
    wide = schedule.bands[2].model_copy(update={"near_tokens": 249})
    native = Schedule(facts=schedule.facts, bands=(native_band(schedule.facts),))
    all_near = load(path, schedule=Schedule(facts=schedule.facts, bands=(wide,)))
    found, same, own = (x.token_losses(TOKENS) for x in (windowed, all_near, load(path, schedule=native)))
    np.testing.assert_allclose(same, own, atol=2e-3)
    assert np.abs(found - own).max() > 1e-2


@pytest.mark.parametrize("options", [{"fast_prefill": False}, {"flash_attn": False}], ids=str)
def test_attention_that_is_left_to_llama_cpp_gets_the_plain_factors(tiny_llama, tmp_path, caplog, load, options):
    path = tiny_llama(tmp_path / "tiny.gguf", **MODELS["llama"])
    schedule = near_bands(path)
    with caplog.at_level(logging.WARNING, "ropewalk"):
        llm = load(path, schedule=schedule, **options)
    assert "without its schedule's near window" in caplog.text and not llm.serves_near_windows
    assert llm.schedule.bands[2] == plain_band(schedule.facts, schedule.bands[2])
    plain = load(path, schedule=without_windows(schedule), **options)
    np.testing.assert_array_equal(llm.token_losses(TOKENS), plain.token_losses(TOKENS))


def test_a_document_past_the_trained_length_is_read_better(smollm2, load):
    """The first 1,500 tokens of a band for ten times the trained length: distances are seen as they are."""
    facts = native_schedule(read_header(smollm2)).facts
    base = Schedule(facts=facts, bands=(native_band(facts),))
    losses = {}
    for method in ("near", "yarn"):
        schedule = extend(base, 81920, method, contexts=(81920,)).only(-1)
        llm = load(smollm2, schedule=schedule, n_ctx=2048, kv="q8_0", exact=False)
        losses[method] = llm.token_losses(llm.tokenize(TEXT.encode())[:1500]).mean()
    assert losses["near"] < losses["yarn"] - 0.05


def decode(llm, tokens, first, sequence=0):
    """Logits of the last of `tokens` by a bare `llama_decode`, at positions from `first` on."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, i == len(tokens) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), shape=(llm.n_vocab(),)).copy()


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_positions_that_others_shift(tiny_llama, tmp_path, where, load, kv):
    """llama.cpp's own shift of cached keys moves the cells that the window is measured from."""
    path = tiny_llama(tmp_path / "tiny.gguf", **MODELS["llama"])
    llm = load(path, schedule=near_bands(path).only(2), kv=kv)
    memory = llama_cpp.llama_get_memory(llm.ctx)
    decode(llm, TOKENS[:150], 0)
    expected = decode(llm, TOKENS[150:160], 150)
    llama_cpp.llama_memory_seq_rm(memory, 0, 150, -1)
    llama_cpp.llama_memory_seq_add(memory, 0, 0, -1, 37)
    shifted = decode(llm, TOKENS[150:160], 187)
    assert np.abs(shifted - expected).max() < PRECISION[kv]
