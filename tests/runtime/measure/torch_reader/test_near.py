"""A near window in the torch reader: against the two formulas, pair by pair in float64, and against differences."""

import numpy as np
import pytest
import torch
from ropewalk.factors import Band, native_band
from ropewalk.runtime.measure.torch_reader import near
from ropewalk.runtime.measure.torch_reader.attention import attend
from ropewalk.runtime.measure.torch_reader.layers import normalise
from ropewalk.runtime.measure.torch_reader.model import load_torch_model

TOKENS = [(37 * i * i + 11 * i) % 260 + 3 for i in range(150)]
TARGETS = range(90, 150)


def make_band(facts, near_tokens, log_factors=None, log_attention=0.1, start_tokens=0):
    if log_factors is None:
        log_factors = np.linspace(0.5, 1.5, facts.n_rot // 2)
    factors = np.array(facts.start_factors) * np.exp(log_factors)
    return Band(
        context=1000,
        near_tokens=near_tokens,
        rescale_factors=tuple(factors.tolist()),
        attention_factor=float(np.exp(log_attention)),
        start_tokens=start_tokens,
        force_start_tokens=True,
    )


def add_head_norms(writer):
    rng = np.random.default_rng(5)
    for i in range(2):
        for name in ("q", "k"):
            writer.add_tensor(f"blk.{i}.attn_{name}_norm.weight", (1 + rng.random(32) / 2).astype(np.float32))


def rotate_a_part(writer):
    writer.kv_data[0]["llama.rope.dimension_count"].value = 20


KINDS = {
    "grouped": {},
    "head norms": {"arch": "qwen3", "extend": add_head_norms},
    "native factors": {"rope_freqs": np.linspace(1, 2, 16).tolist(), "freq_base": 5e5},
    "partial": {"extend": rotate_a_part},
}


@pytest.fixture
def tiny(tiny_llama, tmp_path):
    def make(**options):
        path = tiny_llama(tmp_path / "tiny.gguf", **{"n_embd": 128, "n_head": 4, "n_head_kv": 2, **options})
        return load_torch_model(path, dtype=torch.float64, threads=1)

    return make


# --- the two formulas, pair by pair


def angles(facts, band, n):
    """The angle between row r and key c, shape ``(n, n, n_rot/2)``."""
    pair = torch.arange(facts.n_rot // 2, dtype=torch.float64)
    plain = float(np.float32(facts.freq_base)) ** (-2 * pair / facts.n_rot)
    own, far = (plain / torch.tensor(x, dtype=torch.float64) for x in (facts.start_factors, band.rescale_factors))
    at, near_tokens = torch.arange(n, dtype=torch.float64), band.near_tokens
    r, c = at[:, None, None], at[None, :, None]
    beyond = own * near_tokens + far * (r - c - near_tokens)
    beyond = torch.where(c < band.start_tokens, beyond + (far - own) * c, beyond)  # such keys are not rescaled
    return torch.where(r - c < near_tokens, own * (r - c), beyond)


def scores(q, k, angle, attention):
    """Rotated queries times rotated keys, ``(heads, rows, keys)``, from what is not yet rotated, as complex numbers."""
    half = angle.shape[-1]
    q_pairs, k_pairs = (torch.complex(x[..., :half], x[..., half : 2 * half]) for x in (q, k))
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.einsum("hri,hci,rci->hrc", q_pairs, k_pairs.conj(), turn).real
    return attention**2 * turned + q[..., 2 * half :] @ k[..., 2 * half :].transpose(1, 2)


def dense_losses(model, band, targets):
    """The losses of `TOKENS`, with a whole matrix of scores."""
    w, decoder = model._weights, model._decoder
    n, angle = len(TOKENS), angles(model.facts, band, len(TOKENS))
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    x = w.embedding[torch.tensor(TOKENS)]
    for layer in w.layers:
        q, k, v = decoder._heads(layer, x)
        group = q.shape[1]
        q, k, v = q.flatten(0, 1), k[:, 0].repeat_interleave(group, 0), v[:, 0].repeat_interleave(group, 0)
        found = scores(q, k, angle, band.attention_factor) * w.shape.head_size**-0.5
        out = found.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = decoder._finish(layer, x, out.unflatten(0, (-1, group)))
    logits = normalise(x, w.output_norm, w.shape.eps) @ w.output.T
    chance = logits.log_softmax(-1)
    return np.array([-float(chance[t - 1, TOKENS[t]]) for t in targets])


@pytest.mark.parametrize("start_tokens", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_the_two_formulas(tiny, kind, start_tokens):
    model = tiny(**KINDS[kind])
    targets = range(1, 150)
    for near_tokens in (5, 7, 32, 64, 100, 140):
        band = make_band(model.facts, near_tokens, start_tokens=start_tokens)
        expected = dense_losses(model, band, targets)
        np.testing.assert_allclose(model.token_losses(TOKENS, band, targets), expected, atol=1e-10)
        state = model.prefix_state(TOKENS[:80], band)
        window = model.window_losses(state, TOKENS, band, range(81, 150))
        np.testing.assert_allclose(window, expected[80:], atol=1e-10)
        other = dense_losses(model, make_band(model.facts, near_tokens + 1, start_tokens=start_tokens), targets)
        assert np.abs(other - expected).max() > 1e-6


def test_partial_rotary_is_partial(tiny):
    assert tiny(**KINDS["partial"]).facts.n_rot == 20


def test_the_border_lies_where_the_distance_is_the_window():
    """With scores that are 0 near and 1 far, the largest probability of a row is that of each key beyond."""
    n, w = 40, 8
    zeros = torch.zeros(1, 1, n, n, dtype=torch.float64)
    far = torch.ones(1, 1, n, n, dtype=torch.float64)
    shares = near.attend_apart((zeros, zeros, far, far, torch.eye(n, dtype=torch.float64)[None, None]), w, 1 / n).out
    for row in range(n):
        keys = shares[0, 0, row]
        assert not keys[row + 1 :].any()
        for distance in (0, w - 1, w, w + 1):
            if distance <= row:
                ratio = keys[row - distance] / keys[row]
                assert ratio == pytest.approx(1.0 if distance < w else np.e, rel=1e-9), (row, distance)


# --- short texts, and no window


def test_a_text_within_the_window_is_read_as_by_the_native_band(tiny):
    model = tiny(**KINDS["native factors"])
    native = native_band(model.facts)
    for near_tokens, equal in ((500, True), (149, True), (140, False)):  # the last token is not read
        band = make_band(model.facts, near_tokens, log_attention=0.0, start_tokens=5)
        found, expected = (model.token_losses(TOKENS, x, TARGETS) for x in (band, native))
        assert np.allclose(found, expected, rtol=0, atol=1e-10) == equal
    found = model.loss_and_gradient(TOKENS, make_band(model.facts, 149), TARGETS)
    assert not found.by_log_factors.any() and abs(found.by_log_attention) > 1e-3


def test_where_far_and_near_scores_are_the_same_it_is_plain_attention():
    torch.manual_seed(1)
    q = torch.randn(2, 3, 70, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 1, 200, 16, dtype=torch.float64)
    for w in (1, 2, 33, 130, 131, 199):
        torch.testing.assert_close(near.attend_apart((q, k, q, k, v), w, 0.2).out, attend(q, k, v, 0.2).out)


# --- gradients


def differences(loss, log_factors, log_attention, step=1e-7):
    """Central differences of loss(log factors, log attention factor)."""
    by_factors = [
        (loss(log_factors + d, log_attention) - loss(log_factors - d, log_attention)) / (2 * step)
        for d in step * np.eye(len(log_factors))
    ]
    return by_factors, (loss(log_factors, log_attention + step) - loss(log_factors, log_attention - step)) / (2 * step)


@pytest.mark.parametrize(("near_tokens", "start_tokens"), [(20, 8), (64, 0)])
@pytest.mark.parametrize("kind", ["native factors", "windowed", "partial"])
def test_gradients_are_the_slopes_of_the_loss(tiny, kind, near_tokens, start_tokens):
    model = tiny(**KINDS.get(kind, {}), n_layer=3)
    log_factors, log_attention = np.linspace(0.1, 1.5, model.facts.n_rot // 2), 0.1
    state = None
    if kind == "windowed":
        state = model.prefix_state(TOKENS[:80], make_band(model.facts, 30, 0.5 * log_factors, 0.05, 16))

    def band(at, attention):
        return make_band(model.facts, near_tokens, at, attention, start_tokens)

    def loss(at, attention):
        if state is not None:
            return model.window_losses(state, TOKENS, band(at, attention), TARGETS).mean()
        return model.token_losses(TOKENS, band(at, attention), TARGETS).mean()

    arguments = (TOKENS, band(log_factors, log_attention), TARGETS)
    found = model.window_gradient(state, *arguments) if state is not None else model.loss_and_gradient(*arguments)
    by_factors, by_attention = differences(loss, log_factors, log_attention)
    assert found.loss == pytest.approx(loss(log_factors, log_attention), rel=1e-12)
    assert np.abs(found.by_log_factors).max() > 0.1
    np.testing.assert_allclose(found.by_log_factors, by_factors, rtol=1e-5, atol=1e-5)
    assert found.by_log_attention == pytest.approx(by_attention, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("w", [1, 8, 33, 131, 199])
@pytest.mark.parametrize("n_rows", [70, 200])
def test_attention_is_the_same_in_either_implementation(monkeypatch, n_rows, w):
    torch.manual_seed(1)
    q, far_q, grad = torch.randn(3, 2, 3, n_rows, 32, dtype=torch.float64)
    k, far_k, v = torch.randn(3, 2, 1, 200, 32, dtype=torch.float64)
    heads = (q, k, far_q, far_k, v)
    monkeypatch.setattr(near, "SCORES", 2 * 3 * 200 * 32)
    triangles = near.attend_apart(heads, w, 0.2)
    dense = torch.cat([near._dense(piece, w, 0.2) for _, piece in near._pieces(heads)], dim=2)
    torch.testing.assert_close(triangles.out, dense)
    without_log_sum = near.Attended(triangles.out, None)
    for ours, theirs in zip(
        near.attend_apart_backward(grad, heads, triangles, w, 0.2),
        near.attend_apart_backward(grad, heads, without_log_sum, w, 0.2),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
