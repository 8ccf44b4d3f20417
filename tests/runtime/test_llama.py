"""`ropewalk.Llama` on real models: bands, rollback, saved state, and what it refuses before any work."""

import pickle
import pydoc_data.topics
import signal
import sys
import threading
import time

import llama_cpp
import numpy as np
import pytest
import ropewalk
from ropewalk import UserError
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Band, Schedule, extend, write_schedule, yarn, yarn_attention_factor
from ropewalk.runtime.graph import ggml
from ropewalk.runtime.graph.spans import MOST_ROTATIONS

QUIET = {"verbose": False, "n_threads": 2, "n_threads_batch": 2}
TEXT = "\n\n".join(pydoc_data.topics.topics.values())


def three_bands(path, start_tokens=(0, 16, 4)):
    """Bands at 100, 180 and 250 tokens, so that moves are cheap to watch."""
    facts = native_schedule(read_header(path)).facts
    half, base = facts.n_rot // 2, facts.freq_base
    bands = [Band(context=100, rescale_factors=(1.0,) * half)]
    for context, n in zip((180, 250), start_tokens[1:], strict=True):
        factors = tuple(yarn(facts.n_rot, context / 50, base, 50).tolist())
        attention = yarn_attention_factor(context / 50)
        bands.append(Band(context=context, rescale_factors=factors, start_tokens=n, attention_factor=attention))
    return Schedule(facts=facts, bands=tuple(bands))


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    return tiny_llama(tmp_path / "tiny.gguf", n_embd=128)


@pytest.fixture
def load(request):
    opened = []

    def make(path, **options):
        llm = ropewalk.Llama(path, **{**QUIET, "n_ctx": 250, **options})
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


TOKENS = [(37 * i) % 250 + 5 for i in range(250)]


def last(llm, tokens):
    """Logits after reading `tokens`, through the same prefix reuse that generate() has."""
    llm.eval(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


# What a cache type can keep: an f32 cache shows that rotations are exact, the others add their own rounding.
PRECISION = {"f32": 2e-3, "f16": 2e-2, "q8_0": 0.25, "q4_0": 2.5}


@pytest.mark.parametrize("kv", PRECISION)
def test_moving_up_and_down_again_changes_nothing(tiny, load, kv):
    schedule = three_bands(tiny)
    moved, stayed = load(tiny, schedule=schedule, kv=kv), load(tiny, schedule=schedule, kv=kv)
    changes = []
    moved.on_band_change = changes.append
    moved.eval(TOKENS[:90])
    moved.eval(TOKENS[90:170])
    moved.eval(TOKENS[170:240])
    moved.n_tokens = 60
    there_and_back = last(moved, TOKENS[60:95])
    stayed.eval(TOKENS[:60])
    assert [(c.old_index, c.new_index, c.n_tokens, c.reread) for c in changes] == [
        (0, 1, 90, False),
        (1, 2, 170, False),
        (2, 0, 60, False),
    ]
    assert np.abs(there_and_back - last(stayed, TOKENS[60:95])).max() < PRECISION[kv]


@pytest.mark.parametrize("kv", PRECISION)
def test_keys_rotated_to_a_band_are_those_read_in_it(tiny_llama, tmp_path, load, kv):
    # With one layer the keys depend on the tokens alone: a rotated cache must be the one that the band itself writes.
    path = tiny_llama(tmp_path / "one.gguf", n_embd=128, n_layer=1)
    schedule = three_bands(path)
    rotated = load(path, schedule=schedule, kv=kv)
    rotated.eval(TOKENS[:90])
    rotated.eval(TOKENS[90:170])
    direct = load(path, schedule=schedule.only(2), kv=kv)
    direct.eval(TOKENS[:170])
    a, b = last(rotated, TOKENS[170:200]), last(direct, TOKENS[170:200])
    assert rotated.band_index == 2
    assert np.abs(a - b).max() < PRECISION[kv]


def test_new_factors_over_old_keys_would_be_another_model(tiny_llama, tmp_path, load):
    path = tiny_llama(tmp_path / "one.gguf", n_embd=128, n_layer=1)
    schedule = three_bands(path)
    direct = load(path, schedule=schedule.only(2), kv="f32")
    b = last(direct, TOKENS[:200])
    stale = load(path, schedule=schedule, kv="f32")
    stale.eval(TOKENS[:90])
    stale.band = schedule.bands[2]  # must not happen; shows that the tests around this one can fail
    assert np.abs(last(stale, TOKENS[90:200]) - b).max() > 5 * PRECISION["f32"]


def test_the_short_band_is_the_original_model(smollm2, load):
    tokens = list(range(300, 500))
    long = extend(native_schedule(read_header(smollm2)), 32768)
    ours = load(smollm2, schedule=long, n_ctx=32768, kv="f16", fast_prefill=False)
    stock = llama_cpp.Llama(str(smollm2), n_ctx=256, **QUIET)
    ours.eval(tokens)
    stock.eval(tokens)
    shape = (stock.n_vocab(),)
    expected = np.ctypeslib.as_array(stock._ctx.get_logits(), shape=shape)
    np.testing.assert_array_equal(np.ctypeslib.as_array(ours._ctx.get_logits(), shape=shape), expected)
    stock.close()


def test_generation_moves_up_on_its_own(tiny, load):
    llm = load(tiny, schedule=three_bands(tiny))
    changes = []
    llm.on_band_change = changes.append
    tokens = [token for token, _ in zip(llm.generate(TOKENS[:95], temp=0), range(100), strict=False)]
    assert len(tokens) == 100
    assert [(change.old_index, change.new_index, change.n_tokens) for change in changes] == [(0, 1, 100), (1, 2, 180)]


def test_a_longer_prompt_starts_in_its_own_band(tiny, load):
    llm = load(tiny, schedule=three_bands(tiny))
    changes = []
    llm.on_band_change = changes.append
    llm.eval(TOKENS[:200])
    assert llm.band_index == 2 and not changes
    llm.reset()
    llm.eval(TOKENS[:20])
    assert llm.band_index == 0 and not changes  # nothing was cached that could be rotated


def test_too_many_tokens_are_refused_before_any_work(tiny, load):
    llm = load(tiny, schedule=three_bands(tiny))
    llm.eval(TOKENS[:90])
    with pytest.raises(UserError, match=r"251 tokens are more than the context of 250"):
        llm.eval(TOKENS[:161])
    assert llm.n_tokens == 90 and llm.band_index == 0
    assert llm.n_ctx() == 250  # llama.cpp pads it to 256, which the last band does not hold


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_ctx": 257}, "n_ctx: 257 tokens, expected at most 256, which the model's last band holds"),
        ({"n_ctx": -1}, "n_ctx: -1, expected a number of tokens"),
        ({"n_ctx": "many"}, "n_ctx: 'many', expected"),
        ({"kv": "q9"}, "kv: 'q9', expected"),
        ({"kv": "f16", "type_k": 8}, "either kv or type_k"),
        ({"n_batch": 0}, "n_batch: 0, expected a number of tokens"),
        ({"n_threads": 513}, "n_threads: 513, expected a number of threads up to 512"),
        ({"type_k": 99}, "type_k"),
        ({"rope_freq_base": "many"}, "rope_freq_base: 'many', expected a number"),
        ({"kv_overrides": {"llama.context_length": "long"}}, "kv_overrides: llama.context_length: 'long', expected"),
        ({"lora_path": "nowhere.gguf"}, "nowhere.gguf: cannot read"),
        ({"schedule": "nowhere.json"}, "nowhere.json: cannot read"),
    ],
)
def test_mistakes_give_one_line(tiny, options, message):
    with pytest.raises(UserError) as caught:
        ropewalk.Llama(tiny, **{**QUIET, "n_ctx": 256, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_llama_cpp_refuses_gives_one_line_with_the_reason(tiny_llama, tmp_path, capfd):
    path = tiny_llama(tmp_path / "m.gguf", arch="falcon")  # llama's tensors under another name
    with pytest.raises(UserError, match=r"m\.gguf: llama\.cpp cannot run it: .*key not found in model") as caught:
        ropewalk.Llama(path, n_ctx=256, **QUIET)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_schedule_for_another_model_is_refused(tiny, smollm2, tmp_path):
    write_schedule(extend(native_schedule(read_header(smollm2)), 16384), tmp_path / "s.json")
    with pytest.raises(UserError, match=r"s\.json: the schedule is for freq_base 100000, the model has 10000"):
        ropewalk.Llama(tiny, schedule=tmp_path / "s.json", **QUIET)


def test_llama_cpps_own_rope_options_still_work(tiny, load):
    stock = llama_cpp.Llama(str(tiny), n_ctx=512, rope_freq_base=5e4, **QUIET)
    ours = load(tiny, n_ctx=512, rope_freq_base=5e4, fast_prefill=False)
    stock.eval(TOKENS)
    expected = np.ctypeslib.as_array(stock._ctx.get_logits(), shape=(stock.n_vocab(),))
    np.testing.assert_array_equal(last(ours, TOKENS), expected)
    stock.close()
    with pytest.raises(UserError, match="rope_freq_base: the model has a rescale schedule"):
        ropewalk.Llama(tiny, schedule=three_bands(tiny), rope_freq_base=5e4, **QUIET)


def test_state_is_saved_with_its_band_and_loaded_into_another(tiny, load):
    schedule = three_bands(tiny)
    first = load(tiny, schedule=schedule, kv="f32")
    first.eval(TOKENS[:90])
    short = pickle.loads(pickle.dumps(first.save_state()))
    first.eval(TOKENS[90:170])
    state = first.save_state()
    expected = last(first, TOKENS[170:200])

    other = load(tiny, schedule=schedule, kv="f32")
    other.load_state(state)
    assert (other.n_tokens, other.band_index) == (170, 1)
    np.testing.assert_allclose(last(other, TOKENS[170:200]), expected, atol=1e-4)
    other.load_state(short)
    assert (other.n_tokens, other.band_index) == (90, 0)

    only_long = load(tiny, schedule=schedule.only(2), kv="f32")
    only_long.load_state(short)
    assert only_long.band == schedule.bands[2]  # rotated from the band it was saved in
    foreign = llama_cpp.Llama(str(tiny), n_ctx=250, **QUIET)
    foreign.eval(TOKENS[:10])
    with pytest.raises(UserError, match="not saved by ropewalk"):
        other.load_state(foreign.save_state())
    foreign.close()


def test_completions_and_the_ram_cache(tiny, load):
    llm = load(tiny, schedule=three_bands(tiny))
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompt = "the tea in the interest " * 3
    once = llm.create_completion(prompt, max_tokens=40, temperature=0)["choices"][0]["text"]
    llm.reset()
    assert llm.create_completion(prompt, max_tokens=40, temperature=0)["choices"][0]["text"] == once


def test_it_can_be_pickled(tiny, load):
    llm = load(tiny, schedule=three_bands(tiny), kv="q8_0")
    again = pickle.loads(pickle.dumps(llm))
    assert again.schedule == llm.schedule and again.kv_type == "q8_0" and again.n_ctx() == 250
    again.close()


def test_embeddings_take_the_band_of_the_longest_input(tiny, load):
    plain = load(tiny, schedule=three_bands(tiny, (0, 0, 0)), embedding=True)
    short, long = "tea", "the tea " * 60
    assert len(plain.embed(short)) and plain.band_index == 0
    plain.embed([short, long])
    assert plain.band_index > 0
    with pytest.raises(UserError, match=r"start_tokens \d+, expected 0"):
        load(tiny, schedule=three_bands(tiny), embedding=True).embed(long)


def test_losses_are_those_of_all_logits(tiny, load):
    schedule = three_bands(tiny).only(2)
    llm = load(tiny, schedule=schedule, n_batch=64, logits_all=False)
    losses = llm.token_losses(TOKENS[:200], start=50)
    whole = load(tiny, schedule=schedule, logits_all=True)
    whole.eval(TOKENS[:200])
    log_probabilities = whole.logits_to_logprobs(whole.scores[49:199])
    np.testing.assert_allclose(losses, -log_probabilities[np.arange(150), TOKENS[50:200]], atol=1e-3)
    again = llm.token_losses(TOKENS[:200], start=50)  # from the cached prefix
    np.testing.assert_allclose(again, losses, atol=1e-5)
    chosen = [50, 51, 90, 128, 129, 198, 199]
    for reader in (llm, whole):
        reader.reset()
        found = reader.token_losses(TOKENS[:200], targets=chosen)
        np.testing.assert_allclose(found, losses[np.array(chosen) - 50], atol=1e-5)
    assert len(llm.token_losses(TOKENS[:200], targets=[7])) == 1
    for wrong in ([], [0, 3], [5, 5], [9, 8], [200]):
        with pytest.raises(UserError, match="ascending targets"):
            llm.token_losses(TOKENS[:200], targets=wrong)


def test_another_schedule_at_run_time_rotates_the_cache(tiny_llama, tmp_path, load):
    path = tiny_llama(tmp_path / "one.gguf", n_embd=128, n_layer=1)
    schedule = three_bands(path)
    llm, direct = load(path, schedule=schedule, kv="f32"), load(path, schedule=schedule.only(2), kv="f32")
    llm.eval(TOKENS[:90])
    llm.set_schedule(schedule.only(2))
    direct.eval(TOKENS[:90])
    np.testing.assert_allclose(last(llm, TOKENS[90:100]), last(direct, TOKENS[90:100]), atol=2e-3)


def test_another_schedule_after_a_rollback_rotates_what_is_left(tiny_llama, tmp_path, load):
    path = tiny_llama(tmp_path / "one.gguf", n_embd=128, n_layer=1)
    schedule = three_bands(path)
    other = schedule.model_copy(update={"bands": (schedule.bands[1].model_copy(update={"context": 250}),)})
    llm, direct = load(path, schedule=schedule.only(2), kv="f32"), load(path, schedule=other, kv="f32")
    llm.eval(TOKENS[:90])
    llm.n_tokens = 60  # the cache still holds 90
    llm.set_schedule(other)
    direct.eval(TOKENS[:60])
    np.testing.assert_allclose(last(llm, TOKENS[60:70]), last(direct, TOKENS[60:70]), atol=2e-3)


def test_ctrl_c_while_a_prompt_is_read_leaves_it_usable(smollm2, load):
    llm = load(smollm2, n_ctx=4096)
    tokens = llm.tokenize(TEXT[:20000].encode())[:3500]
    calls = []
    llm.on_progress = lambda done, total: calls.append((done, total))
    started = time.monotonic()
    main = threading.main_thread().ident
    threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        llm.eval(tokens)
    assert time.monotonic() - started < 3.5
    kept = llm.n_tokens
    assert kept % 512 == 0 and kept < len(tokens) and all(total == len(tokens) for _, total in calls)
    llm.on_progress = None
    llm.n_tokens = 0
    fresh = last(llm, tokens[:40])
    llm.n_tokens = 20
    assert np.abs(last(llm, tokens[20:40]) - fresh).max() < 1.0


def test_an_error_inside_the_callback_surfaces(tiny, load, monkeypatch):
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")
    llm = load(tiny, schedule=three_bands(tiny))

    def broken(node):
        raise ZeroDivisionError("in the callback")

    monkeypatch.setitem(llm._graph._handlers, ggml.op_code("ROPE"), broken)
    with pytest.raises(ZeroDivisionError, match="in the callback"):
        llm.eval(TOKENS[:10])
    assert llm.n_tokens == 0
    monkeypatch.undo()
    assert np.isfinite(last(llm, TOKENS[:10])).all()


def test_models_with_factors_of_their_own(tiny_llama, tmp_path, load):
    """The native schedule does what llama.cpp does with the file: Llama 3's factors, linear scaling, YaRN, longrope."""
    half = 32
    ramp = [1 + 7 * i / half for i in range(half)]
    kinds = {
        "freqs": {"rope_freqs": ramp},
        "linear": {"scaling": {"type": "linear", "factor": 4.0}},
        "yarn": {"scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 64}},
        "longrope": {
            "long_factors": ramp,
            "short_factors": [1.0 + i / 100 for i in range(half)],
            "scaling": {"type": "longrope", "original_context_length": 128, "attn_factor": 1.19},
        },
    }
    for name, options in kinds.items():
        path = tiny_llama(tmp_path / f"{name}.gguf", n_embd=128, **options)
        native = native_schedule(read_header(path))
        stock = llama_cpp.Llama(str(path), n_ctx=256, type_k=0, type_v=0, **QUIET)
        stock.eval(TOKENS[:200])
        expected = np.ctypeslib.as_array(stock._ctx.get_logits(), shape=(stock.n_vocab(),)).copy()
        stock.close()
        ours = load(path, n_ctx=256, kv="f32", schedule=native, fast_prefill=False)
        np.testing.assert_allclose(last(ours, TOKENS[:200]), expected, atol=3e-3, err_msg=name)
        extended = extend(native, 1024)
        assert load(path, n_ctx=256, kv="f32", schedule=extended).schedule.bands[0] == native.bands[0]


def test_sliding_window_layers_with_another_base_keep_theirs(tiny_llama, tmp_path, load):
    """Gemma 3: five of six layers have a window and base 10,000; llama.cpp, too, scales only the sixth."""
    n_layer, n_embd, size = 6, 128, 64

    def gemma(writer):
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_sliding_window(32)
        for i in range(n_layer):
            for name, n in (
                ("attn_q_norm", size),
                ("attn_k_norm", size),
                ("post_attention_norm", n_embd),
                ("post_ffw_norm", n_embd),
            ):
                writer.add_tensor(f"blk.{i}.{name}.weight", np.full(n, 1.5, dtype=np.float32))

    path = tiny_llama(tmp_path / "g.gguf", arch="gemma3", n_layer=n_layer, n_embd=n_embd, freq_base=1e6, extend=gemma)
    facts = native_schedule(read_header(path)).facts
    pi = Band(context=256, rescale_factors=(2.0,) * (size // 2))
    stock = llama_cpp.Llama(str(path), n_ctx=256, rope_scaling_type=1, rope_freq_scale=0.5, **QUIET)
    stock.eval(TOKENS[:200])
    expected = np.ctypeslib.as_array(stock._ctx.get_logits(), shape=(stock.n_vocab(),))
    ours = load(path, n_ctx=256, schedule=Schedule(facts=facts, bands=(pi,)), fast_prefill=False)
    np.testing.assert_array_equal(last(ours, TOKENS[:200]), expected)
    stock.close()

    short = Band(context=100, rescale_factors=(1.0,) * (size // 2))
    schedule = Schedule(facts=facts, bands=(short, pi))
    moved, stayed = (load(path, n_ctx=256, schedule=schedule, kv="f32") for _ in range(2))
    moved.eval(TOKENS[:90])
    moved.eval(TOKENS[90:150])
    moved.n_tokens = 60
    stayed.eval(TOKENS[:60])
    assert np.abs(last(moved, TOKENS[60:95]) - last(stayed, TOKENS[60:95])).max() < PRECISION["f32"]

    # A saved state resets llama.cpp's search for free cells to the first: old cells of the window are reused.
    restored = load(path, n_ctx=256, schedule=schedule, kv="f32")
    stayed.eval(TOKENS[95:98])
    restored.load_state(stayed.save_state())
    restored.eval(TOKENS[98:150])
    restored.n_tokens = 60
    stayed.n_tokens = 60
    assert np.abs(last(restored, TOKENS[60:95]) - last(stayed, TOKENS[60:95])).max() < PRECISION["f32"]


def test_a_signal_while_decoding_is_never_lost(tiny, load):
    """Python's handlers run between two bytecodes: an exception that one raises inside a callback from C is lost."""
    llm = load(tiny, schedule=three_bands(tiny))

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    lost = []
    hook, sys.unraisablehook = sys.unraisablehook, lost.append
    try:
        for i in range(60):
            with pytest.raises(Stop):
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0003 * i)
                for _ in range(500):
                    llm.n_tokens = 0
                    llm.eval(TOKENS[:3])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
    assert not lost
    assert np.isfinite(last(llm, TOKENS[:10])).all()


# --- others who decode, and numbers that are not finite


def decoded_by_others(llm, tokens, first=0):
    """Logits of the last of `tokens` by a bare `llama_decode`, as guidance and others call it."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, i == len(tokens) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), shape=(llm.n_vocab(),)).copy()


@pytest.mark.parametrize("index", [0, 2])
def test_others_may_decode_before_the_first_eval(tiny, load, index):
    schedule = three_bands(tiny, (0, 0, 0)).only(index)
    ours, theirs = (load(tiny, schedule=schedule, kv="f32", n_ctx=100) for _ in range(2))
    expected = last(ours, TOKENS[:60])
    np.testing.assert_array_equal(decoded_by_others(theirs, TOKENS[:60]), expected)


def test_others_may_decode_after_a_reset(tiny, load):
    schedule = three_bands(tiny, (0, 0, 0))
    expected = last(load(tiny, schedule=schedule, kv="f32"), TOKENS[:60])
    llm = load(tiny, schedule=schedule, kv="f32")
    llm.eval(TOKENS[:200])
    llm.reset()
    llm._ctx.kv_cache_clear()
    np.testing.assert_array_equal(decoded_by_others(llm, TOKENS[:60]), expected)
    assert llm.band_index == 2  # no longer of any sequence
    llm.eval(TOKENS[:60])
    assert llm.band_index == 0


def test_others_may_go_on_after_the_start_tokens(tiny, load):
    schedule = three_bands(tiny, (0, 16, 4)).only(1)
    expected = last(load(tiny, schedule=schedule, kv="f32", n_ctx=180), TOKENS[:60])
    llm = load(tiny, schedule=schedule, kv="f32", n_ctx=180)
    llm.eval(TOKENS[:16])
    np.testing.assert_allclose(decoded_by_others(llm, TOKENS[16:60], 16), expected, atol=1e-4)


def not_finite(writer):
    """Make one of the embedding's numbers NaN."""
    info = writer.tensors[0]["token_embd.weight"]
    info.tensor[TOKENS[3], 0] = np.nan


@pytest.mark.parametrize("logits_all", [False, True])
def test_weights_that_are_not_numbers_are_reported(tiny_llama, tmp_path, load, logits_all):
    path = tiny_llama(tmp_path / "nan.gguf", n_embd=128, extend=not_finite)
    llm = load(path, logits_all=logits_all)
    llm.eval(TOKENS[:3])
    with pytest.raises(UserError, match=r"nan\.gguf: the model computes NaN or infinity as logits") as caught:
        llm.eval(TOKENS[3:10])
    assert "\n" not in str(caught.value)
    assert llm.n_tokens == 0  # nothing of it is kept
    llm.eval(TOKENS[4:10])
    with pytest.raises(UserError, match="NaN or infinity"):
        llm.token_losses(TOKENS[:30])
    with pytest.raises(UserError, match="NaN or infinity"):
        list(zip(llm.generate(TOKENS[:10], temp=0), range(3), strict=False))


def test_embeddings_that_are_not_numbers_are_reported(tiny_llama, tmp_path, load):
    def all_not_finite(writer):
        writer.tensors[0]["token_embd.weight"].tensor[:, 0] = np.inf

    path = tiny_llama(tmp_path / "inf.gguf", n_embd=128, extend=all_not_finite)
    with pytest.raises(UserError, match="NaN or infinity as embeddings"):
        load(path, embedding=True).embed(["the tea", "the rest"])


def test_the_widest_factors_that_a_schedule_may_have_compute_numbers(tiny, load):
    facts = native_schedule(read_header(tiny)).facts
    for factors, attention in (((1e-6,) * 32, 10.0), ((1e300,) * 32, 0.1)):
        band = Band(context=250, rescale_factors=factors, attention_factor=attention)
        assert np.isfinite(last(load(tiny, schedule=Schedule(facts=facts, bands=(band,))), TOKENS)).all()


# --- what a sequence's history leaves in its keys


@pytest.mark.parametrize("kv", ["q4_0", "q8_0", "f16"])
def test_keys_do_not_drift_over_many_moves(tiny_llama, tmp_path, load, kv):
    path = tiny_llama(tmp_path / "one.gguf", n_embd=128, n_layer=1)
    schedule = three_bands(path, (0, 0, 0))
    moved, stayed = (load(path, schedule=schedule, kv=kv) for _ in range(2))
    changes = []
    moved.on_band_change = changes.append
    expected = last(stayed, TOKENS[:90])
    moved.eval(TOKENS[:80])
    for _ in range(40):
        moved.eval(TOKENS[80:105])
        moved.rewind(80)
        moved.eval(TOKENS[80:81])
        moved.rewind(80)
    assert np.abs(last(moved, TOKENS[80:90]) - expected).max() < PRECISION[kv]
    assert [c.new_index for c in changes] == [1, 0] * 40
    bound = MOST_ROTATIONS.get(kv)
    again = [i for i, change in enumerate(changes) if change.reread]
    # What is read again in the long band must be read again in the short one, too.
    assert again == [i for i in range(80) if bound is not None and i % (bound + 2) >= bound]


def test_a_saved_state_knows_how_worn_its_keys_are(tiny, load):
    llm = load(tiny, schedule=three_bands(tiny, (0, 0, 0)), kv="q4_0")
    changes = []
    llm.on_band_change = changes.append
    llm.eval(TOKENS[:80])
    for _ in range(MOST_ROTATIONS["q4_0"]):
        llm.eval(TOKENS[80:105])
        llm.rewind(80)
        llm.load_state(pickle.loads(pickle.dumps(llm.save_state())))
    assert any(change.reread for change in changes)


def test_after_going_back_the_model_is_as_it_was(tiny, load):
    """Keys that were read in a longer band depend on its factors, whatever they are rotated to."""
    schedule = three_bands(tiny, (0, 0, 0))
    llm, fresh = (load(tiny, schedule=schedule, kv="f32") for _ in range(2))
    changes = []
    llm.on_band_change = changes.append
    llm.eval(TOKENS[:40])
    llm.eval(TOKENS[40:240])  # the last 200 in the last band
    llm.rewind(90)
    fresh.eval(TOKENS[:90])
    expected = last(fresh, TOKENS[90:95])
    assert np.abs(last(llm, TOKENS[90:95]) - expected).max() < PRECISION["f32"]
    assert [(c.new_index, c.n_tokens, c.reread) for c in changes] == [(2, 40, False), (0, 90, True)]


def test_a_repeated_prompt_can_be_had_exactly(tiny, load):
    schedule = three_bands(tiny, (0, 0, 0))
    llm, fresh = (load(tiny, schedule=schedule, kv="q4_0") for _ in range(2))
    llm.rotates_back = False
    changes = []
    llm.on_band_change = changes.append
    llm.eval(TOKENS[:90])
    llm.eval(TOKENS[90:150])
    llm.rewind(90)
    fresh.eval(TOKENS[:90])
    expected = last(fresh, TOKENS[90:95])
    np.testing.assert_array_equal(last(llm, TOKENS[90:95]), expected)
    assert [(c.new_index, c.n_tokens, c.reread) for c in changes] == [(1, 90, False), (0, 90, True)]


def test_a_long_text_is_read_as_if_its_short_beginning_were_new(tiny, load):
    schedule = three_bands(tiny, (0, 0, 0))
    llm, fresh = (load(tiny, schedule=schedule, kv="f32") for _ in range(2))
    llm.eval(TOKENS[:25])
    expected = last(fresh, TOKENS[:240])
    assert np.abs(last(llm, TOKENS[25:240]) - expected).max() < PRECISION["f32"]


class Drafts:
    """Drafts a fixed number of tokens, all of them wrong."""

    def __init__(self):
        self.lengths = []

    def __call__(self, tokens, /, **_):
        self.lengths.append(len(tokens))
        return np.full(10, 7, dtype=np.intc)


def test_drafts_do_not_make_bands_flap(tiny, load):
    schedule = three_bands(tiny, (0, 0, 0))
    llm = load(tiny, schedule=schedule, draft_model=Drafts(), kv="q4_0")
    plain = load(tiny, schedule=schedule, kv="q4_0", logits_all=True)
    changes = []
    llm.on_band_change = changes.append
    tokens = [token for token, _ in zip(llm.generate(TOKENS[:85], temp=0), range(40), strict=False)]
    assert [(change.new_index, change.n_tokens) for change in changes] == [(1, 100)]
    assert len(tokens) == 40 and plain.draft_model is None
    again = pickle.loads(pickle.dumps(llm))
    assert isinstance(again.__getstate__()["draft_model"], Drafts)
    again.close()
