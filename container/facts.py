"""A GGUF file's RoPE: the model's facts, and the scaling that the file already has, as a schedule.

The rules are those of llama.cpp's loader (llama-model.cpp, `load_hparams`; llama-context.cpp; the files of the
architectures) and of its rope operation (ggml-cpu, `rope_yarn`), so that the native schedule rotates keys as stock
llama.cpp would.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import ValidationError

from ..errors import UserError
from ..factors import (
    MAX_CONTEXT,
    SMALLEST_FACTOR,
    Array,
    Band,
    Provenance,
    RopeFacts,
    Schedule,
    first_mistake,
    native_band,
    yarn,
)
from .architectures import ALPHA_ARCHITECTURES, YARN_BETA_ARCHITECTURES, YARN_LOG_MULTIPLIER, has_rope
from .header import GGUFError, Header
from .kinds import check_is_model
from .tensor_types import TYPE_NUMBERS, type_name

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
SCALING_TYPES = ("none", "linear", "yarn", "longrope")
LARGEST_SETTING = 1e9  # of attention factors and betas, with which powers and logarithms are computed
LARGEST_FACTOR = 1e38  # 1e30 is real: Gemma 4's pairs that do not rotate


def rope_facts(header: Header) -> RopeFacts:
    """Return what a schedule must know about the model in this file.

    Raises:
        UserError: the architecture has no RoPE, or keys are missing or invalid.
    """
    return native_schedule(header).facts


def native_schedule(header: Header) -> Schedule:
    """Return what stock llama.cpp does with this file as a schedule: one band, or two if it has long factors.

    Raises:
        UserError: as for `rope_facts`.
    """
    check_is_model(header)
    try:
        return _native_schedule(header)
    except ValidationError as error:
        raise GGUFError(f"{header.path}: the RoPE scaling of its metadata: {first_mistake(error)}") from None


def _native_schedule(header: Header) -> Schedule:
    arch = header.arch
    if not has_rope(header):
        raise UserError(f"{header.path}: architecture {arch!r} has no RoPE, so there is nothing to rescale")
    n_rot, base = _n_rot(header), _freq_base(header)
    given = _context(header, f"{arch}.context_length")
    scaled, attention = _scaling(header, n_rot, base, given)
    context = max(given, _yarn_context(header))
    freqs = _factor_tensor(header, FREQS, n_rot)
    long, short = (_factor_tensor(header, name, n_rot) for name in (LONG, SHORT))
    original, first = context, scaled
    if freqs is not None:  # llama.cpp prefers these
        first = freqs * scaled
    elif long is not None or short is not None:
        original = min(context, _original_context(header, context))
        first = scaled if short is None else short * scaled
    facts = RopeFacts(
        n_rot=n_rot,
        freq_base=base,
        original_context=original,
        native_factors=() if (first == 1).all() else tuple(first.tolist()),
        native_attention_factor=attention,
    )
    bands = [native_band(facts)]
    if original < context:
        last = scaled if long is None else long * scaled
        bands.append(
            Band(
                context=context,
                rescale_factors=tuple(last.tolist()),
                attention_factor=attention,
                found=Provenance(method="native"),
            )
        )
    return Schedule(facts=facts, bands=tuple(bands))


def _yarn_context(header: Header) -> int:
    """The context up to which YaRN scales; 0 without YaRN, or if the file lacks its original context.

    Where scaling was switched on by Qwen's recipe, the file's `context_length` is still the unscaled one.
    """
    key = f"{header.arch}.rope.scaling.original_context_length"
    if _scaling_type(header) != "yarn" or not header.get(key):
        return 0
    factor = _scaling_factor(header)
    context = factor * _context(header, key)
    if context > MAX_CONTEXT:
        raise GGUFError(
            f"{header.path}: {header.arch}.rope.scaling.factor: {factor:g} times the original context, expected at most"
            f" {MAX_CONTEXT:,} tokens"
        )
    return int(context)


def freq_scale(header: Header) -> float:
    """llama.cpp's `rope_freq_scale` for this file's global layers: one over its scaling factor."""
    return 1.0 if _scaling_type(header) == "none" else 1.0 / _scaling_factor(header)


def plain_context(header: Header) -> int:
    """The context that the model had before it was scaled: the original one if the file gives it, else its own."""
    context = _context(header, f"{header.arch}.context_length")
    return min(context, _original_context(header, context))


# --- single keys


def _positive(header: Header, key: str, default: float) -> float:
    value = header.number(key, default)
    if not 0 < value <= LARGEST_SETTING:
        raise GGUFError(f"{header.path}: {key}: {value:g}, expected a number above 0, and at most {LARGEST_SETTING:g}")
    return value


def _context(header: Header, key: str, default: float | None = None) -> int:
    value = header.number(key, default)
    if not 0 < value < 2**31 or value != int(value):
        raise GGUFError(f"{header.path}: {key}: {value}, expected a number of tokens")
    return int(value)


def _original_context(header: Header, default: int) -> int:
    key = f"{header.arch}.rope.scaling.original_context_length"
    return _context(header, key, default) if header.get(key) != 0 else default


def _n_rot(header: Header) -> int:
    arch = header.arch
    for key in (f"{arch}.rope.dimension_count", f"{arch}.attention.key_length"):
        if key in header.entries:
            n = header.number(key)
            break
    else:
        key = f"{arch}.attention.head_count"
        is_list = key in header.entries and header.entries[key].item_type is not None
        heads = max(header.array(key), default=0) if is_list else header.number(key)
        if not isinstance(heads, (int, float)) or heads < 1:
            raise GGUFError(f"{header.path}: {key}: {heads!r}, expected a number of heads")
        n = header.number(f"{arch}.embedding_length") // heads
    if not 2 <= n <= 1 << 17 or n % 2:
        raise GGUFError(f"{header.path}: {key}: {n} rotary dimensions, expected an even number of at least 2")
    return int(n)


def _freq_base(header: Header) -> float:
    arch = header.arch
    base = header.number(f"{arch}.rope.freq_base", 10000.0)
    if not 1 < base < 1e30:
        raise GGUFError(f"{header.path}: {arch}.rope.freq_base: {base:g}, expected a number above 1")
    alpha = header.number(f"{arch}.rope.scaling.alpha", 0.0)
    if arch in ALPHA_ARCHITECTURES and alpha > 0:
        n = header.number(f"{arch}.attention.key_length", _n_rot(header))
        if not 1 <= alpha <= 1e6 or n < 4:
            raise GGUFError(f"{header.path}: {arch}.rope.scaling.alpha: {alpha:g}, expected a number of at least 1")
        base = float(np.float32(base) * np.float32(alpha) ** np.float32(n / (n - 2)))
    return float(base)


def _scaling_type(header: Header) -> str:
    key = f"{header.arch}.rope.scaling.type"
    kind = header.get(key, "linear")
    if kind not in SCALING_TYPES:
        raise GGUFError(f"{header.path}: {key}: {kind!r}, expected one of {', '.join(SCALING_TYPES)}")
    return str(kind)


def _scaling_factor(header: Header) -> float:
    key = f"{header.arch}.rope.scaling.factor"
    if key not in header.entries:
        key = f"{header.arch}.rope.scale_linear"
    factor = header.number(key, 0.0) or 1.0
    if not SMALLEST_FACTOR <= factor <= 1e9:
        raise GGUFError(f"{header.path}: {key}: {factor:g}, expected a number above 0")
    return factor


# --- scaling


def _scaling(header: Header, n_rot: int, base: float, context: int) -> tuple[Array, float]:
    """Return λ of shape ``(n_rot/2,)`` and the attention factor that result from the scaling keys."""
    scaling, factor = f"{header.arch}.rope.scaling.", 1 / freq_scale(header)
    attention = _positive(header, scaling + "attn_factor", 1.0)
    extrapolation = 1.0 if _scaling_type(header) == "yarn" else 0.0
    if header.arch == "grok":
        given = header.number(scaling + "yarn_ext_factor", -1.0)
        extrapolation = given if given >= 0 else extrapolation
        if not extrapolation:
            attention *= _positive(header, scaling + "yarn_attn_factor", 1.0)
    if not extrapolation:
        return np.full(n_rot // 2, factor), attention
    if factor < 1:
        raise GGUFError(f"{header.path}: {scaling}factor: {factor:g}, expected at least 1 with YaRN")
    fast, slow = 8.0 if header.arch == "grok" else 32.0, 1.0
    if header.arch in YARN_BETA_ARCHITECTURES:
        fast = _positive(header, scaling + "yarn_beta_fast", fast)
        slow = _positive(header, scaling + "yarn_beta_slow", slow)
    blended = yarn(n_rot, factor, base, _original_context(header, context), fast, slow)
    if extrapolation != 1:
        blended = 1 / (1 / factor + min(extrapolation, 1.0) * (1 / blended - 1 / factor))
    return blended, attention * _yarn_attention(header, factor)


def _yarn_attention(header: Header, factor: float) -> float:
    """The scale that llama.cpp applies to rotated vectors under YaRN, beyond its own cancelling terms.

    With a log multiplier m, models are trained with ``(0.1 ln s + 1) / (0.1 m ln s + 1)`` here, and the rest of the
    scale is in their attention; deepseek2 has all of it there.
    """
    plain = 0.1 * math.log(factor) + 1
    multiplier = 0.0
    if header.arch in YARN_LOG_MULTIPLIER:
        multiplier = header.number(f"{header.arch}.rope.scaling.yarn_log_multiplier", 0.0)
        multiplier /= YARN_LOG_MULTIPLIER[header.arch]
    if multiplier == 0:
        return plain
    if header.arch == "deepseek2":
        return 1.0
    divisor = 0.1 * multiplier * math.log(factor) + 1
    if not 1e-3 < divisor < 1e3:
        raise GGUFError(
            f"{header.path}: {header.arch}.rope.scaling.yarn_log_multiplier: {multiplier:g}, expected a small number"
        )
    return plain / divisor


def _factor_tensor(header: Header, name: str, n_rot: int) -> Array | None:
    """Read and check the numbers of a factor tensor; None if the file has none."""
    tensor = header.tensor(name)
    if tensor is None:
        return None
    floats: dict[int, str] = {TYPE_NUMBERS["F32"]: "<f4", TYPE_NUMBERS["F16"]: "<f2"}
    dtype = floats.get(tensor.type)
    half = n_rot // 2
    # step35 stores the factors of its layers with most rotary dimensions; the other layers use the first ones of them
    long_enough = tensor.shape[:1] >= (half,) if header.arch == "step35" else tensor.shape[:1] == (half,)
    if dtype is None or not long_enough or any(n != 1 for n in tensor.shape[1:]):
        raise GGUFError(
            f"{header.path}: tensor {name!r}: {type_name(tensor.type)} of shape {list(tensor.shape)},"
            f" expected F32 of [{half}]"
        )
    with np.errstate(invalid="ignore"):  # NaNs are refused below, without a warning
        numbers = np.frombuffer(header.tensor_data(tensor), dtype=dtype)[:half].astype(np.float64)
    for i, number in enumerate(numbers):
        if not SMALLEST_FACTOR <= number <= LARGEST_FACTOR:
            raise GGUFError(f"{header.path}: tensor {name!r}: element {i} is {number:g}, expected a number above 0")
    return numbers
