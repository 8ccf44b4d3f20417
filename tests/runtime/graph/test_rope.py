"""λ in the graph: against llama.cpp's own scaling, against the paper's formula in torch, and node by node."""

import llama_cpp
import numpy as np
import pytest
import ropewalk
import torch
from gguf import GGUFReader
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import Band, RopeFacts, Schedule, yarn, yarn_attention_factor
from ropewalk.runtime.graph import ggml
from ropewalk.runtime.graph.hook import GraphHook
from ropewalk.runtime.graph.kernels import Context, why_missing
from ropewalk.runtime.graph.rope import STILL, RopeHook, plan_rotations, rotation_factors

QUIET = {"verbose": False, "n_threads": 2, "n_threads_batch": 2, "logits_all": True}


def logits(llm, tokens):
    llm.eval(tokens)
    result = llm.scores[: len(tokens)].copy()
    llm.close()
    return result


def one_band(path, factors, start_tokens=0, attention_factor=1.0, context=4096):
    facts = native_schedule(read_header(path)).facts
    band = Band(
        context=context,
        rescale_factors=tuple(factors),
        start_tokens=start_tokens,
        attention_factor=attention_factor,
    )
    return Schedule(facts=facts, bands=(band,))


def test_pi_is_bit_for_bit_llama_cpps_own(smollm2):
    tokens = list(range(300, 500))
    native = llama_cpp.Llama(str(smollm2), n_ctx=256, rope_scaling_type=1, rope_freq_scale=0.5, **QUIET)
    ours = ropewalk.Llama(smollm2, fast_prefill=False, n_ctx=256, schedule=one_band(smollm2, [2.0] * 32), **QUIET)
    plain = ropewalk.Llama(smollm2, fast_prefill=False, n_ctx=256, **QUIET)
    expected = logits(native, tokens)
    np.testing.assert_array_equal(logits(ours, tokens), expected)
    assert np.abs(logits(plain, tokens) - expected).max() > 1  # the test can tell


@pytest.mark.parametrize("scale", [2, 4])
def test_yarn_is_llama_cpps_own(tiny_llama, tmp_path, scale):
    path = tiny_llama(tmp_path / "m.gguf")
    tokens = list(range(20, 220))
    exact = {"n_ctx": 256, "type_k": 0, "type_v": 0, **QUIET}  # an f32 cache, so that no rounding hides a difference
    native = llama_cpp.Llama(str(path), rope_scaling_type=2, rope_freq_scale=1 / scale, yarn_orig_ctx=256, **exact)
    facts = native_schedule(read_header(path)).facts
    factors = yarn(facts.n_rot, scale, facts.freq_base, 256)
    schedule = one_band(path, factors, attention_factor=yarn_attention_factor(scale))
    ours = ropewalk.Llama(path, fast_prefill=False, schedule=schedule, **exact)
    plain = logits(ropewalk.Llama(path, fast_prefill=False, **exact), tokens)
    expected = logits(native, tokens)
    np.testing.assert_allclose(logits(ours, tokens), expected, atol=3e-3)  # angles differ in f32 rounding
    assert np.abs(plain - expected).max() > 1e-2


def torch_logits(path, tokens, factors, start_tokens, attention_factor):
    """A llama model in float64: LongRoPE's equation 2 with its indicator for start tokens, all tokens at once."""
    reader = GGUFReader(path)
    weights = {t.name: torch.tensor(np.array(t.data), dtype=torch.float64) for t in reader.tensors}
    number = lambda key: reader.fields[f"llama.{key}"].contents()  # noqa: E731
    heads, kv_heads, n_embd = (
        number("attention.head_count"),
        number("attention.head_count_kv"),
        number("embedding_length"),
    )
    size, base = n_embd // heads, number("rope.freq_base")
    positions = torch.arange(len(tokens), dtype=torch.float64)
    plain = base ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    rescaled = torch.where(positions[:, None] < start_tokens, plain, plain / torch.tensor(factors, dtype=torch.float64))
    angles = positions[:, None] * rescaled

    def rotate(x):  # (n, heads, size), neighbouring dimensions form a pair
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], size // 2, 2))
        rotated = pairs * torch.polar(torch.full_like(angles, attention_factor), angles)[:, None]
        return torch.view_as_real(rotated).reshape(x.shape)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weights[name]

    x = weights["token_embd.weight"][tokens]
    mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64).triu(1)
    for i in range(number("block_count")):
        w = lambda name, i=i: weights[f"blk.{i}.{name}.weight"]  # noqa: E731
        h = norm(x, f"blk.{i}.attn_norm.weight")
        q = rotate((h @ w("attn_q").T).reshape(-1, heads, size))
        k = rotate((h @ w("attn_k").T).reshape(-1, kv_heads, size)).repeat_interleave(heads // kv_heads, 1)
        v = (h @ w("attn_v").T).reshape(-1, kv_heads, size).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(tokens), -1)
        x = x + mixed @ w("attn_output").T
        h = norm(x, f"blk.{i}.ffn_norm.weight")
        x = x + (torch.nn.functional.silu(h @ w("ffn_gate").T) * (h @ w("ffn_up").T)) @ w("ffn_down").T
    output = weights.get("output.weight", weights["token_embd.weight"])
    return (norm(x, "output_norm.weight") @ output.T).numpy()


@pytest.mark.parametrize("start_tokens", [0, 1, 16, 64])
def test_start_tokens_are_the_papers_formula(tiny_llama, tmp_path, start_tokens):
    path = tiny_llama(tmp_path / "m.gguf")
    tokens = [(37 * i) % 250 + 5 for i in range(150)]
    factors = [1 + i / 3 for i in range(16)]
    schedule = one_band(path, factors, start_tokens, attention_factor=1.2)
    ours = logits(ropewalk.Llama(path, fast_prefill=False, n_ctx=256, schedule=schedule, kv="f32", **QUIET), tokens)
    expected = torch_logits(path, tokens, factors, start_tokens, 1.2)
    assert np.abs(ours - expected).max() < 1e-3
    if start_tokens > 1:  # position 0 does not rotate
        assert np.abs(torch_logits(path, tokens, factors, 0, 1.2) - expected).max() > 1e-2


def test_start_tokens_one_at_a_time_are_the_same(tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m.gguf")
    tokens = [(37 * i) % 250 + 5 for i in range(40)]
    schedule = one_band(path, [3.0] * 16, 16)
    llm = ropewalk.Llama(path, fast_prefill=False, n_ctx=256, schedule=schedule, kv="f32", **QUIET)
    for token in tokens:
        llm.eval([token])
    expected = torch_logits(path, tokens, [3.0] * 16, 16, 1.0)
    assert np.abs(llm.scores[: len(tokens)] - expected).max() < 1e-3
    llm.close()


# --- rotation


def test_rotation_factors_add_up():
    old, new = np.array([1.0, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.5, 2.0])
    factors = np.array(rotation_factors(old, new))
    assert factors[0] == STILL
    np.testing.assert_allclose(1 / factors[1:] + 1 / old[1:], 1 / new[1:])


FACTS = RopeFacts(n_rot=4, freq_base=1e4, original_context=100)


def band(factors, start_tokens=0, attention_factor=1.0):
    return Band(context=1000, rescale_factors=factors, start_tokens=start_tokens, attention_factor=attention_factor)


@pytest.mark.parametrize(
    "old, new, n_tokens, spans",
    [
        (band((1.0, 1.0)), band((1.0, 2.0)), 50, [(0, 50, 1.0)]),
        (band((1.0, 1.0)), band((1.0, 2.0), 16), 50, [(16, 50, 1.0)]),
        (band((1.0, 1.0)), band((1.0, 2.0), 16), 10, []),
        (band((1.0, 2.0), 4), band((1.0, 3.0), 16), 50, [(4, 16, 1.0), (16, 50, 1.0)]),
        (band((1.0, 2.0), 16), band((1.0, 2.0), 4), 50, [(4, 16, 1.0)]),
        (band((1.0, 2.0)), band((1.0, 2.0), 0, 1.5), 50, [(0, 0, 1.5)]),
        (band((1.0, 2.0), 4), band((1.0, 3.0), 16, 0.5), 50, [(4, 16, 0.5), (16, 50, 1.0)]),
        (band((1.0, 1.0)), band((1.0, 2.0)), 0, []),
    ],
)
def test_passes_over_the_cache(old, new, n_tokens, spans):
    rotations = plan_rotations(FACTS, old, new, n_tokens)
    assert [(rotation.start, rotation.stop, rotation.scale) for rotation in rotations] == spans


# --- which nodes are set

needs_kernels = pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")


def graph_hook(rope, native):
    if not native:
        return GraphHook({"ROPE": rope.set_rope})
    kernels = Context()
    kernels.watch(rope.setting, nodes=False)
    return GraphHook({"ROPE": rope.set_rope}, kernels)


@pytest.fixture
def node():
    lib = ggml._library()
    context = lib.ggml_init(ggml._InitParams(1 << 18, None, False))

    def make(freq_base=1e4, n_dims=8, freq_scale=1.0):
        vectors = lib.ggml_new_tensor_3d(context, 0, 8, 1, 3)
        positions = lib.ggml_new_tensor_1d(context, 26, 3)
        return lib.ggml_rope_ext(context, vectors, positions, None, n_dims, 0, 0, freq_base, freq_scale, 0, 1, 32, 1)

    yield make
    lib.ggml_free(context)


@needs_kernels
def test_the_kernels_set_what_python_sets(node):
    found = []
    for native in (True, False):
        hook = RopeHook(RopeFacts(n_rot=8, freq_base=1e4, original_context=100), freq_scale=0.25)
        hook.use((1.0, 2.0, 3.0, 4.0), 1.25)
        graph, address = graph_hook(hook, native), node(freq_scale=0.25)
        assert graph.callback(address, True, graph.userdata) is False
        tensor = ggml.tensor_at(address)
        assert tensor.src[2] == hook.setting.factors
        found.append((bytes(tensor.op_params), tensor.op, hook.touched))
    assert found[0] == found[1]


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)])
def test_only_global_layers_are_set(node, native):
    facts = RopeFacts(n_rot=8, freq_base=1e4, original_context=100, native_factors=(2.0,) * 4)
    hook = RopeHook(facts, freq_scale=0.5)
    hook.use((1.0, 2.0, 3.0, 4.0), 1.25)
    ours, other_base, other_size, unscaled = (
        node(freq_scale=0.5),
        node(1e6, freq_scale=0.5),
        node(n_dims=6, freq_scale=0.5),
        node(),
    )
    graph = graph_hook(hook, native)
    for address in (ours, other_base, other_size, unscaled):
        assert graph.callback(address, True, graph.userdata) is False
    assert hook.touched == 1
    params = ggml.rope_params(ours)
    assert (params.freq_scale, params.attn_factor) == (1.0, 1.25)
    assert ggml.tensor_at(ours).src[2] is not None
    for address in (other_base, other_size, unscaled):
        assert ggml.tensor_at(address).src[2] is None
    hook.use((2.0,) * 4, 1.0)  # a reused graph: the node has lost its own scale, and is recognised as ours
    graph.callback(ours, True, graph.userdata)
    assert hook.touched == 2 and ggml.rope_params(ours).attn_factor == 1.0
    unchanged = bytes(ggml.tensor_at(ours).op_params)
    graph.callback(ours, True, graph.userdata)  # it has what is in use
    assert hook.touched == 2 and bytes(ggml.tensor_at(ours).op_params) == unchanged
