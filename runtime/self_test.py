"""Whether this build of llama.cpp computes what Ropewalk makes of its graph: run in a process of its own.

A random model of one layer is small enough to be computed in numpy as well. Its cached keys depend on the tokens and
on the rotation alone, so that keys rotated to another band must give what that band gives from the first token on.
Tried are the rope nodes, the rotation of cached keys by the native kernels and by llama.cpp's K-shift, and attention
and products taken over, with a near window as well: by the native kernels, their graph callback included, or in torch.
`graph.admission` runs this and remembers the verdict.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ..factors import Band, RopeFacts, Schedule
from .graph.admission import Verdict, trust
from .llama import Llama
from .loading import has_cells

Floats = npt.NDArray[np.float32]
Weights = dict[str, Floats]

N_EMBD, N_HEAD, N_HEAD_KV, HEAD, N_FF, N_VOCAB = 256, 4, 2, 64, 256, 288
BASE, EPSILON = 10000.0, 1e-5
SHORT, TOTAL = 96, 160  # tokens: read in the first band, and in all

FACTS = RopeFacts(n_rot=HEAD, freq_base=BASE, original_context=128)
SCHEDULE = Schedule(
    facts=FACTS,
    bands=(
        Band(context=128, rescale_factors=FACTS.start_factors),
        Band(context=256, rescale_factors=tuple(np.linspace(1, 6, HEAD // 2).tolist()), attention_factor=1.2),
    ),
)

NEAR = Schedule(
    facts=FACTS,
    bands=(Band(context=256, near_tokens=48, rescale_factors=tuple(np.linspace(2, 6, HEAD // 2).tolist())),),
)

MOST_ON_AVERAGE, MOST_ON_ONE = 0.05, 0.5
"""Nats between llama.cpp and numpy on the tokens' losses. Right ones differ by 0.001 on average, over a q8_0 cache by
0.015; with a factor or a rotation left out they differ by 0.3 to 1.2."""


@dataclass(frozen=True)
class Failure(Exception):
    """What went wrong, in a few words that follow the release's name."""

    what: str


FEW = 6  # tokens read one at a time


def main(extra_buffers: bool, use_kernels: bool) -> None:
    """Run all checks and end the process.

    With 0, the last line printed is `Verdict.state_prefix`; with 1, it is the reason.
    """
    trust(Verdict(extra_buffers=extra_buffers, kernels=use_kernels))
    try:
        with tempfile.TemporaryDirectory() as folder:
            prefix = _check_rotation(Path(folder) / "plain.gguf")
            _check_taken_nodes(Path(folder) / "quantised.gguf")
            print(prefix)
    except Exception as error:
        print(error.what if isinstance(error, Failure) else f"{type(error).__name__}: {error}".replace("\n", " "))
        sys.exit(1)


def _check_rotation(path: Path) -> int:
    """Rope nodes read our factors, and cached keys are rotated to another band's; returns `Verdict.state_prefix`.

    Keys are rotated by each of the ways that there are: the kernels, where there are any, and a K-shift.
    """
    weights, tokens = _random_weights(), _random_tokens()
    _write_model(path, weights, gguf.GGMLQuantizationType.F32)
    short = _losses(weights, tokens[:SHORT], SCHEDULE.bands[0])
    long = _losses(weights, tokens, SCHEDULE.bands[1])[SHORT - 1 :]
    changes: list[bool] = []
    llm = Llama(path, schedule=SCHEDULE, n_ctx=256, kv="f16", fast_prefill=False, n_threads=2, verbose=False)
    llm.on_band_change = lambda change: changes.append(change.reread)
    _compare(llm.token_losses(tokens[:SHORT]), short, "rope nodes do not rotate by our factors")
    if llm.rotates_natively:
        found = llm.token_losses(tokens, start=SHORT)
        _compare(found, long, "the kernels do not rotate cached keys by our factors")
        llm.reset()
        llm.rotates_natively = False
        llm.token_losses(tokens[:SHORT])
        changes.clear()
    found = llm.token_losses(tokens, start=SHORT)
    prefix = _state_prefix(llm)
    llm.close()
    if changes != [False]:
        raise Failure("cached keys cannot be rotated by a K-shift")
    _compare(found, long, "a K-shift does not rotate cached keys by our factors")
    return prefix


def _state_prefix(llm: Llama) -> int:
    """How many bytes of a saved sequence come before its one stream of cells at rising positions."""
    state = llm.sequence_state()
    for prefix in range(0, 64, 4):
        if has_cells(state, prefix, llm.n_tokens):
            return prefix
    raise Failure("it saves a sequence in another format")


def _check_taken_nodes(path: Path) -> None:
    """Attention over a quantised cache and products with quantised weights: of many rows, and of one."""
    weights, tokens = _random_weights(), _random_tokens()
    rounded = _write_model(path, weights, gguf.GGMLQuantizationType.Q4_1)
    llm = Llama(path, schedule=SCHEDULE, n_ctx=256, kv="q8_0", n_threads=2, verbose=False)
    expected = _losses(rounded, tokens, SCHEDULE.bands[1])
    found = llm.token_losses(tokens)
    _compare(found, expected, "attention and products that are taken over come out wrong")
    if llm.fast_prefill and not llm.nodes_taken:
        raise Failure("attention nodes cannot be taken over")
    llm.rewind(TOTAL - FEW - 1)
    singly = [float(llm.token_losses(tokens[:n], start=n - 1)[0]) for n in range(TOTAL - FEW + 1, TOTAL + 1)]
    llm.close()  # a decode of one row is done by other code, which may crash or be wrong on its own
    _compare(np.array(singly), expected[-FEW:], "a token read by itself comes out wrong")
    _check_near_window(path, rounded, tokens)


def _check_near_window(path: Path, weights: Weights, tokens: list[int]) -> None:
    """Attention by distance, of many rows and of one, where this build's graphs allow for it."""
    llm = Llama(path, schedule=NEAR, n_ctx=256, kv="q8_0", n_threads=2, verbose=False)
    if llm.serves_near_windows:
        expected = _losses(weights, tokens, NEAR.bands[0])
        _compare(llm.token_losses(tokens), expected, "attention with a near window comes out wrong")
        llm.rewind(TOTAL - 2)
        one = llm.token_losses(tokens, start=TOTAL - 1)
        _compare(one, expected[-1:], "a token read by itself in a near window comes out wrong")
    llm.close()


def _compare(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], what: str) -> None:
    differences = np.where(np.isfinite(found), np.abs(found - expected), np.inf)
    if differences.mean() > MOST_ON_AVERAGE or differences.max() > MOST_ON_ONE:
        raise Failure(
            f"{what}: losses differ by {differences.mean():.2g} nats per token, at most {differences.max():.2g}"
        )


# --- the model, as a file and in numpy


def _random_tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(3, N_VOCAB, TOTAL)]


def _random_weights() -> Weights:
    """By llama.cpp's names, shape ``(rows, columns)``; scaled so that attention is sharp and depends on position."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int, scale: float) -> Floats:
        return np.asarray(rng.normal(size=(rows, columns)) * scale / np.sqrt(columns), np.float32)

    return {
        "token_embd": matrix(N_VOCAB, N_EMBD, np.sqrt(N_EMBD)),
        "blk.0.attn_norm": np.ones(N_EMBD, np.float32),
        "blk.0.attn_q": matrix(N_HEAD * HEAD, N_EMBD, 1.5),
        "blk.0.attn_k": matrix(N_HEAD_KV * HEAD, N_EMBD, 1.5),
        "blk.0.attn_v": matrix(N_HEAD_KV * HEAD, N_EMBD, 1.0),
        "blk.0.attn_output": matrix(N_EMBD, N_HEAD * HEAD, 2.0),
        "blk.0.ffn_norm": np.ones(N_EMBD, np.float32),
        "blk.0.ffn_gate": matrix(N_FF, N_EMBD, 1.0),
        "blk.0.ffn_up": matrix(N_FF, N_EMBD, 1.0),
        "blk.0.ffn_down": matrix(N_EMBD, N_FF, 1.0),
        "output_norm": np.ones(N_EMBD, np.float32),
        "output": matrix(N_VOCAB, N_EMBD, 2.0),
    }


def _write_model(path: Path, weights: Weights, layer_type: gguf.GGMLQuantizationType) -> Weights:
    """Write a GGUF file, its layer's matrices as `layer_type`; returns the weights as they can be read from it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(BASE)
    write_vocabulary(writer)
    read: Weights = {}
    for name, weight in weights.items():
        kind = layer_type if name.startswith("blk.") and weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        read[name] = np.asarray(gguf.dequantize(data, kind), np.float32).reshape(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def write_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Add the `N_VOCAB` tokens of a vocabulary that llama.cpp loads."""
    special, plain = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    named: list[tuple[str, Any]] = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", special), ("</s>", special)]
    named += [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    named += [(f"w{i}", plain) for i in range(N_VOCAB - len(named))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([name for name, _ in named])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([kind for _, kind in named])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _losses(weights: Mapping[str, Floats], tokens: list[int], band: Band) -> npt.NDArray[np.float64]:
    """Negative log-likelihood (nats) of ``tokens[1:]``, all read in `band`, shape ``(n - 1,)``; in float64."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["token_embd"][tokens]
    h = _norm(x) * w["blk.0.attn_norm"]
    q, k, v = (
        (h @ w[f"blk.0.attn_{name}"].T).reshape(len(tokens), heads, HEAD)
        for name, heads in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV))
    )
    scores = _scores(q, np.repeat(k, N_HEAD // N_HEAD_KV, axis=1), band)
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    attended = np.einsum("hij,jhd->ihd", _softmax(scores), np.repeat(v, N_HEAD // N_HEAD_KV, axis=1))
    x = x + attended.reshape(len(tokens), -1) @ w["blk.0.attn_output"].T
    h = _norm(x) * w["blk.0.ffn_norm"]
    gate = h @ w["blk.0.ffn_gate"].T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w["blk.0.ffn_up"].T)) @ w["blk.0.ffn_down"].T
    logits = (_norm(x) * w["output_norm"]) @ w["output"].T
    likelihoods = _softmax(logits[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
    return np.asarray(-np.log(likelihoods))


def _scores(q: npt.NDArray[np.float64], k: npt.NDArray[np.float64], band: Band) -> npt.NDArray[np.float64]:
    """The scores of raw queries and keys, shape ``(heads, rows, cells)``: near ones as without rescaling."""
    if not band.near_tokens:
        return np.asarray(np.einsum("ihd,jhd->hij", _rotate(q, band), _rotate(k, band)) / np.sqrt(HEAD))
    near = _scores(q, k, Band(context=band.context, rescale_factors=FACTS.start_factors))
    border = band.near_tokens * (1 - 1 / np.array(band.rescale_factors))
    ahead = _rotate(_turned(q, border), band)
    far = np.einsum("ihd,jhd->hij", ahead, _rotate(k, band)) / np.sqrt(HEAD)
    distance = np.arange(len(q))[:, None] - np.arange(len(k))[None]
    return np.where(distance < band.near_tokens, near, far)


def _rotate(x: npt.NDArray[np.float64], band: Band) -> npt.NDArray[np.float64]:
    """Rotate neighbouring pairs, shape ``(positions, heads, HEAD)``: pair i by ``position · base^(-2i/d) / λ_i``."""
    positions = np.arange(len(x))[:, None, None] / np.array(band.rescale_factors)
    return _turned(x, positions) * band.attention_factor


def _turned(x: npt.NDArray[np.float64], positions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rotate neighbouring pairs, each as at a position of its own."""
    angles = positions * BASE ** (-np.arange(HEAD // 2) / (HEAD // 2))
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = np.stack((even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)), -1)
    return np.asarray(rotated.reshape(x.shape))


def _norm(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON))


def _softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))
