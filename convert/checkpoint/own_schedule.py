"""RoPE scaling that llama.cpp's own keys and tensors cannot express, as a schedule in ours.

Dynamic NTK has no native form at all. YaRN has one, but llama.cpp does not read its betas and its attention factor for
most architectures (see `container.facts`), and has no unrounded ramp. Llama 3's and LongRoPE's factors are tensors,
which the loaders of most architectures refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...container import Header, native_schedule
from ...factors import (
    MAX_CONTEXT,
    Band,
    Provenance,
    RopeFacts,
    Schedule,
    doubling_contexts,
    dynamic_ntk,
    native_band,
    yarn,
    yarn_attention_factor,
)
from .config import Config
from .rope import (
    LONGROPE,
    factor_in_range,
    llama3_factors,
    longrope_attention,
    longrope_factors,
    original_context,
    rope_parameters,
    scaling_factor,
)

YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def own_schedule(config: Config, header: Header) -> Schedule | None:
    """The schedule for a checkpoint's scaling; None if the native keys and tensors in `header` express it.

    Raises:
        UserError: a factor is invalid.
    """
    parameters, native = rope_parameters(config), native_schedule(header)
    make = BY_KIND.get(parameters["rope_type"])
    if make is None:
        return None
    schedule = make(config, parameters, native)
    return None if _alike(schedule, native) else schedule


def _alike(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules rotate alike, to float32 precision."""
    if [band.context for band in one.bands] != [band.context for band in other.bands]:
        return False
    ours, theirs = (
        [number for band in schedule.bands for number in (band.attention_factor, *band.rescale_factors)]
        for schedule in (one, other)
    )
    return np.allclose(ours, theirs, rtol=1e-6, atol=0)


def _dynamic(config: Config, parameters: Mapping[str, Any], native: Schedule) -> Schedule:
    """One band for each doubling of the context, with the factors that transformers would use at its end."""
    facts, factor = native.facts, factor_in_range(config, parameters)
    longest = int(factor * native.context)
    if longest > MAX_CONTEXT:
        raise config.wrong("rope_scaling.factor", f"a context of at most {MAX_CONTEXT:,} tokens", factor)
    if longest == native.context:
        return native
    bands = [
        Band(
            context=context,
            rescale_factors=tuple(dynamic_ntk(facts.n_rot, factor, context, facts.original_context).tolist()),
            found=Provenance(method="dynamic-ntk"),
        )
        for context in doubling_contexts(native.context, longest)
    ]
    return Schedule(facts=facts, bands=(*native.bands, *bands))


def _yarn(config: Config, parameters: Mapping[str, Any], native: Schedule) -> Schedule:
    """YaRN as transformers computes it, with all of its settings."""
    facts, factor = native.facts, scaling_factor(config, parameters)
    betas = {name: _given(config, parameters, name, default) for name, default in YARN_DEFAULTS.items()}
    attention = yarn_attention_factor(factor)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        part, whole = (_given(config, parameters, name, 1.0) for name in ("mscale", "mscale_all_dim"))
        attention = yarn_attention_factor(factor, part) / yarn_attention_factor(factor, whole)
    attention = _given(config, parameters, "attention_factor", attention)
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise config.wrong("rope_scaling.truncate", "true or false", truncate)
    original = original_context(config, parameters)
    factors = yarn(facts.n_rot, factor, facts.freq_base, original, **betas, truncate=truncate)
    return _trained(native, factors.tolist(), attention)


def _llama3(config: Config, parameters: Mapping[str, Any], native: Schedule) -> Schedule:
    return _trained(native, llama3_factors(config, parameters).tolist())


def _longrope(config: Config, parameters: Mapping[str, Any], native: Schedule) -> Schedule:
    """The short factors up to the original context, and the long ones beyond it."""
    short, long = longrope_factors(config, parameters)
    attention, original = longrope_attention(config, parameters), original_context(config, parameters)
    first = _trained(native, short.tolist(), attention, min(original, native.context))
    if original >= native.context:
        return first
    last = Band(
        context=native.context,
        rescale_factors=tuple(long.tolist()),
        attention_factor=attention,
        found=Provenance(method="native"),
    )
    return Schedule(facts=first.facts, bands=(*first.bands, last))


def _trained(native: Schedule, factors: list[float], attention: float = 1.0, context: int | None = None) -> Schedule:
    """The schedule of a model that was trained with `factors`; one band, by default up to the model's context."""
    facts = RopeFacts(
        n_rot=native.facts.n_rot,
        freq_base=native.facts.freq_base,
        original_context=context or native.context,
        native_factors=tuple(factors),
        native_attention_factor=attention,
    )
    return Schedule(facts=facts, bands=(native_band(facts),))


BY_KIND: Mapping[str, Callable[[Config, Mapping[str, Any], Schedule], Schedule]] = {
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    **dict.fromkeys(LONGROPE, _longrope),
}


def _given(config: Config, parameters: Mapping[str, Any], name: str, default: float) -> float:
    value = parameters.get(name)
    number = default if value is None else config.finite(f"rope_scaling.{name}", value)
    if number <= 0:
        raise config.wrong(f"rope_scaling.{name}", "a positive number", number)
    return number
