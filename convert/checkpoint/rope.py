"""RoPE in a checkpoint's config, and the form in which llama.cpp reads it: keys, and tensors of factors.

The config uses transformers' names (`rope_scaling`, or `rope_parameters` since version 5), and is read as transformers
reads it. Linear and YaRN scaling have a native form in GGUF; Llama 3's and LongRoPE have one for some architectures.
What has none is in our own schedule (see `own_schedule`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType

from ...container import FREQS, LONG, SHORT
from ...container.architectures import NATIVE_FACTOR_ARCHITECTURES
from ...factors import MAX_CONTEXT, longrope_attention_factor
from .architectures import Architecture, head_dim
from .config import Config

YARN_KEYS = (
    ("yarn_ext_factor", ("extrapolation_factor",)),
    ("yarn_attn_factor", ("attention_factor", "attn_factor")),
    ("yarn_beta_fast", ("beta_fast",)),
    ("yarn_beta_slow", ("beta_slow",)),
)
LONGROPE = ("longrope", "su")
KNOWN = ("linear", "yarn", "llama3", "dynamic", "default", *LONGROPE)
READING_FREQS = (MODEL_ARCH.LLAMA, MODEL_ARCH.MINICPM)
"""Architectures whose loader takes a tensor of Llama 3's factors; others refuse a file that has one."""
MAX_FACTOR = 1024
PLAIN_BASE = 10000.0  # llama.cpp's if the file gives none


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return the config's RoPE parameters for layers with full attention, in one form for all versions.

    Raises:
        UserError: they are not a map, or of an unknown type.
    """
    full = _full_attention(config, "rope_parameters")
    scaling = _full_attention(config, "rope_scaling")
    own = dict(scaling or full)  # someone who adds `rope_scaling` to a newer config means it
    kind = own.pop("type", None)
    own["rope_type"] = own.get("rope_type") or kind or "default"
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        for value in (full.get(name), config.get(name)):
            if own.get(name) is None and value is not None:
                own[name] = value
    if config.get("original_max_position_embeddings") is not None:  # this one goes before that among the parameters
        own["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    if own["rope_type"] not in KNOWN:
        raise config.wrong("rope_scaling.rope_type", ", ".join(KNOWN), own["rope_type"])
    return own


def _full_attention(config: Config, name: str) -> Mapping[str, Any]:
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise config.wrong(name, "a map", given)
    full = given.get("full_attention", given)
    if not isinstance(full, Mapping):
        raise config.wrong(f"{name}.full_attention", "a map", full)
    return full


def original_context(config: Config, parameters: Mapping[str, Any]) -> int:
    """The number of tokens that the model was trained for before it was scaled."""
    if parameters.get("original_max_position_embeddings") is None:
        return config.count("max_position_embeddings")
    tokens = _positive(config, parameters, "original_max_position_embeddings")
    if not 1 <= tokens <= MAX_CONTEXT:
        raise config.wrong("original_max_position_embeddings", "a number of tokens", tokens)
    return int(tokens)


def scaling_factor(config: Config, parameters: Mapping[str, Any]) -> float:
    """The factor of YaRN or LongRoPE; without one, the ratio of the contexts.

    Raises:
        UserError: a given one is out of range.
    """
    if parameters.get("factor") is not None:
        return factor_in_range(config, parameters)
    return max(config.count("max_position_embeddings") / original_context(config, parameters), 1.0)


def factor_in_range(config: Config, parameters: Mapping[str, Any]) -> float:
    """The given factor.

    Raises:
        UserError: it is missing, not a number, or out of range.
    """
    factor = config.finite("rope_scaling.factor", parameters.get("factor"))
    if not 1 <= factor <= MAX_FACTOR:
        raise config.wrong("rope_scaling.factor", f"a number from 1 to {MAX_FACTOR}", factor)
    return factor


def scaled_context(config: Config) -> int:
    """The longest context in tokens, which `max_position_embeddings` is not if it was left unscaled (Qwen's recipe).

    Raises:
        UserError: a value that this needs is invalid, or the context is longer than llama.cpp's positions.
    """
    parameters, longest = rope_parameters(config), config.count("max_position_embeddings")
    if parameters["rope_type"] == "yarn" or (parameters["rope_type"] in LONGROPE and parameters.get("factor")):
        factor = scaling_factor(config, parameters)
        scaled = factor * original_context(config, parameters)
        if scaled > MAX_CONTEXT:
            raise config.wrong("rope_scaling.factor", f"a context of at most {MAX_CONTEXT:,} tokens", factor)
        longest = max(longest, int(scaled))
    return longest


def longrope_attention(config: Config, parameters: Mapping[str, Any]) -> float:
    """LongRoPE's attention factor: the given one, or that of the scale, which all bands have."""
    if parameters.get("attention_factor") is not None:
        return _positive(config, parameters, "attention_factor")
    scale, original = scaling_factor(config, parameters), original_context(config, parameters)
    if scale > 1 and original < 2:
        raise config.wrong("original_max_position_embeddings", "at least 2 tokens", original)
    return longrope_attention_factor(scale, original)


def rotary_dimensions(config: Config, parameters: Mapping[str, Any]) -> int:
    """The number of dimensions of a head that are rotated."""
    share = config.finite("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0))
    return int(share * head_dim(config))


def write_rope(writer: GGUFWriter, config: Config, entry: Architecture) -> None:
    """Write RoPE's keys.

    Raises:
        UserError: a value that the scaling needs is missing or not a number.
    """
    parameters = rope_parameters(config)
    plain = parameters["rope_type"] == "default" and parameters.get("rope_theta") in (None, PLAIN_BASE)
    if entry.rope == "phi3":
        _write_phi3(writer, config, parameters)
    elif entry.rope == "common" or not plain:
        _write_scaling(writer, config, parameters, entry)
        if parameters.get("rope_theta") is not None:
            writer.add_rope_freq_base(_positive(config, parameters, "rope_theta"))
        local = _local_theta(config)
        if local is not None:
            writer.add_rope_freq_base_swa(local)


def rope_tensors(config: Config, entry: Architecture) -> dict[str, torch.Tensor]:
    """Return the factors that llama.cpp reads as tensors, float32 of shape (n_rot/2,).

    Raises:
        UserError: factors are invalid, too many or too few.
    """
    parameters = rope_parameters(config)
    if parameters["rope_type"] == "llama3" and entry.arch in READING_FREQS:
        return {FREQS: llama3_factors(config, parameters)}
    if parameters["rope_type"] not in LONGROPE or not _reads_longrope(entry):
        return {}
    short, long = longrope_factors(config, parameters)
    return {LONG: long, SHORT: short}


def _reads_longrope(entry: Architecture) -> bool:
    return MODEL_ARCH_NAMES[entry.arch] in NATIVE_FACTOR_ARCHITECTURES


def longrope_factors(config: Config, parameters: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """LongRoPE's short and long λ, float32 of shape (n_rot/2,).

    Raises:
        UserError: factors are invalid, too many or too few.
    """
    n = rotary_dimensions(config, parameters) // 2
    long = _factors(config, parameters, "long_factor", n)
    return _factors(config, parameters, "short_factor", n), long


def llama3_factors(config: Config, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3's λ: `factor` for pairs that rotate slowly, 1 for fast ones, and a blend for those in between.

    The formula is Meta's (meta-llama/llama-models, apply_scaling), in float32 as in llama.cpp's converter.
    """
    dimensions = head_dim(config)
    base = _positive(config, parameters, "rope_theta", 10000.0)
    factor = _positive(config, parameters, "factor", 8.0)
    low = _positive(config, parameters, "low_freq_factor", 1.0)
    high = _positive(config, parameters, "high_freq_factor", 4.0)
    context = _positive(config, parameters, "original_max_position_embeddings", 8192)
    if not low < high:
        raise config.wrong("rope_scaling.high_freq_factor", f"more than low_freq_factor, {low:g}", high)
    frequencies = 1.0 / (base ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions))
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slow = torch.where(wavelengths > context / low, torch.full_like(between, factor), between)
    return torch.where(wavelengths < context / high, torch.ones_like(between), slow)


def _write_scaling(writer: GGUFWriter, config: Config, parameters: Mapping[str, Any], entry: Architecture) -> None:
    kind, original = parameters["rope_type"], original_context(config, parameters)
    if kind in LONGROPE:
        if _reads_longrope(entry):
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            attention = longrope_attention(config, parameters)
            if attention != 1:
                writer.add_rope_scaling_attn_factors(attention)
        if original < scaled_context(config):
            writer.add_rope_scaling_orig_ctx_len(original)
    elif kind in ("linear", "yarn"):
        _write_factor(writer, config, parameters)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)


def _write_factor(writer: GGUFWriter, config: Config, parameters: Mapping[str, Any]) -> None:
    """Write linear scaling's or YaRN's keys except the original context."""
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_positive(config, parameters, "factor"))
    else:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling_factor(config, parameters))
        for key, names in YARN_KEYS:
            value = next((parameters[name] for name in names if parameters.get(name) is not None), None)
            if value is not None:
                getattr(writer, f"add_rope_scaling_{key}")(config.finite(f"rope_scaling.{names[0]}", value))


def _write_phi3(writer: GGUFWriter, config: Config, parameters: Mapping[str, Any]) -> None:
    writer.add_rope_scaling_orig_ctx_len(original_context(config, parameters))
    writer.add_rope_dimension_count(rotary_dimensions(config, parameters))
    writer.add_rope_freq_base(_positive(config, parameters, "rope_theta"))
    if parameters["rope_type"] in LONGROPE:
        writer.add_rope_scaling_attn_factors(longrope_attention(config, parameters))
    elif parameters["rope_type"] in ("linear", "yarn"):
        _write_factor(writer, config, parameters)


def _local_theta(config: Config) -> float | None:
    """The base of layers with a sliding window, if they have their own (Gemma 3)."""
    given = config.get("rope_parameters")
    if isinstance(given, Mapping) and isinstance(given.get("sliding_attention"), Mapping):
        return config.finite("rope_parameters.sliding_attention", given["sliding_attention"].get("rope_theta"))
    return None if config.get("rope_local_base_freq") is None else config.number("rope_local_base_freq")


def _factors(config: Config, parameters: Mapping[str, Any], name: str, n: int) -> torch.Tensor:
    given = parameters.get(name)
    if not isinstance(given, list) or len(given) != n:
        found = f"{len(given)} numbers" if isinstance(given, list) else given
        raise config.wrong(f"rope_scaling.{name}", f"a list of {n} numbers", found)
    values = [config.finite(f"rope_scaling.{name}", value) for value in given]
    if min(values) <= 0:
        raise config.wrong(f"rope_scaling.{name}", "positive numbers", min(values))
    return torch.tensor(values, dtype=torch.float32)


def _positive(config: Config, parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    given = parameters.get(name)
    value = config.finite(f"rope_scaling.{name}", default if given is None else given)
    if value <= 0:
        raise config.wrong(f"rope_scaling.{name}", "a positive number", value)
    return value
