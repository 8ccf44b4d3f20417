"""The torch reader: llama.cpp's losses for the same file and band, gradients against differences, errors."""

import pydoc_data.topics

import numpy as np
import pytest
import ropewalk
import torch
from ropewalk import UserError
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Band, Schedule, yarn, yarn_attention_factor
from ropewalk.runtime.measure.torch_reader import attention, layers, weights
from ropewalk.runtime.measure.torch_reader.model import load_torch_model
from ropewalk.runtime.measure.torch_reader.rope import rotate

TEXT = "\n\n".join(pydoc_data.topics.topics.values())
TOKENS = [(37 * i * i + 11 * i) % 260 + 3 for i in range(150)]
TARGETS = range(90, 150)


def make_band(facts, log_factors=None, log_attention=0.1, start_tokens=8):
    if log_factors is None:
        log_factors = np.linspace(0, 1.5, facts.n_rot // 2)
    factors = tuple(np.exp(log_factors).tolist())
    attention = float(np.exp(log_attention))
    return Band(context=1000, rescale_factors=factors, attention_factor=attention, start_tokens=start_tokens)


def by_llama(path, band, tokens, kv="f32"):
    schedule = Schedule(facts=native_schedule(read_header(path)).facts, bands=(band,))
    options = {"kv": kv, "fast_prefill": False, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = ropewalk.Llama(path, schedule=schedule, n_ctx=len(tokens), **options)
    try:
        return llm.token_losses(tokens)
    finally:
        llm.close()


def add_head_norms(writer):
    rng = np.random.default_rng(5)
    for i in range(2):
        for name in ("q", "k"):
            norm = (1 + 0.5 * rng.random(32)).astype(np.float32)
            writer.add_tensor(f"blk.{i}.attn_{name}_norm.weight", norm)


def add_biases(writer):
    rng = np.random.default_rng(6)
    sizes = {"attn_q": 128, "attn_k": 64, "attn_v": 64, "attn_output": 128, "ffn_gate": 256, "ffn_down": 128}
    for name, n in sizes.items():
        writer.add_tensor(f"blk.1.{name}.bias", rng.standard_normal(n).astype(np.float32))


GROUPED = {"n_embd": 128, "n_head": 4, "n_head_kv": 2}

KINDS = {
    "llama": {},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3", "extend": add_head_norms},
    "mistral3": {"arch": "mistral3"},
    "biases": {"extend": add_biases},
    "native factors": {"rope_freqs": np.linspace(1, 8, 16).tolist(), "freq_base": 5e5},
    "f16 weights": {"dtype": np.float16, "n_head_kv": 4},
}


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    def make(**options):
        return tiny_llama(tmp_path / "tiny.gguf", **{**GROUPED, **options})

    return make


@pytest.fixture
def exact(tiny):
    """A tiny model in float64."""
    return load_torch_model(tiny(arch="qwen2", n_layer=3), dtype=torch.float64, threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_llama_cpps(tiny, kind):
    path = tiny(**KINDS[kind])
    model = load_torch_model(path, threads=1)
    band = make_band(model.facts, start_tokens=16)
    expected = by_llama(path, band, TOKENS)
    losses = model.token_losses(TOKENS, band, range(1, 150))
    assert losses.dtype == np.float64 and losses.shape == expected.shape
    np.testing.assert_allclose(
        losses, expected, atol=5e-2 if kind == "f16 weights" else 1e-3
    )  # ggml converts activations to f16 as well
    unlike = model.token_losses(TOKENS, band.model_copy(update={"attention_factor": 1.0}), range(1, 150))
    assert np.abs(unlike - expected).max() > 0.05
    unlike = model.token_losses(TOKENS, band.model_copy(update={"start_tokens": 0}), range(1, 150))
    assert np.abs(unlike - expected).max() > 0.05


def test_the_losses_of_a_quantised_model_are_llama_cpps(smollm2):
    model = load_torch_model(smollm2, threads=1)
    facts = model.facts
    tokens = tokenise(smollm2, 600)
    # Factors below one rotate 600 tokens as far as 12,000, past what the model was trained for.
    factors = yarn(facts.n_rot, 2, facts.freq_base, facts.original_context) / 20
    band = Band(
        context=32768,
        rescale_factors=tuple(factors.tolist()),
        start_tokens=16,
        attention_factor=yarn_attention_factor(2),
    )
    ours, theirs = model.token_losses(tokens, band, range(1, 600)), by_llama(smollm2, band, tokens, kv="f16")
    plain = model.token_losses(tokens, native_schedule(read_header(smollm2)).bands[0], range(1, 600))
    assert ours.mean() == pytest.approx(theirs.mean(), rel=5e-3)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99
    assert abs(plain.mean() - theirs.mean()) > 0.1
    state = model.prefix_state(tokens[:400], band)
    window = model.window_losses(state, tokens, band, range(401, 600))
    np.testing.assert_allclose(window, ours[400:], atol=2e-3)
    assert state.n_bytes == 2 * 30 * 3 * 64 * 400 * 4


def tokenise(path, n):
    import llama_cpp

    vocab = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        return vocab.tokenize(TEXT[: 8 * n].encode())[:n]
    finally:
        vocab.close()


# --- gradients


def differences(loss, log_factors, log_attention, step=1e-7):
    """Central differences of loss(log factors, log attention factor)."""
    n = len(log_factors)
    by_factors = [
        (loss(log_factors + d, log_attention) - loss(log_factors - d, log_attention)) / (2 * step)
        for d in step * np.eye(n)
    ]
    return by_factors, (loss(log_factors, log_attention + step) - loss(log_factors, log_attention - step)) / (2 * step)


@pytest.mark.parametrize("start_tokens", [0, 8])
@pytest.mark.parametrize("windowed", [False, True])
def test_gradients_are_the_slopes_of_the_loss(exact, start_tokens, windowed):
    log_factors, log_attention = np.linspace(0.1, 1.5, 16), 0.1
    state = exact.prefix_state(TOKENS[:80], make_band(exact.facts, 0.5 * log_factors, 0.05, 16)) if windowed else None

    def loss(at, attention):
        band = make_band(exact.facts, at, attention, start_tokens)
        if state is not None:
            return exact.window_losses(state, TOKENS, band, TARGETS).mean()
        return exact.token_losses(TOKENS, band, TARGETS).mean()

    band = make_band(exact.facts, log_factors, log_attention, start_tokens)
    if state is not None:
        found = exact.window_gradient(state, TOKENS, band, TARGETS)
    else:
        found = exact.loss_and_gradient(TOKENS, band, TARGETS)
    by_factors, by_attention = differences(loss, log_factors, log_attention)
    assert found.loss == pytest.approx(loss(log_factors, log_attention), rel=1e-12)
    assert found.by_log_factors.shape == (16,) and np.abs(found.by_log_factors).max() > 1
    np.testing.assert_allclose(found.by_log_factors, by_factors, rtol=1e-5, atol=1e-5)
    assert found.by_log_attention == pytest.approx(by_attention, rel=1e-5, abs=1e-6)


def test_a_gradient_in_float32_is_that_in_float64(tiny):
    path = tiny(arch="llama")
    fine, coarse = (load_torch_model(path, dtype=dtype, threads=1) for dtype in (torch.float64, torch.float32))
    band = make_band(fine.facts)
    expected, found = (model.loss_and_gradient(TOKENS, band, TARGETS) for model in (fine, coarse))
    size = np.abs(expected.by_log_factors).max()
    np.testing.assert_allclose(found.by_log_factors, expected.by_log_factors, atol=1e-3 * size)


def test_a_window_in_the_prefixs_band_is_the_whole(exact):
    band = make_band(exact.facts)
    whole = exact.token_losses(TOKENS, band, TARGETS)
    state = exact.prefix_state(TOKENS[:80], band)
    np.testing.assert_allclose(exact.window_losses(state, TOKENS, band, TARGETS), whole, atol=1e-10)
    other = exact.window_losses(state, TOKENS, make_band(exact.facts, np.zeros(16)), TARGETS)
    assert np.abs(other - whole).max() > 0.05
    same, kept = exact.losses_and_state(TOKENS, band, TARGETS, 80)
    np.testing.assert_array_equal(same, whole)
    np.testing.assert_allclose(exact.window_losses(kept, TOKENS, band, TARGETS), whole, atol=1e-10)


def test_pieces_make_no_difference(exact, monkeypatch):
    band, targets = make_band(exact.facts), [140, 20, 77, 20]
    losses, gradient = exact.token_losses(TOKENS, band, targets), exact.loss_and_gradient(TOKENS, band, targets)
    assert losses[1] == losses[3] and gradient.loss == pytest.approx(losses.mean(), rel=1e-12)
    monkeypatch.setattr(layers, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(attention, "ROWS", 32)
    pieces = exact.loss_and_gradient(TOKENS, band, targets)
    np.testing.assert_allclose(exact.token_losses(TOKENS, band, targets), losses, atol=1e-12)
    np.testing.assert_allclose(pieces.by_log_factors, gradient.by_log_factors, atol=1e-9)


@pytest.mark.parametrize("n_rows", [70, 200])
def test_attention_is_the_same_in_either_implementation(monkeypatch, n_rows):
    torch.manual_seed(1)
    q = torch.randn(2, 3, n_rows, 32, dtype=torch.float64)
    k, v = torch.randn(2, 2, 1, 200, 32, dtype=torch.float64)
    grad = torch.randn_like(q)
    monkeypatch.setattr(attention, "ROWS", 32)
    fused = attention.attend(q, k, v, 0.2)
    plain = torch.cat([attention._plain(*piece, 0.2) for piece in attention._pieces(q, k, v)], dim=2)
    torch.testing.assert_close(fused.out, plain)
    without_log_sum = attention.Attended(fused.out, None)
    for ours, theirs in zip(
        attention.attend_backward(grad, q, k, v, fused, 0.2),
        attention.attend_backward(grad, q, k, v, without_log_sum, 0.2),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_dimensions_past_the_rotary_ones_are_unchanged():
    x = torch.arange(10.0).view(1, 10)
    cos, sin = 2 * torch.tensor([[0.0, 1.0]]), 2 * torch.tensor([[1.0, 0.0]])
    assert rotate(x, cos, sin).tolist() == [[-4, 2, 0, 6, 4, 5, 6, 7, 8, 9]]


def test_threads_are_set_for_a_call_and_restored(tiny, monkeypatch):
    model = load_torch_model(tiny(), threads=2)
    seen = []
    head = model._decoder._head
    monkeypatch.setattr(model._decoder, "_head", lambda *args: (seen.append(torch.get_num_threads()), head(*args))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model.token_losses(TOKENS, make_band(model.facts), TARGETS)
        with pytest.raises(UserError):
            model.token_losses(TOKENS, make_band(model.facts), [])
        assert torch.get_num_threads() == 1 and set(seen) == {2}
    finally:
        torch.set_num_threads(before)


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma2"}, "architecture 'gemma2'.*expected llama, mistral3, qwen2, qwen3"),
        ({"extend": lambda w: w.add_expert_count(8)}, "llama.expert_count: 8"),
        ({"extend": lambda w: w.add_attn_logit_softcapping(50.0)}, "attn_logit_softcapping: 50.0"),
        ({"extend": lambda w: w.add_causal_attention(False)}, "causal: False"),
        ({"extend": lambda w: w.add_key_length(16)}, "rope.dimension_count: 32, expected at most the head size, 16"),
        ({"extend": lambda w: w.add_value_length(16)}, "value_length: 16, expected the key length"),
        ({"n_head_kv": 3}, "head_count_kv: 3, expected a divisor of 4"),
        ({"arch": "qwen3"}, "'blk.0.attn_q_norm.weight': missing"),
        (
            {"extend": lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 4, 4), np.float32))},
            "'blk.0.ffn_gate_exps.weight' is not covered",
        ),
        (
            {"extend": lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(5, np.float32))},
            r"'blk.0.attn_q.bias': shape \[5\], expected \[128\]",
        ),
        (
            {"extend": lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(128, np.int32))},
            "'blk.0.attn_q.bias': type I32",
        ),
    ],
)
def test_a_model_that_is_not_covered_is_refused_in_one_line(tiny, monkeypatch, options, message):
    path = tiny(**options)
    monkeypatch.setattr(weights._Builder, "_read", None)  # before any data is read
    with pytest.raises(UserError, match=message) as caught:
        load_torch_model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_model_that_is_too_large_is_refused_before_it_is_read(tiny, monkeypatch):
    path = tiny()
    monkeypatch.setattr(weights._Builder, "_read", None)
    with pytest.raises(UserError, match=r"its weights take \d+ MiB as float32, expected at most 1 MiB"):
        load_torch_model(path, max_bytes=1 << 20)
    with pytest.raises(UserError, match="device: 'abacus' cannot be used"):
        load_torch_model(path, device="abacus")


def test_a_text_that_does_not_fit_is_refused(exact, monkeypatch):
    monkeypatch.setattr(weights, "available_memory", lambda: 300 << 20)
    with pytest.raises(UserError, match=r"not enough memory for 149 tokens and a gradient: .* 300 MiB are free"):
        exact.loss_and_gradient(TOKENS, make_band(exact.facts), TARGETS)


def test_impossible_arguments_are_refused(exact):
    band = make_band(exact.facts)
    state = exact.prefix_state(TOKENS[:80], band)
    for targets, found in (([], "none"), ([0, 5], "0 to 5"), ([150], "150 to 150")):
        with pytest.raises(UserError, match=f"targets: {found}, expected positions from 1 to 149"):
            exact.token_losses(TOKENS, band, targets)
    with pytest.raises(UserError, match="targets: 80 to 80, expected positions from 81 to 149"):
        exact.window_losses(state, TOKENS, band, [80])
    with pytest.raises(UserError, match="prefix state"):
        exact.window_losses(state, TOKENS[::-1], band, TARGETS)
    with pytest.raises(UserError, match="tokens: 5 to 100000, expected numbers from 0 to"):
        exact.token_losses([5, 100000, 7], band, [2])
    with pytest.raises(UserError, match="2 rescale factors, expected n_rot/2 = 16"):
        exact.token_losses(TOKENS, Band(context=9, rescale_factors=(1.0, 1.0)), TARGETS)
