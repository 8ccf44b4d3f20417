"""RoPE scaling that llama.cpp's own keys cannot express, as a schedule in ours.

Dynamic NTK has no native form at all. YaRN has one, but llama.cpp does not read its betas and its attention factor for
most architectures (see `container.facts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ...container import Header, native_schedule
from ...errors import UserError
from ...factors import (
    Band,
    Provenance,
    RopeFacts,
    Schedule,
    doubling_contexts,
    dynamic_ntk,
    first_mistake,
    native_band,
    yarn,
    yarn_attention_factor,
)
from .config import Config
from .rope import rope_parameters

MAX_FACTOR = 1024
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def own_schedule(config: Config, header: Header) -> Schedule | None:
    """The schedule for a checkpoint's scaling; None if the native keys in `header` express it.

    Raises:
        UserError: a factor is invalid.
    """
    parameters = rope_parameters(config)
    build = {"dynamic": _dynamic, "yarn": _yarn}.get(parameters["rope_type"])
    try:
        return None if build is None else build(config, parameters, native_schedule(header))
    except ValidationError as error:
        raise UserError(f"{config.path}: rope_scaling: {first_mistake(error)}") from None


def _dynamic(config: Config, parameters: Mapping[str, Any], native: Schedule) -> Schedule:
    """One band for each doubling of the context, with the factors that transformers would use at its end."""
    facts, factor = native.facts, _factor(config, parameters)
    if factor == 1:
        return native
    bands = [
        Band(
            context=context,
            rescale_factors=tuple(dynamic_ntk(facts.n_rot, factor, context, facts.original_context).tolist()),
            found=Provenance(method="dynamic-ntk"),
        )
        for context in doubling_contexts(native.context, int(factor * native.context))
    ]
    return Schedule(facts=facts, bands=(*native.bands, *bands))


def _yarn(config: Config, parameters: Mapping[str, Any], native: Schedule) -> Schedule | None:
    """YaRN with its own betas or attention factor; None if they are those of llama.cpp."""
    facts, factor = native.facts, _factor(config, parameters)
    betas = {name: _given(config, parameters, name, default) for name, default in YARN_DEFAULTS.items()}
    usual = yarn_attention_factor(factor)
    attention = _given(config, parameters, "attention_factor", usual)
    original = parameters.get("original_max_position_embeddings") or config.count("max_position_embeddings")
    length = int(config.finite("rope_scaling.original_max_position_embeddings", original))
    factors = tuple(yarn(facts.n_rot, factor, facts.freq_base, length, **betas).tolist())
    own = RopeFacts(
        n_rot=facts.n_rot,
        freq_base=facts.freq_base,
        original_context=facts.original_context,
        native_factors=factors,
        native_attention_factor=attention,
    )
    if betas == YARN_DEFAULTS and attention == usual:
        return None
    return Schedule(facts=own, bands=(native_band(own),))


def _factor(config: Config, parameters: Mapping[str, Any]) -> float:
    factor = config.finite("rope_scaling.factor", parameters.get("factor"))
    if not 1 <= factor <= MAX_FACTOR:
        raise config.wrong("rope_scaling.factor", f"a number from 1 to {MAX_FACTOR}", factor)
    return factor


def _given(config: Config, parameters: Mapping[str, Any], name: str, default: float) -> float:
    value = parameters.get(name)
    number = default if value is None else config.finite(f"rope_scaling.{name}", value)
    if number <= 0:
        raise config.wrong(f"rope_scaling.{name}", "a positive number", number)
    return number
