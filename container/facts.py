"""What a GGUF file says of its RoPE: the model's facts, and what it already does beyond plain RoPE, as a schedule.

The rules are those of llama.cpp's loader (llama-model.cpp, `load_hparams`; llama-context.cpp) and of its rope
operation (ggml-cpu, `rope_yarn`), so that the native schedule turns keys as stock llama.cpp would.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from ..errors import UserError
from ..factors import Band, Provenance, RopeFacts, Schedule, native_band, yarn
from .header import GGUFError, Header, Tensor

ARCHITECTURES_WITHOUT_ROPE = frozenset(
    "arwkv7 bert bloom clip glm5-next gpt2 gptj jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba mamba2 mpt"
    " nemotron_h nemotron_h_moe refact rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder wavtokenizer-dec".split()
)
"""Those for which llama.cpp's `llama_model_rope_type` says none, and those with learned absolute positions."""

NATIVE_FACTOR_ARCHITECTURES = frozenset(
    "apertus deci granite granite_swa granitemoe llama llama-embed minicpm minicpm3 mistral3 pangu-embedded phi3"
    " phimoe step35".split()
)
"""Those whose loader in llama.cpp takes `rope_factors_long/short`; others refuse a file with tensors they do not know."""

DEEPSEEK = frozenset({"deepseek2", "deepseek32", "glm-dsa", "mistral4"})  # their YaRN log multiplier is stored × 0.1


def rope_facts(header: Header) -> RopeFacts:
    """What a schedule must know of the model in this file.

    Raises:
        UserError: an architecture without RoPE, or keys that are missing or make no sense.
    """
    return native_schedule(header).facts


def native_schedule(header: Header) -> Schedule:
    """What stock llama.cpp does with this file, as a schedule: one band, or two where it carries long factors.

    Raises:
        UserError: as for `rope_facts`.
    """
    arch = header.arch
    if arch in ARCHITECTURES_WITHOUT_ROPE:
        raise UserError(f"{header.path}: architecture {arch!r} has no RoPE, so there is nothing to rescale")
    n_rot, base = _n_rot(header), _freq_base(header)
    context = _context(header, f"{arch}.context_length")
    plain = _scaling(header, n_rot, base, context)
    attention = header.number(f"{arch}.rope.scaling.attn_factor", 1.0) or 1.0
    kind = header.get(f"{arch}.rope.scaling.type")
    long, short = header.tensor("rope_factors_long.weight"), header.tensor("rope_factors_short.weight")
    if long and short and kind == "longrope":
        original = _context(header, f"{arch}.rope.scaling.original_context_length")
        first, last = (_factors(header, tensor, n_rot) * plain for tensor in (short, long))
        if original >= context:
            return Schedule(
                facts=_facts(n_rot, base, context, first, attention),
                bands=(native_band(_facts(n_rot, base, context, first, attention)),),
            )
        facts = _facts(n_rot, base, original, first, attention)
        band = Band(
            context=context,
            rescale_factors=tuple(last.tolist()),
            attention_factor=attention,
            found=Provenance(method="native"),
        )
        return Schedule(facts=facts, bands=(native_band(facts), band))
    freqs = header.tensor("rope_freqs.weight")
    if freqs:
        plain = plain * _factors(header, freqs, n_rot)
    if kind == "yarn":
        attention *= _yarn_attention(header)
    facts = _facts(n_rot, base, context, plain, attention)
    return Schedule(facts=facts, bands=(native_band(facts),))


def freq_scale(header: Header) -> float:
    """llama.cpp's `rope_freq_scale` for this file's global layers: one over its scaling factor."""
    factor = _factor(header)
    return 1.0 if header.get(f"{header.arch}.rope.scaling.type") == "none" else 1.0 / factor


def _facts(n_rot: int, base: float, context: int, factors: npt.NDArray[np.float64], attention: float) -> RopeFacts:
    own = () if (factors == 1).all() else tuple(factors.tolist())
    return RopeFacts(
        n_rot=n_rot,
        freq_base=base,
        original_context=context,
        native_factors=own,
        native_attention_factor=attention,
    )


def _context(header: Header, key: str) -> int:
    value = header.number(key)
    if not 0 < value < 2**31 or value != int(value):
        raise GGUFError(f"{header.path}: {key}: {value}, expected a number of tokens")
    return int(value)


def _n_rot(header: Header) -> int:
    arch = header.arch
    heads = header.get(f"{arch}.attention.head_count")
    if heads is None and f"{arch}.attention.head_count" in header.entries:
        heads = max(header.array(f"{arch}.attention.head_count"), default=0)
    n = header.get(f"{arch}.rope.dimension_count") or header.get(f"{arch}.attention.key_length")
    if n is None and heads:
        n = header.number(f"{arch}.embedding_length") // heads
    if not isinstance(n, (int, float)) or not 2 <= n <= 1 << 17 or n % 2:
        raise GGUFError(f"{header.path}: {arch}.rope.dimension_count: {n!r}, expected an even number")
    return int(n)


def _freq_base(header: Header) -> float:
    arch = header.arch
    base = header.number(f"{arch}.rope.freq_base", 10000.0)
    alpha = header.number(f"{arch}.rope.scaling.alpha", 0.0)
    if alpha > 0 and arch.startswith("hunyuan"):  # an NTK-aware base, worked out by the loader
        n = header.number(f"{arch}.attention.key_length", _n_rot(header))
        base = float(np.float32(np.float32(base) * np.float32(alpha) ** np.float32(n / (n - 2))))
    if base <= 0:
        raise GGUFError(f"{header.path}: {arch}.rope.freq_base: {base}, expected a number above 0")
    return float(base)


def _factor(header: Header) -> float:
    arch = header.arch
    factor = header.number(f"{arch}.rope.scaling.factor", header.number(f"{arch}.rope.scale_linear", 0.0))
    if factor < 0:
        raise GGUFError(f"{header.path}: {arch}.rope.scaling.factor: {factor}, expected a number above 0")
    return factor or 1.0


def _scaling(header: Header, n_rot: int, base: float, context: int) -> npt.NDArray[np.float64]:
    """λ that the scaling keys amount to, shape ``(n_rot/2,)``."""
    arch, factor = header.arch, 1 / freq_scale(header)
    if header.get(f"{arch}.rope.scaling.type") != "yarn":
        return np.full(n_rot // 2, factor)
    original = int(header.number(f"{arch}.rope.scaling.original_context_length", context)) or context
    fast = header.number(f"{arch}.rope.scaling.yarn_beta_fast", 8.0 if arch == "grok" else 32.0)
    slow = header.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0)
    return yarn(n_rot, max(factor, 1.0), base, original, fast, slow)


def _yarn_attention(header: Header) -> float:
    """The scale that llama.cpp gives rotated vectors under YaRN, past its own cancelling terms."""
    arch, factor = header.arch, _factor(header)
    if factor <= 1:
        return 1.0
    log_multiplier = header.number(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0)
    if not log_multiplier:
        return 0.1 * math.log(factor) + 1
    if arch in DEEPSEEK:
        log_multiplier /= 0.1
    above = log_multiplier if arch == "deepseek2" else 1.0
    return (0.1 * above * math.log(factor) + 1) / (0.1 * log_multiplier * math.log(factor) + 1)


def _factors(header: Header, tensor: Tensor, n_rot: int) -> npt.NDArray[np.float64]:
    """The numbers of a factor tensor, checked."""
    kinds = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
    form = kinds.get(GGMLQuantizationType(tensor.type))
    if form is None or tensor.shape != (n_rot // 2,):
        raise GGUFError(
            f"{header.path}: tensor {tensor.name!r}: {GGMLQuantizationType(tensor.type).name} of shape"
            f" {list(tensor.shape)}, expected F32 of [{n_rot // 2}]"
        )
    with header.path.open("rb") as file:
        file.seek(header.data_start + tensor.offset)
        numbers = np.frombuffer(file.read(tensor.n_bytes), dtype=form).astype(np.float64)
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise GGUFError(f"{header.path}: tensor {tensor.name!r}: not all finite and above 0")
    return numbers
