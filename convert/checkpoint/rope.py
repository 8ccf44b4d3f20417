"""RoPE in a checkpoint's config, and the form in which llama.cpp reads it: keys, and tensors of factors.

The config uses transformers' names (`rope_scaling`, or `rope_parameters` since version 5). Linear, YaRN, Llama 3 and
LongRoPE scaling have a native form in GGUF, from which our own schedule is then read; dynamic NTK has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType

from ...container import FREQS, LONG, SHORT
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


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return the config's RoPE parameters for layers with full attention, in one form for all versions.

    Raises:
        UserError: they are not a map, or of an unknown type.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise config.wrong("rope_scaling", "a map", given)
    full = given.get("full_attention", given)
    if not isinstance(full, Mapping):
        raise config.wrong("rope_parameters.full_attention", "a map", full)
    own = dict(full)
    kind = own.pop("type", None)
    own.setdefault("rope_type", kind or "default")
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if own.get(name) is None and config.get(name) is not None:
            own[name] = config.get(name)
    if own["rope_type"] not in KNOWN:
        raise config.wrong("rope_scaling.rope_type", ", ".join(KNOWN), own["rope_type"])
    return own


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
    if entry.rope == "phi3":
        _write_phi3(writer, config, parameters)
    elif entry.rope == "common":
        _write_scaling(writer, config, parameters)
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
    if entry.rope == "none":
        return {}
    parameters = rope_parameters(config)
    if parameters["rope_type"] == "llama3":
        return {FREQS: llama3_factors(config, parameters)}
    if parameters["rope_type"] not in LONGROPE:
        return {}
    n = rotary_dimensions(config, parameters) // 2
    return {
        LONG: _factors(config, parameters, "long_factor", n),
        SHORT: _factors(config, parameters, "short_factor", n),
    }


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


def _write_scaling(writer: GGUFWriter, config: Config, parameters: Mapping[str, Any]) -> None:
    kind = parameters["rope_type"]
    if kind in LONGROPE:
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(_positive(config, parameters, "factor"))
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(
            config.count("max_position_embeddings")
            if original is None
            else int(_positive(config, parameters, "original_max_position_embeddings"))
        )
        for key, names in YARN_KEYS:
            value = next((parameters[name] for name in names if parameters.get(name) is not None), None)
            if value is not None:
                getattr(writer, f"add_rope_scaling_{key}")(config.finite(f"rope_scaling.{names[0]}", value))


def _write_phi3(writer: GGUFWriter, config: Config, parameters: Mapping[str, Any]) -> None:
    original = int(_positive(config, parameters, "original_max_position_embeddings"))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(rotary_dimensions(config, parameters))
    writer.add_rope_freq_base(_positive(config, parameters, "rope_theta"))
    if parameters["rope_type"] in LONGROPE:
        scale = config.count("max_position_embeddings") / original
        # LongRoPE, arXiv 2402.13753, section 3.3; as in transformers' Phi-3.
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(factor)


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
